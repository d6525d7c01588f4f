//! The mesh under thousands of seeds, and the same seed twice.
//!
//! Invariant: a failure names its seed.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use slotmesh_sim::{Outcome, Variant, plan::Profile, run, run_as, tell};

/// Unless the environment says otherwise (`SLOTMESH_SIM_SEEDS`, as `make sim` sets it).
const SEEDS: u64 = 2_000;
/// Seeds in which primaries come back without their data.
const EMPTY: u64 = 1_000;
/// Seeds in which new nodes take the places of old ones.
const RECRUITS: u64 = 100;

fn seeds() -> u64 {
    let asked = std::env::var("SLOTMESH_SIM_SEEDS").ok();
    asked.and_then(|s| s.parse().ok()).unwrap_or(SEEDS)
}

/// Runs seeds on all cores; the first failure, if any, and what happened in all.
fn run_all(
    seeds: u64,
    one: impl Fn(u64) -> Outcome + Sync,
) -> (Option<(u64, Outcome)>, Vec<Outcome>) {
    let next = AtomicU64::new(1);
    let worker = || {
        let (mut failed, mut all) = (None, Vec::new());
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > seeds || failed.is_some() {
                return (failed, all);
            }
            let outcome = one(seed);
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
fn thousands_of_seeds_hold_every_invariant() {
    let count = seeds();
    let (failed, all) = run_all(count, |seed| run(seed, Variant::Real));
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
    let (moved, returned, failovers) =
        (sum(|o| o.moved), sum(|o| o.returned), sum(|o| o.failovers));
    println!(
        "{count} seeds: {moved} switchovers done, {returned} undone, {failovers} failovers, {} \
         writes acknowledged, {} of them left behind by asynchronous failovers",
        sum(|o| o.acknowledged),
        sum(|o| o.left_behind)
    );
    // A simulation in which nothing happens holds everything.
    let enough = |found: usize, per_thousand: u64| found as u64 * 1_000 > count * per_thousand;
    assert!(enough(moved, 1_000), "only {moved} switchovers were done");
    assert!(
        enough(returned, 100),
        "only {returned} switchovers were undone"
    );
    assert!(
        enough(failovers, 100),
        "only {failovers} primaries were replaced"
    );
    let replaced = sum(|o| o.replacements.1);
    assert!(enough(replaced, 50), "only {replaced} nodes were replaced");
    let (upgraded, back) = (sum(|o| o.upgrades.1), sum(|o| o.upgrades.2));
    assert!(enough(upgraded, 5), "only {upgraded} upgrades were done");
    assert!(enough(back, 2), "only {back} upgrades were taken back");
    assert!(enough(sum(|o| o.acknowledged), 400_000));
    let (elections, compacted) = (sum(|o| o.elections), sum(|o| o.compacted));
    assert!(
        enough(elections, 50),
        "the store elected {elections} leaders"
    );
    assert!(
        enough(compacted, 5),
        "{compacted} watches missed what was compacted"
    );
}

#[test]
fn a_primary_that_comes_back_empty_wipes_nothing_in_a_thousand_trials() {
    let (failed, all) = run_all(EMPTY, |seed| run_as(Profile::Empty, seed, Variant::Real));
    if let Some((seed, outcome)) = failed {
        panic!(
            "seed {seed}: {:?}\nagain: slotmesh-sim --seed {seed} --profile empty --verbose",
            outcome.violation
        );
    }
    let failovers: usize = all.iter().map(|o| o.failovers).sum();
    assert!(
        failovers as u64 > EMPTY / 2,
        "only {failovers} primaries were replaced"
    );
}

#[test]
fn new_nodes_take_the_places_of_old_ones_or_leave_whatever_dies() {
    let (failed, all) = run_all(RECRUITS, |seed| {
        run_as(Profile::Recruits, seed, Variant::Real)
    });
    if let Some((seed, outcome)) = failed {
        panic!(
            "seed {seed}: {:?}\nagain: slotmesh-sim --seed {seed} --profile recruits --verbose",
            outcome.violation
        );
    }
    let done: usize = all.iter().map(|o| o.upgrades.1).sum();
    let back: usize = all.iter().map(|o| o.upgrades.2).sum();
    assert!(
        done as u64 > RECRUITS / 2 && back as u64 > RECRUITS / 20,
        "only {done} upgrades were done, {back} taken back"
    );
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
