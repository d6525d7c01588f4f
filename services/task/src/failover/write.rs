//! What a failover writes: its declaration, its end of the task that had the shard, and each decision
//! as the records that go into one transaction.
//!
//! Invariant: record and phase change together, so that a successor finds them in step.

use slotmesh_topology::{Lineage, Shard, ShardId, TaskId, TransitionError};

use super::{Decision, TRY_MS_MAX, View, is_parked};
use crate::{
    detect::{self, Loss},
    spec::{FailoverPhase, Phase, ShardFailover, Spec, State, Task},
};

/// What a decision writes, in one transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Write {
    /// The task's next state.
    pub task: Task,
    /// The shard's next record, where it changes.
    pub shard: Option<Shard>,
    /// What happened, for the task's events.
    pub event: &'static str,
    /// And why.
    pub message: String,
}

/// The task and the record with which a primary is declared lost. From that write on nobody has the
/// shard's epoch.
///
/// # Errors
/// When the shard has never served, or a failover is under way.
pub fn declare(
    id: TaskId,
    shard: &Shard,
    loss: &Loss,
    now_ms: u64,
) -> Result<(Task, Shard), TransitionError> {
    let mut next = shard.fail_over(&id, now_ms)?;
    let mut phase = FailoverPhase::Fence;
    if let Some(proof) = loss.proof {
        next = next.prove(&id, proof)?;
        phase = FailoverPhase::Choose;
    }
    let lost = shard.primary_member();
    let failover = ShardFailover {
        shard: shard.id.clone(),
        from: shard.primary.clone(),
        from_run_id: lost.map(|m| m.run_id.clone()).unwrap_or_default(),
        from_epoch: shard.epoch,
        to: None,
        phase,
        phase_since_ms: now_ms,
        message: String::new(),
        cause: loss.cause.clone(),
        proof: loss.proof,
        hold_us: 0,
    };
    let task = Task {
        id,
        instance: shard.instance.clone(),
        spec: Spec::Failover(failover),
        state: State::Running,
        message: loss.cause.clone(),
        created_ms: now_ms,
        updated_ms: now_ms,
        deadline_ms: now_ms + TRY_MS_MAX,
        event_count: 0,
        cancel_requested: false,
        not_before_ms: 0,
        in_window: false,
        choice: None,
        trace_id: String::new(),
        copied: crate::spec::Copied::default(),
    };
    Ok((task, next))
}

/// The task that has the shard, without it: failover `by` takes it over. `None` when it can't be
/// taken from that task.
#[must_use]
pub fn supersede(owner: &Task, shard: &ShardId, by: &TaskId, now_ms: u64) -> Option<Task> {
    let why = format!("its primary was lost: task {by} fails it over");
    match &owner.spec {
        Spec::Switchover(switches) => {
            let part = switches.iter().find(|s| s.shard == *shard)?;
            Some(match part.phase {
                Phase::Done | Phase::RolledBack => owner.clone(),
                Phase::Settle => owner.with_phase(shard, Phase::Done, &why, now_ms),
                _ => owner.with_phase(shard, Phase::RolledBack, &why, now_ms),
            })
        }
        Spec::Failover(f) if f.phase == FailoverPhase::Settle && f.shard == *shard => {
            Some(with_phase(owner, FailoverPhase::Done, &why, now_ms))
        }
        // It waits, and goes on with the shard as the failover leaves it.
        Spec::Replace(replacement) if replacement.shard == *shard => Some(Task {
            message: why,
            ..owner.clone()
        }),
        // As a replacement; its switch, if one is under way, is over.
        Spec::Upgrade(upgrade) => {
            let part = upgrade.part(shard.as_str())?;
            let end = match part.switch.as_ref().map(|s| s.phase) {
                None | Some(Phase::Done | Phase::RolledBack) => return Some(owner.clone()),
                Some(Phase::Settle) => Phase::Done,
                Some(_) => Phase::RolledBack,
            };
            Some(owner.with_phase(shard, end, &why, now_ms))
        }
        _ => None,
    }
}

/// The task in `phase` since now. A phase entered again is another try: its step is asked for anew.
/// An operator's choice is spent.
#[must_use]
pub fn with_phase(task: &Task, phase: FailoverPhase, message: &str, now_ms: u64) -> Task {
    let was_parked = is_parked(task);
    let mut next = Task {
        state: match phase {
            FailoverPhase::Parked => State::NeedsOperator,
            FailoverPhase::Done => State::Done,
            _ => State::Running,
        },
        message: message.to_owned(),
        choice: None,
        ..task.clone()
    };
    if was_parked {
        next.deadline_ms = now_ms + TRY_MS_MAX;
    }
    if let Spec::Failover(failover) = &mut next.spec {
        failover.phase_since_ms = now_ms.max(failover.phase_since_ms + 1);
        failover.phase = phase;
        message.clone_into(&mut failover.message);
    }
    next
}

/// The record with the chosen node as the primary. In the middle of an upgrade the others may have another
/// engine: what they refuse of the new primary from here on only their own counters say. Where it was the
/// older one that followed the lost primary, those with that one's engine know all that it says.
fn promoted(
    view: View<'_>,
    run_id: &str,
    lineage: Option<Lineage>,
) -> Result<Shard, TransitionError> {
    let mut next = view.shard.promoted(&view.task.id, run_id, lineage)?;
    let engine = next.primary_member().map(|m| m.engine.clone());
    let lost = view.shard.primary_member().map(|m| m.engine.clone());
    let newer = (view.shard.older(&next.primary)).and(lost);
    let members = next.members.clone();
    for member in members
        .iter()
        .filter(|m| Some(&m.engine) != engine.as_ref() && Some(&m.engine) != newer.as_ref())
    {
        if next.older(&member.node).is_some() {
            continue;
        }
        next = next.is_older(detect::older(member, view.scene))?;
    }
    Ok(next)
}

/// What a decision writes; `None` for one that writes nothing.
///
/// # Errors
/// When the record does not allow it: it has moved on since.
pub fn write(view: View<'_>, decision: &Decision) -> Result<Option<Write>, TransitionError> {
    let (id, now_ms) = (&view.task.id, view.scene.now_ms);
    let phased = |phase, message: &str| with_phase(view.task, phase, message, now_ms);
    let edit = |mut task: Task, change: &dyn Fn(&mut ShardFailover)| {
        if let Spec::Failover(failover) = &mut task.spec {
            change(failover);
        }
        task
    };
    let written = match decision {
        Decision::Wait { .. } | Decision::Promote | Decision::Stop => return Ok(None),
        Decision::Prove(proof) => Write {
            task: edit(phased(FailoverPhase::Choose, proof.name()), &|f| {
                f.proof = Some(*proof);
            }),
            shard: Some(view.shard.prove(id, *proof)?),
            event: "Prove",
            message: proof.name().to_owned(),
        },
        Decision::Choose { node, run_id, why } => Write {
            task: edit(phased(FailoverPhase::Promote, why), &|f| {
                f.to = Some(node.clone());
            }),
            shard: Some(view.shard.choose(id, node, run_id)?),
            event: "Choose",
            message: why.clone(),
        },
        Decision::Advance(phase, message) => Write {
            task: phased(*phase, message),
            shard: None,
            event: phase.name(),
            message: message.clone(),
        },
        Decision::Commit { run_id, lineage } => Write {
            task: phased(FailoverPhase::Settle, ""),
            shard: Some(promoted(view, run_id, lineage.clone())?),
            event: "Commit",
            message: "the new primary has the epoch".into(),
        },
        Decision::End(note) => {
            let message = match &view.failover.to {
                Some(to) => format!("{to} is the primary; {note}"),
                None => note.clone(),
            };
            let message = message.trim_end_matches("; ").to_owned();
            let mut task = phased(FailoverPhase::Done, &message);
            if view.failover.phase != FailoverPhase::Settle {
                task.state = State::NeedsOperator;
            }
            Write {
                task,
                shard: None,
                event: "Ended",
                message,
            }
        }
    };
    Ok(Some(written))
}
