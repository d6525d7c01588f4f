//! Pub/Sub through the proxy, before real nodes: what clients see is what one Redis shows them, and
//! what nodes see is one connection for each worker.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use slotmesh_proto::topology::v1 as pb;
use support::controller::Controller;
use support::node::{ADMIN, Node, snapshot};
use support::raw::Raw;
use support::{Proxy, wait_for};

struct Fixture {
    nodes: Vec<Node>,
    proxy: Proxy,
    _data: tempfile::TempDir,
}

async fn fixture(shards: u32, workers: u32, parameters: &[(&str, &str)]) -> Fixture {
    let nodes: Vec<Node> = (0..shards).map(|_| Node::start_with_epoch(1)).collect();
    let data = tempfile::tempdir().unwrap();
    let routes = (0..shards)
        .map(|i| nodes[i as usize].route(i, shards, 1))
        .collect();
    let mut snapshot = snapshot(1, routes);
    let settings = snapshot.settings.as_mut().unwrap();
    settings.proxy_parameters = parameters
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    slotmesh_proxy::saved::save(data.path(), &snapshot).unwrap();
    let proxy = Proxy::start(data.path(), &["--workers", &workers.to_string()]).await;
    Fixture {
        nodes,
        proxy,
        _data: data,
    }
}

/// What a client gets that sends these commands one after the other.
async fn talk(raw: &mut Raw, commands: &[&str]) -> Vec<String> {
    let mut all = Vec::new();
    for command in commands {
        raw.send(format!("{command}\r\n").as_bytes()).await;
        all.push(format!("{command} -> {}", raw.heard().await));
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_are_redis_s_own_byte_for_byte() {
    let fixture = fixture(3, 2, &[]).await;
    let direct = Node::start();
    let resp2 = [
        "SUBSCRIBE",
        "SUBSCRIBE a b a",
        "PSUBSCRIBE x* x",
        "SSUBSCRIBE s",
        "SUBSCRIBE __keyspace@0__:foo",
        "GET a",
        "CLIENT ID",
        "FOO",
        "PING",
        "PING hi",
        "UNSUBSCRIBE zz a",
        "UNSUBSCRIBE __keyspace@0__:foo",
        "PUNSUBSCRIBE x",
        "SUNSUBSCRIBE",
        "SUNSUBSCRIBE",
        "UNSUBSCRIBE",
        "PUNSUBSCRIBE",
        "UNSUBSCRIBE",
        "GET a",
        "PING",
        "SUBSCRIBE a",
        "RESET",
    ];
    let resp3 = [
        "HELLO 3",
        "SUBSCRIBE a b a",
        "GET a",
        "PING",
        "PSUBSCRIBE a*",
        "UNSUBSCRIBE zz a",
        "UNSUBSCRIBE",
        "UNSUBSCRIBE",
        "PUBSUB NUMSUB",
        "PUBSUB NUMSUB a b",
        "PUBSUB CHANNELS",
        "PUBSUB NUMPAT",
        "PUBSUB FOO",
        "PUBSUB CHANNELS a b",
        "SSUBSCRIBE s",
        "PUBSUB SHARDCHANNELS",
        "PUBSUB SHARDNUMSUB s t",
        "CLIENT REPLY OFF",
        "SUBSCRIBE q",
        "UNSUBSCRIBE q",
    ];
    for commands in [&resp2[..], &resp3[..]] {
        let mut one = Raw::connect(direct.address).await;
        one.send(format!("AUTH admin {ADMIN}\r\n").as_bytes()).await;
        one.expect("+OK\r\n").await;
        let mut other = Raw::connect(fixture.proxy.address).await;
        let (want, got) = (
            talk(&mut one, commands).await,
            talk(&mut other, commands).await,
        );
        for (want, got) in want.iter().zip(&got) {
            let differs = ["HELLO", "CLIENT ID"]
                .iter()
                .any(|word| want.starts_with(word));
            assert!(want == got || differs, "redis: {want}\nproxy: {got}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_reach_every_subscriber_and_are_counted_as_one_redis_counts() {
    let fixture = fixture(3, 2, &[]).await;
    let mut listeners = Vec::new();
    for n in 0..20 {
        let mut raw = Raw::connect(fixture.proxy.address).await;
        if n % 2 == 1 {
            raw.send(b"HELLO 3\r\n").await;
            raw.heard().await;
        }
        raw.send(b"SUBSCRIBE news\r\nPSUBSCRIBE n*s\r\n").await;
        let kind = if n % 2 == 1 { '>' } else { '*' };
        raw.expect(&format!(
            "{kind}3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n{kind}3\r\n$10\r\npsubscribe\r\n$3\r\nn*s\r\n:2\r\n"
        ))
        .await;
        listeners.push((raw, kind));
    }
    let mut publisher = Raw::connect(fixture.proxy.address).await;
    publisher
        .send(b"PUBLISH news hello\r\nPUBLISH other y\r\n")
        .await;
    publisher.expect(":40\r\n:0\r\n").await;
    for (raw, kind) in &mut listeners {
        raw.expect(&format!(
            "{kind}3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$5\r\nhello\r\n\
             {kind}4\r\n$8\r\npmessage\r\n$3\r\nn*s\r\n$4\r\nnews\r\n$5\r\nhello\r\n"
        ))
        .await;
    }
    publisher.send(b"PUBLISH nas x\r\n").await; // of another shard
    publisher.expect(":20\r\n").await;
    for (raw, kind) in &mut listeners {
        raw.expect(&format!(
            "{kind}4\r\n$8\r\npmessage\r\n$3\r\nn*s\r\n$3\r\nnas\r\n$1\r\nx\r\n"
        ))
        .await;
    }
    publisher
        .send(b"PUBSUB NUMSUB news other\r\nPUBSUB NUMPAT\r\nPUBSUB CHANNELS\r\n")
        .await;
    publisher
        .expect("*4\r\n$4\r\nnews\r\n:20\r\n$5\r\nother\r\n:0\r\n:1\r\n*1\r\n$4\r\nnews\r\n")
        .await;
    // One connection for each worker, on each node.
    for node in &fixture.nodes {
        let list = node.admin(&["CLIENT", "LIST", "TYPE", "pubsub"]);
        assert_eq!(list.matches("user=observer").count(), 2, "{list}");
    }
    drop(listeners);
    for node in &fixture.nodes {
        wait_for("the subscriptions to end", || {
            let list = node.admin(&["PUBSUB", "CHANNELS"]) + &node.admin(&["PUBSUB", "NUMPAT"]);
            (list == "*0\r\n:0\r\n").then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_follows_a_confirmation_is_never_missed() {
    let fixture = fixture(3, 2, &[]).await;
    let mut publisher = Raw::connect(fixture.proxy.address).await;
    for n in 0..200 {
        let mut raw = Raw::connect(fixture.proxy.address).await;
        let channel = format!("c{n}");
        // In a pipeline, behind a command of another shard.
        raw.send(format!("GET k{n}\r\nSUBSCRIBE {channel}\r\n").as_bytes())
            .await;
        let len = channel.len();
        raw.expect(&format!(
            "$-1\r\n*3\r\n$9\r\nsubscribe\r\n${len}\r\n{channel}\r\n:1\r\n"
        ))
        .await;
        publisher
            .send(format!("PUBLISH {channel} m\r\n").as_bytes())
            .await;
        publisher.expect(":1\r\n").await;
        raw.expect(&format!(
            "*3\r\n$7\r\nmessage\r\n${len}\r\n{channel}\r\n$1\r\nm\r\n"
        ))
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_subscribers_are_one_connection_at_the_node() {
    let fixture = fixture(1, 1, &[]).await;
    let mut clients = Vec::new();
    for _ in 0..500 {
        let mut raw = Raw::connect(fixture.proxy.address).await;
        raw.send(b"SUBSCRIBE all\r\n").await;
        clients.push(raw);
    }
    for raw in &mut clients {
        raw.expect("*3\r\n$9\r\nsubscribe\r\n$3\r\nall\r\n:1\r\n")
            .await;
    }
    let list = fixture.nodes[0].admin(&["CLIENT", "LIST", "TYPE", "pubsub"]);
    assert_eq!(list.matches("id=").count(), 1, "{list}");
    let mut publisher = Raw::connect(fixture.proxy.address).await;
    for n in 100..200 {
        publisher
            .send(format!("PUBLISH all {n}\r\n").as_bytes())
            .await;
        publisher.expect(":500\r\n").await;
    }
    for raw in &mut clients {
        for n in 100..200 {
            raw.expect(&format!(
                "*3\r\n$7\r\nmessage\r\n$3\r\nall\r\n$3\r\n{n}\r\n"
            ))
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_that_does_not_read_is_closed_and_delays_nobody() {
    let limit = ("client_output_buffer_limit_pubsub", "1000000 500000 1");
    let fixture = fixture(1, 1, &[limit]).await;
    let mut slow = Raw::connect(fixture.proxy.address).await;
    let mut quick = Raw::connect(fixture.proxy.address).await;
    for raw in [&mut slow, &mut quick] {
        raw.send(b"SUBSCRIBE big\r\n").await;
        raw.expect("*3\r\n$9\r\nsubscribe\r\n$3\r\nbig\r\n:1\r\n")
            .await;
    }
    let mut publisher = Raw::connect(fixture.proxy.address).await;
    let text = "x".repeat(100_000);
    let (mut rounds, mut receivers) = (0, 2);
    while receivers == 2 {
        assert!(rounds < 1000, "the slow one is still there");
        let frame = format!("*3\r\n$7\r\nPUBLISH\r\n$3\r\nbig\r\n$100000\r\n{text}\r\n");
        publisher.send(frame.as_bytes()).await;
        receivers = publisher.integer().await;
        quick
            .expect(&format!(
                "*3\r\n$7\r\nmessage\r\n$3\r\nbig\r\n$100000\r\n{text}\r\n"
            ))
            .await;
        rounds += 1;
    }
    let admin = support::raw::http_get(fixture.proxy.admin, "/metrics").await;
    assert!(admin.contains("closed_subscribers_total 1\n"), "{admin}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sharded_channels_of_several_slots_are_refused_by_a_cluster_only() {
    let cluster = fixture(3, 1, &[]).await;
    let mut raw = Raw::connect(cluster.proxy.address).await;
    raw.send(b"SSUBSCRIBE a b\r\nSSUBSCRIBE {a}1 {a}2\r\n")
        .await;
    raw.expect("-CROSSSLOT Keys in request don't hash to the same slot\r\n")
        .await;
    raw.expect("*3\r\n$10\r\nssubscribe\r\n$4\r\n{a}1\r\n:1\r\n")
        .await;
    raw.expect("*3\r\n$10\r\nssubscribe\r\n$4\r\n{a}2\r\n:2\r\n")
        .await;
    let mut publisher = Raw::connect(cluster.proxy.address).await;
    publisher
        .send(b"SPUBLISH {a}2 m\r\nPUBLISH {a}2 m\r\n")
        .await;
    publisher.expect(":1\r\n:0\r\n").await;
    raw.expect("*3\r\n$8\r\nsmessage\r\n$4\r\n{a}2\r\n$1\r\nm\r\n")
        .await;
    let standard = fixture(1, 1, &[]).await;
    let mut raw = Raw::connect(standard.proxy.address).await;
    raw.send(b"SSUBSCRIBE a b\r\n").await;
    raw.expect("*3\r\n$10\r\nssubscribe\r\n$1\r\na\r\n:1\r\n")
        .await;
    raw.expect("*3\r\n$10\r\nssubscribe\r\n$1\r\nb\r\n:2\r\n")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_of_keys_come_from_every_shard() {
    let fixture = fixture(3, 1, &[]).await;
    for node in &fixture.nodes {
        node.admin(&["CONFIG", "SET", "notify-keyspace-events", "KEA"]);
    }
    let mut raw = Raw::connect(fixture.proxy.address).await;
    raw.send(b"SUBSCRIBE __keyevent@0__:set\r\n").await;
    raw.heard().await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    for n in 0..20 {
        writer
            .send(format!("SET k{} x\r\n", n + 10).as_bytes())
            .await;
        writer.expect("+OK\r\n").await;
        raw.expect(&format!(
            "*3\r\n$7\r\nmessage\r\n$18\r\n__keyevent@0__:set\r\n$3\r\nk{}\r\n",
            n + 10
        ))
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_come_back_after_a_node_s_connection_is_lost() {
    let fixture = fixture(1, 1, &[]).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    raw.send(b"SUBSCRIBE a\r\nPSUBSCRIBE b*\r\n").await;
    raw.expect("*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n")
        .await;
    raw.expect("*3\r\n$10\r\npsubscribe\r\n$2\r\nb*\r\n:2\r\n")
        .await;
    fixture.nodes[0].admin(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    wait_for("the subscriptions to come back", || {
        let found = fixture.nodes[0].admin(&["PUBSUB", "NUMPAT"]);
        (found == ":1\r\n").then_some(())
    })
    .await;
    let mut publisher = Raw::connect(fixture.proxy.address).await;
    publisher.send(b"PUBLISH a 1\r\nPUBLISH bx 2\r\n").await;
    publisher.expect(":1\r\n:1\r\n").await;
    raw.expect("*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$1\r\n1\r\n")
        .await;
    raw.expect("*4\r\n$8\r\npmessage\r\n$2\r\nb*\r\n$2\r\nbx\r\n$1\r\n2\r\n")
        .await;
}

fn hold(route: &pb::ShardRoute, target: &Node) -> pb::ShardRoute {
    let hold = pb::Hold {
        task_id: "t1".to_owned(),
        target_address: target.address.to_string(),
        max_hold_ms: 10_000,
    };
    pb::ShardRoute {
        hold: Some(hold),
        ..route.clone()
    }
}

/// There and back, with and without a hold, under publishers: each acknowledged message comes once.
#[tokio::test(flavor = "multi_thread")]
async fn no_message_is_lost_or_repeated_over_six_switchovers() {
    let nodes = Arc::new([Node::start_with_epoch(1), Node::start()]);
    nodes[1].replicate(&nodes[0]);
    let route = nodes[0].route(0, 1, 1);
    let (controller, address) = Controller::start(snapshot(1, vec![route])).await;
    let data = tempfile::tempdir().unwrap();
    let arguments = ["--controller", &address.to_string(), "--workers", "2"];
    let proxy = Proxy::start(data.path(), &arguments).await;
    controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut listeners = Vec::new();
    for n in 0..6 {
        let mut raw = Raw::connect(proxy.address).await;
        let command = if n % 2 == 0 {
            "SUBSCRIBE nums"
        } else {
            "PSUBSCRIBE nu*"
        };
        raw.send(format!("{command}\r\n").as_bytes()).await;
        raw.heard().await;
        listeners.push(tokio::spawn(listen(raw)));
    }
    let mut publishers = tokio::task::JoinSet::new();
    for id in 0..4 {
        publishers.spawn(publish_until(proxy.address, id, Arc::clone(&stop)));
    }
    for round in 0..6_u64 {
        tokio::time::sleep(Duration::from_millis(50)).await; // traffic between the switchovers
        let (epoch, held) = (round + 1, round % 3 != 2);
        let (from, to) = ((round % 2) as usize, ((round + 1) % 2) as usize);
        nodes[to].wait_link().await;
        if held {
            controller.change(hold(&nodes[from].route(0, 1, epoch), &nodes[to]));
            controller
                .wait_level("s0", pb::HoldLevel::Held, epoch)
                .await;
        }
        let shared = Arc::clone(&nodes);
        tokio::task::spawn_blocking(move || {
            // The replica says that it is linked a moment before its primary knows.
            shared[from].wait_info("state=online");
            shared[from].fence(epoch);
            let port = shared[to].address.port().to_string();
            let words = ["FAILOVER", "TO", "127.0.0.1", &port, "TIMEOUT", "4000"];
            assert_eq!(shared[from].admin(&words), "+OK\r\n");
            shared[to].acknowledge_until_primary();
        })
        .await
        .unwrap();
        controller.change(nodes[to].route(0, 1, epoch + 1));
        nodes[to].grant(epoch + 1);
        controller
            .wait_level("s0", pb::HoldLevel::Applied, epoch + 1)
            .await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut sent = [0; 4];
    while let Some(ended) = publishers.join_next().await {
        let (id, count) = ended.unwrap();
        sent[id] = count;
    }
    assert!(sent.iter().sum::<u64>() > 500, "only {sent:?} messages");
    for listener in listeners {
        let heard = tokio::time::timeout(support::LIMIT, listener).await;
        let heard = heard.expect("a listener hears the last messages").unwrap();
        for (id, sent) in sent.iter().enumerate() {
            let wanted: Vec<u64> = (0..*sent).collect();
            assert!(
                heard[id] == wanted,
                "publisher {id}: {}",
                first_difference(&heard[id], &wanted)
            );
        }
    }
    let metrics = support::raw::http_get(proxy.admin, "/metrics").await;
    assert!(
        metrics.contains("subscriber_moves_forced_total 0\n"),
        "{metrics}"
    );
}

fn first_difference(heard: &[u64], wanted: &[u64]) -> String {
    let at = heard.iter().zip(wanted).position(|(a, b)| a != b);
    let at = at.unwrap_or(heard.len().min(wanted.len()));
    let near = &heard[at.saturating_sub(2)..heard.len().min(at + 3)];
    format!(
        "at {at} of {} (of {} wanted): …{near:?}…",
        heard.len(),
        wanted.len()
    )
}

async fn publish_until(
    proxy: std::net::SocketAddr,
    id: usize,
    stop: Arc<AtomicBool>,
) -> (usize, u64) {
    let mut raw = Raw::connect(proxy).await;
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        raw.send(format!("PUBLISH nums {id}:{number}\r\n").as_bytes())
            .await;
        raw.integer().await;
        number += 1;
    }
    raw.send(format!("PUBLISH nums {id}:end\r\n").as_bytes())
        .await;
    raw.integer().await;
    (id, number)
}

/// Messages of each publisher, up to the last one's end.
async fn listen(mut raw: Raw) -> [Vec<u64>; 4] {
    let mut heard: [Vec<u64>; 4] = Default::default();
    let mut ends = 0;
    let mut kept = String::new();
    while ends < 4 {
        kept += &raw.some().await;
        while let Some((message, rest)) = next_message(&kept) {
            let (id, number) = message.split_once(':').unwrap();
            match number.parse() {
                Ok(number) => heard[id.parse::<usize>().unwrap()].push(number),
                Err(_) => ends += 1,
            }
            kept = rest;
        }
    }
    heard
}

/// The payload of the first message, and what follows.
fn next_message(text: &str) -> Option<(String, String)> {
    let mut lines = text.split("\r\n");
    let members: usize = lines.next()?.strip_prefix('*')?.parse().ok()?;
    let payload = lines.nth(members * 2 - 1)?.to_owned();
    let used: usize = text
        .split("\r\n")
        .take(1 + members * 2)
        .map(|line| line.len() + 2)
        .sum();
    let rest = text.get(used..)?.to_owned();
    Some((payload, rest))
}
