//! What a node sends, and what becomes of requests whose node is gone.
//!
//! Invariant: a reply belongs to the oldest request in flight, and a request leaves the queue only
//! together with its answer, its move to the retry queue, or an error to its client.

use slotmesh_resp::{ReplyKind, Scan, write};

use super::Core;
use super::hold::Event;
use super::lane::{LaneNo, Link};
use super::line::is_line;
use super::queue::{Entry, Kind};
use super::retry::{self, Loss, Verdict};
use super::sessions::{NoOutlet, Outlet};
use super::transaction::{BlockStep, BlockVerdict};

/// Error replies of our own on the way to a node.
pub(super) const OUTCOME_UNKNOWN: &str = "ERR slotmesh: connection to the shard's primary was lost; \
     the outcome of this command is unknown";
pub(super) const OVERDUE: &str = "ERR slotmesh: the shard's primary could not be reached in time; \
     this command was not executed";
const OVERTAKEN: &str = "ERR slotmesh: the shard's primary refused this command and then took a \
     later one of this client; this command was not executed";
pub(super) const TORN: &str = "ERR slotmesh: the shard changed its primary within this transaction; \
     its outcome is unknown";
pub(super) const SHARD_REMOVED: &str = "ERR slotmesh: the shard of this command was removed; \
     this command was not executed";

/// A node's connection cannot be used any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeFault {
    #[error("the node's bytes are no reply: {0}")]
    Protocol(#[from] slotmesh_resp::ProtocolError),
    #[error("the node answered something that was not asked")]
    Unasked,
    #[error("the node refused to select a database, or to track")]
    Select,
}

impl Core {
    /// Takes bytes of a node: the kept beginning, if any, and what came since. Returns how many
    /// were used; keep the others.
    ///
    /// # Errors
    /// The connection must be closed; call [`Core::lane_lost`].
    pub fn node_bytes<O: Outlet>(
        &mut self,
        no: LaneNo,
        buf: &[u8],
        outlet: &mut O,
    ) -> Result<usize, NodeFault> {
        if is_line(no) {
            return self.line_bytes(no, buf);
        }
        let mut at = 0;
        self.lanes[no as usize].note_alive(self.now_us);
        if self.lanes[no as usize].is_slow() {
            self.end_slow(no);
        }
        while at < buf.len() {
            let lane = &mut self.lanes[no as usize];
            match lane.scanner.scan(&buf[at..])? {
                Scan::Incomplete { .. } => break,
                Scan::Complete { consumed, kind } => {
                    let reply = &buf[at..at + consumed];
                    at += consumed;
                    if kind == ReplyKind::Push {
                        self.lane_push(no, reply); // not an answer to anything
                        continue;
                    }
                    self.answer(no, reply, outlet)?;
                }
            }
            if !matches!(self.lanes[no as usize].link, Link::Up | Link::Login) {
                at = buf.len().max(at);
                break;
            }
        }
        let held_max = self.table.settings.hold_bytes_max;
        self.lanes[no as usize].check_room(held_max, self.now_us, &mut self.out);
        self.settle_abandoned();
        self.run_jobs();
        Ok(at)
    }

    #[inline]
    fn answer<O: Outlet>(
        &mut self,
        no: LaneNo,
        reply: &[u8],
        outlet: &mut O,
    ) -> Result<(), NodeFault> {
        let lane = &mut self.lanes[no as usize];
        let kind = lane.flight.front().ok_or(NodeFault::Unasked)?.kind;
        let plain = reply[0] != b'-' && lane.gate.admits();
        match kind {
            Kind::Single | Kind::Part | Kind::Job if plain => self.finish(no, reply, outlet),
            Kind::Script if plain => self.finish(no, reply, outlet),
            Kind::Single | Kind::Part | Kind::Job | Kind::Script | Kind::Touch => {
                self.answer_judged(no, reply, outlet);
            }
            Kind::Publish => self.answer_publish(no, reply, outlet),
            Kind::Block | Kind::JobBlock | Kind::Weave => self.answer_block(no, reply, outlet),
            Kind::Select | Kind::Track => {
                lane.flight.pop();
                if reply[0] == b'-' {
                    return Err(NodeFault::Select);
                }
                if kind == Kind::Track {
                    self.lane_tracks(no);
                }
            }
            Kind::Load => {
                lane.flight.pop();
                if reply[0] == b'-' {
                    lane.known_scripts.forget();
                }
            }
            Kind::Login => {
                lane.flight.pop();
                lane.logged_in(reply, self.now_us, &mut self.out);
            }
            Kind::Ping | Kind::Mark => drop(lane.flight.pop()),
            Kind::Confirm => self.confirmed(no, reply, outlet),
        }
        Ok(())
    }

    /// A node that was busy, or silent for too long, says something.
    #[cold]
    fn end_slow(&mut self, no: LaneNo) {
        if self.lanes[no as usize].is_busy() {
            self.end_busy(no);
        }
        self.lanes[no as usize].end_stall(self.now_us, &mut self.out);
    }

    /// As any single request, once its reply is what the client gets.
    pub(super) fn answer_published<O: Outlet>(&mut self, no: LaneNo, reply: &[u8], outlet: &mut O) {
        if reply[0] != b'-' && self.lanes[no as usize].gate.admits() {
            self.finish(no, reply, outlet);
        } else {
            self.answer_judged(no, reply, outlet);
        }
    }

    /// The oldest request is answered.
    #[inline]
    fn finish<O: Outlet>(&mut self, no: LaneNo, reply: &[u8], outlet: &mut O) {
        let lane = &mut self.lanes[no as usize];
        let Some(entry) = lane.flight.pop() else {
            return;
        };
        lane.in_flight -= 1;
        self.give(&entry, reply, outlet);
    }

    /// Gives a reply to its client, or to the gather that it is a part of.
    #[inline]
    pub(super) fn give<O: Outlet>(&mut self, entry: &Entry, reply: &[u8], outlet: &mut O) {
        match entry.kind {
            Kind::Part => {}
            Kind::Job | Kind::JobBlock => return self.jobs.answer(entry.aux, entry.seq, reply),
            Kind::Weave => return self.weave_part(entry.aux, entry.seq, reply),
            _ => {
                let reply = if entry.kind == Kind::Touch {
                    &[]
                } else {
                    reply
                };
                let (client, generation, seq) = (entry.client, entry.generation, entry.seq);
                self.sessions
                    .deliver(client, generation, seq, reply, outlet);
                return;
            }
        }
        self.scratch.clear();
        if let Some(owner) = self
            .gathers
            .part(entry.aux, entry.part, reply, &mut self.scratch)
        {
            let (client, generation) = (owner.client, owner.generation);
            self.sessions
                .deliver(client, generation, owner.seq, &self.scratch, outlet);
        }
    }

    /// An error, or any reply while the gate is closed.
    fn answer_judged<O: Outlet>(&mut self, no: LaneNo, reply: &[u8], outlet: &mut O) {
        let lane = &mut self.lanes[no as usize];
        let Some(effect) = lane.flight.front().map(|e| e.effect) else {
            return;
        };
        let name = command_name(lane.flight.front_frame());
        match lane.gate.judge(reply, effect, name) {
            Verdict::Deliver => self.deliver_judged(no, reply, outlet),
            verdict => self.retry_front(no, verdict),
        }
    }

    fn deliver_judged<O: Outlet>(&mut self, no: LaneNo, reply: &[u8], outlet: &mut O) {
        self.counters.errors += u64::from(reply[0] == b'-');
        if reply.starts_with(b"-NOSCRIPT") {
            self.lanes[no as usize].known_scripts.forget(); // somebody else may have flushed them
        }
        let lane = &self.lanes[no as usize];
        let effect = lane.flight.front().map(|entry| entry.effect);
        if effect.is_some_and(|effect| retry::is_nodes_fault(reply, effect)) {
            self.out.fault(lane.shard());
        }
        self.fail_overtaken(no);
        let lane = &mut self.lanes[no as usize];
        lane.probing = false;
        if lane.keep(reply) {
            return;
        }
        self.finish(no, reply, outlet);
        let lane = &mut self.lanes[no as usize];
        if !lane.gate.admits() {
            lane.step(Event::Executed, self.now_us, &mut self.out);
        }
    }

    /// A write that is delivered while refusals settle ran after the refused ones of its client:
    /// the rights came back in between. They must not run after it.
    fn fail_overtaken(&mut self, no: LaneNo) {
        let lane = &mut self.lanes[no as usize];
        let Some(front) = lane.flight.front().copied() else {
            return;
        };
        if front.effect.repeatable() || !lane.gate.is_settling_refusals() {
            return;
        }
        let overtaken = lane.retry.take_of(front.client, front.generation);
        lane.count_held();
        for entry in overtaken {
            self.counters.overtaken += 1;
            self.fail(&entry, OVERTAKEN);
        }
    }

    /// Keeps the oldest request for another try.
    fn retry_front(&mut self, no: LaneNo, verdict: Verdict) {
        self.counters.retries += 1;
        let now_us = self.now_us;
        let lane = &mut self.lanes[no as usize];
        if std::mem::take(&mut lane.probing) {
            lane.flight.pop_before(&mut lane.retry, now_us);
        } else {
            lane.flight.pop_into(&mut lane.retry, now_us);
        }
        lane.in_flight -= 1;
        lane.count_held();
        match verdict {
            Verdict::NotExecuted(refusal) => {
                lane.step(Event::Refused(refusal), now_us, &mut self.out);
            }
            _ if lane.in_flight == 0 => lane.step(Event::Settled, now_us, &mut self.out),
            _ => {}
        }
    }

    fn answer_block<O: Outlet>(&mut self, no: LaneNo, reply: &[u8], outlet: &mut O) {
        let lane = &mut self.lanes[no as usize];
        let Some(front) = lane.flight.front().copied() else {
            return;
        };
        let total = match front.kind {
            Kind::JobBlock | Kind::Weave => u32::from(front.part),
            _ => front.aux,
        };
        let step = lane.block.reply(reply, total, lane.flight.front_frame());
        let BlockStep::Done(verdict) = step else {
            return;
        };
        match verdict {
            BlockVerdict::NotExecuted(refusal) => {
                self.retry_front(no, Verdict::NotExecuted(refusal));
            }
            BlockVerdict::Torn => {
                self.counters.outcome_unknown += 1;
                let error = error_line(TORN);
                self.deliver_judged(no, &error, outlet);
            }
            BlockVerdict::Aborted(reply) => self.deliver_judged(no, &reply, outlet),
            BlockVerdict::Deliver => match lane.gate.judge(reply, front.effect, b"") {
                Verdict::ReadAgain => self.retry_front(no, Verdict::ReadAgain),
                _ => self.deliver_judged(no, reply, outlet),
            },
        }
    }

    /// The connection of a lane is gone, or could not be made.
    pub fn lane_lost(&mut self, no: LaneNo) {
        if is_line(no) {
            return self.line_lost(no);
        }
        self.counters.node_losses += 1;
        self.settle_flight(no);
        self.lanes[no as usize].lost(self.now_us, &mut self.out);
    }

    /// Decides about every request in flight of a connection that is gone.
    fn settle_flight(&mut self, no: LaneNo) {
        let now_us = self.now_us;
        self.settle_kept(no);
        loop {
            let lane = &mut self.lanes[no as usize];
            let Some(front) = lane.flight.front().copied() else {
                break;
            };
            let delivery = lane.flight.front_delivery();
            if front.kind.is_own() {
                lane.flight.pop();
                continue;
            }
            let block = matches!(front.kind, Kind::Block | Kind::JobBlock | Kind::Weave);
            let torn = block && std::mem::take(&mut lane.block).is_torn();
            if !torn && retry::after_loss(front.effect, delivery) == Loss::Retry {
                if std::mem::take(&mut lane.probing) {
                    lane.flight.pop_before(&mut lane.retry, now_us);
                } else {
                    lane.flight.pop_into(&mut lane.retry, now_us);
                }
                self.counters.retries += 1;
            } else {
                lane.flight.pop();
                self.out.fault(lane.shard());
                self.counters.outcome_unknown += 1;
                self.fail(&front, OUTCOME_UNKNOWN);
            }
        }
        self.lanes[no as usize].in_flight = 0;
    }

    /// Connections that the gates gave up.
    pub(super) fn settle_abandoned(&mut self) {
        while let Some(no) = self.out.abandoned.pop() {
            self.out
                .orders
                .push(super::outbox::Order::Hangup { lane: no });
            self.lane_lost(no);
        }
    }

    /// Answers requests that waited longer than they may.
    pub(super) fn fail_overdue(&mut self, no: LaneNo, budget_us: u64) {
        loop {
            let now_us = self.now_us;
            let lane = &mut self.lanes[no as usize];
            let Some(entry) = lane.take_overdue(budget_us, now_us) else {
                return;
            };
            lane.measure(&entry, now_us);
            self.out.fault(lane.shard());
            self.counters.hold_overdue += 1;
            self.fail(&entry, OVERDUE);
        }
    }

    /// The shard of a lane exists no more.
    pub(super) fn drop_lane(&mut self, no: LaneNo) {
        self.settle_flight(no);
        while let Some(entry) = self.lanes[no as usize].take_overdue(0, u64::MAX) {
            self.fail(&entry, SHARD_REMOVED);
        }
        self.lanes[no as usize].forget_route(self.now_us, &mut self.out);
    }

    pub(super) fn fail(&mut self, entry: &Entry, text: &str) {
        self.counters.errors += 1;
        self.give(entry, &error_line(text), &mut NoOutlet);
    }
}

pub(super) fn error_line(text: &str) -> Vec<u8> {
    let mut line = Vec::with_capacity(text.len() + 3);
    write::write_error(&mut line, text);
    line
}

/// The name in `*3\r\n$4\r\nEVAL\r\n…`: frames in the queues are always of this form.
fn command_name(frame: &[u8]) -> &[u8] {
    let mut lines = frame.split(|b| *b == b'\n');
    let name = lines.nth(2).unwrap_or_default();
    name.strip_suffix(b"\r").unwrap_or(name)
}
