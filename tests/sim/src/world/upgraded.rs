//! What happens to processes and hosts where nodes get another engine, and what must hold then.
//!
//! Invariant: what is judged is what the store says at the moment, and what processes really have.

use slotmesh_task::{Spec, State as TaskState};
use slotmesh_topology::assignment;

use super::World;
use crate::{
    controller::Ask,
    ctx::Event,
    msg::Party,
    node::Ending,
    plan::{Kept, Script},
    redis::LinkState,
    sched::{MS, Micros, SEC},
    store::{Key, Value},
};

/// Between two questions of an operator who drains a host.
const DRAIN_LOOK: Micros = 200 * MS;
/// A host without primaries is down for so long.
const MAINTENANCE: Micros = 2 * SEC;

impl World {
    /// A node's process ends in order, because its agent wants another engine's.
    pub(super) fn end_process(&mut self, node: usize, life: u64, ending: Ending) {
        if self.ctx.borrow().life(Party::Node(node)) != Some(life) {
            return;
        }
        if self.stalled.contains_key(&Party::Node(node)) {
            // It hears of it when it goes on.
            return self.soon(50 * MS, Script::End(node, life, ending));
        }
        self.check_free(node);
        if ending == Ending::Discard {
            self.note_wiped(node);
        }
        self.nodes[node].end(&mut self.ctx.borrow_mut(), ending);
    }

    /// Nobody counts on a process that is ended in order.
    fn check_free(&self, node: usize) {
        let node = &self.nodes[node];
        let Some(process) = &node.process else { return };
        let record = self.shards().find(|s| s.index as usize == node.shard);
        let Some(record) = record else { return };
        let name = node.name.as_str().into();
        let named = record.member(&name).filter(|m| m.run_id == process.run_id);
        let is_primary = named.is_some() && record.primary == name;
        let is_in_sync = named.is_some_and(|m| m.in_sync);
        if is_primary || is_in_sync || process.writable_as().is_some() {
            let how = format!("{name}: primary {is_primary}, in sync {is_in_sync}");
            let rule = "U1: no process makes way that its shard counts on";
            self.ctx.borrow_mut().checks.fail(rule, || how);
        }
    }

    pub(super) fn soon(&self, after: Micros, script: Script) {
        let mut ctx = self.ctx.borrow_mut();
        let at = ctx.now() + after;
        ctx.queue.at(at, Event::Script(script));
    }

    /// A client of the shard uses what only newer engines have.
    pub(super) fn write_newer(&mut self, shard: usize) {
        let of_shard = self.nodes.iter_mut().filter(|n| n.shard == shard);
        of_shard
            .into_iter()
            .for_each(|n| n.write_newer(&mut self.ctx.borrow_mut()));
    }

    /// An operator takes the primaries off a host, and then the host down.
    pub(super) fn drain(&mut self, host: usize, tries: u32) {
        let name = format!("h{host}");
        let is_there = |s: &slotmesh_topology::Shard| {
            s.primary_member().is_some_and(|m| m.host.as_str() == name)
        };
        let busy = self.shards().any(|s| is_there(&s));
        let under_way = self.tasks().any(|t| !t.state.is_ended());
        match (busy || under_way, tries) {
            (false, _) => {
                for node in self.shape.nodes_of(host) {
                    self.crash_node(node, Kept::All);
                }
                self.crash(Party::Agent(host), MAINTENANCE);
                self.crash(Party::Fencer(host), MAINTENANCE);
            }
            // He gives up.
            (true, 0) => {}
            (true, _) => {
                let token = self.ctx.borrow_mut().call();
                self.ask(&Ask::Drain { host, token });
                self.soon(DRAIN_LOOK, Script::Drain(host, tries - 1));
            }
        }
    }

    /// Whoever follows has what its primary has: nobody has refused something and is counted on.
    pub(super) fn check_followers(&self) {
        let process = |name: &str| {
            let node = self.nodes.iter().find(|n| n.name == name)?;
            node.process.as_ref()
        };
        for shard in self.shards() {
            let Some(primary) = process(shard.primary.as_str()) else {
                continue;
            };
            let others = shard.members.iter().filter(|m| m.node != shard.primary);
            for member in others.filter(|m| m.in_sync) {
                // One that has just been told to follow is about to ask for what it lacks.
                let follower = process(member.node.as_str());
                let Some(follower) = follower.filter(|f| f.link == LinkState::Up) else {
                    continue;
                };
                let pairs = follower.log.iter().zip(&primary.log);
                let mut ctx = self.ctx.borrow_mut();
                for (has, wrote) in pairs.filter(|(has, wrote)| has != wrote) {
                    ctx.checks.differ(member.node.as_str(), has, wrote);
                }
            }
        }
    }

    /// Every node runs what its record says, and is exchanged no more.
    pub(super) fn check_engines(&self) {
        let Some(instance) = self.controllers.iter().find_map(|c| c.first_instance()) else {
            return;
        };
        let mut instance = (*instance).clone();
        if let Some(Value::Engine(engine)) = self.store.items.get(&Key::Engine).map(|s| &s.value) {
            engine.clone_into(&mut instance.engine);
        }
        let mut ctx = self.ctx.borrow_mut();
        for shard in self.shards() {
            for member in &shard.members {
                let node = self.nodes.iter().find(|n| n.name == member.node.as_str());
                let Some(process) = node.and_then(|n| n.process.as_ref()) else {
                    continue;
                };
                let wanted = assignment::engine(&instance, member);
                if process.engine != wanted || member.exchange.is_some() {
                    let how = format!(
                        "{} runs {:?}, is to run {wanted:?} ({:?})",
                        member.node, process.engine, member.exchange
                    );
                    ctx.checks
                        .fail("U4: in the end every node runs what is recorded", || how);
                }
            }
        }
        let last = self.tasks().filter_map(|t| match t.spec {
            Spec::Upgrade(upgrade) => Some((t.created_ms, t.state, upgrade)),
            _ => None,
        });
        let Some((_, state, upgrade)) = last.max_by_key(|(at, ..)| *at) else {
            return;
        };
        let runs = |engine: &str| {
            let named = |n: &&crate::node::Node| {
                self.shards()
                    .any(|s| s.members.iter().any(|m| m.node.as_str() == n.name))
            };
            let live = self.nodes.iter().filter(named);
            live.filter_map(|n| n.process.as_ref())
                .all(|p| p.engine == engine)
        };
        let wrong = match state {
            TaskState::Done => !runs(&upgrade.engine),
            TaskState::RolledBack | TaskState::Cancelled => !runs(&upgrade.from_engine),
            _ => false,
        };
        if wrong {
            ctx.checks.fail(
                "U5: an upgrade is done, or has left everything as it was",
                || format!("{state:?} of {}", upgrade.engine),
            );
        }
    }
}
