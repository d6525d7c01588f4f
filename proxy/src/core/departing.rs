//! Clients that are to go elsewhere: when each is told, when it may be closed, and between which two of
//! its requests.
//!
//! Invariants: before its departure's last seconds a client is closed only between two requests: nothing
//! of it is in flight, unsent, half received, queued, watched or listened to. So what it has asked for is
//! answered, and what it sends afterwards is certainly not executed. A client that was told has most of
//! the time that it was told to leave by itself. At the deadline nobody is left.

use std::collections::HashSet;
use std::sync::Arc;

use super::Core;
use super::client::{Client, Pause};
use super::maintenance;
use super::sessions::CloseReason;

/// Unless whoever sends the clients away says otherwise.
pub const DEPARTURE_US: u64 = 600_000_000;
/// So many clients of a worker a second at most are told to reconnect, or closed: where they go, each
/// takes a connection, perhaps a handshake of TLS, and a login. 10,000 of two workers take 20 s.
const CLIENT_INTERVAL_US: u64 = 4_000;
/// Before a client that is not told is closed: one that has just connected does what it came for.
const GRACE_US: u64 = 2_000_000;
/// What MOVING says, at most: as long as Redis Enterprise gives; libraries wait for half of it if they get no
/// address, and forget the address after it.
const MOVING_S_MAX: u64 = 30;
/// Between looks at a client that was busy. Each look finds a client that asks one thing after the other
/// between two requests about every second time.
const LOOK_US: u64 = 20_000;
/// The same at one that waits for others: it may be one of many that wait until the deadline.
const LOOK_WAITS_US: u64 = 200_000;
/// How long a client must have said nothing to be between two requests, and for how long that is asked of
/// it: the rest of a long pipeline may be on its way, for as long as it takes to the client and back.
/// Who asks one thing after the other without a pause is closed at last as soon as it has its reply.
const SILENCES_US: [(u64, u64); 3] = [(100_000, 10_000_000), (5_000, 20_000_000), (0, u64::MAX)];
/// After the proxy's last byte (FIN): for the client to close its side, so that what it was sent is not
/// lost with a reset. One that does not look at its connection does not see it; it needs no more time.
const LINGER_US: u64 = 2_000_000;
/// Before the deadline, for those that never were between two requests: first those in the midst of
/// something, in its second half those that wait for others (messages, a list's next element).
const LAST_US: u64 = 5_000_000;
/// Of the time that there is, at most: until the last client was told or closed for the first time, for
/// what MOVING says, and for the last ones.
const SPREAD_PART: u64 = 4;
const MOVING_PART: u64 = 4;
const GRACE_PART: u64 = 8;
const SILENCE_PART: u64 = 8;
const LAST_PART: u64 = 10;

/// Where clients find their data from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// At this host:port.
    At(String),
    /// Where they are: another process accepts there.
    Here,
    /// At any other proxy of the instance.
    Anywhere,
}

/// Clients are to go elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departure {
    pub elsewhere: Elsewhere,
    /// The same for all its clients, and no other's: libraries know it by that.
    pub number: i64,
    /// Whoever is left is closed, on the worker's clock.
    pub deadline_us: u64,
}

/// How far a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// It is to be told.
    Tell,
    /// It may leave by itself, or do what it came for.
    Stay,
    /// It is closed as soon as it is between two requests.
    Part,
    /// It was sent the last byte.
    Parted,
    /// It is read no more; what it has asked for is answered.
    Cut,
}

#[derive(Debug)]
struct Leaver {
    slot: u32,
    generation: u32,
    departure: Arc<Departure>,
    step: Step,
    /// Nothing is done before.
    next_us: u64,
    /// From when on it is closed as soon as that can be.
    part_us: u64,
    /// From when on it is no longer waited for, if it is in the midst of something, or waits for others.
    cut_us: u64,
    end_us: u64,
}

impl Leaver {
    fn is_leaving(&self) -> bool {
        matches!(self.step, Step::Parted | Step::Cut)
    }

    /// For how long it must have said nothing.
    fn silence_us(&self, now_us: u64) -> u64 {
        let asked_us = now_us.saturating_sub(self.part_us);
        let all_us = self.departure.deadline_us.saturating_sub(self.part_us);
        let mut silences = SILENCES_US.iter().zip(1..);
        let asked = silences
            .find(|((_, limit_us), no)| asked_us < (*limit_us).min(all_us * no / SILENCE_PART));
        asked.map_or(0, |((silence_us, _), _)| *silence_us)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Departing {
    /// Who comes now leaves, too.
    all: Option<Arc<Departure>>,
    leavers: Vec<Leaver>,
    look_at_us: u64,
}

impl Departing {
    fn find(&mut self, slot: u32, generation: u32) -> Option<&mut Leaver> {
        let is_it = |leaver: &&mut Leaver| (leaver.slot, leaver.generation) == (slot, generation);
        self.leavers.iter_mut().find(is_it)
    }
}

impl Client {
    /// It waits for others, perhaps for ever.
    fn waits(&self) -> bool {
        let extra = self.extra.as_deref();
        extra.is_some_and(|extra| {
            extra.subscriber.is_some() || extra.monitoring.is_some() || extra.wait.is_some()
        })
    }

    /// Closing it now takes nothing away that it has asked for or may count on.
    fn is_between_requests(&self) -> bool {
        let extra = self.extra.as_deref();
        let bound = extra.is_some_and(|extra| extra.watching.is_some() || extra.skips_reply);
        self.pause == Pause::None
            && self.in_flight() == 0
            && self.backlog() == 0
            && !self.sealed
            && self.state.input.is_empty()
            && self.state.transaction.is_none()
            && !(bound || self.waits() || self.is_captured())
    }
}

impl Core {
    /// All clients, and those that come, are to go elsewhere, whatever was said before.
    pub fn depart_all(&mut self, departure: Departure) {
        let departure = Arc::new(departure);
        let mut departing = self.departing.take().unwrap_or_default();
        departing.leavers.retain(|leaver| {
            let client = self.sessions.get(leaver.slot);
            let same = client.is_some_and(|client| client.generation == leaver.generation);
            same && leaver.is_leaving()
        });
        let leaving: HashSet<u32> = departing.leavers.iter().map(|one| one.slot).collect();
        let stays = |slot: &u32| !leaving.contains(slot);
        let slots: Vec<u32> = self.sessions.slots().filter(stays).collect();
        let left_us = departure.deadline_us.saturating_sub(self.now_us);
        let room_us = left_us / SPREAD_PART / (slots.len() as u64).max(1);
        let interval_us = CLIENT_INTERVAL_US.min(room_us);
        for (at, slot) in slots.into_iter().enumerate() {
            let leaver = self.plan(slot, &departure, at as u64 * interval_us);
            departing.leavers.extend(leaver);
        }
        // Who comes to where all are to go is in the right place.
        let comes = departure.elsewhere != Elsewhere::Here;
        departing.all = comes.then_some(departure);
        departing.look_at_us = 0;
        self.departing = Some(departing);
        self.out.unsteady = true;
    }

    /// One client is to go elsewhere.
    pub fn depart(&mut self, slot: u32, departure: &Departure) {
        let mut departing = self.departing.take().unwrap_or_default();
        departing.leavers.retain(|leaver| leaver.slot != slot);
        let left_us = departure.deadline_us.saturating_sub(self.now_us);
        let behind_us = departing.leavers.len() as u64 * CLIENT_INTERVAL_US;
        let departure = Arc::new(departure.clone());
        let leaver = self.plan(slot, &departure, behind_us.min(left_us / SPREAD_PART));
        departing.leavers.extend(leaver);
        departing.look_at_us = 0;
        self.departing = Some(departing);
        self.out.unsteady = true;
    }

    /// Nobody is to go any more. Who has been sent the last byte goes nevertheless.
    pub fn stay(&mut self) {
        if let Some(departing) = &mut self.departing {
            departing.all = None;
            departing.leavers.retain(Leaver::is_leaving);
        }
    }

    /// Clients are to go, or were.
    #[inline]
    #[must_use]
    pub fn is_departing(&self) -> bool {
        self.departing.is_some()
    }

    /// A client that comes to a process whose clients are to go.
    #[inline]
    pub(super) fn depart_newcomer(&mut self, slot: u32) {
        let all = self
            .departing
            .as_ref()
            .and_then(|departing| departing.all.clone());
        if let Some(departure) = all {
            self.depart(slot, &departure);
        }
    }

    /// A client has asked to be told, and is to go already.
    pub(super) fn tell_late(&mut self, slot: u32) {
        let now_us = self.now_us;
        let (Some(departing), Some(client)) = (&mut self.departing, self.sessions.get(slot)) else {
            return;
        };
        let leaver = departing.find(slot, client.generation);
        if let Some(leaver) = leaver.filter(|l| matches!(l.step, Step::Stay | Step::Part)) {
            (leaver.step, leaver.next_us) = (Step::Tell, now_us);
            departing.look_at_us = 0;
            self.out.unsteady = true;
        }
    }

    fn plan(&self, slot: u32, departure: &Arc<Departure>, behind_us: u64) -> Option<Leaver> {
        let client = self.sessions.get(slot)?;
        let left_us = departure.deadline_us.saturating_sub(self.now_us);
        let last_us = LAST_US.min(left_us / LAST_PART);
        let (step, wait_us) = match client.state.moving {
            Some(_) => (Step::Tell, 0),
            None => (Step::Stay, GRACE_US.min(left_us / GRACE_PART)),
        };
        Some(Leaver {
            slot,
            generation: client.generation,
            departure: Arc::clone(departure),
            step,
            next_us: self.now_us + wait_us + behind_us,
            part_us: u64::MAX,
            cut_us: departure.deadline_us.saturating_sub(last_us),
            // Not all at one time, but nobody past the deadline.
            end_us: (departure.deadline_us).saturating_sub(behind_us % (last_us / 2).max(1)),
        })
    }

    /// Goes on with those that are to go; returns when to look again.
    pub(super) fn depart_on_time(&mut self) -> Option<u64> {
        let departing = self.departing.as_mut()?;
        if departing.leavers.is_empty() {
            return None;
        }
        if departing.look_at_us > self.now_us {
            return Some(departing.look_at_us);
        }
        let mut leavers = std::mem::take(&mut departing.leavers);
        leavers.retain_mut(|leaver| leaver.next_us > self.now_us || self.send_off(leaver));
        let next_us = leavers.iter().map(|leaver| leaver.next_us).min();
        if let Some(departing) = &mut self.departing {
            departing.leavers = leavers;
            departing.look_at_us = next_us.unwrap_or_default();
        }
        next_us
    }

    /// False: the client is gone, or as good as.
    fn send_off(&mut self, leaver: &mut Leaver) -> bool {
        let (slot, generation, now_us) = (leaver.slot, leaver.generation, self.now_us);
        let deadline_us = leaver.departure.deadline_us;
        let Some(client) = self.sessions.get_same(slot, generation) else {
            return false;
        };
        let (frozen, waits) = (client.pause == Pause::Frozen, client.waits());
        let heard_us = client.heard_us;
        let cut_us = if waits { leaver.end_us } else { leaver.cut_us };
        let is_leaving = leaver.is_leaving();
        if now_us >= deadline_us || leaver.step == Step::Parted {
            self.counters.departed_late += u64::from(!is_leaving);
            self.sessions.doom(slot, CloseReason::Done);
            return false;
        }
        if frozen || is_leaving {
            leaver.next_us = now_us + LOOK_US; // on its way to another process, or nearly done
        } else if now_us >= cut_us {
            self.counters.departed_late += 1;
            if waits {
                self.sessions.doom(slot, CloseReason::Done);
                return false;
            }
            leaver.step = Step::Cut;
            leaver.next_us = now_us + LOOK_US;
            self.client_hung_up(slot);
        } else if leaver.step == Step::Tell {
            self.tell_where(leaver);
        } else {
            leaver.step = Step::Part;
            leaver.part_us = leaver.part_us.min(now_us);
            leaver.next_us = now_us + if waits { LOOK_WAITS_US } else { LOOK_US };
            if !waits && heard_us + leaver.silence_us(now_us) <= now_us {
                self.out.partings.push((slot, generation));
            }
        }
        let next_us = if now_us < cut_us { cut_us } else { deadline_us };
        leaver.next_us = leaver.next_us.min(next_us);
        true
    }

    /// Tells a client where to go, if it wants to know and that does no harm.
    fn tell_where(&mut self, leaver: &mut Leaver) {
        let departure = &leaver.departure;
        let left_us = departure.deadline_us.saturating_sub(self.now_us);
        let own = self.identity.advertise.as_deref();
        let client = self.sessions.get(leaver.slot);
        let told =
            client.and_then(|c| c.told_address(&departure.elsewhere, own, self.identity.port));
        leaver.step = Step::Stay;
        let Some(address) = told else {
            leaver.next_us = self.now_us + GRACE_US.min(left_us / GRACE_PART);
            return;
        };
        let seconds = (left_us / MOVING_PART / 1_000_000).clamp(1, MOVING_S_MAX);
        let push = maintenance::moving(departure, seconds, address.as_deref());
        self.sessions.push(leaver.slot, leaver.generation, &push);
        self.counters.departures_told += 1;
        // Libraries that get no address go after half of it.
        leaver.next_us = self.now_us + seconds * 750_000;
    }

    /// Whether a client of [`super::outbox::Outbox::partings`] is between two requests, as far as is
    /// known here; what lies in its socket is not.
    #[must_use]
    pub fn may_part(&self, slot: u32, generation: u32) -> bool {
        let client = self
            .sessions
            .get(slot)
            .filter(|c| c.generation == generation);
        client.is_some_and(|client| {
            let unheard =
                client.is_muted() && (self.jobs.has_one_of(slot) || self.weaves.has_one_of(slot));
            client.is_between_requests() && !unheard
        })
    }

    /// The client was sent the last byte: what it sends from now on is not read.
    pub fn parted(&mut self, slot: u32, generation: u32) {
        let until_us = self.now_us + LINGER_US;
        self.sessions.leave(slot);
        self.counters.departed += 1;
        let Some(departing) = &mut self.departing else {
            return;
        };
        if let Some(leaver) = departing.find(slot, generation) {
            leaver.step = Step::Parted;
            leaver.next_us = until_us.min(leaver.departure.deadline_us);
            self.out.unsteady = true;
        }
    }
}
