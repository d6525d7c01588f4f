//! What must hold of nodes that get another engine.
//!
//! Invariant: what is judged is what records say one after the other, and what processes have refused.

use slotmesh_task::{
    Spec, Task,
    upgrade::{Upgrade, UpgradePhase},
    wire,
};
use slotmesh_topology::Shard;

use super::Checks;
use crate::{
    redis::{Kind, Op},
    sched::{MS, Micros},
    store::Value,
};

/// What was refused so shortly before a process makes way may not have been seen: a report counts for
/// 2 s, and then a decision has to be written and heard.
const UNSEEN: Micros = 3_000 * MS;

/// An upgrade's record, if it is one.
fn upgrade_of(value: &Value) -> Option<(Task, Upgrade)> {
    let Value::Task(record) = value else {
        return None;
    };
    let task = wire::task_from(record).ok()?;
    match task.spec.clone() {
        Spec::Upgrade(upgrade) => Some((task, upgrade)),
        _ => None,
    }
}

impl Checks {
    /// A process has refused a command of its primary: what it has is not what that one has.
    pub fn diverges(&mut self, run_id: &str, op: u64, now: Micros) {
        self.diverged.insert(run_id.to_owned());
        self.refused.insert(op, now);
    }

    /// It makes way with its data: what it has refused only now no report has said, which is known
    /// (docs/upgrades.md).
    pub fn makes_way(&mut self, log: &[Op], now: Micros) {
        let is_late = |op: &&Op| {
            let at = self.refused.get(&op.id);
            op.kind == Kind::Refused && at.is_some_and(|at| at + UNSEEN >= now)
        };
        self.unseen
            .extend(log.iter().filter(is_late).map(|op| op.id));
    }

    /// What a follower in sync has is not what its primary wrote, and somebody could have known.
    pub fn differ(&mut self, name: &str, has: &Op, wrote: &Op) {
        if !self.unseen.contains(&has.id) {
            self.fail(
                "U6: in the end who is in sync has what its primary has",
                || format!("{name} has {has:?} for {wrote:?}"),
            );
        }
    }

    /// It has copied all of it.
    pub fn is_whole(&mut self, run_id: &str) {
        self.diverged.remove(run_id);
    }

    /// A way back that is closed stays closed, until another switch is planned.
    pub(super) fn way_back(&mut self, old: Option<&Value>, new: &Value) {
        let pair = old.and_then(upgrade_of).zip(upgrade_of(new));
        let Some(((_, old), (task, new))) = pair else {
            return;
        };
        for part in &new.shards {
            let Some(before) = old.part(part.shard.as_str()) else {
                continue;
            };
            let (Some(was), Some(is)) = (&before.rollback, &part.rollback) else {
                continue;
            };
            let is_planned = before.phase == UpgradePhase::Switch && before.switch != part.switch;
            if !was.open && is.open && !is_planned {
                self.fail("U2: a way back that is closed stays closed", || {
                    format!("{} of shard {}: {}", task.id, part.shard, was.why)
                });
            }
        }
    }

    /// One node of a shard is exchanged at a time, never its primary; and nobody becomes one who has
    /// not what its primary had.
    pub(super) fn exchanges(&mut self, index: usize, old: &Shard, new: &Shard) {
        let making_way = |shard: &Shard| {
            let members = shard.members.iter().filter(|m| m.exchange.is_some());
            members.map(|m| m.node.clone()).collect::<Vec<_>>()
        };
        let (before, after) = (making_way(old), making_way(new));
        let begun = after.iter().any(|node| !before.contains(node));
        if after.contains(&new.primary) || (begun && after.len() > 1) {
            self.fail("U1: one replica makes way at a time", || {
                format!(
                    "shard {index}: {before:?} to {after:?}, primary {}",
                    new.primary
                )
            });
        }
        let Some(next) = new.primary_member().filter(|_| old.primary != new.primary) else {
            return;
        };
        if self.diverged.contains(&next.run_id) && !self.loss_was_accepted {
            self.fail(
                "U3: nobody becomes the primary who has refused a command of the last one",
                || format!("shard {index}: {} in epoch {}", next.node, new.epoch),
            );
        }
    }

    /// Whether the task gives its shard free without having ended: while it bakes, and while it waits
    /// for an operator, or for a host that is lost.
    pub(super) fn frees(task: &Value, shard: usize) -> bool {
        let part = upgrade_of(task).and_then(|(_, u)| u.part(&shard.to_string()).cloned());
        part.is_some_and(|part| {
            let rests = matches!(part.phase, UpgradePhase::Bake | UpgradePhase::Parked);
            let is_lost = part.message.starts_with("waiting for the lost host ");
            rests || is_lost || part.phase.is_ended()
        })
    }
}
