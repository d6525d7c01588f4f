//! The crash matrix, every cell of it.
//!
//! Invariant: a cell that breaks a rule, or whose task neither ends nor waits for an operator with a
//! choice, fails by its name.

use std::{collections::BTreeMap, thread};

use slotmesh_sim::matrix::{self, Cell, End, Kind};
use slotmesh_task::State;

/// Extra wait of clients above which a cell is listed.
const LISTED_US: u64 = 1_000_000;

fn run_all(cells: &[Cell]) -> Vec<(Cell, End)> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let part = cells.len().div_ceil(threads).max(1);
    thread::scope(|scope| {
        let run = |cells: &[Cell]| cells.iter().map(|c| (*c, matrix::run(*c))).collect();
        let parts: Vec<_> = (cells.chunks(part))
            .map(|cells| scope.spawn(move || -> Vec<(Cell, End)> { run(cells) }))
            .collect();
        parts
            .into_iter()
            .flat_map(|p| p.join().expect("a cell panicked"))
            .collect()
    })
}

#[test]
fn every_task_ends_or_waits_for_an_operator_whoever_fails_at_whatever_step() {
    let mut usual = BTreeMap::new();
    for kind in [Kind::Provision, Kind::Switchover, Kind::Failover] {
        let step = matrix::steps(kind)[0];
        let fault = None;
        let end = matrix::run(Cell { kind, step, fault });
        assert_eq!(end.violation, None, "{kind:?} without a fault");
        assert_eq!(end.states, [State::Done], "{kind:?} without a fault");
        usual.insert(kind, end.longest);
    }
    let cells: Vec<Cell> = matrix::cells().collect();
    let ends = run_all(&cells);
    let (mut table, mut slow, mut failed) = (BTreeMap::new(), Vec::new(), Vec::new());
    for (cell, end) in &ends {
        let name = format!("{:?} {:?} {:?}", cell.kind, cell.step, cell.fault);
        let good = |s: &State| matches!(s, State::Done | State::RolledBack | State::NeedsOperator);
        if end.violation.is_some() || !end.states.iter().all(good) {
            if failed.is_empty() {
                matrix::tell(*cell)
                    .iter()
                    .for_each(|line| println!("{line}"));
            }
            failed.push(format!("{name}: {:?} {:?}", end.states, end.violation));
        }
        let extra = end.longest.saturating_sub(usual[&cell.kind]);
        if extra > LISTED_US {
            slow.push(format!("{name}: {} ms", extra / 1_000));
        }
        let states = format!("{:?}", end.states);
        let word = if end.reached {
            states
        } else {
            "not reached".into()
        };
        *table.entry((cell.kind, word)).or_insert(0) += 1;
    }
    println!("{} cells: {table:?}", ends.len());
    println!("{} cells with more than 1 s of extra hold:", slow.len());
    slow.iter().for_each(|line| println!("  {line}"));
    assert!(
        failed.is_empty(),
        "{} cells failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
}
