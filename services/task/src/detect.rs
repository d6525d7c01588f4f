//! Whether a shard's primary is lost: from its record, and from what several kinds of witnesses say.
//!
//! Who saw the process end is believed alone. Silence is not: a host without a lease counts only
//! together with a second kind of witness, and not while much of the fleet falls silent at once.
//!
//! **Invariant:** an agent that has merely died, or that merely can't reach a controller, makes no
//! failover as long as its primary's replicas and proxies are content with it.

use std::collections::{BTreeMap, BTreeSet};

use slotmesh_topology::{FenceProof, HostId, Member, Mode, NodeId, NodeRole, Older, Shard};

use crate::{
    observe::{Fleet, NodeView, ProcessState},
    switchover::REPORT_AGE_MS_MAX,
};

/// How long a lease must be seen gone before that counts: an agent's clock and the store's may
/// differ by a little, and its margin is for the rest.
pub const LEASE_GUARD_MS: u64 = 200;
/// How long a primary on a host without a lease must have been missed before that counts. Where its
/// agent died first and its host was cut off later, only the fencer ends it: 1.5 s after it last heard
/// of its replicas, at the second look. A host that is cut off with its agent is missed for 3 s before
/// its lease is gone, so this makes no usual failover later.
pub const MISSED_MS_MIN: u64 = 2_000;
/// A replica whose primary has said nothing for this many seconds is a witness: the engine counts
/// whole ones, so it is more than [`MISSED_MS_MIN`]. Primaries ping their replicas each second.
pub const LINK_SILENT_S_MIN: u32 = 3;
/// Hosts that fall silent within this time of each other look like one event.
pub const BRAKE_WINDOW_MS: u64 = 10_000;
/// Hosts that fell silent together come back one after the other: for this long those that are still
/// silent are not taken for lost, though they are few by now.
pub const BRAKE_RELEASE_MS: u64 = 10_000;
/// One host alone never brakes: it is what failovers are for.
const BRAKE_HOSTS_MIN: usize = 2;
/// More of the fleet than this at once is more likely the network, or us.
const BRAKE_PERCENT_MAX: usize = 30;
/// One of this many proxies in trouble is a witness: fewer may have a problem of their own.
const PROXIES_PER_WITNESS: usize = 3;
/// A proxy whose trouble is younger is no witness.
pub const TROUBLE_MS_MIN: u64 = MISSED_MS_MIN;

/// What the leader remembers of what it saw: since when something is gone. Lost with its term, which
/// only makes it wait anew.
#[derive(Clone, Debug, Default)]
pub struct Sightings {
    leases_gone: BTreeMap<HostId, u64>,
    links_down: BTreeMap<NodeId, u64>,
    known: usize,
    brake: Option<String>,
    /// When there was last a reason for the brake.
    braked_ms: u64,
}

/// What a decision about a primary depends on besides its shard's record.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// What is observed.
    pub fleet: &'a Fleet,
    /// What is remembered of it.
    pub sightings: &'a Sightings,
    /// Replicas that must have a write before it is acknowledged.
    pub durability: u32,
    /// Now, in milliseconds since the epoch.
    pub now_ms: u64,
}

/// A primary is lost.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loss {
    /// What was seen, by whom.
    pub cause: String,
    /// Why it takes no more writes, when that is known at once.
    pub proof: Option<FenceProof>,
}

/// What is known of a primary.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nothing against it.
    Fine,
    /// It looks lost, and nothing is done about it now.
    Suspect {
        /// Look again then.
        until_ms: u64,
        /// What is seen, and what is missing.
        what: String,
    },
    /// Declare it lost.
    Lost(Loss),
}

impl Sightings {
    /// Notes what the fleet shows now. Once before each round of decisions.
    pub fn look<'a>(
        &mut self,
        shards: impl IntoIterator<Item = &'a Shard>,
        fleet: &Fleet,
        now_ms: u64,
    ) {
        let mut hosts: BTreeSet<HostId> = fleet.leases.clone();
        let mut down = BTreeSet::new();
        for member in shards.into_iter().flat_map(|s| &s.members) {
            hosts.insert(member.host.clone());
            let seen = fleet.node(&member.node);
            if seen.is_some_and(|n| n.role == Some(NodeRole::Replica) && !n.link_up) {
                down.insert(member.node.clone());
            }
        }
        // Nobody has a lease: nothing is known about leases.
        let gone: BTreeSet<&HostId> = if fleet.leases.is_empty() {
            BTreeSet::new()
        } else {
            hosts.difference(&fleet.leases).collect()
        };
        self.leases_gone.retain(|host, _| gone.contains(host));
        for host in gone {
            self.leases_gone.entry(host.clone()).or_insert(now_ms);
        }
        self.links_down.retain(|node, _| down.contains(node));
        for node in down {
            self.links_down.entry(node).or_insert(now_ms);
        }
        self.known = hosts.len();
        let brake = brake(&self.leases_gone, &hosts, &fleet.zones);
        let is_fresh = now_ms < self.braked_ms + BRAKE_RELEASE_MS;
        if brake.is_some() {
            (self.brake, self.braked_ms) = (brake, now_ms);
        } else if self.leases_gone.is_empty() || !is_fresh {
            self.brake = None;
        }
    }

    /// The clock has jumped forward by so much (back, if negative): nothing has been gone for longer or
    /// less long than before.
    pub fn shift(&mut self, by_ms: i64) {
        let seen = self.leases_gone.values_mut();
        let seen = seen.chain(self.links_down.values_mut());
        for since_ms in seen.chain([&mut self.braked_ms]) {
            *since_ms = since_ms.saturating_add_signed(by_ms);
        }
    }

    /// Since when the host has been without a lease.
    #[must_use]
    pub fn lease_gone_since(&self, host: &HostId) -> Option<u64> {
        self.leases_gone.get(host).copied()
    }

    /// Since when the replica has been without its primary.
    #[must_use]
    pub fn link_down_since(&self, node: &NodeId) -> Option<u64> {
        self.links_down.get(node).copied()
    }

    /// Hosts that are known, and those of them without a lease.
    #[must_use]
    pub fn hosts(&self) -> (usize, usize) {
        (self.known, self.leases_gone.len())
    }

    /// Why silence makes no failover now: too much of the fleet is silent.
    #[must_use]
    pub fn brake(&self) -> Option<&str> {
        self.brake.as_deref()
    }
}

/// The largest group of hosts that fell silent together, if it is too large to be believed. It brakes
/// until they are back: an operator who knows better can say so.
fn brake(
    gone: &BTreeMap<HostId, u64>,
    known: &BTreeSet<HostId>,
    zones: &BTreeMap<HostId, String>,
) -> Option<String> {
    let together = |first: u64| -> BTreeSet<&HostId> {
        gone.iter()
            .filter(|(_, since)| (first..=first + BRAKE_WINDOW_MS).contains(*since))
            .map(|(host, _)| host)
            .collect()
    };
    let group = gone
        .values()
        .map(|first| together(*first))
        .max_by_key(BTreeSet::len)?;
    let zone_names: BTreeSet<&String> = zones.values().filter(|zone| !zone.is_empty()).collect();
    let is_dead = |zone: &&&String| {
        let mut here = known.iter().filter(|host| zones.get(*host) == Some(**zone));
        here.all(|host| group.contains(host))
    };
    let zones_dead = zone_names.iter().filter(is_dead).count();
    let is_much = group.len() * 100 > known.len() * BRAKE_PERCENT_MAX;
    (group.len() >= BRAKE_HOSTS_MIN && (is_much || zones_dead > 1)).then(|| {
        format!(
            "failover braked: {} of {} hosts fell silent together; that is more likely the network: \
             failovers wait for a witness that saw a process end, or for an operator's word \
             (slotmesh failover)",
            group.len(),
            known.len()
        )
    })
}

/// What is known of the primary of a shard that serves, or that is fenced because it came up empty.
#[must_use]
pub fn decide(shard: &Shard, scene: Scene<'_>) -> Verdict {
    if !matches!(shard.mode, Mode::Serving | Mode::Fenced(_)) {
        return Verdict::Fine;
    }
    judge(shard, scene)
}

/// As [`decide`], whatever the shard's mode.
#[must_use]
pub fn judge(shard: &Shard, scene: Scene<'_>) -> Verdict {
    let verdict = witnesses(shard, scene);
    match verdict {
        Verdict::Lost(loss) if !can_fail_over(shard, scene) => Verdict::Suspect {
            until_ms: u64::MAX,
            what: format!(
                "{}; no replica that had caught up with it is alive to take over: start its \
                 process again with its data, or a replica's host",
                loss.cause
            ),
        },
        verdict => verdict,
    }
}

fn witnesses(shard: &Shard, scene: Scene<'_>) -> Verdict {
    let Some(primary) = shard.primary_member() else {
        return Verdict::Fine;
    };
    if let Some(cause) = exited(primary, scene.fleet) {
        return Verdict::Lost(Loss {
            cause,
            proof: Some(FenceProof::Exited),
        });
    }
    if let Some(since_ms) = scene.sightings.lease_gone_since(&primary.host) {
        return silent(shard, primary, since_ms, scene);
    }
    let hangs = scene.fleet.node(&primary.node).is_some_and(|seen| {
        seen.unresponsive && seen.run_id == primary.run_id && is_recent(seen, scene.now_ms)
    });
    if hangs && scene.fleet.hosts.contains(&primary.host) {
        return Verdict::Lost(Loss {
            cause: format!("{} does not answer its agent", primary.node),
            proof: None,
        });
    }
    Verdict::Fine
}

/// Why the recorded process of a member is known to have ended: its agent says so.
#[must_use]
pub fn exited(member: &Member, fleet: &Fleet) -> Option<String> {
    let seen = fleet.node(&member.node)?;
    if member.run_id.is_empty() {
        return None;
    }
    let what = if seen.exited_run_id == member.run_id {
        "its agent saw its process end"
    } else if matches!(seen.state, ProcessState::Stopped | ProcessState::Failed) {
        "its agent finds no process"
    } else if seen.state == ProcessState::Running
        && !seen.run_id.is_empty()
        && seen.run_id != member.run_id
    {
        "its agent finds another process"
    } else {
        return None;
    };
    Some(format!("{}: {what}", member.node))
}

fn silent(shard: &Shard, primary: &Member, since_ms: u64, scene: Scene<'_>) -> Verdict {
    let suspect = |until_ms, what| Verdict::Suspect { until_ms, what };
    let host = &primary.host;
    let guard_ms = since_ms + LEASE_GUARD_MS;
    if scene.now_ms < guard_ms {
        return suspect(guard_ms, format!("the lease of {host} has run out"));
    }
    let Some(second) = second_witness(shard, primary, scene) else {
        let what = format!(
            "the lease of {host} has run out, but replicas and proxies of {} are content: is only \
             its agent dead?",
            primary.node
        );
        return suspect(missed_at(shard, scene), what);
    };
    if let Some(brake) = scene.sightings.brake() {
        return suspect(u64::MAX, brake.to_owned());
    }
    Verdict::Lost(Loss {
        cause: format!("the lease of {host} has run out, and {second}"),
        proof: Some(FenceProof::Lease),
    })
}

/// Whether the replica has been without its primary for so long that this counts.
fn is_missed(replica: &NodeId, scene: Scene<'_>) -> bool {
    let since = scene.sightings.link_down_since(replica);
    since.is_some_and(|since| scene.now_ms >= since + MISSED_MS_MIN)
}

/// When the next replica will have missed its primary for long enough.
fn missed_at(shard: &Shard, scene: Scene<'_>) -> u64 {
    let since = shard.members.iter();
    let since = since.filter_map(|m| scene.sightings.link_down_since(&m.node));
    let next = since.map(|since| since + MISSED_MS_MIN);
    next.filter(|at| *at > scene.now_ms)
        .min()
        .unwrap_or(u64::MAX)
}

/// Somebody else than its host who misses the primary.
fn second_witness(shard: &Shard, primary: &Member, scene: Scene<'_>) -> Option<String> {
    let misses = |member: &&Member| {
        // One that never was content is no witness, nor is one that was told to let go.
        member.node != primary.node
            && member.in_sync
            && !member.leaving
            && has_lease(&member.host, scene.fleet)
            && scene.fleet.node(&member.node).is_some_and(|seen| {
                seen.run_id == member.run_id
                    && is_recent(seen, scene.now_ms)
                    && (seen.link_silent_s >= LINK_SILENT_S_MIN
                        || !seen.link_up && is_missed(&member.node, scene))
            })
    };
    if let Some(replica) = shard.members.iter().find(misses) {
        return Some(format!("{} misses it", replica.node));
    }
    let proxies: Vec<_> = scene.fleet.fresh_proxies(&shard.instance).collect();
    let troubled = proxies.iter().filter(|p| {
        let trouble = p.troubles.get(&shard.id);
        trouble.is_some_and(|(epoch, ms)| *epoch == shard.epoch && *ms >= TROUBLE_MS_MIN)
    });
    let troubled = troubled.count();
    (troubled > 0 && troubled * PROXIES_PER_WITNESS >= proxies.len())
        .then(|| format!("{troubled} of {} proxies can't reach it", proxies.len()))
}

/// Whether a failover would help. Where acknowledged writes are on replicas, a primary that was
/// started again may lack some, so that only the replicas can say how to go on.
#[must_use]
pub fn can_fail_over(shard: &Shard, scene: Scene<'_>) -> bool {
    let mut others = shard.members.iter().filter(|m| m.node != shard.primary);
    if scene.durability > 0 {
        return others.any(|m| m.role == NodeRole::Replica && m.priority > 0);
    }
    others.any(|m| {
        m.role == NodeRole::Replica
            && m.priority > 0
            && m.in_sync
            && alive(m, scene).is_some_and(|n| !n.loading && is_sound(shard, m, n))
    })
}

/// What the member has is what its primary wrote: its engine is as new, or it has refused nothing.
#[must_use]
pub fn is_sound(shard: &Shard, member: &Member, seen: &NodeView) -> bool {
    let older = shard.older(&member.node);
    older.is_none_or(|older| older.is_sound(&seen.run_id, seen.unexpected_errors))
}

/// The member as one whose engine may refuse what its primary says from now on, with what it has refused
/// until now.
#[must_use]
pub fn older(member: &Member, scene: Scene<'_>) -> Older {
    let refused = alive(member, scene).and_then(|n| n.unexpected_errors);
    Older {
        node: member.node.clone(),
        // Of one that does not say what it has refused before nobody will know what it refuses.
        run_id: refused.map_or_else(String::new, |_| member.run_id.clone()),
        refused: refused.unwrap_or_default(),
    }
}

/// The member as it is seen, if it is the recorded process and can be asked to do something.
#[must_use]
pub fn alive<'a>(member: &Member, scene: Scene<'a>) -> Option<&'a NodeView> {
    let seen = running(member, scene)?;
    (seen.run_id == member.run_id).then_some(seen)
}

/// As [`alive`], whichever its process.
pub(crate) fn running<'a>(member: &Member, scene: Scene<'a>) -> Option<&'a NodeView> {
    let seen = scene.fleet.node(&member.node)?;
    let is_up = seen.state == ProcessState::Running
        && !seen.unresponsive
        && !seen.run_id.is_empty()
        && is_recent(seen, scene.now_ms)
        && scene.fleet.hosts.contains(&member.host)
        && has_lease(&member.host, scene.fleet);
    is_up.then_some(seen)
}

fn has_lease(host: &HostId, fleet: &Fleet) -> bool {
    fleet.leases.is_empty() || fleet.leases.contains(host)
}

fn is_recent(seen: &NodeView, now_ms: u64) -> bool {
    seen.seen_ms + REPORT_AGE_MS_MAX >= now_ms
}

#[cfg(test)]
#[path = "detect_tests.rs"]
pub(crate) mod tests;
