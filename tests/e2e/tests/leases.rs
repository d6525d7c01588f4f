//! Hosts that lose their lease while their primaries are fine: no client is to pay for it.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use slotmesh_e2e::{Witnesses, controllers::without_controller};
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use tokio::time::sleep;

const LIMIT: Duration = Duration::from_secs(45);
/// Several times the life of a lease, and of a promise.
const NO_CONTROLLER: Duration = Duration::from_secs(8);
/// Beyond the life of a lease.
const FROZEN: Duration = Duration::from_secs(4);

#[tokio::test]
async fn agents_promises_keep_every_shard_serving_while_there_is_no_controller() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let before = mesh.nodes().await.unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    without_controller(&mesh, NO_CONTROLLER).await.unwrap();
    same_nodes(&mesh, &before).await;
    let seen = witnesses.testify().await.unwrap();
    let longest = seen.iter().map(|s| s.longest).max().unwrap();
    assert!(longest < FROZEN, "a request waited for {longest:?}");
}

#[tokio::test]
async fn an_agent_that_hangs_beyond_its_lease_costs_no_process_and_no_write() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let before = mesh.nodes().await.unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    let hosts: Vec<u32> = (1..=3)
        .map(|n| format!("hosts/host-{n}/agent.json"))
        .map(|file| mesh.bound_pid(file.as_ref()).unwrap())
        .collect();
    for agent in hosts {
        signals::freeze(agent).unwrap();
        sleep(FROZEN).await;
        signals::thaw(agent).unwrap();
        same_nodes(&mesh, &before).await;
    }
    witnesses.testify().await.unwrap();
}

/// Nobody was replaced, nobody was killed, and all run.
async fn same_nodes(mesh: &Mesh, before: &[slotmesh_ctl::up::contract::NodeEntry]) {
    let same = wait_until(LIMIT, "the same nodes", async || {
        let nodes = mesh.nodes().await?;
        anyhow::ensure!(nodes == before, "{nodes:?}");
        let shards = mesh.api().await?.describe_shards(mesh.instance()).await?;
        let serving = shards.iter().all(|s| s.mode == "Serving");
        anyhow::ensure!(serving, "{shards:?}");
        anyhow::Ok(())
    });
    same.await.unwrap();
}
