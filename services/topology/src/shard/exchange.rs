//! The transitions of an exchange: a member's process makes way for one of another engine.
//!
//! Invariant: from the first word of it until its last the member is not in sync, so nobody counts on
//! what it has, and it is never the primary's: that one has to become a replica first.

use super::{NodeRole, Shard, TransitionError, membership::refusal};
use crate::id::NodeId;

/// What becomes of the data in between.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exchange {
    /// The next process loads it, and goes on from there.
    Keep,
    /// It is removed: the next process can't load it, or must not, and copies the primary's.
    Discard,
}

impl Shard {
    /// Says that a member is to run `engine` (empty: the instance's), and that its process may be
    /// ended for that.
    ///
    /// # Errors
    /// When the shard isn't serving, or the node is its primary, or leaves, or is not of it.
    pub fn exchange(
        &self,
        node: &NodeId,
        engine: &str,
        data: Exchange,
    ) -> Result<Self, TransitionError> {
        self.serving()?;
        let Some(member) = self.member(node) else {
            return Err(refusal(node, "is not of this shard"));
        };
        if member.node == self.primary || member.role == NodeRole::Primary {
            return Err(refusal(
                node,
                "is the primary: its process is not exchanged",
            ));
        }
        if member.leaving {
            return Err(refusal(node, "is leaving the shard"));
        }
        Ok(self.with_member(node, |m| {
            engine.clone_into(&mut m.engine);
            m.exchange = Some(data);
            m.in_sync = false;
        }))
    }

    /// The member runs what it should. It proves anew that it is in sync.
    ///
    /// # Errors
    /// When the node is not of this shard.
    pub fn exchanged(&self, node: &NodeId) -> Result<Self, TransitionError> {
        if self.member(node).is_none() {
            return Err(refusal(node, "is not of this shard"));
        }
        Ok(self.with_member(node, |m| m.exchange = None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::tests::shard;

    #[test]
    fn who_is_exchanged_is_not_in_sync_and_the_primary_never_is() {
        let next = shard().exchange(&"b".into(), "redis-8.2.3", Exchange::Keep);
        let next = next.unwrap();
        let member = next.member(&"b".into()).unwrap();
        assert_eq!(
            (member.engine.as_str(), member.in_sync),
            ("redis-8.2.3", false)
        );
        assert!(shard().exchange(&"a".into(), "x", Exchange::Keep).is_err());
        assert!(shard().exchange(&"z".into(), "x", Exchange::Keep).is_err());
        let done = next.exchanged(&"b".into()).unwrap();
        assert_eq!(done.member(&"b".into()).unwrap().exchange, None);
    }

    #[test]
    fn a_node_that_joins_runs_what_the_shard_was_given() {
        let mut given = shard();
        given.members[0].engine = "redis-8.2.3".into();
        let node = given.next_node();
        let joined = given
            .join(&node, &"spare".into(), NodeRole::Replica)
            .unwrap();
        assert_eq!(joined.member(&node).unwrap().engine, "redis-8.2.3");
    }

    #[test]
    fn a_promoted_node_is_exchanged_no_more() {
        let next = shard()
            .exchange(&"b".into(), "x", Exchange::Discard)
            .unwrap();
        let lost = next.fail_over(&"t".into(), 0).unwrap();
        let proved = lost.prove(&"t".into(), crate::FenceProof::Exited).unwrap();
        let chosen = proved.choose(&"t".into(), &"b".into(), "run-b").unwrap();
        let promoted = chosen.promoted(&"t".into(), "run-b", None).unwrap();
        assert_eq!(promoted.member(&"b".into()).unwrap().exchange, None);
    }
}
