//! Commands that wait at a node, each on a line of its own: BLPOP and its kin, XREAD with BLOCK,
//! WAIT; and WATCH, which takes a line as they do.
//!
//! Invariants: a client has one such command at a time, issued when nothing else of it is in flight,
//! and its next command is taken after the answer. The node decides when it is over, also by time;
//! the proxy only while the command is not at a node. A client that goes away takes its line with
//! it, and so the node forgets the command. What was certainly not executed (refused, or ended by
//! a demotion) is issued again with the time that is left; a line lost without an answer leaves a
//! pop's outcome unknown.

use slotmesh_command::Command;
use slotmesh_resp::Protocol;
use smallvec::SmallVec;

use super::Core;
use super::answer::{OUTCOME_UNKNOWN, OVERDUE, SHARD_REMOVED, error_line};
use super::client::Pause;
use super::dispatch::{Flow, NOT_SERVED};
use super::hold::{PROBE_INTERVAL_US, SETTLE_LIMIT_US};
use super::lane::{SILENCE_LIMIT_US, lane_no};
use super::line::{LineEvent, LineNo, Use};
use super::private::TOO_MANY;
use super::retry::{self, Effect, Verdict};
use super::sessions::NoOutlet;
use super::spec::Request;
use super::tails::Tails;
use super::timeout::Timeout;
use super::waiting::{Part, Purpose, State, Wait};
use crate::routing::{NO_SHARD, ShardNo};

/// Longest time between two tries of a command that a node refused: an undone switchover gives the
/// rights back without a word.
const RETRY_CAP_US: u64 = 80_000;
/// A command that is issued later than this after it came carries the time that is left.
const LATE_US: u64 = 5_000;
/// A shard channel to which nobody subscribes.
pub(super) const WAIT_CHANNEL: &[u8] = b"__slotmesh:wait";
/// What a node says to those who wait when it becomes a replica.
const DEMOTED: &[u8] = b"-UNBLOCKED force unblock";

/// What a client wants.
#[derive(Debug)]
struct Demand<'a> {
    frame: &'a [u8],
    timeout: Option<Timeout>,
    tails: Tails,
    repeatable: bool,
}

impl Core {
    /// A command that may wait.
    pub(super) fn block(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        let (purpose, shards) = match command.name {
            "wait" => (Purpose::Replicas, self.table.all_shards()),
            "waitaof" => (Purpose::Copies, self.table.all_shards()),
            _ => match self.shard_of_keys(command, request) {
                Ok(shard) => (Purpose::Data, vec![shard]),
                Err(text) => return self.refuse(slot, text.as_bytes()),
            },
        };
        let mut demand = Demand {
            frame: request.frame,
            timeout: Timeout::of(command, request, self.now_us),
            tails: Tails::default(),
            repeatable: purpose != Purpose::Data,
        };
        if command.name == "xread" {
            demand.tails = Tails::of(request);
            demand.repeatable = true;
        }
        self.start_wait(slot, purpose, &shards, demand)
    }

    /// WATCH, on a line that stays with the client.
    pub(super) fn start_watch(&mut self, slot: u32, shard: ShardNo, frame: &[u8]) -> Flow {
        let demand = Demand {
            frame,
            timeout: None,
            tails: Tails::default(),
            repeatable: true,
        };
        self.start_wait(slot, Purpose::Watch, &[shard], demand)
    }

    fn start_wait(
        &mut self,
        slot: u32,
        purpose: Purpose,
        shards: &[ShardNo],
        demand: Demand<'_>,
    ) -> Flow {
        if shards.is_empty() || shards.contains(&NO_SHARD) {
            return self.refuse(slot, NOT_SERVED.as_bytes());
        }
        let now_us = self.now_us;
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        if client.in_flight() > 0 {
            return Flow::NotYet;
        }
        let part = |shard: &ShardNo| Part {
            shard: *shard,
            epoch: 0,
            state: State::Held {
                since_us: now_us,
                retry_at_us: now_us,
            },
            tries: 0,
            reply: Vec::new(),
            confirming: false,
        };
        let wait = Wait {
            client: slot,
            generation: client.generation,
            ticket: client.ticket(),
            protocol: client.state.protocol,
            db: client.state.db,
            purpose,
            frame: demand.frame.to_vec(),
            timeout: demand.timeout,
            tails: demand.tails,
            began_us: now_us,
            repeatable: demand.repeatable,
            unblock: None,
            unblock_asked: false,
            parts: shards.iter().map(part).collect(),
            listed: false,
        };
        // A WATCH is answered at once, so a client that closes its side still gets what it asked.
        client.pause = match purpose {
            Purpose::Watch => Pause::Quiet,
            _ => Pause::Blocked,
        };
        let number = self.waits.free.pop().unwrap_or_else(|| {
            self.waits.all.push(None);
            (self.waits.all.len() - 1) as u32
        });
        client.extra_mut().wait = Some(number);
        self.waits.all[number as usize] = Some(wait);
        self.advance_wait(number);
        Flow::Taken
    }

    /// Issues what can be issued. Lists the command if something is left that has a deadline.
    fn advance_wait(&mut self, number: u32) {
        let (budget_us, now_us) = (self.table.settings.hold_budget_us, self.now_us);
        for at in 0..self.waits.get(number).map_or(0, |wait| wait.parts.len()) {
            let Some(wait) = self.waits.get(number) else {
                return; // a part has ended it
            };
            let part = &wait.parts[at];
            if let State::Held { retry_at_us, .. } = part.state
                && retry_at_us <= now_us
                && self.lanes[lane_no(part.shard, Protocol::Resp2) as usize]
                    .gate
                    .admits()
            {
                self.issue(number, at);
            }
        }
        if let Some(wait) = self.waits.get(number)
            && wait.deadline_us(budget_us, now_us).is_some()
        {
            self.waits.list(number);
            self.out.unsteady = true;
        }
    }

    /// Sends a part to its node.
    fn issue(&mut self, number: u32, at: usize) {
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        let (shard, protocol, db) = (wait.parts[at].shard, wait.protocol, wait.db);
        let (client, generation) = (wait.client, wait.generation);
        let (purpose, began_us) = (wait.purpose, wait.began_us);
        let user = Use::Wait {
            number,
            part: at as u16,
        };
        let watched = (purpose == Purpose::Watch)
            .then(|| self.lend_watch(client, generation, user))
            .flatten();
        let Some(no) = watched.or_else(|| self.take_private(shard, protocol, user)) else {
            return self.end_wait(number, &error_line(TOO_MANY));
        };
        self.select_private(no, db);
        if matches!(purpose, Purpose::Replicas | Purpose::Copies) {
            // The node waits for what this connection wrote. Up to 7.0 any command makes that all
            // until now; later ones want something that goes to replicas, which this does.
            self.write_own(no, &[b"PING"]);
            self.write_own(no, self.table.settings.durability().mark());
        }
        let (sent, epoch) = (self.lines.get(no)).map_or((false, 0), |l| (l.is_up(), l.epoch));
        let now_us = self.now_us;
        let late = now_us.saturating_sub(began_us) > LATE_US;
        let Some(wait) = self.waits.all[number as usize].as_mut() else {
            return;
        };
        let part = &mut wait.parts[at];
        part.epoch = epoch;
        part.state = State::Issued {
            line: no,
            sent,
            until_us: (purpose == Purpose::Watch).then_some(now_us + SILENCE_LIMIT_US),
        };
        let mut frames = Vec::new();
        wait.tails.ask(&mut frames);
        let ids = wait.tails.rewrite(&wait.frame);
        let frame = ids.as_deref().unwrap_or(&wait.frame);
        let timeout = wait.timeout.filter(|_| late);
        let rest = timeout.and_then(|timeout| timeout.rewrite(frame, now_us));
        frames.extend_from_slice(rest.as_deref().unwrap_or(frame));
        self.write_line(no, |out| out.extend_from_slice(&frames));
    }

    /// What a line of a waiting command has to say.
    pub(super) fn wait_event(&mut self, no: LineNo, number: u32, at: u16, event: LineEvent<'_>) {
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        let part = &mut wait.parts[usize::from(at)];
        match event {
            LineEvent::Ready => {
                if let State::Issued { sent, .. } = &mut part.state {
                    *sent = true;
                }
            }
            LineEvent::Reply(reply) => self.wait_answered(no, number, usize::from(at), reply),
            LineEvent::Lost(_) => {
                self.privates.forget(part.shard);
                self.wait_lost(number, usize::from(at));
            }
        }
    }

    fn wait_answered(&mut self, no: LineNo, number: u32, at: usize, reply: &[u8]) {
        if self.is_confirming(number, at) {
            return self.wait_confirmed(no, number, at, reply);
        }
        let demoted = reply.starts_with(DEMOTED);
        let refused = retry::classify(reply, Effect::Write, b"") != Verdict::Deliver;
        if demoted || refused {
            self.drop_private(no);
            return self.hold_part(number, at);
        }
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        if wait.tails.is_asking() {
            return wait.tails.answered(reply);
        }
        let (data, repeatable) = (wait.purpose == Purpose::Data, wait.repeatable);
        if data && self.must_confirm(repeatable, reply) {
            let until_us = self.ask_confirmation(no);
            return self.keep_part(number, at, reply, until_us);
        }
        self.wait_done(no, number, at, reply);
    }

    /// The reply of a part is what its client gets.
    fn wait_done(&mut self, no: LineNo, number: u32, at: usize, reply: &[u8]) {
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        let (client, generation) = (wait.client, wait.generation);
        if wait.purpose == Purpose::Watch && reply.first() != Some(&b'-') {
            self.keep_watch(client, generation, no);
        } else if wait.unblock.is_some() {
            self.drop_private(no); // a CLIENT UNBLOCK may be on its way to this connection
        } else {
            self.give_private(no);
        }
        self.part_answered(number, at, reply);
    }

    fn is_confirming(&mut self, number: u32, at: usize) -> bool {
        let wait = self.waits.get(number);
        wait.is_some_and(|wait| wait.parts[at].confirming)
    }

    /// Keeps a reply until replicas have confirmed what was done.
    fn keep_part(&mut self, number: u32, at: usize, reply: &[u8], by_us: u64) {
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        let part = &mut wait.parts[at];
        part.reply = reply.to_vec();
        part.confirming = true;
        if let State::Issued { until_us, .. } = &mut part.state {
            *until_us = Some(until_us.map_or(by_us, |at| at.min(by_us)));
        }
        self.waits.list(number);
    }

    /// What the node said of the replicas.
    fn wait_confirmed(&mut self, no: LineNo, number: u32, at: usize, answer: &[u8]) {
        let wait = self.waits.get(number);
        let reply = wait.map(|wait| std::mem::take(&mut wait.parts[at].reply));
        let reply = self.judge_confirmation(answer, reply.unwrap_or_default());
        self.wait_done(no, number, at, &reply);
    }

    fn part_answered(&mut self, number: u32, at: usize, reply: &[u8]) {
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        wait.parts[at].state = State::Answered;
        wait.parts[at].reply = reply.to_vec();
        if wait.parts.iter().all(|part| part.state == State::Answered) {
            let reply = wait.reply();
            self.end_wait(number, &reply);
        }
    }

    /// The line of a part is gone, without an answer.
    fn wait_lost(&mut self, number: u32, at: usize) {
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        let sent = matches!(wait.parts[at].state, State::Issued { sent: true, .. });
        if sent && !wait.repeatable {
            self.counters.outcome_unknown += 1;
            return self.end_wait(number, &error_line(OUTCOME_UNKNOWN));
        }
        self.hold_part(number, at);
    }

    /// A part was not executed: it is tried again, at this node or another.
    fn hold_part(&mut self, number: u32, at: usize) {
        let now_us = self.now_us;
        self.counters.retries += 1;
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        if let Some(how) = wait.unblock {
            let reply = wait.unblocked(how);
            return self.end_wait(number, &reply);
        }
        if wait.purpose == Purpose::Watch {
            let (client, generation) = (wait.client, wait.generation);
            if self.is_watching(client, generation) {
                // What it watched before counts as touched, so this need not be watched at all.
                return self.end_wait(number, b"+OK\r\n");
            }
        }
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        let part = &mut wait.parts[at];
        let pause_us = (PROBE_INTERVAL_US << part.tries.min(4)).min(RETRY_CAP_US);
        part.tries += 1;
        part.confirming = false;
        part.state = State::Held {
            since_us: now_us,
            retry_at_us: now_us + pause_us,
        };
        self.waits.list(number);
        self.out.unsteady = true;
    }

    /// Answers a command and lets its client go on. Lines that it still has are closed.
    pub(super) fn end_wait(&mut self, number: u32, reply: &[u8]) {
        let Some(wait) = self.forget_wait(number) else {
            return;
        };
        self.counters.errors += u64::from(reply.first() == Some(&b'-'));
        let same = self.sessions.get_same(wait.client, wait.generation);
        if let Some(client) = same {
            if let Some(extra) = &mut client.extra {
                extra.wait = None;
            }
            client.tidy_extra();
            if client.pause == Pause::Blocked {
                client.pause = Pause::None;
                let resumed = (wait.client, wait.generation);
                self.sessions.resumed.push(resumed);
            }
        }
        let (generation, seq) = wait.ticket;
        self.sessions
            .deliver(wait.client, generation, seq, reply, &mut NoOutlet);
        self.sessions.resume_quiet(wait.client, wait.generation);
    }

    fn forget_wait(&mut self, number: u32) -> Option<Wait> {
        let wait = self.waits.all.get_mut(number as usize)?.take()?;
        if wait.listed {
            self.waits.due.retain(|other| *other != number);
        }
        self.waits.free.push(number);
        for part in &wait.parts {
            if let State::Issued { line, .. } = part.state {
                self.drop_private(line);
            }
        }
        Some(wait)
    }

    /// The client is gone: so is what it waits for.
    pub(super) fn cancel_wait(&mut self, number: u32) {
        self.forget_wait(number);
    }

    /// Issues what waits for a gate that has opened.
    pub(super) fn resume_waits(&mut self) {
        if self.waits.due.is_empty() {
            return;
        }
        let (lanes, now_us) = (&self.lanes, self.now_us);
        let may_go = |part: &Part| match part.state {
            State::Held { retry_at_us, .. } => {
                retry_at_us <= now_us
                    && lanes[lane_no(part.shard, Protocol::Resp2) as usize]
                        .gate
                        .admits()
            }
            _ => false,
        };
        let numbers = self.waits.due.iter().copied();
        let mut due: SmallVec<[(u64, u32); 16]> = numbers
            .filter_map(|number| {
                let wait = self.waits.all[number as usize].as_ref()?;
                (wait.parts.iter().any(may_go)).then_some((wait.began_us, number))
            })
            .collect();
        due.sort_unstable(); // who waits for longest is served first
        for (_, number) in due {
            self.advance_wait(number);
        }
    }

    /// A new routing table: what waits at older epochs must end soon, what is held may go on.
    pub(super) fn renew_waits(&mut self) {
        let until = self.now_us + SETTLE_LIMIT_US;
        for number in 0..self.waits.all.len() as u32 {
            let Some(wait) = self.waits.get(number) else {
                continue;
            };
            let (mut removed, mut listed) = (false, false);
            for part in &mut wait.parts {
                let route = self.table.shards.get(usize::from(part.shard));
                let Some(epoch) = route.and_then(Option::as_ref).map(|route| route.epoch) else {
                    removed = true;
                    break;
                };
                match &mut part.state {
                    State::Held { retry_at_us, .. } => *retry_at_us = 0,
                    State::Issued { until_us, .. } if part.epoch < epoch => {
                        until_us.get_or_insert(until);
                        listed = true;
                    }
                    State::Issued { .. } | State::Answered => {}
                }
            }
            if removed {
                self.end_wait(number, &error_line(SHARD_REMOVED));
            } else if listed {
                self.waits.list(number);
                self.out.unsteady = true;
            }
        }
    }

    /// Acts on what is due. Returns when to look again.
    pub(super) fn waits_on_time(&mut self) -> Option<u64> {
        let budget_us = self.table.settings.hold_budget_us;
        for number in std::mem::take(&mut self.waits.due) {
            if let Some(wait) = self.waits.get(number) {
                wait.listed = false;
                self.wait_due(number, budget_us);
                self.advance_wait(number); // lists it again if need be
            }
        }
        let deadlines = self.waits.due.iter().filter_map(|number| {
            let wait = self.waits.all[*number as usize].as_ref()?;
            wait.deadline_us(budget_us, self.now_us)
        });
        deadlines.min()
    }

    fn wait_due(&mut self, number: u32, budget_us: u64) {
        let now_us = self.now_us;
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        if let Some(how) = wait.unblock
            && !wait.unblock_asked
        {
            return self.send_unblock(number, how);
        }
        let over = wait
            .timeout
            .is_some_and(|timeout| timeout.until_us <= now_us);
        for at in 0..wait.parts.len() {
            let Some(wait) = self.waits.get(number) else {
                return;
            };
            match wait.parts[at].state {
                State::Held { .. } if over => {
                    let reply = wait.nil();
                    return self.end_wait(number, &reply);
                }
                State::Held { since_us, .. } if since_us + budget_us <= now_us => {
                    self.counters.hold_overdue += 1;
                    return self.end_wait(number, &error_line(OVERDUE));
                }
                State::Issued {
                    line,
                    until_us: Some(until_us),
                    ..
                } if until_us <= now_us => {
                    self.drop_private(line);
                    self.wait_lost(number, at);
                }
                State::Held { .. } | State::Issued { .. } | State::Answered => {}
            }
        }
    }
}
