//! What must be in the journal, and when: the pure half of never forgetting.
//!
//! Invariant: whoever executes steps and assignments, the real worker or the simulation, takes the
//! facts from here and makes them durable before it goes on.

use slotmesh_proto::agent::v1::ExecuteStepRequest;

use super::Assigned;
use crate::{
    handover::{Role, Verdict},
    journal::record::{Fact, FenceMark, Memory, ShardEpoch, Standing},
};

/// Before an assignment may have effects.
pub fn before_convergence(memory: &Memory, node_id: &str, assigned: &Assigned) -> Vec<Fact> {
    let spec = &assigned.spec;
    let mut facts = vec![Fact::Epoch(ShardEpoch {
        instance_id: spec.instance_id.clone(),
        shard_id: spec.shard_id.clone(),
        epoch: spec.epoch,
    })];
    if !spec.frozen {
        return facts;
    }
    // The first freeze seen is enough: every unfrozen assignment of this epoch after it is the undo.
    let frozen_revision = assigned.revision;
    if let Some(mark) = memory.fence(node_id)
        && spec.epoch == mark.epoch
        && mark.frozen_revision == 0
    {
        facts.push(Fact::Fenced(FenceMark {
            frozen_revision,
            ..mark.clone()
        }));
    }
    if let Some(standing) = memory.standing(node_id)
        && spec.epoch == standing.epoch
        && standing.frozen_revision == 0
    {
        facts.push(Fact::Stood(Standing {
            frozen_revision,
            ..standing.clone()
        }));
    }
    facts
}

/// When a process agrees with the record, before that is reported. Not in a failover: there is no
/// role to agree with, and whoever is promoted but not named must become a replica again.
pub fn when_converged(
    memory: &Memory,
    node_id: &str,
    run_id: &str,
    assigned: &Assigned,
) -> Option<Fact> {
    if assigned.spec.detached {
        return None;
    }
    let (epoch, membership) = (assigned.spec.epoch, assigned.spec.membership);
    let standing = memory.standing(node_id).filter(|s| s.run_id == run_id);
    match standing {
        Some(s) if s.epoch > epoch || s.epoch == epoch && s.membership >= membership => None,
        Some(s) if s.epoch == epoch => Some(Fact::Stood(Standing {
            membership,
            ..s.clone()
        })),
        _ => Some(Fact::Stood(Standing {
            membership,
            ..standing_at(node_id, run_id, epoch)
        })),
    }
}

/// Before the users of a hand-over from `epoch` are made. From then on a replica may become a
/// primary before any assignment says so, and no older assignment may make it a replica again.
pub fn before_prewarming(node_id: &str, run_id: &str, epoch: u64, role: Role) -> Option<Fact> {
    (role == Role::Replica).then(|| Fact::Stood(standing_at(node_id, run_id, epoch)))
}

/// After a hand-over, before its outcome is answered.
pub fn after_hand_over(
    request: &ExecuteStepRequest,
    node_id: &str,
    verdict: Verdict,
) -> Option<Fact> {
    match verdict {
        Verdict::Done { .. } => Some(Fact::Epoch(ShardEpoch {
            instance_id: request.instance_id.clone(),
            shard_id: request.shard_id.clone(),
            epoch: request.epoch + 1,
        })),
        Verdict::NoEffect => Some(Fact::Unfenced(node_id.to_owned())),
        Verdict::Uncertain => None,
    }
}

fn standing_at(node_id: &str, run_id: &str, epoch: u64) -> Standing {
    Standing {
        node_id: node_id.to_owned(),
        run_id: run_id.to_owned(),
        epoch,
        frozen_revision: 0,
        membership: 0,
    }
}
