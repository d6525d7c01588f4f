//! A world in which one task runs and one thing goes wrong, at one of its steps.
//!
//! Invariant: until then nothing goes wrong, and after it nothing more.

use slotmesh_task::{Spec, State as TaskState};

use super::{CALM_DOWN_LIMIT, LIVENESS, PROVISION_LIMIT, World};
use crate::{
    Trace,
    ctx::{Ctx, Event, Tamper},
    matrix::{self, Cell, End, Fault, GONE, Kind, LATE, Role, STALL},
    msg::Party,
    plan::{Kept, Script},
    sched::{MS, SEC},
};

/// Seed of every cell.
const SEED: u64 = 4_711;
/// Chooses the first replica of all shards.
const FIRST_REPLICA: u64 = 0;

impl World {
    /// The mesh of a cell, with nothing started.
    pub(crate) fn staged(_: Cell, trace: Trace) -> Self {
        Self::of(matrix::shape(), Ctx::new(SEED, matrix::VARIANT, trace))
    }

    /// Runs a cell to its end.
    pub(crate) fn stage(mut self, cell: Cell) -> (End, Vec<String>) {
        self.start();
        if cell.kind == Kind::Provision {
            self.arm(cell);
        }
        let provisioned = self.until(PROVISION_LIMIT, "provisioning: it serves", Self::serves);
        if provisioned {
            for client in &mut self.clients {
                client.start(&mut self.ctx.borrow_mut());
            }
            self.wait(SEC + SEC / 2);
            if cell.kind != Kind::Provision {
                self.arm(cell);
            }
            let now = self.ctx.borrow().now();
            let script = match cell.kind {
                Kind::Provision => None,
                Kind::Switchover => Some(Script::SwitchOver {
                    choice: FIRST_REPLICA,
                    token: 1,
                }),
                Kind::Failover => Some(Script::CrashNode(0, Kept::All)),
            };
            if let Some(script) = script {
                self.ctx.borrow_mut().queue.at(now, Event::Script(script));
            }
            self.wait(400 * MS);
            // What is late or stands still is over by then.
            if cell.fault.is_some() {
                self.wait(STALL + SEC);
            }
            if self.until(CALM_DOWN_LIMIT, LIVENESS, Self::is_calm) {
                self.wait(300 * MS);
                self.check_end();
            }
        }
        let states: Vec<TaskState> = (self.tasks())
            .filter(|t| match cell.kind {
                Kind::Provision => matches!(t.spec, Spec::Provision),
                Kind::Switchover => matches!(t.spec, Spec::Switchover(_)),
                Kind::Failover => matches!(t.spec, Spec::Failover(_)),
            })
            .map(|t| t.state)
            .collect();
        let ctx = self.ctx.borrow();
        let end = End {
            violation: ctx.checks.violation.clone(),
            reached: ctx.points.iter().all(|(_, left, _)| *left == 0),
            states,
            longest: self.clients.iter().map(|c| c.longest).max().unwrap_or(0),
        };
        (end, ctx.trace.lines())
    }

    fn arm(&mut self, cell: Cell) {
        if let Some((role, fault)) = cell.fault {
            let script = Script::Befall(role, fault);
            let (point, passes) = cell.step;
            self.ctx.borrow_mut().points.push((point, passes, script));
        }
    }

    fn wait(&mut self, time: u64) {
        let end = self.ctx.borrow().now() + time;
        self.until(time + SEC, "time passes", |w| w.ctx.borrow().now() >= end);
    }

    /// The fault of a cell.
    pub(super) fn befall(&mut self, role: Role, fault: Fault) {
        let leader = self.controllers.iter().position(|c| c.believes().is_some());
        let leader = leader.unwrap_or(0);
        let party = match role {
            Role::Leader => Party::Controller(leader),
            Role::Follower => Party::Controller((leader + 1) % self.controllers.len()),
            Role::OldAgent => Party::Agent(0),
            Role::NewAgent => Party::Agent(1),
            Role::OldPrimary => Party::Node(0),
            Role::Target => Party::Node(1),
            Role::Proxy => Party::Proxy(0),
            Role::Store => Party::Store,
        };
        let tamper = |tamper| self.ctx.borrow_mut().tampers.push((party, tamper));
        match fault {
            Fault::Lose => tamper(Tamper::Lose),
            Fault::Repeat => tamper(Tamper::Repeat),
            Fault::Delay => tamper(Tamper::Delay(LATE)),
            Fault::Stall => self.stall(party, STALL),
            Fault::Kill => match party {
                Party::Node(node) => self.crash_node(node, Kept::All),
                Party::Store => self.store.elect(&mut self.ctx.borrow_mut(), GONE),
                party => self.crash(party, GONE),
            },
        }
    }
}
