//! Tasks as operators handle them: scheduled, given another time, cancelled, filtered, audited.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, SystemTime};

use serde_json::Value;
use slotmesh_e2e::{ctl, roles};
use slotmesh_harness::{Mesh, MeshOptions, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

async fn mesh() -> Mesh {
    Mesh::start(&MeshOptions {
        architecture: Some("standard".into()),
        replicas: Some(1),
        proxies: Some(1),
        ..MeshOptions::default()
    })
    .await
    .unwrap()
}

/// What the ctl printed.
async fn json(mesh: &Mesh, words: &[&str]) -> Value {
    let words = [words, &["--output", "json"]].concat();
    let output = ctl(mesh, &words).await.unwrap();
    slotmesh_e2e::json(&output).unwrap()
}

async fn replica(mesh: &Mesh) -> String {
    let shards = roles(mesh).await.unwrap();
    shards[0].2[0].clone()
}

/// A time so far from now, as the API reads it.
fn from_now(seconds: u64) -> String {
    let at = jiff::Timestamp::now() + Duration::from_secs(seconds);
    format!("{at:.0}")
}

async fn state_of(mesh: &Mesh, task: &str) -> String {
    let shown = json(mesh, &["task", "show", task]).await;
    shown["state"].as_str().unwrap_or_default().to_owned()
}

async fn wait_for_state(mesh: &Mesh, task: &str, state: &str) {
    wait_until(LIMIT, &format!("task to be {state}"), async || {
        let now = state_of(mesh, task).await;
        if now == state { Ok(()) } else { Err(now) }
    })
    .await
    .unwrap();
}

async fn schedule(mesh: &Mesh, target: &str, more: &[&str]) -> String {
    let id = mesh.contract.instance.clone();
    let mut words = vec!["switchover", &id, "--target", target];
    words.extend(more);
    let started = json(mesh, &words).await;
    started["task_id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduled_switchover_waits_has_no_shard_and_can_be_moved_and_cancelled() {
    let mesh = mesh().await;
    let id = mesh.contract.instance.clone();
    let replica = replica(&mesh).await;
    let (far, near) = (from_now(3_600), from_now(2));
    let task = schedule(&mesh, &replica, &["--at", &far]).await;
    assert_eq!(state_of(&mesh, &task).await, "scheduled");

    // It has no shard: another switchover goes first.
    let other = schedule(&mesh, &replica, &["--wait"]).await;
    assert_eq!(state_of(&mesh, &other).await, "done");
    assert_eq!(state_of(&mesh, &task).await, "scheduled");

    let moved = json(&mesh, &["task", "reschedule", &task, "--at", &near]).await;
    assert!(!moved["not_before"].as_str().unwrap().is_empty(), "{moved}");
    wait_for_state(&mesh, &task, "done").await;
    // Planned anew when it began: its target had become the primary meanwhile.
    let shards = roles(&mesh).await.unwrap();
    assert_eq!(
        shards[0].1,
        moved["shards"][0]["to_node_id"].as_str().unwrap()
    );
    let replica = shards[0].2[0].clone();

    let third = schedule(&mesh, &replica, &["--at", &far]).await;
    let token = ["--client-token", "once"];
    json(&mesh, &[&["task", "cancel", &third], &token[..]].concat()).await;
    wait_for_state(&mesh, &third, "cancelled").await;
    let again = json(&mesh, &[&["task", "cancel", &third], &token[..]].concat()).await;
    assert_eq!(again["state"], "cancelled", "the token's first answer");
    let refused = ctl(&mesh, &["task", "reschedule", &third]).await.unwrap();
    assert_eq!(refused.status.code(), Some(3), "it has ended");

    let only = |kind: &'static str, state: &'static str| {
        let mesh = &mesh;
        let words = [
            "task", "list", "--kind", kind, "--state", state, "--shard", "0",
        ];
        async move { json(mesh, &words).await.as_array().unwrap().len() }
    };
    assert_eq!(only("SwitchOver", "done").await, 2);
    assert_eq!(only("SwitchOver", "cancelled").await, 1);
    assert_eq!(only("Provision", "done").await, 1);
    assert_eq!(only("Provision", "cancelled").await, 0);

    let epochs = json(&mesh, &["epochs", &id]).await;
    let causes: Vec<_> = epochs
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["cause"])
        .collect();
    assert_eq!(causes, ["SwitchOver", "Begin"], "{epochs}");
    assert_eq!(epochs[0]["task_id"], other.as_str());
    // Each epoch has the trace of the task that began it, and the ctl made one for each command.
    let shown = json(&mesh, &["task", "show", &other, "--steps"]).await;
    assert_eq!(shown["trace_id"].as_str().unwrap().len(), 32, "{shown}");
    assert_eq!(epochs[0]["trace_id"], shown["trace_id"]);
    assert_ne!(epochs[0]["trace_id"], epochs[1]["trace_id"]);
    let hold = &shown["steps"][2];
    assert_eq!(
        (&hold["name"], &hold["cancellable"]),
        (&"Hold".into(), &false.into())
    );
    let mesh_data = mesh.data();
    let trace = shown["trace_id"].as_str().unwrap();
    let logs = std::fs::read_dir(mesh_data.join("logs")).unwrap();
    let has_trace = |path: &std::path::Path| {
        let log = std::fs::read_to_string(path).unwrap();
        log.contains(trace)
    };
    let logs: Vec<_> = logs.map(|entry| entry.unwrap().path()).collect();
    let of = |name: &str| {
        let mut found = logs.iter().filter(|path| has_trace(path));
        found.any(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with(name)
        })
    };
    assert!(
        of("controller") && of("agent"),
        "{trace} is not in all logs"
    );
    mesh.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_for_the_maintenance_window_begins_in_it() {
    let mesh = mesh().await;
    let id = mesh.contract.instance.clone();
    let replica = replica(&mesh).await;
    let refused = ctl(&mesh, &["instance", "maintain", &id, "--window", "3-4"])
        .await
        .unwrap();
    assert_eq!(refused.status.code(), Some(3));
    // Twelve hours away, whenever the test runs.
    let hour = (SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs()
        / 3_600)
        % 24;
    let away = format!("{:02}:00-{:02}:00", (hour + 12) % 24, (hour + 13) % 24);
    json(&mesh, &["instance", "maintain", &id, "--window", &away]).await;
    let task = schedule(&mesh, &replica, &["--in-window"]).await;
    assert_eq!(state_of(&mesh, &task).await, "scheduled");
    // Open for half a day to come: the task follows its window.
    let here = format!("{:02}:00-{:02}:00", (hour + 23) % 24, (hour + 13) % 24);
    json(&mesh, &["instance", "maintain", &id, "--window", &here]).await;
    wait_for_state(&mesh, &task, "done").await;
    mesh.stop().await.unwrap();
}
