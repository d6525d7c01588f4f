//! Each decision about a proxy as the records that go into one transaction, and where that leads the
//! task.
//!
//! Invariant: placement and phase change together, so that a successor finds them in step.

use slotmesh_topology::Placement;

use super::{Change, Changes, Decision, ProxyPhase, View};
use crate::{
    parts,
    spec::{Spec, State, Task},
};

/// How a proxy says that it was not begun because of another one.
pub(super) const HALTED: &str = "halted: ";

/// Records that are written together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Write {
    /// The task as it will be.
    pub task: Task,
    /// The proxy's next placement.
    pub placement: Option<Placement>,
    /// The event's step.
    pub event: &'static str,
    /// Its words.
    pub message: String,
}

/// Writes the placement of before.
pub(super) fn turn_back(
    view: &View<'_>,
    placement: &Placement,
    why: &str,
    on_request: bool,
) -> Decision {
    let part = view.part;
    let next = placement.returned(&part.from_program, part.from_generation);
    let task = with(view, why, |part| {
        enter(part, ProxyPhase::Back, view.now_ms);
        part.why_back = Some(why.to_owned());
        part.on_request = on_request;
    });
    write(task, Some(next), "Back", why.to_owned())
}

pub(super) fn park(view: &View<'_>, why: &str) -> Decision {
    let task = with(view, why, |part| {
        enter(part, ProxyPhase::Parked, view.now_ms)
    });
    write(task, None, "NeedsOperator", why.to_owned())
}

pub(super) fn advance(
    view: &View<'_>,
    phase: ProxyPhase,
    message: &str,
    change: impl FnOnce(&mut Change),
) -> Decision {
    let task = with(view, message, |part| {
        enter(part, phase, view.now_ms);
        change(part);
    });
    write(task, None, phase.name(), message.to_owned())
}

pub(super) fn end(view: &View<'_>, phase: ProxyPhase, message: &str) -> Decision {
    let task = with(view, message, |part| enter(part, phase, view.now_ms));
    write(task, None, phase.name(), message.to_owned())
}

/// As [`wait`], with a clock of its own for each kind of thing that is waited for.
pub(super) fn wait_at_most(
    view: &View<'_>,
    limit_ms: u64,
    kind: &str,
    what: &str,
    late: impl FnOnce() -> Decision,
) -> Decision {
    let kind = format!("waiting for {kind}: ");
    let words = format!("{kind}{what}");
    let part = view.part;
    if !part.message.starts_with(&kind) {
        let task = with(view, &words, |part| enter(part, part.phase, view.now_ms));
        return write(task, None, "Waiting", words);
    }
    let until_ms = view.limit(part.phase_since_ms + limit_ms);
    if view.now_ms >= until_ms {
        return late();
    }
    match part.message == words {
        true => Decision::Wait { until_ms },
        false => write(with(view, &words, |_| {}), None, "Waiting", words),
    }
}

/// What is waited for is written once, to be shown.
pub(super) fn wait(view: &View<'_>, until_ms: u64, what: &str) -> Decision {
    let words = format!("waiting for {what}");
    if view.part.message == words {
        return Decision::Wait { until_ms };
    }
    write(with(view, &words, |_| {}), None, "Waiting", words)
}

pub(super) fn write(
    task: Task,
    placement: Option<Placement>,
    event: &'static str,
    message: String,
) -> Decision {
    Decision::Write(Box::new(Write {
        task,
        placement,
        event,
        message,
    }))
}

pub(super) fn enter(part: &mut Change, phase: ProxyPhase, now_ms: u64) {
    part.phase = phase;
    part.phase_since_ms = now_ms;
}

/// The task with one proxy's part changed; its own state and line follow.
pub(super) fn with(view: &View<'_>, message: &str, change: impl FnOnce(&mut Change)) -> Task {
    let mut task = view.task.clone();
    if let Spec::Proxies(changes) = &mut task.spec {
        if let Some(part) = changes.part_mut(&view.part.proxy) {
            message.clone_into(&mut part.message);
            change(part);
        }
        task.message = summary(changes);
        task.state = match changes.is_parked() {
            true => State::NeedsOperator,
            false => State::Running,
        };
    }
    task
}

/// Where the change is, in a line.
fn summary(changes: &Changes) -> String {
    let all = changes.proxies.len();
    let mut parts = vec![format!(
        "{} of {all} proxies done",
        count(changes, ProxyPhase::Done)
    )];
    for phase in ProxyPhase::ALL
        .into_iter()
        .filter(|p| *p != ProxyPhase::Done)
    {
        match count(changes, phase) {
            0 => {}
            here => parts.push(format!("{here} in {}", phase.name())),
        }
    }
    if changes.paused {
        parts.push("paused".into());
    }
    parts.join(", ")
}

fn count(changes: &Changes, phase: ProxyPhase) -> usize {
    changes.proxies.iter().filter(|p| p.phase == phase).count()
}

/// Where the task ends once every proxy has, and why.
#[must_use]
pub fn ended(task: &Task, changes: &Changes) -> Option<(State, String)> {
    if !changes.proxies.iter().all(|p| p.phase.is_ended()) {
        return None;
    }
    let what = match changes.restart {
        true => "run a new process",
        false => "run it",
    };
    let others = changes
        .proxies
        .iter()
        .filter(|p| p.phase != ProxyPhase::Done);
    let why = others
        .filter(|p| !p.message.starts_with(HALTED))
        .map(|p| format!("proxy {} ({}): {}", p.proxy, p.phase.name(), p.message));
    let (done, all) = (count(changes, ProxyPhase::Done), changes.proxies.len());
    Some(match done == all {
        true => (State::Done, format!("all {all} proxies {what}")),
        false => parts::fell_short(
            done,
            task.cancel_requested,
            &format!("{done} of {all} proxies {what}, the others serve as before"),
            why.collect(),
        ),
    })
}
