//! `slotmesh-bench durable`: what it costs that replicas must have a write before it is acknowledged.
//!
//! Invariant: as many instances as there are modes live beside each other in one mesh, alike but for
//! their durability, and take turns inside each round; ratios are formed inside a round, and what is
//! reported is their median.

mod report;

use std::{io::Write as _, time::Duration};

use anyhow::Context as _;
use slotmesh_ctl::api::Api;
use slotmesh_harness::{Mesh, MeshOptions, wait_until};
use slotmesh_proto::{
    instance::v1::CreateInstanceRequest,
    store::v1::{InstanceState, NodeRole},
};

use self::report::{Report, Sample};
use crate::{
    chaos::mesh::Mesh as Nodes,
    proxy::{
        cpu,
        load::{self, Cell},
        targets::Target,
    },
};

/// Replicas of every instance, and the highest durability.
const REPLICAS: u32 = 2;
const START_LIMIT: Duration = Duration::from_secs(60);
/// Batches of one and of 64, from one client and from many.
const CELLS: [Cell; 4] = [cell(1, 1), cell(1, 50), cell(64, 1), cell(64, 50)];
/// One client alone makes far fewer requests in a second.
const ALONE_PART: u64 = 5;
/// Pipelined requests are so much cheaper that it takes more of them for a measurement.
const PIPELINED_FACTOR: u64 = 8;

const fn cell(pipeline: u32, clients: u32) -> Cell {
    Cell {
        test: "set",
        pipeline,
        clients,
    }
}

/// Flags of `slotmesh-bench durable`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Rounds; each measures every mode in every cell once.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Requests of one measurement with many clients and without pipelining.
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(1000..))]
    pub requests: u64,
    /// Engine of all nodes, as `slotmesh up --engine`.
    #[arg(long, value_name = "NAME|PATH")]
    pub engine: Option<String>,
}

/// One instance, and whose time counts.
#[derive(Debug)]
struct Mode {
    durability: u32,
    target: Target,
    primary: u32,
    replicas: Vec<u32>,
}

/// Measures and prints; there is nothing that could be broken.
///
/// # Errors
/// When an instance does not serve, or an error was answered.
pub async fn main(args: Args) -> anyhow::Result<bool> {
    let mesh = Mesh::start(&MeshOptions {
        shards: Some(1),
        replicas: Some(REPLICAS),
        proxies: Some(1),
        workers: Some(1),
        engine: args.engine.clone(),
        ..MeshOptions::default()
    })
    .await?;
    let mut api = mesh.api().await?;
    let mut modes = vec![mode(&mut api, mesh.instance(), 0).await?];
    for durability in 1..=REPLICAS {
        let instance = create(&mut api, durability).await?;
        modes.push(mode(&mut api, &instance, durability).await?);
    }
    let mut report = Report::default();
    for mode in &modes {
        load::fill(&mode.target).await?;
    }
    for round in 0..args.rounds as usize {
        for cell in CELLS {
            // Everybody is first once in a while.
            let (later, sooner) = modes.split_at(round % modes.len());
            for mode in sooner.iter().chain(later) {
                let sample = measure(mode, cell, args.requests).await?;
                report.add(cell, mode.durability, sample);
            }
        }
    }
    write!(std::io::stdout().lock(), "{}", report.text())?;
    mesh.stop().await?;
    Ok(true)
}

/// Another instance like the first.
async fn create(api: &mut Api, durability: u32) -> anyhow::Result<String> {
    let request = CreateInstanceRequest {
        name: format!("durable-{durability}"),
        architecture: slotmesh_proto::topology::v1::Architecture::Cluster.into(),
        shard_count: 1,
        replicas_per_shard: Some(REPLICAS),
        proxy_count: Some(1),
        workers_per_proxy: 1,
        durability,
        client_token: format!("durable-{durability}"),
        ..CreateInstanceRequest::default()
    };
    let created = api
        .call(|api| {
            let request = request.clone();
            async move { api.instances().create_instance(request).await }
        })
        .await?;
    Ok(created.instance_id)
}

/// Waits until an instance serves with all its replicas.
async fn mode(api: &mut Api, instance: &str, durability: u32) -> anyhow::Result<Mode> {
    let id = instance.to_owned();
    let api: &Api = api;
    wait_until(START_LIMIT, "an instance with its replicas", async || {
        let mut api = api.clone();
        let found = api.describe_instances(std::slice::from_ref(&id)).await?;
        let found = found.into_iter().next().context("it is not there")?;
        let proxy = found.proxies.first().context("it has no proxy")?;
        let is_up = found.state() == InstanceState::Running && !proxy.address.is_empty();
        anyhow::ensure!(is_up, "it is {:?}", found.state());
        let shards = api.describe_shards(&id).await?;
        let shard = shards.first().context("it has no shard")?;
        let (primaries, replicas): (Vec<_>, Vec<_>) =
            (shard.nodes.iter()).partition(|n| n.current_role() == NodeRole::Primary);
        let are_in_sync = replicas.iter().all(|n| n.in_sync && n.pid > 0);
        anyhow::ensure!(
            are_in_sync && replicas.len() == REPLICAS as usize,
            "not in sync"
        );
        Ok::<_, anyhow::Error>(Mode {
            durability,
            target: Target::new(&format!("k = {durability}"), &proxy.address, proxy.pid)?,
            primary: primaries.first().context("it has no primary")?.pid,
            replicas: replicas.iter().map(|n| n.pid).collect(),
        })
    })
    .await
}

/// CPU time of proxy, primary and all replicas.
fn spent(mode: &Mode) -> anyhow::Result<[Duration; 3]> {
    let mut replicas = Duration::ZERO;
    for pid in &mode.replicas {
        replicas += cpu::of_process(*pid)?;
    }
    let (proxy, primary) = (
        cpu::of_process(mode.target.pid)?,
        cpu::of_process(mode.primary)?,
    );
    Ok([proxy, primary, replicas])
}

/// How often the primary was asked whether replicas have it all.
async fn waits(mode: &Mode) -> anyhow::Result<u64> {
    let mut connection = Nodes::admin(mode.primary).await?;
    let mut info = redis::cmd("INFO");
    let text: String = info
        .arg("commandstats")
        .query_async(&mut connection)
        .await?;
    // There is no line for what was never asked.
    let calls = text
        .lines()
        .filter(|l| l.starts_with("cmdstat_wait"))
        .filter_map(|l| {
            l.split_once("calls=")?
                .1
                .split(',')
                .next()?
                .parse::<u64>()
                .ok()
        });
    Ok(calls.sum())
}

async fn measure(mode: &Mode, cell: Cell, requests: u64) -> anyhow::Result<Sample> {
    let mut requests = requests;
    if cell.clients == 1 {
        requests /= ALONE_PART;
    }
    if cell.pipeline > 1 {
        requests *= PIPELINED_FACTOR;
    }
    let waits_before = waits(mode).await?;
    let before = spent(mode)?;
    let load = load::run(&mode.target, cell, requests).await?;
    let after = spent(mode)?;
    let waits = waits(mode).await?.saturating_sub(waits_before);
    anyhow::ensure!(
        (waits > 0) == (mode.durability > 0),
        "{waits} WAITs for {requests} writes with a durability of {}",
        mode.durability
    );
    let each = |at: usize| {
        let spent = after[at].saturating_sub(before[at]);
        spent.as_secs_f64() * 1e6 / requests as f64
    };
    Ok(Sample {
        requests_per_second: load.requests_per_second,
        p50_ms: load.p50_ms,
        p99_ms: load.p99_ms,
        proxy_us: each(0),
        primary_us: each(1),
        replicas_us: each(2),
        batch: if waits == 0 {
            0.0
        } else {
            requests as f64 / waits as f64
        },
    })
}
