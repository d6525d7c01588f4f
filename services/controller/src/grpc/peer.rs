//! `PeerService`: what agents and proxies say to other controllers, told to the leader.
//!
//! Invariant: what a stream has told is there while the stream is and this controller leads; a peer
//! that has opened a newer stream elsewhere is left as that stream says.

use std::collections::BTreeMap;

use slotmesh_proto::peer::v1::{
    self as pb, peer_service_server::PeerService, relay_request::Message as Said,
    relay_response::Message as Heard,
};
use slotmesh_proto::{agent::v1::Register, topology::v1::Hello};
use slotmesh_topology::{HostId, ProxyId};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::info;

use super::{Context, MessageStream};
use crate::{
    hub::{Hub, Relayed},
    store::keys::valid_id,
};

/// Answers on their way to one controller: a welcome and refused hosts.
const ANSWERS_BUFFERED: usize = 16;

/// The service.
#[derive(Clone, Debug)]
pub struct Peers {
    context: Context,
}

impl Peers {
    /// The service over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self { context }
    }
}

#[tonic::async_trait]
impl PeerService for Peers {
    type RelayStream = MessageStream<pb::RelayResponse>;

    async fn relay(
        &self,
        request: Request<Streaming<pb::RelayRequest>>,
    ) -> Result<Response<Self::RelayStream>, Status> {
        let term = self.context.leading()?;
        let mut inbound = request.into_inner();
        let first = inbound.message().await?.and_then(|m| m.message);
        let Some(Said::Hello(hello)) = first else {
            return Err(Status::invalid_argument("a relay begins with hello"));
        };
        let (sender, receiver) = mpsc::channel(ANSWERS_BUFFERED);
        let welcome = Heard::Welcome(pb::RelayWelcome {
            term: term.number(),
        });
        // There is room: it is the first.
        let _ = sender.try_send(Ok(answer(welcome)));
        let mut leadership = self.context.leadership.clone();
        let stopping = self.context.stopping.clone();
        let mut told = Told::new(self.context.hub.clone());
        let controller = hello.controller_id;
        info!(controller, %term, "relay opened");
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    () = sender.closed() => break,
                    () = stopping.cancelled() => break,
                    _ = leadership.wait_for(|l| l.term() != Some(term)) => break,
                    message = inbound.message() => message,
                };
                let Ok(Some(message)) = message else { break };
                let refused = message.message.and_then(|said| told.take(said));
                if let Some(refused) = refused
                    && sender
                        .send(Ok(answer(Heard::HostRefused(refused))))
                        .await
                        .is_err()
                {
                    break;
                }
            }
            info!(controller, %term, "relay closed");
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn admit_host(
        &self,
        request: Request<pb::AdmitHostRequest>,
    ) -> Result<Response<pb::AdmitHostResponse>, Status> {
        self.context.leading()?;
        let register = request.into_inner().register.unwrap_or_default();
        let other_address = self.context.hub.other_agent(&register).unwrap_or_default();
        Ok(Response::new(pb::AdmitHostResponse { other_address }))
    }
}

fn answer(message: Heard) -> pb::RelayResponse {
    pb::RelayResponse {
        message: Some(message),
    }
}

/// What one stream has told of each peer; dropped, its peers are gone.
#[derive(Debug)]
struct Told {
    hub: Hub,
    hosts: BTreeMap<HostId, (Register, Option<u64>)>,
    proxies: BTreeMap<ProxyId, (Hello, Option<u64>)>,
}

impl Told {
    fn new(hub: Hub) -> Self {
        Self {
            hub,
            hosts: BTreeMap::new(),
            proxies: BTreeMap::new(),
        }
    }

    /// Takes one message; gives back whom it is refused for.
    fn take(&mut self, said: Said) -> Option<pb::HostRefused> {
        match said {
            Said::Hello(_) => None,
            Said::HostOpened(opened) => self.host_opened(opened.register?),
            Said::HostReported(reported) => {
                let id: HostId = reported.host_id.into();
                let report = reported.report?;
                let (register, session) = self.hosts.get(&id)?.clone();
                if session.is_some_and(|s| self.hub.host_reported(&id, s, &report)) {
                    return None;
                }
                // A newer stream elsewhere had its place; that one may have ended since.
                let refused = self.host_opened(register);
                if let Some((_, Some(session))) = self.hosts.get(&id) {
                    self.hub.host_reported(&id, *session, &report);
                }
                refused
            }
            Said::HostClosed(closed) => {
                let id: HostId = closed.host_id.into();
                if let Some((_, Some(session))) = self.hosts.remove(&id) {
                    self.hub.host_closed(&id, session);
                }
                None
            }
            Said::ProxyOpened(opened) => {
                self.proxy_opened(opened.hello?);
                None
            }
            Said::ProxyReported(reported) => {
                let id: ProxyId = reported.proxy_id.into();
                let report = reported.report?;
                let (hello, session) = self.proxies.get(&id)?.clone();
                let taken =
                    session.is_some_and(|s| self.hub.proxy_reported(&id, s, report.clone()));
                if !taken {
                    self.proxy_opened(hello);
                    if let Some((_, Some(session))) = self.proxies.get(&id) {
                        self.hub.proxy_reported(&id, *session, report);
                    }
                }
                None
            }
            Said::ProxyClosed(closed) => {
                let id: ProxyId = closed.proxy_id.into();
                if let Some((_, Some(session))) = self.proxies.remove(&id) {
                    self.hub.proxy_closed(&id, session);
                }
                None
            }
        }
    }

    fn host_opened(&mut self, register: Register) -> Option<pb::HostRefused> {
        if !valid_id(&register.host_id) {
            return None;
        }
        let id: HostId = register.host_id.as_str().into();
        // An agent that has just been started again: what it had before is over.
        if let Some((known, Some(session))) = self.hosts.get(&id)
            && known.agent_instance != register.agent_instance
        {
            self.hub.host_closed(&id, *session);
        }
        let relayed = self.hub.host_relayed(register.clone());
        let (session, refused) = match relayed {
            Relayed::Taken(session) => (Some(session), None),
            Relayed::Older => (None, None),
            Relayed::InUse(other_address) => {
                let refused = pb::HostRefused {
                    host_id: register.host_id.clone(),
                    agent_instance: register.agent_instance.clone(),
                    other_address,
                };
                (None, Some(refused))
            }
        };
        self.hosts.insert(id, (register, session));
        refused
    }

    fn proxy_opened(&mut self, hello: Hello) {
        if !valid_id(&hello.proxy_id) || !valid_id(&hello.instance_id) {
            return;
        }
        let session = match self.hub.proxy_relayed(hello.clone()) {
            Relayed::Taken(session) => Some(session),
            Relayed::Older | Relayed::InUse(_) => None,
        };
        self.proxies
            .insert(hello.proxy_id.as_str().into(), (hello, session));
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        for (id, (_, session)) in &self.hosts {
            if let Some(session) = session {
                self.hub.host_closed(id, *session);
            }
        }
        for (id, (_, session)) in &self.proxies {
            if let Some(session) = session {
                self.hub.proxy_closed(id, *session);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use slotmesh_proto::agent::v1::{HostReport, NodeReport};

    use super::*;

    fn opened(instance: &str, at: u64) -> Said {
        Said::HostOpened(pb::HostOpened {
            register: Some(Register {
                host_id: "h".into(),
                agent_instance: instance.into(),
                agent_address: format!("of-{instance}"),
                opened_unix_us: at,
                ..Register::default()
            }),
        })
    }

    fn reported(run_id: &str) -> Said {
        let node = NodeReport {
            node_id: "n".into(),
            run_id: run_id.into(),
            ..NodeReport::default()
        };
        Said::HostReported(pb::HostReported {
            host_id: "h".into(),
            report: Some(HostReport {
                nodes: vec![node],
                ..HostReport::default()
            }),
        })
    }

    fn run_id(hub: &Hub) -> String {
        hub.read(|f| f.node(&"n".into()).map(|n| n.run_id.clone()))
            .unwrap_or_default()
    }

    #[test]
    fn of_two_controllers_that_relay_a_host_the_newer_session_counts() {
        let hub = Hub::default();
        let (mut a, mut b) = (Told::new(hub.clone()), Told::new(hub.clone()));
        a.take(opened("x", 1));
        a.take(reported("before"));
        b.take(opened("x", 2));
        b.take(reported("now"));
        a.take(reported("late"));
        a.take(opened("x", 1));
        a.take(reported("late"));
        assert_eq!(run_id(&hub), "now");
        drop(a);
        assert!(hub.agent_address(&"h".into()).is_some(), "b has it");
        drop(b);
        assert!(hub.agent_address(&"h".into()).is_none());
    }

    #[test]
    fn a_session_counts_again_when_the_newer_one_has_ended() {
        let hub = Hub::default();
        let (mut a, mut b) = (Told::new(hub.clone()), Told::new(hub.clone()));
        b.take(opened("x", 2));
        a.take(opened("x", 1));
        b.take(Said::HostClosed(pb::HostClosed {
            host_id: "h".into(),
        }));
        a.take(reported("there"));
        assert_eq!(run_id(&hub), "there");
        assert!(hub.agent_address(&"h".into()).is_some());
    }

    #[test]
    fn another_agent_of_a_host_that_has_a_session_is_refused_and_named() {
        let hub = Hub::default();
        let session = hub.host_opened(Register {
            host_id: "h".into(),
            agent_instance: "x".into(),
            agent_address: "of-x".into(),
            ..Register::default()
        });
        let mut a = Told::new(hub.clone());
        let refused = a.take(opened("y", 1)).unwrap();
        assert_eq!(
            (
                refused.agent_instance.as_str(),
                refused.other_address.as_str()
            ),
            ("y", "of-x")
        );
        a.take(reported("of y"));
        assert_eq!(run_id(&hub), "");
        hub.host_closed(&"h".into(), session);
        assert_eq!(a.take(reported("of y")), None);
        assert_eq!(run_id(&hub), "of y");
    }
}
