//! How many replicas must say what they had, where writes are acknowledged once some of them have them.
//!
//! Invariant: a member is left out of account only where it is certain that it has confirmed no write
//! of the lost epoch.

use slotmesh_topology::{Member, NodeRole};

use super::{View, is_final};
use crate::{detect, observe::NodeView};

/// Of the members other than the lost primary: how many may have confirmed something, and of how many
/// of them the answer is needed, so that every set of as many as confirm a write has one of them.
pub(super) fn needed(view: &View<'_>, finals: &[(&Member, &NodeView)]) -> (usize, usize) {
    let (from, durability) = (&view.failover.from, view.scene.durability as usize);
    let others = view.shard.members.iter().filter(|m| m.node != *from);
    let replicas = others.filter(|m| !is_new(view, m, finals)).count();
    (replicas, (replicas + 1).saturating_sub(durability).max(1))
}

/// A member that is still about to get its first copy: one that replaces another may take long for
/// it. Nobody follows before the record names its process; and a process that has followed the lost
/// primary has its history, as those have that were in sync with it. Of an earlier process nobody
/// could say that.
fn is_new(view: &View<'_>, member: &Member, finals: &[(&Member, &NodeView)]) -> bool {
    if member.in_sync || !view.shard.roster.newcomers.contains(&member.node) {
        return false;
    }
    if member.run_id.is_empty() {
        return true;
    }
    let Some(seen) = detect::alive(member, view.scene) else {
        return false;
    };
    // A replica that detached has kept its primary's history; one that was promoted has another.
    let mut kept = finals
        .iter()
        .filter(|(_, other)| other.role == Some(NodeRole::Replica) && other.detached)
        .map(|(_, other)| other.replid.as_str())
        .peekable();
    let is_known = kept.peek().is_some() && !seen.replid.is_empty();
    let is_foreign = |replid: &str| !replid.is_empty() && replid != seen.replid;
    is_known && is_final(view, member, seen) && kept.all(is_foreign)
}

#[cfg(test)]
#[path = "quorum_tests.rs"]
mod tests;
