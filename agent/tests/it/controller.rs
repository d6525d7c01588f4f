//! A controller of one shard with two nodes, `a` on host `h-a` and `b` on host `h-b`: the record,
//! the assignments derived from it, sessions, and the commit.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use slotmesh_proto::{
    agent::v1::{
        Assignment, CommitHandoverRequest, CommitHandoverResponse, ConfirmPromotionRequest,
        ConfirmPromotionResponse, Desired, EpochUser, HostReport, LeaseKept, LostWrites,
        NodeReport, NodeSpec, ProcessState, ProxyReport, ProxySpec, Register, SessionRequest,
        SessionResponse,
        control_service_server::{ControlService, ControlServiceServer},
        session_request, session_response,
    },
    store::v1::{Departure, NodeRole},
};
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream, wrappers::WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub(crate) const NODES: [&str; 2] = ["a", "b"];
pub(crate) const WAIT: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Default)]
pub(crate) struct Record {
    pub(crate) term: u64,
    pub(crate) revision: u64,
    pub(crate) epoch: u64,
    pub(crate) primary: usize,
    pub(crate) closed_epoch: u64,
    pub(crate) run_ids: [String; 2],
    pub(crate) addresses: [String; 2],
    /// Task's token while a hand-over to the other node is under way.
    pub(crate) token: Option<String>,
    pub(crate) desired: i32,
    pub(crate) engine: String,
    /// Of the replica, whose process may be ended for it; with true its data is discarded.
    pub(crate) exchange: Option<(String, bool)>,
    pub(crate) parameters: HashMap<String, String>,
    pub(crate) parameters_version: u64,
    pub(crate) proxies: Vec<ProxySpec>,
    /// A failover is under way; nobody has the epoch.
    pub(crate) detached: bool,
    /// Of that failover.
    pub(crate) target: Option<usize>,
    /// What the last failover's target said of the history before it.
    pub(crate) previous: (String, u64),
    /// The same of more than one failover.
    pub(crate) departures: Vec<Departure>,
    /// Whose promises stand for the primary's lease; empty: it needs none.
    pub(crate) replica_agents: Vec<String>,
    /// The replica is not in sync.
    pub(crate) may_recopy: bool,
}

#[derive(Debug)]
struct State {
    record: watch::Sender<Record>,
    reports: watch::Sender<HashMap<String, HostReport>>,
    registers: Mutex<HashMap<String, Register>>,
    refuse_commits: Mutex<bool>,
    /// The revision at which the leases of hosts began; `None`: none is kept.
    leases_since: Mutex<Option<u64>>,
    /// By host: reports that have kept a lease.
    kept: watch::Sender<HashMap<String, u64>>,
}

/// The fake; the server ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Controller {
    state: Arc<State>,
    pub(crate) address: SocketAddr,
    _stop: Arc<tokio_util::sync::DropGuard>,
}

pub(crate) fn password(user: &str) -> String {
    format!("secret-of-{user}")
}

pub(crate) fn user(name: String, epoch: u64) -> EpochUser {
    EpochUser {
        password: password(&name),
        replication: name.starts_with("rp-"),
        name,
        epoch,
    }
}

impl Controller {
    pub(crate) async fn start() -> Self {
        let record = Record {
            term: 1,
            revision: 1,
            desired: 1,
            ..Record::default()
        };
        let state = Arc::new(State {
            record: watch::Sender::new(record),
            reports: watch::Sender::new(HashMap::new()),
            registers: Mutex::default(),
            refuse_commits: Mutex::new(false),
            leases_since: Mutex::new(None),
            kept: watch::Sender::new(HashMap::new()),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let server = tonic::transport::Server::builder()
            .add_service(ControlServiceServer::new(Service(state.clone())))
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(listener),
                stop.clone().cancelled_owned(),
            );
        tokio::spawn(server);
        Self {
            state,
            address,
            _stop: Arc::new(stop.drop_guard()),
        }
    }

    pub(crate) fn record(&self) -> Record {
        self.state.record.borrow().clone()
    }

    /// Changes the record, which is pushed to every session.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Record)) {
        self.state.record.send_modify(|record| {
            record.revision += 1;
            change(record);
        });
    }

    pub(crate) fn refuse_commits(&self) {
        *self.state.refuse_commits.lock().unwrap() = true;
    }

    /// From now on reports keep leases, or do not.
    pub(crate) fn keep_leases(&self, since: Option<u64>) {
        *self.state.leases_since.lock().unwrap() = since;
    }

    /// Waits until two more reports of the host have kept its lease: the agent that sends the second
    /// one has the answer to the first.
    pub(crate) async fn until_kept(&self, host: &str) {
        let mut kept = self.state.kept.subscribe();
        let count = |all: &HashMap<String, u64>| all.get(host).copied().unwrap_or_default();
        let enough = count(&kept.borrow()) + 2;
        let wait = kept.wait_for(|all| count(all) >= enough);
        let waited = timeout(WAIT, wait).await;
        assert!(waited.is_ok(), "waited for {host} to keep its lease");
    }

    pub(crate) fn register(&self, host: &str) -> Option<Register> {
        self.state.registers.lock().unwrap().get(host).cloned()
    }

    pub(crate) fn node(&self, node: usize) -> Option<NodeReport> {
        node_in(&self.state.reports.borrow(), node)
    }

    /// Waits until a node is reported as `claim` says.
    pub(crate) async fn until(
        &self,
        what: &str,
        node: usize,
        claim: impl Fn(&NodeReport) -> bool,
    ) -> NodeReport {
        let mut reports = self.state.reports.subscribe();
        // Only what the closure is given may be looked at in it: the channel is locked.
        let wait = reports.wait_for(|all| node_in(all, node).is_some_and(|n| claim(&n)));
        let found = timeout(WAIT, wait)
            .await
            .ok()
            .and_then(|all| node_in(&all.unwrap(), node));
        found.unwrap_or_else(|| {
            panic!(
                "waited for {what} of {}: {:#?}",
                NODES[node],
                self.node(node)
            )
        })
    }

    pub(crate) fn lost_writes(&self, host: &str) -> Vec<LostWrites> {
        let reports = self.state.reports.borrow();
        let report = reports.get(host);
        report.map(|r| r.lost_writes.clone()).unwrap_or_default()
    }

    pub(crate) async fn until_proxy(
        &self,
        what: &str,
        claim: impl Fn(&ProxyReport) -> bool,
    ) -> ProxyReport {
        self.until_proxy_in(WAIT, what, claim).await
    }

    pub(crate) async fn until_proxy_in(
        &self,
        limit: Duration,
        what: &str,
        claim: impl Fn(&ProxyReport) -> bool,
    ) -> ProxyReport {
        let find = |reports: &HashMap<String, HostReport>| {
            reports
                .values()
                .flat_map(|r| &r.proxies)
                .find(|p| claim(p))
                .cloned()
        };
        let mut reports = self.state.reports.subscribe();
        let found = timeout(limit, reports.wait_for(|r| find(r).is_some())).await;
        match found {
            Ok(reports) => find(&reports.unwrap()).unwrap(),
            Err(_) => panic!("waited for {what}: {:#?}", self.state.reports.borrow()),
        }
    }

    /// Waits until both nodes run, and names their processes at epoch 1 with `a` as the primary.
    pub(crate) async fn provision(&self) {
        let mut run_ids = [String::new(), String::new()];
        let mut addresses = run_ids.clone();
        for node in 0..2 {
            let running = self.until("running", node, is_running).await;
            run_ids[node] = running.run_id;
            addresses[node] = running.address;
        }
        self.change(|record| {
            record.epoch = 1;
            record.run_ids = run_ids;
            record.addresses = addresses;
        });
        self.until("grant", 0, |n| {
            n.granted_epoch == 1 && n.assigned_epoch == 1
        })
        .await;
        self.until("link up", 1, |n| n.link_up && n.assigned_epoch == 1)
            .await;
    }
}

fn node_in(reports: &HashMap<String, HostReport>, node: usize) -> Option<NodeReport> {
    let mut nodes = reports.values().flat_map(|r| &r.nodes);
    nodes.find(|n| n.node_id == NODES[node]).cloned()
}

pub(crate) fn is_running(node: &NodeReport) -> bool {
    node.state() == ProcessState::Running && !node.run_id.is_empty()
}

impl Record {
    fn spec(&self, node: usize) -> NodeSpec {
        let id = NODES[node];
        let role = if node == self.primary {
            NodeRole::Primary
        } else {
            NodeRole::Replica
        };
        let epoch = self.epoch;
        let mut users = vec![];
        if epoch > 0 {
            users.push(user(format!("rp-{epoch}-{}", NODES[1 - node]), epoch));
            if node == self.primary {
                users.push(user(format!("px-{epoch}"), epoch));
            }
        }
        if self.detached {
            return self.detached_spec(node);
        }
        let master_user = format!("rp-{epoch}-{id}");
        let primary_address = match node == self.primary {
            true => String::new(),
            false => self.addresses[self.primary].clone(),
        };
        let exchange = self.exchange.clone().filter(|_| node != self.primary);
        NodeSpec {
            node_id: id.to_owned(),
            instance_id: "r-1".to_owned(),
            shard_id: "s-1".to_owned(),
            desired: self.desired,
            engine: exchange
                .as_ref()
                .map_or_else(|| self.engine.clone(), |(engine, _)| engine.clone()),
            databases: 256,
            parameters: self.parameters.clone(),
            epoch,
            run_id: self.run_ids[node].clone(),
            role: role.into(),
            frozen: self.token.is_some(),
            primary_node_id: NODES[self.primary].to_owned(),
            primary_address,
            closed_epoch: self.closed_epoch,
            users,
            master_password: password(&master_user),
            master_user,
            observer_user: "ob-1".to_owned(),
            observer_password: password("ob-1"),
            parameters_version: self.parameters_version,
            detached: false,
            replica_agents: match node == self.primary {
                true => self.replica_agents.clone(),
                false => vec![],
            },
            previous_replid: self.previous.0.clone(),
            previous_offset: self.previous.1,
            departures: self.departures.clone(),
            may_recopy: self.may_recopy && node != self.primary,
            may_exchange: exchange.is_some(),
            discard_data: exchange.as_ref().is_some_and(|(_, discard)| *discard),
            ..NodeSpec::default()
        }
    }

    fn detached_spec(&self, node: usize) -> NodeSpec {
        let serving = Self {
            detached: false,
            ..self.clone()
        };
        NodeSpec {
            role: NodeRole::Replica.into(),
            primary_address: String::new(),
            users: vec![],
            master_user: String::new(),
            master_password: String::new(),
            detached: true,
            ..serving.spec(node)
        }
    }

    fn assignment(&self, host: &str) -> Assignment {
        let nodes = (0..2).filter(|n| host == format!("h-{}", NODES[*n]));
        Assignment {
            term: self.term,
            revision: self.revision,
            nodes: nodes.map(|n| self.spec(n)).collect(),
            proxies: self.proxies.clone(),
            controller_addresses: vec![],
        }
    }
}

struct Service(Arc<State>);

#[tonic::async_trait]
impl ControlService for Service {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut inbound = request.into_inner();
        let first = inbound.message().await?.and_then(|m| m.message);
        let Some(session_request::Message::Register(register)) = first else {
            return Err(Status::invalid_argument("register first"));
        };
        let host = register.host_id.clone();
        self.0
            .registers
            .lock()
            .unwrap()
            .insert(host.clone(), register);
        let (state, reporter) = (self.0.clone(), host.clone());
        let (answers, kept) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(Some(message)) = inbound.message().await {
                if let Some(session_request::Message::Report(report)) = message.message {
                    let since = *state.leases_since.lock().unwrap();
                    if let Some(revision) = since {
                        let kept = LeaseKept {
                            report_number: report.number,
                            ttl_ms: 3_000,
                            revision,
                        };
                        let message = Some(session_response::Message::LeaseKept(kept));
                        let _ = answers.send(Ok(SessionResponse { message })).await;
                        state.kept.send_modify(|all| {
                            *all.entry(reporter.clone()).or_default() += 1;
                        });
                    }
                    state.reports.send_modify(|all| {
                        all.insert(reporter.clone(), report);
                    });
                }
            }
        });
        let assignments = WatchStream::new(self.0.record.subscribe()).map(move |record| {
            let assignment = record.assignment(&host);
            let message = Some(session_response::Message::Assignment(assignment));
            Ok(SessionResponse { message })
        });
        let kept = tokio_stream::wrappers::ReceiverStream::new(kept);
        Ok(Response::new(Box::pin(assignments.merge(kept))))
    }

    async fn confirm_promotion(
        &self,
        request: Request<ConfirmPromotionRequest>,
    ) -> Result<Response<ConfirmPromotionResponse>, Status> {
        let request = request.into_inner();
        let record = self.0.record.borrow();
        let named = record.target.is_some_and(|target| {
            NODES[target] == request.node_id && record.run_ids[target] == request.run_id
        });
        Ok(Response::new(ConfirmPromotionResponse {
            confirmed: record.detached && named && record.epoch == request.epoch,
            reason: "the record names another one".to_owned(),
        }))
    }

    async fn commit_handover(
        &self,
        request: Request<CommitHandoverRequest>,
    ) -> Result<Response<CommitHandoverResponse>, Status> {
        let request = request.into_inner();
        if *self.0.refuse_commits.lock().unwrap() {
            return Err(Status::unavailable("the store is away"));
        }
        self.0.record.send_if_modified(|record| {
            let ours = record.epoch == request.epoch
                && record.token.as_deref() == Some(request.token.as_str());
            if ours {
                record.revision += 1;
                record.epoch += 1;
                record.primary = 1 - record.primary;
                record.token = None;
            }
            ours
        });
        let record = self.0.record.borrow();
        Ok(Response::new(CommitHandoverResponse {
            epoch: record.epoch,
            primary_node_id: NODES[record.primary].to_owned(),
        }))
    }
}

/// What an assignment wants of its processes.
pub(crate) fn removed() -> i32 {
    Desired::Removed.into()
}
