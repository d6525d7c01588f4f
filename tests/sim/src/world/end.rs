//! What must hold once everything has come to rest, and what is told of a run.
//!
//! Invariant: every acknowledged write is accounted for: present, or dead with a process's data.

use std::collections::{BTreeMap, BTreeSet};

use slotmesh_task::{Phase, Spec, State as TaskState, Task};
use slotmesh_topology::Mode;

use super::{Outcome, PLANNED_LIMIT, WAIT_LIMIT, World};
use crate::{client::Client, plan::Profile};

impl World {
    pub(super) fn check_end(&mut self) {
        self.check_strangers();
        self.check_engines();
        self.check_followers();
        let mut ctx = self.ctx.borrow_mut();
        for shard in 0..self.shape.shards {
            let record = self.shards().find(|s| s.index as usize == shard);
            let primary = record.map(|r| r.primary.to_string()).unwrap_or_default();
            let node = self.nodes.iter().find(|n| n.name == primary);
            let Some(process) = node.and_then(|n| n.process.as_ref()) else {
                continue;
            };
            let mut seen = BTreeMap::new();
            for op in &process.log {
                *seen.entry(op.id).or_insert(0) += 1;
            }
            if let Some((id, times)) = seen.iter().find(|(_, times)| **times > 1) {
                ctx.checks.fail("A8: a write is executed once", || {
                    format!("write {id} is {times} times in {primary}")
                });
            }
        }
        let present: BTreeSet<u64> = self
            .nodes
            .iter()
            .filter(|n| self.shards().any(|s| s.primary.as_str() == n.name))
            .filter_map(|n| n.process.as_ref())
            .flat_map(|p| p.log.iter().map(|op| op.id))
            .collect();
        let fenced = self.shards().any(|s| s.mode != Mode::Serving);
        if !fenced {
            ctx.checks.look_for_captured(&present);
        }
        for client in &self.clients {
            let mut relied = client.acknowledged.iter().chain(&client.seen);
            let lost = relied.find(|id| {
                let known = [&present, &ctx.checks.lost, &ctx.checks.left_behind];
                known.iter().all(|set| !set.contains(id))
            });
            if let Some(id) = lost
                && !fenced
            {
                ctx.checks
                    .fail("A8/I5/I8: no acknowledged write is lost", || {
                        format!("write {id}")
                    });
            }
            let quiet = matches!(self.shape.profile, Profile::Calm | Profile::Blackout);
            let limit = if quiet { PLANNED_LIMIT } else { WAIT_LIMIT };
            ctx.checks
                .answered("a client's request", client.longest, limit);
            if quiet && let Some(error) = client.errors.first() {
                ctx.checks
                    .fail("A8: a planned change shows no client an error", || {
                        error.clone()
                    });
            }
        }
        let parked = self.tasks().find(super::waits);
        if let Some(task) = parked {
            ctx.checks.fail(
                "durable tasks: an operator's word ends what waits for it",
                || format!("{} {:?}", task.id, task.spec),
            );
        }
        if self.shape.profile == Profile::Calm
            && let Some(task) = self.tasks().find(|t| t.state != TaskState::Done)
        {
            ctx.checks
                .fail("A8: with nothing wrong, a switchover is done", || {
                    format!("{} {:?} {:?}", task.id, task.state, task.spec)
                });
        }
    }

    pub(super) fn outcome(self) -> Outcome {
        let phases: Vec<Phase> = self
            .tasks()
            .filter_map(|t| match t.spec {
                Spec::Switchover(switches) => Some(switches),
                _ => None,
            })
            .flatten()
            .map(|s| s.phase)
            .collect();
        let count = |phase| phases.iter().filter(|p| **p == phase).count();
        let sum = |of: fn(&Client) -> usize| self.clients.iter().map(of).sum();
        let replaced = |t: &Task| super::is_replacement(t) && t.state == TaskState::Done;
        let replaced = self.tasks().filter(replaced).count();
        let upgrades = |ended: &[TaskState]| {
            let upgrades = self.tasks().filter(super::is_upgrade);
            upgrades.filter(|t| ended.contains(&t.state)).count()
        };
        let back = upgrades(&[TaskState::RolledBack, TaskState::Cancelled]);
        let ctx = self.ctx.borrow();
        Outcome {
            violation: ctx.checks.violation.clone(),
            hash: ctx.trace.hash(),
            events: ctx.trace.events(),
            profile: self.shape.profile,
            moved: count(Phase::Done),
            returned: count(Phase::RolledBack),
            acknowledged: sum(|c| c.acknowledged.len()),
            ambiguous: sum(|c| c.ambiguous.len()),
            failovers: ctx.checks.failovers,
            replacements: (ctx.checks.replacements, replaced),
            upgrades: (ctx.checks.upgrades, upgrades(&[TaskState::Done]), back),
            elections: ctx.checks.elections,
            compacted: ctx.checks.compacted,
            left_behind: (self.clients.iter().flat_map(|c| &c.acknowledged))
                .filter(|id| ctx.checks.left_behind.contains(id))
                .count(),
            errors: sum(|c| c.errors.len()),
            longest: self.clients.iter().map(|c| c.longest).max().unwrap_or(0),
            lines: ctx.trace.lines(),
        }
    }
}
