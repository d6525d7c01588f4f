//! What goes wrong, one thing after another, as a seed says.
//!
//! Invariant: each fault ends, and what it killed or cut is put back before the next begins; so
//! whatever is broken afterwards was broken by the mesh.

pub(crate) mod clock;
mod delay;
pub(crate) mod disk;
mod engine;
mod mass;
mod race;

use std::{process::Child, time::Duration};

use anyhow::Context as _;
use rand::{Rng, rngs::SmallRng, seq::IndexedRandom};
use slotmesh_harness::signals;
use tokio::time::sleep;

use self::{clock::Bend, delay::Detour};
use super::{
    mesh::{CONTROLLERS, HOSTS, Mesh, OPS, STORE},
    net::run,
};

/// Loops that starve the processors for the length of a fault.
const BUSY_LOOPS: usize = 8;
/// Within one fault.
const COMPACTIONS: u32 = 3;

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
    /// A primary dies, and a switchover is asked for before the failover, in it, or after it.
    KillAndSwitchover,
    /// Two switchovers of one shard at once.
    RaceSwitchovers,
    /// One switchover asked for many times with one token.
    ReplayTokens,
    /// SIGSTOP of a replica.
    FreezeReplica,
    /// SIGKILL of a replica, and its files are gone when it starts again.
    EmptyReplica,
    /// SIGKILL of a replica, and its files are damaged when it starts again.
    CorruptReplica,
    /// A primary's main thread sleeps.
    SleepPrimary,
    /// A primary's main thread computes.
    LongScript,
    /// A primary can't save, while a replica needs all of its data.
    BreakSaves,
    /// SIGTERM of any process of a host, of a controller, or of the store.
    Terminate,
    /// SIGKILL of every process of a primary's host.
    KillHost,
    /// SIGSTOP of every process of a primary's host.
    FreezeHost,
    /// Two of three hosts are cut off.
    CutMost,
    /// What others send to a primary's host is lost; what it sends arrives.
    OneWayIn,
    /// What a primary's host sends to controllers and store is lost; what they send arrives.
    OneWayControl,
    /// Whatever a primary's host sends and receives takes long.
    Delay,
    /// The clock of a host or controller is wrong by an hour.
    ClockJump,
    /// The clock of a host or controller goes at half its speed.
    ClockSlow,
    /// The disk of a primary's host is full.
    DiskFull,
    /// The disk of a primary's host stands still.
    DiskStalls,
    /// The store's disk stands still.
    StoreDiskStalls,
    /// The store forgets old revisions, and tidies its file.
    CompactStore,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 40] = [
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
        Self::KillAndSwitchover,
        Self::RaceSwitchovers,
        Self::ReplayTokens,
        Self::FreezeReplica,
        Self::EmptyReplica,
        Self::CorruptReplica,
        Self::SleepPrimary,
        Self::LongScript,
        Self::BreakSaves,
        Self::Terminate,
        Self::KillHost,
        Self::FreezeHost,
        Self::CutMost,
        Self::OneWayIn,
        Self::OneWayControl,
        Self::Delay,
        Self::ClockJump,
        Self::ClockSlow,
        Self::DiskFull,
        Self::DiskStalls,
        Self::StoreDiskStalls,
        Self::CompactStore,
    ];

    /// Whether it is nothing but planned moves, which no client may notice.
    #[must_use]
    pub(super) fn is_planned(self) -> bool {
        matches!(
            self,
            Self::Switchover | Self::RaceSwitchovers | Self::ReplayTokens | Self::CompactStore
        )
    }
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
        Kind::KillAgent | Kind::KillController | Kind::KillStore => {
            let name = target(kind, which);
            mesh.kill(name)?;
            sleep(lasts).await;
            mesh.launch(name).map(drop)
        }
        Kind::FreezeAgent | Kind::FreezeController | Kind::FreezeStore => {
            let name = target(kind, which);
            freeze(mesh.pid(name).context("it does not run")?, lasts).await;
            Ok(())
        }
        Kind::KillProxy => kill_proxy(mesh, which, lasts).await,
        Kind::Starve => starve(lasts).await,
        Kind::Terminate => {
            let others = CONTROLLERS.iter().chain([&STORE]);
            let others: Vec<u32> = others.filter_map(|name| mesh.pid(name)).collect();
            mass::terminate(mesh, &others, which, lasts).await
        }
        Kind::KillHost => mass::kill(mesh, which, lasts).await,
        Kind::FreezeHost => mass::freeze(mesh, which, lasts).await,
        Kind::CutMost => mass::cut_most(mesh, which, lasts).await,
        Kind::CutHost
        | Kind::CutControl
        | Kind::OneWay
        | Kind::OneWayIn
        | Kind::OneWayControl
        | Kind::Loss => network(mesh, fault).await,
        Kind::Delay
        | Kind::ClockJump
        | Kind::ClockSlow
        | Kind::DiskFull
        | Kind::DiskStalls
        | Kind::StoreDiskStalls
        | Kind::CompactStore => machine(mesh, fault).await,
        Kind::Switchover
        | Kind::SwitchoverAndKill
        | Kind::KillAndSwitchover
        | Kind::RaceSwitchovers
        | Kind::ReplayTokens => operator(mesh, fault).await,
        _ => node(mesh, fault).await,
    }
}

/// Faults of one node.
async fn node(mesh: &Mesh, fault: Fault) -> anyhow::Result<()> {
    let Fault { kind, lasts, which } = fault;
    let of_replica = matches!(
        kind,
        Kind::KillReplica | Kind::FreezeReplica | Kind::EmptyReplica | Kind::CorruptReplica
    );
    let (pid, _) = mesh.node(which, !of_replica).await?;
    match kind {
        Kind::FreezePrimary | Kind::FreezeReplica => {
            freeze(pid, lasts).await;
            return Ok(());
        }
        Kind::SleepPrimary => return engine::sleep_within(pid, lasts).await,
        Kind::LongScript => return engine::compute(pid, lasts).await,
        Kind::BreakSaves => {
            let (replica, _) = mesh.node(which, false).await?;
            return engine::break_saves(pid, replica, lasts).await;
        }
        Kind::EmptyPrimary | Kind::EmptyReplica => engine::replace_data(pid, disk::wipe)?,
        // No engine starts on that: its agent has it copied.
        Kind::CorruptReplica => engine::replace_data(pid, disk::spoil)?,
        _ => signals::kill(pid)?,
    }
    sleep(lasts).await;
    Ok(())
}

/// Faults of what the mesh runs on.
async fn machine(mesh: &Mesh, fault: Fault) -> anyhow::Result<()> {
    let Fault { kind, lasts, which } = fault;
    let (_, host) = mesh.node(which, true).await?;
    match kind {
        Kind::Delay => {
            let delay = Duration::from_millis(50 + (which as u64 * 37) % 450);
            let detour = Detour::begin(mesh.net(), &host, &mesh.dir_of(OPS), delay).await?;
            sleep(lasts).await;
            drop(detour);
            Ok(())
        }
        Kind::ClockJump | Kind::ClockSlow => {
            let places: Vec<&str> = HOSTS.into_iter().chain(CONTROLLERS).collect();
            let dir = mesh.dir_of(places[which % places.len()]);
            let bend = match (kind, which % 2) {
                (Kind::ClockSlow, _) => Bend::Slow,
                (_, 0) => Bend::Ahead,
                _ => Bend::Behind,
            };
            clock::bend(&dir, bend, lasts).await
        }
        Kind::DiskFull => disk::fill(&mesh.data_of(&host), lasts).await,
        Kind::DiskStalls => disk::stall(&mesh.data_of(&host), lasts).await,
        Kind::StoreDiskStalls => disk::stall(&mesh.data_of(STORE), lasts).await,
        _ => compact(mesh, lasts).await,
    }
}

/// Faults of what operators ask.
async fn operator(mesh: &mut Mesh, fault: Fault) -> anyhow::Result<()> {
    let Fault { kind, lasts, which } = fault;
    let micros = u64::try_from(lasts.as_micros())?;
    match kind {
        // Somewhere in the middle of it.
        Kind::SwitchoverAndKill => {
            race::switch_and_kill(mesh, which, Duration::from_micros(micros % 40_000)).await?;
        }
        Kind::KillAndSwitchover => {
            race::kill_and_switch(mesh, which, Duration::from_micros(micros % 300_000)).await?;
        }
        Kind::RaceSwitchovers => return race::two_at_once(mesh, which).await,
        Kind::ReplayTokens => return race::replay(mesh, which).await,
        _ => return race::switch(mesh, which).await,
    }
    sleep(lasts).await;
    Ok(())
}

async fn kill_proxy(mesh: &Mesh, which: usize, lasts: Duration) -> anyhow::Result<()> {
    let found = mesh.api().await?.describe_instances(&[]).await?;
    let proxies = found.iter().flat_map(|i| &i.proxies);
    let pids: Vec<u32> = proxies.map(|p| p.pid).filter(|p| *p > 0).collect();
    let pid = pids.get(which % pids.len().max(1));
    signals::kill(*pid.context("no proxy runs")?)?;
    sleep(lasts).await;
    Ok(())
}

/// What a store does in time, all at once and again.
async fn compact(mesh: &Mesh, lasts: Duration) -> anyhow::Result<()> {
    let store = mesh.store()?;
    // It may have no revision that is newer than the last time.
    let script = "export ETCDCTL_API=3; \
         now=$(etcdctl --endpoints \"$1\" endpoint status -w json \
             | sed 's/.*\"revision\":\\([0-9]*\\).*/\\1/'); \
         etcdctl --endpoints \"$1\" compaction --physical \"$now\" || :; \
         etcdctl --endpoints \"$1\" defrag";
    for _ in 0..COMPACTIONS {
        let mut etcdctl = std::process::Command::new("timeout");
        etcdctl.args(["10", "sh", "-c", script, "sh", &store]);
        tokio::task::spawn_blocking(move || run(&mut etcdctl)).await??;
        sleep(lasts / COMPACTIONS).await;
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
        Kind::OneWayIn => others.iter().try_for_each(|o| net.deafen(o, &[&host])),
        Kind::OneWayControl => net.deafen(&host, &control),
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
