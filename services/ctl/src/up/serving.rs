//! From running processes to an instance that serves: what is waited for, one thing after another.
//!
//! Each wait says what it waits for, so that the one deadline over all of them can name it.

use std::time::Duration;

use anyhow::anyhow;
use slotmesh_proto::{
    fleet::v1 as fleet,
    instance::v1::{self as instance, CreateInstanceRequest},
    store::v1::{InstanceState, NodeRole},
};
use slotmesh_topology::slot::Slot;
use tokio::time::{Instant, sleep};

use super::{
    Mesh,
    contract::{Contract, NodeEntry, Pids},
    control,
    layout::Shape,
};
use crate::{
    api::Api, failure::Failure, progress, redis::Client, render, views::architecture_value,
};

/// Processes of ours listen within a second on a machine that is not overloaded.
const BASE_TIMEOUT: Duration = Duration::from_secs(60);
/// Each node is a process that starts, and each replica a full sync.
const TIMEOUT_PER_NODE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(50);
/// A process that died this often before it listened will not come up by waiting.
const EARLY_DEATHS_MAX: u32 = 5;
/// Tries to find a key in a slot range: one in 16,384 keys is in a given slot.
const PROBE_KEYS_MAX: u32 = 1_000_000;

/// What is waited for now, and why it is not there yet.
#[derive(Debug, Default)]
struct Waiting {
    what: String,
    why: String,
}

/// Waits until the mesh's instance serves, creating it first if the mesh has none.
///
/// # Errors
/// Says what was waited for, and shows the log that should explain it.
pub(super) async fn bring_up(mesh: &mut Mesh) -> Result<Contract, Failure> {
    let shape = mesh.layout.file.shape.clone();
    let nodes = shape.shards * (shape.replicas + 1);
    let limit = BASE_TIMEOUT + TIMEOUT_PER_NODE * nodes;
    let mut waiting = Waiting::default();
    let result = tokio::time::timeout(limit, steps(mesh, &shape, &mut waiting)).await;
    match result {
        Ok(Ok(contract)) => Ok(contract),
        Ok(Err(failure)) => Err(failure),
        Err(_) => {
            let why = if waiting.why.is_empty() {
                "no answer"
            } else {
                &waiting.why
            };
            Err(Failure::Local(anyhow!(
                "waited {} s for {}: {why}\n{}",
                limit.as_secs(),
                waiting.what,
                mesh.telling_log()
            )))
        }
    }
}

async fn steps(mesh: &mut Mesh, shape: &Shape, waiting: &mut Waiting) -> Result<Contract, Failure> {
    let address = bound(mesh, waiting).await?;
    let mut api = connected(mesh, &address, waiting).await?;
    hosts(&mut api, shape.hosts(), waiting).await?;
    let id = find_or_create(mesh, &mut api, shape, waiting).await?;
    let contract = complete(mesh, &mut api, &id, shape, waiting).await?;
    for proxy in &contract.proxies {
        waiting.what = format!("proxy {proxy} to serve every shard");
        let shards = patiently(waiting, async || api.clone().describe_shards(&id).await).await?;
        while let Err(why) = probe(proxy, &shards).await {
            waiting.why = why;
            sleep(POLL).await;
        }
    }
    Ok(contract)
}

/// Waits until every process says that its sockets are bound; returns the controller's address.
async fn bound(mesh: &Mesh, waiting: &mut Waiting) -> Result<String, Failure> {
    let mut address = String::new();
    for child in mesh.children() {
        waiting.what = format!("the {} to listen", child.name());
        loop {
            if let Some(bound) = child.bound() {
                if child.name() == super::CONTROLLER {
                    address = bound.address;
                }
                break;
            }
            if child.status().deaths >= EARLY_DEATHS_MAX {
                return Err(Failure::Local(anyhow!(
                    "the {} dies whenever it is started\n{}",
                    child.name(),
                    child.log_tail()
                )));
            }
            sleep(POLL).await;
        }
    }
    Ok(address)
}

/// Waits for a controller that leads.
async fn connected(mesh: &Mesh, address: &str, waiting: &mut Waiting) -> Result<Api, Failure> {
    waiting.what = format!(
        "a leader at controller {address} (store {})",
        mesh.layout.file.shape.store
    );
    loop {
        let failure = match Api::connect(address).await {
            Ok(mut api) => {
                let request = fleet::GetLeaderRequest {};
                match api
                    .call(|api| async move { api.fleet().get_leader(request).await })
                    .await
                {
                    Ok(leader) if !leader.address.is_empty() => return Ok(api),
                    Ok(_) => "nobody leads yet".to_owned(),
                    Err(failure) => failure.to_string(),
                }
            }
            Err(failure) => failure.to_string(),
        };
        waiting.why = failure;
        sleep(POLL).await;
    }
}

async fn hosts(api: &mut Api, wanted: u32, waiting: &mut Waiting) -> Result<(), Failure> {
    waiting.what = format!("{wanted} agents to register");
    loop {
        let request = fleet::ListHostsRequest {};
        match api
            .call(|api| async move { api.fleet().list_hosts(request).await })
            .await
        {
            Ok(answer) if answer.hosts.len() >= wanted as usize => return Ok(()),
            Ok(answer) => waiting.why = format!("{} are there", answer.hosts.len()),
            Err(failure) => waiting.why = failure.to_string(),
        }
        sleep(POLL).await;
    }
}

/// The instance that this mesh serves: the one that is kept, else one that is there, else a new one.
async fn find_or_create(
    mesh: &mut Mesh,
    api: &mut Api,
    shape: &Shape,
    waiting: &mut Waiting,
) -> Result<String, Failure> {
    waiting.what = "the controller to say which instances there are".to_owned();
    let known = patiently(waiting, async || api.clone().describe_instances(&[]).await).await?;
    let file = &mesh.layout.file;
    let mut token = file.instance_token.clone();
    if let Some(kept) = &file.instance_id {
        if known.iter().any(|i| i.instance_id == *kept) {
            return Ok(kept.clone());
        }
        if let Some(other) = known.into_iter().next() {
            mesh.layout
                .keep_instance(token, Some(other.instance_id.clone()))?;
            return Ok(other.instance_id);
        }
        // It was deleted: its token still names the task that once created it.
        token = format!("up-{}", uuid::Uuid::now_v7());
        mesh.layout.keep_instance(token.clone(), None)?;
    }
    waiting.what = "the controller to admit the instance".to_owned();
    let request = create_request(shape, token.clone());
    let create = async || {
        let rpc = |api: Api| {
            let request = request.clone();
            async move { api.instances().create_instance(request).await }
        };
        api.clone().call(rpc).await
    };
    let answer = patiently(waiting, create).await?;
    mesh.layout
        .keep_instance(token, Some(answer.instance_id.clone()))?;
    provisioned(api, &answer.task_id, waiting).await?;
    Ok(answer.instance_id)
}

/// Asks until there is an answer; only a refusal ends the asking.
async fn patiently<T, F>(waiting: &mut Waiting, ask: F) -> Result<T, Failure>
where
    F: AsyncFn() -> Result<T, Failure>,
{
    loop {
        match ask().await {
            Err(Failure::Failed { message, .. }) => waiting.why = message,
            Err(failure @ Failure::Unreachable { .. }) => waiting.why = failure.to_string(),
            answered => return answered,
        }
        sleep(POLL).await;
    }
}

fn create_request(shape: &Shape, client_token: String) -> CreateInstanceRequest {
    CreateInstanceRequest {
        architecture: architecture_value(&shape.architecture).map_or(0, i32::from),
        shard_count: shape.shards,
        replicas_per_shard: Some(shape.replicas),
        proxy_count: Some(shape.proxies),
        workers_per_proxy: shape.workers,
        client_token,
        parameters: shape.parameters.clone().into_iter().collect(),
        ..CreateInstanceRequest::default()
    }
}

async fn provisioned(api: &mut Api, task_id: &str, waiting: &mut Waiting) -> Result<(), Failure> {
    waiting.what = format!("task {task_id}, which provisions the instance");
    let mut told = String::new();
    loop {
        match api.task(task_id).await {
            Ok(task) if progress::has_ended(task.state()) => return progress::require_done(&task),
            Ok(task) => {
                waiting.why = task.message;
                if waiting.why != told && !waiting.why.is_empty() {
                    told.clone_from(&waiting.why);
                    render::note(&format!("provisioning, waiting for {told}"));
                }
            }
            Err(failure @ Failure::Refused { .. }) => return Err(failure),
            Err(failure) => waiting.why = failure.to_string(),
        }
        sleep(POLL).await;
    }
}

/// Waits until the API says that everything of the instance runs, and describes it.
async fn complete(
    mesh: &Mesh,
    api: &mut Api,
    id: &str,
    shape: &Shape,
    waiting: &mut Waiting,
) -> Result<Contract, Failure> {
    waiting.what = format!("every node and proxy of {id} to run");
    loop {
        match describe(mesh, api, id).await {
            Ok((contract, missing)) if missing.is_empty() => return Ok(contract),
            Ok((_, missing)) => waiting.why = missing.join("; "),
            Err(failure) => waiting.why = failure.to_string(),
        }
        debug_assert!(
            shape.proxies > 0,
            "a mesh without proxies would never be complete"
        );
        sleep(POLL).await;
    }
}

/// The instance as the API shows it now, and what is missing before it serves.
pub(super) async fn describe(
    mesh: &Mesh,
    api: &mut Api,
    id: &str,
) -> Result<(Contract, Vec<String>), Failure> {
    let found = api.describe_instances(&[id.to_owned()]).await?;
    let Some(instance) = found.into_iter().next() else {
        return Err(Failure::Local(anyhow!("instance {id} is gone")));
    };
    let mut missing = Vec::new();
    if instance.state() != InstanceState::Running {
        missing.push(format!(
            "the instance is {}",
            instance.state().as_str_name()
        ));
    }
    for proxy in instance
        .proxies
        .iter()
        .filter(|p| p.address.is_empty() || p.pid == 0)
    {
        missing.push(format!("proxy {} has not reported", proxy.proxy_id));
    }
    let mut nodes = Vec::new();
    for shard in api.describe_shards(id).await? {
        missing.extend(shard_lacks(&shard));
        nodes.extend(
            shard
                .nodes
                .iter()
                .map(|n| NodeEntry::new(&shard.shard_id, n)),
        );
    }
    let agents = mesh.agents().filter_map(|a| a.status().pid).collect();
    let controllers: Vec<u32> = (mesh.controllers())
        .map(|c| c.status().pid.unwrap_or_default())
        .collect();
    let contract = Contract {
        controller: control::addresses(&mesh.layout).swap_remove(0),
        controllers: control::addresses(&mesh.layout),
        proxies: instance.proxies.iter().map(|p| p.address.clone()).collect(),
        instance: id.to_owned(),
        pids: Pids {
            controller: controllers.first().copied().unwrap_or_default(),
            controllers,
            agents,
            proxies: instance.proxies.iter().map(|p| p.pid).collect(),
        },
        nodes,
    };
    Ok((contract, missing))
}

fn shard_lacks(shard: &instance::Shard) -> Vec<String> {
    let mut missing = Vec::new();
    let id = &shard.shard_id;
    if shard.mode != "Serving" {
        missing.push(format!("shard {id} is {}", shard.mode));
    }
    if !shard
        .nodes
        .iter()
        .any(|n| n.current_role() == NodeRole::Primary)
    {
        missing.push(format!("shard {id} has no primary"));
    }
    for node in &shard.nodes {
        if node.state != "Running" || node.pid == 0 {
            missing.push(format!("node {} is {}", node.node_id, node.state));
        } else if node.current_role() == NodeRole::Replica && !node.in_sync {
            missing.push(format!("replica {} is not in sync", node.node_id));
        }
    }
    missing
}

/// Asks a proxy for a key of every shard: only a primary with the right credential answers.
async fn probe(proxy: &str, shards: &[instance::Shard]) -> Result<(), String> {
    let mut client = Client::connect(proxy)
        .await
        .map_err(|error| error.to_string())?;
    for shard in shards {
        let Some(key) = key_in(shard) else {
            continue;
        };
        match client.call(&[b"EXISTS", key.as_bytes()]).await {
            Ok(value) if value.as_int().is_some() => {}
            Ok(value) => {
                let text = value.as_error().unwrap_or("an unexpected reply");
                return Err(format!("shard {}: {text}", shard.shard_id));
            }
            Err(error) => return Err(format!("shard {}: {error}", shard.shard_id)),
        }
    }
    Ok(())
}

fn key_in(shard: &instance::Shard) -> Option<String> {
    let keys = (0..PROBE_KEYS_MAX).map(|n| format!("slotmesh-probe-{n}"));
    let mut found = keys.filter(|key| {
        let slot = u32::from(Slot::of(key.as_bytes()).number());
        shard
            .slots
            .iter()
            .any(|range| (range.first..=range.last).contains(&slot))
    });
    if shard.slots.is_empty() {
        None
    } else {
        found.next()
    }
}

/// The address and pids that the API shows last, to see afterwards that nothing is left.
pub(super) async fn last_known(mesh: &Mesh, deadline: Instant) -> Option<Contract> {
    let address = mesh.controllers().find_map(|c| c.bound())?.address;
    let id = mesh.layout.file.instance_id.clone()?;
    let look = async {
        let mut api = Api::connect(&address).await.ok()?;
        describe(mesh, &mut api, &id)
            .await
            .ok()
            .map(|(contract, _)| contract)
    };
    tokio::time::timeout_at(deadline, look).await.ok().flatten()
}

#[cfg(test)]
mod tests {
    use slotmesh_proto::topology::v1::SlotRange;

    use super::*;

    #[test]
    fn a_probe_key_lies_in_its_shard() {
        let shard = |first, last| instance::Shard {
            slots: vec![SlotRange { first, last }],
            ..Default::default()
        };
        for (first, last) in [(0, 8191), (8192, 16383), (5, 5)] {
            let key = key_in(&shard(first, last)).unwrap();
            let slot = u32::from(Slot::of(key.as_bytes()).number());
            assert!((first..=last).contains(&slot), "{key} is in {slot}");
        }
        assert_eq!(key_in(&instance::Shard::default()), None);
    }

    #[test]
    fn what_a_shard_lacks_is_named() {
        let node = |id: &str, role: NodeRole, in_sync| instance::Node {
            node_id: id.into(),
            current_role: role.into(),
            state: "Running".into(),
            pid: 7,
            in_sync,
            ..Default::default()
        };
        let mut shard = instance::Shard {
            shard_id: "s-0".into(),
            mode: "Serving".into(),
            nodes: vec![
                node("n-1", NodeRole::Primary, true),
                node("n-2", NodeRole::Replica, true),
            ],
            ..Default::default()
        };
        assert_eq!(shard_lacks(&shard), Vec::<String>::new());
        shard.nodes[1].in_sync = false;
        assert_eq!(shard_lacks(&shard), ["replica n-2 is not in sync"]);
        shard.mode = "Handover".into();
        assert_eq!(shard_lacks(&shard)[0], "shard s-0 is Handover");
    }
}
