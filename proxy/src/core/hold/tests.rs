//! Stories of one gate, and random ones.

use super::*;

const READ: Effect = Effect::Read;

fn order(task: &str) -> Option<HoldOrder> {
    Some(HoldOrder {
        task_id: task.to_owned(),
        max_hold_us: 100,
    })
}

fn route(epoch: u64, hold: Option<HoldOrder>) -> Event {
    Event::Route { epoch, hold }
}

fn applied(epoch: u64) -> Action {
    Action::Report(Level::Applied { epoch })
}

fn held(epoch: u64) -> Action {
    Action::Report(Level::Held {
        epoch,
        task_id: "t".to_owned(),
    })
}

/// Steps through events with the number in flight after each, and compares the actions.
fn check(gate: &mut ShardGate, now_us: u64, steps: &[(Event, usize, &[Action])]) {
    for (event, in_flight, want) in steps {
        let got = gate.step(event.clone(), *in_flight, now_us);
        assert_eq!(got.as_slice(), *want, "after {event:?}");
    }
}

fn open(epoch: u64) -> ShardGate {
    let mut gate = ShardGate::new();
    gate.step(route(epoch, None), 0, 0);
    gate.step(Event::LinkUp, 0, 0);
    assert!(gate.admits());
    gate
}

#[test]
fn a_switchover_holds_then_switches_then_drains() {
    let mut gate = open(1);
    let refused = Event::Refused(Refusal::Fenced);
    check(
        &mut gate,
        10,
        &[
            (route(1, order("t")), 2, &[]),
            (refused, 1, &[]),
            (Event::Settled, 0, &[held(1)]),
            (route(2, None), 0, &[Action::Switch, applied(2)]),
            (Event::LinkUp, 0, &[Action::Drain]),
        ],
    );
    assert!(gate.admits() && gate.epoch() == 2);
}

#[test]
fn a_new_epoch_waits_for_what_is_in_flight_at_the_old_one() {
    let mut gate = open(1);
    check(
        &mut gate,
        10,
        &[
            (route(2, None), 1, &[]),
            (Event::Executed, 1, &[]),
            (Event::Executed, 0, &[Action::Switch, applied(2)]),
            (Event::LinkUp, 0, &[Action::Drain]),
        ],
    );
    let mut gate = open(1);
    check(&mut gate, 10, &[(route(2, None), 1, &[])]);
    let late = gate.deadline_us().unwrap();
    check(
        &mut gate,
        late,
        &[(Event::Tick, 1, &[Action::Abandon]), (Event::Tick, 1, &[])],
    );
    check(
        &mut gate,
        late,
        &[(Event::LinkDown, 0, &[Action::Switch, applied(2)])],
    );
}

#[test]
fn a_refusing_primary_is_asked_again_with_one_request() {
    let mut gate = open(1);
    let refused = || Event::Refused(Refusal::Fenced);
    check(&mut gate, 10, &[(refused(), 1, &[])]);
    assert_eq!(gate.judge(b"+OK\r\n", Effect::Write, b""), Verdict::Deliver);
    assert_eq!(gate.judge(b"$-1\r\n", READ, b""), Verdict::ReadAgain);
    check(&mut gate, 10, &[(Event::Settled, 0, &[])]);
    let at = gate.deadline_us().unwrap();
    check(
        &mut gate,
        at,
        &[(Event::Tick, 0, &[Action::Probe]), (refused(), 0, &[])],
    );
    let at = gate.deadline_us().unwrap();
    check(&mut gate, at, &[(Event::Tick, 0, &[Action::Probe])]);
    assert_eq!(gate.judge(b"$-1\r\n", READ, b""), Verdict::Deliver);
    check(&mut gate, at, &[(Event::Executed, 0, &[Action::Drain])]);
}

#[test]
fn a_lower_epoch_changes_nothing() {
    let mut gate = open(5);
    check(&mut gate, 10, &[(route(4, order("t")), 0, &[])]);
    assert!(gate.admits() && gate.epoch() == 5);
}

#[test]
fn a_hold_ends_by_itself_and_the_same_task_cannot_start_it_again() {
    let mut gate = open(1);
    check(&mut gate, 10, &[(route(1, order("t")), 0, &[held(1)])]);
    assert_eq!(gate.deadline_us(), Some(110));
    check(
        &mut gate,
        110,
        &[(Event::Tick, 0, &[applied(1), Action::Drain])],
    );
    check(&mut gate, 120, &[(route(1, order("t")), 0, &[])]);
    assert!(gate.admits());
    check(
        &mut gate,
        130,
        &[
            (route(1, None), 0, &[]),
            (route(1, order("t")), 0, &[held(1)]),
        ],
    );
}

#[test]
fn a_lost_connection_closes_the_gate_until_the_next_login() {
    let mut gate = open(1);
    check(&mut gate, 10, &[(Event::LinkDown, 0, &[])]);
    assert!(!gate.admits());
    check(&mut gate, 20, &[(Event::LinkUp, 0, &[Action::Drain])]);
}

#[test]
fn a_pause_keeps_requests_back_and_does_not_outlive_its_connection() {
    let mut gate = open(1);
    check(&mut gate, 10, &[(Event::Pause(true), 1, &[])]);
    assert!(!gate.admits() && gate.only_pauses());
    check(&mut gate, 20, &[(Event::Pause(false), 1, &[Action::Drain])]);
    check(
        &mut gate,
        30,
        &[(Event::Pause(true), 1, &[]), (Event::LinkDown, 0, &[])],
    );
    assert!(!gate.only_pauses());
    check(&mut gate, 40, &[(Event::LinkUp, 0, &[Action::Drain])]);
}

/// Any events in any order: the epoch never falls, an ordered hold admits nothing, and the gate
/// always has either a deadline or something that it waits for.
#[test]
fn random_events_break_no_invariant() {
    let mut seed = 0x1234_5678_u64;
    let mut below = |bound: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) % bound
    };
    for _ in 0..2_000 {
        let (mut gate, mut now_us, mut highest) = (ShardGate::new(), 0, 0);
        for _ in 0..50 {
            now_us += below(60);
            let epoch = below(4);
            let in_flight = below(2) as usize;
            let event = match below(10) {
                0 => route(epoch, None),
                1 => route(epoch, order("t")),
                2 => Event::Refused(Refusal::ReadOnly),
                3 => Event::Executed,
                4 => Event::LinkUp,
                5 => Event::LinkDown,
                6 => Event::Settled,
                7 => Event::Pause(below(2) == 0),
                _ => Event::Tick,
            };
            gate.step(event, in_flight, now_us);
            assert!(gate.epoch() >= highest);
            highest = gate.epoch();
            assert!(!(gate.admits() && gate.is_ordered_to_hold()));
            assert!(gate.admits() || !gate.is_ordered_to_hold() || gate.deadline_us().is_some());
        }
    }
}
