//! Which nodes a host has: those of its disk, and those that an assignment names for the first time.
//!
//! Invariant: as in the real supervisor, what an assignment does not name is left alone; a worker ends
//! only when its node is removed and no longer named.

use std::{cell::Cell, rc::Rc};

use slotmesh_proto::agent::v1::{Assignment, NodeReport, NodeSpec, ProcessState};

use super::{Agent, Host, Seat, worker};
use crate::{ctx::Event, fiber::Fiber, plan::Script};

impl Agent {
    /// Begins to look after a node.
    pub(super) fn look_after(&mut self, host: &Rc<Host>, seat: Seat) {
        let starting = NodeReport {
            node_id: seat.name.clone(),
            state: ProcessState::Starting.into(),
            ..NodeReport::default()
        };
        host.reports.borrow_mut().insert(seat.node, starting);
        let worker = worker::run(Rc::clone(host), seat);
        self.fibers.push(Fiber::new(worker));
    }

    /// Makes room for what is new, and forgets what is removed and named no more.
    pub(super) fn seat(&mut self, host: &Rc<Host>, assignment: &Assignment) {
        let named = |name: &str| assignment.nodes.iter().any(|spec| spec.node_id == name);
        let is_over = |seat: &Seat| host.is_removed(seat.node) && !named(&seat.name);
        let over: Vec<Seat> = (self.seats.borrow().iter())
            .filter(|seat| is_over(seat))
            .cloned()
            .collect();
        for seat in over {
            self.seats.borrow_mut().retain(|s| s.node != seat.node);
            host.reports.borrow_mut().remove(&seat.node);
            host.assigned.borrow_mut().remove(&seat.name);
        }
        for spec in &assignment.nodes {
            let is_known = (self.seats.borrow().iter()).any(|seat| seat.name == spec.node_id);
            if !is_known && let Some(seat) = self.spare_seat(spec) {
                self.seats.borrow_mut().push(seat.clone());
                self.look_after(host, seat);
            }
        }
    }

    fn spare_seat(&mut self, spec: &NodeSpec) -> Option<Seat> {
        let shard: usize = spec.shard_id.parse().ok()?;
        let at = self.spare.iter().position(|(of, _)| *of == shard);
        let mut ctx = self.world.borrow_mut();
        let Some(at) = at else {
            let name = spec.node_id.clone();
            ctx.checks
                .fail("model: a host has room for every node", || name);
            return None;
        };
        let (_, node) = self.spare.remove(at);
        let (now, name) = (ctx.now(), spec.node_id.clone());
        let script = Script::Name(node, name.clone());
        ctx.queue.at(now, Event::Script(script));
        Some(Seat {
            node,
            name,
            ran: Rc::new(Cell::new(false)),
            engine: Rc::default(),
        })
    }
}

impl Host {
    /// Its agent still looks after it.
    pub(crate) fn has(&self, node: usize) -> bool {
        self.seats.borrow().iter().any(|seat| seat.node == node)
    }
}
