//! The gate of one shard: may a request go to the primary now, or must it wait?
//!
//! Invariants: the epoch never falls; a request passes only while nothing that was sent before it
//! can still turn out not executed; every hold ends by itself.
//!
//! Pure: an event, the number of requests in flight and a time in, a list of actions out. How to
//! use it (the proxy's lanes and the simulation do exactly this):
//!
//! 1. Ask [`ShardGate::admits`] for each new request: send it, or append it to the queue of held
//!    requests.
//! 2. Give each reply to [`ShardGate::judge`]. `Deliver` goes to the client. For `NotExecuted` and
//!    `ReadAgain` put the request at the end of the *retry* queue (which is older than the held
//!    queue), and for `NotExecuted` also step with [`Event::Refused`]. See
//!    [`ShardGate::is_settling_refusals`] for a write that is delivered after a refusal.
//! 3. Step with [`Event::Settled`] whenever the number in flight falls to 0, with
//!    [`Event::Executed`] when a delivered reply leaves the gate still closed, and with
//!    [`Event::LinkUp`] and [`Event::LinkDown`] for the login and loss of the connection. Before
//!    `LinkDown`, settle everything in flight by [`super::retry::after_loss`].
//! 4. Step with [`Event::Tick`] at [`ShardGate::deadline_us`].
//! 5. Obey the actions in their order.

use smallvec::SmallVec;

use super::retry::{self, Effect, Refusal, Verdict};

/// How long to wait before asking a node again that refused to execute. An undone switchover gives
/// the rights back without telling the proxies, so somebody has to ask.
pub const PROBE_INTERVAL_US: u64 = 5_000;

/// How long requests at an old primary may keep the new epoch waiting. Past it the connection is
/// closed: its reads are asked again, its writes are answered "outcome unknown".
pub const SETTLE_LIMIT_US: u64 = 1_000_000;

/// The controller's order to hold a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldOrder {
    /// The task that asks for it.
    pub task_id: String,
    /// The gate releases by itself after this time.
    pub max_hold_us: u64,
}

/// What happened to a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The topology names the primary of `epoch`, and perhaps wants requests held.
    Route { epoch: u64, hold: Option<HoldOrder> },
    /// A reply said that its command was not executed.
    Refused(Refusal),
    /// A reply was delivered while the gate was closed.
    Executed,
    /// Nothing is in flight any more.
    Settled,
    /// The connection to the primary of the current epoch is logged in.
    LinkUp,
    /// That connection is gone; nothing is in flight.
    LinkDown,
    /// New requests wait for answers to earlier ones, or no longer do.
    Pause(bool),
    /// A deadline may have passed.
    Tick,
}

/// What the owner of the gate must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell the controller.
    Report(Level),
    /// Leave the old primary and connect to the one of the current epoch. Nothing is in flight.
    Switch,
    /// Send everything that waits: the retry queue, then the held queue.
    Drain,
    /// Send only the oldest waiting request; if there is none, step with [`Event::Executed`].
    Probe,
    /// Close the connection to the old primary: its replies take too long.
    Abandon,
}

/// What the gate has reached, for the controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Level {
    /// New requests wait and none is in flight.
    Held { epoch: u64, task_id: String },
    /// Requests go to the primary of this epoch.
    Applied { epoch: u64 },
}

/// A short list of actions.
pub type Actions = SmallVec<[Action; 4]>;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Order {
    task_id: String,
    until_us: u64,
}

/// What is known about a primary that refuses to execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fence {
    None,
    /// Seen; requests sent before are still in flight.
    Settling,
    /// Waiting for a new epoch, or for the time to ask again.
    Waiting {
        probe_at_us: u64,
    },
    /// One request is on its way to find out.
    Probing,
}

/// Decides when requests of one shard pass. One per worker, shard and protocol version.
#[derive(Clone, Debug)]
pub struct ShardGate {
    epoch: u64,
    order: Option<Order>,
    /// A hold that was ended here by its time limit and must not start again.
    expired_task: Option<String>,
    fence: Fence,
    /// Requests of an older epoch are in flight until then.
    settle_until_us: Option<u64>,
    abandoned: bool,
    link: Link,
    paused: bool,
    reported: Option<Level>,
    admits: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    Up,
}

impl Default for ShardGate {
    fn default() -> Self {
        Self::new()
    }
}

impl ShardGate {
    /// A gate that knows no route yet: closed.
    #[must_use]
    pub fn new() -> Self {
        Self {
            epoch: 0,
            order: None,
            expired_task: None,
            fence: Fence::None,
            settle_until_us: None,
            abandoned: false,
            link: Link::Down,
            paused: false,
            reported: None,
            admits: false,
        }
    }

    /// True if a new request may be sent at once. One load: this is on the path of each command.
    #[inline]
    #[must_use]
    pub fn admits(&self) -> bool {
        self.admits
    }

    /// The highest epoch that was routed.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// True while a hold order is in force here.
    #[must_use]
    pub fn is_ordered_to_hold(&self) -> bool {
        self.order.is_some()
    }

    /// True if nothing but a pause keeps requests back: they go on with the next answer, or with the
    /// loss of the connection.
    #[must_use]
    pub fn only_pauses(&self) -> bool {
        self.paused && self.is_open()
    }

    /// Judges a reply in the light of what came before it on the same connection.
    #[must_use]
    pub fn judge(&self, reply: &[u8], effect: Effect, command: &[u8]) -> Verdict {
        match retry::classify(reply, effect, command) {
            Verdict::Deliver if self.fence == Fence::Settling && effect.repeatable() => {
                Verdict::ReadAgain
            }
            verdict => verdict,
        }
    }

    /// True while replies are to come of requests that were sent before a refusal was seen. A write
    /// that succeeds now ran after one that was refused: the rights came back in between. What of
    /// the same client waits to be sent again must then fail, for it would run in the wrong order.
    #[must_use]
    pub fn is_settling_refusals(&self) -> bool {
        self.fence == Fence::Settling
    }

    /// When to step with [`Event::Tick`].
    #[must_use]
    pub fn deadline_us(&self) -> Option<u64> {
        let probe = match self.fence {
            Fence::Waiting { probe_at_us } if self.may_probe() => Some(probe_at_us),
            _ => None,
        };
        let settle = self.settle_until_us.filter(|_| !self.abandoned);
        [self.order.as_ref().map(|o| o.until_us), settle, probe]
            .into_iter()
            .flatten()
            .min()
    }

    /// Takes one event. Total: an event that does not fit the state changes nothing.
    pub fn step(&mut self, event: Event, in_flight: usize, now_us: u64) -> Actions {
        let mut actions = Actions::new();
        let was_open = self.admits;
        match event {
            Event::Route { epoch, hold } => {
                self.route(epoch, hold, in_flight, now_us, &mut actions)
            }
            Event::Refused(_) => self.refused(in_flight, now_us),
            Event::Executed if self.fence == Fence::Probing => self.fence = Fence::None,
            Event::Executed => {}
            Event::Settled => {}
            Event::LinkUp => self.link = Link::Up,
            Event::LinkDown => self.link_down(),
            Event::Pause(paused) => self.paused = paused,
            Event::Tick => self.tick(now_us, &mut actions),
        }
        if in_flight == 0 {
            self.settle(now_us, &mut actions);
        }
        self.report(in_flight, &mut actions);
        self.admits = self.is_open() && !self.paused;
        if self.admits && !was_open {
            actions.push(Action::Drain);
        } else if let Fence::Waiting { probe_at_us } = self.fence
            && probe_at_us <= now_us
            && self.may_probe()
        {
            self.fence = Fence::Probing;
            actions.push(Action::Probe);
        }
        actions
    }

    fn is_open(&self) -> bool {
        self.link == Link::Up
            && self.order.is_none()
            && self.fence == Fence::None
            && self.settle_until_us.is_none()
    }

    fn may_probe(&self) -> bool {
        self.link == Link::Up
            && self.order.is_none()
            && self.settle_until_us.is_none()
            && !self.paused
    }

    fn route(
        &mut self,
        epoch: u64,
        hold: Option<HoldOrder>,
        in_flight: usize,
        now_us: u64,
        actions: &mut Actions,
    ) {
        if epoch < self.epoch {
            return; // never back: the older primary may be fenced or gone
        }
        if epoch > self.epoch {
            self.epoch = epoch;
            self.expired_task = None;
            self.order = None;
            self.link = Link::Down;
            if in_flight > 0 {
                // Keep what is known about the fence: it judges the replies that are still to come.
                self.settle_until_us = Some(now_us + SETTLE_LIMIT_US);
                self.abandoned = false;
            } else {
                self.fence = Fence::None;
                self.settle_until_us = None;
                self.paused = false;
                actions.push(Action::Switch);
            }
        }
        match hold {
            None => {
                self.order = None;
                self.expired_task = None;
                // Withdrawn: the rights are back, or soon; ask at once.
                if let Fence::Waiting { probe_at_us } = &mut self.fence {
                    *probe_at_us = now_us;
                }
            }
            Some(hold) if self.expired_task.as_deref() == Some(hold.task_id.as_str()) => {}
            Some(hold)
                if self
                    .order
                    .as_ref()
                    .is_some_and(|o| o.task_id == hold.task_id) => {}
            Some(hold) => {
                let until_us = now_us.saturating_add(hold.max_hold_us);
                self.order = Some(Order {
                    task_id: hold.task_id,
                    until_us,
                });
            }
        }
    }

    fn refused(&mut self, in_flight: usize, now_us: u64) {
        self.fence = match self.fence {
            _ if in_flight == 0 => Fence::Waiting {
                probe_at_us: now_us + PROBE_INTERVAL_US,
            },
            _ => Fence::Settling,
        };
    }

    fn link_down(&mut self) {
        self.link = Link::Down;
        self.paused = false;
        // A new connection starts anew; if the node still refuses, it will say so again.
        self.fence = Fence::None;
    }

    fn tick(&mut self, now_us: u64, actions: &mut Actions) {
        if self.order.as_ref().is_some_and(|o| o.until_us <= now_us) {
            self.expired_task = self.order.take().map(|o| o.task_id);
        }
        if self.settle_until_us.is_some_and(|until| until <= now_us) && !self.abandoned {
            self.abandoned = true;
            actions.push(Action::Abandon);
        }
    }

    /// Nothing is in flight: what was waiting for that can go on.
    fn settle(&mut self, now_us: u64, actions: &mut Actions) {
        if self.settle_until_us.take().is_some() {
            self.fence = Fence::None;
            self.abandoned = false;
            self.link = Link::Down;
            self.paused = false;
            actions.push(Action::Switch);
        }
        if self.fence == Fence::Settling {
            self.fence = Fence::Waiting {
                probe_at_us: now_us + PROBE_INTERVAL_US,
            };
        }
    }

    fn report(&mut self, in_flight: usize, actions: &mut Actions) {
        let level = match &self.order {
            _ if self.epoch == 0 || self.settle_until_us.is_some() => return,
            Some(_) if in_flight > 0 => return,
            Some(order) => Level::Held {
                epoch: self.epoch,
                task_id: order.task_id.clone(),
            },
            None => Level::Applied { epoch: self.epoch },
        };
        if self.reported.as_ref() != Some(&level) {
            self.reported = Some(level.clone());
            actions.push(Action::Report(level));
        }
    }
}

#[cfg(test)]
mod tests;
