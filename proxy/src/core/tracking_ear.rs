//! How a worker hears of changed keys: one connection per shard that tells of every key.
//!
//! Invariant: whenever something may have been missed between two connections, everybody who tracks is
//! told to forget everything.

use std::net::SocketAddr;

use slotmesh_resp::{Protocol, write};

use super::Core;
use super::line::{LineEvent, LineNo, Opening, Use};
use crate::routing::{Login, ShardNo};

/// Between attempts to reach a node again.
const RETRY_US: u64 = 50_000;

/// A shard's connection.
#[derive(Debug, Default)]
pub(super) struct Ear {
    line: Option<(LineNo, SocketAddr)>,
    up: bool,
    /// To where the primary is now; it takes over as soon as it hears.
    next: Option<(LineNo, SocketAddr)>,
    retry_at_us: u64,
}

impl Ear {
    pub(super) fn is_up(&self) -> bool {
        self.up
    }
}

impl Core {
    /// Connects to where a shard's primary is now.
    fn steer_ear(&mut self, shard: ShardNo) {
        let route = self.table.shards.get(usize::from(shard)).cloned().flatten();
        let now_us = self.now_us;
        let (Some(route), Some(ear)) = (route, self.trackers.ears.get_mut(&shard)) else {
            return;
        };
        let target = ear.next.or(ear.line).map(|(_, address)| address);
        if target == Some(route.address) {
            return;
        }
        if ear.retry_at_us > now_us {
            self.out.unsteady = true;
            return;
        }
        if let Some((line, _)) = ear.next.take() {
            self.close_line(line);
        }
        let login = route.observer.clone().unwrap_or_else(|| Login {
            username: route.username.clone(),
            password: route.password.clone(),
        });
        let line = self.open_line(Opening {
            user: Use::Track(shard),
            shard,
            epoch: route.epoch,
            address: route.address,
            login,
            protocol: Protocol::Resp3,
        });
        let words: &[&[u8]] = &[b"CLIENT", b"TRACKING", b"ON", b"BCAST"];
        self.write_line(line, |out| write::encode_command(out, words));
        if let Some(ear) = self.trackers.ears.get_mut(&shard) {
            match ear.line {
                None => ear.line = Some((line, route.address)),
                Some(_) => ear.next = Some((line, route.address)),
            }
        }
    }

    /// A new routing table.
    pub(super) fn apply_tracking(&mut self) {
        self.leave_own_lanes();
        if self.trackers.by_ear == 0 {
            return;
        }
        let shards = self.table.all_shards();
        let before: Vec<ShardNo> = self.trackers.ears.keys().copied().collect();
        for shard in before {
            if !shards.contains(&shard)
                && let Some(ear) = self.trackers.ears.remove(&shard)
            {
                self.close_ear(&ear);
                self.tell_everybody();
            }
        }
        self.steer_ears();
    }

    /// Connections to all shards.
    pub(super) fn steer_ears(&mut self) {
        for shard in self.table.all_shards() {
            self.trackers.ears.entry(shard).or_default();
            self.steer_ear(shard);
        }
    }

    /// Nobody tracks any more.
    pub(super) fn close_ears(&mut self) {
        for ear in std::mem::take(&mut self.trackers.ears).into_values() {
            self.close_ear(&ear);
        }
    }

    fn close_ear(&mut self, ear: &Ear) {
        for (line, _) in [ear.line, ear.next].into_iter().flatten() {
            self.close_line(line);
        }
    }

    /// Tries lost connections again. Returns when the next one is due.
    pub(super) fn retry_ears(&mut self) -> Option<u64> {
        let now_us = self.now_us;
        let mut retried = Vec::new();
        let mut due = None::<u64>;
        for (shard, ear) in &mut self.trackers.ears {
            if ear.retry_at_us > now_us {
                due = Some(due.map_or(ear.retry_at_us, |due| due.min(ear.retry_at_us)));
            } else if ear.line.is_none() || ear.retry_at_us > 0 {
                ear.retry_at_us = 0;
                retried.push(*shard);
            }
        }
        retried.into_iter().for_each(|shard| self.steer_ear(shard));
        due
    }

    /// Something happened to a connection that hears of changes.
    pub(super) fn track_event(&mut self, no: LineNo, shard: ShardNo, event: LineEvent<'_>) {
        match event {
            LineEvent::Ready => {}
            LineEvent::Reply(b"+OK\r\n") => self.ear_up(no, shard),
            LineEvent::Reply(reply) if reply.first() == Some(&b'-') => {
                self.close_line(no);
                self.ear_lost(no, shard);
            }
            LineEvent::Reply(reply) => self.changed(reply),
            LineEvent::Lost(_) => self.ear_lost(no, shard),
        }
    }

    fn ear_up(&mut self, no: LineNo, shard: ShardNo) {
        let Some(ear) = self.trackers.ears.get_mut(&shard) else {
            return;
        };
        let next = ear.next.take_if(|(line, _)| *line == no);
        let old = if next.is_some() {
            ear.line.take()
        } else {
            None
        };
        ear.line = next.or(ear.line);
        ear.up = true;
        if let Some((line, _)) = old {
            self.close_line(line);
        }
        self.tell_everybody(); // who tracks already may have missed something
        if self.trackers.waiting > 0 {
            let slots: Vec<u32> = self.trackers.clients.keys().copied().collect();
            slots
                .into_iter()
                .for_each(|slot| self.confirm_tracking(slot));
        }
    }

    fn ear_lost(&mut self, no: LineNo, shard: ShardNo) {
        let retry_at_us = self.now_us + RETRY_US;
        self.out.unsteady = true;
        let Some(ear) = self.trackers.ears.get_mut(&shard) else {
            return;
        };
        ear.retry_at_us = retry_at_us;
        if ear.next.take_if(|(line, _)| *line == no).is_none() {
            ear.line = ear.next.take();
            let was_up = std::mem::take(&mut ear.up);
            if was_up {
                self.tell_everybody();
            }
        }
    }
}
