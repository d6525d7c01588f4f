//! The store for production: an etcd cluster, 3.4 or newer.
//!
//! Invariant: every call has a deadline, every error says what to do next, and a watch survives
//! the loss of its stream without losing or repeating a revision.

mod watch;

use std::{future::Future, time::Duration};

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, Compare as EtcdCompare, CompareOp, ConnectOptions, DeleteOptions,
    Error as EtcdError, GetOptions, GetResponse, Identity, KvClient, LeaseClient, PutOptions,
    TlsOptions, Txn as EtcdTxn, TxnOp, WatchClient,
};
use tokio::time::timeout;
use tonic::Code;

use self::watch::EtcdWatch;
use super::{
    Compare, KeyValue, LeaseId, Listing, MAX_KEY_BYTES, MAX_VALUE_BYTES, Op, Store, StoreError,
    Txn, TxnOutcome, Watch, check_from_revision, check_key, granted_ttl,
};

/// A round trip takes about a millisecond; this is etcd electing a leader (1 s by default) twice.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// etcd's default `--grpc-keepalive-min-time` is 5 s; who pings more often is disconnected.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// Keys in one answer to a listing. More are fetched page by page, at one revision.
const PAGE: usize = 128;
/// What the largest page can take: no listing fails because records have grown.
const MAX_PAGE_BYTES: usize = PAGE * (MAX_VALUE_BYTES + MAX_KEY_BYTES + 1024);
/// Compactions that may overtake one listing before it gives up. Each means that paging through
/// took longer than the interval of compactions.
const MAX_LIST_ATTEMPTS: usize = 3;

/// Where etcd is, and as whom we go there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EtcdSettings {
    /// `http://host:port` of each member; `https://host:port` with `tls`.
    pub endpoints: Vec<String>,
    /// When etcd asks for one.
    pub user: Option<EtcdUser>,
    pub tls: Option<EtcdTls>,
}

/// A user of etcd. It needs read and write access to keys below [`super::keys::ROOT`].
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdUser {
    pub name: String,
    pub password: String,
}

/// Without the password.
impl std::fmt::Debug for EtcdUser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdUser")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Contents of PEM files.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// Who signed the members' certificates.
    pub ca: Vec<u8>,
    /// Our certificate and its key, when etcd asks for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// Without the key.
impl std::fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdTls")
            .field("with_certificate", &self.identity.is_some())
            .finish_non_exhaustive()
    }
}

impl EtcdTls {
    fn options(&self) -> TlsOptions {
        let options = TlsOptions::new().ca_certificate(Certificate::from_pem(&self.ca));
        match &self.identity {
            Some((certificate, key)) => options.identity(Identity::from_pem(certificate, key)),
            None => options,
        }
    }
}

/// Cheap to share: one HTTP/2 connection to each member.
#[derive(Clone)]
pub struct EtcdStore {
    kv: KvClient,
    lease: LeaseClient,
    watch: WatchClient,
    endpoints: Vec<String>,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore")
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

impl EtcdStore {
    /// Fails if no member answers: a wrong address should end the start, not be waited for.
    pub async fn connect(settings: &EtcdSettings) -> Result<Self, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            .with_keep_alive_while_idle(true)
            // A member without a leader must say so, rather than stay silent.
            .with_require_leader(true)
            // Tokens end after minutes, and with each start of a member.
            .with_auto_token_refresh(true);
        if let Some(user) = &settings.user {
            options = options.with_user(user.name.as_str(), user.password.as_str());
        }
        if let Some(tls) = &settings.tls {
            options = options.with_tls(tls.options());
        }
        let client = call(
            "connect to etcd",
            // On the heap: it is large, and `connect` is part of the future of a whole start.
            Box::pin(Client::connect(&settings.endpoints, Some(options))),
        );
        let client = client.await?;
        let store = Self {
            kv: client.kv_client().max_decoding_message_size(MAX_PAGE_BYTES),
            lease: client.lease_client(),
            watch: client
                .watch_client()
                .max_decoding_message_size(watch::MAX_MESSAGE_BYTES),
            endpoints: settings.endpoints.clone(),
        };
        store.get(super::keys::ROOT).await?;
        Ok(store)
    }

    async fn list_at_one_revision(&self, prefix: &str) -> Result<Listing, StoreError> {
        let end = end_of(prefix);
        let mut from = prefix.as_bytes().to_vec();
        let mut listing: Option<Listing> = None;
        loop {
            let mut options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(i64::try_from(PAGE).unwrap_or(i64::MAX));
            if let Some(listing) = &listing {
                options = options.with_revision(signed(listing.revision));
            }
            let mut kv = self.kv.clone();
            let mut page = call("list", kv.get(from.clone(), Some(options))).await?;
            let listing = listing.get_or_insert_with(|| Listing {
                revision: page
                    .header()
                    .map_or(0, |header| unsigned(header.revision())),
                items: Vec::new(),
            });
            let more = page.more();
            take_items(&mut page, &mut listing.items)?;
            match listing.items.last() {
                Some(last) if more => {
                    from = last.key.as_bytes().to_vec();
                    from.push(0);
                }
                _ => {
                    return Ok(std::mem::replace(
                        listing,
                        Listing {
                            revision: 0,
                            items: vec![],
                        },
                    ));
                }
            }
        }
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        check_key(key)?;
        let mut kv = self.kv.clone();
        let mut found = call("get", kv.get(key, None)).await?;
        let mut items = Vec::with_capacity(1);
        take_items(&mut found, &mut items)?;
        Ok(items.pop())
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        check_key(prefix)?;
        for _ in 0..MAX_LIST_ATTEMPTS {
            match self.list_at_one_revision(prefix).await {
                Err(StoreError::Compacted { .. }) => {}
                done => return done,
            }
        }
        Err(StoreError::Unavailable {
            doing: "list: overtaken by compactions",
            source: None,
        })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let lease = txn.ops.iter().find_map(|op| match op {
            Op::Put { lease, .. } => *lease,
            Op::Delete { .. } => None,
        });
        let compares: Vec<_> = txn.compares.into_iter().map(compare).collect();
        let ops: Vec<_> = txn.ops.into_iter().map(operation).collect();
        let request = EtcdTxn::new().when(compares).and_then(ops);
        let mut kv = self.kv.clone();
        let answer = call("transaction", kv.txn(request))
            .await
            .map_err(|e| of_lease(e, lease))?;
        if answer.succeeded() {
            let revision = answer
                .header()
                .map_or(0, |header| unsigned(header.revision()));
            Ok(TxnOutcome::Committed { revision })
        } else {
            Ok(TxnOutcome::Conflict)
        }
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Watch, StoreError> {
        check_key(prefix)?;
        check_from_revision(from_revision)?;
        EtcdWatch::open(self.watch.clone(), prefix, from_revision)
            .await
            .map(Watch::new)
    }

    async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        let mut kv = self.kv.clone();
        match call("compact", kv.compact(signed(revision), None)).await {
            Ok(_) | Err(StoreError::Compacted { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let seconds = signed(granted_ttl(ttl).as_secs());
        let mut lease = self.lease.clone();
        let granted = call("grant a lease", lease.grant(seconds, None)).await?;
        Ok(LeaseId::from_raw(granted.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        let mut client = self.lease.clone();
        // Opening the stream renews once and keeps the answer to itself, so we ask again for the
        // time. A renewal is answered from the leader's memory; a stream kept for each lease
        // would have to be looked after.
        let renew = async {
            let (mut keeper, mut answers) = client.keep_alive(lease.raw()).await?;
            keeper.keep_alive().await?;
            answers.message().await
        };
        let answer = call("keep a lease alive", renew)
            .await
            .map_err(|e| of_lease(e, Some(lease)))?;
        match answer.map(|answer| answer.ttl()) {
            Some(seconds) if seconds > 0 => Ok(Duration::from_secs(unsigned(seconds))),
            Some(_) => Err(StoreError::LeaseExpired { lease }),
            None => Err(StoreError::Unavailable {
                doing: "keep a lease alive",
                source: None,
            }),
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let mut client = self.lease.clone();
        let revoked = call("revoke a lease", client.revoke(lease.raw())).await;
        match revoked.map_err(|e| of_lease(e, Some(lease))) {
            Ok(_) | Err(StoreError::LeaseExpired { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn compare(compare: Compare) -> EtcdCompare {
    match compare {
        Compare::ModRevision { key, revision } => {
            EtcdCompare::mod_revision(key, CompareOp::Equal, signed(revision))
        }
        Compare::CreateRevision { key, revision } => {
            EtcdCompare::create_revision(key, CompareOp::Equal, signed(revision))
        }
    }
}

fn operation(op: Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.raw()));
            TxnOp::put(key, value, options)
        }
        Op::Delete { key } => TxnOp::delete(key, None::<DeleteOptions>),
    }
}

fn take_items(found: &mut GetResponse, items: &mut Vec<KeyValue>) -> Result<(), StoreError> {
    for found in found.take_kvs() {
        items.push(item(found)?);
    }
    Ok(())
}

fn item(found: etcd_client::KeyValue) -> Result<KeyValue, StoreError> {
    let (mod_revision, create_revision) = (found.mod_revision(), found.create_revision());
    let (key, value) = found.into_key_value();
    let key = String::from_utf8(key).map_err(|error| StoreError::Corrupt {
        reason: "a key below our prefix is not text".into(),
        source: Some(Box::new(error)),
    })?;
    Ok(KeyValue {
        key,
        value,
        mod_revision: unsigned(mod_revision),
        create_revision: unsigned(create_revision),
    })
}

/// The first key after all that start with `prefix`.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // Text never holds the byte 0xff, so the last one can always be raised.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// etcd counts revisions and seconds in i64, from 0 up.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// Runs one call under the deadline and sorts its error by what the caller does next.
async fn call<T>(
    doing: &'static str,
    call: impl Future<Output = Result<T, EtcdError>>,
) -> Result<T, StoreError> {
    match timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(sorted(doing, error)),
        Err(late) => Err(StoreError::Unavailable {
            doing,
            source: Some(Box::new(late)),
        }),
    }
}

/// What etcd says when a call comes with yesterday's token.
const AUTH_MOVED: [&str; 2] = ["revision of auth store is old", "invalid auth token"];
const LEASE_NOT_FOUND: &str = "lease not found";

fn sorted(doing: &'static str, error: EtcdError) -> StoreError {
    let invalid = |reason: String| StoreError::Invalid {
        reason: format!("{doing}: {reason}"),
    };
    match error {
        EtcdError::GRpcStatus(ref status) => match status.code() {
            Code::OutOfRange if status.message().contains("compacted") => {
                StoreError::Compacted { revision: 0 }
            }
            // Which lease is known to the caller: see `of_lease`.
            Code::NotFound if status.message().contains(LEASE_NOT_FOUND) => {
                StoreError::LeaseExpired {
                    lease: LeaseId::from_raw(0),
                }
            }
            // Users were changed meanwhile, or the token has ended: the next call has a new one.
            Code::InvalidArgument | Code::Unauthenticated
                if AUTH_MOVED
                    .iter()
                    .any(|said| status.message().contains(said)) =>
            {
                StoreError::Unavailable {
                    doing,
                    source: Some(Box::new(error)),
                }
            }
            Code::InvalidArgument
            | Code::OutOfRange
            | Code::NotFound
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented => invalid(status.message().to_owned()),
            _ => StoreError::Unavailable {
                doing,
                source: Some(Box::new(error)),
            },
        },
        EtcdError::LeaseKeepAliveError(ref reason) if reason.contains(LEASE_NOT_FOUND) => {
            StoreError::LeaseExpired {
                lease: LeaseId::from_raw(0),
            }
        }
        EtcdError::InvalidArgs(reason) => invalid(reason),
        EtcdError::InvalidUri(error) => invalid(error.to_string()),
        error => StoreError::Unavailable {
            doing,
            source: Some(Box::new(error)),
        },
    }
}

fn of_lease(error: StoreError, lease: Option<LeaseId>) -> StoreError {
    match (error, lease) {
        (StoreError::LeaseExpired { .. }, Some(lease)) => StoreError::LeaseExpired { lease },
        (error, _) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_after_its_keys_and_before_its_neighbours() {
        let end = end_of("/shard/i-1/");
        assert!(b"/shard/i-1/zzz".as_slice() < end.as_slice());
        assert!(b"/shard/i-10/a".as_slice() > end.as_slice());
    }

    #[test]
    fn errors_are_sorted_by_what_the_caller_does_next() {
        let status = |code, text: &str| EtcdError::GRpcStatus(tonic::Status::new(code, text));
        let sort = |code, text| sorted("x", status(code, text));
        assert!(matches!(
            sort(Code::Unavailable, "no leader"),
            StoreError::Unavailable { .. }
        ));
        assert!(matches!(
            sort(Code::Cancelled, ""),
            StoreError::Unavailable { .. }
        ));
        let compacted = "etcdserver: mvcc: required revision has been compacted";
        assert!(matches!(
            sort(Code::OutOfRange, compacted),
            StoreError::Compacted { .. }
        ));
        let future = "etcdserver: mvcc: required revision is a future revision";
        assert!(matches!(
            sort(Code::OutOfRange, future),
            StoreError::Invalid { .. }
        ));
        let token = "etcdserver: invalid auth token";
        assert!(matches!(
            sort(Code::Unauthenticated, token),
            StoreError::Unavailable { .. }
        ));
        let lease = "etcdserver: requested lease not found";
        assert!(matches!(
            sort(Code::NotFound, lease),
            StoreError::LeaseExpired { .. }
        ));
    }
}
