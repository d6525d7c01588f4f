//! A planned switchover of one shard: from what is recorded and observed, the next act.
//!
//! The order is the protocol: look (no effect), make the next epoch's replication users on the
//! target, declare the hand-over in the record (proxies hold), let the old primary's agent fence
//! and fail over, commit the epoch, then let grants, repointing and proxies converge and revoke
//! the old epoch.
//!
//! **Invariants.** Before the commit the old primary is the only one that can take writes; the
//! commit happens at most once (the record's token); a record is given back to the old primary
//! only after its agent has said that it serves again or that nothing was changed.

use slotmesh_topology::{NodeRole, Shard, TaskId};

use crate::{
    detect::{self, Loss},
    observe::{Fleet, NodeView, ProcessState},
    spec::{Phase, ShardSwitch},
};

/// How long preflight waits for the shard to be fit before it gives up. Covers a replica that is
/// just catching up after the previous change.
pub const PREFLIGHT_MS_MAX: u64 = 15_000;
/// Largest lag of the target at which a switchover begins; at 100 MB/s it is 10 ms of hold.
pub const LAG_BYTES_MAX: u64 = 1024 * 1024;
/// How long fresh proxies are waited for; then the switch goes on without the laggards, which the
/// fence keeps harmless.
pub const HOLD_WAIT_MS: u64 = 150;
/// For how long a proxy holds at most before it lets requests go to the old primary again.
pub const HOLD_MS_MAX: u32 = 1_000;
/// The critical section: the engine's own limit for waiting for the target's acknowledgement.
pub const FAILOVER_TIMEOUT_MS: u32 = 500;
/// From the declaration on, nothing new is begun after this time.
pub const HANDOVER_MS_MAX: u64 = 3_000;
/// How long the proxies, the grant and the replicas are waited for after the commit before the
/// old epoch is revoked all the same.
pub const SETTLE_MS_MAX: u64 = 10_000;
/// Oldest report of a node on which a decision is based.
pub const REPORT_AGE_MS_MAX: u64 = 2_000;

/// What an agent did with the current phase's step.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum StepStatus {
    /// Not asked (or asked by a leader that is gone).
    #[default]
    NotStarted,
    /// Asked, no answer yet.
    Running,
    /// Done; for the critical section: whether the agent's own commit was accepted.
    Done {
        /// The agent committed.
        committed: bool,
    },
    /// Refused or failed, and everything is as before.
    NoEffect(String),
    /// Failed half way, or the answer was lost.
    Uncertain(String),
    /// The agent knows a higher term or epoch: this leader is deposed.
    Fenced,
}

/// A step that an agent executes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Make replication users of the next epoch on the target.
    EnsureUsers,
    /// The critical section, on the old primary.
    HandOver,
    /// Give the old primary its rights back.
    TakeBack,
}

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
    /// Ask the agent.
    Run(Step),
    /// Write the phase.
    Advance(Phase, String),
    /// Write the hand-over into the shard's record, together with phase Hold.
    Declare,
    /// Write the epoch (the agent could not), together with phase Settle.
    Commit,
    /// Give the record back to the old primary, together with phase `RolledBack`.
    GiveBack(String),
    /// The old primary is lost in the middle of it, and a failover takes the shard over: declare it,
    /// together with phase `RolledBack`.
    FailOver(Loss),
    /// Revoke the old epoch in the record, together with phase Done.
    Close(String),
    /// This leader is deposed: stop.
    Stop,
}

/// All that the decision depends on.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The task.
    pub task: &'a TaskId,
    /// How far this shard has come.
    pub switch: &'a ShardSwitch,
    /// The shard's record.
    pub shard: &'a Shard,
    /// What is observed.
    pub fleet: &'a Fleet,
    /// The current phase's step.
    pub step: &'a StepStatus,
    /// The old primary is lost, and somebody can take its place.
    pub lost: Option<&'a Loss>,
    /// Somebody asked to cancel.
    pub cancel_requested: bool,
    /// Another shard of this task is in its hold: one at a time keeps each hold short.
    pub other_in_hold: bool,
    /// Now, in milliseconds since the epoch.
    pub now_ms: u64,
}

/// The next act for this shard.
#[must_use]
pub fn decide(view: View<'_>) -> Decision {
    if view.switch.phase.is_ended() {
        return Decision::Wait {
            until_ms: u64::MAX,
            what: String::new(),
        };
    }
    if view.step == &StepStatus::Fenced {
        return Decision::Stop;
    }
    if committed(&view) && view.switch.phase < Phase::Settle {
        return Decision::Advance(Phase::Settle, "committed".into());
    }
    match view.switch.phase {
        Phase::Preflight => preflight(&view),
        Phase::Prewarm => prewarm(&view),
        Phase::Hold => hold(&view),
        Phase::Resolve => resolve(&view),
        Phase::Settle => settle(&view),
        Phase::Done | Phase::RolledBack => Decision::Wait {
            until_ms: u64::MAX,
            what: String::new(),
        },
    }
}

/// The record says that the target became primary in the epoch after the one admitted, or that
/// others have followed since.
fn committed(view: &View<'_>) -> bool {
    view.shard.epoch > view.switch.from_epoch
        && (view.shard.primary == view.switch.to || view.switch.phase >= Phase::Settle)
}

fn preflight(view: &View<'_>) -> Decision {
    if view.cancel_requested {
        return Decision::Advance(Phase::RolledBack, "cancelled".into());
    }
    if let Some(why) = overtaken(view) {
        return Decision::Advance(Phase::RolledBack, why);
    }
    let give_up_ms = view.switch.phase_since_ms + PREFLIGHT_MS_MAX;
    match unfit(view) {
        None => Decision::Advance(Phase::Prewarm, "fit to switch".into()),
        Some(reason) if view.now_ms >= give_up_ms => Decision::Advance(Phase::RolledBack, reason),
        Some(what) => Decision::Wait {
            until_ms: give_up_ms,
            what,
        },
    }
}

/// Why the switch that was admitted can't happen any more. Every later step names users of the
/// admitted epoch: in another one they would fence nobody.
fn overtaken(view: &View<'_>) -> Option<String> {
    if view.shard.primary != view.switch.from {
        let primary = &view.shard.primary;
        return Some(format!(
            "the shard's primary changed to {primary} meanwhile"
        ));
    }
    (view.shard.epoch != view.switch.from_epoch).then(|| {
        let (epoch, from) = (view.shard.epoch, &view.switch.from);
        format!("{from} was restarted meanwhile and serves epoch {epoch}")
    })
}

/// Why the shard can't be switched now.
fn unfit(view: &View<'_>) -> Option<String> {
    let (from, to) = (&view.switch.from, &view.switch.to);
    let (Some(old), Some(new)) = (view.fleet.node(from), view.fleet.node(to)) else {
        return Some(format!(
            "no report of {from} and {to}: is their agent running?"
        ));
    };
    let old_member = view.shard.member(from)?;
    let Some(new_member) = view.shard.member(to) else {
        return Some(format!("{to} is not of this shard"));
    };
    for (node, seen, member) in [(from, old, old_member), (to, new, new_member)] {
        if !view.fleet.hosts.contains(&member.host) || is_stale(view, seen) {
            return Some(format!("no recent report of {node}: is its agent running?"));
        }
        if seen.state != ProcessState::Running || seen.loading {
            return Some(format!("{node} is {}", seen.state.name()));
        }
        if seen.run_id != member.run_id || seen.run_id.is_empty() {
            return Some(format!(
                "{node} was restarted and has not been admitted yet"
            ));
        }
    }
    if old.role != Some(NodeRole::Primary) || !old.failover_idle {
        return Some(format!("{from} is not an idle primary"));
    }
    if old.granted_epoch != view.shard.epoch {
        return Some(format!(
            "{from} does not serve epoch {} yet",
            view.shard.epoch
        ));
    }
    if !new.follows(&old_member.address) || !new_member.in_sync {
        return Some(format!("{to} has not caught up with {from}"));
    }
    if !detect::is_sound(view.shard, new_member, new) {
        return Some(format!(
            "{to} refused commands of {from}, whose engine is newer: its data differs"
        ));
    }
    let lag = lag_bytes(old, new);
    if lag > LAG_BYTES_MAX {
        return Some(format!("{to} lags {lag} bytes, more than {LAG_BYTES_MAX}"));
    }
    if new.max_memory != 0 && new.max_memory < old.used_memory {
        return Some(format!(
            "{to} may use {} bytes, {from} uses {}",
            new.max_memory, old.used_memory
        ));
    }
    None
}

/// How far the target is behind, at most. A primary knows only what it was told: once a second, by each of its
/// replicas, and nothing at all in the first second after it became one. What the target has is in
/// its own report, which may be older than the primary's; neither says less than the truth for long.
fn lag_bytes(old: &NodeView, new: &NodeView) -> u64 {
    old.lag_bytes.min(old.offset.saturating_sub(new.offset))
}

fn is_stale(view: &View<'_>, seen: &NodeView) -> bool {
    seen.seen_ms + REPORT_AGE_MS_MAX < view.now_ms
}

fn prewarm(view: &View<'_>) -> Decision {
    if view.cancel_requested {
        return Decision::Advance(Phase::RolledBack, "cancelled".into());
    }
    // Waiting for its turn may take long.
    if let Some(why) = overtaken(view) {
        return Decision::Advance(Phase::RolledBack, why);
    }
    if view.other_in_hold {
        return Decision::Wait {
            until_ms: u64::MAX,
            what: "another shard's switch".into(),
        };
    }
    match view.step {
        StepStatus::NotStarted => Decision::Run(Step::EnsureUsers),
        StepStatus::Running => Decision::Wait {
            until_ms: u64::MAX,
            what: "the target's users".into(),
        },
        // It may have waited for its turn since preflight: look once more before the effects.
        StepStatus::Done { .. } => match unfit(view) {
            None => Decision::Declare,
            Some(what) => Decision::Advance(Phase::Preflight, what),
        },
        StepStatus::NoEffect(why) | StepStatus::Uncertain(why) => {
            Decision::Advance(Phase::RolledBack, why.clone())
        }
        StepStatus::Fenced => Decision::Stop,
    }
}

fn hold(view: &View<'_>) -> Decision {
    let Some(handover) = view.shard.handover().filter(|h| h.task == *view.task) else {
        // Phase and record are written together, so this is a record that moved on since.
        return Decision::Advance(
            Phase::Resolve,
            "the hand-over is no longer in the record".into(),
        );
    };
    // Its agent's answer would come too late for those who wait.
    if let Some(lost) = view.lost
        && matches!(view.step, StepStatus::NotStarted | StepStatus::Running)
    {
        return Decision::Advance(Phase::Resolve, lost.cause.clone());
    }
    match view.step {
        StepStatus::NotStarted => {
            if view.now_ms >= handover.deadline_unix_ms {
                return Decision::Advance(Phase::Resolve, "the hand-over ran out of time".into());
            }
            let go_on_ms = view.switch.phase_since_ms + HOLD_WAIT_MS;
            let held = view
                .fleet
                .all_held(&view.shard.instance, &view.shard.id, view.task);
            if held || view.now_ms >= go_on_ms {
                Decision::Run(Step::HandOver)
            } else {
                Decision::Wait {
                    until_ms: go_on_ms,
                    what: "proxies to hold".into(),
                }
            }
        }
        StepStatus::Running => Decision::Wait {
            until_ms: u64::MAX,
            what: "the switch".into(),
        },
        StepStatus::Done { committed: true } => Decision::Wait {
            until_ms: view.now_ms + 50,
            what: "the record to show the commit".into(),
        },
        // The roles have changed, but the agent could not reach a controller.
        StepStatus::Done { committed: false } => Decision::Commit,
        StepStatus::NoEffect(why) => Decision::GiveBack(why.clone()),
        StepStatus::Uncertain(why) => Decision::Advance(Phase::Resolve, why.clone()),
        StepStatus::Fenced => Decision::Stop,
    }
}

fn resolve(view: &View<'_>) -> Decision {
    if view.shard.handover().is_none_or(|h| h.task != *view.task) {
        return Decision::Advance(Phase::RolledBack, "the old primary serves on".into());
    }
    match view.step {
        StepStatus::Running if view.lost.is_none() => {
            return Decision::Wait {
                until_ms: u64::MAX,
                what: "the old primary's rights".into(),
            };
        }
        // The agent says that the old primary serves again.
        StepStatus::Done { .. } => return Decision::GiveBack(view.switch.message.clone()),
        StepStatus::Fenced => return Decision::Stop,
        StepStatus::NotStarted
        | StepStatus::Running
        | StepStatus::NoEffect(_)
        | StepStatus::Uncertain(_) => {}
    }
    // Whoever has its last write, a target that has taken over already or another one, is found out
    // by the failover.
    if let Some(lost) = view.lost {
        return Decision::FailOver(lost.clone());
    }
    let wait = |what: &str| Decision::Wait {
        until_ms: view.now_ms + 100,
        what: what.into(),
    };
    let Some(old) = view.fleet.node(&view.switch.from) else {
        return wait("a report of the old primary");
    };
    // Only what was seen after the phase began counts: earlier reports show the middle of it.
    if old.seen_ms <= view.switch.phase_since_ms || is_stale(view, old) {
        return wait("a report of the old primary");
    }
    let run_id = |id| {
        view.shard
            .member(id)
            .map(|m| m.run_id.as_str())
            .unwrap_or_default()
    };
    // A target whose host is gone for good is never heard of by a leader that began after that.
    let new = (view.fleet.node(&view.switch.to)).filter(|n| n.seen_ms > view.switch.phase_since_ms);
    let target_is_primary = new.is_some_and(|new| {
        new.role == Some(NodeRole::Primary) && new.run_id == run_id(&view.switch.to)
    });
    let target_address = view
        .shard
        .member(&view.switch.to)
        .map(|m| m.address.as_str());
    // An old primary that follows the target, with no failover under way, has been told by it that
    // it took over. If that process is gone since, nobody else has the shard's next epoch either:
    // name it all the same, and its end is that of any primary.
    let target_is_gone = new.is_some_and(|new| {
        new.run_id != run_id(&view.switch.to)
            && matches!(
                new.state,
                ProcessState::Running | ProcessState::Stopped | ProcessState::Failed
            )
    });
    if old.role == Some(NodeRole::Replica)
        && old.run_id == run_id(&view.switch.from)
        && Some(old.following.as_str()) == target_address
        && (target_is_primary || (target_is_gone && old.failover_idle))
    {
        return Decision::Commit;
    }
    if old.state == ProcessState::Running && old.run_id != run_id(&view.switch.from) {
        // The old primary was restarted, so it is fenced and has fed nobody since. Redis promotes
        // a target only when it had every byte.
        return if target_is_primary {
            Decision::Commit
        } else {
            Decision::GiveBack("the old primary was restarted".into())
        };
    }
    if old.role == Some(NodeRole::Primary) && old.state == ProcessState::Running {
        return Decision::Run(Step::TakeBack);
    }
    wait("the old primary to answer")
}

fn settle(view: &View<'_>) -> Decision {
    let end_ms = view.switch.phase_since_ms + SETTLE_MS_MAX;
    if view.shard.epoch > view.switch.from_epoch.next() {
        return Decision::Advance(Phase::Done, "a later epoch has begun".into());
    }
    match unsettled(view) {
        None => Decision::Close(String::new()),
        Some(what) if view.now_ms >= end_ms => Decision::Close(format!("not waited for: {what}")),
        Some(what) => Decision::Wait {
            until_ms: end_ms,
            what,
        },
    }
}

fn unsettled(view: &View<'_>) -> Option<String> {
    let shard = view.shard;
    if view
        .fleet
        .node(&shard.primary)
        .is_none_or(|n| n.granted_epoch != shard.epoch)
    {
        return Some(format!("the grant on {}", shard.primary));
    }
    if !view
        .fleet
        .all_applied(&shard.instance, &shard.id, shard.epoch)
    {
        return Some("proxies to apply the new epoch".into());
    }
    let behind = shard
        .members
        .iter()
        .find(|m| m.node != shard.primary && !m.in_sync)?;
    Some(format!("{} to follow the new primary", behind.node))
}

#[cfg(test)]
#[path = "switchover_tests.rs"]
mod tests;
