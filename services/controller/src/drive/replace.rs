//! Acting on nodes whose host is lost, or that an operator wants elsewhere: begins replacements, and
//! turns each decision of the pure machine into a write.
//!
//! Invariant: a replacement acts only while it has its shard's lock. A failover takes the lock from
//! it and gives it back by ending; what it left is then looked at anew.

use slotmesh_proto::store::v1 as records;
use slotmesh_task::{
    Fleet, NodeReplacement, ReplacePhase, Spec, State as TaskState, Task,
    failover::Write,
    place::{self, Candidate},
    replace::{self, Decision, Lost, View},
};
use slotmesh_topology::{HostId, InstanceState, NodeId, Shard};
use tracing::{info, warn};

use super::{
    DriveError, Driver, Next,
    failover::new_task_id,
    write::{encode_shard, put_task, shard_key},
};
use crate::{
    clock,
    leader::LeaderTxn,
    mirror::{State, Versioned},
    store::keys::{self, Key},
};

/// Between two looks at a shard that belongs to a failover, or for which there is no host.
const BUSY_LOOK_MS: u64 = 1_000;

/// Hosts with an agent whose lease has not run out, and what they run already.
pub(crate) fn candidates(state: &State, fleet: &Fleet) -> Vec<Candidate> {
    let mut load = std::collections::BTreeMap::<HostId, usize>::new();
    let members = state.shards.values().flat_map(|s| &s.value.members);
    let nodes = members.map(|m| &m.host);
    let proxies = state.instances.values().flat_map(|i| &i.value.proxies);
    for host in nodes.chain(proxies.map(|p| &p.host)) {
        *load.entry(host.clone()).or_default() += 1;
    }
    // One that has just opened its first session has none yet; only one that had it has lost it.
    let has_lease = |host: &&HostId| {
        let known = state.hosts.get(*host);
        known.is_none_or(|host| host.leased_since.is_some())
    };
    let hosts = fleet.hosts.iter().filter(has_lease);
    hosts
        .map(|host| Candidate {
            host: host.clone(),
            load: load.get(host).copied().unwrap_or_default(),
        })
        .collect()
}

/// Adds a new replacement to a transaction: its task, and its lock, on the shard as it was planned.
pub(crate) fn put_replacement(txn: LeaderTxn, shard: &Versioned<Shard>, task: Task) -> LeaderTxn {
    let id = shard.value.id.to_string();
    let cause = task.message.clone();
    let key = Key::Task {
        task: task.id.as_str(),
    };
    let txn = txn
        .absent(key)
        .unchanged(shard_key(&shard.value), shard.mod_revision);
    let txn = put_lock(txn, &shard.value, &task);
    put_task(txn, task, &id, "Admitted", &cause)
}

pub(super) fn put_lock(txn: LeaderTxn, shard: &Shard, task: &Task) -> LeaderTxn {
    let lock = Key::Lock {
        instance: shard.instance.as_str(),
        shard: shard.id.as_str(),
    }
    .to_string();
    let record = records::LockRecord {
        schema: 0,
        task_id: task.id.to_string(),
    };
    txn.absent(lock.clone()).put(lock, keys::encode(record))
}

/// Whether an operator has ended a replacement of the node since then: it is left to him.
fn is_spared(state: &State, node: &NodeId, since_ms: u64) -> bool {
    state.tasks.values().rev().any(|t| match &t.value.spec {
        Spec::Replace(r) => {
            r.from == *node
                && t.value.state == TaskState::Cancelled
                && t.value.created_ms >= since_ms
        }
        _ => false,
    })
}

impl Driver {
    /// Begins a replacement for each shard with a node whose host is gone for too long.
    pub(super) async fn replace_lost(&mut self) -> Result<(), DriveError> {
        let now_ms = clock::now_ms();
        let due: Vec<(Versioned<Shard>, Lost)> = self.hub.read(|fleet| {
            self.mirror.read(|state| {
                let look = |shard: &Versioned<Shard>| {
                    let instance = &state.instances.get(&shard.value.instance)?.value;
                    let id = (shard.value.instance.clone(), shard.value.id.clone());
                    if instance.state != InstanceState::Running || state.locks.contains_key(&id) {
                        return None;
                    }
                    let scene = self.scene(fleet, instance.durability, now_ms);
                    let spared = |node: &NodeId, since_ms| is_spared(state, node, since_ms);
                    let lost = replace::due(&shard.value, scene, instance.replace_after_s, spared)?;
                    Some((shard.clone(), lost))
                };
                state.shards.values().filter_map(look).collect()
            })
        });
        for (shard, lost) in due {
            self.begin_replacement(&shard, lost).await?;
        }
        Ok(())
    }

    async fn begin_replacement(
        &mut self,
        shard: &Versioned<Shard>,
        lost: Lost,
    ) -> Result<(), DriveError> {
        let host = self.hub.read(|fleet| {
            let candidates = self.mirror.read(|state| candidates(state, fleet));
            place::replacement(&candidates, &shard.value, &fleet.zones)
        });
        let id = (shard.value.instance.clone(), shard.value.id.clone());
        let Some(host) = host else {
            if self.unreplaced.insert(id) {
                warn!(
                    instance = %shard.value.instance, shard = %shard.value.id, node = %lost.node,
                    cause = lost.cause,
                    "node lost and not replaced: every live host has a node of the shard; add a host"
                );
            }
            return Ok(());
        };
        self.unreplaced.remove(&id);
        let now_ms = clock::now_ms();
        let why = (lost.cause.clone(), false);
        let planned = replace::plan(new_task_id(), &shard.value, &lost.node, &host, why, now_ms);
        let task = match planned {
            Ok(task) => task,
            Err(error) => {
                warn!(node = %lost.node, %error, "node lost and not replaced");
                return Ok(());
            }
        };
        warn!(
            task = %task.id, instance = %id.0, shard = %id.1, node = %lost.node, to = %host,
            cause = lost.cause, "node is replaced"
        );
        let txn = put_replacement(self.term.txn(), shard, task);
        self.commit(txn).await.map(drop)
    }

    pub(super) async fn act_on_replacement(
        &mut self,
        task: &Versioned<Task>,
        spec: &NodeReplacement,
    ) -> Result<Next, DriveError> {
        let id = (task.value.instance.clone(), spec.shard.clone());
        let (found, owner) = self.mirror.read(|s| {
            let durability = s.instances.get(&id.0).map(|i| i.value.durability);
            let found = s.shards.get(&id).cloned().zip(durability);
            (found, s.locks.get(&id).cloned())
        });
        let Some((shard, durability)) = found else {
            let why = "the shard's record is gone";
            let next = Task {
                state: TaskState::RolledBack,
                ..replace::with_phase(&task.value, ReplacePhase::Done, why, clock::now_ms())
            };
            return self.end_task(task, next, &[spec.shard.as_str()], why).await;
        };
        if owner.as_ref() != Some(&task.value.id) {
            return self.regain(task, &shard, owner.is_none()).await;
        }
        let now_ms = clock::now_ms();
        let (decision, write) = self.hub.read(|fleet| {
            let view = View {
                task: &task.value,
                replacement: spec,
                shard: &shard.value,
                scene: self.scene(fleet, durability, now_ms),
            };
            let decision = replace::decide(view);
            let write = replace::write(view, &decision);
            (decision, write)
        });
        match (decision, write) {
            (Decision::Wait { until_ms, what }, _) => self.say(task, spec, until_ms, what).await,
            (_, Ok(Some(write))) => self.write_replacement(task, &shard, write).await,
            (_, Ok(None)) => Ok(Next::At(u64::MAX)),
            (decision, Err(error)) => {
                warn!(task = %task.value.id, ?decision, %error, "replacement: the record moved on");
                Ok(Next::At(now_ms + BUSY_LOOK_MS))
            }
        }
    }

    /// A failover had the shard. When that has ended, it is the replacement's again.
    async fn regain(
        &self,
        task: &Versioned<Task>,
        shard: &Versioned<Shard>,
        is_free: bool,
    ) -> Result<Next, DriveError> {
        if !is_free {
            return Ok(Next::At(clock::now_ms() + BUSY_LOOK_MS));
        }
        let why = "the shard is free again";
        let next = Task {
            message: why.into(),
            ..task.value.clone()
        };
        let txn = put_lock(self.txn_on(task), &shard.value, &task.value);
        let id = shard.value.id.as_str();
        self.commit(put_task(txn, next, id, "Resumed", why)).await
    }

    /// What a replacement waits for, said once.
    async fn say(
        &self,
        task: &Versioned<Task>,
        spec: &NodeReplacement,
        until_ms: u64,
        what: String,
    ) -> Result<Next, DriveError> {
        let is_parked = task.value.is_parked();
        if what.is_empty() || is_parked || task.value.message == what {
            return Ok(Next::At(until_ms));
        }
        let next = Task {
            message: what.clone(),
            ..task.value.clone()
        };
        self.write_task(task, next, spec.shard.as_str(), "Waiting", &what)
            .await
    }

    async fn write_replacement(
        &mut self,
        task: &Versioned<Task>,
        shard: &Versioned<Shard>,
        write: Write,
    ) -> Result<Next, DriveError> {
        let (id, instance) = (shard.value.id.as_str(), shard.value.instance.as_str());
        info!(
            task = %task.value.id, instance, shard = id, step = write.event,
            message = write.message, "replacement"
        );
        let mut txn = self.txn_on(task);
        if let Some(next) = &write.shard {
            let key = shard_key(next);
            txn = txn
                .unchanged(key.clone(), shard.mod_revision)
                .put(key, encode_shard(next));
        }
        if write.task.state.is_ended() && !write.task.is_parked() {
            // It is our own: that was looked at, and only a declaration would take it, which writes
            // the task, too.
            let shard = id;
            txn = txn.delete(Key::Lock { instance, shard });
        }
        self.commit(put_task(txn, write.task, id, write.event, &write.message))
            .await
    }
}
