//! What an operator may say to a change of proxies, and what becomes of it.
//!
//! Invariant: what is said is written into the parts that it concerns at once.

use super::{Change, Changes, ProxyPhase};
use crate::spec::{Choice, Spec, State, Task};

/// What an operator may choose now.
#[must_use]
pub fn menu(task: &Task) -> &'static [Choice] {
    let Spec::Proxies(changes) = &task.spec else {
        return &[];
    };
    if task.state.is_ended() && !task.is_parked() {
        return match task.state {
            State::NeedsOperator => &[Choice::Retry],
            _ => &[],
        };
    }
    let bakes = changes.proxies.iter().any(|p| p.phase == ProxyPhase::Bake);
    match (changes.is_parked(), changes.paused, bakes) {
        (true, ..) => &[Choice::Retry, Choice::Finalize],
        (false, false, true) => &[Choice::Finalize, Choice::Pause],
        (false, true, true) => &[Choice::Finalize, Choice::Resume],
        (false, false, false) => &[Choice::Pause],
        (false, true, false) => &[Choice::Resume],
    }
}

/// The task after a choice of its menu; one that is not on it changes nothing.
#[must_use]
pub fn resolved(task: &Task, choice: Choice, now_ms: u64) -> Task {
    let next = task.clone();
    if !menu(task).contains(&choice) {
        return next;
    }
    match choice {
        Choice::Retry => retried(next, now_ms),
        Choice::Pause => edit(next, |changes| changes.paused = true),
        Choice::Resume => edit(next, |changes| changes.paused = false),
        Choice::Finalize => {
            let waits = |p: &&mut Change| matches!(p.phase, ProxyPhase::Bake | ProxyPhase::Parked);
            edit(next, |changes| {
                let waiting = changes.proxies.iter_mut().filter(waits);
                waiting.for_each(|p| p.finalize = true);
            })
        }
        Choice::Undo | Choice::AcceptLoss => next,
    }
}

/// The task once more: a parked proxy tries to go back again; of an ended task those begin anew that
/// serve as before.
#[must_use]
pub fn retried(mut task: Task, now_ms: u64) -> Task {
    let is_over = task.state.is_ended() && !task.is_parked();
    if is_over {
        task.cancel_requested = false;
    }
    task.state = State::Running;
    task.choice = None;
    edit(task, |changes| {
        for part in &mut changes.proxies {
            match part.phase {
                ProxyPhase::Parked => {
                    part.phase = ProxyPhase::Back;
                    // What has failed once is not tried again under the same number.
                    part.generation = 0;
                }
                ProxyPhase::RolledBack | ProxyPhase::Skipped if is_over => {
                    part.phase = ProxyPhase::Ready;
                    part.generation = 0;
                    (part.why_back, part.on_request) = (None, false);
                    part.successor = None;
                }
                _ => continue,
            }
            part.phase_since_ms = now_ms;
            part.message = "an operator says: try again".into();
            part.finalize = false;
        }
    })
}

fn edit(mut task: Task, change: impl FnOnce(&mut Changes)) -> Task {
    if let Spec::Proxies(changes) = &mut task.spec {
        change(changes);
    }
    task
}
