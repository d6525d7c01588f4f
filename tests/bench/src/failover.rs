//! `slotmesh-bench failover`: how long a shard's writers wait after its primary is killed, frozen with
//! its host, or cut off with it, and what the clients of other shards notice of that.
//!
//! Invariant: every window with a fault has one without right before it, under the same load in the
//! same run, so that what the machine does meanwhile is in both; nothing is averaged away before the
//! verdict.

mod fault;
mod load;
mod report;
pub(crate) mod timeline;

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use slotmesh_harness::{engines, wait_until};
use slotmesh_proto::{
    instance::v1::{Shard, SwitchOverRequest},
    store::v1::NodeRole,
};
use tokio::time::sleep;

pub use self::load::tags;
use self::{
    fault::Fault,
    load::Clients,
    report::{Report, Round},
};
use crate::chaos::{
    history::now_us,
    in_a_network,
    mesh::{HEAL_LIMIT, HOSTS, Mesh, Shape},
    net::Net,
    places,
};

/// A switchover to spread primaries takes milliseconds.
const SPREAD_LIMIT: Duration = Duration::from_secs(30);
/// After the mesh is whole again, connections to what is back are made anew.
const SETTLE: Duration = Duration::from_secs(1);
/// So many rounds that could not be made, and the run is no measurement any more.
const FAILED_MAX: usize = 3;

/// How a primary is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum How {
    /// SIGKILL of its process.
    Kill,
    /// SIGSTOP of everything on its host: agent, fencer, nodes, proxy.
    Freeze,
    /// Its host's network is gone.
    Cut,
}

impl How {
    const ALL: [Self; 3] = [Self::Kill, Self::Freeze, Self::Cut];

    fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Freeze => "freeze",
            Self::Cut => "cut",
        }
    }

    /// Until the first write on the next primary, 99 of 100 times.
    fn wanted(self) -> Duration {
        match self {
            Self::Kill => Duration::from_millis(300),
            // A lease of 3 s is what proves that the lost host takes no more writes.
            Self::Freeze | Self::Cut => Duration::from_secs(4),
        }
    }
}

/// Flags of `slotmesh-bench failover`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Failovers of each way.
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub count: u32,
    /// How the primary is lost; may be repeated; all ways by default.
    #[arg(long, value_enum)]
    pub how: Vec<How>,
    /// Engine of the nodes, as `slotmesh up --engine`.
    #[arg(long, default_value = "", value_name = "NAME|PATH")]
    pub engine: String,
    /// Shards of the instance.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=16))]
    pub shards: u32,
    /// Replicas of each shard, one host each.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=2))]
    pub replicas: u32,
    /// Replicas that must have a write before it is acknowledged.
    #[arg(long, default_value_t = 0)]
    pub durability: u32,
    /// Clients of each shard at each proxy.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub clients: u32,
    /// Pause of a client between two requests, in milliseconds.
    #[arg(long, default_value_t = 10)]
    pub pace_ms: u64,
    /// Length of the windows before and after each fault, in milliseconds.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(4_500..=60_000))]
    pub window_ms: u64,
    /// Keeps the logs of the mesh in this directory.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<std::path::PathBuf>,
    /// Set by the program itself, within the network that it made: this run's number.
    #[arg(long, hide = true)]
    pub inside: Option<u32>,
}

/// Makes a network, measures in it, and removes it. Returns whether everything wanted was kept.
///
/// # Errors
/// When the measurement itself failed.
pub async fn main(args: Args) -> anyhow::Result<bool> {
    if let Some(run) = args.inside {
        return Box::pin(within(&args, run)).await;
    }
    in_a_network()
}

async fn within(args: &Args, run: u32) -> anyhow::Result<bool> {
    let dir = tempfile::Builder::new().prefix("smf-").tempdir()?;
    let net = Net::of(run, &places())?;
    let engine = match args.engine.as_str() {
        "" => String::new(),
        name => engines::find(name)?.display().to_string(),
    };
    let shape = Shape {
        shards: args.shards,
        replicas: args.replicas,
        durability: args.durability,
        engine,
        ..Shape::default()
    };
    let mut mesh = Mesh::start(net, dir.path(), &shape)
        .await
        .context("start the mesh")?;
    let measured = Box::pin(measure(args, &mut mesh)).await;
    mesh.stop();
    if let Some(keep) = &args.keep {
        keep_logs(dir.path(), keep)?;
    }
    let report = measured?;
    say(&report.text());
    Ok(report.is_kept())
}

fn keep_logs(dir: &Path, keep: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(keep).with_context(|| format!("create {}", keep.display()))?;
    for entry in std::fs::read_dir(dir)?.flatten() {
        let log = entry.path().join("log");
        if log.is_file() {
            let name = format!("{}.log", entry.file_name().display());
            std::fs::copy(&log, keep.join(name)).context("keep a log")?;
        }
    }
    Ok(())
}

async fn measure(args: &Args, mesh: &mut Mesh) -> anyhow::Result<Report> {
    let shards = mesh.shards().await?;
    let clients = Clients::start(
        &mesh.proxies,
        &shards,
        args.clients,
        Duration::from_millis(args.pace_ms),
    )
    .await
    .context("start clients")?;
    let ways = match args.how.is_empty() {
        true => How::ALL.to_vec(),
        false => args.how.clone(),
    };
    let mut report = Report::default();
    let mut failed = 0;
    for number in 0..args.count as usize {
        for how in &ways {
            match Box::pin(round(args, mesh, &clients, *how, number)).await {
                Ok(round) => {
                    say(&round.line(number + 1));
                    report.add(round);
                }
                Err(error) => {
                    say(&format!("round {number} ({}): {error:#}", how.name()));
                    failed += 1;
                    report.failed.push(format!("{error:#}"));
                    if failed >= FAILED_MAX {
                        clients.stop().await;
                        return Ok(report);
                    }
                    mesh.wait_healthy(HEAL_LIMIT).await?;
                }
            }
        }
    }
    clients.stop().await;
    Ok(report)
}

/// A window without a fault, then one with it, then until everything is whole again.
async fn round(
    args: &Args,
    mesh: &mut Mesh,
    clients: &Clients,
    how: How,
    number: usize,
) -> anyhow::Result<Round> {
    let window = Duration::from_millis(args.window_ms);
    let (shards, host) = Box::pin(victim(mesh, how, number)).await?;
    let victims = victims(&shards, how, &host, number);
    let fault = Fault::prepare(mesh, how, &shards[number % shards.len()], &host)?;
    sleep(SETTLE).await;
    clients.forget();
    let calm_us = now_us();
    sleep(window).await;
    let hit = fault.happen(mesh)?;
    sleep(window).await;
    let window_end_us = now_us();
    fault.end(mesh)?;
    let healing = now_us();
    mesh.wait_healthy(HEAL_LIMIT).await?;
    let healed_ms = (now_us() - healing) as f64 / 1e3;
    let at = HOSTS.iter().position(|h| *h == host);
    let mut round = Round {
        how,
        // A proxy that is gone itself answers nobody, which is not what is measured.
        proxy_lost: at.filter(|_| how != How::Kill),
        victims,
        hit,
        calm_us,
        window_end_us,
        healed_ms,
        ..Round::default()
    };
    round.count(&clients.samples());
    round.events = timeline::of(mesh, hit.wall).await?;
    Ok(round)
}

/// Shards whose primary the fault takes away.
fn victims(shards: &[Shard], how: How, host: &str, number: usize) -> Vec<usize> {
    match how {
        How::Kill => vec![number % shards.len()],
        _ => (0..shards.len())
            .filter(|s| host_of(&shards[*s]) == host)
            .collect(),
    }
}

fn host_of(shard: &Shard) -> &str {
    let primary = shard
        .nodes
        .iter()
        .find(|n| n.current_role() == NodeRole::Primary);
    primary.map_or("", |n| n.host_id.as_str())
}

/// The host of the shard whose turn it is. Some other shard's primary is elsewhere, or is moved
/// there, so that there are others to compare with.
async fn victim(mesh: &Mesh, how: How, number: usize) -> anyhow::Result<(Vec<Shard>, String)> {
    let shards = mesh.shards().await?;
    let turn = number % shards.len();
    let host = host_of(&shards[turn]).to_owned();
    anyhow::ensure!(!host.is_empty(), "shard {turn} has no primary");
    let is_alone = shards.iter().all(|s| host_of(s) == host);
    if how == How::Kill || !is_alone {
        return Ok((shards, host));
    }
    let other = &shards[(turn + 1) % shards.len()];
    let target = other.nodes.iter().find(|n| n.host_id != host);
    let target = target.context("a replica elsewhere")?.node_id.clone();
    let request = SwitchOverRequest {
        instance_id: mesh.instance.clone(),
        target_primary_node_ids: vec![target],
        ..SwitchOverRequest::default()
    };
    mesh.api().await?.switch_over(request).await?;
    let moved = wait_until(SPREAD_LIMIT, "primaries on two hosts", async || {
        let shards = mesh.shards().await?;
        let is_spread = shards.iter().any(|s| host_of(s) != host);
        let serves = shards.iter().all(|s| s.mode == "Serving");
        let whole = shards.iter().flat_map(|s| &s.nodes);
        let mut whole = whole.filter(|n| n.current_role() != NodeRole::Primary);
        anyhow::ensure!(is_spread && serves && whole.all(|n| n.in_sync), "not yet");
        Ok::<_, anyhow::Error>(shards)
    });
    Ok((moved.await?, host))
}

#[allow(clippy::print_stdout)] // The report is what this program is for.
fn say(line: &str) {
    println!("{line}");
}
