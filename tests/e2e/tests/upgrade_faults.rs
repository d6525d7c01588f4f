//! Controllers that lead die in the middle of an upgrade: the next one goes on from the records, the
//! nodes' roles are in the end what they were, and nobody notices.

#![allow(clippy::unwrap_used)]

use slotmesh_e2e::{
    controllers::{LIMIT, beside, leader, leader_after, sees_all_nodes},
    load::Load,
    roles,
    upgrades::{bake, begin, fill, is_done, list, mesh_with, runs, until},
};
use slotmesh_harness::{EtcdCluster, MeshOptions, signals};
use slotmesh_proto::{instance::v1::ModifyInstanceMinorVersionRequest, task::v1::Task};

/// Not over before the controller that saw it begin is dead: the next one ends it.
const BAKE_SECONDS: u32 = 3;

fn is_in<'a>(phase: &'a str) -> impl Fn(&Task) -> bool + 'a {
    move |task| task.shards.iter().any(|s| s.phase == phase)
}

#[tokio::test]
async fn leaders_that_die_among_the_replicas_and_in_the_bake_are_followed_by_others_and_roles_are_kept()
 {
    let etcd = EtcdCluster::start(1).await.unwrap();
    let options = MeshOptions {
        store: Some(etcd.store()),
        engine: Some("redis-7.0".into()),
        ..MeshOptions::default()
    };
    let (mut mesh, count) = mesh_with(options).await.unwrap();
    let mut others = beside(&mesh, &etcd.store(), 2).await.unwrap();
    for other in &others {
        sees_all_nodes(&mesh, &other.address).await.unwrap();
    }
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(&mesh).await.unwrap();
    let before = roles(&mesh).await.unwrap();
    let copies = mesh.full_copies();
    let first = leader(&mesh.contract.controller).await.unwrap();
    assert_eq!(first.address, mesh.contract.controller);
    let load = Load::start(&mesh).await.unwrap();
    let options = ModifyInstanceMinorVersionRequest {
        preserve_roles: true,
        ..bake(BAKE_SECONDS)
    };
    let task = begin(&mesh, &name, options).await.unwrap();

    until(&mesh, &task, "Replicas", is_in("Replicas"))
        .await
        .unwrap();
    // `up` is frozen, so that the first controller stays dead.
    signals::freeze(mesh.up_pid().unwrap()).unwrap();
    signals::kill_blocking(mesh.contract.pids.controller, LIMIT);
    let second = leader_after(&others[0].address, first.term).await.unwrap();
    mesh.contract.controller = second.address.clone();

    until(&mesh, &task, "Bake", is_in("Bake")).await.unwrap();
    let now = roles(&mesh).await.unwrap();
    assert_ne!(now[0].1, before[0].1, "it has switched");
    let leads = others.iter().position(|c| c.address == second.address);
    others.remove(leads.unwrap()).kill().await.unwrap();
    let third = leader_after(&others[0].address, second.term).await.unwrap();
    assert_eq!(third.address, others[0].address);
    mesh.contract.controller = third.address;

    until(&mesh, &task, "the upgrade to be done", is_done)
        .await
        .unwrap();
    signals::thaw(mesh.up_pid().unwrap()).unwrap();
    load.audit().await.unwrap();
    runs(&mesh, "8.2.3", count, copies).await.unwrap();
    assert_eq!(roles(&mesh).await.unwrap(), before, "the roles are kept");
    mesh.stop().await.unwrap();
}
