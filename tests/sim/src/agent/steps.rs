//! The steps of one node, as in the real worker: refused, repeated from the journal, or executed;
//! and the driver that carries out what the hand-over's machine asks for.
//!
//! Invariant: each act of the critical section is a point at which anybody may die.

use std::time::Duration;

use slotmesh_agent::{
    executor::response,
    fence::{UserKind, parse_user, password_sha256},
    handover::{Event, Failover, HandOver, Observation, Outcome, Record, Role, Verdict},
    journal::record::{Begun, Ended, Fact, FenceMark, Memory, StepKey},
    node::{Assigned, facts},
};
use slotmesh_proto::{
    agent::v1::{
        EnsureUsers, ExecuteStepRequest, ExecuteStepResponse, HandOver as Order, StepOutcome,
        TakeBack, execute_step_request::Act,
    },
    store::v1::NodeRole,
};

use super::{settled, worker::Worker};
use crate::{
    fiber::sleep,
    redis::{Admin, Answer},
    sched::{MS, Micros, SEC},
    variant::Variant,
};

const RESUME_MIN: Micros = 2 * SEC;
/// Between looks at a node that does not answer.
const REACH_PAUSE: Micros = 20 * MS;
const ABORT_WAIT: Micros = 500 * MS;
const ABORT_LOOK: Micros = 2 * MS;
/// Of a step that names no timeout.
const STEP_TIMEOUT: Micros = 5 * SEC;

/// The node's hand-over that was begun and not ended.
pub(crate) fn unfinished(memory: &Memory, node_id: &str) -> Option<Begun> {
    let mut begun = memory
        .unfinished()
        .filter(|b| order_of(b).is_some_and(|o| o.node_id == node_id));
    begun.next().cloned()
}

fn order_of(begun: &Begun) -> Option<&Order> {
    match &begun.request.act {
        Some(Act::HandOver(order)) => Some(order),
        _ => None,
    }
}

fn name_of(request: &ExecuteStepRequest) -> String {
    format!("{}/{}/{}", request.task_id, request.step, request.attempt)
}

/// How long a step may take.
pub(super) fn time_of(request: &ExecuteStepRequest) -> Micros {
    match Micros::from(request.timeout_ms) * MS {
        0 => STEP_TIMEOUT,
        asked => asked,
    }
}

impl Worker {
    pub(crate) async fn execute(&mut self, request: ExecuteStepRequest) -> ExecuteStepResponse {
        if let Some(answer) = settled(&self.host, &request) {
            return answer;
        }
        let Some(act) = request.act.clone() else {
            return response(StepOutcome::NoEffect, "the step has no act");
        };
        if !self.reach(&request).await {
            self.publish();
            let key = StepKey::of(&request);
            let has_begun = self.host.memory.borrow().begun(&key).is_some();
            let outcome = if has_begun {
                StepOutcome::Uncertain
            } else {
                StepOutcome::NoEffect
            };
            let mut answer = response(outcome, "the node does not answer");
            answer.node = Some(self.report.clone());
            if matches!(act, Act::HandOver(_)) && !has_begun {
                self.end(&request, &answer).await;
            }
            return answer;
        }
        {
            let mut ctx = self.host.world.borrow_mut();
            ctx.say(|| format!("agent {}: {} begins", self.host.index, name_of(&request)));
            ctx.checks
                .step_begun(self.host.index, name_of(&request), request.term);
        }
        let mut answer = match &act {
            Act::Probe(_) => response(StepOutcome::Done, ""),
            Act::EnsureUsers(ensure) => self.ensure_users(ensure, request.epoch).await,
            Act::HandOver(order) => self.hand_over(&request, order).await,
            Act::TakeBack(order) => self.take_back(order).await,
            Act::Promote(order) => self.promote(&request, order).await,
            // Answered before it comes to a node's worker.
            Act::StageEngine(_) => response(StepOutcome::NoEffect, "no matter of the node"),
        };
        self.probe().await;
        self.publish();
        answer.node = Some(self.report.clone());
        if !matches!(act, Act::Probe(_)) {
            self.end(&request, &answer).await;
        }
        answer
    }

    /// Waits for the node to answer, but not for longer than half of the step's time.
    async fn reach(&mut self, request: &ExecuteStepRequest) -> bool {
        let until = self.host.now() + time_of(request) / 2;
        loop {
            let assigned = self.assigned();
            self.ensure_process(assigned.as_ref()).await;
            if self.is_running() && self.probe().await {
                return true;
            }
            if self.host.now() >= until {
                return false;
            }
            sleep(&self.host.world, self.host.me, REACH_PAUSE).await;
        }
    }

    async fn end(&mut self, request: &ExecuteStepRequest, answer: &ExecuteStepResponse) {
        let ended = Ended {
            key: StepKey::of(request),
            response: answer.clone(),
        };
        let mut facts = std::mem::take(&mut self.concluded);
        facts.push(Fact::Ended(Box::new(ended)));
        self.host.append(facts).await;
        let mut ctx = self.host.world.borrow_mut();
        ctx.say(|| {
            let (index, outcome) = (self.host.index, answer.outcome());
            format!(
                "agent {index}: {} ends: {outcome:?} {}",
                name_of(request),
                answer.message
            )
        });
        ctx.checks.step_ended(self.host.index, name_of(request));
    }

    fn wrong_process(&self, run_id: &str) -> Option<ExecuteStepResponse> {
        (run_id.is_empty() || run_id != self.run_id).then(|| {
            response(
                StepOutcome::NoEffect,
                "another process runs as this node now",
            )
        })
    }

    async fn ensure_users(&mut self, ensure: &EnsureUsers, epoch: u64) -> ExecuteStepResponse {
        if let Some(refusal) = self.wrong_process(&ensure.run_id) {
            return refusal;
        }
        let role = match self.report.observed_role() {
            NodeRole::Replica => Role::Replica,
            _ => Role::Primary,
        };
        let fact = facts::before_prewarming(&self.seat.name, &self.run_id, epoch, role);
        self.host.append(fact).await;
        for user in &ensure.users {
            let kind = parse_user(&user.name);
            let allowed = user.replication && kind == Some((UserKind::Replication, user.epoch));
            if !allowed && self.host.variant() != Variant::GrantBeforeCommit {
                return response(
                    StepOutcome::NoEffect,
                    "only replication users are made ahead",
                );
            }
            let sha = password_sha256(&user.password);
            let (user, replication) = (user.name.clone(), user.replication);
            let granted = self.admin(Admin::Grant {
                user,
                sha,
                replication,
            });
            if !matches!(granted.await, Some(Answer::Ok)) {
                return response(StepOutcome::NoEffect, "the node does not take the user");
            }
        }
        response(StepOutcome::Done, "")
    }

    async fn hand_over(
        &mut self,
        request: &ExecuteStepRequest,
        order: &Order,
    ) -> ExecuteStepResponse {
        let deadline = self.host.now() + time_of(request);
        let key = StepKey::of(request);
        let has_begun = self.host.memory.borrow().begun(&key).is_some();
        if has_begun {
            self.resume.take_if(|b| StepKey::of(&b.request) == key);
            return self
                .resume_with(request, order, Record::Unchanged, deadline)
                .await;
        }
        if let Some(refusal) = self.wrong_process(&order.run_id) {
            return refusal;
        }
        if self.report.observed_role() != NodeRole::Primary {
            return response(StepOutcome::NoEffect, "the node is not a primary");
        }
        let frozen_revision = self.assigned().map_or(0, |assigned| {
            let frozen = assigned.spec.frozen && assigned.spec.epoch == request.epoch;
            if frozen { assigned.revision } else { 0 }
        });
        let mark = FenceMark {
            node_id: self.seat.name.clone(),
            run_id: order.run_id.clone(),
            epoch: request.epoch,
            term: request.term,
            target_address: order.target_address.clone(),
            frozen_revision,
        };
        let begun = Begun {
            request: request.clone(),
            deadline_unix_ms: deadline / MS,
        };
        self.host
            .append([Fact::Begun(begun), Fact::Fenced(mark)])
            .await;
        let machine =
            HandOver::new(Duration::from_micros(deadline)).checking_target(order.check.is_some());
        let (outcome, critical) = self
            .drive(request, order, machine, Event::Begin, deadline)
            .await;
        self.conclude(request, outcome, critical)
    }

    /// Turns the machine's outcome into the step's, and into what must be remembered.
    fn conclude(
        &mut self,
        request: &ExecuteStepRequest,
        outcome: Outcome,
        critical_us: Micros,
    ) -> ExecuteStepResponse {
        let Outcome { verdict, why } = outcome;
        let outcome = match verdict {
            Verdict::Done { .. } => StepOutcome::Done,
            Verdict::NoEffect => StepOutcome::NoEffect,
            Verdict::Uncertain => StepOutcome::Uncertain,
        };
        self.concluded
            .extend(facts::after_hand_over(request, &self.seat.name, verdict));
        let mut answer = response(outcome, why);
        answer.committed = verdict == Verdict::Done { committed: true };
        answer.critical_us = critical_us;
        answer
    }

    /// Goes on with a hand-over of a former life, as soon as it can be decided.
    pub(crate) async fn resume_hand_over(&mut self, assigned: Option<&Assigned>) {
        let Some(begun) = self.resume.clone() else {
            return;
        };
        let Some(order) = order_of(&begun).cloned() else {
            return;
        };
        let request = begun.request;
        let record = match assigned {
            None => Record::Unknown,
            Some(a) if a.spec.epoch == request.epoch && a.spec.role() == NodeRole::Primary => {
                Record::Unchanged
            }
            Some(a) if a.spec.epoch < request.epoch => Record::Unknown,
            Some(_) => Record::MovedOn,
        };
        let now = self.host.now();
        let deadline = (begun.deadline_unix_ms * MS).max(now + RESUME_MIN);
        if record == Record::Unknown && !self.changed_or_gone(&order).await {
            return;
        }
        self.resume = None;
        let mut answer = self.resume_with(&request, &order, record, deadline).await;
        self.probe().await;
        answer.node = Some(self.report.clone());
        self.end(&request, &answer).await;
    }

    async fn changed_or_gone(&self, order: &Order) -> bool {
        match self.observe(order).await {
            None => true,
            Some(seen) => seen.role == Role::Replica || seen.failover != Failover::None,
        }
    }

    async fn resume_with(
        &mut self,
        request: &ExecuteStepRequest,
        order: &Order,
        record: Record,
        deadline: Micros,
    ) -> ExecuteStepResponse {
        let observed = self.observe(order).await;
        self.host.world.borrow_mut().say(|| {
            let index = self.host.index;
            format!(
                "agent {index}: {} resumes: {observed:?} {record:?}",
                name_of(request)
            )
        });
        let machine = HandOver::new(Duration::from_micros(deadline));
        let first = Event::Restarted { observed, record };
        let (outcome, critical) = self.drive(request, order, machine, first, deadline).await;
        self.conclude(request, outcome, critical)
    }

    /// What the named process says of itself; `None`: it is gone.
    async fn observe(&self, order: &Order) -> Option<Observation> {
        if order.run_id != self.run_id {
            return None;
        }
        self.look(order).await
    }

    pub(super) async fn look(&self, order: &Order) -> Option<Observation> {
        self.info().await?.observation(&order.target_address)
    }

    async fn take_back(&mut self, order: &TakeBack) -> ExecuteStepResponse {
        if let Some(refusal) = self.wrong_process(&order.run_id) {
            return refusal;
        }
        match self.end_failover().await {
            Ok(Role::Primary) => {}
            Ok(Role::Replica) => return response(StepOutcome::NoEffect, "the node is a replica"),
            Err(why) => return response(StepOutcome::Uncertain, why),
        }
        if self.assigned().is_some_and(|a| !self.host.may_serve(&a)) {
            return response(StepOutcome::Uncertain, "the host has no right to serve");
        }
        self.login = None;
        let (user, password) = (order.master_user.clone(), order.master_password.clone());
        let login = self.admin(Admin::SetLogin { user, password }).await;
        let (user, sha) = (
            order.proxy_user.clone(),
            password_sha256(&order.proxy_password),
        );
        let grant = self
            .admin(Admin::Grant {
                user,
                sha,
                replication: false,
            })
            .await;
        if ![login, grant].iter().all(|a| matches!(a, Some(Answer::Ok))) {
            return response(StepOutcome::Uncertain, "the node does not answer");
        }
        if let Some(begun) = self.resume.take() {
            let decided = response(StepOutcome::NoEffect, "the leader took the node back");
            self.end(&begun.request, &decided).await;
        }
        self.concluded.push(Fact::Unfenced(self.seat.name.clone()));
        response(StepOutcome::Done, "")
    }

    /// Ends a failover that is under way; tells what the node is after it.
    async fn end_failover(&self) -> Result<Role, &'static str> {
        let until = self.host.now() + ABORT_WAIT;
        let mut aborted = false;
        loop {
            let info = self.info().await.ok_or("the node does not answer")?;
            match (info.role(), info.failover()) {
                (Some(role), Failover::None) => return Ok(role),
                _ if self.host.now() >= until => return Err("the failover goes on"),
                _ if !aborted => {
                    aborted = true;
                    self.admin(Admin::Abort).await;
                }
                _ => sleep(&self.host.world, self.host.me, ABORT_LOOK).await,
            }
        }
    }
}
