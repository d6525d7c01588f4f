//! Changes of what an instance is like: parameters and accounts.
//!
//! **Invariant:** engine parameters are stored only after running nodes took them, and when a node
//! refused, or nothing could be stored, those that took them are told to go back. What a controller
//! that dies in between leaves behind, the agents undo by themselves.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prost::Message as _;
use slotmesh_proto::{agent::v1 as agent, instance::v1 as api, store::v1::IdempotencyRecord};
use slotmesh_task::{
    ProcessState,
    admit::{self, RefusalKind},
};
use slotmesh_topology::{
    Instance, InstanceId, InstanceState, NodeId,
    account::{self, Account},
    parameter, wire,
};
use tokio::task::JoinSet;
use tonic::Status;
use tracing::{info, warn};

use super::{ADMIT_TRIES, Instances, busy};
use crate::{
    drive::write::put_instance,
    grpc::{refuse, refused, store_failed, token::Token},
    leader::{LeaderOutcome, Term},
};

/// A node sets parameters in a millisecond; one that is busy for longer is not waited for, and gets
/// them with its next assignment.
const NODE_TIMEOUT: Duration = Duration::from_millis(1_500);
/// After a lost race: until the mirror shows who won.
const MIRROR_WAIT: Duration = Duration::from_millis(500);

/// One change of parameters at a time and instance: two at once would each undo the other's.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns {
    instances: Arc<Mutex<BTreeMap<InstanceId, Arc<tokio::sync::Mutex<()>>>>>,
}

impl Turns {
    fn of(&self, instance: &InstanceId) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self
            .instances
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Those that nobody waits for.
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry(instance.clone()).or_default().clone()
    }
}

/// A running node, where its agent is, and what it had before.
#[derive(Clone, Debug)]
struct Target {
    node: NodeId,
    agent: String,
}

/// What running nodes said.
#[derive(Debug, Default)]
struct Answers {
    /// By node: the values of before.
    taken: BTreeMap<NodeId, HashMap<String, String>>,
    /// Words of the first node, in the order of shards, that refused.
    refusal: Option<String>,
}

impl Instances {
    pub(super) async fn change_parameters(
        self,
        request: api::UpdateParametersRequest,
    ) -> Result<u64, Status> {
        admit::parameter_changes(&request).map_err(|r| refused(&r))?;
        let token = Token::of(
            &request.client_token,
            "UpdateParameters",
            &ordered(&request),
        )?;
        if let Some(earlier) = token.earlier(&self.context).await? {
            return Ok(revision_of(&earlier));
        }
        let (found, _) = self.instance(&request.instance_id)?;
        let turn = self.turns.of(&found.id);
        let _turn = turn.lock().await;
        let mut taken = BTreeMap::new();
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            let (instance, revision) = self.instance(&request.instance_id)?;
            let next = with_parameters(&instance, &request)?;
            self.disks_can_be_asked(&instance, &request.proxy)?;
            if !request.engine.is_empty() {
                // First values of before win: a second round would report the first round's.
                for (node, previous) in self.set_on_nodes(term, &next, &request.engine).await? {
                    taken.entry(node).or_insert(previous);
                }
            }
            match self.replace(term, &instance, revision, &next, &token).await {
                Ok(Some(revision)) => {
                    info!(instance = %next.id, engine = request.engine.len(), proxy = request.proxy.len(), "parameters changed");
                    return Ok(revision);
                }
                Ok(None) => {}
                Err(status) => {
                    // A store that did not answer may have stored it; agents find out.
                    if status.code() != tonic::Code::Unavailable {
                        self.undo(term, &next, &taken).await;
                    }
                    return Err(status);
                }
            }
        }
        if let Ok(term) = self.context.leading() {
            self.undo(term, &found, &taken).await;
        }
        Err(busy())
    }

    pub(super) async fn change_accounts(
        &self,
        request: api::UpdateAccountsRequest,
    ) -> Result<u64, Status> {
        let body = api::UpdateAccountsRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let token = Token::of(
            &request.client_token,
            "UpdateAccounts",
            &body.encode_to_vec(),
        )?;
        if let Some(earlier) = token.earlier(&self.context).await? {
            return Ok(revision_of(&earlier));
        }
        let changed: Vec<Account> = request.accounts.iter().map(wire::account_from).collect();
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            let (instance, revision) = self.instance(&request.instance_id)?;
            let accounts = account::change(&instance.accounts, &changed, &request.removed)
                .map_err(|error| refused(&admit::account_refusal(&error)))?;
            let next = Instance {
                accounts,
                ..instance.clone()
            };
            let replaced = self.replace(term, &instance, revision, &next, &token);
            if let Some(revision) = replaced.await? {
                info!(instance = %next.id, changed = changed.len(), removed = request.removed.len(), "accounts changed");
                return Ok(revision);
            }
        }
        Err(busy())
    }

    /// Writes the instance's record; `None` when it lost a race, and the mirror shows to whom.
    pub(super) async fn replace(
        &self,
        term: Term,
        old: &Instance,
        revision: u64,
        next: &Instance,
        token: &Token,
    ) -> Result<Option<u64>, Status> {
        if old.state == InstanceState::Deleting {
            return Err(refuse(
                RefusalKind::Precondition,
                "INSTANCE_DELETING",
                format!("instance {} is being deleted", old.id),
            ));
        }
        if old == next {
            return Ok(Some(revision));
        }
        let txn = put_instance(term.txn(), revision, next);
        let txn = token.put(txn, "", &revision.to_string());
        match txn.commit(&*self.context.store).await {
            Ok(LeaderOutcome::Committed { revision }) => {
                // So that the caller's next read, here, sees it.
                self.context.mirror.shows(revision).await;
                Ok(Some(revision))
            }
            Ok(LeaderOutcome::Conflict) => {
                let mut state = self.context.mirror.subscribe();
                let newer = state.wait_for(|s| {
                    s.instances
                        .get(&next.id)
                        .is_none_or(|i| i.mod_revision != revision)
                });
                let _ = tokio::time::timeout(MIRROR_WAIT, newer).await;
                Ok(None)
            }
            Ok(LeaderOutcome::Deposed) => self.context.leading().map(|_| None),
            Err(error) => Err(store_failed(&error)),
        }
    }

    /// Sets engine parameters on every running node, or on none.
    async fn set_on_nodes(
        &self,
        term: Term,
        next: &Instance,
        parameters: &HashMap<String, String>,
    ) -> Result<BTreeMap<NodeId, HashMap<String, String>>, Status> {
        let targets = self.running_nodes(&next.id);
        let request = |node: &NodeId| agent::SetParametersRequest {
            node_id: node.to_string(),
            parameters: parameters.clone(),
            undo: false,
            ..call(term, next)
        };
        let answers = self.ask(targets, request).await;
        if let Some(words) = answers.refusal {
            self.undo(term, next, &answers.taken).await;
            // Alone in the message: proxies repeat it to their clients.
            return Err(refuse(RefusalKind::Invalid, "ENGINE_REFUSED", words));
        }
        if answers.taken.is_empty() {
            return Err(refuse(
                RefusalKind::Unavailable,
                "NO_NODE_ANSWERS",
                "no node of the instance answers now; try again in a moment",
            ));
        }
        Ok(answers.taken)
    }

    /// Values of before, on those nodes that took others.
    async fn undo(
        &self,
        term: Term,
        next: &Instance,
        taken: &BTreeMap<NodeId, HashMap<String, String>>,
    ) {
        let mut targets = self.running_nodes(&next.id);
        targets.retain(|target| taken.contains_key(&target.node));
        let request = |node: &NodeId| agent::SetParametersRequest {
            node_id: node.to_string(),
            parameters: taken.get(node).cloned().unwrap_or_default(),
            undo: true,
            ..call(term, next)
        };
        let count = targets.len();
        let undone = self.ask(targets, request).await;
        if undone.taken.len() < count {
            warn!(instance = %next.id, "a node did not take its parameters back; its agent will");
        }
    }

    async fn ask(
        &self,
        targets: Vec<Target>,
        request: impl Fn(&NodeId) -> agent::SetParametersRequest,
    ) -> Answers {
        let mut calls = JoinSet::new();
        for (position, target) in targets.into_iter().enumerate() {
            let (agents, request) = (self.context.agents.clone(), request(&target.node));
            calls.spawn(async move {
                let answer = agents.set_parameters(&target.agent, request).await;
                (position, target.node, answer)
            });
        }
        let mut answers = Answers::default();
        let mut first = usize::MAX;
        while let Some(called) = calls.join_next().await {
            match called {
                Ok((position, _, Ok(said))) if !said.refusal.is_empty() => {
                    if position < first {
                        (first, answers.refusal) = (position, Some(said.refusal));
                    }
                }
                Ok((_, node, Ok(said))) if said.running => {
                    answers.taken.insert(node, said.previous);
                }
                Ok((_, node, Ok(_))) => info!(%node, "no process took the parameters"),
                Ok((_, node, Err(status))) => {
                    warn!(%node, error = status.message(), "parameters not set");
                }
                Err(error) => warn!(%error, "call to an agent died"),
            }
        }
        answers
    }

    /// In the order of shards.
    fn running_nodes(&self, instance: &InstanceId) -> Vec<Target> {
        let shards = self.context.mirror.read(|s| s.shards_of(instance));
        let members = shards.iter().flat_map(|s| &s.value.members);
        let is_running = |node: &NodeId| {
            self.context.hub.read(|fleet| {
                fleet
                    .node(node)
                    .is_some_and(|seen| seen.state == ProcessState::Running)
            })
        };
        members
            .filter(|m| is_running(&m.node))
            .filter_map(|m| {
                let agent = self.context.hub.agent_address(&m.host)?;
                let node = m.node.clone();
                Some(Target { node, agent })
            })
            .collect()
    }
}

/// The revision that a repeated request is told: the topology has what was asked since before it.
pub(super) fn revision_of(earlier: &IdempotencyRecord) -> u64 {
    earlier.resource_id.parse().unwrap_or_default()
}

/// The request without its token; maps have no order of their own.
fn ordered(request: &api::UpdateParametersRequest) -> Vec<u8> {
    let mut body = request.instance_id.as_bytes().to_vec();
    for map in [&request.engine, &request.proxy] {
        body.push(0);
        for (name, value) in map.iter().collect::<BTreeMap<_, _>>() {
            for part in [name, value] {
                body.extend_from_slice(&part.len().to_be_bytes());
                body.extend_from_slice(part.as_bytes());
            }
        }
    }
    body
}

/// What all calls for a change have in common.
fn call(term: Term, next: &Instance) -> agent::SetParametersRequest {
    agent::SetParametersRequest {
        term: term.number(),
        version: next.parameters_version,
        timeout_ms: u32::try_from(NODE_TIMEOUT.as_millis()).unwrap_or(u32::MAX),
        ..agent::SetParametersRequest::default()
    }
}

/// The instance as it will be. Its version rises only with a change of what is stored.
#[allow(clippy::result_large_err)]
fn with_parameters(
    instance: &Instance,
    request: &api::UpdateParametersRequest,
) -> Result<Instance, Status> {
    let mut next = instance.clone();
    for (name, value) in &request.engine {
        let name = parameter::engine_name(name);
        next.parameters.insert(name, value.clone());
    }
    if next.parameters.len() > parameter::ENGINE_MAX {
        let error = parameter::ParameterError::TooMany;
        return Err(refused(&admit::parameter_refusal(&error)));
    }
    if next.parameters != instance.parameters {
        next.parameters_version += 1;
    }
    for (name, value) in &request.proxy {
        if value.is_empty() {
            next.proxy_parameters.remove(name);
        } else {
            next.proxy_parameters.insert(name.clone(), value.clone());
        }
    }
    Ok(next)
}
