//! New nodes with the engine take the places of a shard's nodes: of its only one, which could not be
//! stopped, or of all of them, on other hosts.
//!
//! Each new node copies in full and follows; one of them becomes the primary by the machine of
//! switchovers; the old ones follow in the bake, so that one can go back, and leave afterwards. Who goes
//! back lets the new ones leave instead.
//!
//! **Invariants.** An old node leaves only when as many new ones as there were are whole, a new one only
//! while an old one is the primary. Whoever leaves is a member until its right to follow is gone and,
//! with durability, until those that stay have what may have been confirmed with its help.

use slotmesh_topology::{HostId, Member, NodeId, Shard, TransitionError};

use super::{
    Decision, Drain, Lock, View, Write,
    nodes::{self, Converged},
    write::{since, with},
};
use crate::{
    detect,
    replace::{NEW_HOST_GONE_MS, leave},
};

impl View<'_> {
    /// Of a moved shard: the node was of it before, or has taken the place of such a one since, with the
    /// engine that that one had. Who joins for the upgrade is assigned its engine from the first moment.
    pub(super) fn is_old(&self, node: &NodeId) -> bool {
        let member = self.shard.member(node);
        self.part.node(node).is_some() || member.is_some_and(|m| m.engine != self.upgrade.engine)
    }
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
    if new().count() >= view.part.nodes.len() {
        return Converged::Done;
    }
    // One that was about to leave when a failover led forward is fed again before another one joins.
    let mut leaving = followers(view).filter(|m| m.leaving && !view.is_old(&m.node));
    if let Some(member) = leaving.next() {
        return Converged::Act(Decision::Retain(member.node.clone()));
    }
    match view.room {
        Some(host) => Converged::Act(Decision::Recruit(host.clone())),
        None => Converged::Trouble(
            "every live host has a node of the shard: start an agent on another host for the new one"
                .into(),
        ),
    }
}

/// An old one was about to leave when a failover led back.
fn stays_after_all(view: &View<'_>) -> Option<Decision> {
    let old = followers(view).find(|m| m.leaving && view.is_old(&m.node));
    old.map(|m| Decision::Retain(m.node.clone()))
}

fn catch_up(view: &View<'_>, member: &Member) -> Converged {
    let scene = view.scene;
    if let Some(why) = nodes::trouble(view, &member.node, &view.upgrade.engine) {
        return Converged::Trouble(why);
    }
    let gone_since = scene.sightings.lease_gone_since(&member.host);
    if gone_since.is_some_and(|since| scene.now_ms >= since + NEW_HOST_GONE_MS) {
        let (node, host) = (&member.node, &member.host);
        return Converged::Trouble(format!("{host}, the host of {node}, is lost"));
    }
    nodes::settle(view, member)
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
    match ready.find(|m| expelled(view, &m.node).is_ok()) {
        Some(member) => Converged::Act(Decision::Expel(member.node.clone())),
        None => {
            let what = "to follow the primary, and the others to be in sync, before it leaves";
            nodes::patience(view, format!("{node} {what}"))
        }
    }
}

/// What only it had, if it was a primary that was lost, has been kept; or its host is gone for so long
/// that it would be replaced.
fn may_go(view: &View<'_>, member: &Member) -> bool {
    let after_ms = u64::from(view.instance.replace_after_s) * 1_000;
    let gone_since = view.scene.sightings.lease_gone_since(&member.host);
    let is_lost = after_ms > 0 && gone_since.is_some_and(|s| view.scene.now_ms >= s + after_ms);
    let is_blank = view.shard.roster.newcomers.contains(&member.node);
    member.in_sync || is_blank || is_lost || nodes::follows(view, member)
}

/// It leaves: once nobody feeds it, and nobody needs what it has.
fn let_go(view: &View<'_>, member: &Member) -> Converged {
    let (shard, scene, node) = (view.shard, view.scene, &member.node);
    let drain = view.part.drain.filter(|d| d.epoch == shard.epoch);
    let done = match shard.leave(node) {
        Ok(_) => Converged::Act(Decision::Leave(node.clone())),
        Err(error) => nodes::patience(view, format!("the shard to do without: {error}")),
    };
    match drain {
        None => match leave::revoked(shard, scene, view.part.phase_since_ms) {
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

/// Until the new nodes have left, and those that stay are known to be what they were.
pub(super) fn undo(view: &View<'_>) -> Converged {
    if let Some(old) = stays_after_all(view) {
        return Converged::Act(old);
    }
    if let Some(why) = too_few_old(view) {
        return Converged::Trouble(why);
    }
    match dismiss(view, |m| !view.is_old(&m.node)) {
        Converged::Done => sound(view),
        not_yet => not_yet,
    }
}

/// Without the new ones the shard would have fewer nodes than before: one of the old ones has left.
fn too_few_old(view: &View<'_>) -> Option<String> {
    let members = &view.shard.members;
    let (old, before) = (
        members.iter().filter(|m| view.is_old(&m.node)).count(),
        view.part.nodes.len(),
    );
    let new = followers(view).find(|m| !view.is_old(&m.node))?;
    (old < before).then(|| {
        format!(
            "{old} of the {before} nodes with the old engine are left, and the new ones would leave: \
             replace {} of those, such as {} (slotmesh node replace), whose successor gets its \
             primary's engine, then retry",
            before - old,
            new.node
        )
    })
}

/// They followed the new engine: who has refused a command of it is not what its primary is.
fn sound(view: &View<'_>) -> Converged {
    for member in followers(view).filter(|m| view.shard.older(&m.node).is_some()) {
        let node = &member.node;
        match detect::alive(member, view.scene) {
            None => return nodes::patience(view, format!("{node} to be heard")),
            Some(seen) if detect::is_sound(view.shard, member, seen) => {}
            Some(_) => {
                return Converged::Trouble(format!(
                    "it is not known that {node} has all that its primary has, since it followed \
                     the new engine: replace it (slotmesh node replace)"
                ));
            }
        }
    }
    Converged::Done
}

/// The record with what the old nodes that follow have refused before the switch.
pub(super) fn note_older(view: &View<'_>, mut told: Shard) -> Result<Shard, TransitionError> {
    if !view.part.moved {
        return Ok(told);
    }
    for member in followers(view).filter(|m| view.is_old(&m.node)) {
        told = told.is_older(detect::older(member, view.scene))?;
    }
    Ok(told)
}

/// The record in which it leaves: the only replica, too, of a shard that had none.
pub(super) fn expelled(view: &View<'_>, node: &NodeId) -> Result<Shard, TransitionError> {
    match view.part.nodes.len() {
        1 => view.shard.dismiss(node),
        _ => view.shard.expel(node),
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
    let message = format!("{node} joins on {host} with {engine}");
    Ok((shard.recruit(host, engine)?, "Join", message))
}
