//! A shard and the only ways in which its record may change.
//!
//! Each transition is a pure function from record to record that refuses what the protocol does
//! not allow. Whoever calls it then writes the result by compare-and-swap against the record it
//! read, in a transaction that also checks its right to write.

mod exchange;
mod failover;
mod membership;

pub use exchange::{Exchange, Older};
pub use failover::{DEPARTURES_MAX, Departure, Failover, FenceProof, Lineage};
pub use membership::{GONE_MAX, GoneNode, PRIORITY, PRIORITY_MAX, Roster};

use crate::{
    id::{Epoch, HostId, InstanceId, NodeId, ShardId, TaskId},
    slot::SlotRange,
};

/// Role of a node in its shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeRole {
    /// Takes the writes.
    Primary,
    /// Follows the primary and may be promoted.
    Replica,
    /// Follows the primary and is never promoted.
    ReadOnly,
}

/// One node of a shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// The node.
    pub node: NodeId,
    /// Where it runs.
    pub host: HostId,
    /// What it is, or will be.
    pub role: NodeRole,
    /// The process that may serve or be fed; empty: none yet.
    pub run_id: String,
    /// host:port; empty until first reported.
    pub address: String,
    /// It had caught up with the primary of this epoch when last looked at; only such a node may
    /// be promoted.
    pub in_sync: bool,
    /// Of being promoted, among those with as much data; 0: never.
    pub priority: u32,
    /// It is about to leave: nobody feeds it any more.
    pub leaving: bool,
    /// That it should run; empty: the instance's.
    pub engine: String,
    /// Its process is being exchanged for one of that engine; until then it is not in sync.
    pub exchange: Option<Exchange>,
}

/// A planned switchover under way.
#[derive(Clone, PartialEq, Eq)]
pub struct Handover {
    /// Who asked for it.
    pub task: TaskId,
    /// The next primary.
    pub target: NodeId,
    /// Presented by whoever commits; one-shot, because the commit removes it.
    pub token: String,
    /// After it, nothing new is begun.
    pub deadline_unix_ms: u64,
    /// For how long a proxy holds at most.
    pub max_hold_ms: u32,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handover")
            .field("task", &self.task)
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

/// What a shard is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Its processes are being started for the first time.
    Provisioning,
    /// The primary of the epoch serves.
    Serving,
    /// The primary of the epoch is handing over.
    Handover(Handover),
    /// Nobody serves until an operator or a task decides.
    Fenced(String),
    /// The primary is lost, its epoch is over, and the next one's is being chosen.
    FailingOver(Failover),
}

/// Slots, a primary, and those who follow it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shard {
    /// Whose shard.
    pub instance: InstanceId,
    /// Which.
    pub id: ShardId,
    /// Its position, from 0.
    pub index: u32,
    /// Which slots.
    pub slots: Vec<SlotRange>,
    /// Rises with each new primary.
    pub epoch: Epoch,
    /// Who takes the writes of this epoch.
    pub primary: NodeId,
    /// All nodes, the primary too.
    pub members: Vec<Member>,
    /// What it is doing.
    pub mode: Mode,
    /// Credentials of this epoch and below are revoked.
    pub closed_epoch: Epoch,
    /// Where the last failovers left the lost primaries' histories, the newest at the end.
    pub departures: Vec<Departure>,
    /// Who has left, and who is next.
    pub roster: Roster,
}

/// Why a transition is refused. The record stays as it is.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransitionError {
    /// The shard is in another mode than the transition starts from.
    #[error("shard {shard} is {mode}, not {needed}")]
    Mode {
        /// Which shard.
        shard: ShardId,
        /// What it is.
        mode: &'static str,
        /// What it would have to be.
        needed: &'static str,
    },
    /// Someone else's hand-over, another epoch, or a token that is spent.
    #[error("shard {shard} is not in this hand-over (epoch {epoch})")]
    NotThisHandover {
        /// Which shard.
        shard: ShardId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// The node can't become primary.
    #[error("node {node} can't become primary: {reason}")]
    Target {
        /// Which node.
        node: NodeId,
        /// Why not.
        reason: &'static str,
    },
    /// The node can't join, or leave.
    #[error("node {node} {reason}")]
    Member {
        /// Which node.
        node: NodeId,
        /// Why not.
        reason: &'static str,
    },
}

impl Mode {
    /// The mode's name, as users see it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Provisioning => "Provisioning",
            Self::Serving => "Serving",
            Self::Handover(_) => "Handover",
            Self::Fenced(_) => "Fenced",
            Self::FailingOver(_) => "FailingOver",
        }
    }
}

impl Shard {
    /// The member with this id.
    #[must_use]
    pub fn member(&self, node: &NodeId) -> Option<&Member> {
        self.members.iter().find(|m| m.node == *node)
    }

    /// The primary's member, if it is known.
    #[must_use]
    pub fn primary_member(&self) -> Option<&Member> {
        self.member(&self.primary)
    }

    /// The hand-over under way, if any.
    #[must_use]
    pub fn handover(&self) -> Option<&Handover> {
        match &self.mode {
            Mode::Handover(handover) => Some(handover),
            _ => None,
        }
    }

    /// First epoch: every process is known and `primary` may serve.
    ///
    /// # Errors
    /// When the shard has served before.
    pub fn begin(&self) -> Result<Self, TransitionError> {
        if self.mode != Mode::Provisioning {
            return Err(self.wrong_mode("Provisioning"));
        }
        Ok(Self {
            epoch: self.epoch.next(),
            mode: Mode::Serving,
            ..self.clone()
        })
    }

    /// Step 4 of a switchover: say that the primary will hand over. The epoch stays.
    ///
    /// # Errors
    /// When the shard isn't serving or the target can't be promoted.
    pub fn declare(&self, handover: Handover) -> Result<Self, TransitionError> {
        if self.mode != Mode::Serving {
            return Err(self.wrong_mode("Serving"));
        }
        let refuse = |reason| TransitionError::Target {
            node: handover.target.clone(),
            reason,
        };
        let target = self
            .member(&handover.target)
            .ok_or_else(|| refuse("not of this shard"))?;
        if target.node == self.primary {
            return Err(refuse("it is the primary already"));
        }
        if target.role != NodeRole::Replica {
            return Err(refuse("read-only nodes are never promoted"));
        }
        if !target.in_sync {
            return Err(refuse("it has not caught up with the primary"));
        }
        if target.leaving {
            return Err(refuse("it is leaving the shard"));
        }
        if target.exchange.is_some() {
            return Err(refuse("its process is being exchanged"));
        }
        Ok(Self {
            mode: Mode::Handover(handover),
            ..self.clone()
        })
    }

    /// Step 7: the switch. Needs the epoch and the token of the declared hand-over, so that it
    /// happens at most once.
    ///
    /// # Errors
    /// When this hand-over is not (any more) under way.
    pub fn commit(&self, epoch: Epoch, token: &str) -> Result<Self, TransitionError> {
        let Some(handover) = self.handover() else {
            return Err(self.wrong_mode("Handover"));
        };
        if self.epoch != epoch || handover.token != token || token.is_empty() {
            return Err(TransitionError::NotThisHandover {
                shard: self.id.clone(),
                epoch: self.epoch,
            });
        }
        let (old, new) = (self.primary.clone(), handover.target.clone());
        let mut next = Self {
            epoch: self.epoch.next(),
            primary: new.clone(),
            mode: Mode::Serving,
            ..self.clone()
        };
        next.roster.led_by(&new);
        for member in &mut next.members {
            if member.node == new {
                member.role = NodeRole::Primary;
            } else if member.node == old {
                member.role = NodeRole::Replica;
            }
            // The new primary is in sync with itself; the others prove it anew.
            member.in_sync = member.node == new;
        }
        Ok(next)
    }

    /// Gives up a hand-over: the old primary serves on at its epoch.
    ///
    /// # Errors
    /// When this task's hand-over is not under way.
    pub fn cancel(&self, task: &TaskId) -> Result<Self, TransitionError> {
        match self.handover() {
            Some(handover) if handover.task == *task => Ok(Self {
                mode: Mode::Serving,
                ..self.clone()
            }),
            Some(_) => Err(TransitionError::NotThisHandover {
                shard: self.id.clone(),
                epoch: self.epoch,
            }),
            None => Err(self.wrong_mode("Handover")),
        }
    }

    /// Step 10: credentials of every epoch before the current one are revoked.
    #[must_use]
    pub fn close(&self) -> Self {
        Self {
            closed_epoch: Epoch(self.epoch.0.saturating_sub(1)),
            ..self.clone()
        }
    }

    /// A primary that was started again serves on, as a new epoch, with the process `run_id`.
    ///
    /// # Errors
    /// When the shard isn't serving or fenced.
    pub fn readmit(&self, run_id: &str) -> Result<Self, TransitionError> {
        if !matches!(self.mode, Mode::Serving | Mode::Fenced(_)) {
            return Err(self.wrong_mode("Serving or Fenced"));
        }
        let mut next = Self {
            epoch: self.epoch.next(),
            closed_epoch: self.epoch,
            mode: Mode::Serving,
            ..self.clone()
        };
        for member in &mut next.members {
            member.in_sync = member.node == next.primary;
            if member.node == next.primary {
                run_id.clone_into(&mut member.run_id);
            }
        }
        Ok(next)
    }

    fn wrong_mode(&self, needed: &'static str) -> TransitionError {
        TransitionError::Mode {
            shard: self.id.clone(),
            mode: self.mode.name(),
            needed,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn shard() -> Shard {
        let member = |node: &str, role, in_sync| Member {
            node: node.into(),
            host: format!("host-{node}").into(),
            role,
            run_id: format!("run-{node}"),
            address: format!("127.0.0.1:{}", 7000 + node.len()),
            in_sync,
            priority: PRIORITY,
            leaving: false,
            engine: String::new(),
            exchange: None,
        };
        Shard {
            instance: "r-1".into(),
            id: "0".into(),
            index: 0,
            slots: crate::slot::split_evenly(1),
            epoch: Epoch(4),
            primary: "a".into(),
            members: vec![
                member("a", NodeRole::Primary, true),
                member("b", NodeRole::Replica, true),
                member("c", NodeRole::Replica, false),
            ],
            mode: Mode::Serving,
            closed_epoch: Epoch(3),
            departures: Vec::new(),
            roster: Default::default(),
        }
    }

    fn to(target: &str) -> Handover {
        Handover {
            task: "t-1".into(),
            target: target.into(),
            token: "once".into(),
            deadline_unix_ms: 0,
            max_hold_ms: 1000,
        }
    }

    #[test]
    fn only_a_replica_in_sync_becomes_target() {
        for target in ["a", "c", "x"] {
            assert!(matches!(
                shard().declare(to(target)),
                Err(TransitionError::Target { .. })
            ));
        }
        let declared = shard().declare(to("b")).unwrap();
        assert_eq!((declared.epoch, declared.primary.as_str()), (Epoch(4), "a"));
        assert!(
            declared.declare(to("b")).is_err(),
            "one hand-over at a time"
        );
    }

    #[test]
    fn a_commit_raises_the_epoch_with_the_primary_and_happens_once() {
        let declared = shard().declare(to("b")).unwrap();
        assert!(declared.commit(Epoch(4), "guess").is_err());
        assert!(declared.commit(Epoch(3), "once").is_err());
        let committed = declared.commit(Epoch(4), "once").unwrap();
        assert_eq!(
            (committed.epoch, committed.primary.as_str()),
            (Epoch(5), "b")
        );
        assert_eq!(
            committed.member(&"a".into()).unwrap().role,
            NodeRole::Replica
        );
        assert!(!committed.member(&"a".into()).unwrap().in_sync);
        assert!(committed.commit(Epoch(4), "once").is_err());
        assert!(committed.cancel(&"t-1".into()).is_err());
        assert_eq!(committed.close().closed_epoch, Epoch(4));
    }

    #[test]
    fn a_failover_ends_the_lost_epoch_first_and_needs_a_proof_before_a_target() {
        let (task, b): (TaskId, NodeId) = ("t-1".into(), "b".into());
        let lost = shard().fail_over(&task, 7).unwrap();
        assert_eq!((lost.epoch, lost.closed_epoch), (Epoch(5), Epoch(4)));
        assert!(lost.fail_over(&task, 7).is_err());
        assert!(lost.choose(&task, &b, "run-b").is_err(), "not fenced yet");
        assert!(lost.prove(&"t-2".into(), FenceProof::Exited).is_err());
        let fenced = lost.prove(&task, FenceProof::Exited).unwrap();
        assert!(
            fenced.promoted(&task, "run-b", None).is_err(),
            "nobody is chosen"
        );
        let chosen = fenced.choose(&task, &b, "run-b").unwrap();
        assert!(chosen.promoted(&task, "another", None).is_err());
        let lineage = Lineage {
            replid: "old".into(),
            offset: 71,
        };
        let next = chosen
            .promoted(&task, "run-b", Some(lineage.clone()))
            .unwrap();
        let departure = Departure {
            epoch: Epoch(5),
            from: Some(lineage),
        };
        assert_eq!(next.departures, [departure]);
        assert_eq!((next.epoch, next.primary.as_str()), (Epoch(5), "b"));
        assert_eq!(next.member(&"a".into()).unwrap().role, NodeRole::Replica);
        assert!(next.member(&b).unwrap().in_sync);
        assert!(!next.member(&"a".into()).unwrap().in_sync);
    }

    #[test]
    fn a_cancel_leaves_epoch_and_primary() {
        let declared = shard().declare(to("b")).unwrap();
        assert!(declared.cancel(&"t-2".into()).is_err());
        assert_eq!(declared.cancel(&"t-1".into()).unwrap(), shard());
    }

    #[test]
    fn readmission_is_a_new_epoch_with_the_old_credentials_closed() {
        let again = shard().readmit("run-2").unwrap();
        assert_eq!((again.epoch, again.closed_epoch), (Epoch(5), Epoch(4)));
        assert_eq!(again.primary_member().unwrap().run_id, "run-2");
        assert!(shard().declare(to("b")).unwrap().readmit("run-2").is_err());
    }
}
