//! Patches that are installed without anybody's asking: which one an instance would get, and when.
//!
//! Only another patch of the release that the nodes run: its files are the same, so there is always a way
//! back. Invariant: one is begun only in its instance's maintenance window and as one of few at a time,
//! and never a version that did not work somewhere: it waits until somebody has made it work.

use slotmesh_topology::{
    Instance, InstanceState, Shard, TaskId,
    artifact::{Artifact, Level, parse_reported},
    compatibility::{self, Engine},
};

use crate::{
    observe::Fleet,
    schedule::Window,
    spec::{Copied, Spec, State, Task},
    upgrade::{
        BAKE_MS, HOLD_MS, Method, Options, ShardUpgrade, TASK_MS_MAX, Upgrade, UpgradePhase,
    },
};

/// Instances that are upgraded by themselves at a time, where nothing else is said: what is wrong with a
/// patch is seen on one.
pub const AT_A_TIME: usize = 1;

/// After one that ended for want of a host: hosts come and go, and each try makes a node that copies
/// everything.
pub const AGAIN_MS: u64 = 60 * 60 * 1_000;

/// What is to be done about an instance.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nothing is installed by itself.
    Off,
    /// Nothing now.
    Wait {
        /// What will be installed, if something is known.
        next: Option<Engine>,
        /// What for.
        why: String,
    },
    /// Begin.
    Due {
        /// To which.
        to: Engine,
        /// How urgent it is.
        level: Level,
    },
}

/// What a verdict depends on besides its instance.
#[derive(Debug, Clone, Copy)]
pub struct Scene<'a> {
    /// Programs that hosts may run.
    pub listed: &'a [Artifact],
    /// Every instance that is known: whose windows are open.
    pub instances: &'a [&'a Instance],
    /// Every task that is known, the oldest first.
    pub tasks: &'a [&'a Task],
    /// Instances at a time; 0: none.
    pub at_a_time: usize,
    /// Now, in milliseconds since the epoch.
    pub now_ms: u64,
    /// For how long windows do not count yet; see [`crate::steady`].
    pub rests_ms: u64,
}

/// What the nodes run, if each of them has said so.
#[must_use]
pub fn engines(shards: &[Shard], fleet: &Fleet) -> Option<Vec<Engine>> {
    let members = shards.iter().flat_map(|s| &s.members);
    let engine = |m: &slotmesh_topology::Member| parse_reported(&fleet.node(&m.node)?.version);
    let all: Option<Vec<Engine>> = members.map(engine).collect();
    all.filter(|all| !all.is_empty())
}

/// What is to be done about an instance whose nodes run `engines`.
#[must_use]
pub fn judge(instance: &Instance, engines: Option<&[Engine]>, scene: Scene<'_>) -> Verdict {
    let Some(from_level) = instance.auto_upgrade else {
        return Verdict::Off;
    };
    let wait = |next, why: &str| Verdict::Wait {
        next,
        why: why.to_owned(),
    };
    let Some(engines) = engines else {
        return wait(None, "not every node has said which engine it runs");
    };
    let (to, level) = match newest(engines, scene.listed, from_level) {
        Ok(newest) => newest,
        Err(why) => return wait(None, &why),
    };
    match hindrance(instance, to, scene) {
        Some(why) => wait(Some(to), &why),
        None => Verdict::Due { to, level },
    }
}

/// The newest listed patch of the release that all nodes run, and the highest level of those that are
/// newer than what one of them runs: who gets the newest gets them all.
fn newest(
    engines: &[Engine],
    listed: &[Artifact],
    from_level: Level,
) -> Result<(Engine, Level), String> {
    let release = |(product, v): &Engine| (*product, v.major, v.minor);
    let lowest = engines.iter().min_by_key(|(_, v)| *v);
    let lowest = lowest.ok_or("no node has said which engine it runs")?;
    if engines.iter().any(|e| release(e) != release(lowest)) {
        return Err("its nodes run several releases: finish that upgrade first".into());
    }
    let (product, major, minor) = release(lowest);
    let is_patch =
        |a: &&Artifact| release(&(a.product, a.version)) == release(lowest) && a.version > lowest.1;
    let patches = || listed.iter().filter(is_patch);
    let level = patches().map(|a| a.level).max();
    let level = level.filter(|level| *level >= from_level);
    let newest = patches().map(|a| a.version).max();
    match (newest, level) {
        (Some(version), Some(level)) => Ok(((product, version), level)),
        _ => Err(format!(
            "no newer patch of {} {major}.{minor} of that level is listed",
            product.name()
        )),
    }
}

/// Why it is not begun now.
fn hindrance(instance: &Instance, to: Engine, scene: Scene<'_>) -> Option<String> {
    if instance.state != InstanceState::Running {
        return Some("the instance to run".into());
    }
    let Ok(window) = Window::read(&instance.maintenance_window) else {
        let why = "a maintenance window: nothing is installed by itself at any time \
                   (slotmesh instance maintain)";
        return Some(why.into());
    };
    if let Some(why) = distrust(instance, &compatibility::name(to), scene) {
        return Some(why);
    }
    let is_open = |t: &Task| !t.state.is_ended() || t.is_parked();
    let upgrades = || {
        let all = scene.tasks.iter();
        all.filter_map(|task| match &task.spec {
            Spec::Upgrade(upgrade) if is_open(task) => Some((*task, upgrade)),
            _ => None,
        })
    };
    if let Some((task, upgrade)) = upgrades().find(|(t, _)| t.instance == instance.id) {
        let why = stands(task, upgrade).map(|why| format!(" and {why}"));
        let why = why.unwrap_or_default();
        return Some(format!("task {}, which upgrades it{why}", task.id));
    }
    if window.next_ms(scene.now_ms) > scene.now_ms {
        let window = &instance.maintenance_window;
        return Some(format!("its maintenance window, {window} UTC"));
    }
    if scene.rests_ms > 0 {
        return Some("the controller's clock to be steady: it has jumped".into());
    }
    // One that has changed nothing and waits for its own next window keeps nobody else's.
    let is_under_way = |task: &Task, upgrade: &Upgrade| {
        let other = scene.instances.iter().find(|i| i.id == task.instance);
        let window = other.and_then(|i| Window::read(&i.maintenance_window).ok());
        upgrade.has_begun() || window.is_some_and(|w| w.next_ms(scene.now_ms) == scene.now_ms)
    };
    let under_way = || upgrades().filter(|(t, u)| u.automatic && is_under_way(t, u));
    let standing = || {
        let mut stopped = under_way().filter_map(|(t, u)| Some((t, stands(t, u)?)));
        let (task, why) = stopped.next()?;
        Some(format!(
            ", and task {} of instance {} {why}",
            task.id, task.instance
        ))
    };
    (under_way().count() >= scene.at_a_time).then(|| match scene.at_a_time {
        0 => "somebody: the controllers are set to upgrade nothing by themselves".into(),
        most => format!(
            "its turn: {most} at a time{}",
            standing().unwrap_or_default()
        ),
    })
}

/// Whose turn it is before a task that was admitted by itself and has begun nothing: while it waited for its
/// window, others may have begun.
#[must_use]
pub fn goes_before<'a>(
    task: &Task,
    tasks: impl Iterator<Item = &'a Task>,
    at_a_time: usize,
) -> Option<String> {
    let is_automatic = |task: &Task, has_begun| matches!(&task.spec, Spec::Upgrade(u) if u.automatic && u.has_begun() == has_begun);
    if !is_automatic(task, false) {
        return None;
    }
    let is_open = |t: &Task| !t.state.is_ended() || t.is_parked();
    let mut begun = tasks.filter(|t| t.id != task.id && is_open(t) && is_automatic(t, true));
    let last = begun.nth(at_a_time.max(1) - 1)?;
    Some(format!(
        "its turn: task {} of instance {} is under way",
        last.id, last.instance
    ))
}

/// Why one that is open does not get to its end before an operator has looked at it.
fn stands(task: &Task, upgrade: &Upgrade) -> Option<String> {
    match upgrade.paused_why.as_str() {
        _ if task.is_parked() => Some(format!("waits for an operator: {}", task.message)),
        _ if !upgrade.paused => None,
        "" => Some("is paused by an operator: resume or cancel it".into()),
        why => Some(format!("is paused: {why}")),
    }
}

/// Why the version is not installed by itself: it did not work, here or elsewhere, and has worked nowhere
/// since; or an operator has stopped it here.
fn distrust(instance: &Instance, engine: &str, scene: Scene<'_>) -> Option<String> {
    let is_to = |t: &&&Task| matches!(&t.spec, Spec::Upgrade(u) if u.engine == engine);
    let tries = || scene.tasks.iter().rev().filter(is_to);
    let mut here = tries().filter(|t| t.instance == instance.id && t.state.is_ended());
    match here.next() {
        Some(task) if task.state == State::Cancelled => {
            return Some(format!(
                "an operator, who stopped task {} (slotmesh upgrade {} --to {engine})",
                task.id, instance.id
            ));
        }
        Some(task) if is_blameless(task) && scene.now_ms < task.updated_ms + AGAIN_MS => {
            let minutes = AGAIN_MS / 60_000;
            return Some(format!(
                "{minutes} minutes to pass since task {}, which lacked a host: {}",
                task.id, task.message
            ));
        }
        _ => {}
    }
    let judged = |t: &&&Task| {
        let failed = t.state == State::RolledBack || t.state == State::NeedsOperator;
        failed && !is_blameless(t) || t.state == State::Done
    };
    let last = tries().find(judged)?;
    (last.state != State::Done).then(|| {
        format!(
            "an operator: task {} to {engine} of instance {} did not get to its end; upgrade one by \
             hand, or list a newer patch",
            last.id, last.instance
        )
    })
}

/// It fell short, and what of it went back did so for a reason that says nothing about the engine.
fn is_blameless(task: &Task) -> bool {
    let Spec::Upgrade(upgrade) = &task.spec else {
        return false;
    };
    let is_back = |s: &&ShardUpgrade| s.phase == UpgradePhase::RolledBack;
    let shards = || upgrade.shards.iter();
    shards().all(|s| s.phase.is_ended() && (s.blameless || !is_back(&s)))
        && shards().any(|s| is_back(&s))
}

/// The task of an upgrade that was planned with [`options`].
#[must_use]
pub fn task(id: TaskId, instance: &Instance, planned: Upgrade, now_ms: u64) -> Task {
    let level = instance.auto_upgrade.map_or("", Level::name);
    Task {
        id,
        instance: instance.id.clone(),
        message: format!(
            "{} by itself: the instance is set to have patches of level {level} or above",
            planned.engine
        ),
        spec: Spec::Upgrade(planned),
        state: State::Pending,
        created_ms: now_ms,
        updated_ms: now_ms,
        deadline_ms: now_ms + TASK_MS_MAX,
        event_count: 0,
        cancel_requested: false,
        not_before_ms: 0,
        in_window: false,
        choice: None,
        trace_id: String::new(),
        copied: Copied::default(),
    }
}

/// How it is done: in the window, a shard at a time, with the usual bake.
#[must_use]
pub fn options(to: Engine) -> Options {
    Options {
        to,
        bake_ms: BAKE_MS,
        canary_shards: 1,
        parallel_shards: 1,
        finalize_by_operator: false,
        preserve_roles: false,
        in_window: true,
        allow_downtime: false,
        automatic: true,
        method: Method::Auto,
        max_hold_ms: HOLD_MS,
    }
}

#[cfg(test)]
#[path = "auto_tests.rs"]
mod tests;
