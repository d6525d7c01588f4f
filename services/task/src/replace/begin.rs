//! Which node is to be replaced by itself, and the task that does it.
//!
//! Invariant: nothing is begun on silence of many hosts at once, for a primary, or while the primary
//! is not known to be well: its data is what the new node copies.

use slotmesh_topology::{HostId, Mode, NodeId, Shard, TaskId, TransitionError};

use super::CATCH_UP_MS_MAX;
use crate::{
    detect::{self, Scene, Verdict},
    spec::{NodeReplacement, ReplacePhase, Spec, State, Task},
};

/// A node whose host is gone for too long.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lost {
    /// Who.
    pub node: NodeId,
    /// Since when its host has no lease.
    pub since_ms: u64,
    /// What was seen.
    pub cause: String,
}

/// The node of the shard that should be replaced now. `spared` says whether an operator has ended a
/// replacement of a node since a time: then it is left to him.
#[must_use]
pub fn due(
    shard: &Shard,
    scene: Scene<'_>,
    replace_after_s: u32,
    spared: impl Fn(&NodeId, u64) -> bool,
) -> Option<Lost> {
    if replace_after_s == 0 || shard.mode != Mode::Serving || shard.epoch.0 == 0 {
        return None;
    }
    let after_ms = u64::from(replace_after_s) * 1_000;
    let others = shard.members.iter().filter(|m| m.node != shard.primary);
    let mut gone = others.filter_map(|m| {
        let since_ms = scene.sightings.lease_gone_since(&m.host)?;
        let is_due = scene.now_ms >= since_ms + after_ms && !spared(&m.node, since_ms);
        is_due.then_some((m, since_ms))
    });
    let (member, since_ms) = gone.next()?;
    if scene.sightings.brake().is_some() || detect::judge(shard, scene) != Verdict::Fine {
        return None;
    }
    Some(Lost {
        node: member.node.clone(),
        since_ms,
        cause: format!("{} has had no lease for {replace_after_s} s", member.host),
    })
}

/// The task that replaces `node` by one on `host`.
///
/// # Errors
/// When the record does not allow it.
pub fn plan(
    id: TaskId,
    shard: &Shard,
    node: &NodeId,
    host: &HostId,
    (cause, by_operator): (String, bool),
    now_ms: u64,
) -> Result<Task, TransitionError> {
    let refuse = |reason| TransitionError::Member {
        node: node.clone(),
        reason,
    };
    let member = shard
        .member(node)
        .ok_or_else(|| refuse("is not of this shard"))?;
    if *node == shard.primary {
        return Err(refuse(
            "is the primary: make another node the primary first (slotmesh switchover)",
        ));
    }
    let to = shard.next_node();
    shard.join(&to, host, member.role)?;
    let replacement = NodeReplacement {
        shard: shard.id.clone(),
        from: node.clone(),
        from_host: member.host.clone(),
        to,
        to_host: host.clone(),
        phase: ReplacePhase::Join,
        phase_since_ms: now_ms,
        message: String::new(),
        cause: cause.clone(),
        by_operator,
        turned_back: false,
        on_request: false,
        epoch: shard.epoch,
        drain_offset: 0,
    };
    Ok(Task {
        id,
        instance: shard.instance.clone(),
        spec: Spec::Replace(replacement),
        state: State::Running,
        message: cause,
        created_ms: now_ms,
        updated_ms: now_ms,
        deadline_ms: now_ms + CATCH_UP_MS_MAX,
        event_count: 0,
        cancel_requested: false,
        not_before_ms: 0,
        in_window: false,
        choice: None,
        trace_id: String::new(),
        copied: crate::spec::Copied::default(),
    })
}
