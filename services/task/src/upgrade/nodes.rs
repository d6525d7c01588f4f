//! One member after the other to another engine.
//!
//! Invariant: at most one is being exchanged, and the next one's turn comes only when the last is in
//! sync again and has all that the primary has.

use slotmesh_topology::{Exchange, Member, NodeId, NodeRole, Shard, assignment};

use super::{
    Decision, NODE_MS_MAX, UpgradePhase, View, bake::FOLLOW_MS_MAX, plan::files_are_alike,
};
use crate::{
    detect,
    observe::{NodeView, ProcessState},
};

/// Starts of the engine that may fail in a row: the second one excludes a port that was still taken.
pub const STARTS_MAX: u32 = 3;
/// Keys that a replica may lack of its primary's, whatever their number: those that expire.
const KEYS_SLACK: u64 = 1_000;
/// As a part of all keys.
const KEYS_PART: u64 = 20;

/// How far the members are.
#[derive(Debug)]
pub(super) enum Converged {
    /// Every one runs what it should, and is in sync.
    Done,
    /// This comes next.
    Act(Decision),
    /// Until then, for that.
    Wait(u64, String),
    /// It does not get there.
    Trouble(String),
    /// Nor does it here: a host is lost, or there is none. That says nothing about the engine.
    Lost(String),
}

/// Everybody but the primary and those who leave.
pub(super) fn others(shard: &Shard) -> impl Iterator<Item = &Member> {
    let members = shard.members.iter();
    members.filter(|m| m.node != shard.primary && !m.leaving)
}

/// Brings every other member to the engine that is `wanted` of it.
pub(super) fn converge<'w>(
    view: &View<'_>,
    wanted: impl Fn(&Member) -> (&'w str, Exchange),
) -> Converged {
    let mut exchanging = others(view.shard).filter(|m| m.exchange.is_some());
    if let Some(member) = exchanging.next() {
        return exchange(view, member, wanted(member));
    }
    let is_there = |m: &Member| {
        let engine = full(view, wanted(m).0);
        assigned(view, m) == engine && view.engine_of(m) == engine
    };
    let mut behind = others(view.shard).filter(|m| is_there(m) && !is_whole(view, m));
    if let Some(member) = behind.next() {
        return settle(view, member);
    }
    match others(view.shard).find(|m| !is_there(m)) {
        Some(member) => begin(view, member, wanted(member)),
        None => Converged::Done,
    }
}

/// An empty name is the instance's engine, and so is that name itself.
fn full<'a>(view: &View<'a>, name: &'a str) -> &'a str {
    match name {
        "" => &view.instance.engine,
        name => name,
    }
}

fn assigned<'a>(view: &View<'a>, member: &'a Member) -> &'a str {
    assignment::engine(view.instance, member)
}

/// Its process is being exchanged.
fn exchange(view: &View<'_>, member: &Member, (engine, data): (&str, Exchange)) -> Converged {
    let node = &member.node;
    if assigned(view, member) != full(view, engine) {
        return Converged::Act(Decision::Exchange {
            node: node.clone(),
            engine: engine.to_owned(),
            data,
        });
    }
    let wanted = assigned(view, member);
    let seen = view.scene.fleet.node(node);
    // Its old process goes on until it has ended, and may still refuse something.
    let older = view.shard.older(node);
    let is_it = |n: &&NodeView| older.is_some_and(|o| o.run_id == n.run_id);
    let refused = |n: &NodeView| !detect::is_sound(view.shard, member, n);
    if member.exchange == Some(Exchange::Keep) && seen.filter(is_it).is_some_and(refused) {
        return Converged::Act(Decision::Exchange {
            node: node.clone(),
            engine: engine.to_owned(),
            data: Exchange::Discard,
        });
    }
    // A process that was asked to end for an earlier word of the record may look as if it stayed.
    let is_told = |n: &NodeView| n.assigned_membership >= view.shard.roster.membership;
    if seen.is_some_and(|n| is_told(n) && runs(n, wanted)) {
        return Converged::Act(Decision::Exchanged(node.clone()));
    }
    if let Some(why) = trouble(view, node, wanted) {
        return Converged::Trouble(why);
    }
    patience_with(view, member, format!("{node} to run {}", shown(wanted)))
}

/// The engine does not start there.
pub(super) fn trouble(view: &View<'_>, node: &NodeId, wanted: &str) -> Option<String> {
    let trouble = view.scene.fleet.node(node)?.trouble.as_ref();
    let trouble = trouble.filter(|t| t.engine == wanted && t.starts >= STARTS_MAX)?;
    let why = &trouble.why;
    Some(format!("{wanted} does not start on {node}: {why}"))
}

fn runs(seen: &NodeView, engine: &str) -> bool {
    seen.state == ProcessState::Running
        && !seen.loading
        && !seen.settling
        && seen.engine.as_deref() == Some(engine)
}

/// In sync, with as many keys as its primary.
pub(super) fn is_whole(view: &View<'_>, member: &Member) -> bool {
    member.in_sync && refused(view, member) == 0 && !lacks_keys(view, member)
}

/// Of a process that was started by this upgrade: what an older one has counted in its life says nothing.
fn refused(view: &View<'_>, member: &Member) -> u64 {
    let seen = detect::alive(member, view.scene);
    let ours = seen.filter(|n| n.engine.as_ref() == Some(&view.upgrade.engine));
    ours.and_then(|n| n.unexpected_errors).unwrap_or(0)
}

fn lacks_keys(view: &View<'_>, member: &Member) -> bool {
    let keys = |m: &Member| detect::alive(m, view.scene).map(|n| n.keys);
    let primary = view.shard.primary_member().and_then(keys);
    match (primary, keys(member)) {
        (Some(all), Some(has)) => has + KEYS_SLACK.max(all / KEYS_PART) < all,
        _ => true,
    }
}

/// It runs what it should, and is not whole yet.
pub(super) fn settle(view: &View<'_>, member: &Member) -> Converged {
    let (node, errors) = (&member.node, refused(view, member));
    if errors > 0 {
        return Converged::Trouble(format!(
            "{node} refused {errors} commands of its primary: its data is not the same any more"
        ));
    }
    let what = match member.in_sync {
        true => format!("{node} to have as many keys as its primary"),
        false => format!("{node} to be in sync"),
    };
    patience_with(view, member, what)
}

/// It was told to follow the primary, and does so, with or without success: what only it had has been
/// kept by then.
pub(super) fn follows(view: &View<'_>, member: &Member) -> bool {
    let primary = view.shard.primary_member();
    let seen = detect::alive(member, view.scene);
    seen.zip(primary).is_some_and(|(seen, primary)| {
        seen.role == Some(NodeRole::Replica) && seen.following == primary.address
    })
}

/// Writes are confirmed with its help now: the record is slower to say that it is not there, above all
/// right after a switch, while it still follows the primary of before.
fn confirms(view: &View<'_>, member: &Member) -> bool {
    let seen = detect::alive(member, view.scene).zip(view.shard.primary_member());
    member.in_sync && seen.is_some_and(|(seen, primary)| seen.follows(&primary.address))
}

/// After a failover to an upgraded node: an old one that lacks some of the stream can't load a copy.
fn is_left_behind(view: &View<'_>, member: &Member, engine: &str) -> bool {
    let had_time = view.ages.phase_ms >= FOLLOW_MS_MAX;
    engine == view.upgrade.engine
        && !member.in_sync
        && had_time
        && follows(view, member)
        && view.primary_is_upgraded()
        && !files_are_alike(view, &member.node)
}

/// It has the old engine still, behind a primary that has the new one: it may have refused something.
fn follows_newer(view: &View<'_>, member: &Member, engine: &str) -> bool {
    let is_old = full(view, &member.engine) != engine || member.exchange.is_some();
    engine == view.upgrade.engine && is_old && view.primary_is_upgraded()
}

/// Whether it has refused nothing; `None`: it is not heard. Of one that the record does not know as
/// older, nobody has counted.
fn is_sound(view: &View<'_>, member: &Member) -> Option<bool> {
    if view.shard.older(&member.node).is_none() {
        return Some(false);
    }
    let seen = detect::alive(member, view.scene)?;
    Some(detect::is_sound(view.shard, member, seen))
}

/// The next one: from here on nobody counts on it.
fn begin(view: &View<'_>, member: &Member, (engine, data): (&str, Exchange)) -> Converged {
    let node = &member.node;
    let follows_newer = follows_newer(view, member, engine);
    let differs = match follows_newer.then(|| is_sound(view, member)) {
        Some(None) => {
            let what = format!("{node} to be heard before its turn");
            return patience_with(view, member, what);
        }
        Some(Some(is_sound)) => !is_sound,
        None => false,
    };
    let data = match differs || is_left_behind(view, member, engine) {
        true => Exchange::Discard,
        false => data,
    };
    if data == Exchange::Keep && !member.in_sync {
        let what = format!("{node} to be in sync before its turn");
        return patience_with(view, member, what);
    }
    // One whose data is not to be trusted is not counted on for a moment longer.
    let is_bad =
        data == Exchange::Discard && (differs || view.part.phase == UpgradePhase::Finalize);
    if is_bad && !follows(view, member) {
        let what = format!("{node} to follow the primary before its turn");
        return patience_with(view, member, what);
    }
    if member.in_sync && !is_bad {
        let rest = || others(view.shard).filter(|m| m.node != *node);
        // With fewer than that writes would wait at any time: it was agreed to at admission.
        let needed = (view.scene.durability as usize).min(rest().count());
        if rest().filter(|m| confirms(view, m)).count() < needed {
            let what = format!("{needed} other replicas to be in sync before {node}'s turn");
            let missing = rest().find(|m| !m.in_sync);
            return patience_with(view, missing.unwrap_or(member), what);
        }
    }
    Converged::Act(Decision::Exchange {
        node: node.clone(),
        engine: engine.to_owned(),
        data,
    })
}

/// The record in which one that follows a newer engine and makes way copies everything: nobody looks from
/// here on at what its process refuses until that ends.
pub(super) fn unwatched(view: &View<'_>) -> Option<Shard> {
    let is_kept =
        |m: &&Member| m.exchange == Some(Exchange::Keep) && view.shard.older(&m.node).is_some();
    let member = others(view.shard).find(is_kept)?;
    let next = (view.shard).exchange(&member.node, &member.engine, Exchange::Discard);
    next.ok()
}

pub(super) fn patience(view: &View<'_>, what: String) -> Converged {
    match NODE_MS_MAX.saturating_sub(view.ages.phase_ms) {
        0 => Converged::Trouble(format!("not done in time; still waiting for {what}")),
        rest_ms => Converged::Wait(view.scene.now_ms + rest_ms, what),
    }
}

/// As [`patience`], for what a member is to do. Who is on a lost host does nothing, whatever its engine: as long
/// as one can go back, it is waited for until it would be replaced; later, and on the way back, the shard is
/// free, so that it is.
fn patience_with(view: &View<'_>, member: &Member, what: String) -> Converged {
    let (node, host) = (&member.node, &member.host);
    let patience = patience(view, what);
    if !view.is_away(member) {
        return patience;
    }
    if view.part.phase != UpgradePhase::Replicas || view.primary_is_upgraded() {
        return Converged::Act(Decision::Rest {
            until_ms: u64::MAX,
            what: format!("the lost host {host} of {node}, or another node in its place"),
        });
    }
    match patience {
        Converged::Wait(..) if !view.is_lost(member) => patience,
        _ => Converged::Lost(format!("{host}, the host of {node}, is lost")),
    }
}

/// As people read it.
pub(super) fn shown(engine: &str) -> &str {
    match engine {
        "" => "its agent's default engine",
        engine => engine,
    }
}
