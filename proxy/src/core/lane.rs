//! One shard's way for one protocol version: the gate, the connection to the primary, and the
//! requests that are in flight, to be sent again, or held.
//!
//! Invariants: a client uses one lane per shard, and a lane's requests are executed in the order in
//! which they were submitted (`flight`, then `retry`, then `held`). The connection's current
//! database is the one of the last request in `flight`.
//!
//! A lane does no I/O: it leaves orders for the worker, which owns the sockets, in [`Outbox`].

mod link;
mod own;
mod silence;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use slotmesh_resp::{Protocol, ReplyScanner, write};

use super::durable::Durable;
use super::hold::{Action, Actions, Event, Level, ShardGate};
use super::outbox::{HoldSample, Outbox};
use super::queue::{Entry, FrameQueue, Kind};
use super::scripts::{KnownScripts, ScriptCache};
use super::transaction::BlockWatch;
use crate::routing::{ShardNo, ShardRoute};

pub use self::link::Link;
pub use self::own::Own;

use self::link::BACKOFF_FIRST_US;

/// Bytes in flight to one node per worker before its clients wait. A few times the socket buffers,
/// so that it never limits a node that reads.
pub const FLIGHT_BYTES_MAX: usize = 64 * 1024 * 1024;
/// A node that answers nothing for this long, while something is in flight, hangs: its connection is
/// given up. Longer than any sane command takes; and the engines' own limit for scripts, after which
/// they answer others again, is half of it.
pub const SILENCE_LIMIT_US: u64 = 10_000_000;
/// How often a lane whose clients wait for room looks whether other lanes or workers made some.
const RECHECK_US: u64 = 10_000;
/// How long a request waits at a shard that was not reached for a whole budget already: time for
/// one more attempt. So clients that ask one thing after the other hear soon that it is no use.
const LATE_US: u64 = 250_000;
/// No request has this database: the next one selects.
const DB_UNKNOWN: u16 = u16::MAX;

/// Index of a lane: shard number × 2, plus 1 for RESP3.
pub type LaneNo = u32;

/// The lane of a shard for clients of a protocol version.
#[inline]
#[must_use]
pub fn lane_no(shard: ShardNo, protocol: Protocol) -> LaneNo {
    LaneNo::from(shard) * 2 + LaneNo::from(protocol == Protocol::Resp3)
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It will be sent in this turn, or is held.
    Taken,
    /// There is no room: stop reading this client until [`Outbox::freed`].
    Full,
}

/// See the module.
#[derive(Debug)]
pub struct Lane {
    no: LaneNo,
    protocol: Protocol,
    /// Of one client; `None`: of all.
    pub own: Option<Box<Own>>,
    pub gate: ShardGate,
    pub flight: FrameQueue,
    pub retry: FrameQueue,
    pub held: FrameQueue,
    pub link: Link,
    pub scanner: ReplyScanner,
    /// The beginning of a reply.
    pub input: Vec<u8>,
    pub block: BlockWatch,
    /// Requests of clients in `flight`.
    pub in_flight: usize,
    /// The request in flight asks whether the node executes again.
    pub probing: bool,
    pub level: Option<Level>,
    pub scripts: Arc<ScriptCache>,
    pub known_scripts: KnownScripts,
    /// [`FLIGHT_BYTES_MAX`], or 0 while the node is busy with what is in flight.
    room_bytes: usize,
    db: u16,
    route: Option<Arc<ShardRoute>>,
    /// Nobody has the epoch of the route yet.
    vacant: bool,
    /// Epoch of the connection.
    link_epoch: u64,
    /// What waits for replicas to confirm it.
    pub durable: Durable,
    /// Until then what was held only waited behind requests in flight.
    paused_until_us: u64,
    /// The gate was closed without a break since then.
    closed_since_us: Option<u64>,
    touched: bool,
    full: bool,
    recheck_at_us: u64,
    /// Since when nothing came, if something is in flight.
    silent_since_us: u64,
    /// The silence has a deadline. Stays until that is over, so that most requests don't set one.
    watched: bool,
    /// It was silent for too long, and still is.
    stalled: bool,
    /// The controller was told that the primary does not answer.
    trouble: bool,
    /// When the connection is given up whatever its node does.
    give_up_at_us: Option<u64>,
    backoff_us: u64,
    login_refusals: u32,
    /// What waits is, or was, a hold and not just a first connection.
    holding: bool,
    longest_us: u64,
    requests: u64,
    /// Bytes of `retry` and `held` that are in the process's sum.
    counted: usize,
    held_sum: Arc<AtomicU64>,
}

impl Lane {
    pub fn new(no: LaneNo, held_sum: Arc<AtomicU64>, scripts: Arc<ScriptCache>) -> Self {
        Self {
            no,
            protocol: if no % 2 == 1 {
                Protocol::Resp3
            } else {
                Protocol::Resp2
            },
            own: None,
            gate: ShardGate::new(),
            flight: FrameQueue::default(),
            retry: FrameQueue::default(),
            held: FrameQueue::default(),
            link: Link::Idle,
            scanner: ReplyScanner::new(),
            input: Vec::new(),
            block: BlockWatch::default(),
            in_flight: 0,
            probing: false,
            level: None,
            scripts,
            known_scripts: KnownScripts::default(),
            room_bytes: FLIGHT_BYTES_MAX,
            db: DB_UNKNOWN,
            route: None,
            vacant: false,
            link_epoch: 0,
            durable: Durable::default(),
            paused_until_us: 0,
            closed_since_us: None,
            touched: false,
            full: false,
            recheck_at_us: 0,
            silent_since_us: 0,
            watched: false,
            stalled: false,
            trouble: false,
            give_up_at_us: None,
            backoff_us: BACKOFF_FIRST_US,
            login_refusals: 0,
            holding: false,
            longest_us: 0,
            requests: 0,
            counted: 0,
            held_sum,
        }
    }

    pub fn shard(&self) -> ShardNo {
        match &self.own {
            Some(own) => own.shard,
            None => (self.no / 2) as ShardNo,
        }
    }

    /// True if another request can be taken. One that is larger than all room is taken once there
    /// is any, or it could wait for ever behind small ones; so the bound is passed by one at most.
    #[inline]
    pub fn has_room(&self, hold_bytes_max: u64) -> bool {
        if self.gate.admits() {
            self.flight.bytes_len() <= self.room_bytes
        } else {
            self.held_sum.load(Ordering::Relaxed) <= hold_bytes_max
        }
    }

    /// The lane has no room: it says so in the outbox once it has.
    pub fn note_full(&mut self, now_us: u64, out: &mut Outbox) {
        if !std::mem::replace(&mut self.full, true) {
            self.recheck_at_us = now_us + RECHECK_US;
            out.unsteady |= !self.gate.admits();
        }
    }

    /// Takes a request whose room was checked.
    #[inline]
    pub fn submit(&mut self, entry: Entry, frame: &[u8], now_us: u64, out: &mut Outbox) {
        if self.gate.admits() {
            self.send(entry, frame, now_us, out);
            self.touch(out);
        } else {
            self.hold(entry, frame, now_us, out);
        }
    }

    #[inline]
    fn send(&mut self, entry: Entry, frame: &[u8], now_us: u64, out: &mut Outbox) {
        if self.flight.is_empty() {
            self.watch(now_us, out);
        }
        if self.db != entry.db {
            self.select(entry.db);
        }
        if matches!(entry.kind, Kind::Script | Kind::Block | Kind::JobBlock) {
            self.load_scripts(entry.kind, frame);
        }
        if self.own.is_some() {
            self.announce_caching(&entry);
        }
        self.flight.push(entry, frame);
        self.in_flight += 1;
    }

    /// The node is busy with the script in flight: nothing more is taken.
    pub fn set_busy(&mut self, busy: bool) {
        self.room_bytes = if busy { 0 } else { FLIGHT_BYTES_MAX };
    }

    pub fn is_busy(&self) -> bool {
        self.room_bytes == 0
    }

    /// Busy, or silent for too long: its next word ends that.
    #[inline]
    pub fn is_slow(&self) -> bool {
        self.room_bytes == 0 || self.stalled
    }

    fn select(&mut self, db: u16) {
        let number = itoa::Buffer::new().format(db).to_owned();
        self.flight.push_with(Entry::own(Kind::Select), |bytes| {
            write::encode_command(bytes, &[b"SELECT", number.as_bytes()]);
        });
        self.db = db;
    }

    fn hold(&mut self, entry: Entry, frame: &[u8], now_us: u64, out: &mut Outbox) {
        self.holding |= self.gate.is_ordered_to_hold();
        self.held.push(entry.held_since(now_us), frame);
        self.count_held();
        out.unsteady = true;
        if self.link == Link::Idle && !self.vacant {
            self.closed_since_us = Some(now_us);
            self.dial(now_us, out);
        }
    }

    #[inline]
    pub fn touch(&mut self, out: &mut Outbox) {
        if !self.touched {
            self.touched = true;
            out.touched.push(self.no);
        }
    }

    /// Its output was sent, as far as the socket took it.
    pub fn untouch(&mut self) {
        self.touched = false;
    }

    /// Gives an event to the gate and obeys it.
    pub fn step(&mut self, event: Event, now_us: u64, out: &mut Outbox) {
        self.holding |= matches!(event, Event::Refused(_))
            || (event == Event::LinkDown && self.link == Link::Up);
        out.unsteady = true;
        let began = matches!(event, Event::Route { epoch, .. } if epoch > self.gate.epoch());
        let paused = self.gate.only_pauses();
        let actions = self.gate.step(event, self.in_flight, now_us);
        if paused && !self.gate.only_pauses() {
            self.paused_until_us = now_us;
        }
        if self.gate.admits() || self.gate.only_pauses() {
            self.closed_since_us = None;
        } else if began || self.closed_since_us.is_none() {
            self.closed_since_us = Some(now_us); // with a new epoch there is new hope
        }
        self.act(actions, now_us, out);
    }

    fn act(&mut self, actions: Actions, now_us: u64, out: &mut Outbox) {
        for action in actions {
            match action {
                Action::Report(level) => {
                    self.level = Some(level.clone());
                    out.levels.push((self.shard(), level));
                }
                Action::Switch => self.switch(now_us, out),
                Action::Drain => self.drain(now_us, out),
                Action::Probe => self.probe(now_us, out),
                Action::Abandon => out.abandoned.push(self.no),
            }
        }
    }

    fn drain(&mut self, now_us: u64, out: &mut Outbox) {
        while !self.retry.is_empty() || !self.held.is_empty() {
            self.send_oldest(now_us, out);
        }
        self.count_held();
        self.touch(out);
        out.freed |= std::mem::take(&mut self.full);
        self.end_hold(out);
    }

    fn probe(&mut self, now_us: u64, out: &mut Outbox) {
        if self.retry.is_empty() && self.held.is_empty() {
            self.step(Event::Executed, now_us, out);
            return;
        }
        self.send_oldest(now_us, out);
        self.probing = true;
        self.count_held();
        self.touch(out);
    }

    fn send_oldest(&mut self, now_us: u64, out: &mut Outbox) {
        let retry = !self.retry.is_empty();
        // Taken out for the time of the move, so that the frame can be read while it is sent.
        let mut from = std::mem::take(if retry {
            &mut self.retry
        } else {
            &mut self.held
        });
        if let Some(entry) = from.front().copied() {
            self.measure(&entry, now_us);
            self.send(entry, from.front_frame(), now_us, out);
            from.pop();
        }
        *(if retry {
            &mut self.retry
        } else {
            &mut self.held
        }) = from;
    }

    /// Notes how long a request waited.
    pub fn measure(&mut self, entry: &Entry, now_us: u64) {
        if self.holding {
            self.longest_us = self.longest_us.max(now_us.saturating_sub(entry.held_at_us));
            self.requests += 1;
        }
    }

    fn end_hold(&mut self, out: &mut Outbox) {
        if std::mem::take(&mut self.holding) {
            out.samples.push(HoldSample {
                shard: self.shard(),
                epoch: self.gate.epoch(),
                longest_us: std::mem::take(&mut self.longest_us),
                requests: std::mem::take(&mut self.requests),
            });
        }
    }

    /// Brings the process's sum of held bytes up to date.
    pub fn count_held(&mut self) {
        let now = self.retry.bytes_len() + self.held.bytes_len();
        if now >= self.counted {
            self.held_sum
                .fetch_add((now - self.counted) as u64, Ordering::Relaxed);
        } else {
            self.held_sum
                .fetch_sub((self.counted - now) as u64, Ordering::Relaxed);
        }
        self.counted = now;
    }

    /// Called after replies were taken, and now and then: a lane that was full may have room again.
    #[inline]
    pub fn check_room(&mut self, hold_bytes_max: u64, now_us: u64, out: &mut Outbox) {
        if !self.full {
            return;
        }
        let room = if self.gate.admits() {
            self.flight.bytes_len() <= self.room_bytes / 2
        } else {
            self.has_room(hold_bytes_max)
        };
        if room {
            self.full = false;
            out.freed = true;
        } else if self.recheck_at_us <= now_us {
            self.recheck_at_us = now_us + RECHECK_US;
        }
    }

    /// Takes out the oldest request whose waiting time is over.
    pub fn take_overdue(&mut self, budget_us: u64, now_us: u64) -> Option<Entry> {
        let overdue = |q: &FrameQueue| {
            self.overdue_at_us(q, budget_us)
                .is_some_and(|at| at <= now_us)
        };
        let entry = if overdue(&self.retry) {
            self.retry.pop()
        } else if overdue(&self.held) {
            self.held.pop()
        } else {
            None
        };
        if entry.is_some() {
            self.count_held();
        }
        entry
    }

    /// When the oldest request of a queue has waited for long enough: a whole budget, or less at a
    /// shard that is not reached for that long. What only waits behind requests in flight ends with
    /// those.
    fn overdue_at_us(&self, queue: &FrameQueue, budget_us: u64) -> Option<u64> {
        let held_at_us = queue.front()?.held_at_us.max(self.paused_until_us);
        if self.gate.only_pauses() {
            return None;
        }
        let whole = held_at_us.saturating_add(budget_us);
        let closed = self.closed_since_us.unwrap_or(held_at_us);
        let late = (held_at_us + LATE_US).max(closed.saturating_add(budget_us));
        Some(whole.min(late))
    }

    /// When [`Self::on_time`] has something to do.
    pub fn deadline_us(&self, budget_us: u64) -> Option<u64> {
        let link = match self.link {
            Link::Backoff { until_us } | Link::Dialing { until_us } => Some(until_us),
            Link::LoginRefused { retry_at_us } => Some(retry_at_us),
            Link::Idle | Link::Login | Link::Up => None,
        };
        [
            link,
            self.silence_deadline_us(),
            self.give_up_at_us,
            (self.full && !self.gate.admits()).then_some(self.recheck_at_us),
            self.gate.deadline_us(),
            self.overdue_at_us(&self.retry, budget_us),
            self.overdue_at_us(&self.held, budget_us),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Acts on what is due, but for overdue requests. True if the connection must be given up.
    #[must_use]
    pub fn on_time(&mut self, now_us: u64, out: &mut Outbox) -> bool {
        match self.link {
            Link::Backoff { until_us } if until_us <= now_us => self.dial(now_us, out),
            Link::Dialing { until_us } if until_us <= now_us => return true,
            Link::LoginRefused { retry_at_us } if retry_at_us <= now_us => self.login(now_us, out),
            _ => {}
        }
        if self.gate.deadline_us().is_some_and(|at| at <= now_us) {
            self.step(Event::Tick, now_us, out);
        }
        if self.give_up_at_us.is_some_and(|at| at <= now_us) {
            self.give_up_at_us = None;
            return self.in_flight > 0;
        }
        self.listen(now_us, out)
    }
}
