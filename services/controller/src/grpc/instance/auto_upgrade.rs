//! ModifyInstanceAutoUpgrade: whether patches are installed by themselves, and what would be next.
//!
//! Invariant: it is not said to be on where it could not do anything: without a maintenance window.

use prost::Message as _;
use slotmesh_proto::{instance::v1 as api, store::v1::ReleaseLevel};
use slotmesh_task::{
    admit::RefusalKind,
    auto::{self, Scene, Verdict},
    upgrade,
};
use slotmesh_topology::{
    Instance,
    artifact::{Artifact, Level},
    compatibility, wire,
};
use tonic::Status;
use tracing::info;

use super::{ADMIT_TRIES, Instances, busy, change::revision_of};
use crate::{
    clock,
    grpc::{refuse, token::Token},
};

impl Instances {
    pub(super) async fn change_auto_upgrade(
        &self,
        request: api::ModifyInstanceAutoUpgradeRequest,
    ) -> Result<u64, Status> {
        let body = api::ModifyInstanceAutoUpgradeRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let method = "ModifyInstanceAutoUpgrade";
        let token = Token::of(&request.client_token, method, &body.encode_to_vec())?;
        if let Some(earlier) = token.earlier(&self.context).await? {
            return Ok(revision_of(&earlier));
        }
        let level = level(request.level)?;
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            let (instance, revision) = self.instance(&request.instance_id)?;
            if level.is_some() && instance.maintenance_window.is_empty() {
                return Err(no_window(&instance));
            }
            let next = Instance {
                auto_upgrade: level,
                ..instance.clone()
            };
            let replaced = self.replace(term, &instance, revision, &next, &token);
            if let Some(revision) = replaced.await? {
                let level = level.map_or("off", Level::name);
                info!(instance = %next.id, level, "upgrades by themselves changed");
                return Ok(revision);
            }
        }
        Err(busy())
    }

    /// What would be installed next, and what it waits for.
    pub(super) fn next_auto_upgrade(
        &self,
        instance: &Instance,
        listed: &[Artifact],
    ) -> (String, String) {
        let shards = self.plain_shards(instance);
        let engines = self.context.hub.read(|fleet| auto::engines(&shards, fleet));
        let verdict = self.context.mirror.read(|state| {
            let tasks: Vec<_> = state.tasks.values().map(|t| &t.value).collect();
            let instances: Vec<_> = state.instances.values().map(|i| &i.value).collect();
            let scene = Scene {
                listed,
                instances: &instances,
                tasks: &tasks,
                at_a_time: self.context.auto_upgrades,
                now_ms: clock::now_ms(),
                // Of the leader's own clock when it is asked.
                rests_ms: self.context.jumps.look(),
            };
            auto::judge(instance, engines.as_deref(), scene)
        });
        match verdict {
            Verdict::Off => (String::new(), String::new()),
            Verdict::Wait { next, why } => {
                let next = next.map(compatibility::name).unwrap_or_default();
                (next, why)
            }
            Verdict::Due { to, .. } => {
                let options = auto::options(to);
                let planned = self.context.hub.read(|fleet| {
                    upgrade::plan(instance, &shards, fleet, &options, clock::now_ms())
                });
                let why = match planned {
                    Ok(_) => "it is about to begin".into(),
                    // As an operator would be told; it is tried again while the window is open.
                    Err(refusal) => refusal.message,
                };
                (compatibility::name(to), why)
            }
        }
    }
}

/// `None`: off.
#[allow(clippy::result_large_err)]
fn level(given: i32) -> Result<Option<Level>, Status> {
    match ReleaseLevel::try_from(given) {
        Ok(level) => Ok(wire::artifact::level_from(level)),
        Err(_) => Err(refuse(
            RefusalKind::Invalid,
            "LEVEL_INVALID",
            "level is LOW, MEDIUM or HIGH; without one nothing is installed by itself",
        )),
    }
}

fn no_window(instance: &Instance) -> Status {
    refuse(
        RefusalKind::Precondition,
        "NO_MAINTENANCE_WINDOW",
        format!(
            "instance {} has no maintenance window, and patches are installed by themselves only in \
             one: set it first (slotmesh instance maintain {} --window HH:MM-HH:MM)",
            instance.id, instance.id
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_is_none_is_refused_and_none_at_all_is_off() {
        assert_eq!(level(ReleaseLevel::Unspecified.into()).unwrap(), None);
        assert_eq!(level(ReleaseLevel::High.into()).unwrap(), Some(Level::High));
        assert_eq!(level(9).unwrap_err().code(), tonic::Code::InvalidArgument);
    }
}
