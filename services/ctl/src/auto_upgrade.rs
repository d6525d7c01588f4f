//! `slotmesh instance auto-upgrade`: whether patches of an instance's engine are installed by themselves.

use clap::{Args, ValueEnum};
use slotmesh_proto::{instance::v1 as api, store::v1::ReleaseLevel};

use crate::{api::Api, failure::Failure, render::Output, version};

/// What is to be installed by itself.
#[derive(Debug, Clone, Args)]
pub struct AutoUpgradeArgs {
    #[arg(value_name = "INSTANCE")]
    instance: String,
    /// Patches of this level or above, in the maintenance window.
    #[arg(long, value_enum)]
    level: LevelArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LevelArg {
    /// None.
    Off,
    /// Every patch.
    Low,
    /// Recommended and important ones.
    Medium,
    /// Important ones only.
    High,
}

/// Sets it, and shows what the instance runs and what is installed next.
///
/// # Errors
/// As the controller answered.
pub async fn on_auto_upgrade(
    api: &mut Api,
    args: AutoUpgradeArgs,
    output: Output,
) -> Result<(), Failure> {
    let level = match args.level {
        LevelArg::Off => ReleaseLevel::Unspecified,
        LevelArg::Low => ReleaseLevel::Low,
        LevelArg::Medium => ReleaseLevel::Medium,
        LevelArg::High => ReleaseLevel::High,
    };
    let request = api::ModifyInstanceAutoUpgradeRequest {
        instance_id: args.instance.clone(),
        level: level.into(),
        client_token: Api::token(None),
    };
    api.call(|api| {
        let request = request.clone();
        async move { api.instances().modify_instance_auto_upgrade(request).await }
    })
    .await?;
    version::on_version(api, args.instance, output).await
}
