//! The transitions of an exchange: a member's process makes way for one of another engine.
//!
//! Invariant: from the first word of it until its last the member is not in sync, so nobody counts on
//! what it has, and it is never the primary's: that one has to become a replica first.

use super::{
    NodeRole, Shard, TransitionError,
    membership::{Roster, refusal},
};
use crate::id::NodeId;

/// What becomes of the data in between.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exchange {
    /// The next process loads it, and goes on from there.
    Keep,
    /// It is removed: the next process can't load it, or must not, and copies the primary's.
    Discard,
}

/// A member that follows a primary of a newer engine: what that one writes it may refuse, and nobody
/// but its own counter says so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Older {
    /// Which.
    pub node: NodeId,
    /// Its process.
    pub run_id: String,
    /// Replicated commands that it had refused before.
    pub refused: u64,
}

impl Older {
    /// Whether a process with this run id, which has refused so many commands (`None`: not known), has
    /// all that its primary has.
    #[must_use]
    pub fn is_sound(&self, run_id: &str, refused: Option<u64>) -> bool {
        self.run_id == run_id && refused.is_some_and(|count| count <= self.refused)
    }
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
        let next = self.with_member(node, |m| {
            engine.clone_into(&mut m.engine);
            m.exchange = Some(data);
            m.in_sync = false;
        });
        Ok(next.risen())
    }

    /// The member runs what it should. It proves anew that it is in sync.
    ///
    /// # Errors
    /// When the node is not of this shard.
    pub fn exchanged(&self, node: &NodeId) -> Result<Self, TransitionError> {
        if self.member(node).is_none() {
            return Err(refusal(node, "is not of this shard"));
        }
        let mut next = self.with_member(node, |m| m.exchange = None);
        next.roster.counts_no_more(node);
        Ok(next.risen())
    }

    /// Says that a member's engine is older than that of a primary which it will follow: from here on
    /// it is as good as that one only while it is this process, and refuses no further command.
    ///
    /// # Errors
    /// When the node is not of this shard.
    pub fn is_older(&self, older: Older) -> Result<Self, TransitionError> {
        if self.member(&older.node).is_none() {
            return Err(refusal(&older.node, "is not of this shard"));
        }
        let mut next = self.clone();
        next.roster.older.retain(|o| o.node != older.node);
        next.roster.older.push(older);
        Ok(next)
    }

    /// Says the same of a switch that is planned. It is true from the transaction on that makes a node
    /// the primary of which it has not been said; until then the member follows its like, whatever
    /// becomes of the switch.
    ///
    /// # Errors
    /// When the node is not of this shard.
    pub fn foresee(&self, older: Older) -> Result<Self, TransitionError> {
        if self.member(&older.node).is_none() {
            return Err(refusal(&older.node, "is not of this shard"));
        }
        let mut next = self.clone();
        next.roster.foreseen.retain(|o| o.node != older.node);
        next.roster.foreseen.push(older);
        Ok(next)
    }

    /// Nobody follows a newer engine any more, nor is to.
    #[must_use]
    pub fn none_older(&self) -> Self {
        let mut next = self.clone();
        next.roster.older.clear();
        next.roster.foreseen.clear();
        next
    }

    /// What a member's process must still be, if its engine is older than its primary's.
    #[must_use]
    pub fn older(&self, node: &NodeId) -> Option<&Older> {
        self.roster.older.iter().find(|o| o.node == *node)
    }
}

impl Roster {
    /// Nobody asks any more what the node has refused.
    pub(super) fn counts_no_more(&mut self, node: &NodeId) {
        self.older.retain(|o| o.node != *node);
        self.foreseen.retain(|o| o.node != *node);
    }

    /// `next` becomes the primary: what was foreseen comes true, unless it is one of those itself. What
    /// is true already was counted from earlier on.
    pub(super) fn led_by(&mut self, next: &NodeId) {
        let is_alike = self.foreseen.iter().any(|o| o.node == *next);
        self.counts_no_more(next);
        if is_alike {
            return;
        }
        for older in std::mem::take(&mut self.foreseen) {
            if !self.older.iter().any(|o| o.node == older.node) {
                self.older.push(older);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::{Handover, tests::shard};

    fn handover(target: &str) -> Handover {
        Handover {
            task: "t".into(),
            target: target.into(),
            token: "once".into(),
            deadline_unix_ms: 0,
            max_hold_ms: 1_000,
        }
    }

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
        let numbers = [&shard(), &next, &done].map(|s| s.roster.membership);
        assert_eq!(numbers, [0, 1, 2], "an agent knows which is the newer");
    }

    #[test]
    fn an_older_follower_is_sound_while_it_is_the_same_process_and_refuses_nothing() {
        let older = Older {
            node: "a".into(),
            run_id: "run-a".into(),
            refused: 2,
        };
        assert!(older.is_sound("run-a", Some(2)) && older.is_sound("run-a", Some(1)));
        for (run_id, refused) in [("run-a", Some(3)), ("run-a", None), ("run-x", Some(2))] {
            assert!(!older.is_sound(run_id, refused), "{run_id} {refused:?}");
        }
    }

    #[test]
    fn an_older_one_is_remembered_until_it_is_the_primary_or_exchanged() {
        let older = |node: &str| Older {
            node: node.into(),
            run_id: "x".into(),
            refused: 0,
        };
        let told = shard().is_older(older("b")).unwrap();
        let told = told.is_older(older("b")).unwrap();
        assert_eq!(told.roster.older, [older("b")], "said twice");
        assert!(shard().is_older(older("z")).is_err());
        let exchange = told.exchange(&"b".into(), "x", Exchange::Keep).unwrap();
        assert!(
            exchange.older(&"b".into()).is_some(),
            "its process is there still"
        );
        let exchanged = exchange.exchanged(&"b".into()).unwrap();
        assert_eq!(exchanged.older(&"b".into()), None);
        let declared = told.declare(handover("b")).unwrap();
        let committed = declared.commit(declared.epoch, "once").unwrap();
        assert_eq!(committed.older(&"b".into()), None);
        assert!(told.none_older().roster.older.is_empty());
    }

    #[test]
    fn what_is_foreseen_is_true_once_somebody_else_is_the_primary_and_not_before() {
        let older = |node: &str, run_id: &str| Older {
            node: node.into(),
            run_id: run_id.into(),
            refused: 0,
        };
        assert!(shard().foresee(older("z", "x")).is_err());
        let told = shard().foresee(older("a", "old")).unwrap();
        let told = told.foresee(older("a", "run-a")).unwrap();
        let told = told.foresee(older("c", "run-c")).unwrap();
        assert_eq!(told.roster.foreseen.len(), 2, "said twice");
        assert!(told.roster.older.is_empty(), "nobody follows it yet");
        let declared = told.declare(handover("b")).unwrap();
        let cancelled = declared.cancel(&"t".into()).unwrap();
        assert_eq!(cancelled, told, "given up");
        let committed = declared.commit(declared.epoch, "once").unwrap();
        assert_eq!(
            committed.roster.older,
            [older("a", "run-a"), older("c", "run-c")]
        );
        assert!(committed.roster.foreseen.is_empty());
        // Counted from earlier on.
        let counted = told.is_older(older("c", "earlier")).unwrap();
        let declared = counted.declare(handover("b")).unwrap();
        let committed = declared.commit(declared.epoch, "once").unwrap();
        assert_eq!(committed.older(&"c".into()), Some(&older("c", "earlier")));
        let none = told.none_older();
        assert!(none.roster.foreseen.is_empty());
    }

    #[test]
    fn a_failover_among_those_that_are_alike_makes_nothing_of_it_true() {
        let older = |node: &str| Older {
            node: node.into(),
            run_id: "x".into(),
            refused: 0,
        };
        let told = shard().foresee(older("a")).unwrap();
        let alike = told.foresee(older("b")).unwrap();
        let lead = |shard: &Shard| {
            let lost = shard.fail_over(&"t".into(), 0).unwrap();
            let proved = lost.prove(&"t".into(), crate::FenceProof::Exited).unwrap();
            let chosen = proved.choose(&"t".into(), &"b".into(), "run-b").unwrap();
            chosen.promoted(&"t".into(), "run-b", None).unwrap().roster
        };
        let among = lead(&alike);
        assert_eq!((among.older, among.foreseen), (vec![], vec![older("a")]));
        let other = lead(&told);
        assert_eq!((other.older, other.foreseen), (vec![older("a")], vec![]));
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
