//! Hosts with one primary, as short stories: who takes its place, and why nobody does.

use slotmesh_topology::Handover;

use super::*;
use crate::detect::tests::{NOW, Stage};

fn host(name: &str) -> HostId {
    format!("host-{name}").into()
}

fn no_task(_: &Shard) -> Option<TaskId> {
    None
}

/// Every shard has its primary on host-a and replicas on host-b and host-c.
fn shards(count: usize) -> Vec<Shard> {
    let shard = |index: usize| {
        let mut shard = Stage::new().shard;
        shard.id = index.to_string().into();
        shard
    };
    (0..count).map(shard).collect()
}

fn of_a(shards: &[Shard]) -> Drain {
    drain(shards, &host("a"), no_task, |_| true)
}

fn only_stay(drain: &Drain) -> &Stay {
    assert_eq!(drain.moves.len(), 0, "{drain:?}");
    let [stay] = &drain.stays[..] else {
        panic!("{drain:?}")
    };
    stay
}

#[test]
fn primaries_are_spread_over_the_hosts_that_have_fewest() {
    let drain = of_a(&shards(2));
    let moves: Vec<_> = drain.moves.values().flatten().collect();
    assert_eq!(moves.len(), 2);
    assert_ne!(moves[0], moves[1], "one for host-b, one for host-c");
    assert_eq!((drain.primaries(), drain.busy), (2, 0));
}

#[test]
fn the_node_that_an_operator_prefers_wins_over_the_emptiest_host() {
    let mut shards = shards(2);
    for shard in &mut shards {
        let c = shard.members.iter_mut().find(|m| m.host == host("c"));
        c.unwrap().priority += 1;
    }
    let drain = of_a(&shards);
    let moves: Vec<_> = drain.moves.values().flatten().collect();
    assert!(moves.iter().all(|node| node.as_str() == "c"), "{moves:?}");
}

#[test]
fn another_host_s_primaries_are_not_touched() {
    let drain = drain(&shards(1), &host("b"), no_task, |_| true);
    assert_eq!(drain, Drain::default());
}

#[test]
fn who_is_out_of_sync_leaving_silent_or_never_promoted_takes_no_place() {
    let only_b = |change: fn(&mut slotmesh_topology::Member)| {
        let mut shards = shards(1);
        shards[0].members.retain(|m| m.host != host("c"));
        change(&mut shards[0].members[1]);
        shards
    };
    assert!(only_stay(&of_a(&only_b(|m| m.in_sync = false))).moving);
    assert!(!only_stay(&of_a(&only_b(|m| m.priority = 0))).moving);
    assert!(!only_stay(&of_a(&only_b(|m| m.leaving = true))).moving);
    assert!(!only_stay(&of_a(&only_b(|m| m.host = host("a")))).moving);
    let silent = drain(&shards(1), &host("a"), no_task, |_| false);
    assert!(only_stay(&silent).moving, "its agent may come back");
}

#[test]
fn a_busy_shard_is_waited_for_and_counted() {
    let task_of = |_: &Shard| Some(TaskId::from("t"));
    let has_it = drain(&shards(1), &host("a"), task_of, |_| true);
    assert!(only_stay(&has_it).reason.contains("task t"));
    assert_eq!(has_it.busy, 1);
    let replica = drain(&shards(1), &host("b"), task_of, |_| true);
    assert_eq!((replica.primaries(), replica.busy), (0, 1));
    let handover = Handover {
        task: "t".into(),
        target: "b".into(),
        token: "x".into(),
        deadline_unix_ms: NOW + 1,
        max_hold_ms: 1,
    };
    let moving = shards(1).remove(0).declare(handover).unwrap();
    assert!(only_stay(&of_a(&[moving])).moving);
}

#[test]
fn one_switchover_takes_no_more_than_it_may() {
    let drain = of_a(&shards(SWITCHOVER_SHARDS_MAX + 3));
    assert_eq!(
        drain.moves.values().next().unwrap().len(),
        SWITCHOVER_SHARDS_MAX
    );
    assert_eq!(drain.stays.len(), 3);
    assert!(drain.stays.iter().all(|stay| stay.moving));
}
