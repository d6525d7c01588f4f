//! Three controllers on one etcd: any may be asked, agents and proxies stay with any, and when the
//! leader is killed or frozen another leads in time and nobody's connection notices.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use slotmesh_ctl::api::Api;
use slotmesh_e2e::{
    Witnesses,
    controllers::{
        Controller, LIMIT, a_replica, beside, leader, leader_after, sees_all_nodes, switch_over,
    },
};
use slotmesh_harness::{EtcdCluster, Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::{
    agent::v1::{
        Register, SessionRequest, SessionResponse, control_service_client::ControlServiceClient,
        session_request,
    },
    fleet::v1::{ListHostsRequest, ListProxiesRequest},
    instance::v1::{SwitchOverRequest, UpdateAccountsRequest},
    store::v1::TaskState,
    task::v1::{CancelTaskRequest, ListTasksRequest, WatchTaskRequest},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic_types::StatusExt;

/// A leader's lease is 5 s; another leads within 6 s. This machine may be busy with other tests.
const TAKEOVER_MAX: Duration = Duration::from_secs(8);

async fn mesh_of_three(etcd: &EtcdCluster) -> (Mesh, Vec<Controller>) {
    let options = MeshOptions {
        store: Some(etcd.store()),
        proxies: Some(2),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let others = beside(&mesh, &etcd.store(), 2).await.unwrap();
    (mesh, others)
}

/// `up` is frozen first, so that the first controller stays dead.
fn kill_first(mesh: &Mesh) -> Instant {
    signals::freeze(mesh.up_pid().unwrap()).unwrap();
    signals::kill_blocking(mesh.contract.pids.controller, LIMIT);
    Instant::now()
}

/// A change that changes nothing. It is said again when the leader was lost with it in its hands, as the
/// answer asks for: a follower may hear of the death only then.
async fn update_accounts(mesh: &Mesh, controller: &str) {
    let request = UpdateAccountsRequest {
        instance_id: mesh.instance().to_owned(),
        ..UpdateAccountsRequest::default()
    };
    let mut instances = api(controller).await.instances();
    let Err(lost) = instances.update_accounts(request.clone()).await else {
        return;
    };
    let reason = lost.get_details_error_info().map(|info| info.reason);
    assert_eq!(reason.as_deref(), Some("LEADER_LOST"), "{lost}");
    instances.update_accounts(request).await.unwrap();
}

async fn api(address: &str) -> Api {
    Api::connect(address).await.unwrap()
}

#[tokio::test]
async fn the_leader_may_die_twice_and_agents_and_proxies_that_knew_one_address_find_the_third() {
    let etcd = EtcdCluster::start(1).await.unwrap();
    let (mesh, mut others) = mesh_of_three(&etcd).await;
    let witnesses = Witnesses::start(&mesh.contract.proxies, 1).await.unwrap();
    let first = leader(&mesh.contract.controller).await.unwrap();
    assert_eq!(first.address, mesh.contract.controller);
    for other in &others {
        let known = leader_after(&other.address, 0).await.unwrap();
        assert_eq!(known, first, "{} knows the leader", other.id);
    }

    let killed = kill_first(&mesh);
    // A change that is made while nobody leads waits for the next leader.
    update_accounts(&mesh, &others[0].address).await;
    let second = leader_after(&others[0].address, first.term).await.unwrap();
    let took = killed.elapsed();
    assert!(took < TAKEOVER_MAX, "another led after {took:?}");
    for other in &others {
        sees_all_nodes(&mesh, &other.address).await.unwrap();
    }
    let follower = others.iter().find(|c| c.address != second.address).unwrap();
    switch_over(&mesh, &follower.address).await.unwrap();

    let leads = others.iter().position(|c| c.address == second.address);
    let leader = others.remove(leads.unwrap());
    leader.kill().await.unwrap();
    let last = &others[0].address;
    leader_after(last, second.term).await.unwrap();
    sees_all_nodes(&mesh, last).await.unwrap();
    wait_until(
        LIMIT,
        "proxies to be with the third controller",
        async || {
            let request = ListProxiesRequest::default();
            let mut fleet = Api::connect(last).await?.fleet();
            let proxies = fleet.list_proxies(request).await?.into_inner().proxies;
            let found = proxies.len();
            anyhow::ensure!(found == 2, "{found} of 2");
            anyhow::Ok(())
        },
    )
    .await
    .unwrap();
    switch_over(&mesh, last).await.unwrap();
    signals::thaw(mesh.up_pid().unwrap()).unwrap();
    witnesses.testify().await.unwrap();
}

#[tokio::test]
async fn any_controller_answers_and_forwards_and_refuses_as_the_leader_does() {
    let etcd = EtcdCluster::start(1).await.unwrap();
    let (mesh, others) = mesh_of_three(&etcd).await;
    let at = [
        mesh.contract.controller.as_str(),
        &others[0].address,
        &others[1].address,
    ];
    for address in at {
        leader_after(address, 0).await.unwrap();
        sees_all_nodes(&mesh, address).await.unwrap();
        let mut fleet = api(address).await.fleet();
        let hosts = fleet.list_hosts(ListHostsRequest {}).await.unwrap();
        assert!(!hosts.into_inner().hosts.is_empty());
        // Any may change something, and what it has changed is there to be read at once.
        switch_over(&mesh, address).await.unwrap();
        update_accounts(&mesh, address).await;
    }
    let mut refusals = Vec::new();
    for address in at {
        let request = SwitchOverRequest {
            instance_id: "r-nosuch".into(),
            ..SwitchOverRequest::default()
        };
        let refused = api(address).await.instances().switch_over(request).await;
        let cancel = CancelTaskRequest {
            task_id: "t-nosuch".into(),
            ..CancelTaskRequest::default()
        };
        let cancelled = api(address).await.tasks().cancel_task(cancel).await;
        for status in [refused.unwrap_err(), cancelled.unwrap_err()] {
            let reason = status.get_details_error_info().map(|i| i.reason);
            refusals.push((status.code(), reason, status.message().to_owned()));
        }
    }
    assert_eq!(
        refusals[..2],
        refusals[2..4],
        "a follower's are the leader's"
    );
    assert_eq!(refusals[..2], refusals[4..]);
}

#[tokio::test]
async fn a_task_that_is_watched_at_one_controller_is_watched_on_at_another() {
    let etcd = EtcdCluster::start(1).await.unwrap();
    let (mesh, others) = mesh_of_three(&etcd).await;
    switch_over(&mesh, &others[0].address).await.unwrap();
    let mut tasks = api(&others[0].address).await.tasks();
    let request = ListTasksRequest {
        instance_id: mesh.instance().to_owned(),
        ..ListTasksRequest::default()
    };
    let newest = tasks
        .list_tasks(request)
        .await
        .unwrap()
        .into_inner()
        .tasks
        .remove(0);
    let mut numbers = Vec::new();
    let mut from_event = 0;
    for address in [
        &others[0].address,
        &others[1].address,
        &mesh.contract.controller,
    ]
    .into_iter()
    .cycle()
    {
        let request = WatchTaskRequest {
            task_id: newest.task_id.clone(),
            from_event,
        };
        let mut events = api(address)
            .await
            .tasks()
            .watch_task(request)
            .await
            .unwrap()
            .into_inner();
        // One event at each controller, then the next goes on from there.
        let Some(event) = events.message().await.unwrap() else {
            break;
        };
        let number = event.event.unwrap().number;
        numbers.push(number);
        from_event = number + 1;
    }
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected, "no event is missed or repeated");
    assert!(numbers.len() > 3);
}

/// An agent's end of a session, spoken by the test.
struct Session {
    /// Dropped, it ends the session.
    _requests: mpsc::Sender<SessionRequest>,
    _answers: tonic::Streaming<SessionResponse>,
}

async fn session(controller: &str, agent: &str, opened: u64) -> Result<Session, Status> {
    let (requests, outgoing) = mpsc::channel(4);
    let register = Register {
        host_id: "h-test".into(),
        agent_instance: agent.into(),
        agent_address: format!("agent-{agent}:1"),
        opened_unix_us: opened,
        ..Register::default()
    };
    let message = Some(session_request::Message::Register(register));
    requests.try_send(SessionRequest { message }).unwrap();
    let client = ControlServiceClient::connect(format!("http://{controller}"));
    let mut client = client.await.unwrap();
    let answers = client.session(ReceiverStream::new(outgoing)).await?;
    Ok(Session {
        _answers: answers.into_inner(),
        _requests: requests,
    })
}

/// The agent of the test's host, as a controller shows it; empty when it shows none.
async fn agent_of_the_host(controller: &str) -> anyhow::Result<String> {
    let mut fleet = Api::connect(controller).await?.fleet();
    let hosts = fleet.list_hosts(ListHostsRequest {}).await?.into_inner();
    let host = hosts.hosts.into_iter().find(|h| h.host_id == "h-test");
    Ok(host.map(|h| h.agent_address).unwrap_or_default())
}

async fn everybody_shows(controllers: &[&str], agent: &str) {
    for controller in controllers {
        wait_until(LIMIT, "the host's agent to be shown", async || {
            let shown = agent_of_the_host(controller).await?;
            anyhow::ensure!(shown == agent, "it is {shown:?}");
            anyhow::Ok(())
        })
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn a_host_may_move_between_controllers_and_has_one_agent_at_all_of_them() {
    let etcd = EtcdCluster::start(1).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut controllers = Vec::new();
    for id in ["c1", "c2", "c3"] {
        let dir = dir.path().join(id);
        let store = etcd.store();
        let controller = Controller::start(dir, id, &store, &[]).await;
        controllers.push(controller.unwrap());
    }
    let all: Vec<_> = controllers.iter().map(|c| c.address.as_str()).collect();
    let leads = leader_after(all[0], 0).await.unwrap().address;
    let followers: Vec<_> = all.iter().copied().filter(|a| *a != leads).collect();
    for follower in &followers {
        leader_after(follower, 0).await.unwrap();
    }
    let at_first = session(followers[0], "x", 1).await.unwrap();
    everybody_shows(&all, "agent-x:1").await;
    // It has come back to another one before the first has noticed that it went.
    let at_second = session(followers[1], "x", 2).await.unwrap();
    for controller in &all {
        let refused = session(controller, "y", 3).await.map(drop).unwrap_err();
        let reason = refused.get_details_error_info().map(|i| i.reason);
        assert_eq!(reason.as_deref(), Some("HOST_ID_IN_USE"), "at {controller}");
    }
    drop(at_first);
    let y_waits = wait_until(LIMIT, "the first session's end", async || {
        let log = &controllers[all.iter().position(|a| *a == followers[0]).unwrap()].log();
        anyhow::ensure!(log.contains("agent session closed"), "not yet");
        anyhow::Ok(())
    });
    y_waits.await.unwrap();
    everybody_shows(&all, "agent-x:1").await;
    drop(at_second);
    everybody_shows(&all, "").await;
    let _at_leader = session(&leads, "y", 4).await.unwrap();
    everybody_shows(&all, "agent-y:1").await;
}

/// Everything that a leader may write, as etcd has it: key and revision.
fn written(etcd: &EtcdCluster) -> Vec<(String, u64)> {
    let text = etcd
        .ctl(&["get", "--prefix", "/slotmesh/", "-w", "json"])
        .unwrap();
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    let decoded = |key: &str| {
        let bytes = decode_base64(key);
        String::from_utf8(bytes).unwrap()
    };
    let items = all["kvs"].as_array().unwrap().iter();
    let items = items.map(|kv| {
        let key = decoded(kv["key"].as_str().unwrap());
        (key, kv["mod_revision"].as_u64().unwrap())
    });
    // Every controller keeps these, leader or not.
    let others = [
        "/slotmesh/controller/",
        "/slotmesh/host/",
        "/slotmesh/proxy/",
    ];
    items
        .filter(|(key, _)| !others.iter().any(|prefix| key.starts_with(prefix)))
        .collect()
}

fn decode_base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.bytes().filter(|b| *b != b'=') {
        let value = ALPHABET.iter().position(|a| *a == byte).unwrap();
        bits = (bits << 6) | u32::try_from(value).unwrap();
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from((bits >> count) & 0xff).unwrap());
        }
    }
    bytes
}

/// Freezes the leader so long after it has admitted a switchover, and thaws it when another has led
/// the task to its end.
async fn freeze_in_a_switchover(
    mesh: &Mesh,
    others: &[Controller],
    etcd: &EtcdCluster,
    after: Duration,
) {
    let pid_of = |address: &str| {
        let other = others.iter().find(|c| c.address == address);
        other.map_or(mesh.contract.pids.controller, |c| c.pid)
    };
    let first = leader_after(&others[0].address, 0).await.unwrap();
    let replica = a_replica(mesh, &first.address).await.unwrap();
    let request = SwitchOverRequest {
        instance_id: mesh.instance().to_owned(),
        target_primary_node_ids: vec![replica],
        ..SwitchOverRequest::default()
    };
    let mut at_leader = api(&first.address).await;
    let task_id = at_leader.switch_over(request).await.unwrap();
    tokio::time::sleep(after).await;
    signals::freeze(pid_of(&first.address)).unwrap();
    let frozen = Instant::now();
    let awake = match first.address == others[0].address {
        true => &others[1].address,
        false => &others[0].address,
    };
    let second = leader_after(awake, first.term).await.unwrap();
    let took = frozen.elapsed();
    assert!(took < TAKEOVER_MAX, "another led after {took:?}");
    let ended = wait_until(LIMIT, "the task to end", async || {
        let task = Api::connect(awake).await?.task(&task_id).await?;
        let states = [TaskState::Done, TaskState::RolledBack, TaskState::Cancelled];
        let state = task.state();
        anyhow::ensure!(states.contains(&state), "{state:?}: {}", task.message);
        anyhow::Ok(())
    });
    ended.await.unwrap();
    switch_over(mesh, awake).await.unwrap();

    let before = written(etcd);
    signals::thaw(pid_of(&first.address)).unwrap();
    wait_until(LIMIT, "the old leader to follow", async || {
        let known = leader(&first.address).await?;
        anyhow::ensure!(known == second, "it says {known:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    assert_eq!(written(etcd), before, "the old leader has written");
    // And it serves, as any other.
    sees_all_nodes(mesh, &first.address).await.unwrap();
    switch_over(mesh, &first.address).await.unwrap();
}

#[tokio::test]
async fn a_leader_frozen_in_a_switchover_is_replaced_and_writes_nothing_when_it_wakes() {
    let etcd = EtcdCluster::start(1).await.unwrap();
    let (mesh, others) = mesh_of_three(&etcd).await;
    let witnesses = Witnesses::start(&mesh.contract.proxies, 1).await.unwrap();
    for other in &others {
        leader_after(&other.address, 0).await.unwrap();
    }
    sees_all_nodes(&mesh, &others[0].address).await.unwrap();
    // Admitted; in preflight; holding or switching.
    for after_ms in [0, 5, 15] {
        let after = Duration::from_millis(after_ms);
        freeze_in_a_switchover(&mesh, &others, &etcd, after).await;
    }
    witnesses.testify().await.unwrap();
}
