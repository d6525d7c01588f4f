//! The step of a failover whose order matters: a detached replica becomes the primary.
//!
//! Invariant: `REPLICAOF NO ONE` is sent only after a controller has read in the store that the
//! record names this process at this epoch. Nobody can write to what was promoted until the record
//! serves it, so a promotion that comes to nothing does no harm.

use std::time::Duration;

use slotmesh_proto::{
    agent::v1::{
        ConfirmPromotionRequest, ExecuteStepRequest, ExecuteStepResponse, Promote, StepOutcome,
    },
    store::v1::NodeRole,
};
use tokio::time::{Instant, sleep};

use super::{Worker, deadline_of};
use crate::{
    control::ControlError, controllers::Confirmation, executor::response, handover::driver::chain,
    promote::refusal,
};

/// The role changes within the command; this is for an answer that was lost.
const LOOK_PAUSE: Duration = Duration::from_millis(2);
const LOOKS_MAX: u32 = 100;

impl Worker {
    pub(super) async fn promote(
        &mut self,
        request: &ExecuteStepRequest,
        order: &Promote,
    ) -> ExecuteStepResponse {
        let deadline = deadline_of(request);
        // An agent that has just started has not detached the node in this life.
        let assigned = self.assigned.borrow().clone();
        if let Some(assigned) = assigned
            && !self.report.detached
        {
            Box::pin(self.converge(&assigned)).await;
        }
        if let Some(why) = self.not_promotable(request, order) {
            return response(StepOutcome::NoEffect, why);
        }
        let question = ConfirmPromotionRequest {
            instance_id: request.instance_id.clone(),
            shard_id: request.shard_id.clone(),
            task_id: request.task_id.clone(),
            epoch: request.epoch,
            node_id: order.node_id.clone(),
            run_id: order.run_id.clone(),
        };
        let controllers = self.host.controllers.clone();
        match controllers.confirm(&question, deadline).await {
            Confirmation::Confirmed => {}
            Confirmation::Refused(why) => {
                return response(StepOutcome::NoEffect, &format!("not confirmed: {why}"));
            }
            Confirmation::Unreachable => {
                let why = "no controller could be asked whether the record still says so";
                return response(StepOutcome::NoEffect, why);
            }
        }
        // Asking took a while.
        if let Some(why) = self.not_promotable(request, order) {
            return response(StepOutcome::NoEffect, why);
        }
        self.become_primary(deadline).await
    }

    fn not_promotable(
        &self,
        request: &ExecuteStepRequest,
        order: &Promote,
    ) -> Option<&'static str> {
        let lease = &self.host.lease;
        let promised = lease.promised(&request.instance_id, &request.shard_id);
        refusal(request, order, &self.report, promised.is_some())
    }

    async fn become_primary(&mut self, deadline: Instant) -> ExecuteStepResponse {
        if self.report.observed_role() == NodeRole::Primary {
            return response(StepOutcome::Done, "");
        }
        let Some(control) = self.admin().await else {
            return response(StepOutcome::NoEffect, "the node does not answer");
        };
        match control.call(&["REPLICAOF", "NO", "ONE"]).await {
            Err(error @ (ControlError::Refused(_) | ControlError::Connect { .. })) => {
                return response(StepOutcome::NoEffect, &chain(&error));
            }
            // Only what is observed counts.
            Ok(_) | Err(ControlError::Unanswered { .. }) => {}
        }
        for _ in 0..LOOKS_MAX {
            if self.probe().await && self.report.observed_role() == NodeRole::Primary {
                tracing::info!(node = %self.node_id, offset = self.report.offset, "node promoted");
                return response(StepOutcome::Done, "");
            }
            if Instant::now() >= deadline {
                break;
            }
            sleep(LOOK_PAUSE).await;
        }
        response(
            StepOutcome::Uncertain,
            "the node was told to become a primary and did not say that it is one",
        )
    }
}
