//! `ControlService`: sessions of agents, and the delegated commit of a switchover.

use slotmesh_proto::agent::v1::{
    self as pb, control_service_server::ControlService, session_request, session_response,
};
use slotmesh_task::admit::RefusalKind;
use slotmesh_topology::{Epoch, HostId, InstanceId, ShardId, assignment};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{Context, MessageStream, refuse, store_failed};
use crate::{
    drive::write::{Author, encode_shard, epoch_record, shard_key},
    hosts,
    mirror::State,
    store::{
        Txn, TxnOutcome,
        keys::{self, Key, valid_id},
    },
};

/// Assignments on their way to one agent; only the newest matters, so few are ever queued.
const ASSIGNMENTS_BUFFERED: usize = 4;
/// Tries of a commit that loses a race: the record can only have moved past the hand-over.
const COMMIT_TRIES: usize = 3;

/// The service.
#[derive(Clone, Debug)]
pub struct Control {
    context: Context,
}

impl Control {
    /// The service over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    /// Keeps the agent's assignment true until the session ends or this controller is cut off.
    async fn send_assignments(
        self,
        host: HostId,
        sender: mpsc::Sender<Result<pb::SessionResponse, Status>>,
    ) {
        let mut state = self.context.mirror.subscribe();
        let mut leadership = self.context.leadership.clone();
        let mut in_reach = self.context.in_reach.clone();
        let mut sent: Option<pb::Assignment> = None;
        loop {
            if let Err(status) = self.context.serving() {
                let _ = sender.send(Err(status)).await;
                return;
            }
            let term = leadership.borrow_and_update().known_term();
            let (mut next, leased_since) = {
                let state = state.borrow_and_update();
                let entry = state.hosts.get(&host);
                let leased_since = entry.and_then(|h| h.leased_since).unwrap_or_default();
                (assignment_of(&host, &state), leased_since)
            };
            next.term = term;
            next.controller_addresses = self
                .context
                .mirror
                .read(|s| self.context.controller_addresses(s));
            // The revision moves with every write anywhere; only a change for this host is sent, and
            // what proves that nothing changed before its lease began.
            let is_news = sent.as_ref().is_none_or(|old| {
                let proves = old.revision < leased_since;
                let changed = pb::Assignment {
                    revision: next.revision,
                    ..old.clone()
                } != next;
                proves || changed
            });
            if is_news {
                sent = Some(next.clone());
                let message = session_response::Message::Assignment(next);
                let response = pb::SessionResponse {
                    message: Some(message),
                };
                if sender.send(Ok(response)).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return },
                changed = leadership.changed() => if changed.is_err() { return },
                changed = in_reach.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
                () = self.context.stopping.cancelled() => return,
            }
        }
    }
}

fn in_use(host: &HostId, address: &str) -> Status {
    refuse(
        RefusalKind::AlreadyExists,
        "HOST_ID_IN_USE",
        format!(
            "the agent at {address} has a session as host {host}: give each agent its own \
             --host-id; one that was just restarted gets in within seconds"
        ),
    )
}

/// The whole intent for one host.
fn assignment_of(host: &HostId, state: &State) -> pb::Assignment {
    let mut nodes = Vec::new();
    for shard in state.shards.values().map(|s| &s.value) {
        let Some(instance) = state.instances.get(&shard.instance) else {
            continue;
        };
        let here = shard.members.iter().filter(|m| m.host == *host);
        nodes.extend(here.map(|m| pb::NodeSpec {
            replica_agents: match m.node == shard.primary {
                true => hosts::replica_agents(state, shard),
                false => Vec::new(),
            },
            ..assignment::node(&instance.value, shard, m)
        }));
        let gone = shard.roster.gone.iter().filter(|gone| gone.host == *host);
        nodes.extend(gone.map(|gone| assignment::gone(&instance.value, shard, &gone.node)));
    }
    let mut proxies = Vec::new();
    for instance in state.instances.values().map(|i| &i.value) {
        let here = instance.proxies.iter().filter(|p| p.host == *host);
        proxies.extend(here.map(|p| assignment::proxy(instance, p)));
        let gone = instance.gone_proxies.iter().filter(|p| p.host == *host);
        proxies.extend(gone.map(|p| assignment::gone_proxy(instance, p)));
    }
    pb::Assignment {
        revision: state.revision,
        nodes,
        proxies,
        ..pb::Assignment::default()
    }
}

#[tonic::async_trait]
impl ControlService for Control {
    type SessionStream = MessageStream<pb::SessionResponse>;

    async fn session(
        &self,
        request: Request<Streaming<pb::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.context.serving()?;
        let mut inbound = request.into_inner();
        let first = inbound.message().await?.and_then(|m| m.message);
        let Some(session_request::Message::Register(register)) = first else {
            return Err(Status::invalid_argument("a session begins with register"));
        };
        if !valid_id(&register.host_id) {
            return Err(Status::invalid_argument(
                "host_id has characters other than A-Z a-z 0-9 - _ . :",
            ));
        }
        let host: HostId = register.host_id.as_str().into();
        if let Some(address) = self.context.other_agent(&register).await {
            return Err(in_use(&host, &address));
        }
        info!(%host, agent = register.agent_address, "agent session opened");
        let session = self.context.hub.host_opened(register.clone());
        let refused = self.context.hub.host_refusal(&host, session);
        let (sender, receiver) = mpsc::channel(ASSIGNMENTS_BUFFERED);
        let (reported, numbers) = watch::channel(0);
        let store = self.context.store.clone();
        tokio::spawn(hosts::keep(store, register, numbers, sender.clone()));
        tokio::spawn(self.clone().send_assignments(host.clone(), sender.clone()));
        let (hub, stopping) = (self.context.hub.clone(), self.context.stopping.clone());
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    () = sender.closed() => break,
                    () = stopping.cancelled() => break,
                    () = refused.cancelled() => {
                        let _ = sender.try_send(Err(in_use(&host, "another controller")));
                        break;
                    }
                    message = inbound.message() => message,
                };
                match message {
                    Ok(Some(pb::SessionRequest {
                        message: Some(session_request::Message::Report(report)),
                    })) => {
                        reported.send_replace(report.number);
                        hub.host_reported(&host, session, &report);
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(status) => {
                        warn!(%host, error = status.message(), "agent session broke");
                        break;
                    }
                }
            }
            info!(%host, "agent session closed");
            hub.host_closed(&host, session);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    /// Served leader or not: the record in the store is the word.
    async fn confirm_promotion(
        &self,
        request: Request<pb::ConfirmPromotionRequest>,
    ) -> Result<Response<pb::ConfirmPromotionResponse>, Status> {
        let request = request.into_inner();
        if !valid_id(&request.instance_id) || !valid_id(&request.shard_id) {
            return Err(Status::invalid_argument(
                "instance_id or shard_id is malformed",
            ));
        }
        let key = Key::Shard {
            instance: &request.instance_id,
            shard: &request.shard_id,
        }
        .to_string();
        let item = self.context.store.get(&key).await;
        let Some(item) = item.map_err(|e| store_failed(&e))? else {
            return Err(refuse(
                RefusalKind::NotFound,
                "SHARD_NOT_FOUND",
                "no such shard",
            ));
        };
        let record = keys::decode(&item).map_err(|e| store_failed(&e))?;
        let shard = slotmesh_topology::wire::shard_from(&record)
            .map_err(|error| Status::internal(error.to_string()))?;
        let node = request.node_id.as_str().into();
        let names_it = shard.epoch == Epoch(request.epoch)
            && shard
                .member(&node)
                .is_some_and(|m| m.run_id == request.run_id)
            && shard.failover().is_some_and(|f| {
                f.task.as_str() == request.task_id && f.target.as_ref() == Some(&node)
            });
        Ok(Response::new(pb::ConfirmPromotionResponse {
            confirmed: names_it,
            reason: match names_it {
                true => String::new(),
                false => format!(
                    "the record is {} at epoch {}",
                    shard.mode.name(),
                    shard.epoch
                ),
            },
        }))
    }

    /// Served leader or not: the token in the record is the right to commit, once.
    async fn commit_handover(
        &self,
        request: Request<pb::CommitHandoverRequest>,
    ) -> Result<Response<pb::CommitHandoverResponse>, Status> {
        let request = request.into_inner();
        if !valid_id(&request.instance_id) || !valid_id(&request.shard_id) {
            return Err(Status::invalid_argument(
                "instance_id or shard_id is malformed",
            ));
        }
        let id = (
            InstanceId::from(request.instance_id.as_str()),
            ShardId::from(&*request.shard_id),
        );
        for _ in 0..COMMIT_TRIES {
            let found = self.context.mirror.read(|s| s.shards.get(&id).cloned());
            let Some(shard) = found else {
                return Err(refuse(
                    RefusalKind::NotFound,
                    "SHARD_NOT_FOUND",
                    "no such shard",
                ));
            };
            let next = match shard.value.commit(Epoch(request.epoch), &request.token) {
                Ok(next) => next,
                Err(error) => {
                    // The mirror may be behind the declaration: look at the store itself once.
                    if self.is_behind(&shard).await? {
                        continue;
                    }
                    // Committed already, and the answer was lost: say so again. The caller looks
                    // whether the primary is the one that it switched to.
                    if shard.value.epoch == Epoch(request.epoch).next() {
                        return Ok(Response::new(pb::CommitHandoverResponse {
                            epoch: shard.value.epoch.0,
                            primary_node_id: shard.value.primary.to_string(),
                        }));
                    }
                    return Err(refuse(
                        RefusalKind::Precondition,
                        "HANDOVER_OVER",
                        error.to_string(),
                    ));
                }
            };
            let key = shard_key(&next);
            let txn = Txn::new()
                .unchanged(key.clone(), shard.mod_revision)
                .put(key, encode_shard(&next));
            let task = shard.value.handover().map(|h| h.task.to_string());
            let trace_id = self.context.mirror.read(|s| {
                let task = shard.value.handover().and_then(|h| s.tasks.get(&h.task));
                task.map(|t| t.value.trace_id.clone()).unwrap_or_default()
            });
            let author = Author {
                cause: "SwitchOver",
                task: task.as_deref().unwrap_or_default(),
                trace: &trace_id,
                who: &self.context.controller_id,
                term: 0,
            };
            let txn = match epoch_record(&shard.value, &next, author) {
                Some((key, record)) => txn.put(key, record),
                None => txn,
            };
            let outcome = self
                .context
                .store
                .txn(txn)
                .await
                .map_err(|e| store_failed(&e))?;
            match outcome {
                TxnOutcome::Committed { .. } => {
                    info!(
                        instance = %next.instance, shard = %next.id, epoch = %next.epoch,
                        primary = %next.primary, critical_us = request.critical_us, trace_id, "committed"
                    );
                    return Ok(Response::new(pb::CommitHandoverResponse {
                        epoch: next.epoch.0,
                        primary_node_id: next.primary.to_string(),
                    }));
                }
                TxnOutcome::Conflict => {
                    self.is_behind(&shard).await?;
                }
            }
        }
        Err(refuse(
            RefusalKind::Conflict,
            "CONFLICT",
            "the shard's record moves on; try again",
        ))
    }
}

impl Control {
    /// Whether the store holds a newer record; waits for the mirror to show it.
    async fn is_behind(
        &self,
        shard: &crate::mirror::Versioned<slotmesh_topology::Shard>,
    ) -> Result<bool, Status> {
        let key = shard_key(&shard.value);
        let found = self
            .context
            .store
            .get(&key)
            .await
            .map_err(|e| store_failed(&e))?;
        match found {
            Some(found) if found.mod_revision > shard.mod_revision => {
                Ok(self.context.mirror.shows(found.mod_revision).await)
            }
            _ => Ok(false),
        }
    }
}
