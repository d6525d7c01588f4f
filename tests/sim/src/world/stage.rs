//! A world in which one task runs and one thing goes wrong, at one of its steps.
//!
//! Invariant: until then nothing goes wrong, and after it nothing more.

use slotmesh_task::{Choice, Spec, Task, upgrade::UpgradePhase};

use super::{CALM_DOWN_LIMIT, LIVENESS, PROGRESSES, PROVISION_LIMIT, World};
use crate::{
    Trace,
    ambush::{Deed, Leg, Message, Tamper},
    controller::Ask,
    ctx::Ctx,
    matrix::{self, Cell, End, Fault, GONE, Kind, LATE, Moment, Role, STALL, What},
    msg::Party,
    plan::{Kept, Script},
    sched::{MS, Micros, SEC},
    store::Key,
};

/// Seed of every cell.
const SEED: u64 = 4_711;
/// Chooses the first replica of all shards.
const FIRST_REPLICA: u64 = 0;
/// Choose the release that can't be gone back from, and a bake of 500 or of 2,400 ms.
const SHORT_BAKE: u64 = 21;
/// See above.
const LONG_BAKE: u64 = 97;
/// Between two looks of an operator for the bake are 100 ms: a stalled party and a lease later it has
/// begun.
const BAKE_LOOKS: usize = 150;
/// An operator who drains a host looks every 200 ms.
const DRAIN_LOOKS: u32 = 100;
/// For so long clients are served before anything happens.
const QUIET: Micros = SEC / 2;
/// Clients go on within this time after everything has ended.
const GO_ON: Micros = 6 * SEC;

impl World {
    /// The mesh of a cell, with nothing started.
    pub(crate) fn staged(kind: Kind, trace: Trace) -> Self {
        Self::of(matrix::shape(kind), Ctx::new(SEED, matrix::VARIANT, trace))
    }

    /// Runs a cell to its end.
    pub(crate) fn stage(mut self, cell: Cell) -> (End, Vec<String>) {
        self.start();
        let mut by_operator = false;
        if cell.kind == Kind::Provision {
            self.arm(cell);
        }
        if self.until(PROVISION_LIMIT, "provisioning: it serves", Self::serves) {
            for client in &mut self.clients {
                client.start(&mut self.ctx.borrow_mut());
            }
            self.wait(QUIET);
            if cell.kind != Kind::Provision {
                self.arm(cell);
            }
            self.begin(cell.kind);
            self.wait(400 * MS);
            match cell.kind {
                Kind::TakeBack => self.take_back(),
                // The host goes down, and comes back.
                Kind::Drain => self.wait(4 * SEC),
                _ => {}
            }
            // What is late, gone or stands still is over by then.
            self.wait(match cell.what {
                What::Calm | What::Message(_, Tamper::Repeat | Tamper::Fail) => 0,
                What::Fault(_, _, Fault::Stall) => STALL + SEC,
                _ => LATE + SEC,
            });
            // Who asked and got no answer asks again, with the same token.
            if self.tasks_of(cell.kind).is_empty() && cell.kind != Kind::Drain {
                self.begin(cell.kind);
                self.wait(400 * MS);
            }
            let comes_to_rest = |w: &Self| w.is_calm() || w.waits_for_operator();
            if self.until(CALM_DOWN_LIMIT, LIVENESS, comes_to_rest) {
                by_operator = !self.is_calm();
                if by_operator {
                    self.resolve();
                }
                if self.until(CALM_DOWN_LIMIT, LIVENESS, Self::is_calm) {
                    self.rest(cell.kind);
                }
            }
        }
        let now = self.ctx.borrow().now();
        let mut longest: Vec<Micros> = vec![0; self.shape.proxies];
        for client in &mut self.clients {
            client.count_unanswered(now);
            for (all, here) in longest.iter_mut().zip(&client.by_proxy) {
                *all = (*all).max(*here);
            }
        }
        let states = self.tasks_of(cell.kind).iter().map(|t| t.state).collect();
        let mut ctx = self.ctx.borrow_mut();
        let end = End {
            violation: ctx.checks.violation.clone(),
            reached: ctx.ambushes.are_met() && ctx.points.iter().all(|(_, left, _)| *left == 0),
            states,
            by_operator,
            longest,
            messages: std::mem::take(&mut ctx.ambushes.passed),
        };
        (end, ctx.trace.lines())
    }

    /// What an operator asks for, or what happens.
    fn begin(&mut self, kind: Kind) {
        match kind {
            Kind::Provision => {}
            Kind::Switchover => self.ask(&Ask::SwitchOver {
                choice: FIRST_REPLICA,
                token: 1,
            }),
            Kind::Failover => self.crash_node(0, Kept::All),
            Kind::Decommission => self.ask(&Ask::Decommission),
            Kind::Replace => self.ask(&Ask::Move {
                choice: FIRST_REPLICA,
                token: 1,
            }),
            Kind::Upgrade => self.ask(&Ask::Upgrade {
                choice: SHORT_BAKE,
                token: 1,
            }),
            Kind::TakeBack => self.ask(&Ask::Upgrade {
                choice: LONG_BAKE,
                token: 1,
            }),
            Kind::Drain => self.drain(0, DRAIN_LOOKS),
        }
    }

    /// An operator's word to what waits for one. That it loses nothing here is checked as ever.
    fn resolve(&mut self) {
        self.ctx.borrow_mut().checks.anybody_may_lead = true;
        for choice in [Choice::Retry, Choice::AcceptLoss] {
            self.ask(&Ask::Choose(choice));
            self.wait(MS);
        }
    }

    /// An operator wants it undone as soon as the primary runs the next engine.
    fn take_back(&mut self) {
        for _ in 0..BAKE_LOOKS {
            let mut parts = self.tasks().filter_map(|t| match t.spec {
                Spec::Upgrade(upgrade) => upgrade.shards.into_iter().next(),
                _ => None,
            });
            let is_due = |phase: UpgradePhase| phase == UpgradePhase::Bake || phase.is_ended();
            if parts.any(|part| is_due(part.phase)) {
                break;
            }
            drop(parts);
            self.wait(100 * MS);
        }
        self.ask(&Ask::Cancel);
    }

    fn tasks_of(&self, kind: Kind) -> Vec<Task> {
        let is_of = |t: &Task| match kind {
            Kind::Provision => matches!(t.spec, Spec::Provision),
            Kind::Switchover | Kind::Drain => matches!(t.spec, Spec::Switchover(_)),
            Kind::Upgrade | Kind::TakeBack => matches!(t.spec, Spec::Upgrade(_)),
            Kind::Failover => matches!(t.spec, Spec::Failover(_)),
            Kind::Decommission => matches!(t.spec, Spec::Decommission),
            Kind::Replace => matches!(t.spec, Spec::Replace(_)),
        };
        self.tasks().filter(is_of).collect()
    }

    /// What must hold once the task has ended.
    fn rest(&mut self, kind: Kind) {
        if kind == Kind::Decommission {
            return self.check_nothing_left();
        }
        let since = self.ctx.borrow().now();
        self.until(GO_ON, PROGRESSES, |w| w.progressed_since(since));
        self.wait(300 * MS);
        self.check_end();
    }

    fn check_nothing_left(&mut self) {
        let is_record = |key: &&Key| matches!(key, Key::Shard(_) | Key::Instance | Key::Lock(_));
        let record = self.store.items.keys().find(is_record).cloned();
        let node = self.nodes.iter().find(|n| n.process.is_some());
        let node = node.map(|n| n.name.clone());
        let mut ctx = self.ctx.borrow_mut();
        let proxy = (0..self.shape.proxies).find(|p| ctx.life(Party::Proxy(*p)).is_some());
        if record.is_some() || node.is_some() || proxy.is_some() {
            ctx.checks.fail("decommission: nothing is left", || {
                format!("record {record:?}, node {node:?}, proxy {proxy:?}")
            });
        }
    }

    fn arm(&mut self, cell: Cell) {
        let laid = match cell.what {
            What::Calm | What::Twice => None,
            What::Message(message, tamper) => Some((message, Deed::Tamper(tamper))),
            What::Fault(step, role, fault) => {
                let deed = match fault.tamper() {
                    Some(tamper) => Deed::Tamper(tamper),
                    None => Deed::Script(Script::Befall(cell.kind, role, fault)),
                };
                match (step.moment, deed) {
                    (Moment::At(point, times), Deed::Script(script)) => {
                        (self.ctx.borrow_mut().points).push((point, times, script));
                        None
                    }
                    (Moment::At(..), Deed::Tamper(_)) => None,
                    (moment, deed) => {
                        let message = self.message(cell.kind, moment);
                        message.map(|message| (message, deed))
                    }
                }
            }
        };
        let mut ctx = self.ctx.borrow_mut();
        ctx.ambushes.begin();
        if let Some((message, deed)) = laid {
            ctx.ambushes.lay(message, deed);
        }
        if cell.what == What::Twice {
            ctx.ambushes.lay_for_all(Tamper::Repeat);
        }
    }

    fn message(&self, kind: Kind, moment: Moment) -> Option<Message> {
        let Moment::Message {
            call,
            from,
            to,
            nth,
            is_answer,
        } = moment
        else {
            return None;
        };
        let (from, to) = (self.party(kind, from), self.party(kind, to));
        let (from, to) = if is_answer { (to, from) } else { (from, to) };
        Some(Message {
            leg: Leg {
                call,
                from,
                to,
                nth,
            },
            is_answer,
        })
    }

    fn wait(&mut self, time: u64) {
        let end = self.ctx.borrow().now() + time;
        self.until(time + SEC, "time passes", |w| w.ctx.borrow().now() >= end);
    }

    pub(crate) fn party(&self, kind: Kind, role: Role) -> Party {
        let leader = self.controllers.iter().position(|c| c.believes().is_some());
        // The first to come leads.
        let leader = leader.unwrap_or(0);
        // The last host has no node before, and gets the first that it can.
        let last = self.shape.hosts - 1;
        match role {
            Role::OldAgent if kind == Kind::Replace => Party::Agent(1),
            Role::NewAgent if kind == Kind::Replace => Party::Agent(last),
            Role::Target if kind == Kind::Replace => {
                Party::Node(self.shape.spare_of(last, 0).start)
            }
            Role::PrimaryAgent => Party::Agent(0),
            Role::OtherAgent => Party::Agent(2),
            Role::Other => Party::Node(2),
            Role::Leaver => Party::Node(1),
            Role::Leader => Party::Controller(leader),
            Role::Follower => Party::Controller((leader + 1) % self.controllers.len()),
            Role::OldAgent => Party::Agent(0),
            Role::NewAgent => Party::Agent(1),
            Role::OldPrimary => Party::Node(0),
            Role::Target => Party::Node(1),
            Role::Proxy => Party::Proxy(0),
            Role::Store => Party::Store,
        }
    }

    /// kill -9 or SIGSTOP.
    pub(super) fn befall(&mut self, kind: Kind, role: Role, fault: Fault) {
        let party = self.party(kind, role);
        match (fault, party) {
            (Fault::Stall, party) => self.stall(party, STALL),
            (_, Party::Node(node)) => self.crash_node(node, Kept::All),
            (_, Party::Store) => self.store.elect(&mut self.ctx.borrow_mut(), GONE),
            (_, party) => self.crash(party, GONE),
        }
    }
}
