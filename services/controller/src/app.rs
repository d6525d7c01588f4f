//! The controller's composition: the only file that knows every component.
//!
//! `bind` opens the store and the socket, so that what can't work ends the process at once;
//! `run` serves until told to stop.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use slotmesh_proto::{
    FILE_DESCRIPTOR_SET, agent::v1::control_service_server::ControlServiceServer,
    artifact::v1::artifact_service_server::ArtifactServiceServer,
    fleet::v1::fleet_service_server::FleetServiceServer,
    instance::v1::instance_service_server::InstanceServiceServer,
    peer::v1::peer_service_server::PeerServiceServer,
    task::v1::task_service_server::TaskServiceServer,
    topology::v1::topology_service_server::TopologyServiceServer,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, server::TcpIncoming};
use tracing::{info, warn};

use crate::{
    admin,
    agents::Agents,
    drive::Driver,
    forward::{ForwardLayer, Leaders},
    grpc::{self, Context},
    hosts,
    hub::Hub,
    jumps::Jumps,
    leader::{Candidate, Election, LEADER_TTL, Leadership, Term},
    mirror::Mirror,
    peers::Registration,
    relay,
    settings::{Settings, StoreChoice},
    store::{
        EmbeddedStore, EtcdSettings, EtcdStore, Store,
        compactor::{self, COMPACTION_INTERVAL},
        keys::valid_id,
    },
};

/// Open calls get this long to end when the process stops; streams are ended at once.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// A peer that is gone is noticed within two of these.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Calls being served on one connection; agents and proxies need two.
const CALLS_PER_CONNECTION_MAX: usize = 256;

/// A controller whose store is open and whose socket is bound.
#[derive(Debug)]
pub struct App {
    settings: Settings,
    store: Arc<dyn Store>,
    embedded: Option<Arc<EmbeddedStore>>,
    listener: TcpListener,
    admin: TcpListener,
    address: String,
}

impl App {
    /// Opens the store and binds the API's address.
    ///
    /// # Errors
    /// When the address is taken, the directory can't be used, or the store can't be opened or is
    /// of a newer release.
    pub async fn bind(settings: Settings) -> anyhow::Result<Self> {
        if !valid_id(&settings.id) {
            bail!("--id is letters, digits, and any of -_.: (at most 100)");
        }
        std::fs::create_dir_all(&settings.data)
            .with_context(|| format!("create data directory {}", settings.data.display()))?;
        let listener = TcpListener::bind(settings.listen).await.with_context(|| {
            format!(
                "bind the API to {}: choose another --listen",
                settings.listen
            )
        })?;
        let bound = listener.local_addr().context("read the bound address")?;
        let address = settings
            .advertise
            .clone()
            .unwrap_or_else(|| bound.to_string());
        if settings.advertise.is_none() && bound.ip().is_unspecified() {
            warn!(%address, "other hosts can't reach this address: give --advertise HOST:PORT");
        }
        let (store, embedded): (Arc<dyn Store>, _) = match &settings.store {
            StoreChoice::Embedded => {
                let store = EmbeddedStore::open(&settings.data)
                    .await
                    .with_context(|| format!("open the store in {}", settings.data.display()))?;
                let store = Arc::new(store);
                (store.clone(), Some(store))
            }
            StoreChoice::Etcd(endpoints) => {
                let etcd = settings.etcd.resolve(endpoints)?;
                let store = EtcdStore::connect(&etcd)
                    .await
                    .with_context(|| unreachable(&etcd))?;
                (Arc::new(store), None)
            }
        };
        let admin = settings.admin_listen;
        let admin = TcpListener::bind(admin)
            .await
            .with_context(|| format!("bind metrics to {admin}: choose another --admin-listen"))?;
        let admin_bound = admin.local_addr().context("read the bound address")?;
        write_address(&settings.data, bound, admin_bound)?;
        Ok(Self {
            settings,
            store,
            embedded,
            listener,
            admin,
            address,
        })
    }

    /// Where the API is served.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Serves until `shutdown`, then gives the leadership back.
    ///
    /// # Errors
    /// When the records can't be read at start, or the server fails.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let (mirror, mirror_worker) = Mirror::start(self.store.clone(), shutdown.clone())
            .await
            .context("read the records")?;
        let election_stop = CancellationToken::new();
        let candidate = Candidate {
            controller_id: self.settings.id.clone(),
            address: self.address.clone(),
            ttl: LEADER_TTL,
        };
        let election = Election::start(self.store.clone(), candidate, election_stop.clone());
        let registration = Registration::start(
            self.store.clone(),
            mirror.clone(),
            self.settings.id.clone(),
            self.address.clone(),
            shutdown.clone(),
        );
        let hub = Hub::default();
        let context = Context {
            store: self.store.clone(),
            mirror: mirror.clone(),
            hub: hub.clone(),
            leadership: election.leadership(),
            agents: Agents::default(),
            controller_id: self.settings.id.clone(),
            address: self.address.clone(),
            in_reach: registration.in_reach(),
            leaders: Leaders::default(),
            auto_upgrades: self.settings.auto_upgrades,
            jumps: Jumps::default(),
            stopping: shutdown.clone(),
        };
        let clock = tokio::spawn(context.jumps.clone().watch(shutdown.clone()));
        let compactor_stop = shutdown.clone();
        let compacted = self.store.clone();
        let compactor = tokio::spawn(async move {
            compactor::run(compacted, COMPACTION_INTERVAL, compactor_stop).await;
        });
        let drivers = tokio::spawn(lead(context.clone(), shutdown.clone()));
        let leases = hosts::follow(mirror.clone(), hub.clone(), shutdown.clone());
        let leases = tokio::spawn(leases);
        let relay = tokio::spawn(relay::run(context.clone(), shutdown.clone()));
        let admin = admin::serve(self.admin, context.clone(), shutdown.clone());
        let admin = tokio::spawn(async move {
            if let Err(error) = admin.await {
                warn!(%error, "metrics are served no more");
            }
        });
        info!(address = %self.address, id = self.settings.id, "controller serves");
        let served = serve(self.listener, context, shutdown.clone()).await;
        shutdown.cancel();
        join("leader's loop", drivers).await;
        join("relay", relay).await;
        join("metrics", admin).await;
        registration.join().await;
        election_stop.cancel();
        election.join().await;
        join("mirror", mirror_worker).await;
        join("compactor", compactor).await;
        join("hosts' leases", leases).await;
        join("clock", clock).await;
        if let Some(embedded) = self.embedded {
            embedded.shutdown().await;
        }
        served
    }
}

async fn join(name: &str, worker: JoinHandle<()>) {
    if let Err(error) = worker.await {
        warn!(name, %error, "worker died");
    }
}

/// Runs one driver for each term of this controller.
async fn lead(context: Context, shutdown: CancellationToken) {
    let mut leadership = context.leadership.clone();
    loop {
        let term = leadership.borrow_and_update().term();
        match term {
            Some(term) => {
                let stop = shutdown.child_token();
                context.hub.begin_term();
                let driver = Driver::new(
                    context.store.clone(),
                    context.mirror.clone(),
                    context.hub.clone(),
                    context.agents.clone(),
                    term,
                    context.controller_id.clone(),
                );
                let driver = driver
                    .upgrading_at_a_time(context.auto_upgrades)
                    .watching(context.jumps.clone());
                let mut run = tokio::spawn(driver.run(stop.clone()));
                let ended = tokio::select! {
                    ended = &mut run => Some(ended),
                    () = left(&mut leadership, term) => None,
                    () = shutdown.cancelled() => None,
                };
                stop.cancel();
                if ended.is_none() {
                    join("driver", run).await;
                } else {
                    // Deposed, as a write has shown, before the election worker knew; or stopped.
                    tokio::select! {
                        () = left(&mut leadership, term) => {}
                        () = shutdown.cancelled() => {}
                    }
                }
            }
            None => tokio::select! {
                changed = leadership.changed() => if changed.is_err() { return },
                () = shutdown.cancelled() => return,
            },
        }
        if shutdown.is_cancelled() {
            return;
        }
    }
}

async fn left(leadership: &mut watch::Receiver<Leadership>, term: Term) {
    let _ = leadership.wait_for(|l| l.term() != Some(term)).await;
}

async fn serve(
    listener: TcpListener,
    context: Context,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_serving::<InstanceServiceServer<grpc::instance::Instances>>()
        .await;
    health
        .set_serving::<TaskServiceServer<grpc::task::Tasks>>()
        .await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("set up reflection")?;
    // What older clients ask for, older grpcurl among them.
    let reflection_alpha = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1alpha()
        .context("set up reflection")?;
    let stopping = shutdown.clone();
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION_MAX)
        .trace_fn(|request| tracing::info_span!("grpc", path = request.uri().path()))
        .layer(ForwardLayer::new(context.clone()))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(reflection_alpha)
        .add_service(InstanceServiceServer::new(grpc::instance::Instances::new(
            context.clone(),
        )))
        .add_service(TaskServiceServer::new(grpc::task::Tasks::new(
            context.clone(),
        )))
        .add_service(FleetServiceServer::new(grpc::fleet::Fleet::new(
            context.clone(),
        )))
        .add_service(ArtifactServiceServer::new(grpc::artifact::Artifacts::new(
            context.clone(),
        )))
        .add_service(PeerServiceServer::new(grpc::peer::Peers::new(
            context.clone(),
        )))
        .add_service(ControlServiceServer::new(grpc::agent::Control::new(
            context.clone(),
        )))
        .add_service(TopologyServiceServer::new(grpc::topology::Topology::new(
            context,
        )))
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            async move { stopping.cancelled().await },
        );
    tokio::pin!(server);
    tokio::select! {
        served = &mut server => return served.context("serve the API"),
        () = shutdown.cancelled() => {}
    }
    // Streams end by the same token; a peer that does not read may keep one open.
    match tokio::time::timeout(DRAIN_TIMEOUT, server).await {
        Ok(served) => served.context("serve the API"),
        Err(_) => Ok(()),
    }
}

fn unreachable(etcd: &EtcdSettings) -> String {
    let mut text = format!("connect to etcd at {}", etcd.endpoints.join(","));
    if etcd.tls.is_some() {
        text.push_str(" by TLS: --etcd-ca must have signed its certificate, for this very address");
    }
    text
}

/// Tells whoever started this process where it is: `controller.json`.
fn write_address(data: &Path, bound: SocketAddr, admin: SocketAddr) -> anyhow::Result<()> {
    let text = format!(
        "{{\"pid\":{},\"address\":\"{bound}\",\"admin_address\":\"{admin}\"}}\n",
        std::process::id()
    );
    let (path, temporary) = (
        data.join("controller.json"),
        data.join("controller.json.new"),
    );
    std::fs::write(&temporary, text)
        .and_then(|()| std::fs::rename(&temporary, &path))
        .with_context(|| format!("write {}", path.display()))
}
