//! MONITOR, IMONITOR and RIMONITOR through the proxy, before real nodes.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use slotmesh_proto::topology::v1 as pb;
use support::Proxy;
use support::node::{Node, snapshot};
use support::raw::Raw;

struct Fixture {
    nodes: Vec<Node>,
    replica: Node,
    proxy: Proxy,
    _data: tempfile::TempDir,
}

/// Shards of one node each, but for the first, which has a replica.
async fn fixture(shards: u32) -> Fixture {
    let nodes: Vec<Node> = (0..shards).map(|_| Node::start_with_epoch(1)).collect();
    let replica = Node::start();
    replica.replicate(&nodes[0]);
    let data = tempfile::tempdir().unwrap();
    let mut routes: Vec<_> = (0..shards)
        .map(|i| nodes[i as usize].route(i, shards, 1))
        .collect();
    routes[0].replicas.push(pb::Replica {
        node_id: "r0".to_owned(),
        address: replica.address.to_string(),
    });
    slotmesh_proxy::saved::save(data.path(), &snapshot(1, routes)).unwrap();
    let proxy = Proxy::start(data.path(), &["--workers", "2"]).await;
    Fixture {
        nodes,
        replica,
        proxy,
        _data: data,
    }
}

/// Lines of a monitoring client up to one that contains `last`.
async fn lines_until(raw: &mut Raw, last: &str) -> Vec<String> {
    let mut text = String::new();
    loop {
        text += &raw.some().await;
        if text.ends_with("\r\n") && text.contains(last) {
            return text.lines().map(str::to_owned).collect();
        }
    }
}

fn commands(lines: &[String], proxy: u16) -> Vec<String> {
    let from = format!(" proxy:{proxy}] ");
    let command = |line: &String| {
        assert!(line.starts_with('+'), "{line}");
        let (head, command) = line.split_once(&from).unwrap_or_else(|| panic!("{line}"));
        assert!(head.contains(" ["), "{line}");
        command.to_owned()
    };
    lines.iter().map(command).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn monitors_see_what_all_nodes_execute_and_no_inner_address() {
    let fixture = fixture(3).await;
    let mut monitors = Vec::new();
    for _ in 0..4 {
        let mut raw = Raw::connect(fixture.proxy.address).await;
        raw.send(b"MONITOR\r\n").await;
        raw.expect("+OK\r\n").await;
        monitors.push(raw);
    }
    for node in &fixture.nodes {
        let list = node.admin(&["CLIENT", "LIST"]);
        assert!((1..=2).contains(&list.matches("flags=O").count()), "{list}");
    }
    let mut client = Raw::connect(fixture.proxy.address).await;
    for n in 0..10 {
        client
            .send(format!("SELECT 3\r\nSET key{n} \"a b\"\r\nPING\r\n").as_bytes())
            .await;
        client.expect("+OK\r\n+OK\r\n+PONG\r\n").await;
    }
    client.send(b"SET last x\r\n").await;
    for raw in &mut monitors {
        let mut seen = Vec::new();
        while seen.len() < 11 {
            let lines = lines_until(raw, "\"").await;
            seen.extend(commands(&lines, fixture.proxy.address.port()));
        }
        seen.sort();
        let mut wanted: Vec<_> = (0..10)
            .map(|n| format!("\"SET\" \"key{n}\" \"a b\""))
            .collect();
        wanted.push("\"SET\" \"last\" \"x\"".to_owned());
        wanted.sort();
        assert_eq!(seen, wanted);
    }
    // RESET ends it.
    let mut first = monitors.remove(0);
    first.send(b"GET a\r\nRESET\r\nGET nothing\r\n").await;
    first
        .expect("-ERR Replica can't interact with the keyspace\r\n+RESET\r\n$-1\r\n")
        .await;
    assert!(first.is_silent().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_shard_and_one_replica_can_be_watched_by_index() {
    let fixture = fixture(3).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    raw.send(b"IMONITOR 3\r\nIMONITOR -1\r\nRIMONITOR 0 1\r\nRIMONITOR 1 0\r\nIMONITOR x\r\n")
        .await;
    raw.expect(&"-ERR no such db node\r\n".repeat(4)).await;
    raw.expect("-ERR value is not an integer or out of range\r\n")
        .await;
    let mut replica = Raw::connect(fixture.proxy.address).await;
    replica.send(b"RIMONITOR 0 0\r\n").await;
    replica.expect("+OK\r\n").await;
    raw.send(b"IMONITOR 0\r\n").await;
    raw.expect("+OK\r\n").await;
    let mut client = Raw::connect(fixture.proxy.address).await;
    // Slots of the third, the second and the first shard.
    client
        .send(b"SET foo 1\r\nSET key1 3\r\nSET {user1000}x 2\r\n")
        .await;
    client.expect("+OK\r\n+OK\r\n+OK\r\n").await;
    for raw in [&mut raw, &mut replica] {
        let lines = lines_until(raw, "user1000").await.join("\n");
        assert!(!lines.contains("foo") && !lines.contains("key1"), "{lines}");
        assert!(!lines.contains("127.0.0.1"), "{lines}");
    }
    let list = fixture.replica.admin(&["CLIENT", "LIST"]);
    assert_eq!(list.matches("user=observer").count(), 1, "{list}");
}
