//! Engines are exchanged under load, and nobody notices: no error, nothing lost or doubled, no copy in
//! full, and every node at the new version.

#![allow(clippy::unwrap_used)]

use slotmesh_e2e::{
    ctl,
    load::{LONGEST_WAIT, Load},
    roles,
    upgrades::{
        LIMIT, bake, begin, fill, in_sync, is_done, list, list_broken, mesh_of, nodes, runs, say,
        until, version,
    },
};
use slotmesh_harness::{signals, wait_until};
use slotmesh_proto::{
    instance::v1::{FinalizeBy, ModifyInstanceMinorVersionRequest},
    store::v1::TaskState,
    task::v1::Task,
};

async fn nobody_notices(architecture: &str, from: &str, to: (&str, &str, &str)) {
    let shards = if architecture == "cluster" { 2 } else { 1 };
    let (mesh, count) = mesh_of(architecture, shards, from).await.unwrap();
    let (product, number, engine) = to;
    let name = list(&mesh, product, number, engine).await.unwrap();
    fill(&mesh).await.unwrap();
    let copies = mesh.full_copies();
    let load = Load::start(&mesh).await.unwrap();
    let task = begin(&mesh, &name, bake(2)).await.unwrap();
    let task = until(&mesh, &task, "the upgrade to be done", is_done)
        .await
        .unwrap();
    in_sync(&mesh, count).await.unwrap();
    load.audit().await.unwrap();
    runs(&mesh, number, count, copies).await.unwrap();
    for shard in &task.shards {
        // The measure is 100 ms on a machine of its own.
        let hold_ms_max = LONGEST_WAIT.as_secs_f64() * 1_000.0;
        assert!(shard.hold_ms < hold_ms_max, "{shard:?}");
    }
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_a_standard_instance_that_goes_from_7_0_to_8_2() {
    nobody_notices("standard", "redis-7.0", ("redis", "8.2.3", "redis-8.2")).await;
}

#[tokio::test]
async fn nobody_notices_a_cluster_that_goes_from_7_0_to_8_2() {
    nobody_notices("cluster", "redis-7.0", ("redis", "8.2.3", "redis-8.2")).await;
}

#[tokio::test]
async fn nobody_notices_an_instance_that_goes_from_6_2_by_7_0_to_8_2() {
    let (mesh, count) = mesh_of("standard", 1, "redis-6.2").await.unwrap();
    let listed = [("7.0.15", "redis-7.0"), ("8.2.3", "redis-8.2")];
    for (number, engine) in listed {
        list(&mesh, "redis", number, engine).await.unwrap();
    }
    fill(&mesh).await.unwrap();
    let copies = mesh.full_copies();
    let load = Load::start(&mesh).await.unwrap();
    for (number, _) in listed {
        let words = ["upgrade", mesh.instance(), "--to", number];
        let words = [&words[..], &["--bake", "1", "--wait"]].concat();
        let output = ctl(&mesh, &words).await.unwrap();
        assert!(output.status.success(), "{output:?}");
        runs(&mesh, number, count, copies).await.unwrap();
    }
    load.audit().await.unwrap();
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_a_standard_instance_that_goes_from_7_0_to_valkey_8_0() {
    nobody_notices("standard", "redis-7.0", ("valkey", "8.0.1", "valkey-8.0")).await;
}

#[tokio::test]
async fn nobody_notices_that_an_upgrade_is_taken_back_in_its_bake() {
    let (mesh, count) = mesh_of("standard", 1, "redis-7.0").await.unwrap();
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(&mesh).await.unwrap();
    let before = roles(&mesh).await.unwrap();
    let copies = mesh.full_copies();
    let load = Load::start(&mesh).await.unwrap();
    let options = ModifyInstanceMinorVersionRequest {
        finalize: FinalizeBy::Operator.into(),
        ..ModifyInstanceMinorVersionRequest::default()
    };
    let task = begin(&mesh, &name, options).await.unwrap();
    let bakes = |t: &Task| {
        t.shards
            .iter()
            .all(|s| s.rollback == "Open" && s.phase == "Bake")
    };
    until(&mesh, &task, "the bake, with the way back open", bakes)
        .await
        .unwrap();
    assert_ne!(
        roles(&mesh).await.unwrap()[0].1,
        before[0].1,
        "it has switched"
    );
    say(&mesh, &["cancel", &task]).await.unwrap();
    let back = |t: &Task| t.state() == TaskState::Cancelled;
    let task = until(&mesh, &task, "the way back", back).await.unwrap();
    assert_eq!(task.shards[0].phase, "RolledBack", "{task:?}");
    in_sync(&mesh, count).await.unwrap();
    load.audit().await.unwrap();
    // The only node that had the newer engine copies in full: the older one can't read its files.
    assert!(mesh.full_copies() <= copies + 1);
    assert_eq!(version(&mesh).await.unwrap(), "7.0.15");
    assert_eq!(roles(&mesh).await.unwrap()[0].1, before[0].1);
    for node in nodes(&mesh).await.unwrap() {
        assert_eq!(node.engine_version, "7.0.15", "{node:?}");
    }
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_agents_that_die_in_the_middle_of_an_upgrade() {
    let (mesh, count) = mesh_of("standard", 1, "redis-7.0").await.unwrap();
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(&mesh).await.unwrap();
    let copies = mesh.full_copies();
    let roles = roles(&mesh).await.unwrap();
    let (_, primary, replicas) = &roles[0];
    let load = Load::start(&mesh).await.unwrap();
    let task = begin(&mesh, &name, bake(0)).await.unwrap();
    // The agent of the node that makes way, once its process has ended and before the next has come.
    for node in [&replicas[0], primary] {
        let before = mesh.nodes().await.unwrap();
        let node = before.iter().find(|n| n.id == *node).unwrap();
        wait_until(LIMIT, "the node's process to end", async || {
            let lives = signals::belongs_to(node.pid, &mesh.data());
            anyhow::ensure!(!lives, "{} of {} lives", node.pid, node.id);
            anyhow::Ok(())
        })
        .await
        .unwrap();
        let file = format!("hosts/{}/agent.json", node.host);
        let agent = mesh.bound_pid(file.as_ref()).unwrap();
        signals::kill(agent).unwrap();
    }
    until(&mesh, &task, "the upgrade to be done", is_done)
        .await
        .unwrap();
    in_sync(&mesh, count).await.unwrap();
    load.audit().await.unwrap();
    runs(&mesh, "8.2.3", count, copies).await.unwrap();
    mesh.stop().await.unwrap();
}

#[tokio::test]
async fn an_engine_that_fails_its_trial_touches_nothing() {
    let (mesh, count) = mesh_of("standard", 1, "redis-7.0").await.unwrap();
    fill(&mesh).await.unwrap();
    let copies = mesh.full_copies();
    let _program = list_broken(&mesh, "8.2.3").await.unwrap();
    let before: Vec<_> = nodes(&mesh)
        .await
        .unwrap()
        .into_iter()
        .map(|n| n.pid)
        .collect();
    let task = begin(&mesh, "redis-8.2.3", bake(0)).await.unwrap();
    let failed = |t: &Task| {
        t.shards
            .iter()
            .any(|s| s.message.contains("Illegal instruction"))
    };
    until(&mesh, &task, "the trial's failure", failed)
        .await
        .unwrap();
    let after: Vec<_> = nodes(&mesh)
        .await
        .unwrap()
        .into_iter()
        .map(|n| n.pid)
        .collect();
    assert_eq!(after, before);
    runs(&mesh, "7.0.15", count, copies).await.unwrap();
    mesh.stop().await.unwrap();
}
