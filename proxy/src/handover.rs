//! One proxy process takes over from another on its host: listener and clients, and nobody notices.
//!
//! Invariants: a client is served by one process at a time, and by one whenever one of them lives: who
//! has its [`pb::Adopted`] written owns it, and who gives up waiting for one first makes sure that it
//! cannot be written any more (`giver`, `taker`). The process that gave everything away is the
//! other's spare for a while: it still has the listener, and takes it up again if the other dies.
//!
//! | file | its part |
//! |---|---|
//! | `wire` | messages with descriptors |
//! | `door` | the socket where a process is asked to hand over |
//! | `giver` | hands over |
//! | `taker` | takes over, after a trial |
//! | `listening` | both, for clients that listen to channels |
//! | `spare` | what has given everything stands by, and serves again |
//! | `leaving` | clients that are to go elsewhere, and those that cannot be told |
//! | `told` | how a client's connections to nodes are told |
//! | `report` | what whoever started a process that takes over can read |
//! | `scribe` | writes it, and who serves, beside the conversation |
//! | `prepare` | what a process does before it asks: makes room, tries itself |

mod door;
mod giver;
mod leaving;
mod listening;
mod prepare;
mod report;
mod scribe;
mod spare;
mod taker;
mod told;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use slotmesh_proto::handover::v1 as pb;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::core::call::PeerRequest;
use crate::core::pubsub_count::Audience;
use crate::routing::Routing;
use crate::saved::{self, SavedError};
use crate::tls::Port;
use crate::worker::{Pass, WorkerHandle};

pub(crate) use self::door::Door;
pub(crate) use self::leaving::Orders;
pub(crate) use self::report::Report;
pub use self::taker::TakeError;
pub(crate) use self::taker::{inquire, relieve};
pub use self::wire::WireError;

/// Versions of the conversation that this release knows.
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=1;

/// Names the process that serves, and where it is asked to hand over.
const PROXY_JSON: &str = "proxy.json";

/// What a process is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It gets ready to take over.
    Candidate,
    /// It accepts clients.
    Serving,
    /// Another process accepts them; it still has those that could not travel.
    Relieved,
}

/// What a process is, and where clients come in.
#[derive(Clone, Debug)]
pub(crate) struct Stance {
    pub(crate) role: Role,
    pub(crate) socket: Option<Arc<TcpListener>>,
}

/// What is counted of hand-overs.
#[derive(Debug, Default)]
pub struct Counts {
    /// Clients that went to another process, and came from one.
    pub given: AtomicU64,
    pub taken: AtomicU64,
    /// Clients that were stopped and stayed, because the other process did not take them.
    pub returned: AtomicU64,
    /// Clients that are still here while another process serves.
    pub left: AtomicU64,
    /// 1: the clients are to go elsewhere, and no more are accepted.
    pub leaving: AtomicU64,
    /// Conversations that ended before everything was given.
    pub failed: AtomicU64,
    /// For how long a client was stopped that went, at most, in microseconds; of the last hand-over.
    pub stopped_max_us: AtomicU64,
}

impl Counts {
    fn stopped(&self, longest: Duration) {
        let longest_us = u64::try_from(longest.as_micros()).unwrap_or(u64::MAX);
        self.stopped_max_us.store(longest_us, Ordering::Relaxed);
    }
}

/// What both sides need of their process.
#[derive(Debug)]
pub(crate) struct Office {
    pub(crate) proxy_id: String,
    pub(crate) instance: String,
    /// host:port that the mesh shows to clients, and of metrics.
    pub(crate) address: String,
    pub(crate) admin_address: String,
    pub(crate) data: PathBuf,
    pub(crate) workers: Arc<Vec<WorkerHandle>>,
    pub(crate) clients: Arc<AtomicUsize>,
    pub(crate) audience: Arc<Audience>,
    /// What is said of taking over.
    pub(crate) report: Report,
    /// proxy.json names this process.
    pub(crate) announced: AtomicBool,
    /// It is being written.
    pub(crate) writing: Mutex<()>,
    pub(crate) routing: Arc<Routing>,
    /// Id of the next client.
    pub(crate) next_id: Arc<AtomicU64>,
    pub(crate) stance: watch::Sender<Stance>,
    pub(crate) counts: Arc<Counts>,
    /// The process was told to stop, or has nothing left to do.
    pub(crate) stop: CancellationToken,
    /// For clients that come before they have said whether they speak TLS.
    pub(crate) tls: Option<Arc<Port>>,
    /// Where this process is asked to hand over.
    pub(crate) door: PathBuf,
    /// Where the process is asked that has relieved this one.
    pub(crate) successor: Mutex<Option<PathBuf>>,
    /// The spare is asked to serve again.
    pub(crate) wants_back: AtomicBool,
    /// Conversations in which something was given.
    pub(crate) talks: AtomicU64,
    /// One hand-over at a time.
    pub(crate) turn: Mutex<()>,
    /// Whether the clients are to go elsewhere.
    pub(crate) orders: Mutex<Orders>,
    /// Orders of that kind that were heard.
    pub(crate) leave_orders: AtomicU64,
    /// Those that could not be passed are to go.
    pub(crate) sends_rest: AtomicBool,
    pub(crate) runtime: tokio::runtime::Handle,
}

impl Office {
    fn role(&self) -> Role {
        self.stance.borrow().role
    }

    /// This process accepts clients from now on, at a socket that it got or that it still has. The agent
    /// is told by [`Office::announce_again`]: a disk may need longer than clients can wait.
    fn serve(&self, socket: Option<Arc<TcpListener>>) {
        self.announced.store(false, Ordering::Relaxed);
        self.keep_rest();
        self.stance.send_modify(|stance| {
            stance.role = Role::Serving;
            if let Some(socket) = socket {
                stance.socket = Some(socket);
            }
        });
    }

    /// Tells the agent that this process serves, if it was not told yet. False: it still is not.
    fn announce_again(&self) -> bool {
        let _writing = self.writing();
        if self.is_announced() {
            return true;
        }
        if let Err(error) = self.announce() {
            tracing::error!(%error, "proxy.json is not written: the agent may lose this process");
            return false;
        }
        self.announced.store(true, Ordering::Relaxed);
        true
    }

    /// The agent knows who serves, as far as this process has to tell it.
    fn is_announced(&self) -> bool {
        self.announced.load(Ordering::Relaxed) || self.role() != Role::Serving
    }

    /// Does not return before the agent was told, unless the process ends.
    fn insist(&self) {
        /// A disk that is full has room again some day.
        const AGAIN: Duration = Duration::from_secs(1);
        while !self.announce_again() && !self.stop.is_cancelled() {
            std::thread::park_timeout(AGAIN);
        }
    }

    /// As long as this is held, this process does not write proxy.json: what it writes late must not
    /// stand in the place of what its successor writes.
    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another process accepts clients from now on.
    fn be_relieved(&self) {
        self.stance
            .send_modify(|stance| stance.role = Role::Relieved);
    }

    /// Tells the agent which process serves, and where.
    pub(crate) fn announce(&self) -> Result<(), SavedError> {
        let addresses = serde_json::json!({
            "pid": std::process::id(),
            "address": self.address,
            "admin_address": self.admin_address,
            "handover": self.door,
        });
        let text = format!("{addresses}\n");
        saved::write_private(&self.data.join(PROXY_JSON), text.as_bytes())
    }

    fn ask(&self) -> pb::Ask {
        let revision = self.routing.load().revision;
        ask(&self.proxy_id, &self.instance, &self.door, revision)
    }

    /// Gives a worker its part, however full its inbox is.
    fn pass(&self, worker: usize, pass: Pass) {
        let mut next = Some(pass);
        while let Some(pass) = next {
            next = self.workers[worker].pass(pass);
            if next.is_some() {
                // It has room once it has turned.
                std::thread::yield_now();
            }
        }
    }

    /// A channel that nobody else uses.
    fn new_marker(&self) -> Vec<u8> {
        let number: u128 = rand::random();
        [
            crate::core::HIDDEN,
            format!(":pass:{number:032x}").as_bytes(),
        ]
        .concat()
    }

    /// Where clients connect, as the system knows it.
    fn listen_address(&self) -> String {
        let stance = self.stance.borrow();
        let address = stance.socket.as_ref().and_then(|s| s.local_addr().ok());
        address
            .map(|address| address.to_string())
            .unwrap_or_default()
    }

    /// How long a CLIENT PAUSE goes on, in milliseconds, and whether it is of writes only.
    fn pause_left(&self) -> (u64, bool) {
        let request = PeerRequest {
            client_id: 0,
            words: vec![b"pause-left".to_vec()],
        };
        // All workers have the same.
        let asked = self.workers.first().and_then(|worker| worker.ask(request));
        let answer = asked.and_then(|answered| answered.blocking_recv().ok());
        let answer = answer.as_deref().and_then(|a| a.strip_prefix(b":"));
        let left = answer.and_then(|digits| slotmesh_resp::parse_i64(digits.trim_ascii_end()));
        let left = left.unwrap_or(0);
        (left.unsigned_abs(), left < 0)
    }

    /// The CLIENT PAUSE of another process, or that it has none, is what counts here from now on: this
    /// process may have one of before, that was ended there.
    fn pause(&self, pause: Option<&pb::Pause>) {
        let end = (0, false);
        let begin = pause.map(|pause| (pause.remaining_ms, pause.writes_only));
        for (ms, writes_only) in std::iter::once(end).chain(begin) {
            let mode: &[u8] = if writes_only { b"write" } else { b"all" };
            for worker in self.workers.iter() {
                let words = vec![
                    b"pause".to_vec(),
                    ms.to_string().into_bytes(),
                    mode.to_vec(),
                ];
                let request = PeerRequest {
                    client_id: 0,
                    words,
                };
                let done = worker.ask(request);
                if done.is_none_or(|done| done.blocking_recv().is_err()) {
                    tracing::warn!("CLIENT PAUSE was not taken over by a worker");
                }
            }
        }
    }

    fn clients(&self) -> usize {
        self.clients.load(Ordering::Relaxed)
    }
}

/// What a process says of itself when it asks. Revision 0: it has no topology yet.
pub(crate) fn ask(proxy_id: &str, instance: &str, door: &Path, revision: u64) -> pb::Ask {
    pb::Ask {
        version_min: *VERSIONS.start(),
        version_max: *VERSIONS.end(),
        schema_max: crate::core::client::SCHEMA,
        proxy_id: proxy_id.to_owned(),
        instance_id: instance.to_owned(),
        release: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        door: door.display().to_string(),
        revision,
    }
}

/// The version that two processes speak; `None`: they know none together.
fn common_version(ask: &pb::Ask) -> Option<u32> {
    let version = ask.version_max.min(*VERSIONS.end());
    (version >= ask.version_min && VERSIONS.contains(&version)).then_some(version)
}
