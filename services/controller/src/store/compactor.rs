//! Keeps the store's history bounded: every so often it forgets what is older than one interval.
//!
//! Invariant: history younger than the interval stays, so a watch that was interrupted for less
//! than that need not list again.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Store, keys::Key};

/// Longer than any reconnect; at the pace of a large switchover, some ten thousand revisions.
pub const COMPACTION_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// Runs until cancelled. Every controller may run one: compacting twice does no harm.
pub async fn run(store: Arc<dyn Store>, every: Duration, shutdown: CancellationToken) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = None;
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        // Any listing tells the revision; this one is of at most one key.
        let now = match store.list(&Key::Meta.to_string()).await {
            Ok(listing) => listing.revision,
            Err(error) => {
                warn!(%error, "compaction put off");
                continue;
            }
        };
        match before.replace(now) {
            Some(revision) => match store.compact(revision).await {
                Ok(()) => debug!(revision, "history compacted"),
                Err(error) => warn!(%error, revision, "compaction put off"),
            },
            None => debug!(revision = now, "compaction starts"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{EmbeddedStore, StoreError, Txn};

    #[tokio::test(start_paused = true)]
    async fn history_is_kept_for_one_interval_and_then_forgotten() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let shutdown = CancellationToken::new();
        let minute = Duration::from_secs(60);
        let worker = tokio::spawn(run(store.clone(), minute, shutdown.clone()));
        tokio::time::sleep(minute / 2).await;
        let _ = store.txn(Txn::new().put("/a", "1")).await.unwrap();
        tokio::time::sleep(minute).await;
        store.watch("/", 1).await.unwrap();
        tokio::time::sleep(minute).await;
        let forgotten = store.watch("/", 1).await;
        assert!(
            matches!(forgotten, Err(StoreError::Compacted { revision: 1 })),
            "{forgotten:?}"
        );
        shutdown.cancel();
        worker.await.unwrap();
    }
}
