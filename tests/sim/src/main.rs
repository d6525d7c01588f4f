//! `slotmesh-sim`: runs seeds and says what came of them.
//!
//! Invariant: a failure is printed with all that is needed to see it again.
#![allow(clippy::print_stdout)] // Its output is what it is for.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use clap::Parser;
use slotmesh_sim::{Trace, Variant, World, plan::Profile};

/// Simulates the mesh under accidents, one run a seed.
#[derive(Debug, Parser)]
#[command(name = "slotmesh-sim", version)]
struct Cli {
    /// How many seeds.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first, or only, seed.
    #[arg(long)]
    seed: Option<u64>,
    /// How many at once; 0: one for each core.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Deliberately broken, to see that it is caught.
    #[arg(long, value_enum, default_value = "real")]
    variant: Variant,
    /// What goes wrong, instead of what the seed chooses.
    #[arg(long, value_enum)]
    profile: Option<Profile>,
    /// Print everything that happens.
    #[arg(long)]
    verbose: bool,
    /// Go on after a failure; print one line for each.
    #[arg(long)]
    keep_going: bool,
}

#[derive(Default)]
struct Sum {
    moved: usize,
    returned: usize,
    acknowledged: usize,
    ambiguous: usize,
    errors: usize,
    failovers: usize,
    replaced: usize,
    upgraded: usize,
    taken_back: usize,
    left_behind: usize,
    elections: usize,
    compacted: usize,
    events: u64,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (first, count) = match cli.seed {
        Some(seed) if cli.verbose => (seed, 1),
        Some(seed) => (seed, if cli.seeds == 1_000 { 1 } else { cli.seeds }),
        None => (1, cli.seeds),
    };
    let threads = match cli.threads {
        0 => thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let (next, failed) = (AtomicU64::new(first), AtomicU64::new(0));
    let work = || {
        let mut sum = Sum::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let ended = !cli.keep_going && failed.load(Ordering::Relaxed) > 0;
            if seed >= first + count || ended {
                return sum;
            }
            if one(&cli, seed, &mut sum) {
                continue;
            }
            failed.fetch_add(1, Ordering::Relaxed);
        }
    };
    let sum = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let sums = workers.into_iter().map(|worker| {
            // A run that panicked is a failure, and the seeds after it were not run.
            worker.join().unwrap_or_else(|_| {
                failed.fetch_add(1, Ordering::Relaxed);
                Sum::default()
            })
        });
        sums.fold(Sum::default(), Sum::plus)
    });
    let failed = failed.into_inner();
    if failed > 0 {
        println!("FAILED: {failed} of {count} seeds from {first}");
        return ExitCode::FAILURE;
    }
    println!(
        "OK: {count} seeds from {first}: {} events, {} switchovers done, {} returned, {} failovers, \
         {} nodes replaced, {} upgrades done and {} taken back, {} writes acknowledged, none lost but {} behind asynchronous primaries, {} ambiguous, {} errors; \
         the store elected {} leaders and refused {} watches as compacted",
        sum.events,
        sum.moved,
        sum.returned,
        sum.failovers,
        sum.replaced,
        sum.upgraded,
        sum.taken_back,
        sum.acknowledged,
        sum.left_behind,
        sum.ambiguous,
        sum.errors,
        sum.elections,
        sum.compacted
    );
    ExitCode::SUCCESS
}

fn world(cli: &Cli, seed: u64, trace: Trace) -> World {
    match cli.profile {
        Some(profile) => World::with(profile, seed, cli.variant, trace),
        None => World::new(seed, cli.variant, trace),
    }
}

/// Runs a seed; false, and what there is to say of it, when it broke a rule.
fn one(cli: &Cli, seed: u64, sum: &mut Sum) -> bool {
    let outcome = world(cli, seed, Trace::new(cli.verbose, cli.verbose)).run();
    outcome.lines.iter().for_each(|line| println!("{line}"));
    if let Some(violation) = &outcome.violation {
        if !cli.keep_going && !cli.verbose {
            let story = world(cli, seed, Trace::new(true, false)).run();
            story.lines.iter().for_each(|line| println!("{line}"));
        }
        println!(
            "FAILED seed {seed} ({:?}): {}: {}",
            outcome.profile, violation.rule, violation.how
        );
        println!("  again: slotmesh-sim --seed {seed} --verbose");
        return false;
    }
    sum.moved += outcome.moved;
    sum.returned += outcome.returned;
    sum.acknowledged += outcome.acknowledged;
    sum.ambiguous += outcome.ambiguous;
    sum.errors += outcome.errors;
    sum.failovers += outcome.failovers;
    sum.replaced += outcome.replacements.1;
    sum.upgraded += outcome.upgrades.1;
    sum.taken_back += outcome.upgrades.2;
    sum.left_behind += outcome.left_behind;
    sum.elections += outcome.elections;
    sum.compacted += outcome.compacted;
    sum.events += outcome.events;
    true
}

impl Sum {
    fn plus(self, other: Self) -> Self {
        Self {
            moved: self.moved + other.moved,
            returned: self.returned + other.returned,
            acknowledged: self.acknowledged + other.acknowledged,
            ambiguous: self.ambiguous + other.ambiguous,
            errors: self.errors + other.errors,
            failovers: self.failovers + other.failovers,
            replaced: self.replaced + other.replaced,
            upgraded: self.upgraded + other.upgraded,
            taken_back: self.taken_back + other.taken_back,
            left_behind: self.left_behind + other.left_behind,
            elections: self.elections + other.elections,
            compacted: self.compacted + other.compacted,
            events: self.events + other.events,
        }
    }
}
