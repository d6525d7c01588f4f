//! Hosts that are emptied of primaries before somebody works on them; no client notices.

#![allow(clippy::unwrap_used)]

use std::{process::Stdio, time::Duration};

use slotmesh_e2e::{Witnesses, ctl, json};
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::{
    fleet::v1::{DrainHostRequest, DrainHostResponse, ListHostsRequest},
    store::v1::NodeRole,
};
use tokio::{process::Command, time::timeout};

const LIMIT: Duration = Duration::from_secs(60);

async fn mesh() -> Mesh {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    all_in_sync(&mesh).await;
    mesh
}

async fn all_in_sync(mesh: &Mesh) {
    wait_until(LIMIT, "every replica to be in sync", async || {
        let shards = mesh.api().await?.describe_shards(mesh.instance()).await?;
        for shard in shards {
            let lacks = |n: &&slotmesh_proto::instance::v1::Node| {
                n.current_role() != NodeRole::Primary && !n.in_sync
            };
            let lacking = shard.nodes.iter().find(lacks);
            anyhow::ensure!(shard.mode == "Serving" && lacking.is_none(), "{shard:?}");
        }
        anyhow::Ok(())
    })
    .await
    .unwrap();
}

/// Hosts of the shards' primaries.
async fn hosts_of_primaries(mesh: &Mesh) -> Vec<String> {
    let nodes = mesh.nodes().await.unwrap().into_iter();
    let primaries = nodes.filter(|n| n.role == "primary");
    primaries.map(|n| n.host).collect()
}

async fn drain(mesh: &Mesh, host: &str) -> Result<DrainHostResponse, tonic::Status> {
    let mut fleet = mesh.api().await.unwrap().fleet();
    let host_id = host.to_owned();
    let answer = fleet.drain_host(DrainHostRequest { host_id }).await?;
    Ok(answer.into_inner())
}

#[tokio::test]
async fn an_operator_drains_a_host_and_no_client_notices() {
    let mesh = mesh().await;
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    let host = hosts_of_primaries(&mesh).await.remove(0);
    let drained = ctl(&mesh, &["-o", "json", "host", "drain", &host])
        .await
        .unwrap();
    let said = json(&drained).unwrap();
    assert_eq!(said["primaries_left"], 0, "{said}");
    assert!(!hosts_of_primaries(&mesh).await.contains(&host));
    let again = drain(&mesh, &host).await.unwrap();
    assert_eq!((again.primaries, again.task_ids.len()), (0, 0), "{again:?}");
    witnesses.testify().await.unwrap();

    let nobody = drain(&mesh, "nobody").await.unwrap_err();
    assert_eq!(nobody.code(), tonic::Code::NotFound, "{nobody:?}");
}

#[tokio::test]
async fn an_agent_that_is_asked_to_end_drains_its_host_first() {
    let mesh = mesh().await;
    let host = hosts_of_primaries(&mesh).await.remove(0);
    let file = format!("hosts/{host}/agent.json");
    let agent = mesh.bound_pid(file.as_ref()).unwrap();
    let words = std::fs::read(format!("/proc/{agent}/cmdline")).unwrap();
    let mut words: Vec<String> = words
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8(word.to_vec()).unwrap())
        .collect();
    words.retain(|word| word != "--stop-all-on-exit");
    // Its parent would start another one.
    let up = mesh.up_pid().unwrap();
    signals::freeze(up).unwrap();
    signals::kill(agent).unwrap();
    let mut ours = Command::new(&words[0])
        .args(&words[1..])
        .args(["--drain", "--drain-seconds", "45"])
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = ours.id().unwrap();
    wait_until(LIMIT, "an agent of ours", async || {
        anyhow::ensure!(mesh.bound_pid(file.as_ref())? == pid, "not yet");
        let mut fleet = mesh.api().await?.fleet();
        let hosts = fleet.list_hosts(ListHostsRequest {});
        let hosts = hosts.await?.into_inner().hosts;
        let known = hosts.iter().any(|h| h.agent_pid == pid);
        anyhow::ensure!(known, "{hosts:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    all_in_sync(&mesh).await;
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    signals::terminate(pid).unwrap();
    let ended = timeout(LIMIT, ours.wait()).await.expect("the agent to end");
    assert!(ended.unwrap().success());
    assert!(!hosts_of_primaries(&mesh).await.contains(&host));
    let alive = mesh.nodes().await.unwrap();
    assert!(alive.iter().all(|n| signals::is_alive(n.pid)), "{alive:?}");
    signals::thaw(up).unwrap();
    wait_until(LIMIT, "the parent's next agent", async || {
        let next = mesh.bound_pid(file.as_ref())?;
        anyhow::ensure!(next != pid && signals::is_alive(next), "none yet");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    witnesses.testify().await.unwrap();
}
