//! Nodes that take the places of others: hosts for them, and who has to be there in the end.
//!
//! Invariant: a shard has as many nodes after an upgrade as before, whoever they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::Context as _;
use slotmesh_harness::{Mesh, signals, wait_until};
use slotmesh_proto::{
    fleet::v1::ListHostsRequest,
    instance::v1::{Node, Shard},
    store::v1::NodeRole,
};
use tokio::{process::Child, time::timeout};

/// For an agent to start and to be heard.
const HEARD_LIMIT: Duration = Duration::from_secs(30);
/// For an agent to stop its nodes.
const STOP_LIMIT: Duration = Duration::from_secs(40);

/// Hosts that were added to a mesh.
#[derive(Debug, Default)]
pub(super) struct Hosts(Vec<Child>);

impl Hosts {
    /// Adds so many, and waits until the mesh knows them.
    ///
    /// # Errors
    /// When one can't be started, or is not heard.
    pub(super) async fn add(mesh: &Mesh, count: u32) -> anyhow::Result<Self> {
        let mut hosts = Self::default();
        for number in 1..=count {
            hosts.0.push(mesh.add_host(&format!("more-{number}"))?);
        }
        let mut wanted = mesh.contract.pids.agents.len();
        wanted += hosts.0.len();
        let api = mesh.api().await?;
        wait_until(HEARD_LIMIT, "the new hosts to be heard", async || {
            let answer = api.fleet().list_hosts(ListHostsRequest::default()).await?;
            let hosts = answer.into_inner().hosts;
            anyhow::ensure!(hosts.len() >= wanted, "{} are there", hosts.len());
            Ok(())
        })
        .await?;
        Ok(hosts)
    }

    /// Stops them and all that they run.
    ///
    /// # Errors
    /// When one does not stop.
    pub(super) async fn stop(self) -> anyhow::Result<()> {
        for mut agent in self.0 {
            if let Some(pid) = agent.id() {
                signals::terminate(pid)?;
            }
            let ended = timeout(STOP_LIMIT, agent.wait()).await;
            ended.context("an added host does not stop")??;
        }
        Ok(())
    }
}

/// Who is in each shard, and leads it.
#[derive(Debug)]
pub(super) struct Members(BTreeMap<String, Nodes>);

#[derive(Debug)]
struct Nodes {
    all: BTreeSet<String>,
    primary: Option<String>,
}

impl Members {
    pub(super) fn of(shards: &[Shard]) -> Self {
        let nodes = |shard: &Shard| {
            let is_primary = |n: &&Node| n.current_role() == NodeRole::Primary;
            let primary = shard.nodes.iter().find(is_primary);
            Nodes {
                all: shard.nodes.iter().map(|n| n.node_id.clone()).collect(),
                primary: primary.map(|n| n.node_id.clone()),
            }
        };
        let shards = shards.iter();
        Self(shards.map(|s| (s.shard_id.clone(), nodes(s))).collect())
    }

    /// What is not as it has to be after an upgrade: by new nodes, or in place.
    pub(super) fn wrong(&self, after: &Self, is_moved: bool, same_primary: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        for (shard, before) in &self.0 {
            let Some(now) = after.0.get(shard) else {
                wrong.push(format!("shard {shard} is gone"));
                continue;
            };
            let is_so = match is_moved {
                true => now.all.is_disjoint(&before.all) && now.all.len() == before.all.len(),
                false => now.all == before.all,
            };
            if !is_so {
                let (before, now) = (&before.all, &now.all);
                wrong.push(format!("shard {shard} has {now:?} and had {before:?}"));
            }
            if same_primary && !is_moved && now.primary != before.primary {
                let (before, now) = (&before.primary, &now.primary);
                wrong.push(format!("shard {shard}: {now:?} leads, and {before:?} did"));
            }
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(names: &[&str]) -> Members {
        let node = |(at, name): (usize, &&str)| {
            let mut node = Node {
                node_id: (*name).to_owned(),
                ..Node::default()
            };
            let role = if at == 0 {
                NodeRole::Primary
            } else {
                NodeRole::Replica
            };
            node.set_current_role(role);
            node
        };
        let shard = Shard {
            nodes: names.iter().enumerate().map(node).collect(),
            ..Shard::default()
        };
        Members::of(&[shard])
    }

    #[test]
    fn in_place_the_same_nodes_are_there_and_else_as_many_new_ones() {
        let before = members(&["a", "b"]);
        let wrong =
            |now: &[&str], is_moved, same| before.wrong(&members(now), is_moved, same).len();
        assert_eq!(wrong(&["b", "a"], false, false), 0);
        assert_eq!(wrong(&["b", "a"], false, true), 1);
        assert_eq!(wrong(&["a", "b"], false, true), 0);
        assert_eq!(wrong(&["a", "c"], false, false), 1);
        assert_eq!(wrong(&["c", "d"], true, false), 0);
        assert_eq!(wrong(&["c"], true, false), 1);
        assert_eq!(wrong(&["c", "d", "e"], true, false), 1);
        assert_eq!(wrong(&["c", "b"], true, false), 1);
    }
}
