//! The topology stream: keeps one to any controller, hands what it says to the workers, tells it
//! what they have reached.
//!
//! Invariants: a message that was refused is answered by a Nack and changes nothing; what is acked
//! is in force for the next turn of every worker, and will be on disk (by a thread of its own: a
//! disk must not delay a hold). Without a controller the last topology stays in force.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use slotmesh_proto::topology::v1 as pb;
use slotmesh_proto::topology::v1::topology_service_client::TopologyServiceClient;
use slotmesh_proto::topology::v1::watch_request::Message as Said;
use slotmesh_proto::topology::v1::watch_response::Message as Heard;
use slotmesh_runtime::backoff::Backoff;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::controllers::Controllers;
use crate::handover::{Office, Role, Stance};
use crate::progress::Progress;
use crate::routing::Routing;
use crate::saved;
use crate::topology::{Refused, Topology};
use crate::worker::WorkerHandle;

/// A controller that is there accepts a connection at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Heartbeats come every 200 ms; after so many missed ones the stream is dead.
const SILENCE_LIMIT: Duration = Duration::from_secs(3);
/// The same while clients wait for what a controller will say: with a connection to the next one it
/// stays below a second, the budget of a hold. Three heartbeats, so that one late one is no reason.
const WAITING_SILENCE_LIMIT: Duration = Duration::from_millis(650);
/// Between looks at how long the stream has been silent.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Reports are sent on change and this often.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);
/// First and longest wait between attempts to reach a controller.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// A tenth of the default hold budget: what a controller's death leaves held ends with the next
/// controller that is found.
const BACKOFF_CAP: Duration = Duration::from_millis(500);
/// A name that is not resolved by then fails the message.
const RESOLVE_LIMIT: Duration = Duration::from_secs(2);
/// Messages to the controller that may wait to be sent.
const OUTGOING: usize = 64;

/// Who this proxy is, for the first message of a stream.
#[derive(Clone, Debug)]
pub struct Who {
    pub proxy_id: String,
    pub instance: String,
    pub host_id: String,
    pub address: String,
    pub admin_address: String,
}

/// See the module.
#[derive(Debug)]
pub struct Watch {
    pub who: Who,
    pub controllers: Controllers,
    pub data: PathBuf,
    pub routing: Arc<Routing>,
    pub workers: Arc<Vec<WorkerHandle>>,
    pub progress: Arc<Progress>,
    pub freshness: Arc<Freshness>,
    pub topology: Topology,
    /// Whether this process serves, or is about to, or did.
    pub(crate) stance: watch::Receiver<Stance>,
    pub(crate) office: Arc<Office>,
    /// The newest topology, for [`keep_saved`].
    pub to_save: watch::Sender<Option<pb::Snapshot>>,
}

/// How old the topology may be: when a controller was last heard.
#[derive(Debug)]
pub struct Freshness {
    started: Instant,
    heard_ms: AtomicU64,
}

impl Default for Freshness {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            heard_ms: AtomicU64::new(0),
        }
    }
}

impl Freshness {
    fn note(&self) {
        self.heard_ms
            .store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Time since a controller was last heard (or since the start).
    #[must_use]
    pub fn staleness(&self) -> Duration {
        let heard = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(heard)
    }
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error("connect to the controller")]
    Connect(#[from] tonic::transport::Error),
    #[error("the controller ended the stream: {0}")]
    Status(#[from] tonic::Status),
    #[error("the controller was silent for too long")]
    Silent,
    #[error("the stream was closed")]
    Closed,
    #[error("the topology has a gap")]
    Gap,
    #[error("this process has another part now")]
    Role,
}

impl Watch {
    /// Puts a topology in force that was saved by an earlier process. False if there is none.
    pub async fn start_from_disk(&mut self) -> Result<bool, saved::SavedError> {
        let Some(snapshot) = saved::load(&self.data)? else {
            return Ok(false);
        };
        let revision = snapshot.revision;
        match Topology::default().with_snapshot(snapshot) {
            Ok(topology) => match self.publish(topology).await {
                Ok(()) => tracing::info!(revision, "serves from the saved topology"),
                Err(error) => tracing::warn!(%error, "the saved topology cannot be served"),
            },
            Err(error) => tracing::warn!(%error, "the saved topology is not valid"),
        }
        Ok(true)
    }

    /// Keeps a stream until told to stop.
    ///
    /// # Cancel safety
    /// Not needed: ends by the token.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_CAP);
        let mut turn = 0;
        loop {
            let addresses = self.controllers.addresses();
            let Some(controller) = addresses.get(turn % addresses.len().max(1)).cloned() else {
                break;
            };
            turn += 1;
            let began = Instant::now();
            let end = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                end = self.stream(&controller) => end,
            };
            tracing::info!(controller, error = %end, "topology stream ended");
            if matches!(end, StreamEnd::Role) {
                turn -= 1; // the same controller at once: nothing is wrong with it
                continue;
            }
            if began.elapsed() > SILENCE_LIMIT {
                backoff.reset();
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = sleep(backoff.next_delay()) => {}
            }
        }
        stop.cancelled().await;
    }

    /// One stream, until it ends.
    async fn stream(&mut self, controller: &str) -> StreamEnd {
        match self.try_stream(controller).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn try_stream(
        &mut self,
        controller: &str,
    ) -> Result<std::convert::Infallible, StreamEnd> {
        let endpoint = Endpoint::from_shared(format!("http://{controller}"))?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true);
        let mut client = TopologyServiceClient::new(endpoint.connect().await?);
        let role = self.stance.borrow_and_update().role;
        let mut stance = self.stance.clone();
        let (say, outgoing) = mpsc::channel(OUTGOING);
        send(&say, Said::Hello(self.hello(role))).await?;
        let started = client.watch(ReceiverStream::new(outgoing));
        let started = timeout(silence_limit(self.progress.awaits_news()), started)
            .await
            .map_err(|_| StreamEnd::Silent)?;
        let mut heard = started?.into_inner();
        let mut reports = interval(REPORT_INTERVAL);
        reports.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let progress = Arc::clone(&self.progress);
        let mut last = tokio::time::Instant::now();
        loop {
            tokio::select! {
                message = heard.message() => {
                    let message = message?.ok_or(StreamEnd::Closed)?;
                    last = tokio::time::Instant::now();
                    self.freshness.note();
                    if let Some(answer) = self.hear(message).await {
                        let gap = matches!(&answer, (_, Some(Refused::Gap { .. })));
                        send(&say, answer.0).await?;
                        if gap {
                            return Err(StreamEnd::Gap);
                        }
                    }
                }
                changed = stance.changed() => {
                    if changed.is_ok() && stance.borrow_and_update().role != role {
                        return Err(StreamEnd::Role);
                    }
                }
                () = progress.changed.notified() => {
                    send(&say, Said::Report(progress.report())).await?;
                }
                _ = looks.tick() => {
                    if last.elapsed() > silence_limit(progress.awaits_news()) {
                        return Err(StreamEnd::Silent);
                    }
                }
                _ = reports.tick() => {
                    send(&say, Said::Report(progress.report())).await?;
                }
            }
        }
    }

    /// A process that does not serve goes by a name of its own, so that shards are held in it too and
    /// the one that serves stays known.
    fn hello(&self, role: Role) -> pb::Hello {
        let proxy_id = match role {
            Role::Serving => self.who.proxy_id.clone(),
            Role::Candidate | Role::Relieved => {
                format!("{}.{}", self.who.proxy_id, std::process::id())
            }
        };
        pb::Hello {
            proxy_id,
            instance_id: self.who.instance.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            address: self.who.address.clone(),
            admin_address: self.who.admin_address.clone(),
            host_id: self.who.host_id.clone(),
            pid: std::process::id(),
            shards: self.progress.all_shards(),
            opened_unix_us: unix_us(),
            leaves: role == Role::Serving && self.office.leaves(),
        }
    }

    /// Acts on a message; gives the answer to it.
    async fn hear(&mut self, message: pb::WatchResponse) -> Option<(Said, Option<Refused>)> {
        let nonce = message.nonce;
        let next = match message.message? {
            Heard::Heartbeat(_) => return None,
            Heard::Leave(order) => {
                let office = Arc::clone(&self.office);
                // Threads may come to it in another order.
                let number = office.number_leave();
                tokio::task::spawn_blocking(move || office.leave(&order, number));
                return None;
            }
            Heard::Stay(_) => {
                let office = Arc::clone(&self.office);
                let number = office.number_leave();
                tokio::task::spawn_blocking(move || office.stay(number));
                return None;
            }
            Heard::Snapshot(snapshot) => self.topology.with_snapshot(snapshot),
            Heard::Delta(delta) => self.topology.with_delta(delta),
        };
        let published = match next {
            Ok(topology) => self.publish(topology).await,
            Err(refused) => Err(refused),
        };
        let revision = self.topology.revision();
        match published {
            Ok(()) => {
                self.save();
                tracing::debug!(revision, "topology applied");
                Some((Said::Ack(pb::Ack { nonce, revision }), None))
            }
            Err(refused) => {
                tracing::warn!(%refused, still_on = revision, "topology refused");
                let reason = refused.to_string();
                let nack = pb::Nack {
                    nonce,
                    reason,
                    still_on_revision: revision,
                };
                Some((Said::Nack(nack), Some(refused)))
            }
        }
    }

    /// Puts a topology in force in all workers.
    async fn publish(&mut self, topology: Topology) -> Result<(), Refused> {
        let mut resolved = BTreeMap::new();
        for address in topology.addresses() {
            if let Some(socket_address) = resolve(address).await {
                resolved.insert(address.to_owned(), socket_address);
            }
        }
        let table = topology.table(|address| resolved.get(address).copied())?;
        self.controllers.learn(topology.controller_addresses());
        self.routing.publish(table);
        self.workers.iter().for_each(WorkerHandle::wake);
        self.topology = topology;
        Ok(())
    }

    /// Another process may use the same directory.
    fn save(&self) {
        if self.stance.borrow().role != Role::Serving {
            return;
        }
        self.to_save.send_replace(Some(self.topology.to_snapshot()));
    }
}

/// Saves the newest topology whenever there is a newer one, until the sender is gone.
pub async fn keep_saved(data: PathBuf, mut newest: watch::Receiver<Option<pb::Snapshot>>) {
    while newest.changed().await.is_ok() {
        let Some(snapshot) = newest.borrow_and_update().clone() else {
            continue;
        };
        let data = data.clone();
        let saved = tokio::task::spawn_blocking(move || saved::save(&data, &snapshot)).await;
        match saved {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, source = ?std::error::Error::source(&error), "topology not saved");
            }
            Err(error) => tracing::error!(%error, "topology not saved"),
        }
    }
}

/// How long a controller may be silent before another one is asked.
fn silence_limit(awaits_news: bool) -> Duration {
    if awaits_news {
        WAITING_SILENCE_LIMIT
    } else {
        SILENCE_LIMIT
    }
}

/// Orders the streams of one proxy, whichever controller they go to.
fn unix_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_micros() as u64)
}

async fn resolve(address: &str) -> Option<SocketAddr> {
    if let Ok(address) = address.parse() {
        return Some(address);
    }
    let found = timeout(RESOLVE_LIMIT, tokio::net::lookup_host(address)).await;
    found.ok()?.ok()?.next()
}

async fn send(say: &mpsc::Sender<pb::WatchRequest>, message: Said) -> Result<(), StreamEnd> {
    let request = pb::WatchRequest {
        message: Some(message),
    };
    let sent = timeout(SILENCE_LIMIT, say.send(request)).await;
    sent.map_err(|_| StreamEnd::Silent)?
        .map_err(|_| StreamEnd::Closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_controller_is_left_within_a_holds_budget_and_not_for_one_late_heartbeat() {
        const HEARTBEAT: Duration = Duration::from_millis(200);
        const BUDGET: Duration = Duration::from_secs(1);
        let waiting = silence_limit(true);
        assert!(waiting > HEARTBEAT * 3);
        assert!(waiting + LOOK_INTERVAL + BACKOFF_FIRST * 2 < BUDGET);
        assert_eq!(silence_limit(false), SILENCE_LIMIT);
    }
}
