//! The owner of one node, as in the real worker: ensure, probe, resume, converge; one thing at a
//! time.
//!
//! Invariant: the decisions are `node::decide` and `HandOver::step`; here is only their carrying out.

use std::rc::Rc;

use slotmesh_agent::{
    fence::{KnownUsers, password_sha256},
    handover::Role,
    journal::record::{Begun, Fact},
    node::{Action, Assigned, Decision, Login, NOWHERE, Observed, decide, facts},
    probe::{Info, granted_epoch, replication_users},
};
use slotmesh_proto::{
    agent::v1::{Desired, NodeReport, ProcessState},
    store::v1::NodeRole,
};

use super::{Got, Host, Seat, exchange::Exchange, steps};
use crate::{
    fiber::{sleep, wait_until},
    msg::{Party, Rpc},
    plan::{Point, Script},
    redis::{Admin, Answer},
    sched::{MS, Micros},
};

/// How old what is known of a node may get.
const PROBE_EVERY: Micros = 100 * MS;
/// As the real control connection has it.
const COMMAND_TIMEOUT: Micros = 500 * MS;
/// Five pings.
const MISSED: Micros = 500 * MS;
/// Of a process that is unresponsive already.
const MERCY: Micros = 300 * MS;
const ROUNDS_MAX: u32 = 3;
/// Between starts of a node that ends at once.
const RESTART_PAUSE: Micros = 100 * MS;

/// One worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) host: Rc<Host>,
    pub(crate) seat: Seat,
    pub(crate) run_id: String,
    pub(crate) users: KnownUsers,
    pub(crate) login: Option<Login>,
    pub(crate) report: NodeReport,
    pub(crate) resume: Option<Begun>,
    /// What follows from the step that is ending; journaled with its outcome.
    pub(crate) concluded: Vec<Fact>,
    started: Option<Micros>,
    /// What this process has beyond its successor was looked at.
    /// Until the epoch at which it stood then: it may be lost again.
    captured: Option<u64>,
    /// Of the last process that was seen to end.
    exited_run_id: String,
    /// Since when the process does not answer.
    silent_since: Option<Micros>,
    pub(super) exchange: Exchange,
    /// Its append-only file was begun.
    pub(super) appends: bool,
}

/// Runs until the agent dies.
pub(crate) async fn run(host: Rc<Host>, seat: Seat) {
    let resume = steps::unfinished(&host.memory.borrow(), &seat.name);
    let report = host
        .reports
        .borrow()
        .get(&seat.node)
        .cloned()
        .unwrap_or_default();
    let mut worker = Worker {
        host,
        seat,
        run_id: String::new(),
        users: KnownUsers::new(),
        login: None,
        report,
        resume,
        concluded: Vec::new(),
        started: None,
        captured: None,
        exited_run_id: String::new(),
        silent_since: None,
        exchange: Exchange::default(),
        appends: false,
    };
    let mut seen = None;
    while worker.host.has(worker.seat.node) {
        let call = {
            let mut steps = worker.host.steps.borrow_mut();
            steps.entry(worker.seat.node).or_default().pop_front()
        };
        if let Some(call) = call {
            let response = Box::new(worker.execute(call.request).await);
            let mut ctx = worker.host.world.borrow_mut();
            ctx.point(Point::StepAnswered);
            let reply = Rpc::StepReply {
                call: call.call,
                response,
            };
            ctx.rpc(worker.host.me, call.from, reply);
        }
        worker.turn().await;
        let (host, seat) = (Rc::clone(&worker.host), worker.seat.clone());
        let before = seen;
        let me = host.me;
        wait_until(&host.world, me, PROBE_EVERY, || {
            let waiting = host
                .steps
                .borrow()
                .get(&seat.node)
                .is_some_and(|s| !s.is_empty());
            let revision = host.assigned.borrow().get(&seat.name).map(|a| a.revision);
            let died = worker.report.state() == ProcessState::Running
                && host.world.borrow().life(Party::Node(seat.node)).is_none();
            waiting || revision != before || died
        })
        .await;
        seen = host.assigned.borrow().get(&seat.name).map(|a| a.revision);
    }
}

impl Worker {
    pub(crate) fn assigned(&self) -> Option<Assigned> {
        self.host.assigned.borrow().get(&self.seat.name).cloned()
    }

    async fn turn(&mut self) {
        let assigned = self.assigned();
        let desired = assigned.as_ref().map(|a| a.spec.desired());
        if desired == Some(Desired::Removed) || self.host.is_removed(self.seat.node) {
            return self.remove(assigned.as_ref()).await;
        }
        self.ensure_process(assigned.as_ref()).await;
        self.fence_by_force(assigned.as_ref());
        // A freeze that is not remembered would pass for one that never was: a target that stands
        // still meanwhile may promote itself when it wakes.
        if let Some(assigned) = assigned.as_ref().filter(|a| a.spec.frozen) {
            self.remember(assigned).await;
        }
        if self.is_running() && self.probe_if_responsive().await {
            self.resume_hand_over(assigned.as_ref()).await;
            if let Some(assigned) = &assigned
                && !self.make_way(assigned).await
            {
                self.converge(assigned).await;
            }
        }
        self.publish();
    }

    /// Ends the process, and then removes its data: what is left after a crash is begun again. What
    /// only a node has that has left its shard is kept first, as before it would follow.
    async fn remove(&mut self, assigned: Option<&Assigned>) {
        if self.is_running() {
            let has_left = assigned.filter(|a| a.spec.detached);
            if let Some(assigned) = has_left
                && self.probe().await
                && !self.keep(assigned).await
            {
                return;
            }
            let (node, mut ctx) = (self.seat.node, self.host.world.borrow_mut());
            let now = ctx.now();
            return (ctx.queue).at(now, crate::ctx::Event::Script(Script::Remove(node)));
        }
        let party = Party::Node(self.seat.node);
        self.host.world.borrow_mut().removed.insert(party);
        self.forget();
        self.set_state(ProcessState::Removed);
        self.publish();
    }

    /// False when it is to be tried again.
    async fn keep(&mut self, assigned: &Assigned) -> bool {
        let Decision::Act(actions) = self.decide(assigned).await else {
            return true;
        };
        for action in actions {
            if matches!(action, Action::Capture { .. }) && !self.apply(assigned, action).await {
                return false;
            }
        }
        true
    }

    pub(crate) fn publish(&mut self) {
        if !self.host.has(self.seat.node) {
            return;
        }
        self.report.exited_run_id.clone_from(&self.exited_run_id);
        self.report.unresponsive = self.is_unresponsive();
        self.report_engine();
        self.host
            .reports
            .borrow_mut()
            .insert(self.seat.node, self.report.clone());
    }

    pub(crate) fn is_running(&self) -> bool {
        self.host
            .world
            .borrow()
            .life(Party::Node(self.seat.node))
            .is_some()
    }

    /// Starts the node's process if there is none and it may be started.
    pub(crate) async fn ensure_process(&mut self, assigned: Option<&Assigned>) {
        if self.is_running() {
            return;
        }
        if !self.run_id.is_empty() {
            self.exited_run_id.clone_from(&self.run_id);
        }
        self.note_engine_end();
        self.forget();
        self.set_state(ProcessState::Stopped);
        // Out before a successor is started.
        self.publish();
        // Without an assignment it is started as it was last time, if there was one.
        let desired = assigned.map(|a| a.spec.desired());
        let known = self.host.memory.borrow().term() > 0 && self.seat.ran.get();
        let wanted = desired == Some(Desired::Running) || (desired.is_none() && known);
        let now = self.host.now();
        let due = self.started.is_none_or(|at| now >= at + RESTART_PAUSE);
        if !wanted || !due {
            return;
        }
        self.started = Some(now);
        self.seat.ran.set(true);
        let engine = self.prepare(assigned);
        self.host.world.borrow_mut().queue.at(
            now + 2 * MS,
            crate::ctx::Event::Script(Script::Start(self.seat.node, engine)),
        );
        sleep(&self.host.world, self.host.me, 4 * MS).await;
        self.set_state(ProcessState::Starting);
    }

    /// The last epoch at which this process was the primary, as its agent has journaled.
    fn stood(&self) -> u64 {
        let memory = self.host.memory.borrow();
        let standing = memory.standing(&self.seat.name);
        let standing = standing.filter(|s| s.run_id == self.run_id);
        standing.map_or(0, |s| s.epoch)
    }

    fn forget(&mut self) {
        self.run_id.clear();
        self.users.clear();
        self.login = None;
        self.captured = None;
        self.silent_since = None;
        self.appends = false;
    }

    /// The kernel says that the process is stopped, and it has not answered for a while.
    fn is_unresponsive(&self) -> bool {
        let missed = |since| self.host.now() >= since + MISSED;
        let stopped = self
            .host
            .world
            .borrow()
            .is_stopped(Party::Node(self.seat.node));
        stopped && self.silent_since.is_some_and(missed)
    }

    /// The last resort: a process that could still serve an epoch that is over, and takes no fence.
    fn fence_by_force(&self, assigned: Option<&Assigned>) {
        let owes = assigned.is_some_and(|a| {
            let granted = self.report.granted_epoch;
            let lost = a.spec.detached && a.spec.primary_node_id == self.seat.name;
            (granted > 0 && granted <= a.spec.closed_epoch) || (lost && self.run_id.is_empty())
        });
        let overdue = |since| self.host.now() >= since + MISSED + MERCY;
        if owes && self.is_unresponsive() && self.silent_since.is_some_and(overdue) {
            self.host.kill(self.seat.node);
        }
    }

    fn set_state(&mut self, state: ProcessState) {
        self.report = NodeReport {
            node_id: self.seat.name.clone(),
            state: state.into(),
            address: crate::node::address(self.seat.node),
            ..NodeReport::default()
        };
    }

    /// One command on the local socket.
    pub(crate) async fn admin(&self, command: Admin) -> Option<Answer> {
        let call = {
            let mut ctx = self.host.world.borrow_mut();
            let call = ctx.call();
            let message = Rpc::Admin { call, command };
            ctx.local(self.host.me, Party::Node(self.seat.node), message);
            call
        };
        let got = self
            .host
            .answers
            .get(&self.host.world, self.host.me, call, COMMAND_TIMEOUT);
        match got.await {
            Some(Got::Admin(answer)) => answer,
            _ => None,
        }
    }

    pub(crate) async fn info(&self) -> Option<Info> {
        match self.admin(Admin::Info).await {
            Some(Answer::Info(text)) => Some(Info::parse(&text)),
            _ => None,
        }
    }

    /// Asks the process for everything; false when it does not answer.
    pub(crate) async fn probe(&mut self) -> bool {
        let Some(info) = self.info().await else {
            return self.lost();
        };
        let Some(Answer::Users(users)) = self.admin(Admin::Users).await else {
            return self.lost();
        };
        if info.run_id() != self.run_id {
            self.forget();
            info.run_id().clone_into(&mut self.run_id);
        }
        self.users = users;
        self.silent_since = None;
        let (assigned_epoch, detached) = (self.report.assigned_epoch, self.report.detached);
        let membership = self.report.assigned_membership;
        self.set_state(ProcessState::Running);
        info.fill(&mut self.report);
        let is_replica = self.report.observed_role() == NodeRole::Replica;
        self.report.detached = detached && is_replica && !self.report.link_up;
        self.report.granted_epoch = granted_epoch(&self.users);
        self.report.replication_users = replication_users(&self.users);
        self.report.assigned_epoch = assigned_epoch;
        self.report.assigned_membership = membership;
        self.settle().await;
        true
    }

    /// As the real worker, whose pings tell it at once when a process that stands still goes on.
    async fn probe_if_responsive(&mut self) -> bool {
        let party = Party::Node(self.seat.node);
        let is_known_silent = self.silent_since.is_some();
        let stands_still = self.host.world.borrow().is_stopped(party);
        !(is_known_silent && stands_still) && self.probe().await
    }

    fn lost(&mut self) -> bool {
        if self.is_running() {
            // As it was when it answered last: only its end is news.
            self.silent_since
                .get_or_insert(self.host.now() - COMMAND_TIMEOUT);
            if self.report.state() != ProcessState::Running {
                self.set_state(ProcessState::Starting);
            }
        } else {
            self.set_state(ProcessState::Stopped);
        }
        false
    }

    pub(super) async fn converge(&mut self, assigned: &Assigned) {
        if self.report.loading {
            return;
        }
        self.remember(assigned).await;
        for _ in 0..ROUNDS_MAX {
            let actions = match self.decide(assigned).await {
                Decision::Leave(_) => return,
                Decision::Act(actions) if actions.is_empty() => {
                    self.stand(assigned).await;
                    self.report.assigned_epoch = assigned.spec.epoch;
                    self.report.assigned_membership = assigned.spec.membership;
                    let replica = self.report.observed_role() == NodeRole::Replica;
                    self.report.detached = assigned.spec.detached && replica;
                    return;
                }
                Decision::Act(actions) => actions,
            };
            self.report.detached = false;
            for action in actions {
                if !self.apply(assigned, action).await {
                    return;
                }
            }
            if !self.probe().await {
                return;
            }
        }
    }

    /// Journals what must be known before the assignment may have effects.
    async fn remember(&self, assigned: &Assigned) {
        let facts = {
            let memory = self.host.memory.borrow();
            facts::before_convergence(&memory, &self.seat.name, assigned)
        };
        self.host.append(facts).await;
    }

    /// Journals that the process agrees with the record.
    async fn stand(&self, assigned: &Assigned) {
        let fact = {
            let memory = self.host.memory.borrow();
            facts::when_converged(&memory, &self.seat.name, &self.run_id, assigned)
        };
        self.host.append(fact).await;
    }

    async fn decide(&self, assigned: &Assigned) -> Decision {
        let spec = &assigned.spec;
        let (fence, standing, journaled_epoch) = {
            let memory = self.host.memory.borrow();
            let fence = memory.fence(&self.seat.name).cloned();
            let standing = memory.standing(&self.seat.name).cloned();
            (
                fence,
                standing,
                memory.epoch(&spec.instance_id, &spec.shard_id),
            )
        };
        let Some(info) = self.info().await else {
            return Decision::Leave("the node does not answer");
        };
        let following = info.following();
        let target = fence
            .as_ref()
            .map_or("", |mark| mark.target_address.as_str());
        let seen = Observed {
            run_id: &self.run_id,
            role: info.role().unwrap_or(Role::Replica),
            failover: info.failover(),
            following: &following,
            link: info.link(),
            history: info.history(),
            captured: self.captured == Some(self.stood()),
            users: &self.users,
            login: self.login.as_ref(),
            fence: fence.as_ref(),
            fence_target_online: info.observation(target).is_some_and(|o| o.target_online),
            standing: standing.as_ref(),
            journaled_epoch,
            serving_right: self.host.may_serve(assigned),
        };
        decide(assigned, &seen)
    }

    async fn apply(&mut self, assigned: &Assigned, action: Action) -> bool {
        let ok = match action {
            Action::Delete(users) => self.admin(Admin::Delete(users)).await,
            Action::SoftFence(user) => self.admin(Admin::SoftFence(user)).await,
            Action::Grant(_) if !self.host.may_serve(assigned) => return false,
            Action::Grant(user) => {
                let sha = password_sha256(&user.password);
                let (user, replication) = (user.name, user.replication);
                self.admin(Admin::Grant {
                    user,
                    sha,
                    replication,
                })
                .await
            }
            Action::SetLogin(login) => {
                let (user, password) = (login.user.clone(), login.password.clone());
                let answer = self.admin(Admin::SetLogin { user, password }).await;
                if matches!(answer, Some(Answer::Ok)) {
                    self.login = Some(login);
                }
                answer
            }
            Action::Detach => {
                let followed = self.admin(Admin::Follow(NOWHERE.to_owned())).await;
                if !matches!(followed, Some(Answer::Ok)) {
                    return false;
                }
                let (user, password) = (String::new(), String::new());
                let answer = self.admin(Admin::SetLogin { user, password }).await;
                if !matches!(answer, Some(Answer::Ok)) {
                    return false;
                }
                self.login = Some(Login::default());
                answer
            }
            Action::Capture { replid, tail } => {
                let from = i64::try_from(tail.from).unwrap_or(i64::MAX);
                let answer = self.admin(Admin::Capture { replid, from }).await;
                if !matches!(answer, Some(Answer::Captured(_))) {
                    return false;
                }
                self.captured = Some(self.stood());
                Some(Answer::Ok)
            }
            Action::Follow { host, port } => {
                self.admin(Admin::Follow(format!("{host}:{port}"))).await
            }
        };
        matches!(ok, Some(Answer::Ok))
    }
}
