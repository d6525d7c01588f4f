//! Processes that die: clients go on, and what ran before is found again.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use slotmesh_ctl::api::Api;
use slotmesh_e2e::{Witnesses, client, connect, controllers::without_controller, ctl, roles};
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::{
    fleet::v1::{ListHostsRequest, ListProxiesRequest},
    instance::v1::{Shard, SwitchOverRequest},
};
use tokio::time::sleep;

const LIMIT: Duration = Duration::from_secs(45);
/// Long enough that a client of a part that is gone would notice.
const WHILE: Duration = Duration::from_secs(3);

#[tokio::test]
async fn redis_serves_on_when_its_agent_is_killed_and_the_next_agent_adopts_it() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let before = mesh.nodes().await.unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    let files: Vec<String> = (1..=3)
        .map(|n| format!("hosts/host-{n}/agent.json"))
        .collect();
    for file in &files {
        signals::kill(mesh.bound_pid(file.as_ref()).unwrap()).unwrap();
    }
    for node in &before {
        assert!(
            signals::is_alive(node.pid),
            "node {} died with its agent",
            node.id
        );
    }
    sleep(WHILE).await;
    let after = wait_until(LIMIT, "new agents to report the same nodes", async || {
        let nodes = mesh.nodes().await?;
        anyhow::ensure!(nodes == before, "{nodes:?}");
        let shards = mesh.api().await?.describe_shards(mesh.instance()).await?;
        let running = shards
            .iter()
            .flat_map(|s| &s.nodes)
            .all(|n| n.state == "Running");
        anyhow::ensure!(running, "not all are running: {shards:?}");
        anyhow::Ok(())
    });
    after.await.unwrap();
    witnesses.testify().await.unwrap();
    // The adopted nodes are under control again, not just alive.
    let replica = &roles(&mesh).await.unwrap()[0].2[0];
    switch(&mesh, replica).await;
}

#[tokio::test]
async fn clients_go_on_while_the_controller_is_dead_and_it_finds_everything_again() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let before = mesh.nodes().await.unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    without_controller(&mesh, WHILE).await.unwrap();
    let back = wait_until(LIMIT, "the controller to show the same nodes", async || {
        let nodes = mesh.nodes().await?;
        anyhow::ensure!(nodes == before, "{nodes:?}");
        anyhow::Ok(())
    });
    back.await.unwrap();
    let replica = &roles(&mesh).await.unwrap()[1].2[0];
    switch(&mesh, replica).await;
    witnesses.testify().await.unwrap();
}

#[tokio::test]
async fn a_proxy_starts_from_its_saved_topology_with_the_controller_dead() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let mut connection = client(&mesh, 0).await.unwrap();
    for n in 0..20 {
        let mut set = redis::cmd("SET");
        let () = set
            .arg(format!("k{n}"))
            .arg(n)
            .query_async(&mut connection)
            .await
            .unwrap();
    }
    let up = mesh.up_pid().unwrap();
    signals::freeze(up).unwrap();
    signals::kill(mesh.contract.pids.controller).unwrap();
    for pid in &mesh.contract.pids.proxies {
        signals::kill(*pid).unwrap();
    }
    for address in &mesh.contract.proxies {
        let served = wait_until(LIMIT, "the proxy to serve every shard again", async || {
            let mut connection = connect(address, false).await?;
            for n in 0..20 {
                let mut get = redis::cmd("GET");
                let value: u32 = get
                    .arg(format!("k{n}"))
                    .query_async(&mut connection)
                    .await?;
                anyhow::ensure!(value == n, "k{n} is {value}");
            }
            anyhow::Ok(())
        });
        served.await.unwrap();
    }
    signals::thaw(up).unwrap();
}

#[tokio::test]
async fn a_switchover_that_meets_a_dead_controller_is_finished_by_the_next_one() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    for round in 0..6_u64 {
        let replica = roles(&mesh).await.unwrap()[0].2[0].clone();
        let task = start_switchover(&mesh, &replica).await;
        sleep(Duration::from_millis(8 * round)).await;
        let controller = mesh
            .bound_pid("controller/controller.json".as_ref())
            .unwrap();
        signals::kill(controller).unwrap();
        ended(&mesh, &task).await;
        serving(&mesh).await;
    }
    witnesses.testify().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_agents_that_die_in_the_middle_of_a_switchover() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    for round in 0..8_u64 {
        let shards = roles(&mesh).await.unwrap();
        let (_, primary, replicas) = &shards[0];
        let task = start_switchover(&mesh, &replicas[0]).await;
        // Another moment of it each time: preflight, hold, critical section, settling.
        sleep(Duration::from_millis(6 * round)).await;
        let victim = if round % 2 == 0 {
            primary
        } else {
            &replicas[0]
        };
        let node = mesh
            .contract
            .nodes
            .iter()
            .find(|n| n.id == *victim)
            .unwrap();
        let file = format!("hosts/{}/agent.json", node.host);
        let agent = mesh.bound_pid(file.as_ref()).unwrap();
        signals::kill(agent).unwrap();
        ended(&mesh, &task).await;
        wait_until(LIMIT, "a new agent", async || {
            let pid = mesh.bound_pid(file.as_ref())?;
            anyhow::ensure!(pid != agent && signals::is_alive(pid), "none yet");
            anyhow::Ok(())
        })
        .await
        .unwrap();
        serving(&mesh).await;
    }
    witnesses.testify().await.unwrap();
}

#[tokio::test]
async fn a_switchover_that_waits_for_a_frozen_agent_can_be_cancelled_and_changes_nothing() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 1).await.unwrap();
    let before = roles(&mesh).await.unwrap();
    // The target's agent, which has to prepare it before anything is held.
    let nodes = &mesh.contract.nodes;
    let target = nodes.iter().find(|n| n.id == before[0].2[0]).unwrap();
    let agent = mesh
        .bound_pid(format!("hosts/{}/agent.json", target.host).as_ref())
        .unwrap();
    signals::freeze(agent).unwrap();
    let task = start_switchover(&mesh, &before[0].2[0]).await;
    let cancelled = ctl(&mesh, &["task", "cancel", &task]).await.unwrap();
    signals::thaw(agent).unwrap();
    assert!(
        cancelled.status.success(),
        "{}",
        String::from_utf8_lossy(&cancelled.stderr)
    );
    ended(&mesh, &task).await;
    let task = mesh.api().await.unwrap().task(&task).await.unwrap();
    assert_eq!(
        task.state().as_str_name(),
        "TASK_STATE_CANCELLED",
        "{}",
        task.message
    );
    assert_eq!(roles(&mesh).await.unwrap(), before);
    serving(&mesh).await;
    witnesses.testify().await.unwrap();
    // The lock is free again.
    switch(&mesh, &before[0].2[0]).await;
}

#[tokio::test]
async fn a_killed_node_comes_back_with_its_data_and_its_place() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let mut connection = client(&mesh, 0).await.unwrap();
    for n in 0..50 {
        let mut set = redis::cmd("SET");
        let () = set
            .arg(format!("k{n}"))
            .arg(n)
            .query_async(&mut connection)
            .await
            .unwrap();
    }
    for role in ["replica", "primary"] {
        let nodes = mesh.nodes().await.unwrap();
        let victim = nodes.iter().find(|n| n.role == role).unwrap();
        signals::kill(victim.pid).unwrap();
        wait_until(LIMIT, "the node to run again", async || {
            let nodes = mesh.nodes().await?;
            let now = nodes.iter().find(|n| n.id == victim.id).unwrap();
            anyhow::ensure!(now.pid != victim.pid && now.pid != 0, "{now:?}");
            anyhow::Ok(())
        })
        .await
        .unwrap();
        serving(&mesh).await;
        wait_until(LIMIT, "every key to be there", async || {
            let mut connection = client(&mesh, 1).await?;
            for n in 0..50 {
                let mut get = redis::cmd("GET");
                let value: Option<u32> = get
                    .arg(format!("k{n}"))
                    .query_async(&mut connection)
                    .await?;
                anyhow::ensure!(
                    value == Some(n),
                    "k{n} is {value:?} after a {role} was killed"
                );
            }
            anyhow::Ok(())
        })
        .await
        .unwrap();
    }
}

async fn start_switchover(mesh: &Mesh, replica: &str) -> String {
    let request = SwitchOverRequest {
        instance_id: mesh.instance().to_owned(),
        target_primary_node_ids: vec![replica.to_owned()],
        ..SwitchOverRequest::default()
    };
    mesh.api()
        .await
        .unwrap()
        .switch_over(request)
        .await
        .unwrap()
}

/// Waits until the task has ended in a way that needs no operator.
async fn ended(mesh: &Mesh, task: &str) {
    let end = wait_until(LIMIT, "the task to end", async || {
        let task = mesh.api().await?.task(task).await?;
        let state = task.state().as_str_name();
        anyhow::ensure!(slotmesh_ctl::progress::has_ended(task.state()), "{state}");
        anyhow::Ok((state, task))
    });
    let (state, task) = end.await.unwrap();
    assert_ne!(state, "TASK_STATE_NEEDS_OPERATOR", "{task:?}");
}

/// Waits until what broke is mended: agents and proxies connected, every shard serves with a
/// replica in sync.
async fn serving(mesh: &Mesh) {
    wait_until(LIMIT, "the mesh to be whole again", async || {
        let mut api = mesh.api().await?;
        let hosts = |api: Api| async move { api.fleet().list_hosts(ListHostsRequest {}).await };
        let hosts = api.call(hosts).await?.hosts.len();
        let proxies = |api: Api| async move {
            api.fleet()
                .list_proxies(ListProxiesRequest::default())
                .await
        };
        let proxies = api.call(proxies).await?.proxies.len();
        anyhow::ensure!(hosts == 3, "{hosts} agents are connected");
        anyhow::ensure!(proxies == 2, "{proxies} proxies are connected");
        let shards = api.describe_shards(mesh.instance()).await?;
        let ready = |s: &Shard| s.mode == "Serving" && s.nodes.iter().any(|n| n.in_sync);
        anyhow::ensure!(shards.iter().all(ready), "{shards:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
}

async fn switch(mesh: &Mesh, replica: &str) {
    let last = wait_until(LIMIT, "a switchover to be done", async || {
        let switched = ctl(
            mesh,
            &["switchover", mesh.instance(), "--target", replica, "--wait"],
        );
        let switched = switched.await?;
        let said = String::from_utf8_lossy(&switched.stderr).into_owned();
        anyhow::ensure!(switched.status.success(), "{said}");
        anyhow::Ok(())
    });
    last.await.unwrap();
}
