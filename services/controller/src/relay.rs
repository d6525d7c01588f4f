//! What a controller that does not lead tells the leader: all that its agents and proxies say.
//!
//! Invariant: one stream, to the leader of the newest known term. It tells levels: a slow leader
//! gets the newest of everything, never a queue; a new one gets everything.

use std::{collections::BTreeMap, convert::Infallible, time::Duration};

use slotmesh_proto::{
    peer::v1::{
        self as pb, peer_service_client::PeerServiceClient, relay_request::Message as Said,
        relay_response::Message as Heard,
    },
    topology::v1 as topology,
};
use slotmesh_runtime::backoff::Backoff;
use slotmesh_topology::{HostId, ProxyId};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tracing::{info, warn};

use crate::{
    clock,
    grpc::Context,
    hub::{HostEntry, Hub, Peers, ProxyEntry},
    leader::{Leader, Leadership},
};

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// A leader that hangs is noticed within two of these; until then its successor waits to be told.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// A leader that takes nothing for this long is tried anew.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);
/// Messages on their way; beyond, the next look finds the newest.
const UNSENT_MAX: usize = 64;
/// Between attempts: first and longest. A new leader decides from reports one second after it began.
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
const BACKOFF_CAP: Duration = Duration::from_millis(250);
/// Agents report twice a second.
const REPORT_AGE_MS_MAX: u64 = 1_000;
/// How often what no record names any more is forgotten here; a leader's own loop does so, too.
const FORGET_EVERY: Duration = Duration::from_secs(600);

#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error("connect to the leader")]
    Connect(#[from] tonic::transport::Error),
    #[error("the leader ended the stream: {}", .0.message())]
    Status(#[from] tonic::Status),
    #[error("the leader takes nothing")]
    Silent,
    #[error("the leader closed the stream")]
    Closed,
}

/// Relays while another controller leads, until `stop`.
pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let mut leadership = context.leadership.clone();
    let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_CAP);
    let mut forget_at = Instant::now() + FORGET_EVERY;
    while !stop.is_cancelled() {
        let leader = leadership.borrow_and_update().leader().cloned();
        let Some(leader) = leader else {
            backoff.reset();
            tokio::select! {
                () = stop.cancelled() => return,
                changed = leadership.changed() => if changed.is_err() { return },
            }
            continue;
        };
        // Not when nobody is known to lead: the leader ends the stream if it leads no more, and a
        // store that is slow for a moment takes nothing from it.
        let moved = |l: &Leadership| match l {
            Leadership::Leading { .. } => true,
            Leadership::Following { leader: known, .. } => {
                known.as_ref().is_some_and(|known| *known != leader)
            }
        };
        let end = tokio::select! {
            () = stop.cancelled() => return,
            changed = leadership.wait_for(moved) => match changed {
                Ok(_) => continue,
                Err(_) => return,
            },
            end = relay_to(&context, &leader) => match end {
                Ok(never) => match never {},
                Err(end) => end,
            },
        };
        warn!(leader = leader.address, error = %end, source = ?std::error::Error::source(&end), "relay broke");
        if Instant::now() >= forget_at {
            forget_at = Instant::now() + FORGET_EVERY;
            forget_others(&context);
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(backoff.next_delay()) => {}
        }
    }
}

/// So that the hub of a controller that never leads does not grow with time.
fn forget_others(context: &Context) {
    let (nodes, proxies) = context.mirror.read(|state| {
        let members = state.shards.values().flat_map(|s| &s.value.members);
        let proxies = state.instances.values().flat_map(|i| i.value.all_proxies());
        (
            members.map(|m| m.node.clone()).collect(),
            proxies.map(|p| p.proxy.clone()).collect(),
        )
    });
    context.hub.forget_others(&nodes, &proxies);
}

async fn relay_to(context: &Context, leader: &Leader) -> Result<Infallible, RelayError> {
    let channel = Endpoint::from_shared(format!("http://{}", leader.address))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .connect()
        .await?;
    let (sender, receiver) = mpsc::channel(UNSENT_MAX);
    let hello = Said::Hello(pb::RelayHello {
        controller_id: context.controller_id.clone(),
    });
    say(&sender, hello).await?;
    let mut client = PeerServiceClient::new(channel);
    let opened = timeout(SEND_TIMEOUT, client.relay(ReceiverStream::new(receiver)));
    let mut inbound = opened.await.map_err(|_| RelayError::Silent)??.into_inner();
    info!(leader = leader.address, term = leader.term, "relaying");
    let mut news = context.hub.news();
    let mut outbox = Outbox::default();
    loop {
        news.mark_unchanged();
        for message in outbox.collect(&context.hub) {
            say(&sender, message).await?;
        }
        tokio::select! {
            changed = news.changed() => changed.map_err(|_| RelayError::Closed)?,
            heard = inbound.message() => {
                let heard = heard?.ok_or(RelayError::Closed)?;
                if let Some(Heard::HostRefused(refused)) = heard.message {
                    let pb::HostRefused { host_id, agent_instance, other_address } = refused;
                    warn!(host = host_id, other = other_address, "the leader refuses an agent's session");
                    context.hub.refuse_host(&host_id.as_str().into(), &agent_instance);
                }
            }
        }
    }
}

async fn say(sender: &mpsc::Sender<pb::RelayRequest>, message: Said) -> Result<(), RelayError> {
    let request = pb::RelayRequest {
        message: Some(message),
    };
    let sent = timeout(SEND_TIMEOUT, sender.send(request)).await;
    sent.map_err(|_| RelayError::Silent)?
        .map_err(|_| RelayError::Closed)
}

/// What one stream has been told.
#[derive(Debug, Default)]
struct Outbox {
    /// Everything up to this version of the hub.
    told: u64,
    hosts: BTreeMap<HostId, u64>,
    proxies: BTreeMap<ProxyId, u64>,
}

impl Outbox {
    /// What is to be told next.
    fn collect(&mut self, hub: &Hub) -> Vec<Said> {
        hub.look(|peers| {
            let mut messages = Vec::new();
            self.closed(peers, &mut messages);
            for (id, host) in peers.hosts.iter().filter(|(_, h)| h.here) {
                self.host(id, host, &mut messages);
            }
            for (id, proxy) in peers.proxies.iter().filter(|(_, p)| p.here) {
                self.proxy(id, proxy, &mut messages);
            }
            self.told = peers.version;
            messages
        })
    }

    fn closed(&mut self, peers: &Peers, messages: &mut Vec<Said>) {
        self.hosts.retain(|id, _| {
            let there = peers.hosts.get(id).is_some_and(|h| h.here);
            if !there {
                let host_id = id.to_string();
                messages.push(Said::HostClosed(pb::HostClosed { host_id }));
            }
            there
        });
        self.proxies.retain(|id, _| {
            let there = peers.proxies.get(id).is_some_and(|p| p.here);
            if !there {
                let proxy_id = id.to_string();
                messages.push(Said::ProxyClosed(pb::ProxyClosed { proxy_id }));
            }
            there
        });
    }

    fn host(&mut self, id: &HostId, host: &HostEntry, messages: &mut Vec<Said>) {
        let is_new = self.hosts.insert(id.clone(), host.session) != Some(host.session);
        if is_new {
            let register = Some(host.register.clone());
            messages.push(Said::HostOpened(pb::HostOpened { register }));
        }
        // To the leader it is of now, so an old one is kept back: the agent may hang.
        let oldest_ms = clock::now_ms().saturating_sub(REPORT_AGE_MS_MAX);
        let report = host.report.as_ref().filter(|(at, _)| *at >= oldest_ms);
        if let Some((_, report)) = report.filter(|_| is_new || host.version > self.told) {
            messages.push(Said::HostReported(pb::HostReported {
                host_id: id.to_string(),
                report: Some(report.clone()),
            }));
        }
    }

    fn proxy(&mut self, id: &ProxyId, proxy: &ProxyEntry, messages: &mut Vec<Said>) {
        let is_new = self.proxies.insert(id.clone(), proxy.session) != Some(proxy.session);
        if is_new {
            let hello = Some(proxy.hello.clone());
            messages.push(Said::ProxyOpened(pb::ProxyOpened { hello }));
        }
        if !is_new && proxy.version <= self.told {
            return;
        }
        let is_news = |version: u64| is_new || version > self.told;
        let shards = proxy.shards.values().filter(|(v, _)| is_news(*v));
        let holds = proxy.holds.iter().filter(|(v, _)| is_news(*v));
        messages.push(Said::ProxyReported(pb::ProxyReported {
            proxy_id: id.to_string(),
            report: Some(topology::Report {
                shards: shards.map(|(_, s)| s.clone()).collect(),
                holds: holds.map(|(_, h)| h.clone()).collect(),
                ..proxy.report.clone()
            }),
        }));
    }
}

#[cfg(test)]
mod tests {
    use slotmesh_proto::agent::v1 as agent;

    use super::*;

    fn register(opened_unix_us: u64) -> agent::Register {
        agent::Register {
            host_id: "h".into(),
            opened_unix_us,
            ..agent::Register::default()
        }
    }

    fn report(pid: u32) -> agent::HostReport {
        agent::HostReport {
            proxies: vec![agent::ProxyReport {
                pid,
                ..agent::ProxyReport::default()
            }],
            ..agent::HostReport::default()
        }
    }

    fn shard(id: &str, epoch: u64) -> topology::ShardState {
        topology::ShardState {
            shard_id: id.into(),
            epoch,
            ..topology::ShardState::default()
        }
    }

    #[test]
    fn a_new_stream_is_told_everything_and_then_only_the_newest() {
        let hub = Hub::default();
        let session = hub.host_opened(register(1));
        hub.host_reported(&"h".into(), session, &report(1));
        let mut outbox = Outbox::default();
        let told = outbox.collect(&hub);
        assert!(
            matches!(&told[..], [Said::HostOpened(_), Said::HostReported(_)]),
            "{told:?}"
        );
        assert_eq!(outbox.collect(&hub), []);
        hub.host_reported(&"h".into(), session, &report(2));
        hub.host_reported(&"h".into(), session, &report(3));
        let newest = Said::HostReported(pb::HostReported {
            host_id: "h".into(),
            report: Some(report(3)),
        });
        assert_eq!(outbox.collect(&hub), [newest]);
        hub.host_closed(&"h".into(), session);
        assert!(matches!(&outbox.collect(&hub)[..], [Said::HostClosed(_)]));
        assert_eq!(Outbox::default().collect(&hub), []);
    }

    #[test]
    fn shards_and_holds_of_several_reports_are_put_together() {
        let hub = Hub::default();
        let hello = topology::Hello {
            proxy_id: "p".into(),
            shards: vec![shard("0", 1), shard("1", 1)],
            ..topology::Hello::default()
        };
        let session = hub.proxy_opened(hello);
        let mut outbox = Outbox::default();
        let _ = outbox.collect(&hub);
        for (id, epoch) in [("0", 2), ("1", 2), ("0", 3)] {
            let report = topology::Report {
                shards: vec![shard(id, epoch)],
                holds: vec![topology::HoldSample {
                    epoch,
                    ..topology::HoldSample::default()
                }],
                commands: epoch,
                ..topology::Report::default()
            };
            hub.proxy_reported(&"p".into(), session, report);
        }
        let told = outbox.collect(&hub);
        let [Said::ProxyReported(told)] = &told[..] else {
            panic!("{told:?}")
        };
        let told = told.report.clone().unwrap();
        assert_eq!(told.shards, [shard("0", 3), shard("1", 2)]);
        assert_eq!((told.holds.len(), told.commands), (3, 3));
    }

    #[test]
    fn what_was_relayed_here_is_not_relayed_on() {
        let hub = Hub::default();
        let _ = hub.host_relayed(register(1));
        assert_eq!(Outbox::default().collect(&hub), []);
    }
}
