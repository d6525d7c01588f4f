//! Shards whose nodes are moved, where something is lost: a process, a host, a switch.

use super::{
    moves_tests::{alone, cross_host, is_as_before, members},
    story::{NEW, Story, fail_over, options},
    *,
};
use crate::{replace::NEW_HOST_GONE_MS, spec::State};

/// In the bake, and asked to go back.
fn goes_back() -> Story {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Bake);
    story.keep();
    story.task.cancel_requested = true;
    story
}

fn retry(story: &mut Story) {
    story.task.state = State::NeedsOperator;
    story.task = retried(story.task.clone(), story.stage.now_ms);
}

fn joined(story: &Story) -> usize {
    story.events.iter().filter(|e| *e == "Join").count()
}

#[test]
fn a_switch_that_was_given_up_makes_nobody_doubtful() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Switch);
    assert!(story.act(), "planned");
    assert_eq!(story.stage.shard.roster.foreseen.len(), 3);
    // It is overtaken by the loss of the primary, which comes back as another process and copies.
    fail_over(&mut story, "b");
    story.stage.node("a").run_id.push('+');
    story.stage.node("a").unexpected_errors = Some(7);
    assert!(story.stage.shard.older(&"a".into()).is_none());
    story.task.cancel_requested = true;
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(members(&story), ["a", "b", "c"]);
    assert_eq!(joined(&story), 3, "only the new ones");
}

#[test]
fn a_switch_that_was_given_up_and_then_made_counts_from_its_own_beginning() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Switch);
    story.switches = Phase::RolledBack;
    assert!(story.act() && story.act(), "given up");
    story.stage.node("c").unexpected_errors = Some(4);
    story.switches = Phase::Done;
    story.run_to(UpgradePhase::Bake);
    let older = story.stage.shard.older(&"c".into()).unwrap();
    assert_eq!((older.run_id.as_str(), older.refused), ("run-c", 4));
    story.stage.node("c").unexpected_errors = Some(5);
    story.keep();
    story.task.cancel_requested = true;
    story.run_to(UpgradePhase::RolledBack);
    assert!(!members(&story).contains(&"c"), "it refused something");
}

#[test]
fn an_old_node_that_refused_something_or_was_restarted_makes_way_for_one_that_copies_everything() {
    let mut story = goes_back();
    story.stage.node("b").unexpected_errors = Some(1);
    story.stage.node("c").run_id.push('+');
    story.keep();
    story.run_to_end(|story| {
        let shard = &story.stage.shard;
        let stay = shard.members.iter().filter(|m| !m.leaving).count();
        assert!(stay >= 3, "{shard:?}");
    });
    is_as_before(&story, &["a", "r-0-6", "r-0-7"]);
    let members = &story.stage.shard.members;
    assert!(members.iter().all(|m| m.in_sync && m.engine.is_empty()));
    assert_eq!(story.ended().0, State::Cancelled);
}

#[test]
fn who_is_to_take_the_place_of_an_old_one_and_is_lost_makes_way_for_another() {
    let mut story = goes_back();
    story.stage.node("b").unexpected_errors = Some(1);
    while !members(&story).contains(&"r-0-6") {
        story.step();
    }
    let host = story.stage.member("r-0-6").host.clone();
    story.dead.push(host);
    story.settle(1);
    story.stage.pass(NEW_HOST_GONE_MS);
    story.run_to(UpgradePhase::RolledBack);
    is_as_before(&story, &["a", "c", "r-0-7"]);
}

#[test]
fn a_new_node_whose_host_is_gone_leaves_at_once_when_no_primary_was_lost() {
    for replace_after_s in [0, 600] {
        let mut story = cross_host(0);
        story.instance.replace_after_s = replace_after_s;
        story.run_to(UpgradePhase::Switch);
        story.lose("r-0-4");
        let lost_ms = story.stage.now_ms;
        story.task.cancel_requested = true;
        story.run_to(UpgradePhase::RolledBack);
        is_as_before(&story, &["a", "b", "c"]);
        let took_ms = story.stage.now_ms - lost_ms;
        assert!(took_ms < 2 * NEW_HOST_GONE_MS, "{took_ms}");
    }
}

#[test]
fn what_a_primary_that_was_lost_had_is_waited_for_until_somebody_says_that_it_is_lost() {
    for replace_after_s in [0, 600] {
        let mut story = cross_host(0);
        story.instance.replace_after_s = replace_after_s;
        story.run_to(UpgradePhase::Switch);
        story.lose("a");
        fail_over(&mut story, "r-0-3");
        let lost_ms = story.stage.now_ms;
        if replace_after_s > 0 {
            story.settle(1_000);
            assert_eq!(story.part().phase, UpgradePhase::Finalize);
            assert!(members(&story).contains(&"a"));
            story.stage.pass(lost_ms + 600_000 - story.stage.now_ms);
            story.run_to(UpgradePhase::Done);
        } else {
            story.run_to(UpgradePhase::Parked);
            let words = &story.part().message;
            assert!(words.contains("retry to go on without a"), "{words}");
            assert_eq!(story.owner, Owner::Free);
            retry(&mut story);
            story.run_to(UpgradePhase::Done);
            assert!(story.stage.now_ms < lost_ms + 3 * NEW_HOST_GONE_MS);
        }
        assert_eq!(members(&story), ["r-0-3", "r-0-4", "r-0-5"]);
    }
}

#[test]
fn a_new_replica_that_is_lost_after_the_switch_is_waited_for_and_then_another_joins() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Finalize);
    let shard = &story.stage.shard;
    let new = |m: &&Member| m.engine == NEW && m.node != shard.primary;
    let lost = shard.members.iter().find(new).unwrap().node.to_string();
    story.lose(&lost);
    let lost_ms = story.stage.now_ms;
    story.settle(2 * NEW_HOST_GONE_MS as usize / 100);
    assert_eq!(story.part().phase, UpgradePhase::Finalize, "not parked");
    assert!(members(&story).contains(&lost.as_str()));
    story.stage.pass(lost_ms + 600_000 - story.stage.now_ms);
    story.run_to(UpgradePhase::Done);
    assert!(!members(&story).contains(&lost.as_str()));
    let members = &story.stage.shard.members;
    assert!(members.len() == 3 && members.iter().all(|m| m.in_sync && m.engine == NEW));
}

#[test]
fn an_old_replica_that_is_never_in_sync_again_does_not_keep_the_last_new_one() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Switch);
    for node in ["b", "c"] {
        story.stage.cut(node);
        story.stage.member(node).in_sync = false;
    }
    story.task.cancel_requested = true;
    story.run_to(UpgradePhase::UndoNodes);
    story.settle(100);
    assert_eq!(story.stage.shard.members.len(), 4, "one is kept so long");
    story.stage.pass(REPLICA_MS_MAX);
    story.run_to(UpgradePhase::RolledBack);
    is_as_before(&story, &["a", "b", "c"]);
}

#[test]
fn of_one_host_s_primaries_one_at_a_time_is_copied_from() {
    let mut story = alone();
    story.run_to(UpgradePhase::Replicas);
    story.copied = Some("1".into());
    assert!(!story.act());
    let Decision::Wait { what, .. } = story.decide() else {
        panic!("{:?}", story.decide());
    };
    assert!(what.contains("the copy of shard 1"), "{what}");
    story.copied = None;
    assert!(matches!(story.decide(), Decision::Recruit(_)));
}

#[test]
fn a_copy_of_another_shard_that_does_not_end_is_waited_for_no_longer_than_one_may_take() {
    for back in [false, true] {
        let mut story = match back {
            true => goes_back(),
            false => alone(),
        };
        let phase = match back {
            true => {
                // It refused something: another one is to take its place.
                story.stage.node("b").unexpected_errors = Some(7);
                UpgradePhase::UndoNodes
            }
            false => UpgradePhase::Replicas,
        };
        story.run_to(phase);
        story.copied = Some("1".into());
        let waits = |story: &Story| {
            let decision = story.decide();
            matches!(&decision, Decision::Wait { what, .. } if what.contains("the copy of shard 1"))
        };
        // What goes before, on the way back: the new ones leave.
        for _ in 0..500 {
            if !waits(&story) {
                story.settle(1);
            }
        }
        assert!(waits(&story), "{:?}", story.decide());
        let joined_before = joined(&story);
        story.stage.pass(NODE_MS_MAX + 1_000);
        story.settle(1);
        assert_eq!(story.part().phase, phase, "it does not give up");
        assert_eq!(joined(&story), joined_before + 1, "it has its own");
        // The other one's copy is still there.
        story.run_to(match back {
            true => UpgradePhase::RolledBack,
            false => UpgradePhase::Bake,
        });
        assert!(story.copied.is_some() && !story.events.iter().any(|e| e == "Parked"));
    }
}

#[test]
fn how_nodes_get_the_engine_is_decided_anew_when_the_shard_has_changed_before_its_turn() {
    // The only node has got a replica: in place.
    let mut story = alone();
    story.run_to(UpgradePhase::Ready);
    let node = story.stage.shard.next_node();
    let host = HostId::from("other");
    let joined = story.stage.shard.join(&node, &host, NodeRole::Replica);
    story.stage.shard = joined.unwrap();
    story.agents();
    story.agents();
    story.run_to(UpgradePhase::Done);
    assert!(!story.part().moved);
    assert_eq!(members(&story), ["a", node.as_str()]);
    // A replica has left: a new one joins.
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Ready);
    for gone in ["b", "c"] {
        let leaving = story.stage.shard.dismiss(&gone.into()).unwrap();
        story.stage.shard = leaving.leave(&gone.into()).unwrap();
    }
    story.run_to(UpgradePhase::Done);
    assert_eq!(members(&story), ["r-0-3"]);
}

#[test]
fn a_node_that_a_new_one_would_not_be_like_is_seen_before_it_begins() {
    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Ready);
    story.stage.shard = story.stage.shard.prioritize(&"c".into(), 0).unwrap();
    story.run_to(UpgradePhase::RolledBack);
    let part = story.part();
    assert!(part.message.contains("priority 0"), "{part:?}");
    assert!(part.blameless && story.events.iter().all(|e| e != "Join"));
}

#[test]
fn a_lost_host_and_none_at_all_say_nothing_about_the_engine_and_one_that_does_not_start_does() {
    let mut story = alone();
    story.room = None;
    story.run_to(UpgradePhase::RolledBack);
    assert!(story.part().blameless, "{:?}", story.part());

    let mut story = cross_host(0);
    story.run_to(UpgradePhase::Replicas);
    assert!(story.act(), "one joins");
    let host = story.stage.shard.members[3].host.clone();
    story.dead.push(host);
    story.settle(1);
    story.stage.pass(NEW_HOST_GONE_MS);
    story.run_to(UpgradePhase::RolledBack);
    assert!(story.part().blameless, "{:?}", story.part());

    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    story.task.cancel_requested = true;
    story.run_to(UpgradePhase::RolledBack);
    assert!(!story.part().blameless, "an operator's word");
    for (status, blameless) in [
        (StepStatus::NoEffect("no such file".into()), false),
        (
            StepStatus::Uncertain("its agent has no session".into()),
            true,
        ),
    ] {
        let mut story = Story::new(&options());
        story.trial = status;
        assert!(story.act());
        assert_eq!(story.part().phase, UpgradePhase::RolledBack);
        assert_eq!(story.part().blameless, blameless);
    }
}
