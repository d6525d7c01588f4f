//! A step on its way to an agent: the request that a decision becomes, and what the answer means.

use slotmesh_proto::{
    agent::v1::{self as pb, execute_step_request::Act},
    store::v1::FenceProof,
};
use slotmesh_topology::{
    Instance, NodeId, Shard, assignment,
    credential::{self, Credential},
    wire,
};

use crate::{
    spec::{ShardFailover, ShardSwitch, Task},
    switchover::{FAILOVER_TIMEOUT_MS, Step, StepStatus},
};

/// A step without waiting in it.
const STEP_TIMEOUT_MS: u32 = 1_000;
/// The critical section with its commit: the engine's own timeout, twice the round trips.
const HAND_OVER_TIMEOUT_MS: u32 = 2_000;

impl Step {
    /// Its name within the task.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::EnsureUsers => "ensure-users",
            Self::HandOver => "hand-over",
            Self::TakeBack => "take-back",
        }
    }

    /// The node whose agent executes it.
    #[must_use]
    pub fn node(self, switch: &ShardSwitch) -> &NodeId {
        match self {
            Self::EnsureUsers => &switch.to,
            Self::HandOver | Self::TakeBack => &switch.from,
        }
    }
}

/// What the agent is asked, by the leader of `term`.
#[must_use]
pub fn request(
    task: &Task,
    switch: &ShardSwitch,
    instance: &Instance,
    shard: &Shard,
    step: Step,
    term: u64,
    now_ms: u64,
) -> pb::ExecuteStepRequest {
    // An agent answers a repeated attempt from its journal. The same try of a phase is the same
    // attempt, for a successor too; giving rights back is tried until it works.
    let since_ms = match step {
        Step::TakeBack => now_ms,
        Step::EnsureUsers | Step::HandOver => switch.phase_since_ms,
    };
    pb::ExecuteStepRequest {
        task_id: task.id.to_string(),
        step: format!("{}/{}", switch.shard, step.name()),
        attempt: u32::try_from(since_ms % u64::from(u32::MAX)).unwrap_or(1),
        term,
        epoch: shard.epoch.0,
        instance_id: shard.instance.to_string(),
        shard_id: shard.id.to_string(),
        timeout_ms: match step {
            Step::HandOver => HAND_OVER_TIMEOUT_MS,
            Step::EnsureUsers | Step::TakeBack => STEP_TIMEOUT_MS,
        },
        trace_id: task.trace_id.clone(),
        act: Some(act(switch, instance, shard, step)),
    }
}

fn act(switch: &ShardSwitch, instance: &Instance, shard: &Shard, step: Step) -> Act {
    let run_id = |node| {
        shard
            .member(node)
            .map(|m| m.run_id.clone())
            .unwrap_or_default()
    };
    let next = switch.from_epoch.next();
    let Credential {
        user: proxy_user,
        password: proxy_password,
    } = credential::proxy(&instance.secret, &shard.id, switch.from_epoch);
    let follow = |epoch| credential::replica(&instance.secret, &shard.id, epoch, &switch.from);
    match step {
        Step::EnsureUsers => Act::EnsureUsers(pb::EnsureUsers {
            node_id: switch.to.to_string(),
            run_id: run_id(&switch.to),
            users: assignment::replication_users(instance, shard, next, switch.to.as_str()),
        }),
        Step::HandOver => Act::HandOver(pb::HandOver {
            node_id: switch.from.to_string(),
            run_id: run_id(&switch.from),
            proxy_user,
            target_node_id: switch.to.to_string(),
            target_address: shard
                .member(&switch.to)
                .map(|m| m.address.clone())
                .unwrap_or_default(),
            master_user: follow(next).user,
            master_password: follow(next).password,
            token: shard
                .handover()
                .map(|h| h.token.clone())
                .unwrap_or_default(),
            failover_timeout_ms: FAILOVER_TIMEOUT_MS,
            check: check(switch, instance, shard).map(Box::new),
        }),
        Step::TakeBack => Act::TakeBack(pb::TakeBack {
            node_id: switch.from.to_string(),
            run_id: run_id(&switch.from),
            proxy_user,
            proxy_password,
            master_user: follow(switch.from_epoch).user,
            master_password: follow(switch.from_epoch).password,
        }),
    }
}

/// What the target has to be, if its engine is older than that of the primary that it follows.
fn check(switch: &ShardSwitch, instance: &Instance, shard: &Shard) -> Option<pb::TargetCheck> {
    let older = shard.older(&switch.to)?;
    let observer = credential::observer(&instance.secret, &shard.id);
    Some(pb::TargetCheck {
        run_id: older.run_id.clone(),
        refused: older.refused,
        user: observer.user,
        password: observer.password,
    })
}

/// What the agent of a failover's chosen node is asked, by the leader of `term`; `None` while nobody
/// is chosen.
#[must_use]
pub fn promotion(
    task: &Task,
    failover: &ShardFailover,
    shard: &Shard,
    term: u64,
) -> Option<(NodeId, pb::ExecuteStepRequest)> {
    let record = shard.failover()?;
    let target = shard.member(record.target.as_ref()?)?;
    let request = pb::ExecuteStepRequest {
        task_id: task.id.to_string(),
        step: format!("{}/promote", failover.shard),
        // As above: each entry into the phase is another try.
        attempt: u32::try_from(failover.phase_since_ms % u64::from(u32::MAX)).unwrap_or(1),
        term,
        epoch: shard.epoch.0,
        instance_id: shard.instance.to_string(),
        shard_id: shard.id.to_string(),
        timeout_ms: STEP_TIMEOUT_MS,
        trace_id: task.trace_id.clone(),
        act: Some(Act::Promote(pb::Promote {
            node_id: target.node.to_string(),
            run_id: target.run_id.clone(),
            proof: record
                .proof
                .map_or(FenceProof::Unspecified, wire::fence_proof_to)
                .into(),
        })),
    };
    Some((target.node.clone(), request))
}

/// What an answer means to the leader of `term`.
#[must_use]
pub fn status_of(answer: &pb::ExecuteStepResponse, term: u64) -> StepStatus {
    let why = answer.message.clone();
    match answer.outcome() {
        pb::StepOutcome::Done => StepStatus::Done {
            committed: answer.committed,
        },
        pb::StepOutcome::NoEffect => StepStatus::NoEffect(why),
        pb::StepOutcome::Fenced if answer.known_term > term => StepStatus::Fenced,
        // Fenced by an epoch: a higher one of the shard is known there, so this hand-over has been
        // overtaken.
        pb::StepOutcome::Fenced | pb::StepOutcome::Uncertain | pb::StepOutcome::Unspecified => {
            StepStatus::Uncertain(why)
        }
    }
}

#[cfg(test)]
mod tests {
    use slotmesh_topology::Older;

    use super::*;
    use crate::{detect::tests::Stage, spec::Phase, upgrade::story::instance};

    #[test]
    fn a_target_whose_engine_is_older_is_asked_once_more_before_it_takes_over() {
        let older = Older {
            node: "b".into(),
            run_id: "run-b".into(),
            refused: 1,
        };
        let shard = Stage::new().shard.is_older(older).unwrap();
        let to = |node: &str| ShardSwitch {
            shard: "0".into(),
            from: "a".into(),
            to: node.into(),
            from_epoch: shard.epoch,
            phase: Phase::Hold,
            phase_since_ms: 1,
            message: String::new(),
            hold_us: 0,
            critical_us: 0,
        };
        let check = |node| match act(&to(node), &instance(), &shard, Step::HandOver) {
            Act::HandOver(order) => order.check,
            other => panic!("{other:?}"),
        };
        let asked = check("b").unwrap();
        assert_eq!((asked.run_id.as_str(), asked.refused), ("run-b", 1));
        assert!(asked.user.starts_with("ob-"), "{}", asked.user);
        assert_eq!(check("c"), None);
    }

    #[test]
    fn only_a_higher_term_deposes() {
        let fenced = |known_term| {
            let answer = pb::ExecuteStepResponse {
                outcome: pb::StepOutcome::Fenced.into(),
                known_term,
                ..pb::ExecuteStepResponse::default()
            };
            status_of(&answer, 7)
        };
        assert_eq!(fenced(8), StepStatus::Fenced);
        assert_eq!(fenced(7), StepStatus::Uncertain(String::new()));
    }
}
