//! Nodes that are replaced on other hosts: by themselves when their host is lost, and on an operator's
//! word while everybody is well.
//!
//! A mesh has three hosts here and a shard two nodes, so one host is spare.

#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, time::Duration};

use redis::aio::MultiplexedConnection;
use slotmesh_e2e::{Witnesses, connect, ctl, json, roles};
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::{
    fleet::v1::ListProxiesRequest,
    instance::v1::{
        ModifyInstanceReplaceAfterRequest, Node, ReplaceNodeRequest, SetDurabilityRequest, Shard,
        SwitchOverRequest,
    },
    store::v1::{NodeRole, TaskState},
    task::v1::{ListTasksRequest, Task},
};

/// A lease has to run out, a node to start and to copy; the machine may do much else meanwhile.
const LIMIT: Duration = Duration::from_secs(60);
const KEYS: u32 = 2_000;

async fn one_shard() -> Mesh {
    let options = MeshOptions {
        architecture: Some("standard".into()),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    in_sync(&mesh, 2).await;
    mesh
}

async fn shard(mesh: &Mesh) -> anyhow::Result<Shard> {
    let shards = mesh.api().await?.describe_shards(mesh.instance()).await?;
    shards
        .into_iter()
        .next()
        .ok_or_else(|| anyhow::anyhow!("no shard"))
}

/// Waits until so many nodes have the shard's data.
async fn in_sync(mesh: &Mesh, nodes: usize) -> Shard {
    wait_until(LIMIT, "every node to be in sync", async || {
        let shard = shard(mesh).await?;
        let has_data = |n: &&Node| n.in_sync || n.current_role() == NodeRole::Primary;
        let alive = shard.nodes.iter().filter(|n| n.pid != 0);
        let ready = alive.filter(has_data).count();
        anyhow::ensure!(
            shard.nodes.len() == nodes && ready == nodes && shard.mode == "Serving",
            "{shard:?}"
        );
        anyhow::Ok(shard)
    })
    .await
    .unwrap()
}

async fn replace_after(mesh: &Mesh, replace_after_s: u32) {
    let request = ModifyInstanceReplaceAfterRequest {
        instance_id: mesh.instance().to_owned(),
        replace_after_s,
        client_token: "after".into(),
    };
    let mut api = mesh.api().await.unwrap().instances();
    api.modify_instance_replace_after(request).await.unwrap();
    let all = mesh.api().await.unwrap().describe_instances(&[]).await;
    assert_eq!(all.unwrap()[0].replace_after_s, replace_after_s);
}

async fn durable(mesh: &Mesh) {
    let request = SetDurabilityRequest {
        instance_id: mesh.instance().to_owned(),
        durability: 1,
        ..SetDurabilityRequest::default()
    };
    let mut api = mesh.api().await.unwrap().instances();
    api.set_durability(request).await.unwrap();
}

async fn fill(connection: &mut MultiplexedConnection, from: u32) {
    for first in (from..from + KEYS).step_by(500) {
        let mut pipe = redis::pipe();
        for n in first..first + 500 {
            pipe.cmd("SET").arg(format!("k{n}")).arg(n).ignore();
        }
        let written: redis::RedisResult<()> = pipe.query_async(connection).await;
        written.unwrap();
    }
}

async fn keys(connection: &mut MultiplexedConnection) -> usize {
    let size = redis::cmd("DBSIZE").query_async(connection).await;
    size.unwrap()
}

/// A client of a proxy that lives on when the host dies.
async fn client_elsewhere(mesh: &Mesh, host: &str) -> MultiplexedConnection {
    let mut fleet = mesh.api().await.unwrap().fleet();
    let listed = fleet.list_proxies(ListProxiesRequest::default()).await;
    let proxies = listed.unwrap().into_inner().proxies;
    let alive = proxies.iter().find(|p| p.host_id != host).unwrap();
    connect(&alive.address, false).await.unwrap()
}

async fn tasks(mesh: &Mesh) -> anyhow::Result<Vec<Task>> {
    let request = ListTasksRequest {
        instance_id: mesh.instance().to_owned(),
        kinds: vec!["Replace".to_owned()],
        ..ListTasksRequest::default()
    };
    let listed = mesh.api().await?.tasks().list_tasks(request).await?;
    Ok(listed.into_inner().tasks)
}

async fn ended(mesh: &Mesh, task: &str, state: TaskState) -> Task {
    wait_until(LIMIT, "the replacement to end", async || {
        let task = mesh.api().await?.task(task).await?;
        anyhow::ensure!(task.state() == state, "{task:?}");
        anyhow::Ok(task)
    })
    .await
    .unwrap()
}

async fn host_of(mesh: &Mesh, node: &str) -> String {
    let nodes = mesh.nodes().await.unwrap();
    nodes.iter().find(|n| n.id == node).unwrap().host.clone()
}

fn home_of(mesh: &Mesh, host: &str) -> PathBuf {
    mesh.data().join("hosts").join(host)
}

/// Whatever is left of a node on a host: its directory, and processes in it.
fn left_of(mesh: &Mesh, host: &str, node: &str) -> Option<String> {
    let dir = home_of(mesh, host).join("nodes").join(node);
    let pids = signals::of_directory(&dir);
    (dir.exists() || !pids.is_empty()).then(|| format!("{}: {pids:?}", dir.display()))
}

async fn nothing_left(mesh: &Mesh, host: &str, node: &str) {
    wait_until(LIMIT, "the old node to be removed", async || {
        let left = left_of(mesh, host, node);
        anyhow::ensure!(left.is_none(), "{left:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
}

/// The new replica is made the primary: it has everything.
async fn switch_to(mesh: &Mesh, node: &str) {
    let request = SwitchOverRequest {
        instance_id: mesh.instance().to_owned(),
        target_primary_node_ids: vec![node.to_owned()],
        ..SwitchOverRequest::default()
    };
    let task = mesh.api().await.unwrap().switch_over(request).await;
    ended(mesh, &task.unwrap(), TaskState::Done).await;
}

/// The one replacement that the leader has begun by itself, once it is done.
async fn replaced(mesh: &Mesh) -> Task {
    let task = wait_until(LIMIT, "a replacement to begin", async || {
        let task = tasks(mesh).await?.into_iter().next();
        task.ok_or_else(|| anyhow::anyhow!("none"))
    });
    let task = task.await.unwrap().task_id;
    ended(mesh, &task, TaskState::Done).await
}

#[tokio::test]
async fn a_lost_hosts_replica_appears_on_the_spare_host_and_the_old_one_is_removed_on_its_return() {
    let mesh = one_shard().await;
    replace_after(&mesh, 2).await;
    let (_, primary, replicas) = roles(&mesh).await.unwrap()[0].clone();
    let old = &replicas[0];
    let host = host_of(&mesh, old).await;
    durable(&mesh).await;
    let mut connection = client_elsewhere(&mesh, &host).await;
    fill(&mut connection, 0).await;

    // Nobody starts anything again.
    let up = mesh.up_pid().unwrap();
    signals::freeze(up).unwrap();
    let dead = home_of(&mesh, &host);
    for pid in signals::of_directory(&dead) {
        signals::kill(pid).unwrap();
    }
    let task = replaced(&mesh).await;
    let new = task.shards[0].to_node_id.clone();
    assert_eq!(task.shards[0].from_node_id, *old);
    let after = in_sync(&mesh, 2).await;
    assert!(after.nodes.iter().any(|n| n.node_id == new));
    assert!(after.nodes.iter().all(|n| n.host_id != host));
    assert!(left_of(&mesh, &host, old).is_some(), "its agent is dead");
    // The instance acknowledges only what a replica has: the new one counts.
    fill(&mut connection, KEYS).await;

    signals::thaw(up).unwrap();
    nothing_left(&mesh, &host, old).await;
    let now = in_sync(&mesh, 2).await;
    assert_eq!(now.epoch, after.epoch);
    assert_eq!(roles(&mesh).await.unwrap()[0].1, primary);
    switch_to(&mesh, &new).await;
    assert_eq!(keys(&mut connection).await, 2 * KEYS as usize);
    assert_eq!(tasks(&mesh).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_frozen_host_that_wakes_up_after_its_replacement_feeds_from_nobody_and_is_cleared() {
    let mesh = one_shard().await;
    replace_after(&mesh, 2).await;
    let old = roles(&mesh).await.unwrap()[0].2[0].clone();
    let host = host_of(&mesh, &old).await;
    let mut connection = client_elsewhere(&mesh, &host).await;
    fill(&mut connection, 0).await;
    let frozen = signals::of_directory(&home_of(&mesh, &host));
    for pid in &frozen {
        signals::freeze(*pid).unwrap();
    }
    let task = replaced(&mesh).await;
    assert!(
        in_sync(&mesh, 2)
            .await
            .nodes
            .iter()
            .all(|n| n.host_id != host)
    );
    let fed: String = redis::cmd("INFO")
        .arg("replication")
        .query_async(&mut connection)
        .await
        .unwrap();
    assert!(fed.contains("connected_slaves:1"), "{fed}");
    for pid in &frozen {
        // A fencer may have been put down by its agent's end.
        let _ = signals::thaw(*pid);
    }
    nothing_left(&mesh, &host, &old).await;
    switch_to(&mesh, &task.shards[0].to_node_id).await;
    assert_eq!(keys(&mut connection).await, KEYS as usize);
}

#[tokio::test]
async fn an_operator_moves_a_replica_and_no_client_notices() {
    let mesh = one_shard().await;
    durable(&mesh).await;
    let (_, primary, replicas) = roles(&mesh).await.unwrap()[0].clone();
    let old = &replicas[0];
    let host = host_of(&mesh, old).await;
    let before = shard(&mesh).await.unwrap();
    let taken: Vec<_> = before.nodes.iter().map(|n| n.host_id.clone()).collect();
    let spare = ["host-1", "host-2", "host-3"].map(str::to_owned);
    let spare = spare.into_iter().find(|h| !taken.contains(h)).unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();

    let request = |node: &str, to: &str| ReplaceNodeRequest {
        instance_id: mesh.instance().to_owned(),
        node_id: node.to_owned(),
        to_host_id: to.to_owned(),
        client_token: String::new(),
    };
    let mut instances = mesh.api().await.unwrap().instances();
    for (node, to, word) in [
        (primary.as_str(), "", "switchover"),
        (old.as_str(), taken[0].as_str(), "already"),
        (old.as_str(), "host-9", "host list"),
        ("nobody", "", "instance describe"),
    ] {
        let refused = instances.replace_node(request(node, to)).await.unwrap_err();
        assert!(
            refused.message().contains(word),
            "{node} to {to:?}: {refused:?}"
        );
    }
    assert_eq!(tasks(&mesh).await.unwrap().len(), 0);

    let instance = mesh.instance();
    let command = [
        "--output", "json", "node", "replace", instance, old, "--to", &spare, "--wait",
    ];
    let done = json(&ctl(&mesh, &command).await.unwrap()).unwrap();
    assert_eq!(done["task"]["state"], "done", "{done}");
    let after = in_sync(&mesh, 2).await;
    assert_eq!(after.epoch, before.epoch, "the primary served all the time");
    let new = after.nodes.iter().find(|n| n.host_id == spare).unwrap();
    nothing_left(&mesh, &host, old).await;
    let seen = witnesses.testify().await.unwrap();
    assert!(seen.iter().all(|s| s.acknowledged > 10), "{seen:?}");

    let zero = ["node", "priority", instance, new.node_id.as_str(), "0"];
    assert!(ctl(&mesh, &zero).await.unwrap().status.success());
    let refused = ctl(&mesh, &["switchover", instance, "--target", &new.node_id])
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(said.contains("slotmesh node priority"), "{said}");
    let hundred = ["node", "priority", instance, new.node_id.as_str(), "100"];
    assert!(ctl(&mesh, &hundred).await.unwrap().status.success());
    switch_to(&mesh, &new.node_id).await;
}

#[tokio::test]
async fn a_failover_in_the_middle_of_a_replacement_wins_and_whoever_it_promoted_stays() {
    let mesh = one_shard().await;
    let (_, primary, replicas) = roles(&mesh).await.unwrap()[0].clone();
    let before = shard(&mesh).await.unwrap();
    let taken: Vec<_> = before.nodes.iter().map(|n| n.host_id.clone()).collect();
    let spare = ["host-1", "host-2", "host-3"].map(str::to_owned);
    let spare = spare.into_iter().find(|h| !taken.contains(h)).unwrap();
    // Its agent does nothing for now, so the new node does not come.
    let asleep = signals::of_directory(&home_of(&mesh, &spare));
    for pid in &asleep {
        signals::freeze(*pid).unwrap();
    }
    let mut instances = mesh.api().await.unwrap().instances();
    let request = ReplaceNodeRequest {
        instance_id: mesh.instance().to_owned(),
        node_id: replicas[0].clone(),
        ..ReplaceNodeRequest::default()
    };
    let answer = instances.replace_node(request).await.unwrap().into_inner();
    wait_until(LIMIT, "the new member to be recorded", async || {
        let nodes = shard(&mesh).await?.nodes;
        anyhow::ensure!(nodes.len() == 3, "{nodes:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    let mut api = mesh.api().await.unwrap();
    let busy = api.switch_over(SwitchOverRequest {
        instance_id: mesh.instance().to_owned(),
        target_primary_node_ids: replicas.clone(),
        ..SwitchOverRequest::default()
    });
    let busy = busy.await.unwrap_err().to_string();
    assert!(busy.contains(&answer.task_id), "{busy}");

    let nodes = mesh.nodes().await.unwrap();
    let pid = nodes.iter().find(|n| n.id == primary).unwrap().pid;
    signals::kill(pid).unwrap();
    wait_until(LIMIT, "the replica to be promoted", async || {
        let now = roles(&mesh).await?[0].1.clone();
        anyhow::ensure!(now == replicas[0], "{now}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    let task = ended(&mesh, &answer.task_id, TaskState::RolledBack).await;
    assert!(task.message.contains(&answer.new_node_id), "{task:?}");
    assert_eq!(in_sync(&mesh, 2).await.epoch, before.epoch + 1);
    for pid in &asleep {
        let _ = signals::thaw(*pid);
    }
    nothing_left(&mesh, &spare, &answer.new_node_id).await;
}
