//! What clients may leave unread of what they are sent unasked: messages, and lines of MONITOR.
//!
//! Invariant: a client over the hard limit is closed within the turn, one over the soft limit after its
//! time; nobody else waits for it.

use std::collections::BTreeMap;

use super::sessions::{CloseReason, Sessions};
use crate::routing::RoutingTable;

/// What a client may leave unread; 0: anything.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    hard_bytes: usize,
    soft_bytes: usize,
    soft_us: u64,
}

impl Limits {
    pub(super) fn of(table: &RoutingTable) -> Self {
        let given = &table.settings.parameters;
        let or_any = |bytes: usize| if bytes == 0 { usize::MAX } else { bytes };
        Self {
            hard_bytes: or_any(given.pubsub_hard_bytes),
            soft_bytes: or_any(given.pubsub_soft_bytes),
            soft_us: given.pubsub_soft_s.saturating_mul(1_000_000),
        }
    }
}

/// Clients that read too slowly what they did not ask for one by one: closed before they cost memory.
#[derive(Debug, Default)]
pub(super) struct SlowReaders {
    since_us: BTreeMap<(u32, u32), u64>,
}

impl SlowReaders {
    /// Gives bytes to a client. True if it has become slow.
    pub(super) fn push(
        &mut self,
        sessions: &mut Sessions,
        (slot, generation): (u32, u32),
        bytes: &[u8],
        limits: Limits,
        now_us: u64,
    ) -> bool {
        let over = |sessions: &Sessions| sessions.get(slot).map_or(0, |client| client.unsent());
        if over(sessions) > limits.hard_bytes {
            return false; // it is closed at the end of this turn
        }
        sessions.push(slot, generation, bytes);
        let unsent = over(sessions);
        if unsent <= limits.soft_bytes && unsent <= limits.hard_bytes {
            return false;
        }
        let new = !self.since_us.contains_key(&(slot, generation));
        let since_us = if unsent > limits.hard_bytes {
            0
        } else {
            now_us
        };
        let known = self.since_us.entry((slot, generation)).or_insert(since_us);
        *known = since_us.min(*known);
        new || since_us == 0
    }

    /// Closes those whose time is over. Returns how many, and when to look again.
    pub(super) fn close_late(
        &mut self,
        sessions: &mut Sessions,
        limits: Limits,
        now_us: u64,
    ) -> (u64, Option<u64>) {
        let (mut closed, mut next) = (0, None::<u64>);
        self.since_us.retain(|&(slot, generation), since_us| {
            let unsent = sessions
                .get_same(slot, generation)
                .map_or(0, |client| client.unsent());
            let late = since_us.saturating_add(limits.soft_us) <= now_us || *since_us == 0;
            if unsent > limits.hard_bytes || (late && unsent > limits.soft_bytes) {
                sessions.doom(slot, CloseReason::Subscriber);
                closed += 1;
                return false;
            }
            let slow = unsent > limits.soft_bytes;
            if slow {
                let at = since_us.saturating_add(limits.soft_us);
                next = Some(next.map_or(at, |next| next.min(at)));
            }
            slow
        });
        (closed, next)
    }
}
