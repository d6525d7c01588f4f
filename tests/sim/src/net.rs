//! Who can talk to whom, and how badly.
//!
//! Invariant: messages of one connection arrive in order or not at all; once one is lost the
//! connection is dead for both ends. A connection that is cut either dies so, or hangs: what was
//! sent on it arrives when the cut is mended, however long that takes. Messages without a connection may be lost, doubled or late.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, rngs::SmallRng};

use crate::{
    msg::{ConnId, Party},
    sched::{MS, Micros},
};

/// How bad the network is.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Usual one-way delay, at least.
    pub delay_us: Micros,
    /// Messages without connection that are lost, in 1,000.
    pub rpc_loss: u32,
    /// Of them that arrive twice, in 1,000.
    pub rpc_double: u32,
    /// Messages of a connection that break it, in 100,000.
    pub stream_break: u32,
    /// Messages that take long, in 1,000.
    pub spike: u32,
    /// How long those take at most.
    pub spike_us: Micros,
}

impl Weather {
    /// Nothing goes wrong.
    #[must_use]
    pub fn calm() -> Self {
        Self {
            delay_us: 80,
            rpc_loss: 0,
            rpc_double: 0,
            stream_break: 0,
            spike: 0,
            spike_us: MS,
        }
    }
}

/// One end's view is enough: both ends share it.
#[derive(Clone, Debug)]
pub struct Conn {
    /// The ends and their lives.
    pub ends: [(Party, u64); 2],
    /// Messages pass.
    pub up: bool,
    /// What is sent while it is cut waits.
    pub hangs: bool,
    next: [Micros; 2],
}

impl Conn {
    /// The other end.
    #[must_use]
    pub fn peer(&self, of: Party) -> Party {
        if self.ends[0].0 == of {
            self.ends[1].0
        } else {
            self.ends[0].0
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Net {
    /// How bad it is now.
    pub weather: Weather,
    /// Connections by number.
    pub conns: BTreeMap<ConnId, Conn>,
    /// From whom to whom nothing passes.
    pub cuts: BTreeSet<(Party, Party)>,
    next_conn: ConnId,
}

impl Net {
    /// A network without connections.
    #[must_use]
    pub fn new(weather: Weather) -> Self {
        Self {
            weather,
            conns: BTreeMap::new(),
            cuts: BTreeSet::new(),
            next_conn: 0,
        }
    }

    /// True if messages pass from one to the other.
    #[must_use]
    pub fn passes(&self, from: Party, to: Party) -> bool {
        !self.cuts.contains(&(from, to))
    }

    /// A new connection.
    pub fn open(&mut self, from: (Party, u64), to: (Party, u64), now: Micros) -> ConnId {
        self.next_conn += 1;
        let conn = Conn {
            ends: [from, to],
            up: true,
            hangs: false,
            next: [now; 2],
        };
        self.conns.insert(self.next_conn, conn);
        self.next_conn
    }

    /// How long a message takes.
    pub fn delay(&self, rng: &mut SmallRng) -> Micros {
        let base = self.weather.delay_us;
        let usual = base + rng.random_range(0..=base * 2);
        if self.weather.spike > 0 && rng.random_range(0..1_000) < self.weather.spike {
            return usual + rng.random_range(0..=self.weather.spike_us);
        }
        usual
    }

    /// Nothing of this side arrives before then.
    pub fn delay_from(&mut self, id: ConnId, from: Party, until: Micros) {
        if let Some(conn) = self.conns.get_mut(&id) {
            let side = usize::from(conn.ends[1].0 == from);
            conn.next[side] = conn.next[side].max(until);
        }
    }

    /// True when the connection hangs in this direction: nothing passes, nobody notices.
    pub fn is_hanging(&mut self, id: ConnId, from: Party, rng: &mut SmallRng) -> bool {
        let cuts = &self.cuts;
        let Some(conn) = self.conns.get_mut(&id).filter(|c| c.up) else {
            return false;
        };
        if !cuts.contains(&(from, conn.peer(from))) {
            return false;
        }
        conn.hangs = conn.hangs || rng.random_range(0..2) == 0;
        conn.hangs
    }

    /// When a message of a connection arrives; `None`: the connection breaks.
    pub fn arrival(
        &mut self,
        id: ConnId,
        from: Party,
        now: Micros,
        rng: &mut SmallRng,
    ) -> Option<Micros> {
        let delay = self.delay(rng);
        let conn = self.conns.get_mut(&id)?;
        let to = conn.peer(from);
        let breaks = self.weather.stream_break > 0
            && rng.random_range(0..100_000) < self.weather.stream_break;
        if breaks || self.cuts.contains(&(from, to)) {
            return None;
        }
        let side = usize::from(conn.ends[1].0 == from);
        let at = conn.next[side].max(now + delay);
        conn.next[side] = at;
        Some(at)
    }
}
