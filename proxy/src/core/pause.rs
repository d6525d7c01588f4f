//! CLIENT PAUSE: commands of all clients of this process wait, or those that may change data.
//!
//! Invariant: a pause ends by itself. A paused command is not taken: its bytes stay with its client.
//! A script goes on only where the engine itself keeps it from writing: by its text's flags, by a
//! `_RO` command, or as a function that was registered with `no-writes`. Functions are asked for once
//! in a pause, since loading others is a write that waits for its end.

use std::collections::HashSet;

use slotmesh_command::{Class, Command};
use slotmesh_resp::Value;

use super::Core;
use super::dispatch::Flow;
use super::script_flags::declares_no_writes;
use super::scripts::parse_sha;
use super::spec::Request;
use super::unknown::Purpose;

/// No writes by their flags, but what they do may have to reach replicas: PFCOUNT keeps its number.
const MAY_REPLICATE: &[&str] = &["pfcount", "publish", "spublish"];

/// A pause of this worker's clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Paused {
    until_us: u64,
    /// Commands that only read go on.
    writes_only: bool,
    /// Functions that write nothing; `None`: no node was asked yet.
    functions: Option<HashSet<Vec<u8>>>,
}

/// What a pause means for a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    None,
    Possible,
    /// The function must be asked for.
    Unknown,
}

impl Core {
    /// Pauses for that long; 0 ends a pause. As in Redis a second pause never shortens the first,
    /// and the stricter one holds.
    pub(super) fn pause(&mut self, ms: u64, writes_only: bool) {
        if ms == 0 {
            self.paused = None;
            self.out.freed = true;
            return;
        }
        let until_us = self.now_us.saturating_add(ms.saturating_mul(1000));
        let before = self.paused.take();
        let before = before.filter(|paused| paused.until_us > self.now_us);
        self.paused = Some(match before {
            Some(before) => Paused {
                until_us: before.until_us.max(until_us),
                writes_only: writes_only && before.writes_only,
                functions: before.functions,
            },
            None => Paused {
                until_us,
                writes_only,
                functions: None,
            },
        });
        self.out.unsteady = true;
    }

    /// How long a pause goes on, in milliseconds, and whether it is of writes only.
    pub(super) fn pause_left(&self) -> (u64, bool) {
        let paused = self.paused.as_ref();
        paused.map_or((0, false), |paused| {
            let left_us = paused.until_us.saturating_sub(self.now_us);
            (left_us.div_ceil(1000), paused.writes_only)
        })
    }

    /// What a pause makes of a command; `None`: it goes on.
    pub(super) fn held_by_pause(
        &mut self,
        slot: u32,
        command: &Command,
        request: Request<'_>,
    ) -> Option<Flow> {
        let paused = self.paused.as_ref()?;
        if paused.until_us <= self.now_us {
            return None;
        }
        if !paused.writes_only {
            return Some(Flow::NoRoom);
        }
        match self.change_now(slot, command, request) {
            Change::None => None,
            Change::Possible => Some(Flow::NoRoom),
            Change::Unknown => {
                let words = vec![b"FUNCTION".to_vec(), b"LIST".to_vec()];
                Some(self.ask_unseen(slot, words, Purpose::Functions))
            }
        }
    }

    fn change_now(&self, slot: u32, command: &Command, request: Request<'_>) -> Change {
        let possible = |yes| if yes { Change::Possible } else { Change::None };
        let client = self.sessions.get(slot);
        let transaction = client.and_then(|client| client.state.transaction.as_ref());
        match (command.class, transaction) {
            (Class::Transaction, Some(queued)) => {
                possible(command.name == "exec" && queued.may_change)
            }
            (_, Some(_)) => Change::None, // only queued
            (Class::Proxy | Class::Transaction | Class::Monitor | Class::Refused(_), None) => {
                Change::None
            }
            _ if command.name == "fcall" => {
                let functions = self.paused.as_ref().and_then(|p| p.functions.as_ref());
                match functions {
                    None if client.is_some_and(|c| c.state.authenticated) => Change::Unknown,
                    _ => possible(self.may_change_data(command, request)),
                }
            }
            _ => possible(self.may_change_data(command, request)),
        }
    }

    /// Whether what the command does at a node may have to reach replicas.
    pub(super) fn may_change_data(&self, command: &Command, request: Request<'_>) -> bool {
        match command.name {
            "eval" => return !declares_no_writes(request.arg(1)),
            "evalsha" => {
                let text = parse_sha(request.arg(1)).and_then(|sha| self.scripts.text(&sha));
                return !text.is_some_and(|text| declares_no_writes(&text));
            }
            "fcall" => {
                let functions = self.paused.as_ref().and_then(|p| p.functions.as_ref());
                return !functions.is_some_and(|known| known.contains(request.arg(1)));
            }
            _ => {}
        }
        command.is_write() || MAY_REPLICATE.contains(&command.name)
    }

    /// A node's FUNCTION LIST. If there was none, every function waits.
    pub(super) fn note_functions(&mut self, reply: Option<&Value>) {
        if let Some(paused) = &mut self.paused {
            paused.functions = Some(reply.map(no_writes).unwrap_or_default());
        }
    }

    /// Clients that wait for the end of a pause.
    pub(super) fn paused_clients(&self) -> u64 {
        let paused = self.paused.as_ref();
        let paused = paused.is_some_and(|paused| paused.until_us > self.now_us);
        if paused { self.stalled.len() as u64 } else { 0 }
    }

    /// Ends a pause whose time is over; returns when to look again.
    pub(super) fn pause_on_time(&mut self) -> Option<u64> {
        let until_us = self.paused.as_ref()?.until_us;
        if until_us > self.now_us {
            return Some(until_us);
        }
        self.paused = None;
        self.out.freed = true;
        None
    }
}

/// The value behind a name in a list of names and values.
fn field<'v>(fields: &'v [Value], name: &str) -> Option<&'v [Value]> {
    let mut pairs = fields.chunks_exact(2);
    let pair = pairs.find(|pair| pair[0].as_str() == Some(name))?;
    match &pair[1] {
        Value::Array(items) | Value::Set(items) => Some(items),
        _ => None,
    }
}

/// The functions of FUNCTION LIST that have the flag `no-writes`.
fn no_writes(list: &Value) -> HashSet<Vec<u8>> {
    let Value::Array(libraries) = list else {
        return HashSet::new();
    };
    let inside = |value: &Value| match value {
        Value::Array(fields) => fields.clone(),
        _ => Vec::new(),
    };
    let libraries = libraries.iter().map(inside);
    let functions = libraries.flat_map(|fields| {
        let functions = field(&fields, "functions").unwrap_or_default();
        functions.iter().map(inside).collect::<Vec<_>>()
    });
    let quiet = functions.filter(|fields| {
        let flags = field(fields, "flags").unwrap_or_default();
        flags.iter().any(|flag| flag.as_str() == Some("no-writes"))
    });
    let named = quiet.filter_map(|fields| match (fields.first(), fields.get(1)) {
        (Some(key), Some(Value::Bulk(name))) if key.as_str() == Some("name") => Some(name.clone()),
        _ => None,
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_functions_with_the_flag_write_nothing() {
        let text = |text: &str| Value::Bulk(text.as_bytes().to_vec());
        let function = |name: &str, flags: &[&str]| {
            let flags = flags.iter().map(|flag| Value::Simple((*flag).to_owned()));
            Value::Array(vec![
                text("name"),
                text(name),
                text("description"),
                Value::Null,
                text("flags"),
                Value::Array(flags.collect()),
            ])
        };
        let library = Value::Array(vec![
            text("library_name"),
            text("lib"),
            text("functions"),
            Value::Array(vec![
                function("reads", &["allow-stale", "no-writes"]),
                function("writes", &["allow-oom"]),
            ]),
        ]);
        let found = no_writes(&Value::Array(vec![library]));
        assert_eq!(found, HashSet::from([b"reads".to_vec()]));
        assert!(no_writes(&Value::Null).is_empty());
    }
}
