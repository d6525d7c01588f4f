//! One trace from a caller to the epochs that its call began, and the page of metrics.

#![allow(clippy::unwrap_used)] // A test may: its panic is the finding.

#[allow(dead_code)] // Other tests use the rest.
mod support;

use slotmesh_proto::{
    fleet::v1::{ListHostsRequest, fleet_service_client::FleetServiceClient},
    instance::v1::{self as api, instance_service_client::InstanceServiceClient},
    store::v1::{NodeRole, TaskState},
    task::v1::{self as tasks, task_service_client::TaskServiceClient},
};
use support::{Mesh, wait_for};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Request, transport::Channel};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn traced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let metadata = request.metadata_mut();
    metadata.insert("traceparent", parent.parse().unwrap());
    request
}

async fn done(tasks: &mut TaskServiceClient<Channel>, id: &str) -> tasks::Task {
    wait_for(&format!("task {id} to be done"), async || {
        let task_id = id.to_owned();
        let answer = tasks.get_task(tasks::GetTaskRequest { task_id }).await;
        let task = answer.ok()?.into_inner().task.unwrap();
        (task.state() == TaskState::Done).then_some(task)
    })
    .await
}

/// An instance that serves through one fake proxy, created with [`TRACE`].
async fn serving(mesh: &mut Mesh) -> (String, String) {
    let mut fleet = FleetServiceClient::new(mesh.channel().await);
    // Else both nodes may be placed on the one that came first.
    wait_for("both hosts to be there", async || {
        let listed = fleet.list_hosts(ListHostsRequest {}).await.ok()?;
        (listed.into_inner().hosts.len() == 2).then_some(())
    })
    .await;
    let mut instances = InstanceServiceClient::new(mesh.channel().await);
    let request = api::CreateInstanceRequest {
        proxy_count: Some(1),
        ..Default::default()
    };
    let created = wait_for("the creation to be admitted", async || {
        let request = traced(request.clone());
        instances.create_instance(request).await.ok()
    })
    .await
    .into_inner();
    let proxy = format!("{}-proxy-0", created.instance_id);
    mesh.add_proxy(&created.instance_id, &proxy).await;
    (created.instance_id, created.task_id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callers_trace_is_its_tasks_its_events_and_its_epochs_and_a_call_without_gets_one() {
    let mut mesh = Mesh::start(2).await;
    let (instance_id, created) = serving(&mut mesh).await;
    let mut instances = InstanceServiceClient::new(mesh.channel().await);
    let mut tasks = TaskServiceClient::new(mesh.channel().await);
    assert_eq!(done(&mut tasks, &created).await.trace_id, TRACE);
    let watch = tasks::WatchTaskRequest {
        task_id: created.clone(),
        from_event: 1,
    };
    let mut events = tasks.watch_task(watch).await.unwrap().into_inner();
    while let Some(said) = events.message().await.unwrap() {
        assert_eq!(said.event.unwrap().trace_id, TRACE);
    }

    let describe = api::DescribeInstanceShardsRequest {
        instance_id: instance_id.clone(),
    };
    let shards = instances.describe_instance_shards(describe).await.unwrap();
    let nodes = shards.into_inner().shards[0].nodes.clone();
    let replica = nodes.iter().find(|n| n.current_role() == NodeRole::Replica);
    let request = api::SwitchOverRequest {
        instance_id: instance_id.clone(),
        target_primary_node_id: replica.unwrap().node_id.clone(),
        ..Default::default()
    };
    let switched = wait_for("the switchover to be admitted", async || {
        instances.switch_over(request.clone()).await.ok()
    })
    .await
    .into_inner()
    .task_id;
    let own = done(&mut tasks, &switched).await.trace_id;
    assert!(own.len() == 32 && own != TRACE, "{own:?}");

    let request = tasks::ListEpochsRequest {
        instance_id,
        shard_id: "0".into(),
        page_size: 0,
    };
    let epochs = tasks.list_epochs(request).await.unwrap().into_inner();
    let of = |cause: &str| {
        let found = epochs.epochs.iter().find(|e| e.cause == cause).unwrap();
        assert!(!found.who.is_empty(), "{found:?}");
        found.trace_id.clone()
    };
    assert_eq!((of("SwitchOver"), of("Begin")), (own, TRACE.to_owned()));

    // Over: the answer to a cancel is in the words of the table of steps.
    let cancel = tasks::CancelTaskRequest {
        task_id: switched.clone(),
        client_token: String::new(),
    };
    let refused = tasks.cancel_task(cancel).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(refused.message(), "the task has ended");
    let steps = done(&mut tasks, &switched).await.steps;
    let cancellable: Vec<_> = steps.iter().filter(|s| s.cancellable).collect();
    let names: Vec<_> = cancellable.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["Preflight", "Prewarm"]);
    assert!(steps.iter().all(|s| !s.current), "it has ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_shows_what_it_sees_on_its_page_of_metrics() {
    let mut mesh = Mesh::start(2).await;
    let (_, created) = serving(&mut mesh).await;
    done(&mut TaskServiceClient::new(mesh.channel().await), &created).await;
    let page = wait_for("the leader to count its hosts", async || {
        let page = get(&mesh.admin(), "/metrics").await;
        page.contains("slotmesh_controller_hosts 2").then_some(page)
    })
    .await;
    for line in [
        "slotmesh_controller_leading 1",
        "slotmesh_controller_failover_braked 0",
        "slotmesh_controller_failover_brakes_total 0",
        "slotmesh_controller_hosts_silent 0",
        "slotmesh_controller_tasks_open 0",
        "slotmesh_controller_tasks_need_operator 0",
    ] {
        assert!(page.contains(line), "{line} is not in\n{page}");
    }
    assert!(get(&mesh.admin(), "/ready").await.ends_with("ready\n"));
}

async fn get(address: &str, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
