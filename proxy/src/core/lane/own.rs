//! A lane that one client has for itself: the node tracks what it reads there.
//!
//! Invariant: whatever the node must be told so that a read is tracked (that this connection tracks,
//! CLIENT CACHING) goes over the connection ahead of the read, each time that it is sent.

use std::sync::Arc;

use slotmesh_resp::{Protocol, write};

use super::{Durable, Entry, Kind, Lane, Link, Outbox, ShardNo};

/// What only such a lane has.
#[derive(Debug)]
pub struct Own {
    /// Slot and generation of the client.
    pub client: (u32, u32),
    pub shard: ShardNo,
    /// What makes the node track, each time that it is connected to.
    pub setup: Vec<Vec<u8>>,
    /// YES or NO, for CLIENT CACHING.
    pub caching: &'static [u8],
    /// Some node has tracked for it.
    pub tracked: bool,
}

impl Lane {
    /// A lane of one client. It sends nothing before it has a route.
    #[must_use]
    pub fn new_own(no: super::LaneNo, own: Own, protocol: Protocol, like: &Self) -> Self {
        let (held_sum, scripts) = (Arc::clone(&like.held_sum), Arc::clone(&like.scripts));
        Self {
            protocol,
            own: Some(Box::new(own)),
            durable: Durable::new(like.durable.wanted),
            ..Self::new(no, held_sum, scripts)
        }
    }

    /// One that nobody has, for the place of this one.
    #[must_use]
    pub fn fresh(&self) -> Self {
        let (held_sum, scripts) = (Arc::clone(&self.held_sum), Arc::clone(&self.scripts));
        Self::new(self.no, held_sum, scripts)
    }

    pub fn has_route(&self) -> bool {
        self.route.is_some()
    }

    /// Nothing was asked here that is not answered.
    pub fn is_quiet(&self) -> bool {
        self.in_flight == 0 && self.retry.is_empty() && self.held.is_empty()
    }

    /// The client speaks another protocol from now on. Nothing of it is in flight.
    pub fn speak(&mut self, protocol: Protocol, now_us: u64, out: &mut Outbox) {
        if std::mem::replace(&mut self.protocol, protocol) == protocol {
            return;
        }
        let version: &[u8] = match protocol {
            Protocol::Resp2 => b"2",
            Protocol::Resp3 => b"3",
        };
        let mut hello = Vec::new();
        write::encode_command(&mut hello, &[b"HELLO", version]);
        self.tell(&[(Kind::Select, hello)], now_us, out);
    }

    /// Makes the node track as `now` says, if it is connected, and as `setup` says whenever it is
    /// connected to.
    pub fn track(&mut self, now: Vec<Vec<u8>>, setup: Vec<Vec<u8>>, now_us: u64, out: &mut Outbox) {
        if let Some(own) = &mut self.own {
            own.setup = setup;
        }
        if self.link == Link::Up {
            self.tell(&in_order(now), now_us, out);
        }
    }

    fn tell(&mut self, frames: &[(Kind, Vec<u8>)], now_us: u64, out: &mut Outbox) {
        if !matches!(self.link, Link::Up | Link::Login) {
            return;
        }
        if self.flight.is_empty() {
            self.watch(now_us, out);
        }
        for (kind, frame) in frames {
            self.flight.push(Entry::own(*kind), frame);
        }
        self.touch(out);
    }

    /// A client's lane that is to be connected also if nothing is asked.
    pub(super) fn is_set_up(&self) -> bool {
        (self.own.as_ref()).is_some_and(|own| !own.setup.is_empty())
    }

    /// The node knows nothing of this connection any more.
    pub(super) fn forget_reads(&self, out: &mut Outbox) {
        if self.own.is_some() && self.link == Link::Up {
            out.forgotten.push(self.no);
        }
    }

    /// The connection stands anew.
    pub(super) fn begin_tracking(&mut self) {
        let Some(own) = &self.own else { return };
        for (kind, frame) in in_order(own.setup.clone()) {
            self.flight.push(Entry::own(kind), &frame);
        }
    }

    /// CLIENT CACHING, ahead of the command that it is about.
    pub(super) fn announce_caching(&mut self, entry: &Entry) {
        if let Some(own) = &self.own
            && entry.part == Entry::CACHING
            && !matches!(entry.kind, Kind::Weave)
        {
            let words: &[&[u8]] = &[b"CLIENT", b"CACHING", own.caching];
            self.flight.push_with(Entry::own(Kind::Select), |bytes| {
                write::encode_command(bytes, words);
            });
        }
    }
}

/// Only the answer to the last one says that the node tracks.
fn in_order(frames: Vec<Vec<u8>>) -> Vec<(Kind, Vec<u8>)> {
    let last = frames.len().saturating_sub(1);
    let kinds = frames.into_iter().enumerate().map(|(at, frame)| {
        let kind = if at == last {
            Kind::Track
        } else {
            Kind::Select
        };
        (kind, frame)
    });
    kinds.collect()
}
