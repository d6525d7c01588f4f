//! Planned switchovers under load, on every engine: nothing lost, nothing doubled, no error seen.

#![allow(clippy::unwrap_used)]

use slotmesh_bench::switchover::{Options, Report, Target, run};
use slotmesh_e2e::{Witnesses, ctl, roles};
use slotmesh_harness::{Mesh, MeshOptions};

async fn ten_switchovers(engine: Option<&str>) -> Report {
    let options = MeshOptions {
        engine: engine.map(str::to_owned),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let report = run(&Target::of(&mesh), &Options::default()).await.unwrap();
    mesh.stop().await.unwrap();
    report
}

async fn nobody_notices_on(engine: Option<&str>) {
    let report = ten_switchovers(engine).await;
    assert!(report.kept_every_promise(), "{}", report.text());
    assert_eq!(report.switchovers, 10);
    assert!(
        report.told.acknowledged > 1_000,
        "hardly any load:\n{}",
        report.text()
    );
    // A tenth of the limit of the product would be usual; this catches a hold that was not ended.
    assert!(report.hold.max_ms < 1_000.0, "{}", report.text());
}

#[tokio::test]
async fn nobody_notices_ten_switchovers_on_the_engine_of_this_machine() {
    nobody_notices_on(None).await;
}

#[tokio::test]
async fn nobody_notices_ten_switchovers_on_redis_6_2() {
    nobody_notices_on(Some("redis-6.2")).await;
}

#[tokio::test]
async fn nobody_notices_ten_switchovers_on_redis_7_0() {
    nobody_notices_on(Some("redis-7.0")).await;
}

#[tokio::test]
async fn nobody_notices_ten_switchovers_on_redis_8_2() {
    nobody_notices_on(Some("redis-8.2")).await;
}

#[tokio::test]
async fn nobody_notices_ten_switchovers_on_valkey_8_0() {
    nobody_notices_on(Some("valkey-8.0")).await;
}

#[tokio::test]
async fn nobody_notices_six_shards_that_switch_in_one_request() {
    let options = MeshOptions {
        shards: Some(6),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 3).await.unwrap();
    for _ in 0..2 {
        let before = roles(&mesh).await.unwrap();
        assert_eq!(before.len(), 6);
        let mut arguments = vec!["switchover", mesh.instance(), "--wait"];
        for (_, _, replicas) in &before {
            arguments.extend(["--target", &replicas[0]]);
        }
        let done = ctl(&mesh, &arguments).await.unwrap();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        let now = roles(&mesh).await.unwrap();
        for (before, now) in before.iter().zip(&now) {
            assert_eq!(now.1, before.2[0], "shard {}", now.0);
        }
    }
    witnesses.testify().await.unwrap();
}
