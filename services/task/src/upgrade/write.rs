//! Each decision of an upgrade as the records that go into one transaction.
//!
//! Invariant: record and phase change together, so that a successor finds them in step; the lock goes
//! with the phases that need it.

use slotmesh_topology::{Exchange, Mode, Shard, ShardId, TransitionError};

use super::{
    Decision, NodeUpgrade, Owner, ShardUpgrade, UpgradePhase, View, bake, fleet, gate, moves,
    nodes, plan,
};
use crate::spec::{Phase, Spec, State, Task};

/// What becomes of the shard's lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lock {
    /// Nothing.
    Keep,
    /// It is nobody's, and becomes the task's.
    Take,
    /// It is freed, if it is the task's.
    Free,
}

/// Records that are written together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Write {
    /// The task as it will be.
    pub task: Task,
    /// The shard's next record.
    pub shard: Option<Shard>,
    /// Of the shard.
    pub lock: Lock,
    /// The event's step.
    pub event: &'static str,
    /// Its words.
    pub message: String,
}

/// The task with one shard's part changed; its own state and line follow.
pub(super) fn with(view: &View<'_>, message: &str, change: impl FnOnce(&mut ShardUpgrade)) -> Task {
    let mut task = view.task.clone();
    if let Spec::Upgrade(upgrade) = &mut task.spec {
        if let Some(part) = upgrade.part_mut(&view.part.shard) {
            message.clone_into(&mut part.message);
            change(part);
        }
        gate::pause(upgrade, &view.part.shard, view.part.hold_us);
        task.message = fleet::summary(upgrade);
    }
    task.state = match task.is_parked_upgrade() {
        true => State::NeedsOperator,
        false => State::Running,
    };
    task
}

impl Task {
    fn is_parked_upgrade(&self) -> bool {
        matches!(&self.spec, Spec::Upgrade(upgrade) if upgrade.is_parked())
    }
}

/// Since now: what is asked in it is asked anew.
pub(super) fn since(part: &mut ShardUpgrade, now_ms: u64) {
    part.phase_since_ms = now_ms.max(part.phase_since_ms + 1);
}

fn note_hold(part: &mut ShardUpgrade) {
    let last_us = part.switch.as_ref().map_or(0, |s| s.hold_us);
    part.hold_us = part.hold_us.max(last_us);
}

fn enter(part: &mut ShardUpgrade, phase: UpgradePhase, now_ms: u64) {
    if part.phase != phase {
        (part.tries, part.retried) = (0, false);
    }
    note_hold(part);
    part.phase = phase;
    since(part, now_ms);
}

fn waiting(what: &str) -> String {
    format!("waiting for {what}")
}

/// The shard is free while that is waited for; `None` when it is, and that is shown.
fn rest(view: &View<'_>, what: &str) -> Option<Write> {
    let words = waiting(what);
    if *view.owner != Owner::Own && view.part.message == words {
        return None;
    }
    Some(Write {
        task: with(view, &words, |_| {}),
        shard: nodes::unwatched(view),
        lock: Lock::Free,
        event: "Waiting",
        message: words,
    })
}

/// What is waited for, to be shown; `None` when that is shown already.
#[must_use]
pub fn say(view: View<'_>, what: &str) -> Option<Write> {
    let words = waiting(what);
    if what.is_empty() || view.part.message == words || view.part.phase == UpgradePhase::Parked {
        return None;
    }
    Some(Write {
        task: with(&view, &words, |_| {}),
        shard: None,
        lock: Lock::Keep,
        event: "Waiting",
        message: words,
    })
}

/// What a decision writes; `None` for one that writes nothing.
///
/// # Errors
/// When the record does not allow it: it has moved on since.
pub fn write(view: View<'_>, decision: &Decision) -> Result<Option<Write>, TransitionError> {
    let mut written = written(view, decision)?;
    if let Some(write) = &mut written
        && let Spec::Upgrade(next) = &write.task.spec
        && next.paused_why != view.upgrade.paused_why
    {
        let why = format!("; no further shard begins: {}", next.paused_why);
        write.message.push_str(&why);
    }
    Ok(written)
}

fn written(view: View<'_>, decision: &Decision) -> Result<Option<Write>, TransitionError> {
    let now_ms = view.scene.now_ms;
    let written = |task, shard, lock, event, message: String| Write {
        task,
        shard,
        lock,
        event,
        message,
    };
    Ok(Some(match decision {
        Decision::Wait { .. } | Decision::Stage(_) | Decision::Drive | Decision::Stop => {
            return Ok(None);
        }
        Decision::Rest { what, .. } => return Ok(rest(&view, what)),
        Decision::Staged(node) => staged(&view, node),
        Decision::Begin => {
            let message = match view.part.moved {
                true => format!("a new node joins {}", view.shard.primary),
                false => format!("replicas of {} come first", view.shard.primary),
            };
            let task = with(&view, &message, |part| {
                if part.moved {
                    // Whoever joins from here on is new.
                    part.nodes = plan::nodes(view.shard, view.scene.fleet);
                }
                part.began_epoch = view.shard.epoch;
                enter(part, UpgradePhase::Replicas, now_ms);
            });
            written(task, None, Lock::Take, "Begin", message)
        }
        Decision::Regain => {
            let message = "the shard is free again".to_owned();
            let task = with(&view, &message, |part| since(part, now_ms));
            written(task, None, Lock::Take, "Resumed", message)
        }
        Decision::Exchange { node, engine, data } => {
            let next = view.shard.exchange(node, engine, *data)?;
            let message = format!("{node} makes way for {}", super::nodes::shown(engine));
            let task = with(&view, &message, |part| since(part, now_ms));
            written(task, Some(next), Lock::Keep, "Exchange", message)
        }
        Decision::Exchanged(node) => {
            let next = view.shard.exchanged(node)?;
            let message = format!("{node} runs it");
            let task = with(&view, &message, |part| since(part, now_ms));
            written(task, Some(next), Lock::Keep, "Exchanged", message)
        }
        Decision::Recruit(_)
        | Decision::Retain(_)
        | Decision::Expel(_)
        | Decision::Drain(_)
        | Decision::Leave(_) => moves::write(&view, decision)?,
        Decision::Plan(switch, rollback) => {
            let message = format!("{} is to be the primary", switch.to);
            let task = with(&view, &message, |part| {
                let last = part.switch.as_ref();
                part.tries += u32::from(last.is_some_and(|s| s.phase == Phase::RolledBack));
                note_hold(part);
                part.held_us = part.total_hold_us();
                part.switch = Some((**switch).clone());
                part.rollback = rollback.clone().or(part.rollback.take());
            });
            let next = rollback.as_ref().map(|rollback| {
                let told = view.shard.foresee(bake::older(rollback))?;
                moves::note_older(&view, told)
            });
            let next = next.transpose()?;
            written(task, next, Lock::Keep, "Plan", message)
        }
        Decision::Doubt {
            doubt,
            behind_since_ms,
        } => {
            let message = match doubt.as_str() {
                "" => "the way back is open".to_owned(),
                doubt => format!("the way back: {doubt}"),
            };
            let task = with(&view, &view.part.message, |part| {
                if let Some(rollback) = &mut part.rollback {
                    doubt.clone_into(&mut rollback.doubt);
                    rollback.behind_since_ms = *behind_since_ms;
                    rollback.doubts += 1;
                }
            });
            written(task, None, Lock::Keep, "Rollback", message)
        }
        Decision::Close { why, diverged } => close(&view, why, *diverged),
        Decision::TurnBack {
            why,
            on_request,
            blameless,
        } => turn_back(&view, why, (*on_request, *blameless)),
        Decision::Advance(phase, message) => {
            let task = with(&view, message, |part| {
                enter(part, *phase, now_ms);
                if *phase == UpgradePhase::Replicas {
                    (part.why_back, part.on_request) = (None, false);
                    part.blameless = false;
                }
                if *phase == UpgradePhase::Stage {
                    part.moved = plan::is_moved(view.shard, view.upgrade.method);
                }
            });
            let lock = match phase {
                UpgradePhase::Bake => Lock::Free,
                _ => Lock::Keep,
            };
            written(task, None, lock, phase.name(), message.clone())
        }
        Decision::End(phase, message) => {
            let lock = match view.part.phase.is_before() {
                true => Lock::Keep,
                false => Lock::Free,
            };
            // Nobody follows a newer engine any more.
            let next = Some(view.shard.none_older());
            let next = next.filter(|n| !view.part.phase.is_before() && n != view.shard);
            let task = with(&view, message, |part| {
                part.blameless = fleet::is_blameless(&view);
                enter(part, *phase, now_ms);
            });
            written(task, next, lock, phase.name(), message.clone())
        }
        Decision::Park(why) => {
            let words = format!("{why}; when that is mended, retry");
            let task = with(&view, &words, |part| {
                part.parked_in = Some(part.phase);
                enter(part, UpgradePhase::Parked, now_ms);
            });
            // Nothing of it is under way: whoever mends the shard, or replaces a node of it, may have it.
            let is_still = view.shard.mode == Mode::Serving
                && view.part.switch.as_ref().is_none_or(|s| s.phase.is_ended());
            let lock = match is_still {
                true => Lock::Free,
                false => Lock::Keep,
            };
            written(task, nodes::unwatched(&view), lock, "Parked", words)
        }
    }))
}

/// The task without a shard whose record is gone.
#[must_use]
pub fn gone(task: &Task, shard: &ShardId, now_ms: u64) -> Task {
    let mut next = task.clone();
    if let Spec::Upgrade(upgrade) = &mut next.spec
        && let Some(part) = upgrade.part_mut(shard)
    {
        enter(part, UpgradePhase::RolledBack, now_ms);
        part.message = "the shard's record is gone".into();
    }
    next
}

fn staged(view: &View<'_>, node: &slotmesh_topology::NodeId) -> Write {
    let message = format!("the host of {node} has tried the engine");
    let member = view.shard.member(node);
    let joined = NodeUpgrade {
        node: node.clone(),
        from_engine: member.map(|m| m.engine.clone()).unwrap_or_default(),
        from_version: view
            .scene
            .fleet
            .node(node)
            .map(|n| n.version.clone())
            .unwrap_or_default(),
        staged: true,
    };
    let task = with(view, &message, |part| {
        match part.nodes.iter_mut().find(|n| n.node == *node) {
            Some(known) => known.staged = true,
            None => part.nodes.push(joined),
        }
        since(part, view.scene.now_ms);
    });
    Write {
        task,
        shard: None,
        lock: Lock::Keep,
        event: "Staged",
        message,
    }
}

/// No way back from here on; the switch that was to lead there has had no effect.
fn close(view: &View<'_>, why: &str, diverged: bool) -> Write {
    let message = format!("no way back any more: {why}");
    let task = with(view, &message, |part| {
        if let Some(rollback) = &mut part.rollback {
            (rollback.open, rollback.diverged) = (false, rollback.diverged || diverged);
            why.clone_into(&mut rollback.why);
        }
        if let Some(switch) = part.switch.as_mut().filter(|s| !s.phase.is_ended()) {
            switch.phase = Phase::RolledBack;
            why.clone_into(&mut switch.message);
        }
        (part.why_back, part.on_request, part.blameless) = (None, false, false);
        enter(part, UpgradePhase::Finalize, view.scene.now_ms);
    });
    // Nobody may count on what it has from the moment on that this is known.
    let left_out = view.part.rollback.as_ref().filter(|_| diverged);
    let left_out = left_out.and_then(|r| view.shard.member(&r.old));
    let left_out =
        left_out.filter(|m| nodes::follows(view, m) && !matches!(view.owner, Owner::Other(_)));
    let engine = &view.upgrade.engine;
    let shard = left_out.map(|m| match view.part.moved {
        true => moves::expelled(view, &m.node),
        false => view.shard.exchange(&m.node, engine, Exchange::Discard),
    });
    let shard = shard.and_then(Result::ok);
    let lock = match (&shard, view.owner) {
        (Some(_), Owner::Free) => Lock::Take,
        _ => Lock::Keep,
    };
    Write {
        task,
        shard,
        lock,
        event: "Closed",
        message,
    }
}

fn turn_back(view: &View<'_>, why: &str, (on_request, blameless): (bool, bool)) -> Write {
    let phase = match view.primary_is_upgraded() {
        true => UpgradePhase::SwitchBack,
        false => UpgradePhase::UndoNodes,
    };
    let message = format!("goes back: {why}");
    let task = with(view, &message, |part| {
        part.why_back = Some(why.to_owned());
        (part.on_request, part.blameless) = (on_request, blameless);
        enter(part, phase, view.scene.now_ms);
    });
    Write {
        task,
        shard: None,
        lock: Lock::Keep,
        event: "TurnBack",
        message,
    }
}
