//! Lines to primaries that one client uses alone for a while: for a command that waits, for a WATCH.
//!
//! Invariants: the lines of a shard, in use and spare, are never more than the parameter
//! `private_connections_max` says (over it the command is refused, because a client that waits for
//! another to stop waiting may wait for ever). A line becomes spare only if nothing is asked over it
//! and nothing is left of its client: its database is known, and no MULTI or WATCH is open. A spare
//! line is of its shard's current epoch.

use slotmesh_resp::{Protocol, write};

use super::Core;
use super::line::{LineEvent, LineNo, Opening, Use};
use crate::routing::{Login, ShardNo, ShardRoute};

/// Spare lines that a shard keeps: enough for consumers that ask again and again, few enough not to
/// matter to a node with thousands of connections.
const SPARE_MAX: usize = 64;
/// A spare line is closed after this; clients that wait come back sooner or not at all.
const SPARE_LIMIT_US: u64 = 30_000_000;

pub(super) const TOO_MANY: &str = "ERR slotmesh: too many clients of this proxy wait or watch at \
     this shard (private_connections_max); this command was not executed";

#[derive(Debug)]
struct Spare {
    line: LineNo,
    shard: ShardNo,
    since_us: u64,
}

/// The private lines of a worker.
#[derive(Debug, Default)]
pub(super) struct Privates {
    /// Oldest first.
    spare: Vec<Spare>,
    /// By shard.
    in_use: Vec<usize>,
}

impl Privates {
    fn in_use(&mut self, shard: ShardNo) -> &mut usize {
        let at = usize::from(shard);
        if self.in_use.len() <= at {
            self.in_use.resize(at + 1, 0);
        }
        &mut self.in_use[at]
    }

    /// A line in use came from another process.
    pub(super) fn note(&mut self, shard: ShardNo) {
        *self.in_use(shard) += 1;
    }

    /// A line in use is gone.
    pub(super) fn forget(&mut self, shard: ShardNo) {
        let count = self.in_use(shard);
        debug_assert!(*count > 0, "a line in use that was not counted");
        *count = count.saturating_sub(1);
    }
}

impl ShardRoute {
    /// Of the epoch's user, which a fence takes its rights from.
    pub(super) fn login(&self) -> Login {
        Login {
            username: self.username.clone(),
            password: self.password.clone(),
        }
    }
}

impl Core {
    /// Takes a line to the primary of a shard, which has a route. What is written over it is sent
    /// once it is logged in. `None`: there are too many.
    pub(super) fn take_private(
        &mut self,
        shard: ShardNo,
        protocol: Protocol,
        user: Use,
    ) -> Option<LineNo> {
        let route = self.table.shards.get(usize::from(shard))?.clone()?;
        let fits = |spare: &Spare| {
            let line = self.lines.get(spare.line);
            spare.shard == shard
                && line.is_some_and(|l| l.epoch == route.epoch && l.protocol == protocol)
        };
        if let Some(at) = self.privates.spare.iter().rposition(fits) {
            let no = self.privates.spare.remove(at).line;
            *self.privates.in_use(shard) += 1;
            if let Some(line) = self.lines.get_mut(no) {
                line.user = user;
            }
            return Some(no);
        }
        let max = self.table.settings.parameters.private_connections_max;
        if *self.privates.in_use(shard) >= max {
            return None;
        }
        let of_shard = |spare: &&Spare| spare.shard == shard;
        let spare = self.privates.spare.iter().filter(of_shard).count();
        if *self.privates.in_use(shard) + spare >= max {
            self.close_oldest_spare(shard); // of another protocol, or of an older epoch
        }
        *self.privates.in_use(shard) += 1;
        let no = self.open_line(Opening {
            user,
            shard,
            epoch: route.epoch,
            address: route.address,
            login: route.login(),
            protocol,
        });
        // So that a command on it can be ended by CLIENT UNBLOCK.
        self.write_own(no, &[b"CLIENT", b"ID"]);
        Some(no)
    }

    /// Writes a command of the proxy's own: its reply is no event, and an error closes the line.
    pub(super) fn write_own(&mut self, no: LineNo, command: &[&[u8]]) {
        self.write_line(no, |out| write::encode_command(out, command));
        if let Some(line) = self.lines.get_mut(no) {
            line.own_replies += 1;
        }
    }

    /// Makes a database the current one of a line.
    pub(super) fn select_private(&mut self, no: LineNo, db: u16) {
        if let Some(line) = self.lines.get_mut(no)
            && std::mem::replace(&mut line.db, db) != db
        {
            self.write_own(no, &[b"SELECT", db.to_string().as_bytes()]);
        }
    }

    /// A line that was taken is clean and can be used again.
    pub(super) fn give_private(&mut self, no: LineNo) {
        let now_us = self.now_us;
        let Some(line) = self.lines.get_mut(no) else {
            return;
        };
        let shard = line.shard;
        let route = self.table.shards.get(usize::from(shard));
        let current = route.and_then(Option::as_ref).map(|route| route.epoch);
        let of_shard = |spare: &&Spare| spare.shard == shard;
        let room = self.privates.spare.iter().filter(of_shard).count() < SPARE_MAX;
        if !line.is_up() || current != Some(line.epoch) || !room {
            return self.drop_private(no);
        }
        line.user = Use::Spare;
        self.privates.forget(shard);
        self.privates.spare.push(Spare {
            line: no,
            shard,
            since_us: now_us,
        });
        self.out.unsteady = true;
    }

    /// Closes a line that was taken.
    pub(super) fn drop_private(&mut self, no: LineNo) {
        if let Some(shard) = self.lines.get(no).map(|line| line.shard) {
            self.privates.forget(shard);
            self.close_line(no);
            self.out.unsteady = true; // the order to hang up must not wait for the next event
        }
    }

    fn close_oldest_spare(&mut self, shard: ShardNo) {
        let of_shard = |spare: &Spare| spare.shard == shard;
        if let Some(at) = self.privates.spare.iter().position(of_shard) {
            let spare = self.privates.spare.remove(at);
            self.close_line(spare.line);
        }
    }

    /// Something happened to a spare line: it is gone, or says what nobody asked.
    pub(super) fn spare_event(&mut self, no: LineNo, event: LineEvent<'_>) {
        self.privates.spare.retain(|spare| spare.line != no);
        if event != LineEvent::Lost(None) {
            self.close_line(no);
        }
    }

    /// A new routing table: spare lines of older epochs go.
    pub(super) fn renew_privates(&mut self) {
        let epoch_of = |shard: ShardNo| {
            let route = self.table.shards.get(usize::from(shard));
            route.and_then(Option::as_ref).map(|route| route.epoch)
        };
        let old = |spare: &Spare| {
            let line = self.lines.get(spare.line);
            line.is_none_or(|line| Some(line.epoch) != epoch_of(spare.shard))
        };
        let (old, kept) = self.privates.spare.drain(..).partition(old);
        self.privates.spare = kept;
        let old: Vec<Spare> = old;
        for spare in old {
            self.close_line(spare.line);
        }
    }

    /// Everything that needs lines of its own: acts on what is due. Returns when to look again.
    pub(super) fn private_on_time(&mut self) -> Option<u64> {
        let next = [
            self.waits_on_time(),
            self.weaves_on_time(),
            self.health_on_time(),
            self.privates_on_time(),
        ];
        next.into_iter().flatten().min()
    }

    /// Closes what is spare for long. Returns when to look again.
    fn privates_on_time(&mut self) -> Option<u64> {
        let now_us = self.now_us;
        while let Some(first) = self.privates.spare.first()
            && first.since_us + SPARE_LIMIT_US <= now_us
        {
            let spare = self.privates.spare.remove(0);
            self.close_line(spare.line);
        }
        let first = self.privates.spare.first()?;
        Some(first.since_us + SPARE_LIMIT_US)
    }
}
