//! The crash matrix, every cell of it.
//!
//! Invariant: a cell that breaks a rule, or whose task neither ends nor waits for an operator with a
//! choice, or that makes clients wait for longer than its bound, fails by its name.
#![allow(clippy::print_stdout)] // What each cell came to is what one reads when one fails.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use slotmesh_sim::{
    ambush::Tamper,
    matrix::{self, Cell, End, Fault, KINDS, Kind, Place, Role, Step, What},
};
use slotmesh_task::State;

use self::exceptions::{EXCEPTIONS, EXTRA_US, Exception};

#[path = "matrix/exceptions.rs"]
mod exceptions;

/// Runs them all; where nothing was learned, in no order.
fn run_all(cells: &[Cell]) -> Vec<End> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut ends = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(cell) = cells.get(index) else {
                return ends;
            };
            ends.push((index, matrix::run(*cell)));
        }
    };
    let mut ends: Vec<(usize, End)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let ends = workers
            .into_iter()
            .map(|w| w.join().expect("a cell panicked"));
        ends.flatten().collect()
    });
    ends.sort_by_key(|(index, _)| *index);
    ends.into_iter().map(|(_, end)| end).collect()
}

/// What is the same run, although it is another cell: a message has two ends.
fn run_of(kind: Kind, step: Step, role: Role, fault: Fault) -> Cell {
    let role = match (fault.tamper(), step.moment) {
        (Some(_), matrix::Moment::Message { from, .. }) => from,
        _ => role,
    };
    let what = What::Fault(step, role, fault);
    Cell { kind, what }
}

fn is_good(end: &End) -> bool {
    let ended = |s: &State| s.is_ended();
    end.violation.is_none() && !end.states.is_empty() && end.states.iter().all(ended)
}

fn print_story(cell: Cell) {
    matrix::tell(cell)
        .iter()
        .for_each(|line| println!("{line}"));
}

fn usual(kind: Kind) -> End {
    let what = What::Calm;
    let end = matrix::run(Cell { kind, what });
    assert_eq!(end.violation, None, "{kind:?} without a fault");
    assert_eq!(end.states, [usual_end(kind)], "{kind:?} without a fault");
    end
}

fn usual_end(kind: Kind) -> State {
    match kind {
        Kind::TakeBack => State::Cancelled,
        _ => State::Done,
    }
}

/// A cell, or what is none.
struct Entry {
    step: Step,
    role: Role,
    fault: Fault,
    place: Place,
    /// Which of the runs.
    run: Option<usize>,
}

/// All cells of a kind, and the runs that they need.
fn entries(kind: Kind) -> (Vec<Entry>, Vec<Cell>) {
    let mut runs: Vec<Cell> = Vec::new();
    let entry = |(step, role, fault, place)| {
        let cell = run_of(kind, step, role, fault);
        let known = runs.iter().rposition(|run| *run == cell);
        let run = (place == Place::Cell).then(|| {
            known.unwrap_or_else(|| {
                runs.push(cell);
                runs.len() - 1
            })
        });
        Entry {
            step,
            role,
            fault,
            place,
            run,
        }
    };
    let entries = matrix::places(kind).map(entry).collect();
    (entries, runs)
}

/// How long clients may wait in this cell beyond what they wait without a fault.
fn bound(kind: Kind, role: Role, fault: Fault) -> Option<u64> {
    // Nobody is promised an answer by an instance that is being removed.
    if kind == Kind::Decommission {
        return None;
    }
    let fits = |e: &&Exception| (e.kind, e.role, e.fault) == (kind, role, fault);
    let exception = EXCEPTIONS.iter().find(fits);
    Some(exception.map_or(EXTRA_US, |e| e.bound_ms * 1_000))
}

/// While a replica's process makes way for another engine a durable shard of three has one replica
/// less to prove what it had: with its primary lost, too, it waits for an operator, with a choice.
fn waits_for_operators(kind: Kind) -> bool {
    matches!(kind, Kind::Upgrade | Kind::TakeBack)
}

/// Every cell of a kind ends as it should, and within its bound.
fn check(kind: Kind) {
    let usually = usual(kind).longest_but(None);
    let (entries, runs) = entries(kind);
    let ends = run_all(&runs);
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    let mut most: BTreeMap<(Role, Fault), (u64, Vec<String>)> = BTreeMap::new();
    let mut failed = Vec::new();
    for entry in &entries {
        let (role, fault) = (entry.role, entry.fault);
        let Some(end) = entry.run.map(|run| &ends[run]) else {
            *outcomes.entry(format!("{:?}", entry.place)).or_default() += 1;
            continue;
        };
        let word = if end.by_operator {
            " by an operator's word"
        } else {
            ""
        };
        *outcomes
            .entry(format!("{:?}{word}", end.states))
            .or_default() += 1;
        let name = format!("{kind:?}: {}: {role:?} {fault:?}", entry.step);
        if !is_good(end) || !end.reached {
            let (states, why) = (&end.states, &end.violation);
            failed.push(format!(
                "{name}: reached {}, {states:?} {why:?}",
                end.reached
            ));
        }
        // Clients of a proxy that stands still wait for it; that others do is what is asked.
        let own = (role == Role::Proxy && fault == Fault::Stall).then_some(0);
        let extra = end.longest_but(own).saturating_sub(usually);
        // What waits for an operator waits for as long as he takes.
        if end.by_operator {
            if !waits_for_operators(kind) {
                failed.push(format!("{name}: an operator was waited for"));
            }
            continue;
        }
        if extra > EXTRA_US && kind != Kind::Decommission {
            let all = most.entry((role, fault)).or_default();
            all.0 = all.0.max(extra);
            all.1.push(format!("{} {} ms", entry.step, extra / 1_000));
        }
        if bound(kind, role, fault).is_some_and(|bound| extra > bound) {
            failed.push(format!("{name}: {} ms of extra hold", extra / 1_000));
        }
    }
    println!(
        "{kind:?}: {} cells, {} runs: {outcomes:?}",
        entries.len(),
        runs.len()
    );
    for ((role, fault), (extra, steps)) in &most {
        println!(
            "  {role:?} {fault:?}: up to {} ms: {}",
            extra / 1_000,
            steps.join(", ")
        );
    }
    for exception in EXCEPTIONS.iter().filter(|e| e.kind == kind) {
        let Exception { role, fault, .. } = exception;
        let seen = most.contains_key(&(*role, *fault));
        let word = if seen { exception.reason } else { "not needed" };
        println!(
            "  {role:?} {fault:?}: up to {} ms allowed: {word}",
            exception.bound_ms
        );
    }
    assert!(
        failed.is_empty(),
        "{} cells failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
}

#[test]
fn a_provisioning_ends_well_whoever_fails_at_whatever_step() {
    check(Kind::Provision);
}

#[test]
fn a_switchover_ends_well_whoever_fails_at_whatever_step() {
    check(Kind::Switchover);
}

#[test]
fn a_failover_ends_well_whoever_fails_at_whatever_step() {
    check(Kind::Failover);
}

#[test]
fn a_removal_ends_well_whoever_fails_at_whatever_step() {
    check(Kind::Decommission);
}

#[test]
fn a_replacement_ends_well_whoever_fails_at_whatever_step() {
    check(Kind::Replace);
}

#[test]
fn an_upgrade_ends_well_whoever_fails_at_whatever_step() {
    check(Kind::Upgrade);
}

#[test]
fn an_upgrade_that_is_taken_back_ends_well_whoever_fails_at_whatever_step() {
    check(Kind::TakeBack);
}

#[test]
fn a_drained_host_ends_well_whoever_fails_at_whatever_step() {
    check(Kind::Drain);
}

#[test]
fn every_step_may_be_taken_twice() {
    for kind in KINDS {
        let what = What::Twice;
        let cell = Cell { kind, what };
        let end = matrix::run(cell);
        if !is_good(&end) {
            print_story(cell);
        }
        assert_eq!(end.violation, None, "{kind:?}, every step twice");
        assert_eq!(end.states, [usual_end(kind)], "{kind:?}, every step twice");
    }
}

#[test]
fn every_step_may_fail_once() {
    let mut cells = Vec::new();
    for kind in KINDS {
        let asked = usual(kind).messages;
        let asked = asked
            .iter()
            .filter(|m| !m.is_answer && m.leg.call.is_answered());
        cells.extend(asked.map(|message| Cell {
            kind,
            what: What::Message(*message, Tamper::Fail),
        }));
    }
    let ends = run_all(&cells);
    let mut failed = Vec::new();
    for (cell, end) in cells.iter().zip(&ends) {
        if !is_good(end) || !end.reached {
            if failed.is_empty() {
                print_story(*cell);
            }
            failed.push(format!(
                "{cell:?}: reached {} {:?} {:?}",
                end.reached, end.states, end.violation
            ));
        }
    }
    println!("{} steps failed once each", cells.len());
    assert!(
        failed.is_empty(),
        "{} failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
}
