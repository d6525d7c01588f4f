//! Waits that may be long, with the shard free: for a window, for a lost host or another node in its place.

use super::{
    story::{NEW, Story, fail_over, options},
    *,
};
use crate::{
    replace::{self, NEW_HOST_GONE_MS},
    spec::State,
};

const AFTER_MS: u64 = 600_000;
const LOOK_MS: u64 = 5_000;

/// Who would be replaced now by itself.
fn due(story: &Story) -> Option<NodeId> {
    let after_s = story.instance.replace_after_s;
    let lost = replace::due(&story.stage.shard, story.stage.scene(), after_s, |_, _| {
        false
    });
    lost.filter(|_| story.owner == Owner::Free).map(|l| l.node)
}

/// Once it is due, another node takes its place.
fn is_replaced(story: &mut Story, node: &str) {
    for _ in 0..=AFTER_MS / LOOK_MS {
        story.settle(1);
        assert_eq!(story.owner, Owner::Free, "{:?}", story.part());
        if due(story).is_some() {
            break;
        }
        story.stage.pass(LOOK_MS);
    }
    assert_eq!(due(story), Some(node.into()), "{:?}", story.part());
    story.owner = Owner::Other("r".into());
    let shard = &story.stage.shard;
    let joined = shard.join(&shard.next_node(), &"spare".into(), NodeRole::Replica);
    story.stage.shard = joined.unwrap();
    story.settle(3);
    let left = story.stage.shard.expel(&node.into()).unwrap();
    story.stage.shard = left.leave(&node.into()).unwrap();
    story.stage.fleet.nodes.remove(&node.into());
    story.owner = Owner::Free;
}

/// The node whose process makes way.
fn exchanged(story: &Story) -> String {
    let mut members = story.stage.shard.members.iter();
    let member = members.find(|m| m.exchange.is_some());
    member.unwrap().node.to_string()
}

#[test]
fn a_hiccup_after_hours_of_waiting_for_the_window_is_no_reason_to_go_back() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    story.opens_ms = Some(u64::MAX - 1);
    story.settle(50);
    assert_eq!(story.engines(), ["", NEW, NEW]);
    assert_eq!(story.owner, Owner::Free, "others may have the shard");
    let events = story.events.len();
    story.settle(50);
    assert_eq!(story.events.len(), events, "it is said once");
    story.stage.pass(3 * NODE_MS_MAX);
    story.stage.member("b").in_sync = false;
    assert!(story.act());
    assert_eq!(story.part().phase, UpgradePhase::Replicas);
    assert_eq!(story.owner, Owner::Own, "it is looked after");
    assert!(matches!(story.decide(), Decision::Wait { .. }));
    story.settle(5);
    assert_eq!(story.owner, Owner::Free);
    // An operator is heard at once, as ever.
    story.task.cancel_requested = true;
    assert!(story.act() && story.act());
    assert_eq!(story.part().phase, UpgradePhase::UndoNodes);
    story.task.cancel_requested = false;
    story.run_to(UpgradePhase::RolledBack);
}

#[test]
fn what_waited_for_the_window_goes_on_when_it_opens() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    story.opens_ms = Some(u64::MAX - 1);
    story.settle(50);
    story.stage.pass(3 * NODE_MS_MAX);
    story.opens_ms = None;
    story.run_to(UpgradePhase::Done);
    assert_eq!(story.ended().0, State::Done);
}

#[test]
fn a_shard_whose_replica_is_lost_in_its_exchange_goes_back_and_is_free_for_its_replacement() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    assert!(story.act());
    let lost = exchanged(&story);
    story.lose(&lost);
    let lost_ms = story.stage.now_ms;
    story.stage.pass(AFTER_MS - 1_000);
    assert!(!story.act(), "{:?}", story.decide());
    story.stage.pass(1_000);
    assert!(story.act());
    assert_eq!(story.part().phase, UpgradePhase::UndoNodes);
    is_replaced(&mut story, &lost);
    assert!(story.stage.now_ms < lost_ms + AFTER_MS + 10_000);
    story.run_to(UpgradePhase::RolledBack);
    assert!(story.part().blameless);
    assert!(story.engines().iter().all(String::is_empty));
    assert_eq!(story.ended().0, State::RolledBack);
}

#[test]
fn a_lost_host_that_comes_back_is_gone_on_with_by_itself() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    assert!(story.act());
    let lost = exchanged(&story);
    story.lose(&lost);
    story.task.cancel_requested = true;
    story.stage.pass(NEW_HOST_GONE_MS);
    story.settle(3);
    assert_eq!(story.part().phase, UpgradePhase::UndoNodes);
    assert_eq!(story.owner, Owner::Free, "{:?}", story.part());
    story.dead.clear();
    story.stage.node(&lost).link_up = true;
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.engines(), ["", "", ""]);
}

#[test]
fn a_replica_that_nobody_replaces_is_waited_for_as_long_as_for_any_and_is_not_held_against_the_engine()
 {
    let mut story = Story::new(&options());
    story.instance.replace_after_s = 0;
    story.run_to(UpgradePhase::Replicas);
    assert!(story.act());
    let lost = exchanged(&story);
    story.lose(&lost);
    story.stage.pass(AFTER_MS);
    assert!(!story.act(), "{:?}", story.decide());
    story.stage.pass(NODE_MS_MAX);
    story.settle(3);
    assert_eq!(story.part().phase, UpgradePhase::UndoNodes);
    assert!(story.part().blameless);
    assert_eq!(story.owner, Owner::Free);
}

#[test]
fn an_old_primary_that_is_lost_after_the_switch_is_replaced_and_the_upgrade_gets_to_its_end() {
    for phase in [UpgradePhase::Bake, UpgradePhase::Finalize] {
        let mut story = Story::new(&options());
        story.run_to(phase);
        story.keep();
        story.lose("a");
        story.stage.pass(NEW_HOST_GONE_MS);
        story.run_to(UpgradePhase::Finalize);
        story.settle(2);
        is_replaced(&mut story, "a");
        story.run_to(UpgradePhase::Done);
        assert!(story.engines().iter().all(|e| e == NEW), "{phase:?}");
    }
}

#[test]
fn a_new_primary_that_is_lost_with_its_host_is_not_held_against_the_engine_and_is_replaced() {
    for by_host in [true, false] {
        let mut story = Story::new(&options());
        story.run_to(UpgradePhase::Bake);
        story.keep();
        let new = story.stage.shard.primary.to_string();
        if by_host {
            story.lose(&new);
        }
        fail_over(&mut story, "a");
        story.run_to(UpgradePhase::UndoNodes);
        assert_eq!(story.part().blameless, by_host);
        if by_host {
            story.stage.pass(NEW_HOST_GONE_MS);
            while story.owner != Owner::Free {
                story.step();
            }
            is_replaced(&mut story, &new);
        }
        story.run_to(UpgradePhase::RolledBack);
        assert_eq!(story.part().blameless, by_host);
        assert!(story.engines().iter().all(String::is_empty));
    }
}
