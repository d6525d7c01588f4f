//! The gRPC API for a client that has no proto files: reflection, health, and the event stream.

#![allow(clippy::unwrap_used)]

use slotmesh_e2e::roles;
use slotmesh_harness::{Mesh, MeshOptions};
use slotmesh_proto::{
    store::v1::TaskState,
    task::v1::{WatchTaskRequest, task_service_client::TaskServiceClient},
};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

async fn channel(mesh: &Mesh) -> Channel {
    let uri = format!("http://{}", mesh.contract.controller);
    Endpoint::from_shared(uri).unwrap().connect().await.unwrap()
}

async fn ask(mesh: &Mesh, question: MessageRequest) -> MessageResponse {
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    };
    let mut client = ServerReflectionClient::new(channel(mesh).await);
    let answers = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap();
    answers
        .into_inner()
        .message()
        .await
        .unwrap()
        .unwrap()
        .message_response
        .unwrap()
}

#[tokio::test]
async fn reflection_lists_the_services_and_describes_them() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let listed = ask(&mesh, MessageRequest::ListServices(String::new())).await;
    let MessageResponse::ListServicesResponse(listed) = listed else {
        panic!("{listed:?}")
    };
    let names: Vec<&str> = listed.service.iter().map(|s| s.name.as_str()).collect();
    for wanted in [
        "slotmesh.instance.v1.InstanceService",
        "slotmesh.task.v1.TaskService",
        "slotmesh.fleet.v1.FleetService",
        "slotmesh.topology.v1.TopologyService",
        "grpc.health.v1.Health",
    ] {
        assert!(names.contains(&wanted), "{wanted} is not in {names:?}");
    }
    let symbol = "slotmesh.instance.v1.InstanceService.SwitchOver".to_owned();
    let file = ask(&mesh, MessageRequest::FileContainingSymbol(symbol)).await;
    assert!(
        matches!(file, MessageResponse::FileDescriptorResponse(_)),
        "{file:?}"
    );
}

#[tokio::test]
async fn health_says_serving() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let mut health = HealthClient::new(channel(&mesh).await);
    for service in ["", "slotmesh.instance.v1.InstanceService"] {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
}

#[tokio::test]
async fn the_event_stream_counts_from_one_without_gaps_and_ends_with_the_task() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let target = roles(&mesh).await.unwrap()[0].2[0].clone();
    let request = slotmesh_proto::instance::v1::SwitchOverRequest {
        instance_id: mesh.instance().to_owned(),
        target_primary_node_id: target,
        ..Default::default()
    };
    let task_id = mesh
        .api()
        .await
        .unwrap()
        .switch_over(request)
        .await
        .unwrap();
    let mut tasks = TaskServiceClient::new(channel(&mesh).await);
    let watch = |from_event| WatchTaskRequest {
        task_id: task_id.clone(),
        from_event,
    };
    let mut stream = tasks.watch_task(watch(0)).await.unwrap().into_inner();
    let mut events = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        events.extend(answer.event);
    }
    let numbers: Vec<u64> = events.iter().map(|e| e.number).collect();
    assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<_>>());
    assert_eq!(
        events.last().unwrap().state(),
        TaskState::Done,
        "{events:#?}"
    );
    assert!(
        events.len() > 4,
        "a switchover has more steps than this: {events:#?}"
    );

    let half = events.len() as u64 / 2;
    let mut stream = tasks.watch_task(watch(half)).await.unwrap().into_inner();
    let mut resumed = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        resumed.extend(answer.event);
    }
    assert_eq!(
        resumed[..],
        events[half as usize - 1..],
        "resumed in the middle"
    );
}
