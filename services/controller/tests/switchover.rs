//! The controller's whole part of an instance's life: create, switch over in fair and foul
//! weather, refuse, restart, delete.

#![allow(clippy::unwrap_used)] // A test may: its panic is the finding.

#[allow(dead_code)] // Other tests use the rest.
mod support;

use slotmesh_proto::{
    instance::v1::{self as api, instance_service_client::InstanceServiceClient},
    store::v1::{InstanceState, NodeRole, TaskState},
    task::v1::{self as tasks, task_service_client::TaskServiceClient},
};
use support::{Behaviour, Mesh, wait_for};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

struct Client {
    instances: InstanceServiceClient<Channel>,
    tasks: TaskServiceClient<Channel>,
}

impl Client {
    async fn of(mesh: &Mesh) -> Self {
        Self {
            instances: InstanceServiceClient::new(mesh.channel().await),
            tasks: TaskServiceClient::new(mesh.channel().await),
        }
    }

    /// An instance that serves through one fake proxy.
    async fn create(&mut self, mesh: &mut Mesh) -> String {
        wait_for("a leader and two hosts", async || {
            let request = api::CreateInstanceRequest {
                proxy_count: Some(1),
                replicas_per_shard: Some(9),
                ..Default::default()
            };
            let refused = self.instances.create_instance(request).await.unwrap_err();
            (refused.code() == Code::InvalidArgument).then_some(())
        })
        .await;
        let request = api::CreateInstanceRequest {
            proxy_count: Some(1),
            ..Default::default()
        };
        let created = wait_for("the creation to be admitted", async || {
            self.instances.create_instance(request.clone()).await.ok()
        })
        .await
        .into_inner();
        let proxy = format!("{}-proxy-0", created.instance_id);
        mesh.add_proxy(&created.instance_id, &proxy).await;
        assert_eq!(self.end_of(&created.task_id).await.state(), TaskState::Done);
        created.instance_id
    }

    async fn end_of(&mut self, task_id: &str) -> tasks::Task {
        wait_for(&format!("task {task_id} to end"), async || {
            let request = tasks::GetTaskRequest {
                task_id: task_id.to_owned(),
            };
            let task = self
                .tasks
                .get_task(request)
                .await
                .ok()?
                .into_inner()
                .task
                .unwrap();
            let is_open = matches!(task.state(), TaskState::Pending | TaskState::Running);
            (!is_open).then_some(task)
        })
        .await
    }

    async fn shards(&mut self, instance: &str) -> Vec<api::Shard> {
        let request = api::DescribeInstanceShardsRequest {
            instance_id: instance.to_owned(),
        };
        self.instances
            .describe_instance_shards(request)
            .await
            .unwrap()
            .into_inner()
            .shards
    }

    async fn replica_of(&mut self, instance: &str, shard: usize) -> String {
        let shards = self.shards(instance).await;
        let replica = shards[shard]
            .nodes
            .iter()
            .find(|n| n.current_role() == NodeRole::Replica);
        replica.unwrap().node_id.clone()
    }

    async fn switch(
        &mut self,
        instance: &str,
        targets: &[&str],
        token: &str,
    ) -> Result<String, Status> {
        let request = api::SwitchOverRequest {
            instance_id: instance.to_owned(),
            target_primary_node_ids: targets.iter().map(|t| (*t).to_owned()).collect(),
            client_token: token.to_owned(),
            ..Default::default()
        };
        Ok(self
            .instances
            .switch_over(request)
            .await?
            .into_inner()
            .task_id)
    }
}

#[tokio::test]
async fn an_instance_is_created_switched_over_and_deleted() {
    let mut mesh = Mesh::start(2).await;
    let mut client = Client::of(&mesh).await;
    let id = client.create(&mut mesh).await;
    for shard in client.shards(&id).await {
        assert_eq!((shard.epoch, shard.mode.as_str()), (1, "Serving"));
        assert_ne!(shard.nodes[0].host_id, shard.nodes[1].host_id);
    }
    let targets = [
        client.replica_of(&id, 0).await,
        client.replica_of(&id, 1).await,
    ];
    let task = client
        .switch(&id, &[&targets[0], &targets[1]], "")
        .await
        .unwrap();
    let ended = client.end_of(&task).await;
    assert_eq!(ended.state(), TaskState::Done, "{ended:?}");
    assert!(
        ended
            .shards
            .iter()
            .all(|s| s.hold_ms > 4.0 && s.critical_ms > 1.0),
        "{ended:?}"
    );
    for (shard, target) in client.shards(&id).await.iter().zip(&targets) {
        assert_eq!(shard.epoch, 2);
        let primary = shard
            .nodes
            .iter()
            .find(|n| n.current_role() == NodeRole::Primary)
            .unwrap();
        assert_eq!(primary.node_id, *target);
        let route = mesh.routes.lock().unwrap()[&shard.shard_id].clone();
        assert_eq!(
            (route.epoch, &route.primary_address),
            (2, &support::address_of(target))
        );
        assert!(route.hold.is_none());
    }
    let request = api::DeleteInstanceRequest {
        instance_id: id,
        ..Default::default()
    };
    let deleted = client
        .instances
        .delete_instance(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        client.end_of(&deleted.task_id).await.state(),
        TaskState::Done
    );
    let left = client
        .instances
        .describe_instances(api::DescribeInstancesRequest::default());
    assert!(left.await.unwrap().into_inner().instances.is_empty());
}

#[tokio::test]
async fn a_switch_that_fails_leaves_the_old_primary_and_a_free_shard() {
    let mut mesh = Mesh::start(2).await;
    let mut client = Client::of(&mesh).await;
    let id = client.create(&mut mesh).await;
    let target = client.replica_of(&id, 0).await;
    for (behaviour, taken_back) in [(Behaviour::NoEffect, 0), (Behaviour::Breaks, 1)] {
        *mesh.behaviour.lock().unwrap() = behaviour;
        let task = client.switch(&id, &[&target], "").await.unwrap();
        let ended = client.end_of(&task).await;
        assert_eq!(
            ended.state(),
            TaskState::RolledBack,
            "{behaviour:?}: {ended:?}"
        );
        assert_eq!(*mesh.taken_back.lock().unwrap(), taken_back);
        let shard = &client.shards(&id).await[0];
        assert_eq!((shard.epoch, shard.mode.as_str()), (1, "Serving"));
        let route = mesh.routes.lock().unwrap()[&shard.shard_id].clone();
        assert!(route.hold.is_none(), "the hold is withdrawn");
    }
    *mesh.behaviour.lock().unwrap() = Behaviour::CannotCommit;
    let task = client.switch(&id, &[&target], "").await.unwrap();
    assert_eq!(client.end_of(&task).await.state(), TaskState::Done);
    assert_eq!(client.shards(&id).await[0].epoch, 2);
}

#[tokio::test]
async fn refusals_have_a_code_and_a_reason_and_change_nothing() {
    let mut mesh = Mesh::start(2).await;
    let mut client = Client::of(&mesh).await;
    let id = client.create(&mut mesh).await;
    let before = client.shards(&id).await;
    let replica = client.replica_of(&id, 0).await;
    let primary = before[0]
        .nodes
        .iter()
        .find(|n| n.node_id != replica)
        .unwrap()
        .node_id
        .clone();
    let long = "x".repeat(128);
    for (instance, targets, token, code, reason) in [
        (&*id, &[][..], "", Code::InvalidArgument, "TARGET_MISSING"),
        (
            &id,
            &[&*replica, &*replica],
            "",
            Code::InvalidArgument,
            "TARGET_TWICE",
        ),
        (
            &id,
            &[&*replica],
            &*long,
            Code::InvalidArgument,
            "CLIENT_TOKEN_INVALID",
        ),
        (&id, &["r-none-0-0"], "", Code::NotFound, "NODE_NOT_FOUND"),
        (
            &id,
            &[&*primary],
            "",
            Code::FailedPrecondition,
            "NODE_NOT_REPLICA",
        ),
        (
            "r-none",
            &[&*replica],
            "",
            Code::NotFound,
            "INSTANCE_NOT_FOUND",
        ),
    ] {
        let refused = client.switch(instance, targets, token).await.unwrap_err();
        assert_eq!(refused.code(), code, "{reason}: {refused:?}");
        assert_eq!(refused.get_details_error_info().unwrap().reason, reason);
    }
    assert_eq!(client.shards(&id).await, before);
    let listed = client
        .tasks
        .list_tasks(tasks::ListTasksRequest::default())
        .await
        .unwrap();
    assert_eq!(listed.into_inner().tasks.len(), 1, "the creation only");
}

#[tokio::test]
async fn a_token_names_one_request_for_ever() {
    let mut mesh = Mesh::start(2).await;
    let mut client = Client::of(&mesh).await;
    let id = client.create(&mut mesh).await;
    let (first, second) = (
        client.replica_of(&id, 0).await,
        client.replica_of(&id, 1).await,
    );
    let task = client.switch(&id, &[&first], "once").await.unwrap();
    assert_eq!(client.switch(&id, &[&first], "once").await.unwrap(), task);
    let refused = client.switch(&id, &[&second], "once").await.unwrap_err();
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "CLIENT_TOKEN_REUSED"
    );
    assert_eq!(client.end_of(&task).await.state(), TaskState::Done);
    assert_eq!(client.switch(&id, &[&first], "once").await.unwrap(), task);
    // Case matters: another token, and the node is the primary by now.
    let other = client.switch(&id, &[&first], "Once").await.unwrap_err();
    assert_eq!(
        other.get_details_error_info().unwrap().reason,
        "NODE_NOT_REPLICA"
    );
}

#[tokio::test]
async fn records_and_events_survive_a_restart_and_a_watch_resumes() {
    let mut mesh = Mesh::start(2).await;
    let mut client = Client::of(&mesh).await;
    let id = client.create(&mut mesh).await;
    let target = client.replica_of(&id, 0).await;
    let task = client.switch(&id, &[&target], "").await.unwrap();
    client.end_of(&task).await;
    mesh.restart().await;
    let mut watched = wait_for("the controller to answer again", async || {
        let request = tasks::WatchTaskRequest {
            task_id: task.clone(),
            from_event: 3,
        };
        Some(client.tasks.watch_task(request).await.ok()?.into_inner())
    })
    .await;
    let mut numbers = Vec::new();
    let mut steps = Vec::new();
    while let Some(event) = watched.message().await.unwrap() {
        let event = event.event.unwrap();
        numbers.push(event.number);
        steps.push(event.step);
    }
    assert_eq!(numbers, (3..3 + numbers.len() as u64).collect::<Vec<_>>());
    assert_eq!(steps.last().unwrap(), "Ended");
    assert!(steps.iter().any(|s| s == "Declare"), "{steps:?}");
    let instances = client
        .instances
        .describe_instances(api::DescribeInstancesRequest::default());
    assert_eq!(
        instances.await.unwrap().into_inner().instances[0].state(),
        InstanceState::Running
    );
    // And the restarted one goes on working.
    let back = client.replica_of(&id, 0).await;
    let task = wait_for("a switchover to be admitted", async || {
        client.switch(&id, &[&back], "").await.ok()
    })
    .await;
    assert_eq!(client.end_of(&task).await.state(), TaskState::Done);
}
