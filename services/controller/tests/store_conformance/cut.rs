//! A store that can be cut off: from then on, calls to it stay without an answer, as on a dead link.

use std::{
    future::{Future, pending},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use slotmesh_controller::store::{
    KeyValue, LeaseId, Listing, Store, StoreError, Txn, TxnOutcome, Watch,
};
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
pub(crate) struct Cut {
    store: Arc<dyn Store>,
    cut: CancellationToken,
}

impl Cut {
    pub(crate) fn of(store: Arc<dyn Store>) -> (Arc<dyn Store>, impl FnOnce()) {
        let cut = CancellationToken::new();
        let cutter = cut.clone();
        (Arc::new(Self { store, cut }), move || cutter.cancel())
    }

    async fn through<T>(&self, call: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            () = self.cut.cancelled() => pending().await,
            answer = call => answer,
        }
    }
}

#[async_trait]
impl Store for Cut {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        self.through(self.store.get(key)).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.through(self.store.list(prefix)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.through(self.store.txn(txn)).await
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Watch, StoreError> {
        self.through(self.store.watch(prefix, from_revision)).await
    }

    async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        self.through(self.store.compact(revision)).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.through(self.store.grant_lease(ttl)).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.through(self.store.keep_alive(lease)).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.through(self.store.revoke(lease)).await
    }
}
