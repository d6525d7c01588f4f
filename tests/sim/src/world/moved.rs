//! What must hold of nodes that come and go, and of what they leave behind.
//!
//! Invariant: what is judged is what processes really allow and have, not what anybody reports of them.

use slotmesh_task::{Spec, State as TaskState, Task};
use slotmesh_topology::{Shard, credential};

use super::World;
use crate::{
    ctx::Event,
    msg::Party,
    plan::{Kept, Script},
};

impl World {
    /// Its agent ends a node that has left its shard, or whose instance is removed; its data goes, too.
    pub(super) fn remove(&mut self, node: usize) {
        self.note_wiped(node);
        self.crash_node(node, Kept::All);
        self.nodes[node].discard();
    }

    /// What a node has that the present primary does not have is about to be gone.
    pub(super) fn note_wiped(&self, node: usize) {
        let of = self.nodes[node].shard;
        let record = self.shards().find(|s| s.index as usize == of);
        let primary = record.and_then(|s| {
            let named = self.nodes.iter().find(|n| s.primary.as_str() == n.name)?;
            named.process.as_ref()
        });
        let mut ctx = self.ctx.borrow_mut();
        // What stands still can't be asked.
        let asleep = ctx.is_asleep(Party::Node(node));
        if let (Some(process), Some(primary), false) = (&self.nodes[node].process, primary, asleep)
        {
            let beyond = process.beyond(&primary.log);
            ctx.checks.wiped(&self.nodes[node].name, &beyond);
        }
    }

    /// A host that was lost for good with what nobody else has, or with a node that an operator did not
    /// want replaced, is brought back by an operator in the end.
    pub(super) fn bring_back(&self) {
        let mut wanted: Vec<String> = self.shards().map(|s| s.primary.to_string()).collect();
        wanted.extend(self.tasks().filter_map(|t| match &t.spec {
            Spec::Replace(r) if t.cancel_requested => Some(r.from.to_string()),
            _ => None,
        }));
        let named = self.nodes.iter().filter(|n| wanted.contains(&n.name));
        let mut ctx = self.ctx.borrow_mut();
        for host in named.map(|n| n.host) {
            let now = ctx.now();
            for party in [Party::Agent(host), Party::Fencer(host)] {
                ctx.queue.at(now, Event::Script(Script::Restart(party)));
            }
        }
    }

    /// Nothing is left of nodes that have left, but where nobody is who could see to that.
    pub(super) fn has_let_go(&self, shard: &Shard) -> bool {
        let ctx = self.ctx.borrow();
        let is_there = |host: &str| {
            let host = host.strip_prefix('h').and_then(|h| h.parse().ok());
            host.is_some_and(|h| ctx.life(Party::Agent(h)).is_some())
        };
        let gone = &shard.roster.gone;
        !gone.iter().any(|gone| is_there(gone.host.as_str()))
    }

    /// Who has left by the newest records is fed no more.
    pub(super) fn check_left(&self) {
        let left = std::mem::take(&mut self.ctx.borrow_mut().checks.left);
        for (shard, name) in left {
            let Some(record) = self.shards().find(|s| s.index as usize == shard) else {
                continue;
            };
            let Some(named) = record.primary_member() else {
                continue;
            };
            let node = self.nodes.iter().find(|n| n.name == named.node.as_str());
            let process = node.and_then(|n| n.process.as_ref());
            let Some(process) = process.filter(|p| p.run_id == named.run_id) else {
                continue;
            };
            let user = credential::replica_name(record.epoch, &name.as_str().into());
            let is_fed = process.followers.values().any(|f| f.user == user);
            if is_fed || process.users.contains_key(&user) {
                let how = format!("{user} of {} (fed: {is_fed})", named.node);
                let rule = "R2: who leaves a shard is fed no more";
                self.ctx.borrow_mut().checks.fail(rule, || how);
            }
        }
    }

    /// At the end: every process belongs to a member, or to a host without an agent; a replacement that
    /// did not happen has left nothing.
    pub(super) fn check_strangers(&self) {
        let named = |name: &str| {
            self.shards()
                .any(|s| s.members.iter().any(|m| m.node.as_str() == name))
        };
        // Whose host has just come back: it will be told.
        let awaited = |name: &str| {
            self.shards()
                .any(|s| s.roster.gone.iter().any(|g| g.node.as_str() == name))
        };
        let strangers = self.nodes.iter().filter(|n| n.process.is_some());
        let mut ctx = self.ctx.borrow_mut();
        let stranger = strangers.into_iter().find(|n| {
            let looked_after = ctx.life(Party::Agent(n.host)).is_some();
            looked_after && !named(&n.name) && !awaited(&n.name)
        });
        if let Some(stranger) = stranger {
            ctx.checks.fail("R3: of who has left nothing runs on", || {
                stranger.name.clone()
            });
        }
        let taken = |task: &Task| {
            let joiner = |t: &Task| match &t.spec {
                Spec::Replace(r) => Some(r.to.clone()),
                _ => None,
            };
            let mut others = self.tasks().filter(|t| t.id != task.id);
            others.any(|t| joiner(&t) == joiner(task))
        };
        let half = self.tasks().find_map(|t| match &t.spec {
            Spec::Replace(r) => {
                let has = |node: &str| named(node);
                let (from, to) = (has(r.from.as_str()), has(r.to.as_str()));
                let is_half = match t.state {
                    TaskState::Done => from,
                    // Its name was not taken, so another replacement has it.
                    TaskState::RolledBack | TaskState::Cancelled => to && !taken(&t),
                    _ => false,
                };
                is_half.then(|| format!("{}: {:?}, from {from}, to {to}", t.id, t.state))
            }
            _ => None,
        });
        if let Some(half) = half {
            ctx.checks.fail(
                "R4: a replacement is done, or has left nothing behind",
                || half,
            );
        }
    }
}
