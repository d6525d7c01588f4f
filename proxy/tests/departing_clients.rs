//! Clients' own libraries, when their proxy wants them elsewhere: under load, without one error, and with
//! every call executed once. `make clients` installs them.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use slotmesh_proto::topology::v1 as pb;
use slotmesh_proto::topology::v1::watch_response::Message;
use support::controller::Controller;
use support::handover::{metric, wait_metric};
use support::node::{Node, snapshot};
use support::{LIMIT, Proxy};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};

/// Two proxies of one instance, at one port of two addresses.
struct Two {
    old: Proxy,
    controller: Controller,
    new: Proxy,
    _nodes: Vec<Node>,
    _data: [tempfile::TempDir; 2],
}

async fn two() -> Two {
    let nodes: Vec<Node> = (0..2).map(|_| Node::start_with_epoch(1)).collect();
    let routes: Vec<_> = (0..2).map(|i| nodes[i as usize].route(i, 2, 1)).collect();
    let data = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (controller, address) = Controller::start(snapshot(1, routes.clone())).await;
    let controllers = address.to_string();
    let arguments = ["--workers", "2", "--controller", &controllers];
    let old = Proxy::start(data[0].path(), &arguments).await;
    slotmesh_proxy::saved::save(data[1].path(), &snapshot(1, routes)).unwrap();
    let listen = format!("127.0.0.2:{}", old.address.port());
    let new = Proxy::start(data[1].path(), &["--workers", "2", "--listen", &listen]).await;
    wait_ready(old.admin).await;
    Two {
        old,
        controller,
        new,
        _nodes: nodes,
        _data: data,
    }
}

async fn wait_ready(admin: SocketAddr) {
    let deadline = Instant::now() + LIMIT;
    while !support::raw::http_get(admin, "/ready")
        .await
        .contains("ready")
    {
        assert!(Instant::now() < deadline, "waited for a proxy to be ready");
        sleep(Duration::from_millis(5)).await;
    }
}

impl Two {
    fn leave(&self, endpoint: &str, within_ms: u32) {
        self.controller.say(Message::Leave(pb::Leave {
            endpoint: endpoint.to_owned(),
            within_ms,
        }));
    }
}

/// Where `make clients` puts them.
fn installed(what: &str) -> PathBuf {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/clients");
    let dir = std::env::var_os("SLOTMESH_CLIENTS").map_or(place, PathBuf::from);
    let path = dir.join(what);
    assert!(
        path.exists(),
        "{} is missing: run make clients",
        path.display()
    );
    path
}

/// A program under load. Killed when dropped.
struct Load(Option<Child>);

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Load {
    fn start(program: &str, script: &str, arguments: &[&str]) -> Self {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/departing");
        let child = Command::new(installed(program))
            .arg(scripts.join(script))
            .args(arguments)
            .env("NODE_PATH", installed("node_modules"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Self(Some(child.unwrap()))
    }

    /// Ends it; what it says of its errors and calls.
    async fn end(mut self) -> serde_json::Value {
        let mut child = self.0.take().unwrap();
        drop(child.stdin.take());
        let waited = tokio::task::spawn_blocking(move || child.wait_with_output());
        let output = tokio::time::timeout(LIMIT, waited).await.expect("it ends");
        let output = output.unwrap().unwrap();
        assert!(output.status.success(), "{output:?}");
        let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(said["errors"].as_array().map(Vec::len), Some(0), "{said}");
        assert!(said["calls"].as_u64() > Some(100), "{said}");
        said
    }
}

/// Waits until a proxy has executed so many more commands.
async fn works(admin: SocketAddr, more: u64) {
    let deadline = Instant::now() + LIMIT;
    let begin = metric(admin, "commands").await;
    while metric(admin, "commands").await < begin + more {
        assert!(Instant::now() < deadline, "waited for {more} commands");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A client that was told has moved by itself.
async fn moves_by_itself(program: &str, script: &str, library: &[&str]) {
    let two = two().await;
    let port = two.old.address.port().to_string();
    let load = Load::start(program, script, &[library, &["127.0.0.1", &port]].concat());
    works(two.old.admin, 500).await;
    two.leave(&two.new.address.to_string(), 60_000);
    wait_metric(two.old.admin, "clients", 0).await;
    works(two.new.admin, 500).await;
    let said = load.end().await;
    let closed = metric(two.old.admin, "departed_total").await;
    assert_eq!(closed, 0, "closed by the proxy; {said}");
    assert!(metric(two.old.admin, "departures_told").await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_py_moves_to_another_proxy_by_itself() {
    moves_by_itself("bin/python", "redis_py.py", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_redis_moves_to_another_proxy_by_itself() {
    moves_by_itself("bin/node", "node.js", &["redis"]).await;
}

/// One address for both, as a name or a balancer: who is refused by the first goes to the second.
async fn balance(first: SocketAddr, second: SocketAddr) -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = socket.accept().await {
            tokio::spawn(async move {
                let mut server = match TcpStream::connect(first).await {
                    Ok(server) => server,
                    Err(_) => TcpStream::connect(second).await.unwrap(),
                };
                for socket in [&client, &server] {
                    socket.set_nodelay(true).unwrap();
                }
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn ioredis_is_closed_between_two_requests_and_connects_to_another_proxy() {
    let two = two().await;
    let address = balance(two.old.address, two.new.address).await;
    let port = address.port().to_string();
    let load = Load::start("bin/node", "node.js", &["ioredis", "127.0.0.1", &port]);
    works(two.old.admin, 500).await;
    two.leave("", 20_000);
    wait_metric(two.old.admin, "clients", 0).await;
    works(two.new.admin, 500).await;
    load.end().await;
    assert_eq!(metric(two.old.admin, "departed_total").await, 1);
    assert_eq!(metric(two.old.admin, "departed_late").await, 0);
}
