//! For tests: a leader over records in memory, whose hosts say what the test says.

use std::sync::Arc;

use slotmesh_proto::{agent::v1 as agent, store::v1 as records, topology::v1::SlotRange};
use slotmesh_task::Task;
use slotmesh_topology::{Instance, InstanceId, TaskId};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Driver;
use crate::{
    agents::Agents,
    hub::Hub,
    leader::{Candidate, Election, LEADER_TTL, Term},
    mirror::{Mirror, Versioned},
    store::{
        EmbeddedStore, Store, Txn, TxnOutcome,
        keys::{self, Key},
    },
};

/// A leader over what is in a store.
pub(super) struct Leading {
    store: Arc<dyn Store>,
    term: Term,
    pub(super) mirror: Mirror,
    pub(super) hub: Hub,
    _stop: DropGuard,
}

impl Leading {
    pub(super) async fn over(store: Arc<dyn Store>) -> Self {
        let stop = CancellationToken::new();
        let (mirror, _worker) = Mirror::start(store.clone(), stop.clone()).await.unwrap();
        let candidate = Candidate {
            controller_id: "c".into(),
            address: "a:1".into(),
            ttl: LEADER_TTL,
        };
        let election = Election::start(store.clone(), candidate, stop.clone());
        let mut leadership = election.leadership();
        let leading = leadership.wait_for(|l| l.term().is_some()).await.unwrap();
        let term = leading.term().unwrap();
        drop(leading);
        Self {
            store,
            term,
            mirror,
            hub: Hub::default(),
            _stop: stop.drop_guard(),
        }
    }

    /// A driver that has just begun.
    pub(super) fn driver(&self) -> Driver {
        let (store, mirror) = (self.store.clone(), self.mirror.clone());
        let (hub, agents) = (self.hub.clone(), Agents::default());
        Driver::new(store, mirror, hub, agents, self.term, "c".to_owned())
    }
}

/// A leader of one instance `r` with one shard `0`, and one task `t`.
pub(super) struct Desk {
    pub(super) driver: Driver,
    pub(super) leading: Leading,
    session: u64,
}

impl Desk {
    /// With its nodes, the first of them the primary, each on the host `h-<node>`.
    pub(super) async fn with(
        nodes: &[&str],
        shard_mode: records::shard_record::Mode,
        instance_state: records::InstanceState,
        task: records::TaskRecord,
    ) -> Self {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let task = records::TaskRecord {
            task_id: "t".into(),
            instance_id: "r".into(),
            created_unix_ms: 1,
            event_count: 1,
            ..task
        };
        let (instance, shard) = ("r", "0");
        let shard_key = Key::Shard { instance, shard };
        let instance_key = Key::Instance { instance };
        let txn = Txn::new()
            .put(instance_key, keys::encode(instance_record(instance_state)))
            .put(shard_key, keys::encode(shard_record(nodes, shard_mode)))
            .put(Key::Task { task: "t" }, keys::encode(task));
        let written = store.txn(txn).await.unwrap();
        assert!(matches!(written, TxnOutcome::Committed { .. }));
        let leading = Leading::over(store).await;
        let session = leading.hub.host_opened(agent::Register {
            host_id: "h".into(),
            ..agent::Register::default()
        });
        let mut driver = leading.driver();
        // It has led for long: nobody is given time to come back.
        driver.since_ms = 0;
        Self {
            driver,
            leading,
            session,
        }
    }

    pub(super) fn report(&self, node: agent::NodeReport) {
        self.report_all(vec![node]);
    }

    pub(super) fn report_all(&self, nodes: Vec<agent::NodeReport>) {
        let report = agent::HostReport {
            nodes,
            ..agent::HostReport::default()
        };
        assert!(
            self.leading
                .hub
                .host_reported(&"h".into(), self.session, &report)
        );
    }

    pub(super) fn task(&self) -> Versioned<Task> {
        let id = TaskId::from("t");
        self.leading
            .mirror
            .read(|s| s.tasks.get(&id).cloned())
            .unwrap()
    }

    pub(super) fn instance(&self) -> Option<Instance> {
        let id = InstanceId::from("r");
        let found = self.leading.mirror.read(|s| s.instances.get(&id).cloned());
        found.map(|i| i.value)
    }
}

fn instance_record(state: records::InstanceState) -> records::InstanceRecord {
    records::InstanceRecord {
        instance_id: "r".into(),
        name: "r".into(),
        architecture: slotmesh_proto::topology::v1::Architecture::Standard.into(),
        shard_count: 1,
        databases: 256,
        secret: vec![7; 32],
        state: state.into(),
        workers_per_proxy: 1,
        ..records::InstanceRecord::default()
    }
}

fn shard_record(nodes: &[&str], mode: records::shard_record::Mode) -> records::ShardRecord {
    let is_serving = matches!(mode, records::shard_record::Mode::Serving(_));
    let member = |(index, node): (usize, &&str)| records::Member {
        node_id: (*node).to_owned(),
        host_id: format!("h-{node}"),
        role: match index {
            0 => records::NodeRole::Primary.into(),
            _ => records::NodeRole::Replica.into(),
        },
        run_id: match is_serving {
            true => format!("run-{node}"),
            false => String::new(),
        },
        in_sync: is_serving,
        ..records::Member::default()
    };
    records::ShardRecord {
        instance_id: "r".into(),
        shard_id: "0".into(),
        slots: vec![SlotRange {
            first: 0,
            last: 16_383,
        }],
        epoch: is_serving.into(),
        primary_node_id: nodes[0].to_owned(),
        members: nodes.iter().enumerate().map(member).collect(),
        mode: Some(mode),
        ..records::ShardRecord::default()
    }
}
