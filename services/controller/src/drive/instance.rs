//! Acting on instances as a whole: bringing one to life, removing it, and what follows when either
//! was given up.
//!
//! Invariant: a task that gave up is looked at again, and goes on by itself once what was missing is
//! there; it is never two tasks, so an undone provision is the removal of what it made.

use slotmesh_task::{Choice, Spec, State as TaskState, Task, provision};
use slotmesh_topology::{Instance, InstanceState, Shard};
use tracing::info;

use super::{DriveError, Driver, Next, RETURN_MS, write::put_instance};
use crate::{clock, drive::write::put_task, mirror::Versioned, store::keys::Key};

/// What a task that gave up waits for is written down this often at most: it may change back and
/// forth for days.
const WAITS_FOR_MS: u64 = 10_000;

impl Driver {
    pub(super) async fn act_on_instance(
        &mut self,
        task: &Versioned<Task>,
    ) -> Result<Next, DriveError> {
        let id = &task.value.instance;
        let (instance, shards) = self
            .mirror
            .read(|s| (s.instances.get(id).cloned(), s.shards_of(id)));
        let Some(instance) = instance else {
            return self.end_without_instance(task).await;
        };
        if task.value.choice == Some(Choice::Undo) {
            return self.undo_provision(task, &instance, &shards).await;
        }
        let plain: Vec<_> = shards.iter().map(|s| s.value.clone()).collect();
        let decide = if task.value.spec == Spec::Provision {
            provision::provision
        } else {
            provision::decommission
        };
        let deadline_ms = task.value.deadline_ms.max(self.since_ms + RETURN_MS);
        let decision = self.hub.read(|fleet| {
            let now_ms = clock::now_ms();
            decide(&instance.value, &plain, fleet, deadline_ms, now_ms)
        });
        match decision {
            provision::Decision::Begin(shard) => {
                let Some(old) = shards.iter().find(|s| s.value.id == shard.id) else {
                    return Ok(Next::Again);
                };
                self.write_shard(task, old, &shard, "Begin", "first epoch")
                    .await
            }
            provision::Decision::Serve => self.end_provision(task, &instance).await,
            provision::Decision::Forget => self.end_decommission(task, &instance, &shards).await,
            provision::Decision::Wait(what) | provision::Decision::GiveUp(what)
                if task.value.is_parked() =>
            {
                self.say_what_is_missing(task, &what).await
            }
            provision::Decision::Wait(what) => {
                if task.value.message == what {
                    return Ok(Next::At(deadline_ms));
                }
                let next = Task {
                    message: what.clone(),
                    ..task.value.clone()
                };
                self.write_task(task, next, "", "Waiting", &what).await
            }
            provision::Decision::GiveUp(what) => {
                let message = parked(&task.value.spec, &what);
                info!(task = %task.value.id, message, "gives up");
                let next = Task {
                    state: TaskState::NeedsOperator,
                    message: message.clone(),
                    ..task.value.clone()
                };
                self.write_task(task, next, "", "Parked", &message).await
            }
        }
    }

    /// Somebody else removed it: that is the end that a removal asked for.
    async fn end_without_instance(&self, task: &Versioned<Task>) -> Result<Next, DriveError> {
        let state = match task.value.spec {
            Spec::Decommission => TaskState::Done,
            _ => TaskState::RolledBack,
        };
        let message = "the instance's record is gone";
        let next = Task {
            state,
            message: message.into(),
            choice: None,
            ..task.value.clone()
        };
        self.write_task(task, next, "", "Ended", message).await
    }

    async fn say_what_is_missing(
        &self,
        task: &Versioned<Task>,
        what: &str,
    ) -> Result<Next, DriveError> {
        let message = parked(&task.value.spec, what);
        let next_ms = task.value.updated_ms + WAITS_FOR_MS;
        if task.value.message == message {
            return Ok(Next::At(u64::MAX));
        }
        if clock::now_ms() < next_ms {
            return Ok(Next::At(next_ms));
        }
        let next = Task {
            message: message.clone(),
            ..task.value.clone()
        };
        self.write_task(task, next, "", "Waiting", &message).await
    }

    /// The provision turns into the removal of what it has made.
    async fn undo_provision(
        &self,
        task: &Versioned<Task>,
        instance: &Versioned<Instance>,
        shards: &[Versioned<Shard>],
    ) -> Result<Next, DriveError> {
        let deleting = Instance {
            state: InstanceState::Deleting,
            ..instance.value.clone()
        };
        let txn = put_instance(self.txn_on(task), instance.mod_revision, &deleting);
        // As a deletion: no other task may have a shard of it.
        let txn = shards.iter().fold(txn, |txn, shard| {
            txn.absent(Key::Lock {
                instance: shard.value.instance.as_str(),
                shard: shard.value.id.as_str(),
            })
        });
        let next = Task {
            spec: Spec::Decommission,
            state: TaskState::Running,
            choice: None,
            message: String::new(),
            deadline_ms: clock::now_ms() + provision::DECOMMISSION_MS_MAX,
            ..task.value.clone()
        };
        info!(task = %next.id, instance = %next.instance, "provision undone: the instance is removed");
        let words = "the provision is undone: what it made is removed";
        self.commit(put_task(txn, next, "", "Undo", words)).await
    }
}

/// What an operator is told by a task that gave up.
fn parked(spec: &Spec, what: &str) -> String {
    let choices = match spec {
        Spec::Provision => "retry gives it more time, undo removes the instance",
        _ => "retry gives it more time",
    };
    format!(
        "not done in time; still waiting for {what}; it goes on by itself when that is there, {choices}"
    )
}

#[cfg(test)]
#[path = "instance_tests.rs"]
mod tests;
