//! New nodes with the engine take the places of a shard's nodes: of its only one, which could not be
//! stopped, or of all of them, on other hosts.
//!
//! Each new node copies in full and follows; one of them becomes the primary by the machine of
//! switchovers; the old ones follow in the bake, so that one can go back, and leave afterwards. Who goes
//! back lets the new ones leave instead.
//!
//! **Invariants.** An old node leaves only when as many new ones as there were are whole, a new one only
//! while an old one is the primary. Whoever leaves is a member until its right to follow is gone and,
//! with durability, until those that stay have what may have been confirmed with its help. Of one host's
//! primaries one at a time copies everything to a new node, unless that one does not get to its end.

use slotmesh_topology::{HostId, Member, NodeId, NodeRole, Shard, TransitionError};

use super::{
    Decision, Drain, Lock, UpgradePhase, View, Write,
    nodes::{self, Converged},
    write::{since, with},
};
use crate::{
    detect,
    replace::{NEW_HOST_GONE_MS, leave},
};

/// For so long a new node that is to leave stays because no old replica is in sync: an old one that was
/// started again has copied everything by then, unless it can't.
pub const REPLICA_MS_MAX: u64 = 10 * 60 * 1_000;

impl View<'_> {
    /// Of a moved shard: the node was of it before, or has taken the place of such a one since, with the
    /// engine that that one had. Who joins for the upgrade is assigned its engine from the first moment.
    pub(super) fn is_old(&self, node: &NodeId) -> bool {
        let member = self.shard.member(node);
        self.part.node(node).is_some() || member.is_some_and(|m| m.engine != self.upgrade.engine)
    }

    /// Its host has been without a lease for so long that nobody waits for it to copy anything.
    pub(super) fn is_away(&self, member: &Member) -> bool {
        let gone_since = self.scene.sightings.lease_gone_since(&member.host);
        gone_since.is_some_and(|since| self.scene.now_ms >= since + NEW_HOST_GONE_MS)
    }

    /// Its host is gone for so long that it would be replaced, or an operator knows it and has said to
    /// try again.
    pub(super) fn is_lost(&self, member: &Member) -> bool {
        let after_ms = u64::from(self.instance.replace_after_s) * 1_000;
        let gone_since = self.scene.sightings.lease_gone_since(&member.host);
        let is_late = gone_since.is_some_and(|s| self.scene.now_ms >= s + after_ms);
        let is_said = self.part.retried && self.is_away(member);
        is_said || after_ms > 0 && is_late
    }

    /// It has never had anything.
    fn is_blank(&self, member: &Member) -> bool {
        self.shard.roster.newcomers.contains(&member.node)
    }

    /// No primary of the shard was lost since its nodes began to be moved: so each of those that were one
    /// has handed over all that it had.
    fn none_was_lost(&self) -> bool {
        let began = self.part.began_epoch;
        let mut departures = self.shard.departures.iter();
        began.0 > 0 && departures.all(|d| d.epoch <= began)
    }
}

/// What can be done about a member whose host is gone and that nobody replaces by itself.
fn waits_for_word(view: &View<'_>, member: &Member) -> Option<Converged> {
    let is_never = view.instance.replace_after_s == 0;
    (is_never && view.is_away(member)).then(|| {
        let (node, host) = (&member.node, &member.host);
        Converged::Lost(format!(
            "{host}, the host of {node}, is lost, and the instance's nodes are not replaced by \
             themselves: start its agent again, or retry to go on without {node}"
        ))
    })
}

fn followers<'a>(view: &View<'a>) -> impl Iterator<Item = &'a Member> {
    let shard = view.shard;
    shard.members.iter().filter(|m| m.node != shard.primary)
}

/// Until as many new nodes as there were old ones have all that the primary has.
pub(super) fn gather(view: &View<'_>) -> Converged {
    if !view.primary_is_upgraded()
        && let Some(decision) = stays_after_all(view)
    {
        return Converged::Act(decision);
    }
    let new = || {
        view.shard
            .members
            .iter()
            .filter(|m| !view.is_old(&m.node) && !m.leaving)
    };
    let is_behind = |m: &&Member| m.node != view.shard.primary && !nodes::is_whole(view, m);
    if let Some(member) = new().find(is_behind) {
        return catch_up(view, member);
    }
    // Before another one joins: one that was about to leave when a failover led forward is fed again,
    // one whose host is lost is let go of.
    let mut leaving = followers(view).filter(|m| m.leaving && !view.is_old(&m.node));
    match leaving.next() {
        Some(member) if view.is_away(member) => return let_go(view, member),
        Some(member) if new().count() < view.part.nodes.len() => {
            return Converged::Act(Decision::Retain(member.node.clone()));
        }
        _ => {}
    }
    match new().count() >= view.part.nodes.len() {
        true => Converged::Done,
        false => join(view, "for the new one"),
    }
}

/// Another node joins, once no other primary of its host is being copied from: each copy is a fork, and
/// may take as much memory as is written meanwhile. A copy that takes longer than one may is not waited
/// for: two forks are better than a shard that gets no further.
fn join(view: &View<'_>, what_for: &str) -> Converged {
    if let Some(shard) = view.copied {
        let host = view.shard.primary_member().map(|m| m.host.as_str());
        let host = host.unwrap_or_default();
        let what = format!("the copy of shard {shard}, which {host} serves, too");
        if let wait @ Converged::Wait(..) = nodes::patience(view, what) {
            return wait;
        }
    }
    match view.room {
        Some(host) => Converged::Act(Decision::Recruit(host.clone())),
        None => Converged::Lost(format!(
            "every live host has a node of the shard: start an agent on another host {what_for}"
        )),
    }
}

/// As many old ones as there were that are to stay.
fn are_enough(view: &View<'_>, meant: impl Fn(&Member) -> bool) -> bool {
    let old = view.shard.members.iter();
    let old = old.filter(|m| !m.leaving && view.is_old(&m.node) && meant(m));
    old.count() >= view.part.nodes.len()
}

/// An old one was about to leave when a failover led back.
fn stays_after_all(view: &View<'_>) -> Option<Decision> {
    if are_enough(view, |_| true) {
        return None;
    }
    let may_stay = |m: &&Member| m.leaving && view.is_old(&m.node) && !view.is_blank(m);
    let old = followers(view).find(may_stay);
    old.map(|m| Decision::Retain(m.node.clone()))
}

fn catch_up(view: &View<'_>, member: &Member) -> Converged {
    let node = &member.node;
    if let Some(why) = nodes::trouble(view, node, &view.upgrade.engine) {
        return Converged::Trouble(why);
    }
    if !view.is_away(member) {
        return nodes::settle(view, member);
    }
    if !view.primary_is_upgraded() {
        let host = &member.host;
        return Converged::Lost(format!("{host}, the host of {node}, is lost"));
    }
    // The shard's new primary is well, and nothing leads back: another one takes its place, later.
    let is_spare = view.is_blank(member) || view.is_lost(member);
    if is_spare && expelled(view, node).is_ok() {
        return Converged::Act(Decision::Expel(node.clone()));
    }
    let patience = || nodes::patience(view, format!("the host of {node}"));
    waits_for_word(view, member).unwrap_or_else(patience)
}

/// Until no old node follows any more, nor a new one too many: who took a place in the bake, or was about
/// to leave when others had come.
pub(super) fn finish(view: &View<'_>) -> Converged {
    match dismiss(view, |m| view.is_old(&m.node)) {
        Converged::Done => {}
        not_yet => return not_yet,
    }
    if view.shard.members.len() <= view.part.nodes.len() {
        return Converged::Done;
    }
    match followers(view).max_by_key(|m| m.leaving) {
        Some(spare) => dismiss(view, |m| m.node == spare.node),
        None => Converged::Done,
    }
}

/// Until none of those follows any more.
fn dismiss(view: &View<'_>, whom: impl Fn(&Member) -> bool) -> Converged {
    let those = || followers(view).filter(|m| whom(m));
    if let Some(member) = those().find(|m| m.leaving) {
        return let_go(view, member);
    }
    let Some(Member { node, .. }) = those().next() else {
        return Converged::Done;
    };
    let mut ready = those().filter(|m| may_go(view, m));
    if let Some(member) = ready.find(|m| expelled(view, &m.node).is_ok()) {
        return Converged::Act(Decision::Expel(member.node.clone()));
    }
    if let Some(word) = those().find_map(|m| waits_for_word(view, m)) {
        return word;
    }
    let what = "to follow the primary, and the others to be in sync, before it leaves";
    nodes::patience(view, format!("{node} {what}"))
}

/// What only it had, if it was a primary that was lost, has been kept, or it was none; or its host is
/// gone for good.
fn may_go(view: &View<'_>, member: &Member) -> bool {
    let is_known = member.in_sync || nodes::follows(view, member);
    let had_nothing = view.is_blank(member) || view.is_away(member) && view.none_was_lost();
    is_known || had_nothing || view.is_lost(member)
}

/// It leaves: once nobody feeds it, and nobody needs what it has.
fn let_go(view: &View<'_>, member: &Member) -> Converged {
    let (shard, scene, node) = (view.shard, view.scene, &member.node);
    let drain = view.part.drain.filter(|d| d.epoch == shard.epoch);
    // By the clock that stamps reports: it may have jumped back since the record was written.
    let since_ms = scene.now_ms.saturating_sub(view.ages.phase_ms);
    let since_ms = since_ms.min(view.part.phase_since_ms);
    let done = match shard.leave(node) {
        Ok(_) => Converged::Act(Decision::Leave(node.clone())),
        Err(error) => nodes::patience(view, format!("the shard to do without: {error}")),
    };
    match drain {
        None => match leave::revoked(shard, scene, since_ms) {
            None => nodes::patience(view, format!("{} to let go of {node}", shard.primary)),
            Some(_) if scene.durability == 0 => done,
            Some(primary) => Converged::Act(Decision::Drain(primary.offset)),
        },
        Some(drain) => match leave::lacking(shard, scene, drain.offset) {
            None => done,
            Some(needed) => {
                let what = format!("{needed} replicas to have what {node} has confirmed");
                nodes::patience(view, what)
            }
        },
    }
}

/// Until the new nodes have left, and those that stay are known to be what they were, as many as before.
pub(super) fn undo(view: &View<'_>) -> Converged {
    if let Some(old) = stays_after_all(view) {
        return Converged::Act(old);
    }
    match complete(view, |_| true) {
        Converged::Done => {}
        // Where all hosts are taken, and nobody would be missed.
        Converged::Lost(_) if followers(view).all(|m| view.is_old(&m.node)) => {}
        not_yet => return not_yet,
    }
    match dismiss(view, |m| m.leaving || !view.is_old(&m.node)) {
        Converged::Done => renew(view),
        not_yet => not_yet,
    }
}

/// Until there are as many old ones as there were, of those that are meant: who joins has the primary's
/// engine, and copies everything from it.
fn complete(view: &View<'_>, meant: impl Fn(&Member) -> bool) -> Converged {
    let mut joining = followers(view).filter(|m| !m.leaving && view.is_old(&m.node));
    let Some(member) = joining.find(|m| view.is_blank(m)) else {
        return match are_enough(view, &meant) {
            true => Converged::Done,
            false => join(
                view,
                "for one with the old engine, or replace one of the new ones there is",
            ),
        };
    };
    let node = &member.node;
    match view.is_away(member) {
        true => Converged::Act(Decision::Expel(node.clone())),
        false => nodes::patience(view, format!("{node} to be in sync")),
    }
}

/// Some followed the new engine. Who has refused a command of it, or was started again meanwhile, may not
/// be what its primary is: one that copies everything takes its place.
fn renew(view: &View<'_>) -> Converged {
    let mut doubtful = Vec::new();
    for member in followers(view).filter(|m| view.shard.older(&m.node).is_some()) {
        let node = &member.node;
        match detect::alive(member, view.scene) {
            Some(seen) if detect::is_sound(view.shard, member, seen) => {}
            None if !view.is_lost(member) => {
                let patience = || nodes::patience(view, format!("{node} to be heard"));
                return waits_for_word(view, member).unwrap_or_else(patience);
            }
            _ => doubtful.push(node),
        }
    }
    let is_doubtful = |m: &Member| doubtful.contains(&&m.node);
    let Some(first) = doubtful.first() else {
        return Converged::Done;
    };
    match complete(view, |m| !is_doubtful(m)) {
        Converged::Done => dismiss(view, is_doubtful),
        Converged::Lost(why) => Converged::Lost(format!(
            "it is not known that {first} has all that its primary has, since it followed the new \
             engine: {why}, or replace it (slotmesh node replace)"
        )),
        not_yet => not_yet,
    }
}

/// The record with what the old nodes that follow have refused before the switch.
pub(super) fn note_older(view: &View<'_>, mut told: Shard) -> Result<Shard, TransitionError> {
    if !view.part.moved {
        return Ok(told);
    }
    for member in followers(view).filter(|m| view.is_old(&m.node)) {
        told = told.foresee(detect::older(member, view.scene))?;
    }
    Ok(told)
}

/// The record in which it leaves: the only replica, too, of a shard that had none, or whose others were
/// not in sync for too long.
pub(super) fn expelled(view: &View<'_>, node: &NodeId) -> Result<Shard, TransitionError> {
    let is_late = view.ages.phase_ms >= REPLICA_MS_MAX;
    let is_back = view.part.phase == UpgradePhase::UndoNodes && !view.is_old(node);
    match view.part.nodes.len() == 1 || is_back && (is_late || view.part.retried) {
        true => view.shard.dismiss(node),
        false => view.shard.expel(node),
    }
}

/// Each of these decisions as the records that go into one transaction.
pub(super) fn write(view: &View<'_>, decision: &Decision) -> Result<Write, TransitionError> {
    let shard = view.shard;
    let (next, event, message) = match decision {
        Decision::Recruit(host) => recruit(view, host)?,
        Decision::Retain(node) => (shard.retain(node)?, "Retain", format!("{node} stays")),
        Decision::Expel(node) => (expelled(view, node)?, "Expel", format!("{node} leaves")),
        Decision::Leave(node) => (shard.leave(node)?, "Left", format!("{node} has left")),
        _ => (
            shard.clone(),
            "Drain",
            "the one that leaves is fed no more".into(),
        ),
    };
    let drain = match decision {
        Decision::Drain(offset) => Some(Drain {
            epoch: shard.epoch,
            offset: *offset,
        }),
        _ => None,
    };
    let now_ms = view.scene.now_ms;
    let task = with(view, &message, |part| {
        part.drain = drain;
        since(part, now_ms);
    });
    Ok(Write {
        task,
        shard: drain.is_none().then_some(next),
        lock: Lock::Keep,
        event,
        message,
    })
}

fn recruit(
    view: &View<'_>,
    host: &HostId,
) -> Result<(Shard, &'static str, String), TransitionError> {
    let (shard, engine) = (view.shard, &view.upgrade.engine);
    let node = shard.next_node();
    let (next, engine) = match view.part.phase {
        UpgradePhase::UndoNodes => (
            shard.join(&node, host, NodeRole::Replica)?,
            "the old engine",
        ),
        _ => (shard.recruit(host, engine)?, engine.as_str()),
    };
    let message = format!("{node} joins on {host} with {engine}");
    Ok((next, "Join", message))
}
