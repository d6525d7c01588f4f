//! An operator leads an upgrade of three shards: a canary, then two at a time, on whose word alone each
//! bake ends; paused, taken back and begun again on the way, and nobody notices.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use slotmesh_e2e::{
    load::Load,
    upgrades::{begin, fill, in_sync, is_done, list, mesh_of, nodes, runs, say, until},
};
use slotmesh_harness::Mesh;
use slotmesh_proto::{
    instance::v1::{FinalizeBy, ModifyInstanceMinorVersionRequest},
    store::v1::TaskState,
    task::v1::Task,
};
use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

const SHARDS: u32 = 3;
const PARALLEL: usize = 2;
/// Shards are in a phase for longer than that.
const LOOK: Duration = Duration::from_millis(50);
/// The clock would have ended a bake long before.
const BAKE_SECONDS: u32 = 1;
const UNFINALIZED: Duration = Duration::from_secs(2);

/// The phase of each shard.
type Phases = Vec<String>;

fn phases(task: &Task) -> Phases {
    task.shards.iter().map(|s| s.phase.clone()).collect()
}

fn is_active(phase: &str) -> bool {
    !["Stage", "Ready", "Done", "RolledBack"].contains(&phase)
}

/// Every combination of phases that was seen, in their order.
struct Watch {
    stop: CancellationToken,
    work: JoinHandle<Vec<Phases>>,
}

impl Watch {
    async fn start(mesh: &Mesh, task: &str) -> Self {
        let mut api = mesh.api().await.unwrap();
        let task = task.to_owned();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let work = tokio::spawn(async move {
            let mut seen: Vec<Phases> = Vec::new();
            while !stopped.is_cancelled() {
                let now = phases(&api.task(&task).await.unwrap());
                if seen.last() != Some(&now) {
                    seen.push(now);
                }
                sleep(LOOK).await;
            }
            seen
        });
        Self { stop, work }
    }

    /// The canary was alone until it was done, and then there were two at a time, never more.
    async fn audit(self) {
        self.stop.cancel();
        let seen = self.work.await.unwrap();
        let mut most = 0;
        for phases in &seen {
            let active = phases.iter().filter(|p| is_active(p)).count();
            let is_canary = is_active(&phases[0]);
            assert!(active <= if is_canary { 1 } else { PARALLEL }, "{seen:?}");
            most = most.max(active);
        }
        assert_eq!(most, PARALLEL, "{seen:?}");
    }
}

#[tokio::test]
async fn an_operator_finalizes_pauses_takes_back_and_retries_and_two_shards_go_at_a_time() {
    let (mesh, count) = mesh_of("cluster", SHARDS, "redis-7.0").await.unwrap();
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(&mesh).await.unwrap();
    let load = Load::start(&mesh).await.unwrap();
    let options = ModifyInstanceMinorVersionRequest {
        bake_seconds: Some(BAKE_SECONDS),
        finalize: FinalizeBy::Operator.into(),
        parallel_shards: PARALLEL as u32,
        ..ModifyInstanceMinorVersionRequest::default()
    };
    let task = begin(&mesh, &name, options).await.unwrap();
    let watch = Watch::start(&mesh, &task).await;
    let are = |wanted: [&'static str; SHARDS as usize]| {
        let (mesh, task) = (&mesh, &task);
        async move {
            let claim = |t: &Task| phases(t) == wanted;
            until(mesh, task, &format!("{wanted:?}"), claim)
                .await
                .unwrap()
        }
    };

    are(["Bake", "Ready", "Ready"]).await;
    sleep(UNFINALIZED).await;
    are(["Bake", "Ready", "Ready"]).await;
    say(&mesh, &["resolve", &task, "pause"]).await.unwrap();
    say(&mesh, &["resolve", &task, "finalize"]).await.unwrap();
    let paused = are(["Done", "Ready", "Ready"]).await;
    assert!(paused.message.contains("paused"), "{paused:#?}");
    say(&mesh, &["resolve", &task, "resume"]).await.unwrap();

    are(["Done", "Bake", "Bake"]).await;
    say(&mesh, &["cancel", &task]).await.unwrap();
    let halted = |t: &Task| t.state() == TaskState::NeedsOperator;
    let halted = until(&mesh, &task, "two shards to go back", halted)
        .await
        .unwrap();
    assert_eq!(
        phases(&halted),
        ["Done", "RolledBack", "RolledBack"],
        "{halted:#?}"
    );
    in_sync(&mesh, count).await.unwrap();
    let at = |version: &'static str| {
        let mesh = &mesh;
        async move {
            let nodes = nodes(mesh).await.unwrap();
            nodes.iter().filter(|n| n.engine_version == version).count()
        }
    };
    assert_eq!((at("8.2.3").await, at("7.0.15").await), (2, 4));
    // Those that went back have copied in full; from here on nobody does.
    let copies = mesh.full_copies();

    say(&mesh, &["resolve", &task, "retry"]).await.unwrap();
    are(["Done", "Bake", "Bake"]).await;
    say(&mesh, &["resolve", &task, "finalize"]).await.unwrap();
    until(&mesh, &task, "the upgrade to be done", is_done)
        .await
        .unwrap();
    watch.audit().await;
    load.audit().await.unwrap();
    runs(&mesh, "8.2.3", count, copies).await.unwrap();
    mesh.stop().await.unwrap();
}
