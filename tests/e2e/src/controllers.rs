//! More controllers than the one that `up` starts: started, killed, frozen, and asked who leads.
//!
//! Invariant: what a value of this module started is gone when it is dropped.

use std::{fs::File, path::PathBuf, process::Stdio, time::Duration};

use anyhow::Context;
use slotmesh_ctl::api::Api;
use slotmesh_harness::{Mesh, programs, signals, wait_until};
use slotmesh_proto::{
    fleet::v1::{GetLeaderRequest, GetLeaderResponse},
    store::v1::NodeRole,
};
use tokio::{
    process::{Child, Command},
    time::sleep,
};

use crate::{Witnesses, finish, json_file};

/// The leader's lease is 5 s; then everybody has to find the new one.
pub const LIMIT: Duration = Duration::from_secs(45);

/// Long enough for a new client to meet what is missing.
const NEWCOMERS: Duration = Duration::from_millis(500);

/// Kills the controller of `up` and keeps it dead for so long: `up` is frozen, which would start
/// another one. Clients that come at the end of it are served as well.
///
/// # Errors
/// When a client noticed, or a process could not be told.
pub async fn without_controller(mesh: &Mesh, lasts: Duration) -> anyhow::Result<()> {
    let up = mesh.up_pid()?;
    signals::freeze(up)?;
    signals::kill(mesh.contract.pids.controller)?;
    sleep(lasts).await;
    let late = Witnesses::start(&mesh.contract.proxies, 1).await?;
    sleep(NEWCOMERS).await;
    late.testify().await?;
    signals::thaw(up)?;
    Ok(())
}

/// One controller, started by a test.
#[derive(Debug)]
pub struct Controller {
    pub id: String,
    pub address: String,
    pub pid: u32,
    dir: PathBuf,
    process: Child,
}

impl Controller {
    /// Starts one on a store, with more flags if needed, and waits until it listens.
    ///
    /// # Errors
    /// When it does not.
    pub async fn start(
        dir: PathBuf,
        id: &str,
        store: &str,
        flags: &[String],
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        let mut process = Self::command(&dir, id, store, flags)?.spawn()?;
        let pid = process.id().context("pid of a controller")?;
        let bound = wait_until(LIMIT, "a controller to listen", async || {
            if let Some(exit) = process.try_wait()? {
                let said = std::fs::read_to_string(dir.join("controller.log"));
                anyhow::bail!("it ended, {exit}: {}", said.unwrap_or_default());
            }
            let file = json_file(&dir.join("controller.json"))?;
            anyhow::ensure!(file["pid"].as_u64() == Some(pid.into()), "not its file yet");
            let address = file["address"].as_str().unwrap_or_default().to_owned();
            Api::connect(&address).await?;
            Ok(address)
        });
        let address = bound.await?;
        Ok(Self {
            id: id.to_owned(),
            address,
            pid,
            dir,
            process,
        })
    }

    /// The command that starts one, logging to `controller.log` in its directory.
    ///
    /// # Errors
    /// When the program can't be built.
    pub fn command(
        dir: &std::path::Path,
        id: &str,
        store: &str,
        flags: &[String],
    ) -> anyhow::Result<Command> {
        let log = File::create(dir.join("controller.log"))?;
        let mut command = Command::new(programs::path("slotmesh-controller")?);
        command
            .args(["--id", id, "--listen", "127.0.0.1:0", "--store", store])
            .arg("--data")
            .arg(dir)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true);
        Ok(command)
    }

    /// Everything that it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("controller.log")).unwrap_or_default()
    }

    /// Kills it and waits for its end.
    ///
    /// # Errors
    /// When it can't be killed.
    pub async fn kill(mut self) -> anyhow::Result<()> {
        Ok(self.process.kill().await?)
    }

    /// SIGSTOP.
    ///
    /// # Errors
    /// When it is gone.
    pub fn freeze(&self) -> anyhow::Result<()> {
        signals::freeze(self.pid)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// When it is gone.
    pub fn thaw(&self) -> anyhow::Result<()> {
        signals::thaw(self.pid)
    }
}

/// Starts controllers beside the mesh's own: ids `c2`, `c3`, …
///
/// # Errors
/// When one does not start.
pub async fn beside(mesh: &Mesh, store: &str, count: usize) -> anyhow::Result<Vec<Controller>> {
    let mut all = Vec::new();
    for number in 2..2 + count {
        let dir = mesh.data().join(format!("controller-{number}"));
        all.push(Controller::start(dir, &format!("c{number}"), store, &[]).await?);
    }
    Ok(all)
}

/// Who leads, as a controller knows it.
///
/// # Errors
/// When it does not answer.
pub async fn leader(address: &str) -> anyhow::Result<GetLeaderResponse> {
    let mut api = Api::connect(address).await?;
    let ask = |api: Api| async move { api.fleet().get_leader(GetLeaderRequest {}).await };
    Ok(api.call(ask).await?)
}

/// Waits until a controller knows a leader of a higher term than this.
///
/// # Errors
/// When there is none in time.
pub async fn leader_after(address: &str, term: u64) -> anyhow::Result<GetLeaderResponse> {
    wait_until(LIMIT, "another controller to lead", async || {
        let known = leader(address).await?;
        anyhow::ensure!(
            known.term > term && !known.address.is_empty(),
            "{:?} leads, term {} after {term}",
            known.address,
            known.term
        );
        anyhow::Ok(known)
    })
    .await
}

/// Waits until this controller shows every node of the mesh with its pid: it, or the leader that it
/// asks, hears of them all.
///
/// # Errors
/// When it does not in time.
pub async fn sees_all_nodes(mesh: &Mesh, controller: &str) -> anyhow::Result<()> {
    wait_until(LIMIT, "all nodes to be reported", async || {
        let mut api = Api::connect(controller).await?;
        let shards = api.describe_shards(mesh.instance()).await?;
        let nodes: Vec<_> = shards.iter().flat_map(|s| &s.nodes).collect();
        let seen = nodes.iter().filter(|n| n.pid != 0).count();
        anyhow::ensure!(
            !nodes.is_empty() && seen == nodes.len(),
            "{seen} of {}",
            nodes.len()
        );
        anyhow::Ok(())
    })
    .await
}

/// The first shard's replica, to switch over to.
///
/// # Errors
/// When the controller does not answer, or there is none.
pub async fn a_replica(mesh: &Mesh, controller: &str) -> anyhow::Result<String> {
    let mut api = Api::connect(controller).await?;
    let shards = api.describe_shards(mesh.instance()).await?;
    let nodes = shards.first().map(|s| s.nodes.iter());
    let mut nodes = nodes.context("a shard")?;
    let replica = nodes.find(|n| n.current_role() == NodeRole::Replica && n.in_sync);
    Ok(replica.context("a replica in sync")?.node_id.clone())
}

/// Switches the first shard over, through the ctl at this controller, and waits for the end.
///
/// # Errors
/// With what the ctl said.
pub async fn switch_over(mesh: &Mesh, controller: &str) -> anyhow::Result<()> {
    let replica = a_replica(mesh, controller).await?;
    let mut command = Command::new(programs::path("slotmesh")?);
    let instance = mesh.instance();
    command.args(["--controller", controller, "switchover", instance]);
    command.args(["--wait", "--target", &replica]);
    let output = finish(command).await?;
    anyhow::ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
