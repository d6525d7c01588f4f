//! What to do next with a running node: from the assignment and what is observed, to actions.
//!
//! Pure and level-triggered: the same input gives the same actions, and when they have taken effect
//! there are none left. Invariants: no users and no following for a process that the record does not
//! name; never a promotion; proxy rights only for the primary of the record, of exactly its epoch;
//! while a failover is under way nobody is followed, and nobody is demoted.

pub mod data;
pub mod facts;
pub mod files;
mod rest;
pub mod trial;
pub mod worker;

use slotmesh_proto::{
    agent::v1::{Desired, EpochUser, NodeSpec},
    store::v1::NodeRole,
};

use crate::{
    capture::tail::{History, Tail, tail},
    fence::{KnownUsers, UserKind, parse_user, password_sha256},
    handover::{Failover, Link, Role},
    journal::record::{FenceMark, Standing},
};

/// A node's share of an assignment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Assigned {
    pub term: u64,
    /// Of the store, from which the assignment was derived.
    pub revision: u64,
    pub spec: NodeSpec,
}

/// What is known of the process.
#[derive(Debug, Clone)]
pub struct Observed<'a> {
    pub run_id: &'a str,
    pub role: Role,
    pub failover: Failover,
    pub following: &'a str,
    /// Of a replica to its primary.
    pub link: Link,
    /// That the process writes or follows.
    pub history: History<'a>,
    /// What this process has beyond its successor was looked at, so it may follow.
    pub captured: bool,
    pub users: &'a KnownUsers,
    /// Login at its primary, as this agent last set it; `None`: not known.
    pub login: Option<&'a Login>,
    pub fence: Option<&'a FenceMark>,
    /// The target of the hand-over that placed `fence` replicates from this node right now.
    pub fence_target_online: bool,
    /// When this process last agreed with the record.
    pub standing: Option<&'a Standing>,
    /// Highest epoch of the shard in the journal.
    pub journaled_epoch: u64,
    /// This host has the right to serve as the shard's primary.
    pub serving_right: bool,
}

/// With which a node logs in at its primary; empty: with nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Login {
    pub user: String,
    pub password: String,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Delete users of closed epochs.
    Delete(Vec<String>),
    /// Take rights from a proxy user that must not have them here any more.
    SoftFence(String),
    SetLogin(Login),
    /// Break a replica's link for good: let it follow [`NOWHERE`].
    Detach,
    /// Keep this end of history `replid`, which the process writes; following loses it.
    Capture {
        replid: String,
        tail: Tail,
    },
    Follow {
        host: String,
        port: String,
    },
    /// Create a user, or give it its rights (back).
    Grant(EpochUser),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Leave everything as it is, and why.
    Leave(&'static str),
    /// In this order; empty: converged.
    Act(Vec<Action>),
}

/// Whom a detached replica follows. A port that nobody listens at: at a primary that lives, every
/// refused attempt would make it forget how far it has come, and with it its right to continue.
pub const NOWHERE: &str = "127.0.0.1:1";

pub const STALE: &str = "the assignment is older than the journal";
pub const UNNAMED: &str = "the record does not name this process; it stays fenced";
pub const FROZEN: &str = "a hand-over is under way";
pub const NOT_PROMOTED: &str =
    "the record says primary, the process is a replica; only a task promotes";
pub const NOT_DEMOTED: &str =
    "the record says replica, the process was promoted; it waits for a newer assignment";

/// Whether the assignment is of before the record that this very process has agreed with at its epoch:
/// who was a member, or whose process was given free, may have changed since.
#[must_use]
pub fn is_behind(spec: &NodeSpec, run_id: &str, standing: Option<&Standing>) -> bool {
    standing.is_some_and(|s| {
        s.run_id == run_id && s.epoch == spec.epoch && s.membership > spec.membership
    })
}

/// Decides for a process that answers.
pub fn decide(assigned: &Assigned, seen: &Observed<'_>) -> Decision {
    let spec = &assigned.spec;
    if spec.desired() == Desired::Removed {
        return Decision::Act(capture(spec, seen).into_iter().collect());
    }
    if spec.epoch == 0 {
        return Decision::Leave("");
    }
    if spec.epoch < seen.journaled_epoch {
        return Decision::Leave(STALE);
    }
    if spec.run_id.is_empty() || spec.run_id != seen.run_id {
        return Decision::Leave(UNNAMED);
    }
    if spec.frozen {
        return Decision::Leave(FROZEN);
    }
    // Who has left since would be fed again.
    if is_behind(spec, seen.run_id, seen.standing) {
        return Decision::Leave(STALE);
    }
    let mut actions = revocations(spec, seen);
    if spec.detached {
        // A primary is the lost one, which is only fenced, or the next one, before its record.
        if seen.role == Role::Replica && !is_detached(seen) {
            actions.push(Action::Detach);
        }
        return Decision::Act(actions);
    }
    let primary = spec.role() == NodeRole::Primary;
    if primary && seen.role == Role::Replica {
        // Its login belongs to whoever made it a replica.
        return act_or_leave(actions, NOT_PROMOTED);
    }
    if !primary && seen.role == Role::Primary && promoted_since(assigned, seen) {
        return act_or_leave(actions, NOT_DEMOTED);
    }
    let login = Login {
        user: spec.master_user.clone(),
        password: spec.master_password.clone(),
    };
    if !login.user.is_empty() && seen.login != Some(&login) {
        actions.push(Action::SetLogin(login));
    }
    if !primary
        && seen.following != spec.primary_address
        && let Some((host, port)) = spec.primary_address.rsplit_once(':')
    {
        actions.extend(capture(spec, seen));
        actions.push(Action::Follow {
            host: host.to_owned(),
            port: port.to_owned(),
        });
    }
    let missing = spec
        .users
        .iter()
        .filter(|user| may_grant(user, assigned, seen))
        .cloned();
    actions.extend(missing.map(Action::Grant));
    Decision::Act(actions)
}

fn act_or_leave(actions: Vec<Action>, why: &'static str) -> Decision {
    if actions.is_empty() {
        Decision::Leave(why)
    } else {
        Decision::Act(actions)
    }
}

fn is_detached(seen: &Observed<'_>) -> bool {
    seen.link == Link::Down && seen.following == NOWHERE
}

/// What is done before the process follows another one, or ends for good.
fn capture(spec: &NodeSpec, seen: &Observed<'_>) -> Option<Action> {
    let tail = beyond_successors(spec, seen)?;
    Some(Action::Capture {
        replid: seen.history.replid.to_owned(),
        tail,
    })
}

/// What this process was or would have been the primary for, and no primary after it has.
fn beyond_successors(spec: &NodeSpec, seen: &Observed<'_>) -> Option<Tail> {
    if seen.role != Role::Primary || seen.captured {
        return None;
    }
    let standing = seen.standing.filter(|s| s.run_id == seen.run_id);
    tail(spec, &seen.history, standing.map(|s| s.epoch))
}

/// Whether a process that is a primary against the assignment was made one by a hand-over of which
/// the assignment does not know. The target's agent hears of a hand-over through its own session,
/// perhaps from a controller that lags behind; demoting the target then would undo what the old
/// primary's agent is about to commit, or has committed.
fn promoted_since(assigned: &Assigned, seen: &Observed<'_>) -> bool {
    let Some(standing) = seen.standing else {
        return false;
    };
    if standing.run_id != seen.run_id || assigned.spec.epoch > standing.epoch {
        return false;
    }
    let after_frozen = standing.frozen_revision > 0;
    !(after_frozen && assigned.revision > standing.frozen_revision)
}

/// Users to delete, and rights to take, before anything is given.
fn revocations(spec: &NodeSpec, seen: &Observed<'_>) -> Vec<Action> {
    let (mut closed, mut fenced) = (vec![], vec![]);
    for (name, user) in seen.users {
        let Some((kind, epoch)) = parse_user(name) else {
            continue;
        };
        // A replica that has left the shard, or is about to, is fed no more.
        let is_unnamed = kind == UserKind::Replication
            && serves(spec, epoch)
            && !spec.users.iter().any(|user| user.name == *name);
        if epoch <= spec.closed_epoch || is_unnamed {
            closed.push(name.clone());
        } else if kind == UserKind::Proxy && user.full && !serves(spec, epoch) {
            fenced.push(Action::SoftFence(name.clone()));
        }
    }
    let mut actions = fenced;
    if !closed.is_empty() {
        actions.push(Action::Delete(closed));
    }
    actions
}

/// Whether proxies of `epoch` may write here.
fn serves(spec: &NodeSpec, epoch: u64) -> bool {
    spec.role() == NodeRole::Primary && epoch == spec.epoch
}

fn may_grant(user: &EpochUser, assigned: &Assigned, seen: &Observed<'_>) -> bool {
    let spec = &assigned.spec;
    if !seen.serving_right {
        return false;
    }
    // The name decides what a user can do at the engine, so it must agree with the fields.
    let kind = if user.replication {
        UserKind::Replication
    } else {
        UserKind::Proxy
    };
    if parse_user(&user.name) != Some((kind, user.epoch)) || user.epoch <= spec.closed_epoch {
        return false;
    }
    let known = seen.users.get(&user.name);
    let same_password = known.is_some_and(|k| k.password_sha256 == password_sha256(&user.password));
    match kind {
        UserKind::Replication => !same_password,
        UserKind::Proxy => {
            let has_all = same_password && known.is_some_and(|k| k.full && k.current);
            !has_all
                && serves(spec, user.epoch)
                && seen.role == Role::Primary
                && seen.failover == Failover::None
                && !fence_holds(assigned, seen)
        }
    }
}

/// A hand-over's fence is lifted by convergence only as its undo, which takes one of two proofs that
/// the assignment is not from before the hand-over: it is newer than a frozen one of the same
/// epoch, or the hand-over's target still replicates from here and thus was never promoted.
fn fence_holds(assigned: &Assigned, seen: &Observed<'_>) -> bool {
    let Some(mark) = seen.fence else { return false };
    if mark.run_id != seen.run_id || mark.epoch != assigned.spec.epoch {
        return false;
    }
    let after_frozen = mark.frozen_revision > 0 && assigned.revision > mark.frozen_revision;
    assigned.term < mark.term || !(after_frozen || seen.fence_target_online)
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
