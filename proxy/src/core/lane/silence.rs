//! A primary that says nothing: from when on new requests wait here instead of in its socket, when
//! its connection is given up, and what the controller hears of it.
//!
//! Invariants: none of this is looked at per request; a busy lane is looked at twice a second and an
//! idle one asks its node every [`PING_US`]. While a node is silent nothing more is sent to it, so
//! that as few writes as possible are of unknown outcome if it never answers. What keeps a lane from
//! its primary is reported once when it begins and once when it ends.

use slotmesh_resp::write;

use super::{Lane, Link, SILENCE_LIMIT_US};
use crate::core::hold::Event;
use crate::core::outbox::{Outbox, Trouble};
use crate::core::queue::{Entry, Kind};

/// A node that answers nothing for this long, while something is in flight, is in trouble: hundreds
/// of times what a request takes, and a fraction of what a host's lease does.
const TROUBLE_US: u64 = 500_000;
/// An idle connection is asked this often, all lanes at once. With [`TROUBLE_US`] it is less than a
/// host's lease, so that this proxy is a witness in time.
const PING_US: u64 = 2_000_000;

impl Lane {
    /// Something is in flight from now on.
    #[inline]
    pub(super) fn watch(&mut self, now_us: u64, out: &mut Outbox) {
        self.silent_since_us = now_us;
        if !self.watched {
            self.watched = true;
            out.unsteady = true;
        }
    }

    /// The node said something, or took more of what it could not take at once.
    pub fn note_alive(&mut self, now_us: u64) {
        self.silent_since_us = now_us;
    }

    /// How long the node has said nothing.
    pub fn silent_for(&self, now_us: u64) -> u64 {
        now_us.saturating_sub(self.silent_since_us)
    }

    /// True if something is in flight and the node should have said something by now.
    pub(super) fn is_silent(&self, now_us: u64) -> bool {
        !self.flight.is_empty() && self.silent_for(now_us) >= self.trouble_after_us()
    }

    /// A node that waits for its replicas says nothing meanwhile.
    fn trouble_after_us(&self) -> u64 {
        TROUBLE_US + self.durable.longest_wait_us()
    }

    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// The node answers again.
    pub fn end_stall(&mut self, now_us: u64, out: &mut Outbox) {
        if std::mem::take(&mut self.stalled) {
            self.end_trouble(out);
            self.set_pause(now_us, out);
        }
    }

    /// New requests wait while the node is silent, or asked to confirm.
    pub(in crate::core) fn set_pause(&mut self, now_us: u64, out: &mut Outbox) {
        let paused = self.link == Link::Up && (self.stalled || self.durable.is_asking());
        self.step(Event::Pause(paused), now_us, out);
    }

    pub(super) fn begin_trouble(&mut self, since_us: u64, out: &mut Outbox) {
        // Those of all clients are witnesses enough.
        if self.trouble || self.vacant || self.route.is_none() || self.own.is_some() {
            return;
        }
        self.trouble = true;
        out.troubles.push(Trouble {
            lane: self.no,
            shard: self.shard(),
            epoch: self.link_epoch,
            since_us: Some(since_us),
        });
    }

    pub(super) fn end_trouble(&mut self, out: &mut Outbox) {
        if std::mem::take(&mut self.trouble) {
            out.troubles.push(Trouble {
                lane: self.no,
                shard: self.shard(),
                epoch: self.link_epoch,
                since_us: None,
            });
        }
    }

    /// When [`Self::listen`] has something to do.
    pub(super) fn silence_deadline_us(&self) -> Option<u64> {
        if self.watched {
            let patient = self.stalled || self.is_busy();
            let limit_us = if patient {
                self.silence_limit_us()
            } else {
                self.trouble_after_us()
            };
            return Some(self.silent_since_us + limit_us);
        }
        (self.link == Link::Up).then(|| (self.silent_since_us / PING_US + 1) * PING_US)
    }

    fn silence_limit_us(&self) -> u64 {
        SILENCE_LIMIT_US.max(self.trouble_after_us())
    }

    /// Acts on silence. True if the connection must be given up.
    pub(super) fn listen(&mut self, now_us: u64, out: &mut Outbox) -> bool {
        if self.silence_deadline_us().is_none_or(|at| at > now_us) {
            return false;
        }
        if !self.watched {
            self.ping(now_us, out);
            return false;
        }
        if self.flight.is_empty() {
            self.watched = false;
            return false;
        }
        if self.silent_for(now_us) >= self.silence_limit_us() {
            self.watched = false;
            return true;
        }
        self.stalled = true;
        if self.link_epoch == self.gate.epoch() {
            self.begin_trouble(self.silent_since_us, out);
        }
        self.set_pause(now_us, out);
        false
    }

    fn ping(&mut self, now_us: u64, out: &mut Outbox) {
        self.watch(now_us, out);
        self.flight.push_with(Entry::own(Kind::Ping), |bytes| {
            write::encode_command(bytes, &[b"PING"]);
        });
        self.touch(out);
    }
}
