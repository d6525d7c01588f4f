//! SwitchOver says no: with the right code and reason for each cause, and without any effect.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use slotmesh_e2e::{ctl, json, roles, snapshot};
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::{
    instance::v1::{SwitchOverRequest, instance_service_client::InstanceServiceClient},
    task::v1::{ListTasksRequest, task_service_client::TaskServiceClient},
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

const LIMIT: Duration = Duration::from_secs(60);

async fn service(mesh: &Mesh) -> InstanceServiceClient<Channel> {
    let uri = format!("http://{}", mesh.contract.controller);
    InstanceServiceClient::connect(uri).await.unwrap()
}

fn reason(status: &Status) -> String {
    status
        .get_details_error_info()
        .map(|info| info.reason)
        .unwrap_or_default()
}

fn request(instance: &str, targets: &[&str]) -> SwitchOverRequest {
    SwitchOverRequest {
        instance_id: instance.into(),
        target_primary_node_ids: targets.iter().map(|t| (*t).to_owned()).collect(),
        ..SwitchOverRequest::default()
    }
}

/// What is refused in a mesh where these nodes share a shard.
fn refused(
    id: &str,
    primary: &str,
    replicas: &[String],
) -> Vec<(SwitchOverRequest, Code, &'static str)> {
    let many: Vec<String> = (0..51).map(|n| format!("n-{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let with_token = |token: &str| SwitchOverRequest {
        client_token: token.to_owned(),
        ..request(id, &[&replicas[0]])
    };
    vec![
        (request(id, &[]), Code::InvalidArgument, "TARGET_MISSING"),
        (request(id, &[""]), Code::InvalidArgument, "TARGET_MISSING"),
        (
            request(id, &many),
            Code::InvalidArgument,
            "TOO_MANY_TARGETS",
        ),
        (
            request(id, &[&replicas[0], &replicas[0]]),
            Code::InvalidArgument,
            "TARGET_TWICE",
        ),
        (
            request(id, &[&replicas[0], &replicas[1]]),
            Code::InvalidArgument,
            "ONE_NODE_PER_SHARD",
        ),
        (
            request(id, &[primary]),
            Code::FailedPrecondition,
            "NODE_NOT_REPLICA",
        ),
        (
            request(id, &[&replicas[0], "n-none"]),
            Code::NotFound,
            "NODE_NOT_FOUND",
        ),
        (
            request("r-none", &[&replicas[0]]),
            Code::NotFound,
            "INSTANCE_NOT_FOUND",
        ),
        (
            with_token(&"t".repeat(128)),
            Code::InvalidArgument,
            "CLIENT_TOKEN_INVALID",
        ),
        (
            with_token("größe"),
            Code::InvalidArgument,
            "CLIENT_TOKEN_INVALID",
        ),
    ]
}

#[tokio::test]
async fn every_refusal_has_its_code_and_reason_and_changes_nothing() {
    let options = MeshOptions {
        replicas: Some(2),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let mut service = service(&mesh).await;
    let roles = roles(&mesh).await.unwrap();
    let (_, primary, replicas) = &roles[0];
    let cases = refused(mesh.instance(), primary, replicas);
    let before = snapshot(&mesh).await.unwrap();
    for (request, code, expected) in cases {
        let status = service
            .switch_over(request.clone())
            .await
            .expect_err(expected);
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (code, expected),
            "{request:?}"
        );
        assert!(!status.message().is_empty(), "{expected} has no message");
    }
    assert_eq!(
        before,
        snapshot(&mesh).await.unwrap(),
        "a refusal changed something"
    );
}

#[tokio::test]
async fn the_list_of_targets_wins_over_the_single_one() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let roles = roles(&mesh).await.unwrap();
    let request = SwitchOverRequest {
        target_primary_node_id: "n-none".into(),
        ..request(mesh.instance(), &[&roles[0].2[0]])
    };
    let mut api = mesh.api().await.unwrap();
    let task_id = api.switch_over(request).await.unwrap();
    wait_until(LIMIT, "the switchover to be done", async || {
        done(&mesh, &task_id).await
    })
    .await
    .unwrap();
    let now = slotmesh_e2e::roles(&mesh).await.unwrap();
    assert_eq!(now[0].1, roles[0].2[0]);
    assert_eq!(now[1].1, roles[1].1, "the other shard stays");

    let single = SwitchOverRequest {
        target_primary_node_id: roles[0].1.clone(),
        ..request_for(mesh.instance())
    };
    let task_id = api.switch_over(single).await.unwrap();
    wait_until(LIMIT, "the way back", async || done(&mesh, &task_id).await)
        .await
        .unwrap();
    assert_eq!(slotmesh_e2e::roles(&mesh).await.unwrap()[0].1, roles[0].1);
}

fn request_for(instance: &str) -> SwitchOverRequest {
    request(instance, &[])
}

async fn done(mesh: &Mesh, task_id: &str) -> anyhow::Result<()> {
    let task = mesh.api().await?.task(task_id).await?;
    anyhow::ensure!(
        task.state() == slotmesh_proto::store::v1::TaskState::Done,
        "{} {}",
        task.state().as_str_name(),
        task.message
    );
    Ok(())
}

#[tokio::test]
async fn a_client_token_names_one_request_for_ever() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let roles = roles(&mesh).await.unwrap();
    let mut service = service(&mesh).await;
    let with = |token: &str, target: &str| SwitchOverRequest {
        client_token: token.to_owned(),
        ..request(mesh.instance(), &[target])
    };
    let first = with("Token", &roles[0].2[0]);
    let task = service
        .switch_over(first.clone())
        .await
        .unwrap()
        .into_inner()
        .task_id;
    let again = service
        .switch_over(first.clone())
        .await
        .unwrap()
        .into_inner()
        .task_id;
    assert_eq!(task, again, "same token and same body");

    let other = service
        .switch_over(with("Token", &roles[1].2[0]))
        .await
        .expect_err("reused");
    assert_eq!(
        (other.code(), reason(&other).as_str()),
        (Code::AlreadyExists, "CLIENT_TOKEN_REUSED")
    );

    let lower = service
        .switch_over(with("token", &roles[1].2[0]))
        .await
        .unwrap()
        .into_inner();
    assert_ne!(lower.task_id, task, "tokens are case-sensitive");
    for id in [&task, &lower.task_id] {
        wait_until(LIMIT, "both switchovers", async || done(&mesh, id).await)
            .await
            .unwrap();
    }
    let late = service
        .switch_over(first)
        .await
        .unwrap()
        .into_inner()
        .task_id;
    assert_eq!(
        late, task,
        "also after its end, when the node is no replica any more"
    );
    let longest = "x".repeat(127);
    service
        .switch_over(with(&longest, &roles[0].1))
        .await
        .unwrap();
}

#[tokio::test]
async fn all_targets_are_admitted_or_none() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let roles = roles(&mesh).await.unwrap();
    let mut service = service(&mesh).await;
    // The second target is no replica; the first one must not move.
    let mixed = request(mesh.instance(), &[&roles[0].2[0], &roles[1].1]);
    let status = service.switch_over(mixed).await.expect_err("mixed");
    assert_eq!(reason(&status), "NODE_NOT_REPLICA");
    assert_eq!(slotmesh_e2e::roles(&mesh).await.unwrap(), roles);

    let both = ctl(
        &mesh,
        &[
            "switchover",
            mesh.instance(),
            "--target",
            &roles[0].2[0],
            "--target",
            &roles[1].2[0],
            "--wait",
        ],
    );
    assert!(both.await.unwrap().status.success());
    let now = slotmesh_e2e::roles(&mesh).await.unwrap();
    assert_eq!((&now[0].1, &now[1].1), (&roles[0].2[0], &roles[1].2[0]));
}

#[tokio::test]
async fn a_shard_that_is_being_switched_over_is_busy() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let roles = roles(&mesh).await.unwrap();
    let mut service = service(&mesh).await;
    // With the old primary's agent frozen, the first switchover can't get past its preflight.
    let primary = mesh
        .contract
        .nodes
        .iter()
        .find(|n| n.id == roles[0].1)
        .unwrap();
    let file = format!("hosts/{}/agent.json", primary.host);
    let agent = mesh.bound_pid(file.as_ref()).unwrap();
    signals::freeze(agent).unwrap();
    let first = service
        .switch_over(request(mesh.instance(), &[&roles[0].2[0]]))
        .await;
    let second = service
        .switch_over(request(mesh.instance(), &[&roles[0].2[0]]))
        .await;
    signals::thaw(agent).unwrap();
    let task = first.unwrap().into_inner().task_id;
    let status = second.expect_err("busy");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Aborted, "SHARD_BUSY")
    );
    wait_until(LIMIT, "the first task to end", async || {
        let task = mesh.api().await?.task(&task).await?;
        anyhow::ensure!(
            slotmesh_ctl::progress::has_ended(task.state()),
            "{}",
            task.message
        );
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn an_instance_without_replica_is_refused_and_can_be_deleted() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let created = ctl(
        &mesh,
        &[
            "--output",
            "json",
            "instance",
            "create",
            "--architecture",
            "standard",
            "--replicas",
            "0",
            "--proxies",
            "1",
            "--name",
            "alone",
            "--wait",
        ],
    );
    let created = json(&created.await.unwrap()).unwrap();
    let id = created["instance_id"].as_str().unwrap().to_owned();
    assert_eq!(created["task"]["state"], "done");
    let detail = ctl(&mesh, &["--output", "json", "instance", "describe", &id])
        .await
        .unwrap();
    let detail = json(&detail).unwrap();
    assert_eq!(
        (&detail["name"], &detail["architecture"]),
        (&"alone".into(), &"standard".into())
    );
    let node = &detail["shards"][0]["nodes"][0];
    let target = node["node_id"].as_str().unwrap();

    let status = service(&mesh)
        .await
        .switch_over(request(&id, &[target]))
        .await
        .expect_err("alone");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::FailedPrecondition, "NO_REPLICA")
    );

    let pid = u32::try_from(node["pid"].as_u64().unwrap()).unwrap();
    let deleted = ctl(
        &mesh,
        &["--output", "json", "instance", "delete", &id, "--wait"],
    )
    .await
    .unwrap();
    assert_eq!(json(&deleted).unwrap()["task"]["state"], "done");
    assert!(!signals::is_alive(pid), "its node still runs");
    let left = ctl(&mesh, &["--output", "json", "instance", "list"])
        .await
        .unwrap();
    assert_eq!(json(&left).unwrap().as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn the_ctl_tells_refused_from_failed_from_usage() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let refused = ctl(
        &mesh,
        &["switchover", mesh.instance(), "--target", "n-none"],
    )
    .await
    .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(said.contains("NODE_NOT_FOUND"), "{said}");
    let usage = ctl(&mesh, &["switchover", mesh.instance()]).await.unwrap();
    assert_eq!(usage.status.code(), Some(2));
    let unknown = ctl(&mesh, &["task", "show", "t-none"]).await.unwrap();
    assert_eq!(unknown.status.code(), Some(3));
    let nobody = ctl(&mesh, &["--controller", "127.0.0.1:1", "host", "list"]);
    assert_eq!(
        nobody.await.unwrap().status.code(),
        Some(2),
        "--controller twice is a usage error"
    );
}

#[tokio::test]
async fn lists_are_json_for_scripts_and_events_are_one_a_line() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let hosts = json(
        &ctl(&mesh, &["--output", "json", "host", "list"])
            .await
            .unwrap(),
    )
    .unwrap();
    assert_eq!(hosts.as_array().unwrap().len(), 3);
    let proxies = json(
        &ctl(&mesh, &["--output", "json", "proxy", "list"])
            .await
            .unwrap(),
    )
    .unwrap();
    assert_eq!(proxies.as_array().unwrap().len(), 2);
    let tasks = json(
        &ctl(&mesh, &["--output", "json", "task", "list"])
            .await
            .unwrap(),
    )
    .unwrap();
    assert_eq!(tasks[0]["kind"], "Provision");
    let id = tasks[0]["task_id"].as_str().unwrap();
    let events = ctl(&mesh, &["--output", "json", "task", "watch", id])
        .await
        .unwrap();
    assert!(events.status.success());
    let numbers: Vec<u64> = String::from_utf8_lossy(&events.stdout)
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["number"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    let resumed = ctl(
        &mesh,
        &["--output", "json", "task", "watch", id, "--from", "2"],
    )
    .await
    .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&resumed.stdout).lines().count(),
        numbers.len() - 1
    );
    let cancelled = ctl(&mesh, &["task", "cancel", id]).await.unwrap();
    assert_eq!(
        cancelled.status.code(),
        Some(3),
        "a task that is done can't be cancelled"
    );
}

#[tokio::test]
async fn task_lists_come_in_pages() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let roles = roles(&mesh).await.unwrap();
    for target in [&roles[0].2[0], &roles[0].1] {
        let switched = ctl(
            &mesh,
            &["switchover", mesh.instance(), "--target", target, "--wait"],
        );
        assert!(switched.await.unwrap().status.success());
    }
    let uri = format!("http://{}", mesh.contract.controller);
    let mut tasks = TaskServiceClient::connect(uri).await.unwrap();
    let (mut seen, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListTasksRequest {
            page_size: 1,
            page_token,
            ..ListTasksRequest::default()
        };
        let page = tasks.list_tasks(request).await.unwrap().into_inner();
        assert!(page.tasks.len() <= 1);
        seen.extend(page.tasks.into_iter().map(|t| t.kind));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ["SwitchOver", "SwitchOver", "Provision"]);
}
