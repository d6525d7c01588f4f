//! Nodes from birth to removal.

use rustix::process::Signal;
use slotmesh_agent::control::Control;
use slotmesh_proto::{agent::v1::ProcessState, store::v1::NodeRole};

use crate::{
    controller::{is_running, password, removed},
    hosts::{AtExit, Mesh, eventually, kill},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_born_fenced_and_serves_once_the_record_names_it() {
    let mesh = Mesh::start("").await;
    let node = mesh.controller.until("running", 0, is_running).await;
    assert_eq!((node.granted_epoch, node.assigned_epoch), (0, 0));
    let refused = Control::tcp(&node.address, "px-1", &password("px-1")).await;
    assert!(format!("{refused:?}").contains("WRONGPASS"), "{refused:?}");
    let anybody = Control::tcp(&node.address, "default", "").await;
    assert!(anybody.is_err());
    let config = std::fs::read_to_string(mesh.node_dir(0).join("redis.conf")).unwrap();
    let secret = std::fs::read_to_string(mesh.node_dir(0).join("admin.secret")).unwrap();
    assert!(!config.contains(secret.trim()) && !config.contains("replicaof"));

    mesh.controller.provision().await;
    mesh.proxy_connection()
        .await
        .call(&["SET", "k", "v"])
        .await
        .unwrap();
    let replica = mesh.controller.node(1).unwrap();
    assert_eq!(replica.observed_role(), NodeRole::Replica);
    assert_eq!(replica.granted_epoch, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_are_set_and_the_agents_own_are_refused() {
    let mesh = Mesh::provisioned("").await;
    mesh.controller.change(|record| {
        record
            .parameters
            .insert("maxmemory".to_owned(), "123mb".to_owned());
        record
            .parameters
            .insert("masteruser".to_owned(), "evil".to_owned());
    });
    mesh.controller
        .until("maxmemory", 0, |n| n.max_memory == 123 << 20)
        .await;
    let login = mesh
        .admin(0)
        .await
        .call(&["CONFIG", "GET", "masteruser"])
        .await
        .unwrap();
    assert!(!format!("{login:?}").contains("evil"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_process_stays_fenced_until_it_is_named() {
    let mesh = Mesh::provisioned("").await;
    mesh.proxy_connection()
        .await
        .call(&["SET", "k", "v"])
        .await
        .unwrap();
    mesh.admin(0)
        .await
        .call(&["WAITAOF", "1", "0", "1000"])
        .await
        .ok();
    let before = mesh.controller.node(0).unwrap();
    kill(before.pid, Signal::KILL);
    let after = mesh
        .controller
        .until("another process", 0, |n| {
            is_running(n) && n.run_id != before.run_id && n.error.contains("does not name")
        })
        .await;
    assert_eq!(after.address, before.address);
    assert_eq!((after.granted_epoch, after.assigned_epoch), (0, 0));
    let refused = Control::tcp(&after.address, "px-1", &password("px-1")).await;
    assert!(refused.is_err());
    mesh.controller
        .change(|record| record.run_ids[0].clone_from(&after.run_id));
    mesh.controller
        .until("grant", 0, |n| n.granted_epoch == 1)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_restarted_primary_feeds_nobody() {
    let mesh = Mesh::provisioned("").await;
    mesh.proxy_connection()
        .await
        .call(&["SET", "k", "v"])
        .await
        .unwrap();
    mesh.controller.until("the key", 1, |n| n.keys == 1).await;
    let before = mesh.controller.node(0).unwrap();
    std::fs::remove_dir_all(mesh.node_dir(0).join("appendonlydir")).unwrap();
    kill(before.pid, Signal::KILL);
    let after = mesh
        .controller
        .until("another process", 0, |n| {
            is_running(n) && n.run_id != before.run_id
        })
        .await;
    assert_eq!((after.keys, after.granted_epoch), (0, 0));
    // The replica has tried to come back and was sent away.
    let mut admin = mesh.admin(1).await;
    eventually("the replica's refused login", async || {
        let log = std::fs::read_to_string(mesh.node_dir(1).join("redis.log")).unwrap();
        log.contains("WRONGPASS") || log.contains("Unable to AUTH")
    })
    .await;
    assert_eq!(admin.call(&["DBSIZE"]).await.unwrap().as_int(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_node_is_stopped_and_leaves_nothing() {
    let mesh = Mesh::provisioned("").await;
    let pids = [0, 1].map(|n| mesh.controller.node(n).unwrap().pid);
    mesh.controller.change(|record| record.desired = removed());
    for (node, pid) in pids.into_iter().enumerate() {
        mesh.controller
            .until("removal", node, |n| n.state() == ProcessState::Removed)
            .await;
        assert!(!mesh.node_dir(node).exists());
        assert_eq!(slotmesh_agent::process::Process::find(pid), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_engine_is_reported_with_what_to_do() {
    let mesh = Mesh::start("redis-99").await;
    let node = mesh
        .controller
        .until("failure", 0, |n| n.state() == ProcessState::Failed)
        .await;
    assert!(
        node.error.contains("--engine redis-99=PATH"),
        "{}",
        node.error
    );
    // And it is tried again when the assignment changes its mind.
    mesh.controller.change(|record| record.engine.clear());
    mesh.controller.until("running", 0, is_running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_stops_all_leaves_no_process_and_loses_no_data() {
    let mut mesh = Mesh::provisioned("").await;
    mesh.proxy_connection()
        .await
        .call(&["SET", "k", "v"])
        .await
        .unwrap();
    let pid = mesh.controller.node(0).unwrap().pid;
    mesh.stop_agent(0).await;
    mesh.start_agent(0, AtExit::StopAll).await;
    mesh.controller
        .until("adoption", 0, |n| is_running(n) && n.pid == pid)
        .await;
    mesh.stop_agent(0).await;
    assert_eq!(slotmesh_agent::process::Process::find(pid), None);
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    mesh.controller
        .until("data", 0, |n| is_running(n) && n.pid != pid && n.keys == 1)
        .await;
}

/// What it loads, the engine executes as its default user, in transactions with that user's rights.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_process_has_the_transactions_of_its_append_only_file() {
    let mut mesh = Mesh::provisioned("").await;
    let mut connection = mesh.proxy_connection().await;
    let script = "redis.call('SET', 'c', '3') redis.call('SET', 'd', '4')";
    for command in [
        &["MULTI"][..],
        &["SET", "a", "1"],
        &["SET", "b", "2"],
        &["EXEC"],
        &["EVAL", script, "0"],
    ] {
        connection.call(command).await.unwrap();
    }
    let pid = mesh.controller.node(0).unwrap().pid;
    mesh.stop_agent(0).await;
    mesh.start_agent(0, AtExit::StopAll).await;
    mesh.controller
        .until("adoption", 0, |n| is_running(n) && n.pid == pid)
        .await;
    mesh.stop_agent(0).await;
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    mesh.controller
        .until("data", 0, |n| is_running(n) && n.pid != pid && n.keys == 4)
        .await;
    let anybody = Control::tcp(&mesh.controller.node(0).unwrap().address, "default", "").await;
    assert!(anybody.is_err());
}
