//! Several shards: who begins when.

use super::{
    story::{Story, options},
    *,
};
use crate::{
    detect::tests::NOW,
    spec::{Choice, Spec, State},
};

fn shards(count: usize, options: &Options) -> Story {
    let mut story = Story::new(options);
    edit(&mut story, |upgrade| {
        let one = upgrade.shards[0].clone();
        for index in 1..count {
            let mut next = one.clone();
            next.shard = index.to_string().into();
            upgrade.shards.push(next);
        }
        for part in &mut upgrade.shards {
            part.phase = UpgradePhase::Ready;
            part.nodes.iter_mut().for_each(|n| n.staged = true);
        }
    });
    story
}

fn edit(story: &mut Story, change: impl FnOnce(&mut Upgrade)) {
    if let Spec::Upgrade(upgrade) = &mut story.task.spec {
        change(upgrade);
    }
}

/// The shards that would begin now, were each looked at alone.
fn begin(story: &Story) -> Vec<usize> {
    let parts = story.upgrade().shards.iter().enumerate();
    let begins = parts.filter(|(_, part)| {
        let mut shard = story.stage.shard.clone();
        shard.id = part.shard.clone();
        let view = View {
            part,
            shard: &shard,
            ..story.view()
        };
        decide(view) == Decision::Begin
    });
    begins.map(|(index, _)| index).collect()
}

fn set(story: &mut Story, index: usize, phase: UpgradePhase) {
    edit(story, |upgrade| upgrade.shards[index].phase = phase);
}

#[test]
fn canaries_come_first_and_are_waited_for_then_so_many_at_a_time() {
    let mut story = shards(
        5,
        &Options {
            parallel_shards: 2,
            ..options()
        },
    );
    assert_eq!(begin(&story), [0]);
    set(&mut story, 0, UpgradePhase::Bake);
    assert!(begin(&story).is_empty(), "the canary bakes");
    set(&mut story, 0, UpgradePhase::Done);
    assert_eq!(begin(&story), [1]);
    set(&mut story, 1, UpgradePhase::Replicas);
    assert_eq!(begin(&story), [2]);
    set(&mut story, 2, UpgradePhase::Replicas);
    assert!(begin(&story).is_empty());
    set(&mut story, 1, UpgradePhase::Done);
    assert_eq!(begin(&story), [3]);
    edit(&mut story, |upgrade| upgrade.paused = true);
    assert!(begin(&story).is_empty(), "paused");
}

#[test]
fn nobody_begins_while_a_host_has_not_tried_the_engine_or_a_shard_goes_back() {
    let mut story = shards(3, &options());
    set(&mut story, 2, UpgradePhase::Stage);
    assert!(begin(&story).is_empty());
    set(&mut story, 2, UpgradePhase::Ready);
    set(&mut story, 0, UpgradePhase::Done);
    assert_eq!(begin(&story), [1]);
    edit(&mut story, |upgrade| {
        upgrade.shards[0].phase = UpgradePhase::UndoNodes;
        upgrade.shards[0].why_back = Some("it is slow".into());
    });
    assert!(begin(&story).is_empty());
}

#[test]
fn a_shard_that_has_gone_back_halts_the_rest_and_a_retry_goes_on_with_them() {
    let mut story = shards(3, &options());
    set(&mut story, 0, UpgradePhase::Done);
    edit(&mut story, |upgrade| {
        upgrade.shards[1].phase = UpgradePhase::RolledBack;
        upgrade.shards[1].message = "it is slow".into();
    });
    let part = story.upgrade().shards[2].clone();
    let view = View {
        part: &part,
        ..story.view()
    };
    let halted = decide(view);
    let Decision::End(UpgradePhase::RolledBack, why) = &halted else {
        panic!("{halted:?}");
    };
    assert!(why.contains("it is slow"), "{why}");
    story.task = write(view, &halted).unwrap().unwrap().task;
    let (state, words) = story.ended();
    assert_eq!(state, State::NeedsOperator);
    assert!(words.contains("1 of 3 shards"), "{words}");
    story.task.state = state;
    assert_eq!(menu(&story.task), [Choice::Retry]);
    story.task = retried(story.task.clone(), NOW);
    let phases: Vec<_> = story.upgrade().shards.iter().map(|s| s.phase).collect();
    let again = UpgradePhase::Stage;
    assert_eq!(phases, [UpgradePhase::Done, again, again]);
    assert_eq!(story.task.state, State::Running);
}

#[test]
fn an_operator_pauses_and_resumes_between_shards() {
    let mut story = shards(2, &options());
    story.task = resolved(&story.task, Choice::Pause, NOW);
    assert!(begin(&story).is_empty());
    assert_eq!(menu(&story.task), [Choice::Resume]);
    story.task = resolved(&story.task, Choice::Resume, NOW);
    assert_eq!(begin(&story), [0]);
}

#[test]
fn a_shard_that_goes_back_by_itself_takes_those_along_that_still_can() {
    let mut story = shards(3, &options());
    story.run_to(UpgradePhase::Bake);
    story.keep();
    assert!(!story.act(), "it bakes: {:?}", story.decide());
    edit(&mut story, |upgrade| {
        upgrade.shards[1].phase = UpgradePhase::UndoNodes;
        upgrade.shards[1].why_back = Some("it is slow".into());
    });
    let why = |story: &Story| story.part().why_back.clone().unwrap_or_default();
    assert!(story.act());
    assert_eq!(why(&story), "another shard went back: shard 1: it is slow");
    assert_eq!(story.part().phase, UpgradePhase::SwitchBack);
    // One whose way back is closed is finished.
    let mut story = shards(3, &options());
    story.run_to(UpgradePhase::Finalize);
    edit(&mut story, |upgrade| {
        upgrade.shards[1].phase = UpgradePhase::RolledBack;
        upgrade.shards[1].why_back = Some("it is slow".into());
    });
    story.run_to(UpgradePhase::Done);
}

#[test]
fn an_operator_who_takes_one_back_takes_all() {
    let mut story = shards(2, &options());
    story.run_to(UpgradePhase::Bake);
    story.keep();
    story.task.cancel_requested = true;
    assert!(story.act());
    assert!(story.part().on_request);
    let part = story.upgrade().shards[1].clone();
    let view = View {
        part: &part,
        ..story.view()
    };
    assert!(matches!(
        decide(view),
        Decision::End(UpgradePhase::RolledBack, _)
    ));
}

#[test]
fn a_switch_that_holds_for_too_long_lets_no_further_shard_begin_until_an_operator_resumes() {
    for (max_hold_ms, held_ms, halts) in [
        (1_000, 1_000, false),
        (1_000, 1_001, true),
        (0, 9_000, false),
    ] {
        let mut story = shards(
            2,
            &Options {
                max_hold_ms,
                ..options()
            },
        );
        story.run_to(UpgradePhase::Switch);
        while story.part().switch.is_none() {
            assert!(story.act(), "{:?}", story.decide());
        }
        story.switch();
        edit(&mut story, |upgrade| {
            upgrade.shards[0].switch.as_mut().unwrap().hold_us = held_ms * 1_000;
        });
        story.run_to(UpgradePhase::Bake);
        assert_eq!(
            story.upgrade().paused,
            halts,
            "{held_ms} of {max_hold_ms} ms"
        );
        assert_eq!(
            story.task.message.contains("held commands for 1001 ms"),
            halts
        );
        let read = crate::wire::task_from(&crate::wire::task_to(&story.task, 1)).unwrap();
        assert_eq!(read.spec, story.task.spec);
        set(&mut story, 0, UpgradePhase::Done);
        assert_eq!(begin(&story).is_empty(), halts);
        story.task = resolved(&story.task, Choice::Resume, NOW);
        assert_eq!(begin(&story), [1], "{:?}", story.upgrade().paused_why);
    }
}
