//! Forgets what nobody asks for any more, so that neither the store nor the hub grows with time:
//! ended tasks with their events, idempotency records, records of old epochs, and reports of what no
//! record names.

use slotmesh_proto::store::v1 as records;
use slotmesh_topology::TaskId;
use tracing::{info, warn};

use super::{DriveError, Driver};
use crate::{
    clock,
    leader::LeaderOutcome,
    store::keys::{self, Key},
};

/// How often it looks.
pub(super) const INTERVAL_MS: u64 = 10 * 60 * 1_000;
/// Ended tasks that are kept, whatever their age.
const TASKS_KEPT: usize = 1_000;
/// A token can be repeated for this long.
const TOKEN_MS_MAX: u64 = 24 * 60 * 60 * 1_000;
/// Epochs that are kept of each shard.
const EPOCHS_KEPT: usize = 1_000;
/// Epochs of an instance that is gone are kept for this long.
const EPOCHS_MS_MAX: u64 = 30 * 24 * 60 * 60 * 1_000;
/// Deletions in one transaction; below the store's bound on operations, with room for compares.
const DELETIONS_MAX: usize = 100;
/// Tasks forgotten in one go; the rest follows the next time.
const TASKS_PER_RUN_MAX: usize = 200;

impl Driver {
    pub(super) async fn forget_the_old(&self) -> Result<(), DriveError> {
        let (nodes, proxies) = self.mirror.read(|state| {
            let members = state.shards.values().flat_map(|s| &s.value.members);
            let proxies = state.instances.values().flat_map(|i| i.value.all_proxies());
            (
                members.map(|m| m.node.clone()).collect(),
                proxies.map(|p| p.proxy.clone()).collect(),
            )
        });
        self.hub.forget_others(&nodes, &proxies);
        let ended: Vec<(TaskId, u64)> = self.mirror.read(|state| {
            let ended = state
                .tasks
                .values()
                .rev()
                .filter(|t| t.value.state.is_ended() && !t.value.is_parked());
            let old = ended.skip(TASKS_KEPT).take(TASKS_PER_RUN_MAX);
            old.map(|t| (t.value.id.clone(), t.value.event_count))
                .collect()
        });
        let mut doomed: Vec<String> = Vec::new();
        for (task, events) in &ended {
            let task = task.as_str();
            doomed.extend((1..=*events).map(|number| Key::TaskEvent { task, number }.to_string()));
            // The task goes last: until then its events can be found by their numbers.
            doomed.push(Key::Task { task }.to_string());
        }
        let limit_ms = clock::now_ms().saturating_sub(TOKEN_MS_MAX);
        for item in self.store.list(keys::IDEMPOTENCY).await?.items {
            match keys::decode::<records::IdempotencyRecord>(&item) {
                Ok(record) if record.created_unix_ms < limit_ms => doomed.push(item.key),
                Ok(_) => {}
                Err(error) => warn!(%error, "record left where it is"),
            }
        }
        doomed.extend(self.old_epochs().await?);
        for some in doomed.chunks(DELETIONS_MAX) {
            let txn = some
                .iter()
                .fold(self.term.txn(), |txn, key| txn.delete(key.clone()));
            if txn.commit(&*self.store).await? == LeaderOutcome::Deposed {
                return Err(DriveError::Deposed);
            }
        }
        if !doomed.is_empty() {
            info!(
                tasks = ended.len(),
                keys = doomed.len(),
                "old records forgotten"
            );
        }
        Ok(())
    }
}

impl Driver {
    /// Records of epochs that nobody asks for any more.
    async fn old_epochs(&self) -> Result<Vec<String>, DriveError> {
        let now_ms = clock::now_ms();
        let mut doomed = Vec::new();
        let mut of_shard = (String::new(), 0);
        // The newest of each shard first.
        for item in self.store.list(keys::AUDIT).await?.items.into_iter().rev() {
            let Some(Key::Audit {
                instance, shard, ..
            }) = Key::parse(&item.key)
            else {
                continue;
            };
            let id = format!("{instance}/{shard}");
            of_shard = match of_shard {
                (last, count) if last == id => (last, count + 1),
                _ => (id, 1),
            };
            let is_known = self
                .mirror
                .read(|s| s.instances.contains_key(&instance.into()));
            let is_old = match keys::decode::<records::EpochRecord>(&item) {
                Ok(record) => record.unix_ms + EPOCHS_MS_MAX < now_ms,
                Err(error) => {
                    warn!(%error, "record left where it is");
                    continue;
                }
            };
            if of_shard.1 > EPOCHS_KEPT || (!is_known && is_old) {
                doomed.push(item.key);
            }
        }
        Ok(doomed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        drive::desk::Leading,
        store::{EmbeddedStore, Store, Txn, TxnOutcome},
    };

    #[tokio::test]
    async fn a_token_is_forgotten_after_a_day_and_not_before() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let token = |created_unix_ms| {
            keys::encode(records::IdempotencyRecord {
                created_unix_ms,
                ..records::IdempotencyRecord::default()
            })
        };
        let hour_ms = 60 * 60 * 1_000;
        let txn = Txn::new()
            .put(
                Key::Idempotency { token: "old" },
                token(clock::now_ms() - 25 * hour_ms),
            )
            .put(
                Key::Idempotency { token: "new" },
                token(clock::now_ms() - 23 * hour_ms),
            );
        assert!(matches!(
            store.txn(txn).await,
            Ok(TxnOutcome::Committed { .. })
        ));
        let leading = Leading::over(store.clone()).await;
        let driver = leading.driver();
        driver.forget_the_old().await.unwrap();
        let left = store.list(keys::IDEMPOTENCY).await.unwrap().items;
        assert_eq!(left.len(), 1);
        assert!(left[0].key.ends_with("/new"), "{left:?}");
    }
}
