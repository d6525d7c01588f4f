//! The transitions of a failover: a primary is declared lost, its fence is proven, another node is
//! chosen and promoted.
//!
//! Invariant: the declaration ends the lost epoch, and nobody is chosen before it is known why the
//! lost primary takes no more writes.

use super::{Mode, NodeRole, Shard, TransitionError};
use crate::id::{Epoch, NodeId, TaskId};

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

/// How many failovers back a shard remembers where the histories departed. A primary that was away
/// for more of them has long lost its backlog, and each costs the record and every assignment some
/// 60 bytes.
pub const DEPARTURES_MAX: usize = 8;

/// Where a failover left a history.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Departure {
    /// The one that the failover began; 0: written by a release that did not say.
    pub epoch: Epoch,
    /// What the new primary said of it; `None`: it knew nothing of any history before its own.
    pub from: Option<Lineage>,
}

/// The list with one more. A new primary that goes on from an older history than the newest one has
/// nothing of what the later ones wrote beyond that point: they count offsets alike.
fn departed(before: &[Departure], new: Departure) -> Vec<Departure> {
    let mut all = before.to_vec();
    if let Some(from) = &new.from {
        let is_same = |d: &Departure| d.from.as_ref().is_some_and(|l| l.replid == from.replid);
        let branch = all.iter().position(is_same).unwrap_or(all.len());
        for later in all[branch..].iter_mut().filter_map(|d| d.from.as_mut()) {
            later.offset = later.offset.min(from.offset);
        }
    }
    all.push(new);
    all.drain(..all.len().saturating_sub(DEPARTURES_MAX));
    all
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
            departures: departed(
                &self.departures,
                Departure {
                    epoch: self.epoch,
                    from: lineage,
                },
            ),
            ..self.clone()
        };
        next.roster.led_by(&target);
        for member in &mut next.members {
            if member.node == target {
                member.role = NodeRole::Primary;
                member.leaving = false;
                member.exchange = None;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn departure(epoch: u64, from: Option<(&str, u64)>) -> Departure {
        Departure {
            epoch: Epoch(epoch),
            from: from.map(|(replid, offset)| Lineage {
                replid: replid.to_owned(),
                offset,
            }),
        }
    }

    fn after(list: &[(u64, Option<(&str, u64)>)]) -> Vec<Departure> {
        let all = list.iter().map(|(epoch, from)| departure(*epoch, *from));
        all.fold(Vec::new(), |before, new| departed(&before, new))
    }

    #[test]
    fn the_last_failovers_are_remembered_and_older_ones_are_not() {
        let names: Vec<String> = (0..20).map(|n| format!("h{n}")).collect();
        let all: Vec<_> = (0..20)
            .map(|n| (n, Some((names[n as usize].as_str(), n * 10))))
            .collect();
        let kept = after(&all);
        assert_eq!(kept.len(), DEPARTURES_MAX);
        assert_eq!(kept[7], departure(19, Some(("h19", 190))));
        assert_eq!(kept[0], departure(12, Some(("h12", 120))));
    }

    #[test]
    fn going_on_from_an_older_history_takes_back_what_came_after_it() {
        let kept = after(&[
            (2, Some(("w", 40))),
            (3, Some(("x", 100))),
            (4, None),
            (5, Some(("y", 200))),
            (6, Some(("x", 60))),
        ]);
        let offsets: Vec<_> = kept
            .iter()
            .map(|d| d.from.as_ref().map(|l| l.offset))
            .collect();
        assert_eq!(offsets, [Some(40), Some(60), None, Some(60), Some(60)]);
    }
}
