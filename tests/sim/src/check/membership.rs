//! What must hold of nodes that join a shard and leave it.
//!
//! Invariant: what is judged is what records say one after the other, and what processes allow.

use std::collections::BTreeSet;

use slotmesh_topology::{Member, NodeRole, Shard};

use super::{Checks, epoch_of_replica};
use crate::{redis::Op, store::Txn};

impl Checks {
    /// Nobody comes twice, and nobody leaves without having been told to, or before somebody has its
    /// place.
    pub(super) fn membership(&mut self, index: usize, old: &Shard, new: &Shard, txn: &Txn) {
        let names = |shard: &Shard| -> BTreeSet<String> {
            shard.members.iter().map(|m| m.node.to_string()).collect()
        };
        let (before, after) = (names(old), names(new));
        if before == after {
            return;
        }
        let past = self.shards.entry(index).or_default();
        let again = after
            .difference(&before)
            .find(|n| past.members.contains(*n));
        let again = again.cloned();
        let fed = (new.members.iter())
            .find(|m| !before.contains(m.node.as_str()) && (m.in_sync || !m.run_id.is_empty()));
        let fed = fed.map(|m| m.node.to_string());
        let can_follow_up = |shard: &Shard| {
            let fits =
                |m: &&Member| m.role == NodeRole::Replica && m.in_sync && m.node != shard.primary;
            shard.members.iter().filter(fits).count()
        };
        let orphaned = can_follow_up(old) > 0 && can_follow_up(new) == 0;
        let gone: Vec<Member> = (old.members.iter())
            .filter(|m| !after.contains(m.node.as_str()))
            .cloned()
            .collect();
        past.left.extend(gone.iter().map(|m| m.node.to_string()));
        for member in &gone {
            self.left.push((index, member.node.to_string()));
            let refused = !member.leaving || member.node == new.primary || txn.leader.is_none();
            if refused || orphaned {
                self.fail("R1: nobody leaves before somebody has its place", || {
                    format!("shard {index}: {} (orphaned: {orphaned})", member.node)
                });
            }
        }
        if let Some(node) = again.or(fed) {
            self.fail("R5: a new member is new, and has nothing yet", || {
                format!("shard {index}: {node}")
            });
        }
    }

    /// A node is let follow another. One that has left is not let in again at the same epoch.
    pub(super) fn may_follow(&mut self, shard: usize, node: &str, user: &str) {
        let past = self.shards.entry(shard).or_default();
        let Some((epoch, who)) = epoch_of_replica(user) else {
            return;
        };
        // Users that were made ahead at who is no primary now let in nobody.
        let serves = (past.primaries.get(&epoch)).is_some_and(|(named, _)| named == node);
        if epoch == past.epoch && serves && past.left.contains(who) {
            self.fail("R2: who leaves a shard is fed no more", || {
                format!("{node} lets {user} in, which has left")
            });
        }
    }

    /// A node is removed, with what it has written as a primary and the present one does not have.
    pub fn wiped(&mut self, node: &str, beyond: &[Op]) {
        for op in beyond {
            self.wiped.insert(op.id, node.to_owned());
        }
    }

    /// At the end: what was wiped is kept in a file, or somebody else has it.
    pub(super) fn look_for_wiped(&mut self, present: &BTreeSet<u64>) {
        let known = [&self.captured, &self.lost, present];
        let gone = (self.wiped.iter()).find(|(id, _)| known.iter().all(|set| !set.contains(id)));
        if let Some((id, node)) = gone.map(|(id, node)| (*id, node.clone())) {
            self.fail("I8: what a node that is removed had is captured", || {
                format!("{node} had write {id} and others")
            });
        }
    }
}
