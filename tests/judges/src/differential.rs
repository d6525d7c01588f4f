//! One Redis and an instance get the same random commands: every reply and everything that is held
//! at the end must be the same, or the instance must have refused with CROSSSLOT.
//!
//! Ours goes first: what it refuses, the other is not asked, so that both hold the same.

mod compare;
mod generate;
mod keyspace;
mod shrink;

use std::{
    collections::BTreeMap,
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};

use self::generate::Generator;
use crate::{
    random::Random,
    wire::{Connection, Value, Words, encode, show},
};

/// Short rounds: what led to a difference must be readable.
const ROUND_CASES: usize = 400;
/// Commands that are sent before the first reply is read.
const PIPELINE_MAX: usize = 40;
/// Enough to see what is wrong; each costs a round.
const DIFFERENCES_MAX: usize = 40;
/// Small, so that a walk takes several steps.
const SCAN_STEP: usize = 7;

/// What is compared, and how long.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `host:port` of the instance.
    pub ours: String,
    /// `host:port` of one Redis of version 7.0 or later.
    pub one: String,
    pub seed: u64,
    pub cases: usize,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Outcome {
    pub cases: usize,
    pub rounds: usize,
    /// By command: how often the instance said CROSSSLOT.
    pub crossslot: BTreeMap<String, usize>,
    /// By command: how often it refused otherwise, which it must not.
    pub refused: BTreeMap<String, usize>,
    pub differences: Vec<String>,
}

impl Outcome {
    pub fn is_fine(&self) -> bool {
        self.refused.is_empty() && self.differences.is_empty()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} cases in {} rounds", self.cases, self.rounds)?;
        writeln!(f, "CROSSSLOT (allowed): {:?}", self.crossslot)?;
        writeln!(f, "refused otherwise: {:?}", self.refused)?;
        writeln!(f, "differences: {}", self.differences.len())?;
        for difference in &self.differences {
            writeln!(f, "\n{difference}")?;
        }
        Ok(())
    }
}

/// Runs the plan to its end; what differs is in the outcome.
///
/// # Errors
/// One of the two can't be reached, or stops to answer.
pub fn run(plan: &Plan) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut round = 0;
    while outcome.cases < plan.cases && outcome.differences.len() < DIFFERENCES_MAX {
        let batches = batches(Random::new(plan.seed, round))?;
        let found = play(plan, &batches, &mut outcome)
            .with_context(|| format!("round {round} of seed {}", plan.seed))?;
        if found.is_some() {
            let (batches, difference) = shrink::shrink(plan, batches)?;
            let head = format!("round {round} of seed {}: {difference}", plan.seed);
            outcome.differences.push(head + &shrink::story(&batches));
        }
        round += 1;
        outcome.rounds += 1;
    }
    Ok(outcome)
}

/// What is compared as a whole: a command, or a transaction.
type Step = Vec<Words>;

/// Steps that one client sends before it reads the first reply.
#[derive(Debug, Clone)]
struct Batch {
    /// 0 for RESP2, 1 for RESP3: a connection each.
    protocol: usize,
    steps: Vec<Step>,
}

/// All of one round.
fn batches(random: Random) -> anyhow::Result<Vec<Batch>> {
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let mut generator = Generator::new(random, u64::try_from(now_ms)?);
    let mut batches = Vec::new();
    let mut cases = 0;
    while cases < ROUND_CASES {
        let count = generator.random().between(1, PIPELINE_MAX);
        cases += count;
        let mut steps = Vec::with_capacity(count);
        for _ in 0..count {
            steps.push(if generator.random().percent(2) {
                generator.transaction()
            } else {
                vec![generator.command()]
            });
        }
        let protocol = generator.random().below(2);
        batches.push(Batch { protocol, steps });
    }
    Ok(batches)
}

/// A connection in each protocol.
fn connect(address: &str) -> anyhow::Result<[Connection; 2]> {
    let mut both = [Connection::open(address)?, Connection::open_resp3(address)?];
    let reply = both[0].call(&["FLUSHALL"])?;
    if reply != Value::Status(b"OK".to_vec()) {
        bail!("FLUSHALL: {reply:?}");
    }
    Ok(both)
}

/// Plays a round on emptied servers, until its end or the first difference.
fn play(plan: &Plan, batches: &[Batch], outcome: &mut Outcome) -> anyhow::Result<Option<String>> {
    let (mut ours, mut one) = (connect(&plan.ours)?, connect(&plan.one)?);
    for batch in batches {
        outcome.cases += batch.steps.len();
        // One connection at a time, or the order between the two would be open.
        let (ours, one) = (&mut ours[batch.protocol], &mut one[batch.protocol]);
        if let Some(difference) = ask(ours, one, &batch.steps, outcome)? {
            return Ok(Some(difference));
        }
    }
    let found = keyspace::difference(&mut ours[0], &mut one[0], SCAN_STEP)?;
    Ok(found.map(|found| format!("at the end, {found}\n")))
}

/// Sends a batch to ours, what was not refused to the other, and compares.
fn ask(
    ours: &mut Connection,
    one: &mut Connection,
    steps: &[Step],
    outcome: &mut Outcome,
) -> anyhow::Result<Option<String>> {
    let replies = exchange(ours, steps.iter())?;
    let mut asked = Vec::new();
    for (step, replies) in steps.iter().zip(&replies) {
        match refusal(step, replies) {
            Some((name, true)) => *outcome.crossslot.entry(name).or_default() += 1,
            Some((name, false)) => *outcome.refused.entry(name).or_default() += 1,
            None => asked.push((step, replies)),
        }
    }
    let expected = exchange(one, asked.iter().map(|(step, _)| *step))?;
    for ((step, ours), one) in asked.into_iter().zip(&expected) {
        for (n, (command, (a, b))) in step.iter().zip(ours.iter().zip(one)).enumerate() {
            let exec = step.len() > 1 && n + 1 == step.len();
            let same = if exec {
                compare::same_exec(&step[1..n], a, b)
            } else {
                compare::same(command, a, b)
            };
            if !same {
                let what = if exec { shown(step) } else { show(command) };
                return Ok(Some(format!(
                    "{what}\n  ours      {a:?}\n  one Redis {b:?}\n"
                )));
            }
        }
    }
    Ok(None)
}

fn shown(step: &Step) -> String {
    let commands: Vec<_> = step.iter().map(|command| show(command)).collect();
    commands.join("; ")
}

/// Sends all steps at once and reads every reply of them.
fn exchange<'a>(
    server: &mut Connection,
    steps: impl Iterator<Item = &'a Step> + Clone,
) -> anyhow::Result<Vec<Vec<Value>>> {
    let mut frames = Vec::new();
    for command in steps.clone().flatten() {
        encode(&mut frames, command);
    }
    server.send(&frames)?;
    steps
        .map(|step| {
            step.iter()
                .map(|command| server.read().with_context(|| show(command)))
                .collect()
        })
        .collect()
}

/// The command that was refused, and whether by CROSSSLOT. A transaction is refused as a whole.
fn refusal(step: &Step, replies: &[Value]) -> Option<(String, bool)> {
    let (last, before) = replies.split_last()?;
    if step.len() > 1 && !last.is_error("EXECABORT") {
        return None;
    }
    let candidates = if before.is_empty() { replies } else { before };
    step.iter().zip(candidates).find_map(|(command, reply)| {
        let crossslot = reply.is_error("CROSSSLOT");
        let refused = crossslot || reply.is_error("ERR slotmesh:");
        let place = if step.len() > 1 { "MULTI " } else { "" };
        refused.then(|| (format!("{place}{}", compare::name(command)), crossslot))
    })
}
