//! The leader's writes: each compares what it was decided from, and the leader's term; each change
//! of a task comes with an event, in the same transaction.

use slotmesh_proto::store::v1 as records;
use slotmesh_task::{Spec, State as TaskState, Task};
use slotmesh_topology::{Instance, InstanceState, Shard};
use tracing::info;

use super::{DriveError, Driver, Next};
use crate::{
    clock,
    leader::{LeaderOutcome, LeaderTxn},
    mirror::Versioned,
    store::{
        StoreError,
        keys::{self, Key},
    },
    trace,
};

/// How soon a lost race is looked at again if the mirror does not show who won.
const CONFLICT_PAUSE_MS: u64 = 50;

/// Adds the task's next state and its event to a transaction.
pub(crate) fn put_task(
    txn: LeaderTxn,
    mut next: Task,
    shard: &str,
    step: &str,
    message: &str,
) -> LeaderTxn {
    let now_ms = clock::now_ms();
    next.updated_ms = now_ms;
    next.event_count += 1;
    let event = records::TaskEventRecord {
        schema: 0,
        number: next.event_count,
        unix_ms: now_ms,
        shard_id: shard.to_owned(),
        step: step.to_owned(),
        message: message.to_owned(),
        state: slotmesh_task::wire::state_to(next.state).into(),
        trace_id: trace::current_or(&next.trace_id),
    };
    let event_key = Key::TaskEvent {
        task: next.id.as_str(),
        number: next.event_count,
    };
    let record = slotmesh_task::wire::task_to(&next, txn.term().number());
    let task_key = Key::Task {
        task: next.id.as_str(),
    };
    txn.put(task_key, keys::encode(record))
        .put(event_key, keys::encode(event))
}

/// Who begins an epoch, and why, for its record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Author<'a> {
    /// Begin, `SwitchOver`, Failover or Restart.
    pub(crate) cause: &'static str,
    /// Empty: no task did.
    pub(crate) task: &'a str,
    pub(crate) trace: &'a str,
    /// The controller.
    pub(crate) who: &'a str,
    /// Its term; 0: the delegated commit of a hand-over.
    pub(crate) term: u64,
}

/// The epoch's record, when `next` begins an epoch or names its primary.
pub(crate) fn epoch_record(
    before: &Shard,
    next: &Shard,
    author: Author<'_>,
) -> Option<(String, Vec<u8>)> {
    if before.epoch == next.epoch && before.primary == next.primary {
        return None;
    }
    let key = Key::Audit {
        instance: next.instance.as_str(),
        shard: next.id.as_str(),
        epoch: next.epoch.0,
    };
    let primary = match next.failover() {
        Some(_) => String::new(),
        None => next.primary.to_string(),
    };
    let record = records::EpochRecord {
        schema: 0,
        instance_id: next.instance.to_string(),
        shard_id: next.id.to_string(),
        epoch: next.epoch.0,
        primary_node_id: primary,
        before_node_id: before.primary.to_string(),
        cause: author.cause.to_owned(),
        task_id: author.task.to_owned(),
        who: author.who.to_owned(),
        term: author.term,
        trace_id: author.trace.to_owned(),
        unix_ms: clock::now_ms(),
    };
    Some((key.to_string(), keys::encode(record)))
}

/// Adds the epoch's record to a transaction that may begin one.
pub(crate) fn put_epoch(
    txn: LeaderTxn,
    before: &Shard,
    next: &Shard,
    author: Author<'_>,
) -> LeaderTxn {
    match epoch_record(before, next, author) {
        Some((key, record)) => txn.put(key, record),
        None => txn,
    }
}

pub(crate) fn shard_key(shard: &Shard) -> String {
    Key::Shard {
        instance: shard.instance.as_str(),
        shard: shard.id.as_str(),
    }
    .to_string()
}

pub(crate) fn encode_shard(shard: &Shard) -> Vec<u8> {
    keys::encode(slotmesh_topology::wire::shard_to(shard))
}

pub(crate) fn encode_instance(instance: &Instance) -> Vec<u8> {
    keys::encode(slotmesh_topology::wire::instance_to(instance))
}

/// Adds an instance's next record, on the one that was decided upon.
pub(crate) fn put_instance(txn: LeaderTxn, revision: u64, next: &Instance) -> LeaderTxn {
    let key = Key::Instance {
        instance: next.id.as_str(),
    }
    .to_string();
    txn.unchanged(key.clone(), revision)
        .put(key, encode_instance(next))
}

impl Driver {
    /// Commits, then waits until the mirror shows it, so that the next decision sees it.
    pub(super) async fn commit(&self, txn: LeaderTxn) -> Result<Next, DriveError> {
        match txn.commit(&*self.store).await? {
            LeaderOutcome::Committed { revision } => {
                if self.mirror.shows(revision).await {
                    Ok(Next::Again)
                } else {
                    Err(StoreError::Unavailable {
                        doing: "watch own write",
                        source: None,
                    }
                    .into())
                }
            }
            // Someone wrote it since: the mirror will show it, which wakes the loop, then it is
            // decided anew.
            LeaderOutcome::Conflict => Ok(Next::At(clock::now_ms() + CONFLICT_PAUSE_MS)),
            LeaderOutcome::Deposed => Err(DriveError::Deposed),
        }
    }

    /// This leader, for a task.
    pub(super) fn author<'a>(&'a self, task: &'a Task) -> Author<'a> {
        Author {
            cause: match &task.spec {
                Spec::Provision | Spec::Decommission => "Begin",
                Spec::Switchover(_) => "SwitchOver",
                Spec::Failover(_) => "Failover",
                Spec::Replace(_) => "Replace",
                Spec::Upgrade(_) => "Upgrade",
                Spec::Proxies(_) => "Proxies",
            },
            task: task.id.as_str(),
            trace: &task.trace_id,
            who: &self.who,
            term: self.term.number(),
        }
    }

    pub(super) fn txn_on(&self, task: &Versioned<Task>) -> LeaderTxn {
        let key = Key::Task {
            task: task.value.id.as_str(),
        };
        self.term.txn().unchanged(key, task.mod_revision)
    }

    pub(super) async fn write_task(
        &self,
        task: &Versioned<Task>,
        next: Task,
        shard: &str,
        step: &str,
        message: &str,
    ) -> Result<Next, DriveError> {
        self.commit(put_task(self.txn_on(task), next, shard, step, message))
            .await
    }

    /// A shard's record with an event of the task.
    pub(super) async fn write_shard(
        &self,
        task: &Versioned<Task>,
        old: &Versioned<Shard>,
        next: &Shard,
        step: &str,
        message: &str,
    ) -> Result<Next, DriveError> {
        let id = next.id.to_string();
        self.write_shard_and_task(task, task.value.clone(), old, next, (&id, step, message))
            .await
    }

    pub(super) async fn write_shard_and_task(
        &self,
        task: &Versioned<Task>,
        next_task: Task,
        old: &Versioned<Shard>,
        next: &Shard,
        (shard, step, message): (&str, &str, &str),
    ) -> Result<Next, DriveError> {
        let key = shard_key(next);
        let txn = self
            .txn_on(task)
            .unchanged(key.clone(), old.mod_revision)
            .put(key, encode_shard(next));
        let txn = put_epoch(txn, &old.value, next, self.author(&task.value));
        self.commit(put_task(txn, next_task, shard, step, message))
            .await
    }

    pub(super) async fn write_upkeep(
        &self,
        old: &Versioned<Shard>,
        next: &Shard,
    ) -> Result<Next, DriveError> {
        let key = shard_key(next);
        let txn = self
            .term
            .txn()
            .unchanged(key.clone(), old.mod_revision)
            .put(key, encode_shard(next));
        // Nobody asked for it: a decision of the leader's own has a trace of its own.
        let trace_id = trace::new_id();
        if old.value.epoch != next.epoch {
            info!(instance = %next.instance, shard = %next.id, epoch = %next.epoch, trace_id, "primary taken back");
        }
        let author = Author {
            cause: "Restart",
            task: "",
            trace: &trace_id,
            who: &self.who,
            term: self.term.number(),
        };
        self.commit(put_epoch(txn, &old.value, next, author)).await
    }

    /// Ends a task and frees the shards that are still its own: a failover may have taken some.
    pub(super) async fn end_task(
        &self,
        task: &Versioned<Task>,
        next: Task,
        shards: &[&str],
        message: &str,
    ) -> Result<Next, DriveError> {
        let instance = task.value.instance.as_str();
        let is_own = |shard: &str| {
            let id = (task.value.instance.clone(), shard.into());
            self.mirror
                .read(|s| s.locks.get(&id) == Some(&task.value.id))
        };
        let own = shards.iter().filter(|shard| is_own(shard));
        let txn = own.fold(self.txn_on(task), |txn, shard| {
            txn.delete(Key::Lock { instance, shard })
        });
        self.commit(put_task(txn, next, "", "Ended", message)).await
    }

    pub(super) async fn end_provision(
        &self,
        task: &Versioned<Task>,
        instance: &Versioned<Instance>,
    ) -> Result<Next, DriveError> {
        let running = Instance {
            state: InstanceState::Running,
            ..instance.value.clone()
        };
        let txn = put_instance(self.txn_on(task), instance.mod_revision, &running);
        let next = Task {
            state: TaskState::Done,
            message: "serves".into(),
            ..task.value.clone()
        };
        self.commit(put_task(txn, next, "", "Ended", "the instance serves"))
            .await
    }

    pub(super) async fn end_decommission(
        &self,
        task: &Versioned<Task>,
        instance: &Versioned<Instance>,
        shards: &[Versioned<Shard>],
    ) -> Result<Next, DriveError> {
        let key = Key::Instance {
            instance: instance.value.id.as_str(),
        }
        .to_string();
        let txn = self
            .txn_on(task)
            .unchanged(key.clone(), instance.mod_revision)
            .delete(key);
        let txn = shards
            .iter()
            .fold(txn, |txn, shard| txn.delete(shard_key(&shard.value)));
        let next = Task {
            state: TaskState::Done,
            message: "removed".into(),
            ..task.value.clone()
        };
        self.commit(put_task(
            txn,
            next,
            "",
            "Ended",
            "every process and its data is removed",
        ))
        .await
    }
}
