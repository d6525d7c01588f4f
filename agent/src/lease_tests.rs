//! When a primary may serve, by what its agent knows; and promises, seen from both ends.

use super::*;

const NOW: Boot = Boot(100_000);

fn sight() -> Sight {
    Sight {
        now: NOW,
        started: Boot(0),
        replaceable: true,
        ..Sight::default()
    }
}

fn in_ms(ms: u64) -> Option<Boot> {
    Some(NOW.plus(Duration::from_millis(ms)))
}

#[test]
fn a_primary_that_nobody_could_replace_needs_no_right() {
    let alone = Sight {
        replaceable: false,
        fenced: true,
        ..sight()
    };
    assert_eq!(decide(&alone), Right::Serve { until: None });
}

#[test]
fn a_lease_is_enough_and_its_coming_end_is_a_reason_to_ask() {
    let leased = |ms| Sight {
        leased: in_ms(ms),
        ..sight()
    };
    let until = in_ms(2_000);
    assert_eq!(decide(&leased(2_000)), Right::Serve { until });
    assert_eq!(
        decide(&leased(900)),
        Right::Ask {
            until: in_ms(900).unwrap()
        }
    );
    assert_eq!(decide(&leased(0)), Right::Fence);
}

#[test]
fn promises_stand_for_the_lease_until_they_end() {
    let promised = |ms| Sight {
        leased: Some(Boot(99_000)),
        promised: in_ms(ms),
        ..sight()
    };
    assert_eq!(
        decide(&promised(1)),
        Right::Ask {
            until: in_ms(1).unwrap()
        }
    );
    assert_eq!(decide(&promised(0)), Right::Fence);
}

#[test]
fn a_fence_is_lifted_by_a_lease_and_never_by_promises() {
    let fenced = Sight {
        fenced: true,
        promised: in_ms(2_000),
        ..sight()
    };
    assert_eq!(decide(&fenced), Right::Fence);
    let leased = Sight {
        leased: in_ms(2_000),
        ..fenced
    };
    assert!(matches!(decide(&leased), Right::Serve { .. }));
}

#[test]
fn an_agent_that_has_just_started_gives_nothing_and_takes_nothing_for_a_while() {
    let started = |ago| Sight {
        started: Boot(NOW.0 - ago),
        ..sight()
    };
    assert_eq!(decide(&started(2_000)), Right::Unproven);
    assert_eq!(decide(&started(2_200)), Right::Fence);
}

fn spec() -> NodeSpec {
    NodeSpec {
        node_id: "n".into(),
        role: NodeRole::Primary.into(),
        desired: Desired::Running.into(),
        epoch: 5,
        replica_agents: vec!["a:1".into()],
        ..NodeSpec::default()
    }
}

fn answer(number: u64, revision: u64) -> LeaseKept {
    LeaseKept {
        report_number: number,
        ttl_ms: 3_000,
        revision,
    }
}

#[test]
fn a_lease_counts_from_the_report_and_only_with_an_assignment_of_its_time() {
    let lease = Lease::started_at(Boot(0));
    let before = Boot::now();
    let number = lease.reporting();
    let after = Boot::now();
    lease.kept(&answer(number + 1, 1));
    assert_eq!(
        lease.right(&spec(), 9, Boot::now()),
        Right::Fence,
        "not its answer"
    );
    lease.kept(&answer(number, 8));
    let Right::Serve { until: Some(until) } = lease.right(&spec(), 8, Boot::now()) else {
        panic!("a right")
    };
    let right = TTL - MARGIN;
    assert!(until >= before.plus(right) && until <= after.plus(right));
    assert_eq!(
        lease.right(&spec(), 7, Boot::now()),
        Right::Fence,
        "of before"
    );
    assert_eq!(lease.right(&spec(), 8, until), Right::Fence, "over");
}

#[test]
fn a_late_answer_takes_no_right_away_and_a_lease_that_began_anew_forgets_the_old() {
    let lease = Lease::started_at(Boot(0));
    let first = lease.reporting();
    lease.kept(&answer(first, 3));
    let until = lease.lock().kept.unwrap().until;
    lease.begin_session();
    // A controller that answers with less time than was known.
    let again = lease.reporting();
    let short = LeaseKept {
        ttl_ms: 1_000,
        ..answer(again, 3)
    };
    lease.kept(&short);
    assert_eq!(lease.lock().kept.unwrap().until, until);
    let anew = LeaseKept {
        ttl_ms: 1_000,
        ..answer(lease.reporting(), 4)
    };
    lease.kept(&anew);
    assert!(lease.lock().kept.unwrap().until < until);
}

#[test]
fn promises_count_for_their_epoch_from_when_they_were_asked_for() {
    let lease = Lease::started_at(Boot(0));
    let asked = Boot::now();
    lease.promised_by_all("n", 5, asked);
    let until = asked.plus(TTL - MARGIN);
    assert_eq!(lease.right(&spec(), 1, asked), Right::Ask { until });
    let next = NodeSpec { epoch: 6, ..spec() };
    assert_eq!(lease.right(&next, 1, asked), Right::Fence);
    lease.refused("n");
    assert_eq!(lease.right(&spec(), 1, asked), Right::Fence);
}

#[test]
fn whoever_promises_sees_a_promotion_that_was_journaled_and_is_seen_by_one_that_was_not() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    let lease = Lease::started_at(Boot(0));
    let request = PromiseNotToPromoteRequest {
        instance_id: "r".into(),
        shard_id: "0".into(),
        epoch: 5,
        ttl_ms: 3_000,
    };
    assert!(lease.promised("r", "0").is_none());
    assert!(lease.promise(&request, &journal).promised);
    assert!(lease.promised("r", "0").is_some());
}
