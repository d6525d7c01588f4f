//! Where records of the store become values of the model and back. Nothing else parses them.

pub mod artifact;
mod departures;
mod roster;

use slotmesh_proto::{store::v1 as store, topology::v1 as topology};

use self::departures::departures_from;
pub(crate) use self::departures::{departures_to, newest_offset, newest_replid};
use crate::{
    account::Account,
    check::{self, CheckError},
    compatibility,
    id::Epoch,
    instance::{Architecture, Instance, InstanceState, Leaving, Placement, REPLACE_AFTER_S},
    shard::{Exchange, Failover, FenceProof, Handover, Member, Mode, NodeRole, PRIORITY, Shard},
    slot::SlotRange,
};

/// Schema of the records written by this release. A record of a newer one is refused.
pub const SCHEMA: u32 = 1;

/// A record that is not a value of the model.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Written by a newer release.
    #[error(
        "record {record} has schema {found}; this release knows {SCHEMA}: upgrade this process"
    )]
    Schema {
        /// Kind of record.
        record: &'static str,
        /// Its schema.
        found: u32,
    },
    /// A field that must be set is not, or has a value out of range.
    #[error("record {record} has no valid {field}")]
    Field {
        /// Kind of record.
        record: &'static str,
        /// Which field.
        field: &'static str,
    },
    /// Fields that contradict each other.
    #[error(transparent)]
    Check(#[from] CheckError),
}

fn schema(record: &'static str, found: u32) -> Result<(), WireError> {
    if found == 0 || found > SCHEMA {
        return Err(WireError::Schema { record, found });
    }
    Ok(())
}

/// Reads a shard's record.
///
/// # Errors
/// When it is of a newer schema, incomplete, or breaks an invariant.
pub fn shard_from(record: &store::ShardRecord) -> Result<Shard, WireError> {
    schema("shard", record.schema)?;
    let field = |field| WireError::Field {
        record: "shard",
        field,
    };
    let slots = record
        .slots
        .iter()
        .map(slot_range_from)
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| field("slots"))?;
    let members = record
        .members
        .iter()
        .map(|m| {
            Some(Member {
                node: m.node_id.as_str().into(),
                host: m.host_id.as_str().into(),
                role: node_role_from(m.role())?,
                run_id: m.run_id.clone(),
                address: m.address.clone(),
                in_sync: m.in_sync,
                priority: m.priority.unwrap_or(PRIORITY),
                leaving: m.leaving,
                engine: m.engine.clone(),
                exchange: exchange_from(m.exchange()),
            })
        })
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| field("members"))?;
    let mode = match record.mode.as_ref().ok_or_else(|| field("mode"))? {
        store::shard_record::Mode::Provisioning(_) => Mode::Provisioning,
        store::shard_record::Mode::Serving(_) => Mode::Serving,
        store::shard_record::Mode::Fenced(f) => Mode::Fenced(f.reason.clone()),
        store::shard_record::Mode::FailingOver(f) => Mode::FailingOver(Failover {
            task: f.task_id.as_str().into(),
            target: Some(f.target_node_id.as_str())
                .filter(|t| !t.is_empty())
                .map(Into::into),
            proof: fence_proof_from(f.proof()),
            since_unix_ms: f.since_unix_ms,
        }),
        store::shard_record::Mode::Handover(h) => Mode::Handover(Handover {
            task: h.task_id.as_str().into(),
            target: h.target_node_id.as_str().into(),
            token: h.token.clone(),
            deadline_unix_ms: h.deadline_unix_ms,
            max_hold_ms: h.max_hold_ms,
        }),
    };
    let shard = Shard {
        instance: record.instance_id.as_str().into(),
        id: record.shard_id.as_str().into(),
        index: record.index,
        slots,
        epoch: Epoch(record.epoch),
        primary: record.primary_node_id.as_str().into(),
        members,
        mode,
        closed_epoch: Epoch(record.closed_epoch),
        departures: departures_from(record),
        roster: roster::from(record),
    };
    check::shard(&shard)?;
    Ok(shard)
}

/// Writes a shard's record.
///
/// # Panics
/// When the shard breaks an invariant: that is our mistake and must not reach the store.
#[must_use]
pub fn shard_to(shard: &Shard) -> store::ShardRecord {
    let checked = check::shard(shard);
    assert!(checked.is_ok(), "{checked:?}");
    let mode = match &shard.mode {
        Mode::Provisioning => store::shard_record::Mode::Provisioning(store::Provisioning {}),
        Mode::Serving => store::shard_record::Mode::Serving(store::Serving {}),
        Mode::FailingOver(f) => store::shard_record::Mode::FailingOver(store::FailingOver {
            task_id: f.task.to_string(),
            target_node_id: f
                .target
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            proof: f
                .proof
                .map_or(store::FenceProof::Unspecified, fence_proof_to)
                .into(),
            since_unix_ms: f.since_unix_ms,
        }),
        Mode::Fenced(reason) => store::shard_record::Mode::Fenced(store::Fenced {
            reason: reason.clone(),
        }),
        Mode::Handover(h) => store::shard_record::Mode::Handover(store::Handover {
            task_id: h.task.to_string(),
            target_node_id: h.target.to_string(),
            token: h.token.clone(),
            deadline_unix_ms: h.deadline_unix_ms,
            max_hold_ms: h.max_hold_ms,
        }),
    };
    store::ShardRecord {
        schema: SCHEMA,
        instance_id: shard.instance.to_string(),
        shard_id: shard.id.to_string(),
        index: shard.index,
        slots: shard.slots.iter().map(slot_range).collect(),
        epoch: shard.epoch.0,
        primary_node_id: shard.primary.to_string(),
        members: shard
            .members
            .iter()
            .map(|m| store::Member {
                node_id: m.node.to_string(),
                host_id: m.host.to_string(),
                role: node_role_to(m.role).into(),
                run_id: m.run_id.clone(),
                address: m.address.clone(),
                in_sync: m.in_sync,
                priority: Some(m.priority),
                leaving: m.leaving,
                engine: m.engine.clone(),
                exchange: exchange_to(m.exchange).into(),
            })
            .collect(),
        mode: Some(mode),
        closed_epoch: shard.closed_epoch.0,
        previous_replid: newest_replid(shard),
        previous_offset: newest_offset(shard),
        departures: departures_to(shard),
        gone_nodes: roster::gone_to(&shard.roster),
        nodes_made: shard.roster.made,
        newcomers: roster::newcomers_to(&shard.roster),
        older: roster::older_to(&shard.roster),
        membership: shard.roster.membership,
    }
}

/// Reads an instance's record.
///
/// # Errors
/// When it is of a newer schema or incomplete.
pub fn instance_from(record: &store::InstanceRecord) -> Result<Instance, WireError> {
    schema("instance", record.schema)?;
    let field = |field| WireError::Field {
        record: "instance",
        field,
    };
    let state = match record.state() {
        store::InstanceState::Creating => InstanceState::Creating,
        store::InstanceState::Running => InstanceState::Running,
        store::InstanceState::Deleting => InstanceState::Deleting,
        store::InstanceState::Unspecified => return Err(field("state")),
    };
    Ok(Instance {
        id: record.instance_id.as_str().into(),
        name: record.name.clone(),
        architecture: architecture_from(record.architecture())
            .ok_or_else(|| field("architecture"))?,
        shard_count: record.shard_count,
        replicas_per_shard: record.replicas_per_shard,
        databases: record.databases,
        engine: record.engine.clone(),
        secret: record.secret.clone(),
        password_sha256: record.password_sha256.clone(),
        state,
        proxies: record.proxies.iter().map(placement_from).collect(),
        gone_proxies: record.gone_proxies.iter().map(placement_from).collect(),
        workers_per_proxy: record.workers_per_proxy,
        created_unix_ms: record.created_unix_ms,
        parameters: record.parameters.clone().into_iter().collect(),
        parameters_version: record.parameters_version,
        proxy_parameters: record.proxy_parameters.clone().into_iter().collect(),
        durability: record.durability,
        replace_after_s: record.replace_after_s.unwrap_or(REPLACE_AFTER_S),
        maintenance_window: record.maintenance_window.clone(),
        auto_upgrade: artifact::level_from(record.auto_upgrade()),
        held_back: compatibility::named(&record.held_back),
        accounts: record.accounts.iter().map(account_from).collect(),
    })
}

/// Writes an instance's record.
#[must_use]
pub fn instance_to(instance: &Instance) -> store::InstanceRecord {
    store::InstanceRecord {
        schema: SCHEMA,
        instance_id: instance.id.to_string(),
        name: instance.name.clone(),
        architecture: architecture_to(instance.architecture).into(),
        shard_count: instance.shard_count,
        replicas_per_shard: instance.replicas_per_shard,
        databases: instance.databases,
        engine: instance.engine.clone(),
        secret: instance.secret.clone(),
        password_sha256: instance.password_sha256.clone(),
        state: instance_state_to(instance.state).into(),
        proxies: instance.proxies.iter().map(placement_to).collect(),
        gone_proxies: instance.gone_proxies.iter().map(placement_to).collect(),
        workers_per_proxy: instance.workers_per_proxy,
        created_unix_ms: instance.created_unix_ms,
        parameters: instance.parameters.clone().into_iter().collect(),
        accounts: instance.accounts.iter().map(account_to).collect(),
        proxy_parameters: instance.proxy_parameters.clone().into_iter().collect(),
        parameters_version: instance.parameters_version,
        durability: instance.durability,
        replace_after_s: Some(instance.replace_after_s),
        maintenance_window: instance.maintenance_window.clone(),
        auto_upgrade: instance
            .auto_upgrade
            .map_or(store::ReleaseLevel::Unspecified, artifact::level_to)
            .into(),
        held_back: instance
            .held_back
            .map(compatibility::name)
            .unwrap_or_default(),
    }
}

fn placement_from(record: &store::ProxyPlacement) -> Placement {
    Placement {
        proxy: record.proxy_id.as_str().into(),
        host: record.host_id.as_str().into(),
        program: record.program.clone(),
        generation: record.generation,
        generations: record.generations,
        leaving: record.leaving.as_ref().map(|leaving| Leaving {
            endpoint: leaving.endpoint.clone(),
            until_unix_ms: leaving.until_unix_ms,
            suspended: leaving.suspended,
        }),
        port: u16::try_from(record.port).unwrap_or_default(),
        cold: record.cold,
        workers: record.workers,
    }
}

fn placement_to(placement: &Placement) -> store::ProxyPlacement {
    store::ProxyPlacement {
        proxy_id: placement.proxy.to_string(),
        host_id: placement.host.to_string(),
        program: placement.program.clone(),
        generation: placement.generation,
        generations: placement.generations,
        leaving: placement
            .leaving
            .as_ref()
            .map(|leaving| store::ProxyLeaving {
                endpoint: leaving.endpoint.clone(),
                until_unix_ms: leaving.until_unix_ms,
                suspended: leaving.suspended,
            }),
        port: placement.port.into(),
        cold: placement.cold,
        workers: placement.workers,
    }
}

/// Reads an account.
#[must_use]
pub fn account_from(account: &topology::Account) -> Account {
    Account {
        name: account.name.clone(),
        rules: account.rules.clone(),
    }
}

/// Writes an account.
#[must_use]
pub fn account_to(account: &Account) -> topology::Account {
    topology::Account {
        name: account.name.clone(),
        rules: account.rules.clone(),
    }
}

/// How a primary is known to be fenced, for records and steps.
#[must_use]
pub fn fence_proof_to(proof: FenceProof) -> store::FenceProof {
    match proof {
        FenceProof::Exited => store::FenceProof::Exited,
        FenceProof::Fenced => store::FenceProof::Fenced,
        FenceProof::Lease => store::FenceProof::Lease,
        FenceProof::Operator => store::FenceProof::Operator,
    }
}

/// `None` when unspecified.
#[must_use]
pub fn fence_proof_from(proof: store::FenceProof) -> Option<FenceProof> {
    match proof {
        store::FenceProof::Unspecified => None,
        store::FenceProof::Exited => Some(FenceProof::Exited),
        store::FenceProof::Fenced => Some(FenceProof::Fenced),
        store::FenceProof::Lease => Some(FenceProof::Lease),
        store::FenceProof::Operator => Some(FenceProof::Operator),
    }
}

fn exchange_to(exchange: Option<Exchange>) -> store::Exchange {
    match exchange {
        None => store::Exchange::Unspecified,
        Some(Exchange::Keep) => store::Exchange::Keep,
        Some(Exchange::Discard) => store::Exchange::Discard,
    }
}

fn exchange_from(exchange: store::Exchange) -> Option<Exchange> {
    match exchange {
        store::Exchange::Unspecified => None,
        store::Exchange::Keep => Some(Exchange::Keep),
        store::Exchange::Discard => Some(Exchange::Discard),
    }
}

/// State of an instance, for records and the API.
#[must_use]
pub fn instance_state_to(state: InstanceState) -> store::InstanceState {
    match state {
        InstanceState::Creating => store::InstanceState::Creating,
        InstanceState::Running => store::InstanceState::Running,
        InstanceState::Deleting => store::InstanceState::Deleting,
    }
}

/// Architecture, for records and the API.
#[must_use]
pub fn architecture_to(architecture: Architecture) -> topology::Architecture {
    match architecture {
        Architecture::Standard => topology::Architecture::Standard,
        Architecture::Cluster => topology::Architecture::Cluster,
    }
}

/// `None` when unspecified.
#[must_use]
pub fn architecture_from(architecture: topology::Architecture) -> Option<Architecture> {
    match architecture {
        topology::Architecture::Unspecified => None,
        topology::Architecture::Standard => Some(Architecture::Standard),
        topology::Architecture::Cluster => Some(Architecture::Cluster),
    }
}

/// Role, for records and the API.
#[must_use]
pub fn node_role_to(role: NodeRole) -> store::NodeRole {
    match role {
        NodeRole::Primary => store::NodeRole::Primary,
        NodeRole::Replica => store::NodeRole::Replica,
        NodeRole::ReadOnly => store::NodeRole::ReadOnly,
    }
}

/// `None` when unspecified.
#[must_use]
pub fn node_role_from(role: store::NodeRole) -> Option<NodeRole> {
    match role {
        store::NodeRole::Unspecified => None,
        store::NodeRole::Primary => Some(NodeRole::Primary),
        store::NodeRole::Replica => Some(NodeRole::Replica),
        store::NodeRole::ReadOnly => Some(NodeRole::ReadOnly),
    }
}

/// Writes a range.
#[must_use]
pub fn slot_range(range: &SlotRange) -> topology::SlotRange {
    topology::SlotRange {
        first: range.first().into(),
        last: range.last().into(),
    }
}

/// Reads a range; `None` when it is none.
#[must_use]
pub fn slot_range_from(range: &topology::SlotRange) -> Option<SlotRange> {
    SlotRange::new(
        u16::try_from(range.first).ok()?,
        u16::try_from(range.last).ok()?,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::tests::shard;

    #[test]
    fn a_shard_survives_the_round_trip_in_each_mode() {
        let handover = Handover {
            task: "t".into(),
            target: "b".into(),
            token: "x".into(),
            deadline_unix_ms: 9,
            max_hold_ms: 1000,
        };
        let modes = [
            Mode::Provisioning,
            Mode::Serving,
            Mode::Handover(handover),
            Mode::Fenced("why".into()),
            Mode::FailingOver(Failover {
                task: "t".into(),
                target: Some("b".into()),
                proof: Some(FenceProof::Lease),
                since_unix_ms: 7,
            }),
        ];
        for mode in modes {
            let shard = Shard { mode, ..shard() };
            assert_eq!(shard_from(&shard_to(&shard)).unwrap(), shard);
        }
    }

    #[test]
    fn a_newer_or_damaged_record_is_refused() {
        let good = shard_to(&shard());
        let newer = store::ShardRecord {
            schema: SCHEMA + 1,
            ..good.clone()
        };
        assert!(matches!(shard_from(&newer), Err(WireError::Schema { .. })));
        let no_mode = store::ShardRecord {
            mode: None,
            ..good.clone()
        };
        assert!(matches!(
            shard_from(&no_mode),
            Err(WireError::Field { field: "mode", .. })
        ));
        let other = store::ShardRecord {
            primary_node_id: "b".into(),
            ..good
        };
        assert!(matches!(shard_from(&other), Err(WireError::Check(_))));
    }
}
