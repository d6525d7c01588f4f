//! What proxies hold back for an upgrade's sake does not outlive it.
//!
//! The upgrade's own task says what is held back, while it is open. One that was ended by a controller of a
//! release before that leaves it standing; so does a shard that is removed. Invariant: it is let go only
//! when no upgrade of the instance can go on by itself, and each node has said that it runs the same.

use slotmesh_task::{Spec, Task, auto};
use slotmesh_topology::{Instance, InstanceId, InstanceState, Shard};
use tracing::info;

use super::{DriveError, Driver, write::put_instance};
use crate::mirror::Versioned;

impl Driver {
    /// Clears what nothing is held back for any more.
    pub(super) async fn let_go(&self) -> Result<(), DriveError> {
        for instance in self.held_for_nothing() {
            let next = Instance {
                held_back: None,
                ..instance.value
            };
            info!(instance = %next.id, "no upgrade is under way: no command is held back any more");
            let txn = put_instance(self.term.txn(), instance.mod_revision, &next);
            // Who was changed since is looked at again.
            self.commit(txn).await?;
        }
        Ok(())
    }

    fn held_for_nothing(&self) -> Vec<Versioned<Instance>> {
        self.mirror.read(|state| {
            let is_wanted = |id: &InstanceId| {
                let is_open = |task: &Task| !task.state.is_ended() || task.is_parked();
                let mut tasks = state.tasks.values().map(|t| &t.value);
                tasks.any(|t| t.instance == *id && matches!(t.spec, Spec::Upgrade(_)) && is_open(t))
            };
            let run_the_same = |id: &InstanceId| {
                let shards = state.shards_of(id).into_iter().map(|s| s.value);
                let shards: Vec<Shard> = shards.collect();
                let engines = self.hub.read(|fleet| auto::engines(&shards, fleet));
                let mut members = shards.iter().flat_map(|s| &s.members);
                let is_exchanged = members.any(|m| m.exchange.is_some());
                engines.is_some_and(|e| !is_exchanged && e.iter().all(|one| *one == e[0]))
            };
            let is_held = |i: &&Versioned<Instance>| {
                i.value.held_back.is_some() && i.value.state != InstanceState::Deleting
            };
            let held = state.instances.values().filter(is_held);
            held.filter(|i| !is_wanted(&i.value.id) && run_the_same(&i.value.id))
                .cloned()
                .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use slotmesh_proto::{agent::v1 as agent, store::v1 as records};
    use slotmesh_topology::artifact::parse_name;

    use super::*;
    use crate::{
        drive::{desk::Desk, write::encode_instance},
        leader::LeaderOutcome,
        store::keys::Key,
    };

    fn node(id: &str, version: &str) -> agent::NodeReport {
        agent::NodeReport {
            node_id: id.into(),
            state: agent::ProcessState::Running.into(),
            run_id: format!("run-{id}"),
            engine_version: version.into(),
            ..agent::NodeReport::default()
        }
    }

    /// An instance for which something is held back, and an upgrade of it that is in that state.
    async fn held(state: records::TaskState, versions: [&str; 2]) -> bool {
        let task = records::TaskRecord {
            spec: Some(records::task_record::Spec::Upgrade(records::UpgradeSpec {
                engine: "redis-8.2.3".into(),
                ..records::UpgradeSpec::default()
            })),
            state: state.into(),
            ..records::TaskRecord::default()
        };
        let serving = records::shard_record::Mode::Serving(records::Serving {});
        let desk = Desk::with(&["a", "b"], serving, records::InstanceState::Running, task).await;
        let instance = Instance {
            held_back: parse_name("redis-7.0.15"),
            ..desk.instance().unwrap()
        };
        let key = Key::Instance { instance: "r" };
        let txn = desk.driver.term.txn().put(key, encode_instance(&instance));
        let outcome = txn.commit(&*desk.driver.store).await.unwrap();
        let LeaderOutcome::Committed { revision } = outcome else {
            panic!("{outcome:?}");
        };
        assert!(desk.driver.mirror.shows(revision).await);
        let [a, b] = versions;
        desk.report_all(vec![node("a", a), node("b", b)]);
        desk.driver.let_go().await.unwrap();
        desk.instance().unwrap().held_back.is_some()
    }

    #[tokio::test]
    async fn what_an_ended_upgrade_has_left_is_let_go_once_all_nodes_run_the_same() {
        use records::TaskState::{Done, NeedsOperator, RolledBack, Running};
        let (old, new) = ("7.0.15", "8.2.3");
        for (state, versions, want) in [
            (RolledBack, [old, old], false),
            (Done, [new, new], false),
            (NeedsOperator, [new, old], true),
            (RolledBack, [old, ""], true),
            (Running, [old, old], true),
        ] {
            assert_eq!(held(state, versions).await, want, "{state:?} {versions:?}");
        }
    }
}
