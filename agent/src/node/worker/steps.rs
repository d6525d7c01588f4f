//! The steps of one node: each refused, repeated from the journal, or executed.
//!
//! Invariant: a step that changes anything checks the run id first, and a hand-over is journaled,
//! with the mark of its fence, before its first command.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use slotmesh_proto::{
    agent::v1::{
        EnsureUsers, ExecuteStepRequest, ExecuteStepResponse, HandOver as Order, StepOutcome,
        TakeBack, execute_step_request::Act,
    },
    store::v1::NodeRole,
};
use tokio::time::{Instant, sleep};

use super::{Worker, deadline_of};
use crate::{
    controllers::Commit,
    executor::{not_executed, response, settled},
    fence,
    handover::{
        Event, Failover, HandOver, Observation, Outcome, Record, Role, Verdict,
        driver::{Done, Driver, Parts, chain, set_login},
    },
    journal::record::{Begun, Ended, Fact, FenceMark, Memory, StepKey},
    node::{Assigned, facts},
    probe::Info,
};

/// A hand-over that is resumed after its deadline still gets so much time to commit what has
/// already happened.
const RESUME_MIN: Duration = Duration::from_secs(2);
/// Redis ends a failover within a few milliseconds of ABORT.
const ABORT_WAIT: Duration = Duration::from_millis(500);
/// Between looks at a node that does not answer.
const REACH_PAUSE: Duration = Duration::from_millis(20);
const ABORT_LOOK: Duration = Duration::from_millis(2);

/// The node's hand-over that was begun and not ended.
pub(super) fn unfinished(memory: &Memory, node_id: &str) -> Option<Begun> {
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

impl Worker {
    pub(super) async fn execute(&mut self, request: ExecuteStepRequest) -> ExecuteStepResponse {
        // Looked up again here: while the call waited for its turn, a twin or a newer leader may
        // have been served.
        if let Some(answer) = settled(&self.host.journal, &request) {
            self.host.metrics.steps_settled.add(1);
            return answer;
        }
        let Some(act) = request.act.clone() else {
            return response(StepOutcome::NoEffect, "the step has no act");
        };
        if !self.reach(&request).await {
            self.publish();
            let why = "the node does not answer";
            let mut answer = not_executed(&self.host.journal, &request, why);
            answer.node = Some(self.report.clone());
            // On this word the leader gives the shard back: a late copy of the same hand-over must
            // find it ended and not run.
            if matches!(act, Act::HandOver(_)) && answer.outcome() == StepOutcome::NoEffect {
                self.end(&request, &answer).await;
            }
            return answer;
        }
        let mut answer = match &act {
            Act::Probe(_) => response(StepOutcome::Done, ""),
            Act::EnsureUsers(ensure) => self.ensure_users(ensure, request.epoch).await,
            Act::HandOver(order) => Box::pin(self.hand_over(&request, order)).await,
            Act::TakeBack(order) => self.take_back(order).await,
            Act::Promote(order) => self.promote(&request, order).await,
            Act::StageEngine(_) => response(StepOutcome::NoEffect, "engines are not tried here"),
        };
        self.probe().await;
        self.publish();
        answer.node = Some(self.report.clone());
        // Looking again is the point of a probe; everything else is answered once.
        if !matches!(act, Act::Probe(_)) {
            self.end(&request, &answer).await;
        }
        answer
    }

    /// Waits for the node to answer, for half of the step's time.
    async fn reach(&mut self, request: &ExecuteStepRequest) -> bool {
        let now = Instant::now();
        let until = now + (deadline_of(request) - now) / 2;
        loop {
            let assigned = self.assigned.borrow().clone();
            self.ensure_process(assigned.as_ref()).await;
            if self.process.is_some() && self.probe().await {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            sleep(REACH_PAUSE).await;
        }
    }

    /// Journals the outcome, with what follows from it in the same write: a leader that asks again
    /// must not find the one without the other.
    async fn end(&mut self, request: &ExecuteStepRequest, answer: &ExecuteStepResponse) {
        let ended = Ended {
            key: StepKey::of(request),
            response: answer.clone(),
        };
        let mut facts = std::mem::take(&mut self.concluded);
        facts.push(Fact::Ended(Box::new(ended)));
        if let Err(error) = self.host.journal.append(facts).await {
            // A repetition will find the act begun, observe, and come to the same end.
            tracing::error!(%error, "outcome of step not journaled");
        }
    }

    pub(super) fn wrong_process(&self, run_id: &str) -> Option<ExecuteStepResponse> {
        (run_id.is_empty() || run_id != self.run.run_id).then(|| {
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
        let allowed = |user: &slotmesh_proto::agent::v1::EpochUser| {
            let kind = fence::parse_user(&user.name);
            user.replication && kind == Some((fence::UserKind::Replication, user.epoch))
        };
        if !ensure.users.iter().all(allowed) {
            return response(
                StepOutcome::NoEffect,
                "only replication users are made ahead",
            );
        }
        let role = match self.report.observed_role() {
            NodeRole::Replica => Role::Replica,
            _ => Role::Primary,
        };
        let fact = facts::before_prewarming(&self.node_id, &self.run.run_id, epoch, role);
        if let Err(error) = self.host.journal.append(Vec::from_iter(fact)).await {
            return response(StepOutcome::NoEffect, &chain(&error));
        }
        let dialect = self.run.dialect();
        for user in &ensure.users {
            let Some(control) = self.admin().await else {
                return response(StepOutcome::NoEffect, "the node does not answer");
            };
            if let Err(error) = fence::grant(control, user, dialect).await {
                // A replication user too many does no harm, hence not uncertain.
                return response(StepOutcome::NoEffect, &chain(&error));
            }
        }
        response(StepOutcome::Done, "")
    }

    async fn hand_over(
        &mut self,
        request: &ExecuteStepRequest,
        order: &Order,
    ) -> ExecuteStepResponse {
        // Begun in a former life, or in this one when its outcome could not be journaled.
        let key = StepKey::of(request);
        let has_begun = self
            .host
            .journal
            .read(|memory| memory.begun(&key).is_some());
        if has_begun {
            // The leader that repeats it has just read the record: it is unchanged.
            self.resume.take_if(|b| StepKey::of(&b.request) == key);
            return self
                .resume_with(request, order, Record::Unchanged, deadline_of(request))
                .await;
        }
        if let Some(refusal) = self.wrong_process(&order.run_id) {
            return refusal;
        }
        if self.report.observed_role() != NodeRole::Primary {
            return response(StepOutcome::NoEffect, "the node is not a primary");
        }
        let frozen_revision = self.assigned.borrow().as_ref().map_or(0, |assigned| {
            let frozen = assigned.spec.frozen && assigned.spec.epoch == request.epoch;
            if frozen { assigned.revision } else { 0 }
        });
        let mark = FenceMark {
            node_id: self.node_id.clone(),
            run_id: order.run_id.clone(),
            epoch: request.epoch,
            term: request.term,
            target_address: order.target_address.clone(),
            frozen_revision,
        };
        let (origin, deadline) = (Instant::now(), deadline_of(request));
        let begun = Begun {
            request: request.clone(),
            deadline_unix_ms: unix_ms() + millis(deadline - Instant::now()),
        };
        if let Err(error) = self
            .host
            .journal
            .append([Fact::Begun(begun), Fact::Fenced(mark)])
            .await
        {
            return response(StepOutcome::NoEffect, &chain(&error));
        }
        let machine = HandOver::new(deadline - origin).checking_target(order.check.is_some());
        let done = self
            .drive(request, order, machine, Event::Begin, origin, deadline)
            .await;
        let unfinished = Outcome {
            verdict: Verdict::Uncertain,
            why: "unfinished",
        };
        self.conclude(
            request,
            done.unwrap_or(Done {
                outcome: unfinished,
                critical: None,
                parts: Parts::default(),
            }),
        )
    }

    async fn drive(
        &mut self,
        request: &ExecuteStepRequest,
        order: &Order,
        machine: HandOver,
        first: Event,
        origin: Instant,
        deadline: Instant,
    ) -> Option<Done> {
        let dialect = self.run.dialect();
        // The machine's commands go past what this worker remembers.
        self.run.login = None;
        let controllers = self.host.controllers.clone();
        let dir = self.dir.clone()?;
        let secret = dir.admin_secret().ok()?;
        let (host, assigned) = (self.host.clone(), self.assigned.borrow().clone());
        let may_serve = || assigned.as_ref().is_none_or(|a| host.lease.may_serve(a));
        let admin = self.admin().await?;
        let driver = Driver {
            order,
            socket: dir.socket(),
            admin_user: fence::ADMIN_USER,
            admin_secret: &secret,
            dialect,
            controllers: &controllers,
            commit: Commit {
                instance_id: request.instance_id.clone(),
                shard_id: request.shard_id.clone(),
                task_id: request.task_id.clone(),
                epoch: request.epoch,
                token: order.token.clone(),
                target_node_id: order.target_node_id.clone(),
                critical_us: 0,
            },
            deadline,
            may_serve: &may_serve,
        };
        driver.run(machine, first, origin, admin).await
    }

    /// Turns the machine's outcome into the step's, and into what must be remembered.
    fn conclude(&mut self, request: &ExecuteStepRequest, done: Done) -> ExecuteStepResponse {
        let metrics = &self.host.metrics;
        let Outcome { verdict, why } = done.outcome;
        let critical_us = done.critical.map_or(0, |c| c.as_micros() as u64);
        tracing::info!(node = %self.node_id, task = %request.task_id, epoch = request.epoch, ?verdict, why, critical_us, "hand-over ended");
        let outcome = match verdict {
            Verdict::Done { .. } => {
                metrics.hand_overs_done.add(1);
                metrics.critical_us.add(critical_us);
                StepOutcome::Done
            }
            Verdict::NoEffect => {
                metrics.hand_overs_undone.add(1);
                StepOutcome::NoEffect
            }
            Verdict::Uncertain => {
                metrics.hand_overs_uncertain.add(1);
                StepOutcome::Uncertain
            }
        };
        self.concluded
            .extend(facts::after_hand_over(request, &self.node_id, verdict));
        let words = match verdict {
            Verdict::Done { .. } => done.parts.words(done.critical),
            Verdict::NoEffect | Verdict::Uncertain => why.to_owned(),
        };
        let mut answer = response(outcome, &words);
        answer.committed = verdict == Verdict::Done { committed: true };
        answer.critical_us = critical_us;
        answer
    }

    /// Goes on with a hand-over of a former life, as soon as it can be decided.
    pub(super) async fn resume_hand_over(&mut self, assigned: Option<&Assigned>) {
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
        let left = Duration::from_millis(begun.deadline_unix_ms.saturating_sub(unix_ms()));
        let deadline = Instant::now() + left.max(RESUME_MIN);
        if record == Record::Unknown && !self.changed_or_gone(&order).await {
            return;
        }
        self.resume = None;
        let mut answer = self.resume_with(&request, &order, record, deadline).await;
        self.probe().await;
        answer.node = Some(self.report.clone());
        self.end(&request, &answer).await;
    }

    /// Whether the hand-over can go on without an assignment.
    async fn changed_or_gone(&mut self, order: &Order) -> bool {
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
        deadline: Instant,
    ) -> ExecuteStepResponse {
        let observed = self.observe(order).await;
        tracing::info!(node = %self.node_id, task = %request.task_id, ?observed, ?record, "resuming a hand-over");
        let origin = Instant::now();
        let machine = HandOver::new(deadline.saturating_duration_since(origin));
        let first = Event::Restarted { observed, record };
        let done = self
            .drive(request, order, machine, first, origin, deadline)
            .await;
        let unfinished = Outcome {
            verdict: Verdict::Uncertain,
            why: "the record is not known",
        };
        self.conclude(
            request,
            done.unwrap_or(Done {
                outcome: unfinished,
                critical: None,
                parts: Parts::default(),
            }),
        )
    }

    /// What the named process says of itself; `None`: it is gone.
    async fn observe(&mut self, order: &Order) -> Option<Observation> {
        if order.run_id != self.run.run_id {
            return None;
        }
        let control = self.admin().await?;
        Info::read(control, "replication")
            .await
            .ok()?
            .observation(&order.target_address)
    }

    async fn take_back(&mut self, order: &TakeBack) -> ExecuteStepResponse {
        if let Some(refusal) = self.wrong_process(&order.run_id) {
            return refusal;
        }
        let Some((fence::UserKind::Proxy, epoch)) = fence::parse_user(&order.proxy_user) else {
            return response(StepOutcome::NoEffect, "no proxy user is named");
        };
        match self.end_failover().await {
            Ok(Role::Primary) => {}
            Ok(Role::Replica) => return response(StepOutcome::NoEffect, "the node is a replica"),
            Err(why) => return response(StepOutcome::Uncertain, &why),
        }
        let assigned = self.assigned.borrow().clone();
        if assigned.is_some_and(|a| !self.host.lease.may_serve(&a)) {
            let why = "this host has no lease, so the node may not serve now";
            return response(StepOutcome::Uncertain, why);
        }
        let dialect = self.run.dialect();
        let user = slotmesh_proto::agent::v1::EpochUser {
            name: order.proxy_user.clone(),
            password: order.proxy_password.clone(),
            epoch,
            replication: false,
        };
        let restored = match self.admin().await {
            None => Err("the node does not answer".to_owned()),
            Some(control) => async {
                if !order.master_user.is_empty() {
                    set_login(control, &order.master_user, &order.master_password).await?;
                }
                fence::grant(control, &user, dialect).await
            }
            .await
            .map_err(|error| chain(&error)),
        };
        self.run.login = None;
        if let Err(why) = restored {
            return response(StepOutcome::Uncertain, &why);
        }
        if let Some(begun) = self.resume.take() {
            let decided = response(StepOutcome::NoEffect, "the leader took the node back");
            self.end(&begun.request, &decided).await;
        }
        self.concluded.push(Fact::Unfenced(self.node_id.clone()));
        response(StepOutcome::Done, "")
    }

    /// Ends a failover that is under way; tells what the node is after it.
    async fn end_failover(&mut self) -> Result<Role, String> {
        let until = Instant::now() + ABORT_WAIT;
        let mut aborted = false;
        loop {
            let control = self.admin().await.ok_or("the node does not answer")?;
            let info = Info::read(control, "replication")
                .await
                .map_err(|e| chain(&e))?;
            match (info.role(), info.failover()) {
                (Some(role), Failover::None) => return Ok(role),
                _ if Instant::now() >= until => return Err("the failover goes on".to_owned()),
                _ if !aborted => {
                    aborted = true;
                    // Refused when it ended in this moment; the next look tells.
                    let _ = control.call(&["FAILOVER", "ABORT"]).await;
                }
                _ => sleep(ABORT_LOOK).await,
            }
        }
    }
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, millis)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
