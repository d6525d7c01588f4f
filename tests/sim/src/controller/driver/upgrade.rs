//! Gives nodes another engine, as the real driver does: the real machine decides, here its decisions
//! become writes, trials on hosts, and acts of the machine of switchovers.
//!
//! Invariant: a shard is acted upon only while the task has its lock; what is done before that touches
//! nothing that serves.

use std::rc::Rc;

use slotmesh_proto::agent::v1::{self as pb, execute_step_request::Act};
use slotmesh_task::{
    Phase, ShardSwitch, State as TaskState, Task, place, step,
    switchover::StepStatus,
    upgrade::{self, Decision, Lock, Owner, ShardUpgrade, Upgrade, UpgradePhase, View, Write},
};
use slotmesh_topology::{NodeId, Shard};

use super::{Driver, StepKey, ask, replace::put_lock};
use crate::{
    controller::{
        Desk, Versioned,
        write::{Next, Writer, Wrote},
    },
    fiber::{Fiber, sleep},
    msg::Party,
    sched::{MS, Micros, SEC},
    store::{Compare, Key, Value},
};

/// As the real driver has them, but for the time of one question: here nothing takes that long.
const BUSY_LOOK_MS: u64 = 1_000;
const LOOK_MS: u64 = 1_000;
const STAGE_POLL: Micros = 500 * MS;
const STAGE_SILENCE_MAX: Micros = 60 * SEC;
const STAGE_ASK: Micros = 2 * SEC;

impl Driver {
    /// The next acts of an upgrade.
    pub(super) async fn act_on_upgrade(
        &mut self,
        task: &Versioned<Task>,
        spec: &Upgrade,
    ) -> Result<Next, Wrote> {
        let mut wake_ms = u64::MAX;
        for part in spec.shards.iter().filter(|s| !s.phase.is_ended()) {
            match self.act_on_part(task, spec, part).await? {
                Next::Again => return Ok(Next::Again),
                Next::At(at_ms) => wake_ms = wake_ms.min(at_ms),
            }
        }
        match upgrade::ended(&task.value, spec) {
            Some((state, message)) => self.end_upgrade(task, spec, state, message).await,
            None => Ok(Next::At(wake_ms)),
        }
    }

    async fn act_on_part(
        &mut self,
        task: &Versioned<Task>,
        spec: &Upgrade,
        part: &ShardUpgrade,
    ) -> Result<Next, Wrote> {
        let index: usize = part.shard.as_str().parse().unwrap_or(usize::MAX);
        let now_ms = self.desk.now_ms();
        let Some(shard) = self.desk.mirror.borrow().shards.get(&index).cloned() else {
            let next = upgrade::gone(&task.value, &part.shard, now_ms);
            return self.write.task(task, next).await;
        };
        let owner = owner(&self.desk, index, task);
        let key: StepKey = (task.value.id.to_string(), index, part.phase_since_ms);
        let (stage, _) = self.steps.borrow().get(&key).cloned().unwrap_or_default();
        let watch = (task.value.id.to_string(), index);
        // Time only counts here.
        let ages = (self.watches.entry(watch).or_default()).look(part, now_ms, now_ms);
        let instance = self.desk.present_instance();
        let room = super::replace::place(&self.desk, &shard.value);
        let (decision, write) = {
            let fleet = self.desk.fleet.borrow();
            let mirror = self.desk.mirror.borrow();
            let shards = mirror.shards.values().map(|s| &s.value);
            let copied = place::copied(shards, &shard.value, &fleet);
            let view = View {
                task: &task.value,
                upgrade: spec,
                part,
                shard: &shard.value,
                instance: &instance,
                scene: self.scene(&fleet),
                ages,
                owner: &owner,
                stage: &stage,
                opens_ms: None,
                room: room.as_ref(),
                copied: copied.as_ref(),
            };
            let decision = upgrade::decide(view);
            let write = match &decision {
                Decision::Wait { what, .. } => Ok(upgrade::say(view, what)),
                decision => upgrade::write(view, decision),
            };
            (decision, write)
        };
        let is_quiet = |d: &Decision| {
            matches!(
                d,
                Decision::Wait { .. } | Decision::Rest { .. } | Decision::Drive
            )
        };
        if !is_quiet(&decision) {
            let mut ctx = self.desk.world.borrow_mut();
            ctx.say(|| {
                let phase = part.phase.name();
                format!("{:?}: shard {index} {phase}: {decision:?}", self.desk.me)
            });
        }
        match (decision, write) {
            (Decision::Stop, _) => Err(Wrote::Deposed),
            (Decision::Stage(node), _) => {
                self.start_trial(task, spec, &shard.value, &node, key);
                Ok(Next::At(u64::MAX))
            }
            (Decision::Drive, _) => match &part.switch {
                Some(switch) => {
                    let turn = is_anothers_turn(spec, part);
                    self.act_on_switch(task, switch, turn).await
                }
                None => Ok(Next::At(now_ms + BUSY_LOOK_MS)),
            },
            (_, Ok(Some(write))) => self.write_upgrade(task, &shard, write).await,
            (Decision::Wait { until_ms, .. } | Decision::Rest { until_ms, .. }, _) => {
                Ok(Next::At(until_ms.min(now_ms + LOOK_MS)))
            }
            (_, Ok(None)) => Ok(Next::At(u64::MAX)),
            (_, Err(_)) => Ok(Next::At(now_ms + BUSY_LOOK_MS)),
        }
    }

    async fn write_upgrade(
        &self,
        task: &Versioned<Task>,
        shard: &Versioned<Shard>,
        write: Write,
    ) -> Result<Next, Wrote> {
        let index = shard.value.index as usize;
        let mut txn = (self.write).with_task(self.write.leader_txn(), task, write.task);
        if let Some(next) = &write.shard {
            txn = Writer::with_shard(txn, shard, next);
        }
        match write.lock {
            Lock::Keep => {}
            Lock::Take => {
                // Nobody removes the instance at the same time.
                txn.compares.push(Compare::Absent(Key::Instance));
                put_lock(&mut txn, index, &task.value);
            }
            Lock::Free => self.write.unlock(&mut txn, index, task),
        }
        self.write.commit(txn).await
    }

    /// Every shard's part is over; when all of them run the engine, it is the instance's.
    async fn end_upgrade(
        &self,
        task: &Versioned<Task>,
        spec: &Upgrade,
        state: TaskState,
        message: String,
    ) -> Result<Next, Wrote> {
        let next = Task {
            state,
            message,
            ..task.value.clone()
        };
        let mut txn = (self.write).with_task(self.write.leader_txn(), task, next);
        if state == TaskState::Done {
            txn.compares.push(Compare::Absent(Key::Instance));
            let engine = Value::Engine(spec.engine.clone());
            txn.puts.push((Key::Engine, engine));
        }
        self.write.commit(txn).await
    }

    /// Asks the host's agent to try the engine, beside the loop; the answer wakes the loop.
    fn start_trial(
        &mut self,
        task: &Versioned<Task>,
        spec: &Upgrade,
        shard: &Shard,
        node: &NodeId,
        key: StepKey,
    ) {
        let request = pb::ExecuteStepRequest {
            task_id: task.value.id.to_string(),
            step: format!("{}/stage/{node}", shard.id),
            attempt: u32::try_from(key.2 % u64::from(u32::MAX)).unwrap_or(1),
            term: self.term,
            epoch: shard.epoch.0,
            instance_id: shard.instance.to_string(),
            shard_id: shard.id.to_string(),
            act: Some(Act::StageEngine(pb::StageEngine {
                node_id: node.to_string(),
                engine: spec.engine.clone(),
                without_data: *node == shard.primary,
                ..pb::StageEngine::default()
            })),
            ..pb::ExecuteStepRequest::default()
        };
        let running = (StepStatus::Running, 0);
        self.steps.borrow_mut().insert(key.clone(), running);
        let host = shard.member(node).map(|m| &m.host);
        let host = host.and_then(super::failover::host_index);
        let (desk, steps, term) = (Rc::clone(&self.desk), Rc::clone(&self.steps), self.term);
        let mut trial = Fiber::new(async move {
            let status = tried(&desk, host, request, term).await;
            steps.borrow_mut().insert(key, (status, 0));
        });
        if !trial.poll() {
            self.calls.push(trial);
        }
    }
}

/// One trial of an engine on a host: asked for until it is over.
async fn tried(
    desk: &Desk,
    host: Option<usize>,
    request: pb::ExecuteStepRequest,
    term: u64,
) -> StepStatus {
    let now = || desk.world.borrow().now();
    let mut heard = now();
    loop {
        let known = host.filter(|h| desk.agents.borrow().contains_key(h));
        let answer = match known {
            Some(host) => ask(desk, Party::Agent(host), request.clone(), STAGE_ASK).await,
            None => None,
        };
        if let Some(answer) = answer {
            heard = now();
            let goes_on = answer.staged.as_ref().is_some_and(|s| s.under_way);
            if !goes_on {
                return step::status_of(&answer, term);
            }
        }
        if now() >= heard + STAGE_SILENCE_MAX {
            return StepStatus::Uncertain("its agent has no session".into());
        }
        sleep(&desk.world, desk.me, STAGE_POLL).await;
    }
}

fn owner(desk: &Desk, index: usize, task: &Versioned<Task>) -> Owner {
    match desk.mirror.borrow().owners.get(&index) {
        None => Owner::Free,
        Some((owner, _)) if owner == task.value.id.as_str() => Owner::Own,
        Some((owner, _)) => Owner::Other(owner.as_str().into()),
    }
}

/// Another shard's switch is in its hold, or goes first.
fn is_anothers_turn(spec: &Upgrade, part: &ShardUpgrade) -> bool {
    let switching = |s: &ShardUpgrade| s.switch.as_ref().map(|s: &ShardSwitch| s.phase);
    let index = spec.shards.iter().position(|s| s.shard == part.shard);
    let others = spec.shards.iter().enumerate();
    others
        .filter(|(i, _)| Some(*i) != index)
        .any(|(i, s)| match switching(s) {
            Some(Phase::Hold | Phase::Resolve) => true,
            Some(Phase::Prewarm) => Some(i) < index,
            _ => false,
        })
}

/// As the real driver: a cancel is for a switch only while it leads to the new engine.
pub(super) fn is_cancelled(task: &Task, switch: &ShardSwitch) -> bool {
    let goes_forward = match &task.spec {
        slotmesh_task::Spec::Upgrade(upgrade) => {
            let part = upgrade.part(switch.shard.as_str());
            part.is_some_and(|p| p.phase == UpgradePhase::Switch)
        }
        _ => true,
    };
    task.cancel_requested && goes_forward
}
