//! The machine as tables: events in, actions out; and what must hold whatever comes.

use super::*;

const DEADLINE: Duration = Duration::from_millis(1_000);

fn seen(role: Role, link: Link, failover: Failover) -> Observation {
    Observation {
        role,
        link,
        failover,
        follows_target: role == Role::Replica,
        target_online: role == Role::Primary,
    }
}

fn waiting() -> Event {
    Event::RoleObserved(seen(Role::Primary, Link::Down, Failover::WaitingForSync))
}

fn changed() -> Event {
    Event::RoleObserved(seen(Role::Replica, Link::Up, Failover::None))
}

fn back() -> Event {
    Event::RoleObserved(seen(Role::Primary, Link::Down, Failover::None))
}

fn alone() -> Event {
    Event::RoleObserved(Observation {
        target_online: false,
        ..seen(Role::Primary, Link::Down, Failover::None)
    })
}

/// Runs `events`, each 1 ms after the other from `start`, and prints the actions.
fn run(start: Duration, events: &[Event]) -> String {
    let mut machine = HandOver::new(DEADLINE);
    let mut lines = vec![];
    for (n, event) in (0u32..).zip(events) {
        let (next, actions) = machine.step(*event, start + n * Duration::from_millis(1));
        machine = next;
        let words = actions.iter().map(|action| match action {
            Action::Finish(Outcome { verdict, .. }) => format!("{verdict:?}"),
            action => format!("{action:?}"),
        });
        lines.push(words.collect::<Vec<_>>().join("+"));
    }
    lines.join(" ")
}

fn check(events: &[Event], expected: &str) {
    assert_eq!(run(Duration::ZERO, events), expected);
}

use Event::*;

const FENCED: [Event; 4] = [Begin, TargetReached, FenceDone, MasterUserSet];

fn after_failover(events: &[Event], expected: &str) {
    let events = [&FENCED[..], &[FailoverAccepted], events].concat();
    let start = "ReachTarget SoftFence SetMasterUser Failover GetAck+Observe ";
    check(&events, &format!("{start}{expected}"));
}

#[test]
fn a_hand_over_without_trouble_commits() {
    after_failover(
        &[waiting(), changed(), CommitAccepted],
        "GetAck+Observe Commit Done { committed: true }",
    );
}

#[test]
fn the_critical_section_is_measured_from_the_fence_to_the_change() {
    let mut machine = HandOver::new(DEADLINE);
    let events = [&FENCED[..], &[FailoverAccepted, changed()]].concat();
    for (n, event) in (0u32..).zip(events) {
        machine = machine.step(event, n * Duration::from_millis(1)).0;
    }
    assert_eq!(machine.critical(), Some(Duration::from_millis(4)));
}

#[test]
fn an_unreachable_target_leaves_everything_untouched() {
    check(&[Begin, TargetUnreachable], "ReachTarget NoEffect");
}

#[test]
fn failures_before_failover_restore_the_rights() {
    let restored = "RestoreGrant NoEffect";
    check(
        &[Begin, TargetReached, FenceFailed, GrantRestored],
        &format!("ReachTarget SoftFence {restored}"),
    );
    check(
        &[
            Begin,
            TargetReached,
            FenceDone,
            MasterUserFailed,
            GrantRestored,
        ],
        &format!("ReachTarget SoftFence SetMasterUser {restored}"),
    );
    check(
        &[&FENCED[..], &[FailoverRefused, GrantRestored]].concat(),
        &format!("ReachTarget SoftFence SetMasterUser Failover {restored}"),
    );
    check(
        &[&FENCED[..], &[FailoverRefused, RestoreFailed]].concat(),
        "ReachTarget SoftFence SetMasterUser Failover RestoreGrant Uncertain",
    );
}

/// As [`run`], with a target whose engine is older.
fn checked(events: &[Event]) -> (HandOver, String) {
    let mut machine = HandOver::new(DEADLINE).checking_target(true);
    let mut all = Vec::new();
    for (n, event) in (0u32..).zip(events) {
        let (next, actions) = machine.step(*event, n * Duration::from_millis(1));
        machine = next;
        all.extend(actions.iter().map(|action| format!("{action:?}")));
    }
    (machine, all.join(" "))
}

#[test]
fn an_older_target_is_asked_when_nothing_more_is_written_and_before_it_takes_over() {
    let (_, actions) = checked(&[&FENCED[..], &[TargetSound]].concat());
    assert_eq!(
        actions,
        "ReachTarget SoftFence SetMasterUser CheckTarget Failover"
    );
    let unsound = [TargetUnsound("its data differs"), GrantRestored];
    let (machine, actions) = checked(&[&FENCED[..], &unsound].concat());
    assert!(actions.contains("CheckTarget RestoreGrant"), "{actions}");
    assert!(!actions.contains("Failover"), "{actions}");
    let outcome = machine.outcome().unwrap();
    assert_eq!(outcome.verdict, Verdict::NoEffect);
    assert_eq!(outcome.why, "its data differs");
    let late = HandOver {
        phase: Phase::Checking,
        ..machine
    };
    assert_eq!(
        late.step(TargetSound, DEADLINE).1,
        [Action::RestoreGrant],
        "who asked for too long goes back"
    );
}

#[test]
fn a_failover_that_timed_out_is_undone_while_the_target_still_replicates() {
    after_failover(
        &[waiting(), back(), GrantRestored],
        "GetAck+Observe RestoreGrant NoEffect",
    );
}

#[test]
fn a_primary_alone_may_have_promoted_the_target_so_it_stays_fenced() {
    // The lost-reply race: O is a master again and N may be one too.
    after_failover(
        &[alone(), alone(), back(), GrantRestored],
        "Observe Observe RestoreGrant NoEffect",
    );
    let events = [&FENCED[..], &[FailoverAccepted, alone()]].concat();
    let late = run(DEADLINE - Duration::from_millis(5), &events);
    assert!(late.ends_with("GetAck+Observe Uncertain"), "{late}");
}

#[test]
fn a_failover_without_end_is_aborted_at_the_deadline_and_judged_by_what_is_seen() {
    let in_progress = RoleObserved(seen(Role::Replica, Link::Down, Failover::InProgress));
    for (judged, expected) in [
        (back(), "RestoreGrant"),
        (changed(), "Commit"),
        (alone(), "Uncertain"),
        (Unobservable, "Uncertain"),
        (in_progress, "Uncertain"),
    ] {
        let events = [
            &FENCED[..],
            &[FailoverAccepted, waiting(), AbortDone, judged],
        ]
        .concat();
        let text = run(DEADLINE - Duration::from_millis(5), &events);
        assert!(
            text.ends_with(&format!("AbortFailover Observe {expected}")),
            "{text}"
        );
    }
}

#[test]
fn a_change_to_somebody_else_is_not_committed() {
    let elsewhere = RoleObserved(Observation {
        follows_target: false,
        ..seen(Role::Replica, Link::Up, Failover::None)
    });
    after_failover(&[elsewhere], "Uncertain");
}

#[test]
fn a_replica_in_progress_is_not_yet_a_change() {
    let in_progress = RoleObserved(seen(Role::Replica, Link::Up, Failover::InProgress));
    after_failover(&[in_progress, changed()], "GetAck+Observe Commit");
}

#[test]
fn commits_are_repeated_until_the_deadline_and_refusals_believed() {
    after_failover(
        &[changed(), CommitUnreachable, CommitAccepted],
        "Commit Commit Done { committed: true }",
    );
    after_failover(
        &[
            changed(),
            CommitRefused {
                target_is_primary: true,
            },
        ],
        "Commit Done { committed: false }",
    );
    after_failover(
        &[
            changed(),
            CommitRefused {
                target_is_primary: false,
            },
        ],
        "Commit Uncertain",
    );
    let events = [
        &FENCED[..],
        &[FailoverAccepted, changed(), CommitUnreachable],
    ]
    .concat();
    let late = run(DEADLINE - Duration::from_millis(6), &events);
    assert!(late.ends_with("Commit Uncertain"), "{late}");
}

#[test]
fn a_restart_is_decided_by_what_is_seen_and_by_the_record() {
    use Record::*;
    let master = seen(Role::Primary, Link::Down, Failover::None);
    let alone = Observation {
        target_online: false,
        ..master
    };
    let slave = seen(Role::Replica, Link::Up, Failover::None);
    let going = seen(Role::Primary, Link::Down, Failover::WaitingForSync);
    for (observed, record, expected) in [
        (None, Unchanged, "Uncertain"),
        (Some(slave), Unknown, "Commit"),
        (Some(slave), Unchanged, "Commit"),
        (Some(slave), MovedOn, "Commit"),
        (Some(going), Unknown, "GetAck+Observe"),
        (Some(master), Unknown, ""),
        (Some(master), Unchanged, "RestoreGrant"),
        (Some(master), MovedOn, "Uncertain"),
        (Some(alone), Unchanged, "Uncertain"),
    ] {
        assert_eq!(
            run(Duration::ZERO, &[Restarted { observed, record }]),
            expected,
            "{observed:?} {record:?}"
        );
    }
    // What could not be decided at first is decided when the record is known.
    let wait = Restarted {
        observed: Some(master),
        record: Unknown,
    };
    let known = Restarted {
        observed: Some(master),
        record: Unchanged,
    };
    check(
        &[wait, wait, known, GrantRestored],
        "  RestoreGrant NoEffect",
    );
}

/// Every event that a driver can make.
fn all_events() -> Vec<Event> {
    let mut events = vec![
        Begin,
        TargetReached,
        TargetUnreachable,
        FenceDone,
        FenceFailed,
        MasterUserSet,
        MasterUserFailed,
        TargetSound,
        TargetUnsound("why"),
        FailoverAccepted,
        FailoverRefused,
        FailoverUnanswered,
        Unobservable,
        AbortDone,
        AbortFailed,
        GrantRestored,
        RestoreFailed,
        CommitAccepted,
        CommitUnreachable,
        CommitRefused {
            target_is_primary: true,
        },
        CommitRefused {
            target_is_primary: false,
        },
        Tick,
    ];
    for role in [Role::Primary, Role::Replica] {
        for failover in [
            Failover::None,
            Failover::WaitingForSync,
            Failover::InProgress,
        ] {
            for link in [Link::Up, Link::Down] {
                for (follows_target, target_online) in
                    [(false, false), (true, false), (false, true)]
                {
                    let it = Observation {
                        role,
                        link,
                        failover,
                        follows_target,
                        target_online,
                    };
                    events.push(RoleObserved(it));
                }
            }
        }
    }
    events
}

#[test]
fn whatever_comes_rights_return_and_commits_leave_only_on_proof() {
    // Walks all reachable states, before and after the deadline.
    let new = HandOver::new(DEADLINE);
    let mut seen_states: Vec<HandOver> = vec![new, new.checking_target(true)];
    let mut next = 0;
    while next < seen_states.len() {
        let state = seen_states[next];
        next += 1;
        for event in all_events() {
            for now in [Duration::ZERO, DEADLINE] {
                let (mut after, actions) = state.step(event, now);
                // Times are no part of a state here.
                after.fenced_at = after.fenced_at.map(|_| Duration::ZERO);
                after.critical = after.critical.map(|_| Duration::ZERO);
                let proof_of_replica = matches!(event, RoleObserved(o)
                    if o.role == Role::Primary && o.failover == Failover::None && o.target_online);
                let not_asked = !state.failover_may_run || event == FailoverRefused;
                if actions.contains(&Action::RestoreGrant) {
                    assert!(proof_of_replica || not_asked, "{state:?} {event:?}");
                }
                if actions.contains(&Action::Commit) {
                    let proof = matches!(event, RoleObserved(o) if o.role == Role::Replica
                        && o.failover == Failover::None && o.follows_target);
                    assert!(
                        proof || state.phase == Phase::Committing,
                        "{state:?} {event:?}"
                    );
                }
                if matches!(state.phase, Phase::Finished(_)) {
                    assert!(actions.is_empty() && after == state, "{state:?} {event:?}");
                }
                if !seen_states.contains(&after) {
                    seen_states.push(after);
                }
            }
        }
    }
    assert!(seen_states.len() > 15, "{}", seen_states.len());
}
