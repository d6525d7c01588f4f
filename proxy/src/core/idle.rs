//! Clients that say nothing for longer than the instance's `timeout` are closed.
//!
//! Invariant: who waits for something (a reply, a message, a list's next element) is not idle. The
//! time is looked at about once a second, so nothing is paid for a command.

use super::Core;
use super::client::{Client, Pause};
use super::sessions::CloseReason;

/// How often clients are looked at: the parameter has seconds.
const LOOK_EVERY_US: u64 = 1_000_000;

impl Core {
    /// Closes idle clients; returns when to look again.
    pub(super) fn close_idle(&mut self) -> Option<u64> {
        let timeout_us = self.table.settings.parameters.timeout_s * 1_000_000;
        if timeout_us == 0 {
            return None;
        }
        if self.idle_at_us > self.now_us {
            return Some(self.idle_at_us);
        }
        self.idle_at_us = self.now_us + LOOK_EVERY_US;
        let now_us = self.now_us;
        let idle = |client: &Client| {
            client.heard_us + timeout_us <= now_us
                && client.in_flight() == 0
                && client.unsent() == 0
                && !client.sealed
                && client.pause == Pause::None
                && !client.is_subscriber()
                && !client.is_monitoring()
        };
        let slots: Vec<u32> = self.sessions.slots().collect();
        for slot in slots {
            if self.sessions.get(slot).is_some_and(idle) {
                self.sessions.doom(slot, CloseReason::Idle);
            }
        }
        Some(self.idle_at_us)
    }
}
