//! Accepts clients and gives each to the worker with the fewest.
//!
//! One acceptor spreads better than one listening socket per worker, whose share is left to chance. It
//! accepts only while this process is the one that serves: another may have the same socket.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::core::client::ClientState;
use crate::core::passing_lines::Pins;
use crate::handover::{Role, Stance};
use crate::routing::Routing;
use crate::tls::{Port, Tls};
use crate::worker::{Accepted, WorkerHandle};

/// Out of descriptors, or no worker takes a client: accepting again at once would only spin.
pub(crate) const PAUSE: Duration = Duration::from_millis(10);
/// For the farewell to a client that is one too many.
const FAREWELL_LIMIT: Duration = Duration::from_millis(100);
/// Redis's default: without it, clients whose host is gone would stay for ever.
const KEEPALIVE: Duration = Duration::from_secs(300);
const TOO_MANY: &[u8] = b"-ERR max number of clients reached\r\n";

/// See the module.
#[derive(Debug)]
pub struct Listener {
    pub(crate) stance: watch::Receiver<Stance>,
    pub workers: Arc<Vec<WorkerHandle>>,
    /// Clients of the process.
    pub clients: Arc<AtomicUsize>,
    /// Unless the instance's parameter says otherwise.
    pub max_clients: usize,
    pub routing: Arc<Routing>,
    pub rejected: Arc<AtomicU64>,
    /// Id of the next client.
    pub next_id: Arc<AtomicU64>,
    /// Clients may speak TLS.
    pub(crate) tls: Option<Arc<Port>>,
}

impl Listener {
    /// Accepts until told to stop; then the socket is closed.
    pub async fn run(self, stop: CancellationToken) {
        let mut stance = self.stance.clone();
        let mut open: Option<Arc<TcpListener>> = None;
        loop {
            let now = stance.borrow_and_update().clone();
            if now.socket.is_none()
                && let Some(socket) = open.take()
            {
                self.close(&socket).await;
            }
            let socket = now.socket.filter(|_| now.role == Role::Serving);
            open = socket.clone();
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                changed = stance.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                accepted = accept(socket.as_deref()) => accepted,
            };
            match accepted {
                Ok((socket, _)) => {
                    let id = self.next_id.fetch_add(1, Ordering::Relaxed);
                    if let Err(error) = self.place(socket, id).await {
                        tracing::debug!(%error, "a client left before it was placed");
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// No more clients come. Those whom the system has accepted are taken in, so that they are not reset;
    /// whoever comes later is refused and tries another address at once, also if a spare has the socket.
    async fn close(&self, socket: &TcpListener) {
        /// As many as the system keeps at most.
        const QUEUED_MAX: usize = 4096;
        for _ in 0..QUEUED_MAX {
            let Ok(Ok((client, _))) = timeout(Duration::ZERO, socket.accept()).await else {
                break;
            };
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = self.place(client, id).await {
                tracing::debug!(%error, "a client left before it was placed");
            }
        }
        if let Err(error) = socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Read) {
            tracing::warn!(%error, "the listening socket is closed and not shut down");
        }
    }

    async fn place(&self, mut socket: TcpStream, id: u64) -> io::Result<()> {
        let parameter = self.routing.load().settings.parameters.clients_max;
        let max_clients = parameter.unwrap_or(self.max_clients);
        if self.clients.load(Ordering::Relaxed) >= max_clients {
            self.rejected.fetch_add(1, Ordering::Relaxed);
            let _ = timeout(FAREWELL_LIMIT, socket.write_all(TOO_MANY)).await;
            return Ok(());
        }
        socket.set_nodelay(true)?;
        let keepalive = socket2::TcpKeepalive::new().with_time(KEEPALIVE);
        socket2::SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        let peer = socket.peer_addr().ok();
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let state = ClientState::new(id, peer, since_epoch.as_millis() as u64);
        let mut client = Accepted {
            socket: socket.into_std()?,
            state,
            pins: Pins::default(),
            lines: Vec::new(),
            reserved: None,
            tls: self.tls.as_ref().map(Tls::unsaid),
        };
        self.clients.fetch_add(1, Ordering::Relaxed);
        loop {
            let Some(worker) = self.least_loaded() else {
                return Ok(());
            };
            match worker.give(client) {
                None => return Ok(()),
                Some(back) => client = back,
            }
            sleep(PAUSE).await;
        }
    }

    fn least_loaded(&self) -> Option<&WorkerHandle> {
        self.workers.iter().min_by_key(|worker| worker.load())
    }
}

/// The next client; none ever, without a socket.
async fn accept(socket: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match socket {
        Some(socket) => socket.accept().await,
        None => std::future::pending().await,
    }
}
