//! Replicas whose processes make way for other engines, by real engines.

use std::{os::unix::fs::PermissionsExt, path::Path, time::Duration};

use rustix::process::Signal;
use slotmesh_agent::{probe::Info, process::Process};
use slotmesh_proto::{agent::v1::NodeReport, store::v1::NodeRole};

use crate::{
    binary,
    controller::is_running,
    hosts::{AtExit, Mesh, eventually, fetched_engines, kill},
};

pub(crate) const REPLICA: usize = 1;

/// The path of an engine, where it was fetched.
pub(crate) fn engine(name: &str) -> Option<String> {
    fetched_engines()
        .into_iter()
        .find(|path| path.contains(name))
}

/// Old and new, where both were fetched.
pub(crate) fn pair(old: &str, new: &str) -> Option<(String, String)> {
    let found = engine(old).zip(engine(new));
    if found.is_none() {
        println!("skipped: {old} and {new} are not both in .engines");
    }
    found
}

pub(crate) async fn info(mesh: &Mesh, node: usize) -> Info {
    let mut admin = mesh.admin(node).await;
    Info::read(&mut admin, "all").await.unwrap()
}

pub(crate) async fn write(mesh: &Mesh, from: u32, to: u32) {
    let mut connection = mesh.proxy_connection().await;
    for n in from..to {
        let key = format!("k{n}");
        connection.call(&["SET", &key, "v"]).await.unwrap();
    }
}

fn ran(path: &str) -> impl Fn(&NodeReport) -> bool {
    move |n: &NodeReport| is_running(n) && n.engine.as_deref() == Some(path) && !n.settling
}

/// Says that the replica is to run this engine, and names the process that comes of it.
pub(crate) async fn exchange(mesh: &Mesh, path: &str, discard: bool) -> NodeReport {
    let before = mesh.controller.node(REPLICA).unwrap();
    mesh.controller
        .change(|record| record.exchange = Some((path.to_owned(), discard)));
    let claim = |n: &NodeReport| ran(path)(n) && n.run_id != before.run_id;
    let other = mesh
        .controller
        .until("the other engine", REPLICA, claim)
        .await;
    name(mesh, &other).await
}

/// The record names the replica's process.
async fn name(mesh: &Mesh, process: &NodeReport) -> NodeReport {
    let run_id = process.run_id.clone();
    mesh.controller
        .change(|record| record.run_ids[REPLICA].clone_from(&run_id));
    mesh.controller
        .until("its link", REPLICA, |n| n.run_id == run_id && n.link_up)
        .await
}

pub(crate) async fn has_keys(mesh: &Mesh, keys: u64) {
    mesh.controller
        .until("the keys", REPLICA, |n| n.keys == keys)
        .await;
}

/// What a process of the replica has on disk, as a normal start finds it.
async fn has_on_disk(mesh: &Mesh, keys: u64) {
    // Flushed every second.
    eventually("the file to be flushed", async || {
        info(mesh, REPLICA).await.number("aof_pending_bio_fsync") == 0
    })
    .await;
    let before = mesh.controller.node(REPLICA).unwrap();
    kill(before.pid, Signal::KILL);
    let claim = |n: &NodeReport| is_running(n) && n.run_id != before.run_id && !n.loading;
    let after = mesh.controller.until("its restart", REPLICA, claim).await;
    assert_eq!(after.keys, keys);
    assert_eq!(after.engine, before.engine);
    name(mesh, &after).await;
}

async fn goes_on(old: &str, new: &str) {
    let Some((old, new)) = pair(old, new) else {
        return;
    };
    let mesh = Mesh::provisioned(&old).await;
    write(&mesh, 0, 200).await;
    has_keys(&mesh, 200).await;
    let before = info(&mesh, 0).await;
    let process = exchange(&mesh, &new, false).await;
    write(&mesh, 200, 300).await;
    has_keys(&mesh, 300).await;
    let after = info(&mesh, 0).await;
    assert_eq!(after.number("sync_full"), before.number("sync_full"));
    let partial = after.number("sync_partial_ok") - before.number("sync_partial_ok");
    assert_eq!(partial, 1, "it went on where its predecessor stopped");
    assert_eq!(process.observed_role(), NodeRole::Replica);
    let file = std::fs::read_link(format!("/proc/{}/exe", process.pid)).unwrap();
    assert_eq!(file, Path::new(&new).canonicalize().unwrap());
    let dir = mesh.node_dir(REPLICA);
    assert!(!dir.join("dump.rdb").exists() && !dir.join("resume").exists());
    has_on_disk(&mesh, 300).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_goes_on_from_6_2_with_7_0() {
    goes_on("redis-6.2", "redis-7.0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_goes_on_from_7_0_with_8_2() {
    goes_on("redis-7.0", "redis-8.2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_goes_on_from_7_0_with_valkey_8_0() {
    goes_on("redis-7.0", "valkey-8.0").await;
}

/// A program that says it is an engine, and then does something else.
pub(crate) fn pretender(mesh: &Mesh, does: &str) -> String {
    let path = mesh.dir.path().join("pretender");
    let version = "Redis server v=8.2.3 sha=00000000:0 malloc=libc bits=64";
    let text =
        format!("#!/bin/sh\nif [ \"$1\" = --version ]; then echo '{version}'; exit; fi\n{does}\n");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_way_back_data_that_an_older_engine_cannot_read_is_copied_anew() {
    let Some((old, new)) = pair("redis-7.0", "redis-8.2") else {
        return;
    };
    let mesh = Mesh::provisioned(&old).await;
    write(&mesh, 0, 100).await;
    exchange(&mesh, &new, false).await;
    let before = info(&mesh, 0).await;
    exchange(&mesh, &old, true).await;
    write(&mesh, 100, 150).await;
    has_keys(&mesh, 150).await;
    let after = info(&mesh, 0).await;
    assert_eq!(after.number("sync_full") - before.number("sync_full"), 1);
    // The order to discard stands for a moment longer, and means nothing any more.
    has_on_disk(&mesh, 150).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_does_not_start_is_told_and_the_one_of_before_goes_on() {
    let Some(old) = engine("redis-7.0") else {
        return;
    };
    let mesh = Mesh::provisioned(&old).await;
    write(&mesh, 0, 100).await;
    has_keys(&mesh, 100).await;
    let before = info(&mesh, 0).await;
    let wrong = pretender(&mesh, "echo 'no such instruction'; exit 132");
    mesh.controller
        .change(|record| record.exchange = Some((wrong.clone(), false)));
    let failed = |n: &NodeReport| n.engine_trouble.as_ref().is_some_and(|t| t.starts >= 3);
    let told = mesh
        .controller
        .until("failed starts", REPLICA, failed)
        .await;
    let trouble = told.engine_trouble.unwrap();
    assert_eq!(trouble.engine, wrong);
    assert!(
        trouble.why.contains("no such instruction"),
        "{}",
        trouble.why
    );
    let process = exchange(&mesh, &old, false).await;
    assert_eq!((process.keys, process.engine_trouble), (100, None));
    let after = info(&mesh, 0).await;
    assert_eq!(after.number("sync_full"), before.number("sync_full"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_not_there_ends_nothing() {
    let mesh = Mesh::provisioned("").await;
    let before = mesh.controller.node(REPLICA).unwrap();
    mesh.controller
        .change(|record| record.exchange = Some(("redis-99".to_owned(), false)));
    let failed = |n: &NodeReport| n.engine_trouble.as_ref().is_some_and(|t| t.starts >= 3);
    let told = mesh
        .controller
        .until("what is missing", REPLICA, failed)
        .await;
    let why = told.engine_trouble.unwrap().why;
    assert!(why.contains("--engine redis-99=PATH"), "{why}");
    assert_eq!((told.pid, told.run_id), (before.pid, before.run_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_name_alone_ends_nothing() {
    let Some((old, new)) = pair("redis-7.0", "redis-8.2") else {
        return;
    };
    let mesh = Mesh::provisioned(&old).await;
    let before = [0, 1].map(|n| mesh.controller.node(n).unwrap());
    mesh.controller.change(|record| {
        record.engine.clone_from(&new);
        record.parameters = [("maxmemory".into(), "99mb".into())].into();
    });
    for (node, before) in before.into_iter().enumerate() {
        let claim = |n: &NodeReport| n.max_memory == 99 << 20;
        let after = mesh.controller.until("its parameter", node, claim).await;
        assert_eq!((after.pid, after.run_id), (before.pid, before.run_id));
        assert_eq!(after.engine, Some(old.clone()), "it says what runs");
    }
}

/// Each place where a life of the agent can end, made by hand: what the next one finds is the same.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_died_in_the_middle_is_continued() {
    let Some((old, new)) = pair("redis-7.0", "redis-8.2") else {
        return;
    };
    let mut mesh = Mesh::provisioned(&old).await;
    write(&mesh, 0, 100).await;
    has_keys(&mesh, 100).await;
    let before = info(&mesh, 0).await;
    let dir = mesh.node_dir(REPLICA);
    mesh.stop_agent(REPLICA).await;
    // It had said that a snapshot comes, and asked for it; the process has ended.
    std::fs::write(dir.join("resume"), "").unwrap();
    let pid = mesh.controller.node(REPLICA).unwrap().pid;
    let mut admin = mesh.admin(REPLICA).await;
    let _ = admin.call(&["SHUTDOWN", "SAVE"]).await;
    eventually("its end", async || Process::find(pid).is_none()).await;
    mesh.controller
        .change(|record| record.exchange = Some((new.clone(), false)));
    mesh.start_agent(REPLICA, AtExit::LeaveRunning).await;
    let other = mesh
        .controller
        .until("the other engine", REPLICA, ran(&new))
        .await;
    name(&mesh, &other).await;
    let after = info(&mesh, 0).await;
    assert_eq!(after.number("sync_full"), before.number("sync_full"));

    // It had started the next process, and neither recorded it nor seen it answer.
    mesh.stop_agent(REPLICA).await;
    std::fs::remove_file(dir.join("process")).unwrap();
    std::fs::write(dir.join("resume"), "").unwrap();
    mesh.start_agent(REPLICA, AtExit::LeaveRunning).await;
    let claim = |n: &NodeReport| ran(&new)(n) && n.link_up;
    let adopted = mesh.controller.until("its adoption", REPLICA, claim).await;
    assert_eq!((adopted.pid, adopted.run_id), (other.pid, other.run_id));
    eventually("the mark to be removed", async || {
        !dir.join("resume").exists()
    })
    .await;
    write(&mesh, 100, 150).await;
    has_keys(&mesh, 150).await;
    has_on_disk(&mesh, 150).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_at_any_time_does_not_stop_it() {
    let Some((old, new)) = pair("redis-6.2", "redis-7.0") else {
        return;
    };
    let mut mesh = Mesh::provisioned(&old).await;
    write(&mesh, 0, 100).await;
    has_keys(&mesh, 100).await;
    mesh.stop_agent(REPLICA).await;
    for (round, after_ms) in [1, 30, 80, 150, 300, 600].into_iter().enumerate() {
        let wanted = if round % 2 == 0 { &new } else { &old };
        let mut agent = binary::agent_of(&mesh.controller, "h-b", &mesh.data(REPLICA));
        let pid = agent.id().unwrap();
        eventually("the agent to register", async || {
            mesh.controller
                .register("h-b")
                .is_some_and(|r| r.pid == pid)
        })
        .await;
        mesh.controller
            .change(|record| record.exchange = Some((wanted.clone(), round % 2 == 1)));
        tokio::time::sleep(Duration::from_millis(after_ms)).await;
        binary::end(&mut agent, Signal::KILL).await;
        let mut agent = binary::agent_of(&mesh.controller, "h-b", &mesh.data(REPLICA));
        let other = mesh
            .controller
            .until("the other engine", REPLICA, ran(wanted))
            .await;
        name(&mesh, &other).await;
        has_keys(&mesh, 100).await;
        binary::end(&mut agent, Signal::KILL).await;
    }
}
