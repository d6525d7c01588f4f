//! What an agent is told of a node: which process it should be, and which credentials it must
//! have. Derived from the shard's record alone, so every controller derives the same.

use slotmesh_proto::agent::v1 as pb;

use crate::{
    credential,
    id::{Epoch, NodeId},
    instance::{Instance, InstanceState, Placement},
    shard::{Exchange, Member, Mode, NodeRole, Shard},
    wire,
};

/// The specification of one member of a shard.
#[must_use]
pub fn node(instance: &Instance, shard: &Shard, member: &Member) -> pb::NodeSpec {
    let fenced = matches!(shard.mode, Mode::Fenced(_));
    // The epoch that has begun is nobody's yet: nobody serves, nobody is followed.
    let leaves = member.leaving && member.node != shard.primary;
    let detached = shard.failover().is_some() || leaves;
    let is_primary = member.node == shard.primary && !detached;
    let serving = shard.epoch > Epoch(0) && !fenced;
    let master = if detached {
        credential::Credential::default()
    } else {
        credential::replica(&instance.secret, &shard.id, shard.epoch, &member.node)
    };
    let observer = credential::observer(&instance.secret, &shard.id);
    let exchange = exchange(shard, member);
    pb::NodeSpec {
        node_id: member.node.to_string(),
        instance_id: instance.id.to_string(),
        shard_id: shard.id.to_string(),
        desired: desired(instance).into(),
        engine: engine(instance, member).to_owned(),
        databases: instance.databases,
        parameters: instance.parameters.clone().into_iter().collect(),
        epoch: shard.epoch.0,
        run_id: member.run_id.clone(),
        role: wire::node_role_to(if detached && member.role == NodeRole::Primary {
            NodeRole::Replica
        } else {
            member.role
        })
        .into(),
        frozen: shard.handover().is_some(),
        detached,
        replica_agents: Vec::new(),
        primary_node_id: shard.primary.to_string(),
        primary_address: if is_primary || detached {
            String::new()
        } else {
            shard
                .primary_member()
                .map(|m| m.address.clone())
                .unwrap_or_default()
        },
        // A fenced shard has no valid credential at all.
        closed_epoch: if fenced {
            shard.epoch.0
        } else {
            shard.closed_epoch.0
        },
        users: if is_primary && serving {
            primary_users(instance, shard)
        } else {
            Vec::new()
        },
        master_user: master.user,
        master_password: master.password,
        observer_user: observer.user,
        observer_password: observer.password,
        parameters_version: instance.parameters_version,
        previous_replid: wire::newest_replid(shard),
        previous_offset: wire::newest_offset(shard),
        departures: wire::departures_to(shard),
        membership: shard.roster.membership,
        may_exchange: exchange.is_some(),
        discard_data: exchange == Some(Exchange::Discard),
        may_recopy: is_spare(shard, member),
    }
}

/// The specification of one proxy of an instance.
#[must_use]
pub fn proxy(instance: &Instance, placement: &Placement) -> pb::ProxySpec {
    pb::ProxySpec {
        proxy_id: placement.proxy.to_string(),
        instance_id: instance.id.to_string(),
        desired: desired(instance).into(),
        workers: match placement.workers {
            0 => instance.workers_per_proxy,
            workers => workers,
        },
        program: placement.program.clone(),
        generation: placement.generation,
        port: placement.port.into(),
        cold: placement.cold,
    }
}

/// The specification of a proxy that is not of its instance any more: its process is stopped, its
/// directory removed.
#[must_use]
pub fn gone_proxy(instance: &Instance, placement: &Placement) -> pb::ProxySpec {
    pb::ProxySpec {
        desired: pb::Desired::Removed.into(),
        ..proxy(instance, placement)
    }
}

fn desired(instance: &Instance) -> pb::Desired {
    match instance.state {
        InstanceState::Deleting => pb::Desired::Removed,
        InstanceState::Creating | InstanceState::Running => pb::Desired::Running,
    }
}

/// The engine that a member should run.
#[must_use]
pub fn engine<'a>(instance: &'a Instance, member: &'a Member) -> &'a str {
    match member.engine.as_str() {
        "" => &instance.engine,
        engine => engine,
    }
}

/// Whether its agent may end the member's process for one of another engine.
fn exchange(shard: &Shard, member: &Member) -> Option<Exchange> {
    member.exchange.filter(|_| is_spare(shard, member))
}

/// The member takes no writes, and nobody counts on what it has confirmed.
fn is_spare(shard: &Shard, member: &Member) -> bool {
    shard.mode == Mode::Serving
        && shard.epoch > Epoch(0)
        && member.node != shard.primary
        && !member.in_sync
        && !member.leaving
}

/// The specification of a node that has left the shard: its process is stopped and its data removed.
#[must_use]
pub fn gone(instance: &Instance, shard: &Shard, node: &NodeId) -> pb::NodeSpec {
    pb::NodeSpec {
        node_id: node.to_string(),
        instance_id: instance.id.to_string(),
        shard_id: shard.id.to_string(),
        desired: pb::Desired::Removed.into(),
        epoch: shard.epoch.0,
        closed_epoch: shard.epoch.0,
        role: wire::node_role_to(NodeRole::Replica).into(),
        detached: true,
        previous_replid: wire::newest_replid(shard),
        previous_offset: wire::newest_offset(shard),
        departures: wire::departures_to(shard),
        ..pb::NodeSpec::default()
    }
}

/// Users that the primary of the shard's epoch must have.
fn primary_users(instance: &Instance, shard: &Shard) -> Vec<pb::EpochUser> {
    let proxy = credential::proxy(&instance.secret, &shard.id, shard.epoch);
    let mut users = vec![user(proxy, shard.epoch, false)];
    users.extend(replication_users(
        instance,
        shard,
        shard.epoch,
        shard.primary.as_str(),
    ));
    users
}

/// Users as which every node but `primary` follows it at `epoch`; made ahead of the epoch on the
/// next primary.
#[must_use]
pub fn replication_users(
    instance: &Instance,
    shard: &Shard,
    epoch: Epoch,
    primary: &str,
) -> Vec<pb::EpochUser> {
    shard
        .members
        .iter()
        .filter(|m| m.node.as_str() != primary && !m.leaving)
        .map(|m| {
            let replica = credential::replica(&instance.secret, &shard.id, epoch, &m.node);
            user(replica, epoch, true)
        })
        .collect()
}

fn user(credential: credential::Credential, epoch: Epoch, replication: bool) -> pb::EpochUser {
    pb::EpochUser {
        name: credential.user,
        password: credential.password,
        epoch: epoch.0,
        replication,
    }
}

/// True for a node that takes the epoch's writes once it has converged.
#[must_use]
pub fn is_primary(spec: &pb::NodeSpec) -> bool {
    wire::node_role_from(spec.role()) == Some(NodeRole::Primary)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{instance::Architecture, shard::Handover, shard::tests::shard};

    fn instance() -> Instance {
        Instance {
            id: "r-1".into(),
            name: "r-1".into(),
            architecture: Architecture::Standard,
            shard_count: 1,
            replicas_per_shard: 2,
            databases: 256,
            engine: String::new(),
            secret: vec![1; 32],
            password_sha256: Vec::new(),
            state: InstanceState::Running,
            proxies: Vec::new(),
            gone_proxies: Vec::new(),
            workers_per_proxy: 1,
            created_unix_ms: 0,
            parameters: Default::default(),
            parameters_version: 0,
            proxy_parameters: Default::default(),
            accounts: Vec::new(),
            durability: 0,
            maintenance_window: String::new(),
            auto_upgrade: None,
            held_back: None,
            replace_after_s: crate::instance::REPLACE_AFTER_S,
        }
    }

    fn names(spec: &pb::NodeSpec) -> Vec<&str> {
        spec.users.iter().map(|u| u.name.as_str()).collect()
    }

    #[test]
    fn only_the_primary_of_the_epoch_has_users() {
        let shard = shard();
        let specs: Vec<_> = shard
            .members
            .iter()
            .map(|m| node(&instance(), &shard, m))
            .collect();
        assert_eq!(names(&specs[0]), ["px-4", "rp-4-b", "rp-4-c"]);
        assert!(specs[1].users.is_empty() && specs[2].users.is_empty());
        assert_eq!(specs[1].master_user, "rp-4-b");
        assert_eq!(specs[1].master_password, specs[0].users[1].password);
        assert!(specs[0].primary_address.is_empty() && !specs[1].primary_address.is_empty());
    }

    #[test]
    fn a_handover_freezes_and_a_fence_takes_every_credential() {
        let handover = Handover {
            task: "t".into(),
            target: "b".into(),
            token: "x".into(),
            deadline_unix_ms: 0,
            max_hold_ms: 1000,
        };
        let declared = shard().declare(handover).unwrap();
        assert!(
            declared
                .members
                .iter()
                .all(|m| node(&instance(), &declared, m).frozen)
        );
        let fenced = Shard {
            mode: Mode::Fenced("test".into()),
            ..shard()
        };
        let spec = node(&instance(), &fenced, &fenced.members[0]);
        assert!(spec.users.is_empty());
        assert_eq!(spec.closed_epoch, 4);
    }

    #[test]
    fn in_a_failover_nobody_has_the_epoch_and_nobody_is_followed() {
        let lost = shard().fail_over(&"t".into(), 0).unwrap();
        for member in &lost.members {
            let spec = node(&instance(), &lost, member);
            assert!(spec.detached && spec.users.is_empty());
            assert_eq!((spec.epoch, spec.closed_epoch), (5, 4));
            assert!(spec.primary_address.is_empty() && spec.master_user.is_empty());
            assert!(!is_primary(&spec));
        }
    }

    #[test]
    fn only_a_replica_that_is_not_in_sync_may_be_exchanged_and_only_while_its_shard_serves() {
        let specs = |shard: &Shard| -> Vec<_> {
            let specs = shard.members.iter().map(|m| node(&instance(), shard, m));
            specs
                .map(|s| (s.engine, s.may_exchange, s.discard_data))
                .collect()
        };
        let next = shard()
            .exchange(&"b".into(), "redis-8.2.3", Exchange::Keep)
            .unwrap();
        let new = "redis-8.2.3".to_owned();
        assert_eq!(specs(&next)[1], (new.clone(), true, false));
        assert_eq!(specs(&next)[0], (String::new(), false, false));
        let mut in_sync = next.clone();
        in_sync.members[1].in_sync = true;
        assert!(!specs(&in_sync)[1].1, "it is counted on");
        let lost = next.fail_over(&"t".into(), 0).unwrap();
        assert!(!specs(&lost)[1].1, "it may be needed");
        let discarded = shard()
            .exchange(&"b".into(), "redis-8.2.3", Exchange::Discard)
            .unwrap();
        assert_eq!(specs(&discarded)[1], (new, true, true));
    }

    #[test]
    fn only_a_replica_that_nobody_counts_on_may_lose_what_it_can_not_load() {
        let may = |shard: &Shard| -> Vec<bool> {
            let specs = shard.members.iter().map(|m| node(&instance(), shard, m));
            specs.map(|s| s.may_recopy).collect()
        };
        let mut spare = shard();
        for member in &mut spare.members {
            member.in_sync = false;
        }
        assert_eq!(may(&spare)[..2], [false, true], "the primary never");
        let mut in_sync = spare.clone();
        in_sync.members[1].in_sync = true;
        assert!(!may(&in_sync)[1], "it is counted on");
        let lost = spare.fail_over(&"t".into(), 0).unwrap();
        assert!(!may(&lost).contains(&true), "it may be needed");
        let mut fenced = spare.clone();
        fenced.mode = Mode::Fenced("why".to_owned());
        assert!(!may(&fenced).contains(&true), "nobody serves");
    }

    #[test]
    fn users_made_ahead_are_those_that_the_next_epoch_asks_for() {
        let handover = Handover {
            task: "t".into(),
            target: "b".into(),
            token: "x".into(),
            deadline_unix_ms: 0,
            max_hold_ms: 1000,
        };
        let ahead = replication_users(&instance(), &shard(), Epoch(5), "b");
        let committed = shard()
            .declare(handover)
            .unwrap()
            .commit(Epoch(4), "x")
            .unwrap();
        let spec = node(&instance(), &committed, &committed.members[1]);
        assert_eq!(&spec.users[1..], &ahead[..]);
    }
}
