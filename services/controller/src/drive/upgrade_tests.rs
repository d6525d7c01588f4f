//! An upgrade in the records: what the leader writes for it, and when.

use slotmesh_proto::{agent::v1 as agent, store::v1 as records};
use slotmesh_task::{Spec, State as TaskState, upgrade::UpgradePhase};
use slotmesh_topology::{Exchange, compatibility};

use super::super::{Next, desk::Desk};

const NEW: &str = "redis-8.2.3";

fn part(phase: records::UpgradePhase) -> records::ShardUpgrade {
    let node = |id: &str| records::NodeUpgrade {
        node_id: id.into(),
        from_version: "7.0.15".into(),
        staged: true,
        ..records::NodeUpgrade::default()
    };
    records::ShardUpgrade {
        shard_id: "0".into(),
        phase: phase.into(),
        phase_since_unix_ms: 1,
        nodes: vec![node("a"), node("b")],
        ..records::ShardUpgrade::default()
    }
}

async fn desk(phase: records::UpgradePhase) -> Desk {
    let spec = records::UpgradeSpec {
        engine: NEW.into(),
        parallel_shards: 1,
        shards: vec![part(phase)],
        ..records::UpgradeSpec::default()
    };
    let task = records::TaskRecord {
        spec: Some(records::task_record::Spec::Upgrade(spec)),
        state: records::TaskState::Running.into(),
        deadline_unix_ms: u64::MAX,
        ..records::TaskRecord::default()
    };
    let serving = records::shard_record::Mode::Serving(records::Serving {});
    let running = records::InstanceState::Running;
    Desk::with(&["a", "b"], serving, running, task).await
}

/// Lets the leader act until it has to wait; says what the shard's record has then.
async fn act(desk: &mut Desk) -> (Option<String>, Vec<(String, Option<Exchange>, bool)>) {
    for _ in 0..20 {
        let task = desk.task();
        if task.value.state.is_ended() {
            break;
        }
        let next = desk.driver.act(&task, true).await.unwrap();
        if next != Next::Again {
            break;
        }
    }
    desk.driver.mirror.read(|s| {
        let shard = &s.shards.values().next().unwrap().value;
        let members = shard.members.iter();
        let members = members.map(|m| (m.engine.clone(), m.exchange, m.in_sync));
        let owner = s.locks.values().next().map(ToString::to_string);
        (owner, members.collect())
    })
}

#[tokio::test]
async fn a_shard_whose_turn_has_come_is_taken_and_its_replica_is_named_first() {
    let mut desk = desk(records::UpgradePhase::Ready).await;
    let (owner, members) = act(&mut desk).await;
    assert_eq!(owner.as_deref(), Some("t"));
    assert_eq!(members[0], (String::new(), None, true), "the primary");
    assert_eq!(members[1], (NEW.to_owned(), Some(Exchange::Keep), false));
    let held_back = desk.instance().unwrap().held_back;
    let held_back = held_back.map(compatibility::name);
    assert_eq!(held_back.as_deref(), Some("redis-7.0.15"), "by then");
    // Its agent has done it.
    desk.report(agent::NodeReport {
        node_id: "b".into(),
        state: agent::ProcessState::Running.into(),
        run_id: "run-b2".into(),
        engine: Some(NEW.into()),
        assigned_membership: 1,
        ..agent::NodeReport::default()
    });
    let (_, members) = act(&mut desk).await;
    assert_eq!(members[1], (NEW.to_owned(), None, false));
}

#[tokio::test]
async fn a_node_has_the_time_that_this_leader_sees_pass_whatever_the_clock_says() {
    let mut desk = desk(records::UpgradePhase::Ready).await;
    act(&mut desk).await;
    // By the clock the node makes way since two hours ago.
    let task = desk.task();
    let mut next = task.value.clone();
    let Spec::Upgrade(upgrade) = &mut next.spec else {
        panic!("{next:?}");
    };
    let part = &mut upgrade.shards[0];
    assert_eq!(part.phase, UpgradePhase::Replicas);
    part.phase_since_ms -= 2 * 60 * 60 * 1_000;
    let written = desk.driver.write_task(&task, next, "0", "Jump", "").await;
    written.unwrap();
    let (_, members) = act(&mut desk).await;
    assert_eq!(members[1], (NEW.to_owned(), Some(Exchange::Keep), false));
    let Spec::Upgrade(upgrade) = desk.task().value.spec else {
        panic!("no upgrade");
    };
    let part = &upgrade.shards[0];
    assert_eq!(
        (part.phase, &part.why_back),
        (UpgradePhase::Replicas, &None)
    );
}

#[tokio::test]
async fn an_upgrade_that_is_done_makes_the_engine_the_instances_own() {
    let mut desk = desk(records::UpgradePhase::Done).await;
    let (owner, _) = act(&mut desk).await;
    assert_eq!(owner, None);
    assert_eq!(desk.task().value.state, TaskState::Done);
    assert_eq!(desk.instance().unwrap().engine, NEW);
}

#[tokio::test]
async fn one_that_has_gone_back_leaves_the_instance_as_it_was() {
    let mut desk = desk(records::UpgradePhase::RolledBack).await;
    act(&mut desk).await;
    assert_eq!(desk.task().value.state, TaskState::RolledBack);
    assert_eq!(desk.instance().unwrap().engine, "");
}

#[tokio::test]
async fn nothing_is_held_back_any_more_once_every_node_runs_the_same() {
    for end in [UpgradePhase::Done, UpgradePhase::RolledBack] {
        let mut desk = desk(records::UpgradePhase::Ready).await;
        act(&mut desk).await;
        assert!(desk.instance().unwrap().held_back.is_some());
        let task = desk.task();
        let mut next = task.value.clone();
        let Spec::Upgrade(upgrade) = &mut next.spec else {
            panic!("{next:?}");
        };
        upgrade.shards[0].phase = end;
        let written = desk.driver.write_task(&task, next, "0", "Ended", "").await;
        written.unwrap();
        act(&mut desk).await;
        assert!(desk.task().value.state.is_ended());
        assert_eq!(desk.instance().unwrap().held_back, None, "{end:?}");
    }
}
