//! Each decision about a proxy as the records that go into one transaction, and where that leads the
//! task.
//!
//! Invariant: placement and phase change together, so that a successor finds them in step.

use slotmesh_topology::{Instance, Placement, ProxyId};

use super::{Change, Changes, Decision, ProxyPhase, View};
use crate::{
    observe::ProxyProcess,
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
    /// What becomes of the instance's placements.
    pub placed: Placed,
    /// The event's step.
    pub event: &'static str,
    /// Its words.
    pub message: String,
}

/// What becomes of an instance's placements.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Placed {
    /// They stay.
    Same,
    /// The proxy's placement is this one now.
    Changed(Placement),
    /// Another proxy.
    Added(Placement),
    /// This one's agent is to remove it.
    Removed(ProxyId),
    /// The proxy's placement is this one now, and the other one's agent is to remove it.
    Exchanged(Placement, ProxyId),
}

impl Placed {
    /// The instance with that; `None`: its record stays as it is.
    #[must_use]
    pub fn on(&self, instance: &Instance, now_ms: u64) -> Option<Instance> {
        let changed = |instance: &Instance, placement: &Placement| {
            let mut next = instance.clone();
            let proxies = next.proxies.iter_mut();
            for one in proxies.filter(|p| p.proxy == placement.proxy) {
                one.clone_from(placement);
            }
            next
        };
        Some(match self {
            Self::Same => return None,
            Self::Changed(placement) => changed(instance, placement),
            Self::Added(placement) => {
                let mut next = instance.clone();
                next.proxies.push(placement.clone());
                next
            }
            Self::Removed(proxy) => instance.without_proxy(proxy, now_ms),
            Self::Exchanged(placement, proxy) => {
                changed(instance, placement).without_proxy(proxy, now_ms)
            }
        })
    }
}

/// Whether the process of before may still have to be ended: until one serves that the record is about.
/// Before that a process that was told to take no more clients may be there, whatever was tried since.
pub(super) fn is_cold(view: &View<'_>, placement: &Placement) -> bool {
    let is_recorded = |p: &ProxyProcess| p.serves(&placement.program, placement.generation);
    placement.cold && !view.process().is_some_and(is_recorded)
}

/// Writes the placement of before.
pub(super) fn turn_back(
    view: &View<'_>,
    placement: &Placement,
    why: &str,
    on_request: bool,
) -> Decision {
    let part = view.part;
    let next = Placement {
        workers: part.from_workers,
        cold: is_cold(view, placement),
        ..placement.returned(&part.from_program, part.from_generation)
    };
    let task = with(view, why, |part| {
        enter(part, ProxyPhase::Back, view.now_ms);
        part.why_back = Some(why.to_owned());
        part.on_request = on_request;
    });
    write(task, Placed::Changed(next), "Back", why.to_owned())
}

pub(super) fn park(view: &View<'_>, why: &str) -> Decision {
    let task = with(view, why, |part| {
        enter(part, ProxyPhase::Parked, view.now_ms)
    });
    write(task, Placed::Same, "NeedsOperator", why.to_owned())
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
    write(task, Placed::Same, phase.name(), message.to_owned())
}

pub(super) fn end(view: &View<'_>, phase: ProxyPhase, message: &str) -> Decision {
    let task = with(view, message, |part| enter(part, phase, view.now_ms));
    write(task, Placed::Same, phase.name(), message.to_owned())
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
        return write(task, Placed::Same, "Waiting", words);
    }
    let until_ms = view.limit(part.phase_since_ms + limit_ms);
    if view.now_ms >= until_ms {
        return late();
    }
    match part.message == words {
        true => Decision::Wait { until_ms },
        false => write(with(view, &words, |_| {}), Placed::Same, "Waiting", words),
    }
}

/// What is waited for is written once, to be shown.
pub(super) fn wait(view: &View<'_>, until_ms: u64, what: &str) -> Decision {
    let words = format!("waiting for {what}");
    if view.part.message == words {
        return Decision::Wait { until_ms };
    }
    write(with(view, &words, |_| {}), Placed::Same, "Waiting", words)
}

pub(super) fn write(task: Task, placed: Placed, event: &'static str, message: String) -> Decision {
    Decision::Write(Box::new(Write {
        task,
        placed,
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
    let what = match (&changes.rebuild, changes.restart) {
        (Some(_), _) => "are on another host",
        (None, true) => "run a new process",
        (None, false) => "run it",
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
