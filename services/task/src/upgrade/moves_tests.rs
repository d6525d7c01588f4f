//! Shards whose nodes' places are taken by new ones: what is seen, and what the record says then.

use slotmesh_topology::Epoch;

use super::{
    story::{BAKE_MS, NEW, Story, fail_over, options},
    *,
};
use crate::{
    detect::tests::Stage,
    observe::{EngineTrouble, NodeView},
    replace::NEW_HOST_GONE_MS,
    spec::{Choice, State},
};

/// The first node that joins a shard of one.
const FIRST: &str = "r-0-1";

pub(super) fn alone() -> Story {
    let mut stage = Stage::new();
    stage.shard.members.truncate(1);
    stage.fleet.nodes.retain(|node, _| node.as_str() == "a");
    Story::of(stage, &options())
}

/// Three nodes that go to other hosts.
pub(super) fn cross_host(durability: u32) -> Story {
    let mut stage = Stage::new();
    stage.durability = durability;
    for host in ["x", "y", "z"] {
        stage.fleet.hosts.insert(host.into());
    }
    let method = Method::CrossHost;
    let mut story = Story::of(
        stage,
        &Options {
            method,
            ..options()
        },
    );
    story.instance.durability = durability;
    story
}

pub(super) fn members(story: &Story) -> Vec<&str> {
    let members = story.stage.shard.members.iter();
    members.map(|m| m.node.as_str()).collect()
}

/// As it was before: who is of the shard, and who is its primary.
pub(super) fn is_as_before(story: &Story, all: &[&str]) {
    assert_eq!(members(story), all);
    assert_eq!(story.stage.shard.primary.as_str(), "a");
    assert_eq!(
        story
            .stage
            .fleet
            .node(&"a".into())
            .unwrap()
            .engine
            .as_deref(),
        Some("")
    );
    assert!(story.stage.shard.roster.older.is_empty());
    assert_eq!(story.owner, Owner::Free);
}

#[test]
fn the_place_of_an_only_node_is_taken_by_a_new_one_and_the_old_one_is_the_way_back() {
    let mut story = alone();
    assert!(story.part().moved);
    story.run_to(UpgradePhase::Switch);
    assert_eq!(members(&story), ["a", FIRST]);
    assert_eq!(story.stage.shard.primary.as_str(), "a");
    story.run_to(UpgradePhase::Bake);
    let rollback = story.part().rollback.clone().unwrap();
    assert!(rollback.open && rollback.old.as_str() == "a");
    assert_eq!(members(&story), ["a", FIRST], "the old one follows");
    assert_eq!(story.owner, Owner::Free);
    let begun_ms = story.stage.now_ms;
    story.run_to(UpgradePhase::Done);
    assert!(story.stage.now_ms >= begun_ms + BAKE_MS);
    assert_eq!(members(&story), [FIRST]);
    assert_eq!(story.stage.shard.roster.gone[0].node.as_str(), "a");
    assert_eq!(story.stage.shard.members[0].engine, NEW);
    assert_eq!((story.ended().0, &story.owner), (State::Done, &Owner::Free));
    for never in ["Exchange", "Staged", "Drain"] {
        assert!(
            !story.events.contains(&never.to_owned()),
            "{:?}",
            story.events
        );
    }
}

#[test]
fn a_cancel_lets_the_new_node_leave_and_a_retry_makes_another() {
    for phase in [
        UpgradePhase::Replicas,
        UpgradePhase::Switch,
        UpgradePhase::Bake,
    ] {
        let mut story = alone();
        story.run_to(phase);
        if phase == UpgradePhase::Replicas {
            assert!(story.act(), "it joins");
        }
        story.keep();
        story.task.cancel_requested = true;
        story.run_to(UpgradePhase::RolledBack);
        is_as_before(&story, &["a"]);
        let (state, _) = story.ended();
        assert_eq!(state, State::Cancelled, "{phase:?}");
        story.task.state = State::NeedsOperator;
        story.task = retried(story.task.clone(), story.stage.now_ms);
        story.run_to(UpgradePhase::Done);
        assert_eq!(members(&story), ["r-0-2"], "no id is given twice");
    }
}

#[test]
fn an_engine_that_does_not_start_and_a_host_that_is_lost_leave_all_as_it_was() {
    let mut story = alone();
    story.run_to(UpgradePhase::Replicas);
    assert!(story.act(), "it joins");
    let failing = NodeView {
        trouble: Some(EngineTrouble {
            engine: NEW.into(),
            starts: STARTS_MAX,
            why: "illegal instruction".into(),
        }),
        ..NodeView::default()
    };
    story.stage.fleet.nodes.insert(FIRST.into(), failing);
    story.run_to(UpgradePhase::RolledBack);
    is_as_before(&story, &["a"]);
    assert!(story.ended().1.contains("illegal instruction"));

    let mut story = alone();
    story.run_to(UpgradePhase::Replicas);
    assert!(story.act(), "it joins");
    assert!(!story.act(), "it copies: {:?}", story.decide());
    story.stage.fleet.hosts.remove(&"spare".into());
    story.stage.pass(1);
    story.stage.pass(NEW_HOST_GONE_MS);
    assert!(story.act());
    assert_eq!(
        story.part().phase,
        UpgradePhase::UndoNodes,
        "{:?}",
        story.part()
    );
    story.run_to(UpgradePhase::RolledBack);
    is_as_before(&story, &["a"]);
}

#[test]
fn without_room_nothing_is_begun_and_in_place_it_is_refused() {
    let mut story = alone();
    story.room = None;
    story.run_to(UpgradePhase::RolledBack);
    is_as_before(&story, &["a"]);
    assert!(story.ended().1.contains("start an agent on another host"));
    let in_place = Options {
        method: Method::InPlace,
        ..options()
    };
    let shards = [story.stage.shard.clone()];
    for allow_downtime in [false, true] {
        let in_place = Options {
            allow_downtime,
            ..in_place.clone()
        };
        let refused = plan(&story.instance, &shards, &story.stage.fleet, &in_place, 1);
        let refused = refused.unwrap_err();
        assert_eq!(refused.reason, "NO_REPLICA");
        assert!(
            refused.message.contains("method auto"),
            "{}",
            refused.message
        );
    }
    let elsewhere = Options {
        method: Method::CrossHost,
        ..options()
    };
    story.stage.fleet.hosts.retain(|h| h.as_str() == "host-a");
    let refused = plan(&story.instance, &shards, &story.stage.fleet, &elsewhere, 1);
    assert_eq!(refused.unwrap_err().reason, "NO_HOST");
}

#[test]
fn an_old_node_whose_process_is_another_one_leaves_at_once() {
    let mut story = alone();
    story.run_to(UpgradePhase::Bake);
    story.keep();
    story.stage.node("a").run_id.push('+');
    story.keep();
    assert!(story.act());
    assert_eq!(story.part().phase, UpgradePhase::Finalize);
    assert!(story.stage.member("a").leaving);
    assert_eq!(story.owner, Owner::Own);
    story.run_to(UpgradePhase::Done);
    assert_eq!(members(&story), [FIRST]);
}

#[test]
fn a_failover_to_the_new_node_is_as_good_as_a_switch_and_the_lost_one_leaves_when_it_follows() {
    let mut story = alone();
    story.run_to(UpgradePhase::Switch);
    fail_over(&mut story, FIRST);
    story.stage.node("a").following = String::new();
    story.stage.member("a").in_sync = false;
    story.stage.pass(1);
    for _ in 0..20 {
        story.act();
        story.stage.pass(1);
    }
    assert_eq!(story.part().phase, UpgradePhase::Finalize);
    assert!(
        !story.stage.member("a").leaving,
        "what only it has is not kept yet"
    );
    story.follow(&FIRST.into());
    story.run_to(UpgradePhase::Done);
    assert_eq!(members(&story), [FIRST]);
}

#[test]
fn a_failover_in_the_bake_to_the_old_node_means_back() {
    let mut story = alone();
    story.run_to(UpgradePhase::Bake);
    story.keep();
    fail_over(&mut story, "a");
    story.run_to(UpgradePhase::RolledBack);
    is_as_before(&story, &["a"]);
}

#[test]
fn all_nodes_go_to_other_hosts_and_never_fewer_are_in_sync_than_before() {
    for durability in [0, 1] {
        let mut story = cross_host(durability);
        let mut most = 0;
        story.run_to_end(|story| {
            let stay = story.stage.shard.members.iter().filter(|m| !m.leaving);
            // After a switch each proves anew that it follows.
            assert!(stay.count() >= 3, "{:?}", story.stage.shard);
            most = most.max(story.stage.shard.members.len());
        });
        assert_eq!(story.part().phase, UpgradePhase::Done);
        assert_eq!(most, 6);
        assert_eq!(members(&story), ["r-0-3", "r-0-4", "r-0-5"]);
        let hosts = story.stage.shard.members.iter().map(|m| m.host.as_str());
        assert!(hosts.into_iter().all(|h| h.starts_with("spare")));
        assert!(story.stage.shard.members.iter().all(|m| m.in_sync));
        let drains = story.events.iter().filter(|e| *e == "Drain").count();
        assert_eq!(drains, 3 * durability as usize);
        assert!(story.stage.shard.roster.older.is_empty());
    }
}

#[test]
fn with_durability_an_old_node_is_left_out_when_the_others_have_what_it_may_have_confirmed() {
    let mut story = cross_host(1);
    while !story.events.contains(&"Drain".to_owned()) {
        story.step();
    }
    let drain = story.part().drain.unwrap();
    assert_eq!(drain.epoch, Epoch(5));
    for node in story.stage.fleet.nodes.values_mut() {
        node.offset = drain.offset - 1;
    }
    assert!(!story.act(), "{:?}", story.decide());
    for node in story.stage.fleet.nodes.values_mut() {
        node.offset = drain.offset;
    }
    assert!(matches!(story.decide(), Decision::Leave(_)));
}

#[test]
fn who_goes_back_keeps_every_old_node_and_without_room_asks_about_one_that_refused_something() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Bake);
    story.keep();
    assert_eq!(
        story.stage.shard.roster.older.len(),
        3,
        "the old ones follow, too"
    );
    story.task.cancel_requested = true;
    story.run_to(UpgradePhase::RolledBack);
    is_as_before(&story, &["a", "b", "c"]);
    assert_eq!(story.ended().0, State::Cancelled);

    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Bake);
    story.keep();
    story.stage.node("b").unexpected_errors = Some(1);
    (story.task.cancel_requested, story.room) = (true, None);
    story.run_to(UpgradePhase::Parked);
    assert!(
        story.part().message.contains("replace it"),
        "{:?}",
        story.part()
    );
    assert!(menu(&story.task).contains(&Choice::Retry));
}

#[test]
fn a_node_that_was_replaced_after_going_back_is_one_of_the_old_ones() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Bake);
    story.keep();
    story.stage.node("b").unexpected_errors = Some(1);
    (story.task.cancel_requested, story.room) = (true, None);
    story.run_to(UpgradePhase::Parked);
    // As its operator is told.
    let put = story.stage.shard.next_node();
    exchange_for_a_newcomer(&mut story, "b");
    assert_eq!(story.stage.member(put.as_str()).engine, "", "its primary's");
    story.task.state = State::NeedsOperator;
    story.task = retried(story.task.clone(), story.stage.now_ms);
    story.run_to(UpgradePhase::RolledBack);
    is_as_before(&story, &["a", "c", put.as_str()]);
    assert!(story.stage.shard.members.iter().all(|m| !m.leaving));
}

#[test]
fn a_failover_to_a_new_node_while_the_others_were_to_leave_goes_forward_with_all_of_them() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Switch);
    story.task.cancel_requested = true;
    story.run_to(UpgradePhase::UndoNodes);
    assert!(story.act());
    let leaving = story.stage.shard.members.iter().find(|m| m.leaving);
    let leaving = leaving.unwrap().node.clone();
    let new = ["r-0-3", "r-0-4", "r-0-5"].map(NodeId::from);
    let lucky = new.iter().find(|n| **n != leaving).unwrap();
    fail_over(&mut story, lucky.as_str());
    story.run_to(UpgradePhase::Done);
    assert_eq!(members(&story), ["r-0-3", "r-0-4", "r-0-5"]);
    assert!(story.stage.shard.members.iter().all(|m| !m.leaving));
}

#[test]
fn a_new_node_too_many_leaves_in_the_end() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Bake);
    story.keep();
    exchange_for_a_newcomer(&mut story, "c");
    story.run_to(UpgradePhase::Done);
    assert_eq!(story.stage.shard.members.len(), 3, "{:?}", members(&story));
    assert!(story.stage.shard.members.iter().all(|m| m.in_sync));
}

#[test]
fn who_would_go_back_to_fewer_nodes_than_there_were_waits_for_room_or_an_operator() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Bake);
    story.keep();
    exchange_for_a_newcomer(&mut story, "c");
    (story.task.cancel_requested, story.room) = (true, None);
    story.run_to(UpgradePhase::Parked);
    let words = &story.part().message;
    assert!(words.contains("for one with the old engine"), "{words}");
    assert_eq!(story.stage.shard.primary.as_str(), "a");
    assert_eq!(story.stage.shard.members.len(), 6, "nobody has left");
    // As he is told.
    exchange_for_a_newcomer(&mut story, "r-0-3");
    story.task.state = State::NeedsOperator;
    story.task = retried(story.task.clone(), story.stage.now_ms);
    story.run_to(UpgradePhase::RolledBack);
    is_as_before(&story, &["a", "b", "r-0-7"]);
}

/// A replacement, all at once: with the engine that the primary has now.
pub(super) fn exchange_for_a_newcomer(story: &mut Story, node: &str) {
    let shard = &story.stage.shard;
    let (put, host) = (shard.next_node(), format!("for-{node}").into());
    story.stage.shard = shard.join(&put, &host, NodeRole::Replica).unwrap();
    story.agents();
    story.agents();
    assert!(story.stage.member(put.as_str()).in_sync);
    let leaving = story.stage.shard.expel(&node.into()).unwrap();
    story.stage.shard = leaving.leave(&node.into()).unwrap();
}

#[test]
fn a_host_is_shared_only_by_an_only_node_that_somebody_wants_upgraded() {
    let story = alone();
    let (upgrade, part) = (story.upgrade(), story.part());
    assert!(may_share(upgrade, part));
    let automatic = Upgrade {
        automatic: true,
        ..upgrade.clone()
    };
    assert!(!may_share(&automatic, part));
    let two = ShardUpgrade {
        nodes: vec![part.nodes[0].clone(), part.nodes[0].clone()],
        ..part.clone()
    };
    assert!(!may_share(upgrade, &two), "it has got a replica since");
    let story = cross_host(0);
    assert!(!may_share(story.upgrade(), story.part()));
}

#[test]
fn an_automatic_patch_of_an_only_node_needs_another_host() {
    let mut stage = alone().stage;
    let automatic = Options {
        automatic: true,
        ..options()
    };
    let planned = |stage: &Stage| {
        let shards = [stage.shard.clone()];
        plan(&story::instance(), &shards, &stage.fleet, &automatic, 1)
    };
    assert!(planned(&stage).is_ok());
    stage.fleet.hosts.retain(|h| h.as_str() == "host-a");
    assert_eq!(planned(&stage).unwrap_err().reason, "NO_HOST");
}

#[test]
fn nodes_that_new_ones_would_not_be_like_are_not_moved_to_other_hosts() {
    let stage = cross_host(0).stage;
    let cross = Options {
        method: Method::CrossHost,
        ..options()
    };
    let refused = |shard: &Shard, options: &Options| {
        let shards = [shard.clone()];
        let planned = plan(&story::instance(), &shards, &stage.fleet, options, 1);
        planned.err().map(|e| (e.reason, e.message))
    };
    assert_eq!(refused(&stage.shard, &cross), None);
    let last = stage.shard.prioritize(&"c".into(), 0).unwrap();
    let mut reader = stage.shard.clone();
    reader.members[2].role = NodeRole::ReadOnly;
    for (shard, why) in [(last, "priority 0"), (reader, "read-only")] {
        let (reason, message) = refused(&shard, &cross).unwrap();
        assert_eq!(reason, "NODES_DIFFER");
        assert!(message.contains(why), "{message}");
        assert_eq!(refused(&shard, &options()), None, "in place it may");
    }
}
