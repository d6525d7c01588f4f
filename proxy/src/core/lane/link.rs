//! The connection of a lane: where it goes, how it is made, and what its loss means.
//!
//! Invariants: a connection is of one epoch and address; it is dialed again by itself after a loss,
//! at most [`BACKOFF_CAP_US`] later, and at once when the route names another primary. Nobody is
//! dialed while a shard is *vacant*: an epoch that begins with a hold at the address of the one
//! before says that this primary is lost and that nobody has its place yet (a failover; every other
//! new epoch names its primary). What was in flight then will never be answered, so it is settled
//! at once.

use std::sync::Arc;

use slotmesh_resp::{Protocol, ReplyScanner, write};

use super::{DB_UNKNOWN, FLIGHT_BYTES_MAX, Lane};
use crate::core::durable::Durable;
use crate::core::hold::Event;
use crate::core::outbox::{Order, Outbox};
use crate::core::queue::{Entry, FrameQueue, Kind};
use crate::core::transaction::BlockWatch;
use crate::routing::ShardRoute;

/// A connection attempt fails after this; a host that is there answers in a fraction of it.
const DIAL_LIMIT_US: u64 = 1_000_000;
/// First wait after a lost connection: a restarted process is back within milliseconds.
pub(super) const BACKOFF_FIRST_US: u64 = 2_000;
/// Longest wait between attempts: a shard that is back must be found soon.
const BACKOFF_CAP_US: u64 = 250_000;
/// A refused login is tried again this soon: a new epoch's user appears moments after its route.
const LOGIN_RETRY_US: u64 = 1_500;
/// After this many refusals the user is not just late.
const LOGIN_FAST_TRIES: u32 = 500;
const LOGIN_SLOW_RETRY_US: u64 = 50_000;
/// A primary that was silent before a route of a higher epoch came has this long to say something:
/// its answers may have come together with the route.
const LAST_WORDS_US: u64 = 50_000;

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

impl Lane {
    /// A new route.
    pub fn set_route(&mut self, route: &Arc<ShardRoute>, now_us: u64, out: &mut Outbox) {
        if route.epoch < self.gate.epoch() || self.route.as_ref() == Some(route) {
            return;
        }
        let raised = route.epoch > self.gate.epoch();
        let before = self.route.replace(Arc::clone(route));
        let moved = before.as_ref().is_some_and(|b| b.address != route.address);
        let was_vacant = self.vacant;
        let vacates = before.is_some_and(|before| before.is_vacated_by(route));
        self.vacant = vacates || (was_vacant && route.hold.is_some() && !moved);
        if raised || moved {
            self.end_trouble(out);
        }
        // A lane without a connection has no client; it counts from its first request on.
        self.holding |= route.hold.is_some() && self.link != Link::Idle;
        if let (Some(_), Some(address)) = (&route.hold, route.target)
            && (self.link != Link::Idle || self.vacant)
        {
            out.orders.push(Order::Prepare {
                lane: self.no,
                address,
            });
        }
        let silent = self.is_silent(now_us);
        let event = Event::Route {
            epoch: route.epoch,
            hold: route.hold.clone(),
        };
        self.step(event, now_us, out);
        let in_flight = self.in_flight > 0;
        if in_flight && (vacates || (moved && !raised)) {
            out.abandoned.push(self.no);
        } else if in_flight && raised && silent {
            self.give_up_at_us = Some(now_us + LAST_WORDS_US);
        } else if !raised && (moved || (was_vacant && !self.vacant)) {
            self.step(Event::LinkDown, now_us, out);
            self.switch(now_us, out);
        }
    }

    /// Leaves the old primary, where nothing is in flight, and connects to the one of the route.
    pub(super) fn switch(&mut self, now_us: u64, out: &mut Outbox) {
        debug_assert_eq!(self.in_flight, 0);
        let waits = !self.retry.is_empty() || !self.held.is_empty();
        let shared = self.protocol == Protocol::Resp2 && self.own.is_none();
        let wanted = waits || self.link != Link::Idle || shared || self.is_set_up();
        self.forget_reads(out);
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
    fn reset_link(&mut self) {
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
        self.stalled = false;
        self.give_up_at_us = None;
        self.durable = Durable::new(self.durable.wanted);
    }

    pub(super) fn dial(&mut self, now_us: u64, out: &mut Outbox) {
        let Some(route) = &self.route else { return };
        if self.vacant {
            self.link = Link::Idle;
            return;
        }
        self.link_epoch = route.epoch;
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

    pub(super) fn login(&mut self, now_us: u64, out: &mut Outbox) {
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
        self.end_trouble(out);
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
        self.begin_tracking();
        self.step(Event::LinkUp, now_us, out);
    }

    /// The connection is gone and what was in flight is settled: try again later.
    pub fn lost(&mut self, now_us: u64, out: &mut Outbox) {
        let was_up = self.link == Link::Up;
        if self.link_epoch == self.gate.epoch() {
            self.begin_trouble(now_us, out);
        }
        self.forget_reads(out);
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

    /// The shard was removed: it may come back as it was, and must then connect anew. What was in
    /// flight or waited must have been settled.
    pub fn forget_route(&mut self, now_us: u64, out: &mut Outbox) {
        if self.route.take().is_none() {
            return;
        }
        self.end_trouble(out);
        self.vacant = false;
        if self.link != Link::Idle {
            out.orders.push(Order::Hangup { lane: self.no });
        }
        self.reset_link();
        self.step(Event::LinkDown, now_us, out);
        self.holding = false;
    }
}

impl ShardRoute {
    /// True if the next route says that this one's primary is lost and nobody has its place yet.
    #[must_use]
    pub fn is_vacated_by(&self, next: &Self) -> bool {
        next.epoch > self.epoch && next.hold.is_some() && next.address == self.address
    }
}
