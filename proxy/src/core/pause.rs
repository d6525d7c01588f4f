//! CLIENT PAUSE: commands of all clients of this process wait, or those that may change data.
//!
//! Invariant: a pause ends by itself. A paused command is not taken: its bytes stay with its client.

use slotmesh_command::{Class, Command};

use super::Core;
use super::retry::Effect;
use super::spec;

/// A pause of this worker's clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Paused {
    until_us: u64,
    /// Commands that only read go on.
    writes_only: bool,
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
        let before = self.paused.filter(|paused| paused.until_us > self.now_us);
        self.paused = Some(Paused {
            until_us: before.map_or(until_us, |before| before.until_us.max(until_us)),
            writes_only: writes_only && before.is_none_or(|before| before.writes_only),
        });
        self.out.unsteady = true;
    }

    /// True if a command must wait for the end of the pause.
    pub(super) fn must_pause(&self, slot: u32, command: &Command) -> bool {
        let Some(paused) = self.paused.filter(|paused| paused.until_us > self.now_us) else {
            return false;
        };
        !paused.writes_only || self.may_change_data(slot, command)
    }

    fn may_change_data(&self, slot: u32, command: &Command) -> bool {
        let transaction = self
            .sessions
            .get(slot)
            .and_then(|client| client.state.transaction.as_ref());
        match (command.class, transaction) {
            (Class::Transaction, Some(queued)) => command.name == "exec" && !queued.read_only,
            (_, Some(_)) => false, // only queued
            (Class::Proxy | Class::Transaction | Class::Monitor | Class::Refused(_), None) => false,
            _ if command.name == "pfcount" => true, // it may write its cached number
            _ => {
                matches!(spec::effect(command), Effect::Write | Effect::Script)
                    && (command.is_write() || !command.name.contains("subscribe"))
            }
        }
    }

    /// Clients that wait for the end of a pause.
    pub(super) fn paused_clients(&self) -> u64 {
        let paused = self
            .paused
            .is_some_and(|paused| paused.until_us > self.now_us);
        if paused { self.stalled.len() as u64 } else { 0 }
    }

    /// Ends a pause whose time is over; returns when to look again.
    pub(super) fn pause_on_time(&mut self) -> Option<u64> {
        let paused = self.paused?;
        if paused.until_us > self.now_us {
            return Some(paused.until_us);
        }
        self.paused = None;
        self.out.freed = true;
        None
    }
}
