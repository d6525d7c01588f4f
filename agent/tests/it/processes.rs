//! Agents that come back, long paths, proxies, and data directories that are not ours.

use std::{os::unix::fs::PermissionsExt, path::Path};

use rustix::process::Signal;
use slotmesh_agent::{app::App, process::Process};
use slotmesh_proto::agent::v1::{Desired, ProcessState, ProxySpec};

use crate::{
    controller::{Controller, is_running},
    hosts::{Agent, AtExit, Mesh, eventually, kill, settings},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_adopts_what_runs() {
    let mut mesh = Mesh::provisioned("").await;
    let before = mesh.controller.node(0).unwrap();
    let instance = mesh.controller.register("h-a").unwrap().agent_instance;
    let mut connection = mesh.proxy_connection().await;
    mesh.stop_agent(0).await;
    connection.call(&["SET", "k", "v"]).await.unwrap();
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    eventually("the agent to register again", async || {
        mesh.controller.register("h-a").unwrap().agent_instance != instance
    })
    .await;
    let after = mesh
        .controller
        .until("adoption", 0, |n| is_running(n) && n.keys == 1)
        .await;
    assert_eq!((after.pid, after.run_id), (before.pid, before.run_id));
    connection.call(&["SET", "k", "v2"]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_not_recorded_is_adopted_too() {
    let mut mesh = Mesh::provisioned("").await;
    let before = mesh.controller.node(0).unwrap();
    // The agent was killed before its own record, or even before the engine wrote its pid file.
    for traces in [&["process"][..], &["process", "redis.pid"]] {
        mesh.stop_agent(0).await;
        for trace in traces {
            std::fs::remove_file(mesh.node_dir(0).join(trace)).unwrap();
        }
        mesh.start_agent(0, AtExit::LeaveRunning).await;
        eventually("the process to be recorded again", async || {
            mesh.node_dir(0).join("process").exists()
        })
        .await;
        let after = mesh.controller.until("adoption", 0, is_running).await;
        assert_eq!(after.pid, before.pid, "without {traces:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_died_while_the_agent_was_away_is_started_without_a_controller() {
    let mut mesh = Mesh::provisioned("").await;
    let before = mesh.controller.node(0).unwrap();
    mesh.stop_agent(0).await;
    kill(before.pid, Signal::KILL);
    let nowhere = Controller::start().await;
    let mut lonely = settings(&nowhere, "h-a", mesh.data(0));
    lonely.controllers = vec!["127.0.0.1:1".to_owned()];
    mesh.agents[0] = Some(Agent::start(lonely).await);
    eventually("a new process", async || {
        let process = Process::load(&mesh.node_dir(0).join("process"));
        process.is_some_and(|p| p.pid != before.pid)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_data_path_gets_its_socket_elsewhere() {
    let controller = Controller::start().await;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("x".repeat(120));
    let agent = Agent::start(settings(&controller, "h-a", data.clone())).await;
    let node = controller.until("running", 0, is_running).await;
    let config = std::fs::read_to_string(data.join("nodes/a/redis.conf")).unwrap();
    let socket = config
        .lines()
        .find_map(|l| l.strip_prefix("unixsocket "))
        .unwrap();
    let socket = Path::new(socket.trim_matches('"'));
    assert!(socket.as_os_str().len() < 108);
    let private = socket
        .parent()
        .unwrap()
        .metadata()
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(private & 0o777, 0o700);
    controller.change(|record| record.desired = crate::controller::removed());
    controller
        .until("removal", 0, |n| n.state() == ProcessState::Removed)
        .await;
    assert!(!socket.exists());
    assert_eq!(Process::find(node.pid), None);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_in_use_or_of_a_newer_release_is_refused() {
    let controller = Controller::start().await;
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&controller, "h-z", dir.path().to_owned());
    let agent = Agent::start(settings.clone()).await;
    let error = App::bind(settings.clone()).await.unwrap_err().to_string();
    assert!(error.contains("another slotmesh-agent"), "{error}");
    agent.stop().await;
    std::fs::write(dir.path().join("schema"), "99\n").unwrap();
    let error = format!("{:?}", App::bind(settings).await.unwrap_err());
    assert!(error.contains("newer slotmesh-agent"), "{error}");
}

const PROXY: &str = r#"#!/bin/sh
while [ $# -gt 1 ]; do
  case "$1" in --data) data="$2";; --listen) listen="$2";; esac
  shift 2
done
echo "{\"pid\":$$,\"address\":\"$listen\",\"admin_address\":\"127.0.0.1:4343\"}" > "$data/proxy.json"
exec sleep 600
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_restarted_at_its_endpoint_adopted_and_removed() {
    let controller = Controller::start().await;
    let dir = tempfile::tempdir().unwrap();
    let binary = dir.path().join("proxy.sh");
    std::fs::write(&binary, PROXY).unwrap();
    std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o700)).unwrap();
    let mut settings = settings(&controller, "h-p", dir.path().join("data"));
    settings.proxy_binary = binary;
    let agent = Agent::start(settings.clone()).await;
    let spec = |desired: Desired| ProxySpec {
        proxy_id: "p-1".to_owned(),
        instance_id: "r-1".to_owned(),
        desired: desired.into(),
        workers: 2,
        ..ProxySpec::default()
    };
    controller.change(|record| record.proxies = vec![spec(Desired::Running)]);
    let running = |p: &slotmesh_proto::agent::v1::ProxyReport| p.state() == ProcessState::Running;
    let first = controller.until_proxy("a running proxy", running).await;
    // Not of the range from which the kernel takes ports of outgoing connections.
    let address: std::net::SocketAddr = first.address.parse().unwrap();
    assert!((20_000..32_000).contains(&address.port()), "{address}");

    kill(first.pid, Signal::KILL);
    let second = controller
        .until_proxy("another proxy process", |p| {
            running(p) && p.pid != first.pid
        })
        .await;
    assert_eq!(second.address, first.address);

    agent.stop().await;
    assert!(Process::find(second.pid).is_some());
    let agent = Agent::start(settings).await;
    controller.change(|record| record.proxies = vec![spec(Desired::Running)]);
    let third = controller.until_proxy("adoption", running).await;
    assert_eq!(third.pid, second.pid);

    controller.change(|record| record.proxies = vec![spec(Desired::Removed)]);
    controller
        .until_proxy("removal", |p| p.state() == ProcessState::Removed)
        .await;
    assert!(!dir.path().join("data/proxies/p-1").exists());
    eventually("the proxy to be gone", async || {
        Process::find(third.pid).is_none()
    })
    .await;
    agent.stop().await;
}
