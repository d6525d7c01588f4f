//! The sockets of clients that are to go elsewhere.
//!
//! Invariant: a client is sent the last byte only if nothing of it waits to be read. What comes in the
//! instant between the two looks at the socket is like what comes later: not executed, and its sender
//! finds the connection ended instead of a reply.

use std::time::Instant;

use super::Worker;
use crate::core::departing::{Departure, Elsewhere};

/// All clients of a process are to go.
#[derive(Clone, Debug)]
pub(crate) struct SendOff {
    pub(crate) elsewhere: Elsewhere,
    pub(crate) number: i64,
    /// Whoever is left is closed.
    pub(crate) deadline: Instant,
}

impl Worker {
    /// `None`: nobody is to go any more.
    pub(super) fn depart(&mut self, off: Option<SendOff>) {
        let Some(off) = off else {
            return self.core.stay();
        };
        let until = off.deadline.saturating_duration_since(self.started);
        self.core.depart_all(Departure {
            elsewhere: off.elsewhere,
            number: off.number,
            deadline_us: u64::try_from(until.as_micros()).unwrap_or(u64::MAX),
        });
    }

    /// Once per turn, while clients are to go: closes those whose time has come and who are between two
    /// requests. Behind the sends of a turn: who has its reply just now has hardly sent the next request.
    pub(super) fn part(&mut self) {
        let mut partings = std::mem::take(&mut self.core.out.partings);
        for (slot, generation) in partings.drain(..) {
            if self.core.may_part(slot, generation) && self.clients.end(slot, &mut self.core) {
                self.core.parted(slot, generation);
            }
        }
        self.core.out.partings = partings; // keeps its memory
        self.published.store_departures(&self.core.counters);
    }
}
