//! Each decision of a replacement as the records that go into one transaction.
//!
//! Invariant: record and phase change together, so that a successor finds them in step.

use slotmesh_topology::{Shard, TransitionError};

use super::{CATCH_UP_MS_MAX, Decision, View};
use crate::{
    failover::Write,
    spec::{NodeReplacement, ReplacePhase, Spec, State, Task},
};

/// The task in `phase` since now. An operator's choice is spent.
#[must_use]
pub fn with_phase(task: &Task, phase: ReplacePhase, message: &str, now_ms: u64) -> Task {
    let was_parked = task.is_parked();
    let mut next = Task {
        state: match phase {
            ReplacePhase::Parked => State::NeedsOperator,
            _ => State::Running,
        },
        message: message.to_owned(),
        choice: None,
        ..task.clone()
    };
    if was_parked {
        next.deadline_ms = now_ms + CATCH_UP_MS_MAX;
    }
    edit(next, |replacement| {
        replacement.phase_since_ms = now_ms.max(replacement.phase_since_ms + 1);
        replacement.phase = phase;
        message.clone_into(&mut replacement.message);
    })
}

fn edit(mut task: Task, change: impl FnOnce(&mut NodeReplacement)) -> Task {
    if let Spec::Replace(replacement) = &mut task.spec {
        change(replacement);
    }
    task
}

fn ended(task: &Task, state: State, message: &str, now_ms: u64) -> Task {
    Task {
        state,
        ..with_phase(task, ReplacePhase::Done, message, now_ms)
    }
}

/// What a decision writes; `None` for one that writes nothing.
///
/// # Errors
/// When the record does not allow it: it has moved on since.
pub fn write(view: View<'_>, decision: &Decision) -> Result<Option<Write>, TransitionError> {
    let (replacement, shard, now_ms) = (view.replacement, view.shard, view.scene.now_ms);
    let phased = |phase, message: &str| with_phase(view.task, phase, message, now_ms);
    let written = |task: Task, shard: Option<Shard>, event| Write {
        message: task.message.clone(),
        task,
        shard,
        event,
    };
    Ok(Some(match decision {
        Decision::Wait { .. } => return Ok(None),
        Decision::Join => {
            let old = shard.member(&replacement.from);
            let role = old.map_or(slotmesh_topology::NodeRole::Replica, |m| m.role);
            let next = shard.join(&replacement.to, &replacement.to_host, role)?;
            let message = format!("{} joins on {}", replacement.to, replacement.to_host);
            let task = phased(ReplacePhase::CatchUp, &message);
            written(task, Some(next), "Join")
        }
        Decision::Expel => {
            let next = shard.expel(&replacement.from)?;
            let message = format!("{} is in sync, {} leaves", replacement.to, replacement.from);
            let task = phased(ReplacePhase::Leave, &message);
            written(task, Some(next), "Leave")
        }
        Decision::Drain(offset) => {
            let message = format!("{} is fed no more", replacement.leaver());
            let task = edit(phased(ReplacePhase::Drain, &message), |r| {
                r.drain_offset = *offset;
                r.epoch = shard.epoch;
            });
            written(task, None, "Drain")
        }
        Decision::Leave => {
            let next = shard.leave(replacement.leaver())?;
            let task = view.task;
            written(end(task, replacement, now_ms), Some(next), "Left")
        }
        Decision::TurnBack { why, on_request } => {
            let next = shard.retain(&replacement.from)?.expel(&replacement.to)?;
            let task = edit(phased(ReplacePhase::Leave, why), |r| {
                r.turned_back = true;
                r.on_request = *on_request;
            });
            written(task, Some(next), "TurnBack")
        }
        Decision::Advance(phase, message) => advance(view, *phase, message)?,
        Decision::End(state, message) => {
            written(ended(view.task, *state, message, now_ms), None, "Ended")
        }
    }))
}

/// The end of a task whose leaving node has left.
fn end(task: &Task, replacement: &NodeReplacement, now_ms: u64) -> Task {
    let (from, to) = (&replacement.from, &replacement.to);
    let (state, message) = if !replacement.turned_back {
        (State::Done, format!("{to} has the place of {from}"))
    } else if replacement.on_request {
        (State::Cancelled, format!("{to} has left again"))
    } else {
        let why = format!("{to} has left again: {}", replacement.message);
        (State::RolledBack, why)
    };
    ended(task, state, &message, now_ms)
}

/// A phase by itself. One who was turned back and is needed after all is fed again.
fn advance(view: View<'_>, phase: ReplacePhase, message: &str) -> Result<Write, TransitionError> {
    let (replacement, shard) = (view.replacement, view.shard);
    let mut task = with_phase(view.task, phase, message, view.scene.now_ms);
    let mut next = None;
    if phase == ReplacePhase::CatchUp && replacement.turned_back {
        next = Some(shard.retain(&replacement.to)?);
        task = edit(task, |r| r.turned_back = false);
    }
    Ok(Write {
        task,
        shard: next,
        event: phase.name(),
        message: message.to_owned(),
    })
}
