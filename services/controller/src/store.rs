//! The one truth: versioned keys, changed only by compare-and-swap, watched in order.
//!
//! Invariant: revisions order everything. A transaction happens wholly at one revision or not at
//! all; a watch shows each revision once, in order; a key's create revision never comes twice.
//! `tests/store_conformance` holds every implementation to this contract.

pub mod compactor;
pub mod embedded;
pub mod etcd;
pub mod keys;

use std::{collections::BTreeSet, error::Error as StdError, fmt, time::Duration};

use async_trait::async_trait;

pub use embedded::EmbeddedStore;
pub use etcd::{EtcdSettings, EtcdStore, EtcdTls, EtcdUser};

/// Largest value: below etcd's default request limit of 1.5 MiB, with room for compares and keys.
pub const MAX_VALUE_BYTES: usize = 1024 * 1024;
/// Largest transaction, keys and values together: as above, and it leaves 256 KiB for framing.
pub const MAX_TXN_BYTES: usize = 1280 * 1024;
/// Most compares, and most operations, in one transaction: etcd's default `--max-txn-ops`.
pub const MAX_TXN_OPS: usize = 128;
/// Longest key. Ours are a few ids long; the bound keeps an id from becoming a document.
pub const MAX_KEY_BYTES: usize = 512;
/// Shortest lease: etcd (with its default election timeout) grants none shorter, so no store does.
pub const MIN_LEASE_TTL: Duration = Duration::from_secs(2);

/// Any failure below the store that is kept as a source.
pub type Source = Box<dyn StdError + Send + Sync>;

/// Split by what the caller does next.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Try again, with backoff. The call may or may not have taken effect: a transaction's
    /// compares make its repetition safe, and reading tells which it was.
    #[error("store did not answer: {doing}")]
    Unavailable {
        doing: &'static str,
        source: Option<Source>,
    },
    /// List again, then watch from the listing's revision + 1.
    #[error("store has forgotten the history up to revision {revision}")]
    Compacted { revision: u64 },
    /// Give up what the lease protected, or grant a new one.
    #[error("lease {lease} is gone")]
    LeaseExpired { lease: LeaseId },
    /// Our mistake or the caller's input: make it smaller, don't retry.
    #[error("{what} is {size}, more than the store takes ({limit})")]
    TooLarge {
        what: &'static str,
        size: usize,
        limit: usize,
    },
    /// Our mistake: don't retry.
    #[error("store refuses the request: {reason}")]
    Invalid { reason: String },
    /// Run the version that wrote it, or a newer one.
    #[error(
        "{what} has schema {found}, this build knows {known} and older: \
         start the slotmesh version that wrote it, or a newer one"
    )]
    NewerSchema {
        what: String,
        found: u32,
        known: u32,
    },
    /// A human must look: data that we can't read, or a disk that doesn't keep what it took.
    #[error("store is broken: {reason}")]
    Corrupt {
        reason: String,
        source: Option<Source>,
    },
}

/// Identifies a lease. Keys put with it vanish when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(i64);

impl LeaseId {
    /// For implementations of [`Store`] only; everyone else gets one from `grant_lease`.
    pub fn from_raw(raw: i64) -> Self {
        Self(raw)
    }

    pub fn raw(self) -> i64 {
        self.0
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// One key as it was at some revision.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyValue {
    pub key: String,
    pub value: Vec<u8>,
    /// Revision of the transaction that wrote this value.
    pub mod_revision: u64,
    /// Revision of the transaction that made the key, since it was last absent.
    pub create_revision: u64,
}

/// Without the value: it may hold a secret.
impl fmt::Debug for KeyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyValue")
            .field("key", &self.key)
            .field("value_bytes", &self.value.len())
            .field("mod_revision", &self.mod_revision)
            .field("create_revision", &self.create_revision)
            .finish()
    }
}

/// Everything below a prefix, in key order, as it was at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    pub revision: u64,
    pub items: Vec<KeyValue>,
}

/// What must hold for a transaction to happen. Revision 0 means: the key is absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    ModRevision { key: String, revision: u64 },
    CreateRevision { key: String, revision: u64 },
}

/// One change of a transaction.
#[derive(Clone, PartialEq, Eq)]
pub enum Op {
    /// Without a lease the key stays until it is deleted, even if it was leased before.
    Put {
        key: String,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    },
    /// Deleting an absent key does nothing.
    Delete { key: String },
}

impl Op {
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put { key, value, lease } => f
                .debug_struct("Put")
                .field("key", key)
                .field("value_bytes", &value.len())
                .field("lease", lease)
                .finish(),
            Self::Delete { key } => f.debug_struct("Delete").field("key", key).finish(),
        }
    }
}

/// Happens wholly, at one revision, if every compare holds; else not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub ops: Vec<Op>,
}

impl Txn {
    pub fn new() -> Self {
        Self::default()
    }

    /// The key must still be as it was read at `mod_revision`.
    #[must_use]
    pub fn unchanged(mut self, key: impl Into<String>, mod_revision: u64) -> Self {
        self.compares.push(Compare::ModRevision {
            key: key.into(),
            revision: mod_revision,
        });
        self
    }

    #[must_use]
    pub fn absent(self, key: impl Into<String>) -> Self {
        self.unchanged(key, 0)
    }

    /// The key must be the same incarnation, whatever was written to it since.
    #[must_use]
    pub fn created_at(mut self, key: impl Into<String>, create_revision: u64) -> Self {
        self.compares.push(Compare::CreateRevision {
            key: key.into(),
            revision: create_revision,
        });
        self
    }

    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.ops.push(Op::Put {
            key: key.into(),
            value: value.into(),
            lease: None,
        });
        self
    }

    #[must_use]
    pub fn put_leased(
        mut self,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
        lease: LeaseId,
    ) -> Self {
        self.ops.push(Op::Put {
            key: key.into(),
            value: value.into(),
            lease: Some(lease),
        });
        self
    }

    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(Op::Delete { key: key.into() });
        self
    }

    /// Every store checks this before anything else, so that what one refuses, all refuse.
    pub fn check(&self) -> Result<(), StoreError> {
        limit("number of compares", self.compares.len(), MAX_TXN_OPS)?;
        limit("number of operations", self.ops.len(), MAX_TXN_OPS)?;
        if self.ops.is_empty() {
            return Err(StoreError::Invalid {
                reason: "transaction changes nothing".into(),
            });
        }
        let mut bytes = 0;
        for compare in &self.compares {
            let (Compare::ModRevision { key, .. } | Compare::CreateRevision { key, .. }) = compare;
            check_key(key)?;
            bytes += key.len();
        }
        let mut changed = BTreeSet::new();
        for op in &self.ops {
            check_key(op.key())?;
            bytes += op.key().len();
            if let Op::Put { value, .. } = op {
                limit("value's length in bytes", value.len(), MAX_VALUE_BYTES)?;
                bytes += value.len();
            }
            if !changed.insert(op.key()) {
                let reason = format!("transaction changes {} twice", op.key());
                return Err(StoreError::Invalid { reason });
            }
        }
        limit("transaction's length in bytes", bytes, MAX_TXN_BYTES)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a conflict means that nothing was written"]
pub enum TxnOutcome {
    Committed {
        revision: u64,
    },
    /// A compare did not hold: read again, decide again.
    Conflict,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Put(KeyValue),
    Delete { key: String },
}

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put(item) => &item.key,
            Self::Delete { key } => key,
        }
    }
}

/// All that one revision changed below the watched prefix; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvents {
    pub revision: u64,
    pub events: Vec<Event>,
}

/// How an implementation feeds a [`Watch`].
#[async_trait]
pub trait WatchSource: Send + fmt::Debug {
    /// Must be cancel safe.
    async fn next(&mut self) -> Result<WatchEvents, StoreError>;
}

/// A running watch; dropping it ends it.
#[derive(Debug)]
pub struct Watch(Box<dyn WatchSource>);

impl Watch {
    pub fn new(source: impl WatchSource + 'static) -> Self {
        Self(Box::new(source))
    }

    /// The next revision that changed something below the prefix. After `Compacted` the watch is
    /// of no more use; after `Unavailable` it may be asked again and misses nothing.
    ///
    /// # Cancel safety
    /// A dropped future loses no event.
    pub async fn next(&mut self) -> Result<WatchEvents, StoreError> {
        self.0.next().await
    }
}

/// What slotmesh needs of its store. Every call ends within the store's own deadline.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Linearizable: sees every transaction that was acknowledged before the call.
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError>;

    /// Linearizable, and all items are of one revision. An empty prefix is refused.
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError>;

    /// On `Unavailable` it may have happened.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// Events of `from_revision` and later: after a listing, pass its revision + 1. `Compacted`
    /// may come from this call or from [`Watch::next`].
    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Watch, StoreError>;

    /// Forgets the history up to and including `revision`; current values stay. Repeating it is
    /// no error, compacting the future is.
    async fn compact(&self, revision: u64) -> Result<(), StoreError>;

    /// Whole seconds, rounded up, at least [`MIN_LEASE_TTL`].
    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// The lease runs for its whole time again, which is returned.
    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError>;

    /// Ends the lease now and deletes its keys, at one revision. A lease that is gone is no error.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;
}

fn limit(what: &'static str, size: usize, limit: usize) -> Result<(), StoreError> {
    if size > limit {
        Err(StoreError::TooLarge { what, size, limit })
    } else {
        Ok(())
    }
}

fn check_key(key: &str) -> Result<(), StoreError> {
    if key.is_empty() {
        return Err(StoreError::Invalid {
            reason: "empty key or prefix".into(),
        });
    }
    limit("key's length in bytes", key.len(), MAX_KEY_BYTES)
}

/// Revision 0 is before everything, and etcd reads it as "from now on".
fn check_from_revision(revision: u64) -> Result<(), StoreError> {
    if revision == 0 {
        return Err(StoreError::Invalid {
            reason: "watch from revision 0".into(),
        });
    }
    Ok(())
}

/// The time to live that a store really grants: etcd counts in whole seconds.
fn granted_ttl(asked: Duration) -> Duration {
    let asked = asked.max(MIN_LEASE_TTL);
    let whole = Duration::from_secs(asked.as_secs());
    if whole == asked {
        whole
    } else {
        whole + Duration::from_secs(1)
    }
}
