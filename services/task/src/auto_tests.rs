//! Patches by themselves: which, when, and when not.

use slotmesh_topology::artifact::{SHA256_LENGTH, parse_name};

use super::*;
use crate::{
    steady::{Clock, REST_MS},
    upgrade::story,
};

const HOUR_MS: u64 = 60 * 60 * 1_000;
const DAY_MS: u64 = 24 * HOUR_MS;
/// Half past two of some day.
const OPEN_MS: u64 = 20_000 * DAY_MS + 2 * HOUR_MS + HOUR_MS / 2;

fn listed(name: &str, level: Level) -> Artifact {
    let (product, version) = parse_name(name).unwrap();
    Artifact {
        product,
        version,
        level,
        release_note: String::new(),
        sha256: [0; SHA256_LENGTH],
        source: "file:///opt/program".into(),
        created_unix_ms: 1,
    }
}

fn catalogue() -> Vec<Artifact> {
    vec![
        listed("redis-7.0.14", Level::High),
        listed("redis-7.0.16", Level::High),
        listed("redis-7.0.17", Level::Low),
        listed("redis-8.2.3", Level::High),
        listed("valkey-8.0.1", Level::High),
    ]
}

fn instance() -> Instance {
    Instance {
        maintenance_window: "02:00-03:00".into(),
        auto_upgrade: Some(Level::Medium),
        ..story::instance()
    }
}

fn engine(name: &str) -> Engine {
    parse_name(name).unwrap()
}

/// Another instance's, or this one's, upgrade that is or was.
fn task(instance: &str, state: State, automatic: bool) -> Task {
    let mut task = story::task();
    task.instance = instance.into();
    task.state = state;
    if let Spec::Upgrade(upgrade) = &mut task.spec {
        upgrade.engine = "redis-7.0.17".into();
        upgrade.automatic = automatic;
    }
    task
}

fn judged(instance: &Instance, tasks: &[Task], now_ms: u64) -> Verdict {
    let tasks: Vec<&Task> = tasks.iter().collect();
    let other = Instance {
        id: "other".into(),
        ..self::instance()
    };
    let scene = Scene {
        listed: &catalogue(),
        instances: &[instance, &other],
        tasks: &tasks,
        at_a_time: 1,
        now_ms,
        rests_ms: 0,
    };
    judge(instance, Some(&[engine("redis-7.0.15")]), scene)
}

fn why(verdict: Verdict) -> String {
    match verdict {
        Verdict::Wait { why, .. } => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_newest_patch_of_the_release_is_due_when_one_of_those_missed_is_of_the_level() {
    let due = Verdict::Due {
        to: engine("redis-7.0.17"),
        level: Level::High,
    };
    assert_eq!(judged(&instance(), &[], OPEN_MS), due);
    let newer = |from: &str| {
        let scene = Scene {
            listed: &catalogue(),
            instances: &[],
            tasks: &[],
            at_a_time: 1,
            now_ms: OPEN_MS,
            rests_ms: 0,
        };
        judge(&instance(), Some(&[engine(from)]), scene)
    };
    assert!(
        why(newer("redis-7.0.16")).contains("of that level"),
        "only LOW"
    );
    assert!(why(newer("redis-7.0.17")).contains("no newer patch"));
    assert!(
        why(newer("redis-7.2.1")).contains("no newer patch"),
        "not 8.2"
    );
}

#[test]
fn nothing_is_installed_while_off_or_unknown_or_between_two_releases() {
    let off = Instance {
        auto_upgrade: None,
        ..instance()
    };
    assert_eq!(judged(&off, &[], OPEN_MS), Verdict::Off);
    let (catalogue, tasks) = (catalogue(), []);
    let scene = Scene {
        listed: &catalogue,
        instances: &[],
        tasks: &tasks,
        at_a_time: 1,
        now_ms: OPEN_MS,
        rests_ms: 0,
    };
    assert!(why(judge(&instance(), None, scene)).contains("not every node"));
    let mixed = [engine("redis-7.0.15"), engine("redis-8.2.3")];
    assert!(why(judge(&instance(), Some(&mixed), scene)).contains("several releases"));
}

#[test]
fn it_begins_inside_of_the_window_only_and_a_window_that_was_missed_is_over() {
    for (at_ms, is_due) in [
        (OPEN_MS - HOUR_MS, false),
        (OPEN_MS, true),
        // Nobody led during the window: the next one is waited for.
        (OPEN_MS + HOUR_MS, false),
        (OPEN_MS + DAY_MS, true),
    ] {
        let verdict = judged(&instance(), &[], at_ms);
        assert_eq!(
            matches!(verdict, Verdict::Due { .. }),
            is_due,
            "{verdict:?}"
        );
    }
    let without = Instance {
        maintenance_window: String::new(),
        ..instance()
    };
    assert!(why(judged(&without, &[], OPEN_MS)).contains("maintenance window"));
}

#[test]
fn one_instance_at_a_time_and_one_that_waits_for_an_operator_stops_the_others() {
    for state in [State::Pending, State::Running] {
        let tasks = [task("other", state, true)];
        assert!(why(judged(&instance(), &tasks, OPEN_MS)).contains("its turn"));
    }
    let by_hand = [task("other", State::Running, false)];
    assert!(matches!(
        judged(&instance(), &by_hand, OPEN_MS),
        Verdict::Due { .. }
    ));
    let own = [task("r", State::Running, false)];
    assert!(why(judged(&instance(), &own, OPEN_MS)).contains("which upgrades it"));
}

#[test]
fn who_waits_behind_one_that_is_paused_or_parked_is_told_which_and_why() {
    let stopped = |of: &str, edit: &dyn Fn(&mut Upgrade)| {
        let mut task = task(of, State::Running, true);
        if let Spec::Upgrade(upgrade) = &mut task.spec {
            edit(upgrade);
        }
        why(judged(&instance(), &[task], OPEN_MS))
    };
    let gate = "a switch of shard 0 held commands for 1200 ms, more than 1000 ms";
    let by_gate = |u: &mut Upgrade| (u.paused, u.paused_why) = (true, gate.into());
    let said = stopped("other", &by_gate);
    for part in ["its turn", "task t of instance other is paused", gate] {
        assert!(said.contains(part), "{said}");
    }
    let said = stopped("r", &by_gate);
    assert!(said.contains("which upgrades it and is paused") && said.contains(gate));
    let said = stopped("other", &|u| u.paused = true);
    assert!(
        said.contains("is paused by an operator: resume or cancel"),
        "{said}"
    );
    let said = stopped("other", &|_| {});
    assert_eq!(said, "its turn: 1 at a time");

    let mut parked = task("other", State::NeedsOperator, true);
    parked.message = "every live host has a node of the shard".into();
    if let Spec::Upgrade(upgrade) = &mut parked.spec {
        upgrade.shards[0].phase = UpgradePhase::Parked;
        upgrade.engine = "redis-8.2.3".into();
    }
    let said = why(judged(&instance(), &[parked], OPEN_MS));
    assert!(
        said.contains("waits for an operator: every live host"),
        "{said}"
    );
}

#[test]
fn a_version_that_did_not_work_somewhere_waits_until_it_has_worked() {
    for state in [State::RolledBack, State::NeedsOperator] {
        for automatic in [true, false] {
            let failed = task("other", state, automatic);
            let said = why(judged(&instance(), std::slice::from_ref(&failed), OPEN_MS));
            assert!(said.contains("did not get to its end"), "{said}");
            let mended = [failed, task("other", State::Done, false)];
            assert!(matches!(
                judged(&instance(), &mended, OPEN_MS),
                Verdict::Due { .. }
            ));
        }
    }
    let elsewhere = [task("other", State::Cancelled, true)];
    assert!(matches!(
        judged(&instance(), &elsewhere, OPEN_MS),
        Verdict::Due { .. }
    ));
    let here = [task("r", State::Cancelled, true)];
    assert!(why(judged(&instance(), &here, OPEN_MS)).contains("who stopped"));
}

#[test]
fn a_host_that_was_lost_says_nothing_about_the_version_and_is_waited_for_by_its_own_instance_only()
{
    let mut lost = task("r", State::RolledBack, true);
    lost.updated_ms = OPEN_MS;
    let edit = |task: &Task, blameless, phase| {
        let mut task = task.clone();
        let Spec::Upgrade(upgrade) = &mut task.spec else {
            panic!("{task:?}");
        };
        (upgrade.shards[0].blameless, upgrade.shards[0].phase) = (blameless, phase);
        task
    };
    let lost = edit(&lost, true, UpgradePhase::RolledBack);
    let other = Instance {
        id: "other".into(),
        ..instance()
    };
    let is_due = |instance: &Instance, task: &Task, now_ms| {
        let verdict = judged(instance, std::slice::from_ref(task), now_ms);
        matches!(verdict, Verdict::Due { .. })
    };
    assert!(is_due(&other, &lost, OPEN_MS));
    let said = why(judged(&instance(), std::slice::from_ref(&lost), OPEN_MS));
    assert!(said.contains("lacked a host"), "{said}");
    assert!(
        is_due(&instance(), &lost, OPEN_MS + DAY_MS),
        "the next window"
    );
    for blamed in [
        edit(&lost, false, UpgradePhase::RolledBack),
        edit(&lost, true, UpgradePhase::Parked),
    ] {
        assert!(!is_due(&other, &blamed, OPEN_MS), "{blamed:?}");
    }
}

/// When it is due, looked at once a second while the wall clock reads so and the other one counts.
fn due(wall: impl Fn(u64) -> u64, seconds: u64) -> Vec<u64> {
    let (mut clock, catalogue) = (Clock::default(), catalogue());
    let is_due = |second: &u64| {
        let now_ms = wall(*second);
        let scene = Scene {
            listed: &catalogue,
            instances: &[],
            tasks: &[],
            at_a_time: 1,
            now_ms,
            rests_ms: clock.look(now_ms, second * 1_000),
        };
        let verdict = judge(&instance(), Some(&[engine("redis-7.0.15")]), scene);
        matches!(verdict, Verdict::Due { .. })
    };
    (0..seconds).filter(is_due).collect()
}

#[test]
fn after_a_jump_back_into_the_window_nothing_begins_until_the_clock_is_steady() {
    let wall = |second: u64| match second {
        0..600 => OPEN_MS + second * 1_000,
        _ => OPEN_MS + second * 1_000 - HOUR_MS / 2,
    };
    let due = due(wall, 1_200);
    let rested = 600 + REST_MS / 1_000;
    let wanted: Vec<u64> = (0..600).chain(rested..1_200).collect();
    assert_eq!(due, wanted);
}

#[test]
fn what_has_begun_or_is_done_is_not_begun_again_whatever_the_clock_says() {
    let own = [task("r", State::Running, true)];
    for at_ms in [OPEN_MS, OPEN_MS - HOUR_MS / 4, OPEN_MS + DAY_MS] {
        let verdict = judged(&instance(), &own, at_ms);
        assert!(why(verdict).contains("which upgrades it"));
        let scene = Scene {
            listed: &catalogue(),
            instances: &[],
            tasks: &[],
            at_a_time: 1,
            now_ms: at_ms,
            rests_ms: 0,
        };
        let verdict = judge(&instance(), Some(&[engine("redis-7.0.17")]), scene);
        assert!(why(verdict).contains("no newer patch"));
    }
}

#[test]
fn a_clock_that_jumps_forward_over_or_into_the_window_begins_nothing_at_once() {
    let before_ms = OPEN_MS - 2 * HOUR_MS;
    // Over it: it is not open any more.
    let over = |second: u64| match second {
        0..600 => before_ms + second * 1_000,
        _ => OPEN_MS + HOUR_MS + second * 1_000,
    };
    assert!(due(over, 4_000).is_empty());
    // Into it for some seconds, by a mistake that is corrected.
    let mistaken = |second: u64| match second {
        600..660 => OPEN_MS + second * 1_000,
        _ => before_ms + second * 1_000,
    };
    assert!(due(mistaken, 2_000).is_empty());
    // Into it for good: when it has been steady for a while.
    let into = |second: u64| match second {
        0..600 => before_ms + second * 1_000,
        _ => OPEN_MS + second * 1_000,
    };
    assert_eq!(due(into, 1_000).first(), Some(&(600 + REST_MS / 1_000)));
}

#[test]
fn one_that_has_not_begun_when_its_window_closes_keeps_no_other_ones() {
    let mut waits = task("other", State::Running, true);
    let later = Instance {
        maintenance_window: "04:00-05:00".into(),
        ..instance()
    };
    let (mine, theirs) = (OPEN_MS + 2 * HOUR_MS, OPEN_MS);
    let is_due = |instance: &Instance, tasks: &[Task], now_ms| {
        matches!(judged(instance, tasks, now_ms), Verdict::Due { .. })
    };
    let tasks = [waits.clone()];
    assert!(
        !is_due(&instance(), &tasks, theirs),
        "it may begin at any moment"
    );
    assert!(is_due(&later, &tasks, mine), "it begins tomorrow");
    if let Spec::Upgrade(upgrade) = &mut waits.spec {
        upgrade.shards[0].phase = UpgradePhase::Bake;
    }
    assert!(why(judged(&later, &[waits], mine)).contains("its turn"));
}

#[test]
fn who_waited_for_its_window_does_not_begin_beside_one_that_has_begun_since() {
    let waits = task("r", State::Running, true);
    let mut begun = task("other", State::Running, true);
    begun.id = "u".into();
    let before = |waits: &Task, begun: &Task, at_a_time| {
        goes_before(waits, [waits, begun].into_iter(), at_a_time)
    };
    assert_eq!(before(&waits, &begun, 1), None, "neither has");
    if let Spec::Upgrade(upgrade) = &mut begun.spec {
        upgrade.shards[0].phase = UpgradePhase::Bake;
    }
    let said = before(&waits, &begun, 1).unwrap();
    assert!(
        said.contains("task u of instance other is under way"),
        "{said}"
    );
    assert_eq!(before(&waits, &begun, 2), None, "two may be");
    assert_eq!(before(&begun, &begun, 1), None, "it goes on");
    let by_hand = task("r", State::Running, false);
    assert_eq!(before(&by_hand, &begun, 1), None);
    begun.state = State::Done;
    assert_eq!(before(&waits, &begun, 1), None);
}
