//! Acting on a switchover: turns each decision of the pure machine into a write or a step.

use std::time::Duration;

use slotmesh_proto::agent::v1 as pb;
use slotmesh_task::{
    Phase, ShardSwitch, Spec, State as TaskState, Task, step,
    switchover::{self, Decision, HANDOVER_MS_MAX, HOLD_MS_MAX, Step, StepStatus, View},
    upgrade::UpgradePhase,
};
use slotmesh_topology::{Handover, Instance, Shard};
use tracing::{Instrument as _, info, warn};

use super::{Answer, DriveError, Driver, Next, StepKey, timing::Timing};
use crate::{clock, mirror::Versioned};

/// Proxies say how long they held when what they held is sent, which is after they have the new epoch, and
/// the agent answers when it has looked once more. So long that is waited for; nobody waits but the
/// record of what it cost.
const HOLDS_WAIT: Duration = Duration::from_millis(200);
/// Between two looks meanwhile.
const HOLDS_LOOK_MS: u64 = 10;
/// After a step that failed, before the machine may ask for it again.
const RETRY_PAUSE: Duration = Duration::from_millis(300);

impl Driver {
    pub(super) async fn act_on_switches(
        &mut self,
        task: &Versioned<Task>,
        switches: &[ShardSwitch],
    ) -> Result<Next, DriveError> {
        let mut wake_ms = u64::MAX;
        for (index, switch) in switches.iter().enumerate() {
            if switch.phase.is_ended() {
                continue;
            }
            let other_in_hold = switches.iter().any(|other| {
                other.shard != switch.shard && matches!(other.phase, Phase::Hold | Phase::Resolve)
            });
            // A predecessor in line that is about to begin its hold goes first.
            let other_before = switches[..index]
                .iter()
                .any(|other| other.phase == Phase::Prewarm);
            match self
                .act_on_switch(task, switch, other_in_hold || other_before)
                .await?
            {
                // The task's record changed: decide the others from the new one.
                Next::Again => return Ok(Next::Again),
                Next::At(at_ms) => wake_ms = wake_ms.min(at_ms),
            }
        }
        if switches.iter().all(|s| s.phase.is_ended()) {
            return self.end_switchover(task, switches).await;
        }
        Ok(Next::At(wake_ms))
    }

    pub(super) async fn act_on_switch(
        &mut self,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        other_in_hold: bool,
    ) -> Result<Next, DriveError> {
        let id = &task.value.instance;
        let found = self.mirror.read(|s| {
            let shard = s.shards.get(&(id.clone(), switch.shard.clone())).cloned();
            s.instances.get(id).cloned().zip(shard)
        });
        let Some((instance, shard)) = found else {
            let why = "the shard's record is gone";
            return self.advance(task, switch, Phase::RolledBack, why).await;
        };
        let key = step_key(task, switch);
        let step = self.steps.get(&key).cloned().unwrap_or_default();
        // While it serves, the loss of its primary is not the switchover's to declare.
        let is_handing_over = shard.value.handover().is_some();
        let lost = is_handing_over
            .then(|| self.loss_of(&shard.value, instance.value.durability))
            .flatten();
        self.note_applied(task, switch, &shard.value);
        let decision = self.hub.read(|fleet| {
            switchover::decide(View {
                task: &task.value.id,
                switch,
                shard: &shard.value,
                fleet,
                step: &step,
                lost: lost.as_ref(),
                cancel_requested: is_cancelled(&task.value, switch),
                other_in_hold,
                now_ms: clock::now_ms(),
            })
        });
        match decision {
            Decision::Wait { until_ms, .. } => Ok(Next::At(until_ms)),
            Decision::Stop => Err(DriveError::Deposed),
            Decision::Run(step) => {
                self.start_step(task, switch, &instance.value, &shard.value, step);
                Ok(Next::At(u64::MAX))
            }
            Decision::Advance(phase, message) => self.advance(task, switch, phase, &message).await,
            Decision::Declare => self.declare(task, switch, &shard).await,
            Decision::Commit => self.commit_handover(task, switch, &shard).await,
            Decision::GiveBack(why) => match shard.value.cancel(&task.value.id) {
                Ok(next) => {
                    let next_task = task.value.with_phase(
                        &switch.shard,
                        Phase::RolledBack,
                        &why,
                        clock::now_ms(),
                    );
                    let event = (switch.shard.as_str(), "GiveBack", why.as_str());
                    self.write_shard_and_task(task, next_task, &shard, &next, event)
                        .await
                }
                Err(error) => {
                    self.advance(task, switch, Phase::RolledBack, &error.to_string())
                        .await
                }
            },
            Decision::FailOver(loss) => self.declare_lost(&shard, &loss).await,
            Decision::Close(note) => match self.awaits_holds(task, switch, &shard.value) {
                true => Ok(Next::At(clock::now_ms() + HOLDS_LOOK_MS)),
                false => self.close(task, switch, &shard, &note).await,
            },
        }
    }

    /// When every proxy sends to the new primary; reports of it wake the loop.
    fn note_applied(&mut self, task: &Versioned<Task>, switch: &ShardSwitch, shard: &Shard) {
        let switched = (task.value.id.clone(), switch.shard.clone());
        let Some(timing) = self.timings.get_mut(&switched) else {
            return;
        };
        let is_applied = |fleet: &slotmesh_task::Fleet| {
            fleet.all_applied(&shard.instance, &shard.id, shard.epoch)
        };
        if shard.epoch > switch.from_epoch && self.hub.read(is_applied) {
            timing.applied();
        }
    }

    /// All is done, but not everybody has said how long it took.
    fn awaits_holds(&self, task: &Versioned<Task>, switch: &ShardSwitch, shard: &Shard) -> bool {
        let switched = (task.value.id.clone(), switch.shard.clone());
        let timing = self.timings.get(&switched);
        let Some(timing) = timing.filter(|t| t.applied_since() < HOLDS_WAIT) else {
            return false;
        };
        let hub = &self.hub;
        !timing.is_answered() || !hub.holds_are_known(&shard.instance, &shard.id, shard.epoch)
    }

    async fn advance(
        &mut self,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        phase: Phase,
        message: &str,
    ) -> Result<Next, DriveError> {
        let next = task
            .value
            .with_phase(&switch.shard, phase, message, clock::now_ms());
        info!(task = %task.value.id, shard = %switch.shard, phase = phase.name(), message, "switchover");
        self.write_task(task, next, switch.shard.as_str(), phase.name(), message)
            .await
    }

    async fn declare(
        &mut self,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        shard: &Versioned<Shard>,
    ) -> Result<Next, DriveError> {
        let handover = Handover {
            task: task.value.id.clone(),
            target: switch.to.clone(),
            token: hex::encode(rand::random::<[u8; 16]>()),
            deadline_unix_ms: clock::now_ms() + HANDOVER_MS_MAX,
            max_hold_ms: HOLD_MS_MAX,
        };
        match shard.value.declare(handover) {
            Ok(next) => {
                let next_task =
                    task.value
                        .with_phase(&switch.shard, Phase::Hold, "", clock::now_ms());
                let event = (switch.shard.as_str(), "Declare", "proxies hold");
                let switched = (task.value.id.clone(), switch.shard.clone());
                self.timings.insert(switched.clone(), Timing::begin());
                self.critical_us.remove(&switched);
                let written = self
                    .write_shard_and_task(task, next_task, shard, &next, event)
                    .await;
                if let Some(timing) = self.timings.get_mut(&switched) {
                    timing.declared();
                }
                written
            }
            Err(error) => {
                self.advance(task, switch, Phase::RolledBack, &error.to_string())
                    .await
            }
        }
    }

    /// The roles have changed but the old primary's agent could not commit: the leader does.
    async fn commit_handover(
        &mut self,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        shard: &Versioned<Shard>,
    ) -> Result<Next, DriveError> {
        let token = shard
            .value
            .handover()
            .map(|h| h.token.clone())
            .unwrap_or_default();
        match shard.value.commit(switch.from_epoch, &token) {
            Ok(next) => {
                let next_task =
                    task.value
                        .with_phase(&switch.shard, Phase::Settle, "", clock::now_ms());
                let event = (switch.shard.as_str(), "Commit", "committed by the leader");
                self.write_shard_and_task(task, next_task, shard, &next, event)
                    .await
            }
            Err(error) => {
                self.advance(task, switch, Phase::Resolve, &error.to_string())
                    .await
            }
        }
    }

    async fn close(
        &mut self,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        shard: &Versioned<Shard>,
        note: &str,
    ) -> Result<Next, DriveError> {
        let hold_us =
            self.hub
                .longest_hold_us(&shard.value.instance, &switch.shard, shard.value.epoch);
        let mut next_task =
            task.value
                .with_phase(&switch.shard, Phase::Done, note, clock::now_ms());
        let moved = (task.value.id.clone(), switch.shard.clone());
        let timing = self.timings.remove(&moved);
        let critical_us = self.critical_us.remove(&moved).unwrap_or_default();
        let parts = timing.map(|t| t.words()).unwrap_or_default();
        next_task.edit_switch(&switch.shard, |s| {
            (s.hold_us, s.critical_us) = (hold_us, critical_us)
        });
        info!(
            task = %task.value.id, shard = %switch.shard, epoch = %shard.value.epoch,
            primary = %shard.value.primary, hold_us, parts, note, "switchover done"
        );
        let mut words = "the old epoch is revoked".to_owned();
        if !parts.is_empty() {
            words.push_str(&format!(
                "; held for {:.1} ms: {parts}",
                Duration::from_micros(hold_us).as_secs_f64() * 1000.0
            ));
        }
        let event = (switch.shard.as_str(), "Close", words.as_str());
        self.write_shard_and_task(task, next_task, shard, &shard.value.close(), event)
            .await
    }

    async fn end_switchover(
        &mut self,
        task: &Versioned<Task>,
        switches: &[ShardSwitch],
    ) -> Result<Next, DriveError> {
        let moved = switches.iter().filter(|s| s.phase == Phase::Done).count();
        let why: Vec<_> = switches
            .iter()
            .filter(|s| !s.message.is_empty())
            .map(|s| format!("shard {}: {}", s.shard, s.message))
            .collect();
        let message = format!(
            "{moved} of {} shards moved; {}",
            switches.len(),
            why.join("; ")
        );
        let message = message.trim_end_matches("; ").to_owned();
        let state = if moved == switches.len() {
            TaskState::Done
        } else if moved > 0 {
            TaskState::NeedsOperator
        } else if task.value.cancel_requested {
            TaskState::Cancelled
        } else {
            TaskState::RolledBack
        };
        let next = Task {
            state,
            message: message.clone(),
            ..task.value.clone()
        };
        let shards: Vec<&str> = switches.iter().map(|s| s.shard.as_str()).collect();
        self.end_task(task, next, &shards, &message).await
    }

    /// Asks the agent, beside the loop; the answer wakes the loop.
    fn start_step(
        &mut self,
        task: &Versioned<Task>,
        switch: &ShardSwitch,
        instance: &Instance,
        shard: &Shard,
        step: Step,
    ) {
        let key = step_key(task, switch);
        let switched = (task.value.id.clone(), switch.shard.clone());
        if let Some(timing) = self
            .timings
            .get_mut(&switched)
            .filter(|_| step == Step::HandOver)
        {
            timing.asked();
        }
        let (node, term) = (step.node(switch), self.term.number());
        let now_ms = clock::now_ms();
        let request = step::request(&task.value, switch, instance, shard, step, term, now_ms);
        self.steps.insert(key.clone(), StepStatus::Running);
        let (agents, address) = (self.agents.clone(), self.address_of(shard, node));
        let (answers, node) = (self.answers.0.clone(), node.clone());
        let step = async move {
            let answer = match address {
                Some(address) => agents.execute(&address, request).await,
                None => Err(tonic::Status::unavailable("its agent has no session")),
            };
            let (status, critical_us, said) = status_of(answer, term);
            let failed = !matches!(status, StepStatus::Done { .. });
            if failed {
                warn!(%node, step = step.name(), ?status, "step failed");
            }
            if failed && step == Step::TakeBack {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            // The loop is gone only when the term is.
            let _ = answers
                .send(Answer {
                    key,
                    status,
                    critical_us,
                    said,
                    promoted: None,
                })
                .await;
        };
        tokio::spawn(step.in_current_span());
    }
}

/// In an upgrade a cancel ends the switch to the new engine, but not those that lead back.
fn is_cancelled(task: &Task, switch: &ShardSwitch) -> bool {
    let goes_forward = match &task.spec {
        Spec::Upgrade(upgrade) => {
            let part = upgrade.part(switch.shard.as_str());
            part.is_some_and(|p| p.phase == UpgradePhase::Switch)
        }
        _ => true,
    };
    task.cancel_requested && goes_forward
}

fn step_key(task: &Versioned<Task>, switch: &ShardSwitch) -> StepKey {
    StepKey {
        task: task.value.id.clone(),
        shard: switch.shard.clone(),
        phase_since_ms: switch.phase_since_ms,
    }
}

fn status_of(
    answer: Result<pb::ExecuteStepResponse, tonic::Status>,
    term: u64,
) -> (StepStatus, u64, String) {
    match answer {
        Ok(answer) => {
            let status = step::status_of(&answer, term);
            (status, answer.critical_us, answer.message)
        }
        Err(status) => {
            let why = status.message().to_owned();
            (StepStatus::Uncertain(why), 0, String::new())
        }
    }
}
