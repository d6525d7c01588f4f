//! What is wrong gets a clear error, costs nobody else anything, and loses nothing.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::process::Command;

use support::Proxy;
use support::node::{Node, snapshot};
use support::raw::Raw;

async fn fixture() -> (Node, Proxy, tempfile::TempDir) {
    let node = Node::start_with_epoch(1);
    let data = tempfile::tempdir().unwrap();
    let routes = vec![node.route(0, 1, 1)];
    slotmesh_proxy::saved::save(data.path(), &snapshot(1, routes)).unwrap();
    let proxy = Proxy::start(data.path(), &["--workers", "1"]).await;
    (node, proxy, data)
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_closes_its_client_with_redis_words_and_no_other() {
    let (_node, proxy, _data) = fixture().await;
    let mut good = Raw::connect(proxy.address).await;
    good.send(b"SET k v\r\n").await;
    good.expect("+OK\r\n").await;
    for (bytes, want) in [
        (
            "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$999999999999\r\n",
            "invalid bulk length",
        ),
        ("*99999999999\r\n", "invalid multibulk length"),
        ("*1\r\n!1\r\n", "expected '$', got '!'"),
        ("GET \"unbalanced\r\n", "unbalanced quotes in request"),
    ] {
        let mut bad = Raw::connect(proxy.address).await;
        bad.send(bytes.as_bytes()).await;
        let reply = bad.rest().await;
        assert_eq!(reply, format!("-ERR Protocol error: {want}\r\n"));
    }
    // Half a command, a length that never comes, and a hang-up.
    for half in [
        "*2\r\n$3\r\nGE",
        "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$536870912\r\nabc",
    ] {
        let mut bad = Raw::connect(proxy.address).await;
        bad.send(half.as_bytes()).await;
        drop(bad);
    }
    good.send(b"GET k\r\n").await;
    good.expect("$1\r\nv\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_bytes_never_hurt_another_client() {
    let (_node, proxy, _data) = fixture().await;
    let mut good = Raw::connect(proxy.address).await;
    let mut seed = 0x9E37_79B9_u64;
    let pieces: [&[u8]; 10] = [
        b"*2\r\n",
        b"$3\r\n",
        b"GET\r\n",
        b"\r\n",
        b"$-1\r\n",
        b"*-1\r\n",
        b"\x00\xff",
        b"PING\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"MULTI\r\n",
    ];
    for n in 1..200 {
        let mut bytes = Vec::new();
        for _ in 0..20 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            bytes.extend_from_slice(pieces[(seed >> 11) as usize % pieces.len()]);
        }
        let mut bad = Raw::connect(proxy.address).await;
        bad.send(&bytes).await;
        drop(bad);
        good.send(b"INCR n\r\n").await;
        good.expect(&format!(":{n}\r\n")).await;
    }
}

/// The process itself, which must end at once.
fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_slotmesh-proxy"))
        .args(arguments)
        .output();
    let output = output.unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn the_process_says_why_it_cannot_start() {
    let data = tempfile::tempdir().unwrap();
    let dir = data.path().to_str().unwrap();
    let fixed = ["--proxy-id", "p", "--instance", "i", "--data", dir];
    let with = |more: &[&str]| run(&[&fixed[..], more].concat());

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, text) = with(&["--listen", &address]);
    assert_eq!(code, Some(1));
    assert!(
        text.contains(&format!("listen on {address}: Address already in use")),
        "{text}"
    );

    let config = data.path().join("bad.toml");
    std::fs::write(&config, "wrokers = 1\n").unwrap();
    let (code, text) = with(&["--config", config.to_str().unwrap()]);
    assert_eq!(code, Some(64));
    assert!(text.contains("wrokers"), "{text}");

    std::fs::write(
        data.path().join("topology.pb"),
        [b"SMPXTOP9".as_slice(), &[0; 40]].concat(),
    )
    .unwrap();
    let (code, text) = with(&[]);
    assert_eq!(code, Some(1));
    assert!(text.contains("written by a newer release"), "{text}");
}
