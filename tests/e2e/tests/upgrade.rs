//! Engines are exchanged under load, and nobody notices: no error, nothing lost or doubled, no copy in
//! full, and every node at the new version.

#![allow(clippy::unwrap_used)]

use std::{fs, time::Duration};

use slotmesh_e2e::{Witnesses, connect, ctl, json, roles};
use slotmesh_harness::{Mesh, MeshOptions, engines, signals, wait_until};
use slotmesh_proto::{
    instance::v1::{FinalizeBy, ModifyInstanceMinorVersionRequest, Node},
    store::v1::{NodeRole, OperatorChoice, TaskState},
    task::v1::{ResolveTaskRequest, Task},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Engines are tried, processes exchanged one by one, and the machine may do much else meanwhile.
const LIMIT: Duration = Duration::from_secs(240);
/// So many bytes in each shard before, so that a copy in full is not nothing.
const KEYS: u32 = 2_000;
/// What a client waits for in one piece, at most: a hold of 100 ms on a machine that is not free.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// An engine of the repository, listed in the mesh's catalogue.
async fn list(mesh: &Mesh, product: &str, version: &str, engine: &str) -> String {
    let file = engines::find(engine).unwrap().display().to_string();
    let words = ["artifact", "add", product, version, "--file", &file];
    let output = ctl(mesh, &words).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    format!("{product}-{version}")
}

async fn nodes(mesh: &Mesh) -> anyhow::Result<Vec<Node>> {
    let shards = mesh.api().await?.describe_shards(mesh.instance()).await?;
    Ok(shards.into_iter().flat_map(|s| s.nodes).collect())
}

async fn in_sync(mesh: &Mesh, nodes_wanted: usize) {
    wait_until(LIMIT, "every node to be in sync", async || {
        let nodes = nodes(mesh).await?;
        let ready = nodes
            .iter()
            .filter(|n| n.in_sync || n.current_role() == NodeRole::Primary);
        anyhow::ensure!(
            nodes.len() == nodes_wanted && ready.count() == nodes_wanted,
            "{nodes:?}"
        );
        anyhow::Ok(())
    })
    .await
    .unwrap();
}

async fn fill(mesh: &Mesh) {
    let mut connection = connect(&mesh.contract.proxies[0], false).await.unwrap();
    for first in (0..KEYS).step_by(500) {
        let mut pipe = redis::pipe();
        for n in first..first + 500 {
            pipe.cmd("SET").arg(format!("k{n}")).arg(n).ignore();
        }
        let written: redis::RedisResult<()> = pipe.query_async(&mut connection).await;
        written.unwrap();
    }
}

/// Copies in full that the nodes have ever taken, by their logs.
fn full_copies(mesh: &Mesh) -> usize {
    let hosts = fs::read_dir(mesh.data().join("hosts")).unwrap().flatten();
    let nodes = hosts.flat_map(|h| fs::read_dir(h.path().join("nodes")).into_iter().flatten());
    let logs = nodes.flatten().map(|n| n.path().join("redis.log"));
    let texts = logs.map(|log| fs::read_to_string(log).unwrap_or_default());
    texts
        .map(|text| text.matches("Full resync from").count())
        .sum()
}

/// A client that appends unique ids to lists of its own, and counts what was acknowledged.
struct Writer {
    stop: CancellationToken,
    work: JoinHandle<Vec<u32>>,
    number: usize,
    address: String,
}

const LISTS: u32 = 7;

impl Writer {
    async fn start(mesh: &Mesh, number: usize) -> Self {
        let proxies = &mesh.contract.proxies;
        let address = proxies[number % proxies.len()].clone();
        let mut connection = connect(&address, number % 2 == 1).await.unwrap();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let work = tokio::spawn(async move {
            let mut acknowledged = vec![];
            for id in 0.. {
                if stopped.is_cancelled() {
                    break;
                }
                let mut push = redis::cmd("RPUSH");
                push.arg(format!("ids:{number}:{}", id % LISTS)).arg(id);
                let answer: redis::RedisResult<u32> = push.query_async(&mut connection).await;
                answer.unwrap_or_else(|error| panic!("writer {number}, id {id}: {error}"));
                acknowledged.push(id);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            acknowledged
        });
        Self {
            stop,
            work,
            number,
            address,
        }
    }

    /// What is there is what was acknowledged, once each and in order.
    async fn audit(self) -> usize {
        self.stop.cancel();
        let acknowledged = self.work.await.unwrap();
        let mut connection = connect(&self.address, false).await.unwrap();
        for list in 0..LISTS {
            let mut range = redis::cmd("LRANGE");
            range
                .arg(format!("ids:{}:{list}", self.number))
                .arg(0)
                .arg(-1);
            let found: Vec<u32> = range.query_async(&mut connection).await.unwrap();
            let ids = acknowledged.iter().copied();
            let wanted: Vec<u32> = ids.filter(|id| id % LISTS == list).collect();
            assert_eq!(found, wanted, "list {list} of writer {}", self.number);
        }
        acknowledged.len()
    }
}

struct Load {
    witnesses: Witnesses,
    writers: Vec<Writer>,
}

impl Load {
    async fn start(mesh: &Mesh) -> Self {
        let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
        let mut writers = vec![];
        for number in 0..4 {
            writers.push(Writer::start(mesh, number).await);
        }
        Self { witnesses, writers }
    }

    async fn audit(self) {
        for writer in self.writers {
            let written = writer.audit().await;
            assert!(written > 100, "hardly any load: {written}");
        }
        for seen in self.witnesses.testify().await.unwrap() {
            assert!(seen.longest < LONGEST_WAIT, "{seen:?}");
        }
    }
}

async fn begin(mesh: &Mesh, engine: &str, more: ModifyInstanceMinorVersionRequest) -> String {
    let request = ModifyInstanceMinorVersionRequest {
        instance_id: mesh.instance().to_owned(),
        minor_version: engine.to_owned(),
        client_token: format!("to-{engine}"),
        ..more
    };
    let mut api = mesh.api().await.unwrap().instances();
    let answer = api.modify_instance_minor_version(request).await.unwrap();
    answer.into_inner().task_id
}

async fn until(mesh: &Mesh, task: &str, what: &str, claim: impl Fn(&Task) -> bool) -> Task {
    wait_until(LIMIT, what, async || {
        let task = mesh.api().await?.task(task).await?;
        anyhow::ensure!(claim(&task), "{task:#?}");
        anyhow::Ok(task)
    })
    .await
    .unwrap()
}

async fn version(mesh: &Mesh) -> String {
    let words = ["--output", "json", "version", mesh.instance()];
    let output = ctl(mesh, &words).await.unwrap();
    let versions = json(&output).unwrap();
    versions["minor_version"].as_str().unwrap().to_owned()
}

async fn mesh_of(architecture: &str, engine: &str) -> (Mesh, usize) {
    let shards = if architecture == "cluster" { 2 } else { 1 };
    let options = MeshOptions {
        architecture: Some(architecture.into()),
        shards: (shards > 1).then_some(shards),
        engine: Some(engine.into()),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let nodes = nodes(&mesh).await.unwrap().len();
    in_sync(&mesh, nodes).await;
    (mesh, nodes)
}

/// Every node runs it, and none has copied in full since.
async fn runs(mesh: &Mesh, number: &str, nodes_wanted: usize, copies: usize) {
    in_sync(mesh, nodes_wanted).await;
    assert_eq!(full_copies(mesh), copies);
    assert_eq!(version(mesh).await, number);
    for node in nodes(mesh).await.unwrap() {
        assert!(node.engine_version.ends_with(number), "{node:?}");
    }
}

fn bake(seconds: u32) -> ModifyInstanceMinorVersionRequest {
    ModifyInstanceMinorVersionRequest {
        bake_seconds: Some(seconds),
        ..ModifyInstanceMinorVersionRequest::default()
    }
}

fn is_done(task: &Task) -> bool {
    task.state() == TaskState::Done
}

async fn nobody_notices(architecture: &str, from: &str, to: (&str, &str, &str)) {
    let (mesh, count) = mesh_of(architecture, from).await;
    let (product, number, engine) = to;
    let name = list(&mesh, product, number, engine).await;
    fill(&mesh).await;
    let copies = full_copies(&mesh);
    let load = Load::start(&mesh).await;
    let task = begin(&mesh, &name, bake(2)).await;
    let task = until(&mesh, &task, "the upgrade to be done", is_done).await;
    in_sync(&mesh, count).await;
    load.audit().await;
    runs(&mesh, number, count, copies).await;
    for shard in &task.shards {
        // The measure is 100 ms on a machine of its own.
        let hold_ms_max = LONGEST_WAIT.as_secs_f64() * 1_000.0;
        assert!(shard.hold_ms < hold_ms_max, "{shard:?}");
    }
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_a_standard_instance_that_goes_from_7_0_to_8_2() {
    nobody_notices("standard", "redis-7.0", ("redis", "8.2.3", "redis-8.2")).await;
}

#[tokio::test]
async fn nobody_notices_a_cluster_that_goes_from_7_0_to_8_2() {
    nobody_notices("cluster", "redis-7.0", ("redis", "8.2.3", "redis-8.2")).await;
}

#[tokio::test]
async fn nobody_notices_an_instance_that_goes_from_6_2_by_7_0_to_8_2() {
    let (mesh, count) = mesh_of("standard", "redis-6.2").await;
    let listed = [("7.0.15", "redis-7.0"), ("8.2.3", "redis-8.2")];
    for (number, engine) in listed {
        list(&mesh, "redis", number, engine).await;
    }
    fill(&mesh).await;
    let copies = full_copies(&mesh);
    let load = Load::start(&mesh).await;
    for (number, _) in listed {
        let words = ["upgrade", mesh.instance(), "--to", number];
        let words = [&words[..], &["--bake", "1", "--wait"]].concat();
        let output = ctl(&mesh, &words).await.unwrap();
        assert!(output.status.success(), "{output:?}");
        runs(&mesh, number, count, copies).await;
    }
    load.audit().await;
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_a_standard_instance_that_goes_from_7_0_to_valkey_8_0() {
    nobody_notices("standard", "redis-7.0", ("valkey", "8.0.1", "valkey-8.0")).await;
}

#[tokio::test]
async fn nobody_notices_that_an_upgrade_is_taken_back_in_its_bake() {
    let (mesh, count) = mesh_of("standard", "redis-7.0").await;
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await;
    fill(&mesh).await;
    let before = roles(&mesh).await.unwrap();
    let copies = full_copies(&mesh);
    let load = Load::start(&mesh).await;
    let options = ModifyInstanceMinorVersionRequest {
        finalize: FinalizeBy::Operator.into(),
        ..ModifyInstanceMinorVersionRequest::default()
    };
    let task = begin(&mesh, &name, options).await;
    let bakes = |t: &Task| {
        t.shards
            .iter()
            .all(|s| s.rollback == "Open" && s.phase == "Bake")
    };
    until(&mesh, &task, "the bake, with the way back open", bakes).await;
    assert_ne!(
        roles(&mesh).await.unwrap()[0].1,
        before[0].1,
        "it has switched"
    );
    let request = ResolveTaskRequest {
        task_id: task.clone(),
        choice: OperatorChoice::Undo.into(),
        client_token: "back".to_owned(),
    };
    let mut api = mesh.api().await.unwrap().tasks();
    api.resolve_task(request).await.unwrap();
    let back = |t: &Task| t.state() == TaskState::Cancelled;
    let task = until(&mesh, &task, "the way back", back).await;
    assert_eq!(task.shards[0].phase, "RolledBack", "{task:?}");
    in_sync(&mesh, count).await;
    load.audit().await;
    // The only node that had the newer engine copies in full: the older one can't read its files.
    assert!(full_copies(&mesh) <= copies + 1);
    assert_eq!(version(&mesh).await, "7.0.15");
    assert_eq!(roles(&mesh).await.unwrap()[0].1, before[0].1);
    for node in nodes(&mesh).await.unwrap() {
        assert_eq!(node.engine_version, "7.0.15", "{node:?}");
    }
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_agents_that_die_in_the_middle_of_an_upgrade() {
    let (mesh, count) = mesh_of("standard", "redis-7.0").await;
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await;
    fill(&mesh).await;
    let copies = full_copies(&mesh);
    let roles = roles(&mesh).await.unwrap();
    let (_, primary, replicas) = &roles[0];
    let load = Load::start(&mesh).await;
    let task = begin(&mesh, &name, bake(0)).await;
    // The agent of the node that makes way.
    for (phase, node) in [("Replicas", &replicas[0]), ("Finalize", primary)] {
        let is_in = |t: &Task| is_done(t) || t.shards.iter().any(|s| s.phase == phase);
        until(&mesh, &task, phase, is_in).await;
        let nodes = mesh.nodes().await.unwrap();
        let host = &nodes.iter().find(|n| n.id == *node).unwrap().host;
        let file = format!("hosts/{host}/agent.json");
        let agent = mesh.bound_pid(file.as_ref()).unwrap();
        signals::kill(agent).unwrap();
    }
    until(&mesh, &task, "the upgrade to be done", is_done).await;
    in_sync(&mesh, count).await;
    load.audit().await;
    runs(&mesh, "8.2.3", count, copies).await;
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn an_engine_that_fails_its_trial_touches_nothing() {
    let (mesh, count) = mesh_of("standard", "redis-7.0").await;
    fill(&mesh).await;
    let copies = full_copies(&mesh);
    // It says what it is, and does not run.
    let own = tempfile::tempdir().unwrap();
    let program = own.path().join("program");
    let version = "Redis server v=8.2.3 sha=00000000:0 malloc=libc bits=64";
    let text = format!(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo '{version}'; exit; fi\n\
         echo 'Illegal instruction' >&2\nexit 132\n"
    );
    fs::write(&program, text).unwrap();
    let file = program.display().to_string();
    let words = ["artifact", "add", "redis", "8.2.3", "--file", &file];
    let output = ctl(&mesh, &words).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    let before: Vec<_> = nodes(&mesh)
        .await
        .unwrap()
        .into_iter()
        .map(|n| n.pid)
        .collect();
    let task = begin(&mesh, "redis-8.2.3", bake(0)).await;
    let failed = |t: &Task| {
        t.shards
            .iter()
            .any(|s| s.message.contains("Illegal instruction"))
    };
    until(&mesh, &task, "the trial's failure", failed).await;
    let after: Vec<_> = nodes(&mesh)
        .await
        .unwrap()
        .into_iter()
        .map(|n| n.pid)
        .collect();
    assert_eq!(after, before);
    runs(&mesh, "7.0.15", count, copies).await;
    mesh.stop().await.unwrap();
}
