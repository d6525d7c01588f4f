//! The right to serve: until when this host's primaries may take writes, and by whose word.
//!
//! Invariant: a right is counted from before it was asked for, on a clock that does not stop in
//! suspend, and ends [`MARGIN`] before whoever gave it may act on its end. It comes from the host's
//! lease, or else from every agent that could promote a replica. Once it has ended without a
//! successor the shard is fenced, and only the lease gives the right back, with an assignment that
//! is not from before that lease. Nothing is given before the fencer watches over it: an agent may
//! die right after.

pub mod guard;
pub mod promises;
pub mod sever;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use slotmesh_proto::{
    agent::v1::{
        Desired, LeaseKept, NodeSpec, PromiseNotToPromoteRequest, PromiseNotToPromoteResponse,
    },
    store::v1::NodeRole,
};
use tokio::{sync::watch, time::timeout};

use self::promises::Promises;
use crate::{journal::Journal, node::Assigned};

/// Of a host's lease, and of a promise. A controller that grants a longer one is not relied on.
pub const TTL: Duration = Duration::from_secs(3);
/// By how much a right ends early: clocks differ, and fencing takes its time.
pub const MARGIN: Duration = Duration::from_millis(800);
/// Less right than this left is a reason to ask the replicas' agents: one slow try and a quick one
/// before it ends. A lease that is renewed as usual leaves more.
const ASK_AHEAD: Duration = Duration::from_millis(1_500);
/// How long an agent that has just started looks for a right before it fences what it has adopted.
/// Meanwhile the fencer of the agent before watches it.
const SETTLE: Duration = Duration::from_millis(2_200);
/// A controller that has kept the lease and does not answer for so long is left for another one,
/// while there is right enough to find it.
const UNHEARD_MAX: Duration = Duration::from_millis(1_200);
/// For the guard to tell the fencer of a new primary; it does so at once, and looks at each node every
/// 50 ms anyway. A worker that has waited for longer tries again at its next turn.
const WATCHED_WITHIN: Duration = Duration::from_millis(100);
/// Reports that are not answered yet; a burst sends one in 3 ms.
const UNANSWERED_MAX: usize = 1_024;

/// A time on a clock that goes on in suspend: milliseconds since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Boot(pub u64);

impl Boot {
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        Self(seconds * 1_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000)
    }

    #[must_use]
    pub fn plus(self, time: Duration) -> Self {
        Self(self.0.saturating_add(millis(time)))
    }

    /// How long until `later`.
    pub fn until(self, later: Self) -> Duration {
        Duration::from_millis(later.0.saturating_sub(self.0))
    }
}

/// What a primary may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Until then, or for ever.
    Serve { until: Option<Boot> },
    /// Until then, and the replicas' agents should be asked for more.
    Ask { until: Boot },
    /// This agent has just started: nothing is given, nothing is taken, the agents are asked.
    Unproven,
    /// Nothing: whatever it has is taken.
    Fence,
}

/// What the decision is made from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sight {
    pub now: Boot,
    /// When this agent started.
    pub started: Boot,
    /// Somebody could be promoted in the primary's place.
    pub replaceable: bool,
    /// The end of the right that the lease gives.
    pub leased: Option<Boot>,
    /// The end of the right that all promises together give.
    pub promised: Option<Boot>,
    /// Its right has ended once, and has not come back.
    pub fenced: bool,
}

/// Decides for one primary.
pub fn decide(sight: &Sight) -> Right {
    let now = sight.now;
    if !sight.replaceable {
        return Right::Serve { until: None };
    }
    if let Some(until) = sight.leased.filter(|until| now < *until) {
        return match now.until(until) < ASK_AHEAD {
            true => Right::Ask {
                until: until.max(sight.promised.unwrap_or_default()),
            },
            false => Right::Serve { until: Some(until) },
        };
    }
    if sight.fenced {
        return Right::Fence;
    }
    if let Some(until) = sight.promised.filter(|until| now < *until) {
        return Right::Ask { until };
    }
    if now < sight.started.plus(SETTLE) {
        return Right::Unproven;
    }
    Right::Fence
}

/// What this agent's right to serve rests on; and what it has promised to others.
#[derive(Debug)]
pub struct Lease {
    started: Boot,
    inner: Mutex<Inner>,
    /// Primaries that the fencer was told of.
    watched: watch::Sender<BTreeSet<String>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Reports that no controller has answered, and when they were sent.
    sent: VecDeque<(u64, Boot)>,
    number: u64,
    kept: Option<Kept>,
    /// By node: what all agents of its replicas have promised.
    promised: BTreeMap<String, Promised>,
    fenced: BTreeSet<String>,
    given: Promises,
}

/// The host's lease, as its controllers have said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept {
    until: Boot,
    /// When it began; what an older assignment says may be over.
    since_revision: u64,
}

#[derive(Debug, Clone, Copy)]
struct Promised {
    epoch: u64,
    until: Boot,
}

impl Default for Lease {
    fn default() -> Self {
        Self::started_at(Boot::now())
    }
}

impl Lease {
    fn started_at(started: Boot) -> Self {
        let inner = Inner {
            given: Promises::since(started),
            ..Inner::default()
        };
        Self {
            started,
            inner: Mutex::new(inner),
            watched: watch::Sender::default(),
        }
    }

    /// Reports are counted anew in each session.
    pub fn begin_session(&self) {
        let mut inner = self.lock();
        inner.sent.clear();
        inner.number = 0;
    }

    /// A report is about to be sent: its number.
    pub fn reporting(&self) -> u64 {
        let now = Boot::now();
        let mut inner = self.lock();
        inner.number += 1;
        let number = inner.number;
        if inner.sent.len() >= UNANSWERED_MAX {
            inner.sent.pop_front();
        }
        inner.sent.push_back((number, now));
        number
    }

    /// A controller has renewed the lease after a report.
    pub fn kept(&self, kept: &LeaseKept) {
        let mut inner = self.lock();
        let found = inner.sent.iter().find(|(n, _)| *n == kept.report_number);
        let Some(&(number, sent)) = found else { return };
        inner.sent.retain(|(n, _)| *n > number);
        let ttl = Duration::from_millis(kept.ttl_ms.into()).min(TTL);
        let new = Kept {
            until: sent.plus(ttl.saturating_sub(MARGIN)),
            since_revision: kept.revision,
        };
        let until = match inner.kept {
            Some(old) if old.since_revision == new.since_revision => old.until.max(new.until),
            _ => new.until,
        };
        inner.kept = Some(Kept { until, ..new });
    }

    /// Whether reports of this session have not been answered for too long, by controllers that
    /// know of leases.
    pub fn is_unheard(&self) -> bool {
        let inner = self.lock();
        let oldest = inner.sent.front().map(|(_, sent)| *sent);
        inner.kept.is_some() && oldest.is_some_and(|sent| sent.until(Boot::now()) > UNHEARD_MAX)
    }

    /// All agents that could promote a replica of the node's shard have promised not to, counted
    /// from when they were asked.
    fn promised_by_all(&self, node_id: &str, epoch: u64, asked: Boot) {
        let until = asked.plus(TTL.saturating_sub(MARGIN));
        let word = Promised { epoch, until };
        self.lock().promised.insert(node_id.to_owned(), word);
    }

    /// One of them knows better: what all have promised before is no reason to go on.
    fn refused(&self, node_id: &str) {
        self.lock().promised.remove(node_id);
    }

    /// The right of a primary now, by an assignment of `revision`.
    fn right(&self, spec: &NodeSpec, revision: u64, now: Boot) -> Right {
        let inner = self.lock();
        decide(&inner.sight(self.started, spec, revision, now))
    }

    /// Whether a node may be given rights.
    pub fn may_serve(&self, assigned: &Assigned) -> bool {
        let spec = &assigned.spec;
        !is_guarded(spec)
            || self.has_right(assigned) && self.watched.borrow().contains(&spec.node_id)
    }

    fn has_right(&self, assigned: &Assigned) -> bool {
        let right = self.right(&assigned.spec, assigned.revision, Boot::now());
        matches!(right, Right::Serve { .. } | Right::Ask { .. })
    }

    /// Waits until the fencer watches over a node that has a right; no longer than 100 ms.
    pub async fn until_watched(&self, assigned: &Assigned) {
        if !is_guarded(&assigned.spec) || !self.has_right(assigned) {
            return;
        }
        let mut watched = self.watched.subscribe();
        let told = watched.wait_for(|nodes| nodes.contains(&assigned.spec.node_id));
        let _ = timeout(WATCHED_WITHIN, told).await;
    }

    fn watched(&self) -> BTreeSet<String> {
        self.watched.borrow().clone()
    }

    /// The fencer watches over these, and no others.
    fn set_watched(&self, nodes: BTreeSet<String>) {
        self.watched.send_if_modified(|old| {
            let news = *old != nodes;
            *old = nodes;
            news
        });
    }

    /// Remembers that the node's right has ended, or is back; `true`: it was not so before.
    fn set_fenced(&self, node_id: &str, fenced: bool) -> bool {
        let mut inner = self.lock();
        match fenced {
            true => inner.fenced.insert(node_id.to_owned()),
            false => inner.fenced.remove(node_id),
        }
    }

    /// Forgets nodes that are not `guarded` any more.
    fn retain(&self, guarded: &BTreeSet<&str>) {
        let mut inner = self.lock();
        inner.fenced.retain(|node| guarded.contains(node.as_str()));
        inner
            .promised
            .retain(|node, _| guarded.contains(node.as_str()));
    }

    /// Asked by the agent of a primary: whether this agent promises not to promote a replica of its
    /// shard. The journal is read under the lock under which [`Self::promised`] looks, and a
    /// promotion is journaled before it looks: one of the two sees the other.
    pub fn promise(
        &self,
        request: &PromiseNotToPromoteRequest,
        journal: &Journal,
    ) -> PromiseNotToPromoteResponse {
        let mut inner = self.lock();
        let known = journal.read(|m| m.epoch(&request.instance_id, &request.shard_id));
        let given = inner.given.give(request, known, Boot::now());
        PromiseNotToPromoteResponse {
            promised: given.is_ok(),
            reason: given.err().unwrap_or_default().to_owned(),
            known_epoch: known,
        }
    }

    /// For how long this agent has promised not to promote a replica of the shard on the proof of a
    /// lease.
    pub fn promised(&self, instance_id: &str, shard_id: &str) -> Option<Duration> {
        self.lock().given.left(instance_id, shard_id, Boot::now())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn sight(&self, started: Boot, spec: &NodeSpec, revision: u64, now: Boot) -> Sight {
        let kept = self.kept.filter(|kept| revision >= kept.since_revision);
        let promised = self.promised.get(&spec.node_id);
        Sight {
            now,
            started,
            replaceable: !spec.replica_agents.is_empty(),
            leased: kept.map(|kept| kept.until),
            promised: promised.filter(|p| p.epoch == spec.epoch).map(|p| p.until),
            fenced: self.fenced.contains(&spec.node_id),
        }
    }
}

/// Whether serving takes a right: a primary whose replica could be promoted by others.
pub fn is_guarded(spec: &NodeSpec) -> bool {
    spec.role() == NodeRole::Primary
        && spec.desired() == Desired::Running
        && spec.epoch > 0
        && !spec.replica_agents.is_empty()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
