//! Placement: which node and which proxy goes to which host.

use std::collections::BTreeMap;

use slotmesh_topology::{HostId, Shard};

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
    fn loaded_hosts_come_last() {
        let mut candidates = hosts(3);
        candidates[0].load = 5;
        assert_eq!(
            nodes(&candidates, 1, 2).unwrap(),
            [["h1".into(), "h2".into()]]
        );
    }
}
