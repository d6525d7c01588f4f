//! Instances and shards as the API shows them: the record, with what is observed beside it.

use slotmesh_proto::instance::v1 as api;
use slotmesh_topology::{Instance, Shard, parameter, wire};

use crate::{clock, hub::ProxyEntry};

pub(super) fn instance(instance: &Instance, proxies: &[ProxyEntry]) -> api::Instance {
    api::Instance {
        instance_id: instance.id.to_string(),
        name: instance.name.clone(),
        architecture: wire::architecture_to(instance.architecture).into(),
        state: wire::instance_state_to(instance.state).into(),
        shard_count: instance.shard_count,
        replicas_per_shard: instance.replicas_per_shard,
        engine: instance.engine.clone(),
        proxies: instance
            .proxies
            .iter()
            // One that sends its clients away is nothing to connect to.
            .filter(|placed| placed.sends_away().is_none())
            .map(|placed| {
                let id = placed.proxy.as_str();
                let seen = proxies.iter().find(|p| p.hello.proxy_id == id);
                api::ProxyEndpoint {
                    proxy_id: id.to_owned(),
                    host_id: placed.host.to_string(),
                    address: seen.map(|p| p.hello.address.clone()).unwrap_or_default(),
                    pid: seen.map(|p| p.hello.pid).unwrap_or_default(),
                }
            })
            .collect(),
        created_at: clock::rfc3339(instance.created_unix_ms),
        durability: instance.durability,
        replace_after_s: instance.replace_after_s,
        maintenance_window: instance.maintenance_window.clone(),
        password_required: !instance.password_sha256.is_empty(),
        engine_parameters: instance.parameters.clone().into_iter().collect(),
        proxy_parameters: parameter::PROXY
            .iter()
            .map(|known| {
                let value = parameter::proxy_value(&instance.proxy_parameters, known);
                (known.name.to_owned(), value.to_owned())
            })
            .collect(),
    }
}

pub(super) fn shard(shard: &Shard, fleet: &slotmesh_task::Fleet, suspected: &str) -> api::Shard {
    let unknown = slotmesh_task::NodeView::default();
    api::Shard {
        shard_id: shard.id.to_string(),
        index: shard.index,
        slots: shard.slots.iter().map(wire::slot_range).collect(),
        epoch: shard.epoch.0,
        mode: shard.mode.name().to_owned(),
        message: suspected.to_owned(),
        nodes: shard
            .members
            .iter()
            .map(|m| {
                let seen = fleet.node(&m.node).unwrap_or(&unknown);
                api::Node {
                    node_id: m.node.to_string(),
                    host_id: m.host.to_string(),
                    current_role: wire::node_role_to(m.role).into(),
                    address: m.address.clone(),
                    run_id: m.run_id.clone(),
                    in_sync: m.in_sync,
                    priority: m.priority,
                    leaving: m.leaving,
                    pid: seen.pid,
                    engine_version: seen.version.clone(),
                    state: seen.state.name().to_owned(),
                    replication_offset: seen.offset,
                }
            })
            .collect(),
    }
}
