//! Engines that are tried beside a node, with real engines.

use std::time::Duration;

use slotmesh_agent::process::Process;
use slotmesh_proto::agent::v1::{
    ExecuteStepResponse, StageEngine, StepOutcome, execute_step_request::Act,
};

use crate::{
    controller::NODES,
    exchange::{REPLICA, engine, has_keys, pair, pretender, write},
    hosts::{Mesh, eventually},
};

/// Asks until the trial has ended.
async fn tried(mesh: &mut Mesh, order: StageEngine) -> ExecuteStepResponse {
    let node = NODES.iter().position(|n| *n == order.node_id).unwrap();
    let request = mesh.request("0/stage", Act::StageEngine(order));
    loop {
        let answer = mesh.agent(node).step(request.clone()).await;
        let staged = answer.staged.clone().unwrap();
        if !staged.under_way {
            return answer;
        }
        assert_eq!(answer.outcome(), StepOutcome::Done, "{answer:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn order(node: usize, engine: &str) -> StageEngine {
    StageEngine {
        node_id: NODES[node].to_owned(),
        engine: engine.to_owned(),
        limit_ms: 10_000,
        without_data: false,
    }
}

/// Nothing of a trial is left, and the node is what it was.
async fn untouched(mesh: &Mesh, pid: u32) {
    let trial = mesh.data(REPLICA).join("trials").join(NODES[REPLICA]);
    assert!(!trial.exists());
    let config = trial.join("redis.conf").display().to_string();
    eventually("the trial's process to be gone", async || {
        Process::find_in(&trial, std::slice::from_ref(&config)).is_none()
    })
    .await;
    assert!(!mesh.node_dir(REPLICA).join("dump.rdb").exists());
    let node = mesh.controller.node(REPLICA).unwrap();
    assert_eq!((node.pid, node.link_up), (pid, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_is_tried_with_the_nodes_data_and_parameters_and_leaves_no_trace() {
    let Some((old, new)) = pair("redis-7.0", "redis-8.2") else {
        return;
    };
    let mut mesh = Mesh::provisioned(&old).await;
    write(&mesh, 0, 500).await;
    has_keys(&mesh, 500).await;
    mesh.controller
        .change(|record| record.parameters = [("maxmemory".into(), "99mb".into())].into());
    let claim = |n: &slotmesh_proto::agent::v1::NodeReport| n.max_memory == 99 << 20;
    let pid = mesh
        .controller
        .until("its parameter", REPLICA, claim)
        .await
        .pid;
    let mut engines = vec![(new, "8.2.3")];
    engines.extend(engine("valkey-8.0").map(|path| (path, "valkey-8.0.1")));
    for (path, version) in engines {
        let answer = tried(&mut mesh, order(REPLICA, &path)).await;
        assert_eq!(answer.outcome(), StepOutcome::Done, "{}", answer.message);
        let staged = answer.staged.unwrap();
        assert_eq!(staged.version, version);
        assert_eq!((staged.keys, staged.keys_expected), (500, 500));
        assert!(staged.bytes > 0 && staged.load_ms > 0);
        untouched(&mesh, pid).await;
    }
    let empty = StageEngine {
        without_data: true,
        ..order(0, &engine("redis-8.2").unwrap())
    };
    let answer = tried(&mut mesh, empty).await;
    assert_eq!(answer.outcome(), StepOutcome::Done, "{}", answer.message);
    assert_eq!(answer.staged.unwrap().keys, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_not_fit_is_refused_with_its_own_words() {
    let Some((old, new)) = pair("redis-7.0", "redis-8.2") else {
        return;
    };
    let mut mesh = Mesh::provisioned(&new).await;
    write(&mesh, 0, 10).await;
    has_keys(&mesh, 10).await;
    let pid = mesh.controller.node(REPLICA).unwrap().pid;
    let refused = async |mesh: &mut Mesh, order: StageEngine, why: &str| {
        let answer = tried(mesh, order).await;
        assert_eq!(answer.outcome(), StepOutcome::NoEffect);
        assert!(answer.message.contains(why), "{}", answer.message);
        untouched(mesh, pid).await;
    };
    refused(&mut mesh, order(REPLICA, &old), "RDB format version").await;
    refused(
        &mut mesh,
        order(REPLICA, "redis-99"),
        "--engine redis-99=PATH",
    )
    .await;
    let ends = pretender(&mesh, "echo 'no such instruction'; exit 132");
    refused(&mut mesh, order(REPLICA, &ends), "no such instruction").await;
    let hangs = pretender(&mesh, "exec sleep 600");
    let hurried = StageEngine {
        limit_ms: 500,
        ..order(REPLICA, &hangs)
    };
    refused(&mut mesh, hurried, "it was at: load").await;
}
