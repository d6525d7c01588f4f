//! A controller in this process, with one fake agent per host and one fake proxy, which behave as
//! the protocol asks and keep what they were told.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use slotmesh_controller::{
    app::App,
    settings::{Settings, StoreChoice},
};
use slotmesh_proto::{
    agent::v1::{
        self as agent, agent_service_server, control_service_client::ControlServiceClient,
        execute_step_request::Act,
    },
    fleet::v1::{self as fleet, fleet_service_client::FleetServiceClient},
    store::v1 as store,
    topology::v1::{self as topology, topology_service_client::TopologyServiceClient},
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    transport::{Channel, server::TcpIncoming},
};

/// Longest wait of a test for anything.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(20);

/// Waits for a condition, and says which one when it does not come.
pub(crate) async fn wait_for<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + WAIT_MAX;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "waited {WAIT_MAX:?} for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// How the fake agents answer the critical section.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Behaviour {
    /// Switch the roles and commit.
    Works,
    /// Say that nothing was changed.
    NoEffect,
    /// Switch the roles, but let the leader commit.
    CannotCommit,
    /// Break off half way; the old primary is still primary.
    Breaks,
}

/// Roles as the fake Redis processes have them: node → the node it follows, or itself.
pub(crate) type Roles = Arc<Mutex<BTreeMap<String, String>>>;

/// Parameters of each fake Redis process.
pub(crate) type Parameters = Arc<Mutex<BTreeMap<String, BTreeMap<String, String>>>>;

/// Clients of each fake proxy, and which proxies were told where they are to go.
#[derive(Default, Debug)]
pub(crate) struct Crowd {
    pub(crate) clients: u32,
    pub(crate) told: Vec<(String, topology::Leave)>,
}

pub(crate) struct Mesh {
    pub(crate) address: String,
    pub(crate) roles: Roles,
    pub(crate) behaviour: Arc<Mutex<Behaviour>>,
    pub(crate) routes: Arc<Mutex<BTreeMap<String, topology::ShardRoute>>>,
    pub(crate) taken_back: Arc<Mutex<u32>>,
    pub(crate) parameters: Parameters,
    pub(crate) settings: Arc<Mutex<topology::InstanceSettings>>,
    pub(crate) crowd: Arc<Mutex<Crowd>>,
    data: tempfile::TempDir,
    stop: CancellationToken,
    controller: JoinHandle<()>,
    peers: Vec<JoinHandle<()>>,
}

impl Mesh {
    pub(crate) async fn start(hosts: usize) -> Self {
        let data = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let (address, controller) = controller(&data, &stop, 0).await;
        let mut mesh = Self {
            address,
            roles: Roles::default(),
            behaviour: Arc::new(Mutex::new(Behaviour::Works)),
            routes: Arc::default(),
            taken_back: Arc::default(),
            parameters: Parameters::default(),
            settings: Arc::default(),
            crowd: Arc::default(),
            data,
            stop,
            controller,
            peers: Vec::new(),
        };
        for n in 0..hosts {
            mesh.add_agent(format!("host-{n}")).await;
        }
        mesh.sees(hosts).await;
        mesh
    }

    /// An instance that is made before would be placed on fewer hosts.
    async fn sees(&self, hosts: usize) {
        let mut fleet = FleetServiceClient::new(self.channel().await);
        wait_for("the controller to see every host", async || {
            let request = fleet::ListHostsRequest::default();
            let seen = fleet.list_hosts(request).await.ok()?.into_inner().hosts;
            (seen.len() == hosts).then_some(())
        })
        .await;
    }

    pub(crate) async fn channel(&self) -> Channel {
        tonic::transport::Endpoint::from_shared(format!("http://{}", self.address))
            .unwrap()
            .connect_lazy()
    }

    /// Where its metrics are.
    pub(crate) fn admin(&self) -> String {
        let text = std::fs::read_to_string(self.data.path().join("controller.json")).unwrap();
        let (_, rest) = text.split_once("\"admin_address\":\"").unwrap();
        rest.split_once('"').unwrap().0.to_owned()
    }

    /// Stops the controller and starts it again on the same address and data.
    pub(crate) async fn restart(&mut self) {
        self.stop.cancel();
        (&mut self.controller).await.unwrap();
        self.stop = CancellationToken::new();
        let port = self.address.rsplit(':').next().unwrap().parse().unwrap();
        let (_, controller) = controller(&self.data, &self.stop, port).await;
        self.controller = controller;
    }

    async fn add_agent(&mut self, host: String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let fake = FakeAgent {
            controller: self.channel().await,
            roles: self.roles.clone(),
            behaviour: self.behaviour.clone(),
            taken_back: self.taken_back.clone(),
            parameters: self.parameters.clone(),
        };
        let service = agent_service_server::AgentServiceServer::new(fake);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        self.peers.push(tokio::spawn(async move {
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        }));
        let (channel, roles) = (self.channel().await, self.roles.clone());
        self.peers.push(tokio::spawn(async move {
            loop {
                // The session ends with the controller; a new one is opened until the test ends.
                let _ = agent_session(channel.clone(), &host, address, &roles).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }));
    }

    pub(crate) async fn add_proxy(&mut self, instance: &str, proxy: &str) {
        let (channel, routes) = (self.channel().await, self.routes.clone());
        let (settings, crowd) = (self.settings.clone(), self.crowd.clone());
        let (instance, proxy) = (instance.to_owned(), proxy.to_owned());
        self.peers.push(tokio::spawn(async move {
            loop {
                let channel = channel.clone();
                let _ = proxy_stream(channel, &instance, &proxy, &routes, &settings, &crowd).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }));
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.stop.cancel();
        self.peers.iter().for_each(JoinHandle::abort);
    }
}

async fn controller(
    data: &tempfile::TempDir,
    stop: &CancellationToken,
    port: u16,
) -> (String, JoinHandle<()>) {
    let settings = Settings {
        id: "c1".into(),
        listen: SocketAddr::from(([127, 0, 0, 1], port)),
        admin_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        advertise: None,
        store: StoreChoice::Embedded,
        data: data.path().to_owned(),
        etcd: slotmesh_controller::settings::EtcdAccess::default(),
        auto_upgrades: 1,
    };
    let app = App::bind(settings).await.unwrap();
    let (address, stop) = (app.address().to_owned(), stop.clone());
    (
        address,
        tokio::spawn(async move { app.run(stop).await.unwrap() }),
    )
}

/// Reports every assigned node as running, in the role that the fakes have given it.
async fn agent_session(
    channel: Channel,
    host: &str,
    address: SocketAddr,
    roles: &Roles,
) -> Result<(), Status> {
    let (sender, receiver) = mpsc::channel(16);
    let message = |m| agent::SessionRequest { message: Some(m) };
    let register = agent::Register {
        host_id: host.to_owned(),
        agent_address: address.to_string(),
        ..Default::default()
    };
    let _ = sender
        .send(message(agent::session_request::Message::Register(register)))
        .await;
    let mut inbound = ControlServiceClient::new(channel)
        .session(ReceiverStream::new(receiver))
        .await?
        .into_inner();
    let mut assignment = agent::Assignment::default();
    loop {
        tokio::select! {
            news = inbound.message() => match news? {
                Some(agent::SessionResponse {
                    message: Some(agent::session_response::Message::Assignment(a)),
                }) => assignment = a,
                Some(_) => {}
                None => return Ok(()),
            },
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
        let report = agent::HostReport {
            nodes: assignment
                .nodes
                .iter()
                .map(|spec| report(spec, roles))
                .collect(),
            proxies: assignment.proxies.iter().map(proxy_report).collect(),
            ..agent::HostReport::default()
        };
        let report = message(agent::session_request::Message::Report(report));
        if sender.send(report).await.is_err() {
            return Ok(());
        }
    }
}

/// A program that no fake agent can hand a proxy over to.
pub(crate) const BROKEN: &str = "proxy-6.6.6";

/// A proxy is at once what it should be, by a process with the number that the fake proxy has.
fn proxy_report(spec: &agent::ProxySpec) -> agent::ProxyReport {
    let state = match spec.desired() {
        agent::Desired::Removed => agent::ProcessState::Removed,
        _ => agent::ProcessState::Running,
    };
    let (serves, handover) = match spec.program.as_str() {
        BROKEN => ((String::new(), 0), agent::HandoverState::Failed),
        program => (
            (program.to_owned(), spec.generation),
            agent::HandoverState::Done,
        ),
    };
    agent::ProxyReport {
        proxy_id: spec.proxy_id.clone(),
        state: state.into(),
        program: Some(serves.0),
        generation: serves.1,
        handover: Some(agent::ProxyHandover {
            program: spec.program.clone(),
            generation: spec.generation,
            state: handover.into(),
            why: "its sum is another one".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// host:port of a fake node or proxy: made of its id, never dialled.
pub(crate) fn address_of(node: &str) -> String {
    format!("{node}:6379")
}

fn report(spec: &agent::NodeSpec, roles: &Roles) -> agent::NodeReport {
    if spec.desired() == agent::Desired::Removed {
        return agent::NodeReport {
            node_id: spec.node_id.clone(),
            state: agent::ProcessState::Removed.into(),
            ..Default::default()
        };
    }
    let mut roles = roles.lock().unwrap();
    let leader = roles
        .entry(spec.node_id.clone())
        .or_insert_with(|| spec.node_id.clone());
    // Convergence, as a real agent does it.
    if !spec.frozen && spec.epoch > 0 && spec.role() == store::NodeRole::Replica {
        leader.clone_from(&spec.primary_node_id);
    }
    let is_primary = *leader == spec.node_id;
    let is_granted = is_primary && spec.users.iter().any(|u| !u.replication);
    let role = if is_primary {
        store::NodeRole::Primary
    } else {
        store::NodeRole::Replica
    };
    agent::NodeReport {
        node_id: spec.node_id.clone(),
        state: agent::ProcessState::Running.into(),
        address: address_of(&spec.node_id),
        run_id: format!("run-{}", spec.node_id),
        observed_role: role.into(),
        link_up: !is_primary,
        following: if is_primary {
            String::new()
        } else {
            address_of(leader)
        },
        failover_state: "no-failover".into(),
        granted_epoch: if is_granted { spec.epoch } else { 0 },
        assigned_epoch: spec.epoch,
        ..Default::default()
    }
}

struct FakeAgent {
    controller: Channel,
    roles: Roles,
    behaviour: Arc<Mutex<Behaviour>>,
    taken_back: Arc<Mutex<u32>>,
    parameters: Parameters,
}

#[tonic::async_trait]
impl agent_service_server::AgentService for FakeAgent {
    type ReadLostWritesStream = tokio_stream::Empty<Result<agent::ReadLostWritesResponse, Status>>;

    async fn read_lost_writes(
        &self,
        _: Request<agent::ReadLostWritesRequest>,
    ) -> Result<Response<Self::ReadLostWritesStream>, Status> {
        Ok(Response::new(tokio_stream::empty()))
    }

    async fn promise_not_to_promote(
        &self,
        _: Request<agent::PromiseNotToPromoteRequest>,
    ) -> Result<Response<agent::PromiseNotToPromoteResponse>, Status> {
        Ok(Response::new(agent::PromiseNotToPromoteResponse::default()))
    }

    async fn execute_step(
        &self,
        request: Request<agent::ExecuteStepRequest>,
    ) -> Result<Response<agent::ExecuteStepResponse>, Status> {
        let request = request.into_inner();
        let behaviour = *self.behaviour.lock().unwrap();
        let mut response = agent::ExecuteStepResponse {
            outcome: agent::StepOutcome::Done.into(),
            ..Default::default()
        };
        match request.act.clone() {
            Some(Act::HandOver(act)) => match behaviour {
                Behaviour::NoEffect => {
                    response.outcome = agent::StepOutcome::NoEffect.into();
                    response.message = "the target did not answer".into();
                }
                Behaviour::Breaks => return Err(Status::unavailable("broke off")),
                Behaviour::Works | Behaviour::CannotCommit => {
                    {
                        let mut roles = self.roles.lock().unwrap();
                        roles.insert(act.target_node_id.clone(), act.target_node_id.clone());
                        roles.insert(act.node_id.clone(), act.target_node_id.clone());
                    }
                    response.critical_us = 1_500;
                    if behaviour == Behaviour::Works {
                        let commit = agent::CommitHandoverRequest {
                            instance_id: request.instance_id,
                            shard_id: request.shard_id,
                            task_id: request.task_id,
                            epoch: request.epoch,
                            token: act.token,
                            critical_us: 1_500,
                        };
                        ControlServiceClient::new(self.controller.clone())
                            .commit_handover(commit)
                            .await?;
                        response.committed = true;
                    }
                }
            },
            Some(Act::TakeBack(_)) => *self.taken_back.lock().unwrap() += 1,
            Some(Act::EnsureUsers(act)) => assert!(!act.users.is_empty()),
            _ => {}
        }
        Ok(Response::new(response))
    }

    async fn set_parameters(
        &self,
        request: Request<agent::SetParametersRequest>,
    ) -> Result<Response<agent::SetParametersResponse>, Status> {
        let answer = set_parameters(&self.parameters, request.into_inner());
        Ok(Response::new(answer))
    }
}

/// Values that a node refuses have its id.
fn set_parameters(
    all: &Parameters,
    request: agent::SetParametersRequest,
) -> agent::SetParametersResponse {
    let mut response = agent::SetParametersResponse {
        running: true,
        ..Default::default()
    };
    let is_bad = |value: &String| value.contains(&request.node_id);
    if request.parameters.values().any(is_bad) {
        response.refusal = format!("ERR {} does not like it", request.node_id);
        return response;
    }
    let mut all = all.lock().unwrap();
    let node = all.entry(request.node_id).or_default();
    for (name, value) in request.parameters {
        let before = node.insert(name.clone(), value);
        response.previous.insert(name, before.unwrap_or_default());
    }
    response
}

/// Holds and applies at once, as a proxy without traffic does.
async fn proxy_stream(
    channel: Channel,
    instance: &str,
    proxy: &str,
    routes: &Arc<Mutex<BTreeMap<String, topology::ShardRoute>>>,
    settings: &Arc<Mutex<topology::InstanceSettings>>,
    crowd: &Arc<Mutex<Crowd>>,
) -> Result<(), Status> {
    let (sender, receiver) = mpsc::channel(16);
    let message = |m| topology::WatchRequest { message: Some(m) };
    let hello = topology::Hello {
        proxy_id: proxy.to_owned(),
        instance_id: instance.to_owned(),
        address: address_of(proxy),
        ..Default::default()
    };
    let _ = sender
        .send(message(topology::watch_request::Message::Hello(hello)))
        .await;
    let mut inbound = TopologyServiceClient::new(channel)
        .watch(ReceiverStream::new(receiver))
        .await?
        .into_inner();
    while let Some(news) = inbound.message().await? {
        let (changed, new_settings) = match news.message {
            Some(topology::watch_response::Message::Snapshot(s)) => (s.shards, s.settings),
            Some(topology::watch_response::Message::Delta(d)) => (d.changed, d.settings),
            Some(topology::watch_response::Message::Leave(leave)) => {
                let told = &mut crowd.lock().unwrap().told;
                told.push((proxy.to_owned(), leave));
                (Vec::new(), None)
            }
            _ => (Vec::new(), None),
        };
        if let Some(new_settings) = new_settings {
            *settings.lock().unwrap() = new_settings;
        }
        let mut report = topology::Report {
            clients: crowd.lock().unwrap().clients,
            ..topology::Report::default()
        };
        for route in changed {
            let level = if route.hold.is_some() {
                topology::HoldLevel::Held
            } else {
                topology::HoldLevel::Applied
            };
            report.shards.push(topology::ShardState {
                shard_id: route.shard_id.clone(),
                epoch: route.epoch,
                level: level.into(),
                task_id: route
                    .hold
                    .as_ref()
                    .map(|h| h.task_id.clone())
                    .unwrap_or_default(),
            });
            report.holds.push(topology::HoldSample {
                shard_id: route.shard_id.clone(),
                epoch: route.epoch,
                longest_us: 4_200,
                requests: 1,
            });
            routes.lock().unwrap().insert(route.shard_id.clone(), route);
        }
        let _ = sender
            .send(message(topology::watch_request::Message::Report(report)))
            .await;
    }
    Ok(())
}
