//! A planned change of a primary, with real nodes and a real `FAILOVER`, seen by pipelined writers.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use slotmesh_proto::topology::v1 as pb;
use slotmesh_proto::topology::v1::watch_request::Message as Said;
use slotmesh_proto::topology::v1::watch_response::Message;
use support::Proxy;
use support::controller::Controller;
use support::node::{Node, snapshot};
use support::raw::Raw;

fn hold(route: &pb::ShardRoute, target: &Node, max_hold_ms: u32) -> pb::ShardRoute {
    let hold = pb::Hold {
        task_id: "t1".to_owned(),
        target_address: target.address.to_string(),
        max_hold_ms,
    };
    pb::ShardRoute {
        hold: Some(hold),
        ..route.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_acked_refused_and_resumed() {
    let node = Node::start_with_epoch(3);
    let (controller, address) = Controller::start(snapshot(7, vec![node.route(0, 1, 3)])).await;
    let data = tempfile::tempdir().unwrap();
    let proxy = Proxy::start(data.path(), &["--controller", &address.to_string()]).await;
    let hello = controller
        .wait_heard("hello", |said| matches!(said, Said::Hello(_)))
        .await;
    let Said::Hello(hello) = hello else {
        unreachable!()
    };
    assert_eq!((hello.proxy_id.as_str(), hello.shards.len()), ("p1", 0));
    controller
        .wait_heard(
            "ack",
            |said| matches!(said, Said::Ack(a) if a.revision == 7),
        )
        .await;
    controller.wait_level("s0", pb::HoldLevel::Applied, 3).await;
    let mut raw = Raw::connect(proxy.address).await;
    raw.send(b"SET a 1\r\n").await;
    raw.expect("+OK\r\n").await;
    // A lower epoch is refused and changes nothing.
    let lower = pb::Delta {
        base_revision: 7,
        revision: 8,
        changed: vec![node.route(0, 1, 2)],
        ..Default::default()
    };
    controller.say(Message::Delta(lower));
    let nack = controller
        .wait_heard("nack", |said| matches!(said, Said::Nack(_)))
        .await;
    let Said::Nack(nack) = nack else {
        unreachable!()
    };
    assert!(
        nack.reason.contains("below 3") && nack.still_on_revision == 7,
        "{nack:?}"
    );
    // A gap makes it subscribe anew, and say what it serves.
    let gap = pb::Delta {
        base_revision: 9,
        revision: 10,
        ..Default::default()
    };
    controller.say(Message::Delta(gap));
    let again = controller
        .wait_heard("hello again", |said| matches!(said, Said::Hello(_)))
        .await;
    let Said::Hello(hello) = again else {
        unreachable!()
    };
    assert_eq!(hello.shards[0].epoch, 3);
    raw.send(b"GET a\r\n").await;
    raw.expect("$1\r\n1\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_shard_waits_and_goes_on_at_the_new_primary() {
    let (old, new) = (Node::start_with_epoch(1), Node::start());
    let route = old.route(0, 1, 1);
    let (controller, address) = Controller::start(snapshot(1, vec![route.clone()])).await;
    let data = tempfile::tempdir().unwrap();
    let arguments = ["--controller", &address.to_string(), "--workers", "2"];
    let proxy = Proxy::start(data.path(), &arguments).await;
    controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
    let mut raw = Raw::connect(proxy.address).await;
    raw.send(b"SET a 1\r\n").await;
    raw.expect("+OK\r\n").await;
    controller.change(hold(&route, &new, 10_000));
    controller.wait_level("s0", pb::HoldLevel::Held, 1).await;
    raw.send(b"SET a 2\r\nGET a\r\n").await;
    assert!(raw.is_silent().await);
    controller.change(new.route(0, 1, 2));
    assert!(raw.is_silent().await, "epoch 2 was not granted yet");
    new.grant(2);
    raw.expect("+OK\r\n$1\r\n2\r\n").await;
    controller.wait_level("s0", pb::HoldLevel::Applied, 2).await;
    assert!(old.admin(&["GET", "a"]).starts_with("$1\r\n1"));
}

/// The whole of a switchover as agents do it, there and back, under writers and readers.
#[tokio::test(flavor = "multi_thread")]
async fn writers_notice_nothing_of_ten_switchovers() {
    let nodes = Arc::new([Node::start_with_epoch(1), Node::start()]);
    nodes[1].replicate(&nodes[0]);
    let route = nodes[0].route(0, 1, 1);
    let (controller, address) = Controller::start(snapshot(1, vec![route])).await;
    let data = tempfile::tempdir().unwrap();
    let arguments = ["--controller", &address.to_string(), "--workers", "2"];
    let proxy = Proxy::start(data.path(), &arguments).await;
    controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
    let stop = Arc::new(AtomicBool::new(false));
    let longest_us = Arc::new(AtomicU64::new(0));
    let mut writers = tokio::task::JoinSet::new();
    for id in 0..6 {
        writers.spawn(write_until(
            proxy.address,
            id,
            Arc::clone(&stop),
            Arc::clone(&longest_us),
        ));
    }
    for round in 0..10_u64 {
        tokio::time::sleep(Duration::from_millis(30)).await; // traffic between the switchovers
        let (epoch, held) = (round + 1, round % 3 != 2); // sometimes without a hold: a laggard
        let (from, to) = ((round % 2) as usize, ((round + 1) % 2) as usize);
        nodes[to].wait_link().await;
        if held {
            let route = nodes[from].route(0, 1, epoch);
            controller.change(hold(&route, &nodes[to], 5_000));
            controller
                .wait_level("s0", pb::HoldLevel::Held, epoch)
                .await;
        }
        let shared = Arc::clone(&nodes);
        let moved =
            tokio::task::spawn_blocking(move || fail_over(&shared[from], &shared[to], epoch));
        moved.await.unwrap();
        controller.change(nodes[to].route(0, 1, epoch + 1));
        nodes[to].grant(epoch + 1);
        controller
            .wait_level("s0", pb::HoldLevel::Applied, epoch + 1)
            .await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = 0;
    while let Some(ended) = writers.join_next().await {
        acknowledged += ended.unwrap();
    }
    let total: u64 = (0..6)
        .map(|id| {
            let reply = nodes[0].admin(&["GET", &format!("n{id}")]);
            reply.lines().nth(1).unwrap().parse::<u64>().unwrap()
        })
        .sum();
    assert_eq!(
        total, acknowledged,
        "each acknowledged increment happened exactly once"
    );
    assert!(acknowledged > 60, "only {acknowledged} increments");
    let longest_ms = longest_us.load(Ordering::Relaxed) / 1000;
    assert!(longest_ms < 2_000, "a client waited for {longest_ms} ms");
}

/// Fence, then move the role, as the agent of the old primary does.
fn fail_over(from: &Node, to: &Node, epoch: u64) {
    // The replica says that it is linked a moment before its primary knows.
    from.wait_info("state=online");
    from.fence(epoch);
    let port = to.address.port().to_string();
    assert_eq!(
        from.admin(&["FAILOVER", "TO", "127.0.0.1", &port, "TIMEOUT", "4000"]),
        "+OK\r\n"
    );
    to.acknowledge_until_primary();
}

/// Writes pipelines of increments, reads and transactions; panics at any reply that one Redis would
/// not have given. Returns how many increments were acknowledged.
async fn write_until(
    proxy: std::net::SocketAddr,
    id: u64,
    stop: Arc<AtomicBool>,
    longest_us: Arc<AtomicU64>,
) -> u64 {
    let mut raw = Raw::connect(proxy).await;
    let mut value = 0_u64;
    let depth = if id.is_multiple_of(2) { 1 } else { 8 };
    while !stop.load(Ordering::Relaxed) {
        let (mut sent, mut want) = (String::new(), String::new());
        for n in 0..depth {
            value += 1;
            match (id + n) % 3 {
                0 => {
                    sent += &format!("INCR n{id}\r\n");
                    want += &format!(":{value}\r\n");
                }
                1 => {
                    let script = "return redis.pcall('incr',KEYS[1])";
                    sent += &format!("EVAL \"{script}\" 1 n{id}\r\n");
                    want += &format!(":{value}\r\n");
                }
                _ => {
                    sent += &format!("MULTI\r\nINCR n{id}\r\nEXEC\r\n");
                    want += &format!("+OK\r\n+QUEUED\r\n*1\r\n:{value}\r\n");
                }
            }
            sent += &format!("GET n{id}\r\n");
            want += &format!("${}\r\n{value}\r\n", value.to_string().len());
        }
        let began = Instant::now();
        raw.send(sent.as_bytes()).await;
        raw.expect(&want).await;
        longest_us.fetch_max(began.elapsed().as_micros() as u64, Ordering::Relaxed);
    }
    value
}
