//! Placement: which node and which proxy goes to which host.

use std::collections::BTreeMap;

use slotmesh_topology::{HostId, Member, Mode, Shard, ShardId};

use crate::observe::{Fleet, ProcessState};

/// A host that can take processes, and how many it has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// The host.
    pub host: HostId,
    /// Nodes and proxies that it runs already.
    pub load: usize,
}

/// Why nothing can be placed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no host has a live agent; start an agent that connects to this controller")]
pub struct NoHost;

/// Hosts of each shard's nodes, primary first.
///
/// Two nodes of one shard share a host only when there are fewer hosts than nodes of a shard.
/// Primaries and all nodes are spread evenly; ties go by host id, so the outcome is repeatable.
///
/// # Errors
/// When there is no host at all.
pub fn nodes(
    candidates: &[Candidate],
    shards: usize,
    nodes_per_shard: usize,
) -> Result<Vec<Vec<HostId>>, NoHost> {
    let mut load = Load::new(candidates)?;
    Ok((0..shards)
        .map(|_| {
            let mut used = Vec::with_capacity(nodes_per_shard);
            for position in 0..nodes_per_shard {
                let host = load.take(position == 0, &used);
                used.push(host);
            }
            used
        })
        .collect())
}

/// Hosts of an instance's proxies: spread over as many hosts as possible.
///
/// # Errors
/// When there is no host at all.
pub fn proxies(candidates: &[Candidate], count: usize) -> Result<Vec<HostId>, NoHost> {
    let mut load = Load::new(candidates)?;
    let mut used: Vec<HostId> = Vec::with_capacity(count);
    for _ in 0..count {
        // Every host once before any host twice.
        let round: Vec<_> = used[used.len() / load.hosts.len() * load.hosts.len()..].to_vec();
        used.push(load.take(false, &round));
    }
    Ok(used)
}

/// Where a node that replaces another one of its shard goes: to a host without a part in the shard,
/// in another zone than its primary's if there is one, with the fewest processes.
#[must_use]
pub fn replacement(
    candidates: &[Candidate],
    shard: &Shard,
    zones: &BTreeMap<HostId, String>,
) -> Option<HostId> {
    let is_free = |c: &&Candidate| !shard.members.iter().any(|m| m.host == c.host);
    let zone = |host: &HostId| zones.get(host).filter(|zone| !zone.is_empty());
    let primary_zone = shard.primary_member().and_then(|m| zone(&m.host));
    let rank = |c: &&Candidate| {
        let shares_zone = primary_zone.is_some() && zone(&c.host) == primary_zone;
        (shares_zone, c.load, c.host.clone())
    };
    let best = candidates.iter().filter(is_free).min_by_key(rank);
    best.map(|c| c.host.clone())
}

/// Where a proxy goes that takes the place of the one on `old`: to a host without a proxy of the
/// instance, in the old one's zone if it can (its clients are near it, and proxies stay spread over
/// zones as they were), with the fewest processes.
#[must_use]
pub fn proxy(
    candidates: &[Candidate],
    taken: &[HostId],
    old: &HostId,
    zones: &BTreeMap<HostId, String>,
) -> Option<HostId> {
    let is_free = |c: &&Candidate| c.host != *old && !taken.contains(&c.host);
    let rank = |c: &&Candidate| {
        let leaves_zone = zones.get(&c.host) != zones.get(old);
        (leaves_zone, c.load, c.host.clone())
    };
    let best = candidates.iter().filter(is_free).min_by_key(rank);
    best.map(|c| c.host.clone())
}

/// Where a new node goes that takes the place of another one: as a replacement, or, where every other
/// host has a part in the shard and it may share one, to its primary's host.
#[must_use]
pub fn recruit(
    candidates: &[Candidate],
    shard: &Shard,
    zones: &BTreeMap<HostId, String>,
    may_share: bool,
) -> Option<HostId> {
    let own = shard.primary_member().filter(|_| may_share);
    let own = own.filter(|m| candidates.iter().any(|c| c.host == m.host));
    replacement(candidates, shard, zones).or_else(|| own.map(|m| m.host.clone()))
}

/// Another shard whose primary is on the same host, and of which a new node copies everything now: each
/// copy is a fork of its primary. One whose host is gone, or whose process can't be started, copies
/// nothing; nor does anybody from a primary that does not serve.
#[must_use]
pub fn copied<'a>(
    shards: impl IntoIterator<Item = &'a Shard>,
    shard: &Shard,
    fleet: &Fleet,
) -> Option<ShardId> {
    let host = &shard.primary_member()?.host;
    let is_other = |s: &&Shard| (&s.instance, &s.id) != (&shard.instance, &shard.id);
    let serves_it =
        |s: &&Shard| s.mode == Mode::Serving && s.primary_member().is_some_and(|m| m.host == *host);
    let is_failed = |m: &Member| {
        let seen = fleet.node(&m.node);
        seen.is_some_and(|n| n.state == ProcessState::Failed)
    };
    let copies = |s: &Shard, m: &Member| {
        let is_blank = s.roster.newcomers.contains(&m.node);
        is_blank && !m.leaving && fleet.hosts.contains(&m.host) && !is_failed(m)
    };
    let mut others = shards.into_iter().filter(is_other).filter(serves_it);
    let busy = others.find(|s| s.members.iter().any(|m| copies(s, m)));
    busy.map(|s| s.id.clone())
}

/// Load of each host as placement goes on: (primaries given now, processes).
struct Load {
    hosts: BTreeMap<HostId, (usize, usize)>,
}

impl Load {
    fn new(candidates: &[Candidate]) -> Result<Self, NoHost> {
        if candidates.is_empty() {
            return Err(NoHost);
        }
        Ok(Self {
            hosts: candidates
                .iter()
                .map(|c| (c.host.clone(), (0, c.load)))
                .collect(),
        })
    }

    fn take(&mut self, primary: bool, used: &[HostId]) -> HostId {
        let best = self
            .hosts
            .iter()
            .min_by_key(|(host, (primaries, processes))| {
                let shared = used.iter().filter(|u| u == host).count();
                (shared, if primary { *primaries } else { 0 }, *processes)
            })
            .map(|(host, _)| host.clone());
        let Some(host) = best else {
            unreachable!("Load::new refuses an empty list")
        };
        if let Some((primaries, processes)) = self.hosts.get_mut(&host) {
            *processes += 1;
            *primaries += usize::from(primary);
        }
        host
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn hosts(count: usize) -> Vec<Candidate> {
        (0..count)
            .map(|i| Candidate {
                host: format!("h{i}").into(),
                load: 0,
            })
            .collect()
    }

    #[test]
    fn no_two_nodes_of_a_shard_share_a_host_where_there_are_enough() {
        for (count, shards, nodes_per_shard) in [(2, 5, 2), (3, 2, 2), (3, 7, 3), (8, 50, 6)] {
            for placed in nodes(&hosts(count), shards, nodes_per_shard).unwrap() {
                let distinct: BTreeSet<_> = placed.iter().collect();
                assert_eq!(distinct.len(), nodes_per_shard, "{count} hosts: {placed:?}");
            }
        }
    }

    #[test]
    fn too_few_hosts_are_shared_evenly() {
        let placed = nodes(&hosts(2), 1, 4).unwrap();
        let first = placed[0].iter().filter(|h| h.as_str() == "h0").count();
        assert_eq!(first, 2, "{placed:?}");
        assert_eq!(nodes(&[], 1, 1), Err(NoHost));
    }

    #[test]
    fn primaries_and_proxies_are_spread() {
        let placed = nodes(&hosts(3), 3, 2).unwrap();
        let primaries: BTreeSet<_> = placed.iter().map(|p| &p[0]).collect();
        assert_eq!(primaries.len(), 3, "{placed:?}");
        let proxies: BTreeSet<_> = proxies(&hosts(3), 3).unwrap().into_iter().collect();
        assert_eq!(proxies.len(), 3);
    }

    #[test]
    fn a_recruit_shares_its_primarys_host_only_where_there_is_no_other_and_it_may() {
        let shard = crate::detect::tests::Stage::new().shard;
        let live = |names: &[&str]| -> Vec<Candidate> {
            let candidate = |name: &&str| Candidate {
                host: (*name).into(),
                load: 1,
            };
            names.iter().map(candidate).collect()
        };
        let zones = BTreeMap::new();
        let goes = |names: &[&str], may_share| recruit(&live(names), &shard, &zones, may_share);
        let all = ["host-a", "host-b", "spare"];
        assert_eq!(goes(&all, true), Some("spare".into()));
        assert_eq!(goes(&all[..2], true), Some("host-a".into()));
        assert_eq!(goes(&all[..2], false), None);
        assert_eq!(
            goes(&all[1..2], true),
            None,
            "the primary's host is not live"
        );
    }

    #[test]
    fn a_primary_that_a_new_node_copies_keeps_its_hosts_other_primaries_waiting() {
        let stage = crate::detect::tests::Stage::new();
        let (shard, mut fleet) = (stage.shard, stage.fleet);
        let mut other = shard.clone();
        other.id = "1".into();
        let busy = |other: &Shard, fleet: &Fleet| copied([&shard, other], &shard, fleet);
        assert_eq!(busy(&other, &fleet), None);
        let new = other.next_node();
        let copying = other.recruit(&"spare".into(), "redis-8.2.3").unwrap();
        assert_eq!(busy(&copying, &fleet), None, "its host is gone");
        fleet.hosts.insert("spare".into());
        assert_eq!(busy(&copying, &fleet), Some("1".into()));
        assert_eq!(busy(&copying.settle(&new), &fleet), None, "it has all");
        let leaving = copying.expel(&new).unwrap();
        assert_eq!(busy(&leaving, &fleet), None);
        let mut fenced = copying.clone();
        fenced.mode = Mode::Fenced("for a test".into());
        assert_eq!(busy(&fenced, &fleet), None, "it does not serve");
        let mut seen = fleet.node(&"b".into()).unwrap().clone();
        for (state, wanted) in [
            (ProcessState::Starting, Some("1".into())),
            (ProcessState::Failed, None),
        ] {
            seen.state = state;
            fleet.nodes.insert(new.clone(), seen.clone());
            assert_eq!(busy(&copying, &fleet), wanted, "{state:?}");
        }
        fleet.nodes.remove(&new);
        let mut elsewhere = copying;
        elsewhere.primary = "b".into();
        assert_eq!(busy(&elsewhere, &fleet), None);
        let own = shard.recruit(&"spare".into(), "redis-8.2.3").unwrap();
        assert_eq!(copied([&own], &own, &fleet), None);
    }

    #[test]
    fn loaded_hosts_come_last() {
        let mut candidates = hosts(3);
        candidates[0].load = 5;
        assert_eq!(
            nodes(&candidates, 1, 2).unwrap(),
            [["h1".into(), "h2".into()]]
        );
    }
}
