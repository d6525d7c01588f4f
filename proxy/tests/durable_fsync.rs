//! Durable mode with `durability_fsync`, with real nodes that know WAITAOF: a write is acknowledged only
//! if it is on the disks of the primary and of its replicas.

#![allow(clippy::unwrap_used, clippy::print_stderr)] // tests may, and so may what only tests use

mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use slotmesh_proto::topology::v1 as pb;
use support::Proxy;
use support::controller::Controller;
use support::node::{Node, engine, snapshot};
use support::raw::Raw;

/// What is acknowledged before the lights go out.
const WRITES: usize = 300;
const ON_DISK_AT_ONCE: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];
const ON_DISK_EACH_SECOND: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "everysec"];
const ON_DISK_SOME_DAY: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "no"];

/// Engines that know WAITAOF and are here.
fn engines() -> Vec<PathBuf> {
    let named = ["redis-8.2", "valkey-8.0"].map(|name| (name, engine(name)));
    for (name, _) in named.iter().filter(|(_, found)| found.is_none()) {
        eprintln!("not tested: {name} is not here; `deploy/engines/fetch` brings it");
    }
    named.into_iter().filter_map(|(_, found)| found).collect()
}

/// A primary with two replicas, both of which have to confirm.
struct World {
    nodes: [Node; 3],
    proxy: Proxy,
    _controller: Controller,
    _data: tempfile::TempDir,
}

impl World {
    async fn start(program: &Path, primary: &[&str], replica: &[&str], timeout_ms: u64) -> Self {
        let nodes = [primary, replica, replica].map(|kept| Node::start_engine(program, kept));
        nodes[0].grant(1);
        for replica in &nodes[1..] {
            replica.replicate(&nodes[0]);
        }
        nodes[0].wait_info("slave1:");
        let parameters = [
            ("durability_fsync", "yes".to_owned()),
            ("durability_timeout_ms", timeout_ms.to_string()),
        ];
        let mut first = snapshot(1, vec![nodes[0].route(0, 1, 1)]);
        let settings = first.settings.get_or_insert_with(Default::default);
        settings.durability = 2;
        settings.proxy_parameters = parameters
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        let (controller, address) = Controller::start(first).await;
        let data = tempfile::tempdir().unwrap();
        let arguments = ["--controller", &address.to_string()];
        let proxy = Proxy::start(data.path(), &arguments).await;
        controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
        Self {
            nodes,
            proxy,
            _controller: controller,
            _data: data,
        }
    }

    async fn client(&self) -> Raw {
        Raw::connect(self.proxy.address).await
    }
}

/// Writes one key after the other until the node does not take them any more.
async fn write(proxy: SocketAddr, id: u32, acknowledged: Arc<AtomicUsize>) -> Vec<String> {
    let mut client = Raw::connect(proxy).await;
    let mut mine = Vec::new();
    for n in 0_u32.. {
        client
            .send(format!("SET k{id}:{n} {n}\r\n").as_bytes())
            .await;
        let line = client.line().await;
        if line != "+OK" {
            assert!(line.starts_with('-'), "{line}");
            break;
        }
        mine.push(format!("k{id}:{n}"));
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
    mine
}

/// Every process of the shard is killed at once, in the middle of writes.
#[tokio::test(flavor = "multi_thread")]
async fn when_the_whole_shard_is_killed_every_acknowledged_write_is_on_each_of_its_disks() {
    for program in engines() {
        let mut world = World::start(&program, &ON_DISK_AT_ONCE, &ON_DISK_AT_ONCE, 4_000).await;
        let count = Arc::new(AtomicUsize::new(0));
        let mut writers = tokio::task::JoinSet::new();
        for id in 0..8 {
            writers.spawn(write(world.proxy.address, id, Arc::clone(&count)));
        }
        let enough = || (count.load(Ordering::Relaxed) >= WRITES).then_some(());
        support::wait_for("acknowledged writes", enough).await;
        for node in &world.nodes {
            node.kill();
        }
        let mut acknowledged = Vec::new();
        while let Some(mine) = writers.join_next().await {
            acknowledged.extend(mine.unwrap());
        }
        assert!(acknowledged.len() >= WRITES);
        for node in &mut world.nodes {
            node.start_again();
            let loaded = || (node.admin(&["PING"]) == "+PONG\r\n").then_some(());
            support::wait_for("the node's data", loaded).await;
            for key in &acknowledged {
                let there = node.admin(&["EXISTS", key]);
                assert_eq!(there, ":1\r\n", "{key} with {}", program.display());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_waits_for_the_disks_also_where_they_are_written_each_second() {
    for program in engines() {
        let world = World::start(&program, &ON_DISK_EACH_SECOND, &ON_DISK_EACH_SECOND, 4_000).await;
        let mut client = world.client().await;
        client
            .send(b"SET a 1\r\nRPUSH l x\r\nBLPOP l 0\r\nWATCH a\r\nMULTI\r\nSET a 2\r\nEXEC\r\n")
            .await;
        client
            .expect(
                "+OK\r\n:1\r\n*2\r\n$1\r\nl\r\n$1\r\nx\r\n+OK\r\n+OK\r\n+QUEUED\r\n*1\r\n+OK\r\n",
            )
            .await;
        for node in &world.nodes {
            assert_eq!(node.admin(&["GET", "a"]), "$1\r\n2\r\n");
        }
    }
}

/// In memory all of them have it: `WAIT` would be content.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_never_says_what_is_on_its_disk_confirms_nothing() {
    for program in engines() {
        let world = World::start(&program, &ON_DISK_AT_ONCE, &ON_DISK_SOME_DAY, 300).await;
        let mut client = world.client().await;
        client.send(b"SET a 1\r\n").await;
        let line = client.line().await;
        assert!(
            line.starts_with("-WAITFAIL "),
            "{}: {line}",
            program.display()
        );
        for replica in &world.nodes[1..] {
            let has_it = || (replica.admin(&["GET", "a"]) == "$1\r\n1\r\n").then_some(());
            support::wait_for("the write in the replica's memory", has_it).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_without_an_append_only_file_says_so_in_the_refusal() {
    for program in engines() {
        let world = World::start(&program, &["--appendonly", "no"], &ON_DISK_AT_ONCE, 300).await;
        let mut client = world.client().await;
        client.send(b"SET a 1\r\n").await;
        let line = client.line().await;
        assert!(
            line.starts_with("-WAITFAIL ") && line.contains("appendonly"),
            "{line}"
        );
    }
}
