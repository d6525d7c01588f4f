//! The turn of a worker: one thread, one poller, one owner of its clients and connections.
//!
//! A turn has fixed phases: wait; take in new sockets and a new route; read each ready client once;
//! send once to each touched node; read each ready node once; send once to each touched client;
//! act on what is due. Sending after every read instead costs half as much again.
//!
//! Events are edge-triggered: a socket stays on its ready list until a read came back short, and a
//! half-closed one is read to its end. A socket is deregistered before it is closed, or the number's
//! next owner loses its events.

mod clients;
mod departing;
mod handle;
mod nodes;
mod passing;
mod passing_topics;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mio::{Events, Poll, Registry, Token, Waker};
use slotmesh_acl::AclLog;
use tokio::sync::oneshot;

use crate::core::call::{Call, PeerRequest, Ticket};
use crate::core::client::ClientState;
use crate::core::hold::Level;
use crate::core::outbox::{HoldSample, Trouble};
use crate::core::passing_lines::Pins;
use crate::core::pubsub_count::Audience;
use crate::core::scripts::ScriptCache;
use crate::core::{Core, Counters, Identity};
use crate::metrics::Published;
use crate::routing::{Routing, ShardNo};
use crate::tls::Tls;

use self::clients::Clients;
use self::nodes::Nodes;
use self::passing::Passing;

pub(crate) use self::departing::SendOff;
pub(crate) use self::passing::{Collect, Collected, Parcel, Pass};
pub(crate) use self::passing_topics::{Cutting, Reserve};

/// Read buffer of a worker. Larger ones gain nothing (measured); it bounds the work of one read.
const READ_BYTES: usize = 256 * 1024;
/// Events per wait. No effect on cost from 16 up (measured).
const EVENTS: usize = 1024;
/// New sockets that may wait for a worker; over it the acceptor waits, and then the kernel.
const INBOX: usize = 1024;
/// Calls of a worker that may be open; there is always room for their answers in the inbox. They are
/// operators' commands (CLIENT LIST, ACL SETUSER): over it the command is refused.
const CALLS_MAX: usize = 1024;
/// What a worker has to tell that was not taken yet; a slow watch makes it keep it.
const REPORTS: usize = 4096;
/// How long a worker that was told to stop goes on serving what is in flight.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

const WAKE: Token = Token(usize::MAX);
/// Tokens from here on are connections to nodes; below, clients.
const LANES: usize = 1 << 40;

/// A client that was accepted.
#[derive(Debug)]
pub struct Accepted {
    pub socket: std::net::TcpStream,
    pub state: ClientState,
    /// What it has at nodes, if another process had it before.
    pub pins: Pins,
    /// The sockets of that.
    pub lines: Vec<std::net::TcpStream>,
    /// The slot and generation at which it was listened for it before it came.
    pub reserved: Option<(u32, u32)>,
    /// What it has of TLS, if it has, or may have.
    pub(crate) tls: Option<Box<Tls>>,
}

/// What others want of a worker.
#[derive(Debug)]
enum Errand {
    Client(Box<Accepted>),
    /// A question of any worker; answered with one RESP2 frame.
    Peer(PeerRequest, oneshot::Sender<Vec<u8>>),
    /// The answer to a call of this worker.
    Answer(Ticket, Vec<u8>),
    /// A part of a hand-over.
    Pass(Pass),
}

/// A call of a worker, on its way to the switchboard.
#[derive(Debug)]
pub struct Question {
    pub worker: usize,
    pub ticket: Ticket,
    pub call: Call,
}

/// What a worker tells the watch.
#[derive(Debug)]
pub enum Notice {
    /// Both lanes of the shard have reached this level in this worker.
    Level {
        worker: usize,
        shard: ShardNo,
        level: Level,
    },
    /// A hold has ended in one lane.
    Hold { shard: ShardNo, sample: HoldSample },
    /// A primary stops to answer one lane, or answers again.
    Trouble {
        worker: usize,
        trouble: Trouble,
        /// When it stopped.
        since: Option<Instant>,
    },
    /// Requests were answered by errors that are no client's fault.
    Faults { shard: ShardNo, count: u64 },
}

/// What others see of a worker.
#[derive(Debug)]
pub struct WorkerHandle {
    inbox: SyncSender<Errand>,
    waker: Arc<Waker>,
    /// Given and not yet taken.
    waiting: Arc<AtomicU64>,
    pub published: Arc<Published>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// What all workers of a process share.
#[derive(Clone, Debug)]
pub struct Shared {
    pub routing: Arc<Routing>,
    pub identity: Arc<Identity>,
    pub held_sum: Arc<AtomicU64>,
    pub audience: Arc<Audience>,
    /// Clients of the process.
    pub clients: Arc<AtomicUsize>,
    pub stop: Arc<AtomicBool>,
    pub notices: tokio::sync::mpsc::Sender<Notice>,
    pub questions: tokio::sync::mpsc::Sender<Question>,
    /// Texts of clients' scripts.
    pub scripts: Arc<ScriptCache>,
    pub acl_log: Arc<Mutex<AclLog>>,
}

impl Shared {
    /// The channel to the switchboard, with its bound.
    #[must_use]
    pub fn questions() -> (
        tokio::sync::mpsc::Sender<Question>,
        tokio::sync::mpsc::Receiver<Question>,
    ) {
        tokio::sync::mpsc::channel(CALLS_MAX)
    }

    /// The sending half of the channel that the watch reads, with its bound.
    #[must_use]
    pub fn notices() -> (
        tokio::sync::mpsc::Sender<Notice>,
        tokio::sync::mpsc::Receiver<Notice>,
    ) {
        tokio::sync::mpsc::channel(REPORTS)
    }
}

/// Why there is no worker.
#[derive(Debug, thiserror::Error)]
#[error("start worker {index}")]
pub struct StartError {
    index: usize,
    source: io::Error,
}

/// Starts a worker on its thread.
///
/// # Errors
/// The system has no descriptors or threads left.
pub fn start(index: usize, shared: Shared) -> Result<WorkerHandle, StartError> {
    let failed = |source| StartError { index, source };
    let poll = Poll::new().map_err(failed)?;
    let waker = Arc::new(Waker::new(poll.registry(), WAKE).map_err(failed)?);
    let (inbox, errands) = sync_channel(INBOX + CALLS_MAX);
    let published = Arc::new(Published::default());
    let waiting = Arc::new(AtomicU64::new(0));
    let mut core = Core::new(Arc::clone(&shared.identity), Arc::clone(&shared.held_sum));
    core.share_scripts(Arc::clone(&shared.scripts));
    core.share_audience(Arc::clone(&shared.audience));
    core.share_acl_log(Arc::clone(&shared.acl_log));
    let worker = Worker {
        index,
        poll,
        errands,
        calls_open: 0,
        core,
        clients: Clients::default(),
        nodes: Nodes::default(),
        buffer: vec![0; READ_BYTES].into_boxed_slice(),
        generation: 0,
        started: Instant::now(),
        next_due_us: None,
        unsent_notices: Vec::new(),
        published: Arc::clone(&published),
        waiting: Arc::clone(&waiting),
        passing: None,
        shared,
    };
    let thread = std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            let _guard = EndTogether { index };
            worker.run();
        })
        .map_err(failed)?;
    Ok(WorkerHandle {
        inbox,
        waker,
        waiting,
        published,
        thread: Mutex::new(Some(thread)),
    })
}

struct Worker {
    index: usize,
    poll: Poll,
    errands: Receiver<Errand>,
    /// Calls without an answer.
    calls_open: usize,
    core: Core,
    clients: Clients,
    nodes: Nodes,
    /// The one read buffer: what is not a whole frame moves to its owner after each read.
    buffer: Box<[u8]>,
    generation: u64,
    started: Instant,
    next_due_us: Option<u64>,
    unsent_notices: Vec<Notice>,
    published: Arc<Published>,
    waiting: Arc<AtomicU64>,
    /// While clients are handed to another process.
    passing: Option<Box<Passing>>,
    shared: Shared,
}

impl Worker {
    fn run(mut self) {
        let mut events = Events::with_capacity(EVENTS);
        let mut stop_at = None;
        loop {
            let wait = self.wait_time(stop_at);
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    tracing::error!(worker = self.index, %error, "a worker cannot wait for events");
                    return;
                }
                _ => {}
            }
            self.read_clock();
            for event in &events {
                match event.token() {
                    WAKE => {}
                    Token(token) if token >= LANES => {
                        let lane = nodes::at_place(token - LANES);
                        self.nodes.note(lane, event, &mut self.core);
                    }
                    Token(client) => self.clients.note(client as u32, event, &mut self.core),
                }
            }
            self.take_control();
            self.turn();
            if self.shared.stop.load(Ordering::Relaxed) {
                let at = *stop_at.get_or_insert_with(|| Instant::now() + DRAIN_LIMIT);
                self.clients.stop_reading(&mut self.core);
                if Instant::now() >= at || self.core.sessions.is_empty() {
                    return;
                }
            }
        }
    }

    /// The phases after the wait.
    fn turn(&mut self) {
        let registry = self.poll.registry();
        self.clients.read(&mut self.core, &mut self.buffer);
        self.nodes.obey(&mut self.core, registry);
        self.nodes.send(&mut self.core);
        self.nodes
            .read(&mut self.core, &mut self.buffer, &mut self.clients);
        self.settle();
    }

    /// What follows from replies and time, until nothing more follows.
    fn settle(&mut self) {
        let now_us = self.now_us();
        let due = self.next_due_us.is_some_and(|at| at <= now_us);
        if self.core.out.unsteady || due {
            self.next_due_us = self.core.on_time();
        }
        self.clients.end_greetings(&mut self.core);
        self.core.resume_stalled();
        self.send_calls();
        self.clients.resume(&mut self.core);
        self.nodes.obey(&mut self.core, self.poll.registry());
        self.nodes.send(&mut self.core);
        self.clients.send(&mut self.core);
        if self.core.is_departing() {
            self.part();
        }
        if self.passing.is_some() {
            self.pass_on();
        }
        let closed = self
            .clients
            .close_doomed(&mut self.core, self.poll.registry());
        self.shared.clients.fetch_sub(closed, Ordering::Relaxed);
        self.publish();
    }

    fn wait_time(&self, stop_at: Option<Instant>) -> Option<Duration> {
        /// Notices that found no room are tried again.
        const RETRY: Duration = Duration::from_millis(1);
        if self.clients.has_ready(&self.core) || self.nodes.has_ready() || self.core.out.unsteady {
            return Some(Duration::ZERO);
        }
        let due = [self.next_due_us, self.clients.greeting_due_us()];
        let due = due.into_iter().flatten().min();
        let due = due.map(|at| Duration::from_micros(at.saturating_sub(self.now_us())));
        let stop = stop_at.map(|at| at.saturating_duration_since(Instant::now()));
        let notices = (!self.unsent_notices.is_empty()).then_some(RETRY);
        let passing = self
            .passing
            .as_ref()
            .and_then(|passing| passing.wait_time());
        [due, stop, notices, passing].into_iter().flatten().min()
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// The one reading of the clocks in a turn.
    fn read_clock(&mut self) {
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.core.set_now(self.now_us(), unix.as_micros() as u64);
    }

    /// New clients, and a new routing table.
    fn take_control(&mut self) {
        let generation = self.shared.routing.generation();
        if generation != self.generation {
            self.generation = generation;
            self.core.apply(self.shared.routing.load());
        }
        while let Ok(errand) = self.errands.try_recv() {
            match errand {
                Errand::Client(accepted) => self.take_in(*accepted),
                Errand::Peer(request, answer) => {
                    // Whoever asked may have stopped waiting.
                    let _ = answer.send(self.core.peer_request(&request));
                }
                Errand::Answer(ticket, reply) => {
                    self.calls_open -= 1;
                    self.core.call_answered(ticket, &reply);
                }
                Errand::Pass(pass) => self.take_pass(pass),
            }
        }
    }

    fn take_in(&mut self, mut accepted: Accepted) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        let pins = std::mem::take(&mut accepted.pins);
        let lines = std::mem::take(&mut accepted.lines);
        let reserved = accepted.reserved; // it counts since then
        let registry = self.poll.registry();
        let Some(slot) = self.clients.open(accepted, &mut self.core, registry) else {
            if reserved.is_none() {
                self.shared.clients.fetch_sub(1, Ordering::Relaxed);
            }
            return;
        };
        if !pins.is_empty() {
            let lines = lines.into_iter().map(mio::net::TcpStream::from_std);
            self.take_pins(slot, pins, lines.collect());
        }
    }

    /// Hands calls to the switchboard.
    fn send_calls(&mut self) {
        const BUSY: &[u8] = b"-ERR slotmesh: too many commands wait for the control plane\r\n";
        while let Some((ticket, call)) = self.core.out.calls.pop() {
            let question = Question {
                worker: self.index,
                ticket,
                call,
            };
            if self.calls_open < CALLS_MAX && self.shared.questions.try_send(question).is_ok() {
                self.calls_open += 1;
            } else {
                self.core.call_answered(ticket, BUSY);
            }
        }
    }

    /// Oldest first: of two levels of a shard the later one must be heard last.
    fn send_notices(&mut self) {
        use tokio::sync::mpsc::error::TrySendError;
        let mut unsent = std::mem::take(&mut self.unsent_notices).into_iter();
        while let Some(notice) = unsent.next() {
            if let Err(TrySendError::Full(notice)) = self.shared.notices.try_send(notice) {
                self.unsent_notices.push(notice);
                self.unsent_notices.extend(unsent);
                return;
            }
        }
    }

    /// Counters for observers, levels and samples for the watch.
    fn publish(&mut self) {
        // Each request has turns of its own when few come: there is nothing to tell in nearly all of them.
        if self.core.out.has_notices() {
            self.note();
        }
        if !self.unsent_notices.is_empty() {
            self.send_notices();
        }
        let counters: &Counters = &self.core.counters;
        self.published.store(counters, self.core.sessions.len());
    }

    /// What the watch is to be told.
    #[cold]
    fn note(&mut self) {
        let mut shards: smallvec::SmallVec<[ShardNo; 8]> = smallvec::SmallVec::new();
        for (shard, _) in self.core.out.levels.drain(..) {
            if !shards.contains(&shard) {
                shards.push(shard);
            }
        }
        for shard in shards {
            if let Some(level) = self.core.level_of(shard).cloned() {
                self.unsent_notices.push(Notice::Level {
                    worker: self.index,
                    shard,
                    level,
                });
            }
        }
        for sample in self.core.out.samples.drain(..) {
            self.core.counters.held_requests += sample.requests;
            let max = self.core.counters.held_max_us.max(sample.longest_us);
            self.core.counters.held_max_us = max;
            self.unsent_notices.push(Notice::Hold {
                shard: sample.shard,
                sample,
            });
        }
        for trouble in self.core.out.troubles.drain(..) {
            let at = |us| self.started + Duration::from_micros(us);
            self.unsent_notices.push(Notice::Trouble {
                worker: self.index,
                trouble,
                since: trouble.since_us.map(at),
            });
        }
        for (shard, count) in self.core.out.faults.drain(..) {
            self.unsent_notices.push(Notice::Faults { shard, count });
        }
    }
}

/// A worker that panics takes the process with it: its clients would hang otherwise, and the agent
/// starts a proxy that died.
struct EndTogether {
    index: usize,
}

impl Drop for EndTogether {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(worker = self.index, "a worker panicked; the process ends");
            std::process::abort();
        }
    }
}

/// Takes a socket from the poller before it is closed.
fn deregister(registry: &Registry, socket: &mut mio::net::TcpStream) {
    // An error means that it was not registered; it is closed next.
    let _ = registry.deregister(socket);
}
