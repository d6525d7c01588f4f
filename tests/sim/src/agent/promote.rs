//! The step that makes a detached replica a primary, as the real worker does it around the real
//! refusals.
//!
//! Invariant: nobody is promoted before a controller has read in the store that the record says so.

use slotmesh_agent::{executor::response, promote::refusal};
use slotmesh_proto::agent::v1::{
    ConfirmPromotionRequest, ExecuteStepRequest, ExecuteStepResponse, Promote, StepOutcome,
};
use slotmesh_proto::store::v1::NodeRole;

use super::{Got, steps::time_of, worker::Worker};
use crate::{
    fiber::sleep,
    msg::{Party, Rpc},
    plan::Point,
    redis::{Admin, Answer},
    sched::{MS, Micros},
};

const LOOK_PAUSE: Micros = 2 * MS;
const LOOKS_MAX: u32 = 100;
/// For one controller's answer.
const CONFIRM_TRY: Micros = 300 * MS;

impl Worker {
    pub(super) async fn promote(
        &mut self,
        request: &ExecuteStepRequest,
        order: &Promote,
    ) -> ExecuteStepResponse {
        let deadline = self.host.now() + time_of(request);
        if let Some(assigned) = self.assigned()
            && !self.report.detached
        {
            Box::pin(self.converge(&assigned)).await;
        }
        if let Some(why) = self.not_promotable(request, order) {
            return response(StepOutcome::NoEffect, why);
        }
        match self.confirmed(request, order, deadline).await {
            Some(true) => {}
            Some(false) => return response(StepOutcome::NoEffect, "not confirmed"),
            None => return response(StepOutcome::NoEffect, "no controller could be asked"),
        }
        self.host.world.borrow_mut().point(Point::Confirmed);
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
        let promised = self
            .host
            .has_promised(&request.instance_id, &request.shard_id);
        refusal(request, order, &self.report, promised)
    }

    /// One controller after the other, until one has read the record; `None`: none did in time.
    async fn confirmed(
        &self,
        request: &ExecuteStepRequest,
        order: &Promote,
        deadline: Micros,
    ) -> Option<bool> {
        let question = ConfirmPromotionRequest {
            instance_id: request.instance_id.clone(),
            shard_id: request.shard_id.clone(),
            task_id: request.task_id.clone(),
            epoch: request.epoch,
            node_id: order.node_id.clone(),
            run_id: order.run_id.clone(),
        };
        let host = &self.host;
        let first = host.preferred.borrow().unwrap_or(0);
        for n in 0.. {
            let left = deadline.saturating_sub(host.now());
            if left == 0 {
                break;
            }
            let call = {
                let mut ctx = host.world.borrow_mut();
                let to = Party::Controller((first + n) % host.controllers);
                let call = ctx.call();
                let request = question.clone();
                ctx.rpc(host.me, to, Rpc::Confirm { call, request });
                call
            };
            let limit = left.min(CONFIRM_TRY);
            if let Some(Got::Confirm(Some(confirmed))) =
                host.answers.get(&host.world, host.me, call, limit).await
            {
                return Some(confirmed);
            }
        }
        None
    }

    async fn become_primary(&mut self, deadline: Micros) -> ExecuteStepResponse {
        if self.report.observed_role() == NodeRole::Primary {
            return response(StepOutcome::Done, "");
        }
        if let Some(Answer::Err(why)) = self.admin(Admin::Promote).await {
            return response(StepOutcome::NoEffect, why);
        }
        for _ in 0..LOOKS_MAX {
            if self.probe().await && self.report.observed_role() == NodeRole::Primary {
                return response(StepOutcome::Done, "");
            }
            if self.host.now() >= deadline {
                break;
            }
            sleep(&self.host.world, self.host.me, LOOK_PAUSE).await;
        }
        response(
            StepOutcome::Uncertain,
            "the node does not say that it is a primary",
        )
    }
}
