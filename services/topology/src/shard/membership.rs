//! The transitions of membership: a node joins a shard, one leaves it.
//!
//! Invariant: a member is fed only while the record names it and does not say that it leaves; so what
//! may have confirmed a write is a member, from before its first confirmation until after its last.
//! The primary never leaves, nor does the last replica that could take its place.

use super::{Member, Mode, NodeRole, Older, Shard, TransitionError};
use crate::{
    id::{HostId, NodeId},
    instance::REPLICAS_MAX,
};

/// Of a node that nobody has said anything about.
pub const PRIORITY: u32 = 100;
/// The highest that can be set; the range is that of a percentage, ten times.
pub const PRIORITY_MAX: u32 = 1_000;
/// Nodes that have left and are remembered until their agents have removed them. A host that was away
/// for so many replacements of one shard does not come back.
pub const GONE_MAX: usize = 32;

/// A node that has left, while its process or its data may still be on its host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GoneNode {
    /// The node.
    pub node: NodeId,
    /// Where it was.
    pub host: HostId,
}

/// Who has left a shard, and who is next.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Roster {
    /// Until their agents have removed them, the newest at the end.
    pub gone: Vec<GoneNode>,
    /// Numbers below it were given to nodes; 0: to as many as there are members.
    pub made: u32,
    /// Members that never were in sync, and that have their first process or none yet.
    pub newcomers: Vec<NodeId>,
    /// Rises with each transition of membership or of an exchange, so that an agent knows which of two
    /// is the newer.
    pub membership: u64,
    /// Members whose engine is older than that of a primary that they follow, or have followed.
    pub older: Vec<Older>,
    /// Those that will be, once the switch that is planned has made another node the primary.
    pub foreseen: Vec<Older>,
}

impl Shard {
    /// The id of the next node; none is ever given twice.
    #[must_use]
    pub fn next_node(&self) -> NodeId {
        format!("{}-{}-{}", self.instance, self.index, self.numbers_given()).into()
    }

    fn numbers_given(&self) -> u32 {
        let members = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        self.roster.made.max(members)
    }

    /// A node becomes a member. It has no data yet, and follows the primary from here on.
    ///
    /// # Errors
    /// When the shard isn't serving, the node or its host has a part in it already, or it has as many
    /// nodes as a shard can have.
    pub fn join(
        &self,
        node: &NodeId,
        host: &HostId,
        role: NodeRole,
    ) -> Result<Self, TransitionError> {
        self.serving()?;
        let refuse = |reason| Err(refusal(node, reason));
        if role == NodeRole::Primary {
            return refuse("can't join as a primary");
        }
        if *node != self.next_node() {
            return refuse("is not the next node of its shard");
        }
        if self.members.iter().any(|m| m.host == *host) {
            return refuse("can't join: its host has a node of the shard");
        }
        // One more than an instance can ask for: the one that is being replaced.
        if self.members.len() > REPLICAS_MAX as usize + 1 {
            return refuse("can't join: the shard has as many nodes as it can have");
        }
        // What an upgrade has given the shard, before the instance as a whole has it.
        let engine = self.primary_member().map(|m| m.engine.clone());
        Ok(self.with_newcomer(node, host, role, &engine.unwrap_or_default()))
    }

    /// The next node becomes a member with an engine of its own. It has no data yet, follows the primary
    /// from here on, and takes the place of one with the present engine later. It may share a host with
    /// that one.
    ///
    /// # Errors
    /// When the shard isn't serving, or has as many nodes as it can have: twice those of an instance,
    /// while all of them are being replaced.
    pub fn recruit(&self, host: &HostId, engine: &str) -> Result<Self, TransitionError> {
        self.serving()?;
        let node = self.next_node();
        if self.members.len() >= 2 * (REPLICAS_MAX as usize + 1) {
            let reason = "can't join: the shard has as many nodes as it can have";
            return Err(refusal(&node, reason));
        }
        Ok(self.with_newcomer(&node, host, NodeRole::Replica, engine))
    }

    fn with_newcomer(&self, node: &NodeId, host: &HostId, role: NodeRole, engine: &str) -> Self {
        let mut next = self.clone();
        next.roster.made = self.numbers_given() + 1;
        next.roster.membership += 1;
        next.roster.newcomers.push(node.clone());
        next.members.push(Member {
            node: node.clone(),
            host: host.clone(),
            role,
            run_id: String::new(),
            address: String::new(),
            in_sync: false,
            priority: PRIORITY,
            leaving: false,
            engine: engine.to_owned(),
            exchange: None,
        });
        next
    }

    /// Says that a member leaves: its right to follow is taken. It can still be [`retained`].
    ///
    /// [`retained`]: Shard::retain
    ///
    /// # Errors
    /// When the shard isn't serving, or the node is its primary, or the last that could be promoted.
    pub fn expel(&self, node: &NodeId) -> Result<Self, TransitionError> {
        self.may_leave(node)?;
        Ok(self.with_member(node, |m| m.leaving = true).risen())
    }

    /// As [`Shard::expel`], also of the last replica: the shard is to have none. Nobody counts on what it
    /// has from here on.
    ///
    /// # Errors
    /// When the shard isn't serving, or the node is its primary, or is not of it.
    pub fn dismiss(&self, node: &NodeId) -> Result<Self, TransitionError> {
        let spare = self.with_member(node, |m| m.in_sync &= m.node == self.primary);
        spare.expel(node)
    }

    /// A member that was about to leave stays, and is fed again.
    ///
    /// # Errors
    /// When the shard isn't serving, or the node is not of it.
    pub fn retain(&self, node: &NodeId) -> Result<Self, TransitionError> {
        self.serving()?;
        if self.member(node).is_none() {
            return Err(refusal(node, "is not of this shard"));
        }
        Ok(self.with_member(node, |m| m.leaving = false).risen())
    }

    /// A member has left: nobody counts it any more, and its agent is told to remove it. The caller
    /// has seen that its right to follow is gone.
    ///
    /// # Errors
    /// As [`Shard::expel`], and when that has not been said before.
    pub fn leave(&self, node: &NodeId) -> Result<Self, TransitionError> {
        let member = self.may_leave(node)?;
        if !member.leaving {
            return Err(refusal(node, "can't leave while it is fed"));
        }
        let gone = GoneNode {
            node: member.node.clone(),
            host: member.host.clone(),
        };
        let mut next = self.clone();
        next.members.retain(|m| m.node != *node);
        next.roster.made = self.numbers_given();
        next.roster.newcomers.retain(|n| n != node);
        next.roster.counts_no_more(node);
        next.roster.membership += 1;
        next.roster.gone.push(gone);
        let excess = next.roster.gone.len().saturating_sub(GONE_MAX);
        next.roster.gone.drain(..excess);
        Ok(next)
    }

    /// A member has been in sync, or has another process: nobody can say any more that no write was
    /// ever confirmed with its help.
    #[must_use]
    pub fn settle(&self, node: &NodeId) -> Self {
        let mut next = self.clone();
        next.roster.newcomers.retain(|n| n != node);
        next
    }

    /// Nothing is left of a node that has left.
    #[must_use]
    pub fn forget(&self, node: &NodeId) -> Self {
        let mut next = self.clone();
        next.roster.gone.retain(|gone| gone.node != *node);
        next
    }

    /// A member is preferred, or not, when a primary is replaced.
    ///
    /// # Errors
    /// When the node is not of this shard.
    pub fn prioritize(&self, node: &NodeId, priority: u32) -> Result<Self, TransitionError> {
        if self.member(node).is_none() {
            return Err(refusal(node, "is not of this shard"));
        }
        Ok(self.with_member(node, |m| m.priority = priority))
    }

    fn may_leave(&self, node: &NodeId) -> Result<&Member, TransitionError> {
        self.serving()?;
        let refuse = |reason| Err(refusal(node, reason));
        let Some(member) = self.member(node) else {
            return refuse("is not of this shard");
        };
        if member.node == self.primary {
            return refuse(
                "is the primary: make another node the primary first (slotmesh switchover)",
            );
        }
        let can_be_promoted =
            |m: &Member| m.role == NodeRole::Replica && m.in_sync && m.node != self.primary;
        let mut others = self
            .members
            .iter()
            .filter(|m| m.node != *node && !m.leaving);
        if can_be_promoted(member) && !others.any(can_be_promoted) {
            return refuse("is the last replica that has caught up with its primary");
        }
        Ok(member)
    }

    pub(super) fn risen(mut self) -> Self {
        self.roster.membership += 1;
        self
    }

    pub(super) fn serving(&self) -> Result<(), TransitionError> {
        match self.mode {
            Mode::Serving => Ok(()),
            _ => Err(self.wrong_mode("Serving")),
        }
    }

    pub(super) fn with_member(&self, node: &NodeId, change: impl Fn(&mut Member)) -> Self {
        let mut next = self.clone();
        next.members
            .iter_mut()
            .filter(|m| m.node == *node)
            .for_each(change);
        next
    }
}

pub(super) fn refusal(node: &NodeId, reason: &'static str) -> TransitionError {
    TransitionError::Member {
        node: node.clone(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::TaskId,
        shard::{Handover, tests::shard},
    };

    fn joined() -> Shard {
        let before = shard();
        let node = before.next_node();
        before
            .join(&node, &"spare".into(), NodeRole::Replica)
            .unwrap()
    }

    fn in_sync(shard: &Shard, node: &NodeId) -> Shard {
        shard.with_member(node, |m| m.in_sync = true)
    }

    #[test]
    fn a_new_member_has_its_own_id_for_ever_and_is_not_in_sync() {
        let first = joined();
        let node = first.members[3].node.clone();
        assert_eq!(node.as_str(), "r-1-0-3");
        assert!(!first.members[3].in_sync && !first.members[3].leaving);
        let gone = first.expel(&node).unwrap().leave(&node).unwrap();
        assert_eq!(gone.members, shard().members);
        assert_eq!(gone.roster.gone[0].host.as_str(), "spare");
        assert_eq!(gone.next_node().as_str(), "r-1-0-4");
        assert_eq!(gone.forget(&node).next_node().as_str(), "r-1-0-4");
        assert!(gone.forget(&node).roster.gone.is_empty());
    }

    #[test]
    fn who_has_a_part_already_does_not_join() {
        let before = shard();
        let (next, spare): (NodeId, HostId) = (before.next_node(), "spare".into());
        for (node, host, role) in [
            (NodeId::from("a"), spare.clone(), NodeRole::Replica),
            (next.clone(), HostId::from("host-b"), NodeRole::Replica),
            (next.clone(), spare.clone(), NodeRole::Primary),
        ] {
            assert!(matches!(
                before.join(&node, &host, role),
                Err(TransitionError::Member { .. })
            ));
        }
        assert!(before.join(&next, &spare, NodeRole::ReadOnly).is_ok());
    }

    #[test]
    fn a_recruit_has_its_own_engine_and_may_share_a_host() {
        let host: HostId = "host-a".into();
        let next = shard().recruit(&host, "redis-8.2.3").unwrap();
        let new = next.members.last().unwrap();
        assert_eq!((&new.host, new.engine.as_str()), (&host, "redis-8.2.3"));
        assert_eq!(new.node, shard().next_node());
        assert!(!new.in_sync && next.roster.newcomers.contains(&new.node));
        let mut full = next;
        while let Ok(more) = full.recruit(&host, "x") {
            full = more;
        }
        assert_eq!(full.members.len(), 2 * (REPLICAS_MAX as usize + 1));
    }

    #[test]
    fn the_last_replica_is_dismissed_where_none_is_needed_and_the_primary_never() {
        let b: NodeId = "b".into();
        assert!(shard().expel(&b).is_err(), "nobody else has caught up");
        let next = shard().dismiss(&b).unwrap();
        let leaving = next.member(&b).unwrap();
        assert!(leaving.leaving && !leaving.in_sync);
        assert!(next.leave(&b).unwrap().member(&b).is_none());
        assert!(shard().dismiss(&"a".into()).is_err());
    }

    #[test]
    fn a_newcomer_is_one_until_it_was_in_sync_or_has_left() {
        let joined = joined();
        let node = joined.members.last().unwrap().node.clone();
        assert_eq!(joined.roster.newcomers, std::slice::from_ref(&node));
        assert!(joined.settle(&node).roster.newcomers.is_empty());
        let left = joined.expel(&node).unwrap().leave(&node).unwrap();
        assert!(left.roster.newcomers.is_empty());
        assert_eq!(left.roster.membership, 3);
    }

    #[test]
    fn neither_the_primary_nor_the_last_that_could_be_promoted_leaves() {
        let (a, b, c): (NodeId, NodeId, NodeId) = ("a".into(), "b".into(), "c".into());
        assert!(shard().expel(&a).is_err());
        assert!(shard().expel(&b).is_err(), "c has not caught up");
        assert!(shard().expel(&"x".into()).is_err());
        assert!(shard().expel(&c).is_ok(), "nobody counts on it");
        let two = in_sync(&shard(), &c);
        let leaving = two.expel(&b).unwrap();
        assert!(leaving.expel(&c).is_err(), "b is on its way out");
        assert!(two.leave(&b).is_err(), "it is still fed");
        assert_eq!(leaving.leave(&b).unwrap().members.len(), 2);
        let retained = leaving.retain(&b).unwrap();
        assert_eq!(retained.members, two.members);
        assert_eq!(
            retained.roster.membership, 2,
            "two changes, and it is as before"
        );
    }

    #[test]
    fn nobody_joins_or_leaves_during_a_handover_or_a_failover() {
        let task: TaskId = "t".into();
        let handover = Handover {
            task: task.clone(),
            target: "b".into(),
            token: "x".into(),
            deadline_unix_ms: 0,
            max_hold_ms: 0,
        };
        let c: NodeId = "c".into();
        for busy in [
            shard().declare(handover).unwrap(),
            shard().fail_over(&task, 0).unwrap(),
        ] {
            assert!(
                busy.join(&busy.next_node(), &"s".into(), NodeRole::Replica)
                    .is_err()
            );
            assert!(busy.expel(&c).is_err() && busy.leave(&c).is_err() && busy.retain(&c).is_err());
        }
    }

    #[test]
    fn one_that_leaves_is_no_target_but_may_be_promoted_if_it_has_most() {
        let leaving = in_sync(&shard(), &"c".into()).expel(&"b".into()).unwrap();
        let handover = Handover {
            task: "t".into(),
            target: "b".into(),
            token: "x".into(),
            deadline_unix_ms: 0,
            max_hold_ms: 0,
        };
        assert!(leaving.declare(handover).is_err());
        let task: TaskId = "f".into();
        let lost = leaving.fail_over(&task, 0).unwrap();
        let fenced = lost.prove(&task, crate::FenceProof::Exited).unwrap();
        let chosen = fenced.choose(&task, &"b".into(), "run-b").unwrap();
        let next = chosen.promoted(&task, "run-b", None).unwrap();
        assert!(!next.member(&"b".into()).unwrap().leaving);
    }
}
