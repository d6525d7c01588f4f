//! Durable mode: a write is acknowledged when so many replicas have it.
//!
//! What is sent to a node at once is a *batch*. One that writes is sealed: `WAIT` is sent behind it,
//! and what comes meanwhile waits for the next batch, because a node that waits for its replicas
//! executes nothing more of the connection. Replies are kept, from the first write of the batch on,
//! until the answer to `WAIT` says whether they may be delivered. With `read_gate` every batch is
//! sealed and everything of it is kept, so that nobody sees what could still be lost.
//!
//! Invariants: no reply to a write is delivered in this mode unless enough replicas have confirmed
//! it: otherwise its client is told that its outcome is unknown. It is never repeated. Without the
//! mode nothing here costs more than one look per turn.

use std::collections::VecDeque;

use slotmesh_resp::{parse_i64, write};

use super::Core;
use super::answer::error_line;
use super::blocking::WAIT_CHANNEL;
use super::hold::Event;
use super::lane::{Lane, LaneNo, Link};
use super::line::{LineNo, is_line};
use super::outbox::Outbox;
use super::queue::{Entry, FrameQueue, Kind};
use super::sessions::Outlet;
use crate::routing::Durability;

/// What the client of a write hears whose primary was lost before it was confirmed.
const LOST: &str = "WAITFAIL slotmesh: the shard's primary was lost before enough replicas confirmed \
     this command; its outcome is unknown";

/// Of engines of every version, for a command that they do not have.
const UNKNOWN: &[u8] = b"-ERR unknown command";

/// What clients of writes hear while `durability_fsync` asks for more than the engine can say.
const NO_WAITAOF: &str = "WAITFAIL slotmesh: durability_fsync is on and the shard's engine has no \
     WAITAOF to say what is on disk; its outcome is unknown: the primary has executed it. Use Redis \
     7.2 or later or Valkey, or set durability_fsync to no";

/// What a lane waits to have confirmed.
#[derive(Debug, Default)]
pub struct Durable {
    /// As the instance has it now.
    pub wanted: Durability,
    /// Questions in flight.
    asking: u32,
    /// What was executed and is not confirmed, oldest first; with their replies one after the other.
    kept: FrameQueue,
    replies: Vec<u8>,
    lengths: VecDeque<usize>,
}

impl Durable {
    pub fn new(wanted: Durability) -> Self {
        Self {
            wanted,
            ..Self::default()
        }
    }

    pub fn is_asking(&self) -> bool {
        self.asking > 0
    }

    /// For how long the node may say nothing because it waits.
    pub fn longest_wait_us(&self) -> u64 {
        if self.asking > 0 {
            u64::from(self.wanted.timeout_ms) * 1000
        } else {
            0
        }
    }

    /// True if the reply to this request must wait: it is a write, or behind one.
    fn keeps(&self, entry: &Entry) -> bool {
        self.asking > 0
            && (self.wanted.reads || !self.kept.is_empty() || !entry.effect.repeatable())
    }

    fn pop(&mut self) -> Option<(Entry, Vec<u8>)> {
        let entry = self.kept.pop()?;
        let length = self.lengths.pop_front().unwrap_or_default();
        Some((entry, self.replies.drain(..length).collect()))
    }
}

impl Durability {
    /// Something that goes to replicas, changes nothing there, and reaches no client.
    pub(super) fn mark(self) -> &'static [&'static [u8]] {
        match self.plain_channels {
            false => &[b"SPUBLISH", WAIT_CHANNEL, b""],
            true => &[b"PUBLISH", WAIT_CHANNEL, b""],
        }
    }

    /// True if so many replicas are enough. `reply` is that to WAIT or WAITAOF.
    fn is_met_by(self, reply: &[u8]) -> bool {
        let lines = reply.split(|b| *b == b'\n');
        let numbers = lines.filter_map(|line| parse_i64(line.strip_prefix(b":")?.trim_ascii_end()));
        let numbers: Vec<i64> = numbers.collect();
        let enough = |n: i64| n >= i64::from(self.replicas);
        match (reply.first(), &numbers[..]) {
            (Some(b':'), [replicas]) => enough(*replicas),
            (Some(b'*'), [local, replicas]) => *local >= 1 && enough(*replicas),
            _ => false,
        }
    }

    /// What the client of a write hears that was not confirmed. `answer` is that to the question.
    pub(super) fn failure(self, answer: &[u8]) -> Vec<u8> {
        // A promise of less than what was asked for would be taken for what was asked for.
        if self.fsync && answer.starts_with(UNKNOWN) {
            return error_line(NO_WAITAOF);
        }
        if let Some(why) = answer.strip_prefix(b"-") {
            let why = String::from_utf8_lossy(why.trim_ascii());
            return error_line(&format!(
                "WAITFAIL slotmesh: the shard's primary can't say which replicas have this command; \
                 its outcome is unknown: the primary has executed it, and a failover may lose it \
                 (it answered: {why})"
            ));
        }
        error_line(&format!(
            "WAITFAIL slotmesh: fewer than {} replicas confirmed this command within {} ms; its \
             outcome is unknown: the primary has executed it, and a failover may lose it",
            self.replicas, self.timeout_ms
        ))
    }

    fn write_question(self, out: &mut Vec<u8>) {
        let (replicas, limit) = (self.replicas.to_string(), self.timeout_ms.to_string());
        let (replicas, limit) = (replicas.as_bytes(), limit.as_bytes());
        if self.fsync {
            write::encode_command(out, &[b"WAITAOF", b"1", replicas, limit]);
        } else {
            write::encode_command(out, &[b"WAIT", replicas, limit]);
        }
    }
}

impl Lane {
    /// Closes the batch that is about to be sent.
    fn seal(&mut self, now_us: u64, out: &mut Outbox) {
        let wanted = self.durable.wanted;
        if wanted.replicas == 0 || self.link != Link::Up {
            return;
        }
        let batch = self.flight.entries().rev();
        let open = batch
            .take_while(|entry| entry.kind != Kind::Confirm)
            .filter(|entry| !entry.kind.is_own())
            .any(|entry| wanted.reads || !entry.effect.repeatable());
        if !open {
            return;
        }
        if wanted.reads {
            // WAIT is about what this connection wrote; this makes it about all there was before.
            let mark = wanted.mark();
            self.flight.push_with(Entry::own(Kind::Mark), |bytes| {
                write::encode_command(bytes, mark);
            });
        }
        self.durable.asking += 1;
        self.ask();
        self.set_pause(now_us, out);
    }

    fn ask(&mut self) {
        let wanted = self.durable.wanted;
        self.flight.push_with(Entry::own(Kind::Confirm), |bytes| {
            wanted.write_question(bytes);
        });
    }

    /// Keeps the reply to the oldest request in flight, if it must not be delivered yet.
    pub(super) fn keep(&mut self, reply: &[u8]) -> bool {
        let keeps = |entry: &Entry| self.durable.keeps(entry);
        if !self.flight.front().is_some_and(keeps) {
            return false;
        }
        self.flight.pass_into(&mut self.durable.kept);
        self.durable.replies.extend_from_slice(reply);
        self.durable.lengths.push_back(reply.len());
        true
    }
}

impl Core {
    /// Closes the batches that are about to be sent. Called once before each sending.
    #[inline]
    pub fn seal_batches(&mut self) {
        if self.durable {
            self.seal_touched();
        }
    }

    #[cold]
    fn seal_touched(&mut self) {
        for at in 0..self.out.touched.len() {
            let no = self.out.touched[at];
            if !is_line(no) {
                self.lanes[no as usize].seal(self.now_us, &mut self.out);
            }
        }
    }

    /// A new routing table.
    pub(super) fn apply_durability(&mut self) {
        let wanted = self.table.settings.durability();
        self.durable = wanted.replicas > 0;
        for lane in &mut self.lanes {
            lane.durable.wanted = wanted;
        }
    }

    /// The answer to a question of [`Lane::seal`]. Its entry is the front of the queue.
    #[cold]
    pub(super) fn confirmed<O: Outlet>(&mut self, no: LaneNo, reply: &[u8], outlet: &mut O) {
        let now_us = self.now_us;
        let lane = &mut self.lanes[no as usize];
        lane.flight.pop();
        let wanted = lane.durable.wanted;
        let (answer, met) = (reply, wanted.is_met_by(reply));
        lane.durable.asking = lane.durable.asking.saturating_sub(1);
        while let Some((entry, reply)) = self.lanes[no as usize].durable.pop() {
            self.lanes[no as usize].in_flight -= 1;
            let seen = entry.effect.repeatable() && !wanted.reads;
            if met || seen || reply.first() == Some(&b'-') {
                self.give(&entry, &reply, outlet);
            } else {
                self.counters.errors += 1;
                self.counters.unconfirmed += 1;
                self.give(&entry, &wanted.failure(answer), outlet);
            }
        }
        let lane = &mut self.lanes[no as usize];
        lane.set_pause(now_us, &mut self.out);
        if !lane.gate.admits() {
            lane.step(Event::Executed, now_us, &mut self.out);
        }
    }

    /// The connection is gone: what was executed and not confirmed may be lost. What only read is
    /// asked again, before all that was asked later.
    pub(super) fn settle_kept(&mut self, no: LaneNo) {
        let durable = &mut self.lanes[no as usize].durable;
        if durable.kept.is_empty() {
            return;
        }
        let now_us = self.now_us;
        let mut retry = FrameQueue::default();
        while let Some(entry) = self.lanes[no as usize].durable.kept.front().copied() {
            if entry.effect.repeatable() {
                let durable = &mut self.lanes[no as usize].durable;
                durable.kept.pop_into(&mut retry, now_us);
                let length = durable.lengths.pop_front().unwrap_or_default();
                durable.replies.drain(..length);
                self.counters.retries += 1;
                continue;
            }
            let Some((_, reply)) = self.lanes[no as usize].durable.pop() else {
                break;
            };
            if reply.first() == Some(&b'-') {
                self.give(&entry, &reply, &mut super::sessions::NoOutlet);
            } else {
                self.counters.unconfirmed += 1;
                self.fail(&entry, LOST);
            }
        }
        let later = &mut self.lanes[no as usize].retry;
        while !later.is_empty() {
            later.pop_into(&mut retry, now_us);
        }
        *later = retry;
    }

    /// True if a reply on a line of a client's own must be confirmed first.
    pub(super) fn must_confirm(&self, repeatable: bool, reply: &[u8]) -> bool {
        let nothing = [&b"-"[..], b"*-1\r\n", b"$-1\r\n", b"_\r\n"];
        let wanted = self.table.settings.durability();
        self.durable
            && (wanted.reads || !repeatable)
            && !nothing.iter().any(|no| reply.starts_with(no))
    }

    /// Asks on a line whether what was executed there is confirmed. The next reply says so. Returns
    /// by when it must.
    pub(super) fn ask_confirmation(&mut self, no: LineNo) -> u64 {
        let wanted = self.table.settings.durability();
        // See `blocking`: the question is about what this connection wrote.
        self.write_own(no, &[b"PING"]);
        self.write_own(no, wanted.mark());
        self.write_line(no, |out| wanted.write_question(out));
        self.out.unsteady = true;
        self.now_us + u64::from(wanted.timeout_ms) * 1000 + super::lane::SILENCE_LIMIT_US
    }

    /// The reply that a client gets, after the answer to [`Self::ask_confirmation`].
    pub(super) fn judge_confirmation(&mut self, answer: &[u8], reply: Vec<u8>) -> Vec<u8> {
        let wanted = self.table.settings.durability();
        if wanted.is_met_by(answer) {
            return reply;
        }
        self.counters.unconfirmed += 1;
        wanted.failure(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asked_for_disks_is_told_that_the_engine_can_not_say() {
        let fsync = Durability {
            replicas: 1,
            fsync: true,
            ..Durability::default()
        };
        let told = |answer: &[u8]| String::from_utf8(fsync.failure(answer)).unwrap();
        let refusal = told(b"-ERR unknown command 'WAITAOF', with args beginning with: '1' \r\n");
        assert!(refusal.contains("no WAITAOF") && refusal.contains("durability_fsync to no"));
        let off = told(b"-ERR WAITAOF cannot be used when appendonly is disabled.\r\n");
        assert!(off.starts_with("-WAITFAIL ") && off.contains("appendonly is disabled"));
        assert!(told(b"*2\r\n:1\r\n:0\r\n").contains("fewer than 1 replicas"));
    }

    #[test]
    fn only_enough_replicas_are_enough() {
        let two = Durability {
            replicas: 2,
            ..Durability::default()
        };
        for (reply, met) in [
            (":2\r\n", true),
            (":3\r\n", true),
            (":1\r\n", false),
            ("*2\r\n:1\r\n:2\r\n", true),
            ("*2\r\n:0\r\n:2\r\n", false),
            ("*2\r\n:1\r\n:1\r\n", false),
            ("-NOPERM x\r\n", false),
            ("+OK\r\n", false),
            (":x\r\n", false),
        ] {
            assert_eq!(two.is_met_by(reply.as_bytes()), met, "{reply}");
        }
    }
}
