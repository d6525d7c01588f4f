//! Takes listener and clients over from another process, after a trial of this one.
//!
//! Invariants: nothing is asked for before this process has shown that it can serve. What was received
//! is this process's once its `Adopted` is written, or if the other process has ended meanwhile;
//! otherwise it is dropped untouched, because the other process goes on with it.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use slotmesh_proto::handover::v1 as pb;
use slotmesh_proto::handover::v1::to_giver::Message as Said;
use slotmesh_proto::handover::v1::to_taker::Message as Heard;
use tokio::net::TcpListener;

use super::listening::Announced;
use super::wire::{Wire, WireError};
use super::{Office, Role, door, told};
use crate::core::client::ClientState;
use crate::worker::{Accepted, Pass};

/// For an answer that needs no work.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// The other process shows signs of life every second.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// Between looks at whether this process was told to stop.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long a topology may take to come, from the disk or a controller.
const TOPOLOGY_LIMIT: Duration = Duration::from_secs(10);
/// A word that could not be written: is it because the other process has ended? Its end shows
/// milliseconds after its sockets are closed.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Conversations that end early are begun anew for those who are left, so often.
const TRIES: u32 = 5;
/// For the spare to end its own conversation before it takes back.
const BACK_LIMIT: Duration = Duration::from_secs(5);

/// For the way back as a whole, with the trial.
const TAKEN_LIMIT: Duration = Duration::from_secs(30);

/// Why a process could not take over.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    #[error("no process hands over at {}: is that the \"handover\" of its proxy.json?", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the other process refused: {0}")]
    Refused(String),
    #[error("this process is not fit to serve: {0}; the other one goes on")]
    Unfit(String),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("this process was told to stop")]
    Stopped,
}

/// Asks a process where it listens, and whether it would hand over.
pub(crate) fn inquire(path: &Path, ask: pb::Ask) -> Result<pb::Offer, TakeError> {
    let wire = connect(path)?;
    say(&wire, Said::Inquire(ask))?;
    let (answer, _) = wire.receive::<pb::ToTaker>(ANSWER_LIMIT)?;
    offer_of(answer)
}

fn offer_of(answer: pb::ToTaker) -> Result<pb::Offer, TakeError> {
    match answer.message {
        Some(Heard::Offer(offer)) => Ok(offer),
        Some(Heard::Refused(refused)) => Err(TakeError::Refused(refused.reason)),
        _ => Err(WireError::Nonsense("neither an offer nor a refusal").into()),
    }
}

fn connect(path: &Path) -> Result<Wire, TakeError> {
    let failed = |source| TakeError::Connect {
        path: path.to_owned(),
        source,
    };
    let stream = door::connect(path).map_err(failed)?;
    Wire::new(stream).map_err(failed)
}

fn say(wire: &Wire, message: Said) -> Result<(), WireError> {
    let message = pb::ToGiver {
        message: Some(message),
    };
    wire.send(&message, &[], ANSWER_LIMIT)
}

/// What a process does that was started to take over: shows that it can serve, takes everything from
/// the process at `path`, and listens to it until it has nothing more to give.
///
/// # Errors
/// Nothing was taken: the other process serves as before.
pub(crate) fn relieve(office: &Office, path: &Path) -> Result<(), TakeError> {
    try_out(office)?;
    take_over(office, path, &|| {})
}

/// As [`relieve`], without the trial. Says when everybody has come who can.
fn take_over(office: &Office, path: &Path, settled: &dyn Fn()) -> Result<(), TakeError> {
    let mut tries = 0;
    let has_listener = Cell::new(false);
    loop {
        let ended = try_take(office, path, &has_listener, settled);
        match ended {
            Err(error) if !has_listener.get() => return Err(error),
            Ok(()) => return Ok(()),
            Err(error) if tries < TRIES => {
                tracing::warn!(%error, "a hand-over ended early; the rest is asked for again");
                tries += 1;
            }
            Err(error) => {
                tracing::warn!(%error, "some clients stay with the process that served before");
                return Ok(());
            }
        }
    }
}

fn try_take(
    office: &Office,
    path: &Path,
    has_listener: &Cell<bool>,
    settled: &dyn Fn(),
) -> Result<(), TakeError> {
    let began = Instant::now();
    let wire = connect(path)?;
    say(&wire, Said::Ask(office.ask()))?;
    let (answer, _) = wire.receive::<pb::ToTaker>(ANSWER_LIMIT)?;
    let offer = offer_of(answer)?;
    tracing::info!(
        pid = offer.pid,
        release = offer.release,
        clients = offer.clients,
        "takes over"
    );
    let mut taker = Taker {
        office,
        wire: &wire,
        taken: 0,
        announced: None,
    };
    let ended = taker.listen(has_listener, settled);
    if let Some(announced) = taker.announced.take() {
        announced.end(office);
    }
    tracing::debug!(taken = taker.taken, took = ?began.elapsed(), "a hand-over is over");
    ended
}

struct Taker<'a> {
    office: &'a Office,
    wire: &'a Wire,
    taken: u64,
    /// Clients that are to come.
    announced: Option<Announced>,
}

impl Taker<'_> {
    fn listen(&mut self, has_listener: &Cell<bool>, settled: &dyn Fn()) -> Result<(), TakeError> {
        let (office, wire) = (self.office, self.wire);
        loop {
            let (message, fds) = next(office, wire)?;
            match message.message {
                Some(Heard::Listener(listener)) => {
                    take_listener(office, wire, &listener, fds)?;
                    has_listener.set(true);
                }
                Some(Heard::Announce(announce)) => {
                    if let Some(before) = self.announced.take() {
                        before.end(office);
                    }
                    self.announced = Announced::prepare(office, announce);
                    let ready = self.announced.is_some();
                    say(wire, Said::Ready(pb::Ready { ready }))?;
                }
                Some(Heard::Batch(batch)) => self.take_batch(batch, fds)?,
                Some(Heard::Rest(rest)) => {
                    settled();
                    if rest.over {
                        let (taken, left) = (self.taken, rest.clients);
                        tracing::info!(taken, left, "has taken over");
                        return Ok(());
                    }
                }
                _ => return Err(WireError::Nonsense("a word out of place").into()),
            }
        }
    }

    fn take_batch(&mut self, batch: pb::Batch, fds: Vec<OwnedFd>) -> Result<(), TakeError> {
        let office = self.office;
        let (number, is_announced) = (batch.number, batch.announced);
        let announced = self.announced.take_if(|_| is_announced);
        let mut announced = announced.unwrap_or_default();
        let place = |id| is_announced.then(|| announced.take(id));
        let (clients, refused) = read_batch(batch, fds, place)?;
        if !adopt(self.wire, number, refused) {
            let clients = clients.into_iter();
            announced.put_back(clients.filter_map(|c| Some((c.state.id, c.reserved?))));
            self.announced = is_announced.then_some(announced);
            return Err(WireError::Gone.into());
        }
        let count = clients.len() as u64;
        self.taken += count;
        office.counts.taken.fetch_add(count, Ordering::Relaxed);
        if !is_announced {
            office.clients.fetch_add(clients.len(), Ordering::Relaxed);
        }
        for client in clients {
            if is_announced {
                announced.place(office, client);
            } else {
                place_anywhere(office, client);
            }
        }
        if is_announced {
            announced.end(office);
        }
        Ok(())
    }
}

/// The next message, in time, unless this process is told to stop.
fn next(office: &Office, wire: &Wire) -> Result<(pb::ToTaker, Vec<OwnedFd>), TakeError> {
    let until = Instant::now() + SILENCE_LIMIT;
    while !wire.has_news(LOOK_INTERVAL) {
        if office.stop.is_cancelled() {
            return Err(TakeError::Stopped);
        }
        if Instant::now() >= until {
            return Err(WireError::Late.into());
        }
    }
    Ok(wire.receive(ANSWER_LIMIT)?)
}

/// Says that what came with this number is adopted. False: the other process goes on with it.
fn adopt(wire: &Wire, number: u64, refused: Vec<u32>) -> bool {
    let said = say(wire, Said::Adopted(pb::Adopted { number, refused }));
    said.is_ok() || wire.peer_ends(END_LIMIT)
}

fn take_listener(
    office: &Office,
    wire: &Wire,
    listener: &pb::Listener,
    fds: Vec<OwnedFd>,
) -> Result<(), TakeError> {
    let mut fds = fds.into_iter();
    let (Some(fd), None) = (fds.next(), fds.next()) else {
        return Err(WireError::Nonsense("a listener without its descriptor").into());
    };
    let _context = office.runtime.enter();
    let socket = std::net::TcpListener::from(fd);
    socket.set_nonblocking(true).map_err(WireError::from)?;
    let socket = TcpListener::from_std(socket).map_err(WireError::from)?;
    office
        .next_id
        .fetch_max(listener.next_client_id, Ordering::Relaxed);
    if let Some(pause) = &listener.pause {
        office.pause(pause);
    }
    if !adopt(wire, 0, Vec::new()) {
        return Err(WireError::Gone.into());
    }
    office.serve(Some(Arc::new(socket)));
    Ok(())
}

/// The clients of a batch, and the positions of those that are not understood. `place` says where a
/// client was expected; `None`: anywhere.
fn read_batch(
    batch: pb::Batch,
    fds: Vec<OwnedFd>,
    mut place: impl FnMut(u64) -> Option<Option<(u32, u32)>>,
) -> Result<(Vec<Accepted>, Vec<u32>), TakeError> {
    let mut fds = fds.into_iter();
    let (mut clients, mut refused) = (Vec::new(), Vec::new());
    for (at, client) in batch.clients.into_iter().enumerate() {
        let watch = client.watch.as_ref();
        let watched = watch.is_some_and(|watch| watch.line.is_some());
        let count = usize::from(watched) + usize::from(client.wait.is_some());
        let socket = fds.next();
        let lines: Vec<_> = fds.by_ref().take(count).collect();
        let (Some(socket), true) = (socket, lines.len() == count) else {
            return Err(WireError::Nonsense("clients without their descriptors").into());
        };
        let state = client.state.map(ClientState::from_message);
        let pins = told::pins(client.watch, client.wait);
        let (Some(Ok(state)), Some(pins)) = (state, pins) else {
            tracing::warn!("a client that is not understood stays where it is");
            refused.push(at as u32);
            continue;
        };
        let reserved = match place(state.id) {
            Some(None) => {
                refused.push(at as u32); // nobody listens for it
                continue;
            }
            expected => expected.flatten(),
        };
        clients.push(Accepted {
            socket: std::net::TcpStream::from(socket),
            state,
            pins,
            lines: lines.into_iter().map(std::net::TcpStream::from).collect(),
            reserved,
        });
    }
    if fds.next().is_some() {
        return Err(WireError::Nonsense("descriptors without their clients").into());
    }
    Ok((clients, refused))
}

/// Gives a client to the worker with the fewest.
fn place_anywhere(office: &Office, client: Accepted) {
    let mut next = Some(client);
    while let Some(client) = next {
        let least = office.workers.iter().min_by_key(|worker| worker.load());
        next = least.and_then(|worker| worker.give(client));
        if next.is_some() {
            std::thread::yield_now(); // there is room once it has turned
        }
    }
}

/// Waits for a topology, and asks every worker to serve a client of its own.
///
/// # Errors
/// What is wrong with this process.
fn try_out(office: &Office) -> Result<(), TakeError> {
    let until = Instant::now() + TOPOLOGY_LIMIT;
    while !office.routing.load().is_complete() {
        if office.stop.is_cancelled() {
            return Err(TakeError::Stopped);
        }
        if Instant::now() >= until {
            let text = "no topology that serves every slot came from the disk or a controller";
            return Err(TakeError::Unfit(text.to_owned()));
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let ask = |worker| {
        let (answer, answered) = sync_channel(1);
        office.pass(worker, Pass::Trial(answer));
        answered
    };
    let asked: Vec<_> = (0..office.workers.len()).map(ask).collect();
    for answered in asked {
        // A worker answers in time, or has ended.
        let ended = || TakeError::Unfit("a worker has ended".to_owned());
        let result = answered.recv().map_err(|_| ended())?;
        result.map_err(TakeError::Unfit)?;
    }
    Ok(())
}

/// Makes this process, a spare, serve again: the same hand-over backwards. Returns when everybody has
/// come who can.
///
/// # Errors
/// Why the other process goes on to serve, for the operator.
pub(super) fn take_back(office: &Arc<Office>) -> Result<(), String> {
    if office.role() != Role::Relieved {
        return Err("this process is no spare".to_owned());
    }
    let successor = office
        .successor
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let path = successor.ok_or("nobody has relieved this process")?;
    office.wants_back.store(true, Ordering::Relaxed);
    let until = Instant::now() + BACK_LIMIT;
    // The conversation in which it gives must end first.
    while office.turn.try_lock().is_err() {
        if Instant::now() >= until {
            return Err("the hand-over before did not end in time".to_owned());
        }
        std::thread::park_timeout(LOOK_INTERVAL);
    }
    let (told, settled) = channel();
    let taking = Arc::clone(office);
    office.runtime.spawn_blocking(move || {
        let tell = told.clone();
        let first = move || {
            let _ = tell.send(Ok(())); // only the first is waited for
        };
        let ended = try_out(&taking).and_then(|()| take_over(&taking, &path, &first));
        if let Err(error) = &ended {
            tracing::warn!(%error, "the spare does not serve again");
        }
        let _ = told.send(ended.map_err(|error| error.to_string()));
    });
    let ended = settled.recv_timeout(TAKEN_LIMIT);
    ended.unwrap_or_else(|_| Err("the hand-over takes too long; look at the log".to_owned()))
}
