//! A scheduled switchover whose time has come: it gets its shards, or waits for them.
//!
//! Invariant: until the transaction that begins it, a scheduled task has no lock; so its end before
//! that takes none away from others.

use slotmesh_proto::store::v1 as records;
use slotmesh_task::{
    ShardSwitch, Spec, State as TaskState, Task,
    schedule::{self, Beginning},
};

use super::{DriveError, Driver, Next, write::put_task, write::shard_key};
use crate::{
    clock,
    mirror::Versioned,
    store::keys::{self, Key},
};

/// Between two looks at a shard that belongs to another task.
const BUSY_LOOK_MS: u64 = 1_000;

impl Driver {
    /// Begins it, ends it, or says until when it waits.
    pub(super) async fn act_on_scheduled(
        &self,
        task: &Versioned<Task>,
        switches: &[ShardSwitch],
    ) -> Result<Next, DriveError> {
        let now_ms = clock::now_ms();
        let old = &task.value;
        if old.cancel_requested {
            return self
                .end_unbegun(task, TaskState::Cancelled, "cancelled before it began")
                .await;
        }
        let instance = &old.instance;
        let window = self.mirror.read(|s| {
            let found = s.instances.get(instance);
            found.map(|i| i.value.maintenance_window.clone())
        });
        let window = window.unwrap_or_default();
        if let Some(next) = schedule::retimed(old, &window, now_ms, self.rests_ms) {
            // It has said that windows rest, and keeps its times meanwhile.
            if next == *old {
                return Ok(Next::At(now_ms + self.rests_ms));
            }
            let words = next.message.clone();
            let event = match now_ms < old.not_before_ms {
                true => "Rescheduled",
                false => "PutOff",
            };
            return self.write_task(task, next, "", event, &words).await;
        }
        if now_ms < old.not_before_ms {
            return Ok(Next::At(old.not_before_ms));
        }
        let (shards, locks) = self
            .mirror
            .read(|s| (s.shards_of(instance), s.locks.clone()));
        let plain: Vec<_> = shards.iter().map(|s| s.value.clone()).collect();
        let owner = |switch: &ShardSwitch| {
            let key = (instance.clone(), switch.shard.clone());
            locks.get(&key).cloned()
        };
        let next_switches = match schedule::begin(switches, &plain, owner, now_ms) {
            Beginning::Begin(next) => next,
            Beginning::Busy(_) if now_ms >= old.deadline_ms => {
                let why = "its shards belonged to other tasks until its time was over";
                return self.end_unbegun(task, TaskState::RolledBack, why).await;
            }
            Beginning::Busy(owner) => {
                let what = format!("its time has come; waiting for task {owner} to free a shard");
                if old.message == what {
                    return Ok(Next::At(now_ms + BUSY_LOOK_MS));
                }
                let next = Task {
                    message: what.clone(),
                    ..old.clone()
                };
                return self.write_task(task, next, "", "Waiting", &what).await;
            }
        };
        self.take_shards(task, &plain, &shards, next_switches).await
    }

    async fn take_shards(
        &self,
        task: &Versioned<Task>,
        plain: &[slotmesh_topology::Shard],
        shards: &[Versioned<slotmesh_topology::Shard>],
        switches: Vec<ShardSwitch>,
    ) -> Result<Next, DriveError> {
        let old = &task.value;
        let key = Key::Task {
            task: old.id.as_str(),
        };
        let mut txn = self.term.txn().unchanged(key, task.mod_revision);
        for switch in &switches {
            let lock = Key::Lock {
                instance: old.instance.as_str(),
                shard: switch.shard.as_str(),
            }
            .to_string();
            let record = records::LockRecord {
                schema: 0,
                task_id: old.id.to_string(),
            };
            txn = txn.absent(lock.clone()).put(lock, keys::encode(record));
            // What the plan was made from.
            let found = plain.iter().position(|s| s.id == switch.shard);
            if let Some(shard) = found.and_then(|index| shards.get(index)) {
                txn = txn.unchanged(shard_key(&shard.value), shard.mod_revision);
            }
        }
        let next = Task {
            spec: Spec::Switchover(switches),
            state: TaskState::Running,
            message: String::new(),
            ..old.clone()
        };
        self.commit(put_task(txn, next, "", "Started", "its time has come"))
            .await
    }

    async fn end_unbegun(
        &self,
        task: &Versioned<Task>,
        state: TaskState,
        why: &str,
    ) -> Result<Next, DriveError> {
        let next = Task {
            state,
            message: why.to_owned(),
            ..task.value.clone()
        };
        self.write_task(task, next, "", "Ended", why).await
    }
}
