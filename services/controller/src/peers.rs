//! This controller among its peers: it says where it serves, and notices when it is cut off.
//!
//! Invariant: the record is leased, so a dead controller is nobody's address for longer than
//! [`REGISTRATION_TTL`]; and a controller that has not reached the store for that long says so
//! (`in_reach` is false), because what it would tell agents and proxies grows old unseen.

use std::{sync::Arc, time::Duration};

use slotmesh_proto::store::v1::ControllerRecord;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    mirror::{Mirror, State},
    store::{
        LeaseId, Store, StoreError, Txn,
        keys::{self, Key},
    },
};

/// How long a controller that died is still named to agents and proxies. As the leader's: shorter
/// ones run out when etcd pauses.
pub const REGISTRATION_TTL: Duration = Duration::from_secs(5);
/// Keep-alives in one TTL: two may be lost.
const KEEP_ALIVES_PER_TTL: u32 = 3;
/// Between attempts while the store does not answer.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// For taking the record away when we end; if it takes longer, the lease runs out by itself.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// Addresses of all controllers, as agents and proxies are told them: those that serve, and this
/// one in any case.
pub(crate) fn addresses(state: &State, own: &str) -> Vec<String> {
    let mut all: Vec<String> = state.controllers.values().cloned().collect();
    all.push(own.to_owned());
    all.sort();
    all.dedup();
    all
}

/// A running registration.
#[derive(Debug)]
pub struct Registration {
    in_reach: watch::Receiver<bool>,
    worker: JoinHandle<()>,
}

impl Registration {
    /// Registers, and stays so until `shutdown`.
    pub fn start(
        store: Arc<dyn Store>,
        mirror: Mirror,
        controller_id: String,
        address: String,
        shutdown: CancellationToken,
    ) -> Self {
        let (sender, in_reach) = watch::channel(true);
        let worker = Worker {
            store,
            mirror,
            controller_id,
            address,
            in_reach: sender,
            reached: Instant::now(),
            clashes: 0,
        };
        Self {
            in_reach,
            worker: tokio::spawn(worker.run(shutdown)),
        }
    }

    /// False while the store does not answer this controller.
    #[must_use]
    pub fn in_reach(&self) -> watch::Receiver<bool> {
        self.in_reach.clone()
    }

    /// Waits until the record is taken away.
    pub async fn join(self) {
        if let Err(error) = self.worker.await {
            warn!(%error, "registration died");
        }
    }
}

struct Worker {
    store: Arc<dyn Store>,
    mirror: Mirror,
    controller_id: String,
    address: String,
    in_reach: watch::Sender<bool>,
    /// When the store last answered.
    reached: Instant,
    /// Times in a row that the record was found to be another's.
    clashes: u32,
}

impl Worker {
    async fn run(mut self, shutdown: CancellationToken) {
        let mut lease = None;
        loop {
            let turn = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                turn = timeout(REGISTRATION_TTL, self.renew(&mut lease)) => turn,
            };
            let pause = match turn {
                Ok(Ok(())) => {
                    self.answered();
                    REGISTRATION_TTL / KEEP_ALIVES_PER_TTL
                }
                Ok(Err(StoreError::LeaseExpired { .. })) => {
                    lease = None;
                    Duration::ZERO
                }
                Ok(Err(error)) => {
                    self.silent(&error.to_string());
                    RETRY_PAUSE
                }
                Err(_) => {
                    self.silent("it did not answer in time");
                    RETRY_PAUSE
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = sleep(pause) => {}
            }
        }
        if let Some(lease) = lease {
            // Else it runs out.
            let _ = timeout(FAREWELL_TIMEOUT, self.store.revoke(lease)).await;
        }
    }

    /// Keeps the record there: a lease that was lost in an outage is granted anew.
    async fn renew(&mut self, lease: &mut Option<LeaseId>) -> Result<(), StoreError> {
        let known = match *lease {
            Some(lease) => {
                self.store.keep_alive(lease).await?;
                lease
            }
            None => {
                let granted = self.store.grant_lease(REGISTRATION_TTL).await?;
                *lease = Some(granted);
                self.put(granted).await?;
                info!(
                    id = self.controller_id,
                    address = self.address,
                    "registered"
                );
                return Ok(());
            }
        };
        let id = self.controller_id.as_str();
        let named = self.mirror.read(|s| s.controllers.get(id).cloned());
        if named.as_ref() == Some(&self.address) {
            self.clashes = 0;
            return Ok(());
        }
        if let Some(other) = named {
            self.clashes += 1;
            if self.clashes > 1 {
                warn!(
                    id,
                    other, "another controller has this id: give each its own --id"
                );
            }
        }
        self.put(known).await
    }

    async fn put(&self, lease: LeaseId) -> Result<(), StoreError> {
        let record = keys::encode(ControllerRecord {
            schema: 0,
            controller_id: self.controller_id.clone(),
            address: self.address.clone(),
        });
        let key = Key::Controller {
            controller: &self.controller_id,
        };
        // Without a compare: an earlier process of this id may have left one.
        let txn = Txn::new().put_leased(key, record, lease);
        self.store.txn(txn).await.map(|_| ())
    }

    fn answered(&mut self) {
        self.reached = Instant::now();
        if !self.in_reach.send_replace(true) {
            info!("the store answers again");
        }
    }

    fn silent(&self, error: &str) {
        if self.reached.elapsed() < REGISTRATION_TTL {
            return;
        }
        if self.in_reach.send_replace(false) {
            warn!(
                error,
                "cut off from the store: agents and proxies are sent to other controllers"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::EmbeddedStore;

    const LIMIT: Duration = Duration::from_secs(10);

    async fn shown(mirror: &Mirror, wanted: &[&str]) {
        let mut state = mirror.subscribe();
        let shown = state.wait_for(|s| s.controllers.values().eq(wanted.iter().copied()));
        let shown = timeout(LIMIT, shown).await;
        shown.expect("the controllers in time").unwrap();
    }

    #[tokio::test]
    async fn a_controller_is_named_while_it_runs_and_again_after_its_record_was_lost() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let stop = CancellationToken::new();
        let (mirror, _worker) = Mirror::start(store.clone(), stop.clone()).await.unwrap();
        let start = |id: &str, address: &str, stop: &CancellationToken| {
            let (store, mirror) = (store.clone(), mirror.clone());
            Registration::start(store, mirror, id.into(), address.into(), stop.clone())
        };
        let leaves = CancellationToken::new();
        let first = start("c1", "a:1", &leaves);
        let second = start("c2", "a:2", &stop);
        shown(&mirror, &["a:1", "a:2"]).await;
        assert_eq!(
            mirror.read(|s| addresses(s, "a:0")),
            ["a:0", "a:1", "a:2"],
            "this one is named even before it is seen"
        );
        leaves.cancel();
        first.join().await;
        shown(&mirror, &["a:2"]).await;
        let lost = Txn::new().delete(Key::Controller { controller: "c2" });
        let _ = store.txn(lost).await.unwrap();
        shown(&mirror, &[]).await;
        shown(&mirror, &["a:2"]).await;
        stop.cancel();
        second.join().await;
    }
}
