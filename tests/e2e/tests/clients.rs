//! Clients that others wrote, with their default settings, do their own basic work through a mesh:
//! as if it were one Redis, and as if it were a Redis cluster.
//!
//! A client that is not installed fails the test and says how to get it; only Jedis, which no registry
//! of ours has, is tried where `JEDIS_CLASSPATH` says where it is. The checks of each client are beside
//! the judges, in tests/judges/clients.

#![allow(clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    process::Output,
};

use redis::AsyncCommands as _;
use slotmesh_e2e::finish;
use slotmesh_harness::{Mesh, MeshOptions, foreign::installed};
use tokio::process::Command;

const CLUSTER_KEYS: usize = 300;

/// The engine is the newest: clients ask for its version before they use what is new.
async fn mesh() -> Mesh {
    let options = MeshOptions {
        shards: Some(3),
        replicas: Some(1),
        proxies: Some(2),
        workers: Some(2),
        engine: Some("redis-8.2".into()),
        ..MeshOptions::default()
    };
    Mesh::start(&options).await.unwrap()
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../judges/clients")
        .join(name)
}

async fn succeeds(command: Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = finish(command).await.unwrap();
    let said = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{status}:\n{said}");
    said
}

/// Runs a script of checks in both modes.
async fn checks(program: &Path, name: &str) {
    let mesh = mesh().await;
    let (host, port) = mesh.contract.proxies[0].rsplit_once(':').unwrap();
    for kind in ["standalone", "cluster"] {
        let mut command = Command::new(program);
        command.arg(script(name)).args([host, port, kind]);
        if Path::new(name).extension().is_some_and(|e| e == "js") {
            command.env("NODE_PATH", installed("node_modules").unwrap());
        }
        let said = succeeds(command).await;
        assert!(said.contains("checks passed"), "{said}");
    }
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn redis_py_does_its_work() {
    checks(&installed("bin/python").unwrap(), "redis_py.py").await;
}

#[tokio::test]
async fn ioredis_does_its_work() {
    checks(&installed("bin/node").unwrap(), "ioredis.js").await;
}

#[tokio::test]
async fn node_redis_does_its_work() {
    checks(&installed("bin/node").unwrap(), "node_redis.js").await;
}

/// `JEDIS_CLASSPATH` names the jars of Jedis 5 and of what it needs: commons-pool2, gson, slf4j, json.
#[tokio::test]
async fn jedis_does_its_work_where_there_is_one() {
    let Some(classpath) = std::env::var_os("JEDIS_CLASSPATH") else {
        eprintln!("Jedis was not tried: JEDIS_CLASSPATH names no jars");
        return;
    };
    let mesh = mesh().await;
    let (host, port) = mesh.contract.proxies[0].rsplit_once(':').unwrap();
    for kind in ["standalone", "cluster"] {
        let mut command = Command::new("java");
        command.arg("-cp").arg(&classpath);
        command.arg(script("Jedis.java")).args([host, port, kind]);
        let said = succeeds(command).await;
        assert!(said.contains("checks passed"), "{said}");
    }
    mesh.stop().await.unwrap();
}

/// What both kinds of connections of redis-rs can do.
async fn basic_work<C: redis::aio::ConnectionLike + Send + Sync>(c: &mut C, tag: &str) {
    let key = |name: &str| format!("rs:{tag}:{name}{{rs}}");
    let () = c.set(key("s"), "v").await.unwrap();
    assert_eq!(c.get::<_, String>(key("s")).await.unwrap(), "v");
    assert_eq!(c.incr::<_, _, i64>(key("n"), 5).await.unwrap(), 5);
    let () = c.hset(key("h"), "field", 7).await.unwrap();
    assert_eq!(c.hget::<_, _, u32>(key("h"), "field").await.unwrap(), 7);
    let () = c.rpush(key("l"), &["a", "b"]).await.unwrap();
    assert_eq!(c.lpop::<_, String>(key("l"), None).await.unwrap(), "a");
    let () = c.sadd(key("x"), &[1, 2, 3]).await.unwrap();
    assert_eq!(c.scard::<_, u32>(key("x")).await.unwrap(), 3);
    let () = c.zadd(key("z"), "m", 2.5).await.unwrap();
    assert_eq!(c.zscore::<_, _, f64>(key("z"), "m").await.unwrap(), 2.5);
    let id: String = c.xadd(key("st"), "*", &[("k", "v")]).await.unwrap();
    assert!(id.contains('-'), "{id}");
    let popped: Option<(String, String)> = c.blpop(key("l"), 1.0).await.unwrap();
    assert_eq!(popped.unwrap().1, "b");
    let script = redis::Script::new("return redis.call('INCRBY', KEYS[1], ARGV[1])");
    let added: i64 = script.key(key("lua")).arg(3).invoke_async(c).await.unwrap();
    assert_eq!(added, 3);
    let mut block = redis::pipe();
    block.atomic().set(key("t"), 1).ignore().incr(key("t"), 1);
    assert_eq!(block.query_async::<Vec<i64>>(c).await.unwrap(), [2]);
    let mut pipe = redis::pipe();
    for n in 0..100 {
        pipe.set(key(&n.to_string()), n)
            .ignore()
            .get(key(&n.to_string()));
    }
    let values: Vec<usize> = pipe.query_async(c).await.unwrap();
    assert!(values.into_iter().eq(0..100));
}

#[tokio::test]
async fn redis_rs_does_its_work() {
    let mesh = mesh().await;
    let url = format!("redis://{}", mesh.contract.proxies[0]);
    for protocol in ["resp2", "resp3"] {
        let client = redis::Client::open(format!("{url}/?protocol={protocol}")).unwrap();
        let mut c = client.get_multiplexed_async_connection().await.unwrap();
        basic_work(&mut c, protocol).await;
        let walk = c.scan_match::<_, String>(format!("rs:{protocol}:*")).await;
        let mut walk = walk.unwrap();
        let mut found = std::collections::HashSet::new();
        while let Some(key) = walk.next_item().await {
            found.insert(key.unwrap());
        }
        assert!(found.len() > 100, "{} keys were found", found.len());
    }
    hears(&url).await;
    let cluster = redis::cluster::ClusterClient::new(vec![url]).unwrap();
    let mut c = cluster.get_async_connection().await.unwrap();
    basic_work(&mut c, "cluster").await;
    for n in 0..CLUSTER_KEYS {
        let () = c.set(format!("rs:c:{n}"), n).await.unwrap();
    }
    for n in 0..CLUSTER_KEYS {
        assert_eq!(c.get::<_, usize>(format!("rs:c:{n}")).await.unwrap(), n);
    }
    mesh.stop().await.unwrap();
}

/// A subscriber of redis-rs hears what another client says.
async fn hears(url: &str) {
    let client = redis::Client::open(url).unwrap();
    let (mut sink, mut stream) = client.get_async_pubsub().await.unwrap().split();
    sink.subscribe("rs:news").await.unwrap();
    sink.psubscribe("rs:n?ws").await.unwrap();
    let mut c = client.get_multiplexed_async_connection().await.unwrap();
    let () = c.publish("rs:news", "hello").await.unwrap();
    for _ in 0..2 {
        let message = tokio::time::timeout(
            std::time::Duration::from_secs(5),
            tokio_stream::StreamExt::next(&mut stream),
        );
        let message = message.await.expect("a message within 5 s").unwrap();
        assert_eq!(message.get_payload::<String>().unwrap(), "hello");
    }
}

#[tokio::test]
async fn redis_cli_does_its_work() {
    let mesh = mesh().await;
    let (host, port) = mesh.contract.proxies[0].rsplit_once(':').unwrap();
    let cli = |arguments: &[&str]| {
        let mut command = Command::new("redis-cli");
        command.args(["-h", host, "-p", port]).args(arguments);
        command
    };
    for mode in [&[][..], &["-c"], &["-3"]] {
        let with = |arguments: &[&'static str]| cli(&[mode, arguments].concat());
        assert_eq!(succeeds(with(&["SET", "cli", "v"])).await, "OK\n");
        assert_eq!(succeeds(with(&["GET", "cli"])).await, "v\n");
        let said = succeeds(with(&["--scan", "--pattern", "cli*"])).await;
        assert_eq!(said, "cli\n");
        let said = succeeds(with(&["EVAL", "return KEYS[1]", "1", "cli"])).await;
        assert_eq!(said, "cli\n");
        let said = succeeds(with(&["-r", "3", "INCR", "cli:n"])).await;
        assert_eq!(said.lines().count(), 3, "{said}");
        let _ = succeeds(with(&["DEL", "cli", "cli:n"])).await;
    }
    let said = succeeds(cli(&["--bigkeys"])).await;
    assert!(said.contains("summary"), "{said}");
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn redis_benchmark_does_its_work() {
    let mesh = mesh().await;
    let (host, port) = mesh.contract.proxies[0].rsplit_once(':').unwrap();
    let modes: &[&[&str]] = &[&[], &["-P", "16"], &["--cluster"], &["-3"]];
    for mode in modes {
        let mut command = Command::new("redis-benchmark");
        command.args([
            "-h", host, "-p", port, "-n", "2000", "-c", "20", "-r", "1000", "-q",
        ]);
        let said = succeeds({
            command.args(*mode);
            command
        });
        let said = said.await;
        for test in ["SET", "LPUSH", "SPOP", "ZADD", "LRANGE_100", "MSET"] {
            assert!(said.contains(test), "{mode:?} did not do {test}: {said}");
        }
        assert!(!said.contains("rror"), "{mode:?}: {said}");
    }
    mesh.stop().await.unwrap();
}
