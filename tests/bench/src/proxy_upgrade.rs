//! `slotmesh-bench proxy-upgrade`: one proxy with thousands of clients of every kind, handed over from
//! process to process again and again.
//!
//! Invariant: no client ever connects a second time, and every hand-over has a time without one right
//! before it, under the same load in the same run.

mod book;
mod clients;
mod handover;
mod idle;
mod kill;
mod report;
mod wire;

use std::{collections::HashMap, io::Write as _, time::Duration};

use anyhow::Context as _;
use rustix::process::{Resource, getrlimit};
use slotmesh_ctl::api::Api;
use slotmesh_harness::{Mesh, MeshOptions};
use slotmesh_proto::instance::v1::UpdateParametersRequest;
use tokio::time::{Instant, sleep};

pub use self::handover::By;
pub use self::kill::KillArgs;
pub use self::report::Report;
use self::{
    book::Books,
    clients::{Crew, Plan},
    handover::Proxy,
    idle::Idle,
    report::Change,
};
use crate::{chaos::history::now_us, probe::Probe, report::Output};

/// Load before the first hand-over, and after the last one.
const QUIET: Duration = Duration::from_secs(2);
/// Hand-overs that fail before the run is no measurement any more.
const FAILURES_MAX: u32 = 3;
const NOTE_EVERY: u32 = 5;
/// Descriptors beside those of clients: nodes, the mesh's own, logs.
const OTHER_DESCRIPTORS: u64 = 1_000;

/// Flags of `slotmesh-bench proxy-upgrade`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Connections that say nothing.
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    pub idle: u32,
    /// Connections that do something: pipelined, MULTI, WATCH, BLPOP, subscribed, tracking, MONITOR.
    #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub active: u32,
    /// Hand-overs.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub count: u32,
    /// How they are asked for.
    #[arg(long, value_enum, default_value = "hand")]
    pub by: By,
    /// Pause of an active client between two rounds of what it does, in milliseconds.
    #[arg(long, default_value_t = 500, value_name = "MS")]
    pub pace_ms: u64,
    /// Messages that are published in a second.
    #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub messages: u64,
    /// Time without a hand-over that each is compared with, right before it, in milliseconds.
    #[arg(long, default_value_t = 1_500, value_name = "MS")]
    pub calm_ms: u64,
    /// Time after a hand-over that counts for nothing, in milliseconds.
    #[arg(long, default_value_t = 500, value_name = "MS")]
    pub pause_ms: u64,
    /// Shards of the instance.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub shards: u32,
    /// Workers of the proxy.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub workers: u32,
    /// Engine of the nodes, as `slotmesh up --engine`; 7.0 or newer, for shard channels.
    #[arg(long, value_name = "NAME|PATH")]
    pub engine: Option<String>,
    #[command(flatten)]
    pub kill: KillArgs,
    #[arg(long, value_enum, default_value = "text")]
    pub output: Output,
}

/// Measures and prints; returns whether every promise was kept.
///
/// # Errors
/// When the mesh or the clients could not be started.
pub async fn main(args: Args) -> anyhow::Result<bool> {
    let clients = u64::from(args.idle) + u64::from(args.active);
    require_descriptors(clients)?;
    let mesh = Mesh::start(&MeshOptions {
        architecture: Some("cluster".to_owned()),
        shards: Some(args.shards),
        // Who feeds those that are handed over is to survive all of it.
        proxies: Some(if args.kill.is_wanted() { 2 } else { 1 }),
        workers: Some(args.workers),
        engine: args.engine.clone(),
        ..MeshOptions::default()
    })
    .await?;
    let mut api = mesh.api().await?;
    make_room(&mut api, mesh.instance(), clients).await?;
    let hosts = mesh.data().join("hosts");
    let addresses = &mesh.contract.proxies;
    let address = addresses.first().context("the mesh has no proxy")?;
    // A way back is asked for by who kills.
    let by = match args.kill.is_wanted() {
        true => By::Fresh,
        false => args.by,
    };
    let proxy = Proxy::find(&hosts, address, mesh.instance(), api, by)?;
    if args.kill.is_wanted() {
        let others_at = addresses.get(1).context("the mesh has one proxy")?;
        let report = kill::measure(&args, proxy, others_at).await?;
        mesh.stop().await?;
        args.output.print(&report, kill::Report::text)?;
        return Ok(report.broken().is_empty());
    }
    let report = measure(&args, proxy).await?;
    mesh.stop().await?;
    args.output.print(&report, Report::text)?;
    Ok(report.broken().is_empty())
}

/// This process has a socket for each client, the proxy that and a few lines to nodes.
fn require_descriptors(clients: u64) -> anyhow::Result<()> {
    let wanted = clients + clients / 4 + OTHER_DESCRIPTORS;
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    anyhow::ensure!(
        limit >= wanted,
        "{clients} clients need {wanted} descriptors a process, and {limit} are allowed: ulimit -n {wanted}"
    );
    Ok(())
}

/// The proxy lets so many in, and gives each of those that wait or watch a connection of its own.
async fn make_room(api: &mut Api, instance: &str, clients: u64) -> anyhow::Result<()> {
    let room = [
        ("maxclients", (2 * clients + 1_000).to_string()),
        ("private_connections_max", "10000".to_owned()),
    ];
    let room = room.map(|(name, value)| (name.to_owned(), value));
    let request = UpdateParametersRequest {
        instance_id: instance.to_owned(),
        proxy: HashMap::from(room),
        client_token: Api::token(None),
        ..UpdateParametersRequest::default()
    };
    let updated = api.instances().update_parameters(request).await;
    updated.context("raise maxclients")?;
    Ok(())
}

async fn measure(args: &Args, mut proxy: Proxy) -> anyhow::Result<Report> {
    let address = proxy.bound()?.address;
    let books = Books::default();
    let mut idle = Idle::connect(&address, args.idle as usize, &books)
        .await
        .context("connect those that say nothing")?;
    let plan = Plan {
        others_at: address.clone(),
        address,
        active: args.active as usize,
        pace: Duration::from_millis(args.pace_ms),
        messages_per_second: args.messages,
    };
    let crew = Crew::start(&plan, &books).await?;
    let probe = Probe::start()?;
    let began = Instant::now();
    sleep(QUIET).await;
    let (mut changes, mut failed, mut words) = (Vec::new(), 0, Vec::new());
    for number in 1..=args.count {
        let calm_from_us = now_us();
        sleep(Duration::from_millis(args.calm_ms)).await;
        let wrong = books.wrong();
        match proxy.hand_over().await {
            Ok(seen) => changes.push(Change { calm_from_us, seen }),
            Err(error) => {
                failed += 1;
                words.push(format!("hand-over {number}: {error:#}"));
            }
        }
        idle.look();
        sleep(Duration::from_millis(args.pause_ms)).await;
        let more = books.wrong() - wrong;
        if number % NOTE_EVERY == 0 || more > 0 {
            note(number, args.count, changes.last(), more);
        }
        if failed >= FAILURES_MAX {
            break;
        }
    }
    sleep(QUIET).await;
    crew.end().await;
    idle.end().await;
    let mut report = Report::of(books.pages(), &changes, &probe.end());
    (report.failed, report.words) = (failed, words);
    report.seconds = began.elapsed().as_secs_f64();
    Ok(report)
}

/// A long run says on stderr how it goes; nobody has to read it.
fn note(done: u32, of: u32, last: Option<&Change>, wrong: u64) {
    let took = last.map_or(0, |c| c.seen.settled_us.saturating_sub(c.seen.serving_us));
    let left = last.map_or(0, |c| c.seen.left);
    let mut out = std::io::stderr().lock();
    let _ = writeln!(
        out,
        "{done} of {of} hand-overs, the last in {} ms, {left} left behind; {wrong} wrong things since",
        took / 1_000
    );
}
