//! The right to serve, against real engines: its end fences, promises stand for it, and the fencer
//! looks after it when the agent can't.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use slotmesh_agent::{control::Control, fence, lease::Lease, process::Process};
use slotmesh_proto::agent::v1::{
    PromiseNotToPromoteRequest, agent_service_client::AgentServiceClient,
};
use tokio::time::{Instant, sleep};

use crate::{
    controller::{Controller, NODES, WAIT},
    hosts::{Agent, Mesh, eventually, kill, settings},
};

/// From the last report that kept a lease to the end of the right.
const RIGHT: Duration = Duration::from_millis(2_200);
/// What a machine that is short of CPU may add to anything.
const SLACK: Duration = Duration::from_millis(1_500);

/// Whether proxies may write at the node, as the engine itself says.
async fn granted(admin: &mut Control) -> bool {
    let users = fence::known_users(admin).await.unwrap();
    users.values().any(|user| user.full)
}

/// Two nodes whose primary needs a lease, or else the promise of `b`'s agent.
async fn leased() -> Mesh {
    let mesh = Mesh::provisioned("").await;
    mesh.controller.keep_leases(Some(1));
    // A primary that comes to need a lease without one is fenced.
    mesh.controller.until_kept("h-a").await;
    let agent = mesh.agent(1).address.clone();
    mesh.controller
        .change(|record| record.replica_agents = vec![agent]);
    // The agent has the assignment before it reports twice more.
    mesh.controller.until_kept("h-a").await;
    mesh.controller
        .until("the grant", 0, |n| n.granted_epoch == 1)
        .await;
    mesh
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_lease_and_promises_the_primary_is_fenced_in_time_and_the_lease_gives_it_back() {
    let mut mesh = leased().await;
    let mut admin = mesh.admin(0).await;
    mesh.stop_agent(1).await;
    mesh.controller.keep_leases(None);
    let since = Instant::now();
    eventually("the self-fence", async || !granted(&mut admin).await).await;
    let took = since.elapsed();
    assert!(took <= RIGHT + SLACK, "fenced after {took:?}");
    assert!(
        took >= RIGHT - SLACK,
        "fenced while it had its lease: {took:?}"
    );
    // Hard: replicas have no user any more either.
    eventually("the hard fence", async || {
        fence::known_users(&mut admin).await.unwrap().is_empty()
    })
    .await;
    mesh.controller
        .until("the fence in the report", 0, |n| n.granted_epoch == 0)
        .await;
    // A lease that began later than what the agent knows of the record gives nothing back.
    let later = mesh.controller.record().revision + 1;
    mesh.controller.keep_leases(Some(later));
    sleep(Duration::from_millis(800)).await;
    assert!(!granted(&mut admin).await, "by an assignment of before");
    mesh.controller.change(|_| {});
    mesh.controller
        .until("the grant", 0, |n| n.granted_epoch == 1)
        .await;
    assert!(granted(&mut admin).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promises_of_the_replicas_agents_keep_a_shard_serving_without_any_lease() {
    let mesh = leased().await;
    let mut admin = mesh.admin(0).await;
    mesh.controller.keep_leases(None);
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        assert!(granted(&mut admin).await, "fenced with all promises");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promise_is_refused_for_an_epoch_that_is_over() {
    let mesh = leased().await;
    let address = format!("http://{}", mesh.agent(1).address);
    let mut client = AgentServiceClient::connect(address).await.unwrap();
    let request = |epoch| PromiseNotToPromoteRequest {
        instance_id: "r-1".into(),
        shard_id: "s-1".into(),
        epoch,
        ttl_ms: 3_000,
    };
    let answer = client.promise_not_to_promote(request(1)).await.unwrap();
    assert!(answer.into_inner().promised);
    let answer = client.promise_not_to_promote(request(0)).await.unwrap();
    let answer = answer.into_inner();
    assert!(!answer.promised && !answer.reason.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_answers_nobody_is_killed_when_its_right_ends() {
    let mut mesh = leased().await;
    let process = Process::load(&mesh.node_dir(0).join("process")).unwrap();
    mesh.stop_agent(1).await;
    process.signal(Signal::STOP);
    mesh.controller.keep_leases(None);
    let since = Instant::now();
    eventually("the process to be killed", async || !process.is_alive()).await;
    assert!(since.elapsed() <= RIGHT + SLACK, "{:?}", since.elapsed());
}

/// An agent of its own process for node `a`, with a fencer.
struct Program {
    child: Child,
    data: PathBuf,
}

impl Program {
    fn start(mesh: &Mesh, more: &[&str]) -> Self {
        let data = mesh.data(0);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(mesh.dir.path().join("agent.log"))
            .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_slotmesh-agent"))
            .args(["--host-id", "h-a", "--controller"])
            .arg(mesh.controller.address.to_string())
            .arg("--data")
            .arg(&data)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { child, data }
    }

    fn fencer(&self) -> Option<Process> {
        Process::load(&self.data.join("fencer/process"))
    }

    /// Reports of the agent before may still be there; its whereabouts are not.
    async fn has_bound(&self) {
        let pid = format!("\"pid\":{},", self.child.id());
        eventually("the agent to be bound", async || {
            let here = std::fs::read_to_string(self.data.join("agent.json"));
            here.is_ok_and(|here| here.contains(&pid))
        })
        .await;
    }

    fn signal(&self, signal: Signal) {
        kill(self.child.id(), signal);
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(fencer) = self.fencer() {
            fencer.signal(Signal::KILL);
        }
    }
}

/// As [`leased`], with node `a` under an agent that can be frozen and killed.
async fn under_a_program() -> (Mesh, Program) {
    let mut mesh = leased().await;
    mesh.stop_agent(0).await;
    let program = Program::start(&mesh, &[]);
    eventually("the fencer", async || program.fencer().is_some()).await;
    // The fencer has been petted with the right that a lease gives.
    sleep(Duration::from_millis(600)).await;
    (mesh, program)
}

fn node(mesh: &Mesh, node: usize) -> Process {
    Process::load(&mesh.node_dir(node).join("process")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_hangs_for_four_seconds_costs_no_process() {
    let (mesh, program) = under_a_program().await;
    let primary = node(&mesh, 0);
    program.signal(Signal::STOP);
    sleep(Duration::from_secs(4)).await;
    assert!(primary.is_alive(), "killed although its replica follows it");
    program.signal(Signal::CONT);
    mesh.controller
        .until("the grant", 0, |n| n.granted_epoch == 1)
        .await;
    let mut admin = mesh.admin(0).await;
    eventually("the grant at the engine", async || {
        granted(&mut admin).await
    })
    .await;
    assert!(primary.is_alive());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_without_agent_that_loses_its_replica_is_killed_by_the_fencer() {
    let (mesh, mut program) = under_a_program().await;
    let (primary, replica) = (node(&mesh, 0), node(&mesh, 1));
    let fencer = program.fencer().unwrap();
    program.kill();
    replica.signal(Signal::STOP);
    let since = Instant::now();
    eventually("the fencer to kill", async || !primary.is_alive()).await;
    let took = since.elapsed();
    replica.signal(Signal::CONT);
    assert!(took <= Duration::from_secs(3) + SLACK, "after {took:?}");
    eventually("the fencer to end", async || !fencer.is_alive()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_without_agent_that_is_followed_lives_and_the_next_agent_takes_the_fencer_over() {
    let (mesh, mut program) = under_a_program().await;
    let primary = node(&mesh, 0);
    let fencer = program.fencer().unwrap();
    program.kill();
    sleep(Duration::from_secs(5)).await;
    assert!(primary.is_alive(), "an agent's death alone stopped it");
    assert!(fencer.is_alive(), "the fencer guards on");
    let next = Program::start(&mesh, &[]);
    next.has_bound().await;
    sleep(Duration::from_millis(600)).await;
    assert_eq!(next.fencer(), Some(fencer), "one fencer, the same");
    // It knows the new agent's word: what that one looks after, it leaves alone.
    // The next pet of a new agent comes with its first right.
    node(&mesh, 1).signal(Signal::STOP);
    sleep(Duration::from_secs(4)).await;
    node(&mesh, 1).signal(Signal::CONT);
    assert!(primary.is_alive(), "killed although its agent has a lease");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_is_guarded_from_its_first_moment_although_its_agent_dies_in_the_next() {
    let mut mesh = Mesh::provisioned("").await;
    mesh.controller.keep_leases(Some(1));
    mesh.stop_agent(0).await;
    let mut program = Program::start(&mesh, &[]);
    eventually("a fencer with nothing to guard", async || {
        program.fencer().is_some_and(|f| f.is_alive())
    })
    .await;
    mesh.controller.until_kept("h-a").await;
    let agent = mesh.agent(1).address.clone();
    mesh.controller.change(|record| {
        record.replica_agents = vec![agent];
        record.epoch = 2;
    });
    mesh.controller
        .until("the grant", 0, |n| n.granted_epoch == 2)
        .await;
    program.kill();
    let (primary, replica) = (node(&mesh, 0), node(&mesh, 1));
    assert!(primary.is_alive());
    replica.signal(Signal::STOP);
    eventually("the fencer to kill", async || !primary.is_alive()).await;
    replica.signal(Signal::CONT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fencer_that_never_comes_up_delays_a_grant_and_prevents_none() {
    let mut mesh = leased().await;
    mesh.stop_agent(0).await;
    let mut settings = settings(&mesh.controller, "h-a", mesh.data(0));
    // Ends at once, and hears nothing.
    settings.fencer_binary = Some("true".into());
    mesh.agents[0] = Some(Agent::start(settings).await);
    let since = Instant::now();
    mesh.controller.change(|record| record.epoch = 2);
    mesh.controller
        .until("the grant", 0, |n| n.granted_epoch == 2)
        .await;
    let took = since.elapsed();
    assert!(took > Duration::from_secs(2), "given after {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_told_to_end_leaves_no_fencer_behind() {
    for more in [&[][..], &["--stop-all-on-exit"]] {
        let (mesh, mut program) = under_a_program().await;
        program.kill();
        let mut next = Program::start(&mesh, more);
        let fencer = next.fencer().unwrap();
        next.has_bound().await;
        next.signal(Signal::TERM);
        let since = Instant::now();
        while next.child.try_wait().unwrap().is_none() {
            assert!(
                since.elapsed() < WAIT,
                "waited for the agent of {} to end",
                NODES[0]
            );
            sleep(Duration::from_millis(10)).await;
        }
        assert!(!fencer.is_alive(), "with {more:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_leaves_a_controller_that_keeps_its_lease_no_more_for_another_one() {
    let (first, second) = (Controller::start().await, Controller::start().await);
    first.keep_leases(Some(1));
    second.keep_leases(Some(1));
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(&first, "h-x", dir.path().to_owned());
    settings.controllers.push(second.address.to_string());
    let agent = Agent::start(settings).await;
    eventually("a session", async || first.register("h-x").is_some()).await;
    sleep(Duration::from_millis(600)).await;
    assert!(second.register("h-x").is_none());
    first.keep_leases(None);
    let since = Instant::now();
    eventually("the other session", async || {
        second.register("h-x").is_some()
    })
    .await;
    assert!(since.elapsed() <= RIGHT + SLACK, "{:?}", since.elapsed());
    agent.stop().await;
}

#[test]
fn a_lease_starts_with_no_right() {
    let lease = Lease::default();
    assert!(
        lease.promised("r-1", "s-1").is_some(),
        "it may have promised before"
    );
}
