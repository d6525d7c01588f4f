//! A copy of the store's records in memory, kept true by a watch.
//!
//! Decisions read it; writes go to the store by compare-and-swap against the revisions it holds,
//! so a copy that is behind costs a conflict, never a wrong write.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use slotmesh_proto::store::v1 as records;
use slotmesh_task::Task;
use slotmesh_topology::{HostId, Instance, InstanceId, Shard, ShardId, TaskId, wire::WireError};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::store::{
    Event, KeyValue, Listing, Store, StoreError,
    keys::{self, Key},
};

/// How long a writer waits for its own write to appear in the mirror. A watch is only that far
/// behind when the store is in trouble.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(5);
/// Between attempts while the store does not answer.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// A record and the revision at which it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The record.
    pub value: T,
    /// To compare with when it is written again.
    pub mod_revision: u64,
}

/// All records that decisions depend on.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// The store's revision that this shows.
    pub revision: u64,
    /// Instances by id.
    pub instances: BTreeMap<InstanceId, Versioned<Instance>>,
    /// Shards by instance and id.
    pub shards: BTreeMap<(InstanceId, ShardId), Versioned<Shard>>,
    /// Tasks by id; ids sort by time.
    pub tasks: BTreeMap<TaskId, Versioned<Task>>,
    /// Which task has which shard.
    pub locks: BTreeMap<(InstanceId, ShardId), TaskId>,
    /// Addresses of the controllers that serve, by id.
    pub controllers: BTreeMap<String, String>,
    /// Hosts by id, those too whose lease has run out while this copy was kept.
    pub hosts: BTreeMap<HostId, HostEntry>,
}

/// A host as its record says, or said last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEntry {
    /// Where its agent's API is.
    pub agent_address: String,
    /// Its failure domain.
    pub zone: String,
    /// The revision at which its lease began; `None`: it has run out.
    pub leased_since: Option<u64>,
}

impl State {
    /// Shards of one instance, by index.
    #[must_use]
    pub fn shards_of(&self, instance: &InstanceId) -> Vec<Versioned<Shard>> {
        let mut shards: Vec<_> = self
            .shards
            .iter()
            .filter(|((owner, _), _)| owner == instance)
            .map(|(_, shard)| shard.clone())
            .collect();
        shards.sort_by_key(|s| s.value.index);
        shards
    }

    fn put(&mut self, item: &KeyValue) -> Result<(), StoreError> {
        let corrupt = |source: WireError| StoreError::Corrupt {
            reason: format!("record at {}", item.key),
            source: Some(Box::new(source)),
        };
        match Key::parse(&item.key) {
            Some(Key::Instance { instance }) => {
                let record: records::InstanceRecord = keys::decode(item)?;
                let value = slotmesh_topology::wire::instance_from(&record).map_err(corrupt)?;
                let versioned = Versioned {
                    value,
                    mod_revision: item.mod_revision,
                };
                self.instances.insert(instance.into(), versioned);
            }
            Some(Key::Shard { instance, shard }) => {
                let record: records::ShardRecord = keys::decode(item)?;
                let value = slotmesh_topology::wire::shard_from(&record).map_err(corrupt)?;
                let versioned = Versioned {
                    value,
                    mod_revision: item.mod_revision,
                };
                self.shards
                    .insert((instance.into(), shard.into()), versioned);
            }
            Some(Key::Task { task }) => {
                let record: records::TaskRecord = keys::decode(item)?;
                let value = slotmesh_task::wire::task_from(&record).map_err(corrupt)?;
                let versioned = Versioned {
                    value,
                    mod_revision: item.mod_revision,
                };
                self.tasks.insert(task.into(), versioned);
            }
            Some(Key::Controller { controller }) => {
                let record: records::ControllerRecord = keys::decode(item)?;
                self.controllers.insert(controller.into(), record.address);
            }
            Some(Key::Host { host }) => {
                let record: records::HostRecord = keys::decode(item)?;
                let entry = HostEntry {
                    agent_address: record.agent_address,
                    zone: record.zone,
                    leased_since: Some(item.create_revision),
                };
                self.hosts.insert(host.into(), entry);
            }
            Some(Key::Lock { instance, shard }) => {
                let record: records::LockRecord = keys::decode(item)?;
                self.locks
                    .insert((instance.into(), shard.into()), record.task_id.into());
            }
            _ => {}
        }
        Ok(())
    }

    /// A host's key is gone. What was known of it stays while shards have nodes there: whose promise
    /// stands for a lease does not change with leases.
    fn end_lease(&mut self, host: &HostId) {
        let mut members = self.shards.values().flat_map(|s| &s.value.members);
        if !members.any(|m| m.host == *host) {
            self.hosts.remove(host);
        } else if let Some(entry) = self.hosts.get_mut(host) {
            entry.leased_since = None;
        }
    }

    /// Takes over what another copy shows at `key`.
    fn keep(&mut self, key: &str, from: &Self) {
        match Key::parse(key) {
            Some(Key::Instance { instance }) => {
                let id = InstanceId::from(instance);
                self.instances
                    .extend(from.instances.get(&id).map(|found| (id, found.clone())));
            }
            Some(Key::Shard { instance, shard }) => {
                let id = (instance.into(), shard.into());
                self.shards
                    .extend(from.shards.get(&id).map(|found| (id, found.clone())));
            }
            Some(Key::Task { task }) => {
                let id = TaskId::from(task);
                self.tasks
                    .extend(from.tasks.get(&id).map(|found| (id, found.clone())));
            }
            Some(Key::Controller { controller }) => {
                let found = from.controllers.get(controller);
                self.controllers
                    .extend(found.map(|found| (controller.to_owned(), found.clone())));
            }
            Some(Key::Host { host }) => {
                let id = HostId::from(host);
                self.hosts
                    .extend(from.hosts.get(&id).map(|found| (id, found.clone())));
            }
            Some(Key::Lock { instance, shard }) => {
                let id = (instance.into(), shard.into());
                self.locks
                    .extend(from.locks.get(&id).map(|found| (id, found.clone())));
            }
            _ => {}
        }
    }

    fn delete(&mut self, key: &str) {
        match Key::parse(key) {
            Some(Key::Instance { instance }) => {
                self.instances.remove(&instance.into());
            }
            Some(Key::Shard { instance, shard }) => {
                self.shards.remove(&(instance.into(), shard.into()));
            }
            Some(Key::Task { task }) => {
                self.tasks.remove(&task.into());
            }
            Some(Key::Controller { controller }) => {
                self.controllers.remove(controller);
            }
            Some(Key::Host { host }) => self.end_lease(&host.into()),
            Some(Key::Lock { instance, shard }) => {
                self.locks.remove(&(instance.into(), shard.into()));
            }
            _ => {}
        }
    }
}

/// The copy, shared.
#[derive(Clone, Debug)]
pub struct Mirror {
    state: watch::Receiver<State>,
}

impl Mirror {
    /// Lists the store, then follows it until `shutdown`.
    ///
    /// # Errors
    /// When the first listing fails or holds a record that can't be read.
    pub async fn start(
        store: Arc<dyn Store>,
        shutdown: CancellationToken,
    ) -> Result<(Self, JoinHandle<()>), StoreError> {
        let first = load(&store.list(keys::ROOT).await?)?;
        let (sender, state) = watch::channel(first);
        let worker = tokio::spawn(follow(store, sender, shutdown));
        Ok((Self { state }, worker))
    }

    /// A receiver of its own: changed whenever a record changed.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Looks at the records.
    pub fn read<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        look(&self.state.borrow())
    }

    /// Waits until the mirror shows `revision`; false when it does not in time.
    pub async fn shows(&self, revision: u64) -> bool {
        let mut state = self.state.clone();
        let caught_up = state.wait_for(|s| s.revision >= revision);
        matches!(
            tokio::time::timeout(CATCH_UP_TIMEOUT, caught_up).await,
            Ok(Ok(_))
        )
    }
}

fn load(listing: &Listing) -> Result<State, StoreError> {
    let mut state = State {
        revision: listing.revision,
        ..State::default()
    };
    for item in &listing.items {
        state.put(item)?;
    }
    Ok(state)
}

async fn follow(store: Arc<dyn Store>, sender: watch::Sender<State>, shutdown: CancellationToken) {
    loop {
        let ended = tokio::select! {
            () = shutdown.cancelled() => return,
            ended = follow_once(&*store, &sender) => ended,
        };
        match ended {
            Err(StoreError::Compacted { .. }) => {
                warn!("the store has compacted what the mirror had not seen; listing again");
                if let Err(error) = relist(&*store, &sender).await {
                    warn!(%error, "list the store");
                }
            }
            Err(error @ StoreError::Unavailable { .. }) => {
                warn!(%error, "the mirror is behind");
            }
            Err(error) => error!(%error, "a record can't be read; the mirror is behind"),
            Ok(()) => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY_PAUSE) => {}
        }
    }
}

async fn relist(store: &dyn Store, sender: &watch::Sender<State>) -> Result<(), StoreError> {
    let listing = store.list(keys::ROOT).await?;
    let state = load_beside(&listing, &sender.borrow());
    sender.send_replace(state);
    Ok(())
}

/// Like a watch, it stays with the old version of a record that can't be read, and shows the
/// others: one record must not end the news of all.
fn load_beside(listing: &Listing, old: &State) -> State {
    let mut state = State {
        revision: listing.revision,
        ..State::default()
    };
    for item in &listing.items {
        if let Err(error) = state.put(item) {
            error!(%error, "a record can't be read; its old version stays");
            state.keep(&item.key, old);
        }
    }
    for (host, entry) in &old.hosts {
        if !state.hosts.contains_key(host) {
            state.hosts.insert(host.clone(), entry.clone());
            state.end_lease(host);
        }
    }
    state
}

async fn follow_once(store: &dyn Store, sender: &watch::Sender<State>) -> Result<(), StoreError> {
    let from = sender.borrow().revision + 1;
    let mut watch = store.watch(keys::ROOT, from).await?;
    loop {
        let change = watch.next().await?;
        let mut failed = None;
        sender.send_modify(|state| {
            for event in &change.events {
                match event {
                    Event::Put(item) => {
                        if let Err(error) = state.put(item) {
                            failed = Some(error);
                        }
                    }
                    Event::Delete { key } => state.delete(key),
                }
            }
            state.revision = change.revision;
        });
        if let Some(error) = failed {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{EmbeddedStore, Txn};

    #[test]
    fn a_record_that_cannot_be_read_keeps_its_old_version_and_hides_no_other() {
        let lock = |shard, value| KeyValue {
            key: Key::Lock {
                instance: "i",
                shard,
            }
            .to_string(),
            value,
            mod_revision: 1,
            create_revision: 1,
        };
        let of = |task: &str| {
            keys::encode(records::LockRecord {
                schema: 0,
                task_id: task.to_owned(),
            })
        };
        let listing = |revision, items| Listing { revision, items };
        let old = load(&listing(1, vec![lock("0", of("t"))])).unwrap();
        let items = vec![lock("0", vec![0xff]), lock("1", of("u"))];
        assert!(load(&listing(2, items.clone())).is_err(), "at start");
        let new = load_beside(&listing(2, items), &old);
        let locks: Vec<_> = new.locks.into_values().collect();
        assert_eq!((new.revision, locks), (2, vec!["t".into(), "u".into()]));
    }

    #[tokio::test]
    async fn shows_what_was_there_and_what_comes() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let lock = |task: &str| {
            keys::encode(records::LockRecord {
                schema: 0,
                task_id: task.to_owned(),
            })
        };
        let key = |shard| Key::Lock {
            instance: "i",
            shard,
        };
        assert!(matches!(
            store.txn(Txn::new().put(key("0"), lock("t"))).await,
            Ok(crate::store::TxnOutcome::Committed { .. })
        ));
        let stop = CancellationToken::new();
        let (mirror, worker) = Mirror::start(store.clone(), stop.clone()).await.unwrap();
        assert_eq!(mirror.read(|s| s.locks.len()), 1);
        let txn = Txn::new().put(key("1"), lock("u")).delete(key("0"));
        let Ok(crate::store::TxnOutcome::Committed { revision }) = store.txn(txn).await else {
            panic!("committed")
        };
        assert!(mirror.shows(revision).await);
        let locks = mirror.read(|s| s.locks.clone());
        assert_eq!(locks.into_values().collect::<Vec<_>>(), [TaskId::from("u")]);
        stop.cancel();
        worker.await.unwrap();
    }
}
