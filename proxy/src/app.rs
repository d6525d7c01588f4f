//! Puts the process together: the only file that knows all components.
//!
//! [`App::bind`] binds all sockets, so that addresses are known and errors end the process before
//! anything runs; [`App::run`] serves until it is told to stop.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc::Receiver;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Observed};
use crate::controllers::Controllers;
use crate::core::Identity;
use crate::handover::{self, Door, Office, Report, Role, Stance, TakeError};
use crate::listener::Listener;
use crate::progress::Progress;
use crate::routing::Routing;
use crate::saved::SavedError;
use crate::settings::Settings;
use crate::switchboard::Switchboard;
use crate::tls::{Port, TlsError};
use crate::topology::Topology;
use crate::watch::{Freshness, Watch, Who, keep_saved};
use crate::worker::{self, Notice, Question, Shared, WorkerHandle};

/// For a scrape that is under way, or a stream that is being opened, when the process stops.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// Why the process cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("listen on {address}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("use the data directory {}", path.display())]
    Data {
        path: std::path::PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Saved(#[from] SavedError),
    #[error(transparent)]
    Worker(#[from] worker::StartError),
    #[error("take over from another process")]
    TakeOver(#[from] TakeError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the other process listens at {0:?}, which is no address")]
    Address(String),
}

impl StartError {
    /// The status with which the process ends.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::TakeOver(error) => error.exit_status(),
            _ => 1,
        }
    }
}

/// Everything, bound.
#[derive(Debug)]
pub struct App {
    address: SocketAddr,
    admin_address: SocketAddr,
    admin_socket: TcpListener,
    listener: Listener,
    door: Door,
    office: Arc<Office>,
    take_over: Option<PathBuf>,
    watch: Watch,
    observed: Observed,
    progress: Arc<Progress>,
    notices: Receiver<Notice>,
    switchboard: Switchboard,
    questions: Receiver<Question>,
    stop_workers: Arc<AtomicBool>,
    workers: Arc<Vec<WorkerHandle>>,
}

impl App {
    /// Binds sockets, starts workers, and puts the saved topology in force if there is one.
    ///
    /// # Errors
    /// A port is in use, the data directory cannot be used, or holds a newer release's data.
    pub async fn bind(settings: Settings) -> Result<Self, StartError> {
        let data_error = |source| StartError::Data {
            path: settings.data.clone(),
            source,
        };
        std::fs::create_dir_all(&settings.data).map_err(data_error)?;
        let report = Report::new(&settings.data);
        if settings.take_over.is_some() {
            report.begin();
        }
        let tls = settings.tls.as_ref().map(Port::load).transpose();
        let tls = tls.inspect_err(|error| {
            if settings.take_over.is_some() {
                report.give_up("", error.to_string());
            }
        })?;
        let door = Door::open(&settings.data).map_err(data_error)?;
        let entrance = match enter(&settings, &door).await {
            Ok(entrance) => entrance,
            Err(error) => {
                match &error {
                    StartError::TakeOver(error) => report.failed(error),
                    other if settings.take_over.is_some() => report.give_up("", other.to_string()),
                    _ => {}
                }
                return Err(error);
            }
        };
        let address = entrance.address;
        let (admin_socket, admin_address) = entrance.admin;
        let (notices_in, notices) = Shared::notices();
        let (questions_in, questions) = Shared::questions();
        let shared = Shared {
            routing: Arc::new(Routing::default()),
            identity: Arc::new(Identity {
                run_id: format!(
                    "{:032x}{:08x}",
                    rand::random::<u128>(),
                    rand::random::<u32>()
                ),
                port: address.port(),
                pid: std::process::id(),
                advertise: settings.advertise.clone(),
            }),
            held_sum: Arc::new(AtomicU64::new(0)),
            audience: Arc::default(),
            clients: Arc::new(AtomicUsize::new(0)),
            stop: Arc::new(AtomicBool::new(false)),
            notices: notices_in,
            questions: questions_in,
            scripts: Arc::default(),
            acl_log: Arc::default(),
        };
        let mut workers = Vec::new();
        for index in 0..settings.workers {
            workers.push(worker::start(index, shared.clone())?);
        }
        let workers = Arc::new(workers);
        let published: Vec<_> = workers.iter().map(|w| Arc::clone(&w.published)).collect();
        let routing = Arc::clone(&shared.routing);
        let progress = Arc::new(Progress::new(published.clone(), Arc::clone(&routing)));
        let freshness = Arc::new(Freshness::default());
        let rejected = Arc::new(AtomicU64::new(0));
        let controllers = Controllers::new(settings.controllers);
        let switchboard = Switchboard {
            instance: settings.instance.clone(),
            controllers: controllers.clone(),
            routing: Arc::clone(&routing),
            workers: Arc::clone(&workers),
        };
        let stance = tokio::sync::watch::Sender::new(Stance {
            role: entrance.role,
            socket: entrance.socket.map(Arc::new),
        });
        let office = Arc::new(Office {
            proxy_id: settings.proxy_id.clone(),
            instance: settings.instance.clone(),
            address: settings
                .advertise
                .clone()
                .unwrap_or_else(|| address.to_string()),
            admin_address: admin_address.to_string(),
            data: settings.data.clone(),
            workers: Arc::clone(&workers),
            clients: Arc::clone(&shared.clients),
            audience: Arc::clone(&shared.audience),
            report,
            announced: AtomicBool::new(false),
            writing: Mutex::default(),
            routing: Arc::clone(&routing),
            next_id: Arc::new(AtomicU64::new(1)),
            stance,
            counts: Arc::default(),
            stop: CancellationToken::new(),
            tls: tls.clone(),
            door: door.path().to_owned(),
            successor: Mutex::default(),
            wants_back: AtomicBool::new(false),
            talks: AtomicU64::new(0),
            turn: Mutex::default(),
            orders: Mutex::default(),
            leave_orders: AtomicU64::new(0),
            sends_rest: AtomicBool::new(false),
            runtime: tokio::runtime::Handle::current(),
        });
        let mut watch = Watch {
            who: Who {
                proxy_id: settings.proxy_id,
                instance: settings.instance,
                host_id: settings.host_id,
                address: office.address.clone(),
                admin_address: admin_address.to_string(),
            },
            controllers,
            data: settings.data.clone(),
            routing: Arc::clone(&routing),
            workers: Arc::clone(&workers),
            progress: Arc::clone(&progress),
            freshness: Arc::clone(&freshness),
            topology: Topology::default(),
            stance: office.stance.subscribe(),
            office: Arc::clone(&office),
            to_save: tokio::sync::watch::Sender::new(None),
        };
        watch.start_from_disk().await?;
        if entrance.role == Role::Serving {
            office.announce()?;
        }
        Ok(Self {
            address,
            admin_address,
            admin_socket,
            listener: Listener {
                stance: office.stance.subscribe(),
                workers: Arc::clone(&workers),
                clients: Arc::clone(&shared.clients),
                max_clients: settings.max_clients,
                routing: Arc::clone(&shared.routing),
                rejected: Arc::clone(&rejected),
                next_id: Arc::clone(&office.next_id),
                tls,
            },
            door,
            take_over: settings.take_over,
            watch,
            observed: Observed {
                workers: published,
                routing,
                freshness,
                rejected,
                held_bytes: Arc::clone(&shared.held_sum),
                handovers: Arc::clone(&office.counts),
            },
            office,
            progress,
            notices,
            switchboard,
            questions,
            stop_workers: shared.stop,
            workers,
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Metrics and readiness.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// Serves until `stop`, or until another process has taken over and needs this one no more: then
    /// nothing is accepted, what clients have asked is answered, within a bound, and all threads end.
    ///
    /// # Errors
    /// It was to take over from another process, and could not.
    pub async fn run(self, stop: CancellationToken) -> Result<(), TakeError> {
        let role = self.office.stance.borrow().role;
        tracing::info!(address = %self.address, admin = %self.admin_address, ?role, "started");
        let Self {
            mut notices,
            progress,
            stop_workers,
            workers,
            office,
            ..
        } = self;
        let mut tasks = JoinSet::new();
        let told = stop;
        let stop = office.stop.clone();
        // What runs on threads of its own ends with this, however this ends.
        let _ends = stop.clone().drop_guard();
        let both = stop.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = told.cancelled() => both.cancel(),
                () = both.cancelled() => {}
            }
        });
        let (failed, failure) = tokio::sync::oneshot::channel();
        if let Some(path) = self.take_over {
            let office = Arc::clone(&office);
            tokio::task::spawn_blocking(move || {
                if let Err(error) = handover::relieve(&office, &path) {
                    let _ = failed.send(error); // heard once everything has ended
                    office.stop.cancel();
                }
            });
        }
        tasks.spawn(self.door.run(Arc::clone(&office), stop.child_token()));
        drop(office);
        tasks.spawn(self.listener.run(stop.child_token()));
        let calls = self.switchboard.run(self.questions, stop.child_token());
        tasks.spawn(calls);
        let watching = stop.child_token();
        let saver = keep_saved(self.watch.data.clone(), self.watch.to_save.subscribe());
        tasks.spawn(saver);
        tasks.spawn(self.watch.run(watching));
        let admin = admin::serve(self.admin_socket, self.observed, stop.child_token());
        tasks.spawn(async move {
            if let Err(error) = admin.await {
                tracing::error!(%error, "the admin port is not served");
            }
        });
        let told = stop.child_token();
        tasks.spawn(async move {
            loop {
                tokio::select! {
                    biased;
                    () = told.cancelled() => return,
                    notice = notices.recv() => match notice {
                        Some(notice) => progress.note(notice),
                        None => return,
                    },
                }
            }
        });
        stop.cancelled().await;
        stop_workers.store(true, Ordering::Relaxed);
        workers.iter().for_each(WorkerHandle::wake);
        let ends = async {
            while let Some(ended) = tasks.join_next().await {
                if let Err(error) = ended {
                    tracing::error!(%error, "a part of the process ended by a panic");
                }
            }
        };
        if timeout(STOP_LIMIT, ends).await.is_err() {
            tasks.shutdown().await;
        }
        let joined = tokio::task::spawn_blocking(move || {
            workers.iter().for_each(WorkerHandle::join);
        });
        let _ = joined.await; // a panic of it was logged
        tracing::info!("stopped");
        let mut failure = failure;
        failure.try_recv().map_or(Ok(()), Err)
    }
}

/// How clients and scrapes come in.
struct Entrance {
    role: Role,
    /// None yet, of a process that takes over.
    socket: Option<TcpListener>,
    address: SocketAddr,
    admin: (TcpListener, SocketAddr),
}

/// Binds the sockets, or asks the process from which it takes over where its one is.
async fn enter(settings: &Settings, door: &Door) -> Result<Entrance, StartError> {
    let Some(path) = settings.take_over.clone() else {
        let (socket, address) = listen(settings.listen).await?;
        return Ok(Entrance {
            role: Role::Serving,
            socket: Some(socket),
            address,
            admin: listen(settings.admin_listen).await?,
        });
    };
    let ask = handover::ask(&settings.proxy_id, &settings.instance, door.path(), 0);
    let asked = tokio::task::spawn_blocking(move || handover::inquire(&path, ask)).await;
    let offer = asked.map_err(|_| StartError::Address(String::new()))??;
    let address = offer.address.parse();
    let address = address.map_err(|_| StartError::Address(offer.address))?;
    // The port may be the one of the process that serves still.
    let any_port = SocketAddr::new(settings.admin_listen.ip(), 0);
    let admin = match listen(settings.admin_listen).await {
        Err(StartError::Listen { source, .. }) if source.kind() == io::ErrorKind::AddrInUse => {
            listen(any_port).await?
        }
        bound => bound?,
    };
    Ok(Entrance {
        role: Role::Candidate,
        socket: None,
        address,
        admin,
    })
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { address, source };
    // Sets SO_REUSEADDR, so that a restart gets its port back at once.
    let socket = TcpListener::bind(address).await.map_err(failed)?;
    let bound = socket.local_addr().map_err(failed)?;
    Ok((socket, bound))
}
