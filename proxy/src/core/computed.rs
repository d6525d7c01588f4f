//! Commands whose keys are on several shards, computed here: operands are fetched, combined as an
//! engine would, and stored.
//!
//! Invariants: a result is what one engine with all the keys would give, or the command is refused;
//! errors are the engine's own, and the one that the engine would have found first. Nothing is
//! atomic across shards, but what one shard is told to store, it stores as a whole or not at all.

mod hyperloglog;
mod lcs;
mod read;
mod registers;
mod score;
mod sets;
mod smove;
mod sorted;
mod store;
mod transfer;

use slotmesh_command::Command;

use super::Core;
use super::dispatch::Flow;
use super::job::{Job, Round, Step};
use super::spec::Request;

const SYNTAX: &str = "ERR syntax error";
const NOT_AN_INTEGER: &str = "ERR value is not an integer or out of range";
const NEGATIVE_LIMIT: &str = "ERR LIMIT can't be negative";

impl Core {
    /// Computes a command whose keys are on several shards.
    pub(super) fn compute(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        if self.sessions.get(slot).is_some_and(|c| c.in_flight() > 0) {
            return Flow::NotYet;
        }
        match begin(command, request, self.table.settings.databases) {
            Ok(job) => self.start_job(slot, job),
            Err(text) => self.refuse(slot, text.as_bytes()),
        }
    }
}

/// Begins a command of class `Computed` whose keys are not all on one shard.
///
/// # Errors
/// The text of the error that an engine gives before it looks at any key.
fn begin(
    command: &'static Command,
    request: Request<'_>,
    databases: u16,
) -> Result<Box<dyn Job>, String> {
    let words: Vec<Vec<u8>> = (0..request.len())
        .map(|at| request.arg(at).to_vec())
        .collect();
    let job: Box<dyn Job> = match command.name {
        "sdiff" | "sinter" | "sunion" | "sdiffstore" | "sinterstore" | "sunionstore"
        | "sintercard" => Box::new(sets::Sets::begin(command.name, words)?),
        "smove" => Box::new(smove::Smove::begin(words)),
        "zdiff" | "zinter" | "zunion" | "zdiffstore" | "zinterstore" | "zunionstore"
        | "zintercard" => Box::new(sorted::Sorted::begin(command.name, words)?),
        "lcs" => Box::new(lcs::Lcs::begin(words)),
        "pfcount" => Box::new(hyperloglog::Count::begin(words)),
        "pfmerge" => Box::new(hyperloglog::Merge::begin(words)),
        "rename" | "renamenx" | "copy" => {
            Box::new(transfer::Transfer::begin(command.name, words, databases)?)
        }
        _ => return Err(super::dispatch::CROSS_SLOT.to_owned()),
    };
    Ok(job)
}

/// The name of a key that exists only while its node executes one block or script, so that nobody
/// else ever sees it. No user has it: besides the words, it is a moment of this proxy.
fn hidden_name(now_unix_us: u64, number: usize) -> Vec<u8> {
    format!("\0slotmesh:hidden:7b1f0c52d8e94a36:{now_unix_us}:{number}").into_bytes()
}

/// Ends a job whose last step failed after an earlier one took effect: an error that says `state`,
/// and why. The error alone might say that nothing was executed.
fn fail_half_done(round: &mut Round<'_>, state: &str, error: &[u8]) -> Step {
    let cause = error.strip_prefix(b"-").unwrap_or(error);
    let cause = String::from_utf8_lossy(cause);
    round.fail(format!("ERR slotmesh: {state}: {}", cause.trim_end()).as_bytes())
}

/// True if `word` is this option, in any case.
fn is(word: &[u8], option: &str) -> bool {
    word.eq_ignore_ascii_case(option.as_bytes())
}

#[cfg(test)]
mod tests;
