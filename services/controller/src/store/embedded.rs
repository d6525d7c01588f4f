//! A store inside the controller's own process: for one controller, for `slotmesh up`, for tests.
//!
//! Invariant: one writer decides every change; a change is durable before anyone sees it, and
//! visible before it is acknowledged. In memory only, it is the same store without the file.

mod disk;
#[cfg(test)]
mod faults;
mod state;

use std::{
    fmt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until, timeout},
};
use tracing::{error, info};

use self::disk::{Disk, Opened};
use self::state::{NextEvents, Staged, State};
use super::{
    KeyValue, LeaseId, Listing, Store, StoreError, Txn, TxnOutcome, Watch, WatchEvents,
    WatchSource, check_from_revision, check_key, granted_ttl,
};

/// Requests that wait for the writer. Each holds at most one transaction (1.25 MiB); a caller that
/// finds the queue full waits, within its deadline.
const QUEUE: usize = 256;
/// Most transactions in one commit to disk: bounds how long the first one waits for the last.
const MAX_BATCH: usize = 64;
/// A disk that takes longer is not working; the caller should know.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Needs a tokio runtime around it; its writer runs until [`EmbeddedStore::shutdown`] or until
/// the last handle is dropped.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    requests: mpsc::Sender<Request>,
    visible: watch::Receiver<u64>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl EmbeddedStore {
    /// Keeps nothing: for simulation and tests.
    pub fn in_memory() -> Self {
        Self::start(State::new(0, []), None)
    }

    /// Opens or creates the store in `dir`, with its file `store.redb`.
    pub async fn open(dir: &Path) -> Result<Self, StoreError> {
        let owned = dir.to_owned();
        let Opened {
            disk,
            revision,
            items,
        } = blocking(move || Disk::open(&owned)).await?;
        info!(dir = %dir.display(), revision, items = items.len(), "store opened");
        Ok(Self::start(
            State::new(revision, items),
            Some(Arc::new(disk)),
        ))
    }

    fn start(state: State, disk: Option<Arc<Disk>>) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            granted: Notify::new(),
        });
        let (requests, queue) = mpsc::channel(QUEUE);
        let (visible, observer) = watch::channel(0);
        let writer = Writer {
            shared: shared.clone(),
            queue,
            visible,
            disk,
            failed: false,
        };
        let writer = tokio::spawn(writer.run());
        Self {
            shared,
            requests,
            visible: observer,
            writer: Mutex::new(Some(writer)),
        }
    }

    /// Ends the writer and closes the file, after all that was asked before. Later calls fail
    /// with `Unavailable`, and so do watches.
    pub async fn shutdown(&self) {
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(writer) = writer {
            let _ = self.requests.send(Request::Stop).await;
            let _ = writer.await;
        }
    }

    async fn ask<T>(
        &self,
        doing: &'static str,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let ask = async {
            self.requests.send(request(reply)).await.ok()?;
            answer.await.ok()
        };
        match timeout(CALL_TIMEOUT, ask).await {
            Ok(Some(answer)) => answer,
            Ok(None) | Err(_) => Err(StoreError::Unavailable {
                doing,
                source: None,
            }),
        }
    }
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore").finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        check_key(key)?;
        Ok(self.shared.state().get(key))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        check_key(prefix)?;
        Ok(self.shared.state().list(prefix))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        self.ask("transaction", |reply| Request::Txn(txn, reply))
            .await
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Watch, StoreError> {
        check_key(prefix)?;
        check_from_revision(from_revision)?;
        // Says now what `next` would say later.
        self.shared.state().events(prefix, from_revision)?;
        Ok(Watch::new(EmbeddedWatch {
            shared: self.shared.clone(),
            visible: self.visible.clone(),
            prefix: prefix.to_owned(),
            from: from_revision,
        }))
    }

    async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        // History is only in memory: nothing to write.
        self.shared.state().compact(revision)
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let lease = self
            .shared
            .state()
            .grant(granted_ttl(ttl), Instant::now())?;
        self.shared.granted.notify_one();
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        // Not through the writer: a slow disk must not cost anyone a lease.
        self.shared.state().keep_alive(lease, Instant::now())
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask("revoke a lease", |reply| Request::Revoke(lease, reply))
            .await
    }
}

struct Shared {
    state: Mutex<State>,
    /// A lease was granted: the writer's next deadline may have come nearer.
    granted: Notify,
}

impl Shared {
    /// Held for the time of a look or a change in memory, never across a wait.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct EmbeddedWatch {
    shared: Arc<Shared>,
    visible: watch::Receiver<u64>,
    prefix: String,
    from: u64,
}

impl fmt::Debug for EmbeddedWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedWatch")
            .field("prefix", &self.prefix)
            .field("from", &self.from)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl WatchSource for EmbeddedWatch {
    async fn next(&mut self) -> Result<WatchEvents, StoreError> {
        loop {
            self.visible.borrow_and_update();
            let next = self.shared.state().events(&self.prefix, self.from)?;
            match next {
                NextEvents::Some(events) => {
                    self.from = events.revision + 1;
                    return Ok(events);
                }
                NextEvents::NoneBefore(from) => self.from = from,
            }
            let closed = StoreError::Unavailable {
                doing: "watch: store is shut down",
                source: None,
            };
            self.visible.changed().await.map_err(|_| closed)?;
        }
    }
}

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Request {
    Txn(Txn, Reply<TxnOutcome>),
    Revoke(LeaseId, Reply<()>),
    Stop,
}

struct Writer {
    shared: Arc<Shared>,
    queue: mpsc::Receiver<Request>,
    visible: watch::Sender<u64>,
    disk: Option<Arc<Disk>>,
    /// A write failed. What the file holds is unknown until it is opened again, so nothing more
    /// is written.
    failed: bool,
}

impl Writer {
    async fn run(mut self) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        loop {
            self.end_expired_leases().await;
            let deadline = self.shared.state().next_deadline();
            let received = tokio::select! {
                biased;
                received = self.queue.recv_many(&mut batch, MAX_BATCH) => received,
                () = self.shared.granted.notified() => continue,
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    continue;
                }
            };
            if received == 0 || self.serve(&mut batch).await.is_break() {
                break;
            }
        }
        if let Some(disk) = self.disk.take() {
            // Closing waits for the disk.
            let _ = spawn_blocking(move || drop(disk)).await;
        }
    }

    async fn serve(&mut self, batch: &mut Vec<Request>) -> std::ops::ControlFlow<()> {
        self.end_expired_leases().await;
        let mut staged = Staged::default();
        let mut answers = Vec::new();
        for request in batch.drain(..) {
            match request {
                Request::Txn(mut txn, reply) => {
                    let outcome = self.shared.state().prepare(&mut staged, &mut txn);
                    answers.push((reply, outcome));
                }
                Request::Revoke(lease, reply) => {
                    self.commit(std::mem::take(&mut staged), &mut answers).await;
                    self.shared.state().end_lease(lease, &mut staged);
                    let done = self.commit(std::mem::take(&mut staged), &mut answers).await;
                    let failed = StoreError::Corrupt {
                        reason: FAILED.into(),
                        source: None,
                    };
                    let _ = reply.send(if done { Ok(()) } else { Err(failed) });
                }
                Request::Stop => {
                    self.commit(staged, &mut answers).await;
                    return std::ops::ControlFlow::Break(());
                }
            }
        }
        self.commit(staged, &mut answers).await;
        std::ops::ControlFlow::Continue(())
    }

    async fn end_expired_leases(&mut self) {
        let mut staged = Staged::default();
        {
            let mut state = self.shared.state();
            for lease in state.expired(Instant::now()) {
                state.end_lease(lease, &mut staged);
            }
        }
        self.commit(staged, &mut Vec::new()).await;
    }

    /// Durable, then visible, then acknowledged. False if nothing can be written any more.
    async fn commit(
        &mut self,
        staged: Staged,
        answers: &mut Vec<(Reply<TxnOutcome>, Result<TxnOutcome, StoreError>)>,
    ) -> bool {
        let mut changes = staged.changes;
        if let Some(disk) = self.disk.clone()
            && !changes.is_empty()
            && !self.failed
        {
            let written = blocking(move || {
                disk.commit(&changes)?;
                Ok(changes)
            });
            match written.await {
                Ok(written) => changes = written,
                Err(error) => {
                    error!(%error, source = ?std::error::Error::source(&error), "store write failed");
                    self.failed = true;
                    changes = Vec::new();
                }
            }
        }
        if self.failed {
            for (reply, _) in answers.drain(..) {
                let failed = StoreError::Corrupt {
                    reason: FAILED.into(),
                    source: None,
                };
                let _ = reply.send(Err(failed));
            }
            return false;
        }
        if let Some(last) = changes.last().map(|change| change.revision) {
            let mut state = self.shared.state();
            changes.into_iter().for_each(|change| state.apply(change));
            drop(state);
            self.visible.send_replace(last);
        }
        for (reply, outcome) in answers.drain(..) {
            let _ = reply.send(outcome);
        }
        true
    }
}

const FAILED: &str = "a write to disk failed; free space or mend the disk, then restart";

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(StoreError::Corrupt {
            reason: "the store's disk worker died".into(),
            source: Some(Box::new(error)),
        }),
    }
}
