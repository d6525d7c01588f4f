//! An agent that died inside a hand-over: what its next life makes of the journal and of what it
//! sees.

use slotmesh_agent::{
    control::Control,
    fence,
    handover::driver::set_login,
    journal::{
        Journal,
        record::{Begun, Fact, FenceMark},
    },
};
use slotmesh_proto::agent::v1::{
    ExecuteStepRequest, HandOver, StepOutcome, execute_step_request::Act,
};

use crate::{
    controller::is_running,
    hosts::{AtExit, Mesh, eventually},
};

/// Stops the agent of the old primary and leaves what a crash after the fence leaves.
async fn crash_after_fence(mesh: &mut Mesh) -> (ExecuteStepRequest, HandOver, Control) {
    let request = mesh.declare("token").await;
    let Some(Act::HandOver(order)) = request.act.clone() else {
        panic!("a hand-over")
    };
    mesh.stop_agent(0).await;
    let journal = Journal::open(&mesh.data(0)).unwrap();
    let mark = FenceMark {
        node_id: order.node_id.clone(),
        run_id: order.run_id.clone(),
        epoch: request.epoch,
        term: request.term,
        target_address: order.target_address.clone(),
        frozen_revision: 0,
    };
    let begun = Begun {
        request: request.clone(),
        deadline_unix_ms: 1,
    };
    journal
        .append([Fact::Begun(begun), Fact::Fenced(mark)])
        .await
        .unwrap();
    let mut admin = mesh.admin(0).await;
    fence::soft_fence(&mut admin, &order.proxy_user)
        .await
        .unwrap();
    set_login(&mut admin, &order.master_user, &order.master_password)
        .await
        .unwrap();
    (request, order, admin)
}

#[tokio::test(flavor = "multi_thread")]
async fn before_failover_it_goes_back_when_the_record_is_unchanged() {
    let mut mesh = Mesh::provisioned("").await;
    let (request, _, _) = crash_after_fence(&mut mesh).await;
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    mesh.controller
        .until("rights", 0, |n| is_running(n) && n.granted_epoch == 1)
        .await;
    let answer = mesh.agent(0).step(request).await;
    assert_eq!(
        answer.outcome(),
        StepOutcome::NoEffect,
        "{}",
        answer.message
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn after_failover_it_commits() {
    let mut mesh = Mesh::provisioned("").await;
    let (request, order, mut admin) = crash_after_fence(&mut mesh).await;
    let (host, port) = order.target_address.rsplit_once(':').unwrap();
    admin
        .call(&["FAILOVER", "TO", host, port, "TIMEOUT", "3000"])
        .await
        .unwrap();
    eventually("the change of roles", async || {
        let info = slotmesh_agent::probe::Info::read(&mut admin, "replication")
            .await
            .unwrap();
        info.text("role") == "slave" && info.text("master_link_status") == "up"
    })
    .await;
    assert_eq!(mesh.controller.record().epoch, 1);
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    mesh.controller
        .until("grant", 1, |n| n.granted_epoch == 2)
        .await;
    let answer = mesh.agent(0).step(request).await;
    assert_eq!(answer.outcome(), StepOutcome::Done, "{}", answer.message);
    assert!(answer.committed);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_does_not_go_back_when_the_record_has_moved_on() {
    let mut mesh = Mesh::provisioned("").await;
    let (request, _, mut admin) = crash_after_fence(&mut mesh).await;
    // A controller went forward with the target meanwhile.
    mesh.admin(1)
        .await
        .call(&["REPLICAOF", "NO", "ONE"])
        .await
        .unwrap();
    mesh.controller.change(|record| {
        (record.epoch, record.primary, record.token) = (2, 1, None);
    });
    mesh.controller
        .until("grant", 1, |n| n.granted_epoch == 2)
        .await;
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    mesh.controller
        .until("following", 0, |n| n.link_up && n.assigned_epoch == 2)
        .await;
    let users = fence::known_users(&mut admin).await.unwrap();
    assert!(users.get("px-1").is_none_or(|user| !user.full));
    let answer = mesh.agent(0).step(request).await;
    assert_eq!(
        answer.outcome(),
        StepOutcome::Uncertain,
        "{}",
        answer.message
    );
}
