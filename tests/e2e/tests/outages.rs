//! etcd goes away, loses members, or forgets what a controller has not seen: no client notices, and
//! the three controllers come back by themselves.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use slotmesh_ctl::api::Api;
use slotmesh_e2e::{
    Witnesses,
    controllers::{Controller, LIMIT, beside, leader, leader_after, sees_all_nodes, switch_over},
};
use slotmesh_harness::{EtcdCluster, Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::task::v1::ListTasksRequest;

/// How long etcd is away; for hours of it set this to minutes.
const OUTAGE_VARIABLE: &str = "SLOTMESH_OUTAGE_SECONDS";
const OUTAGE_SECONDS: u64 = 20;
/// Revisions that a watch must miss to be behind for good: etcd buffers 128 answers for it, and its
/// connection takes 2 MiB, which is 32 of them.
const MISSED_REVISIONS: usize = 260;
/// Values larger than what a connection buffers, together.
const MISSED_BYTES: usize = 64 * 1024;

fn outage() -> Duration {
    let given = std::env::var(OUTAGE_VARIABLE).ok();
    let seconds = given.and_then(|s| s.parse().ok()).unwrap_or(OUTAGE_SECONDS);
    Duration::from_secs(seconds)
}

async fn mesh_of_three(etcd: &EtcdCluster) -> (Mesh, Vec<Controller>) {
    let options = MeshOptions {
        store: Some(etcd.store()),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let others = beside(&mesh, &etcd.store(), 2).await.unwrap();
    (mesh, others)
}

fn addresses<'a>(mesh: &'a Mesh, others: &'a [Controller]) -> Vec<&'a str> {
    let others = others.iter().map(|c| c.address.as_str());
    std::iter::once(mesh.contract.controller.as_str())
        .chain(others)
        .collect()
}

/// Every controller is registered, knows the leader and all nodes, and takes a change.
async fn all_work(mesh: &Mesh, others: &[Controller], etcd: &EtcdCluster) {
    wait_until(LIMIT, "three controllers to be registered", async || {
        let found = etcd.ctl(&["get", "--prefix", "--keys-only", "/slotmesh/controller/"])?;
        let found = found.lines().filter(|l| !l.is_empty()).count();
        anyhow::ensure!(found == 3, "{found}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    for address in addresses(mesh, others) {
        leader_after(address, 0).await.unwrap();
        sees_all_nodes(mesh, address).await.unwrap();
        let switched = wait_until(LIMIT, "a switchover", async || {
            switch_over(mesh, address).await
        });
        switched.await.unwrap();
    }
}

#[tokio::test]
async fn an_etcd_that_is_away_costs_no_client_an_error() {
    let mut etcd = EtcdCluster::start(1).await.unwrap();
    let (mesh, others) = mesh_of_three(&etcd).await;
    all_work(&mesh, &others, &etcd).await;
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    let nodes: Vec<u32> = mesh.nodes().await.unwrap().iter().map(|n| n.pid).collect();
    etcd.kill(0);
    tokio::time::sleep(outage()).await;
    for pid in &nodes {
        assert!(signals::is_alive(*pid), "node {pid} lives on");
    }
    etcd.restart(0).unwrap();
    etcd.healthy().await.unwrap();
    all_work(&mesh, &others, &etcd).await;
    let seen = witnesses.testify().await.unwrap();
    assert!(seen.iter().all(|s| s.acknowledged > 1_000), "{seen:?}");
}

#[tokio::test]
async fn etcd_may_lose_its_leader_and_then_its_majority() {
    let mut etcd = EtcdCluster::start(3).await.unwrap();
    let (mesh, others) = mesh_of_three(&etcd).await;
    all_work(&mesh, &others, &etcd).await;
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    let first = etcd.leader().await.unwrap();
    etcd.kill(first);
    etcd.healthy().await.unwrap();
    all_work(&mesh, &others, &etcd).await;
    // Without a majority the last member ends all watches: it has no leader.
    let second = etcd.leader().await.unwrap();
    etcd.kill(second);
    tokio::time::sleep(outage() / 2).await;
    etcd.restart(first).unwrap();
    etcd.restart(second).unwrap();
    etcd.healthy().await.unwrap();
    all_work(&mesh, &others, &etcd).await;
    witnesses.testify().await.unwrap();
}

#[tokio::test]
async fn a_controller_that_slept_through_a_compaction_reads_everything_again() {
    let etcd = EtcdCluster::start(1).await.unwrap();
    let (mesh, others) = mesh_of_three(&etcd).await;
    all_work(&mesh, &others, &etcd).await;
    let sleeper = &others[1];
    assert_ne!(
        leader(&sleeper.address).await.unwrap().address,
        sleeper.address
    );
    sleeper.freeze().unwrap();
    let value = "x".repeat(MISSED_BYTES);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (etcd, value) = (&etcd, &value);
            scope.spawn(move || {
                for number in 0..MISSED_REVISIONS / 4 {
                    let key = format!("/slotmesh/nobodys/{thread}/{number}");
                    etcd.ctl(&["put", &key, value]).unwrap();
                }
            });
        }
    });
    switch_over(&mesh, &mesh.contract.controller).await.unwrap();
    let newest = newest_task(&mesh, &mesh.contract.controller).await.unwrap();
    let status = etcd
        .ctl(&["get", "/slotmesh/nobodys", "-w", "json"])
        .unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let revision = status["header"]["revision"].to_string();
    etcd.ctl(&["compact", &revision]).unwrap();
    sleeper.thaw().unwrap();
    let shown = wait_until(LIMIT, "the sleeper to show the newest task", async || {
        let shown = newest_task(&mesh, &sleeper.address).await?;
        anyhow::ensure!(shown == newest, "it shows {shown}");
        anyhow::Ok(())
    });
    shown.await.unwrap();
    let log = sleeper.log();
    assert!(log.contains("listing again"), "it was behind:\n{log}");
    all_work(&mesh, &others, &etcd).await;
}

/// From this controller's own copy of the records.
async fn newest_task(mesh: &Mesh, controller: &str) -> anyhow::Result<String> {
    let mut tasks = Api::connect(controller).await?.tasks();
    let request = ListTasksRequest {
        instance_id: mesh.instance().to_owned(),
        ..ListTasksRequest::default()
    };
    let found = tasks.list_tasks(request).await?.into_inner().tasks;
    Ok(found.first().map(|t| t.task_id.clone()).unwrap_or_default())
}
