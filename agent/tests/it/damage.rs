//! Replicas whose files no engine can load, of real engines: they come back by a full copy, and only
//! when the record and the primary allow it.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::process::Signal;
use slotmesh_agent::probe::Info;

use crate::{
    controller::is_running,
    failover::{keys_of, write},
    hosts::{Mesh, eventually, fetched_engines, kill},
};

const KEYS: u32 = 200;

/// Where a file is spoiled.
#[derive(Debug, Clone, Copy)]
enum Spot {
    /// The snapshot with which it begins, or that is its base.
    Snapshot,
    /// The commands after it.
    Commands,
}

/// `b` has all keys of `a`, half of them in its snapshot and half as commands.
async fn provisioned(engine: &str) -> Mesh {
    let mesh = Mesh::provisioned(engine).await;
    let mut writer = mesh.proxy_connection().await;
    write(&mut writer, 0..KEYS / 2).await;
    has_all(&mesh, KEYS / 2).await;
    let mut b = mesh.admin(1).await;
    // One may be under way since the first copy.
    eventually("a new snapshot", async || {
        b.call(&["BGREWRITEAOF"]).await.is_ok()
    })
    .await;
    eventually("the snapshot to be there", async || {
        let info = Info::read(&mut b, "persistence").await.unwrap();
        info.number("aof_rewrite_in_progress") + info.number("aof_rewrite_scheduled") == 0
    })
    .await;
    write(&mut writer, KEYS / 2..KEYS).await;
    has_all(&mesh, KEYS).await;
    mesh
}

async fn has_all(mesh: &Mesh, keys: u32) {
    let what = format!("b to have {keys} keys");
    eventually(&what, async || keys_of(mesh, 1).await == u64::from(keys)).await;
}

/// The file that has it, and where.
fn spot(dir: &Path, spot: Spot) -> (PathBuf, u64) {
    let (in_one, parts) = (dir.join("appendonly.aof"), dir.join("appendonlydir"));
    let (file, is_first) = if in_one.exists() {
        (in_one, matches!(spot, Spot::Snapshot))
    } else {
        let part = match spot {
            Spot::Snapshot => ".base.rdb",
            Spot::Commands => ".incr.aof",
        };
        let entries = fs::read_dir(parts).unwrap().map(|e| e.unwrap().path());
        let mut found = entries.filter(|p| p.to_str().unwrap().ends_with(part));
        (found.next().unwrap(), true)
    };
    let length = fs::metadata(&file).unwrap().len();
    (file, if is_first { length / 2 } else { length - 500 })
}

async fn kill_with_damage(mesh: &Mesh, at: Spot) {
    let seen = mesh.controller.until("running", 1, is_running).await;
    kill(seen.pid, Signal::STOP);
    let (file, offset) = spot(&mesh.node_dir(1), at);
    let file = fs::File::options().write(true).open(file).unwrap();
    file.write_all_at(&[0xa5; 64], offset).unwrap();
    kill(seen.pid, Signal::KILL);
}

fn starts(mesh: &Mesh) -> usize {
    let log = fs::read(mesh.node_dir(1).join("redis.log")).unwrap();
    let log = String::from_utf8_lossy(&log);
    log.matches("just started").count()
}

fn aside(mesh: &Mesh) -> Vec<PathBuf> {
    let entries = fs::read_dir(mesh.node_dir(1)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let is_aside = |path: &PathBuf| path.to_str().unwrap().contains("/damaged-");
    paths.filter(is_aside).collect()
}

/// It was started again this often, and everything is where it was.
async fn is_left_alone(mesh: &Mesh, times: usize) {
    let before = starts(mesh);
    eventually("more starts", async || starts(mesh) >= before + times).await;
    assert_eq!(aside(mesh), Vec::<PathBuf>::new());
}

/// The record names the new process, which then gets everything from `a`.
async fn is_copied(mesh: &Mesh, old: &str) {
    // One that is about to refuse its files answers for a moment in the middle of loading them.
    let is_new =
        |n: &slotmesh_proto::agent::v1::NodeReport| is_running(n) && !n.loading && n.run_id != old;
    let new = mesh.controller.until("a new process", 1, is_new).await;
    assert_eq!(new.keys, 0, "it has nothing of before");
    mesh.controller
        .change(|record| record.run_ids[1] = new.run_id);
    mesh.controller.until("link up", 1, |n| n.link_up).await;
    has_all(mesh, KEYS).await;
    let kept = aside(mesh);
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert!(fs::read_dir(&kept[0]).unwrap().next().is_some());
}

async fn a_damaged_replica_is_copied_with(engine: &str, at: Spot) {
    println!("{engine} {at:?}");
    let mesh = provisioned(engine).await;
    let old = mesh.controller.record().run_ids[1].clone();
    mesh.controller.change(|record| record.may_recopy = true);
    kill_with_damage(&mesh, at).await;
    is_copied(&mesh, &old).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_with_damaged_files_is_copied_from_its_primary_on_every_engine() {
    for engine in fetched_engines() {
        for at in [Spot::Snapshot, Spot::Commands] {
            a_damaged_replica_is_copied_with(&engine, at).await;
        }
    }
    a_damaged_replica_is_copied_with("", Spot::Commands).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_files_are_left_alone_without_the_record_or_without_a_primary_that_answers() {
    let mesh = provisioned("").await;
    let old = mesh.controller.record().run_ids[1].clone();
    kill_with_damage(&mesh, Spot::Commands).await;
    is_left_alone(&mesh, 5).await;

    let primary = mesh.controller.until("running", 0, is_running).await.pid;
    kill(primary, Signal::STOP);
    mesh.controller.change(|record| record.may_recopy = true);
    is_left_alone(&mesh, 1).await;
    kill(primary, Signal::CONT);
    is_copied(&mesh, &old).await;
}
