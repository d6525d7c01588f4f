//! CLIENT and CLUSTER: what a proxy says about its clients and itself.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use support::Proxy;
use support::node::{Node, snapshot};
use support::raw::Raw;

struct Fixture {
    proxy: Proxy,
    _nodes: Vec<Node>,
    _data: tempfile::TempDir,
}

async fn fixture(shards: u32) -> Fixture {
    let nodes: Vec<Node> = (0..shards).map(|_| Node::start_with_epoch(1)).collect();
    let data = tempfile::tempdir().unwrap();
    let routes = (0..shards)
        .map(|i| nodes[i as usize].route(i, shards, 1))
        .collect();
    slotmesh_proxy::saved::save(data.path(), &snapshot(1, routes)).unwrap();
    // Several workers: what one says must hold for all.
    let proxy = Proxy::start(data.path(), &["--workers", "3"]).await;
    Fixture {
        proxy,
        _nodes: nodes,
        _data: data,
    }
}

impl Fixture {
    async fn raw(&self) -> Raw {
        Raw::connect(self.proxy.address).await
    }

    /// A client with a name, and its id.
    async fn named(&self, name: &str) -> (Raw, u64) {
        let mut raw = self.raw().await;
        raw.send(format!("CLIENT SETNAME {name}\r\nCLIENT ID\r\n").as_bytes())
            .await;
        raw.expect("+OK\r\n:").await;
        let id = raw.line().await.parse().unwrap();
        (raw, id)
    }
}

async fn talk(raw: &mut Raw, lines: &[(&str, &str)]) {
    for (line, want) in lines {
        raw.send(format!("{line}\r\n").as_bytes()).await;
        raw.expect(&format!("{want}\r\n")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_list_and_kill_reach_clients_of_every_worker() {
    let fixture = fixture(1).await;
    let mut clients = Vec::new();
    for n in 0..6 {
        clients.push(fixture.named(&format!("c{n}")).await);
    }
    let (mut asker, own_id) = fixture.named("asker").await;
    asker.send(b"CLIENT LIST\r\n").await;
    let list = asker.bulk().await;
    assert_eq!(list.lines().count(), 7, "{list}");
    for n in 0..6 {
        assert!(list.contains(&format!(" name=c{n} ")), "{list}");
    }
    let own = list
        .lines()
        .find(|line| line.contains("name=asker"))
        .unwrap();
    assert!(
        own.contains(" cmd=client|list user=default redir=-1 resp=2"),
        "{own}"
    );
    let (a, b) = (clients[2].1, clients[4].1);
    asker
        .send(format!("CLIENT LIST ID {a} {b}\r\n").as_bytes())
        .await;
    assert_eq!(asker.bulk().await.lines().count(), 2);
    talk(
        &mut asker,
        &[
            (&format!("CLIENT KILL ID {a}"), ":1"),
            (&format!("CLIENT KILL ID {a}"), ":0"),
            ("CLIENT KILL 1.2.3.4:5", "-ERR No such client"),
            (&format!("CLIENT KILL ID {own_id}"), ":0"),
            ("CLIENT KILL TYPE normal SKIPME yes", ":5"),
        ],
    )
    .await;
    for (mut raw, _) in clients {
        assert_eq!(raw.rest().await, "", "it was closed");
    }
    // A client may end itself, and still gets its answer.
    talk(
        &mut asker,
        &[(&format!("CLIENT KILL ID {own_id} SKIPME no"), ":1")],
    )
    .await;
    assert_eq!(asker.rest().await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_that_are_not_wanted_are_not_sent() {
    let fixture = fixture(2).await;
    let mut raw = fixture.raw().await;
    raw.send(b"CLIENT REPLY OFF\r\nSET a 1\r\nSET b 2\r\nPING\r\nMGET a b\r\nDBSIZE\r\nNONSENSE\r\nCLIENT REPLY ON\r\nMGET a b\r\n").await;
    raw.expect("+OK\r\n*2\r\n$1\r\n1\r\n$1\r\n2\r\n").await;
    raw.send(b"CLIENT REPLY SKIP\r\nSET a 3\r\nGET a\r\nCLIENT REPLY SKIP\r\nPING\r\nPING x\r\n")
        .await;
    raw.expect("$1\r\n3\r\n$1\r\nx\r\n").await;
    talk(&mut raw, &[("CLIENT REPLY maybe", "-ERR syntax error")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_holds_writes_or_everything_of_every_worker_and_ends() {
    let fixture = fixture(2).await;
    let mut others = Vec::new();
    for n in 0..3 {
        others.push(fixture.named(&format!("c{n}")).await.0);
    }
    let mut operator = fixture.raw().await;
    talk(&mut operator, &[("CLIENT PAUSE 60000 WRITE", "+OK")]).await;
    for raw in &mut others {
        raw.send(b"GET k\r\nSET k 1\r\nGET k\r\n").await;
        raw.expect("$-1\r\n").await;
        assert!(raw.is_silent().await, "its write waits");
    }
    talk(&mut operator, &[("CLIENT UNPAUSE", "+OK")]).await;
    for raw in &mut others {
        raw.expect("+OK\r\n$1\r\n1\r\n").await;
    }
    talk(
        &mut operator,
        &[("CLIENT PAUSE 100", "+OK"), ("PING", "+PONG")],
    )
    .await;
    talk(
        &mut operator,
        &[("CLIENT PAUSE -1", "-ERR timeout is negative")],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_client_finds_every_slot_here_and_no_inner_address() {
    let fixture = fixture(3).await;
    let mut raw = fixture.raw().await;
    let port = fixture.proxy.address.port();
    raw.send(b"CLUSTER SLOTS\r\n").await;
    raw.expect(&format!(
        "*3\r\n*3\r\n:0\r\n:5460\r\n*4\r\n$9\r\n127.0.0.1\r\n:{port}\r\n$40\r\n"
    ))
    .await;
    let mut raw = fixture.raw().await;
    raw.send(b"CLUSTER NODES\r\n").await;
    let nodes = raw.bulk().await;
    assert_eq!(nodes.lines().count(), 3, "one for each shard, all here");
    let here = format!(" 127.0.0.1:{port}@");
    assert!(nodes.lines().all(|line| line.contains(&here)), "{nodes}");
    assert!(
        nodes.contains(" 0-5460\n") && nodes.ends_with("-16383\n"),
        "{nodes}"
    );
    talk(
        &mut raw,
        &[
            ("CLUSTER KEYSLOT foo", ":12182"),
            ("SET foo 1", "+OK"),
            ("SET {foo}bar 1", "+OK"),
            ("SET other 1", "+OK"),
            ("CLUSTER COUNTKEYSINSLOT 12182", ":2"),
            (
                "CLUSTER COUNTKEYSINSLOT 16384",
                "-ERR Invalid or out of range slot",
            ),
            ("CLUSTER GETKEYSINSLOT 12182 0", "*0"),
            ("READONLY", "+OK"),
            ("ROLE", "*3\r\n$6\r\nmaster\r\n:0\r\n*0"),
        ],
    )
    .await;
    raw.send(b"CLUSTER GETKEYSINSLOT 12182 1\r\n").await;
    raw.expect("*1\r\n$").await;
}
