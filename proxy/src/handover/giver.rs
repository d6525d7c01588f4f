//! Hands a process's listener and clients to another one.
//!
//! Invariants: what was sent is the other's once its `Adopted` was read, and this process's again if
//! that cannot come any more, which the other one is told first. A client that cannot be told stays, is
//! served, and is tried again. When nothing is left, the process stays as a spare for a while: if the
//! other dies, it accepts clients again.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use slotmesh_proto::handover::v1 as pb;
use slotmesh_proto::handover::v1::to_giver::Message as Heard;
use slotmesh_proto::handover::v1::to_taker::Message as Said;

use super::leaving::TRAVEL_LIMIT;
use super::wire::{FDS_MAX, Wire, WireError};
use super::{Office, Role, common_version, spare, told};
use crate::tls;
use crate::worker::{Collect, Collected, Parcel, Pass};

/// The first message of a conversation.
const FIRST_LIMIT: Duration = Duration::from_secs(2);
/// How long clients wait for the other process to say that it has them. It takes milliseconds; on a
/// machine without time to spare more, and the next try would not be better.
pub(super) const ACK_LIMIT: Duration = Duration::from_millis(500);
/// For what was said before the ear was closed. It is there or never comes, so that nobody waits for it;
/// but this thread may be kept from reading it by others.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(5);
/// Clients per message that say nothing: each descriptor counts, and some have two.
pub(super) const BATCH: usize = 200;
/// Clients per message that may notice that they are stopped. Each waits for all of its message, which
/// takes some ten microseconds a client; with fewer, the words around a message take longer.
const BATCH_LIVELY: usize = 64;
/// Bytes of clients per message, passed by one client of each worker at most.
pub(super) const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Between looks at clients that could not travel yet.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// As long as everybody else is on the way: many of them can in a moment.
const LOOK_SOON: Duration = Duration::from_millis(10);
const SOON: Duration = Duration::from_secs(1);
/// Signs of life.
const REST_INTERVAL: Duration = Duration::from_secs(1);
/// How long the process stays as a spare once everybody has travelled.
pub(super) const SPARE_TIME: Duration = Duration::from_secs(60);
/// How long it stays for those who cannot travel, while they go by themselves; then they are closed.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(600);
/// Ids that are left free for clients that are being accepted right now.
const IDS_RESERVED: u64 = 1024;

/// Answers one process.
pub(super) fn converse(office: &Arc<Office>, wire: &Wire) {
    let first = match wire.receive::<pb::ToGiver>(FIRST_LIMIT) {
        Ok((first, _)) => first.message,
        Err(error) => return tracing::debug!(%error, "nobody asked for a hand-over after all"),
    };
    match first {
        Some(Heard::Inquire(ask)) => {
            let answer = judge(office, &ask).map_or_else(refusal, Said::Offer);
            if let Err(error) = say(wire, answer, &[]) {
                tracing::debug!(%error, "an inquiry was not answered");
            }
        }
        Some(Heard::Ask(ask)) => serve_ask(office, wire, &ask),
        Some(Heard::TakeBack(_)) => {
            let problem = spare::take_back(office).err().unwrap_or_default();
            if let Err(error) = say(wire, Said::TakenBack(pb::TakenBack { problem }), &[]) {
                tracing::debug!(%error, "whoever wanted this process back is gone");
            }
        }
        Some(Heard::Adopted(_) | Heard::Ready(_)) | None => {
            tracing::debug!("a conversation began with nonsense")
        }
    }
}

fn serve_ask(office: &Office, wire: &Wire, ask: &pb::Ask) {
    let Ok(turn) = office.turn.try_lock() else {
        let busy = refusal("another hand-over is under way; try again when it is over".to_owned());
        let _ = say(wire, busy, &[]); // it may be gone
        return;
    };
    let offer = match judge(office, ask) {
        Ok(offer) => offer,
        Err(reason) => {
            tracing::warn!(%reason, pid = ask.pid, "a hand-over was refused");
            drop(turn); // whoever hears that may ask again at once
            let _ = say(wire, refusal(reason), &[]);
            return;
        }
    };
    let talks = office.talks.fetch_add(1, Ordering::Relaxed) + 1;
    let giver = Giver {
        office,
        wire,
        schema_max: ask.schema_max,
        sent: 0,
        listening_at: Instant::now(),
        stopped: Stopped::default(),
    };
    if let Err(error) = giver.give(offer, ask) {
        office.counts.failed.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(%error, pid = ask.pid, "a hand-over ended early");
    }
    drop(turn);
    spare::stand_by(office, wire, talks);
}

fn refusal(reason: String) -> Said {
    Said::Refused(pb::Refused { reason })
}

pub(super) fn say(wire: &Wire, message: Said, fds: &[BorrowedFd<'_>]) -> Result<(), WireError> {
    let message = pb::ToTaker {
        message: Some(message),
    };
    wire.send(&message, fds, ACK_LIMIT)
}

/// Whether this process would hand over to the one that asks.
fn judge(office: &Office, ask: &pb::Ask) -> Result<pb::Offer, String> {
    let version = common_version(ask).ok_or_else(|| {
        format!(
            "release {} speaks versions {} to {} of the hand-over, this one others; upgrade over a \
             release between them",
            ask.release, ask.version_min, ask.version_max
        )
    })?;
    if (&ask.proxy_id, &ask.instance_id) != (&office.proxy_id, &office.instance) {
        return Err(format!(
            "this process is {} of {}, not {} of {}",
            office.proxy_id, office.instance, ask.proxy_id, ask.instance_id
        ));
    }
    if office.leaves() {
        return Err(
            "the clients of this process are to go elsewhere; it is not to be relieved".to_owned(),
        );
    }
    let revision = office.routing.load().revision;
    if ask.revision != 0 && ask.revision < revision {
        return Err(format!(
            "the topology of the asking process is of revision {}, older than {revision}; try again \
             when it has caught up",
            ask.revision
        ));
    }
    let again = office
        .successor
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let again = again
        .as_ref()
        .is_some_and(|door| door.as_os_str() == ask.door.as_str());
    if office.role() != Role::Serving && !again {
        return Err("this process does not serve clients; ask the one that does".to_owned());
    }
    Ok(pb::Offer {
        version,
        release: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        address: office.listen_address(),
        clients: u32::try_from(office.clients()).unwrap_or(u32::MAX),
    })
}

pub(super) struct Giver<'a> {
    pub(super) office: &'a Office,
    pub(super) wire: &'a Wire,
    pub(super) schema_max: u32,
    /// Batches so far.
    sent: u64,
    /// When to try again those who listen to channels.
    pub(super) listening_at: Instant,
    stopped: Stopped,
}

/// For how long clients that went were stopped: from the last byte that was read here to the other
/// process's word that it has them.
#[derive(Debug, Default)]
struct Stopped(Vec<Duration>);

impl Stopped {
    /// So many are remembered, the first ones.
    const MAX: usize = 100_000;

    fn note(&mut self, parcels: &[Parcel]) {
        let room = Self::MAX - self.0.len();
        let times = parcels.iter().map(|parcel| parcel.stopped.elapsed());
        self.0.extend(times.take(room));
    }

    /// The longest, and that of 99 of 100.
    fn extremes(&mut self) -> (Duration, Duration) {
        self.0.sort_unstable();
        let rank = self.0.len().saturating_sub(1) * 99 / 100;
        let at = |rank: usize| self.0.get(rank).copied().unwrap_or_default();
        (at(self.0.len().saturating_sub(1)), at(rank))
    }
}

impl Giver<'_> {
    fn give(mut self, offer: pb::Offer, ask: &pb::Ask) -> Result<(), WireError> {
        let office = self.office;
        let began = Instant::now();
        tracing::info!(pid = ask.pid, release = ask.release, "hands over");
        say(self.wire, Said::Offer(offer), &[])?;
        let writing = office.writing();
        self.give_listener()?;
        *office
            .successor
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(ask.door.clone().into());
        office.wants_back.store(false, Ordering::Relaxed);
        office.be_relieved();
        drop(writing);
        let mut relieved: Option<Instant> = None;
        let mut rest_at = Instant::now();
        loop {
            let (mut given, left) = self.give_clients()?;
            if given == 0 {
                given = self.give_listening()?;
            }
            office.counts.left.store(left as u64, Ordering::Relaxed);
            if given > 0 {
                continue;
            }
            if relieved.is_none() {
                let took = began.elapsed();
                let (longest, most) = self.stopped.extremes();
                office.counts.stopped(longest);
                tracing::info!(
                    ?took, left, stopped_max = ?longest, stopped_p99 = ?most,
                    "has handed over all clients that can travel"
                );
            }
            let since = *relieved.get_or_insert_with(Instant::now);
            if left > 0 && since.elapsed() >= TRAVEL_LIMIT {
                office.send_rest(DRAIN_LIMIT.saturating_sub(since.elapsed()));
            }
            let done = left == 0 && since.elapsed() >= SPARE_TIME;
            let over = done || since.elapsed() >= DRAIN_LIMIT;
            let back = office.wants_back.load(Ordering::Relaxed) || office.stop.is_cancelled();
            if over || back || rest_at <= Instant::now() {
                self.say_rest(left, over || back)?;
                rest_at = Instant::now() + REST_INTERVAL;
            }
            if over {
                tracing::info!(left, "is not needed any more and ends");
                office.stop.cancel();
            }
            if over || back {
                return Ok(());
            }
            let pause = match since.elapsed() < SOON {
                true => LOOK_SOON,
                false => LOOK_AGAIN,
            };
            if self.wire.has_news(pause) {
                // It has nothing to say now: it is gone.
                let (_, _) = self.wire.receive::<pb::ToGiver>(ACK_LIMIT)?;
                return Err(WireError::Nonsense("an answer that nobody waits for"));
            }
        }
    }

    fn say_rest(&self, left: usize, over: bool) -> Result<(), WireError> {
        let clients = u32::try_from(left).unwrap_or(u32::MAX);
        say(self.wire, Said::Rest(pb::Rest { clients, over }), &[])
    }

    fn give_listener(&mut self) -> Result<(), WireError> {
        let office = self.office;
        let socket = office.stance.borrow().socket.clone();
        let socket = socket.ok_or(WireError::Nonsense("there is no listener"))?;
        let (remaining_ms, writes_only) = office.pause_left();
        let message = pb::Listener {
            next_client_id: office.next_id.fetch_add(IDS_RESERVED, Ordering::Relaxed)
                + IDS_RESERVED,
            pause: (remaining_ms > 0).then_some(pb::Pause {
                remaining_ms,
                writes_only,
            }),
        };
        say(self.wire, Said::Listener(message), &[socket.as_fd()])?;
        match self.adopted(0) {
            Some(_) => Ok(()),
            None => Err(WireError::Late),
        }
    }

    /// One round: so many clients as can be told now. Returns how many went, and how many are left.
    fn give_clients(&mut self) -> Result<(usize, usize), WireError> {
        let collected = self.collect();
        let left = collected.iter().map(|one| one.left).sum();
        let mut parcels: Vec<Parcel> = collected.into_iter().flat_map(|c| c.parcels).collect();
        let mut given = 0;
        while !parcels.is_empty() {
            let (mut bytes, mut fds) = (0, 0);
            let fits = parcels.iter().take_while(|parcel| {
                let before = bytes;
                bytes += parcel.bytes_len();
                fds += 1 + parcel.lines.len();
                before < BATCH_BYTES && fds <= FDS_MAX
            });
            let rest = parcels.split_off(fits.count());
            let batch = std::mem::replace(&mut parcels, rest);
            match self.give_batch(batch, false) {
                Ok(count) => given += count,
                Err(error) => {
                    self.return_all(parcels);
                    return Err(error);
                }
            }
        }
        Ok((given, left))
    }

    fn collect(&self) -> Vec<Collected> {
        let workers = self.office.workers.len();
        let ask = |worker| {
            let (answer, answered) = sync_channel(1);
            let collect = Collect {
                clients_max: BATCH.div_ceil(workers),
                lively_max: BATCH_LIVELY.div_ceil(workers),
                bytes_max: BATCH_BYTES / workers,
                schema_max: self.schema_max,
                answer,
            };
            self.office.pass(worker, Pass::Collect(collect));
            answered
        };
        let asked: Vec<_> = (0..workers).map(ask).collect();
        // Without a limit: what a worker answers too late would be lost with its clients. It answers
        // within `QUIET_LIMIT_US`, or has ended.
        asked
            .into_iter()
            .filter_map(|answered| answered.recv().ok())
            .collect()
    }

    /// Sends clients and waits until the other process has them.
    pub(super) fn give_batch(
        &mut self,
        parcels: Vec<Parcel>,
        announced: bool,
    ) -> Result<usize, WireError> {
        self.sent += 1;
        let client = |parcel: &Parcel| {
            let mut state = parcel.state.to_message();
            if parcel.tls.is_some() {
                state.schema = state.schema.max(tls::SCHEMA);
            }
            pb::Client {
                state: Some(state),
                watch: parcel.pins.watch.as_ref().map(told::watch),
                wait: parcel.pins.wait.as_ref().map(told::wait),
                tls: parcel.tls.as_ref().and_then(|tls| tls.to_message()),
            }
        };
        let batch = pb::Batch {
            number: self.sent,
            clients: parcels.iter().map(client).collect(),
            announced,
        };
        let fds: Vec<_> = parcels.iter().flat_map(descriptors).collect();
        let sent = say(self.wire, Said::Batch(batch), &fds);
        let Some(refused) = self.adopted_after(sent, self.sent) else {
            self.return_all(parcels);
            return Err(WireError::Late);
        };
        self.stopped.note(&parcels);
        let numbered = parcels.into_iter().enumerate();
        let is_refused = |at: usize| refused.iter().any(|refused| *refused as usize == at);
        let (stay, go): (Vec<_>, Vec<_>) = numbered.partition(|(at, _)| is_refused(*at));
        let count = go.len();
        self.office
            .counts
            .given
            .fetch_add(count as u64, Ordering::Relaxed);
        for worker in 0..self.office.workers.len() {
            let own = go.iter().filter(|(_, parcel)| parcel.worker == worker);
            let keys: Vec<_> = own.map(|(_, parcel)| parcel.key()).collect();
            if !keys.is_empty() {
                self.office.pass(worker, Pass::Forget(keys));
            }
        }
        self.return_all(stay.into_iter().map(|(_, parcel)| parcel).collect());
        Ok(count)
    }

    fn adopted_after(&self, sent: Result<(), WireError>, number: u64) -> Option<Vec<u32>> {
        match sent {
            Ok(()) => self.adopted(number),
            // It cannot have all of it, and nothing may be sent behind a part of it.
            Err(error) => {
                tracing::debug!(%error, "a batch was not sent");
                self.wire.hang_up();
                None
            }
        }
    }

    /// Waits for the other's word. After `None` it can no longer be given, and the other side can know.
    fn adopted(&self, number: u64) -> Option<Vec<u32>> {
        let word = |limit| match self.wire.receive::<pb::ToGiver>(limit) {
            Ok((message, _)) => match message.message {
                Some(Heard::Adopted(adopted)) if adopted.number == number => Some(adopted.refused),
                _ => None,
            },
            Err(_) => None,
        };
        word(ACK_LIMIT).or_else(|| {
            if let Err(error) = self.wire.hear_no_more() {
                tracing::debug!(%error, "the conversation was over already");
            }
            let word = word(LAST_WORDS_LIMIT);
            if word.is_none() {
                self.withdraw(number);
            }
            word
        })
    }

    /// Says that what was sent is this process's again, before it is: should this process die now, the
    /// other one would otherwise take it for its own, as it was then.
    fn withdraw(&self, number: u64) {
        self.wire.make_room();
        let word = Said::Withdrawn(pb::Withdrawn { number });
        if let Err(error) = say(self.wire, word, &[]) {
            tracing::debug!(%error, "the other process is gone, or stands still");
        }
    }

    pub(super) fn return_all(&self, parcels: Vec<Parcel>) {
        let count = parcels.len() as u64;
        self.office
            .counts
            .returned
            .fetch_add(count, Ordering::Relaxed);
        let mut by_worker: Vec<Vec<Parcel>> = Vec::new();
        by_worker.resize_with(self.office.workers.len(), Vec::new);
        for parcel in parcels {
            by_worker[parcel.worker].push(parcel);
        }
        for (worker, parcels) in by_worker.into_iter().enumerate() {
            if !parcels.is_empty() {
                self.office.pass(worker, Pass::Return(parcels));
            }
        }
    }
}

/// The client's own, then those of its lines.
fn descriptors(parcel: &Parcel) -> impl Iterator<Item = BorrowedFd<'_>> {
    let lines = parcel.lines.iter().map(|line| line.as_fd());
    std::iter::once(parcel.socket.as_fd()).chain(lines)
}
