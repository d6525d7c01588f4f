//! Sessions: which controller is dialled, which assignments are taken, what is committed where.

use std::time::Duration;

use slotmesh_agent::controllers::{Commit, CommitAnswer, Controllers};
use tokio::time::Instant;

use crate::{
    controller::{Controller, is_running},
    hosts::{Agent, Mesh, eventually, settings},
};

/// A port on which nobody listens.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_goes_through_its_list_until_a_controller_takes_it() {
    let controller = Controller::start().await;
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(&controller, "h-q", dir.path().to_owned());
    settings.controllers = vec![nobody(), nobody(), controller.address.to_string()];
    let agent = Agent::start(settings).await;
    eventually("a session", async || controller.register("h-q").is_some()).await;
    assert_eq!(
        controller.register("h-q").unwrap().agent_address,
        agent.address
    );
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_is_taken_by_any_controller_refused_by_the_record_and_never_by_silence() {
    let controller = Controller::start().await;
    controller.change(|record| (record.epoch, record.token) = (4, Some("token".to_owned())));
    let controllers = Controllers::new(vec![nobody(), controller.address.to_string()]);
    let commit = Commit {
        instance_id: "r-1".to_owned(),
        shard_id: "s-1".to_owned(),
        task_id: "t-1".to_owned(),
        epoch: 4,
        token: "another".to_owned(),
        target_node_id: "b".to_owned(),
        critical_us: 1,
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    let refused = controllers.commit(&commit, deadline).await;
    assert_eq!(
        refused,
        CommitAnswer::Refused {
            primary_node_id: "a".to_owned()
        }
    );
    let commit = Commit {
        token: "token".to_owned(),
        ..commit
    };
    assert_eq!(
        controllers.commit(&commit, deadline).await,
        CommitAnswer::Accepted
    );
    // Sent again, because the answer was lost.
    assert_eq!(
        controllers.commit(&commit, deadline).await,
        CommitAnswer::Accepted
    );
    controller.refuse_commits();
    let soon = Instant::now() + Duration::from_millis(200);
    assert_eq!(
        controllers.commit(&commit, soon).await,
        CommitAnswer::Unreachable
    );
    let alone = Controllers::new(vec![nobody()]);
    let soon = Instant::now() + Duration::from_millis(200);
    assert_eq!(alone.commit(&commit, soon).await, CommitAnswer::Unreachable);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assignment_of_a_deposed_leader_changes_nothing() {
    let mesh = Mesh::provisioned("").await;
    mesh.controller.change(|record| record.term = 9);
    mesh.controller
        .change(|record| record.parameters = [("maxmemory".into(), "5mb".into())].into());
    mesh.controller
        .until("the new leader's", 0, |n| n.max_memory == 5 << 20)
        .await;
    mesh.controller.change(|record| {
        record.term = 8;
        record.parameters = [("maxmemory".into(), "6mb".into())].into();
    });
    mesh.controller.change(|record| {
        record.term = 9;
        record.parameters = [
            ("maxmemory".into(), "5mb".into()),
            ("hz".into(), "7".into()),
        ]
        .into();
    });
    let mut admin = mesh.admin(0).await;
    eventually("the newest assignment", async || {
        let hz = admin.call(&["CONFIG", "GET", "hz"]).await.unwrap();
        assert_ne!(mesh.controller.node(0).unwrap().max_memory, 6 << 20);
        format!("{hz:?}").contains("55")
    })
    .await;
    mesh.controller.until("still running", 0, is_running).await;
}
