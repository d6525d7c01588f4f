//! Acting on a change of proxies: writes each decision of the pure machine, placement and task together.
//!
//! Invariant: a placement changes only in the transaction that writes the phase it belongs to; agents
//! learn of it as of every record.

use slotmesh_task::{
    ProcessState, Task,
    proxies::{self, Change, Changes, Decision, ProxyPhase, View, Write},
    schedule,
};
use slotmesh_topology::{Instance, Placement, Shard};
use tracing::info;

use super::{
    DriveError, Driver, Next,
    replace::candidates,
    write::{put_instance, put_task},
};
use crate::{clock, mirror::Versioned};

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
        let candidates = self
            .hub
            .read(|fleet| self.mirror.read(|state| candidates(state, fleet)));
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
                    candidates: &candidates,
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
        if let Some(next) = write.placed.on(&instance.value, clock::now_ms()) {
            txn = put_instance(txn, instance.mod_revision, &next);
        }
        let message = format!("proxy {}: {}", part.proxy, write.message);
        self.commit(put_task(txn, write.task, "", write.event, &message))
            .await
    }

    /// Forgets proxies that their agents have removed.
    pub(super) async fn forget_gone_proxies(&self) -> Result<(), DriveError> {
        let kept: Vec<Versioned<Instance>> = self.mirror.read(|state| {
            let all = state.instances.values();
            all.filter(|i| !i.value.gone_proxies.is_empty())
                .cloned()
                .collect()
        });
        for instance in kept {
            let next = self.hub.read(|fleet| {
                instance.value.without_removed(|p: &Placement| {
                    let process = fleet.proxy_processes.get(&p.proxy);
                    process.is_some_and(|p| p.state == ProcessState::Removed)
                })
            });
            if next.gone_proxies.len() < instance.value.gone_proxies.len() {
                info!(instance = %next.id, "a removed proxy is forgotten");
                self.commit(put_instance(self.term.txn(), instance.mod_revision, &next))
                    .await?;
            }
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use slotmesh_proto::{agent::v1 as agent, store::v1 as records, topology::v1::Architecture};

    use super::*;
    use crate::{
        drive::desk::Leading,
        store::{EmbeddedStore, Store, Txn, TxnOutcome, keys, keys::Key},
    };

    #[tokio::test]
    async fn a_removed_proxy_is_forgotten_once_its_agent_says_so_and_its_id_is_given_to_no_other() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let gone = |id: &str| records::ProxyPlacement {
            proxy_id: id.into(),
            host_id: "h".into(),
            ..records::ProxyPlacement::default()
        };
        let record = records::InstanceRecord {
            schema: 1,
            instance_id: "r".into(),
            architecture: Architecture::Standard.into(),
            state: records::InstanceState::Running.into(),
            // The last one that was placed, too.
            gone_proxies: vec![gone("r-proxy-0"), gone("r-proxy-1")],
            ..records::InstanceRecord::default()
        };
        let key = Key::Instance { instance: "r" };
        let txn = Txn::new().put(key, keys::encode(record));
        let outcome = store.txn(txn).await.unwrap();
        assert!(matches!(outcome, TxnOutcome::Committed { .. }));
        let leading = Leading::over(store).await;
        let gone = || {
            let of = |i: &Versioned<Instance>| i.value.gone_proxies.len();
            leading
                .mirror
                .read(|s| s.instances.values().map(of).sum::<usize>())
        };
        let session = leading.hub.host_opened(agent::Register {
            host_id: "h".into(),
            ..agent::Register::default()
        });
        for (state, left) in [
            (agent::ProcessState::Running, 2),
            (agent::ProcessState::Removed, 1),
        ] {
            let proxy = |id: &str| agent::ProxyReport {
                proxy_id: id.into(),
                state: state.into(),
                ..agent::ProxyReport::default()
            };
            let report = agent::HostReport {
                proxies: vec![proxy("r-proxy-0"), proxy("r-proxy-1")],
                ..agent::HostReport::default()
            };
            leading.hub.host_reported(&"h".into(), session, &report);
            leading.driver().forget_gone_proxies().await.unwrap();
            assert_eq!(gone(), left, "{state:?}");
        }
        let next = |i: &Versioned<Instance>| i.value.next_proxy();
        let next = leading
            .mirror
            .read(|s| s.instances.values().map(next).next());
        assert_eq!(next, Some("r-proxy-2".into()));
    }
}
