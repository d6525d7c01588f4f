//! `slotmesh-bench proxy`: what one request costs in our proxy, beside a direct connection and
//! twemproxy, measured from outside with redis-benchmark.
//!
//! Invariant: machines drift by a factor of two from hour to hour, so targets take turns inside each
//! round, ratios are formed inside a round, and what is reported is their median.

pub(crate) mod cpu;
pub(crate) mod load;
pub(crate) mod report;
pub(crate) mod targets;

use anyhow::Context;
use slotmesh_harness::{Mesh, MeshOptions};

use crate::report::Output;
use load::Cell;
use report::{Report, Sample};
use targets::{Certificate, PeerSpec, SLOTMESH, Servers, TWEMPROXY, Target};

/// What is measured in each round.
const CELLS: [Cell; 4] = [
    Cell {
        test: "get",
        pipeline: 1,
        clients: 50,
    },
    Cell {
        test: "set",
        pipeline: 1,
        clients: 50,
    },
    Cell {
        test: "get",
        pipeline: 16,
        clients: 50,
    },
    Cell {
        test: "set",
        pipeline: 16,
        clients: 50,
    },
];
/// Pipelined requests are so much cheaper that it takes more of them for a measurement.
const PIPELINED_FACTOR: u64 = 8;

/// Compares the proxy's cost of a request with that of others.
#[derive(Debug, clap::Args)]
pub struct ProxyArgs {
    /// Rounds; each measures every target in every cell once.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Requests of one measurement without pipelining; eight times as many with it.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1000..))]
    requests: u64,
    /// Shards behind the proxies.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    shards: u32,
    /// Worker threads of our proxy. Twemproxy has one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Engine of all nodes, as `slotmesh up` takes it; the redis-server on PATH by default.
    #[arg(long, default_value = "")]
    engine: String,
    /// Another proxy that runs already, over shards of its own. May be given several times.
    #[arg(long = "peer", value_name = "NAME=HOST:PORT:PID")]
    peers: Vec<PeerSpec>,
    /// Measure TLS as well: our proxy and the direct connection once more, with TLS 1.3.
    #[arg(long, conflicts_with = "peers_only")]
    tls: bool,
    /// Measure only the others: direct, twemproxy and what --peer names.
    #[arg(long)]
    peers_only: bool,
    /// Fail if our CPU time for a request exceeds this many times twemproxy's in any cell.
    #[arg(long, value_name = "RATIO", conflicts_with = "peers_only")]
    at_most: Option<f64>,
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// Runs the comparison and prints it; says whether `--at-most` was kept.
///
/// # Errors
/// A program is missing, or a target does not serve.
pub async fn run(args: ProxyArgs) -> anyhow::Result<bool> {
    let report = Box::pin(measure(&args)).await?;
    args.output.print(&report, Report::text)?;
    let above = args
        .at_most
        .map_or(Vec::new(), |limit| report.above(TWEMPROXY, limit));
    for cell in &above {
        eprintln!("CPU per request above the limit: {cell} x twemproxy's");
    }
    Ok(above.is_empty())
}

async fn measure(args: &ProxyArgs) -> anyhow::Result<Report> {
    let mut targets: Vec<Target> = Vec::new();
    let certificate = args.tls.then(Certificate::new).transpose()?;
    let mesh = if args.peers_only {
        None
    } else {
        Some(start_mesh(args, certificate.as_ref()).await?)
    };
    if let Some(mesh) = &mesh {
        let ours = targets::of_mesh(&mesh.contract)?;
        // The same port, the same process.
        targets.extend(certificate.as_ref().map(|_| ours.with_tls(ours.port)));
        targets.push(ours);
    }
    let servers = Servers::start(&args.engine, args.shards, certificate.as_ref()).await?;
    targets.extend(servers.direct()?);
    targets.push(servers.twemproxy()?);
    targets.extend(args.peers.iter().map(PeerSpec::target));

    let mut report = Report::new(args.rounds);
    for target in &targets {
        load::fill(target).await?;
    }
    for round in 0..args.rounds {
        for cell in CELLS {
            // Everybody is first once in a while.
            let first = round as usize % targets.len();
            let (later, sooner) = targets.split_at(first);
            for target in sooner.iter().chain(later) {
                let sample = measure_one(target, cell, args.requests).await?;
                report.add(cell, &target.name, sample);
            }
        }
    }
    report.compare_with(SLOTMESH);
    Ok(report)
}

async fn measure_one(target: &Target, cell: Cell, requests: u64) -> anyhow::Result<Sample> {
    let requests = if cell.pipeline > 1 {
        requests * PIPELINED_FACTOR
    } else {
        requests
    };
    let (before, host_before) = (cpu::of_process(target.pid)?, cpu::of_host()?);
    let load = load::run(target, cell, requests).await?;
    let (after, host_after) = (cpu::of_process(target.pid)?, cpu::of_host()?);
    let per_request = |spent: std::time::Duration| spent.as_secs_f64() * 1e6 / requests as f64;
    Ok(Sample {
        cpu_us: per_request(after.saturating_sub(before)),
        host_cpu_us: per_request(host_after.saturating_sub(host_before)),
        requests_per_second: load.requests_per_second,
        p50_ms: load.p50_ms,
        p99_ms: load.p99_ms,
    })
}

async fn start_mesh(args: &ProxyArgs, certificate: Option<&Certificate>) -> anyhow::Result<Mesh> {
    let options = MeshOptions {
        shards: Some(args.shards),
        replicas: Some(0),
        proxies: Some(1),
        workers: Some(args.workers),
        engine: Some(args.engine.clone()).filter(|engine| !engine.is_empty()),
        environment: certificate.map_or(Vec::new(), Certificate::environment),
        ..MeshOptions::default()
    };
    Mesh::start(&options)
        .await
        .context("start a mesh to measure")
}
