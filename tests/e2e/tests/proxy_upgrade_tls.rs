//! A mesh whose agents have a certificate: its proxies' processes are exchanged under clients with TLS
//! that others wrote, and none of them is connected anew.

#![allow(clippy::unwrap_used)]

use std::{path::Path, process::Stdio, time::Duration};

use slotmesh_e2e::{ctl, proxy_pids};
use slotmesh_harness::{
    Mesh, MeshOptions,
    foreign::{certificate, installed},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

const LIMIT: Duration = Duration::from_secs(120);

async fn count(address: &str, cert: &str) -> Child {
    let (host, port) = address.rsplit_once(':').unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../judges/clients/tls_counts.py");
    let mut child = Command::new(installed("bin/python").unwrap())
        .arg(script)
        .args([host, port, cert])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = timeout(LIMIT, lines.next_line()).await;
    let first = first.expect("waited for clients to count").unwrap();
    assert_eq!(first.as_deref(), Some("counting"));
    child
}

#[tokio::test]
async fn proxies_are_restarted_and_clients_with_tls_keep_their_sessions() {
    let dir = tempfile::tempdir().unwrap();
    let [cert, key] = certificate(dir.path()).unwrap();
    let named =
        |name: &str, value: &str| (format!("SLOTMESH_AGENT_PROXY_TLS_{name}"), value.to_owned());
    let options = MeshOptions {
        environment: vec![named("CERT", &cert), named("KEY", &key)],
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let mut counting = Vec::new();
    for address in &mesh.contract.proxies {
        counting.push(count(address, &cert).await);
    }
    let before = proxy_pids(&mesh).await.unwrap();
    for (one, _) in &before {
        let words = [
            "proxy",
            "restart",
            mesh.instance(),
            "--proxy",
            one,
            "--bake",
            "1",
            "--wait",
        ];
        let output = ctl(&mesh, &words).await.unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let after = proxy_pids(&mesh).await.unwrap();
    let changed = before
        .iter()
        .zip(&after)
        .all(|(a, b)| a.0 == b.0 && a.1 != b.1);
    assert!(changed, "{before:?} {after:?}");
    for mut child in counting {
        drop(child.stdin.take());
        let ended = timeout(LIMIT, child.wait_with_output()).await;
        let ended = ended.expect("waited for clients to end").unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "{said}");
    }
    mesh.stop().await.unwrap();
}
