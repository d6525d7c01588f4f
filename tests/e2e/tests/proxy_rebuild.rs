//! A proxy is built anew on another host: clients that connect anew end there, the old process goes, and
//! neither a controller nor a host that dies meanwhile leaves the instance with less than it had.
//!
//! A mesh has three hosts here and two proxies, so one host has none.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use slotmesh_e2e::{Witnesses, connect, ctl};
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::{
    instance::v1::{ProxyEndpoint, RestartMode, RestartProxyRequest},
    store::v1::TaskState,
    task::v1::Task,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A host may be away for a minute before it counts as lost, on a machine that does much else.
const LIMIT: Duration = Duration::from_secs(180);
const DRAIN_S: u32 = 4;

async fn mesh() -> Mesh {
    let options = MeshOptions {
        architecture: Some("standard".into()),
        ..MeshOptions::default()
    };
    Mesh::start(&options).await.unwrap()
}

async fn endpoints(mesh: &Mesh) -> anyhow::Result<Vec<ProxyEndpoint>> {
    let found = mesh.api().await?.describe_instances(&[]).await?;
    Ok(found.into_iter().flat_map(|i| i.proxies).collect())
}

fn ids(endpoints: &[ProxyEndpoint]) -> BTreeSet<&str> {
    endpoints.iter().map(|p| p.proxy_id.as_str()).collect()
}

fn home_of(mesh: &Mesh, host: &str) -> PathBuf {
    mesh.data().join("hosts").join(host)
}

fn dir_of(mesh: &Mesh, proxy: &ProxyEndpoint) -> PathBuf {
    home_of(mesh, &proxy.host_id)
        .join("proxies")
        .join(&proxy.proxy_id)
}

/// The host without a proxy.
fn spare(before: &[ProxyEndpoint]) -> &'static str {
    let taken: Vec<&str> = before.iter().map(|p| p.host_id.as_str()).collect();
    let mut hosts = ["host-1", "host-2", "host-3"].into_iter();
    hosts.find(|h| !taken.contains(h)).unwrap()
}

/// Everything on a host is killed, and nobody starts anything again.
fn kill_host(mesh: &Mesh, host: &str) {
    for pid in signals::of_directory(&home_of(mesh, host)) {
        signals::kill(pid).unwrap();
    }
}

fn rebuild(mesh: &Mesh, proxy: &ProxyEndpoint, bake_seconds: u32) -> RestartProxyRequest {
    RestartProxyRequest {
        instance_id: mesh.instance().to_owned(),
        proxy_instance_ids: vec![proxy.proxy_id.clone()],
        mode: RestartMode::Rebuild.into(),
        bake_seconds: Some(bake_seconds),
        drain_seconds: Some(DRAIN_S),
        ..RestartProxyRequest::default()
    }
}

async fn begin(mesh: &Mesh, proxy: &ProxyEndpoint, bake_seconds: u32) -> String {
    let mut api = mesh.api().await.unwrap().instances();
    api.restart_proxy(rebuild(mesh, proxy, bake_seconds))
        .await
        .unwrap()
        .into_inner()
        .task_id
}

async fn until(mesh: &Mesh, task: &str, what: &str, claim: impl Fn(&Task) -> bool) -> Task {
    wait_until(LIMIT, what, async || {
        let task = mesh.api().await?.task(task).await?;
        anyhow::ensure!(claim(&task), "{} {:?}", task.message, task.proxies);
        anyhow::Ok(task)
    })
    .await
    .unwrap()
}

async fn ended(mesh: &Mesh, task: &str, state: TaskState) -> Task {
    until(mesh, task, "the rebuild to end", |t| t.state() == state).await
}

fn is_in(phase: &str) -> impl Fn(&Task) -> bool {
    move |task| task.proxies[0].phase == phase
}

/// The proxy is gone from its host, with its process.
async fn removed(mesh: &Mesh, old: &ProxyEndpoint) {
    let dir = dir_of(mesh, old);
    wait_until(LIMIT, "the old proxy to be removed", async || {
        anyhow::ensure!(!dir.exists(), "{} is there", dir.display());
        anyhow::ensure!(!signals::is_alive(old.pid), "{old:?} runs");
        anyhow::Ok(())
    })
    .await
    .unwrap();
}

/// The other proxy stays, and another one serves in the place of the old one.
async fn rebuilt(mesh: &Mesh, before: &[ProxyEndpoint], old: &ProxyEndpoint) -> ProxyEndpoint {
    let after = endpoints(mesh).await.unwrap();
    assert_eq!(after.len(), before.len(), "{after:?}");
    assert!(!ids(&after).contains(old.proxy_id.as_str()), "{after:?}");
    let new = after
        .into_iter()
        .find(|p| !ids(before).contains(&*p.proxy_id));
    let new = new.unwrap();
    assert_eq!(new.host_id, spare(before));
    let mut connection = connect(&new.address, false).await.unwrap();
    let pong: redis::RedisResult<String> = redis::cmd("PING").query_async(&mut connection).await;
    assert_eq!(pong.unwrap(), "PONG");
    new
}

/// A client that, when its connection ends, asks where the instance serves and connects there.
struct Nomads {
    stop: CancellationToken,
    all: Vec<JoinHandle<anyhow::Result<Nomad>>>,
}

struct Nomad {
    address: String,
    acknowledged: u64,
    moves: u32,
}

impl Nomads {
    async fn start(mesh: &Mesh, at: &ProxyEndpoint, count: usize) -> Self {
        let stop = CancellationToken::new();
        let mut all = Vec::new();
        for n in 0..count {
            let api = mesh.api().await.unwrap();
            let nomad = roam(api, at.address.clone(), format!("nomad:{n}"), stop.clone());
            all.push(tokio::spawn(nomad));
        }
        Self { stop, all }
    }

    /// Nothing that was acknowledged is lost; says where they are.
    async fn settle(self, mesh: &Mesh) -> Vec<Nomad> {
        self.stop.cancel();
        let at = endpoints(mesh).await.unwrap().remove(0).address;
        let mut connection = connect(&at, false).await.unwrap();
        let mut all = Vec::new();
        for (n, one) in self.all.into_iter().enumerate() {
            let nomad = one.await.unwrap().unwrap();
            let value: u64 = redis::cmd("GET")
                .arg(format!("nomad:{n}"))
                .query_async(&mut connection)
                .await
                .unwrap();
            // One of a connection that ended may have been written unacknowledged.
            let most = nomad.acknowledged + u64::from(nomad.moves);
            assert!((nomad.acknowledged..=most).contains(&value), "{n}: {value}");
            all.push(nomad);
        }
        all
    }
}

async fn roam(
    mut api: slotmesh_ctl::api::Api,
    mut address: String,
    key: String,
    stop: CancellationToken,
) -> anyhow::Result<Nomad> {
    let (mut acknowledged, mut moves) = (0, 0);
    while !stop.is_cancelled() {
        if let Ok(mut connection) = connect(&address, false).await {
            let mut increment = redis::cmd("INCR");
            increment.arg(&key);
            while !stop.is_cancelled()
                && increment.query_async::<u64>(&mut connection).await.is_ok()
            {
                acknowledged += 1;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            moves += u32::from(!stop.is_cancelled());
        }
        let found = api.describe_instances(&[]).await;
        let proxies = found.into_iter().flatten().flat_map(|i| i.proxies);
        let mut served = proxies.filter(|p| !p.address.is_empty());
        // The newest: the others have been tried by whoever comes from there.
        if let Some(next) = served.next_back() {
            address = next.address;
        }
    }
    Ok(Nomad {
        address,
        acknowledged,
        moves,
    })
}

#[tokio::test]
async fn clients_end_on_the_new_proxy_and_the_old_process_is_gone() {
    let mesh = mesh().await;
    let before = endpoints(&mesh).await.unwrap();
    let old = before[0].clone();
    let words = [
        "proxy",
        "restart",
        mesh.instance(),
        "--proxy",
        &old.proxy_id,
    ];
    let words = [
        &words[..],
        &["--rebuild", "--bake", "1", "--drain-seconds", "4"],
    ]
    .concat();
    let plan = ctl(&mesh, &[&words[..], &["--plan"]].concat())
        .await
        .unwrap();
    let plan = String::from_utf8(plan.stdout).unwrap();
    let way = format!("{} -> {}", old.host_id, spare(&before));
    assert!(plan.contains(&way), "{way} is not in\n{plan}");
    assert_eq!(endpoints(&mesh).await.unwrap(), before, "only a plan");

    let witnesses = Witnesses::start(&[before[1].address.clone()], 2)
        .await
        .unwrap();
    let nomads = Nomads::start(&mesh, &old, 5).await;
    let output = ctl(&mesh, &[&words[..], &["--wait"]].concat())
        .await
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let new = rebuilt(&mesh, &before, &old).await;
    removed(&mesh, &old).await;
    let nomads = nomads.settle(&mesh).await;
    for nomad in &nomads {
        assert!(nomad.acknowledged > 10 && nomad.moves >= 1);
        assert_ne!(nomad.address, old.address);
    }
    assert!(nomads.iter().any(|nomad| nomad.address == new.address));
    witnesses.testify().await.unwrap();
    // As every proxy: a restart in place, by hand-over.
    let words = [
        "proxy",
        "restart",
        mesh.instance(),
        "--proxy",
        &new.proxy_id,
    ];
    let output = ctl(&mesh, &[&words[..], &["--bake", "1", "--wait"]].concat());
    let output = output.await.unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test]
async fn a_controller_that_is_killed_in_the_bake_and_in_the_drain_is_followed_by_one_that_goes_on()
{
    let mesh = mesh().await;
    let before = endpoints(&mesh).await.unwrap();
    let old = before[0].clone();
    let nomads = Nomads::start(&mesh, &old, 3).await;
    let controller = mesh.data().join("controller/controller.json");
    let kill = || signals::kill(mesh.bound_pid(&controller).unwrap()).unwrap();
    let task = begin(&mesh, &old, 3).await;
    until(&mesh, &task, "its bake", is_in("Bake")).await;
    kill();
    until(&mesh, &task, "its drain", is_in("Drain")).await;
    kill();
    ended(&mesh, &task, TaskState::Done).await;
    rebuilt(&mesh, &before, &old).await;
    removed(&mesh, &old).await;
    nomads.settle(&mesh).await;
}

#[tokio::test]
async fn a_destination_that_dies_while_the_new_one_is_watched_changes_nothing() {
    let mesh = mesh().await;
    let before = endpoints(&mesh).await.unwrap();
    let old = before[0].clone();
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    let up = mesh.up_pid().unwrap();
    signals::freeze(up).unwrap();
    let task = begin(&mesh, &old, 120).await;
    until(&mesh, &task, "its bake", is_in("Bake")).await;
    kill_host(&mesh, spare(&before));
    let task = ended(&mesh, &task, TaskState::RolledBack).await;
    assert_eq!(task.proxies[0].phase, "RolledBack", "{task:?}");
    assert_eq!(endpoints(&mesh).await.unwrap(), before, "as it was");
    signals::thaw(up).unwrap();
    witnesses.testify().await.unwrap();
}

#[tokio::test]
async fn one_whose_host_is_dead_is_built_anew_and_does_not_come_back_with_its_host() {
    let mesh = mesh().await;
    let before = endpoints(&mesh).await.unwrap();
    let old = before[0].clone();
    let up = mesh.up_pid().unwrap();
    signals::freeze(up).unwrap();
    kill_host(&mesh, &old.host_id);
    let task = begin(&mesh, &old, 1).await;
    ended(&mesh, &task, TaskState::Done).await;
    rebuilt(&mesh, &before, &old).await;
    assert!(dir_of(&mesh, &old).exists(), "its agent is dead");
    signals::thaw(up).unwrap();
    removed(&mesh, &old).await;
    rebuilt(&mesh, &before, &old).await;
}

#[tokio::test]
async fn a_new_proxy_that_is_lost_in_the_drain_is_given_up_and_the_old_one_takes_clients_again() {
    let mesh = mesh().await;
    let before = endpoints(&mesh).await.unwrap();
    let old = before[0].clone();
    let mut api = mesh.api().await.unwrap().instances();
    let request = RestartProxyRequest {
        drain_seconds: Some(900),
        ..rebuild(&mesh, &old, 1)
    };
    let answer = api.restart_proxy(request).await.unwrap();
    let task = answer.into_inner().task_id;
    let up = mesh.up_pid().unwrap();
    signals::freeze(up).unwrap();
    until(&mesh, &task, "its drain", is_in("Drain")).await;
    kill_host(&mesh, spare(&before));
    ended(&mesh, &task, TaskState::RolledBack).await;
    signals::thaw(up).unwrap();
    let again = endpoints(&mesh).await.unwrap();
    assert_eq!(ids(&again), ids(&before));
    let again = again.iter().find(|p| p.proxy_id == old.proxy_id).unwrap();
    assert_eq!(again.address, old.address);
    assert_ne!(again.pid, old.pid, "its process took no more clients");
    let witnesses = Witnesses::start(&mesh.contract.proxies, 2).await.unwrap();
    witnesses.testify().await.unwrap();
}
