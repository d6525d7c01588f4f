//! When a node that leaves its shard has been let go: nobody feeds it, and nobody needs what it has.
//!
//! Invariant: what only the leaving node may have confirmed is with as many of those that stay as
//! durability asks for before it is left out.

use slotmesh_topology::{Member, NodeId, Shard, credential};

use crate::{
    detect::{self, Scene},
    observe::NodeView,
};

/// The primary's newest report, when that shows exactly those who may follow, and that its agent will
/// not let in anybody else any more: it has agreed with a record that is as new. `since_ms`: when the
/// record said so.
pub(crate) fn revoked<'a>(shard: &Shard, scene: Scene<'a>, since_ms: u64) -> Option<&'a NodeView> {
    let primary = shard.primary_member()?;
    let seen = detect::alive(primary, scene)?;
    let has = |node: &NodeId| {
        let name = credential::replica_name(shard.epoch, node);
        seen.replication_users.contains(&name)
    };
    let mut others = shard.members.iter().filter(|m| m.node != shard.primary);
    let is_as_recorded = others.all(|m| has(&m.node) != m.leaving);
    let is_new = seen.seen_ms > since_ms && !seen.loading;
    let agrees =
        seen.assigned_epoch == shard.epoch && seen.assigned_membership >= shard.roster.membership;
    (is_new && is_as_recorded && agrees).then_some(seen)
}

/// How many of those that stay have to have read up to `offset`, so that each set of nodes from which a
/// failover could choose has one of them; `None`: as many have.
pub(crate) fn lacking(shard: &Shard, scene: Scene<'_>, offset: u64) -> Option<usize> {
    let stay = || {
        let others = shard.members.iter().filter(|m| m.node != shard.primary);
        others.filter(|m| !m.leaving)
    };
    let has_it =
        |m: &&Member| m.in_sync && detect::alive(m, scene).is_some_and(|n| n.offset >= offset);
    let needed = stay().count().min(scene.durability as usize);
    (stay().filter(has_it).count() < needed).then_some(needed)
}
