//! Acting on lost primaries: declares them, then turns each decision of the pure machine into a
//! write or the one step, the promotion.
//!
//! Invariant: a declaration is one transaction that ends the lost epoch, takes the shard's lock from
//! whoever had it, and makes the task that sees to the rest. A successor needs nothing else.

use slotmesh_proto::store::v1 as records;
use slotmesh_task::{
    FailoverPhase, ShardFailover, Task,
    detect::{self, Loss, Scene, Verdict},
    failover::{self, Decision, View, Write},
    step,
    switchover::StepStatus,
    wire,
};
use slotmesh_topology::{FenceProof, InstanceState, NodeId, Shard, TaskId};
use tracing::{Instrument as _, info, warn};

use super::{
    Answer, DriveError, Driver, Next, StepKey,
    write::{Author, encode_shard, put_epoch, put_task, shard_key},
};
use crate::{
    clock,
    leader::LeaderTxn,
    mirror::{State, Versioned},
    store::keys::{self, Key},
    trace,
};

/// An id that sorts by time.
pub(crate) fn new_task_id() -> TaskId {
    format!("t-{}", uuid::Uuid::now_v7().simple()).into()
}

/// Adds all of a declaration but its own task to a transaction: the record, the epoch's entry, and
/// the lock, taken over from the task that has it now.
///
/// # Errors
/// With the task that has the shard, when it can't be taken from it.
pub(crate) fn put_declaration(
    txn: LeaderTxn,
    state: &State,
    shard: &Versioned<Shard>,
    (task, next): (&Task, &Shard),
    author: Author<'_>,
) -> Result<LeaderTxn, TaskId> {
    let lock = Key::Lock {
        instance: next.instance.as_str(),
        shard: next.id.as_str(),
    }
    .to_string();
    let id = (next.instance.clone(), next.id.clone());
    let txn = match state.locks.get(&id) {
        None => txn.absent(lock.clone()),
        Some(owner) => {
            let old = state.tasks.get(owner).ok_or_else(|| owner.clone())?;
            let now_ms = clock::now_ms();
            let ended = failover::supersede(&old.value, &next.id, &task.id, now_ms)
                .ok_or_else(|| owner.clone())?;
            let message = format!("task {} fails it over", task.id);
            let key = Key::Task {
                task: owner.as_str(),
            };
            let txn = txn.unchanged(key, old.mod_revision);
            put_task(txn, ended, next.id.as_str(), "Superseded", &message)
        }
    };
    let record = records::LockRecord {
        schema: 0,
        task_id: task.id.to_string(),
    };
    let key = shard_key(next);
    let txn = txn
        .put(lock, keys::encode(record))
        .unchanged(key.clone(), shard.mod_revision)
        .put(key, encode_shard(next));
    Ok(put_epoch(txn, &shard.value, next, author))
}

impl Driver {
    /// Declares the primaries that are lost; returns when to look again at the latest.
    pub(super) async fn detect(&mut self) -> Result<u64, DriveError> {
        let shards: Vec<(Versioned<Shard>, u32)> = self.mirror.read(|state| {
            let of = |s: &Versioned<Shard>| {
                let instance = &state.instances.get(&s.value.instance)?.value;
                let is_kept = instance.state != InstanceState::Deleting;
                is_kept.then(|| (s.clone(), instance.durability))
            };
            state.shards.values().filter_map(of).collect()
        });
        let now_ms = clock::now_ms();
        self.look(shards.iter().map(|(s, _)| &s.value), now_ms);
        let ids = shards.iter().map(|(s, _)| &s.value);
        let ids = ids.map(|s| (s.instance.clone(), s.id.clone())).collect();
        self.hub.doubts().keep_only(&ids);
        let mut wake_ms = u64::MAX;
        for (shard, durability) in &shards {
            let verdict = self.hub.read(|fleet| {
                let scene = self.scene(fleet, *durability, now_ms);
                detect::decide(&shard.value, scene)
            });
            match verdict {
                Verdict::Fine => {
                    let id = (shard.value.instance.clone(), shard.value.id.clone());
                    self.hub.doubts().trust(&id);
                }
                Verdict::Suspect { until_ms, what } => {
                    wake_ms = wake_ms.min(until_ms);
                    self.suspect(&shard.value, &what);
                }
                Verdict::Lost(loss) => {
                    if let Next::At(at_ms) = self.declare_lost(shard, &loss).await? {
                        wake_ms = wake_ms.min(at_ms);
                    }
                }
            }
        }
        Ok(wake_ms)
    }

    /// Says once what keeps a primary that looks lost from being replaced.
    fn suspect(&self, shard: &Shard, what: &str) {
        let id = (shard.instance.clone(), shard.id.clone());
        if self.hub.doubts().suspect(id, what) {
            warn!(instance = %shard.instance, shard = %shard.id, what, "primary suspected, not replaced");
        }
    }

    fn look<'a>(&mut self, shards: impl Iterator<Item = &'a Shard>, now_ms: u64) {
        let Self { hub, sightings, .. } = self;
        hub.read(|fleet| sightings.look(shards, fleet, now_ms));
        let (hosts, silent) = sightings.hosts();
        if hub.doubts().see_hosts(sightings.brake(), hosts, silent) {
            match sightings.brake() {
                Some(why) => warn!(hosts, silent, why, "the brake on failovers is on"),
                None => info!(hosts, silent, "the brake on failovers is off"),
            }
        }
    }

    pub(super) fn scene<'a>(
        &'a self,
        fleet: &'a slotmesh_task::Fleet,
        durability: u32,
        now_ms: u64,
    ) -> Scene<'a> {
        Scene {
            fleet,
            sightings: &self.sightings,
            durability,
            now_ms,
        }
    }

    /// The loss of a shard's primary, in whatever mode the shard is.
    pub(super) fn loss_of(&self, shard: &Shard, durability: u32) -> Option<Loss> {
        let now_ms = clock::now_ms();
        let verdict = self
            .hub
            .read(|fleet| detect::judge(shard, self.scene(fleet, durability, now_ms)));
        match verdict {
            Verdict::Lost(loss) => Some(loss),
            Verdict::Fine | Verdict::Suspect { .. } => None,
        }
    }

    /// Ends the lost epoch and begins the failover.
    pub(super) async fn declare_lost(
        &mut self,
        shard: &Versioned<Shard>,
        loss: &Loss,
    ) -> Result<Next, DriveError> {
        let declared = failover::declare(new_task_id(), &shard.value, loss, clock::now_ms());
        let Ok((mut task, next)) = declared else {
            return Ok(Next::At(u64::MAX));
        };
        task.trace_id = trace::new_id();
        let mut txn = self.term.txn();
        if loss.proof == Some(FenceProof::Lease) {
            txn = self.without_lease(txn, &shard.value, &shard.value.primary);
        }
        let author = self.author(&task);
        let planned = self
            .mirror
            .read(|state| put_declaration(txn, state, shard, (&task, &next), author));
        let txn = match planned {
            Ok(txn) => txn,
            Err(owner) => {
                let what = format!("{}; its shard belongs to task {owner}", loss.cause);
                self.suspect(&shard.value, &what);
                return Ok(Next::At(u64::MAX));
            }
        };
        warn!(
            task = %task.id, trace_id = task.trace_id, instance = %next.instance, shard = %next.id,
            epoch = %next.epoch, lost = %next.primary, cause = loss.cause, "primary declared lost"
        );
        let cause = loss.cause.clone();
        self.commit(put_task(txn, task, next.id.as_str(), "Declare", &cause))
            .await
    }

    /// The proof is the lease's absence, so it holds at the very revision of the write.
    fn without_lease(&self, txn: LeaderTxn, shard: &Shard, node: &NodeId) -> LeaderTxn {
        match shard.member(node) {
            Some(member) => txn.absent(Key::Host {
                host: member.host.as_str(),
            }),
            None => txn,
        }
    }

    pub(super) async fn act_on_failover(
        &mut self,
        task: &Versioned<Task>,
        spec: &ShardFailover,
    ) -> Result<Next, DriveError> {
        let id = (task.value.instance.clone(), spec.shard.clone());
        let found = self.mirror.read(|s| {
            let durability = s.instances.get(&id.0).map(|i| i.value.durability);
            s.shards.get(&id).cloned().zip(durability)
        });
        let Some((shard, durability)) = found else {
            let why = "the shard's record is gone";
            let next = failover::with_phase(&task.value, FailoverPhase::Done, why, clock::now_ms());
            return self.end_task(task, next, &[spec.shard.as_str()], why).await;
        };
        let key = step_key(task, spec);
        let step = self.steps.get(&key).cloned().unwrap_or_default();
        let now_ms = clock::now_ms();
        let (decision, write) = self.hub.read(|fleet| {
            let view = View {
                task: &task.value,
                failover: spec,
                shard: &shard.value,
                scene: self.scene(fleet, durability, now_ms),
                step: &step,
                promoted: self.promoted.get(&key),
            };
            let decision = failover::decide(view);
            let write = failover::write(view, &decision);
            (decision, write)
        });
        match (decision, write) {
            (Decision::Wait { until_ms, .. }, _) => Ok(Next::At(until_ms)),
            (Decision::Stop, _) => Err(DriveError::Deposed),
            (Decision::Promote, _) => {
                self.start_promotion(task, spec, &shard.value);
                Ok(Next::At(u64::MAX))
            }
            (Decision::End(_), Ok(Some(write))) => self.end_failover(task, spec, write).await,
            (decision, Ok(Some(write))) => {
                self.write_failover(task, &shard, &decision, write).await
            }
            (_, Ok(None)) => Ok(Next::At(u64::MAX)),
            (decision, Err(error)) => {
                warn!(task = %task.value.id, ?decision, %error, "failover: the record moved on");
                Ok(Next::At(u64::MAX))
            }
        }
    }

    async fn write_failover(
        &mut self,
        task: &Versioned<Task>,
        shard: &Versioned<Shard>,
        decision: &Decision,
        write: Write,
    ) -> Result<Next, DriveError> {
        let now = write.shard.as_ref().unwrap_or(&shard.value);
        info!(
            task = %task.value.id, shard = %now.id, epoch = %now.epoch, step = write.event,
            message = write.message, "failover"
        );
        let mut txn = self.txn_on(task);
        if *decision == Decision::Prove(FenceProof::Lease) {
            txn = self.without_lease(txn, &shard.value, &shard.value.primary);
        }
        if let Some(next) = &write.shard {
            let key = shard_key(next);
            txn = txn
                .unchanged(key.clone(), shard.mod_revision)
                .put(key, encode_shard(next));
            txn = put_epoch(txn, &shard.value, next, self.author(&task.value));
        }
        let id = shard.value.id.as_str();
        self.commit(put_task(txn, write.task, id, write.event, &write.message))
            .await
    }

    async fn end_failover(
        &mut self,
        task: &Versioned<Task>,
        spec: &ShardFailover,
        mut write: Write,
    ) -> Result<Next, DriveError> {
        let epoch = spec.from_epoch.next();
        let hold_us = self
            .hub
            .longest_hold_us(&task.value.instance, &spec.shard, epoch);
        if let slotmesh_task::Spec::Failover(failover) = &mut write.task.spec {
            failover.hold_us = hold_us;
        }
        info!(
            task = %task.value.id, shard = %spec.shard, %epoch, hold_us,
            message = write.message, "failover ended"
        );
        self.end_task(task, write.task, &[spec.shard.as_str()], &write.message)
            .await
    }

    /// Asks the chosen node's agent, beside the loop; the answer wakes the loop.
    fn start_promotion(&mut self, task: &Versioned<Task>, spec: &ShardFailover, shard: &Shard) {
        let term = self.term.number();
        let Some((node, request)) = step::promotion(&task.value, spec, shard, term) else {
            return;
        };
        let key = step_key(task, spec);
        self.steps.insert(key.clone(), StepStatus::Running);
        let (agents, address) = (self.agents.clone(), self.address_of(shard, &node));
        let answers = self.answers.0.clone();
        let step = async move {
            let answer = match address {
                Some(address) => agents.execute(&address, request).await,
                None => Err(tonic::Status::unavailable("its agent has no session")),
            };
            let (status, promoted) = match answer {
                Ok(answer) => {
                    let seen = answer.node.as_ref();
                    let seen = seen.map(|n| wire::node_view(n, clock::now_ms()));
                    (step::status_of(&answer, term), seen)
                }
                Err(status) => (StepStatus::Uncertain(status.message().to_owned()), None),
            };
            if !matches!(status, StepStatus::Done { .. }) {
                warn!(%node, ?status, "promotion failed");
            }
            // The loop is gone only when the term is.
            let _ = answers
                .send(Answer {
                    key,
                    status,
                    critical_us: 0,
                    said: String::new(),
                    promoted,
                })
                .await;
        };
        tokio::spawn(step.in_current_span());
    }
}

fn step_key(task: &Versioned<Task>, spec: &ShardFailover) -> StepKey {
    StepKey {
        task: task.value.id.clone(),
        shard: spec.shard.clone(),
        phase_since_ms: spec.phase_since_ms,
    }
}

#[cfg(test)]
#[path = "brake_tests.rs"]
mod tests;
