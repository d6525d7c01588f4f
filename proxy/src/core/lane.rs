//! One shard's way for one protocol version: the gate, the connection to the primary, and the
//! requests that are in flight, to be sent again, or held.
//!
//! Invariants: a client uses one lane per shard, and a lane's requests are executed in the order in
//! which they were submitted (`flight`, then `retry`, then `held`). The connection's current
//! database is the one of the last request in `flight`.
//!
//! A lane does no I/O: it leaves orders for the worker, which owns the sockets, in [`Outbox`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use slotmesh_resp::{Protocol, ReplyScanner, write};

use super::hold::{Action, Actions, Event, Level, ShardGate};
use super::outbox::{HoldSample, Order, Outbox};
use super::queue::{Entry, FrameQueue, Kind};
use super::scripts::{KnownScripts, ScriptCache};
use super::transaction::BlockWatch;
use crate::routing::{ShardNo, ShardRoute};

/// Bytes in flight to one node per worker before its clients wait. A few times the socket buffers,
/// so that it never limits a node that reads.
pub const FLIGHT_BYTES_MAX: usize = 64 * 1024 * 1024;
/// A connection attempt fails after this; a host that is there answers in a fraction of it.
const DIAL_LIMIT_US: u64 = 1_000_000;
/// First wait after a lost connection: a restarted process is back within milliseconds.
const BACKOFF_FIRST_US: u64 = 2_000;
/// Longest wait between attempts: a shard that is back must be found soon.
const BACKOFF_CAP_US: u64 = 250_000;
/// A refused login is tried again this soon: a new epoch's user appears moments after its route.
const LOGIN_RETRY_US: u64 = 1_500;
/// After this many refusals the user is not just late.
const LOGIN_FAST_TRIES: u32 = 500;
const LOGIN_SLOW_RETRY_US: u64 = 50_000;
/// A node that answers nothing for this long, while something is in flight, hangs: its connection is
/// given up. Longer than any sane command takes; and the engines' own limit for scripts, after which
/// they answer others again, is half of it.
pub const SILENCE_LIMIT_US: u64 = 10_000_000;
/// How often a lane whose clients wait for room looks whether other lanes or workers made some.
const RECHECK_US: u64 = 10_000;
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

/// The connection of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// None, and none is wanted yet.
    Idle,
    Backoff {
        until_us: u64,
    },
    Dialing {
        until_us: u64,
    },
    /// The login was sent.
    Login,
    /// The login was refused.
    LoginRefused {
        retry_at_us: u64,
    },
    Up,
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
    touched: bool,
    full: bool,
    recheck_at_us: u64,
    /// Since when nothing came, if something is in flight.
    silent_since_us: u64,
    /// The silence has a deadline. Stays until that is over, so that most requests don't set one.
    watched: bool,
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
            touched: false,
            full: false,
            recheck_at_us: 0,
            silent_since_us: 0,
            watched: false,
            backoff_us: BACKOFF_FIRST_US,
            login_refusals: 0,
            holding: false,
            longest_us: 0,
            requests: 0,
            counted: 0,
            held_sum,
        }
    }

    fn shard(&self) -> ShardNo {
        (self.no / 2) as ShardNo
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
        self.flight.push(entry, frame);
        self.in_flight += 1;
    }

    /// Something is in flight from now on.
    #[inline]
    fn watch(&mut self, now_us: u64, out: &mut Outbox) {
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

    /// The node is busy with the script in flight: nothing more is taken.
    pub fn set_busy(&mut self, busy: bool) {
        self.room_bytes = if busy { 0 } else { FLIGHT_BYTES_MAX };
    }

    pub fn is_busy(&self) -> bool {
        self.room_bytes == 0
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
        if self.link == Link::Idle {
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

    /// A new route.
    pub fn set_route(&mut self, route: &Arc<ShardRoute>, now_us: u64, out: &mut Outbox) {
        if route.epoch < self.gate.epoch() || self.route.as_ref() == Some(route) {
            return;
        }
        self.route = Some(Arc::clone(route));
        // A lane without a connection has no client; it counts from its first request on.
        self.holding |= route.hold.is_some() && self.link != Link::Idle;
        if let (Some(_), Some(address)) = (&route.hold, route.target)
            && self.link != Link::Idle
        {
            out.orders.push(Order::Prepare {
                lane: self.no,
                address,
            });
        }
        let event = Event::Route {
            epoch: route.epoch,
            hold: route.hold.clone(),
        };
        self.step(event, now_us, out);
    }

    /// Gives an event to the gate and obeys it.
    pub fn step(&mut self, event: Event, now_us: u64, out: &mut Outbox) {
        self.holding |= matches!(event, Event::Refused(_))
            || (event == Event::LinkDown && self.link == Link::Up);
        out.unsteady = true;
        let actions = self.gate.step(event, self.in_flight, now_us);
        self.act(actions, now_us, out);
    }

    fn act(&mut self, actions: Actions, now_us: u64, out: &mut Outbox) {
        for action in actions {
            match action {
                Action::Report(level) => {
                    self.level = Some(level.clone());
                    out.levels.push((self.no, level));
                }
                Action::Switch => self.switch(now_us, out),
                Action::Drain => self.drain(now_us, out),
                Action::Probe => self.probe(now_us, out),
                Action::Abandon => out.abandoned.push(self.no),
            }
        }
    }

    /// Leaves the old primary, where nothing is in flight, and connects to the one of the route.
    fn switch(&mut self, now_us: u64, out: &mut Outbox) {
        debug_assert_eq!(self.in_flight, 0);
        let wanted = self.link != Link::Idle || self.protocol == Protocol::Resp2;
        if self.link != Link::Idle {
            out.orders.push(Order::Hangup { lane: self.no });
        }
        self.reset_link();
        self.backoff_us = BACKOFF_FIRST_US;
        if wanted {
            self.dial(now_us, out);
        }
    }

    /// Forgets the connection. What was in flight must have been settled.
    pub fn reset_link(&mut self) {
        self.link = Link::Idle;
        self.flight = FrameQueue::default();
        self.scanner = ReplyScanner::new();
        self.input = Vec::new();
        self.block = BlockWatch::default();
        self.in_flight = 0;
        self.probing = false;
        self.db = DB_UNKNOWN;
        self.known_scripts.forget();
        self.room_bytes = FLIGHT_BYTES_MAX;
        self.login_refusals = 0;
    }

    fn dial(&mut self, now_us: u64, out: &mut Outbox) {
        let Some(route) = &self.route else { return };
        self.link = Link::Dialing {
            until_us: now_us + DIAL_LIMIT_US,
        };
        out.unsteady = true;
        out.orders.push(Order::Dial {
            lane: self.no,
            address: route.address,
        });
    }

    /// The connection stands: log in.
    pub fn connected(&mut self, now_us: u64, out: &mut Outbox) {
        if matches!(self.link, Link::Dialing { .. }) {
            self.login(now_us, out);
        }
    }

    fn login(&mut self, now_us: u64, out: &mut Outbox) {
        let Some(route) = self.route.clone() else {
            return;
        };
        self.watch(now_us, out);
        let (user, password) = (route.username.as_bytes(), route.password.as_bytes());
        let entry = Entry::own(Kind::Login);
        self.flight.push_with(entry, |bytes| match self.protocol {
            Protocol::Resp2 => write::encode_command(bytes, &[b"AUTH", user, password]),
            Protocol::Resp3 => {
                write::encode_command(bytes, &[b"HELLO", b"3", b"AUTH", user, password]);
            }
        });
        self.link = Link::Login;
        self.touch(out);
    }

    /// The reply to the login. The entry was taken from the queue.
    pub fn logged_in(&mut self, reply: &[u8], now_us: u64, out: &mut Outbox) {
        if reply.first() == Some(&b'-') {
            self.login_refusals += 1;
            let fast = self.login_refusals < LOGIN_FAST_TRIES;
            let wait_us = if fast {
                LOGIN_RETRY_US
            } else {
                LOGIN_SLOW_RETRY_US
            };
            self.link = Link::LoginRefused {
                retry_at_us: now_us + wait_us,
            };
            out.unsteady = true;
            return;
        }
        self.link = Link::Up;
        self.db = 0;
        self.backoff_us = BACKOFF_FIRST_US;
        self.step(Event::LinkUp, now_us, out);
    }

    /// The connection is gone and what was in flight is settled: try again later.
    pub fn lost(&mut self, now_us: u64, out: &mut Outbox) {
        let was_up = self.link == Link::Up;
        self.reset_link();
        // Spread by lane, so that the lanes of a node don't come back in step.
        let spread = u64::from(self.no).wrapping_mul(0x9E37_79B9) % (self.backoff_us / 2);
        self.link = Link::Backoff {
            until_us: now_us + self.backoff_us / 2 + spread,
        };
        self.backoff_us = (self.backoff_us * 2).min(BACKOFF_CAP_US);
        self.holding |= was_up;
        self.count_held();
        self.step(Event::LinkDown, now_us, out);
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

    /// The shard was removed: it may come back as it was, and must then connect anew. What was in
    /// flight or waited must have been settled.
    pub fn forget_route(&mut self, now_us: u64, out: &mut Outbox) {
        if self.route.take().is_none() {
            return;
        }
        if self.link != Link::Idle {
            out.orders.push(Order::Hangup { lane: self.no });
        }
        self.reset_link();
        self.step(Event::LinkDown, now_us, out);
        self.holding = false;
    }

    /// Takes out the oldest request whose waiting time is over.
    pub fn take_overdue(&mut self, budget_us: u64, now_us: u64) -> Option<Entry> {
        let overdue = |q: &FrameQueue| {
            q.front()
                .is_some_and(|e| e.held_at_us.saturating_add(budget_us) <= now_us)
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

    /// When [`Self::on_time`] has something to do.
    pub fn deadline_us(&self, budget_us: u64) -> Option<u64> {
        let link = match self.link {
            Link::Backoff { until_us } | Link::Dialing { until_us } => Some(until_us),
            Link::LoginRefused { retry_at_us } => Some(retry_at_us),
            Link::Idle | Link::Login | Link::Up => None,
        };
        let overdue = |q: &FrameQueue| q.front().map(|e| e.held_at_us.saturating_add(budget_us));
        [
            link,
            self.watched
                .then(|| self.silent_since_us + SILENCE_LIMIT_US),
            (self.full && !self.gate.admits()).then_some(self.recheck_at_us),
            self.gate.deadline_us(),
            overdue(&self.retry),
            overdue(&self.held),
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
        if self.watched && self.silent_since_us + SILENCE_LIMIT_US <= now_us {
            self.watched = false;
            return !self.flight.is_empty();
        }
        false
    }
}
