//! Primaries that are killed and lose their files at once: they come back empty, and nobody who has
//! data follows them.

#![allow(clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use redis::aio::MultiplexedConnection;
use slotmesh_bench::failover::tags;
use slotmesh_e2e::connect;
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::{
    instance::v1::{Node, SetDurabilityRequest, Shard},
    store::v1::NodeRole,
};
use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(60);
const SHARDS: usize = 4;
/// Each kills the primaries of all shards: 20 in all.
const ROUNDS: usize = 5;
/// Keys of each shard before the first of them.
const KEYS: usize = 300;
/// How often a replica is asked how many keys it has.
const LOOK: Duration = Duration::from_millis(10);
/// Between two writes of one writer.
const PAUSE: Duration = Duration::from_millis(5);
/// Keys that are looked for with one command.
const CHUNK: usize = 200;

/// A connection to a node as its agent has one.
async fn admin(pid: u32) -> MultiplexedConnection {
    let dir = dir_of(pid);
    let secret = std::fs::read_to_string(dir.join("admin.secret")).unwrap();
    let socket = dir.join("admin.sock");
    let url = format!(
        "unix://{}?user=slotmesh-admin&pass={}",
        socket.display(),
        secret.trim()
    );
    let client = redis::Client::open(url).unwrap();
    client.get_multiplexed_async_connection().await.unwrap()
}

fn dir_of(pid: u32) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap()
}

async fn size(connection: &mut MultiplexedConnection) -> redis::RedisResult<usize> {
    redis::cmd("DBSIZE").query_async(connection).await
}

/// How often a node has sent everything to a replica.
async fn full_syncs(pid: u32) -> u64 {
    let mut info = redis::cmd("INFO");
    let asked = info.arg("stats").query_async(&mut admin(pid).await).await;
    let text: String = asked.unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("sync_full:"));
    line.unwrap().trim().parse().unwrap()
}

/// Removes what an engine would read at its start. It runs on meanwhile, on files without names.
fn lose_files(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_str().unwrap_or_default();
        if name == "appendonlydir" {
            std::fs::remove_dir_all(path).unwrap();
        } else if name.ends_with(".rdb") || name.ends_with(".aof") {
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// Someone who asks a replica for its number of keys until it is told to stop.
struct Watch {
    stop: CancellationToken,
    least: JoinHandle<Result<usize, String>>,
}

impl Watch {
    async fn start(pid: u32) -> (Self, usize) {
        let (stop, mut connection) = (CancellationToken::new(), admin(pid).await);
        let stopped = stop.clone();
        let first = size(&mut connection).await.unwrap();
        let least = tokio::spawn(async move {
            let mut least = first;
            while !stopped.is_cancelled() {
                let now = size(&mut connection).await;
                least = least.min(now.map_err(|e| format!("{pid} does not answer: {e}"))?);
                sleep(LOOK).await;
            }
            Ok(least)
        });
        (Self { stop, least }, first)
    }

    async fn end(self) -> usize {
        self.stop.cancel();
        self.least.await.unwrap().unwrap()
    }
}

/// Writes keys of its own, and keeps which were acknowledged.
struct Writer {
    stop: CancellationToken,
    acknowledged: JoinHandle<Vec<String>>,
}

impl Writer {
    async fn start(address: &str, name: String) -> Self {
        let mut connection = connect(address, false).await.unwrap();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let acknowledged = tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            let mut number = 0_u64;
            while !stopped.is_cancelled() {
                number += 1;
                let key = format!("{name}:{number}");
                let mut set = redis::cmd("SET");
                // An error says that nobody knows, or that fewer have it than should.
                if (set
                    .arg(&key)
                    .arg(1)
                    .query_async::<()>(&mut connection)
                    .await)
                    .is_ok()
                {
                    acknowledged.push(key);
                }
                sleep(PAUSE).await;
            }
            acknowledged
        });
        Self { stop, acknowledged }
    }
}

fn primary(shard: &Shard) -> &Node {
    let mut nodes = shard.nodes.iter();
    nodes
        .find(|n| n.current_role() == NodeRole::Primary)
        .unwrap()
}

async fn whole(mesh: &Mesh) -> Vec<Shard> {
    wait_until(LIMIT, "every node to be in sync", async || {
        let shards = mesh.api().await?.describe_shards(mesh.instance()).await?;
        for shard in &shards {
            let is_whole = shard.mode == "Serving"
                && shard.nodes.iter().all(|n| {
                    let has_data = n.in_sync || n.current_role() == NodeRole::Primary;
                    has_data && n.state == "Running" && n.pid > 0
                });
            anyhow::ensure!(is_whole, "{shard:?}");
        }
        anyhow::Ok(shards)
    })
    .await
    .unwrap()
}

/// Kills every shard's primary without its files, and waits until all are back.
async fn round(mesh: &Mesh) {
    let before = whole(mesh).await;
    let mut watches = Vec::new();
    for node in before.iter().flat_map(|s| &s.nodes) {
        if node.current_role() == NodeRole::Replica {
            watches.push((node.node_id.clone(), Watch::start(node.pid).await));
        }
    }
    for shard in &before {
        let lost = primary(shard);
        lose_files(&dir_of(lost.pid));
        signals::kill(lost.pid).unwrap();
    }
    wait_until(LIMIT, "another primary of every shard", async || {
        let now = mesh.api().await?.describe_shards(mesh.instance()).await?;
        for (before, now) in before.iter().zip(&now) {
            anyhow::ensure!(now.epoch > before.epoch, "{now:?}");
        }
        anyhow::Ok(())
    })
    .await
    .unwrap();
    let after = whole(mesh).await;
    for (before, after) in before.iter().zip(&after) {
        let (lost, now) = (primary(before), primary(after));
        assert_ne!(lost.node_id, now.node_id, "the empty one was taken back");
        let back = after.nodes.iter().find(|n| n.node_id == lost.node_id);
        let back = back.unwrap();
        assert_ne!(back.run_id, lost.run_id);
        let keys = size(&mut admin(back.pid).await).await.unwrap();
        assert!(keys >= KEYS, "{} came back to {keys} keys", back.node_id);
        // It brought no history of its own: it was empty indeed.
        assert!(full_syncs(now.pid).await >= 1, "{} had data", back.node_id);
    }
    for (node, (watch, first)) in watches {
        let least = watch.end().await;
        assert!(
            first >= KEYS && least >= first,
            "{node} had {first} keys and then {least}"
        );
    }
}

async fn count(connection: &mut MultiplexedConnection, keys: &[String]) -> usize {
    let mut there = 0;
    for some in keys.chunks(CHUNK) {
        let mut exists = redis::cmd("EXISTS");
        let found: usize = exists.arg(some).query_async(connection).await.unwrap();
        there += found;
    }
    there
}

#[tokio::test]
async fn an_empty_restarted_primary_wipes_nothing_twenty_times() {
    let mesh = Mesh::start(&MeshOptions {
        shards: Some(u32::try_from(SHARDS).unwrap()),
        replicas: Some(2),
        ..MeshOptions::default()
    })
    .await
    .unwrap();
    let mut instances = mesh.api().await.unwrap().instances();
    let request = SetDurabilityRequest {
        instance_id: mesh.instance().to_owned(),
        durability: 1,
        ..SetDurabilityRequest::default()
    };
    instances.set_durability(request).await.unwrap();
    let shards = whole(&mesh).await;
    let address = mesh.contract.proxies[0].as_str();
    let mut connection = connect(address, false).await.unwrap();
    let tags = tags(address, &shards).await.unwrap();
    let mut keys = Vec::new();
    for tag in &tags {
        let mut sets = redis::pipe();
        for number in 0..KEYS {
            let key = format!("{{{tag}}}:before:{number}");
            sets.cmd("SET").arg(&key).arg(1).ignore();
            keys.push(key);
        }
        sets.query_async::<()>(&mut connection).await.unwrap();
    }
    wait_until(LIMIT, "every replica to have the keys", async || {
        for node in mesh.nodes().await? {
            let keys = size(&mut admin(node.pid).await).await?;
            anyhow::ensure!(keys >= KEYS, "{} has {keys}", node.id);
        }
        anyhow::Ok(())
    })
    .await
    .unwrap();
    let mut writers = Vec::new();
    for tag in &tags {
        writers.push(Writer::start(address, format!("{{{tag}}}:during")).await);
    }
    for _ in 0..ROUNDS {
        round(&mesh).await;
    }
    for writer in writers {
        writer.stop.cancel();
        let acknowledged = writer.acknowledged.await.unwrap();
        assert!(acknowledged.len() > 100, "{}", acknowledged.len());
        keys.extend(acknowledged);
    }
    assert_eq!(count(&mut connection, &keys).await, keys.len());
}
