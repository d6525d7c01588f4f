//! The controllers that this agent knows: whom to dial, and the commit that any of them takes.
//!
//! Invariant: a commit is only called refused when a controller that read the record said so;
//! silence is never taken for a no.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use slotmesh_proto::agent::v1::{
    CommitHandoverRequest, ConfirmPromotionRequest, control_service_client::ControlServiceClient,
};
use slotmesh_runtime::backoff::Backoff;
use tokio::time::{Instant, sleep, timeout};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use crate::process::write_atomic;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Dead peers are noticed within twice this time, well below a host's lease.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Longer than a slow transaction of etcd, and short enough to try another controller while proxies
/// hold.
const COMMIT_TRY: Duration = Duration::from_millis(300);
/// Assignments name every controller; a mesh has a handful.
const ADDRESSES_MAX: usize = 16;
/// Addresses of before that are still tried, last: while the store comes back from an outage an
/// assignment may name fewer controllers than there are.
const FORMER_MAX: usize = 8;

/// A commit to make.
#[derive(Debug, Clone)]
pub struct Commit {
    pub instance_id: String,
    pub shard_id: String,
    pub task_id: String,
    pub epoch: u64,
    pub token: String,
    pub target_node_id: String,
    pub critical_us: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommitAnswer {
    /// The record names the target at the next epoch.
    Accepted,
    /// The record is not this hand-over's; it names this primary (empty: not told).
    Refused { primary_node_id: String },
    /// No controller answered by the deadline.
    Unreachable,
}

/// What a controller says of a promotion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Confirmation {
    /// The record names this process at this epoch.
    Confirmed,
    /// A controller has read the record, and it says something else.
    Refused(String),
    /// No controller could read the record by the deadline.
    Unreachable,
}

/// A handle; clones share the list.
#[derive(Debug, Clone)]
pub struct Controllers {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// As configured; never forgotten.
    configured: Vec<String>,
    /// As the newest assignment says.
    learned: Vec<String>,
    /// As earlier ones said, the newest first.
    former: Vec<String>,
    /// Where all of these are kept, for the next process.
    file: Option<PathBuf>,
    channels: HashMap<String, Channel>,
    /// The one whose session is up.
    preferred: Option<String>,
}

impl Controllers {
    pub fn new(configured: Vec<String>) -> Self {
        let inner = Inner {
            configured,
            ..Inner::default()
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// As [`Controllers::new`], with what an earlier process has learned and kept in this file.
    pub fn kept_in(configured: Vec<String>, file: PathBuf) -> Self {
        let kept = fs::read(&file).ok();
        let learned = kept.and_then(|kept| serde_json::from_slice(&kept).ok());
        let inner = Inner {
            configured,
            learned: learned.unwrap_or_default(),
            file: Some(file),
            ..Inner::default()
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// Takes the list of an assignment.
    pub fn learn(&self, addresses: &[String]) {
        let mut inner = self.lock();
        let learned: Vec<_> = addresses.iter().take(ADDRESSES_MAX).cloned().collect();
        if learned.is_empty() || learned == inner.learned {
            return;
        }
        let before = std::mem::replace(&mut inner.learned, learned);
        let mut former: Vec<String> = before.into_iter().chain(inner.former.drain(..)).collect();
        former.retain(|address| !inner.learned.contains(address));
        former.truncate(FORMER_MAX);
        inner.former = former;
        let known = inner.addresses();
        inner.channels.retain(|address, _| known.contains(address));
        let kept: Vec<_> = inner.learned.iter().chain(&inner.former).collect();
        if let (Some(file), Ok(text)) = (&inner.file, serde_json::to_vec(&kept))
            && let Err(error) = write_atomic(file, &text, 0o600)
        {
            tracing::warn!(%error, "addresses of controllers not kept");
        }
    }

    /// Everyone, the preferred one first.
    pub fn addresses(&self) -> Vec<String> {
        self.lock().addresses()
    }

    pub fn prefer(&self, address: Option<String>) {
        self.lock().preferred = address;
    }

    /// A channel that connects when it is first used and again after a break.
    pub fn channel(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        let mut inner = self.lock();
        if let Some(channel) = inner.channels.get(address) {
            return Ok(channel.clone());
        }
        let uri = if address.contains("://") {
            address.to_owned()
        } else {
            format!("http://{address}")
        };
        let channel = Endpoint::from_shared(uri)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .connect_lazy();
        inner.channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    /// Asks one controller after the other until one has read the record, or the deadline is over.
    pub async fn commit(&self, commit: &Commit, deadline: Instant) -> CommitAnswer {
        let mut pause = Backoff::new(Duration::from_millis(2), Duration::from_millis(50));
        loop {
            for address in self.addresses() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return CommitAnswer::Unreachable;
                }
                if let Some(answer) = self.commit_at(&address, commit, left.min(COMMIT_TRY)).await {
                    return answer;
                }
            }
            if Instant::now() >= deadline {
                return CommitAnswer::Unreachable;
            }
            sleep(pause.next_delay()).await;
        }
    }

    /// Asks one controller after the other whether the record names the target of a failover.
    pub async fn confirm(
        &self,
        question: &ConfirmPromotionRequest,
        deadline: Instant,
    ) -> Confirmation {
        let mut pause = Backoff::new(Duration::from_millis(2), Duration::from_millis(50));
        loop {
            for address in self.addresses() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Confirmation::Unreachable;
                }
                let asked = self.confirm_at(&address, question, left.min(COMMIT_TRY));
                if let Some(answer) = asked.await {
                    return answer;
                }
            }
            if Instant::now() >= deadline {
                return Confirmation::Unreachable;
            }
            sleep(pause.next_delay()).await;
        }
    }

    async fn confirm_at(
        &self,
        address: &str,
        question: &ConfirmPromotionRequest,
        limit: Duration,
    ) -> Option<Confirmation> {
        let mut client = ControlServiceClient::new(self.channel(address).ok()?);
        let answer = timeout(limit, client.confirm_promotion(question.clone()))
            .await
            .ok()?;
        match answer {
            Ok(response) => {
                let response = response.into_inner();
                Some(match response.confirmed {
                    true => Confirmation::Confirmed,
                    false => Confirmation::Refused(response.reason),
                })
            }
            Err(status) => {
                // Whatever it is, another controller may have read the record.
                tracing::warn!(controller = address, code = ?status.code(), message = status.message(), "promotion not confirmed");
                None
            }
        }
    }

    async fn commit_at(
        &self,
        address: &str,
        commit: &Commit,
        limit: Duration,
    ) -> Option<CommitAnswer> {
        let mut client = ControlServiceClient::new(self.channel(address).ok()?);
        let request = CommitHandoverRequest {
            instance_id: commit.instance_id.clone(),
            shard_id: commit.shard_id.clone(),
            task_id: commit.task_id.clone(),
            epoch: commit.epoch,
            token: commit.token.clone(),
            critical_us: commit.critical_us,
        };
        let answer = timeout(limit, client.commit_handover(request)).await.ok()?;
        match answer {
            Ok(response) => {
                let response = response.into_inner();
                let target = response.primary_node_id == commit.target_node_id;
                if target && response.epoch == commit.epoch + 1 {
                    return Some(CommitAnswer::Accepted);
                }
                Some(CommitAnswer::Refused {
                    primary_node_id: response.primary_node_id,
                })
            }
            Err(status) => {
                tracing::warn!(controller = address, code = ?status.code(), message = status.message(), "commit of hand-over not taken");
                // These come from a controller that has read the record. All others may come from
                // anywhere on the way, and NotFound from one that has not read the store yet.
                let refused = matches!(
                    status.code(),
                    Code::FailedPrecondition | Code::PermissionDenied | Code::InvalidArgument
                );
                refused.then(|| CommitAnswer::Refused {
                    primary_node_id: String::new(),
                })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn addresses(&self) -> Vec<String> {
        let mut addresses: Vec<String> = Vec::new();
        let all = self
            .preferred
            .iter()
            .chain(&self.learned)
            .chain(&self.configured)
            .chain(&self.former);
        for address in all {
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        addresses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(of: &[&str]) -> Vec<String> {
        of.iter().map(|a| (*a).to_owned()).collect()
    }

    #[test]
    fn what_was_learned_is_there_after_a_restart_and_what_was_known_is_tried_last() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("controllers.json");
        let configured = || all(&["a:1"]);
        let known = Controllers::kept_in(configured(), file.clone());
        assert_eq!(known.addresses(), ["a:1"]);
        known.learn(&all(&["a:1", "b:1", "c:1"]));
        known.learn(&all(&["b:1"]));
        known.learn(&[]);
        assert_eq!(known.addresses(), ["b:1", "a:1", "c:1"]);
        let restarted = Controllers::kept_in(configured(), file);
        let mut addresses = restarted.addresses();
        addresses.sort();
        assert_eq!(addresses, ["a:1", "b:1", "c:1"]);
    }
}
