//! The shards of one upgrade, one after the other: canaries first, then some at a time.
//!
//! Invariant: no shard begins before every host has tried the engine, while a canary is not done, while
//! the upgrade is paused, or after a shard has gone back by itself.

use slotmesh_topology::{InstanceState, Mode, assignment};

use super::{Decision, Method, Owner, Upgrade, UpgradePhase, View, nodes, plan, wait};
use crate::{
    parts, schedule,
    spec::{State, Task},
    switchover::StepStatus,
};

/// Shards whose hosts try the engine at the same time: each loads a copy of the data.
pub const STAGE_PARALLEL: usize = 4;

/// The next act for a shard that has not begun.
pub(super) fn before(view: &View<'_>) -> Decision {
    let end = |why: String| Decision::End(UpgradePhase::RolledBack, why);
    if view.task.cancel_requested {
        return end("cancelled before it began".into());
    }
    if view.instance.state != InstanceState::Running {
        return end("the instance is being removed".into());
    }
    if let Some(why) = halted(view.upgrade) {
        return end(why);
    }
    match view.part.phase {
        UpgradePhase::Stage => stage(view),
        _ => ready(view),
    }
}

fn failed(upgrade: &Upgrade) -> Option<&super::ShardUpgrade> {
    let shards = &mut upgrade.shards.iter();
    shards.find(|s| s.phase == UpgradePhase::RolledBack)
}

/// Why no further shard begins for good.
fn halted(upgrade: &Upgrade) -> Option<String> {
    let shard = failed(upgrade)?;
    Some(format!("halted: shard {}: {}", shard.shard, shard.message))
}

/// Whether what ends a shard's part says nothing about the engine.
pub(super) fn is_blameless(view: &View<'_>) -> bool {
    match (failed(view.upgrade), view.part.phase) {
        _ if !view.part.phase.is_before() => view.part.blameless,
        (Some(other), _) => other.blameless,
        // Its agent was not heard; one that has tried it says so.
        (None, UpgradePhase::Stage) => matches!(view.stage, StepStatus::Uncertain(_)),
        (None, _) => true,
    }
}

fn unstaged<'a>(view: &View<'a>) -> Option<&'a slotmesh_topology::Member> {
    let is_staged =
        |m: &slotmesh_topology::Member| view.part.node(&m.node).is_some_and(|n| n.staged);
    view.shard.members.iter().find(|m| !is_staged(m))
}

fn stage(view: &View<'_>) -> Decision {
    if view.part.moved {
        let why = "new nodes try the engine themselves, before anybody counts on them";
        return Decision::Advance(UpgradePhase::Ready, why.into());
    }
    let Some(member) = unstaged(view) else {
        let why = "every host has tried the engine";
        return Decision::Advance(UpgradePhase::Ready, why.into());
    };
    let node = &member.node;
    let mut earlier = view.upgrade.shards.iter();
    let earlier = earlier.by_ref().take_while(|s| s.shard != view.part.shard);
    let busy = earlier.filter(|s| s.phase == UpgradePhase::Stage).count();
    match view.stage {
        StepStatus::NotStarted if busy >= STAGE_PARALLEL => {
            wait(u64::MAX, "other shards' hosts to try the engine")
        }
        StepStatus::NotStarted => Decision::Stage(node.clone()),
        StepStatus::Running => wait(u64::MAX, format!("the host of {node} to try the engine")),
        StepStatus::Done { .. } => Decision::Staged(node.clone()),
        StepStatus::NoEffect(why) | StepStatus::Uncertain(why) => {
            let engine = &view.upgrade.engine;
            let why = format!("{engine} can't be used on the host of {node}: {why}");
            Decision::End(UpgradePhase::RolledBack, why)
        }
        StepStatus::Fenced => Decision::Stop,
    }
}

fn ready(view: &View<'_>) -> Decision {
    // Somebody may have joined since.
    if let Some(member) = unstaged(view).filter(|_| !view.part.moved) {
        let why = format!("{} is new", member.node);
        return Decision::Advance(UpgradePhase::Stage, why);
    }
    let (upgrade, now_ms) = (view.upgrade, view.scene.now_ms);
    let time_ms = schedule::time_ms(view.task, &view.instance.maintenance_window);
    if now_ms < time_ms {
        return wait(time_ms, "its time");
    }
    if let Some(closed) = view.window() {
        return closed;
    }
    if upgrade.paused {
        let why = match upgrade.paused_why.as_str() {
            "" => "an operator to resume".to_owned(),
            why => format!("an operator to resume: {why}"),
        };
        return wait(u64::MAX, why);
    }
    if let Some(what) = not_its_turn(view) {
        return wait(u64::MAX, what);
    }
    if let Owner::Other(task) = view.owner {
        return wait(u64::MAX, format!("task {task}, which has the shard"));
    }
    if view.shard.mode != Mode::Serving || view.shard.epoch.0 == 0 {
        return wait(u64::MAX, "the shard to serve");
    }
    let runs_it = |m: &slotmesh_topology::Member| {
        assignment::engine(view.instance, m) == upgrade.engine
            && view.engine_of(m) == upgrade.engine
            && m.exchange.is_none()
    };
    if view.shard.members.iter().all(runs_it) {
        return Decision::End(UpgradePhase::Done, "every node runs it already".into());
    }
    if let Some(decision) = changed(view) {
        return decision;
    }
    if !view.part.moved && nodes::others(view.shard).next().is_none() {
        let why = "it has no replica: nobody could take its primary's place meanwhile";
        return Decision::End(UpgradePhase::RolledBack, why.into());
    }
    Decision::Begin
}

/// Nodes have joined or left since it was admitted, or are to be something else: how they get the engine
/// is decided anew, or it is not begun.
fn changed(view: &View<'_>) -> Option<Decision> {
    let (part, method) = (view.part, view.upgrade.method);
    if part.moved != plan::is_moved(view.shard, method) {
        let why = match part.moved {
            true => "it has a replica by now: its nodes get the engine in place",
            false => "it has one node by now: a new one takes its place",
        };
        return Some(Decision::Advance(UpgradePhase::Stage, why.into()));
    }
    let are_alike = match method {
        Method::CrossHost => plan::check_alike(view.shard),
        _ => Ok(()),
    };
    let refused = are_alike.err()?;
    Some(Decision::End(UpgradePhase::RolledBack, refused.message))
}

fn not_its_turn(view: &View<'_>) -> Option<String> {
    let shards = &view.upgrade.shards;
    if let Some(other) = shards.iter().find(|s| s.phase == UpgradePhase::Stage) {
        return Some(format!("the hosts of shard {}", other.shard));
    }
    if let Some(other) = shards
        .iter()
        .find(|s| s.why_back.is_some() && !s.phase.is_ended())
    {
        return Some(format!("shard {}, which goes back", other.shard));
    }
    let index = shards.iter().position(|s| s.shard == view.part.shard)?;
    let canaries = view.upgrade.canary_shards as usize;
    let is_canary = index < canaries;
    let mut first = shards.iter().take(canaries);
    if !is_canary && let Some(canary) = first.find(|s| s.phase != UpgradePhase::Done) {
        return Some(format!("shard {}, which comes first", canary.shard));
    }
    let at_a_time = match is_canary {
        true => 1,
        false => view.upgrade.parallel_shards.max(1) as usize,
    };
    let is_active = |s: &&super::ShardUpgrade| !s.phase.is_before() && !s.phase.is_ended();
    let active = shards.iter().filter(is_active).count();
    // Those before it go first, also when both could begin now.
    let waiting = shards[..index].iter().any(|s| s.phase.is_before());
    (active >= at_a_time || waiting).then(|| "its turn".to_owned())
}

/// Where the task ends once every shard has, and why.
#[must_use]
pub fn ended(task: &Task, upgrade: &Upgrade) -> Option<(State, String)> {
    if !upgrade.shards.iter().all(|s| s.phase.is_ended()) {
        return None;
    }
    let (done, all) = (done(upgrade), upgrade.shards.len());
    let engine = &upgrade.engine;
    if done == all {
        let mut words = format!("every node runs {engine}");
        for part in &upgrade.shards {
            if let Some(closed) = unasked(upgrade, part) {
                let shard = &part.shard;
                words.push_str(&format!(
                    "; shard {shard}: the operator was not waited for: {closed}"
                ));
            }
        }
        return Some((State::Done, words));
    }
    let back = upgrade
        .shards
        .iter()
        .filter(|s| s.phase == UpgradePhase::RolledBack);
    let why = back
        .filter(|s| !s.message.starts_with("halted"))
        .map(|s| format!("shard {}: {}", s.shard, s.message));
    let words = format!("{done} of {all} shards run {engine}, the others run what they ran before");
    let cancelled = task.cancel_requested;
    Some(parts::fell_short(done, cancelled, &words, why.collect()))
}

/// Why there was nothing left to wait for, when an operator was to say when the bake is over and has not.
pub(super) fn unasked<'a>(upgrade: &Upgrade, part: &'a super::ShardUpgrade) -> Option<&'a str> {
    let rollback = part.rollback.as_ref().filter(|r| !r.open)?;
    (upgrade.finalize_by_operator && !part.finalize).then_some(rollback.why.as_str())
}

fn done(upgrade: &Upgrade) -> usize {
    let done = |s: &&super::ShardUpgrade| s.phase == UpgradePhase::Done;
    upgrade.shards.iter().filter(done).count()
}

/// Where the upgrade is, in a line.
#[must_use]
pub fn summary(upgrade: &Upgrade) -> String {
    let (done, all) = (done(upgrade), upgrade.shards.len());
    let mut parts = vec![format!("{done} of {all} shards run {}", upgrade.engine)];
    for phase in UpgradePhase::ALL.into_iter().filter(|p| !p.is_ended()) {
        let here = upgrade.shards.iter().filter(|s| s.phase == phase).count();
        if here > 0 {
            parts.push(format!("{here} in {}", phase.name()));
        }
    }
    if upgrade.paused {
        parts.push(match upgrade.paused_why.as_str() {
            "" => "paused".into(),
            why => format!("paused: {why}"),
        });
    }
    parts.join(", ")
}
