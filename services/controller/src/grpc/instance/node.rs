//! What is said of one node: that it is to be replaced, and whether it is promoted; and after what time
//! an instance's nodes are replaced by themselves.
//!
//! Invariant: what an operator asks for is decided by the same rules as what the leader begins by
//! itself; only the reason differs.

use prost::Message as _;
use slotmesh_proto::instance::v1 as api;
use slotmesh_task::{Spec, Task, admit::RefusalKind, place, replace};
use slotmesh_topology::{HostId, Instance, InstanceState, NodeId, PRIORITY_MAX, Shard};
use tonic::Status;
use tracing::info;

use super::{ADMIT_TRIES, Instances, busy, change::revision_of};
use crate::{
    clock,
    drive::{
        failover::new_task_id,
        replace::{candidates, put_replacement},
        write::{encode_shard, shard_key},
    },
    grpc::{refuse, store_failed, token::Token},
    leader::LeaderOutcome,
    mirror::Versioned,
    store::keys::Key,
    trace,
};

/// A host that is gone for a year is no reason to wait longer.
const REPLACE_AFTER_S_MAX: u32 = 365 * 24 * 60 * 60;

/// Whether nodes may be replaced after so long.
///
/// # Errors
/// When that is out of range.
#[allow(clippy::result_large_err)]
pub(super) fn check_replace_after(seconds: Option<u32>) -> Result<(), Status> {
    if seconds.is_none_or(|s| s <= REPLACE_AFTER_S_MAX) {
        return Ok(());
    }
    Err(refuse(
        RefusalKind::Invalid,
        "REPLACE_AFTER_INVALID",
        format!("replace_after_s is 0 (never) to {REPLACE_AFTER_S_MAX}"),
    ))
}

impl Instances {
    pub(super) async fn change_replace_after(
        &self,
        request: api::ModifyInstanceReplaceAfterRequest,
    ) -> Result<u64, Status> {
        check_replace_after(Some(request.replace_after_s))?;
        let body = api::ModifyInstanceReplaceAfterRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let method = "ModifyInstanceReplaceAfter";
        let token = Token::of(&request.client_token, method, &body.encode_to_vec())?;
        if let Some(earlier) = token.earlier(&self.context).await? {
            return Ok(revision_of(&earlier));
        }
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            let (instance, revision) = self.instance(&request.instance_id)?;
            let next = Instance {
                replace_after_s: request.replace_after_s,
                ..instance.clone()
            };
            let replaced = self.replace(term, &instance, revision, &next, &token);
            if let Some(revision) = replaced.await? {
                info!(instance = %next.id, seconds = next.replace_after_s, "replacement after another time");
                return Ok(revision);
            }
        }
        Err(busy())
    }

    pub(super) async fn change_priority(
        &self,
        request: api::SetNodePriorityRequest,
    ) -> Result<u64, Status> {
        if request.priority > PRIORITY_MAX {
            return Err(refuse(
                RefusalKind::Invalid,
                "PRIORITY_INVALID",
                format!("priority is 0 (never promoted) to {PRIORITY_MAX}"),
            ));
        }
        let body = api::SetNodePriorityRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let token = Token::of(
            &request.client_token,
            "SetNodePriority",
            &body.encode_to_vec(),
        )?;
        if let Some(earlier) = token.earlier(&self.context).await? {
            return Ok(revision_of(&earlier));
        }
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            let (instance, _) = self.instance(&request.instance_id)?;
            let node = NodeId::from(request.node_id.as_str());
            let shard = self.shard_of(&instance, &node)?;
            let next = shard.value.prioritize(&node, request.priority);
            let next = next.map_err(|e| not_found(&e.to_string()))?;
            if next == shard.value {
                return Ok(shard.mod_revision);
            }
            let key = shard_key(&next);
            let txn = term
                .txn()
                .unchanged(key.clone(), shard.mod_revision)
                .put(key, encode_shard(&next));
            let resource = shard.mod_revision.to_string();
            let outcome = token.put(txn, "", &resource).commit(&*self.context.store);
            match outcome.await.map_err(|e| store_failed(&e))? {
                LeaderOutcome::Committed { revision } => {
                    self.context.mirror.shows(revision).await;
                    info!(%node, priority = request.priority, "priority changed");
                    return Ok(revision);
                }
                LeaderOutcome::Conflict => {}
                LeaderOutcome::Deposed => {
                    self.context.leading()?;
                }
            }
        }
        Err(busy())
    }

    /// Admits the replacement of a node on an operator's word.
    pub(super) async fn admit_replacement(
        &self,
        request: api::ReplaceNodeRequest,
    ) -> Result<api::ReplaceNodeResponse, Status> {
        let body = api::ReplaceNodeRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let token = Token::of(&request.client_token, "ReplaceNode", &body.encode_to_vec())?;
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            if let Some(earlier) = token.earlier(&self.context).await? {
                return Ok(api::ReplaceNodeResponse {
                    task_id: earlier.task_id,
                    new_node_id: earlier.resource_id,
                });
            }
            let (instance, revision) = self.instance(&request.instance_id)?;
            let (shard, task) = self.plan_replacement(&instance, &request)?;
            let answer = answer_of(&task);
            // A deletion that is admitted at the same time must not miss this task.
            let key = Key::Instance {
                instance: instance.id.as_str(),
            };
            let txn = put_replacement(term.txn().unchanged(key, revision), &shard, task);
            let txn = token.put(txn, &answer.task_id, &answer.new_node_id);
            let outcome = txn.commit(&*self.context.store).await;
            match outcome.map_err(|e| store_failed(&e))? {
                LeaderOutcome::Committed { revision } => {
                    self.context.mirror.shows(revision).await;
                    info!(
                        task = answer.task_id,
                        node = request.node_id,
                        "replacement admitted"
                    );
                    return Ok(answer);
                }
                LeaderOutcome::Conflict => {}
                LeaderOutcome::Deposed => {
                    self.context.leading()?;
                }
            }
        }
        Err(busy())
    }

    #[allow(clippy::result_large_err)]
    fn plan_replacement(
        &self,
        instance: &Instance,
        request: &api::ReplaceNodeRequest,
    ) -> Result<(Versioned<Shard>, Task), Status> {
        if instance.state != InstanceState::Running {
            return Err(unfit(
                "INSTANCE_NOT_RUNNING",
                &format!("instance {} is not running", instance.id),
            ));
        }
        let node = NodeId::from(request.node_id.as_str());
        let shard = self.shard_of(instance, &node)?;
        let id = (instance.id.clone(), shard.value.id.clone());
        if let Some(owner) = self.context.mirror.read(|s| s.locks.get(&id).cloned()) {
            return Err(refuse(
                RefusalKind::Conflict,
                "SHARD_BUSY",
                format!("shard {} belongs to task {owner}; wait for it to end", id.1),
            ));
        }
        if node == shard.value.primary {
            return Err(unfit(
                "NODE_IS_PRIMARY",
                &format!(
                    "node {node} is its shard's primary; make another node the primary first \
                     (slotmesh switchover), then replace it"
                ),
            ));
        }
        let host = self.host_for(&shard.value, &request.to_host_id)?;
        let cause = format!("an operator wants {node} replaced");
        let now_ms = clock::now_ms();
        let planned = replace::plan(
            new_task_id(),
            &shard.value,
            &node,
            &host,
            (cause, true),
            now_ms,
        );
        let task = planned.map_err(|e| unfit("NODE_NOT_REPLACEABLE", &e.to_string()))?;
        let trace_id = trace::current();
        Ok((shard, Task { trace_id, ..task }))
    }

    /// The host that was asked for, or the best one.
    #[allow(clippy::result_large_err)]
    fn host_for(&self, shard: &Shard, wanted: &str) -> Result<HostId, Status> {
        let (live, best) = self.context.hub.read(|fleet| {
            let live = self.context.mirror.read(|s| candidates(s, fleet));
            let best = place::replacement(&live, shard, &fleet.zones);
            (live, best)
        });
        if wanted.is_empty() {
            return best.ok_or_else(|| {
                unfit(
                    "NO_HOST",
                    "every live host has a node of the shard already; start an agent on another host",
                )
            });
        }
        let host = HostId::from(wanted);
        if !live.iter().any(|c| c.host == host) {
            let why = format!("host {wanted} has no live agent; slotmesh host list shows who has");
            return Err(unfit("HOST_NOT_LIVE", &why));
        }
        if shard.members.iter().any(|m| m.host == host) {
            let why = format!("host {wanted} has a node of shard {} already", shard.id);
            return Err(unfit("HOST_TAKEN", &why));
        }
        Ok(host)
    }

    #[allow(clippy::result_large_err)]
    fn shard_of(&self, instance: &Instance, node: &NodeId) -> Result<Versioned<Shard>, Status> {
        let shards = self.context.mirror.read(|s| s.shards_of(&instance.id));
        let mut shards = shards.into_iter();
        let found = shards.find(|s| s.value.member(node).is_some());
        found.ok_or_else(|| {
            not_found(&format!(
                "node {node} is not of instance {}; slotmesh instance describe shows who is",
                instance.id
            ))
        })
    }
}

fn answer_of(task: &Task) -> api::ReplaceNodeResponse {
    let new_node_id = match &task.spec {
        Spec::Replace(replacement) => replacement.to.to_string(),
        _ => String::new(),
    };
    api::ReplaceNodeResponse {
        task_id: task.id.to_string(),
        new_node_id,
    }
}

fn not_found(message: &str) -> Status {
    refuse(RefusalKind::NotFound, "NODE_NOT_FOUND", message)
}

fn unfit(reason: &'static str, message: &str) -> Status {
    refuse(RefusalKind::Precondition, reason, message)
}
