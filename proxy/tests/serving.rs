//! The proxy before real nodes, started from a saved topology.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::sync::Arc;

use support::node::{Node, snapshot};
use support::raw::Raw;
use support::{Proxy, wait_for};

struct Fixture {
    nodes: Vec<Node>,
    proxy: Proxy,
    _data: tempfile::TempDir,
}

async fn fixture(shards: u32, arguments: &[&str]) -> Fixture {
    let nodes: Vec<Node> = (0..shards).map(|_| Node::start_with_epoch(1)).collect();
    let data = tempfile::tempdir().unwrap();
    let routes = (0..shards)
        .map(|i| nodes[i as usize].route(i, shards, 1))
        .collect();
    slotmesh_proxy::saved::save(data.path(), &snapshot(1, routes)).unwrap();
    let proxy = Proxy::start(data.path(), arguments).await;
    Fixture {
        nodes,
        proxy,
        _data: data,
    }
}

impl Fixture {
    async fn redis(&self, protocol: &str) -> redis::aio::MultiplexedConnection {
        let url = format!("redis://{}/?protocol={protocol}", self.proxy.address);
        let client = redis::Client::open(url).unwrap();
        client.get_multiplexed_async_connection().await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_client_gets_right_answers_in_both_protocols() {
    let fixture = fixture(3, &["--workers", "2"]).await;
    for protocol in ["resp2", "resp3"] {
        let mut redis = fixture.redis(protocol).await;
        let keys: Vec<String> = (0..200).map(|n| format!("{protocol}:{n}")).collect();
        let mut pipe = redis::pipe();
        for (n, key) in keys.iter().enumerate() {
            pipe.set(key, n).ignore();
        }
        pipe.query_async::<()>(&mut redis).await.unwrap();
        let mut mget = redis::cmd("MGET");
        mget.arg(keys.iter().rev().collect::<Vec<_>>());
        let values: Vec<usize> = mget.query_async(&mut redis).await.unwrap();
        assert!(values.into_iter().eq((0..200).rev()));
        let mut del = redis::cmd("DEL");
        del.arg(&keys);
        assert_eq!(del.query_async::<usize>(&mut redis).await.unwrap(), 200);
        let mut hash = redis::pipe();
        hash.atomic().hset("h", "a", 1).ignore().hgetall("h");
        let (map,): (std::collections::BTreeMap<String, u8>,) =
            hash.query_async(&mut redis).await.unwrap();
        assert_eq!(map.get("a"), Some(&1));
        let script = redis::Script::new("return redis.call('incrby', KEYS[1], ARGV[1])");
        let sum: i64 = script
            .key("n")
            .arg(5)
            .invoke_async(&mut redis)
            .await
            .unwrap();
        assert!(sum % 5 == 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_pass_and_a_slow_reader_delays_nobody() {
    let fixture = fixture(2, &["--workers", "1"]).await;
    let mut redis = fixture.redis("resp2").await;
    let big = vec![b'x'; 5_000_000];
    redis::cmd("SET")
        .arg("big")
        .arg(&big)
        .query_async::<()>(&mut redis)
        .await
        .unwrap();
    let mut slow = Raw::connect(fixture.proxy.address).await;
    for _ in 0..20 {
        slow.send(b"*2\r\n$3\r\nGET\r\n$3\r\nbig\r\n").await; // and reads nothing yet
    }
    for n in 0..50 {
        let got: usize = redis::cmd("INCR")
            .arg("n")
            .query_async(&mut redis)
            .await
            .unwrap();
        assert_eq!(got, n + 1);
    }
    let reply = format!("$5000000\r\n{}\r\n", "x".repeat(5_000_000));
    for _ in 0..20 {
        slow.expect(&reply).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_closed_client_still_gets_its_answers() {
    use tokio::io::AsyncWriteExt as _;
    let fixture = fixture(2, &["--workers", "1"]).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    let commands = "SET a 1\r\nSET b 2\r\nGET a\r\nGET b\r\n".repeat(50);
    raw.send(commands.as_bytes()).await;
    raw.stream.shutdown().await.unwrap();
    let want = "+OK\r\n+OK\r\n$1\r\n1\r\n$1\r\n2\r\n".repeat(50);
    assert_eq!(raw.rest().await, want);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_above_the_bound_is_told_so() {
    let fixture = fixture(1, &["--max-clients", "1"]).await;
    let mut first = Raw::connect(fixture.proxy.address).await;
    first.send(b"PING\r\n").await;
    first.expect("+PONG\r\n").await;
    let mut second = Raw::connect(fixture.proxy.address).await;
    assert_eq!(
        second.rest().await,
        "-ERR max number of clients reached\r\n"
    );
    drop(first);
    let address = fixture.proxy.address;
    let accepted = wait_for("room for a client again", || {
        std::net::TcpStream::connect(address).ok().filter(|stream| {
            use std::io::{Read as _, Write as _};
            let mut stream = stream;
            let mut reply = [0; 7];
            stream.write_all(b"PING\r\n").is_ok()
                && stream.read_exact(&mut reply).is_ok()
                && &reply == b"+PONG\r\n"
        })
    });
    accepted.await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_proxy_gets_its_port_back_and_serves_without_a_controller() {
    let fixture = fixture(1, &[]).await;
    let address = fixture.proxy.address.to_string();
    let mut raw = Raw::connect(fixture.proxy.address).await;
    raw.send(b"SET a 1\r\n").await;
    raw.expect("+OK\r\n").await;
    let Fixture {
        nodes,
        mut proxy,
        _data: data,
    } = fixture;
    proxy.stop();
    (&mut proxy.task).await.unwrap().unwrap();
    assert_eq!(raw.rest().await, "");
    let again = Proxy::start(data.path(), &["--listen", &address]).await;
    let mut raw = Raw::connect(again.address).await;
    raw.send(b"GET a\r\n").await;
    raw.expect("$1\r\n1\r\n").await;
    drop(nodes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_node_costs_a_wait_and_no_error_for_reads() {
    let mut fixture = fixture(1, &["--workers", "1"]).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    raw.send(b"SET a 1\r\n").await;
    raw.expect("+OK\r\n").await;
    let address = fixture.nodes[0].address;
    fixture.nodes.clear();
    raw.send(b"GET a\r\n").await;
    assert!(raw.is_silent().await);
    let revived = wait_for("the node's port", || {
        std::net::TcpListener::bind(address).ok().map(drop)
    });
    revived.await;
    let node = tokio::task::spawn_blocking(move || Node::start_at(address))
        .await
        .unwrap();
    node.grant(1);
    raw.expect("$-1\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelines_of_many_clients_keep_their_order_over_shards_and_pieces() {
    let fixture = Arc::new(fixture(3, &["--workers", "2"]).await);
    let mut clients = tokio::task::JoinSet::new();
    for id in 0..16 {
        let fixture = Arc::clone(&fixture);
        clients.spawn(async move {
            let mut raw = Raw::connect(fixture.proxy.address).await;
            let (mut sent, mut want) = (Vec::new(), String::new());
            for n in 1..=300 {
                for key in 0..5 {
                    sent.extend(format!("INCR c{id}:{key}\r\n").into_bytes());
                    want += &format!(":{n}\r\n");
                }
                sent.extend(format!("MGET c{id}:0 c{id}:1 c{id}:2\r\nPING\r\n").into_bytes());
                let value = format!("${}\r\n{n}\r\n", n.to_string().len());
                want += &format!("*3\r\n{}+PONG\r\n", value.repeat(3));
            }
            let (mut read, mut write) = raw.stream.split();
            let writing = async {
                use tokio::io::AsyncWriteExt as _;
                for piece in sent.chunks(37 + id * 11) {
                    write.write_all(piece).await.unwrap();
                }
            };
            let reading = async {
                use tokio::io::AsyncReadExt as _;
                let mut got = vec![0; want.len()];
                read.read_exact(&mut got).await.unwrap();
                assert!(got == want.as_bytes(), "client {id}");
            };
            tokio::join!(writing, reading);
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_resets_before_its_replies_come_is_let_go() {
    let fixture = fixture(1, &["--workers", "1", "--max-clients", "2"]).await;
    let mut busy = Raw::connect(fixture.proxy.address).await;
    busy.send(format!("SET k {}\r\n", "x".repeat(20_000)).as_bytes())
        .await;
    busy.expect("+OK\r\n").await;
    // What follows on the node's connection waits for this.
    busy.send(b"EVAL \"local e = 0 for i = 1, 20000000 do e = e + i end return 1\" 1 k\r\n")
        .await;
    let mut dying = Raw::connect(fixture.proxy.address).await;
    // More than may be in flight, so that it is not read when the reset comes.
    let mut all = b"PING\r\n".to_vec();
    all.extend(b"GET k\r\n".repeat(1_500));
    dying.send(&all).await;
    dying.expect("+PONG\r\n").await;
    let socket = socket2::SockRef::from(&dying.stream);
    socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(dying);
    busy.expect(":1\r\n").await;
    let deadline = std::time::Instant::now() + support::LIMIT;
    loop {
        let mut next = Raw::connect(fixture.proxy.address).await;
        next.send(b"PING\r\nQUIT\r\n").await;
        let replies = next.rest().await;
        if replies == "+PONG\r\n+OK\r\n" {
            break;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "waited for the place of the client that left: {replies}"
        );
    }
}
