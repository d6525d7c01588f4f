//! Which switchovers take the primaries off a host.
//!
//! Invariant: a shard that is busy, or that has no replica fit to be its primary on another host, is
//! left alone and named with the reason; nothing here makes a shard wait.

use std::collections::BTreeMap;

use slotmesh_topology::{HostId, InstanceId, Mode, NodeId, NodeRole, Shard, TaskId};

use crate::admit::SWITCHOVER_SHARDS_MAX;

/// What can be done for a host now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drain {
    /// The next primaries, by instance; at most as many for each as one switchover takes.
    pub moves: BTreeMap<InstanceId, Vec<NodeId>>,
    /// Primaries that stay for now.
    pub stays: Vec<Stay>,
    /// Shards with a node on the host that a task has now: while one has, the host is of use to it.
    pub busy: usize,
}

/// A primary that can't be moved now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stay {
    /// Its instance.
    pub instance: InstanceId,
    /// Its shard.
    pub shard: String,
    /// The primary.
    pub node: NodeId,
    /// For people: why, and what helps.
    pub reason: String,
    /// Something is under way with its shard; a later look may find it gone.
    pub moving: bool,
}

impl Drain {
    /// Primaries of the host, those that can be moved and those that can't.
    #[must_use]
    pub fn primaries(&self) -> usize {
        self.stays.len() + self.moves.values().map(Vec::len).sum::<usize>()
    }
}

/// Looks at all shards. `task_of` names the task that has a shard's lock; `answers` says whether a host
/// has a session with a controller.
pub fn drain<'a>(
    shards: impl IntoIterator<Item = &'a Shard>,
    host: &HostId,
    task_of: impl Fn(&Shard) -> Option<TaskId>,
    answers: impl Fn(&HostId) -> bool,
) -> Drain {
    let shards: Vec<&Shard> = shards.into_iter().collect();
    let mut primaries_of: BTreeMap<&HostId, usize> = BTreeMap::new();
    for shard in &shards {
        if let Some(primary) = shard.member(&shard.primary) {
            *primaries_of.entry(&primary.host).or_default() += 1;
        }
    }
    let mut drain = Drain::default();
    for shard in shards {
        let task = task_of(shard);
        if task.is_some() && shard.members.iter().any(|m| m.host == *host) {
            drain.busy += 1;
        }
        let Some(primary) = shard.member(&shard.primary) else {
            continue;
        };
        if primary.host != *host {
            continue;
        }
        let mut stay = |reason: String, moving| {
            drain.stays.push(Stay {
                instance: shard.instance.clone(),
                shard: shard.id.to_string(),
                node: shard.primary.clone(),
                reason,
                moving,
            });
        };
        if let Some(task) = task {
            stay(format!("task {task} has its shard"), true);
            continue;
        }
        if shard.mode != Mode::Serving {
            stay(format!("its shard is {}", shard.mode.name()), true);
            continue;
        }
        let elsewhere = shard.members.iter().filter(|m| {
            m.role == NodeRole::Replica && m.host != *host && !m.leaving && m.priority > 0
        });
        let (fit, unfit): (Vec<_>, Vec<_>) = elsewhere.partition(|m| m.in_sync && answers(&m.host));
        // Who runs the engine of the primary: another one ends the upgrade. Then who is preferred by the
        // operator, and who has the fewest primaries already.
        let best = fit.into_iter().min_by_key(|m| {
            let load = primaries_of.get(&m.host).copied().unwrap_or_default();
            let is_older = shard.older(&m.node).is_some();
            (
                is_older,
                std::cmp::Reverse(m.priority),
                load,
                m.node.clone(),
            )
        });
        let Some(best) = best else {
            match unfit.is_empty() {
                true => stay(
                    "no replica on another host may be promoted: add one, or move one there \
                     (slotmesh node replace)"
                        .to_owned(),
                    false,
                ),
                false => stay(
                    "no replica on another host is in sync and answers".to_owned(),
                    true,
                ),
            }
            continue;
        };
        let moves = drain.moves.entry(shard.instance.clone()).or_default();
        if moves.len() >= SWITCHOVER_SHARDS_MAX {
            stay("it is moved after others of its instance".to_owned(), true);
            continue;
        }
        moves.push(best.node.clone());
        *primaries_of.entry(&best.host).or_default() += 1;
    }
    drain
}

#[cfg(test)]
#[path = "drain_tests.rs"]
mod tests;
