//! What is planned, and what is refused before anything is fetched.

use super::*;
use crate::{
    detect::tests::{NOW, Stage},
    upgrade::story,
};

fn instance(durability: u32) -> Instance {
    Instance {
        durability,
        ..story::instance()
    }
}

fn options(to: &str) -> Options {
    Options {
        to: parse_name(to).unwrap(),
        bake_ms: BAKE_MS,
        canary_shards: 1,
        parallel_shards: 0,
        finalize_by_operator: false,
        preserve_roles: false,
        in_window: false,
        allow_downtime: false,
        automatic: false,
        method: Method::InPlace,
        max_hold_ms: crate::upgrade::HOLD_MS,
    }
}

fn stage() -> Stage {
    let mut stage = Stage::new();
    for node in stage.fleet.nodes.values_mut() {
        node.version = "7.0.15".into();
    }
    stage
}

fn planned(stage: &Stage, durability: u32, options: &Options) -> Result<Planned, Refusal> {
    let shards = [stage.shard.clone()];
    plan(&instance(durability), &shards, &stage.fleet, options, NOW)
}

fn reason(stage: &Stage, durability: u32, options: &Options) -> &'static str {
    planned(stage, durability, options).unwrap_err().reason
}

#[test]
fn a_plan_names_every_node_with_what_it_runs_and_says_that_nothing_leads_back() {
    let planned = planned(&stage(), 1, &options("redis-8.2.3")).unwrap();
    assert_eq!(planned.upgrade.parallel_shards, 1);
    let part = &planned.upgrade.shards[0];
    assert!(
        part.nodes
            .iter()
            .all(|n| n.from_version == "7.0.15" && !n.staged)
    );
    let said = planned.remarks.join("; ");
    assert!(
        said.contains("nothing leads back") && said.contains("60 s"),
        "{said}"
    );
    let patch = self::planned(&stage(), 0, &options("redis-7.0.16")).unwrap();
    assert!(patch.remarks.join("; ").contains("could still load"));
}

#[test]
fn what_would_lose_data_or_make_clients_wait_is_refused() {
    let to = options("redis-8.2.3");
    let mut stage = stage();
    assert_eq!(
        reason(&stage, 0, &options("redis-6.2.14")),
        "UPGRADE_REFUSED"
    );
    assert_eq!(reason(&stage, 2, &to), "WRITES_WOULD_WAIT");
    let agreed = Options {
        allow_downtime: true,
        ..to.clone()
    };
    assert!(planned(&stage, 2, &agreed).is_ok());
    let long = Options {
        bake_ms: BAKE_MS_MAX + 1,
        ..to.clone()
    };
    assert_eq!(reason(&stage, 0, &long), "UPGRADE_INVALID");
    stage.node("b").version = String::new();
    assert_eq!(reason(&stage, 0, &to), "VERSION_UNKNOWN");
    stage.node("b").version = "7.4.1".into();
    assert_eq!(
        reason(&stage, 0, &options("redis-7.0.16")),
        "UPGRADE_REFUSED"
    );
    for replica in ["b", "c"] {
        stage.member(replica).priority = 0;
    }
    assert_eq!(reason(&stage, 0, &to), "NO_CANDIDATE");
    stage.shard.members.truncate(1);
    assert_eq!(reason(&stage, 0, &agreed), "NO_REPLICA");
    let refused = planned(&stage, 0, &agreed).unwrap_err();
    assert!(refused.message.contains("allow_downtime"), "{refused}");
}

#[test]
fn what_runs_it_already_is_left_alone() {
    let mut stage = stage();
    for member in &mut stage.shard.members {
        member.engine = "redis-7.0.15".into();
    }
    let planned = planned(&stage, 2, &options("redis-7.0.15")).unwrap();
    assert!(planned.nothing_to_do);
    assert_eq!(planned.upgrade.shards[0].phase, UpgradePhase::Done);
}
