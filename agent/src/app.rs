//! Puts the agent together. The only file that knows all components.
//!
//! Invariant: after `bind` the data directory is ours, the address is known and written down, and
//! every error that an operator can cause has been told; after `run` all workers have ended.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;
use slotmesh_proto::agent::v1::{Register, agent_service_server::AgentServiceServer};
use slotmesh_runtime::shutdown;
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

use crate::{
    artifact::{Engines, catalogue::Catalogue},
    controllers::Controllers,
    drain::drain,
    executor::Executor,
    fencer::{FencerError, client::FencerClient},
    host::Host,
    journal::{Journal, JournalError, SCHEMA_VERSION},
    lease::{Lease, guard::Guard},
    metrics::Metrics,
    node::{
        files::{NodeDir, check_schema, make_private_dir},
        worker::Farewell,
    },
    process::write_atomic,
    proxy::programs_in,
    reports::Reports,
    session,
    settings::Settings,
    supervisor::{Supervisor, ids_in},
};

/// Steps that are under way may end before the server does.
const SERVER_GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("data directory {path}")]
    Data { path: PathBuf, source: io::Error },
    #[error("listen on {address}: choose another with --listen")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Fencer(#[from] FencerError),
    #[error("gRPC server")]
    Server(#[from] tonic::transport::Error),
    #[error("set up gRPC reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A bound agent that has not started to work.
#[derive(Debug)]
pub struct App {
    settings: Settings,
    listener: Option<TcpListener>,
    address: SocketAddr,
    host: Arc<Host>,
    fencer: Option<FencerClient>,
}

#[derive(Serialize)]
struct Whereabouts {
    pid: u32,
    address: String,
}

impl App {
    pub async fn bind(settings: Settings) -> Result<Self, AppError> {
        let data = |source| AppError::Data {
            path: settings.data.clone(),
            source,
        };
        make_private_dir(&settings.data).map_err(data)?;
        let root = settings.data.canonicalize().map_err(data)?;
        check_schema(&root, SCHEMA_VERSION).map_err(data)?;
        let journal = Journal::open(&root)?;
        let (nodes_dir, proxies_dir) = (root.join("nodes"), root.join("proxies"));
        let lost_dir = root.join("lost");
        make_private_dir(&lost_dir).map_err(data)?;
        let reports = Reports::default();
        journal.read(|memory| {
            for captured in memory.captures() {
                reports.lost(&lost_dir, captured.lost.clone());
            }
        });
        make_private_dir(&nodes_dir).map_err(data)?;
        make_private_dir(&proxies_dir).map_err(data)?;
        let address = settings.listen;
        let listen = |source| AppError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        write_whereabouts(&root, address).map_err(data)?;
        let controllers =
            Controllers::kept_in(settings.controllers.clone(), root.join("controllers.json"));
        let catalogue = Catalogue::new(root.join("artifacts"), controllers.clone());
        let catalogue = Arc::new(catalogue.map_err(data)?);
        let engines = Engines::new(settings.engine_default.clone(), settings.engines.clone());
        let host = Arc::new(Host {
            host_id: settings.host_id.clone(),
            advertise_ip: settings.advertise_ip,
            nodes_dir,
            lost_dir,
            proxies_dir,
            proxy_binary: settings.proxy_binary.clone(),
            proxy_tls: settings.proxy_tls.clone(),
            engines: engines.with_catalogue(catalogue.clone()),
            catalogue,
            journal,
            lease: Lease::default(),
            reports,
            controllers,
            metrics: Arc::new(Metrics::default()),
        });
        let fencer = FencerClient::new(settings.fencer_binary.clone(), root)?;
        Ok(Self {
            settings,
            listener: Some(listener),
            address,
            host,
            fencer: Some(fencer),
        })
    }

    /// Of the agent's gRPC API.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn metrics(&self) -> Arc<Metrics> {
        self.host.metrics.clone()
    }

    /// Works until `shutdown`. Nodes and proxies live on, unless the settings say otherwise.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), AppError> {
        let stop = CancellationToken::new();
        let supervisor = Supervisor::start(self.host.clone());
        let assignments = watch::Sender::new(None);
        let reconcile = tokio::spawn({
            let (supervisor, receiver) = (supervisor.clone(), assignments.subscribe());
            let stop = stop.clone();
            async move { supervisor.run(receiver, stop).await }
        });
        let guard = self.fencer.take().map(|fencer| {
            let guard = Guard::new(self.host.clone(), fencer);
            tokio::spawn(guard.run(assignments.subscribe(), stop.clone()))
        });
        let clean = tokio::spawn({
            let (host, stop) = (self.host.clone(), stop.clone());
            async move {
                let used = || &engines_of(&host.nodes_dir) | &programs_in(&host.proxies_dir);
                host.catalogue.keep_clean(used, stop).await;
            }
        });
        let register = self.register();
        let session = tokio::spawn(session::run(
            self.host.clone(),
            register,
            assignments,
            stop.clone(),
        ));
        let server = self.serve(supervisor.clone(), stop.clone()).await?;
        let mut server = tokio::spawn(server);
        tracing::info!(host = %self.host.host_id, address = %self.address, "agent runs");
        let early = tokio::select! {
            () = self.asked_to_end(shutdown) => None,
            ended = &mut server => Some(ended),
        };
        stop.cancel();
        let farewell = match self.settings.stop_all_on_exit {
            true => Farewell::Stop,
            false => Farewell::LeaveRunning,
        };
        for worker in [reconcile, session, clean].into_iter().chain(guard) {
            let _ = worker.await;
        }
        supervisor.stop(farewell).await;
        let ended = match early {
            Some(ended) => Some(ended),
            None => match timeout(SERVER_GRACE, &mut server).await {
                Ok(ended) => Some(ended),
                Err(_) => {
                    server.abort();
                    let _ = server.await;
                    None
                }
            },
        };
        tracing::info!(host = %self.host.host_id, ?farewell, "agent ends");
        match ended {
            Some(Ok(Err(error))) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Resolves when the agent may end: at the first signal, or once its host is drained.
    async fn asked_to_end(&self, shutdown: impl Future<Output = ()>) {
        shutdown.await;
        let Some(limit) = self.settings.drain else {
            return;
        };
        tracing::info!(?limit, "moving the primaries of this host to others first");
        let drain = drain(&self.host.host_id, &self.host.controllers, limit);
        tokio::select! {
            drained = drain => tracing::info!(?drained, "drain ends"),
            _ = shutdown::signalled() => tracing::warn!("a second signal: ending undrained"),
        }
    }

    async fn serve(
        &mut self,
        supervisor: Arc<Supervisor>,
        stop: CancellationToken,
    ) -> Result<impl Future<Output = Result<(), tonic::transport::Error>> + use<>, AppError> {
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<AgentServiceServer<Executor>>().await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(slotmesh_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let executor = Executor::new(self.host.clone(), supervisor);
        let listener = self.listener.take().ok_or_else(|| AppError::Listen {
            address: self.address,
            source: io::ErrorKind::NotConnected.into(),
        })?;
        // An answer is several small writes; none of them may wait for an acknowledgement.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        Ok(tonic::transport::Server::builder()
            .add_service(AgentServiceServer::new(executor))
            .add_service(health_service)
            .add_service(reflection)
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned()))
    }

    fn register(&self) -> Register {
        let bytes: [u8; 8] = rand::random();
        Register {
            host_id: self.host.host_id.clone(),
            agent_address: reachable(self.address, self.host.advertise_ip).to_string(),
            advertise_ip: self.host.advertise_ip.to_string(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            agent_instance: hex::encode(bytes),
            engines: self.host.engines.names(),
            zone: self.settings.zone.clone(),
            pid: std::process::id(),
            // Of each session: set when it opens.
            opened_unix_us: 0,
        }
    }
}

/// Names of the engines that nodes of this host are made of.
fn engines_of(nodes_dir: &Path) -> BTreeSet<String> {
    let specs = ids_in(nodes_dir).into_iter();
    let specs = specs.filter_map(|id| NodeDir::peek_spec(nodes_dir, &id));
    specs.map(|spec| spec.engine).collect()
}

/// Where others reach what listens at `bound`.
fn reachable(bound: SocketAddr, advertise_ip: IpAddr) -> SocketAddr {
    if bound.ip().is_unspecified() {
        SocketAddr::new(advertise_ip, bound.port())
    } else {
        bound
    }
}

fn write_whereabouts(root: &Path, address: SocketAddr) -> io::Result<()> {
    let here = Whereabouts {
        pid: std::process::id(),
        address: address.to_string(),
    };
    let text = serde_json::to_vec(&here).map_err(io::Error::other)?;
    write_atomic(&root.join("agent.json"), &text, 0o600)
}
