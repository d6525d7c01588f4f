//! New nodes take the places of a shard's nodes, under load, and nobody notices: of an only node, which
//! could not be stopped, and of all of them, on other hosts.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, path::Path};

use slotmesh_e2e::{
    connect, ctl,
    load::{LONGEST_WAIT, Load},
    upgrades::{
        LIMIT, bake, begin, fill, in_sync, is_done, list, list_broken, mesh_with, nodes, say,
        until, version,
    },
};
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::{
    instance::v1::{FinalizeBy, ModifyInstanceMinorVersionRequest, Node, UpgradeMethod},
    store::v1::{NodeRole, TaskState},
    task::v1::Task,
};

/// Shards with so many replicas on 7.0, with some data; and 8.2 is listed.
async fn mesh(architecture: &str, shards: u32, replicas: u32) -> (Mesh, Vec<Node>) {
    let (mesh, _) = mesh_with(MeshOptions {
        architecture: Some(architecture.into()),
        shards: (shards > 1).then_some(shards),
        replicas: Some(replicas),
        engine: Some("redis-7.0".into()),
        ..MeshOptions::default()
    })
    .await
    .unwrap();
    list(&mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(&mesh).await.unwrap();
    let before = nodes(&mesh).await.unwrap();
    (mesh, before)
}

fn ids(nodes: &[Node]) -> BTreeSet<String> {
    nodes.iter().map(|n| n.node_id.clone()).collect()
}

fn hosts(nodes: &[Node]) -> BTreeSet<String> {
    nodes.iter().map(|n| n.host_id.clone()).collect()
}

async fn keys(mesh: &Mesh) -> usize {
    let mut connection = connect(&mesh.contract.proxies[0], false).await.unwrap();
    let size: redis::RedisResult<usize> = redis::cmd("DBSIZE").query_async(&mut connection).await;
    size.unwrap()
}

/// Nothing is left of a node on its host: neither its data nor its process.
async fn is_gone(mesh: &Mesh, node: &Node) {
    let dir = mesh.data().join("hosts").join(&node.host_id);
    let dir = dir.join("nodes").join(&node.node_id);
    wait_until(LIMIT, "the old node to be removed", async || {
        anyhow::ensure!(!dir.exists(), "{} is there", dir.display());
        anyhow::ensure!(!signals::is_alive(node.pid), "{node:?} runs");
        anyhow::Ok(())
    })
    .await
    .unwrap();
}

/// As many nodes as before, none of them one of those, all at 8.2; and nothing was noticed.
async fn all_are_new(mesh: &Mesh, before: &[Node], task: &Task) {
    in_sync(mesh, before.len()).await.unwrap();
    let after = nodes(mesh).await.unwrap();
    assert!(ids(&after).is_disjoint(&ids(before)), "{after:?}");
    for node in &after {
        assert_eq!(node.engine_version, "8.2.3", "{node:?}");
    }
    assert_eq!(version(mesh).await.unwrap(), "8.2.3");
    for node in before {
        is_gone(mesh, node).await;
    }
    for shard in &task.shards {
        // The measure is 100 ms on a machine of its own.
        let hold_ms_max = LONGEST_WAIT.as_secs_f64() * 1_000.0;
        assert!(
            shard.hold_ms > 0.0 && shard.hold_ms < hold_ms_max,
            "{shard:?}"
        );
    }
}

async fn nobody_notices(mesh: &Mesh, before: &[Node], method: UpgradeMethod) {
    let load = Load::start(mesh).await.unwrap();
    let had = keys(mesh).await;
    let options = ModifyInstanceMinorVersionRequest {
        method: method.into(),
        ..bake(2)
    };
    let task = begin(mesh, "redis-8.2.3", options).await.unwrap();
    let task = until(mesh, &task, "the upgrade to be done", is_done);
    let task = task.await.unwrap();
    all_are_new(mesh, before, &task).await;
    load.audit().await.unwrap();
    assert!(keys(mesh).await >= had);
}

#[tokio::test]
async fn nobody_notices_that_a_new_node_takes_the_place_of_the_only_one() {
    let (mesh, before) = mesh("standard", 1, 0).await;
    nobody_notices(&mesh, &before, UpgradeMethod::Auto).await;
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_that_each_shard_of_a_cluster_without_replicas_gets_a_new_node() {
    let (mesh, before) = mesh("cluster", 2, 0).await;
    nobody_notices(&mesh, &before, UpgradeMethod::Auto).await;
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_that_all_nodes_of_a_shard_go_to_other_hosts() {
    let (mesh, before) = mesh("standard", 1, 1).await;
    let request = ModifyInstanceMinorVersionRequest {
        method: UpgradeMethod::CrossHost.into(),
        ..bake(2)
    };
    let refused = begin(&mesh, "redis-8.2.3", request).await.unwrap_err();
    assert!(
        refused.to_string().contains("start more agents"),
        "{refused}"
    );
    let mut agent = mesh.add_host("host-4").unwrap();
    wait_until(LIMIT, "the fourth host to be listed", async || {
        let output = ctl(&mesh, &["host", "list"]).await?;
        let listed = String::from_utf8_lossy(&output.stdout).into_owned();
        anyhow::ensure!(listed.contains("host-4"), "{listed}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    nobody_notices(&mesh, &before, UpgradeMethod::CrossHost).await;
    let after = nodes(&mesh).await.unwrap();
    assert!(hosts(&after).is_disjoint(&hosts(&before)), "{after:?}");
    signals::terminate(agent.id().unwrap()).unwrap();
    agent.wait().await.unwrap();
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_that_an_only_node_is_taken_back_in_the_bake() {
    let (mesh, before) = mesh("standard", 1, 0).await;
    let load = Load::start(&mesh).await.unwrap();
    let options = ModifyInstanceMinorVersionRequest {
        finalize: FinalizeBy::Operator.into(),
        ..ModifyInstanceMinorVersionRequest::default()
    };
    let task = begin(&mesh, "redis-8.2.3", options).await.unwrap();
    let bakes = |t: &Task| {
        let mut shards = t.shards.iter();
        shards.all(|s| s.rollback == "Open" && s.phase == "Bake")
    };
    let baking = until(&mesh, &task, "the bake, with the way back open", bakes);
    baking.await.unwrap();
    let both = nodes(&mesh).await.unwrap();
    let new = both.iter().find(|n| n.node_id != before[0].node_id);
    let new = new.unwrap();
    assert_eq!(new.current_role(), NodeRole::Primary, "{both:?}");
    say(&mesh, &["resolve", &task, "undo"]).await.unwrap();
    let back = |t: &Task| t.state() == TaskState::Cancelled;
    until(&mesh, &task, "the way back", back).await.unwrap();
    is_gone(&mesh, new).await;
    load.audit().await.unwrap();
    let after = nodes(&mesh).await.unwrap();
    assert_eq!(
        (ids(&after), after[0].pid),
        (ids(&before), before[0].pid),
        "the very process of before"
    );
    assert_eq!(version(&mesh).await.unwrap(), "7.0.15");
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_a_controller_that_dies_while_an_only_node_is_replaced() {
    let (mesh, before) = mesh("standard", 1, 0).await;
    let load = Load::start(&mesh).await.unwrap();
    let task = begin(&mesh, "redis-8.2.3", bake(2)).await.unwrap();
    for phase in ["Replicas", "Bake", "Finalize"] {
        let is_in = |t: &Task| is_done(t) || t.shards.iter().any(|s| s.phase == phase);
        until(&mesh, &task, phase, is_in).await.unwrap();
        let pid = mesh.bound_pid(Path::new("controller/controller.json"));
        signals::kill(pid.unwrap()).unwrap();
        wait_until(LIMIT, "a controller to answer", async || {
            mesh.api().await?.task(&task).await
        })
        .await
        .unwrap();
    }
    let task = until(&mesh, &task, "the upgrade to be done", is_done);
    let task = task.await.unwrap();
    all_are_new(&mesh, &before, &task).await;
    load.audit().await.unwrap();
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn an_engine_that_does_not_start_leaves_the_only_node_as_it_is() {
    let (mesh, before) = mesh("standard", 1, 0).await;
    let _program = list_broken(&mesh, "8.2.4").await.unwrap();
    let task = begin(&mesh, "redis-8.2.4", bake(0)).await.unwrap();
    let failed = |t: &Task| t.state() == TaskState::RolledBack;
    let task = until(&mesh, &task, "the upgrade to be given up", failed);
    let task = task.await.unwrap();
    assert!(task.message.contains("Illegal instruction"), "{task:?}");
    let after = nodes(&mesh).await.unwrap();
    assert_eq!((ids(&after), after[0].pid), (ids(&before), before[0].pid));
    mesh.stop().await.unwrap();
}
