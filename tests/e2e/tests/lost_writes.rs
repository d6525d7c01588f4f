//! A primary that was cut off comes back: what only it had is kept, listed, shown, and given to the
//! instance again on demand.

#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, time::Duration};

use slotmesh_ctl::{
    lost_writes::{LostWritesCommand, ReplayArgs, Selection, file::LostFile, on_lost_writes},
    render::Output,
};
use slotmesh_e2e::{connect, roles};
use slotmesh_harness::{Mesh, MeshOptions, wait_until};
use slotmesh_proto::{
    instance::v1::FailOverRequest,
    task::v1::{ListLostWritesRequest, LostWrites},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

const LIMIT: Duration = Duration::from_secs(60);
const LOST: usize = 100;

/// The directory of a node, on whichever host it is.
fn dir_of(mesh: &Mesh, node: &str) -> PathBuf {
    let mut dirs = vec![mesh.data()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() && path.ends_with(format!("nodes/{node}")) {
                return path;
            }
            if path.is_dir() {
                dirs.push(path);
            }
        }
    }
    panic!("node {node} has no directory");
}

/// Says it to a node's engine as its administrator, past everything.
async fn tell(mesh: &Mesh, node: &str, commands: &[&str]) {
    let dir = dir_of(mesh, node);
    let secret = std::fs::read_to_string(dir.join("admin.secret")).unwrap();
    let mut socket = UnixStream::connect(dir.join("admin.sock")).await.unwrap();
    let login = format!("AUTH slotmesh-admin {}", secret.trim());
    for command in [&[login.as_str()], commands].concat() {
        let line = format!("{command}\r\n");
        socket.write_all(line.as_bytes()).await.unwrap();
        let mut answer = [0; 256];
        let count = timeout(LIMIT, socket.read(&mut answer)).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..count.unwrap()]).into_owned();
        assert!(!answer.starts_with('-'), "{command}: {answer}");
    }
}

async fn kept(mesh: &Mesh) -> LostWrites {
    wait_until(LIMIT, "the lost writes to be listed", async || {
        let request = ListLostWritesRequest {
            instance_id: mesh.instance().to_owned(),
        };
        let mut tasks = mesh.api().await?.tasks();
        let mut all = tasks
            .list_lost_writes(request)
            .await?
            .into_inner()
            .lost_writes;
        anyhow::ensure!(all.len() == 1, "{all:?}");
        Ok(all.remove(0))
    })
    .await
    .unwrap()
}

async fn there(mesh: &Mesh) -> usize {
    let mut connection = connect(&mesh.contract.proxies[0], false).await.unwrap();
    let mut exists = redis::cmd("EXISTS");
    for n in 0..LOST {
        exists.arg(format!("{{t}}:lost:{n}"));
    }
    exists.query_async(&mut connection).await.unwrap()
}

#[tokio::test]
async fn what_only_a_lost_primary_had_is_kept_listed_and_replayed_on_demand() {
    let options = MeshOptions {
        architecture: Some("standard".to_owned()),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let (shard, old, replicas) = roles(&mesh).await.unwrap()[0].clone();
    let replica = replicas[0].clone();
    let mut connection = connect(&mesh.contract.proxies[0], false).await.unwrap();
    // The replica's agent has set its login and sees no reason to do it again.
    tell(
        &mesh,
        &replica,
        &[
            "CONFIG SET masterauth no-password",
            "CLIENT KILL TYPE master",
        ],
    )
    .await;
    for n in 0..LOST {
        let mut set = redis::cmd("SET");
        set.arg(format!("{{t}}:lost:{n}")).arg("a value");
        let () = set.query_async(&mut connection).await.unwrap();
    }
    let request = FailOverRequest {
        instance_id: mesh.instance().to_owned(),
        shard_id: shard.clone(),
        accept_data_loss: true,
        target_node_id: replica.clone(),
        client_token: String::new(),
    };
    let mut instances = mesh.api().await.unwrap().instances();
    instances.fail_over(request).await.unwrap();

    let lost = kept(&mesh).await;
    assert!(lost.complete, "{lost:?}");
    assert_eq!((&lost.shard_id, &lost.node_id), (&shard, &old));
    assert_eq!(lost.commands, LOST as u64);
    let mut shown = vec![];
    let mut file = LostFile::open(&lost).await.unwrap();
    while let Some(commands) = file.next().await.unwrap() {
        shown.extend(commands.iter().map(|c| c.line()));
    }
    let expected: Vec<_> = (0..LOST)
        .map(|n| format!("SET {{t}}:lost:{n} \"a value\""))
        .collect();
    assert_eq!(shown, expected);
    assert_eq!(there(&mesh).await, 0);

    let replay = async |yes, only: &str| {
        let selection = Selection {
            only: Some(only.to_owned()),
            ..Selection::default()
        };
        let command = LostWritesCommand::Replay(ReplayArgs {
            instance: mesh.instance().to_owned(),
            file: lost.file.clone(),
            selection,
            user: None,
            password_file: None,
            yes,
        });
        let mut api = mesh.api().await.unwrap();
        on_lost_writes(&mut api, command, Output::Json)
            .await
            .unwrap();
        there(&mesh).await
    };
    assert_eq!(replay(false, "*").await, 0);
    assert_eq!(replay(true, "*:lost:1?").await, 10);
    assert_eq!(replay(true, "*").await, LOST);
}
