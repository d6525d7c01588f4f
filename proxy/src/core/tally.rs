//! What INFO tells of commands that no node sees: those answered here, and those refused here.
//!
//! Invariant: a command is counted either here or at a node; the sums of both are what one Redis
//! would have counted.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use slotmesh_command::{Class, Command};

/// Most codes of errors that are told apart, as in Redis: who makes up codes must not take memory.
const CODES_MAX: usize = 128;

#[derive(Clone, Copy, Debug, Default)]
struct Calls {
    calls: u64,
    rejected: u64,
    failed: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// By [`Command::id`].
    commands: Vec<Calls>,
    errors: BTreeMap<String, u64>,
    errors_sum: u64,
}

impl Tally {
    fn of(&mut self, command: &Command) -> Option<&mut Calls> {
        let id = command.id()?;
        if self.commands.len() <= id {
            self.commands.resize(id + 1, Calls::default());
        }
        self.commands.get_mut(id)
    }

    /// The proxy answered it itself.
    pub(super) fn called(&mut self, command: &Command, failed: bool) {
        if let Some(calls) = self.of(command) {
            calls.calls += 1;
            calls.failed += u64::from(failed);
        }
    }

    /// It was refused before it was executed.
    pub(super) fn rejected(&mut self, command: &Command) {
        if let Some(calls) = self.of(command) {
            calls.rejected += 1;
        }
    }

    /// An error reply of the proxy; `text` without `-`.
    pub(super) fn error(&mut self, text: &[u8]) {
        self.errors_sum += 1;
        let code = text.split(|b| *b == b' ').next().unwrap_or_default();
        let code = String::from_utf8_lossy(code).into_owned();
        if self.errors.len() < CODES_MAX || self.errors.contains_key(&code) {
            *self.errors.entry(code).or_default() += 1;
        }
    }

    pub(super) fn errors_sum(&self) -> u64 {
        self.errors_sum
    }

    /// CONFIG RESETSTAT.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// For a peer: a line each, `calls|name|calls|rejected|failed` and `error|code|count`.
    pub(super) fn write(&self, out: &mut String) {
        for command in slotmesh_command::all() {
            let Some(calls) = command.id().and_then(|id| self.commands.get(id)) else {
                continue;
            };
            if calls.calls + calls.rejected > 0 {
                let Calls {
                    calls,
                    rejected,
                    failed,
                } = calls;
                let name = command.name.replace('|', ":");
                let _ = writeln!(out, "calls|{name}|{calls}|{rejected}|{failed}");
            }
        }
        for (code, count) in &self.errors {
            let _ = writeln!(out, "error|{code}|{count}");
        }
    }
}

/// True if calls of the command are the proxy's to count: those that nodes get are its own.
pub(super) fn counts_here(name: &str) -> bool {
    let words: Vec<&[u8]> = name.split('|').map(str::as_bytes).collect();
    let command = slotmesh_command::lookup(words.first().copied().unwrap_or_default());
    command.is_some_and(|command| {
        let sub = words.get(1).and_then(|sub| command.subcommand(sub));
        sub.unwrap_or(command).class == Class::Proxy
    })
}
