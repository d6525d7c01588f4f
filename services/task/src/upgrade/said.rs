//! What an operator may say to an upgrade, and what becomes of it.
//!
//! Invariant: what is said is written into the parts that it concerns at once; nothing waits to be acted
//! upon by shards that come to it later.

use super::{Upgrade, UpgradePhase};
use crate::spec::{Choice, Spec, State, Task};

/// What an operator may choose now.
#[must_use]
pub fn menu(task: &Task) -> &'static [Choice] {
    let Spec::Upgrade(upgrade) = &task.spec else {
        return &[];
    };
    if task.state.is_ended() && !task.is_parked() {
        return match task.state {
            State::NeedsOperator => &[Choice::Retry],
            _ => &[],
        };
    }
    let is_in = |phase| upgrade.shards.iter().any(|s| s.phase == phase);
    match (
        upgrade.is_parked(),
        upgrade.paused,
        is_in(UpgradePhase::Bake),
    ) {
        (true, false, _) => &[Choice::Retry, Choice::Undo, Choice::Pause],
        (true, true, _) => &[Choice::Retry, Choice::Undo, Choice::Resume],
        (false, false, true) => &[Choice::Finalize, Choice::Undo, Choice::Pause],
        (false, true, true) => &[Choice::Finalize, Choice::Undo, Choice::Resume],
        (false, false, false) => &[Choice::Pause],
        (false, true, false) => &[Choice::Resume],
    }
}

/// The task after a choice of its menu; one that is not on it changes nothing.
#[must_use]
pub fn resolved(task: &Task, choice: Choice, now_ms: u64) -> Task {
    let mut next = task.clone();
    if !menu(task).contains(&choice) {
        return next;
    }
    match choice {
        Choice::Retry => return retried(next, now_ms),
        Choice::Undo => {
            next = retried(next, now_ms);
            next.cancel_requested = true;
        }
        _ => edit(&mut next, |upgrade| match choice {
            Choice::Pause => upgrade.paused = true,
            Choice::Resume => {
                upgrade.paused = false;
                upgrade.paused_why.clear();
            }
            Choice::Finalize => {
                let baking = |s: &&mut super::ShardUpgrade| s.phase == UpgradePhase::Bake;
                upgrade
                    .shards
                    .iter_mut()
                    .filter(baking)
                    .for_each(|s| s.finalize = true);
            }
            _ => {}
        }),
    }
    next
}

/// The task once more: parked shards go on where they were; of an ended task those begin anew that went
/// back.
#[must_use]
pub fn retried(mut task: Task, now_ms: u64) -> Task {
    let is_over = task.state.is_ended() && !task.is_parked();
    if is_over {
        task.cancel_requested = false;
    }
    edit(&mut task, |upgrade| {
        for part in &mut upgrade.shards {
            let phase = match part.phase {
                UpgradePhase::Parked => part.parked_in.unwrap_or(UpgradePhase::Replicas),
                UpgradePhase::RolledBack if is_over => UpgradePhase::Stage,
                _ => continue,
            };
            if is_over {
                part.held_us = part.total_hold_us();
                (part.switch, part.rollback) = (None, None);
                (part.why_back, part.on_request, part.blameless) = (None, false, false);
                // What they run now is noted when their hosts have tried the engine.
                part.nodes.clear();
                part.drain = None;
            }
            part.phase = phase;
            part.phase_since_ms = now_ms.max(part.phase_since_ms + 1);
            part.message = "an operator says: try again".into();
            (part.tries, part.parked_in) = (0, None);
            part.retried = !is_over;
        }
    });
    task.state = State::Running;
    task.choice = None;
    task
}

fn edit(task: &mut Task, change: impl FnOnce(&mut Upgrade)) {
    if let Spec::Upgrade(upgrade) = &mut task.spec {
        change(upgrade);
    }
}
