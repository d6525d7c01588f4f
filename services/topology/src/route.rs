//! What a proxy is told of a shard: where its requests go, as whom, and whether to hold them.

use slotmesh_proto::topology::v1 as pb;

use crate::{
    compatibility, credential,
    instance::{Architecture, Instance},
    parameter,
    shard::{Mode, Shard},
    wire,
};

/// Longest time that a proxy holds a request before it answers with an error. Clients' own
/// timeouts are rarely below it.
pub const HOLD_BUDGET_MS: u64 = 5_000;
/// Bytes of held requests in one proxy before it stops reading clients.
pub const HOLD_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// The route of a shard; `None` while no epoch of it has begun.
///
/// A fenced shard has a route with a hold, so that requests wait out their budget rather than
/// fail at once.
#[must_use]
pub fn shard(instance: &Instance, shard: &Shard) -> Option<pb::ShardRoute> {
    if shard.epoch.0 == 0 {
        return None;
    }
    let hold = match &shard.mode {
        Mode::Handover(handover) => Some(pb::Hold {
            task_id: handover.task.to_string(),
            target_address: shard
                .member(&handover.target)
                .map(|m| m.address.clone())
                .unwrap_or_default(),
            max_hold_ms: handover.max_hold_ms,
        }),
        Mode::FailingOver(failover) => Some(pb::Hold {
            task_id: failover.task.to_string(),
            target_address: failover
                .target
                .as_ref()
                .and_then(|target| shard.member(target))
                .map(|m| m.address.clone())
                .unwrap_or_default(),
            // As long as the proxy holds at all: the epoch before is over, so there is nowhere else
            // to go.
            max_hold_ms: u32::try_from(HOLD_BUDGET_MS).unwrap_or(u32::MAX),
        }),
        Mode::Fenced(_) => Some(pb::Hold {
            max_hold_ms: u32::try_from(HOLD_BUDGET_MS).unwrap_or(u32::MAX),
            ..pb::Hold::default()
        }),
        Mode::Serving | Mode::Provisioning => None,
    };
    let credential = credential::proxy(&instance.secret, &shard.id, shard.epoch);
    let observer = credential::observer(&instance.secret, &shard.id);
    Some(pb::ShardRoute {
        shard_id: shard.id.to_string(),
        index: shard.index,
        slots: shard.slots.iter().map(wire::slot_range).collect(),
        epoch: shard.epoch.0,
        primary_node_id: shard.primary.to_string(),
        primary_address: shard
            .primary_member()
            .map(|m| m.address.clone())
            .unwrap_or_default(),
        username: credential.user,
        password: credential.password,
        hold,
        observer_username: observer.user,
        observer_password: observer.password,
        replicas: replicas(shard),
    })
}

/// All members but the primary that have an address, in the order of their node ids.
fn replicas(shard: &Shard) -> Vec<pb::Replica> {
    let others = shard.members.iter().filter(|m| m.node != shard.primary);
    let mut replicas: Vec<_> = others
        .filter(|m| !m.address.is_empty())
        .map(|m| pb::Replica {
            node_id: m.node.to_string(),
            address: m.address.clone(),
        })
        .collect();
    replicas.sort_by(|a, b| a.node_id.cmp(&b.node_id));
    replicas
}

/// What a proxy must know of its instance besides the shards.
#[must_use]
pub fn settings(instance: &Instance) -> pb::InstanceSettings {
    pb::InstanceSettings {
        instance_id: instance.id.to_string(),
        architecture: match instance.architecture {
            Architecture::Standard => pb::Architecture::Standard,
            Architecture::Cluster => pb::Architecture::Cluster,
        }
        .into(),
        databases: instance.databases,
        password_sha256: instance.password_sha256.clone(),
        hold_budget_ms: parameter::hold_budget_ms(&instance.proxy_parameters),
        hold_bytes_max: HOLD_BYTES_MAX,
        accounts: instance.accounts.iter().map(wire::account_to).collect(),
        proxy_parameters: instance.proxy_parameters.clone().into_iter().collect(),
        durability: instance.durability,
        controller_addresses: Vec::new(),
        held_back: instance
            .held_back
            .map(compatibility::name)
            .unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;

    #[test]
    fn proxies_are_told_what_is_held_back_as_the_record_has_it() {
        let record = slotmesh_proto::store::v1::InstanceRecord {
            schema: wire::SCHEMA,
            architecture: pb::Architecture::Standard.into(),
            state: slotmesh_proto::store::v1::InstanceState::Running.into(),
            held_back: "redis-7.0.15".to_owned(),
            ..Default::default()
        };
        let instance = wire::instance_from(&record).unwrap();
        assert_eq!(settings(&instance).held_back, "redis-7.0.15");
        assert_eq!(wire::instance_to(&instance).held_back, "redis-7.0.15");
        let before = slotmesh_proto::store::v1::InstanceRecord {
            held_back: String::new(),
            ..record
        };
        let before = wire::instance_from(&before).unwrap();
        assert_eq!(before.held_back, None, "a record of an earlier release");
        assert_eq!(settings(&before).held_back, "");
    }
}
