//! Whether a proxy may be touched, whether its new process is as good as the old one was.
//!
//! Invariant: what is not reported is not well; but only what a report says makes a new process bad, so
//! that a controller that has just begun to lead takes nobody back for its own ignorance.

use slotmesh_topology::{Mode, Placement, Shard};

use super::{Change, Counted, View};
use crate::observe::{HoldLevel, ProcessState, ProxyProcess, ProxyView};

/// Trouble with a primary that is nobody's but this proxy's: as long as its own retries take.
pub const TROUBLE_MS_MAX: u64 = 5_000;
/// Fewer commands say nothing about their errors.
pub const COMMANDS_MIN: u64 = 100;
/// Errors of the new process, in per mille of its commands, that are not held against it on top of
/// twice those of before: clients' own mistakes come in bursts.
const ERRORS_PER_MILLE_EXTRA: u64 = 10;

/// What is wrong with the shards, for whatever proxy: a primary that is being replaced, or that answers
/// none of those that are heard.
pub(super) fn shards(view: &View<'_>) -> Option<String> {
    if let Some(shard) = view.shards.iter().find(|s| s.mode != Mode::Serving) {
        let mode = shard.mode.name();
        return Some(format!("shard {} to serve (it is {mode})", shard.id));
    }
    if let Some(shard) = view.shards.iter().find(|s| !is_well(view, s)) {
        return Some(format!("the primary of shard {} to answer", shard.id));
    }
    let placed = view.instance.proxies.iter();
    let fresh = placed.filter_map(|p| view.fleet.proxies.get(&p.proxy).filter(|p| p.fresh));
    let lacks: Option<Vec<String>> = fresh.map(|seen| behind(view, seen)).collect();
    let what = lacks?.into_iter().next()?;
    Some(format!("every proxy to reach its nodes: {what}"))
}

/// What keeps the instance's other proxies from doing without this one.
pub(super) fn others(view: &View<'_>) -> Option<String> {
    let others = view.instance.proxies.iter();
    let is_other = |p: &&Placement| p.proxy != view.part.proxy && p.proxy != *view.subject();
    let mut others = others.filter(is_other);
    let (other, what) = others.find_map(|p| Some((p, unwell(view, p)?)))?;
    Some(format!("proxy {} to be well: {what}", other.proxy))
}

/// What is wrong with a proxy that nobody has changed.
pub(super) fn unwell(view: &View<'_>, placement: &Placement) -> Option<String> {
    let process = view.fleet.proxy_processes.get(&placement.proxy);
    if let Some(process) = process
        && matches!(process.state, ProcessState::Stopped | ProcessState::Failed)
    {
        return Some(format!("{}: {}", process.state.name(), process.error));
    }
    let under_way = |p: &ProxyProcess| p.handover.as_ref().is_some_and(|h| h.is_under_way);
    if process.is_some_and(under_way) {
        return Some("it hands over".into());
    }
    let Some(seen) = view.fleet.proxies.get(&placement.proxy).filter(|p| p.fresh) else {
        return Some("no controller hears it".into());
    };
    behind(view, seen)
}

/// What a proxy that is heard lacks of the topology, or of its nodes.
pub(super) fn behind(view: &View<'_>, seen: &ProxyView) -> Option<String> {
    for shard in view.shards {
        let at = seen.shards.get(&shard.id);
        let applied = at
            .is_some_and(|(epoch, level, _)| *level == HoldLevel::Applied && *epoch >= shard.epoch);
        if !applied {
            return Some(format!(
                "it does not route shard {} at epoch {} yet",
                shard.id, shard.epoch
            ));
        }
        if seen.troubles.contains_key(&shard.id) {
            return Some(format!(
                "the primary of shard {} does not answer it",
                shard.id
            ));
        }
    }
    None
}

/// What is wrong with the new process itself.
pub(super) fn bad(view: &View<'_>, part: &Change, process: &ProxyProcess) -> Option<String> {
    match process.state {
        ProcessState::Stopped | ProcessState::Failed => {
            return Some(format!("its new process has ended: {}", process.error));
        }
        ProcessState::Running if process.pid != part.pid => {
            return Some("its new process has ended, and another one was started".into());
        }
        _ => {}
    }
    let seen = view.fleet.proxies.get(view.subject());
    let seen = seen.filter(|seen| seen.fresh && seen.pid == part.pid)?;
    lonely_trouble(view, seen).or_else(|| more_errors(part.before, seen))
}

/// A primary does not answer it, and answers others.
fn lonely_trouble(view: &View<'_>, seen: &ProxyView) -> Option<String> {
    let shards = view.shards.iter().filter(|s| {
        let trouble = seen.troubles.get(&s.id);
        trouble.is_some_and(|(epoch, ms)| *epoch == s.epoch && *ms >= TROUBLE_MS_MAX)
    });
    // A process that was relieved is heard, too, and has nobody to be in trouble for.
    let others = || {
        let placed = view.instance.proxies.iter();
        let placed = placed.filter(|p| p.proxy != *view.subject());
        let fresh = placed.filter_map(|p| view.fleet.proxies.get(&p.proxy));
        fresh.filter(|p| p.fresh && p.commands > 0)
    };
    let answers = |shard: &Shard| others().any(|p| !p.troubles.contains_key(&shard.id));
    let mut alone = shards.filter(|s| is_well(view, s) && answers(s));
    let shard = alone.next()?;
    Some(format!(
        "the primary of shard {} answers other proxies, and not its new process",
        shard.id
    ))
}

/// Its agent says that the shard's primary answers.
fn is_well(view: &View<'_>, shard: &Shard) -> bool {
    let primary = view.fleet.node(&shard.primary);
    primary.is_some_and(|n| n.state == ProcessState::Running && !n.unresponsive)
}

/// The new process answers more of its commands by errors than the old one did. Where it is not known
/// what the old one did (its host was lost), clients' own mistakes could be all of it.
fn more_errors(before: Counted, seen: &ProxyView) -> Option<String> {
    if seen.commands < COMMANDS_MIN || before.commands < COMMANDS_MIN {
        return None;
    }
    let per_mille = |c: Counted| c.errors.saturating_mul(1_000) / c.commands.max(1);
    let now = per_mille(Counted {
        commands: seen.commands,
        errors: seen.errors,
    });
    let allowed = 2 * per_mille(before) + ERRORS_PER_MILLE_EXTRA;
    (now > allowed).then(|| {
        format!(
            "{} of {} commands got an error from its new process; of the old one {} of {}",
            seen.errors, seen.commands, before.errors, before.commands
        )
    })
}
