//! SCAN, RANDOMKEY and commands that name a shard by its index.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redis::Value;
use support::Proxy;
use support::node::{Node, snapshot};

struct Fixture {
    nodes: Vec<Node>,
    proxy: Proxy,
    _data: tempfile::TempDir,
}

async fn fixture(shards: u32, workers: &str) -> Fixture {
    let nodes: Vec<Node> = (0..shards).map(|_| Node::start_with_epoch(1)).collect();
    let (proxy, data) = proxy_before(&nodes, workers).await;
    Fixture {
        nodes,
        proxy,
        _data: data,
    }
}

async fn proxy_before(nodes: &[Node], workers: &str) -> (Proxy, tempfile::TempDir) {
    let data = tempfile::tempdir().unwrap();
    let shards = nodes.len() as u32;
    let routes = (0..shards)
        .map(|i| nodes[i as usize].route(i, shards, 1))
        .collect();
    slotmesh_proxy::saved::save(data.path(), &snapshot(1, routes)).unwrap();
    let proxy = Proxy::start(data.path(), &["--workers", workers]).await;
    (proxy, data)
}

async fn connect(proxy: &Proxy, protocol: &str) -> redis::aio::MultiplexedConnection {
    let url = format!("redis://{}/?protocol={protocol}", proxy.address);
    let client = redis::Client::open(url).unwrap();
    client.get_multiplexed_async_connection().await.unwrap()
}

async fn ask<T: redis::FromRedisValue>(
    redis: &mut redis::aio::MultiplexedConnection,
    words: &str,
) -> T {
    let result = try_ask(redis, words).await;
    result.unwrap_or_else(|error| panic!("{words}: {error}"))
}

async fn try_ask<T: redis::FromRedisValue>(
    redis: &mut redis::aio::MultiplexedConnection,
    words: &str,
) -> redis::RedisResult<T> {
    let mut words = words.split(' ');
    let mut command = redis::cmd(words.next().unwrap());
    for word in words {
        command.arg(word);
    }
    command.query_async(redis).await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_key_that_stays_is_found_while_others_come_and_go_at_any_proxy() {
    let fixture = fixture(3, "1").await;
    let (second, _data) = proxy_before(&fixture.nodes, "1").await;
    let mut redis = connect(&fixture.proxy, "resp2").await;
    let mut pipe = redis::pipe();
    for n in 0..5_000 {
        pipe.set(format!("stays:{n}"), n).ignore();
    }
    pipe.query_async::<()>(&mut redis).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writing = {
        let (stop, mut redis) = (Arc::clone(&stop), redis.clone());
        tokio::spawn(async move {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                // Tables grow and shrink while they are walked.
                let mut pipe = redis::pipe();
                for n in n..n + 500 {
                    pipe.set(format!("comes:{n}"), n).ignore();
                }
                if n >= 1_000 {
                    for n in n - 1_000..n - 500 {
                        pipe.del(format!("comes:{n}")).ignore();
                    }
                }
                pipe.query_async::<()>(&mut redis).await.unwrap();
                n += 500;
            }
        })
    };
    let mut other = connect(&second, "resp3").await;
    for count in ["7", "10", "1000"] {
        let (mut cursor, mut found, mut turn) = ("0".to_owned(), BTreeSet::new(), 0);
        loop {
            turn += 1;
            let at = if turn % 2 == 0 {
                &mut redis
            } else {
                &mut other
            };
            let scan = format!("SCAN {cursor} MATCH stays:* COUNT {count}");
            let (next, keys): (String, Vec<String>) = ask(at, &scan).await;
            found.extend(keys);
            cursor = next;
            assert!(cursor.parse::<u64>().unwrap() < 1 << 53, "{cursor}");
            if cursor == "0" {
                break;
            }
        }
        assert_eq!(found.len(), 5_000, "COUNT {count}");
    }
    stop.store(true, Ordering::Relaxed);
    writing.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn options_and_errors_of_scan_are_the_engines() {
    let fixture = fixture(3, "1").await;
    let mut redis = connect(&fixture.proxy, "resp2").await;
    for n in 0..50 {
        ask::<()>(&mut redis, &format!("SET string:{n} x")).await;
        ask::<()>(&mut redis, &format!("LPUSH list:{n} x")).await;
    }
    let (mut cursor, mut lists) = ("0".to_owned(), 0);
    loop {
        let scan = format!("SCAN {cursor} TYPE list COUNT 100");
        let (next, keys): (String, Vec<String>) = ask(&mut redis, &scan).await;
        lists += keys.len();
        assert!(keys.iter().all(|key| key.starts_with("list:")));
        cursor = next;
        if cursor == "0" {
            break;
        }
    }
    assert_eq!(lists, 50);
    for (scan, error) in [
        ("SCAN x", "invalid cursor"),
        ("SCAN 0 COUNT 0", "syntax error"),
        ("SCAN 0 COUNT x", "value is not an integer or out of range"),
        ("SCAN 0 FOO", "syntax error"),
    ] {
        let refused = try_ask::<Value>(&mut redis, scan).await.unwrap_err();
        assert_eq!(refused.detail(), Some(error), "{scan}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn randomkey_finds_the_only_key_and_shards_by_their_size() {
    let fixture = fixture(3, "1").await;
    let mut redis = connect(&fixture.proxy, "resp2").await;
    assert_eq!(ask::<Value>(&mut redis, "RANDOMKEY").await, Value::Nil);
    for key in ["a", "b", "c", "d"] {
        ask::<()>(&mut redis, &format!("SET {key} 1")).await;
        assert_eq!(ask::<String>(&mut redis, "RANDOMKEY").await, key);
        ask::<()>(&mut redis, &format!("DEL {key}")).await;
    }
    let keys: BTreeSet<String> = (0..30).map(|n| format!("k{n}")).collect();
    for key in &keys {
        ask::<()>(&mut redis, &format!("SET {key} 1")).await;
    }
    let mut seen = BTreeSet::new();
    for _ in 0..1_000 {
        seen.insert(ask::<String>(&mut redis, "RANDOMKEY").await);
    }
    assert_eq!(seen, keys);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_is_reached_by_its_index_and_a_wrong_index_is_refused() {
    let fixture = fixture(3, "1").await;
    for protocol in ["resp2", "resp3"] {
        let mut redis = connect(&fixture.proxy, protocol).await;
        ask::<()>(&mut redis, "FLUSHALL").await;
        for n in 0..60 {
            ask::<()>(&mut redis, &format!("SET k{n} 1")).await;
        }
        let mut found = BTreeSet::new();
        for index in 0..3 {
            let iscan = format!("ISCAN {index} 0 COUNT 1000");
            let (cursor, keys): (String, Vec<String>) = ask(&mut redis, &iscan).await;
            assert_eq!(cursor, "0");
            found.extend(keys);
            let info: String = ask(&mut redis, &format!("IINFO {index} keyspace")).await;
            assert!(info.starts_with("# Keyspace\r\ndb0:keys="), "{info}");
            let server: String = ask(&mut redis, &format!("IINFO {index} server")).await;
            assert!(server.contains(&format!("tcp_port:{}\r\n", fixture.proxy.address.port())));
        }
        assert_eq!(found.len(), 60);
        for wrong in [
            "ISCAN 3 0",
            "IINFO 3",
            "IINFO -1",
            "RIINFO 0 0",
            "RIINFO 7 0",
        ] {
            let refused = try_ask::<Value>(&mut redis, wrong).await.unwrap_err();
            assert_eq!(refused.detail(), Some("no such db node"), "{wrong}");
        }
        let place: String = ask(&mut redis, "INFO KEY foo").await;
        assert_eq!(place, "slot:12182 node_index:2");
    }
}
