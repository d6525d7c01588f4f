//! Giving the nodes of a shard another engine: from what is recorded and observed, the next act.
//!
//! Hosts fetch the engine and try it. Then one replica after the other leaves those in sync, has its
//! process exchanged and catches up; one of them becomes the primary by the machine of switchovers;
//! the old primary follows for a while with the old engine, so that one can go back; in the end its
//! process is exchanged, too. Most of it is convergence: the record says which engine a member should
//! run, its agent sees to it. Where nodes are moved, new ones join instead, and the old ones leave in the
//! end (`moves`).
//!
//! **Invariants.** The primary's process is never exchanged, nor that of a member in sync. One node of
//! a shard is exchanged at a time, and as many others as durability asks for are in sync then. The way
//! back is open only while the old primary's process has followed the new one's stream without a gap
//! and without refusing a command; once closed it stays closed, and nothing goes back.

mod ages;
mod bake;
mod fleet;
mod gate;
mod held;
mod moves;
mod nodes;
mod plan;
mod said;
mod spec;
mod write;

pub use ages::{Ages, Watch};
pub use bake::{FAULTS_MAX, FAULTS_WINDOW_MS, FOLLOW_MS_MAX, TROUBLE_MS_MAX};
pub use fleet::{STAGE_PARALLEL, ended, summary};
pub use gate::{Gate, HOLD_MS, Heard, gates};
pub use held::held_back;
pub use moves::REPLICA_MS_MAX;
pub use nodes::STARTS_MAX;
pub use plan::{
    BAKE_MS, BAKE_MS_MAX, Options, PARALLEL_MAX, Planned, TASK_MS_MAX, may_share, plan,
};
pub use said::{menu, resolved, retried};
pub use spec::{Drain, Method, NodeUpgrade, Rollback, ShardUpgrade, Upgrade, UpgradePhase};
pub use write::{Lock, Write, gone, say, write};

use slotmesh_topology::{
    Exchange, HostId, Instance, Member, Mode, NodeId, NodeRole, Shard, ShardId, TaskId, assignment,
};

use self::nodes::Converged;
use crate::{
    detect::{self, Scene},
    spec::{Phase, ShardSwitch, Task},
    switchover::StepStatus,
};

/// How long one node may take to run the engine and to be in sync before it is given up: a full copy
/// of 1 TB at 280 MB/s, as for a replacement.
pub const NODE_MS_MAX: u64 = crate::replace::CATCH_UP_MS_MAX;
/// Switches that may be given up in a row. Each has waited for the shard to be fit.
pub const SWITCH_TRIES: u32 = 4;
/// Between the first switch that was given up and the next try: what most often kept it from happening, a
/// target or an agent that was late for a moment, is over by then, and a way back may take 1 s in all.
pub const SWITCH_PAUSE_FIRST_MS: u64 = 100;
/// Between later ones.
pub const SWITCH_PAUSE_MS: u64 = 2_000;

/// How a shard says that it goes back because another one did.
const FOLLOWS: &str = "another shard went back: ";

/// Whose the shard is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Owner {
    /// The task's.
    Own,
    /// Nobody's.
    Free,
    /// Another task's.
    Other(TaskId),
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
    /// Wait with the shard free: nothing of it is under way, and others may have to do something to it.
    Rest {
        /// Look again then, whatever happens.
        until_ms: u64,
        /// For what, to tell the operator.
        what: String,
    },
    /// Ask the agent of the node's host to fetch the engine and to try it.
    Stage(NodeId),
    /// Write that it has.
    Staged(NodeId),
    /// Take the shard, together with phase Replicas.
    Begin,
    /// Take the shard again after another task had it.
    Regain,
    /// Write which engine a member is to run, and that its process may be ended.
    Exchange {
        /// Who.
        node: NodeId,
        /// Which; empty: the instance's.
        engine: String,
        /// What becomes of its data.
        data: Exchange,
    },
    /// Write that it runs it.
    Exchanged(NodeId),
    /// Write that a new node with the engine joins on that host.
    Recruit(HostId),
    /// Write that a node which was about to leave stays.
    Retain(NodeId),
    /// Write that it leaves.
    Expel(NodeId),
    /// Write up to where those that stay must come before it is left out.
    Drain(u64),
    /// Write the record without it.
    Leave(NodeId),
    /// Write the switch that is to be made, and what the way back depends on.
    Plan(Box<ShardSwitch>, Option<Rollback>),
    /// Let the machine of switchovers act.
    Drive,
    /// Write why the way back is not known to be open now; empty: it is.
    Doubt {
        /// Why.
        doubt: String,
        /// Since when the old primary does not follow; 0: it does.
        behind_since_ms: u64,
    },
    /// Write that there is no way back any more, together with phase Finalize.
    Close {
        /// Why.
        why: String,
        /// What the old primary has is not what the new one has.
        diverged: bool,
    },
    /// Go back to what was before.
    TurnBack {
        /// Why.
        why: String,
        /// An operator wants it.
        on_request: bool,
        /// It says nothing about the engine.
        blameless: bool,
    },
    /// Write the phase.
    Advance(UpgradePhase, String),
    /// End the shard's part, and free the shard.
    End(UpgradePhase, String),
    /// Wait for an operator.
    Park(String),
    /// This leader is deposed: stop.
    Stop,
}

/// All that the decision about one shard depends on.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The task.
    pub task: &'a Task,
    /// What is asked for.
    pub upgrade: &'a Upgrade,
    /// How far the shard has come.
    pub part: &'a ShardUpgrade,
    /// Its record.
    pub shard: &'a Shard,
    /// Its instance's.
    pub instance: &'a Instance,
    /// What is observed.
    pub scene: Scene<'a>,
    /// For how long this leader has seen what the part says of time.
    pub ages: Ages,
    /// Whose the shard is.
    pub owner: &'a Owner,
    /// The trial of the engine that is under way.
    pub stage: &'a StepStatus,
    /// When the maintenance window opens next; `None`: it is open, or is not waited for.
    pub opens_ms: Option<u64>,
    /// Where a new node of the shard would go now.
    pub room: Option<&'a HostId>,
    /// Another shard of whose primary, on the same host, a new node copies everything now.
    pub copied: Option<&'a ShardId>,
}

/// The next act for the shard.
#[must_use]
pub fn decide(view: View<'_>) -> Decision {
    let part = view.part;
    if part.phase.is_ended() {
        return wait(u64::MAX, "");
    }
    if view.stage == &StepStatus::Fenced {
        return Decision::Stop;
    }
    if part.phase.is_before() {
        return fleet::before(&view);
    }
    match view.owner {
        Owner::Own => next(&view),
        // A bake may take days: whatever has to be done to the shard meanwhile is done.
        _ if part.phase == UpgradePhase::Bake => next(&view),
        _ if part.phase == UpgradePhase::Parked => wait(u64::MAX, "an operator's choice"),
        Owner::Free => match next(&view) {
            rest @ Decision::Rest { .. } => rest,
            // Whatever it is, it counts from when the shard is the task's again.
            _ => Decision::Regain,
        },
        Owner::Other(task) => wait(u64::MAX, format!("task {task}, which has the shard")),
    }
}

/// The next act for a shard that has begun.
fn next(view: &View<'_>) -> Decision {
    let part = view.part;
    if let Some(switch) = part.switch.as_ref().filter(|s| !s.phase.is_ended()) {
        return under_way(view, switch);
    }
    if view.shard.mode != Mode::Serving {
        return wait(u64::MAX, "the shard to serve");
    }
    match part.phase {
        UpgradePhase::Replicas => replicas(view),
        UpgradePhase::Switch => switch(view),
        UpgradePhase::Bake => bake::decide(view),
        UpgradePhase::Finalize => finalize(view),
        UpgradePhase::Preserve => preserve(view),
        UpgradePhase::SwitchBack => switch_back(view),
        UpgradePhase::UndoNodes => undo_nodes(view),
        _ => wait(u64::MAX, "an operator's choice"),
    }
}

fn wait(until_ms: u64, what: impl Into<String>) -> Decision {
    Decision::Wait {
        until_ms,
        what: what.into(),
    }
}

/// A switch that has had no effect yet may still turn out to lead nowhere.
fn under_way(view: &View<'_>, switch: &ShardSwitch) -> Decision {
    let is_back = view.part.phase == UpgradePhase::SwitchBack;
    if is_back
        && switch.phase < Phase::Hold
        && let Some(closed) = bake::closing(view)
    {
        return closed;
    }
    Decision::Drive
}

impl View<'_> {
    /// The engine that the member runs, as far as is known.
    fn engine_of(&self, member: &Member) -> String {
        let seen = detect::alive(member, self.scene);
        let assigned = assignment::engine(self.instance, member);
        seen.and_then(|n| n.engine.clone())
            .unwrap_or_else(|| assigned.to_owned())
    }

    fn primary_is_upgraded(&self) -> bool {
        let primary = self.shard.primary_member();
        primary.is_some_and(|m| self.is_upgraded(m))
    }

    fn is_upgraded(&self, member: &Member) -> bool {
        match self.part.moved {
            true => !self.is_old(&member.node),
            false => self.engine_of(member) == self.upgrade.engine,
        }
    }

    /// An operator wants it back, or another shard has gone back by itself: what was wrong with that
    /// one is more likely the engine than the shard.
    fn goes_back(&self) -> Option<Decision> {
        if self.task.cancel_requested {
            return Some(on_request());
        }
        let shards = self.upgrade.shards.iter();
        let mut others = shards.filter(|s| s.shard != self.part.shard && !s.on_request);
        let (other, why) = others.find_map(|s| Some((s, s.why_back.as_ref()?)))?;
        // Those that followed it say why it went.
        let why = why.strip_prefix(FOLLOWS).unwrap_or(why);
        Some(Decision::TurnBack {
            why: match why.starts_with("shard ") {
                true => format!("{FOLLOWS}{why}"),
                false => format!("{FOLLOWS}shard {}: {why}", other.shard),
            },
            on_request: false,
            blameless: other.blameless,
        })
    }

    /// Something that clients notice has to wait for the window, which may be a week.
    fn window(&self) -> Option<Decision> {
        Some(Decision::Rest {
            until_ms: self.opens_ms?,
            what: "the maintenance window".into(),
        })
    }
}

fn on_request() -> Decision {
    Decision::TurnBack {
        why: "an operator wants it undone".into(),
        on_request: true,
        blameless: false,
    }
}

fn given_up(why: impl Into<String>) -> Decision {
    Decision::TurnBack {
        why: why.into(),
        on_request: false,
        blameless: false,
    }
}

fn replicas(view: &View<'_>) -> Decision {
    let is_past = view.primary_is_upgraded();
    if !is_past && let Some(back) = view.goes_back() {
        return back;
    }
    let converged = match view.part.moved {
        true => moves::gather(view),
        false => nodes::converge(view, |_| (&view.upgrade.engine, Exchange::Keep)),
    };
    match converged {
        Converged::Act(decision) => decision,
        Converged::Wait(until_ms, what) => wait(until_ms, what),
        // A failover has made one of the upgraded the primary: there is nothing to go back to.
        Converged::Trouble(why) | Converged::Lost(why) if is_past => Decision::Park(why),
        Converged::Trouble(why) => given_up(why),
        Converged::Lost(why) => Decision::TurnBack {
            why,
            on_request: false,
            blameless: true,
        },
        Converged::Done if is_past && view.part.moved => {
            let why = format!("{} is the primary already", view.shard.primary);
            Decision::Advance(UpgradePhase::Finalize, why)
        }
        Converged::Done if is_past => done(view),
        Converged::Done => view.window().unwrap_or_else(|| {
            let why = match view.part.moved {
                true => "the new nodes have everything",
                false => "every replica runs the engine",
            };
            Decision::Advance(UpgradePhase::Switch, why.into())
        }),
    }
}

fn switch(view: &View<'_>) -> Decision {
    let part = view.part;
    let primary = &view.shard.primary;
    if view.primary_is_upgraded() {
        let moved = part.switch.as_ref().filter(|s| s.phase == Phase::Done);
        return match moved.is_some_and(|s| s.to == *primary) {
            true => Decision::Advance(UpgradePhase::Bake, format!("{primary} is the primary")),
            false => Decision::Close {
                why: format!("a failover made {primary} the primary"),
                diverged: true,
            },
        };
    }
    if let Some(back) = view.goes_back() {
        return back;
    }
    if let Some(decision) = try_again_later(view) {
        return decision.unwrap_or_else(given_up);
    }
    let mut others = nodes::others(view.shard);
    let are_ready = match view.part.moved {
        true => matches!(moves::gather(view), Converged::Done),
        false => others.all(|m| view.is_upgraded(m) && m.in_sync),
    };
    if !are_ready {
        return Decision::Advance(
            UpgradePhase::Replicas,
            "not every replica is in sync".into(),
        );
    }
    match best_target(view) {
        Some(target) => Decision::Plan(
            Box::new(planned(view, &target.node)),
            Some(bake::baseline(view, target)),
        ),
        None => given_up("no upgraded replica may be promoted: give one a priority above 0"),
    }
}

/// After a switch that was given up: a pause, or, as an error, why there is no further try.
fn try_again_later(view: &View<'_>) -> Option<Result<Decision, String>> {
    let last = view.part.switch.as_ref()?;
    if last.phase != Phase::RolledBack {
        return None;
    }
    if view.part.tries >= SWITCH_TRIES {
        let why = format!(
            "{SWITCH_TRIES} switches were given up; the last: {}",
            last.message
        );
        return Some(Err(why));
    }
    let pause_ms = match view.part.tries {
        0 => SWITCH_PAUSE_FIRST_MS,
        _ => SWITCH_PAUSE_MS,
    };
    let rest_ms = pause_ms.saturating_sub(view.ages.switch_ms);
    let until_ms = view.scene.now_ms + rest_ms;
    (rest_ms > 0).then(|| Ok(wait(until_ms, "the next try to switch")))
}

fn planned(view: &View<'_>, to: &NodeId) -> ShardSwitch {
    let earlier_ms = view.part.switch.as_ref().map_or(0, |s| s.phase_since_ms);
    ShardSwitch {
        shard: view.shard.id.clone(),
        from: view.shard.primary.clone(),
        to: to.clone(),
        from_epoch: view.shard.epoch,
        phase: Phase::Preflight,
        // Another try is another attempt for its agents.
        phase_since_ms: view.scene.now_ms.max(earlier_ms + 1),
        message: String::new(),
        hold_us: 0,
        critical_us: 0,
    }
}

fn may_be_promoted(member: &Member) -> bool {
    member.role == NodeRole::Replica && member.in_sync && member.priority > 0 && !member.leaving
}

fn best_target<'a>(view: &View<'a>) -> Option<&'a Member> {
    let offset = |m: &Member| view.scene.fleet.node(&m.node).map_or(0, |n| n.offset);
    nodes::others(view.shard)
        .filter(|m| may_be_promoted(m) && view.is_upgraded(m))
        .max_by_key(|m| (m.priority, offset(m), std::cmp::Reverse(m.node.clone())))
}

fn finalize(view: &View<'_>) -> Decision {
    let diverged = view.part.rollback.as_ref().filter(|r| r.diverged);
    let wanted = |member: &Member| {
        let is_old = diverged.is_some_and(|r| r.old == member.node);
        let data = match is_old && member.engine != view.upgrade.engine {
            true => Exchange::Discard,
            false => member.exchange.unwrap_or(Exchange::Keep),
        };
        (view.upgrade.engine.as_str(), data)
    };
    if !view.primary_is_upgraded() {
        // A failover to the old engine, though nothing leads back: it goes forward once more.
        let why = format!("{} is the primary now", view.shard.primary);
        return Decision::Advance(UpgradePhase::Replicas, why);
    }
    let converged = match view.part.moved {
        true => match moves::gather(view) {
            Converged::Done => moves::finish(view),
            not_yet => not_yet,
        },
        false => nodes::converge(view, wanted),
    };
    match converged {
        Converged::Act(decision) => decision,
        Converged::Wait(until_ms, what) => wait(until_ms, what),
        Converged::Trouble(why) | Converged::Lost(why) => Decision::Park(why),
        Converged::Done if view.upgrade.preserve_roles && !view.part.moved => {
            Decision::Advance(UpgradePhase::Preserve, "every node runs the engine".into())
        }
        Converged::Done => done(view),
    }
}

fn done(view: &View<'_>) -> Decision {
    let mut why = format!("every node runs {}", view.upgrade.engine);
    if let Some(closed) = fleet::unasked(view.upgrade, view.part) {
        why.push_str(&format!("; the operator was not waited for: {closed}"));
    }
    Decision::End(UpgradePhase::Done, why)
}

/// What the shard was before is a wish: it is not worth an operator's time.
fn preserve(view: &View<'_>) -> Decision {
    let Some(original) = view.part.rollback.as_ref().map(|r| &r.old) else {
        return done(view);
    };
    let kept = |why: &str| {
        let primary = &view.shard.primary;
        let engine = &view.upgrade.engine;
        let why = format!("every node runs {engine}; {primary} stays the primary: {why}");
        Decision::End(UpgradePhase::Done, why)
    };
    if view.shard.primary == *original {
        return done(view);
    }
    if view.task.cancel_requested {
        return kept("an operator cancelled");
    }
    let is_ours = |s: &&ShardSwitch| s.to == *original;
    if view.part.switch.as_ref().filter(is_ours).is_some() {
        match try_again_later(view) {
            Some(Ok(decision)) => return decision,
            Some(Err(why)) => return kept(&why),
            None => {}
        }
    }
    if let Some(closed) = view.window() {
        return closed;
    }
    match view.shard.member(original).filter(|m| may_be_promoted(m)) {
        Some(_) => Decision::Plan(Box::new(planned(view, original)), None),
        None => kept("the old one can't be promoted"),
    }
}

fn switch_back(view: &View<'_>) -> Decision {
    let Some(rollback) = &view.part.rollback else {
        return Decision::Advance(UpgradePhase::UndoNodes, String::new());
    };
    if !view.primary_is_upgraded() {
        let why = format!("{} is the primary", view.shard.primary);
        return Decision::Advance(UpgradePhase::UndoNodes, why);
    }
    if let Some(closed) = bake::closing(view).or_else(|| bake::doubt(view)) {
        return closed;
    }
    let is_ours = |s: &&ShardSwitch| s.to == rollback.old;
    if view.part.switch.as_ref().filter(is_ours).is_some() {
        match try_again_later(view) {
            Some(Ok(decision)) => return decision,
            Some(Err(why)) => return Decision::Park(why),
            None => {}
        }
    }
    Decision::Plan(Box::new(planned(view, &rollback.old)), None)
}

fn undo_nodes(view: &View<'_>) -> Decision {
    if view.primary_is_upgraded() {
        let primary = &view.shard.primary;
        let why = format!("{primary}, which runs the new engine, is the primary now: it goes on");
        return Decision::Advance(UpgradePhase::Replicas, why);
    }
    let wanted = |member: &Member| {
        let data = match plan::files_are_alike(view, &member.node) {
            true => Exchange::Keep,
            false => Exchange::Discard,
        };
        (view.part.from_engine(&member.node), data)
    };
    let converged = match view.part.moved {
        true => moves::undo(view),
        false => nodes::converge(view, wanted),
    };
    match converged {
        Converged::Act(decision) => decision,
        Converged::Wait(until_ms, what) => wait(until_ms, what),
        Converged::Trouble(why) | Converged::Lost(why) => Decision::Park(why),
        Converged::Done => {
            let why = view.part.why_back.clone().unwrap_or_default();
            Decision::End(UpgradePhase::RolledBack, why)
        }
    }
}

#[cfg(test)]
mod lost_tests;
#[cfg(test)]
mod moves_lost_tests;
#[cfg(test)]
mod moves_tests;
#[cfg(test)]
mod order_tests;
#[cfg(test)]
mod rest_tests;
#[cfg(test)]
pub(crate) mod story;
#[cfg(test)]
#[path = "upgrade_tests.rs"]
mod tests;
