//! Carries out what the hand-over's real machine asks for, as the real driver does.
//!
//! Invariant: each act of the critical section is a point at which anybody may die.

use std::{collections::VecDeque, time::Duration};

use rand::Rng;
use slotmesh_agent::{
    controllers::CommitAnswer,
    handover::{Action, Event, HandOver, Outcome, Phase, Verdict},
};
use slotmesh_proto::agent::v1::{CommitHandoverRequest, ExecuteStepRequest, HandOver as Order};

use super::{Got, worker::Worker};
use crate::{
    fiber::sleep,
    msg::{ConnId, Party, Rpc, Stream},
    node::party_of,
    plan::Point,
    redis::{Admin, Answer},
    sched::{MS, Micros},
    variant::Variant,
};

const COMMIT_TRY: Micros = 300 * MS;
const CONNECT_TIMEOUT: Micros = 500 * MS;
/// For so long the driver looks without a pause.
const EAGER: Micros = 5 * MS;
const PACE: Micros = MS;

impl Worker {
    /// Drives the real machine to its end.
    pub(super) async fn drive(
        &mut self,
        request: &ExecuteStepRequest,
        order: &Order,
        mut machine: HandOver,
        first: Event,
        deadline: Micros,
    ) -> (Outcome, Micros) {
        self.login = None;
        let mut target = None;
        let mut events = VecDeque::from([first]);
        let mut looked_since = None;
        while let Some(event) = events.pop_front() {
            let now = Duration::from_micros(self.host.now());
            let (next, actions) = machine.step(event, now);
            machine = next;
            let looks = actions.contains(&Action::Observe);
            if looks && machine.phase() == Phase::CatchingUp {
                let since = *looked_since.get_or_insert(self.host.now());
                if self.host.now() > since + EAGER {
                    sleep(&self.host.world, self.host.me, PACE).await;
                }
            }
            for action in actions {
                if !matches!(action, Action::Observe | Action::GetAck) {
                    let mut ctx = self.host.world.borrow_mut();
                    ctx.point(Point::Act);
                    ctx.say(|| format!("agent {}: hand-over: {action:?}", self.host.index));
                }
                if let Action::Finish(outcome) = action {
                    self.hang_up(target);
                    return (outcome, machine.critical().map_or(0, micros));
                }
                events.extend(
                    self.act(action, request, order, &mut target, deadline)
                        .await,
                );
            }
        }
        self.hang_up(target);
        (
            Outcome {
                verdict: Verdict::Uncertain,
                why: "the record is not known",
            },
            0,
        )
    }

    fn hang_up(&self, target: Option<ConnId>) {
        if let Some(conn) = target {
            self.host.targets.borrow_mut().remove(&conn);
            self.host.world.borrow_mut().close(self.host.me, conn);
        }
    }

    async fn act(
        &mut self,
        action: Action,
        request: &ExecuteStepRequest,
        order: &Order,
        target: &mut Option<ConnId>,
        deadline: Micros,
    ) -> Option<Event> {
        let variant = self.host.variant();
        Some(match action {
            Action::ReachTarget => {
                *target = self.reach_target(order).await;
                if target.is_some() {
                    Event::TargetReached
                } else {
                    Event::TargetUnreachable
                }
            }
            Action::SoftFence if variant == Variant::NoFence => Event::FenceDone,
            Action::SoftFence => {
                match self.admin(Admin::SoftFence(order.proxy_user.clone())).await {
                    Some(Answer::Ok) => Event::FenceDone,
                    _ => Event::FenceFailed,
                }
            }
            Action::SetMasterUser => {
                let (user, password) = (order.master_user.clone(), order.master_password.clone());
                match self.admin(Admin::SetLogin { user, password }).await {
                    Some(Answer::Ok) => Event::MasterUserSet,
                    _ => Event::MasterUserFailed,
                }
            }
            Action::CheckTarget => self.check_target(order).await,
            Action::Failover => self.failover(request, order, deadline).await,
            Action::GetAck => {
                if target.is_none_or(|c| !self.host.targets.borrow().contains_key(&c)) {
                    *target = self.reach_target(order).await;
                }
                if let Some(conn) = *target {
                    self.host
                        .world
                        .borrow_mut()
                        .send(self.host.me, conn, Stream::GetAck);
                }
                return None;
            }
            Action::Observe => match self.look(order).await {
                Some(seen) => Event::RoleObserved(seen),
                None => Event::Unobservable,
            },
            Action::AbortFailover => match self.admin(Admin::Abort).await {
                Some(Answer::Ok) => Event::AbortDone,
                _ => Event::AbortFailed,
            },
            Action::RestoreGrant if !self.assigned().is_none_or(|a| self.host.may_serve(&a)) => {
                Event::RestoreFailed
            }
            Action::RestoreGrant => {
                match self.admin(Admin::Restore(order.proxy_user.clone())).await {
                    Some(Answer::Ok) => Event::GrantRestored,
                    _ => Event::RestoreFailed,
                }
            }
            Action::Commit => match self.commit(request, order, deadline).await {
                CommitAnswer::Accepted => Event::CommitAccepted,
                CommitAnswer::Refused { primary_node_id } => Event::CommitRefused {
                    target_is_primary: primary_node_id == order.target_node_id,
                },
                CommitAnswer::Unreachable => Event::CommitUnreachable,
            },
            Action::Finish(_) => return None,
        })
    }

    async fn failover(
        &self,
        request: &ExecuteStepRequest,
        order: &Order,
        deadline: Micros,
    ) -> Event {
        let variant = self.host.variant();
        if variant == Variant::PromoteBehind {
            self.promote_by_hand(order).await;
            return Event::FailoverAccepted;
        }
        let timeout = Micros::from(order.failover_timeout_ms) * MS;
        let to = order.target_address.clone();
        match self.admin(Admin::Failover { to, timeout }).await {
            Some(Answer::Err(_)) => Event::FailoverRefused,
            None => Event::FailoverUnanswered,
            Some(_) => {
                if variant == Variant::CommitUnproven {
                    self.commit(request, order, deadline).await;
                }
                Event::FailoverAccepted
            }
        }
    }

    /// Broken on purpose: the target becomes primary with what it happens to have.
    async fn promote_by_hand(&self, order: &Order) {
        if let Some(target) = party_of(&order.target_address) {
            let mut ctx = self.host.world.borrow_mut();
            let call = ctx.call();
            ctx.local(
                self.host.me,
                target,
                Rpc::Admin {
                    call,
                    command: Admin::Promote,
                },
            );
        }
        self.admin(Admin::Follow(order.target_address.clone()))
            .await;
    }

    /// A connection to the target, logged in as the old primary's replication user.
    async fn reach_target(&self, order: &Order) -> Option<ConnId> {
        let target = party_of(&order.target_address)?;
        let (conn, call) = {
            let mut ctx = self.host.world.borrow_mut();
            let conn = ctx.open(self.host.me, target);
            let login = Stream::TargetLogin {
                user: order.master_user.clone(),
                password: order.master_password.clone(),
            };
            ctx.send(self.host.me, conn, login);
            (conn, ctx.call())
        };
        self.host.targets.borrow_mut().insert(conn, call);
        let got = self
            .host
            .answers
            .get(&self.host.world, self.host.me, call, CONNECT_TIMEOUT);
        if matches!(got.await, Some(Got::Login(true))) {
            return Some(conn);
        }
        self.hang_up(Some(conn));
        None
    }

    /// As the real commit: one controller after the other, until one has read the record.
    async fn commit(
        &self,
        request: &ExecuteStepRequest,
        order: &Order,
        deadline: Micros,
    ) -> CommitAnswer {
        let token = match self.host.variant() {
            Variant::CommitWithoutToken => String::new(),
            _ => order.token.clone(),
        };
        let commit = CommitHandoverRequest {
            instance_id: request.instance_id.clone(),
            shard_id: request.shard_id.clone(),
            task_id: request.task_id.clone(),
            epoch: request.epoch,
            token,
            critical_us: 0,
        };
        let first = self.host.preferred.borrow().unwrap_or(0);
        loop {
            for n in 0..self.host.controllers {
                let left = deadline.saturating_sub(self.host.now());
                if left == 0 {
                    return CommitAnswer::Unreachable;
                }
                let call = {
                    let mut ctx = self.host.world.borrow_mut();
                    let to = Party::Controller((first + n) % self.host.controllers);
                    let call = ctx.call();
                    ctx.rpc(
                        self.host.me,
                        to,
                        Rpc::Commit {
                            call,
                            request: commit.clone(),
                        },
                    );
                    ctx.point(Point::CommitSent);
                    call
                };
                let limit = left.min(COMMIT_TRY);
                let got = self
                    .host
                    .answers
                    .get(&self.host.world, self.host.me, call, limit)
                    .await;
                match got {
                    Some(Got::Commit(CommitAnswer::Unreachable)) | None => {}
                    Some(Got::Commit(answer)) => return answer,
                    Some(_) => {}
                }
            }
            let pause = self
                .host
                .world
                .borrow_mut()
                .rng
                .random_range(2 * MS..50 * MS);
            sleep(&self.host.world, self.host.me, pause).await;
        }
    }
}

fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
