//! The records and keys with which a run begins.
//!
//! Invariant: nothing has been provisioned; the real provision task does that.

use std::collections::BTreeMap;

use slotmesh_proto::store::v1 as records;
use slotmesh_task::{Spec, State as TaskState, Task, wire};
use slotmesh_topology::{
    Architecture, Epoch, Instance, InstanceState, Member, Mode, NodeRole, Placement, Shard, Slot,
    slot,
};

use crate::{
    node::Node,
    plan::Shape,
    store::{Key, Value},
};

/// Keys of clients: of each shard a register and a list.
pub(super) struct Keys {
    pub(super) next: u32,
    pub(super) shards: u16,
}

impl Keys {
    pub(super) fn of_client(&mut self) -> Vec<(u32, u32)> {
        let ranges = slot::split_evenly(self.shards);
        ranges
            .iter()
            .map(|range| (self.within(range), self.within(range)))
            .collect()
    }

    fn within(&mut self, range: &slotmesh_topology::SlotRange) -> u32 {
        loop {
            self.next += 1;
            let slot = Slot::of(format!("k{}", self.next).as_bytes()).number();
            if (range.first()..=range.last()).contains(&slot) {
                return self.next;
            }
        }
    }
}

pub(super) fn instance(shape: Shape) -> Instance {
    Instance {
        id: "r".into(),
        name: "r".into(),
        architecture: Architecture::Cluster,
        shard_count: shape.shards as u32,
        replicas_per_shard: shape.nodes as u32 - 1,
        databases: 256,
        engine: String::new(),
        secret: vec![7; 32],
        password_sha256: Vec::new(),
        state: InstanceState::Running,
        proxies: (0..shape.proxies)
            .map(|p| {
                Placement::new(
                    format!("p{p}").into(),
                    format!("h{}", p % shape.hosts).into(),
                )
            })
            .collect(),
        gone_proxies: Vec::new(),
        workers_per_proxy: 1,
        created_unix_ms: 0,
        parameters: BTreeMap::new(),
        parameters_version: 0,
        proxy_parameters: BTreeMap::new(),
        accounts: Vec::new(),
        durability: shape.durability,
        maintenance_window: String::new(),
        auto_upgrade: None,
        held_back: None,
        replace_after_s: shape.replace_after_s,
    }
}

pub(super) fn records(instance: &Instance, shards: &[Shard]) -> Vec<(Key, Value)> {
    let task = Task {
        id: "t0".into(),
        instance: instance.id.clone(),
        spec: Spec::Provision,
        state: TaskState::Running,
        message: String::new(),
        created_ms: 0,
        updated_ms: 0,
        deadline_ms: u64::MAX,
        event_count: 1,
        cancel_requested: false,
        not_before_ms: 0,
        in_window: false,
        choice: None,
        trace_id: String::new(),
        copied: slotmesh_task::Copied::default(),
    };
    let record: records::TaskRecord = wire::task_to(&task, 0);
    let mut items = vec![(Key::Task("t0".into()), Value::Task(record))];
    items.extend(shards.iter().map(|shard| {
        let record = slotmesh_topology::wire::shard_to(shard);
        (Key::Shard(shard.index as usize), Value::Shard(record))
    }));
    items
}

/// Nodes and shards, spread over the hosts.
pub(super) fn shards(shape: Shape, instance: &Instance) -> (Vec<Node>, Vec<Shard>) {
    let (mut nodes, mut shards) = (Vec::new(), Vec::new());
    for (index, range) in slot::split_evenly(shape.shards as u16)
        .into_iter()
        .enumerate()
    {
        let mut members = Vec::new();
        for position in 0..shape.nodes {
            let (number, host) = (nodes.len(), (index + position) % shape.hosts);
            let name = format!("r-{index}-{position}");
            members.push(Member {
                node: name.as_str().into(),
                host: format!("h{host}").into(),
                role: if position == 0 {
                    NodeRole::Primary
                } else {
                    NodeRole::Replica
                },
                run_id: String::new(),
                address: String::new(),
                in_sync: false,
                priority: slotmesh_topology::PRIORITY,
                leaving: false,
                engine: String::new(),
                exchange: None,
            });
            nodes.push(Node::new(number, index, host, name));
        }
        shards.push(Shard {
            instance: instance.id.clone(),
            id: index.to_string().into(),
            index: index as u32,
            slots: vec![range],
            epoch: Epoch(0),
            primary: members[0].node.clone(),
            members,
            mode: Mode::Provisioning,
            closed_epoch: Epoch(0),
            departures: Vec::new(),
            roster: Default::default(),
        });
    }
    for host in 0..shape.hosts {
        for shard in 0..shape.shards {
            let spare = shape.spare_of(host, shard);
            nodes.extend(spare.map(|n| Node::new(n, shard, host, format!("spare-{n}"))));
        }
    }
    (nodes, shards)
}
