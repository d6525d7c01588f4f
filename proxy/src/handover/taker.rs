//! Takes listener and clients over from another process, after a trial of this one.
//!
//! Invariants: nothing is asked for before this process has shown that it can serve. What was received
//! is this process's once its `Adopted` is written, or if the other process has ended meanwhile;
//! otherwise it is dropped untouched, because the other process goes on with it.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use slotmesh_proto::handover::v1 as pb;
use slotmesh_proto::handover::v1::to_giver::Message as Said;
use slotmesh_proto::handover::v1::to_taker::Message as Heard;
use tokio::net::TcpListener;

use super::listening::Announced;
use super::scribe::{Scribe, with_scribe};
use super::wire::{Wire, WireError};
use super::{Office, door, prepare, told};
use crate::core::client::ClientState;
use crate::tls::{Port, Tls};
use crate::worker::{Accepted, WorkerHandle};

/// For an answer that needs no work.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// The other process shows signs of life every second.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// Between looks at whether this process was told to stop.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// A word that could not be written: what were the other process's last words, and has it ended? Its
/// end shows milliseconds after its sockets are closed.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Conversations that end early are begun anew for those who are left, so often without one that came,
/// after waits that double from [`LOOK_INTERVAL`] on.
const TRIES: u32 = 5;

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
    #[error("this process was told to stop before it had anything")]
    Stopped,
}

impl TakeError {
    /// A word for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "connect",
            Self::Refused(_) => "refused",
            Self::Unfit(_) => "unfit",
            Self::Wire(_) => "wire",
            Self::Stopped => "stopped",
        }
    }

    /// The status with which the process ends.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Connect { .. } => 3,
            Self::Refused(_) => 4,
            Self::Unfit(_) => 5,
            Self::Wire(_) => 6,
            Self::Stopped => 7,
        }
    }
}

/// Asks a process where it listens, and whether it would hand over.
pub(crate) fn inquire(path: &Path, ask: pb::Ask) -> Result<pb::Offer, TakeError> {
    first_look(path, ask).map(|(offer, _)| offer)
}

/// As [`inquire`]. What comes with the answer shows whether the process lives.
pub(super) fn first_look(path: &Path, ask: pb::Ask) -> Result<(pb::Offer, Wire), TakeError> {
    let wire = connect(path)?;
    say(&wire, Said::Inquire(ask))?;
    let (answer, _) = wire.receive::<pb::ToTaker>(ANSWER_LIMIT)?;
    Ok((offer_of(answer)?, wire))
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
    let fit = match office.report.write() {
        true => prepare::get_ready(office, path),
        // Nor could proxy.json be, and the agent would never know that this process serves.
        false => Err(TakeError::Unfit(
            "its data directory cannot be written".to_owned(),
        )),
    };
    let ended = fit.and_then(|()| take_over(office, path, &|| {}));
    office.insist();
    if let Err(error) = &ended {
        office.report.failed(error);
    }
    ended
}

/// As [`relieve`], without the trial. Says when everybody has come who can, and that was written down.
pub(super) fn take_over(
    office: &Office,
    path: &Path,
    settled: &(dyn Fn() + Sync),
) -> Result<(), TakeError> {
    with_scribe(office, settled, |scribe| take_all(office, path, scribe))
}

/// One conversation after the other.
fn take_all(office: &Office, path: &Path, scribe: &Scribe<'_>) -> Result<(), TakeError> {
    let mut tries = 0;
    let progress = Progress::default();
    let taken = || office.counts.taken.load(Ordering::Relaxed);
    let taken_before = taken();
    let number = office.report.number();
    let note = || {
        let left = u64::from(progress.left.get());
        let report = &office.report;
        report.settled(number, taken() - taken_before, left)
    };
    let told = Cell::new(false);
    let settled = || {
        if note() || !told.replace(true) || !office.is_announced() {
            scribe.settled();
        }
    };
    loop {
        let taken_then = taken();
        let ended = try_take(office, path, &progress, scribe, &settled);
        office.audience.expect_clients(false);
        if taken() > taken_then {
            tries = 0;
        }
        match ended {
            Err(error) if !progress.has_listener.get() => return Err(error),
            // Told to stop, it takes no more: the other process goes on with the rest.
            Ok(()) | Err(TakeError::Stopped) => return Ok(()),
            Err(error) if tries < TRIES => {
                tracing::warn!(%error, "a hand-over ended early; the rest is asked for again");
                // The other process takes back what it had sent, or catches up, before it hears.
                pause(office, LOOK_INTERVAL * (1 << tries));
                tries += 1;
            }
            Err(error) => {
                tracing::warn!(%error, "some clients stay with the process that served before");
                note();
                scribe.news();
                return Ok(());
            }
        }
    }
}

fn try_take(
    office: &Office,
    path: &Path,
    progress: &Progress,
    scribe: &Scribe<'_>,
    settled: &dyn Fn(),
) -> Result<(), TakeError> {
    let began = Instant::now();
    let wire = connect(path)?;
    if !progress.has_listener.get() {
        office.report.asking();
    }
    office.audience.expect_clients(true);
    say(&wire, Said::Ask(office.ask()))?;
    let (answer, _) = wire.receive::<pb::ToTaker>(ANSWER_LIMIT)?;
    let offer = offer_of(answer)?;
    tracing::info!(
        pid = offer.pid,
        release = offer.release,
        clients = offer.clients,
        "takes over"
    );
    progress.left.set(offer.clients);
    let mut taker = Taker {
        office,
        wire: &wire,
        progress,
        scribe,
        taken: 0,
        announced: None,
    };
    let ended = taker.listen(settled);
    if let Some(announced) = taker.announced.take() {
        announced.end(office);
    }
    tracing::debug!(taken = taker.taken, took = ?began.elapsed(), "a hand-over is over");
    ended
}

/// What is known of the other process, over all conversations.
#[derive(Debug, Default)]
struct Progress {
    has_listener: Cell<bool>,
    /// Clients that it still has.
    left: Cell<u32>,
}

/// Waits, unless this process is told to stop.
fn pause(office: &Office, time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until && !office.stop.is_cancelled() {
        std::thread::park_timeout(LOOK_INTERVAL);
    }
}

struct Taker<'a> {
    office: &'a Office,
    wire: &'a Wire,
    progress: &'a Progress,
    scribe: &'a Scribe<'a>,
    taken: u64,
    /// Clients that are to come.
    announced: Option<Announced>,
}

impl Taker<'_> {
    fn listen(&mut self, settled: &dyn Fn()) -> Result<(), TakeError> {
        let (office, wire) = (self.office, self.wire);
        loop {
            let (message, fds) = next(office, wire)?;
            match message.message {
                Some(Heard::Listener(listener)) => {
                    take_listener(office, wire, &listener, fds)?;
                    self.progress.has_listener.set(true);
                    self.scribe.news();
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
                    self.progress.left.set(rest.clients);
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
        let (clients, refused) = read_batch(batch, fds, office.tls.as_ref(), place)?;
        if !adopt(self.wire, number, refused) {
            let clients = clients.into_iter();
            announced.put_back(clients.filter_map(|c| Some((c.state.id, c.reserved?))));
            self.announced = is_announced.then_some(announced);
            return Err(WireError::Gone.into());
        }
        let count = clients.len() as u64;
        self.taken += count;
        let left = &self.progress.left;
        left.set(left.get().saturating_sub(count as u32));
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
        // Once for all of them: a worker that is woken for each turns for each.
        office.workers.iter().for_each(WorkerHandle::wake);
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

/// Says that what came with this number is adopted. False: the other process goes on with it, or went
/// on before it died.
fn adopt(wire: &Wire, number: u64, refused: Vec<u32>) -> bool {
    let said = say(wire, Said::Adopted(pb::Adopted { number, refused }));
    if said.is_ok() {
        return true;
    }
    let until = Instant::now() + END_LIMIT;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match wire.receive::<pb::ToTaker>(left) {
            // It has what it sent again since then; what was sent is old.
            Ok((word, _)) if matches!(word.message, Some(Heard::Withdrawn(_))) => return false,
            Ok(_) => {}
            Err(WireError::Gone) => return wire.peer_ends(left),
            Err(_) => return false,
        }
    }
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
    office.pause(listener.pause.as_ref());
    if !adopt(wire, 0, Vec::new()) {
        return Err(WireError::Gone.into());
    }
    office.serve(Some(Arc::new(socket)));
    office.report.serving();
    Ok(())
}

/// The clients of a batch, and the positions of those that are not understood. `place` says where a
/// client was expected; `None`: anywhere.
fn read_batch(
    batch: pb::Batch,
    fds: Vec<OwnedFd>,
    port: Option<&Arc<Port>>,
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
        let tls = Tls::read_message(client.tls, port);
        let (Some(Ok(state)), Some(pins), Some(tls)) = (state, pins, tls) else {
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
            tls,
        });
    }
    if fds.next().is_some() {
        return Err(WireError::Nonsense("descriptors without their clients").into());
    }
    Ok((clients, refused))
}

/// Gives a client to the worker with the fewest, which is to be woken for it.
fn place_anywhere(office: &Office, client: Accepted) {
    let mut next = Some(client);
    while let Some(client) = next {
        let least = office.workers.iter().min_by_key(|worker| worker.load());
        next = least.and_then(|worker| worker.put(client));
        if next.is_some() && office.stop.is_cancelled() {
            office.clients.fetch_sub(1, Ordering::Relaxed);
            return; // nobody takes it any more: it is closed, as all are
        }
        if next.is_some() {
            office.workers.iter().for_each(WorkerHandle::wake);
            std::thread::yield_now(); // there is room once it has turned
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    /// A conversation with a process that has ended, and its end of it.
    fn with_the_dead() -> (Wire, Wire) {
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        let peer = pidfd_open(Pid::from_child(&ended), PidfdFlags::empty()).unwrap();
        ended.wait().unwrap();
        let (theirs, ours) = UnixStream::pair().unwrap();
        (Wire::new(theirs).unwrap(), Wire::with_peer(ours, peer))
    }

    fn withdraw(wire: &Wire) {
        wire.hear_no_more().unwrap();
        wire.make_room();
        let word = pb::ToTaker {
            message: Some(Heard::Withdrawn(pb::Withdrawn { number: 1 })),
        };
        wire.send(&word, &[], ANSWER_LIMIT).unwrap();
    }

    #[test]
    fn what_a_process_had_given_when_it_died_is_adopted() {
        let (theirs, ours) = with_the_dead();
        drop(theirs);
        assert!(adopt(&ours, 1, Vec::new()));
    }

    #[test]
    fn what_a_process_had_withdrawn_before_it_died_is_old_and_not_adopted() {
        let (theirs, ours) = with_the_dead();
        withdraw(&theirs);
        drop(theirs);
        assert!(!adopt(&ours, 1, Vec::new()));
        // However much was left unread before.
        let (theirs, ours) = with_the_dead();
        let bulk = pb::ToTaker {
            message: Some(Heard::Refused(pb::Refused {
                reason: "x".repeat(1000),
            })),
        };
        let brief = Duration::from_millis(10);
        while theirs.send(&bulk, &[], brief).is_ok() {}
        theirs.hear_no_more().unwrap();
        theirs.make_room();
        let sent = theirs.send(&pb::ToTaker::default(), &[], brief);
        assert!(sent.is_ok(), "{sent:?}");
        drop((theirs, ours));
    }
}
