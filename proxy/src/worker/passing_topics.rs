//! A worker's part in handing over clients that listen to channels: the marker on both sides.
//!
//! Invariant: a client is stopped no longer than others are ([`QUIET_LIMIT_US`]); if its marker has not
//! come by then, it goes on here, and gets what was kept for it when the marker is ended.

use std::sync::mpsc::SyncSender;

use super::passing::{Collected, Key, Passing};
use super::{Ordering, Worker};
use crate::core::passing::{Frozen, QUIET_LIMIT_US, Settled};
use crate::core::passing_topics::{Listening, Wanted};

/// For nodes to confirm what other clients listened to. They answer in milliseconds; clients are
/// served meanwhile.
const RESERVE_LIMIT_US: u64 = 2_000_000;

/// Stop these clients and collect them once the marker has come. Always answered, if the worker lives.
#[derive(Debug)]
pub(crate) struct Cutting {
    pub(crate) marker: Vec<u8>,
    /// With what was announced of each: whoever listens to something else by now stays.
    pub(crate) clients: Vec<(Key, Listening)>,
    pub(crate) schema_max: u32,
    pub(crate) answer: SyncSender<Collected>,
}

/// Listen for these clients, that will come. Answered with slots and generations once everything is
/// confirmed, or with nothing.
#[derive(Debug)]
pub(crate) struct Reserve {
    pub(crate) marker: Vec<u8>,
    pub(crate) clients: Vec<Listening>,
    pub(crate) answer: SyncSender<Option<Vec<Key>>>,
}

/// A node that answers sends the marker within milliseconds; one that is gone never does.
const ENDING_LIMIT_US: u64 = 2_000_000;

/// What is under way.
#[derive(Debug, Default)]
pub(super) struct Topics {
    cutting: Option<(Cutting, Vec<Frozen>, u64)>,
    reserving: Option<(Reserve, Vec<Key>, u64)>,
    /// Markers whose clients have come while the marker itself is still on its way here, and since when.
    ending: Vec<(Vec<u8>, u64)>,
    /// Where the next clients that listen are looked for, so that all have their turn.
    next_slot: u32,
}

impl Topics {
    pub(super) fn are_under_way(&self) -> bool {
        self.cutting.is_some() || self.reserving.is_some() || !self.ending.is_empty()
    }
}

impl Worker {
    pub(super) fn begin_cutting(&mut self, passing: &mut Passing, cutting: Cutting, now_us: u64) {
        let mut frozen = Vec::new();
        for (key, listening) in &cutting.clients {
            let may_go = self.clients.may_go(key.0, cutting.schema_max);
            let may = may_go && self.is_as_announced(*key, listening);
            let stopped = || self.core.freeze(key.0, cutting.schema_max, true).ok();
            match may.then(stopped).flatten() {
                Some(one) => frozen.push(one),
                None => passing.put_off(*key, now_us),
            }
        }
        let keys: Vec<_> = frozen.iter().map(Frozen::key).collect();
        if !keys.is_empty() && self.core.begin_cut(&cutting.marker, &keys, true) {
            passing.topics.cutting = Some((cutting, frozen, now_us));
            return;
        }
        tracing::debug!(stopped = frozen.len(), "nobody who listens can go now");
        for one in &frozen {
            self.core.thaw(one);
            passing.put_off(one.key(), now_us);
        }
        self.send_parcels(passing, Vec::new(), &cutting.answer);
    }

    /// Some clients that listen and can be told.
    pub(super) fn find_listening(
        &self,
        passing: &mut Passing,
        wanted: Wanted,
        now_us: u64,
    ) -> Vec<(Key, Listening)> {
        let schema_max = wanted.schema_max;
        let may = |slot, generation| {
            !passing.waits(slot, generation, now_us) && self.clients.may_go(slot, schema_max)
        };
        let found = self.core.listening(wanted, passing.topics.next_slot, may);
        if let Some((last, _)) = found.last() {
            passing.topics.next_slot = last + 1;
        }
        let found = found.into_iter().filter_map(|(slot, listening)| {
            let generation = self.core.sessions.get(slot)?.generation;
            Some(((slot, generation), listening))
        });
        found.collect()
    }

    /// True if a client listens to what the other process was told, and is told it so.
    fn is_as_announced(&self, (slot, generation): Key, announced: &Listening) -> bool {
        let client = self.core.sessions.get(slot);
        let same = client.is_some_and(|client| client.generation == generation);
        same && self.core.listening_of(slot).as_ref() == Some(announced)
    }

    pub(super) fn begin_reserving(
        &mut self,
        passing: &mut Passing,
        mut wanted: Reserve,
        now_us: u64,
    ) {
        let mut keys = Vec::new();
        for client in std::mem::take(&mut wanted.clients) {
            let slot = self.core.reserve(client);
            if let Some(client) = self.core.sessions.get(slot) {
                keys.push((slot, client.generation));
            }
        }
        self.shared.clients.fetch_add(keys.len(), Ordering::Relaxed);
        self.core.begin_cut(&wanted.marker, &keys, false);
        passing.topics.reserving = Some((wanted, keys, now_us));
    }

    /// A cut is over for those who gave and took. What the nodes sent before the marker was delivered by
    /// the process that gave, so it is kept from the clients until the marker has come here as well.
    pub(super) fn begin_ending(&mut self, passing: &mut Passing, marker: Vec<u8>, now_us: u64) {
        self.core.forgive_renewed(&marker);
        match self.core.is_cut_heard(&marker) || self.core.gives_cut(&marker) {
            true => self.core.end_cut(&marker),
            false => passing.topics.ending.push((marker, now_us)),
        }
    }

    /// Once per turn.
    pub(super) fn go_on_with_topics(&mut self, passing: &mut Passing, now_us: u64) {
        let core = &mut self.core;
        passing.topics.ending.retain(|(marker, since_us)| {
            core.forgive_renewed(marker);
            let over = core.is_cut_heard(marker) || since_us + ENDING_LIMIT_US <= now_us;
            if over {
                core.end_cut(marker);
            }
            !over
        });
        if let Some((cutting, frozen, since_us)) = passing.topics.cutting.take() {
            if self.core.is_cut_ready(&cutting.marker) {
                self.core.publish_cut(&cutting.marker);
            }
            let late = since_us + QUIET_LIMIT_US <= now_us;
            if late || self.is_cut(&cutting, &frozen) {
                self.answer_cut(passing, &cutting, frozen, now_us);
            } else {
                passing.topics.cutting = Some((cutting, frozen, since_us));
            }
        }
        if let Some((wanted, keys, since_us)) = passing.topics.reserving.take() {
            let late = since_us + RESERVE_LIMIT_US <= now_us;
            let ready = self.core.is_cut_ready(&wanted.marker);
            if !late && !ready {
                passing.topics.reserving = Some((wanted, keys, since_us));
                return;
            }
            if ready && wanted.answer.try_send(Some(keys.clone())).is_ok() {
                return;
            }
            self.core.end_cut(&wanted.marker);
            for (slot, generation) in keys {
                if self.core.sessions.get_same(slot, generation).is_some() {
                    self.core.close_client(slot);
                    self.shared.clients.fetch_sub(1, Ordering::Relaxed);
                }
            }
            let _ = wanted.answer.try_send(None); // whoever asked may have stopped waiting
        }
    }

    /// True if nothing has to be waited for.
    fn is_cut(&self, cutting: &Cutting, frozen: &[Frozen]) -> bool {
        let under_way = self.core.under_way();
        let waits = |one: &Frozen| {
            self.core.settled(one, cutting.schema_max, &under_way) == Settled::NotYet
        };
        self.core.is_cut_heard(&cutting.marker) && !frozen.iter().any(waits)
    }

    fn answer_cut(
        &mut self,
        passing: &mut Passing,
        cutting: &Cutting,
        frozen: Vec<Frozen>,
        now_us: u64,
    ) {
        let heard = self.core.is_cut_heard(&cutting.marker);
        let under_way = self.core.under_way();
        let mut parcels = Vec::new();
        for one in frozen {
            let settled = self.core.settled(&one, cutting.schema_max, &under_way);
            // A SUBSCRIBE that was under way when it was stopped has its effect all the same.
            let announced = cutting.clients.iter().find(|(key, _)| *key == one.key());
            let same = announced.is_some_and(|(key, told)| self.is_as_announced(*key, told));
            if heard && same && settled == Settled::Yes {
                parcels.extend(self.pack(one));
            } else {
                tracing::debug!(heard, same, ?settled, "a client that listens stays for now");
                self.core.thaw(&one);
                passing.put_off(one.key(), now_us);
            }
        }
        self.send_parcels(passing, parcels, &cutting.answer);
    }
}
