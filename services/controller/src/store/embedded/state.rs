//! The embedded store's data: pure, so that what it decides can be tested without a clock or disk.
//!
//! Invariant: [`State::apply`] takes changes in revision order, and only changes that
//! [`State::prepare`] made; nothing else moves the revision.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use tokio::time::Instant;

use crate::store::{
    Compare, Event, KeyValue, LeaseId, Listing, Op, StoreError, Txn, TxnOutcome, WatchEvents,
};

/// How much history a slow watch may lag before it must list again. A revision is one transaction;
/// the busiest thing we do, a switchover of 50 shards, makes some hundreds.
const MAX_HISTORY_REVISIONS: usize = 10_000;
/// Memory that history may take. Values are small, but each may be 1 MiB.
const MAX_HISTORY_BYTES: usize = 64 * 1024 * 1024;
/// Leases held at once: one a controller, host and proxy, with room for a mesh of thousands.
const MAX_LEASES: usize = 100_000;

#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) item: KeyValue,
    pub(super) lease: Option<LeaseId>,
}

#[derive(Debug)]
pub(super) enum Write {
    Put(Stored),
    Delete(String),
}

impl Write {
    fn key(&self) -> &str {
        match self {
            Self::Put(stored) => &stored.item.key,
            Self::Delete(key) => key,
        }
    }
}

/// All that one revision changes.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) writes: Vec<Write>,
}

/// Changes that are decided and not yet durable, so not yet visible to readers. Later
/// transactions of the same batch are decided on top of them.
#[derive(Debug, Default)]
pub(super) struct Staged {
    pub(super) changes: Vec<Change>,
    /// Where in `changes` a key was written last.
    latest: BTreeMap<String, (usize, usize)>,
}

impl Staged {
    fn push(&mut self, change: Change) {
        let index = self.changes.len();
        for (n, write) in change.writes.iter().enumerate() {
            self.latest.insert(write.key().to_owned(), (index, n));
        }
        self.changes.push(change);
    }
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    deadline: Instant,
}

#[derive(Debug)]
pub(super) struct State {
    revision: u64,
    compacted: u64,
    items: BTreeMap<String, Stored>,
    history: VecDeque<WatchEvents>,
    history_bytes: usize,
    leases: BTreeMap<LeaseId, Lease>,
    last_lease: i64,
}

impl State {
    /// A store that was at `revision` with `items`, and remembers no history.
    pub(super) fn new(revision: u64, items: impl IntoIterator<Item = KeyValue>) -> Self {
        let items = items.into_iter().map(|i| {
            (
                i.key.clone(),
                Stored {
                    item: i,
                    lease: None,
                },
            )
        });
        Self {
            revision,
            compacted: revision,
            items: items.collect(),
            history: VecDeque::new(),
            history_bytes: 0,
            leases: BTreeMap::new(),
            last_lease: 0,
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<KeyValue> {
        self.items.get(key).map(|stored| stored.item.clone())
    }

    pub(super) fn list(&self, prefix: &str) -> Listing {
        let items = self.items.range(prefix.to_owned()..);
        let items = items.take_while(|(key, _)| key.starts_with(prefix));
        Listing {
            revision: self.revision,
            items: items.map(|(_, stored)| stored.item.clone()).collect(),
        }
    }

    /// Decides a transaction on top of what is staged, and stages its change.
    pub(super) fn prepare(
        &self,
        staged: &mut Staged,
        txn: &mut Txn,
    ) -> Result<TxnOutcome, StoreError> {
        for op in &txn.ops {
            if let Op::Put {
                lease: Some(lease), ..
            } = op
                && !self.leases.contains_key(lease)
            {
                return Err(StoreError::LeaseExpired { lease: *lease });
            }
        }
        let holds = txn.compares.iter().all(|compare| match compare {
            Compare::ModRevision { key, revision } => {
                self.current(staged, key).map_or(0, |s| s.item.mod_revision) == *revision
            }
            Compare::CreateRevision { key, revision } => {
                self.current(staged, key)
                    .map_or(0, |s| s.item.create_revision)
                    == *revision
            }
        });
        if !holds {
            return Ok(TxnOutcome::Conflict);
        }
        let at = staged
            .changes
            .last()
            .map_or(self.revision, |change| change.revision);
        let revision = at + 1;
        let mut writes = Vec::with_capacity(txn.ops.len());
        for op in txn.ops.drain(..) {
            match op {
                Op::Put { key, value, lease } => {
                    let was = self.current(staged, &key);
                    let create_revision = was.map_or(revision, |s| s.item.create_revision);
                    let item = KeyValue {
                        key,
                        value,
                        mod_revision: revision,
                        create_revision,
                    };
                    writes.push(Write::Put(Stored { item, lease }));
                }
                Op::Delete { key } => {
                    if self.current(staged, &key).is_some() {
                        writes.push(Write::Delete(key));
                    }
                }
            }
        }
        if writes.is_empty() {
            return Ok(TxnOutcome::Committed { revision: at });
        }
        staged.push(Change { revision, writes });
        Ok(TxnOutcome::Committed { revision })
    }

    fn current<'a>(&'a self, staged: &'a Staged, key: &str) -> Option<&'a Stored> {
        match staged.latest.get(key) {
            Some(&(change, write)) => match &staged.changes[change].writes[write] {
                Write::Put(stored) => Some(stored),
                Write::Delete(_) => None,
            },
            None => self.items.get(key),
        }
    }

    /// Makes a durable change visible.
    pub(super) fn apply(&mut self, change: Change) {
        assert_eq!(
            change.revision,
            self.revision + 1,
            "changes are applied in order"
        );
        self.revision = change.revision;
        let mut events = Vec::with_capacity(change.writes.len());
        for write in change.writes {
            match write {
                Write::Put(stored) => {
                    events.push(Event::Put(stored.item.clone()));
                    self.items.insert(stored.item.key.clone(), stored);
                }
                Write::Delete(key) => {
                    self.items.remove(&key);
                    events.push(Event::Delete { key });
                }
            }
        }
        let entry = WatchEvents {
            revision: change.revision,
            events,
        };
        self.history_bytes += bytes_of(&entry);
        self.history.push_back(entry);
        while self.history.len() > MAX_HISTORY_REVISIONS || self.history_bytes > MAX_HISTORY_BYTES {
            self.forget_oldest();
        }
    }

    /// The first revision from `from` on that changed something below `prefix`, or, if there is
    /// none yet, the revision to look from next time.
    pub(super) fn events(&self, prefix: &str, from: u64) -> Result<NextEvents, StoreError> {
        if from <= self.compacted {
            return Err(StoreError::Compacted {
                revision: self.compacted,
            });
        }
        let start = self.history.partition_point(|entry| entry.revision < from);
        for entry in self.history.range(start..) {
            let events = entry
                .events
                .iter()
                .filter(|event| event.key().starts_with(prefix));
            let events: Vec<Event> = events.cloned().collect();
            if !events.is_empty() {
                return Ok(NextEvents::Some(WatchEvents {
                    revision: entry.revision,
                    events,
                }));
            }
        }
        Ok(NextEvents::NoneBefore(from.max(self.revision + 1)))
    }

    pub(super) fn compact(&mut self, revision: u64) -> Result<(), StoreError> {
        if revision > self.revision {
            let reason = format!("can't compact revision {revision} at {}", self.revision);
            return Err(StoreError::Invalid { reason });
        }
        while self
            .history
            .front()
            .is_some_and(|entry| entry.revision <= revision)
        {
            self.forget_oldest();
        }
        self.compacted = self.compacted.max(revision);
        Ok(())
    }

    fn forget_oldest(&mut self) {
        if let Some(entry) = self.history.pop_front() {
            self.history_bytes -= bytes_of(&entry);
            self.compacted = entry.revision;
        }
    }

    pub(super) fn grant(&mut self, ttl: Duration, now: Instant) -> Result<LeaseId, StoreError> {
        if self.leases.len() >= MAX_LEASES {
            let (size, limit) = (self.leases.len() + 1, MAX_LEASES);
            return Err(StoreError::TooLarge {
                what: "number of leases",
                size,
                limit,
            });
        }
        self.last_lease += 1;
        let id = LeaseId::from_raw(self.last_lease);
        self.leases.insert(
            id,
            Lease {
                ttl,
                deadline: now + ttl,
            },
        );
        Ok(id)
    }

    pub(super) fn keep_alive(&mut self, id: LeaseId, now: Instant) -> Result<Duration, StoreError> {
        match self.leases.get_mut(&id) {
            // A lease that ran out is gone, even if nobody has collected it yet.
            Some(lease) if lease.deadline > now => {
                lease.deadline = now + lease.ttl;
                Ok(lease.ttl)
            }
            _ => Err(StoreError::LeaseExpired { lease: id }),
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.deadline).min()
    }

    pub(super) fn expired(&self, now: Instant) -> Vec<LeaseId> {
        let leases = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.deadline <= now);
        leases.map(|(id, _)| *id).collect()
    }

    /// Ends a lease and stages the deletion of its keys, at one revision.
    pub(super) fn end_lease(&mut self, id: LeaseId, staged: &mut Staged) {
        self.leases.remove(&id);
        let keys = self
            .items
            .values()
            .filter(|stored| stored.lease == Some(id));
        let ops: Vec<Op> = keys
            .map(|s| Op::Delete {
                key: s.item.key.clone(),
            })
            .collect();
        if !ops.is_empty() {
            let mut txn = Txn {
                compares: Vec::new(),
                ops,
            };
            // No lease is put and nothing compared: it can neither fail nor conflict.
            let outcome = self.prepare(staged, &mut txn);
            debug_assert!(matches!(outcome, Ok(TxnOutcome::Committed { .. })));
        }
    }
}

#[derive(Debug)]
pub(super) enum NextEvents {
    Some(WatchEvents),
    /// Nothing matches below this revision.
    NoneBefore(u64),
}

fn bytes_of(entry: &WatchEvents) -> usize {
    let bytes = |event: &Event| match event {
        Event::Put(item) => item.key.len() + item.value.len(),
        Event::Delete { key } => key.len(),
    };
    entry.events.iter().map(bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(state: &mut State, txn: Txn) -> TxnOutcome {
        let mut staged = Staged::default();
        let outcome = state.prepare(&mut staged, &mut txn.clone()).unwrap();
        staged
            .changes
            .into_iter()
            .for_each(|change| state.apply(change));
        outcome
    }

    #[test]
    fn a_batch_is_decided_on_top_of_its_own_earlier_transactions() {
        let mut state = State::new(0, []);
        let mut staged = Staged::default();
        let mut create = Txn::new().absent("/a").put("/a", "1");
        let mut again = create.clone();
        let mut delete = Txn::new().unchanged("/a", 1).delete("/a");
        let mut back = Txn::new().absent("/a").put("/a", "2");
        let committed = |revision| TxnOutcome::Committed { revision };
        assert_eq!(
            state.prepare(&mut staged, &mut create).unwrap(),
            committed(1)
        );
        assert_eq!(
            state.prepare(&mut staged, &mut again).unwrap(),
            TxnOutcome::Conflict
        );
        assert_eq!(
            state.prepare(&mut staged, &mut delete).unwrap(),
            committed(2)
        );
        assert_eq!(state.prepare(&mut staged, &mut back).unwrap(), committed(3));
        assert_eq!(
            state.get("/a"),
            None,
            "nothing is visible before it is applied"
        );
        staged
            .changes
            .into_iter()
            .for_each(|change| state.apply(change));
        assert_eq!(state.get("/a").unwrap().create_revision, 3);
    }

    #[test]
    fn history_is_bounded_and_what_it_forgets_counts_as_compacted() {
        let mut state = State::new(0, []);
        for _ in 0..MAX_HISTORY_REVISIONS + 5 {
            let _ = commit(&mut state, Txn::new().put("/a", "x"));
        }
        assert!(matches!(
            state.events("/", 5),
            Err(StoreError::Compacted { revision: 5 })
        ));
        assert!(matches!(state.events("/", 6), Ok(NextEvents::Some(e)) if e.revision == 6));

        let mut state = State::new(0, []);
        for _ in 0..MAX_HISTORY_BYTES / (1024 * 1024) + 3 {
            let _ = commit(&mut state, Txn::new().put("/a", vec![0; 1024 * 1024]));
        }
        assert!(state.history_bytes <= MAX_HISTORY_BYTES);
        assert!(matches!(
            state.events("/", 1),
            Err(StoreError::Compacted { .. })
        ));
    }

    #[test]
    fn a_lease_that_ran_out_takes_neither_keys_nor_keep_alives() {
        let mut state = State::new(0, []);
        let start = Instant::now();
        let lease = state.grant(Duration::from_secs(2), start).unwrap();
        let late = start + Duration::from_secs(2);
        assert!(matches!(
            state.keep_alive(lease, late),
            Err(StoreError::LeaseExpired { .. })
        ));
        assert_eq!(state.expired(late), [lease]);
        state.end_lease(lease, &mut Staged::default());
        let put = state.prepare(
            &mut Staged::default(),
            &mut Txn::new().put_leased("/a", "", lease),
        );
        assert!(matches!(put, Err(StoreError::LeaseExpired { .. })));
    }
}
