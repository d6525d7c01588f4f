//! The leader's writes: each compares what it was decided from, and the leader's term; each change
//! of a task comes with an event, in the same transaction.

use slotmesh_proto::store::v1 as records;
use slotmesh_task::{State as TaskState, Task};
use slotmesh_topology::{Instance, InstanceState, Shard};

use super::{DriveError, Driver, Next};
use crate::{
    clock,
    leader::{LeaderOutcome, LeaderTxn},
    mirror::Versioned,
    store::{
        StoreError,
        keys::{self, Key},
    },
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

    fn txn_on(&self, task: &Versioned<Task>) -> LeaderTxn {
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
        self.commit(txn).await
    }

    /// Ends a task and frees its shards.
    pub(super) async fn end_task(
        &self,
        task: &Versioned<Task>,
        next: Task,
        shards: &[&str],
        message: &str,
    ) -> Result<Next, DriveError> {
        let instance = task.value.instance.as_str();
        let txn = shards.iter().fold(self.txn_on(task), |txn, shard| {
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
        let key = Key::Instance {
            instance: running.id.as_str(),
        }
        .to_string();
        let txn = self
            .txn_on(task)
            .unchanged(key.clone(), instance.mod_revision)
            .put(key, encode_instance(&running));
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
