//! The leading controller's wall clock jumps by hours, under load: what waits for a window does not begin,
//! what is under way goes on once, and nobody loses the lead.
//!
//! Only the controller of `up` runs with the bent clock, and only the time of day is bent.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use slotmesh_e2e::{
    clock::Bent,
    controllers::{beside, leader, sees_all_nodes},
    ctl, json,
    load::Load,
    roles,
    upgrades::{bake, begin, fill, is_done, list, mesh_with, runs, say, until},
};
use slotmesh_harness::{EtcdCluster, Mesh, MeshOptions, engines};
use slotmesh_proto::task::v1::{ListEpochsRequest, Task};
use tokio::time::{Instant, sleep};

const HOUR_S: i64 = 60 * 60;
/// An operator ends it.
const BAKE_SECONDS: u32 = 3_600;
/// For so long nothing may begin: the leader looks each quarter of a second.
const STILL: Duration = Duration::from_secs(6);

/// A mesh whose controller shows the time that a file says.
struct World {
    mesh: Mesh,
    nodes: usize,
    clock: Bent,
    etcd: EtcdCluster,
}

impl World {
    async fn start(engine: Option<&str>) -> Self {
        let clock = Bent::install(0).unwrap();
        let etcd = EtcdCluster::start(1).await.unwrap();
        let options = MeshOptions {
            store: Some(etcd.store()),
            architecture: Some("standard".into()),
            // By its path: programs elsewhere look for engines elsewhere.
            engine: engine.map(|name| engines::find(name).unwrap().display().to_string()),
            programs: Some(clock.directory().to_owned()),
            ..MeshOptions::default()
        };
        let (mesh, nodes) = mesh_with(options).await.unwrap();
        Self {
            mesh,
            nodes,
            clock,
            etcd,
        }
    }

    fn show(&self, seconds: i64) {
        self.clock.show(seconds).unwrap();
    }

    async fn task(&self, id: &str) -> Task {
        self.mesh.api().await.unwrap().task(id).await.unwrap()
    }

    /// Of the leader.
    async fn term(&self) -> u64 {
        let known = leader(&self.mesh.contract.controller).await.unwrap();
        assert_eq!(known.address, self.mesh.contract.controller);
        known.term
    }

    /// Primaries that there have been.
    async fn epochs(&self) -> Vec<(u64, String)> {
        let request = ListEpochsRequest {
            instance_id: self.mesh.instance().to_owned(),
            ..ListEpochsRequest::default()
        };
        let mut tasks = self.mesh.api().await.unwrap().tasks();
        let epochs = tasks
            .list_epochs(request)
            .await
            .unwrap()
            .into_inner()
            .epochs;
        epochs.into_iter().map(|e| (e.epoch, e.cause)).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_into_the_window_and_back_begins_nothing() {
    let bent = World::start(None).await;
    let mesh = &bent.mesh;
    let load = Load::start(mesh).await.unwrap();
    let (before, epochs, term) = (
        roles(mesh).await.unwrap(),
        bent.epochs().await,
        bent.term().await,
    );
    let hour = jiff::Timestamp::now().as_second() / HOUR_S % 24;
    let window = format!("{:02}:00-{:02}:00", (hour + 2) % 24, (hour + 4) % 24);
    let id = mesh.instance();
    let words = ["instance", "maintain", id, "--window", &window];
    assert!(ctl(mesh, &words).await.unwrap().status.success());
    let replica = &before[0].2[0];
    let words = [
        "--output",
        "json",
        "switchover",
        id,
        "--target",
        replica,
        "--in-window",
    ];
    let started = json(&ctl(mesh, &words).await.unwrap()).unwrap();
    let task = started["task_id"].as_str().unwrap();

    bent.show(2 * HOUR_S);
    let rests = |t: &Task| t.message.contains("clock has jumped");
    until(mesh, task, "it to wait for a steady clock", rests)
        .await
        .unwrap();
    let is_still = async || {
        let quiet = Instant::now() + STILL;
        while Instant::now() < quiet {
            let now = bent.task(task).await;
            assert_eq!(
                now.state(),
                slotmesh_proto::store::v1::TaskState::Scheduled,
                "{now:#?}"
            );
            sleep(Duration::from_millis(200)).await;
        }
    };
    is_still().await;
    bent.show(0);
    is_still().await;
    assert_eq!(bent.epochs().await, epochs);
    assert_eq!(roles(mesh).await.unwrap(), before);
    assert_eq!(bent.term().await, term, "nobody lost the lead");
    say(mesh, &["cancel", task]).await.unwrap();
    // A switchover that somebody asks for does not wait.
    let words = ["switchover", id, "--target", replica, "--wait"];
    let output = ctl(mesh, &words).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    load.audit().await.unwrap();
    bent.mesh.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_back_in_the_middle_of_an_upgrade_makes_nothing_happen_twice() {
    let bent = World::start(Some("redis-7.0")).await;
    let mesh = &bent.mesh;
    let others = beside(mesh, &bent.etcd.store(), 1).await.unwrap();
    sees_all_nodes(mesh, &others[0].address).await.unwrap();
    let name = list(mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(mesh).await.unwrap();
    let (epochs, term) = (bent.epochs().await, bent.term().await);
    let copies = mesh.full_copies();
    let load = Load::start(mesh).await.unwrap();
    let task = begin(mesh, &name, bake(BAKE_SECONDS)).await.unwrap();
    let exchanges = |t: &Task| t.shards[0].phase == "Replicas";
    until(mesh, &task, "Replicas", exchanges).await.unwrap();
    bent.show(-2 * HOUR_S);
    // Said twice, it is the same one.
    let again = begin(mesh, &name, bake(BAKE_SECONDS)).await.unwrap();
    assert_eq!(again, task);
    let bakes = |t: &Task| t.shards[0].phase == "Bake" && t.shards[0].rollback == "Open";
    until(mesh, &task, "the bake, with the way back open", bakes)
        .await
        .unwrap();
    assert_eq!(bent.epochs().await.len(), epochs.len() + 1, "one switch");
    assert_eq!(bent.term().await, term, "nobody lost the lead");
    say(mesh, &["resolve", &task, "finalize"]).await.unwrap();
    until(mesh, &task, "the upgrade to be done", is_done)
        .await
        .unwrap();
    bent.show(0);
    let replica = slotmesh_e2e::controllers::switch_over(mesh, &others[0].address);
    replica.await.unwrap();
    assert_eq!(bent.epochs().await.len(), epochs.len() + 2);
    load.audit().await.unwrap();
    runs(mesh, "8.2.3", bent.nodes, copies).await.unwrap();
    bent.mesh.stop().await.unwrap();
}
