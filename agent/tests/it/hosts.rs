//! Two agents in this process, a step at a time, and what a test's clients do.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use slotmesh_agent::{
    app::{App, AppError},
    control::Control,
    metrics::Metrics,
    process::{Process, last_lines},
    settings::Settings,
};
use slotmesh_proto::agent::v1::{
    EnsureUsers, ExecuteStepRequest, ExecuteStepResponse, HandOver, StepOutcome,
    agent_service_client::AgentServiceClient, execute_step_request::Act,
};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use crate::controller::{Controller, NODES, Record, WAIT, password, user};

/// One agent.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) address: String,
    pub(crate) metrics: Arc<Metrics>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), AppError>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtExit {
    LeaveRunning,
    StopAll,
}

pub(crate) fn settings(controller: &Controller, host: &str, data: PathBuf) -> Settings {
    Settings {
        host_id: host.to_owned(),
        data,
        listen: "127.0.0.1:0".parse().unwrap(),
        advertise_ip: "127.0.0.1".parse().unwrap(),
        controllers: vec![controller.address.to_string()],
        engine_default: "redis-server".to_owned(),
        engines: BTreeMap::new(),
        proxy_binary: "slotmesh-proxy".into(),
        proxy_tls: None,
        zone: String::new(),
        stop_all_on_exit: false,
        drain: None,
        fencer_binary: None,
    }
}

/// The agent before this one lets go of its journal a moment after it has ended.
async fn bind(settings: Settings) -> App {
    let deadline = tokio::time::Instant::now() + WAIT;
    loop {
        match App::bind(settings.clone()).await {
            Err(error) if format!("{error:?}").contains("InUse") => {
                let late = tokio::time::Instant::now() >= deadline;
                assert!(!late, "waited for the journal of the agent before: {error}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            bound => return bound.unwrap(),
        }
    }
}

impl Agent {
    pub(crate) async fn start(settings: Settings) -> Self {
        let app = bind(settings).await;
        let address = app.address().to_string();
        let metrics = app.metrics();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            app.run(async {
                let _ = stopped.await;
            })
            .await
        });
        Self {
            address,
            metrics,
            stop: Some(stop),
            task,
        }
    }

    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        timeout(WAIT, &mut self.task)
            .await
            .expect("agent to end")
            .unwrap()
            .unwrap();
    }

    pub(crate) async fn step(&self, request: ExecuteStepRequest) -> ExecuteStepResponse {
        let address = format!("http://{}", self.address);
        let mut client = AgentServiceClient::connect(address).await.unwrap();
        timeout(WAIT, client.execute_step(request))
            .await
            .expect("step")
            .unwrap()
            .into_inner()
    }
}

/// Two hosts with a node each. Engine processes are killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Mesh {
    pub(crate) controller: Controller,
    pub(crate) agents: Vec<Option<Agent>>,
    pub(crate) dir: TempDir,
    task_number: u32,
}

impl Mesh {
    pub(crate) async fn start(engine: &str) -> Self {
        Self::start_as(|record| record.engine = engine.to_owned()).await
    }

    /// With a record that says so before any agent has read it.
    pub(crate) async fn start_as(change: impl FnOnce(&mut Record)) -> Self {
        let controller = Controller::start().await;
        controller.change(change);
        let dir = tempfile::tempdir().unwrap();
        let mut mesh = Self {
            controller,
            agents: vec![None, None],
            dir,
            task_number: 0,
        };
        for node in 0..2 {
            mesh.start_agent(node, AtExit::LeaveRunning).await;
        }
        mesh
    }

    pub(crate) async fn provisioned(engine: &str) -> Self {
        let mesh = Self::start(engine).await;
        mesh.controller.provision().await;
        // The replica reports its link a moment before the primary takes it for online.
        let mut admin = mesh.admin(0).await;
        eventually("the primary to know its replica", async || {
            let info = slotmesh_agent::probe::Info::read(&mut admin, "replication")
                .await
                .unwrap();
            info.text("slave0").contains("state=online")
        })
        .await;
        mesh
    }

    pub(crate) fn data(&self, node: usize) -> PathBuf {
        self.dir.path().join(NODES[node])
    }

    pub(crate) fn node_dir(&self, node: usize) -> PathBuf {
        self.data(node).join("nodes").join(NODES[node])
    }

    pub(crate) async fn start_agent(&mut self, node: usize, at_exit: AtExit) {
        let host = format!("h-{}", NODES[node]);
        let mut settings = settings(&self.controller, &host, self.data(node));
        settings.stop_all_on_exit = at_exit == AtExit::StopAll;
        self.agents[node] = Some(Agent::start(settings).await);
    }

    pub(crate) async fn stop_agent(&mut self, node: usize) {
        self.agents[node].take().unwrap().stop().await;
    }

    pub(crate) fn agent(&self, node: usize) -> &Agent {
        self.agents[node].as_ref().unwrap()
    }

    /// The admin's connection to a node, past its agent.
    pub(crate) async fn admin(&self, node: usize) -> Control {
        let dir = self.node_dir(node);
        let secret = std::fs::read_to_string(dir.join("admin.secret")).unwrap();
        let config = std::fs::read_to_string(dir.join("redis.conf")).unwrap();
        let socket = config
            .lines()
            .find_map(|l| l.strip_prefix("unixsocket "))
            .unwrap();
        let socket = PathBuf::from(socket.trim_matches('"'));
        Control::unix(&socket, "slotmesh-admin", secret.trim())
            .await
            .unwrap()
    }

    /// A proxy's connection at the record's epoch.
    pub(crate) async fn proxy_connection(&self) -> Control {
        let record = self.controller.record();
        let name = format!("px-{}", record.epoch);
        Control::tcp(&record.addresses[record.primary], &name, &password(&name))
            .await
            .unwrap()
    }

    pub(crate) fn request(&mut self, step: &str, act: Act) -> ExecuteStepRequest {
        self.task_number += 1;
        let record = self.controller.record();
        ExecuteStepRequest {
            task_id: format!("t-{}", self.task_number),
            step: step.to_owned(),
            attempt: 1,
            term: record.term,
            epoch: record.epoch,
            instance_id: "r-1".to_owned(),
            shard_id: "s-1".to_owned(),
            trace_id: String::new(),
            timeout_ms: 3_000,
            act: Some(act),
        }
    }

    /// Steps 3 and 4: users of the next epoch, and the record in Handover. Gives step 6.
    pub(crate) async fn declare(&mut self, token: &str) -> ExecuteStepRequest {
        let record = self.controller.record();
        let next = record.epoch + 1;
        for node in 0..2 {
            let name = format!("rp-{next}-{}", NODES[1 - node]);
            let act = Act::EnsureUsers(EnsureUsers {
                node_id: NODES[node].to_owned(),
                run_id: record.run_ids[node].clone(),
                users: vec![user(name, next)],
            });
            let request = self.request("0/prewarm", act);
            let done = self.agent(node).step(request).await;
            assert_eq!(done.outcome(), StepOutcome::Done, "{}", done.message);
        }
        let old = record.primary;
        let master_user = format!("rp-{next}-{}", NODES[old]);
        let act = Act::HandOver(HandOver {
            node_id: NODES[old].to_owned(),
            run_id: record.run_ids[old].clone(),
            proxy_user: format!("px-{}", record.epoch),
            target_node_id: NODES[1 - old].to_owned(),
            target_address: record.addresses[1 - old].clone(),
            master_password: password(&master_user),
            master_user,
            token: token.to_owned(),
            failover_timeout_ms: 1_000,
            check: None,
        });
        self.controller
            .change(|record| record.token = Some(token.to_owned()));
        self.request("0/critical", act)
    }

    /// A whole switchover to the other node.
    pub(crate) async fn switch_over(&mut self) -> ExecuteStepResponse {
        let old = self.controller.record().primary;
        let token = format!("token-{}", self.task_number);
        let request = self.declare(&token).await;
        let done = self.agent(old).step(request).await;
        assert_eq!(done.outcome(), StepOutcome::Done, "{}", done.message);
        assert!(done.committed);
        let epoch = self.controller.record().epoch;
        self.controller
            .until("grant", 1 - old, |n| n.granted_epoch == epoch)
            .await;
        self.controller
            .change(|record| record.closed_epoch = epoch - 1);
        self.controller
            .until("link up", old, |n| n.link_up && n.assigned_epoch == epoch)
            .await;
        done
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        // Agents first: they would start again what is killed.
        let (ended, all_ended) = std::sync::mpsc::channel();
        for mut agent in self.agents.iter_mut().filter_map(Option::take) {
            drop(agent.stop.take());
            let ended = ended.clone();
            tokio::spawn(async move {
                let _ = agent.task.await;
                drop(ended);
            });
        }
        drop(ended);
        let _: Result<(), _> = all_ended.recv_timeout(WAIT);
        for (node, name) in NODES.iter().enumerate() {
            if std::thread::panicking() {
                let log = last_lines(&self.node_dir(node).join("redis.log"));
                println!("log of node {name} ends with:\n{log}");
            }
            if let Some(process) = Process::load(&self.node_dir(node).join("process")) {
                process.signal(rustix::process::Signal::KILL);
            }
        }
    }
}

pub(crate) fn kill(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Binaries of other versions, where they have been fetched.
pub(crate) fn fetched_engines() -> Vec<String> {
    let engines = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.engines");
    let entries = std::fs::read_dir(engines).into_iter().flatten();
    let binaries = entries.map(|entry| entry.unwrap().path().join("redis-server"));
    let found = binaries.filter(|binary| binary.exists());
    found.map(|b| b.to_str().unwrap().to_owned()).collect()
}

/// Looks until `claim` holds.
pub(crate) async fn eventually(what: &str, mut claim: impl AsyncFnMut() -> bool) {
    let looks = async {
        while !claim().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(WAIT, looks)
        .await
        .unwrap_or_else(|_| panic!("waited for {what}"));
}
