//! `TopologyService`: one stream per proxy. A snapshot first, then what changed; each answered.
//!
//! **Invariant:** the base of a delta is what the proxy acknowledged or was sent last on this
//! stream; after a refusal it is sent a whole snapshot with the next change.

use std::{collections::BTreeMap, time::Duration};

use slotmesh_proto::topology::v1::{
    self as pb, topology_service_server::TopologyService, watch_request, watch_response,
};
use slotmesh_topology::{InstanceId, Leaving, ProxyId, delta::View, route};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{Context, MessageStream, refuse};
use crate::{clock, mirror::State, store::keys::valid_id};

/// Messages on their way to one proxy; a proxy that reads slower is waited for, alone.
const MESSAGES_BUFFERED: usize = 16;
/// Between messages of a stream when nothing changes. A proxy that holds requests leaves a stream that
/// misses three.
const HEARTBEAT: Duration = Duration::from_millis(200);

/// The service.
#[derive(Clone, Debug)]
pub struct Topology {
    context: Context,
}

impl Topology {
    /// The service over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    /// Keeps the proxy's routes true until its stream ends or this controller is cut off. `leaves`: it was
    /// told to leave before.
    async fn publish(
        self,
        (instance, proxy): (InstanceId, ProxyId),
        mut leaves: bool,
        mut refused: watch::Receiver<u64>,
        sender: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    ) {
        let mut state = self.context.mirror.subscribe();
        let mut in_reach = self.context.in_reach.clone();
        let mut sent: Option<View> = None;
        let mut refused_at = None;
        let mut told: Option<Leaving> = None;
        let mut nonce = 0;
        loop {
            if let Err(status) = self.context.serving() {
                let _ = sender.send(Err(status)).await;
                return;
            }
            let (view, leaving) = {
                let state = state.borrow_and_update();
                (
                    self.view_of(&instance, &state),
                    leaving_of(&instance, &proxy, &state),
                )
            };
            let message = match (&view, &sent) {
                // Not created yet, or deleted: the proxy keeps what it has.
                (None, _) => None,
                // What was refused would be refused again.
                (Some(view), None) if refused_at == Some(view.revision) => None,
                (Some(view), None) => Some(watch_response::Message::Snapshot(view.snapshot())),
                (Some(view), Some(base)) => view.since(base).map(watch_response::Message::Delta),
            };
            if let Some(message) = message {
                nonce += 1;
                sent = view;
                if !say(&sender, nonce, message).await {
                    return;
                }
            }
            // After what it needs to serve those whom it sends away.
            let stays = leaving.is_none() && sent.is_some();
            let news = leaving.filter(|now| sent.is_some() && told.as_ref() != Some(now));
            let order = match news {
                Some(news) => Some(watch_response::Message::Leave(leave(told.insert(news)))),
                None if leaves && stays => Some(watch_response::Message::Stay(pb::Stay {})),
                None => None,
            };
            if let Some(order) = order {
                leaves = !stays;
                if stays {
                    told = None;
                }
                if !say(&sender, 0, order).await {
                    return;
                }
            }
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return },
                changed = in_reach.changed() => if changed.is_err() { return },
                changed = refused.changed() => {
                    if changed.is_err() { return }
                    refused_at = sent.take().map(|view| view.revision);
                }
                () = tokio::time::sleep(HEARTBEAT) => {
                    let revision = state.borrow().revision;
                    let heartbeat = watch_response::Message::Heartbeat(pb::Heartbeat { revision });
                    if !say(&sender, 0, heartbeat).await {
                        return;
                    }
                }
                () = sender.closed() => return,
                () = self.context.stopping.cancelled() => return,
            }
        }
    }

    fn view_of(&self, instance: &InstanceId, state: &State) -> Option<View> {
        let found = state.instances.get(instance)?;
        let shards: BTreeMap<_, _> = state
            .shards
            .values()
            .filter(|s| s.value.instance == *instance)
            .filter_map(|s| route::shard(&found.value, &s.value))
            .map(|route| (route.shard_id.clone(), route))
            .collect();
        // Half an instance is not served: wait until every shard has begun.
        if shards.len() < found.value.shard_count as usize {
            return None;
        }
        let mut settings = route::settings(&found.value);
        settings.controller_addresses = self.context.controller_addresses(state);
        Some(View {
            revision: state.revision,
            settings,
            shards,
        })
    }
}

/// `false`: nobody hears it any more.
async fn say(
    sender: &mpsc::Sender<Result<pb::WatchResponse, Status>>,
    nonce: u64,
    message: watch_response::Message,
) -> bool {
    let response = pb::WatchResponse {
        nonce,
        message: Some(message),
    };
    sender.send(Ok(response)).await.is_ok()
}

fn leaving_of(instance: &InstanceId, proxy: &ProxyId, state: &State) -> Option<Leaving> {
    let known = state.instances.get(instance)?;
    known.value.leaving(proxy).cloned()
}

/// What a proxy is told whose clients are to go elsewhere. A time that is over is a moment: 0 would be
/// none.
fn leave(leaving: &Leaving) -> pb::Leave {
    let within_ms = leaving.until_unix_ms.saturating_sub(clock::now_ms()).max(1);
    pb::Leave {
        endpoint: leaving.endpoint.clone(),
        within_ms: u32::try_from(within_ms).unwrap_or(u32::MAX),
    }
}

#[tonic::async_trait]
impl TopologyService for Topology {
    type WatchStream = MessageStream<pb::WatchResponse>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.context.serving()?;
        let mut inbound = request.into_inner();
        let first = inbound.message().await?.and_then(|m| m.message);
        let Some(watch_request::Message::Hello(hello)) = first else {
            return Err(Status::invalid_argument(
                "a topology stream begins with hello",
            ));
        };
        if !valid_id(&hello.proxy_id) || !valid_id(&hello.instance_id) {
            return Err(Status::invalid_argument(
                "proxy_id or instance_id is malformed",
            ));
        }
        let instance: InstanceId = hello.instance_id.as_str().into();
        if !self
            .context
            .mirror
            .read(|s| s.instances.contains_key(&instance))
        {
            return Err(refuse(
                slotmesh_task::admit::RefusalKind::NotFound,
                "INSTANCE_NOT_FOUND",
                format!("there is no instance {instance}"),
            ));
        }
        let proxy: ProxyId = hello.proxy_id.as_str().into();
        info!(%proxy, %instance, "proxy stream opened");
        let leaves = hello.leaves;
        let session = self.context.hub.proxy_opened(hello);
        let (sender, receiver) = mpsc::channel(MESSAGES_BUFFERED);
        let (refusals, refused) = watch::channel(0);
        let whom = (instance, proxy.clone());
        tokio::spawn(self.clone().publish(whom, leaves, refused, sender.clone()));
        let (hub, stopping) = (self.context.hub.clone(), self.context.stopping.clone());
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    () = sender.closed() => break,
                    () = stopping.cancelled() => break,
                    message = inbound.message() => message,
                };
                match message.map(|m| m.map(|m| m.message)) {
                    Ok(Some(Some(watch_request::Message::Report(report)))) => {
                        hub.proxy_reported(&proxy, session, report);
                    }
                    Ok(Some(Some(watch_request::Message::Nack(nack)))) => {
                        warn!(%proxy, reason = nack.reason, still_on = nack.still_on_revision, "topology refused");
                        refusals.send_modify(|n| *n += 1);
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(status) => {
                        info!(%proxy, error = status.message(), "proxy stream broke");
                        break;
                    }
                }
            }
            info!(%proxy, "proxy stream closed");
            hub.proxy_closed(&proxy, session);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
