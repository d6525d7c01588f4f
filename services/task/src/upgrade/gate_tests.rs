//! What a command may take at a new primary, and what is not compared.

use super::*;
use crate::{
    observe::ServedWindow,
    upgrade::{
        Decision, UpgradePhase,
        story::{Story, options},
    },
};

fn cost(name: &str, calls: u64, usec: u64) -> CommandCost {
    CommandCost {
        name: name.into(),
        calls,
        usec,
    }
}

/// What `get` and `set` have cost, for each of them 10,000 times.
fn of(get: u64, set: u64) -> Vec<CommandCost> {
    vec![
        cost("get", 10_000, get * 10_000),
        cost("set", 10_000, set * 10_000),
    ]
}

/// In the bake of a shard whose old primary was measured.
fn baking(before: Vec<CommandCost>) -> Story {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Switch);
    let epoch = story.stage.shard.epoch;
    story.stage.node("a").served = vec![ServedWindow {
        epoch,
        number: 0,
        commands: before,
    }];
    story.run_to(UpgradePhase::Bake);
    story.keep();
    story
}

/// Its new primary's windows, the newest first.
fn serves(story: &mut Story, windows: Vec<(u32, Vec<CommandCost>)>) {
    let (epoch, primary) = (story.stage.shard.epoch, story.stage.shard.primary.clone());
    let window = |(number, commands)| ServedWindow {
        epoch,
        number,
        commands,
    };
    story.stage.node(primary.as_str()).served = windows.into_iter().map(window).collect();
}

fn back(story: &Story) -> Option<String> {
    match story.decide() {
        Decision::TurnBack { why, .. } => Some(why),
        _ => None,
    }
}

#[test]
fn a_new_primary_that_takes_many_times_as_long_for_two_windows_is_taken_back_with_both_numbers() {
    let mut story = baking(of(10, 30));
    serves(&mut story, vec![(2, of(80, 300)), (1, of(85, 290))]);
    let why = back(&story).unwrap_or_else(|| panic!("{:?}", story.decide()));
    assert!(why.contains("190.0 µs") && why.contains("20.0 µs"), "{why}");
    // Whoever leads next knows it, too.
    let read = crate::wire::task_from(&crate::wire::task_to(&story.task, 1)).unwrap();
    assert_eq!(read.spec, story.task.spec);
    story.run_to(UpgradePhase::RolledBack);
    assert_eq!(story.stage.shard.primary.as_str(), "a");
}

#[test]
fn one_slow_window_the_first_one_little_more_or_few_commands_are_no_reason() {
    let slow = || of(80, 300);
    for (what, windows) in [
        ("one of two", vec![(2, slow()), (1, of(11, 31))]),
        ("the first", vec![(1, slow()), (0, slow())]),
        ("only one", vec![(1, slow())]),
        (
            "less than three times",
            vec![(2, of(29, 89)), (1, of(29, 89))],
        ),
        (
            "few",
            vec![(2, vec![cost("get", 900, 900_000)]), (1, slow())],
        ),
        (
            "others",
            vec![(2, vec![cost("sort", 9_000, 9_000_000)]), (1, slow())],
        ),
        ("none", vec![]),
    ] {
        let mut story = baking(of(10, 30));
        serves(&mut story, windows);
        assert_eq!(back(&story), None, "{what}");
    }
}

#[test]
fn what_was_not_measured_before_is_not_compared_and_microseconds_are_not_many_times_two() {
    for before in [vec![], vec![cost("get", 999, 999)], of(2, 2)] {
        let mut story = baking(before);
        serves(&mut story, vec![(2, of(40, 40)), (1, of(40, 40))]);
        assert_eq!(back(&story), None);
    }
}

#[test]
fn windows_of_another_epoch_are_not_of_this_primary() {
    let mut story = baking(of(10, 30));
    serves(&mut story, vec![(2, of(80, 300)), (1, of(80, 300))]);
    for window in &mut story.stage.node("b").served {
        window.epoch = slotmesh_topology::Epoch(window.epoch.0 - 1);
    }
    assert_eq!(back(&story), None);
}

#[test]
fn another_mix_of_the_same_commands_is_not_slower() {
    let before = vec![
        cost("get", 100_000, 200_000),
        cost("zunion", 1_000, 900_000),
    ];
    let now = vec![
        cost("get", 1_000, 2_000),
        cost("zunion", 100_000, 90_000_000),
    ];
    assert_eq!(compared(&before, &now), Some((10_891, 10_891)));
}

#[test]
fn a_shard_under_way_shows_each_gate_with_its_limit_before_it_breaks() {
    let mut story = Story::new(&options());
    story.run_to(UpgradePhase::Ready);
    let shown = |story: &Story| {
        let heard = Heard {
            fleet: &story.stage.fleet,
            shard: &story.stage.shard,
            now_ms: story.stage.now_ms,
        };
        gates(story.upgrade(), story.part(), Some(heard))
    };
    assert_eq!(shown(&story), [], "nothing can break yet");
    let mut story = baking(of(10, 30));
    serves(&mut story, vec![(1, of(40, 60))]);
    story.stage.pass(FAULTS_WINDOW_MS);
    assert_eq!(back(&story), None);
    if let crate::spec::Spec::Upgrade(upgrade) = &mut story.task.spec {
        upgrade.shards[0].hold_us = 12_500;
    }
    let gates = shown(&story);
    let of = |name: &str| {
        let gate = gates.iter().find(|g| g.name == name).unwrap();
        (gate.before, gate.now, gate.limit)
    };
    assert_eq!(of("Hold"), (None, Some(12.5), Some(1_000.0)));
    assert_eq!(of("Faults"), (Some(0.0), Some(0.0), Some(100.0)));
    assert_eq!(of("CommandTime"), (Some(20.0), Some(50.0), Some(70.0)));
    assert_eq!(of("ProxyTrouble"), (None, Some(0.0), Some(5_000.0)));
    // Who does not lead hears not everybody: it says what is written.
    let written = super::gates(story.upgrade(), story.part(), None);
    let now: Vec<_> = written.iter().map(|g| (g.name, g.now)).collect();
    assert_eq!(
        now,
        [
            ("Hold", Some(12.5)),
            ("Faults", None),
            ("CommandTime", None),
            ("ProxyTrouble", None)
        ]
    );
}
