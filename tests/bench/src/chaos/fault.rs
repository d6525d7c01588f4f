//! What goes wrong, one thing after another, as a seed says.
//!
//! Invariant: each fault ends, and what it killed or cut is put back before the next begins; so
//! whatever is broken afterwards was broken by the mesh.

use std::{path::Path, process::Child, time::Duration};

use anyhow::Context as _;
use rand::{Rng, rngs::SmallRng, seq::IndexedRandom};
use slotmesh_harness::signals;
use slotmesh_proto::{instance::v1::SwitchOverRequest, store::v1::NodeRole};
use tokio::time::sleep;

use super::mesh::{CONTROLLERS, HOSTS, Mesh, OPS, STORE};

/// Loops that starve the processors for the length of a fault.
const BUSY_LOOPS: usize = 8;

/// Kinds of fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Kind {
    /// SIGKILL of a shard's primary.
    KillPrimary,
    /// SIGKILL of a replica.
    KillReplica,
    /// SIGSTOP of a shard's primary.
    FreezePrimary,
    /// SIGKILL of a shard's primary, and its files are gone when it starts again.
    EmptyPrimary,
    /// SIGKILL of an agent; its nodes live.
    KillAgent,
    /// SIGSTOP of an agent.
    FreezeAgent,
    /// SIGKILL of a controller.
    KillController,
    /// SIGSTOP of a controller.
    FreezeController,
    /// SIGKILL of a proxy; its agent starts it again.
    KillProxy,
    /// SIGKILL of the store.
    KillStore,
    /// SIGSTOP of the store.
    FreezeStore,
    /// A primary's host is cut off, with a proxy and clients inside.
    CutHost,
    /// A host sees neither controllers nor store; its data plane works.
    CutControl,
    /// What a host sends to the other hosts is lost; what they send arrives.
    OneWay,
    /// Some packets of every host are lost.
    Loss,
    /// Other programs want all processors.
    Starve,
    /// A planned switchover.
    Switchover,
    /// A planned switchover whose primary dies meanwhile.
    SwitchoverAndKill,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 18] = [
        Self::KillPrimary,
        Self::KillReplica,
        Self::FreezePrimary,
        Self::EmptyPrimary,
        Self::KillAgent,
        Self::FreezeAgent,
        Self::KillController,
        Self::FreezeController,
        Self::KillProxy,
        Self::KillStore,
        Self::FreezeStore,
        Self::CutHost,
        Self::CutControl,
        Self::OneWay,
        Self::Loss,
        Self::Starve,
        Self::Switchover,
        Self::SwitchoverAndKill,
    ];
}

/// A fault and how long it lasts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// Which.
    pub(super) kind: Kind,
    /// For how long.
    pub(super) lasts: Duration,
    /// Chooses among shards, hosts and controllers.
    pub(super) which: usize,
}

impl Fault {
    /// The next one of a seed.
    #[must_use]
    pub(super) fn draw(random: &mut SmallRng, kinds: &[Kind]) -> Self {
        let kind = kinds.choose(random).copied().unwrap_or(Kind::KillPrimary);
        Self {
            kind,
            lasts: Duration::from_millis(random.random_range(500..8_000)),
            which: random.random_range(0..1_000),
        }
    }
}

/// Lets a fault happen, and ends it.
///
/// # Errors
/// When it could not be done; then nothing is left of it either, as far as possible.
pub(super) async fn happen(mesh: &mut Mesh, fault: Fault) -> anyhow::Result<()> {
    let Fault { kind, lasts, which } = fault;
    match kind {
        Kind::KillPrimary | Kind::KillReplica => {
            let (pid, _) = mesh.node(which, kind == Kind::KillPrimary).await?;
            signals::kill(pid)?;
            sleep(lasts).await;
        }
        Kind::EmptyPrimary => empty(mesh, which, lasts).await?,
        Kind::FreezePrimary => {
            let (pid, _) = mesh.node(which, true).await?;
            freeze(pid, lasts).await;
        }
        Kind::FreezeAgent | Kind::FreezeController | Kind::FreezeStore => {
            let name = target(kind, which);
            freeze(mesh.pid(name).context("it does not run")?, lasts).await;
        }
        Kind::KillAgent | Kind::KillController | Kind::KillStore => {
            let name = target(kind, which);
            mesh.kill(name)?;
            sleep(lasts).await;
            mesh.launch(name)?;
        }
        Kind::KillProxy => {
            let mut api = mesh.api().await?;
            let found = api.describe_instances(&[]).await?;
            let proxies = found.iter().flat_map(|i| &i.proxies);
            let pids: Vec<u32> = proxies.map(|p| p.pid).filter(|p| *p > 0).collect();
            signals::kill(
                *pids
                    .get(which % pids.len().max(1))
                    .context("no proxy runs")?,
            )?;
            sleep(lasts).await;
        }
        Kind::CutHost | Kind::CutControl | Kind::OneWay | Kind::Loss => {
            network(mesh, fault).await?;
        }
        Kind::Starve => starve(lasts).await?,
        Kind::Switchover => switch(mesh, which).await?,
        Kind::SwitchoverAndKill => {
            let (pid, _) = mesh.node(which, true).await?;
            switch(mesh, which).await?;
            // Somewhere in the middle of it.
            sleep(Duration::from_micros(lasts.as_micros() as u64 % 40_000)).await;
            signals::kill(pid)?;
            sleep(lasts).await;
        }
    }
    Ok(())
}

fn target(kind: Kind, which: usize) -> &'static str {
    match kind {
        Kind::KillAgent | Kind::FreezeAgent => HOSTS[which % HOSTS.len()],
        Kind::KillController | Kind::FreezeController => CONTROLLERS[which % CONTROLLERS.len()],
        _ => STORE,
    }
}

async fn freeze(pid: u32, lasts: Duration) {
    // It may be killed while it stands still: that is one of the ways to fence it.
    let _ = signals::freeze(pid);
    sleep(lasts).await;
    let _ = signals::thaw(pid);
}

async fn network(mesh: &Mesh, fault: Fault) -> anyhow::Result<()> {
    let net = mesh.net().clone();
    let (_, host) = mesh.node(fault.which, true).await?;
    let others: Vec<&str> = HOSTS.iter().copied().filter(|h| *h != host).collect();
    let control: Vec<&str> = CONTROLLERS.iter().copied().chain([STORE]).collect();
    let done = match fault.kind {
        Kind::CutHost => net.cut(&host),
        Kind::CutControl => net.part(&host, &control),
        Kind::OneWay => net.deafen(&host, &others),
        _ => {
            let of = 100 / (1 + u32::try_from(fault.which % 20).unwrap_or(0));
            HOSTS.iter().try_for_each(|h| net.lose(h, of.max(5)))
        }
    };
    if done.is_ok() {
        sleep(fault.lasts).await;
    }
    let mut healed = Ok(());
    for name in HOSTS.iter().chain(&CONTROLLERS).chain(&[STORE, OPS]) {
        healed = healed.and(net.heal(name));
    }
    done.and(healed)
}

/// Kills a primary and removes its files before its agent can start it again.
async fn empty(mesh: &Mesh, which: usize, lasts: Duration) -> anyhow::Result<()> {
    let (pid, _) = mesh.node(which, true).await?;
    let dir = std::fs::read_link(format!("/proc/{pid}/cwd")).context("find the node's files")?;
    signals::kill(pid)?;
    for entry in std::fs::read_dir(&dir)?.flatten() {
        let path = entry.path();
        if is_data(&path) {
            let gone = match path.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
            gone.with_context(|| format!("remove {}", path.display()))?;
        }
    }
    sleep(lasts).await;
    Ok(())
}

fn is_data(path: &Path) -> bool {
    let name = path
        .file_name()
        .and_then(|n| n.to_str())
        .unwrap_or_default();
    name.ends_with(".rdb") || name.ends_with(".aof") || name == "appendonlydir"
}

async fn starve(lasts: Duration) -> anyhow::Result<()> {
    let mut loops: Vec<Child> = Vec::new();
    for _ in 0..BUSY_LOOPS {
        let seconds = lasts.as_secs().max(1).to_string();
        let child = std::process::Command::new("timeout")
            .args([&*seconds, "sh", "-c", "while :; do :; done"])
            .spawn()
            .context("start a busy loop")?;
        loops.push(child);
    }
    sleep(lasts).await;
    for mut child in loops {
        signals::kill_blocking(child.id(), Duration::from_secs(1));
        child.wait()?;
    }
    Ok(())
}

async fn switch(mesh: &Mesh, which: usize) -> anyhow::Result<()> {
    let shards = mesh.shards().await?;
    let shard = &shards[which % shards.len()];
    let replica = shard
        .nodes
        .iter()
        .find(|n| n.current_role() == NodeRole::Replica && n.in_sync)
        .context("no replica is in sync")?;
    let request = SwitchOverRequest {
        instance_id: mesh.instance.clone(),
        target_primary_node_id: replica.node_id.clone(),
        ..SwitchOverRequest::default()
    };
    mesh.api().await?.switch_over(request).await?;
    Ok(())
}
