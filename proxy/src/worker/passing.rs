//! A worker's part of a hand-over: collects clients that can be told, and takes back what did not
//! travel.
//!
//! Invariant: the socket of a client is at one place: here, in a [`Parcel`], or closed. A parcel that
//! is not forgotten comes back, and its client goes on as if nothing had been.

use std::collections::HashMap;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use mio::net::TcpStream;

use super::passing_topics::{Cutting, Reserve, Topics};
use super::{Ordering, Worker};
use crate::core::client::{Client, ClientState, Pause};
use crate::core::passing::{Frozen, QUIET_LIMIT_US, Settled};
use crate::core::passing_lines::Pins;
use crate::core::passing_topics::{Listening, Wanted};
use crate::tls::Tls;

/// Some clients can be told and others not yet: how long the former wait for company. Replies of a
/// node on the same network take less.
const COMPANY_US: u64 = 2_000;
/// One that could not be told is tried again after this, so that it is stopped less than half of the
/// time ([`QUIET_LIMIT_US`]), and a hand-over is over within a second nevertheless.
const RETRY_US: u64 = 300_000;
/// Who has said nothing for so long hardly begins in the next milliseconds.
const STILL_US: u64 = 1_000_000;
/// Between looks at clients that were stopped.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// The trial of a process may wait for connections to be made, and no longer.
const TRIAL_LIMIT_US: u64 = 5_000_000;

/// Where it is said whether a process is fit, or why not.
type Verdict = SyncSender<Result<(), String>>;
/// Slot and generation of a client.
pub(crate) type Key = (u32, u32);

/// What a hand-over wants of a worker.
#[derive(Debug)]
pub(crate) enum Pass {
    Collect(Collect),
    /// These were not taken: they go on here.
    Return(Vec<Parcel>),
    /// These are another process's now: slots and generations.
    Forget(Vec<(u32, u32)>),
    /// Clients are to go by themselves, or, with `None`, no longer.
    Depart(Option<super::SendOff>),
    /// Is everything as it must be to take over?
    Trial(Verdict),
    /// Which clients listen and can be told?
    Listening(Wanted, SyncSender<Vec<(Key, Listening)>>),
    /// These could not be told for now.
    PutOff(Vec<Key>),
    Cut(Cutting),
    Reserve(Reserve),
    /// A marker has done its work; these, that were reserved, do not come.
    EndCut(Vec<u8>, Vec<(u32, u32)>),
}

/// Asks for clients. Always answered, if the worker lives.
#[derive(Debug)]
pub(crate) struct Collect {
    /// Of those that have said nothing for a while, and of all that are stopped at a time.
    pub(crate) clients_max: usize,
    /// Of the others, when none of the former is left: they are stopped in smaller groups.
    pub(crate) lively_max: usize,
    /// Passed by one client at most.
    pub(crate) bytes_max: usize,
    pub(crate) schema_max: u32,
    pub(crate) answer: SyncSender<Collected>,
}

/// Clients that can be told.
#[derive(Debug)]
pub(crate) struct Collected {
    pub(crate) parcels: Vec<Parcel>,
    /// Clients that the worker still has.
    pub(crate) left: usize,
}

/// A client on its way.
#[derive(Debug)]
pub(crate) struct Parcel {
    pub(crate) worker: usize,
    pub(crate) socket: TcpStream,
    /// What it has of TLS.
    pub(crate) tls: Option<Box<Tls>>,
    pub(crate) state: ClientState,
    pub(crate) pins: Pins,
    /// The sockets of the pins, in their order.
    pub(crate) lines: Vec<TcpStream>,
    /// Since when it is not served.
    pub(crate) stopped: Instant,
    frozen: Frozen,
}

/// Which clients go first: those whom a stop does not touch, then those who are between two requests.
#[derive(Clone, Copy, Debug)]
enum Manner {
    Still,
    AtRest,
    Any,
}

impl Manner {
    fn fits(self, client: &Client, now_us: u64) -> bool {
        let at_rest = client.pause == Pause::None && client.in_flight() == 0;
        match self {
            Self::Still => at_rest && client.heard_us + STILL_US <= now_us,
            Self::AtRest => at_rest,
            Self::Any => client.pause != Pause::Frozen,
        }
    }
}

impl Parcel {
    pub(crate) fn key(&self) -> (u32, u32) {
        self.frozen.key()
    }

    /// What it takes of a message, as good as.
    pub(crate) fn bytes_len(&self) -> usize {
        let tls = self.tls.as_ref().map_or(0, |tls| tls.bytes_len());
        self.state.bytes_len() + self.pins.bytes_len() + tls
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Passing {
    collect: Option<(Collect, u64)>,
    frozen: Vec<Frozen>,
    /// Clients that are in parcels.
    away: usize,
    /// Those that could not be told, by slot: their generation, and when to try again.
    later: HashMap<u32, (u32, u64)>,
    /// Slots of the clients that try, and until when.
    trial: Option<(Vec<u32>, u64, Verdict)>,
    pub(super) topics: Topics,
}

impl Passing {
    pub(super) fn wait_time(&self) -> Option<Duration> {
        let looks = self.collect.is_some()
            || self.trial.is_some()
            || !self.frozen.is_empty()
            || self.topics.are_under_way();
        looks.then_some(LOOK_INTERVAL)
    }

    /// True if a client could not be told a moment ago.
    pub(super) fn waits(&self, slot: u32, generation: u32, now_us: u64) -> bool {
        let later = self.later.get(&slot);
        later.is_some_and(|(of, until_us)| *of == generation && *until_us > now_us)
    }

    /// A client that could not be told is tried again, but not at once.
    pub(super) fn put_off(&mut self, (slot, generation): Key, now_us: u64) {
        self.later.insert(slot, (generation, now_us + RETRY_US));
    }

    fn is_over(&self) -> bool {
        let idle = self.collect.is_none() && self.trial.is_none() && !self.topics.are_under_way();
        idle && self.frozen.is_empty() && self.away == 0 && self.later.is_empty()
    }
}

impl Worker {
    pub(super) fn take_pass(&mut self, pass: Pass) {
        let mut passing = self.passing.take().unwrap_or_default();
        let now_us = self.now_us();
        match pass {
            Pass::Collect(collect) => {
                self.stop_clients(&mut passing, &collect, now_us);
                passing.collect = Some((collect, now_us));
            }
            Pass::Return(parcels) => {
                for parcel in parcels {
                    passing.away -= 1;
                    self.take_back(&mut passing, parcel, now_us);
                }
            }
            Pass::Forget(keys) => {
                passing.away -= keys.len();
                let mut gone = 0;
                for (slot, generation) in keys {
                    if self.core.sessions.get_same(slot, generation).is_some() {
                        self.core.close_client(slot);
                        gone += 1;
                    }
                }
                self.shared.clients.fetch_sub(gone, Ordering::Relaxed);
            }
            Pass::Listening(wanted, answer) => {
                let found = self.find_listening(&mut passing, wanted, now_us);
                let _ = answer.try_send(found); // whoever asked waits for it
            }
            Pass::PutOff(keys) => keys
                .into_iter()
                .for_each(|key| passing.put_off(key, now_us)),
            Pass::Depart(off) => self.depart(off),
            Pass::Cut(cutting) => self.begin_cutting(&mut passing, cutting, now_us),
            Pass::Reserve(reserve) => self.begin_reserving(&mut passing, reserve, now_us),
            Pass::EndCut(marker, unwanted) => {
                self.begin_ending(&mut passing, marker, now_us);
                for (slot, generation) in unwanted {
                    if self.core.sessions.get_same(slot, generation).is_some() {
                        self.core.close_client(slot);
                        self.shared.clients.fetch_sub(1, Ordering::Relaxed);
                    }
                }
            }
            Pass::Trial(answer) => {
                let slots = self.core.begin_trial();
                if slots.is_empty() {
                    // Whoever asked may have stopped waiting.
                    let _ = answer.try_send(Err("no topology is in force".to_owned()));
                } else {
                    passing.trial = Some((slots, now_us + TRIAL_LIMIT_US, answer));
                }
            }
        }
        self.passing = Some(passing);
    }

    /// Stops as many clients as are wanted, all of the first manner that there is.
    fn stop_clients(&mut self, passing: &mut Passing, collect: &Collect, now_us: u64) {
        let slots: Vec<u32> = self.core.sessions.slots().collect();
        let manners = [
            (Manner::Still, collect.clients_max),
            (Manner::AtRest, collect.lively_max),
            (Manner::Any, collect.lively_max),
        ];
        for (manner, wanted) in manners {
            let room = collect.clients_max.saturating_sub(passing.frozen.len());
            let stopped = passing.frozen.len();
            for slot in &slots {
                if passing.frozen.len() - stopped >= wanted.min(room) {
                    break;
                }
                let Some(client) = self.core.sessions.get(*slot) else {
                    continue;
                };
                let waits = passing.waits(*slot, client.generation, now_us);
                let may_go = self.clients.may_go(*slot, collect.schema_max);
                if !manner.fits(client, now_us) || waits || !may_go {
                    continue;
                }
                if let Ok(frozen) = self.core.freeze(*slot, collect.schema_max, false) {
                    passing.frozen.push(frozen);
                }
            }
            if passing.frozen.len() > stopped {
                return;
            }
        }
    }

    fn take_back(&mut self, passing: &mut Passing, parcel: Parcel, now_us: u64) {
        let (slot, generation) = parcel.key();
        if self.core.sessions.get_same(slot, generation).is_none() {
            return; // it was closed meanwhile
        }
        let registry = self.poll.registry();
        let taken = (parcel.socket, parcel.tls);
        self.clients.put_back(slot, taken, &mut self.core, registry);
        self.take_pins(slot, parcel.pins, parcel.lines);
        self.core.thaw(&parcel.frozen);
        passing.put_off((slot, generation), now_us);
    }

    /// Gives a client what it had at nodes.
    pub(super) fn take_pins(&mut self, slot: u32, pins: Pins, sockets: Vec<TcpStream>) {
        let lines = self.core.fasten_pins(slot, pins);
        for (no, socket) in lines.into_iter().zip(sockets) {
            let Some(no) = no else { continue };
            let registry = self.poll.registry();
            if let Err(error) = self.nodes.put_in(no, socket, registry) {
                tracing::debug!(%error, "a connection to a node did not survive a hand-over");
                self.core.lane_abandon(no);
            }
        }
    }

    /// Goes on with what is under way. Once per turn, behind the sends to clients.
    pub(super) fn pass_on(&mut self) {
        let Some(mut passing) = self.passing.take() else {
            return;
        };
        let now_us = self.now_us();
        if let Some((collect, since_us)) = passing.collect.take() {
            if self.may_answer(&mut passing, collect.schema_max, since_us, now_us) {
                self.answer_collect(&mut passing, collect);
            } else {
                passing.collect = Some((collect, since_us));
            }
        } else {
            // Nobody may ask for them again.
            let late = |frozen: &Frozen| frozen.since_us() + QUIET_LIMIT_US <= now_us;
            for frozen in passing.frozen.extract_if(.., |frozen| late(frozen)) {
                self.core.thaw(&frozen);
            }
        }
        if let Some((slots, until_us, answer)) = passing.trial.take() {
            match self.trial_result(&slots, until_us <= now_us) {
                Some(result) => {
                    let _ = answer.try_send(result);
                    for slot in slots {
                        self.core.close_client(slot);
                    }
                }
                None => passing.trial = Some((slots, until_us, answer)),
            }
        }
        self.go_on_with_topics(&mut passing, now_us);
        passing.later.retain(|_, (_, until_us)| *until_us > now_us);
        if !passing.is_over() {
            self.passing = Some(passing);
        }
    }

    /// Lets those go on that cannot be told, and says whether it is time to send the others.
    fn may_answer(
        &mut self,
        passing: &mut Passing,
        schema_max: u32,
        since_us: u64,
        now_us: u64,
    ) -> bool {
        let under_way = self.core.under_way();
        let (mut ready, mut waiting) = (0, 0);
        for frozen in std::mem::take(&mut passing.frozen) {
            match self.core.settled(&frozen, schema_max, &under_way) {
                Settled::Yes => ready += 1,
                Settled::NotYet => waiting += 1,
                Settled::No => {
                    let stopped_us = now_us.saturating_sub(frozen.since_us());
                    tracing::debug!(slot = frozen.slot, stopped_us, "a client stays for now");
                    self.core.thaw(&frozen);
                    passing.put_off(frozen.key(), now_us);
                    continue;
                }
            }
            passing.frozen.push(frozen);
        }
        waiting == 0 || (ready > 0 && since_us + COMPANY_US <= now_us)
    }

    fn answer_collect(&mut self, passing: &mut Passing, collect: Collect) {
        let under_way = self.core.under_way();
        let (mut parcels, mut bytes) = (Vec::new(), 0);
        for frozen in std::mem::take(&mut passing.frozen) {
            let settled = self.core.settled(&frozen, collect.schema_max, &under_way);
            if settled != Settled::Yes || bytes > collect.bytes_max {
                passing.frozen.push(frozen);
                continue;
            }
            if let Some(parcel) = self.pack(frozen) {
                bytes += parcel.bytes_len();
                parcels.push(parcel);
            }
        }
        self.send_parcels(passing, parcels, &collect.answer);
    }

    /// Takes a settled client's socket away, with all that is known of it.
    pub(super) fn pack(&mut self, frozen: Frozen) -> Option<Parcel> {
        // Without TLS in its message it would be taken for a plain client.
        if !self.clients.may_go(frozen.slot, u32::MAX) {
            self.core.thaw(&frozen);
            return None;
        }
        let registry = self.poll.registry();
        let state = self.core.parting_state(frozen.slot);
        let socket = self.clients.take_out(frozen.slot, registry);
        let (Some(state), Some((socket, tls))) = (state, socket) else {
            self.core.thaw(&frozen);
            return None;
        };
        let numbers = self.core.pinned_lines(frozen.slot);
        let pins = self.core.loosen_pins(frozen.slot);
        let nodes = &mut self.nodes;
        let taken = numbers
            .into_iter()
            .filter_map(|no| nodes.take_out(no, registry));
        let lines: Vec<TcpStream> = taken.collect();
        debug_assert_eq!(lines.len(), pins.lines(), "a line that is up has a socket");
        let stopped = self.started + Duration::from_micros(frozen.since_us());
        Some(Parcel {
            worker: self.index,
            socket,
            tls,
            state,
            pins,
            lines,
            stopped,
            frozen,
        })
    }

    /// Answers with clients; they come back if nobody waits for them any more.
    pub(super) fn send_parcels(
        &mut self,
        passing: &mut Passing,
        parcels: Vec<Parcel>,
        answer: &SyncSender<Collected>,
    ) {
        use std::sync::mpsc::TrySendError;
        passing.away += parcels.len();
        let all = self.core.sessions.len();
        let left = all - passing.away.min(all);
        let sent = answer.try_send(Collected { parcels, left });
        if let Err(TrySendError::Disconnected(back) | TrySendError::Full(back)) = sent {
            let now_us = self.now_us();
            passing.away -= back.parcels.len();
            for parcel in back.parcels {
                self.take_back(passing, parcel, now_us);
            }
            for frozen in std::mem::take(&mut passing.frozen) {
                self.core.thaw(&frozen);
            }
        }
    }

    fn trial_result(&self, slots: &[u32], is_late: bool) -> Option<Result<(), String>> {
        for slot in slots {
            match self.core.trial_replies(*slot).map(judge) {
                Some(Ok(())) => {}
                Some(Err(words)) => return Some(Err(words)),
                None if is_late => {
                    let words = "a shard does not answer this process";
                    return Some(Err(words.to_owned()));
                }
                None => return None,
            }
        }
        Some(Ok(()))
    }
}

/// Errors of a node are shown to the operator; they name no key but the trial's.
fn judge(replies: &[u8]) -> Result<(), String> {
    let mut lines = replies.split(|byte| *byte == b'\n');
    match lines.find(|line| line.first() == Some(&b'-')) {
        Some(error) => Err(String::from_utf8_lossy(&error[1..]).trim_end().to_owned()),
        None => Ok(()),
    }
}
