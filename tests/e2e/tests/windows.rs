//! Maintenance windows with real engines and proxies, under load: what waits for one is prepared and not
//! begun while it is shut; one that shuts in the middle stops after the shard that is under way.
//!
//! The window moves, not the clock: after a jump of the clock none counts as open for minutes.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use slotmesh_e2e::{
    ctl, json,
    load::Load,
    proxy_pids,
    upgrades::{bake, begin, fill, is_done, list, mesh_of, nodes, runs, say, until},
};
use slotmesh_harness::Mesh;
use slotmesh_proto::{
    instance::v1::{EffectiveTime, ModifyInstanceMinorVersionRequest},
    task::v1::Task,
};
use tokio::time::{Instant, sleep};

const HOUR_S: i64 = 60 * 60;
/// An operator ends it.
const BAKE_SECONDS: u32 = 3_600;
/// For so long nothing may begin: the leader looks each quarter of a second.
const STILL: Duration = Duration::from_secs(4);

/// The instance's window is to begin so many hours from the hour that it is, and to last twelve.
async fn window(mesh: &Mesh, from: i64) {
    let hour = jiff::Timestamp::now().as_second() / HOUR_S + from;
    let text = format!(
        "{:02}:00-{:02}:00",
        hour.rem_euclid(24),
        (hour + 12).rem_euclid(24)
    );
    let words = ["instance", "maintain", mesh.instance(), "--window", &text];
    let output = ctl(mesh, &words).await.unwrap();
    assert!(output.status.success(), "{output:?}");
}

async fn opens(mesh: &Mesh) {
    window(mesh, -1).await;
}

async fn shuts(mesh: &Mesh) {
    window(mesh, 3).await;
}

/// Every process of the mesh that an upgrade could exchange.
async fn processes(mesh: &Mesh) -> Vec<(String, u64)> {
    let mut all = proxy_pids(mesh).await.unwrap();
    let nodes = nodes(mesh).await.unwrap().into_iter();
    all.extend(nodes.map(|node| (node.node_id, u64::from(node.pid))));
    all.sort();
    all
}

/// Looks for a while that the claim stays true.
async fn stays(mesh: &Mesh, task: &str, claim: impl Fn(&Task) -> bool) {
    let end = Instant::now() + STILL;
    while Instant::now() < end {
        let now = mesh.api().await.unwrap().task(task).await.unwrap();
        assert!(claim(&now), "{now:#?}");
        sleep(Duration::from_millis(200)).await;
    }
}

fn phases(task: &Task) -> Vec<&str> {
    task.shards.iter().map(|s| s.phase.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_is_prepared_at_once_and_goes_from_shard_to_shard_only_in_the_window() {
    let (mesh, count) = mesh_of("cluster", 2, "redis-7.0").await.unwrap();
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(&mesh).await.unwrap();
    shuts(&mesh).await;
    let (before, copies) = (processes(&mesh).await, mesh.full_copies());
    let load = Load::start(&mesh).await.unwrap();
    let request = ModifyInstanceMinorVersionRequest {
        effective_time: EffectiveTime::MaintainTime.into(),
        ..bake(BAKE_SECONDS)
    };
    let task = begin(&mesh, &name, request).await.unwrap();
    let is_prepared = |t: &Task| phases(t) == ["Ready", "Ready"];
    until(&mesh, &task, "the engine to have been tried", is_prepared)
        .await
        .unwrap();
    stays(&mesh, &task, is_prepared).await;
    assert_eq!(processes(&mesh).await, before);

    opens(&mesh).await;
    let bakes = |t: &Task| phases(t) == ["Bake", "Ready"];
    until(&mesh, &task, "the first shard's bake", bakes)
        .await
        .unwrap();
    shuts(&mesh).await;
    say(&mesh, &["resolve", &task, "finalize"]).await.unwrap();
    // What has begun is ended; what has not waits for the next window.
    let waits = |t: &Task| phases(t) == ["Done", "Ready"];
    until(&mesh, &task, "the first shard to be done", waits)
        .await
        .unwrap();
    stays(&mesh, &task, waits).await;

    opens(&mesh).await;
    until(&mesh, &task, "the second shard's bake", |t| {
        phases(t) == ["Done", "Bake"]
    })
    .await
    .unwrap();
    say(&mesh, &["resolve", &task, "finalize"]).await.unwrap();
    until(&mesh, &task, "the upgrade to be done", is_done)
        .await
        .unwrap();
    load.audit().await.unwrap();
    runs(&mesh, "8.2.3", count, copies).await.unwrap();
    mesh.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_are_handed_over_only_in_the_window_and_their_clients_stay() {
    let (mesh, _) = mesh_of("standard", 1, "redis-7.0").await.unwrap();
    shuts(&mesh).await;
    let before = proxy_pids(&mesh).await.unwrap();
    let load = Load::start(&mesh).await.unwrap();
    let id = mesh.instance();
    let words = ["-o", "json", "proxy", "restart", id, "--bake", "1"];
    let words = [&words[..], &["--at", "window"]].concat();
    let words = [&words[..], &["--proxy", &before[0].0]].concat();
    let begun = json(&ctl(&mesh, &words).await.unwrap()).unwrap();
    let task = begun["task_id"].as_str().unwrap();
    stays(&mesh, task, |t| t.proxies[0].phase == "Ready").await;
    assert_eq!(proxy_pids(&mesh).await.unwrap(), before);
    opens(&mesh).await;
    until(&mesh, task, "the hand-over to be done", is_done)
        .await
        .unwrap();
    let after = proxy_pids(&mesh).await.unwrap();
    assert_ne!(after[0], before[0]);
    assert_eq!(after[1..], before[1..]);
    load.audit().await.unwrap();
    mesh.stop().await.unwrap();
}
