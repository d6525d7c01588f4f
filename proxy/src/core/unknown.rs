//! Names that the command table does not have: a node is asked, once, whether a module brought them.
//!
//! Invariants: the client's command stays where it is until the answer came, then takes its way as
//! any other, so order and rights are those of every command. Who makes up names costs one question
//! to a node each, and a bounded memory.

use std::collections::HashMap;

use slotmesh_command::{Command, CommandError, LearnError, Part, learn};
use slotmesh_resp::Value;

use super::Core;
use super::dispatch::Flow;
use super::job::{Answers, Job, Round, Step};
use super::login::SERVER_VERSION;
use super::retry::Effect;
use super::spec::{self, Request};

/// How long a name that no node knows is not asked for again: a module is not loaded in between.
const UNKNOWN_US: u64 = 5_000_000;
/// Such names that are remembered.
const UNKNOWN_MAX: usize = 256;
/// A longer name is nobody's.
const NAME_BYTES_MAX: usize = 64;
/// How often the engine's version is asked for at most.
const VERSION_RETRY_US: u64 = 5_000_000;

/// What a question that no client asked is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Whether a node knows the command.
    Learn(Vec<u8>),
    /// Which version the engine has.
    Version,
    /// Which functions write nothing.
    Functions,
}

/// What nodes have told of themselves.
#[derive(Debug, Default)]
pub(super) struct Learned {
    /// Names that no node knows, and until when that counts.
    unknown: HashMap<Vec<u8>, u64>,
    version: Option<String>,
    /// The table's revision that the version was asked at, and when to ask again.
    version_asked: Option<(u64, u64)>,
}

/// One question, whose answer is kept as it is.
#[derive(Debug)]
struct Question {
    words: Vec<Vec<u8>>,
    asked: bool,
}

impl Job for Question {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if std::mem::replace(&mut self.asked, true) {
            return round.pass(answers.first().map(Vec::as_slice).unwrap_or_default());
        }
        let words: Vec<&[u8]> = self.words.iter().map(Vec::as_slice).collect();
        round.ask(round.any_shard(), Effect::Read, &words);
        Step::Asked
    }
}

impl Core {
    /// A command that the table does not have, or not with so many arguments.
    pub(super) fn unresolved(
        &mut self,
        slot: u32,
        request: Request<'_>,
        error: &CommandError,
    ) -> Flow {
        if let Some(client) = self.sessions.get_mut(slot) {
            client.last_command = None;
        }
        match error {
            CommandError::Unknown(_) if self.may_ask(slot, request.arg(0)) => {
                let name = request.arg(0).to_ascii_lowercase();
                let words = vec![b"COMMAND".to_vec(), b"INFO".to_vec(), name.clone()];
                let flow = self.ask_unseen(slot, words, Purpose::Learn(name));
                // Nobody could be asked: then there is nothing to wait for.
                if !self.is_unknown(request.arg(0)) {
                    return flow;
                }
            }
            CommandError::WrongArity(name) => {
                if let Some(command) = slotmesh_command::all().find(|c| c.name == *name) {
                    self.tally.rejected(command);
                }
            }
            _ => {}
        }
        self.misspelt(slot, error)
    }

    fn may_ask(&self, slot: u32, name: &[u8]) -> bool {
        let usual = !name.is_empty()
            && name.len() <= NAME_BYTES_MAX
            && name.iter().all(u8::is_ascii_graphic);
        let welcome = self
            .sessions
            .get(slot)
            .is_some_and(|c| c.state.authenticated);
        usual && welcome && self.ready && !self.is_unknown(name)
    }

    fn is_unknown(&self, name: &[u8]) -> bool {
        let until_us = self.learned.unknown.get(&name.to_ascii_lowercase());
        until_us.is_some_and(|until_us| *until_us > self.now_us)
    }

    /// Asks a node before a client's command is taken. The command is shown again afterwards.
    pub(super) fn ask_unseen(&mut self, slot: u32, words: Vec<Vec<u8>>, purpose: Purpose) -> Flow {
        let job = Question {
            words,
            asked: false,
        };
        self.start_unseen_job(slot, Box::new(job), purpose);
        Flow::NotYet
    }

    /// The answer to such a question.
    pub(super) fn found_out(&mut self, purpose: Purpose, reply: &[u8]) {
        let value = Value::decode(reply).ok().flatten().map(|(value, _)| value);
        match purpose {
            Purpose::Learn(name) => {
                let entry = match value {
                    Some(Value::Array(entries)) => entries.into_iter().next().map(part_of),
                    _ => None,
                };
                let entry = entry.unwrap_or(Part::Nil);
                // What the newer of two engines has by itself the older one does not have.
                if self.held_back.is_some() && !entry.is_of_module() {
                    return self.note_unknown(name, LearnError::Unknown);
                }
                match learn(&name, &entry) {
                    Ok(command) => {
                        tracing::info!(command = command.name, "a node's command was learned");
                    }
                    Err(error) => self.note_unknown(name, error),
                }
            }
            Purpose::Functions => self.note_functions(value.as_ref()),
            Purpose::Version => {
                let info = value.as_ref().and_then(Value::as_str).unwrap_or_default();
                let mut lines = info.lines();
                let version = lines.find_map(|line| line.strip_prefix("redis_version:"));
                if let Some(version) = version {
                    self.learned.version = Some(version.trim().to_owned());
                }
            }
        }
    }

    fn note_unknown(&mut self, name: Vec<u8>, error: LearnError) {
        if error != LearnError::Unknown {
            tracing::warn!(%error, "a node's command could not be learned");
        }
        let unknown = &mut self.learned.unknown;
        if unknown.len() >= UNKNOWN_MAX {
            unknown.clear();
        }
        unknown.insert(name, self.now_us + UNKNOWN_US);
    }

    /// The engine's version, as far as it is known.
    pub(super) fn server_version(&self) -> &str {
        self.learned.version.as_deref().unwrap_or(SERVER_VERSION)
    }

    /// Finds out the engine's version before a client is told. `None`: go on.
    pub(super) fn wait_for_version(&mut self, slot: u32) -> Option<Flow> {
        let revision = self.table.revision;
        let due = match self.learned.version_asked {
            None => true,
            // A new table may have come with another engine.
            Some((asked, again_us)) => {
                again_us <= self.now_us && (asked != revision || self.learned.version.is_none())
            }
        };
        if !due || self.table.all_shards().is_empty() {
            return None;
        }
        if self.sessions.get(slot).is_some_and(|c| c.in_flight() > 0) {
            return Some(Flow::NotYet);
        }
        self.learned.version_asked = Some((revision, self.now_us + VERSION_RETRY_US));
        let words = vec![b"INFO".to_vec(), b"server".to_vec()];
        Some(self.ask_unseen(slot, words, Purpose::Version))
    }

    /// What a cluster refuses and the only shard may get: a command that a node told of, whose keys
    /// only that node can tell, and what one node answers for itself.
    pub(super) fn may_pass(&self, command: &Command) -> bool {
        let fits = command.is_learned() || spec::FOR_ONE_SHARD.contains(&command.name);
        fits && self.table.only_shard().is_some()
    }
}

/// A node's reply as plain data.
fn part_of(value: Value) -> Part {
    match value {
        Value::Null => Part::Nil,
        Value::Int(number) => Part::Int(number),
        Value::Bool(flag) => Part::Int(i64::from(flag)),
        Value::Array(items) | Value::Set(items) | Value::Push(items) => {
            Part::List(items.into_iter().map(part_of).collect())
        }
        Value::Map(pairs) => {
            let fields = pairs.into_iter().flat_map(|(key, value)| [key, value]);
            Part::List(fields.map(part_of).collect())
        }
        Value::Simple(text) | Value::Error(text) | Value::BigNumber(text) => {
            Part::Text(text.into_bytes())
        }
        Value::Bulk(text) | Value::Verbatim { text, .. } => Part::Text(text),
        Value::Double(number) => Part::Text(number.to_string().into_bytes()),
    }
}
