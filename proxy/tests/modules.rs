//! Commands of a module, which the proxy's table does not have: learned from a node, then routed like
//! any other.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::Proxy;
use support::node::{Node, snapshot};
use support::talk::Talk;

struct Fixture {
    proxy: Proxy,
    _nodes: Vec<Node>,
    _directory: tempfile::TempDir,
}

/// Nodes with the module that the command table's tests have too.
async fn fixture(shards: u32) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let module = built_module(directory.path());
    let start = |_| {
        let node = Node::start_with(&["--loadmodule", module.to_str().unwrap()]);
        node.grant(1);
        node
    };
    let nodes: Vec<Node> = (0..shards).map(start).collect();
    let routes = (0..shards)
        .map(|i| nodes[i as usize].route(i, shards, 1))
        .collect();
    slotmesh_proxy::saved::save(directory.path(), &snapshot(1, routes)).unwrap();
    Fixture {
        proxy: Proxy::start(directory.path(), &["--workers", "2"]).await,
        _nodes: nodes,
        _directory: directory,
    }
}

fn built_module(directory: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("command/tests/support/module.c");
    let module = directory.join("module.so");
    let compiler = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&module, &source])
        .status();
    assert!(compiler.expect("there is a C compiler").success());
    module
}

#[tokio::test(flavor = "multi_thread")]
async fn a_modules_keys_are_on_the_shards_that_own_them() {
    let fixture = fixture(3).await;
    let mut talk = Talk::connect(fixture.proxy.address).await;
    for n in 0..60 {
        talk.expect(&format!("Demo.Set key:{n} {n}"), ":3\r\n")
            .await;
        let len = n.to_string().len();
        talk.expect(&format!("GET key:{n}"), &format!("${len}\r\n{n}\r\n"))
            .await;
    }
    talk.expect("demo.two {a}1 {a}2 x", ":4\r\n").await;
    let crossed = talk.ask("demo.two a b x").await;
    assert!(crossed.starts_with("-CROSSSLOT "), "{crossed}");
    talk.expect("demo.none", ":1\r\n").await;
    // Where its key is, only the module knows.
    let refused = talk.ask("demo.last a b").await;
    assert!(
        refused.contains("which of its arguments are keys"),
        "{refused}"
    );
    let admin = talk.ask("demo.admin").await;
    assert!(admin.starts_with("-ERR slotmesh: 'demo.admin'"), "{admin}");
    let missing = talk.ask("demo.set").await;
    assert_eq!(
        missing,
        "-ERR wrong number of arguments for 'demo.set' command\r\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_shard_takes_what_only_it_understands() {
    let fixture = fixture(1).await;
    let mut talk = Talk::connect(fixture.proxy.address).await;
    talk.expect("demo.last a b", ":3\r\n").await;
    talk.expect("demo.two a b x", ":4\r\n").await;
    talk.expect("demo.hidden a", ":2\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_keep_their_order_around_a_command_that_is_looked_up() {
    let fixture = fixture(3).await;
    let mut talk = Talk::connect(fixture.proxy.address).await;
    for line in [
        "SET a 1",
        "demo.pairs x a 1",
        "GET a",
        "no.such b",
        "PING",
        "demo.one a",
    ] {
        talk.say(line).await;
    }
    for want in [
        "+OK\r\n",
        ":4\r\n",
        "$1\r\n1\r\n",
        "-ERR unknown command 'no.such', with args beginning with: 'b' \r\n",
        "+PONG\r\n",
        ":2\r\n",
    ] {
        assert_eq!(talk.hear().await, want);
    }
    // In a transaction too.
    talk.expect("MULTI", "+OK\r\n").await;
    talk.expect("demo.second x a", "+QUEUED\r\n").await;
    talk.expect("EXEC", "*1\r\n:3\r\n").await;
}
