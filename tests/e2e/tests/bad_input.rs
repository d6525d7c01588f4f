//! What clients and operators do wrong: a clear error for them, nothing for anybody else.

#![allow(clippy::unwrap_used)]

use std::fs;

use slotmesh_e2e::{Witnesses, connect, ctl, finish, json, raw};
use slotmesh_harness::{Mesh, MeshOptions, programs};
use tokio::{io::AsyncWriteExt, net::TcpStream, process::Command};

#[tokio::test]
async fn bad_bytes_get_a_protocol_error_and_cost_nobody_else_anything() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    let proxy = &mesh.contract.proxies[0];
    let garbage: Vec<u8> = (0..4096_u32).map(|n| (n * 131 % 251) as u8).collect();
    let closed = [
        (&b"*1\r\n$999999999999\r\n"[..], "-ERR Protocol error"),
        (b"*99999999\r\n", "-ERR Protocol error"),
        (b"*2147483648\r\n$4\r\nPING\r\n", "-ERR Protocol error"),
        (b"*-7\r\n*x\r\n", "-ERR Protocol error"),
        (b"*1\r\n:5\r\n", "-ERR Protocol error"),
        (b"*1\r\n$-5\r\nPING\r\n", "-ERR Protocol error"),
    ];
    for (bytes, answer) in closed {
        let shown = String::from_utf8_lossy(bytes).into_owned();
        let got = raw(proxy, bytes, "")
            .await
            .unwrap_or_else(|e| panic!("{shown:?}: {e:#}"));
        assert!(got.contains(answer), "{shown:?} was answered {got:?}");
    }
    // Garbage with a line end in it is a command that nobody knows, or a protocol error.
    let mut line = garbage.clone();
    line.extend_from_slice(b"\r\nPING\r\n");
    let got = raw(proxy, &line, "\r\n").await.unwrap();
    assert!(got.starts_with("-ERR"), "{got:?}");
    // A line that never ends is cut off at a bound.
    let got = raw(proxy, &vec![b'a'; 1 << 20], "").await.unwrap();
    assert!(got.contains("-ERR Protocol error"), "{got:?}");
    let seen = witnesses.testify().await.unwrap();
    assert!(seen.iter().all(|s| s.acknowledged > 0));
}

#[tokio::test]
async fn half_a_command_and_a_hang_up_have_no_effect() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let proxy = &mesh.contract.proxies[0];
    for half in [
        &b"*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$5\r\nval"[..],
        b"*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n",
        b"SET half val",
        b"*1\r\n$5\r\nMULTI\r\n*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$1\r\n1\r\n",
    ] {
        let mut socket = TcpStream::connect(proxy).await.unwrap();
        socket.write_all(half).await.unwrap();
        drop(socket);
    }
    // A whole command and a hang-up without reading: it may be done, and nobody else is hurt.
    let mut socket = TcpStream::connect(proxy).await.unwrap();
    socket
        .write_all(b"*3\r\n$3\r\nSET\r\n$5\r\nwhole\r\n$1\r\n1\r\n")
        .await
        .unwrap();
    drop(socket);
    let mut connection = connect(proxy, false).await.unwrap();
    let there: u32 = redis::cmd("EXISTS")
        .arg("half")
        .query_async(&mut connection)
        .await
        .unwrap();
    assert_eq!(there, 0);
}

#[tokio::test]
async fn a_password_is_asked_for_and_a_wrong_one_is_refused() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    fs::write(&file, "correct horse\n").unwrap();
    let created = ctl(
        &mesh,
        &[
            "--output",
            "json",
            "instance",
            "create",
            "--architecture",
            "standard",
            "--proxies",
            "1",
            "--password-file",
            file.to_str().unwrap(),
            "--wait",
        ],
    );
    let created = json(&created.await.unwrap()).unwrap();
    let id = created["instance_id"].as_str().unwrap();
    let detail = ctl(&mesh, &["--output", "json", "instance", "describe", id])
        .await
        .unwrap();
    let detail = json(&detail).unwrap();
    assert_eq!(detail["password_required"], true);
    let proxy = detail["proxies"][0]["address"].as_str().unwrap();

    let answers = raw(
        proxy,
        b"GET k\r\nAUTH wrong\r\nAUTH default wrong\r\nHELLO 3 AUTH default wrong\r\nGET k\r\nQUIT\r\n",
        "",
    );
    let answers = answers.await.unwrap();
    let lines: Vec<&str> = answers.lines().collect();
    assert!(lines[0].starts_with("-NOAUTH"), "{answers}");
    assert!(
        lines[1..4].iter().all(|l| l.starts_with("-WRONGPASS")),
        "{answers}"
    );
    assert!(lines[4].starts_with("-NOAUTH"), "{answers}");
    let right = b"*2\r\n$4\r\nAUTH\r\n$13\r\ncorrect horse\r\n*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n";
    assert_eq!(raw(proxy, right, ":1").await.unwrap(), "+OK\r\n:1\r\n");
    assert!(
        !String::from_utf8_lossy(&fs::read(mesh.home().log()).unwrap()).contains("correct horse")
    );
}

#[tokio::test]
async fn an_unknown_field_in_a_settings_file_is_named_and_nothing_starts() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("settings.toml");
    fs::write(&file, "lissten = \"127.0.0.1:0\"\n").unwrap();
    for program in ["slotmesh-controller", "slotmesh-agent", "slotmesh-proxy"] {
        let mut command = Command::new(programs::path(program).unwrap());
        command.arg("--config").arg(&file).current_dir(dir.path());
        let output = finish(command).await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{program} started");
        assert!(said.contains("lissten"), "{program} said: {said}");
    }
}

#[tokio::test]
async fn commands_that_cannot_be_served_get_a_clear_error() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let proxy = &mesh.contract.proxies[0];
    for (line, part) in [
        ("NOSUCHCOMMAND a b", "unknown command"),
        ("GET", "wrong number of arguments"),
        ("CONFIG SET nonsense 1", "-ERR Unknown option"),
        ("SHUTDOWN", "-ERR"),
        ("ACL SETUSER x nonsense", "-ERR Error in ACL SETUSER"),
        ("REPLICAOF NO ONE", "-ERR"),
        ("FAILOVER", "-ERR"),
        ("DEBUG SLEEP 1", "-ERR"),
        ("SELECT 256", "-ERR"),
        ("SELECT x", "-ERR"),
    ] {
        let got = raw(proxy, format!("{line}\r\n").as_bytes(), "\r\n")
            .await
            .unwrap();
        assert!(
            got.starts_with('-') && got.contains(part),
            "{line} was answered {got:?}"
        );
    }
    let select = "SELECT 255\r\nSET k v\r\nSELECT 0\r\nEXISTS k\r\nSELECT 255\r\nEXISTS k\r\nDEL k\r\nQUIT\r\n";
    let got = raw(proxy, select.as_bytes(), "").await.unwrap();
    assert_eq!(got, "+OK\r\n+OK\r\n+OK\r\n:0\r\n+OK\r\n:1\r\n:1\r\n+OK\r\n");
}
