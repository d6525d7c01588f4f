//! Upgrades as short stories: what is seen, what is done next, and what the record says then.

use super::{
    story::{BAKE_MS, NEW, Story, options},
    *,
};
use crate::{
    detect::tests::NOW,
    observe::{EngineTrouble, NodeView, ProcessState},
    spec::{Choice, State},
    table::{self, Cancel},
};

#[test]
fn replicas_come_first_then_a_switch_then_a_bake_then_the_old_primary() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Switch);
    assert_eq!(story.engines(), ["", NEW, NEW]);
    assert_eq!(story.stage.shard.primary.as_str(), "a");
    story.run_to(UpgradePhase::Bake);
    let rollback = story.part().rollback.clone().unwrap();
    assert!(rollback.open && rollback.old.as_str() == "a");
    assert_eq!(
        story.engines(),
        ["", NEW, NEW],
        "the old one stays as it is"
    );
    assert_eq!(story.owner, Owner::Free, "a bake may take days");
    let begun_ms = story.stage.now_ms;
    story.run_to(UpgradePhase::Done);
    assert!(story.stage.now_ms >= begun_ms + BAKE_MS);
    assert_eq!(story.engines(), [NEW, NEW, NEW]);
    assert_eq!(story.owner, Owner::Free);
    assert_eq!(story.ended().0, State::Done);
    assert!(!story.part().rollback.as_ref().unwrap().open);
    assert!(
        story
            .stage
            .shard
            .members
            .iter()
            .all(|m| m.in_sync && m.exchange.is_none())
    );
    assert_eq!(story.events.iter().filter(|e| *e == "Exchange").count(), 3);
}

#[test]
fn roles_are_preserved_when_asked_for_and_a_failing_switch_back_is_no_failure() {
    let preserve = Options {
        preserve_roles: true,
        ..options()
    };
    let mut story = Story::new(&preserve);
    story.hold_us = 700;
    story.run_to(UpgradePhase::Done);
    assert_eq!(story.stage.shard.primary.as_str(), "a");
    let part = story.part();
    assert_eq!((part.hold_us, part.total_hold_us()), (700, 1_400), "twice");
    let mut story = Story::new(&preserve);
    story.run_to(UpgradePhase::Preserve);
    story.switches = Phase::RolledBack;
    story.run_to(UpgradePhase::Done);
    assert_ne!(story.stage.shard.primary.as_str(), "a");
    assert!(story.part().message.contains("stays the primary"));
}

#[test]
fn a_host_that_cannot_use_the_engine_ends_it_before_anything_is_touched() {
    let mut story = Story::new(&options());
    assert_eq!(story.decide(), Decision::Stage("a".into()));
    story.trial = StepStatus::NoEffect("its sum is wrong".into());
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.engines(), ["", "", ""]);
    assert_eq!(story.owner, Owner::Free, "it never had the lock");
    let (state, why) = story.ended();
    assert_eq!(state, State::RolledBack);
    assert!(why.contains("its sum is wrong"), "{why}");
}

#[test]
fn a_cancel_before_the_switch_gives_the_replicas_their_engine_back() {
    for phase in [UpgradePhase::Stage, UpgradePhase::Ready] {
        let mut story = Story::new(&options());
        story.run_to(phase);
        story.task.cancel_requested = true;
        story.run_to(UpgradePhase::RolledBack);
        assert_eq!(story.ended().0, State::Cancelled);
        assert!(!story.events.contains(&"Exchange".to_owned()));
    }
    for phase in [UpgradePhase::Replicas, UpgradePhase::Switch] {
        let mut story = Story::new(&options());
        story.run_to(phase);
        // In the middle of an exchange, too.
        story.act();
        story.task.cancel_requested = true;
        if phase == UpgradePhase::Switch {
            // As the machine of switchovers does with a cancel.
            story.switches = Phase::RolledBack;
        }
        story.run_to(UpgradePhase::RolledBack);
        assert_eq!(story.engines(), ["", "", ""], "{phase:?}");
        assert_eq!(story.stage.shard.primary.as_str(), "a");
        assert_eq!(story.ended().0, State::Cancelled);
        assert_eq!(story.owner, Owner::Free);
    }
}

#[test]
fn a_cancel_in_the_bake_switches_back_and_what_can_not_be_loaded_is_copied() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    story.keep();
    assert_eq!(table::cancel(&story.task), Cancel::Honoured);
    story.task.cancel_requested = true;
    story
        .run_to(UpgradePhase::SwitchBack)
        .run_to(UpgradePhase::UndoNodes);
    assert_eq!(story.stage.shard.primary.as_str(), "a");
    let back = story.decide();
    let Decision::Exchange { data, engine, .. } = back else {
        panic!("{back:?}");
    };
    assert_eq!(
        (data, engine.as_str()),
        (Exchange::Discard, ""),
        "7.0 reads no files of 8.2"
    );
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.engines(), ["", "", ""]);
    assert_eq!(story.ended().0, State::Cancelled);
}

#[test]
fn an_engine_that_does_not_start_turns_the_shard_back() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    assert!(story.act());
    let node = story
        .stage
        .shard
        .members
        .iter()
        .find(|m| m.exchange.is_some());
    let node = node.unwrap().node.to_string();
    story.stage.node(&node).trouble = Some(EngineTrouble {
        engine: NEW.into(),
        starts: STARTS_MAX,
        why: "missing library".into(),
    });
    story.stage.node(&node).state = ProcessState::Stopped;
    assert!(story.act());
    assert_eq!(story.part().phase, UpgradePhase::UndoNodes);
    assert!(story.act(), "the old engine is named");
    story.stage.node(&node).state = ProcessState::Running;
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.engines(), ["", "", ""]);
    let (state, why) = story.ended();
    assert_eq!(state, State::RolledBack);
    assert!(why.contains("missing library"), "{why}");
}

#[test]
fn the_next_replica_waits_for_the_last_one_and_for_as_many_others_as_durability_asks_for() {
    let mut story = Story::new(&options());
    story.stage.durability = 1;
    story.run_to(UpgradePhase::Replicas);
    story.stage.member("c").in_sync = false;
    let Decision::Wait { what, .. } = story.decide() else {
        panic!("{:?}", story.decide());
    };
    assert!(what.contains("1 other replicas"), "{what}");
    story.keep();
    // It is in sync by the record, and follows the primary of before, or nobody: it confirms nothing.
    for change in [
        |n: &mut NodeView| n.link_up = false,
        |n: &mut NodeView| n.following = "a.before:1".into(),
    ] {
        let before = story.stage.node("c").clone();
        change(story.stage.node("c"));
        let Decision::Wait { what, .. } = story.decide() else {
            panic!("{:?}", story.decide());
        };
        assert!(what.contains("1 other replicas"), "{what}");
        *story.stage.node("c") = before;
    }
    assert!(matches!(story.decide(), Decision::Exchange { node, .. } if node.as_str() == "b"));
    assert!(story.act());
    story.agents();
    assert_eq!(story.decide(), Decision::Exchanged("b".into()));
    assert!(story.act());
    story.stage.node("b").keys = 0;
    story.stage.node("a").keys = 100_000;
    story.keep();
    let Decision::Wait { what, .. } = story.decide() else {
        panic!("{:?}", story.decide());
    };
    assert!(what.contains("as many keys"), "{what}");
    story.stage.node("b").keys = 99_500;
    assert!(matches!(story.decide(), Decision::Exchange { node, .. } if node.as_str() == "c"));
}

#[test]
fn a_process_that_was_told_to_end_is_not_taken_for_one_that_stays() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    assert!(story.act(), "b is to make way");
    // Its agent is at it, and its last report is of before, when an operator changes his mind.
    story.task.cancel_requested = true;
    story.run_until_undone("b");
    assert!(
        matches!(story.decide(), Decision::Wait { .. }),
        "{:?}",
        story.decide()
    );
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.engines(), ["", "", ""]);
}

#[test]
fn a_replica_that_refuses_commands_or_takes_for_ever_turns_the_shard_back() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    story.act();
    story.agents();
    story.act();
    story.stage.node("b").unexpected_errors = Some(1);
    assert!(story.act());
    assert_eq!(story.part().phase, UpgradePhase::UndoNodes);
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Replicas);
    story.act();
    story.stage.pass(NODE_MS_MAX + 1_000);
    assert!(story.act());
    assert!(
        story
            .part()
            .why_back
            .as_ref()
            .unwrap()
            .contains("not done in time")
    );
}

#[test]
fn switches_that_are_given_up_are_tried_again_and_then_no_more() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Switch);
    story.switches = Phase::RolledBack;
    story.run_to(UpgradePhase::UndoNodes);
    let plans = story.events.iter().filter(|e| *e == "Plan").count();
    assert_eq!(plans, SWITCH_TRIES as usize + 1);
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.engines(), ["", "", ""]);
}

#[test]
fn a_way_back_whose_first_switch_comes_to_nothing_is_tried_again_within_its_second() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    story.keep();
    story.task.cancel_requested = true;
    story.run_to(UpgradePhase::SwitchBack);
    let asked_ms = story.stage.now_ms;
    story.switches = Phase::RolledBack;
    while story.events.last().is_none_or(|e| e != "Plan") {
        assert!(story.act(), "{:?}", story.decide());
    }
    story.switch();
    let Decision::Wait { until_ms, .. } = story.decide() else {
        panic!("{:?}", story.decide());
    };
    let pause_ms = until_ms - story.stage.now_ms;
    assert!(pause_ms <= SWITCH_PAUSE_FIRST_MS + 1, "{pause_ms}");
    story.switches = Phase::Done;
    story.run_to(UpgradePhase::UndoNodes);
    assert_eq!(story.stage.shard.primary.as_str(), "a");
    let took_ms = story.stage.now_ms - asked_ms;
    assert!(took_ms < 1_000, "{took_ms}");
    assert!(story.part().rollback.as_ref().unwrap().open);
}

#[test]
fn a_bake_that_an_operator_was_to_end_and_did_not_says_why_it_is_over() {
    let by_operator = Options {
        finalize_by_operator: true,
        ..options()
    };
    let mut story = Story::new(&by_operator);
    story.run_to(UpgradePhase::Bake);
    let new = story.stage.shard.primary.clone();
    story.stage.node(new.as_str()).sync_full += 1;
    story.run_to(UpgradePhase::Done);
    let (state, words) = story.ended();
    assert_eq!(state, State::Done);
    let why = "the operator was not waited for";
    assert!(
        words.contains(why) && words.contains("a copy in full"),
        "{words}"
    );
    assert!(
        story.part().message.contains(why),
        "{}",
        story.part().message
    );
}

#[test]
fn a_way_back_that_does_not_work_waits_for_an_operator() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    story.task.cancel_requested = true;
    story.switches = Phase::RolledBack;
    story.run_to(UpgradePhase::Parked);
    assert!(story.task.is_parked());
    assert_eq!(story.task.state, State::NeedsOperator);
    assert!(menu(&story.task).contains(&Choice::Retry));
    story.switches = Phase::Done;
    story.task = resolved(&story.task, Choice::Retry, story.stage.now_ms);
    assert_eq!(story.part().phase, UpgradePhase::SwitchBack);
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.engines(), ["", "", ""]);
}

#[test]
fn trouble_of_proxies_in_the_bake_turns_it_back() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    story.keep();
    let epoch = story.stage.shard.epoch;
    let proxy = story.stage.fleet.proxies.values_mut().next().unwrap();
    proxy.troubles.insert("0".into(), (epoch, TROUBLE_MS_MAX));
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.stage.shard.primary.as_str(), "a");
}

#[test]
fn a_new_primary_that_answers_by_more_errors_than_the_old_one_is_taken_back_by_itself() {
    let faults = |story: &mut Story, count| {
        let proxy = story.stage.fleet.proxies.values_mut().next().unwrap();
        proxy.faults.insert("0".into(), count);
    };
    let before = 30;
    for (now, goes_back) in [
        (2 * before + FAULTS_MAX, false),
        (2 * before + FAULTS_MAX + 1, true),
    ] {
        let mut story = Story::new(&options());
        story.run_to(UpgradePhase::Switch);
        faults(&mut story, before);
        story.run_to(UpgradePhase::Bake);
        story.keep();
        faults(&mut story, now);
        let is_back = |story: &Story| matches!(story.decide(), Decision::TurnBack { .. });
        assert!(!is_back(&story), "the window begins before the switch");
        story.stage.pass(FAULTS_WINDOW_MS);
        assert_eq!(is_back(&story), goes_back, "{now}: {:?}", story.decide());
    }
}

#[test]
fn a_window_that_was_changed_counts_and_not_the_time_of_the_one_before() {
    let mut story = Story::new(&Options {
        in_window: true,
        ..options()
    });
    story.task.not_before_ms = u64::MAX - 1;
    // It was taken away: nothing else says when.
    story.instance.maintenance_window = String::new();
    story.run_to(UpgradePhase::Ready);
    let waits = story.decide();
    assert!(
        matches!(&waits, Decision::Wait { what, .. } if what == "its time"),
        "{waits:?}"
    );
    // Another one is open now.
    story.instance.maintenance_window = "12:00-14:00".into();
    story.run_to(UpgradePhase::Replicas);
}

#[test]
fn the_switch_waits_for_the_window_and_for_its_time() {
    let mut story = Story::new(&options());
    story.opens_ms = Some(u64::MAX - 1);
    story.task.not_before_ms = NOW + 500;
    story.run_to(UpgradePhase::Ready);
    let waits = |story: &Story, word: &str| match story.decide() {
        Decision::Wait { what, .. } | Decision::Rest { what, .. } => what.contains(word),
        _ => false,
    };
    assert!(waits(&story, "its time"), "{:?}", story.decide());
    story.stage.pass(1_000);
    assert!(waits(&story, "window"), "{:?}", story.decide());
    story.opens_ms = None;
    story.run_to(UpgradePhase::Replicas);
    story.opens_ms = Some(u64::MAX - 1);
    for _ in 0..50 {
        story.step();
    }
    assert_eq!(story.engines(), ["", NEW, NEW]);
    assert!(
        waits(&story, "window"),
        "replicas are not noticed, a switch may be"
    );
}

#[test]
fn an_operator_ends_the_bake_when_he_has_said_that_he_will() {
    let by_operator = Options {
        finalize_by_operator: true,
        ..options()
    };
    let mut story = Story::new(&by_operator);
    story.run_to(UpgradePhase::Bake);
    for _ in 0..20 {
        story.stage.pass(BAKE_MS);
        story.keep();
        assert!(!story.act(), "{:?}", story.decide());
    }
    assert!(menu(&story.task).contains(&Choice::Finalize));
    story.task = resolved(&story.task, Choice::Finalize, story.stage.now_ms);
    story.run_to(UpgradePhase::Done);
    assert!(!story.ended().1.contains("not waited for"));
}

#[test]
fn what_is_waited_for_is_said_once() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Bake);
    story.keep();
    let Decision::Wait { what, .. } = story.decide() else {
        panic!("{:?}", story.decide());
    };
    let said = say(story.view(), &what).unwrap();
    story.task = said.task;
    assert_eq!(say(story.view(), &what), None);
}

#[test]
fn every_record_of_a_story_survives_the_store() {
    Story::new(&options()).run_to_end(|story| {
        let read = crate::wire::task_from(&crate::wire::task_to(&story.task, 1));
        assert_eq!(read.unwrap(), story.task);
    });
}
