//! Acting on an upgrade: turns each decision of the pure machine into a write, a trial on a host, or an
//! act of the machine of switchovers.
//!
//! Invariant: a shard is acted upon only while the task has its lock; what is done before that touches
//! nothing that serves.

use std::time::{Duration, Instant};

use slotmesh_proto::agent::v1 as pb;
use slotmesh_task::{
    Phase, ShardSwitch, State as TaskState, Task, auto, place, schedule, step,
    switchover::StepStatus,
    upgrade::{self, Decision, Lock, Owner, ShardUpgrade, Upgrade, View, Write},
};
use slotmesh_topology::{HostId, Instance, NodeId, Shard, compatibility};
use tracing::{Instrument as _, info, warn};

use super::{
    Answer, DriveError, Driver, Next, StepKey,
    replace::{candidates, put_lock},
    write::{encode_shard, put_instance, put_task, shard_key},
};
use crate::{agents::Agents, clock, hub::Hub, mirror::Versioned, store::keys::Key};

/// Between two looks at a shard that belongs to another task, or whose record moved on.
const BUSY_LOOK_MS: u64 = 1_000;
/// Between two looks at a way back: what closes it is seen in reports, which wake the loop; this is
/// for their silence.
const LOOK_MS: u64 = 1_000;
/// Between two questions how far a trial is.
const STAGE_POLL: Duration = Duration::from_millis(500);
/// A whole trial: fetching a program, saving and loading a data set of 500 GB.
const STAGE_LIMIT: Duration = Duration::from_secs(60 * 60);
/// An agent that does not answer for so long is not waited for: longer than its restart takes.
const STAGE_SILENCE_MAX: Duration = Duration::from_secs(60);
/// One question; the trial itself goes on beside it.
const STAGE_ASK_MS: u32 = 2_000;

impl Driver {
    pub(super) async fn act_on_upgrade(
        &mut self,
        task: &Versioned<Task>,
        upgrade: &Upgrade,
    ) -> Result<Next, DriveError> {
        if let Some(next) = self.hold_back(task, upgrade).await? {
            return Ok(next);
        }
        let mut wake_ms = u64::MAX;
        for part in upgrade.shards.iter().filter(|s| !s.phase.is_ended()) {
            match self.act_on_part(task, upgrade, part).await? {
                // The task's record changed: decide the others from the new one.
                Next::Again => return Ok(Next::Again),
                Next::At(at_ms) => wake_ms = wake_ms.min(at_ms),
            }
        }
        match upgrade::ended(&task.value, upgrade) {
            Some((state, message)) => self.end_upgrade(task, upgrade, state, message).await,
            None => Ok(Next::At(wake_ms)),
        }
    }

    /// Proxies are told what not every node knows before anything is done by which that changes;
    /// `None`: they have been.
    async fn hold_back(
        &self,
        task: &Versioned<Task>,
        upgrade: &Upgrade,
    ) -> Result<Option<Next>, DriveError> {
        let id = &task.value.instance;
        let found = self.mirror.read(|s| s.instances.get(id).cloned());
        let Some(instance) = found else {
            return Ok(None);
        };
        let held_back = upgrade::held_back(upgrade, instance.value.held_back);
        if instance.value.held_back == held_back {
            return Ok(None);
        }
        let message = match held_back.map(compatibility::name) {
            Some(oldest) => format!("commands that {oldest} does not know are held back"),
            None => "no command is held back any more".to_owned(),
        };
        info!(task = %task.value.id, instance = %id, message, "upgrade");
        let next = Instance {
            held_back,
            ..instance.value
        };
        let txn = put_instance(self.txn_on(task), instance.mod_revision, &next);
        let txn = put_task(txn, task.value.clone(), "", "HeldBack", &message);
        self.commit(txn).await.map(Some)
    }

    async fn act_on_part(
        &mut self,
        task: &Versioned<Task>,
        upgrade: &Upgrade,
        part: &ShardUpgrade,
    ) -> Result<Next, DriveError> {
        let id = (task.value.instance.clone(), part.shard.clone());
        let (found, owner) = self.mirror.read(|s| {
            let shard = s.shards.get(&id).cloned();
            let owner = s.locks.get(&id).cloned();
            (s.instances.get(&id.0).cloned().zip(shard), owner)
        });
        let Some((instance, shard)) = found else {
            let next = upgrade::gone(&task.value, &part.shard, clock::now_ms());
            let words = "the shard's record is gone";
            return self
                .write_task(task, next, part.shard.as_str(), "Ended", words)
                .await;
        };
        let owner = match owner {
            None => Owner::Free,
            Some(owner) if owner == task.value.id => Owner::Own,
            Some(owner) => Owner::Other(owner),
        };
        let key = StepKey {
            task: task.value.id.clone(),
            shard: part.shard.clone(),
            phase_since_ms: part.phase_since_ms,
        };
        let stage = self.steps.get(&key).cloned().unwrap_or_default();
        let now_ms = clock::now_ms();
        let watch = (task.value.id.clone(), part.shard.clone());
        let watch = self.watches.entry(watch).or_default();
        let ages = watch.look(part, now_ms, self.jumps.counted_ms());
        let window = &instance.value.maintenance_window;
        let opens_ms = match upgrade.in_window {
            // Nobody has asked for it at any time.
            true if upgrade.automatic && window.is_empty() => Some(u64::MAX),
            true => schedule::opens_ms(window, now_ms, self.rests_ms),
            false => None,
        };
        let turn = self.mirror.read(|s| {
            let tasks = s.tasks.values().map(|t| &t.value);
            auto::goes_before(&task.value, tasks, self.by_themselves.at_a_time)
        });
        let (decision, write) = self.hub.read(|fleet| {
            let room = part.moved.then(|| {
                let live = self.mirror.read(|state| candidates(state, fleet));
                let may_share = upgrade::may_share(upgrade, part);
                place::recruit(&live, &shard.value, &fleet.zones, may_share)
            });
            let room = room.flatten();
            let copied = part.moved.then(|| {
                self.mirror.read(|state| {
                    let shards = state.shards.values().map(|s| &s.value);
                    place::copied(shards, &shard.value, fleet)
                })
            });
            let copied = copied.flatten();
            let view = View {
                task: &task.value,
                upgrade,
                part,
                shard: &shard.value,
                instance: &instance.value,
                scene: self.scene(fleet, instance.value.durability, now_ms),
                ages,
                owner: &owner,
                stage: &stage,
                opens_ms,
                room: room.as_ref(),
                copied: copied.as_ref(),
            };
            let decision = match (upgrade::decide(view), turn) {
                (Decision::Begin, Some(what)) => Decision::Wait {
                    until_ms: u64::MAX,
                    what,
                },
                (decision, _) => decision,
            };
            let write = match &decision {
                Decision::Wait { what, .. } => Ok(upgrade::say(view, what)),
                decision => upgrade::write(view, decision),
            };
            (decision, write)
        });
        match (decision, write) {
            (Decision::Stop, _) => Err(DriveError::Deposed),
            (Decision::Stage(node), _) => {
                self.start_trial(task, upgrade, &shard.value, &node, key);
                Ok(Next::At(u64::MAX))
            }
            (Decision::Drive, _) => match &part.switch {
                Some(switch) => {
                    let turn = is_anothers_turn(upgrade, part);
                    self.act_on_switch(task, switch, turn).await
                }
                None => Ok(Next::At(now_ms + BUSY_LOOK_MS)),
            },
            (_, Ok(Some(write))) => self.write_upgrade(task, &instance, &shard, write).await,
            (Decision::Wait { until_ms, .. } | Decision::Rest { until_ms, .. }, _) => {
                Ok(Next::At(until_ms.min(now_ms + LOOK_MS)))
            }
            (_, Ok(None)) => Ok(Next::At(u64::MAX)),
            (decision, Err(error)) => {
                warn!(task = %task.value.id, ?decision, %error, "upgrade: the record moved on");
                Ok(Next::At(now_ms + BUSY_LOOK_MS))
            }
        }
    }

    async fn write_upgrade(
        &mut self,
        task: &Versioned<Task>,
        instance: &Versioned<Instance>,
        shard: &Versioned<Shard>,
        write: Write,
    ) -> Result<Next, DriveError> {
        let id = shard.value.id.as_str();
        info!(
            task = %task.value.id, instance = %shard.value.instance, shard = id,
            step = write.event, message = write.message, "upgrade"
        );
        let mut txn = self.txn_on(task);
        if let Some(next) = &write.shard {
            let key = shard_key(next);
            txn = txn
                .unchanged(key.clone(), shard.mod_revision)
                .put(key, encode_shard(next));
        }
        match write.lock {
            Lock::Keep => {}
            Lock::Take => {
                // A deletion that is admitted at the same time looks for locks, and changes the
                // instance's record.
                let key = Key::Instance {
                    instance: instance.value.id.as_str(),
                };
                txn =
                    put_lock(txn, &shard.value, &task.value).unchanged(key, instance.mod_revision);
            }
            Lock::Free => {
                let instance = shard.value.instance.as_str();
                let lock = (shard.value.instance.clone(), shard.value.id.clone());
                let owner = self.mirror.read(|s| s.locks.get(&lock).cloned());
                if owner.as_ref() == Some(&task.value.id) {
                    txn = txn.delete(Key::Lock {
                        instance,
                        shard: id,
                    });
                }
            }
        }
        self.commit(put_task(txn, write.task, id, write.event, &write.message))
            .await
    }

    /// Every shard's part is over; when all of them run the engine, it is the instance's.
    async fn end_upgrade(
        &self,
        task: &Versioned<Task>,
        upgrade: &Upgrade,
        state: TaskState,
        message: String,
    ) -> Result<Next, DriveError> {
        let next = Task {
            state,
            message: message.clone(),
            ..task.value.clone()
        };
        let mut txn = self.txn_on(task);
        let found = self
            .mirror
            .read(|s| s.instances.get(&task.value.instance).cloned());
        if state == TaskState::Done
            && let Some(instance) = found
        {
            let upgraded = Instance {
                engine: upgrade.engine.clone(),
                ..instance.value
            };
            txn = put_instance(txn, instance.mod_revision, &upgraded);
        }
        info!(task = %task.value.id, instance = %task.value.instance, message, "upgrade ended");
        self.commit(put_task(txn, next, "", "Ended", &message))
            .await
    }

    /// Asks the host's agent to try the engine, beside the loop; the answer wakes the loop.
    fn start_trial(
        &mut self,
        task: &Versioned<Task>,
        upgrade: &Upgrade,
        shard: &Shard,
        node: &NodeId,
        key: StepKey,
    ) {
        let Some(member) = shard.member(node) else {
            return;
        };
        let term = self.term.number();
        let request = pb::ExecuteStepRequest {
            task_id: task.value.id.to_string(),
            step: format!("{}/stage/{node}", shard.id),
            attempt: u32::try_from(key.phase_since_ms % u64::from(u32::MAX)).unwrap_or(1),
            term,
            epoch: shard.epoch.0,
            instance_id: shard.instance.to_string(),
            shard_id: shard.id.to_string(),
            timeout_ms: STAGE_ASK_MS,
            trace_id: task.value.trace_id.clone(),
            act: Some(pb::execute_step_request::Act::StageEngine(
                pb::StageEngine {
                    node_id: node.to_string(),
                    engine: upgrade.engine.clone(),
                    limit_ms: u32::try_from(STAGE_LIMIT.as_millis()).unwrap_or(u32::MAX),
                    without_data: *node == shard.primary,
                },
            )),
        };
        self.steps.insert(key.clone(), StepStatus::Running);
        let trial = Trial {
            agents: self.agents.clone(),
            hub: self.hub.clone(),
            host: member.host.clone(),
            request,
            term,
        };
        let (answers, node) = (self.answers.0.clone(), node.clone());
        let step = async move {
            // The loop is gone only when the term is.
            let status = tokio::select! {
                status = trial.run() => status,
                () = answers.closed() => return,
            };
            if !matches!(status, StepStatus::Done { .. }) {
                warn!(%node, ?status, "the engine's trial failed");
            }
            let answer = Answer {
                key,
                status,
                critical_us: 0,
                said: String::new(),
                promoted: None,
            };
            let _ = answers.send(answer).await;
        };
        tokio::spawn(step.in_current_span());
    }
}

/// One trial of an engine on a host: asked for until it is over.
struct Trial {
    agents: Agents,
    hub: Hub,
    host: HostId,
    request: pb::ExecuteStepRequest,
    term: u64,
}

impl Trial {
    async fn run(&self) -> StepStatus {
        let (begun, mut heard) = (Instant::now(), Instant::now());
        loop {
            let silence = match self.ask().await {
                Ok(None) => {
                    heard = Instant::now();
                    String::new()
                }
                Ok(Some(status)) => return status,
                Err(why) => why,
            };
            if heard.elapsed() >= STAGE_SILENCE_MAX {
                return StepStatus::Uncertain(silence);
            }
            if begun.elapsed() >= STAGE_LIMIT {
                return StepStatus::Uncertain("the trial was not over in time".into());
            }
            // The agent has nobody to tell: it is asked again.
            tokio::time::sleep(STAGE_POLL).await;
        }
    }

    /// How it is; `None`: it goes on.
    async fn ask(&self) -> Result<Option<StepStatus>, String> {
        let address = self.hub.agent_address(&self.host);
        let address = address.ok_or("its agent has no session")?;
        let answer = self.agents.execute(&address, self.request.clone()).await;
        match answer {
            Ok(answer) if answer.outcome() == pb::StepOutcome::Done => {
                let goes_on = answer.staged.as_ref().is_some_and(|s| s.under_way);
                Ok((!goes_on).then_some(StepStatus::Done { committed: false }))
            }
            Ok(answer) => match step::status_of(&answer, self.term) {
                StepStatus::Uncertain(why) => Err(why),
                status => Ok(Some(status)),
            },
            // An older one finds no act in it that it knows.
            Err(status) if is_not_known(&status) => {
                let why = "its agent is of a release that can't; upgrade the agent first";
                Ok(Some(StepStatus::NoEffect(why.into())))
            }
            Err(status) => Err(status.message().to_owned()),
        }
    }
}

fn is_not_known(status: &tonic::Status) -> bool {
    use tonic::Code::{InvalidArgument, Unimplemented};
    matches!(status.code(), Unimplemented | InvalidArgument)
}

/// Another shard's switch is in its hold, or goes first: one at a time keeps each hold short.
fn is_anothers_turn(upgrade: &Upgrade, part: &ShardUpgrade) -> bool {
    let switching = |s: &ShardUpgrade| s.switch.as_ref().map(|s: &ShardSwitch| s.phase);
    let index = upgrade.shards.iter().position(|s| s.shard == part.shard);
    let others = upgrade.shards.iter().enumerate();
    others
        .filter(|(i, _)| Some(*i) != index)
        .any(|(i, s)| match switching(s) {
            Some(Phase::Hold | Phase::Resolve) => true,
            Some(Phase::Prewarm) => Some(i) < index,
            _ => false,
        })
}

#[cfg(test)]
#[path = "upgrade_tests.rs"]
mod tests;
