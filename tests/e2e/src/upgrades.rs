//! What tests of upgrades of engines share: meshes at a version, listed engines, the task, and what
//! every node runs in the end.

use std::{fs, time::Duration};

use anyhow::{Context, ensure};
use slotmesh_harness::{Mesh, MeshOptions, engines, wait_until};
use slotmesh_proto::{
    instance::v1::{ModifyInstanceMinorVersionRequest, Node},
    store::v1::{NodeRole, TaskState},
    task::v1::Task,
};
use tempfile::TempDir;

use crate::{connect, ctl, json};

/// Engines are tried, processes exchanged one by one, and the machine may do much else meanwhile.
pub const LIMIT: Duration = Duration::from_secs(240);
/// So many in each mesh before, so that a copy in full is not nothing.
const KEYS: u32 = 2_000;

/// Lists an engine of the repository in the mesh's catalogue, and says under which name.
///
/// # Errors
/// With what the ctl said.
pub async fn list(
    mesh: &Mesh,
    product: &str,
    version: &str,
    engine: &str,
) -> anyhow::Result<String> {
    let file = engines::find(engine)?.display().to_string();
    let words = ["artifact", "add", product, version, "--file", &file];
    let output = ctl(mesh, &words).await?;
    ensure!(output.status.success(), "{output:?}");
    Ok(format!("{product}-{version}"))
}

/// Lists a Redis that says its version and does not run; its program lives as long as what is returned.
///
/// # Errors
/// When it can't be written or listed.
pub async fn list_broken(mesh: &Mesh, version: &str) -> anyhow::Result<TempDir> {
    let own = tempfile::tempdir()?;
    let program = own.path().join("program");
    let says = format!("Redis server v={version} sha=00000000:0 malloc=libc bits=64");
    let text = format!(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo '{says}'; exit; fi\n\
         echo 'Illegal instruction' >&2\nexit 132\n"
    );
    fs::write(&program, text)?;
    let file = program.display().to_string();
    let words = ["artifact", "add", "redis", version, "--file", &file];
    let output = ctl(mesh, &words).await?;
    ensure!(output.status.success(), "{output:?}");
    Ok(own)
}

/// The nodes as the API shows them.
///
/// # Errors
/// When the controller does not answer.
pub async fn nodes(mesh: &Mesh) -> anyhow::Result<Vec<Node>> {
    let shards = mesh.api().await?.describe_shards(mesh.instance()).await?;
    Ok(shards.into_iter().flat_map(|s| s.nodes).collect())
}

/// Waits until there are so many nodes, and every one is a primary or in sync.
///
/// # Errors
/// When that is not so in time.
pub async fn in_sync(mesh: &Mesh, nodes_wanted: usize) -> anyhow::Result<()> {
    wait_until(LIMIT, "every node to be in sync", async || {
        let nodes = nodes(mesh).await?;
        let ready = nodes
            .iter()
            .filter(|n| n.in_sync || n.current_role() == NodeRole::Primary);
        ensure!(
            nodes.len() == nodes_wanted && ready.count() == nodes_wanted,
            "{nodes:?}"
        );
        anyhow::Ok(())
    })
    .await
}

/// Writes some keys.
///
/// # Errors
/// When a client of the first proxy sees one.
pub async fn fill(mesh: &Mesh) -> anyhow::Result<()> {
    let mut connection = connect(&mesh.contract.proxies[0], false).await?;
    for first in (0..KEYS).step_by(500) {
        let mut pipe = redis::pipe();
        for n in first..first + 500 {
            pipe.cmd("SET").arg(format!("k{n}")).arg(n).ignore();
        }
        pipe.query_async::<()>(&mut connection).await?;
    }
    Ok(())
}

/// A mesh whose nodes run this engine and are all in sync, and how many they are.
///
/// # Errors
/// When it does not start.
pub async fn mesh_of(
    architecture: &str,
    shards: u32,
    engine: &str,
) -> anyhow::Result<(Mesh, usize)> {
    mesh_with(MeshOptions {
        architecture: Some(architecture.into()),
        shards: (shards > 1).then_some(shards),
        engine: Some(engine.into()),
        ..MeshOptions::default()
    })
    .await
}

/// As [`mesh_of`], with any options.
///
/// # Errors
/// When it does not start.
pub async fn mesh_with(options: MeshOptions) -> anyhow::Result<(Mesh, usize)> {
    let mesh = Mesh::start(&options).await?;
    let nodes = nodes(&mesh).await?.len();
    in_sync(&mesh, nodes).await?;
    Ok((mesh, nodes))
}

/// Begins an upgrade to a listed engine, and gives its task's id.
///
/// # Errors
/// When it is refused.
pub async fn begin(
    mesh: &Mesh,
    engine: &str,
    more: ModifyInstanceMinorVersionRequest,
) -> anyhow::Result<String> {
    let request = ModifyInstanceMinorVersionRequest {
        instance_id: mesh.instance().to_owned(),
        minor_version: engine.to_owned(),
        client_token: format!("to-{engine}"),
        ..more
    };
    let mut api = mesh.api().await?.instances();
    let answer = api.modify_instance_minor_version(request).await?;
    Ok(answer.into_inner().task_id)
}

/// An upgrade whose shards bake for so long.
#[must_use]
pub fn bake(seconds: u32) -> ModifyInstanceMinorVersionRequest {
    ModifyInstanceMinorVersionRequest {
        bake_seconds: Some(seconds),
        ..ModifyInstanceMinorVersionRequest::default()
    }
}

/// Waits until the claim is true of the task.
///
/// # Errors
/// When it is not in time; says what the task was then.
pub async fn until(
    mesh: &Mesh,
    task: &str,
    what: &str,
    claim: impl Fn(&Task) -> bool,
) -> anyhow::Result<Task> {
    wait_until(LIMIT, what, async || {
        let task = mesh.api().await?.task(task).await?;
        ensure!(claim(&task), "{task:#?}");
        anyhow::Ok(task)
    })
    .await
}

/// It has ended, as it should.
#[must_use]
pub fn is_done(task: &Task) -> bool {
    task.state() == TaskState::Done
}

/// Says something to the task, with `slotmesh task`: `resolve TASK finalize`, `cancel TASK`.
///
/// # Errors
/// When it is refused.
pub async fn say(mesh: &Mesh, words: &[&str]) -> anyhow::Result<()> {
    let output = ctl(mesh, &[&["task"], words].concat()).await?;
    ensure!(output.status.success(), "{words:?}: {output:?}");
    Ok(())
}

/// The instance's version, as the ctl shows it.
///
/// # Errors
/// With what the ctl said.
pub async fn version(mesh: &Mesh) -> anyhow::Result<String> {
    let words = ["--output", "json", "version", mesh.instance()];
    let versions = json(&ctl(mesh, &words).await?)?;
    let version = versions["minor_version"].as_str();
    version.map(str::to_owned).context("no version is shown")
}

/// Every node runs the version, and none has copied in full since there were so many copies.
///
/// # Errors
/// Says which does not, or how many have copied.
pub async fn runs(
    mesh: &Mesh,
    number: &str,
    nodes_wanted: usize,
    copies: usize,
) -> anyhow::Result<()> {
    in_sync(mesh, nodes_wanted).await?;
    let now = mesh.full_copies();
    ensure!(now == copies, "{now} copies in full, before {copies}");
    let shown = version(mesh).await?;
    ensure!(shown == number, "the instance is at {shown}, not {number}");
    for node in nodes(mesh).await? {
        ensure!(node.engine_version.ends_with(number), "{node:?}");
    }
    Ok(())
}
