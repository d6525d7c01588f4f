//! The delegated commit of a switchover, which every controller serves, leader or not.
//!
//! Invariant: the record is changed only by `Shard::commit`, by compare-and-swap.

use std::rc::Rc;

use slotmesh_agent::controllers::CommitAnswer;
use slotmesh_proto::agent::v1::{CommitHandoverRequest, ConfirmPromotionRequest};
use slotmesh_topology::{Epoch, Shard};

use super::{Desk, Versioned};
use crate::{
    msg::{Party, Rpc},
    plan::Point,
    store::{Compare, Key, StoreReply, StoreRequest, Txn, Value},
    variant::Variant,
};

const COMMIT_TRIES: usize = 3;

/// Answers one commit.
pub(super) async fn serve(desk: Rc<Desk>, from: Party, call: u64, request: CommitHandoverRequest) {
    let answer = committed(&desk, &request).await;
    let mut ctx = desk.world.borrow_mut();
    ctx.say(|| format!("{:?}: commit answered {answer:?}", desk.me));
    ctx.rpc(desk.me, from, Rpc::CommitReply { call, answer });
}

/// Answers whether the record, as the store has it now, names who is to be promoted.
pub(super) async fn confirm(
    desk: Rc<Desk>,
    from: Party,
    call: u64,
    request: ConfirmPromotionRequest,
) {
    let index = request.shard_id.parse().unwrap_or(usize::MAX);
    let confirmed = match desk.store(StoreRequest::Get(Key::Shard(index))).await {
        Some(StoreReply::Got(Some(found))) => Some(names(&found.value, &request)),
        Some(StoreReply::Got(None)) => Some(false),
        _ => None,
    };
    let mut ctx = desk.world.borrow_mut();
    ctx.rpc(desk.me, from, Rpc::ConfirmReply { call, confirmed });
}

fn names(value: &Value, request: &ConfirmPromotionRequest) -> bool {
    let Value::Shard(record) = value else {
        return false;
    };
    let Ok(shard) = slotmesh_topology::wire::shard_from(record) else {
        return false;
    };
    let node = request.node_id.as_str().into();
    let process = shard
        .member(&node)
        .is_some_and(|m| m.run_id == request.run_id);
    let target = shard
        .failover()
        .is_some_and(|f| f.task.as_str() == request.task_id && f.target.as_ref() == Some(&node));
    shard.epoch == Epoch(request.epoch) && process && target
}

async fn committed(desk: &Desk, request: &CommitHandoverRequest) -> CommitAnswer {
    let refused = || CommitAnswer::Refused {
        primary_node_id: String::new(),
    };
    let Ok(index) = request.shard_id.parse::<usize>() else {
        return refused();
    };
    for _ in 0..COMMIT_TRIES {
        let Some(shard) = desk.mirror.borrow().shards.get(&index).cloned() else {
            return CommitAnswer::Unreachable;
        };
        let broken = desk.world.borrow().variant == Variant::CommitWithoutToken;
        let token = match shard.value.handover() {
            Some(handover) if broken => handover.token.clone(),
            _ => request.token.clone(),
        };
        let Ok(next) = shard.value.commit(Epoch(request.epoch), &token) else {
            match is_behind(desk, index, &shard).await {
                Some(true) => continue,
                Some(false) => return refused(),
                None => return CommitAnswer::Unreachable,
            }
        };
        desk.world.borrow_mut().point(Point::CommitTaken);
        let key = Key::Shard(index);
        let txn = Txn {
            compares: vec![Compare::Unchanged(key.clone(), shard.mod_revision)],
            puts: vec![(key, Value::Shard(slotmesh_topology::wire::shard_to(&next)))],
            token: Some(request.token.clone()),
            ..Txn::default()
        };
        match desk.store(StoreRequest::Txn(txn)).await {
            Some(StoreReply::Committed(_)) => return CommitAnswer::Accepted,
            Some(StoreReply::Conflict) => {
                if is_behind(desk, index, &shard).await.is_none() {
                    return CommitAnswer::Unreachable;
                }
            }
            _ => return CommitAnswer::Unreachable,
        }
    }
    CommitAnswer::Unreachable
}

/// Whether the store holds a newer record; `None`: it did not answer.
async fn is_behind(desk: &Desk, index: usize, shard: &Versioned<Shard>) -> Option<bool> {
    match desk.store(StoreRequest::Get(Key::Shard(index))).await? {
        StoreReply::Got(Some(found)) if found.mod_revision > shard.mod_revision => {
            Some(desk.shows(found.mod_revision).await)
        }
        StoreReply::Got(_) => Some(false),
        _ => None,
    }
}
