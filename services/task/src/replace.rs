//! Replacing a node of a shard by one on another host: from what is recorded and observed, the next
//! act.
//!
//! The new node joins before the old one leaves, so that no moment has fewer copies than before. Most
//! of the work is convergence: the record names the new member, its agent starts it and lets it
//! follow; the record names the leaving one, its agents let go.
//!
//! **Invariants.** Nobody leaves before somebody in sync has its place, or it is the new node that
//! leaves. Whoever leaves is a member until its right to follow is gone, and, with a durability of k,
//! until k of those that stay have all that may have been confirmed with its help. The primary serves
//! all the time, at its epoch.

mod begin;
pub(crate) mod leave;
mod write;

pub use begin::{Lost, due, plan};
pub use write::{with_phase, write};

use slotmesh_topology::{Member, Mode, Shard};

use crate::{
    detect::{self, Scene},
    observe::{NodeView, ProcessState},
    spec::{Choice, NodeReplacement, ReplacePhase, State, Task},
};

/// How long the new node may take to have the primary's data before an operator is asked: 1 TB at
/// 280 MB/s. It is counted anew from a retry.
pub const CATCH_UP_MS_MAX: u64 = 60 * 60 * 1_000;
/// How long the primary's agent may take to let go of the leaving node, and the others to catch up
/// with what it had, before an operator is asked.
pub const LEAVE_MS_MAX: u64 = 60_000;
/// A host without a lease for so long is not waited for by a node that is to join on it.
pub const NEW_HOST_GONE_MS: u64 = 30_000;

/// The next act.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Nothing to do until something changes or the time comes.
    Wait {
        /// Look again then, whatever happens.
        until_ms: u64,
        /// For what, to tell the operator.
        what: String,
    },
    /// Write the new member, together with phase `CatchUp`.
    Join,
    /// Write that the old node leaves, together with phase Leave.
    Expel,
    /// Write up to where the others must come, together with phase Drain.
    Drain(u64),
    /// Write the record without the leaving node; end the task and free the shard.
    Leave,
    /// Write that the new node leaves again, together with phase Leave.
    TurnBack {
        /// Why.
        why: String,
        /// An operator wants it.
        on_request: bool,
    },
    /// Write the phase; an operator's choice is spent with it.
    Advance(ReplacePhase, String),
    /// End the task without further effect, and free the shard.
    End(State, String),
}

/// All that the decision depends on.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The task. It has the shard's lock.
    pub task: &'a Task,
    /// How far it has come.
    pub replacement: &'a NodeReplacement,
    /// The shard's record.
    pub shard: &'a Shard,
    /// What is observed.
    pub scene: Scene<'a>,
}

/// What an operator may choose now.
#[must_use]
pub fn menu(task: &Task) -> &'static [Choice] {
    match &task.spec {
        crate::Spec::Replace(replacement) if task.is_parked() => match replacement.turned_back {
            true => &[Choice::Retry],
            false => &[Choice::Retry, Choice::Undo],
        },
        _ => &[],
    }
}

/// The next act.
#[must_use]
pub fn decide(view: View<'_>) -> Decision {
    let (task, replacement) = (view.task, view.replacement);
    if replacement.phase == ReplacePhase::Done {
        return wait(u64::MAX, "");
    }
    if view.shard.mode != Mode::Serving {
        return wait(u64::MAX, "the shard to serve");
    }
    let undo = task.cancel_requested || task.choice == Some(Choice::Undo);
    if undo && !replacement.turned_back && replacement.phase != ReplacePhase::Done {
        if let Some(back) = turn_back(&view, "an operator wants it undone", true) {
            return back;
        }
        if task.choice.is_some() {
            let why = "can't be undone: without the new node nobody could take the primary's place";
            return Decision::Advance(ReplacePhase::Parked, why.into());
        }
    }
    if replacement.phase == ReplacePhase::Parked {
        return parked(&view);
    }
    if let Some(over) = overtaken(&view) {
        return over;
    }
    match replacement.phase {
        ReplacePhase::Join => join(&view),
        ReplacePhase::CatchUp => catch_up(&view),
        ReplacePhase::Leave => leave(&view),
        _ => drain(&view),
    }
}

fn wait(until_ms: u64, what: impl Into<String>) -> Decision {
    Decision::Wait {
        until_ms,
        what: what.into(),
    }
}

/// A failover or a restart went over it: who was to leave has left, or is the primary now.
fn overtaken(view: &View<'_>) -> Option<Decision> {
    let (replacement, shard) = (view.replacement, view.shard);
    let (from, to) = (&replacement.from, &replacement.to);
    let leaver = replacement.leaver();
    if shard.member(leaver).is_none() && !has_not_joined(replacement) {
        let state = match replacement.turned_back {
            true => State::RolledBack,
            false => State::Done,
        };
        return Some(Decision::End(state, format!("{leaver} has left already")));
    }
    if shard.primary == *from && !replacement.turned_back {
        let why = format!("{from} is the primary now");
        // Another replica has to be in sync first.
        let until_ms = view.task.deadline_ms;
        let or_wait = || match view.scene.now_ms < until_ms {
            true => wait(
                until_ms,
                format!("{why}; waiting for another replica to catch up"),
            ),
            false => Decision::Advance(ReplacePhase::Parked, why.clone()),
        };
        return Some(turn_back(view, &why, false).unwrap_or_else(or_wait));
    }
    if shard.primary == *to && replacement.turned_back {
        let why = format!("{to} is the primary now, so {from} leaves after all");
        return Some(Decision::Advance(ReplacePhase::CatchUp, why));
    }
    None
}

fn has_not_joined(replacement: &NodeReplacement) -> bool {
    replacement.phase == ReplacePhase::Join
}

/// The end without the new node, or what leads to it; `None` when it can't be spared any more.
fn turn_back(view: &View<'_>, why: &str, on_request: bool) -> Option<Decision> {
    let (replacement, shard) = (view.replacement, view.shard);
    if shard.member(&replacement.to).is_none() {
        let state = match on_request {
            true => State::Cancelled,
            false => State::RolledBack,
        };
        return Some(Decision::End(state, why.to_owned()));
    }
    let old_stays = shard.retain(&replacement.from).ok()?;
    old_stays.expel(&replacement.to).ok()?;
    Some(Decision::TurnBack {
        why: why.to_owned(),
        on_request,
    })
}

fn join(view: &View<'_>) -> Decision {
    let (replacement, shard) = (view.replacement, view.shard);
    let end = |why: String| Decision::End(State::RolledBack, why);
    let Some(old) = shard.member(&replacement.from) else {
        return end(format!(
            "{} is not of this shard any more",
            replacement.from
        ));
    };
    if !replacement.by_operator && view.scene.fleet.leases.contains(&old.host) {
        return end(format!("{} is back", old.host));
    }
    let (to, host) = (&replacement.to, &replacement.to_host);
    if !view.scene.fleet.hosts.contains(host) {
        return end(format!("{host} has no live agent any more"));
    }
    match shard.join(to, host, old.role) {
        Ok(_) => Decision::Join,
        Err(error) => end(error.to_string()),
    }
}

fn catch_up(view: &View<'_>) -> Decision {
    let (replacement, shard, scene) = (view.replacement, view.shard, view.scene);
    let (Some(old), Some(new)) = (
        shard.member(&replacement.from),
        shard.member(&replacement.to),
    ) else {
        // Whoever is missing has been looked for.
        return Decision::End(State::RolledBack, format!("{} has left", replacement.to));
    };
    if new.in_sync {
        return Decision::Expel;
    }
    if !replacement.by_operator
        && is_well(shard, old, scene)
        && let Some(back) = turn_back(view, &format!("{} is back, and in sync", old.node), false)
    {
        return back;
    }
    let gone_since = scene.sightings.lease_gone_since(&new.host);
    if gone_since.is_some_and(|since| scene.now_ms >= since + NEW_HOST_GONE_MS)
        && let Some(back) = turn_back(view, &format!("{} is lost, too", new.host), false)
    {
        return back;
    }
    let what = behind(new, scene.fleet.node(&new.node));
    if scene.now_ms >= view.task.deadline_ms {
        let why = format!("not done in time; still waiting for {what}; retry, or undo");
        return Decision::Advance(ReplacePhase::Parked, why);
    }
    let until_ms = gone_since.map_or(u64::MAX, |since| since + NEW_HOST_GONE_MS);
    wait(until_ms.min(view.task.deadline_ms), what)
}

/// Its agent is there, and it follows the primary: there is nothing to replace.
fn is_well(shard: &Shard, old: &Member, scene: Scene<'_>) -> bool {
    let Some(primary) = shard.primary_member() else {
        return false;
    };
    old.in_sync
        && scene.fleet.leases.contains(&old.host)
        && detect::alive(old, scene).is_some_and(|seen| seen.follows(&primary.address))
}

fn behind(new: &Member, seen: Option<&NodeView>) -> String {
    match seen {
        Some(seen) if seen.state == ProcessState::Failed => {
            format!("{}, which can't be started: {}", new.node, seen.error)
        }
        Some(seen) if seen.state == ProcessState::Running => {
            format!("{} to catch up with the primary", new.node)
        }
        _ => format!("{} to be started on {}", new.node, new.host),
    }
}

fn revoked<'a>(view: &View<'a>) -> Option<&'a NodeView> {
    leave::revoked(view.shard, view.scene, view.replacement.phase_since_ms)
}

fn leave(view: &View<'_>) -> Decision {
    let leaver = view.replacement.leaver();
    let Some(primary) = revoked(view) else {
        let what = format!("{} to let go of {leaver}", view.shard.primary);
        return patience(view, what);
    };
    match view.scene.durability {
        0 => left(view),
        _ => Decision::Drain(primary.offset),
    }
}

/// With durability: until so many have what may have been confirmed with the leaving one that each
/// set of nodes from which a failover could choose has one of them.
fn drain(view: &View<'_>) -> Decision {
    let (shard, replacement) = (view.shard, view.replacement);
    if replacement.epoch != shard.epoch {
        let why = "another epoch has begun meanwhile".into();
        return Decision::Advance(ReplacePhase::Leave, why);
    }
    match leave::lacking(shard, view.scene, replacement.drain_offset) {
        None => left(view),
        Some(needed) => {
            let leaver = replacement.leaver();
            let what = format!("{needed} replicas to have what {leaver} has confirmed");
            patience(view, what)
        }
    }
}

fn left(view: &View<'_>) -> Decision {
    match view.shard.leave(view.replacement.leaver()) {
        Ok(_) => Decision::Leave,
        Err(error) => patience(view, format!("the shard to do without: {error}")),
    }
}

fn patience(view: &View<'_>, what: String) -> Decision {
    let until_ms = view.replacement.phase_since_ms + LEAVE_MS_MAX;
    if view.scene.now_ms < until_ms {
        return wait(until_ms, what);
    }
    let why = format!("not done in time; still waiting for {what}; when that is mended, retry");
    Decision::Advance(ReplacePhase::Parked, why)
}

fn parked(view: &View<'_>) -> Decision {
    let (shard, replacement) = (view.shard, view.replacement);
    let is_leaving = shard
        .member(replacement.leaver())
        .is_some_and(|m| m.leaving);
    let phase = match shard.member(&replacement.to) {
        None if !replacement.turned_back => ReplacePhase::Join,
        _ if is_leaving || replacement.turned_back => ReplacePhase::Leave,
        _ => ReplacePhase::CatchUp,
    };
    if view.task.choice == Some(Choice::Retry) {
        return Decision::Advance(phase, "an operator says: try again".into());
    }
    let caught_up = shard.member(&replacement.to).is_some_and(|m| m.in_sync);
    if phase == ReplacePhase::CatchUp && caught_up {
        let why = format!("{} has caught up after all", replacement.to);
        return Decision::Advance(phase, why);
    }
    if phase == ReplacePhase::Leave
        && revoked(view).is_some()
        && left(view) == Decision::Leave
        && view.scene.durability == 0
    {
        let why = format!("{} is let go after all", replacement.leaver());
        return Decision::Advance(phase, why);
    }
    wait(u64::MAX, "an operator's choice")
}

#[cfg(test)]
#[path = "replace_tests.rs"]
mod tests;
