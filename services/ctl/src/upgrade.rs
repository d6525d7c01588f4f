//! `slotmesh upgrade`: another engine for an instance's nodes; the plan before, progress while it runs.
//!
//! Invariant: what is shown as the plan is what the controller admits: it plans once more, and refuses
//! what it does not allow by then.

use clap::{Args, ValueEnum};
use serde::Serialize;
use slotmesh_proto::instance::v1 as api;

use crate::{
    api::Api,
    command::StartArgs,
    failure::Failure,
    operate::started,
    render::{self, Output, Text, show, table},
};

/// When shards begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WhenArg {
    /// As soon as every host has tried the engine.
    Now,
    /// In the instance's maintenance windows; hosts try the engine at once.
    Window,
}

/// Who ends the time in which one can go back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FinalizeArg {
    /// The clock.
    Auto,
    /// `slotmesh task resolve TASK finalize`.
    Operator,
}

/// How nodes get the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    /// In place; through a new node where a shard has but one.
    Auto,
    /// Where they are, one after the other.
    InPlace,
    /// New nodes on other hosts take their places.
    CrossHost,
}

/// Arguments of `upgrade`.
#[derive(Debug, Clone, Args)]
pub struct UpgradeArgs {
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    /// A listed version, such as 8.2.3, or an artifact's name, such as valkey-8.0.1; latest: the newest
    /// patch of the release that the nodes run.
    #[arg(long, value_name = "VERSION", default_value = "latest")]
    pub to: String,
    #[arg(long, value_enum, default_value_t = WhenArg::Now)]
    pub at: WhenArg,
    #[arg(long, value_enum, default_value_t = MethodArg::Auto)]
    pub method: MethodArg,
    /// Shows what would be done, and does nothing.
    #[arg(long)]
    pub plan: bool,
    /// Seconds after each switch in which one can go back (slotmesh task cancel) [default: 60].
    #[arg(long, value_name = "SECONDS")]
    pub bake: Option<u32>,
    /// Shards that come first and are waited for [default: 1].
    #[arg(long, value_name = "N")]
    pub canary: Option<u32>,
    /// Shards under way at a time after those.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub parallel: u32,
    #[arg(long, value_enum, default_value_t = FinalizeArg::Auto)]
    pub finalize: FinalizeArg,
    /// Makes the old primaries primaries again in the end.
    #[arg(long)]
    pub preserve_roles: bool,
    /// Also where writes have to wait for a replica that restarts.
    #[arg(long)]
    pub allow_downtime: bool,
    /// Milliseconds; a switch that holds commands for longer pauses the upgrade before the next shard;
    /// 0: none does [default: 1000].
    #[arg(long, value_name = "MS")]
    pub max_hold: Option<u32>,
    #[command(flatten)]
    pub start: StartArgs,
}

#[derive(Debug, Clone, Serialize)]
struct PlanView {
    engine: String,
    begins_at: String,
    shards: Vec<ShardPlanView>,
    remarks: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
struct ShardPlanView {
    shard: String,
    canary: bool,
    nothing_to_do: bool,
    moved: bool,
    nodes: Vec<NodePlanView>,
}

#[derive(Debug, Clone, Serialize)]
struct NodePlanView {
    node: String,
    host: String,
    version: String,
    primary: bool,
}

/// Upgrades, or shows how that would be done.
///
/// # Errors
/// As the controller answered; [`Failure::TaskEnded`] when a task was waited for in vain.
pub async fn on_upgrade(api: &mut Api, args: UpgradeArgs, output: Output) -> Result<(), Failure> {
    let request = api::ModifyInstanceMinorVersionRequest {
        plan_only: args.plan,
        client_token: Api::token(args.start.client_token.clone()),
        ..request(&args)
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.instances().modify_instance_minor_version(request).await }
        })
        .await?;
    let plan = answer.plan.map(PlanView::from);
    if answer.task_id.is_empty() {
        return match plan {
            Some(plan) => Ok(show(output, &plan)?),
            None => Ok(()),
        };
    }
    if let Some(plan) = plan.filter(|_| output == Output::Text) {
        render::note(plan.text().trim_end());
    }
    started(
        api,
        None,
        answer.task_id,
        "upgrade",
        args.start.wait,
        output,
    )
    .await
}

fn request(args: &UpgradeArgs) -> api::ModifyInstanceMinorVersionRequest {
    api::ModifyInstanceMinorVersionRequest {
        instance_id: args.instance.clone(),
        minor_version: match args.to.as_str() {
            "latest" => String::new(),
            version => version.to_owned(),
        },
        effective_time: match args.at {
            WhenArg::Now => api::EffectiveTime::Immediately,
            WhenArg::Window => api::EffectiveTime::MaintainTime,
        }
        .into(),
        method: match args.method {
            MethodArg::Auto => api::UpgradeMethod::Auto,
            MethodArg::InPlace => api::UpgradeMethod::InPlace,
            MethodArg::CrossHost => api::UpgradeMethod::CrossHost,
        }
        .into(),
        bake_seconds: args.bake,
        canary_shards: args.canary,
        parallel_shards: args.parallel,
        finalize: match args.finalize {
            FinalizeArg::Auto => api::FinalizeBy::Auto,
            FinalizeArg::Operator => api::FinalizeBy::Operator,
        }
        .into(),
        preserve_roles: args.preserve_roles,
        allow_downtime: args.allow_downtime,
        max_hold_ms: args.max_hold,
        ..api::ModifyInstanceMinorVersionRequest::default()
    }
}

impl From<api::UpgradePlan> for PlanView {
    fn from(from: api::UpgradePlan) -> Self {
        let node = |n: api::NodePlan| NodePlanView {
            node: n.node_id,
            host: n.host_id,
            version: n.version,
            primary: n.primary,
        };
        let shard = |s: api::ShardPlan| ShardPlanView {
            shard: s.shard_id,
            canary: s.canary,
            nothing_to_do: s.nothing_to_do,
            moved: s.moved,
            nodes: s.nodes.into_iter().map(node).collect(),
        };
        Self {
            engine: from.engine,
            begins_at: from.begins_at,
            shards: from.shards.into_iter().map(shard).collect(),
            remarks: from.remarks,
        }
    }
}

impl Text for PlanView {
    fn text(&self) -> String {
        if self.shards.iter().all(|s| s.nothing_to_do) {
            return format!(
                "every node runs {} already; nothing to do (slotmesh version lists what else it may be \
                 given)\n",
                self.engine
            );
        }
        let begins = match self.begins_at.as_str() {
            "" => "once every host has tried it".to_owned(),
            at => format!("at {at}, once every host has tried it"),
        };
        let head = format!("to {}, {begins}\n", self.engine);
        let rows = self.shards.iter().enumerate().flat_map(|(index, shard)| {
            let nodes = shard.nodes.iter().map(move |n| {
                let what = match (shard.nothing_to_do, shard.moved, n.primary) {
                    (true, ..) => "nothing to do",
                    (_, true, _) => "a new node takes its place, it leaves after the bake",
                    (_, _, true) => "last, after the switch and the bake",
                    (_, _, false) => "exchanged in its turn",
                };
                let order = match shard.canary {
                    true => format!("{} (canary)", index + 1),
                    false => (index + 1).to_string(),
                };
                [
                    order,
                    shard.shard.clone(),
                    n.node.clone(),
                    n.host.clone(),
                    n.version.clone(),
                    what.to_owned(),
                ]
            });
            nodes.collect::<Vec<_>>()
        });
        let rows = table(["ORDER", "SHARD", "NODE", "HOST", "RUNS", "WHAT"], rows);
        let remarks: String = self.remarks.iter().map(|r| format!("- {r}\n")).collect();
        format!("{head}\n{rows}\n{remarks}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(nothing_to_do: bool) -> PlanView {
        PlanView::from(api::UpgradePlan {
            engine: "redis-8.2.3".into(),
            shards: vec![api::ShardPlan {
                shard_id: "0".into(),
                nodes: vec![
                    api::NodePlan {
                        node_id: "r-0-1".into(),
                        host_id: "h2".into(),
                        version: "7.0.15".into(),
                        primary: false,
                    },
                    api::NodePlan {
                        node_id: "r-0-0".into(),
                        host_id: "h1".into(),
                        version: "7.0.15".into(),
                        primary: true,
                    },
                ],
                canary: true,
                nothing_to_do,
                moved: false,
            }],
            remarks: vec!["afterwards nothing leads back".into()],
            begins_at: String::new(),
        })
    }

    #[test]
    fn a_plan_shows_each_node_in_its_order_and_what_to_know_before() {
        let text = plan(false).text();
        for part in [
            "redis-8.2.3",
            "1 (canary)",
            "r-0-1",
            "last, after the switch",
            "- afterwards",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(
            text.find("r-0-1") < text.find("r-0-0"),
            "the primary comes last"
        );
        assert!(plan(true).text().contains("nothing to do"));
    }
}
