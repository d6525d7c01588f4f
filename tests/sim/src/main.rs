//! `slotmesh-sim`: runs seeds and says what came of them.
//!
//! Invariant: a failure is printed with all that is needed to see it again.
#![allow(clippy::print_stdout)] // Its output is what it is for.

use std::process::ExitCode;

use clap::Parser;
use slotmesh_sim::{Variant, run, tell};

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
    events: u64,
    failed: u64,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (first, count) = match cli.seed {
        Some(seed) if cli.verbose => (seed, 1),
        Some(seed) => (seed, if cli.seeds == 1_000 { 1 } else { cli.seeds }),
        None => (1, cli.seeds),
    };
    let mut sum = Sum::default();
    for seed in first..first + count {
        let outcome = if cli.verbose {
            tell(seed, Variant::Real, true)
        } else {
            run(seed, Variant::Real)
        };
        outcome.lines.iter().for_each(|line| println!("{line}"));
        if let Some(violation) = &outcome.violation {
            if cli.keep_going {
                println!(
                    "FAILED seed {seed} ({:?}): {}: {}",
                    outcome.profile, violation.rule, violation.how
                );
                sum.failed += 1;
                continue;
            }
            if !cli.verbose {
                tell(seed, Variant::Real, false)
                    .lines
                    .iter()
                    .for_each(|l| println!("{l}"));
            }
            println!(
                "FAILED seed {seed} ({:?}): {}",
                outcome.profile, violation.rule
            );
            println!("  {}", violation.how);
            println!("  again: slotmesh-sim --seed {seed} --verbose");
            return ExitCode::FAILURE;
        }
        sum.moved += outcome.moved;
        sum.returned += outcome.returned;
        sum.acknowledged += outcome.acknowledged;
        sum.ambiguous += outcome.ambiguous;
        sum.errors += outcome.errors;
        sum.events += outcome.events;
    }
    if sum.failed > 0 {
        println!("FAILED: {} of {count} seeds from {first}", sum.failed);
        return ExitCode::FAILURE;
    }
    println!(
        "OK: {count} seeds from {first}: {} events, {} switchovers done, {} returned, \
         {} writes acknowledged and none lost, {} ambiguous, {} errors",
        sum.events, sum.moved, sum.returned, sum.acknowledged, sum.ambiguous, sum.errors
    );
    ExitCode::SUCCESS
}
