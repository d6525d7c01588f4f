//! The time in which one can go back, and whether one can.
//!
//! Invariant: the way back is called open only while the very process of the old primary has followed
//! the very process of the new one, without a full copy and without refusing a command. What is not
//! known counts against it.

use slotmesh_topology::{Member, NodeId, Older};

use super::{Decision, Rollback, View, gate, given_up, wait};
use crate::{detect, switchover::REPORT_AGE_MS_MAX};

/// For so long the old primary may not be in sync, after the switch or later: a link that breaks comes
/// back in less, and then it goes on in the stream, or the new one has to serve a copy in full, which is
/// seen. After it the way back is closed: a bake is no time to wait for a node that may not come back.
pub const FOLLOW_MS_MAX: u64 = 10_000;
/// A proxy that has had trouble with the new primary for so long is a reason to go back.
pub const TROUBLE_MS_MAX: u64 = 5_000;

/// Changes between open and unknown that are written down: each is an event of the task, and a link may come
/// and go all through a bake of days.
pub(super) const DOUBTS_MAX: u32 = 100;

/// How far back proxies' counts of faults go at most.
pub const FAULTS_WINDOW_MS: u64 = 10_000;
/// So many in that time, on top of twice those of before the switch, are no reason to go back: a node that is
/// full, or a connection that breaks, has as many on the old engine.
pub const FAULTS_MAX: u64 = 100;

/// What the way back will be judged by, taken before the switch to `target`: what happens in the middle
/// of it counts, too.
pub(super) fn baseline(view: &View<'_>, target: &Member) -> Rollback {
    let old = view.shard.primary_member();
    let old_seen = old.and_then(|m| detect::alive(m, view.scene));
    let errors = old_seen.and_then(|n| n.unexpected_errors);
    let new_seen = detect::alive(target, view.scene);
    let why = match (errors, new_seen) {
        (Some(_), Some(_)) => "",
        _ => "agents do not say what is needed to know that it is open",
    };
    Rollback {
        open: why.is_empty(),
        why: why.to_owned(),
        old: view.shard.primary.clone(),
        old_run_id: old.map(|m| m.run_id.clone()).unwrap_or_default(),
        old_unexpected_errors: errors.unwrap_or_default(),
        new: target.node.clone(),
        new_run_id: target.run_id.clone(),
        new_sync_full: new_seen.map_or(0, |n| n.sync_full),
        diverged: false,
        doubt: String::new(),
        doubts: 0,
        behind_since_ms: 0,
        faults_before: Some(gate::faults(view.scene.fleet, view.shard)),
        costs_before: gate::costs(view),
    }
}

/// The same for the shard's record, where everybody looks who may make the old primary a primary again.
pub(super) fn older(rollback: &Rollback) -> Older {
    Older {
        node: rollback.old.clone(),
        // What it has refused before is not known: nor is what it will.
        run_id: match rollback.open {
            true => rollback.old_run_id.clone(),
            false => String::new(),
        },
        refused: rollback.old_unexpected_errors,
    }
}

/// An open way back that is not known to be open at this moment, or is known again.
pub(super) fn doubt(view: &View<'_>) -> Option<Decision> {
    let rollback = view.part.rollback.as_ref().filter(|r| r.open)?;
    let (old, new, now_ms) = (&rollback.old, &rollback.new, view.scene.now_ms);
    let follows = view.shard.primary != *new || view.shard.member(old).is_some_and(|m| m.in_sync);
    let behind_since_ms = match (follows, rollback.behind_since_ms) {
        (true, _) => 0,
        (false, 0) => now_ms,
        (false, since_ms) => since_ms,
    };
    let is_silent = |node: &&NodeId| {
        let seen = view.scene.fleet.node(node);
        seen.is_none_or(|n| n.seen_ms + REPORT_AGE_MS_MAX < now_ms)
    };
    let doubt = match ([old, new].into_iter().find(is_silent), follows) {
        (Some(silent), _) => format!("nothing was heard of {silent} lately"),
        (None, false) => format!("{old} does not follow {new} at the moment"),
        (None, true) => String::new(),
    };
    let is_new = doubt != rollback.doubt || behind_since_ms != rollback.behind_since_ms;
    if !is_new || rollback.doubts >= DOUBTS_MAX {
        return None;
    }
    Some(match rollback.doubts + 1 {
        // What is never taken back must not close the way back later.
        DOUBTS_MAX => Decision::Doubt {
            doubt: format!("it was open and unknown in turn, {DOUBTS_MAX} times: no more is said"),
            behind_since_ms: 0,
        },
        _ => Decision::Doubt {
            doubt,
            behind_since_ms,
        },
    })
}

/// What closes the way back now, if anything does.
pub(super) fn closing(view: &View<'_>) -> Option<Decision> {
    let rollback = view.part.rollback.as_ref().filter(|r| r.open)?;
    let close = |why: String, diverged: bool| Some(Decision::Close { why, diverged });
    let (old, new) = (&rollback.old, &rollback.new);
    if view.shard.primary != *new && view.shard.primary != *old {
        let primary = &view.shard.primary;
        return close(format!("{primary} is the primary now"), true);
    }
    let Some(member) = view.shard.member(old) else {
        return close(format!("{old} has left the shard"), false);
    };
    if member.run_id != rollback.old_run_id {
        return close(format!("{old} was restarted"), true);
    }
    let run_id = view.shard.member(new).map(|m| m.run_id.as_str());
    if run_id != Some(&rollback.new_run_id) {
        return close(format!("{new} was restarted"), true);
    }
    if let Some(seen) = seen_as(view, new, &rollback.new_run_id)
        && seen.sync_full > rollback.new_sync_full
    {
        return close(format!("{new} had to serve a copy in full"), true);
    }
    if let Some(seen) = seen_as(view, old, &rollback.old_run_id) {
        let errors = seen.unexpected_errors;
        if errors.is_none_or(|e| e > rollback.old_unexpected_errors) {
            let why = format!("{old} refused a command of the new engine: its data differs");
            return close(why, true);
        }
    }
    if view.shard.primary == *new && view.shard.older(old).is_none() {
        let why = format!("nobody has written down what {old} had refused before");
        return close(why, true);
    }
    let is_late = rollback.behind_since_ms > 0 && view.ages.behind_ms >= FOLLOW_MS_MAX;
    if view.shard.primary == *new && !member.in_sync && is_late {
        return close(format!("{old} does not follow {new}"), true);
    }
    None
}

/// The newest report of the very process, however old it is.
fn seen_as<'a>(view: &View<'a>, node: &NodeId, run_id: &str) -> Option<&'a crate::NodeView> {
    let seen = view.scene.fleet.node(node)?;
    (seen.run_id == run_id).then_some(seen)
}

pub(super) fn decide(view: &View<'_>) -> Decision {
    let part = view.part;
    let Some(rollback) = &part.rollback else {
        return Decision::Close {
            why: "it is not known how to go back".into(),
            diverged: true,
        };
    };
    if view.shard.primary == rollback.old {
        let new = view.shard.member(&rollback.new);
        let is_gone = |m: &Member| view.scene.sightings.lease_gone_since(&m.host).is_some();
        return Decision::TurnBack {
            why: format!("{} is the primary again", rollback.old),
            on_request: false,
            // Who was lost with its host says nothing about its engine.
            blameless: new.is_some_and(is_gone),
        };
    }
    if let Some(closed) = closing(view) {
        return closed;
    }
    if !rollback.open {
        return Decision::Close {
            why: rollback.why.clone(),
            diverged: rollback.diverged,
        };
    }
    if let Some(doubt) = doubt(view) {
        return doubt;
    }
    if let Some(back) = view.goes_back() {
        return back;
    }
    if let Some(why) = breach(view) {
        return given_up(why);
    }
    let rest_ms = view
        .upgrade
        .bake_ms
        .saturating_sub(view.ages.whole_phase_ms);
    let is_over = match view.upgrade.finalize_by_operator {
        true => false,
        false => rest_ms == 0,
    };
    if is_over || part.finalize {
        return Decision::Close {
            why: "finalized".into(),
            diverged: false,
        };
    }
    match view.upgrade.finalize_by_operator {
        true => wait(u64::MAX, "an operator to finalize, or to undo"),
        false => wait(view.scene.now_ms + rest_ms, "the end of the bake"),
    }
}

/// What is worse than before.
fn breach(view: &View<'_>) -> Option<String> {
    let shard = view.shard;
    // A primary that is gone is a failover's.
    detect::alive(shard.primary_member()?, view.scene)?;
    // Until then it counts what was before the switch, too.
    let counts = view.ages.phase_ms >= FAULTS_WINDOW_MS;
    let before = view.part.rollback.as_ref().and_then(|r| r.faults_before);
    let now = gate::faults(view.scene.fleet, shard);
    if counts
        && let Some(before) = before
        && now > gate::faults_max(before)
    {
        let primary = &shard.primary;
        return Some(format!(
            "{primary} could not do what it was asked {now} times in {} s; before the switch it was \
             {before} times",
            FAULTS_WINDOW_MS / 1_000
        ));
    }
    let troubles = gate::troubles(view.scene.fleet, shard);
    let troubled = troubles.filter(|ms| *ms >= TROUBLE_MS_MAX).count();
    if troubled > 0 {
        let primary = &shard.primary;
        return Some(format!(
            "{troubled} proxies have had trouble with {primary} for {TROUBLE_MS_MAX} ms"
        ));
    }
    gate::too_slow(view)
}
