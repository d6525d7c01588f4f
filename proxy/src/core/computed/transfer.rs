//! RENAME, RENAMENX and COPY from one shard to another.
//!
//! Invariants: the value stands at its new place before it is removed from its old one, and it is
//! removed only if it still is what was copied; so nothing is lost, whatever ends half-way. The time
//! to live goes with it.

use slotmesh_resp::{parse_i64, write};

use super::super::job::{Answers, Job, Round, Step};
use super::super::retry::Effect;
use super::{NOT_AN_INTEGER, SYNTAX, fail_half_done, hidden_name, is, read};

/// How often a value is copied anew because its source changed meanwhile. A key that changes more
/// often than it can be copied would never arrive.
const ATTEMPTS_MAX: u32 = 8;

const NO_SUCH_KEY: &[u8] = b"ERR no such key";
const NO_SUCH_DATABASE: &str = "ERR DB index is out of range";
const NO_INT: &str = "ERR value is out of range, value must between -2147483648 and 2147483647";
const HALF_DONE: &str =
    "the value stands under its new name, and may still stand under its old one";
const UNSTEADY: &[u8] =
    b"ERR slotmesh: the key changed whenever it was read to be copied to another \
     shard; try again";
const KEEPS_CHANGING: &[u8] = b"ERR slotmesh: the key kept changing while it was moved to another \
     shard; it still has its old name, and an earlier value of it stands under the new one";
const TAKEN: &[u8] = b"ERR slotmesh: another client removed the key while it was moved to another \
     shard; the value that it had stands under the new name";

/// Removes the key if it still is what was copied: it has the same time of expiry (if that is known
/// exactly), and the same value. See the script.
const REMOVE: &[u8] = include_bytes!("remove.lua");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Rename,
    RenameNx,
    Copy,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Begin,
    Read,
    Restore,
    Remove,
}

#[derive(Debug)]
pub(super) struct Transfer {
    verb: Verb,
    source: Vec<u8>,
    destination: Vec<u8>,
    /// Where to, if it is not the client's database.
    database: Option<u16>,
    replace: bool,
    phase: Phase,
    /// How often the source turned out to have changed.
    attempts: u32,
    /// A copy stands at the destination.
    copied: bool,
    /// Engines before 7.0 cannot say when a key expires, only in how long.
    relative: bool,
    dump: Vec<u8>,
    /// -1: never.
    expires_at_ms: i64,
}

impl Transfer {
    pub(super) fn begin(name: &str, words: Vec<Vec<u8>>, databases: u16) -> Result<Self, String> {
        let (mut database, mut replace) = (None, name == "rename");
        let mut options = words.iter().skip(3);
        while let Some(option) = options.next() {
            if is(option, "replace") {
                replace = true;
            } else if is(option, "db")
                && let Some(number) = options.next()
            {
                database = Some(parse_database(number, databases)?);
            } else {
                return Err(SYNTAX.to_owned());
            }
        }
        let mut keys = words.into_iter().skip(1);
        let mut key = || keys.next().unwrap_or_default();
        Ok(Self {
            verb: match name {
                "rename" => Verb::Rename,
                "renamenx" => Verb::RenameNx,
                _ => Verb::Copy,
            },
            source: key(),
            destination: key(),
            database,
            replace,
            phase: Phase::Begin,
            attempts: 0,
            copied: false,
            relative: false,
            dump: Vec::new(),
            expires_at_ms: -1,
        })
    }

    /// The time of expiry is asked before and after: if it is the same, it belongs to the value.
    fn ask_value(&mut self, round: &mut Round<'_>) -> Step {
        let expiry: &[u8] = if self.relative {
            b"PTTL"
        } else {
            b"PEXPIRETIME"
        };
        for verb in [expiry, b"DUMP", expiry] {
            round.ask_owner(&self.source, Effect::Read, &[verb, &self.source]);
        }
        self.phase = Phase::Read;
        Step::Asked
    }

    fn read(&mut self, answers: &Answers, round: &mut Round<'_>) -> Step {
        let [before, dump, after] = &answers[..] else {
            return round.fail(read::UNREADABLE);
        };
        if !self.relative && before.starts_with(b"-ERR unknown command") {
            self.relative = true;
            return self.ask_value(round);
        }
        if let Some(error) = read::first_error(answers) {
            return self.failed(error, round);
        }
        let Some(dump) = read::bulk(dump) else {
            return round.fail(read::UNREADABLE);
        };
        let Some(dump) = dump else {
            return self.source_is_gone(round);
        };
        let (Some(before), Some(after)) = (read::integer(before), read::integer(after)) else {
            return round.fail(read::UNREADABLE);
        };
        self.expires_at_ms = match (before, after) {
            (-1, -1) => -1,
            (0.., 0..) if self.relative => (round.now_unix_us / 1000) as i64 + after,
            (0.., 0..) if before == after => after,
            _ => return self.changed(round),
        };
        self.dump = dump.to_vec();
        self.restore(round)
    }

    fn restore(&mut self, round: &mut Round<'_>) -> Step {
        // 0 would mean "never": what expired then is gone, and 1 ms is in the past as well.
        let ttl = match self.expires_at_ms {
            -1 => "0".to_owned(),
            at => at.max(1).to_string(),
        };
        let mut command: Vec<&[u8]> = vec![b"RESTORE", &self.destination];
        command.extend([ttl.as_bytes(), &self.dump, b"ABSTTL"]);
        if self.replace || self.copied {
            command.push(b"REPLACE");
        }
        let shard = round.shard_of(&self.destination);
        let database = self.database.unwrap_or(round.db);
        round.ask_in(shard, database, Effect::Write, &command);
        self.phase = Phase::Restore;
        Step::Asked
    }

    fn restored(&mut self, answer: &[u8], round: &mut Round<'_>) -> Step {
        if answer.starts_with(b"-BUSYKEY") {
            return reply(round, 0);
        }
        if read::is_error(answer) {
            return self.failed(answer, round);
        }
        self.copied = true;
        if self.verb == Verb::Copy {
            return reply(round, 1);
        }
        let expiry = if self.relative {
            String::new()
        } else {
            self.expires_at_ms.to_string()
        };
        let (dump, expiry) = (&self.dump[..], expiry.as_bytes());
        let hidden = hidden_name(round.now_unix_us, 0);
        let command = [b"EVAL", REMOVE, b"2", &self.source, &hidden, dump, expiry];
        round.ask_owner(&self.source, Effect::Script, &command);
        self.phase = Phase::Remove;
        Step::Asked
    }

    fn removed(&mut self, answer: &[u8], round: &mut Round<'_>) -> Step {
        match read::integer(answer) {
            Some(1) => self.moved(round),
            Some(0) => self.changed(round),
            Some(-1) => self.source_is_gone(round),
            _ => self.failed(answer, round),
        }
    }

    fn failed(&self, error: &[u8], round: &mut Round<'_>) -> Step {
        if self.copied {
            fail_half_done(round, HALF_DONE, error)
        } else {
            round.pass(error)
        }
    }

    fn moved(&self, round: &mut Round<'_>) -> Step {
        match self.verb {
            Verb::Rename => round.done(|out, _| write::write_simple(out, "OK")),
            Verb::RenameNx | Verb::Copy => reply(round, 1),
        }
    }

    fn changed(&mut self, round: &mut Round<'_>) -> Step {
        self.attempts += 1;
        if self.attempts < ATTEMPTS_MAX {
            return self.ask_value(round);
        }
        round.fail(if self.copied {
            KEEPS_CHANGING
        } else {
            UNSTEADY
        })
    }

    fn source_is_gone(&self, round: &mut Round<'_>) -> Step {
        let now_ms = (round.now_unix_us / 1000) as i64;
        match self.verb {
            // It expired, at its new place too.
            _ if self.copied && self.expires_at_ms > 0 && now_ms >= self.expires_at_ms => {
                self.moved(round)
            }
            _ if self.copied => round.fail(TAKEN),
            Verb::Copy => reply(round, 0),
            Verb::Rename | Verb::RenameNx => round.fail(NO_SUCH_KEY),
        }
    }
}

impl Job for Transfer {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        let answer = answers.first().map(Vec::as_slice).unwrap_or_default();
        match self.phase {
            Phase::Begin => self.ask_value(round),
            Phase::Read => self.read(&answers, round),
            Phase::Restore => self.restored(answer, round),
            Phase::Remove => self.removed(answer, round),
        }
    }
}

fn parse_database(number: &[u8], databases: u16) -> Result<u16, String> {
    let number = parse_i64(number).ok_or(NOT_AN_INTEGER)?;
    if i32::try_from(number).is_err() {
        return Err(NO_INT.to_owned());
    }
    let number = u16::try_from(number).ok();
    Ok(number
        .filter(|number| *number < databases)
        .ok_or(NO_SUCH_DATABASE)?)
}

fn reply(round: &mut Round<'_>, value: i64) -> Step {
    round.done(|out, _| write::write_int(out, value))
}
