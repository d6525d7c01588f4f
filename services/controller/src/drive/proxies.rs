//! Acting on a change of proxies: writes each decision of the pure machine, placement and task together.
//!
//! Invariant: a placement changes only in the transaction that writes the phase it belongs to; agents
//! learn of it as of every record.

use slotmesh_task::{
    Task,
    proxies::{self, Change, Changes, Decision, ProxyPhase, View, Write},
    schedule,
};
use slotmesh_topology::{Instance, Shard};
use tracing::info;

use super::{
    DriveError, Driver, Next,
    write::{encode_instance, put_task},
};
use crate::{clock, mirror::Versioned, store::keys::Key};

/// Between two looks at a proxy: what it waits for is in reports, which wake the loop; counters and
/// silence are not.
const LOOK_MS: u64 = 1_000;

impl Driver {
    pub(super) async fn act_on_proxies(
        &mut self,
        task: &Versioned<Task>,
        changes: &Changes,
    ) -> Result<Next, DriveError> {
        let id = &task.value.instance;
        let (instance, shards) = self
            .mirror
            .read(|s| (s.instances.get(id).cloned(), s.shards_of(id)));
        let Some(instance) = instance else {
            return self.end_proxies_of_nobody(task, changes).await;
        };
        let shards: Vec<Shard> = shards.into_iter().map(|s| s.value).collect();
        let now_ms = clock::now_ms();
        let window = &instance.value.maintenance_window;
        let opens_ms = match changes.in_window {
            true => schedule::opens_ms(window, now_ms, self.rests_ms),
            false => None,
        };
        let mut wake_ms = u64::MAX;
        for part in changes.proxies.iter().filter(|p| !p.phase.is_ended()) {
            let decision = self.hub.read(|fleet| {
                proxies::decide(View {
                    task: &task.value,
                    changes,
                    part,
                    instance: &instance.value,
                    shards: &shards,
                    fleet,
                    now_ms,
                    opens_ms,
                    since_ms: self.since_ms,
                })
            });
            match decision {
                Decision::Wait { until_ms } => wake_ms = wake_ms.min(until_ms),
                Decision::Write(write) => {
                    return self.write_proxy(task, &instance, part, *write).await;
                }
            }
        }
        match proxies::ended(&task.value, changes) {
            Some((state, message)) => {
                info!(task = %task.value.id, instance = %id, message, "change of proxies ended");
                let next = Task {
                    state,
                    message: message.clone(),
                    ..task.value.clone()
                };
                self.write_task(task, next, "", "Ended", &message).await
            }
            None => Ok(Next::At(wake_ms.min(now_ms + LOOK_MS))),
        }
    }

    async fn write_proxy(
        &self,
        task: &Versioned<Task>,
        instance: &Versioned<Instance>,
        part: &Change,
        write: Write,
    ) -> Result<Next, DriveError> {
        info!(
            task = %task.value.id, instance = %instance.value.id, proxy = %part.proxy,
            step = write.event, message = write.message, "change of proxies"
        );
        let mut txn = self.txn_on(task);
        if let Some(placement) = write.placement {
            let mut next = instance.value.clone();
            let placed = next.proxies.iter_mut();
            for one in placed.filter(|p| p.proxy == placement.proxy) {
                *one = placement.clone();
            }
            let key = Key::Instance {
                instance: next.id.as_str(),
            }
            .to_string();
            txn = txn
                .unchanged(key.clone(), instance.mod_revision)
                .put(key, encode_instance(&next));
        }
        let message = format!("proxy {}: {}", part.proxy, write.message);
        self.commit(put_task(txn, write.task, "", write.event, &message))
            .await
    }

    async fn end_proxies_of_nobody(
        &self,
        task: &Versioned<Task>,
        changes: &Changes,
    ) -> Result<Next, DriveError> {
        let words = "the instance is gone";
        let mut gone = changes.clone();
        for part in gone.proxies.iter_mut().filter(|p| !p.phase.is_ended()) {
            part.phase = ProxyPhase::Skipped;
            words.clone_into(&mut part.message);
        }
        let next = Task {
            spec: slotmesh_task::Spec::Proxies(gone),
            state: slotmesh_task::State::RolledBack,
            message: words.to_owned(),
            ..task.value.clone()
        };
        self.write_task(task, next, "", "Ended", words).await
    }
}
