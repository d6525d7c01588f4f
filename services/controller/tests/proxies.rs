//! UpgradeProxy and RestartProxy through the API: what is admitted, what is refused and in which words,
//! and what agents are told.

#![allow(clippy::unwrap_used)] // A test may: its panic is the finding.

#[allow(dead_code)] // Other tests use the rest.
mod support;

use slotmesh_proto::{
    artifact::v1::{self as artifacts, artifact_service_client::ArtifactServiceClient},
    instance::v1::{self as api, instance_service_client::InstanceServiceClient},
    store::v1::{self as records, TaskState},
    task::v1::{self as tasks, task_service_client::TaskServiceClient},
    topology::v1::{
        self as topology, topology_service_client::TopologyServiceClient, watch_response::Message,
    },
};
use support::{BROKEN, Mesh, wait_for};
use tokio_stream::StreamExt as _;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

struct Stage {
    mesh: Mesh,
    instances: InstanceServiceClient<Channel>,
    artifacts: ArtifactServiceClient<Channel>,
    tasks: TaskServiceClient<Channel>,
    id: String,
}

impl Stage {
    /// An instance of one shard that serves through two fake proxies.
    async fn new() -> Self {
        Self::on(2).await
    }

    /// As [`Stage::new`], on so many hosts.
    async fn on(hosts: usize) -> Self {
        let mut mesh = Mesh::start(hosts).await;
        let channel = mesh.channel().await;
        let mut instances = InstanceServiceClient::new(channel.clone());
        let request = api::CreateInstanceRequest {
            shard_count: 1,
            proxy_count: Some(2),
            ..Default::default()
        };
        let created = wait_for("the creation to be admitted", async || {
            instances.create_instance(request.clone()).await.ok()
        })
        .await
        .into_inner();
        let id = created.instance_id;
        for n in 0..2 {
            mesh.add_proxy(&id, &format!("{id}-proxy-{n}")).await;
        }
        let mut stage = Self {
            mesh,
            instances,
            artifacts: ArtifactServiceClient::new(channel.clone()),
            tasks: TaskServiceClient::new(channel),
            id,
        };
        assert_eq!(stage.ended(&created.task_id).await.state(), TaskState::Done);
        stage
    }

    async fn list(&mut self, version: &str) {
        let artifact = artifacts::Artifact {
            product: records::Product::Proxy.into(),
            version: version.into(),
            sha256: "00".repeat(32),
            source: "file:///opt/slotmesh-proxy".into(),
            ..artifacts::Artifact::default()
        };
        let request = artifacts::AddArtifactRequest {
            artifact: Some(artifact),
            ..artifacts::AddArtifactRequest::default()
        };
        self.artifacts.add_artifact(request).await.unwrap();
    }

    fn upgrade(&self) -> api::UpgradeProxyRequest {
        api::UpgradeProxyRequest {
            instance_id: self.id.clone(),
            bake_seconds: Some(0),
            ..api::UpgradeProxyRequest::default()
        }
    }

    /// Of the first proxy, to whichever host.
    fn rebuild(&self) -> api::RestartProxyRequest {
        api::RestartProxyRequest {
            instance_id: self.id.clone(),
            proxy_instance_ids: vec![format!("{}-proxy-0", self.id)],
            mode: api::RestartMode::Rebuild.into(),
            bake_seconds: Some(0),
            ..api::RestartProxyRequest::default()
        }
    }

    /// Endpoints that clients are shown.
    async fn proxies(&mut self) -> Vec<api::ProxyEndpoint> {
        let request = api::DescribeInstancesRequest::default();
        let answer = self.instances.describe_instances(request).await.unwrap();
        answer.into_inner().instances.remove(0).proxies
    }

    async fn endpoints(&mut self) -> Vec<String> {
        let proxies = self.proxies().await;
        proxies.into_iter().map(|p| p.address).collect()
    }

    async fn ask(
        &mut self,
        request: api::UpgradeProxyRequest,
    ) -> Result<api::UpgradeProxyResponse, Status> {
        let answer = self.instances.upgrade_proxy(request).await;
        answer.map(tonic::Response::into_inner)
    }

    async fn ended(&mut self, task_id: &str) -> tasks::Task {
        let is_open = |state| matches!(state, TaskState::Pending | TaskState::Running);
        wait_for("the task to end", async || {
            let request = tasks::GetTaskRequest {
                task_id: task_id.to_owned(),
            };
            let task = self.tasks.get_task(request).await.ok()?.into_inner().task?;
            (!is_open(task.state())).then_some(task)
        })
        .await
    }

    /// The program that each proxy is to run.
    async fn programs(&mut self) -> Vec<String> {
        let request = api::DescribeEngineVersionRequest {
            instance_id: self.id.clone(),
        };
        let answer = self.instances.describe_engine_version(request).await;
        let proxies = answer.unwrap().into_inner().proxies.into_iter();
        proxies.map(|p| p.program).collect()
    }
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().unwrap().reason
}

#[tokio::test(flavor = "multi_thread")]
async fn every_proxy_is_given_the_newest_listed_program_and_it_can_not_be_removed_then() {
    let mut stage = Stage::new().await;
    stage.list("0.2.0").await;
    let plan = api::UpgradeProxyRequest {
        plan_only: true,
        ..stage.upgrade()
    };
    let plan = stage.ask(plan).await.unwrap();
    assert_eq!(plan.task_id, "");
    assert_eq!(plan.plan.unwrap().proxies.len(), 2);
    let request = api::UpgradeProxyRequest {
        client_token: "once".into(),
        ..stage.upgrade()
    };
    let admitted = stage.ask(request.clone()).await.unwrap();
    let again = stage.ask(request.clone()).await.unwrap();
    assert_eq!(again.task_id, admitted.task_id, "one token, one task");
    let other = api::UpgradeProxyRequest {
        bake_seconds: Some(1),
        ..request
    };
    let reused = stage.ask(other).await.unwrap_err();
    assert_eq!(reason(&reused), "CLIENT_TOKEN_REUSED");
    let task = stage.ended(&admitted.task_id).await;
    assert_eq!(task.state(), TaskState::Done, "{}", task.message);
    assert_eq!(task.kind, "UpgradeProxy");
    let phases: Vec<_> = task.proxies.iter().map(|p| p.phase.as_str()).collect();
    assert_eq!(phases, ["Done", "Done"]);
    assert_eq!(stage.programs().await, ["proxy-0.2.0", "proxy-0.2.0"]);
    let remove = artifacts::RemoveArtifactRequest {
        name: "proxy-0.2.0".into(),
        ..artifacts::RemoveArtifactRequest::default()
    };
    let refused = stage.artifacts.remove_artifact(remove).await.unwrap_err();
    assert_eq!(reason(&refused), "ARTIFACT_IN_USE");
    let nothing = stage.ask(stage.upgrade()).await.unwrap();
    assert_eq!(nothing.task_id, "", "all of them run it");
    let restart = api::RestartProxyRequest {
        instance_id: stage.id.clone(),
        proxy_instance_ids: vec![format!("{}-proxy-1", stage.id)],
        bake_seconds: Some(0),
        ..api::RestartProxyRequest::default()
    };
    let restarted = stage.instances.restart_proxy(restart).await.unwrap();
    let task = stage.ended(&restarted.into_inner().task_id).await;
    assert_eq!(
        (task.state(), task.kind.as_str()),
        (TaskState::Done, "RestartProxy")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_can_not_be_handed_over_to_stops_at_the_canary() {
    let mut stage = Stage::new().await;
    stage.list(BROKEN.trim_start_matches("proxy-")).await;
    let admitted = stage.ask(stage.upgrade()).await.unwrap();
    let task = stage.ended(&admitted.task_id).await;
    assert_eq!(task.state(), TaskState::RolledBack);
    assert!(
        task.message.contains("its sum is another one"),
        "{}",
        task.message
    );
    assert_eq!(task.proxies[1].from_version, "");
    assert!(task.proxies[1].message.starts_with("halted"));
    assert_eq!(stage.programs().await, ["", ""]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_controller_goes_on_where_the_last_one_stopped() {
    let mut stage = Stage::new().await;
    stage.list("0.2.0").await;
    let request = api::UpgradeProxyRequest {
        bake_seconds: Some(2),
        ..stage.upgrade()
    };
    let admitted = stage.ask(request.clone()).await.unwrap();
    let busy = stage.ask(request).await.unwrap_err();
    assert_eq!(reason(&busy), "PROXIES_UNDER_WAY");
    wait_for("the first placement to be written", async || {
        (stage.programs().await[0] == "proxy-0.2.0").then_some(())
    })
    .await;
    stage.mesh.restart().await;
    let task = stage.ended(&admitted.task_id).await;
    assert_eq!(task.state(), TaskState::Done, "{}", task.message);
    assert_eq!(stage.programs().await, ["proxy-0.2.0", "proxy-0.2.0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_meant_is_refused_with_what_to_do() {
    let mut stage = Stage::new().await;
    let none = stage.ask(stage.upgrade()).await.unwrap_err();
    assert_eq!(reason(&none), "ARTIFACT_NOT_FOUND");
    assert!(none.message().contains("slotmesh artifact add"), "{none}");
    stage.list("0.2.0").await;
    let unknown = api::UpgradeProxyRequest {
        proxy_instance_ids: vec!["nobody".into()],
        ..stage.upgrade()
    };
    let unknown = stage.ask(unknown).await.unwrap_err();
    assert_eq!(
        (unknown.code(), reason(&unknown).as_str()),
        (Code::NotFound, "PROXY_NOT_FOUND")
    );
    assert!(
        unknown.message().contains("slotmesh proxy list"),
        "{unknown}"
    );
    let nowhere = stage.rebuild();
    let nowhere = stage.instances.restart_proxy(nowhere).await.unwrap_err();
    assert_eq!(reason(&nowhere), "NO_OTHER_HOST");
    let in_place = api::RestartProxyRequest {
        mode: api::RestartMode::InPlace.into(),
        host_id: "host-1".into(),
        ..stage.rebuild()
    };
    let in_place = stage.instances.restart_proxy(in_place).await.unwrap_err();
    assert_eq!(reason(&in_place), "NOT_A_REBUILD");
    let later = api::UpgradeProxyRequest {
        schedule: Some(tasks::Schedule {
            when: Some(tasks::schedule::When::At("2999-01-01T00:00:00Z".into())),
        }),
        ..stage.upgrade()
    };
    assert_eq!(
        reason(&stage.ask(later).await.unwrap_err()),
        "TOO_FAR_AHEAD"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_sent_to_the_successor_by_whoever_leads_and_the_old_proxy_is_removed() {
    let mut stage = Stage::on(3).await;
    let name = |n: u32| format!("{}-proxy-{n}", stage.id);
    let (old, other, new) = (name(0), name(1), name(2));
    stage.mesh.crowd.lock().unwrap().clients = 9;
    let id = stage.id.clone();
    let request = stage.rebuild();
    let plan = api::RestartProxyRequest {
        plan_only: true,
        ..request.clone()
    };
    let plan = stage.instances.restart_proxy(plan).await.unwrap();
    let plan = plan.into_inner();
    assert_eq!(plan.task_id, "");
    let taken: Vec<_> = stage
        .proxies()
        .await
        .into_iter()
        .map(|p| p.host_id)
        .collect();
    let to = &plan.plan.unwrap().proxies[0].to_host_id;
    assert!(!to.is_empty() && !taken.contains(to), "{to}: {taken:?}");
    let admitted = stage.instances.restart_proxy(request).await.unwrap();
    let task_id = admitted.into_inner().task_id;
    stage.mesh.add_proxy(&id, &new).await;
    let told = |stage: &Stage| stage.mesh.crowd.lock().unwrap().told.clone();
    wait_for("the old proxy to be told", async || {
        (!told(&stage).is_empty()).then_some(())
    })
    .await;
    let (who, leave) = told(&stage).remove(0);
    assert_eq!(
        (who, leave.endpoint.clone()),
        (old.clone(), support::address_of(&new))
    );
    assert!((1..=600_000).contains(&leave.within_ms), "{leave:?}");
    let shown = [&other, &new].map(|p| support::address_of(p));
    assert_eq!(stage.endpoints().await, shown, "no new client goes there");

    stage.mesh.restart().await;
    wait_for("it to be told on its new stream", async || {
        (told(&stage).len() > 1).then_some(())
    })
    .await;
    assert!(told(&stage).iter().all(|(who, _)| *who == old));
    let request = tasks::GetTaskRequest {
        task_id: task_id.clone(),
    };
    let task = wait_for("the task", async || {
        stage.tasks.get_task(request.clone()).await.ok()
    });
    let task = task.await.into_inner().task.unwrap();
    assert_eq!(task.proxies[0].phase, "Drain", "it has clients: {task:?}");
    let cancel = tasks::CancelTaskRequest {
        task_id: task_id.clone(),
        ..Default::default()
    };
    let refused = stage.tasks.cancel_task(cancel).await.unwrap_err();
    assert!(refused.message().contains("on their way"), "{refused}");
    stage.mesh.crowd.lock().unwrap().clients = 0;
    let task = stage.ended(&task_id).await;
    assert_eq!(task.state(), TaskState::Done, "{}", task.message);
    assert_eq!(task.proxies[0].to_proxy_id, new);
    assert_eq!(stage.endpoints().await, shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_never_serves_is_taken_away_by_a_cancel_and_the_old_one_stays() {
    let mut stage = Stage::on(3).await;
    let request = stage.rebuild();
    let admitted = stage.instances.restart_proxy(request).await.unwrap();
    let task_id = admitted.into_inner().task_id;
    wait_for("the successor to be placed", async || {
        (stage.endpoints().await.len() == 3).then_some(())
    })
    .await;
    let cancel = tasks::CancelTaskRequest {
        task_id: task_id.clone(),
        ..Default::default()
    };
    stage.tasks.cancel_task(cancel).await.unwrap();
    let task = stage.ended(&task_id).await;
    assert_eq!(task.state(), TaskState::Cancelled, "{}", task.message);
    assert_eq!(stage.endpoints().await.len(), 2);
    assert!(stage.mesh.crowd.lock().unwrap().told.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_leaves_and_of_which_the_record_says_that_it_stays_is_told_on_its_new_stream()
{
    let stage = Stage::new().await;
    // Names of no proxy of it, so that the others' streams go on.
    for (proxy, leaves) in [("a", true), ("b", false)] {
        let hello = topology::Hello {
            proxy_id: proxy.into(),
            instance_id: stage.id.clone(),
            leaves,
            ..topology::Hello::default()
        };
        let hello = topology::WatchRequest {
            message: Some(topology::watch_request::Message::Hello(hello)),
        };
        let mut client = TopologyServiceClient::new(stage.mesh.channel().await);
        let says = tokio_stream::once(hello).chain(tokio_stream::pending());
        let mut hears = client.watch(says).await.unwrap().into_inner();
        let mut heard = Vec::new();
        // Until there is nothing else to say.
        while let Some(said) = hears.message().await.unwrap() {
            match said.message.unwrap() {
                Message::Heartbeat(_) => break,
                said => heard.push(said),
            }
        }
        assert!(matches!(heard[0], Message::Snapshot(_)), "{heard:?}");
        let stays = heard.iter().any(|said| matches!(said, Message::Stay(_)));
        assert_eq!(stays, leaves, "{heard:?}");
    }
}
