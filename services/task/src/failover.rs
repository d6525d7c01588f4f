//! Replacing the lost primary of one shard: from what is recorded and observed, the next act.
//!
//! The declaration has ended the lost epoch already; agents take its credentials and detach the
//! replicas from the record alone. What is decided here is the rest, whose order matters: know that
//! the lost primary takes no more writes, choose who has most of the data, let its agent promote it,
//! commit it, wait until the shard is whole.
//!
//! **Invariants.** Nobody is chosen before the lost primary is known to be fenced. Whoever is chosen
//! has the process that the record names and a final offset, unless an operator accepts loss. With a
//! durability of k, the chosen one has every acknowledged write. A promoted node that is not
//! committed has no credential, so that trying another one is safe.

mod quorum;
mod write;

use std::cmp::Reverse;

use slotmesh_topology::{FenceProof, HostId, Lineage, Member, NodeId, NodeRole, Shard};

pub use write::{Write, declare, supersede, with_phase, write};

use crate::{
    detect::{self, LEASE_GUARD_MS, Scene},
    observe::NodeView,
    spec::{Choice, FailoverPhase, ShardFailover, Spec, Task},
    switchover::StepStatus,
};

/// How long the fence may take before an operator is asked: a lease with all its margins, three
/// times.
pub const FENCE_MS_MAX: u64 = 15_000;
/// How long members that are alive are waited for to detach. Those that are slower are left out.
pub const DETACH_MS_MAX: u64 = 500;
/// How long somebody who can be promoted is waited for before an operator is asked.
pub const CHOOSE_MS_MAX: u64 = 10_000;
/// Between two tries to promote: an agent or a process that restarts is back in less than this, a
/// promise not to promote ends in seconds. Clients wait meanwhile.
pub const RETRY_MS: u64 = 400;
/// Tries to promote end here, counted from the declaration or an operator's word.
pub const TRY_MS_MAX: u64 = 60_000;
/// How long the proxies, the grant and the replicas are waited for after the commit.
pub const SETTLE_MS_MAX: u64 = 10_000;

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
    /// Write why the lost primary takes no more writes, together with phase Choose. `Lease` is
    /// written only while the host's lease is still gone.
    Prove(FenceProof),
    /// Write who will be promoted, together with phase Promote.
    Choose {
        /// Who.
        node: NodeId,
        /// Its process.
        run_id: String,
        /// Why this one.
        why: String,
    },
    /// Ask the chosen node's agent.
    Promote,
    /// Write the phase; an operator's choice is spent with it.
    Advance(FailoverPhase, String),
    /// Write the chosen node as the primary, together with phase Settle.
    Commit {
        /// Its process.
        run_id: String,
        /// Where its history departs from the lost primary's.
        lineage: Option<Lineage>,
    },
    /// End the task and free the shard.
    End(String),
    /// This leader is deposed: stop.
    Stop,
}

/// All that the decision depends on.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The task.
    pub task: &'a Task,
    /// How far it has come.
    pub failover: &'a ShardFailover,
    /// The shard's record.
    pub shard: &'a Shard,
    /// What is observed.
    pub scene: Scene<'a>,
    /// The promotion, in phase Promote.
    pub step: &'a StepStatus,
    /// The promoted node, as its agent saw it after the step.
    pub promoted: Option<&'a NodeView>,
}

/// What an operator may choose now.
#[must_use]
pub fn menu(task: &Task) -> &'static [Choice] {
    if is_parked(task) {
        &[Choice::Retry, Choice::AcceptLoss]
    } else {
        &[]
    }
}

/// A failover that waits for an operator. It keeps its shard, and is looked at again: it goes on by
/// itself once somebody can be promoted without loss.
#[must_use]
pub fn is_parked(task: &Task) -> bool {
    task.is_parked() && matches!(&task.spec, Spec::Failover(_))
}

/// The next act.
#[must_use]
pub fn decide(view: View<'_>) -> Decision {
    if view.step == &StepStatus::Fenced {
        return Decision::Stop;
    }
    let phase = view.failover.phase;
    if phase == FailoverPhase::Settle {
        return settle(&view);
    }
    if phase == FailoverPhase::Done {
        return wait(u64::MAX, "");
    }
    // Phase and record are written together, so this is a record that moved on since.
    let Some(record) = (view.shard.failover()).filter(|f| f.task == view.task.id) else {
        return Decision::End("the shard is no longer in this failover".into());
    };
    match (phase, record.proof) {
        (FailoverPhase::Fence, None) => fence(&view),
        (FailoverPhase::Fence, Some(proof)) => {
            Decision::Advance(FailoverPhase::Choose, proof.name().into())
        }
        (FailoverPhase::Choose, _) => choose(&view),
        (FailoverPhase::Promote, _) => promote(&view),
        (_, proof) => parked(&view, proof),
    }
}

fn wait(until_ms: u64, what: impl Into<String>) -> Decision {
    Decision::Wait {
        until_ms,
        what: what.into(),
    }
}

fn fence(view: &View<'_>) -> Decision {
    if view.task.choice == Some(Choice::AcceptLoss) {
        return Decision::Prove(FenceProof::Operator);
    }
    if let Some(proof) = proven(view) {
        return Decision::Prove(proof);
    }
    let give_up_ms = view.failover.phase_since_ms + FENCE_MS_MAX;
    let from = &view.failover.from;
    if view.scene.now_ms >= give_up_ms {
        return Decision::Advance(
            FailoverPhase::Parked,
            format!(
                "nothing proves that {from} takes no more writes: its host has a lease, and its \
                 agent has not fenced it; stop the process, or accept loss"
            ),
        );
    }
    let guard_ms = lost_host(view)
        .and_then(|host| view.scene.sightings.lease_gone_since(host))
        .map_or(give_up_ms, |since| since + LEASE_GUARD_MS);
    wait(guard_ms.min(give_up_ms), format!("{from} to be fenced"))
}

fn lost_host<'a>(view: &View<'a>) -> Option<&'a HostId> {
    view.shard.member(&view.failover.from).map(|m| &m.host)
}

/// Why the lost primary takes no more writes, if that can be known.
fn proven(view: &View<'_>) -> Option<FenceProof> {
    let (from, scene) = (&view.failover.from, view.scene);
    let lost = Member {
        run_id: view.failover.from_run_id.clone(),
        ..view.shard.member(from)?.clone()
    };
    if detect::exited(&lost, scene.fleet).is_some() {
        return Some(FenceProof::Exited);
    }
    if let Some(seen) = scene.fleet.node(from)
        && is_lost_process(view, seen)
        && is_fenced(view, seen)
    {
        return Some(FenceProof::Fenced);
    }
    let since = scene.sightings.lease_gone_since(&lost.host)?;
    (scene.now_ms >= since + LEASE_GUARD_MS).then_some(FenceProof::Lease)
}

fn is_lost_process(view: &View<'_>, seen: &NodeView) -> bool {
    seen.run_id == view.failover.from_run_id && !seen.run_id.is_empty()
}

/// Its agent has converged to the failover's epoch, in which it has no user; or it is a process that
/// the record does not name: it was born without users, and its agent leaves it so.
fn is_fenced(view: &View<'_>, seen: &NodeView) -> bool {
    let is_named = view.shard.members.iter().any(|m| m.run_id == seen.run_id);
    (seen.assigned_epoch >= view.shard.epoch || !is_named) && seen.granted_epoch.0 == 0
}

/// Its offset will not rise any more.
fn is_final(view: &View<'_>, member: &Member, seen: &NodeView) -> bool {
    // A primary follows nobody; it has no users, so nobody writes to it.
    let is_primary = seen.role == Some(NodeRole::Primary);
    let stands = seen.detached || is_primary || member.node == view.failover.from;
    stands && is_fenced(view, seen)
}

fn choose(view: &View<'_>) -> Decision {
    let since_ms = view.failover.phase_since_ms;
    let now_ms = view.scene.now_ms;
    let tried = view.shard.failover().and_then(|f| f.target.as_ref());
    if tried.is_some() {
        if now_ms >= view.task.deadline_ms {
            let why = format!("no promotion worked: {}", view.failover.message);
            return Decision::Advance(FailoverPhase::Parked, why);
        }
        if now_ms < since_ms + RETRY_MS {
            return wait(since_ms + RETRY_MS, "another try to promote");
        }
    }
    if now_ms < since_ms + DETACH_MS_MAX
        && let Some(behind) = candidates(view).find(|(m, seen)| !is_final(view, m, seen))
    {
        return wait(
            since_ms + DETACH_MS_MAX,
            format!("{} to detach", behind.0.node),
        );
    }
    match pick(view) {
        Ok((member, seen)) => Decision::Choose {
            node: member.node.clone(),
            run_id: seen.run_id.clone(),
            why: format!("{} is at offset {}", member.node, seen.offset),
        },
        Err(why) if now_ms >= since_ms + CHOOSE_MS_MAX => {
            Decision::Advance(FailoverPhase::Parked, why)
        }
        Err(why) => {
            let next_ms = [since_ms + DETACH_MS_MAX, since_ms + CHOOSE_MS_MAX];
            let next_ms = next_ms.into_iter().find(|at_ms| *at_ms > now_ms);
            wait(next_ms.unwrap_or(u64::MAX), why)
        }
    }
}

fn accepts_loss(view: &View<'_>) -> bool {
    let proof = view.shard.failover().and_then(|f| f.proof);
    proof == Some(FenceProof::Operator)
}

/// Members that could be promoted, final or not.
fn candidates<'a>(view: &View<'a>) -> impl Iterator<Item = (&'a Member, &'a NodeView)> {
    let (scene, from) = (view.scene, &view.failover.from);
    let from_run_id = &view.failover.from_run_id;
    // Any that has finished loading; acknowledged writes on replicas are worth an operator's word.
    let any = accepts_loss(view) || (scene.durability == 0 && all_are_new(view));
    view.shard
        .members
        .iter()
        .filter(|m| m.role != NodeRole::ReadOnly)
        // The lost one itself had been promoted; an operator's word counts more.
        .filter(move |m| m.priority > 0 || m.node == *from || any)
        .filter_map(move |m| Some((m, detect::running(m, scene)?)))
        .filter(move |(m, seen)| {
            if any {
                return !seen.loading;
            }
            // The lost process itself, back and fenced, has everything.
            if m.node == *from {
                return seen.run_id == *from_run_id || has_all(view, m, seen);
            }
            // What it had is counted by process: a new one may lack some.
            seen.run_id == m.run_id && m.in_sync
        })
}

/// Another process than the lost one, but with everything that it had when it ended in order. An empty
/// one is not believed where another member has keys.
fn has_all(view: &View<'_>, member: &Member, seen: &NodeView) -> bool {
    let lost = &view.failover.from_run_id;
    let is_it = !lost.is_empty() && seen.continues_run_id == *lost && !seen.loading;
    let others = view.shard.members.iter().filter(|m| m.node != member.node);
    let mut others = others.filter_map(|m| view.scene.fleet.node(&m.node));
    is_it && (seen.keys > 0 || others.all(|other| other.keys == 0))
}

/// Every member is back, and none as a process that is known to have caught up: there is nobody left
/// to wait for who could have more than what they have read from disk.
fn all_are_new(view: &View<'_>) -> bool {
    let (from, from_run_id) = (&view.failover.from, &view.failover.from_run_id);
    view.shard.members.iter().all(|m| {
        detect::running(m, view.scene).is_some_and(|seen| {
            let is_known = match m.node == *from {
                true => seen.run_id == *from_run_id,
                false => seen.run_id == m.run_id && m.in_sync,
            };
            !seen.loading && !is_known
        })
    })
}

/// A member with data whose host is there, whatever else is known of it.
fn holds_data<'a>(view: &View<'a>) -> Option<&'a NodeId> {
    let fleet = view.scene.fleet;
    let mut members = view
        .shard
        .members
        .iter()
        .filter(|m| m.role != NodeRole::ReadOnly);
    members
        .find(|m| {
            let has_keys = fleet.node(&m.node).is_some_and(|seen| seen.keys > 0);
            has_keys && fleet.leases.contains(&m.host)
        })
        .map(|m| &m.node)
}

/// Who has most of the data, or what is missing to know that.
fn pick<'a>(view: &View<'a>) -> Result<(&'a Member, &'a NodeView), String> {
    let from = &view.failover.from;
    let (durability, loss) = (view.scene.durability, accepts_loss(view));
    let mut finals: Vec<_> = candidates(view)
        .filter(|(m, seen)| is_final(view, m, seen))
        .collect();
    if loss && let Some(holder) = holds_data(view) {
        // Accepting loss is no word for wiping: those that are slow to let go would follow it.
        let wanted = view.failover.to.as_ref();
        finals.retain(|(m, seen)| seen.keys > 0 || wanted == Some(&m.node));
        if finals.is_empty() {
            return Err(format!("{holder} holds data and has not let go yet"));
        }
    }
    let is_lost_one = |(m, seen): &(&Member, &NodeView)| {
        m.node == *from && seen.run_id == view.failover.from_run_id
    };
    if durability > 0 && !loss && !finals.iter().any(is_lost_one) {
        // Another process of the lost node counts its bytes anew, so it is compared with nobody; and
        // replicas that have everything follow one of themselves without a full copy.
        let (heir, replicas_left): (Vec<_>, Vec<_>) =
            finals.into_iter().partition(|(m, _)| m.node == *from);
        let (replicas, needed) = quorum::needed(view, &replicas_left);
        finals = match replicas_left.len() >= needed {
            true => replicas_left,
            false if !heir.is_empty() => heir,
            false => {
                return Err(format!(
                    "{} of {replicas} replicas answer with what they had, {needed} are needed to \
                     have every acknowledged write: bring their hosts back, or accept loss",
                    replicas_left.len()
                ));
            }
        };
    }
    if !loss {
        finals = sound(view, finals)?;
    }
    let tried = view.shard.failover().and_then(|f| f.target.as_ref());
    let lost_zone = lost_host(view).and_then(|host| zone(view, host));
    let all_new = all_are_new(view);
    let rank = |(m, seen): &(&Member, &NodeView)| {
        let is_tried = tried == Some(&m.node);
        // Named before it is chosen: whom the operator wants.
        let is_wanted = !is_tried && view.failover.to.as_ref() == Some(&m.node);
        // Between processes that were never compared, offsets say little.
        let by_word = loss.then(|| {
            (
                is_wanted,
                !is_tried,
                seen.keys > 0,
                m.node != *from,
                seen.run_id == m.run_id && m.in_sync,
            )
        });
        let by_disk = (!loss && all_new).then_some((seen.keys > 0, !is_tried, m.node == *from));
        // Where writes are acknowledged by replicas, less data is no alternative.
        let may_pass_over = durability == 0 && !is_tried;
        // Then: who can be followed without a full sync, who stays, the preferred one, the lost
        // primary's zone, the first id.
        let ties = (
            !is_tried,
            m.node != *from,
            seen.role == Some(NodeRole::Primary),
            !m.leaving,
            m.priority,
            lost_zone.is_some() && zone(view, &m.host) == lost_zone,
            view.shard.older(&m.node).is_none(),
            Reverse(m.node.clone()),
        );
        (by_word, by_disk, may_pass_over, seen.offset, ties)
    };
    let best = finals.into_iter().max_by_key(rank);
    best.ok_or_else(|| {
        "no replica that had caught up and may be promoted (priority above 0) is alive: bring one's \
         host back, or accept loss"
            .to_owned()
    })
}

type Candidate<'a> = (&'a Member, &'a NodeView);

/// Without those that refused a command of the lost primary, whose engine is newer than theirs: what
/// they lack no offset shows. Where writes are acknowledged by replicas, one of them may have been
/// acknowledged by such a one alone, so whoever takes its place must have read as far.
fn sound<'a>(view: &View<'a>, all: Vec<Candidate<'a>>) -> Result<Vec<Candidate<'a>>, String> {
    let is_sound = |(m, seen): &Candidate<'a>| {
        m.node == view.failover.from || detect::is_sound(view.shard, m, seen)
    };
    let (mut left, differ): (Vec<_>, Vec<_>) = all.into_iter().partition(is_sound);
    let Some((other, seen)) = differ.into_iter().max_by_key(|(_, seen)| seen.offset) else {
        return Ok(left);
    };
    let is_lost_one = |m: &Member| m.node == view.failover.from;
    left.retain(|(m, s)| view.scene.durability == 0 || is_lost_one(m) || s.offset >= seen.offset);
    match left.is_empty() {
        false => Ok(left),
        true => Err(format!(
            "{} refused commands of {}, whose engine is newer: its data differs, and nobody else has \
             read as far. Start the process of {} again with its data, or accept loss",
            other.node, view.failover.from, view.failover.from
        )),
    }
}

fn zone<'a>(view: &View<'a>, host: &HostId) -> Option<&'a String> {
    let zone = view.scene.fleet.zones.get(host);
    zone.filter(|zone| !zone.is_empty())
}

fn promote(view: &View<'_>) -> Decision {
    let record = view.shard.failover();
    let Some(target) = record
        .and_then(|f| f.target.as_ref())
        .and_then(|t| view.shard.member(t))
    else {
        let why = "nobody is named".into();
        return Decision::Advance(FailoverPhase::Choose, why);
    };
    let again = |why| Decision::Advance(FailoverPhase::Choose, why);
    match view.step {
        StepStatus::NotStarted => Decision::Promote,
        StepStatus::Running => match detect::exited(target, view.scene.fleet) {
            Some(why) => again(why),
            None => wait(u64::MAX, format!("{} to be promoted", target.node)),
        },
        StepStatus::Done { .. } => match view.promoted {
            Some(seen) if seen.run_id == target.run_id => Decision::Commit {
                run_id: target.run_id.clone(),
                lineage: lineage(seen),
            },
            _ => again(format!("another process of {} answered", target.node)),
        },
        StepStatus::NoEffect(why) | StepStatus::Uncertain(why) => {
            again(format!("{}: {why}", target.node))
        }
        StepStatus::Fenced => Decision::Stop,
    }
}

/// Redis names an unknown history with zeros.
fn lineage(seen: &NodeView) -> Option<Lineage> {
    let is_known = seen.second_offset > 0 && seen.replid2.bytes().any(|b| b != b'0');
    is_known.then(|| Lineage {
        replid: seen.replid2.clone(),
        offset: seen.second_offset,
    })
}

fn parked(view: &View<'_>, proof: Option<FenceProof>) -> Decision {
    let phase = match proof {
        None => FailoverPhase::Fence,
        Some(_) => FailoverPhase::Choose,
    };
    match view.task.choice {
        Some(Choice::AcceptLoss) => return Decision::Prove(FenceProof::Operator),
        Some(Choice::Retry) => {
            return Decision::Advance(phase, "an operator says: try again".into());
        }
        Some(Choice::Undo) => {
            let why = "can't be undone: the lost primary's epoch is over; retry, or accept loss";
            return Decision::Advance(FailoverPhase::Parked, why.into());
        }
        None | Some(Choice::Pause | Choice::Resume | Choice::Finalize) => {}
    }
    let goes_on = match proof {
        None => proven(view).map(|proof| proof.name().to_owned()),
        Some(_) => {
            let tried = view.shard.failover().and_then(|f| f.target.as_ref());
            // One that could not be promoted is tried again at an operator's word only.
            let found = pick(view).ok().filter(|_| tried.is_none());
            found.map(|(member, _)| format!("{} can be promoted now", member.node))
        }
    };
    match goes_on {
        Some(why) => Decision::Advance(phase, why),
        None => wait(u64::MAX, "an operator's choice"),
    }
}

fn settle(view: &View<'_>) -> Decision {
    if view.shard.epoch > view.failover.from_epoch.next() {
        return Decision::End("a later epoch has begun".into());
    }
    let end_ms = view.failover.phase_since_ms + SETTLE_MS_MAX;
    match unsettled(view) {
        None => Decision::End(String::new()),
        Some(what) if view.scene.now_ms >= end_ms => {
            Decision::End(format!("not waited for: {what}"))
        }
        Some(what) => wait(end_ms, what),
    }
}

fn unsettled(view: &View<'_>) -> Option<String> {
    let (shard, fleet) = (view.shard, view.scene.fleet);
    let is_granted = |n: &NodeView| n.granted_epoch == shard.epoch;
    if !fleet.node(&shard.primary).is_some_and(is_granted) {
        return Some(format!("the grant on {}", shard.primary));
    }
    if !fleet.all_applied(&shard.instance, &shard.id, shard.epoch) {
        return Some("proxies to apply the new epoch".into());
    }
    // The lost primary may take long to come back; it joins whenever it does.
    let behind = shard
        .members
        .iter()
        .find(|m| !m.in_sync && m.node != view.failover.from)?;
    Some(format!("{} to follow the new primary", behind.node))
}

#[cfg(test)]
#[path = "failover_tests.rs"]
mod tests;
