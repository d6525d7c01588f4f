//! Whether an instance's nodes may be given another engine, and what that will be made of.
//!
//! Invariant: what is refused here would have lost data, made clients wait unasked, or led nowhere; and
//! it is refused before anything is fetched.

use std::collections::BTreeSet;

use slotmesh_topology::{
    Epoch, HostId, Instance, Member, Mode, NodeId, NodeRole, PRIORITY, Shard,
    artifact::{parse_name, parse_reported},
    assignment,
    compatibility::{self, Engine, WayBack},
};

use super::{Method, NodeUpgrade, ShardUpgrade, Upgrade, UpgradePhase, View};
use crate::{
    admit::{Refusal, RefusalKind},
    observe::Fleet,
};

/// Shards under way at a time: as many as one switchover may have.
pub const PARALLEL_MAX: u32 = 50;
/// A longer bake is a decision, not a wait.
pub const BAKE_MS_MAX: u64 = 7 * 24 * 60 * 60 * 1_000;
/// A task's deadline: its phases have their own, and a bake takes days.
pub const TASK_MS_MAX: u64 = 60 * 24 * 60 * 60 * 1_000;
/// What is not said: a minute in which errors show.
pub const BAKE_MS: u64 = 60_000;

/// What an operator asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The next engine.
    pub to: Engine,
    /// For how long the old primary is kept.
    pub bake_ms: u64,
    /// That come first.
    pub canary_shards: u32,
    /// At a time; 0 means 1.
    pub parallel_shards: u32,
    /// The bake ends on his word only.
    pub finalize_by_operator: bool,
    /// The old primaries become primaries again.
    pub preserve_roles: bool,
    /// In the maintenance window only.
    pub in_window: bool,
    /// Also where writes have to wait for a node that restarts.
    pub allow_downtime: bool,
    /// Nobody asks for it but the instance's setting.
    pub automatic: bool,
    /// How nodes get it.
    pub method: Method,
    /// A switch that holds commands for longer pauses it; 0: none does.
    pub max_hold_ms: u32,
}

/// What would be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Planned {
    /// The task's part.
    pub upgrade: Upgrade,
    /// What to know before.
    pub remarks: Vec<String>,
    /// Every node runs it already.
    pub nothing_to_do: bool,
}

fn refuse<T>(kind: RefusalKind, reason: &'static str, message: String) -> Result<T, Refusal> {
    Err(Refusal {
        kind,
        reason,
        message,
    })
}

/// What an upgrade would do, shard by shard.
///
/// # Errors
/// When an option is out of range, the table of releases does not allow it, or a shard could not be
/// upgraded without being noticed.
pub fn plan(
    instance: &Instance,
    shards: &[Shard],
    fleet: &Fleet,
    options: &Options,
    now_ms: u64,
) -> Result<Planned, Refusal> {
    check_range(options)?;
    let mut ways = BTreeSet::new();
    for shard in shards {
        for member in &shard.members {
            let version = &fleet.node(&member.node).map(|n| n.version.clone());
            let version = version.as_deref().unwrap_or_default();
            if way_back(&member.node, version, options.to)? == WayBack::ByStream {
                ways.insert(version.to_owned());
            }
        }
    }
    let name = compatibility::name(options.to);
    let is_done = |s: &Shard| runs_it(instance, s, fleet, options.to, &name);
    for shard in shards.iter().filter(|s| !is_done(s)) {
        match is_moved(shard, options.method) {
            true => check_moved(shard, fleet, options)?,
            false => check_shard(shard, instance.durability, options.allow_downtime)?,
        }
    }
    let part = |s: &Shard| part(s, fleet, is_moved(s, options.method), now_ms);
    let mut parts: Vec<_> = shards.iter().map(part).collect();
    for (part, shard) in parts.iter_mut().zip(shards) {
        if is_done(shard) {
            part.phase = UpgradePhase::Done;
            part.message = "every node runs it already".into();
        }
    }
    let upgrade = Upgrade {
        engine: name.clone(),
        from_engine: instance.engine.clone(),
        bake_ms: options.bake_ms,
        canary_shards: options.canary_shards,
        parallel_shards: options.parallel_shards.max(1),
        finalize_by_operator: options.finalize_by_operator,
        preserve_roles: options.preserve_roles,
        in_window: options.in_window,
        paused: false,
        paused_why: String::new(),
        max_hold_ms: options.max_hold_ms,
        automatic: options.automatic,
        allow_downtime: options.allow_downtime,
        method: options.method,
        shards: parts,
    };
    Ok(Planned {
        remarks: remarks(&upgrade, &ways, instance),
        nothing_to_do: shards.iter().all(is_done),
        upgrade,
    })
}

fn check_range(options: &Options) -> Result<(), Refusal> {
    let invalid = |message| refuse(RefusalKind::Invalid, "UPGRADE_INVALID", message);
    if options.parallel_shards > PARALLEL_MAX {
        return invalid(format!("parallel_shards is at most {PARALLEL_MAX}"));
    }
    if options.bake_ms > BAKE_MS_MAX {
        let days = BAKE_MS_MAX / (24 * 60 * 60 * 1_000);
        return invalid(format!(
            "bake_seconds is at most {days} days; to decide later yourself, finalize by operator"
        ));
    }
    if options.preserve_roles && options.method == Method::CrossHost {
        return invalid(
            "preserve_roles makes the old primaries primaries again, and with method cross-host they \
             leave in the end: ask for one of the two"
                .into(),
        );
    }
    Ok(())
}

fn way_back(node: &NodeId, version: &str, to: Engine) -> Result<WayBack, Refusal> {
    let Some(from) = parse_reported(version) else {
        let message = format!(
            "node {node} has not said which engine it runs: is its agent running? try again then"
        );
        return refuse(RefusalKind::Unavailable, "VERSION_UNKNOWN", message);
    };
    compatibility::upgrade(from, to).or_else(|refusal| {
        refuse(
            RefusalKind::Precondition,
            "UPGRADE_REFUSED",
            refusal.to_string(),
        )
    })
}

/// Every node runs the engine, under its name or another one.
fn runs_it(instance: &Instance, shard: &Shard, fleet: &Fleet, to: Engine, name: &str) -> bool {
    shard.members.iter().all(|m| {
        let version = fleet.node(&m.node).map(|n| n.version.as_str());
        let assigned = assignment::engine(instance, m);
        // A name that stands for another version would be started with that at the next restart.
        let is_meant = parse_name(assigned).is_none() || assigned == name;
        version.and_then(parse_reported) == Some(to) && is_meant && m.exchange.is_none()
    })
}

/// New nodes take the places of its nodes.
pub(super) fn is_moved(shard: &Shard, method: Method) -> bool {
    match method {
        Method::Auto => shard.members.len() == 1,
        Method::InPlace => false,
        Method::CrossHost => true,
    }
}

fn check_serving(shard: &Shard) -> Result<(), Refusal> {
    if shard.mode == Mode::Serving {
        return Ok(());
    }
    let (id, mode) = (&shard.id, shard.mode.name());
    let message = format!("shard {id} is {mode}; try again when it serves");
    refuse(RefusalKind::Conflict, "SHARD_BUSY", message)
}

/// A new node may go to the host of its primary: that of an only node, when somebody has asked for it, who
/// knows whether that host has memory for the data twice.
#[must_use]
pub fn may_share(upgrade: &Upgrade, part: &ShardUpgrade) -> bool {
    let is_asked = upgrade.method != Method::CrossHost && !upgrade.automatic;
    is_asked && part.nodes.len() == 1
}

/// There is room for a new node for each, and each new one is what an old one was; whether it stays so is
/// seen when they join.
fn check_moved(shard: &Shard, fleet: &Fleet, options: &Options) -> Result<(), Refusal> {
    check_serving(shard)?;
    if options.method == Method::CrossHost {
        check_alike(shard)?;
    }
    let is_free = |host: &&HostId| !shard.members.iter().any(|m| m.host == **host);
    let (free, needed) = (
        fleet.hosts.iter().filter(is_free).count(),
        shard.members.len(),
    );
    let is_elsewhere = options.method == Method::CrossHost || options.automatic;
    if is_elsewhere && free < needed {
        let id = &shard.id;
        let message = format!(
            "shard {id} needs {needed} hosts with a live agent and without a node of it for its new \
             nodes, and there are {free}: start more agents, or upgrade it by hand on the hosts that \
             it has"
        );
        return refuse(RefusalKind::Precondition, "NO_HOST", message);
    }
    Ok(())
}

/// New nodes may be promoted, and have the default priority.
pub(super) fn check_alike(shard: &Shard) -> Result<(), Refusal> {
    let is_plain = |m: &Member| m.role != NodeRole::ReadOnly && m.priority == PRIORITY;
    let Some(member) = shard.members.iter().find(|m| !is_plain(m)) else {
        return Ok(());
    };
    let (node, id) = (&member.node, &shard.id);
    let what = match member.role {
        NodeRole::ReadOnly => "is read-only".to_owned(),
        _ => format!("has priority {}", member.priority),
    };
    let message = format!(
        "node {node} of shard {id} {what}, and a new node in its place would be a replica with priority \
         {PRIORITY}: upgrade in place, or give it priority {PRIORITY} first if it may be promoted \
         (slotmesh node priority)"
    );
    refuse(RefusalKind::Precondition, "NODES_DIFFER", message)
}

fn check_shard(shard: &Shard, durability: u32, allow_downtime: bool) -> Result<(), Refusal> {
    let id = &shard.id;
    let unfit = |reason, message| refuse(RefusalKind::Precondition, reason, message);
    check_serving(shard)?;
    let others = || shard.members.iter().filter(|m| m.node != shard.primary);
    if others().next().is_none() {
        return unfit(
            "NO_REPLICA",
            format!(
                "shard {id} has one node: in place it would be stopped, and clients would get errors \
                 for as long as it saves and loads all data. That is never done, with allow_downtime \
                 neither: it lets writes wait for a replica that restarts, where durability needs all \
                 of them. Take method auto: a new node copies the data and takes the only one's place, \
                 on the same host where there is no other"
            ),
        );
    }
    if !others().any(|m| m.role == NodeRole::Replica && m.priority > 0) {
        return unfit(
            "NO_CANDIDATE",
            format!(
                "no replica of shard {id} may be promoted; give one a priority above 0 first \
                 (slotmesh node priority)"
            ),
        );
    }
    let (needed, replicas) = (durability as usize, others().count());
    if needed > 0 && replicas <= needed && !allow_downtime {
        return unfit(
            "WRITES_WOULD_WAIT",
            format!(
                "each write to shard {id} waits for all of its {replicas} replicas (durability \
                 {durability}): while one restarts, writes would wait. Take method cross-host: new \
                 nodes on other hosts come first, and no write waits. Or lower the durability \
                 meanwhile, or set allow_downtime when that is agreeable: it is as long as the \
                 replica takes to save and load its data"
            ),
        );
    }
    Ok(())
}

/// The shard's nodes as they are now.
pub(super) fn nodes(shard: &Shard, fleet: &Fleet) -> Vec<NodeUpgrade> {
    let version = |node: &NodeId| fleet.node(node).map(|n| n.version.clone());
    let node = |m: &Member| NodeUpgrade {
        node: m.node.clone(),
        from_engine: m.engine.clone(),
        from_version: version(&m.node).unwrap_or_default(),
        staged: false,
    };
    shard.members.iter().map(node).collect()
}

fn part(shard: &Shard, fleet: &Fleet, moved: bool, now_ms: u64) -> ShardUpgrade {
    ShardUpgrade {
        shard: shard.id.clone(),
        moved,
        drain: None,
        phase: UpgradePhase::Stage,
        phase_since_ms: now_ms,
        message: String::new(),
        nodes: nodes(shard, fleet),
        switch: None,
        rollback: None,
        why_back: None,
        on_request: false,
        hold_us: 0,
        held_us: 0,
        tries: 0,
        finalize: false,
        parked_in: None,
        retried: false,
        blameless: false,
        began_epoch: Epoch(0),
    }
}

/// What an operator should know before; `by_stream`: versions that can't load the new one's files.
fn remarks(upgrade: &Upgrade, by_stream: &BTreeSet<String>, instance: &Instance) -> Vec<String> {
    let mut said = vec![match upgrade.finalize_by_operator {
        true => {
            "after each switch one can go back until an operator finalizes the shard".to_owned()
        }
        false => format!(
            "after each switch one can go back for {} s (slotmesh task cancel)",
            upgrade.bake_ms / 1_000
        ),
    }];
    if by_stream.is_empty() {
        said.push("afterwards the old engine could still load the new one's files".into());
    } else {
        let old: Vec<&str> = by_stream.iter().map(String::as_str).collect();
        said.push(format!(
            "afterwards nothing leads back: {} can't load the files of {}; take a backup before",
            old.join(", "),
            upgrade.engine
        ));
        if upgrade.shards.iter().any(|s| !s.moved) {
            let words = "replicas that go back copy the whole data set from the old primary: they \
                         can't load what the new engine has saved";
            said.push(words.into());
        }
    }
    if upgrade.max_hold_ms > 0 && upgrade.shards.len() > 1 {
        said.push(format!(
            "a switch that holds commands for more than {} ms pauses it before the next shard begins",
            upgrade.max_hold_ms
        ));
    }
    said.extend(of_moved(upgrade));
    if upgrade.in_window && instance.maintenance_window.is_empty() {
        said.push("the instance has no maintenance window, so any time is one".into());
    }
    said
}

/// What new nodes need, and what becomes of the old ones.
fn of_moved(upgrade: &Upgrade) -> Option<String> {
    let is_meant = |s: &&ShardUpgrade| s.moved && s.phase != UpgradePhase::Done;
    let moved = upgrade.shards.iter().filter(is_meant);
    let ids: Vec<&str> = moved.map(|s| s.shard.as_str()).collect();
    if ids.is_empty() {
        return None;
    }
    let ids = ids.join(", ");
    Some(match upgrade.method {
        Method::CrossHost => format!(
            "new nodes on other hosts take the places of those of shards {ids}: each copies all data, \
             and the old ones leave after the bake"
        ),
        _ if upgrade.automatic => format!(
            "shards {ids} have one node each: a new one on another host takes its place, and the old \
             one leaves after the bake"
        ),
        _ => format!(
            "shards {ids} have one node each: a new one takes its place, on another host, or on the \
             same where there is no other, which then needs memory for a second copy; the old one \
             leaves after the bake"
        ),
    })
}

/// Whether the engine that the node had can load what the new one has saved.
pub(super) fn files_are_alike(view: &View<'_>, node: &NodeId) -> bool {
    let from = view.part.node(node).map(|n| n.from_version.as_str());
    let pair = from
        .and_then(parse_reported)
        .zip(parse_name(&view.upgrade.engine));
    let back = pair.map(|(from, to)| compatibility::upgrade(from, to));
    back == Some(Ok(WayBack::ByCopy))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
