//! Replaces nodes, as the real driver does: the real machine decides, here its decisions become
//! writes.
//!
//! Invariant: a replacement acts only while it has its shard's lock. A failover takes the lock from
//! it and gives it back by ending; what it left is then looked at anew.

use slotmesh_task::{
    NodeReplacement, ReplacePhase, Spec, State as TaskState, Task,
    failover::Write,
    place::{self, Candidate},
    replace::{self, Decision, Lost, View},
};
use slotmesh_topology::{HostId, NodeId, Shard, TaskId};

use super::Driver;
use crate::{
    controller::{
        Desk, Versioned,
        mirror::Mirror,
        write::{Next, Writer, Wrote},
    },
    store::{Compare, Key, Txn, Value},
    variant::Variant,
};

/// Between two looks at a shard that belongs to a failover, as the real driver has it.
const BUSY_LOOK_MS: u64 = 1_000;

/// Hosts with an agent and a lease, and what they run already.
fn candidates(desk: &Desk) -> Vec<Candidate> {
    let (mirror, fleet) = (desk.mirror.borrow(), desk.fleet.borrow());
    let load = |host: &HostId| {
        let nodes = mirror.shards.values().flat_map(|s| &s.value.members);
        let proxies = desk.instance.proxies.iter().map(|p| &p.host);
        (nodes.map(|m| &m.host).chain(proxies))
            .filter(|on| *on == host)
            .count()
    };
    let has_lease = |host: &&HostId| {
        super::failover::host_index(host).is_some_and(|index| mirror.hosts.contains_key(&index))
    };
    let hosts = fleet.hosts.iter().filter(has_lease);
    hosts
        .map(|host| Candidate {
            host: host.clone(),
            load: load(host),
        })
        .collect()
}

/// Where a node of the shard would go.
pub(in crate::controller) fn place(desk: &Desk, shard: &Shard) -> Option<HostId> {
    let candidates = candidates(desk);
    place::replacement(&candidates, shard, &desk.fleet.borrow().zones)
}

impl Writer {
    /// Adds a new replacement: its task, and its lock, on the shard as it was planned.
    pub(in crate::controller) fn put_replacement(
        &self,
        mut txn: Txn,
        shard: &Versioned<Shard>,
        task: &Task,
    ) -> Txn {
        let index = shard.value.index as usize;
        let unchanged = Compare::Unchanged(Key::Shard(index), shard.mod_revision);
        txn.compares.push(unchanged);
        txn.compares
            .push(Compare::Absent(Key::Task(task.id.to_string())));
        put_lock(&mut txn, index, task);
        self.new_task(&mut txn, task);
        txn
    }
}

pub(super) fn put_lock(txn: &mut Txn, shard: usize, task: &Task) {
    let lock = Key::Lock(shard);
    txn.compares.push(Compare::Absent(lock.clone()));
    txn.puts.push((lock, Value::Lock(task.id.to_string())));
}

/// Whether an operator has ended a replacement of the node since then: it is left to him.
fn is_spared(mirror: &Mirror, node: &NodeId, since_ms: u64) -> bool {
    mirror.tasks.values().any(|t| match &t.value.spec {
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
    pub(super) async fn replace_lost(&mut self) -> Result<(), Wrote> {
        let due: Vec<(Versioned<Shard>, Lost)> = {
            let (mirror, fleet) = (self.desk.mirror.borrow(), self.desk.fleet.borrow());
            if mirror.is_deleting {
                return Ok(());
            }
            let free = mirror.shards.iter();
            let free = free.filter(|(index, _)| !mirror.owners.contains_key(index));
            let look = |(_, shard): (&usize, &Versioned<Shard>)| {
                let spared = |node: &NodeId, since_ms| is_spared(&mirror, node, since_ms);
                let after_s = self.desk.instance.replace_after_s;
                let lost = replace::due(&shard.value, self.scene(&fleet), after_s, spared)?;
                Some((shard.clone(), lost))
            };
            free.filter_map(look).collect()
        };
        for (shard, lost) in due {
            let Some(host) = place(&self.desk, &shard.value) else {
                continue;
            };
            let number = self.desk.world.borrow_mut().call();
            let id = TaskId::from(format!("r{number}").as_str());
            let why = (lost.cause, false);
            let now_ms = self.desk.now_ms();
            let planned = replace::plan(id, &shard.value, &lost.node, &host, why, now_ms);
            let Ok(task) = planned else { continue };
            {
                let mut ctx = self.desk.world.borrow_mut();
                ctx.say(|| format!("{:?}: {} goes to {host}", self.desk.me, lost.node));
                ctx.checks.replacements += 1;
            }
            let txn = (self.write).put_replacement(self.write.leader_txn(), &shard, &task);
            self.write.commit(txn).await?;
        }
        Ok(())
    }

    /// The next act of a replacement.
    pub(super) async fn act_on_replacement(
        &mut self,
        task: &Versioned<Task>,
        spec: &NodeReplacement,
    ) -> Result<Next, Wrote> {
        let index = spec.shard.as_str().parse().unwrap_or(usize::MAX);
        let (shard, owner) = {
            let mirror = self.desk.mirror.borrow();
            let owner = mirror.owners.get(&index).map(|(task, _)| task.clone());
            (mirror.shards.get(&index).cloned(), owner)
        };
        let now_ms = self.desk.now_ms();
        let Some(shard) = shard else {
            let why = "the shard's record is gone";
            let next = Task {
                state: TaskState::RolledBack,
                ..replace::with_phase(&task.value, ReplacePhase::Done, why, now_ms)
            };
            return self.write.task(task, next).await;
        };
        if owner.as_deref() != Some(task.value.id.as_str()) {
            return self.regain(task, index, owner.is_none()).await;
        }
        let (decision, write) = {
            let fleet = self.desk.fleet.borrow();
            let view = View {
                task: &task.value,
                replacement: spec,
                shard: &shard.value,
                scene: self.scene(&fleet),
            };
            let decision = self.impatient(replace::decide(view), spec);
            let write = replace::write(view, &decision);
            (decision, write)
        };
        if !matches!(decision, Decision::Wait { .. }) {
            let mut ctx = self.desk.world.borrow_mut();
            ctx.say(|| {
                let phase = spec.phase.name();
                format!("{:?}: shard {index} {phase}: {decision:?}", self.desk.me)
            });
        }
        match (decision, write) {
            (Decision::Wait { until_ms, what }, _) => self.say(task, until_ms, what).await,
            (_, Ok(Some(write))) => self.write_replacement(task, &shard, write).await,
            (_, Ok(None)) => Ok(Next::At(u64::MAX)),
            (_, Err(_)) => Ok(Next::At(now_ms + BUSY_LOOK_MS)),
        }
    }

    /// A failover had the shard. When that has ended, it is the replacement's again.
    async fn regain(
        &self,
        task: &Versioned<Task>,
        shard: usize,
        is_free: bool,
    ) -> Result<Next, Wrote> {
        if !is_free {
            return Ok(Next::At(self.desk.now_ms() + BUSY_LOOK_MS));
        }
        let next = Task {
            message: "the shard is free again".into(),
            ..task.value.clone()
        };
        let mut txn = (self.write).with_task(self.write.leader_txn(), task, next);
        put_lock(&mut txn, shard, &task.value);
        self.write.commit(txn).await
    }

    /// What a replacement waits for, said once.
    async fn say(
        &self,
        task: &Versioned<Task>,
        until_ms: u64,
        what: String,
    ) -> Result<Next, Wrote> {
        if what.is_empty() || task.value.is_parked() || task.value.message == what {
            return Ok(Next::At(until_ms));
        }
        let next = Task {
            message: what,
            ..task.value.clone()
        };
        self.write.task(task, next).await
    }

    async fn write_replacement(
        &self,
        task: &Versioned<Task>,
        shard: &Versioned<Shard>,
        write: Write,
    ) -> Result<Next, Wrote> {
        let ends = write.task.state.is_ended() && !write.task.is_parked();
        let mut txn = (self.write).with_task(self.write.leader_txn(), task, write.task);
        if let Some(next) = &write.shard {
            txn = Writer::with_shard(txn, shard, next);
        }
        if ends {
            txn.deletes.push(Key::Lock(shard.value.index as usize));
        }
        self.write.commit(txn).await
    }

    /// What a deliberately broken machine would decide instead.
    fn impatient(&self, decision: Decision, spec: &NodeReplacement) -> Decision {
        let variant = self.desk.world.borrow().variant;
        match (decision, variant, spec.phase) {
            (Decision::Wait { .. }, Variant::LeavesFed, ReplacePhase::Leave) => Decision::Leave,
            (decision, ..) => decision,
        }
    }
}
