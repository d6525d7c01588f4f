//! Requests of operators at bad times: two at once, one that meets a failover, one that is repeated.
//!
//! Invariant: what a controller refuses here is no fault of the mesh; that one token made two tasks is.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Context as _;
use slotmesh_harness::signals;
use slotmesh_proto::{instance::v1::SwitchOverRequest, store::v1::NodeRole};
use tokio::task::JoinSet;

use super::super::mesh::{CONTROLLERS, Mesh};

/// Of one request, at each controller.
const REPEATS: usize = 3;
/// A switchover is done by then, or refused.
const SOON: Duration = Duration::from_millis(700);

/// What an operator may ask: a replica that is in sync shall be the primary of its shard. The other
/// one second, if there is one.
async fn targets(mesh: &Mesh, which: usize) -> anyhow::Result<Vec<SwitchOverRequest>> {
    let shards = mesh.shards().await?;
    let shard = &shards[which % shards.len()];
    let mut nodes = shard.nodes.iter().collect::<Vec<_>>();
    nodes.retain(|n| n.current_role() == NodeRole::Replica && n.in_sync);
    anyhow::ensure!(!nodes.is_empty(), "no replica is in sync");
    let request = |node: &&slotmesh_proto::instance::v1::Node| SwitchOverRequest {
        instance_id: mesh.instance.clone(),
        target_primary_node_id: node.node_id.clone(),
        ..SwitchOverRequest::default()
    };
    Ok(nodes.iter().map(request).collect())
}

/// A planned switchover.
///
/// # Errors
/// When it is refused.
pub(super) async fn switch(mesh: &Mesh, which: usize) -> anyhow::Result<()> {
    let request = targets(mesh, which).await?.remove(0);
    mesh.api().await?.switch_over(request).await?;
    Ok(())
}

/// A switchover whose primary dies in the middle of it.
///
/// # Errors
/// When the switchover is refused.
pub(super) async fn switch_and_kill(
    mesh: &Mesh,
    which: usize,
    after: Duration,
) -> anyhow::Result<()> {
    let (pid, _) = mesh.node(which, true).await?;
    switch(mesh, which).await?;
    tokio::time::sleep(after).await;
    signals::kill(pid)
}

/// A primary that dies, and a switchover that is asked for before anybody has noticed, or after.
///
/// # Errors
/// When the shards can't be seen.
pub(super) async fn kill_and_switch(
    mesh: &Mesh,
    which: usize,
    after: Duration,
) -> anyhow::Result<()> {
    let (pid, _) = mesh.node(which, true).await?;
    let request = targets(mesh, which).await?.remove(0);
    let mut api = mesh.api().await?;
    signals::kill(pid)?;
    tokio::time::sleep(after).await;
    // Refused, most likely: the shard has a task.
    let _ = api.switch_over(request).await;
    Ok(())
}

/// Two switchovers of one shard to two replicas, at two controllers at once.
///
/// # Errors
/// When there are no two replicas, or both are refused.
pub(super) async fn two_at_once(mesh: &Mesh, which: usize) -> anyhow::Result<()> {
    let requests = targets(mesh, which).await?;
    anyhow::ensure!(requests.len() > 1, "it has only one replica");
    let mut racing = JoinSet::new();
    for (index, request) in requests.into_iter().take(2).enumerate() {
        let place = CONTROLLERS[(which + index) % CONTROLLERS.len()];
        let mut api = mesh.api_at(place).await?;
        racing.spawn(async move { api.switch_over(request).await });
    }
    let mut words = Vec::new();
    while let Some(ended) = racing.join_next().await {
        match ended? {
            Ok(_) => words.clear(),
            Err(error) => words.push(error.to_string()),
        }
    }
    anyhow::ensure!(words.len() < 2, "both were refused: {words:?}");
    Ok(())
}

/// One switchover, asked for many times with the same token, at all controllers, and again later.
///
/// # Errors
/// When nobody takes it.
pub(super) async fn replay(mesh: &mut Mesh, which: usize) -> anyhow::Result<()> {
    let mut request = targets(mesh, which).await?.remove(0);
    request.client_token = uuid::Uuid::from_u128(rand::random()).to_string();
    let mut tasks = BTreeSet::new();
    for _ in 0..2 {
        let mut racing = JoinSet::new();
        for place in CONTROLLERS {
            for _ in 0..REPEATS {
                let mut api = mesh.api_at(place).await?;
                let request = request.clone();
                racing.spawn(async move { api.switch_over(request).await });
            }
        }
        while let Some(ended) = racing.join_next().await {
            // A refusal says that nothing was made, or that it is being made.
            if let Ok(task) = ended? {
                tasks.insert(task);
            }
        }
        tokio::time::sleep(SOON).await;
    }
    let first = tasks.first().context("nobody took it")?.clone();
    if tasks.len() > 1 {
        mesh.complain(format!(
            "one client token made several tasks: {tasks:?}, first {first}"
        ));
    }
    Ok(())
}
