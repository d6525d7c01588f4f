//! The checks can fail: each deliberately broken variant is caught, by the rule that it breaks.
//!
//! Invariant: a variant that nothing catches is a hole in the checks, and fails here.

use slotmesh_sim::{Outcome, Variant, plan::Profile, run, run_as};

/// Within so many seeds; the rarest needs an accident at one certain act.
const SEEDS: u64 = 250;

fn caught_by(variant: Variant, rules: &[&str]) {
    caught_in(variant, rules, |seed| run(seed, variant));
}

fn caught_in(variant: Variant, rules: &[&str], run: impl Fn(u64) -> Outcome) {
    for seed in 1..=SEEDS {
        if let Some(violation) = run(seed).violation {
            assert!(
                rules.iter().any(|rule| violation.rule.contains(rule)),
                "{variant:?} is caught at seed {seed} by another rule: {violation:?}"
            );
            return;
        }
    }
    panic!("{variant:?} is not caught within {SEEDS} seeds");
}

#[test]
fn handing_over_without_a_fence_is_caught() {
    caught_by(Variant::NoFence, &["A4"]);
}

#[test]
fn granting_before_the_commit_is_caught() {
    caught_by(Variant::GrantBeforeCommit, &["I2"]);
}

#[test]
fn committing_without_the_token_is_caught() {
    caught_by(Variant::CommitWithoutToken, &["A1"]);
}

#[test]
fn writing_as_a_deposed_leader_is_caught() {
    // Two leaders are a matter of controllers and the store alone.
    let variant = Variant::DeposedLeaderWrites;
    caught_in(variant, &["A1"], |seed| {
        run_as(Profile::ControlPlane, seed, variant)
    });
}

#[test]
fn keeping_users_over_a_restart_is_caught() {
    caught_by(Variant::NotBornFenced, &["A2", "A5", "I1"]);
}

#[test]
fn committing_before_the_roles_have_changed_is_caught() {
    caught_by(Variant::CommitUnproven, &["I4"]);
}

#[test]
fn executing_a_step_twice_is_caught() {
    caught_by(Variant::Forgetful, &["A3"]);
}

#[test]
fn promoting_a_target_that_is_behind_is_caught() {
    caught_by(Variant::PromoteBehind, &["A8", "A2", "I8"]);
}

#[test]
fn routing_at_a_lower_epoch_is_caught() {
    caught_by(Variant::ProxyGoesBack, &["A6"]);
}

#[test]
fn believing_in_the_end_of_a_lease_without_comparing_it_is_caught() {
    caught_by(Variant::LeaseNotCompared, &["I4: a lease's end"]);
}

#[test]
fn serving_on_without_a_right_is_caught() {
    caught_by(Variant::NoSelfFence, &["A2/I1", "A2/A4/I2", "I1"]);
}

#[test]
fn promoting_somebody_who_is_behind_is_caught() {
    // Whom it names may be a process that has ended since: then nobody is ever promoted.
    caught_by(Variant::NotHighest, &["A8", "liveness"]);
}

#[test]
fn promoting_another_process_than_the_recorded_one_is_caught() {
    caught_by(Variant::AnyProcess, &["F4"]);
}

#[test]
fn promoting_without_a_proof_of_the_fence_is_caught() {
    caught_by(Variant::NoProof, &["A2/I1"]);
}

#[test]
fn lifting_the_fence_for_an_assignment_of_before_the_lease_is_caught() {
    caught_by(Variant::LiftsEarly, &["A2/I1"]);
}

#[test]
fn taking_replicas_out_of_sync_because_their_primary_died_is_caught() {
    caught_by(Variant::ForgetsReplicas, &["D1"]);
}

#[test]
fn leaving_before_the_right_to_follow_is_gone_is_caught() {
    let variant = Variant::LeavesFed;
    caught_in(variant, &["R2"], |seed| {
        run_as(Profile::Moves, seed, variant)
    });
}

#[test]
fn promoting_against_a_promise_is_caught() {
    caught_by(Variant::IgnoresPromise, &["A2/I1"]);
}
