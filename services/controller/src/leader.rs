//! Election: of all controllers one leads, and what it writes is fenced by its term.
//!
//! Invariant: a [`Term`] is the create revision of the leader key, so terms only rise, and a
//! [`LeaderTxn`] happens only while that very key exists. Believing to lead is never enough: a
//! leader that was deposed without knowing it changes nothing.

use std::{fmt, sync::Arc, time::Duration};

use slotmesh_proto::store::v1::LeaderRecord;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::store::{
    Event, LeaseId, Store, StoreError, Txn, TxnOutcome,
    keys::{self, Key},
};

/// How long after a leader's death another may lead. Shorter elects during a pause of etcd.
pub const LEADER_TTL: Duration = Duration::from_secs(5);
/// Keep-alives in one TTL: two may be lost.
const KEEP_ALIVES_PER_TTL: u32 = 3;
/// The part of the TTL by which we stop leading before the store could elect another. It covers
/// clocks that run at different speeds and the time to stop.
const MARGIN_PER_TTL: u32 = 5;
/// Between attempts while the store does not answer.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// For giving the key back when we end; if it takes longer, the lease runs out by itself.
const RESIGN_TIMEOUT: Duration = Duration::from_secs(1);

/// Orders leaders. Only winning an election makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(u64);

impl Term {
    /// For messages and records. A number does not make a term again.
    pub fn number(self) -> u64 {
        self.0
    }

    /// A transaction that happens only while this term lasts.
    pub fn txn(self) -> LeaderTxn {
        LeaderTxn {
            term: self,
            txn: Txn::new().created_at(Key::Leader, self.0),
        }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who leads, as this controller knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leadership {
    /// This controller, until it publishes otherwise.
    Leading { term: Term },
    /// Another one; or nobody that we know of. `term` is the highest that we know, and stays while
    /// nobody leads.
    Following { leader: Option<Leader>, term: u64 },
}

/// Another controller that leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    pub controller_id: String,
    /// `host:port` of its gRPC API.
    pub address: String,
    pub term: u64,
}

impl Leadership {
    pub fn term(&self) -> Option<Term> {
        match self {
            Self::Leading { term } => Some(*term),
            Self::Following { .. } => None,
        }
    }

    /// The highest term that this controller knows, whoever has it.
    pub fn known_term(&self) -> u64 {
        match self {
            Self::Leading { term } => term.0,
            Self::Following { term, .. } => *term,
        }
    }

    /// The other controller that leads.
    pub fn leader(&self) -> Option<&Leader> {
        match self {
            Self::Leading { .. } => None,
            Self::Following { leader, .. } => leader.as_ref(),
        }
    }
}

/// A transaction that compares the leader key. There is no other way for a leader to write.
#[derive(Clone, Debug)]
#[must_use = "nothing happens before it is committed"]
pub struct LeaderTxn {
    term: Term,
    txn: Txn,
}

/// What became of a [`LeaderTxn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a conflict means that nothing was written"]
pub enum LeaderOutcome {
    Committed {
        revision: u64,
    },
    /// Read again, decide again.
    Conflict,
    /// The term is over: stop everything that a leader does.
    Deposed,
}

impl LeaderTxn {
    pub fn term(&self) -> Term {
        self.term
    }

    pub fn unchanged(self, key: impl Into<String>, mod_revision: u64) -> Self {
        self.with(|txn| txn.unchanged(key, mod_revision))
    }

    pub fn absent(self, key: impl Into<String>) -> Self {
        self.with(|txn| txn.absent(key))
    }

    pub fn put(self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.with(|txn| txn.put(key, value))
    }

    pub fn delete(self, key: impl Into<String>) -> Self {
        self.with(|txn| txn.delete(key))
    }

    fn with(self, change: impl FnOnce(Txn) -> Txn) -> Self {
        Self {
            term: self.term,
            txn: change(self.txn),
        }
    }

    /// On `Unavailable` it may have happened.
    pub async fn commit(self, store: &dyn Store) -> Result<LeaderOutcome, StoreError> {
        match store.txn(self.txn).await? {
            TxnOutcome::Committed { revision } => Ok(LeaderOutcome::Committed { revision }),
            TxnOutcome::Conflict if lasts(store, self.term).await? => Ok(LeaderOutcome::Conflict),
            TxnOutcome::Conflict => Ok(LeaderOutcome::Deposed),
        }
    }
}

async fn lasts(store: &dyn Store, term: Term) -> Result<bool, StoreError> {
    let leader = store.get(&Key::Leader.to_string()).await?;
    Ok(leader.is_some_and(|leader| leader.create_revision == term.0))
}

/// One controller in the election.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub controller_id: String,
    /// `host:port` of its gRPC API, for those who look for the leader.
    pub address: String,
    /// [`LEADER_TTL`], except in tests.
    pub ttl: Duration,
}

/// A running candidacy. It ends when its token is cancelled: cancel it after everything that
/// writes as leader has ended, because it gives the leadership away at once.
#[derive(Debug)]
pub struct Election {
    leadership: watch::Receiver<Leadership>,
    worker: JoinHandle<()>,
}

impl Election {
    pub fn start(store: Arc<dyn Store>, candidate: Candidate, shutdown: CancellationToken) -> Self {
        let (published, leadership) = watch::channel(Leadership::Following {
            leader: None,
            term: 0,
        });
        let worker = Worker {
            store,
            candidate,
            published,
        };
        Self {
            leadership,
            worker: tokio::spawn(worker.run(shutdown)),
        }
    }

    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    /// Waits until the candidacy has ended and the key, if it was ours, is given back.
    pub async fn join(self) {
        if let Err(error) = self.worker.await {
            warn!(%error, "election worker died");
        }
    }
}

/// The leader key as it was won.
struct Held {
    lease: LeaseId,
    term: Term,
    /// On our clock, from before the store was asked: then the store can't elect another yet.
    until: Instant,
}

struct Worker {
    store: Arc<dyn Store>,
    candidate: Candidate,
    published: watch::Sender<Leadership>,
}

impl Worker {
    async fn run(self, shutdown: CancellationToken) {
        // Not a select around everything: what we hold must be given back.
        while !shutdown.is_cancelled() {
            let turn = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                turn = self.campaign() => turn,
            };
            match turn {
                Ok(Some(held)) => {
                    let since = Instant::now();
                    info!(term = %held.term, "leading");
                    self.publish(Leadership::Leading { term: held.term });
                    let shut_down = tokio::select! {
                        biased;
                        () = shutdown.cancelled() => true,
                        () = self.keep(&held) => false,
                    };
                    self.follow(None);
                    info!(term = %held.term, led = ?since.elapsed(), shut_down, "leads no more");
                    self.give_back(held.lease).await;
                }
                Ok(None) => {}
                Err(error) => {
                    warn!(%error, source = ?std::error::Error::source(&error), "election stalls");
                    self.follow(None);
                    tokio::select! {
                        () = shutdown.cancelled() => break,
                        () = sleep(RETRY_PAUSE) => {}
                    }
                }
            }
        }
        self.follow(None);
    }

    /// Tries once. If another leads, waits until that may have changed.
    ///
    /// # Cancel safety
    /// A dropped attempt may leave a lease, or even the key, behind; both run out after the TTL.
    async fn campaign(&self) -> Result<Option<Held>, StoreError> {
        let key = Key::Leader.to_string();
        let listing = self.store.list(&key).await?;
        if let Some(item) = listing.items.iter().find(|item| item.key == key) {
            let record: LeaderRecord = keys::decode(item)?;
            // Our own id: left by an earlier process, or by an attempt that we gave up.
            let ours = record.controller_id == self.candidate.controller_id;
            self.follow((!ours).then_some(Leader {
                controller_id: record.controller_id,
                address: record.address,
                term: item.create_revision,
            }));
            self.wait_for_vacancy(&key, listing.revision + 1).await?;
            return Ok(None);
        }
        let until = self.hold_until(Instant::now(), self.candidate.ttl);
        let lease = self.store.grant_lease(self.candidate.ttl).await?;
        let record = keys::encode(LeaderRecord {
            schema: 0,
            controller_id: self.candidate.controller_id.clone(),
            address: self.candidate.address.clone(),
        });
        let txn = Txn::new().absent(&*key).put_leased(&*key, record, lease);
        match self.store.txn(txn).await {
            Ok(TxnOutcome::Committed { revision }) => Ok(Some(Held {
                lease,
                term: Term(revision),
                until,
            })),
            Ok(TxnOutcome::Conflict) => {
                self.give_back(lease).await;
                Ok(None)
            }
            Err(error) => {
                // It may have happened, but we don't know since when: give it back either way.
                self.give_back(lease).await;
                Err(error)
            }
        }
    }

    async fn wait_for_vacancy(&self, key: &str, from: u64) -> Result<(), StoreError> {
        let vacant = async {
            let mut watch = self.store.watch(key, from).await?;
            loop {
                let change = watch.next().await?;
                let deleted = |event: &Event| matches!(event, Event::Delete { key: k } if k == key);
                if change.events.iter().any(deleted) {
                    return Ok(());
                }
            }
        };
        // A look at the key now and then costs little, and no watch is then trusted for ever.
        match timeout(self.candidate.ttl, vacant).await {
            Err(_) | Ok(Err(StoreError::Compacted { .. })) => Ok(()),
            Ok(done) => done,
        }
    }

    /// Returns when we no longer lead, before the store lets anyone else lead.
    async fn keep(&self, held: &Held) {
        let interval = self.candidate.ttl / KEEP_ALIVES_PER_TTL;
        let mut until = held.until;
        let mut pause = interval;
        loop {
            if timeout_at(until, sleep(pause)).await.is_err() {
                warn!(term = %held.term, "no keep-alive in time");
                return;
            }
            let asked = Instant::now();
            let renew = async {
                let ttl = self.store.keep_alive(held.lease).await?;
                Ok::<_, StoreError>((ttl, lasts(&*self.store, held.term).await?))
            };
            match timeout_at(until, renew).await {
                Ok(Ok((ttl, true))) => {
                    until = self.hold_until(asked, ttl);
                    pause = interval;
                }
                Ok(Ok((_, false))) => {
                    warn!(term = %held.term, "someone deleted the leader key");
                    return;
                }
                Ok(Err(StoreError::Unavailable { .. })) => pause = RETRY_PAUSE,
                Ok(Err(error)) => {
                    warn!(term = %held.term, %error, "keep-alive refused");
                    return;
                }
                Err(_) => {
                    warn!(term = %held.term, "no keep-alive in time");
                    return;
                }
            }
        }
    }

    fn hold_until(&self, asked: Instant, granted: Duration) -> Instant {
        asked + granted.min(self.candidate.ttl) - self.candidate.ttl / MARGIN_PER_TTL
    }

    async fn give_back(&self, lease: LeaseId) {
        match timeout(RESIGN_TIMEOUT, self.store.revoke(lease)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "leader lease not revoked, it will run out"),
            Err(_) => warn!("leader lease not revoked in time, it will run out"),
        }
    }

    fn follow(&self, leader: Option<Leader>) {
        let known = self.published.borrow().known_term();
        let term = leader.as_ref().map_or(known, |l| l.term.max(known));
        self.publish(Leadership::Following { leader, term });
    }

    fn publish(&self, leadership: Leadership) {
        self.published.send_if_modified(|current| {
            let changed = *current != leadership;
            *current = leadership;
            changed
        });
    }
}
