//! `FailOver`: an operator's word that a primary is lost, although nobody saw its end.
//!
//! Invariant: the word is proof enough to choose another primary, so it is asked for by name
//! (`accept_data_loss`) and written down with the epoch that it begins.

use prost::Message as _;
use slotmesh_proto::instance::v1 as api;
use slotmesh_task::{
    Choice, Spec, Task,
    admit::RefusalKind,
    detect::Loss,
    failover::{self, is_parked},
};
use slotmesh_topology::{
    FenceProof, Instance, InstanceState, NodeId, NodeRole, Shard, ShardId, TaskId,
};
use tonic::Status;
use tracing::warn;

use super::{ADMIT_TRIES, Instances, busy};
use crate::{
    clock,
    drive::{
        failover::{new_task_id, put_declaration},
        write::{Author, put_task},
    },
    grpc::{refuse, store_failed, token::Token},
    leader::{LeaderOutcome, LeaderTxn, Term},
    mirror::{State, Versioned},
    store::keys::Key,
    trace,
};

/// What an operator's word leads to.
struct Planned {
    task: TaskId,
    txn: LeaderTxn,
}

impl Instances {
    /// Admits it, or tells the failover that is under way that loss is accepted.
    pub(super) async fn admit_failover(
        &self,
        request: api::FailOverRequest,
    ) -> Result<TaskId, Status> {
        if !request.accept_data_loss {
            return Err(refuse(
                RefusalKind::Invalid,
                "DATA_LOSS_NOT_ACCEPTED",
                "what only the primary had will be lost: set accept_data_loss to say that you \
                 accept that; a switchover loses nothing",
            ));
        }
        let body = api::FailOverRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let token = Token::of(&request.client_token, "FailOver", &body.encode_to_vec())?;
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            if let Some(earlier) = token.earlier(&self.context).await? {
                return Ok(earlier.task_id.into());
            }
            let (instance, _) = self.instance(&request.instance_id)?;
            let planned = self.plan_failover(term, &instance, &request)?;
            let txn = token.put(planned.txn, planned.task.as_str(), "");
            let outcome = txn.commit(&*self.context.store).await;
            match outcome.map_err(|e| store_failed(&e))? {
                LeaderOutcome::Committed { revision } => {
                    self.context.mirror.shows(revision).await;
                    warn!(
                        task = %planned.task, instance = %instance.id, shard = request.shard_id,
                        "an operator accepts loss: failover"
                    );
                    return Ok(planned.task);
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
    fn plan_failover(
        &self,
        term: Term,
        instance: &Instance,
        request: &api::FailOverRequest,
    ) -> Result<Planned, Status> {
        if instance.state == InstanceState::Deleting {
            return Err(refuse(
                RefusalKind::Precondition,
                "INSTANCE_DELETING",
                format!("instance {} is being deleted", instance.id),
            ));
        }
        let id = (
            instance.id.clone(),
            ShardId::from(request.shard_id.as_str()),
        );
        let state = self.context.mirror.read(State::clone);
        let Some(shard) = state.shards.get(&id) else {
            return Err(refuse(
                RefusalKind::NotFound,
                "SHARD_NOT_FOUND",
                format!("instance {} has no shard {}", instance.id, request.shard_id),
            ));
        };
        let target = target_of(&shard.value, &request.target_node_id)?;
        match shard.value.failover() {
            Some(under_way) => go_on(term, &state, &under_way.task, target),
            None => self.declare(term, &state, shard, target),
        }
    }

    #[allow(clippy::result_large_err)]
    fn declare(
        &self,
        term: Term,
        state: &State,
        shard: &Versioned<Shard>,
        target: Option<NodeId>,
    ) -> Result<Planned, Status> {
        let loss = Loss {
            cause: "an operator says that it is lost".into(),
            proof: Some(FenceProof::Operator),
        };
        let declared = failover::declare(new_task_id(), &shard.value, &loss, clock::now_ms());
        let (mut task, next) = declared.map_err(|error| {
            refuse(
                RefusalKind::Precondition,
                "SHARD_NOT_SERVING",
                error.to_string(),
            )
        })?;
        name_target(&mut task, target);
        task.trace_id = trace::current();
        let author = Author {
            cause: "Failover",
            task: task.id.as_str(),
            trace: &task.trace_id,
            who: &self.context.controller_id,
            term: term.number(),
        };
        let txn = put_declaration(term.txn(), state, shard, (&task, &next), author);
        let txn = txn.map_err(|owner| {
            refuse(
                RefusalKind::Conflict,
                "SHARD_BUSY",
                format!(
                    "shard {} belongs to task {owner}; wait for it to end",
                    next.id
                ),
            )
        })?;
        let txn = txn.absent(Key::Task {
            task: task.id.as_str(),
        });
        let id = task.id.clone();
        Ok(Planned {
            txn: put_task(txn, task, next.id.as_str(), "Declare", &loss.cause),
            task: id,
        })
    }
}

/// The failover that is under way goes on with the operator's word.
#[allow(clippy::result_large_err)]
fn go_on(
    term: Term,
    state: &State,
    id: &TaskId,
    target: Option<NodeId>,
) -> Result<Planned, Status> {
    let found = state
        .tasks
        .get(id)
        .filter(|t| !t.value.state.is_ended() || is_parked(&t.value));
    let Some(old) = found else {
        return Err(busy());
    };
    let mut task = Task {
        choice: Some(Choice::AcceptLoss),
        ..old.value.clone()
    };
    name_target(&mut task, target);
    let txn = term
        .txn()
        .unchanged(Key::Task { task: id.as_str() }, old.mod_revision);
    let words = "an operator accepts loss";
    Ok(Planned {
        txn: put_task(txn, task, "", "Resolved", words),
        task: id.clone(),
    })
}

fn name_target(task: &mut Task, target: Option<NodeId>) {
    if let Spec::Failover(failover) = &mut task.spec
        && target.is_some()
    {
        failover.to = target;
    }
}

#[allow(clippy::result_large_err)]
fn target_of(shard: &Shard, wanted: &str) -> Result<Option<NodeId>, Status> {
    if wanted.is_empty() {
        return Ok(None);
    }
    let node = NodeId::from(wanted);
    let Some(member) = shard.member(&node) else {
        return Err(refuse(
            RefusalKind::NotFound,
            "NODE_NOT_FOUND",
            format!("shard {} has no node {wanted}", shard.id),
        ));
    };
    let why = if member.role == NodeRole::ReadOnly {
        "is read-only and never promoted"
    } else if node == shard.primary && shard.failover().is_none() {
        "is the primary already"
    } else {
        return Ok(Some(node));
    };
    Err(refuse(
        RefusalKind::Precondition,
        "TARGET_UNFIT",
        format!("{wanted} {why}"),
    ))
}
