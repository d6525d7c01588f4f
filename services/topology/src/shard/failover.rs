//! The transitions of a failover: a primary is declared lost, its fence is proven, another node is
//! chosen and promoted.
//!
//! Invariant: the declaration ends the lost epoch, and nobody is chosen before it is known why the
//! lost primary takes no more writes.

use super::{Mode, NodeRole, Shard, TransitionError};
use crate::id::{NodeId, TaskId};

/// How it is known that a lost primary takes no more writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FenceProof {
    /// Its agent saw its process end.
    Exited,
    /// Its agent has taken every credential of its epoch from it.
    Fenced,
    /// Its host's lease has run out, and with it the right to serve.
    Lease,
    /// An operator says so, and accepts loss.
    Operator,
}

impl FenceProof {
    /// Its name, as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exited => "its process has ended",
            Self::Fenced => "its agent has fenced it",
            Self::Lease => "its host's lease has run out",
            Self::Operator => "an operator accepts loss",
        }
    }
}

/// The primary of the epoch before is lost; nobody has this epoch yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failover {
    /// Which task sees to it.
    pub task: TaskId,
    /// Who will be promoted, once chosen.
    pub target: Option<NodeId>,
    /// Why the lost primary takes no more writes, once known. A target is chosen only with it.
    pub proof: Option<FenceProof>,
    /// When it was declared.
    pub since_unix_ms: u64,
}

/// A lost primary's history, and where its successor's departs from it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lineage {
    /// The replication id under which the lost primary wrote.
    pub replid: String,
    /// The first offset of it that the successor does not have.
    pub offset: u64,
}

impl Shard {
    /// The failover under way, if any.
    #[must_use]
    pub fn failover(&self) -> Option<&Failover> {
        match &self.mode {
            Mode::FailingOver(failover) => Some(failover),
            _ => None,
        }
    }

    /// Declares the primary lost: from here on no process has the shard's epoch, and the lost one
    /// can never have it again. `primary` still names it.
    ///
    /// # Errors
    /// When the shard has never served, or a failover is under way.
    pub fn fail_over(&self, task: &TaskId, now_ms: u64) -> Result<Self, TransitionError> {
        if !matches!(
            self.mode,
            Mode::Serving | Mode::Handover(_) | Mode::Fenced(_)
        ) || self.epoch.0 == 0
        {
            return Err(self.wrong_mode("Serving, Handover or Fenced"));
        }
        Ok(Self {
            epoch: self.epoch.next(),
            closed_epoch: self.epoch,
            mode: Mode::FailingOver(Failover {
                task: task.clone(),
                target: None,
                proof: None,
                since_unix_ms: now_ms,
            }),
            ..self.clone()
        })
    }

    /// Writes down why the lost primary takes no more writes.
    ///
    /// # Errors
    /// When this task's failover is not under way.
    pub fn prove(&self, task: &TaskId, proof: FenceProof) -> Result<Self, TransitionError> {
        let failover = self.failover_of(task)?;
        Ok(Self {
            mode: Mode::FailingOver(Failover {
                proof: Some(proof),
                ..failover.clone()
            }),
            ..self.clone()
        })
    }

    /// Names who will be promoted, and as which process, or another one after the first could not
    /// be. The lost primary itself may be named: it came back, and nobody has more.
    ///
    /// # Errors
    /// When this task's failover is not under way, the lost primary may still take writes, or the
    /// node is no member that can be promoted.
    pub fn choose(
        &self,
        task: &TaskId,
        target: &NodeId,
        run_id: &str,
    ) -> Result<Self, TransitionError> {
        let failover = self.failover_of(task)?;
        let refuse = |reason| TransitionError::Target {
            node: target.clone(),
            reason,
        };
        if failover.proof.is_none() {
            return Err(refuse("the lost primary may still take writes"));
        }
        let member = self
            .member(target)
            .ok_or_else(|| refuse("not of this shard"))?;
        if member.role == NodeRole::ReadOnly {
            return Err(refuse("read-only nodes are never promoted"));
        }
        if run_id.is_empty() {
            return Err(refuse("it has no process"));
        }
        let mut next = Self {
            mode: Mode::FailingOver(Failover {
                target: Some(target.clone()),
                ..failover.clone()
            }),
            ..self.clone()
        };
        for member in &mut next.members {
            if member.node == *target {
                // Another process than the one that had caught up has not.
                member.in_sync &= member.run_id == run_id;
                run_id.clone_into(&mut member.run_id);
            }
        }
        Ok(next)
    }

    /// The chosen node is a primary: it has the epoch that the declaration began. `lineage` is what
    /// it says of the history that it goes on from.
    ///
    /// # Errors
    /// When this task's failover is not under way, or `run_id` is not the chosen node's process.
    pub fn promoted(
        &self,
        task: &TaskId,
        run_id: &str,
        lineage: Option<Lineage>,
    ) -> Result<Self, TransitionError> {
        let failover = self.failover_of(task)?;
        let refuse = |node: &NodeId, reason| TransitionError::Target {
            node: node.clone(),
            reason,
        };
        let target = failover
            .target
            .clone()
            .ok_or_else(|| refuse(&self.primary, "nobody is chosen yet"))?;
        if self.member(&target).is_none_or(|m| m.run_id != run_id) {
            return Err(refuse(&target, "another process than the one chosen"));
        }
        let mut next = Self {
            primary: target.clone(),
            mode: Mode::Serving,
            lineage,
            ..self.clone()
        };
        for member in &mut next.members {
            if member.node == target {
                member.role = NodeRole::Primary;
            } else if member.role == NodeRole::Primary {
                member.role = NodeRole::Replica;
            }
            // The new primary is in sync with itself; the others prove it anew.
            member.in_sync = member.node == target;
        }
        Ok(next)
    }

    fn failover_of(&self, task: &TaskId) -> Result<&Failover, TransitionError> {
        match self.failover() {
            Some(failover) if failover.task == *task => Ok(failover),
            Some(_) => Err(TransitionError::NotThisHandover {
                shard: self.id.clone(),
                epoch: self.epoch,
            }),
            None => Err(self.wrong_mode("FailingOver")),
        }
    }
}
