//! The judges of tests/judges against whole meshes: nothing that they try may tell an instance from
//! one Redis.
//!
//! A run of all tests tries less of each than a judge by itself does; `SLOTMESH_JUDGES=full` tries
//! everything.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use slotmesh_harness::{Mesh, MeshOptions, RedisServer, engines, programs};
use slotmesh_judges::{differential, isolation};
use tokio::process::Command;

/// As many as the promise says, or as many as a run of all tests has time for.
fn full_or<T>(full: T, some: T) -> T {
    let given = std::env::var("SLOTMESH_JUDGES").unwrap_or_default();
    match given.as_str() {
        "full" => full,
        "" => some,
        other => panic!("SLOTMESH_JUDGES is {other:?}; it may be `full`"),
    }
}

async fn three_shards(proxies: u32) -> Mesh {
    let options = MeshOptions {
        shards: Some(3),
        replicas: Some(0),
        proxies: Some(proxies),
        workers: Some(2),
        ..MeshOptions::default()
    };
    Mesh::start(&options).await.unwrap()
}

#[tokio::test]
async fn a_cluster_answers_as_one_redis_or_says_crossslot() {
    let mesh = three_shards(1).await;
    // The one that the promise names; PEXPIRETIME, LCS and others are not in older ones.
    let engine = engines::find("redis-7.0").unwrap();
    let one = RedisServer::start(&engine, &["--databases", "256"])
        .await
        .unwrap();
    let plan = differential::Plan {
        ours: mesh.contract.proxies[0].clone(),
        one: one.address.clone(),
        seed: 20_261,
        cases: full_or(100_000, 20_000),
    };
    let outcome = tokio::task::spawn_blocking(move || differential::run(&plan));
    let outcome = outcome.await.unwrap().unwrap();
    assert!(outcome.is_fine(), "{outcome}");
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn no_reply_is_wrong_while_other_clients_die_in_every_state() {
    let mesh = three_shards(2).await;
    let crowd = isolation::Crowd {
        addresses: mesh.contract.proxies.clone(),
        seed: 11,
        clients: full_or(100, 40),
        commands: full_or(10_000, 2_000),
        misfits: full_or(100, 20),
    };
    let seen = tokio::task::spawn_blocking(move || isolation::run(&crowd));
    let seen = seen.await.unwrap().unwrap();
    assert!(seen.wrong.is_empty(), "{seen}");
    assert!(seen.deaths > 100, "hardly any client died: {seen}");
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn bytes_may_arrive_in_any_way_and_slots_are_those_of_the_whole_key() {
    let mesh = three_shards(1).await;
    let framing = isolation::Framing {
        address: mesh.contract.proxies[0].clone(),
        seed: 5,
        gaps: full_or(5_000, 300),
        floods: full_or(500, 30),
    };
    let tried = tokio::task::spawn_blocking(move || isolation::framing(&framing));
    let tried = tried.await.unwrap().unwrap();
    assert!(tried.gaps > 5_000, "{tried}");
    mesh.stop().await.unwrap();
}

/// Redis's own suite in a process of its own: it starts a mesh of these programs.
async fn redis_suite(kind: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = Command::new("python3");
    command
        .arg(root.join("tests/judges/tcl_suite"))
        .args([kind, "--programs"])
        .arg(programs::directory().unwrap())
        .kill_on_drop(true);
    if !full_or(true, false) {
        command.arg("--quick");
    }
    let output = command.output().await.unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn redis_own_suite_passes_through_a_standard_instance() {
    redis_suite("standard").await;
}

#[tokio::test]
async fn redis_own_suite_passes_through_a_cluster_but_for_what_is_documented() {
    redis_suite("cluster").await;
}
