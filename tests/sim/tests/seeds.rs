//! The mesh under a thousand seeds, and the same seed twice.
//!
//! Invariant: a failure names its seed.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use slotmesh_sim::{Outcome, Variant, run, tell};

const SEEDS: u64 = 1_000;

/// Runs seeds on all cores; the first failure, if any, and what happened in all.
fn run_all(seeds: u64) -> (Option<(u64, Outcome)>, Vec<Outcome>) {
    let next = AtomicU64::new(1);
    let worker = || {
        let (mut failed, mut all) = (None, Vec::new());
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > seeds || failed.is_some() {
                return (failed, all);
            }
            let outcome = run(seed, Variant::Real);
            if outcome.violation.is_some() {
                failed = Some((seed, outcome));
            } else {
                all.push(outcome);
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let mut sum = (None, Vec::new());
        for worker in workers {
            let Ok((failed, all)) = worker.join() else {
                panic!("a run panicked")
            };
            sum.0 = sum.0.or(failed);
            sum.1.extend(all);
        }
        sum
    })
}

#[test]
fn a_thousand_seeds_hold_every_invariant() {
    let (failed, all) = run_all(SEEDS);
    if let Some((seed, outcome)) = failed {
        for line in tell(seed, Variant::Real, false).lines {
            println!("{line}");
        }
        panic!(
            "seed {seed}: {:?}\nagain: slotmesh-sim --seed {seed} --verbose",
            outcome.violation
        );
    }
    let sum = |of: fn(&Outcome) -> usize| all.iter().map(of).sum::<usize>();
    let (moved, returned) = (sum(|o| o.moved), sum(|o| o.returned));
    // A simulation in which nothing happens holds everything.
    assert!(moved > 1_000, "only {moved} switchovers were done");
    assert!(returned > 100, "only {returned} switchovers were undone");
    assert!(sum(|o| o.acknowledged) > 500_000 && sum(|o| o.ambiguous) > 1_000);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in [3, 17, 40] {
        let (first, second) = (run(seed, Variant::Real), tell(seed, Variant::Real, true));
        assert_eq!(
            (first.hash, first.events),
            (second.hash, second.events),
            "seed {seed}"
        );
        assert!(!second.lines.is_empty());
    }
    assert_ne!(run(3, Variant::Real).hash, run(17, Variant::Real).hash);
}
