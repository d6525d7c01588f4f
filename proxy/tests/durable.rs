//! Durable mode with real nodes: a write is acknowledged only if its replica has it.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use slotmesh_proto::topology::v1 as pb;
use support::Proxy;
use support::controller::Controller;
use support::node::{Node, snapshot};
use support::raw::Raw;

/// So long that a replica which runs confirms in time also on a busy machine.
const TIMEOUT_MS: u64 = 1_000;

struct World {
    primary: Node,
    replica: Node,
    proxy: Proxy,
    controller: Controller,
    _data: tempfile::TempDir,
}

impl World {
    async fn start(parameters: &[(&str, &str)]) -> Self {
        let (primary, replica) = (Node::start_with_epoch(1), Node::start());
        replica.replicate(&primary);
        primary.wait_info("state=online");
        let timeout = TIMEOUT_MS.to_string();
        let mut all = HashMap::from([("durability_timeout_ms".to_owned(), timeout)]);
        let given = parameters.iter();
        all.extend(given.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let mut first = snapshot(1, vec![primary.route(0, 1, 1)]);
        let settings = first.settings.get_or_insert_with(Default::default);
        settings.durability = 1;
        settings.proxy_parameters = all;
        let (controller, address) = Controller::start(first).await;
        let data = tempfile::tempdir().unwrap();
        let arguments = ["--controller", &address.to_string()];
        let proxy = Proxy::start(data.path(), &arguments).await;
        controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
        Self {
            primary,
            replica,
            proxy,
            controller,
            _data: data,
        }
    }

    async fn client(&self) -> Raw {
        Raw::connect(self.proxy.address).await
    }

    /// How often clients of the primary have called a command.
    fn calls(&self, command: &str) -> u64 {
        let stats = self.primary.admin(&["INFO", "commandstats"]);
        let name = format!("cmdstat_{command}:calls=");
        let mut lines = stats.lines();
        let calls = lines.find_map(|line| line.strip_prefix(&name));
        calls.map_or(0, |calls| calls.split(',').next().unwrap().parse().unwrap())
    }
}

async fn expect_waitfail(client: &mut Raw) {
    let line = client.line().await;
    assert!(line.starts_with("-WAITFAIL "), "{line}");
    assert!(line.contains("outcome is unknown"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_keeps_its_order_and_is_confirmed_in_batches() {
    let world = World::start(&[]).await;
    let mut client = world.client().await;
    let (mut sent, mut want) = (String::new(), String::new());
    for n in 1..=500 {
        sent += "INCR n\r\nGET n\r\nEVAL \"return redis.call('incr',KEYS[1])\" 1 m\r\nGET x\r\n";
        let digits = n.to_string().len();
        want += &format!(":{n}\r\n${digits}\r\n{n}\r\n:{n}\r\n$-1\r\n");
    }
    sent += "MULTI\r\nINCR n\r\nGET n\r\nEXEC\r\nMSET {n}a 1 {n}b 2\r\nPUBLISH c x\r\n";
    want += "+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n:501\r\n$3\r\n501\r\n+OK\r\n:0\r\n";
    client.send(sent.as_bytes()).await;
    client.expect(&want).await;
    let (waits, writes) = (world.calls("wait"), world.calls("incr"));
    assert!(
        writes >= 1001 && waits >= 1 && waits * 5 < writes,
        "{waits} of {writes}"
    );
    assert_eq!(world.replica.admin(&["GET", "n"]), "$3\r\n501\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_replica_fails_writes_of_every_kind_and_no_read() {
    let world = World::start(&[]).await;
    let (mut client, mut other) = (world.client().await, world.client().await);
    client
        .send(b"RPUSH l 1 2 3\r\nWATCH w\r\nMULTI\r\nSET w 1\r\n")
        .await;
    client.expect(":3\r\n+OK\r\n+OK\r\n+QUEUED\r\n").await;
    world.replica.freeze();
    let began = Instant::now();
    client.send(b"EXEC\r\n").await;
    expect_waitfail(&mut client).await;
    assert!(began.elapsed() >= Duration::from_millis(TIMEOUT_MS));
    for write in [
        "SET a 1\r\n",
        "EVAL \"return redis.call('set',KEYS[1],2)\" 1 a\r\n",
        "MULTI\r\nSET a 3\r\nEXEC\r\n",
        "BLPOP l 0\r\n",
        "LPOP l\r\n",
        "MSET a 1 b 2\r\n",
        "FLUSHDB\r\n",
    ] {
        client.send(write.as_bytes()).await;
        if write.starts_with("MULTI") {
            client.expect("+OK\r\n+QUEUED\r\n").await;
        }
        expect_waitfail(&mut client).await;
    }
    // What was not executed is no matter of replicas, and reads are not either.
    client.send(b"INCR a b\r\n").await;
    assert!(client.line().await.starts_with("-ERR wrong number"));
    other.send(b"GET a\r\n").await;
    other.expect("$-1\r\n").await;
    world.replica.thaw();
    client.send(b"SET a 9\r\n").await;
    let mut line = client.line().await;
    while line != "+OK" {
        assert!(line.starts_with("-WAITFAIL"), "{line}"); // it has to catch up first
        client.send(b"SET a 9\r\n").await;
        line = client.line().await;
    }
    world.replica.admin(&["PING"]);
    assert_eq!(world.replica.admin(&["GET", "a"]), "$1\r\n9\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_read_gate_no_read_shows_what_may_be_lost() {
    let world = World::start(&[("read_gate", "yes")]).await;
    let (mut client, mut other) = (world.client().await, world.client().await);
    client.send(b"SET a 1\r\nGET a\r\n").await;
    client.expect("+OK\r\n$1\r\n1\r\n").await;
    other.send(b"GET a\r\nMGET a b\r\n").await;
    other.expect("$1\r\n1\r\n*2\r\n$1\r\n1\r\n$-1\r\n").await;
    world.replica.freeze();
    client.send(b"SET a 2\r\n").await;
    expect_waitfail(&mut client).await;
    other.send(b"GET a\r\n").await;
    expect_waitfail(&mut other).await;
}

/// The engine that is installed, 7.0, is one.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_waitaof_refuses_to_promise_what_is_on_disks() {
    let world = World::start(&[("durability_fsync", "yes")]).await;
    let mut client = world.client().await;
    for write in [
        "SET a 1\r\n",
        "RPUSH l x\r\n",
        "BLPOP l 0\r\n",
        "MSET a 1 b 2\r\n",
    ] {
        client.send(write.as_bytes()).await;
        let line = client.line().await;
        assert!(
            line.starts_with("-WAITFAIL ") && line.contains("no WAITAOF"),
            "{line}"
        );
    }
    client.send(b"GET a\r\n").await;
    client.expect("$1\r\n1\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn durability_can_be_set_while_clients_write() {
    let world = World::start(&[]).await;
    let mut client = world.client().await;
    client.send(b"SET a 1\r\n").await;
    client.expect("+OK\r\n").await;
    world.replica.freeze();
    world.controller.set_durability(0);
    let deadline = Instant::now() + support::LIMIT;
    loop {
        client.send(b"SET a 2\r\n").await;
        if client.line().await == "+OK" {
            break;
        }
        assert!(Instant::now() < deadline, "writes are still confirmed");
    }
}

/// As agents do it: what was acknowledged before the hold was confirmed before it, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_switchover_fails_no_durable_write() {
    let world = World::start(&[("durability_timeout_ms", "4000")]).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = tokio::task::JoinSet::new();
    let count = Arc::new(AtomicUsize::new(0));
    for id in 0..4 {
        writers.spawn(write_until(
            world.proxy.address,
            id,
            Arc::clone(&stop),
            Arc::clone(&count),
        ));
    }
    let several = || (count.load(Ordering::Relaxed) > 8).then_some(());
    support::wait_for("writes before the switchover", several).await;
    let hold = pb::Hold {
        task_id: "t".to_owned(),
        target_address: world.replica.address.to_string(),
        max_hold_ms: 5_000,
    };
    world.controller.change(pb::ShardRoute {
        hold: Some(hold),
        ..world.primary.route(0, 1, 1)
    });
    world
        .controller
        .wait_level("s0", pb::HoldLevel::Held, 1)
        .await;
    world.primary.fence(1);
    let port = world.replica.address.port().to_string();
    let words = ["FAILOVER", "TO", "127.0.0.1", &port, "TIMEOUT", "4000"];
    assert_eq!(world.primary.admin(&words), "+OK\r\n");
    world.replica.acknowledge_until_primary();
    world.replica.grant(2);
    world.controller.change(world.replica.route(0, 1, 2));
    let mut client = world.client().await;
    client.send(b"SET last 1\r\n").await;
    client.expect("+OK\r\n").await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = 0;
    while let Some(written) = writers.join_next().await {
        acknowledged += written.unwrap().len();
    }
    assert!(acknowledged > 8, "{acknowledged} writes");
    let metrics = support::raw::http_get(world.proxy.admin, "/metrics").await;
    for name in ["unconfirmed", "outcome_unknown"] {
        let name = format!("slotmesh_proxy_{name}");
        let mut lines = metrics.lines().filter(|line| line.starts_with(&name));
        let line = lines
            .next()
            .unwrap_or_else(|| panic!("no {name} in {metrics}"));
        assert!(line.ends_with(" 0"), "{line}");
    }
}

/// The primary dies while its replica comes and goes: what was acknowledged is there afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_with_its_primary() {
    let world = World::start(&[]).await;
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicUsize::new(0));
    let mut writers = tokio::task::JoinSet::new();
    for id in 0..4 {
        writers.spawn(write_until(
            world.proxy.address,
            id,
            Arc::clone(&stop),
            Arc::clone(&count),
        ));
    }
    for round in 1..=3 {
        let with_a_replica = || (count.load(Ordering::Relaxed) > round * 10).then_some(());
        support::wait_for("writes with a replica", with_a_replica).await;
        world.replica.freeze();
        tokio::time::sleep(Duration::from_millis(TIMEOUT_MS)).await; // and without
        world.replica.thaw();
    }
    world.replica.freeze();
    tokio::time::sleep(Duration::from_millis(20)).await; // what the primary alone has
    world.primary.kill();
    world.replica.thaw();
    let route = world.primary.route(0, 1, 2);
    let hold = pb::Hold {
        task_id: "t".to_owned(),
        target_address: world.replica.address.to_string(),
        max_hold_ms: 5_000,
    };
    world.controller.change(pb::ShardRoute {
        hold: Some(hold),
        ..route
    });
    assert_eq!(world.replica.admin(&["REPLICAOF", "NO", "ONE"]), "+OK\r\n");
    world.replica.grant(2);
    world.controller.set_durability(0);
    world.controller.change(world.replica.route(0, 1, 2));
    let mut client = world.client().await;
    client.send(b"SET last 1\r\n").await;
    client.expect("+OK\r\n").await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = Vec::new();
    while let Some(written) = writers.join_next().await {
        acknowledged.extend(written.unwrap());
    }
    assert!(acknowledged.len() > 20, "{} writes", acknowledged.len());
    for key in &acknowledged {
        assert_eq!(world.replica.admin(&["EXISTS", key]), ":1\r\n", "{key}");
    }
}

/// Writes one key after the other. Returns those that were acknowledged.
async fn write_until(
    proxy: SocketAddr,
    id: u32,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
) -> Vec<String> {
    let mut client = Raw::connect(proxy).await;
    let mut acknowledged = Vec::new();
    for n in 0_u32.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        client.send(format!("SET k{id}:{n} 1\r\n").as_bytes()).await;
        let line = client.line().await;
        if line == "+OK" {
            acknowledged.push(format!("k{id}:{n}"));
            count.fetch_add(1, Ordering::Relaxed);
        } else {
            assert!(
                line.ends_with("may lose it") || line.ends_with("is unknown"),
                "{line}"
            );
        }
    }
    acknowledged
}
