//! Failovers as an agent sees them, between real engines: detaching, promoting, a process that ended
//! and one that does not answer.

use std::time::Duration;

use rustix::process::Signal;
use sha2::{Digest, Sha256};
use slotmesh_agent::{control::Control, probe::Info};
use slotmesh_proto::{
    agent::v1::{
        ExecuteStepResponse, NodeReport, ProcessState, Promote, ReadLostWritesRequest, StepOutcome,
        agent_service_client::AgentServiceClient, execute_step_request::Act,
    },
    store::v1::{FenceProof, NodeRole},
};
use slotmesh_resp::write::encode_command;
use tokio::time::{Instant, sleep};

use crate::{
    controller::{Controller, NODES, Record, is_running},
    hosts::{AtExit, Mesh, eventually, fetched_engines, kill},
};

/// A replica tries to connect again every second.
const SOME_TRIES: Duration = Duration::from_millis(2_500);

/// The record as a leader writes it when `a` is lost.
pub(crate) fn lost(record: &mut Record) {
    record.closed_epoch = record.epoch;
    record.epoch += 1;
    record.detached = true;
}

/// The record as a leader writes it when `b` was promoted.
fn promoted(answer: &NodeReport) -> impl FnOnce(&mut Record) {
    let previous = (answer.replid2.clone(), answer.second_offset);
    move |record| {
        record.primary = 1;
        record.detached = false;
        record.target = None;
        record.previous = previous;
    }
}

pub(crate) async fn promote(mesh: &mut Mesh, proof: FenceProof) -> ExecuteStepResponse {
    let order = Promote {
        node_id: NODES[1].to_owned(),
        run_id: mesh.controller.record().run_ids[1].clone(),
        proof: proof.into(),
    };
    let request = mesh.request("0/promote", Act::Promote(order));
    mesh.agent(1).step(request).await
}

pub(crate) async fn is_detached(controller: &Controller) -> NodeReport {
    let epoch = controller.record().epoch;
    let detached = |n: &NodeReport| n.detached && n.assigned_epoch == epoch;
    controller.until("being detached", 1, detached).await
}

pub(crate) async fn write(connection: &mut Control, keys: std::ops::Range<u32>) {
    for key in keys {
        let key = format!("k-{key}");
        connection.call(&["SET", &key, "v"]).await.unwrap();
    }
}

pub(crate) async fn keys_of(mesh: &Mesh, node: usize) -> u64 {
    let mut admin = mesh.admin(node).await;
    let mut report = NodeReport::default();
    Info::read(&mut admin, "default")
        .await
        .unwrap()
        .fill(&mut report);
    report.keys
}

async fn offset_of(mesh: &Mesh, node: usize) -> u64 {
    let mut admin = mesh.admin(node).await;
    let info = Info::read(&mut admin, "replication").await.unwrap();
    info.offset()
}

/// `a` is cut off from its replica and goes on; its agent is away.
async fn a_primary_is_replaced(engine: &str) {
    let mut mesh = Mesh::provisioned(engine).await;
    let controller = mesh.controller.clone();
    let mut connection = mesh.proxy_connection().await;
    write(&mut connection, 0..50).await;
    eventually("the replica to have it all", async || {
        keys_of(&mesh, 1).await == 50
    })
    .await;
    mesh.stop_agent(0).await;
    let early = promote(&mut mesh, FenceProof::Exited).await;
    assert_eq!(early.outcome(), StepOutcome::NoEffect, "{engine}");

    controller.change(lost);
    let seen = is_detached(&controller).await;
    write(&mut connection, 50..150).await;
    sleep(SOME_TRIES).await;
    assert_eq!(offset_of(&mesh, 1).await, seen.offset, "{engine}");
    assert_eq!(keys_of(&mesh, 1).await, 50, "{engine}");

    let unconfirmed = promote(&mut mesh, FenceProof::Exited).await;
    assert_eq!(unconfirmed.outcome(), StepOutcome::NoEffect);
    assert!(
        unconfirmed.message.contains("not confirmed"),
        "{engine}: {}",
        unconfirmed.message
    );
    controller.change(|record| record.target = Some(1));
    let answer = promote(&mut mesh, FenceProof::Exited).await;
    assert_eq!(answer.outcome(), StepOutcome::Done, "{}", answer.message);
    let node = answer.node.unwrap();
    assert_eq!(node.observed_role(), NodeRole::Primary);
    assert_eq!(
        (&node.replid2, node.second_offset),
        (&seen.replid, seen.offset + 1)
    );
    // Not committed, it is left as it is, and nobody may write to it.
    controller.change(|_| {});
    sleep(Duration::from_millis(300)).await;
    let waiting = controller.node(1).unwrap();
    assert_eq!(waiting.observed_role(), NodeRole::Primary, "{engine}");
    assert_eq!(waiting.granted_epoch, 0, "{engine}");
    let again = promote(&mut mesh, FenceProof::Exited).await;
    assert_eq!(again.outcome(), StepOutcome::Done, "{}", again.message);

    controller.change(promoted(&node));
    controller
        .until("the grant", 1, |n| {
            n.granted_epoch == 2 && n.assigned_epoch == 2
        })
        .await;
    let mut connection = mesh.proxy_connection().await;
    write(&mut connection, 50..60).await;

    mesh.start_agent(0, AtExit::LeaveRunning).await;
    let back = controller
        .until("following", 0, |n| n.link_up && n.assigned_epoch == 2)
        .await;
    assert_eq!(back.granted_epoch, 0, "{engine}");
    assert_eq!(keys_of(&mesh, 0).await, 60, "{engine}");
    what_was_lost_is_kept(&mut mesh, seen.offset + 1, engine).await;
}

/// Exactly the writes made after the cut.
async fn what_was_lost_is_kept(mesh: &mut Mesh, from: u64, engine: &str) {
    let controller = mesh.controller.clone();
    let kept = async || controller.lost_writes("h-a").len() == 1;
    eventually("the report of lost writes", kept).await;
    let lost = controller.lost_writes("h-a").remove(0);
    assert!(lost.complete && lost.bytes > 0, "{engine}: {lost:?}");
    assert_eq!(
        (lost.epoch, lost.commands),
        (1, 100),
        "{engine}: from {from}"
    );
    let file = read_lost(mesh, &lost.file).await.unwrap();
    assert_eq!(lost.sha256, hex(&file), "{engine}");
    let mut expected = vec![];
    encode_command(&mut expected, &[b"SELECT", b"0"]);
    for key in 50..150 {
        let key = format!("k-{key}");
        encode_command(&mut expected, &[b"SET", key.as_bytes(), b"v"]);
    }
    assert_eq!(without_pings(&file), expected, "{engine}");

    // Told again by the agent's next life, until somebody has deleted the file.
    mesh.stop_agent(0).await;
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    let number = async || controller.lost_writes("h-a") == std::slice::from_ref(&lost);
    eventually("the report of the next life", number).await;
    std::fs::remove_file(mesh.data(0).join("lost").join(&lost.file)).unwrap();
    let gone = async || controller.lost_writes("h-a").is_empty();
    eventually("the end of the report", gone).await;
    let status = read_lost(mesh, &lost.file).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound);
    let status = read_lost(mesh, "../journal").await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
}

pub(crate) async fn read_lost(mesh: &Mesh, file: &str) -> Result<Vec<u8>, tonic::Status> {
    let address = format!("http://{}", mesh.agent(0).address);
    let mut client = AgentServiceClient::connect(address).await.unwrap();
    let request = ReadLostWritesRequest { file: file.into() };
    let mut stream = client.read_lost_writes(request).await?.into_inner();
    let mut bytes = vec![];
    while let Some(response) = stream.message().await? {
        bytes.extend(response.chunk);
    }
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

pub(crate) fn without_pings(file: &[u8]) -> Vec<u8> {
    let mut text = String::from_utf8(file.to_vec()).unwrap();
    // By engine.
    for name in [b"PING", b"ping"] {
        let mut ping = vec![];
        encode_command(&mut ping, &[name]);
        text = text.replace(std::str::from_utf8(&ping).unwrap(), "");
    }
    text.into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_replicas_offset_is_final_and_only_a_confirmed_one_is_promoted() {
    a_primary_is_replaced("").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_primary_is_replaced_on_every_fetched_engine() {
    for engine in fetched_engines() {
        a_primary_is_replaced(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_primary_that_lives_is_fenced_and_says_so() {
    let mesh = Mesh::provisioned("").await;
    let mut connection = mesh.proxy_connection().await;
    mesh.controller.change(lost);
    let fenced = |n: &NodeReport| n.assigned_epoch == 2 && n.granted_epoch == 0;
    let seen = mesh.controller.until("the fence", 0, fenced).await;
    assert_eq!(seen.run_id, mesh.controller.record().run_ids[0]);
    assert!(!seen.detached && seen.observed_role() == NodeRole::Primary);
    assert!(connection.call(&["SET", "k", "v"]).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_ends_is_reported_at_once_and_its_empty_successor_wipes_nothing() {
    let mesh = Mesh::provisioned("").await;
    let mut connection = mesh.proxy_connection().await;
    write(&mut connection, 0..50).await;
    eventually("the replica to have it all", async || {
        keys_of(&mesh, 1).await == 50
    })
    .await;
    let before = mesh.controller.node(0).unwrap();
    std::fs::remove_dir_all(mesh.node_dir(0).join("appendonlydir")).unwrap();
    let began = Instant::now();
    kill(before.pid, Signal::KILL);
    let exited = |n: &NodeReport| n.exited_run_id == before.run_id;
    mesh.controller.until("its end", 0, exited).await;
    println!("its end was reported after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(1));
    let next = mesh
        .controller
        .until("its successor", 0, |n| {
            is_running(n) && n.run_id != before.run_id
        })
        .await;
    assert_eq!((next.keys, next.granted_epoch), (0, 0));
    assert_eq!(next.exited_run_id, before.run_id);
    sleep(SOME_TRIES).await;
    assert_eq!(keys_of(&mesh, 1).await, 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_sleeps_for_three_seconds_is_not_unresponsive() {
    let mesh = Mesh::start_as(|record| {
        let debug = ("enable-debug-command".to_owned(), "yes".to_owned());
        record.parameters = [debug].into();
    })
    .await;
    mesh.controller.provision().await;
    let mut admin = mesh.admin(0).await;
    let began = Instant::now();
    let sleeping = tokio::spawn(async move {
        let limit = Duration::from_secs(10);
        admin.call_within(&["DEBUG", "SLEEP", "3"], limit).await
    });
    while !sleeping.is_finished() {
        assert!(!mesh.controller.node(0).unwrap().unresponsive);
        sleep(Duration::from_millis(20)).await;
    }
    sleeping.await.unwrap().unwrap();
    assert!(
        began.elapsed() >= Duration::from_secs(3),
        "it did not sleep"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_comes_back_to_a_stopped_process_says_so_and_fences_it_when_told() {
    let mut mesh = Mesh::provisioned("").await;
    let controller = mesh.controller.clone();
    let before = controller.node(0).unwrap();
    mesh.stop_agent(0).await;
    kill(before.pid, Signal::STOP);
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    controller
        .until("unresponsive", 0, |n| n.unresponsive)
        .await;
    controller.change(lost);
    let next = controller
        .until("its successor", 0, |n| {
            n.state() == ProcessState::Running && n.run_id != before.run_id
        })
        .await;
    assert!(!next.unresponsive && next.granted_epoch == 0);
}

/// A script that takes so long, on a connection whose answer nobody reads.
async fn keep_busy(mesh: &Mesh, millis: u32) {
    let script = "local function now() local t = redis.call('TIME') return t[1] * 1000 + t[2] / 1000 end \
         local start = now() while now() - start < tonumber(ARGV[1]) do end return 1";
    let mut admin = mesh.admin(0).await;
    let _ = admin
        .call_within(
            &["EVAL", script, "0", &millis.to_string()],
            Duration::from_millis(100),
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_process_is_not_unresponsive_and_a_stopped_one_is() {
    let mesh = Mesh::provisioned("").await;
    let controller = mesh.controller.clone();
    let began = Instant::now();
    keep_busy(&mesh, 3_000).await;
    let mut silent = false;
    while began.elapsed() < Duration::from_millis(3_500) {
        assert!(!controller.node(0).unwrap().unresponsive);
        silent |= controller.node(0).unwrap().busy;
        sleep(Duration::from_millis(20)).await;
    }
    assert!(silent, "the script kept nobody waiting");

    let pid = controller.node(0).unwrap().pid;
    let began = Instant::now();
    kill(pid, Signal::STOP);
    controller
        .until("unresponsive", 0, |n| n.unresponsive)
        .await;
    println!("called unresponsive after {:?}", began.elapsed());
    kill(pid, Signal::CONT);
    let answers = |n: &NodeReport| !n.unresponsive && n.error.is_empty() && n.granted_epoch == 1;
    let after = controller.until("an answer", 0, answers).await;
    assert_eq!(after.pid, pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_process_keeps_its_life_until_its_epoch_is_over() {
    let mesh = Mesh::provisioned("").await;
    let controller = mesh.controller.clone();
    let before = controller.node(0).unwrap();
    kill(before.pid, Signal::STOP);
    controller
        .until("unresponsive", 0, |n| n.unresponsive)
        .await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(controller.node(0).unwrap().pid, before.pid);
    controller.change(lost);
    let exited = |n: &NodeReport| n.exited_run_id == before.run_id;
    controller.until("its end", 0, exited).await;
    let next = controller
        .until("its successor", 0, |n| {
            n.state() == ProcessState::Running && n.run_id != before.run_id
        })
        .await;
    assert!(!next.unresponsive && next.granted_epoch == 0);
}
