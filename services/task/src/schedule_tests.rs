//! Windows, times, and what becomes of a task whose time has come.

use super::*;

const HOUR_MS: u64 = 60 * MINUTE_MS;

#[test]
fn a_window_is_open_now_or_opens_next() {
    let window = Window::parse("02:00-03:30").unwrap();
    let day = 20_000 * DAY_MS;
    assert_eq!(window.next_ms(day), day + 2 * HOUR_MS);
    assert_eq!(window.next_ms(day + 3 * HOUR_MS), day + 3 * HOUR_MS);
    let late = day + 4 * HOUR_MS;
    assert_eq!(window.next_ms(late), day + DAY_MS + 2 * HOUR_MS);
    let night = Window::parse("23:00-01:00").unwrap();
    assert_eq!(night.next_ms(day), day, "over midnight");
    assert_eq!(night.next_ms(day + HOUR_MS), day + 23 * HOUR_MS);
}

#[test]
fn a_window_may_say_that_it_is_utc_and_an_old_short_one_is_still_read() {
    assert_eq!(Window::parse("23:30Z-00:30Z"), Window::parse("23:30-00:30"));
    assert!(Window::parse("02:00-02:30").is_err());
    assert!(Window::read("02:00-02:30").is_ok());
}

#[test]
fn what_is_no_window_is_refused() {
    for text in [
        "",
        "2-3",
        "02:00",
        "24:00-03:00",
        "02:00-02:59",
        "02:00Z-02:30Z",
        "02:00ZZ-03:00Z",
        "2:00-03:00",
        "02:00-02:00",
        "+2:00-03:00",
    ] {
        assert_eq!(
            Window::parse(text).unwrap_err().reason,
            "WINDOW_INVALID",
            "{text}"
        );
    }
}

#[test]
fn a_time_that_has_passed_is_now_and_one_too_far_is_refused() {
    assert_eq!(at(5, 10), Ok(0));
    assert_eq!(at(11, 10), Ok(11));
    assert_eq!(
        at(11 + AHEAD_MS_MAX, 10).unwrap_err().reason,
        "TOO_FAR_AHEAD"
    );
}

fn switch(to: &str) -> ShardSwitch {
    ShardSwitch {
        shard: "0".into(),
        from: "a".into(),
        to: to.into(),
        from_epoch: slotmesh_topology::Epoch(1),
        phase: Phase::Preflight,
        phase_since_ms: 1,
        message: String::new(),
        hold_us: 0,
        critical_us: 0,
    }
}

fn shard() -> Shard {
    let member = |node: &str, role| slotmesh_topology::Member {
        node: node.into(),
        host: "h".into(),
        role,
        run_id: "x".into(),
        address: "x:1".into(),
        in_sync: true,
        priority: slotmesh_topology::PRIORITY,
        leaving: false,
        engine: String::new(),
        exchange: None,
    };
    Shard {
        instance: "r".into(),
        id: "0".into(),
        index: 0,
        slots: slotmesh_topology::slot::split_evenly(1),
        epoch: slotmesh_topology::Epoch(7),
        primary: "b".into(),
        members: vec![
            member("a", slotmesh_topology::NodeRole::Replica),
            member("b", slotmesh_topology::NodeRole::Primary),
        ],
        mode: slotmesh_topology::Mode::Serving,
        closed_epoch: slotmesh_topology::Epoch(6),
        departures: Vec::new(),
        roster: Default::default(),
    }
}

#[test]
fn what_was_scheduled_is_planned_anew_when_it_begins() {
    let plan = |to: &str| match begin(&[switch(to)], &[shard()], |_| None, 9) {
        Beginning::Begin(switches) => switches[0].clone(),
        Beginning::Busy(task) => panic!("busy with {task}"),
    };
    let moved = plan("a");
    assert_eq!((moved.from.as_str(), moved.from_epoch.0), ("b", 7));
    assert_eq!(plan("b").phase, Phase::Done);
    assert_eq!(plan("gone").phase, Phase::RolledBack);
    let busy = begin(&[switch("a")], &[shard()], |_| Some("t-2".into()), 9);
    assert_eq!(busy, Beginning::Busy("t-2".into()));
}

fn scheduled(not_before_ms: u64) -> Task {
    Task {
        spec: Spec::Switchover(vec![switch("a")]),
        state: State::Pending,
        not_before_ms,
        deadline_ms: not_before_ms + HOUR_MS,
        in_window: true,
        ..crate::upgrade::story::task()
    }
}

const NIGHT: &str = "02:00-03:00";

#[test]
fn a_task_that_waits_for_a_window_does_not_begin_outside_of_it_when_its_time_was_missed() {
    let day = 20_000 * DAY_MS;
    let task = scheduled(day + 2 * HOUR_MS);
    let at = |now_ms| retimed(&task, NIGHT, now_ms, 0);
    assert_eq!(at(day + HOUR_MS), None, "its time has not come");
    assert_eq!(at(day + 2 * HOUR_MS + 1), None, "it begins");
    // No controller led, or the clock jumped forward over the window.
    let late = at(day + 5 * HOUR_MS).unwrap();
    assert_eq!(late.not_before_ms, day + DAY_MS + 2 * HOUR_MS);
    assert_eq!(late.deadline_ms, task.deadline_ms + DAY_MS);
    assert!(is_scheduled(&late), "it may still be given another time");
    assert!(
        late.message.contains("no controller led"),
        "{}",
        late.message
    );
    // The clock was wrong, and has been right for a while: it has its time back.
    let back = retimed(&late, NIGHT, day + HOUR_MS, 0).unwrap();
    assert_eq!(
        (back.not_before_ms, back.deadline_ms),
        (task.not_before_ms, task.deadline_ms)
    );
    // Without a window any time is one; one with a time of its own is not put off.
    assert_eq!(retimed(&task, "", day + 5 * HOUR_MS, 0), None);
    let by_time = Task {
        in_window: false,
        ..task.clone()
    };
    assert_eq!(retimed(&by_time, NIGHT, day + 5 * HOUR_MS, 0), None);
    let begun = Task {
        state: State::Running,
        ..task.clone()
    };
    assert_eq!(retimed(&begun, NIGHT, day + 5 * HOUR_MS, 0), None);
}

#[test]
fn a_window_that_a_jump_has_opened_does_not_count_and_changes_no_time_until_the_clock_is_steady() {
    let day = 20_000 * DAY_MS;
    let open = day + 2 * HOUR_MS + MINUTE_MS;
    let task = scheduled(day + 2 * HOUR_MS);
    let times = |t: &Task| (t.not_before_ms, t.deadline_ms);
    // Into the window, to its end, past it, and by a year: no later time is made of any of them.
    for jumped in [
        open,
        day + 3 * HOUR_MS - MINUTE_MS,
        day + 5 * HOUR_MS,
        open + 365 * DAY_MS,
    ] {
        let rested = retimed(&task, NIGHT, jumped, 5 * MINUTE_MS).unwrap();
        assert_eq!(times(&rested), times(&task));
        assert!(
            rested.message.contains("clock has jumped"),
            "{}",
            rested.message
        );
        let again = retimed(&rested, NIGHT, jumped + MINUTE_MS, 4 * MINUTE_MS);
        assert_eq!(again.as_ref(), Some(&rested), "said once");
        // The clock is right again before the night: it begins in its window.
        assert!(open - HOUR_MS < rested.not_before_ms);
        assert_eq!(retimed(&rested, NIGHT, open, 0), None);
        // It was right after the jump: what has been missed is put off then.
        let late = retimed(&rested, NIGHT, day + 5 * HOUR_MS, 0).unwrap();
        assert_eq!(late.not_before_ms, day + DAY_MS + 2 * HOUR_MS);
    }
    assert_eq!(retimed(&task, "", open, 5 * MINUTE_MS), None);
}

#[test]
fn what_waits_is_planned_for_its_time_or_the_window_whatever_it_does_meanwhile() {
    let day = 20_000 * DAY_MS;
    let (noon, night) = (day + 12 * HOUR_MS, day + DAY_MS + 2 * HOUR_MS);
    // Its hosts try the engine: the first write has made it a running one.
    let mut upgrade = crate::upgrade::story::task();
    assert_eq!(upgrade.state, State::Running);
    let at = |task: &Task, now_ms| planned_ms(task, NIGHT, now_ms, 0);
    assert_eq!(at(&upgrade, noon), None, "it waits for no time");
    upgrade.not_before_ms = noon + 1;
    assert_eq!(at(&upgrade, noon), Some(noon + 1));
    assert_eq!(at(&upgrade, noon + 1), None);
    // The window was open when it was admitted, and has closed since.
    upgrade.not_before_ms = 0;
    if let Spec::Upgrade(spec) = &mut upgrade.spec {
        spec.in_window = true;
    }
    assert_eq!(at(&upgrade, noon), Some(night));
    assert_eq!(at(&upgrade, night), None);
    let rests = planned_ms(&upgrade, NIGHT, night, MINUTE_MS);
    assert_eq!(rests, Some(night + MINUTE_MS), "after a jump of the clock");
    if let Spec::Upgrade(spec) = &mut upgrade.spec {
        spec.shards[0].phase = crate::upgrade::UpgradePhase::Replicas;
    }
    assert_eq!(at(&upgrade, noon), None, "it has begun");
    assert_eq!(at(&scheduled(night), noon), Some(night));
}

#[test]
fn a_task_that_waits_for_the_window_begins_in_the_one_that_there_is_now() {
    let day = 20_000 * DAY_MS;
    let (ten, noon, night) = (
        day + 10 * HOUR_MS,
        day + 12 * HOUR_MS,
        day + DAY_MS + 2 * HOUR_MS,
    );
    const NOON: &str = "12:00-14:00";
    let task = scheduled(night);
    assert_eq!(retimed(&task, NIGHT, ten, 0), None, "as planned");
    assert_eq!(retimed(&task, NOON, ten, MINUTE_MS), None, "windows rest");
    assert_eq!(retimed(&task, "", ten, 0), None, "it keeps the time it had");
    let moved = retimed(&task, NOON, ten, 0).unwrap();
    assert_eq!(
        (moved.not_before_ms, moved.deadline_ms),
        (noon, noon + HOUR_MS)
    );
    assert!(
        moved.message.contains("is 12:00-14:00 UTC now"),
        "{}",
        moved.message
    );
    assert_eq!(retimed(&moved, NOON, ten + 1, 0), None, "said once");
    assert_eq!(retimed(&moved, NOON, noon, 0), None, "it begins");
    // It is open already, or was moved away from under it at its time.
    let open = retimed(&task, NOON, noon + 1, 0).unwrap();
    assert_eq!(open.not_before_ms, noon + 1);
    let late = retimed(&moved, NIGHT, noon, 0).unwrap();
    assert_eq!(late.not_before_ms, night);
    assert!(
        !late.message.contains("no controller led"),
        "{}",
        late.message
    );

    // Of what has parts, the record keeps the time of its admission.
    let mut upgrade = crate::upgrade::story::task();
    upgrade.not_before_ms = night;
    if let Spec::Upgrade(spec) = &mut upgrade.spec {
        spec.in_window = true;
    }
    let planned = |window| planned_ms(&upgrade, window, ten, 0);
    assert_eq!(planned(NIGHT), Some(night));
    assert_eq!(planned(NOON), Some(noon));
    assert_eq!(planned(""), Some(night));
    assert_eq!(planned_ms(&upgrade, NOON, noon, 0), None);
}
