//! A replica's process makes way for one of another engine, and engines are tried before, as the real
//! worker and the real trials do it.
//!
//! Invariant: no process is ended that the assignment does not give free, by the real rule.

use rand::Rng;
use slotmesh_agent::{
    executor::response,
    handover::{Event as Next, Role},
    node::{Assigned, is_behind, worker::is_free},
    probe::Info,
};
use slotmesh_proto::{
    agent::v1::{
        EngineTrouble, ExecuteStepRequest, ExecuteStepResponse, HandOver as Order, NodeSpec,
        StageEngine, Staged, StepOutcome, TargetCheck,
    },
    store::v1::NodeRole,
};

use super::{Got, Host, worker::Worker};
use crate::{
    ctx::Event,
    engine,
    fiber::sleep,
    msg::{Party, Rpc},
    node::{Ending, party_of},
    plan::{Point, Script},
    redis::{Admin, Answer},
    sched::{MS, Micros},
};

/// One that was asked to end and answers for longer has given up ending.
const ENDING_MAX: Micros = 10_000 * MS;
/// A target is asked for so long.
const CHECK_WITHIN: Micros = 250 * MS;
/// A process writes its snapshot, and ends.
const ENDS_WITHIN: Micros = 20 * MS;
/// A trial of an engine here.
const TRIAL: std::ops::Range<Micros> = 20 * MS..700 * MS;

/// What is known of the node's engines; gone with the agent's life.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    ending: Option<Micros>,
    /// A process was started, and has not answered yet.
    launched: bool,
    trouble: Option<EngineTrouble>,
}

impl Worker {
    /// Ends the process if it has to make way; tells whether it is on its way.
    pub(super) async fn make_way(&mut self, assigned: &Assigned) -> bool {
        let now = self.host.now();
        if let Some(since) = self.exchange.ending {
            let has_given_up = now >= since + ENDING_MAX;
            if has_given_up {
                self.exchange.ending = None;
            }
            return !has_given_up;
        }
        let spec = &assigned.spec;
        let is_free = {
            let memory = self.host.memory.borrow();
            let standing = memory.standing(&self.seat.name);
            let epoch = memory.epoch(&spec.instance_id, &spec.shard_id);
            is_free(assigned, epoch) && !is_behind(spec, &self.run_id, standing)
        };
        let is_other = *self.seat.engine.borrow() != spec.engine;
        if !is_other || !is_free || self.report.loading || !self.is_nobodys_primary(spec) {
            return false;
        }
        if self.host.world.borrow().spoiled.contains(&self.host.index) && !spec.engine.is_empty() {
            // Its successor's program was not found: nothing is ended for it.
            self.engine_failed(&spec.engine);
            return false;
        }
        self.exchange.ending = Some(now);
        let ending = match spec.discard_data {
            true => Ending::Discard,
            false => Ending::Save,
        };
        let node = self.seat.node;
        let mut ctx = self.host.world.borrow_mut();
        let life = ctx.life(Party::Node(node)).unwrap_or(0);
        let at = now + ctx.rng.random_range(2 * MS..ENDS_WITHIN);
        ctx.point(Point::MakesWay);
        ctx.queue
            .at(at, Event::Script(Script::End(node, life, ending)));
        true
    }

    /// As the real worker: a replica, or a process that was never named and that no proxy can reach.
    fn is_nobodys_primary(&self, spec: &NodeSpec) -> bool {
        let has_stood = {
            let memory = self.host.memory.borrow();
            let standing = memory.standing(&self.seat.name);
            standing.is_some_and(|s| s.run_id == self.run_id)
        };
        let is_unnamed = spec.run_id != self.run_id && !has_stood && self.report.granted_epoch == 0;
        self.report.observed_role() == NodeRole::Replica || is_unnamed
    }

    /// Which engine is started next; its data is as the assignment wants it.
    pub(super) fn prepare(&mut self, assigned: Option<&Assigned>) -> String {
        let last = self.seat.engine.borrow().clone();
        let Some(spec) = assigned.map(|a| &a.spec) else {
            return last;
        };
        // One that does not start may have been started with files that it was not to load.
        let fails = self
            .exchange
            .trouble
            .as_ref()
            .is_some_and(|t| t.engine == spec.engine);
        if spec.may_exchange && spec.discard_data && (last != spec.engine || fails) {
            let (node, mut ctx) = (self.seat.node, self.host.world.borrow_mut());
            let now = ctx.now();
            ctx.queue.at(now, Event::Script(Script::Discard(node)));
        }
        spec.engine.clone_into(&mut self.seat.engine.borrow_mut());
        self.exchange.launched = true;
        spec.engine.clone()
    }

    /// There is no process: one that never answered was of no use.
    pub(super) fn note_engine_end(&mut self) {
        let was_asked = self.exchange.ending.take().is_some();
        if std::mem::take(&mut self.exchange.launched) && !was_asked {
            let engine = self.seat.engine.borrow().clone();
            self.engine_failed(&engine);
        }
    }

    fn engine_failed(&mut self, engine: &str) {
        let before = self.exchange.trouble.take();
        let before = before.filter(|t| t.engine == engine);
        self.exchange.trouble = Some(EngineTrouble {
            engine: engine.to_owned(),
            starts: before.map_or(0, |t| t.starts).saturating_add(1),
            why: "it does not start".into(),
        });
    }

    /// As the real check of a target whose engine is older: after the fence, once it has executed all
    /// that was written.
    pub(super) async fn check_target(&self, order: &Order) -> Next {
        let Some(check) = &order.check else {
            return Next::TargetSound;
        };
        let Some(written) = self.info().await.map(|info| info.offset()) else {
            return Next::TargetUnsound("the old primary did not say how far it has written");
        };
        let end = self.host.now() + CHECK_WITHIN;
        while self.host.now() < end {
            let seen = self.ask_target(order, end - self.host.now()).await;
            let has_all =
                |info: &Info| info.role() == Some(Role::Replica) && info.offset() >= written;
            if let Some(info) = seen.filter(has_all) {
                return judge(&info, check);
            }
            sleep(&self.host.world, self.host.me, MS).await;
        }
        Next::TargetUnsound("the target did not get to the end of the stream in time")
    }

    async fn ask_target(&self, order: &Order, limit: Micros) -> Option<Info> {
        let target = party_of(&order.target_address)?;
        let (host, command) = (&self.host, Admin::Info);
        let call = {
            let mut ctx = host.world.borrow_mut();
            let call = ctx.call();
            ctx.rpc(host.me, target, Rpc::Admin { call, command });
            call
        };
        match host.answers.get(&host.world, host.me, call, limit).await {
            Some(Got::Admin(Some(Answer::Info(text)))) => Some(Info::parse(&text)),
            _ => None,
        }
    }

    /// At each answer: goes on with an append-only file that is not whole.
    pub(super) async fn settle(&mut self) {
        if self.report.loading {
            return;
        }
        if std::mem::take(&mut self.exchange.launched) {
            self.exchange.trouble = None;
        }
        if self.is_settling() && self.exchange.ending.is_none() && !self.appends {
            // A refusal begins nothing: it is asked again at the next answer.
            self.appends = matches!(self.admin(Admin::Append).await, Some(Answer::Ok));
        }
    }

    fn is_settling(&self) -> bool {
        let party = Party::Node(self.seat.node);
        self.host.world.borrow().settling.contains(&party)
    }

    /// The report's part of it.
    pub(super) fn report_engine(&mut self) {
        let lives = self.is_running();
        let engine = self.seat.engine.borrow().clone();
        self.report.engine = Some(engine).filter(|_| lives);
        self.report
            .engine_trouble
            .clone_from(&self.exchange.trouble);
        self.report.settling = lives && self.is_settling();
    }
}

/// As the real one does.
fn judge(info: &Info, check: &TargetCheck) -> Next {
    let refused = info.text("unexpected_error_replies").parse::<u64>();
    match refused {
        _ if info.run_id() != check.run_id => Next::TargetUnsound("the target was restarted"),
        Ok(refused) if refused <= check.refused => Next::TargetSound,
        _ => Next::TargetUnsound("the target refused a command of the newer engine"),
    }
}

impl Host {
    /// A trial of an engine beside its node: the first question begins it, each further one tells how
    /// far it is. Not journaled: a restarted agent begins anew.
    pub(crate) fn stage(
        &self,
        request: &ExecuteStepRequest,
        order: &StageEngine,
    ) -> ExecuteStepResponse {
        let term = self.memory.borrow().term();
        if request.term < term {
            let mut answer = response(StepOutcome::Fenced, "a higher term is known here");
            answer.known_term = term;
            return answer;
        }
        let now = self.now();
        let key = (request.step.clone(), request.attempt);
        let time = self.world.borrow_mut().rng.random_range(TRIAL);
        let over = *self.trials.borrow_mut().entry(key).or_insert(now + time);
        if now >= over && self.world.borrow().spoiled.contains(&self.index) {
            return response(StepOutcome::NoEffect, "its sum is wrong");
        }
        let mut answer = response(StepOutcome::Done, "");
        answer.known_term = term;
        answer.staged = Some(Staged {
            under_way: now < over,
            version: engine::version(&order.engine).to_owned(),
            ..Staged::default()
        });
        answer
    }
}
