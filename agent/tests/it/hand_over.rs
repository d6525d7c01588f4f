//! Hand-overs between real engines, under a writer, and the ones that must come to nothing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::process::Signal;
use slotmesh_agent::{
    control::{Control, ControlError},
    probe::Info,
};
use slotmesh_proto::agent::v1::{StepOutcome, TakeBack, execute_step_request::Act};
use tokio::time::sleep;

use crate::{
    controller::{Controller, NODES, password},
    hosts::{Mesh, eventually, fetched_engines, kill},
};

/// A proxy without its hold: a laggard, which must be safe too.
struct Writer {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    ambiguous: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Writer {
    fn start(controller: Controller) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (acknowledged, ambiguous) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (over, acks, unclear) = (stop.clone(), acknowledged.clone(), ambiguous.clone());
        let task = tokio::spawn(async move {
            let mut connection: Option<(u64, Control)> = None;
            while !over.load(Ordering::Relaxed) {
                let record = controller.record();
                if connection
                    .as_ref()
                    .is_none_or(|(epoch, _)| *epoch != record.epoch)
                {
                    let name = format!("px-{}", record.epoch);
                    let address = &record.addresses[record.primary];
                    connection = Control::tcp(address, &name, &password(&name))
                        .await
                        .ok()
                        .map(|control| (record.epoch, control));
                }
                let answer = match &mut connection {
                    Some((_, control)) => control.call(&["INCR", "counter"]).await,
                    None => {
                        sleep(Duration::from_millis(1)).await;
                        continue;
                    }
                };
                match answer {
                    Ok(_) => drop(acks.fetch_add(1, Ordering::Relaxed)),
                    Err(ControlError::Refused(why)) => {
                        assert!(
                            why.starts_with("NOPERM") || why.starts_with("READONLY"),
                            "{why}"
                        );
                        sleep(Duration::from_millis(1)).await;
                    }
                    Err(ControlError::Connect { .. }) => connection = None,
                    Err(ControlError::Unanswered { .. }) => {
                        unclear.fetch_add(1, Ordering::Relaxed);
                        connection = None;
                    }
                }
            }
        });
        Self {
            stop,
            acknowledged,
            ambiguous,
            task,
        }
    }

    async fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        (
            self.acknowledged.load(Ordering::Relaxed),
            self.ambiguous.load(Ordering::Relaxed),
        )
    }
}

async fn hand_overs_lose_nothing(engine: &str, count: u32) {
    let mut mesh = Mesh::provisioned(engine).await;
    let writer = Writer::start(mesh.controller.clone());
    let mut critical_us = vec![];
    for _ in 0..count {
        let before = writer.acknowledged.load(Ordering::Relaxed);
        let done = mesh.switch_over().await;
        assert!(done.critical_us > 0);
        critical_us.push(done.critical_us);
        eventually("the writer to go on", async || {
            writer.acknowledged.load(Ordering::Relaxed) > before + 20
        })
        .await;
    }
    let (acknowledged, ambiguous) = writer.end().await;
    let counter = mesh
        .proxy_connection()
        .await
        .call(&["GET", "counter"])
        .await
        .unwrap();
    let counter = u64::try_from(counter.as_int().unwrap()).unwrap();
    assert!(
        acknowledged <= counter && counter <= acknowledged + ambiguous,
        "{engine}: acknowledged {acknowledged}, counted {counter}, ambiguous {ambiguous}"
    );
    assert_eq!(mesh.controller.record().epoch, u64::from(count) + 1);
    critical_us.sort_unstable();
    let (p50, max) = (
        critical_us[critical_us.len() / 2],
        critical_us[critical_us.len() - 1],
    );
    println!(
        "{engine}: {count} hand-overs, critical section p50 {p50} us, max {max} us, {acknowledged} acknowledged, {ambiguous} ambiguous"
    );
    // One heartbeat of a replica is 1,000 ms: without GETACK the median would be near it.
    assert!(p50 < 250_000, "critical section p50 {p50} us");
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_hand_overs_under_a_writer_lose_nothing() {
    hand_overs_lose_nothing("", 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hand_overs_lose_nothing_on_every_fetched_engine() {
    for engine in fetched_engines() {
        hand_overs_lose_nothing(&engine, 10).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_hand_over_answers_from_the_journal_and_a_lower_term_is_fenced() {
    let mut mesh = Mesh::provisioned("").await;
    let request = mesh.declare("token").await;
    let first = mesh.agent(0).step(request.clone()).await;
    assert_eq!(first.outcome(), StepOutcome::Done, "{}", first.message);
    mesh.controller
        .until("link up", 0, |n| n.link_up && n.assigned_epoch == 2)
        .await;
    let second = mesh.agent(0).step(request.clone()).await;
    assert_eq!(
        (second.outcome(), second.critical_us),
        (StepOutcome::Done, first.critical_us)
    );
    // Also by a later life of the agent.
    mesh.stop_agent(0).await;
    mesh.start_agent(0, crate::hosts::AtExit::LeaveRunning)
        .await;
    let third = mesh.agent(0).step(request.clone()).await;
    assert_eq!(
        (third.outcome(), third.critical_us),
        (StepOutcome::Done, first.critical_us)
    );

    let mut deposed = request.clone();
    deposed.attempt = 2;
    deposed.term = 0;
    let refused = tonic_code(&mesh, deposed.clone()).await;
    assert_eq!(refused, tonic::Code::InvalidArgument);
    mesh.controller.change(|record| record.term = 7);
    eventually("the new term to arrive", async || {
        let mut old = deposed.clone();
        old.term = 6;
        let answer = mesh.agent(0).step(old).await;
        answer.outcome() == StepOutcome::Fenced && answer.known_term == 7
    })
    .await;
    let mut old_epoch = request;
    (old_epoch.attempt, old_epoch.term) = (3, 7);
    let answer = mesh.agent(0).step(old_epoch).await;
    assert_eq!(
        (answer.outcome(), answer.known_epoch),
        (StepOutcome::Fenced, 2)
    );
}

async fn tonic_code(
    mesh: &Mesh,
    request: slotmesh_proto::agent::v1::ExecuteStepRequest,
) -> tonic::Code {
    use slotmesh_proto::agent::v1::agent_service_client::AgentServiceClient;
    let address = format!("http://{}", mesh.agent(0).address);
    let mut client = AgentServiceClient::connect(address).await.unwrap();
    client.execute_step(request).await.unwrap_err().code()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_refuses_the_replication_user_changes_nothing() {
    let mut mesh = Mesh::provisioned("").await;
    let mut request = mesh.declare("token").await;
    if let Some(Act::HandOver(order)) = &mut request.act {
        order.master_password = "wrong".to_owned();
    }
    let done = mesh.agent(0).step(request).await;
    assert_eq!(done.outcome(), StepOutcome::NoEffect, "{}", done.message);
    mesh.proxy_connection()
        .await
        .call(&["SET", "k", "v"])
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_target_is_found_before_anything_is_fenced() {
    let mut mesh = Mesh::provisioned("").await;
    let request = mesh.declare("token").await;
    let target = mesh.controller.node(1).unwrap().pid;
    let mut connection = mesh.proxy_connection().await;
    kill(target, Signal::STOP);
    let step = mesh.agent(0).step(request).await;
    kill(target, Signal::CONT);
    assert_eq!(step.outcome(), StepOutcome::NoEffect, "{}", step.message);
    assert_eq!(step.node.unwrap().granted_epoch, 1);
    connection.call(&["SET", "k", "v"]).await.unwrap();
    assert_eq!(mesh.controller.record().epoch, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_no_replica_is_refused_and_the_old_primary_gets_its_rights_back() {
    let mut mesh = Mesh::provisioned("").await;
    let mut request = mesh.declare("token").await;
    // The target has left its primary behind the controller's back.
    mesh.admin(1)
        .await
        .call(&["REPLICAOF", "NO", "ONE"])
        .await
        .unwrap();
    let mut admin = mesh.admin(0).await;
    eventually("the replica to be gone", async || {
        let info = Info::read(&mut admin, "replication").await.unwrap();
        info.text("connected_slaves") == "0"
    })
    .await;
    let mut connection = mesh.proxy_connection().await;
    let step = mesh.agent(0).step(request.clone()).await;
    assert_eq!(step.outcome(), StepOutcome::NoEffect, "{}", step.message);
    connection.call(&["SET", "k", "v"]).await.unwrap();
    // Another attempt is executed, the same one is not.
    request.attempt += 1;
    let step = mesh.agent(0).step(request).await;
    assert_eq!(step.outcome(), StepOutcome::NoEffect, "{}", step.message);
    connection.call(&["SET", "k", "v"]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_target_is_not_demoted_by_an_assignment_from_before_the_hand_over() {
    let mut mesh = Mesh::provisioned("").await;
    let request = mesh.declare("token").await;
    mesh.controller.refuse_commits();
    // The target's agent hears nothing of the freeze: its newest assignment is epoch 1, unfrozen.
    mesh.stop_agent(1).await;
    let journal_has_no_freeze = mesh.data(1).join("journal").exists();
    assert!(journal_has_no_freeze);
    let mut short = request;
    short.timeout_ms = 2_000; // a busy machine must get as far as the commit
    let step = mesh.agent(0).step(short).await;
    assert_eq!(step.outcome(), StepOutcome::Uncertain, "{}", step.message);
    let frozen = mesh.controller.record().revision;
    mesh.controller.change(|record| {
        record.token = None;
        record.revision = frozen - 1;
    });
    mesh.start_agent(1, crate::hosts::AtExit::LeaveRunning)
        .await;
    let node = mesh
        .controller
        .until("patience", 1, |n| n.error.contains("was promoted"))
        .await;
    assert_eq!(
        node.observed_role(),
        slotmesh_proto::store::v1::NodeRole::Primary
    );
    // The same, newer than a freeze, is the undo.
    mesh.controller.change(|record| {
        record.token = Some("token".to_owned());
        record.revision = frozen + 1;
    });
    mesh.controller
        .until("a freeze", 1, |n| n.error.is_empty())
        .await;
    mesh.controller.change(|record| {
        record.token = None;
        record.revision = frozen + 2;
    });
    mesh.controller
        .until("demotion", 1, |n| {
            n.observed_role() == slotmesh_proto::store::v1::NodeRole::Replica
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_no_controller_to_commit_the_old_primary_stays_fenced_and_a_later_take_back_is_honest()
{
    let mut mesh = Mesh::provisioned("").await;
    mesh.controller.refuse_commits();
    let mut request = mesh.declare("token").await;
    request.timeout_ms = 2_000;
    let done = mesh.agent(0).step(request).await;
    assert_eq!(done.outcome(), StepOutcome::Uncertain, "{}", done.message);
    assert!(!done.committed);
    let record = mesh.controller.record();
    let act = Act::TakeBack(TakeBack {
        node_id: NODES[0].to_owned(),
        run_id: record.run_ids[0].clone(),
        proxy_user: "px-1".to_owned(),
        proxy_password: password("px-1"),
        master_user: "rp-1-a".to_owned(),
        master_password: password("rp-1-a"),
    });
    let request = mesh.request("0/undo", act);
    let back = mesh.agent(0).step(request).await;
    assert_eq!(back.outcome(), StepOutcome::NoEffect, "{}", back.message);
    assert_eq!(back.node.unwrap().granted_epoch, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_was_left_is_lifted_by_take_back_and_a_second_one_changes_nothing() {
    let mut mesh = Mesh::provisioned("").await;
    let mut admin = mesh.admin(0).await;
    mesh.controller
        .change(|record| record.token = Some("token".to_owned()));
    // As an agent leaves it that dies after 6a.
    slotmesh_agent::fence::soft_fence(&mut admin, "px-1")
        .await
        .unwrap();
    mesh.controller
        .until("fence", 0, |n| n.granted_epoch == 0)
        .await;
    let run_id = mesh.controller.record().run_ids[0].clone();
    for _ in 0..2 {
        let act = Act::TakeBack(TakeBack {
            node_id: NODES[0].to_owned(),
            run_id: run_id.clone(),
            proxy_user: "px-1".to_owned(),
            proxy_password: password("px-1"),
            master_user: "rp-1-a".to_owned(),
            master_password: password("rp-1-a"),
        });
        let request = mesh.request("0/undo", act);
        let back = mesh.agent(0).step(request).await;
        assert_eq!(back.outcome(), StepOutcome::Done, "{}", back.message);
        assert_eq!(back.node.unwrap().granted_epoch, 1);
    }
    mesh.proxy_connection()
        .await
        .call(&["SET", "k", "v"])
        .await
        .unwrap();
}
