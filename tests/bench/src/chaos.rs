//! `slotmesh-bench chaos`: a mesh over network namespaces of its own, faults from a seed, clients that
//! write down what they were told, and a verdict over the whole history.
//!
//! Invariant: the run touches only the namespaces that it made, every loop in it is bounded by its
//! length, and it removes everything at its end, also after a failure.

pub mod check;
pub(crate) mod client;
mod fault;
pub mod history;
pub mod hold;
pub mod linear;
pub mod losses;
pub(crate) mod mesh;
pub mod monitor;
pub(crate) mod net;
mod observers;
pub mod pubsub;
pub mod timeline;
pub mod topology;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use rand::{SeedableRng as _, rngs::SmallRng};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::{
    check::{Checked, Finals, Finding, Promise},
    client::Load,
    fault::{Fault, Kind},
    history::{History, Kind as Asked, Outcome, Record, now_us},
    mesh::{CONTROLLERS, HEAL_LIMIT, HOSTS, Mesh, OPS, STORE, Shape},
    net::Net,
    observers::Observers,
    timeline::Timeline,
};

/// For so long everything must have been well before the next fault.
const CALM: Duration = Duration::from_secs(2);
/// Reading one key at the end.
const READ_LIMIT: Duration = Duration::from_secs(30);
/// With all proxies in turn.
const READ_ATTEMPTS: usize = 6;
/// Clients in each host's place.
const INSIDERS: u32 = 5;

/// Faults against a mesh under load, and what became of what clients were told.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How long faults go on.
    #[arg(long, default_value_t = 3)]
    pub minutes: u32,
    /// From which everything random is drawn.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Replicas that must have a write before it is acknowledged; 0: asynchronous.
    #[arg(long, default_value_t = 1)]
    pub durability: u32,
    /// Shards of the instance.
    #[arg(long, default_value_t = 2)]
    pub shards: u32,
    /// Replicas of each shard, one host each.
    #[arg(long, default_value_t = 2)]
    pub replicas: u32,
    /// Clients outside of the hosts; each host has five more inside.
    #[arg(long, default_value_t = 20)]
    pub clients: u32,
    /// Pause between two requests of a client, in milliseconds.
    #[arg(long, default_value_t = 10)]
    pub pace_ms: u64,
    /// Only these faults, by their names, such as KillPrimary; none: all.
    #[arg(long = "fault", value_name = "NAME")]
    pub faults: Vec<String>,
    /// Where the history and the logs of a failure are kept.
    #[arg(long, default_value = "target/chaos-failure")]
    pub keep: PathBuf,
    /// Set by the program itself, within the network that it made: this run's number.
    #[arg(long, hide = true)]
    pub inside: Option<u32>,
}

/// Clients within a host's place: started by `chaos`, not by people.
#[derive(Clone, Debug, clap::Args)]
pub struct InsiderArgs {
    #[arg(long)]
    proxy: Vec<String>,
    #[arg(long)]
    first: u32,
    #[arg(long)]
    pace_ms: u64,
    #[arg(long)]
    out: PathBuf,
}

pub(crate) fn places() -> Vec<&'static str> {
    let all = [STORE, OPS].into_iter();
    all.chain(CONTROLLERS).chain(HOSTS).collect()
}

/// Makes the network, runs, and removes it. Returns whether every promise was kept.
///
/// # Errors
/// When the run itself failed.
pub async fn main(args: Args) -> anyhow::Result<bool> {
    if let Some(run) = args.inside {
        return Box::pin(within(&args, run)).await;
    }
    kinds(&args.faults)?;
    in_a_network()
}

/// Makes a network, runs this program once more in it, and removes it.
///
/// # Errors
/// When the kernel refuses, or the run itself failed.
pub(crate) fn in_a_network() -> anyhow::Result<bool> {
    let run = std::process::id();
    let net = Net::of(run, &places())?;
    let made = net.make();
    let ended = made.and_then(|()| again_within(&net, run));
    net.remove();
    ended
}

/// Runs this program once more, in the place of the clients.
fn again_within(net: &Net, run: u32) -> anyhow::Result<bool> {
    let own = std::env::current_exe().context("find the running program")?;
    // Before: programs are built by a cargo that may want the network outside.
    let programs = slotmesh_harness::programs::directory()?;
    let status = net
        .place(OPS)?
        .command(&own)
        .args(std::env::args_os().skip(1))
        .arg(format!("--inside={run}"))
        .env("SLOTMESH_PROGRAMS", programs)
        .status()
        .context("run within the network")?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => bail!("the run ended with {status}"),
    }
}

fn kinds(names: &[String]) -> anyhow::Result<Vec<Kind>> {
    if names.is_empty() {
        return Ok(Kind::ALL.to_vec());
    }
    let of = |name: &String| {
        let found = Kind::ALL.into_iter().find(|k| format!("{k:?}") == *name);
        found.with_context(|| format!("no fault {name}; there are {:?}", Kind::ALL))
    };
    names.iter().map(of).collect()
}

async fn within(args: &Args, run: u32) -> anyhow::Result<bool> {
    let dir = tempfile::Builder::new().prefix("smc-").tempdir()?;
    let net = Net::of(run, &places())?;
    let shape = Shape {
        shards: args.shards,
        replicas: args.replicas,
        durability: args.durability,
        read_gate: args.durability > 0,
        disks: true,
        clocks: true,
        ..Shape::default()
    };
    let history = Arc::new(History::default());
    let judged = match Mesh::start(net, dir.path(), &shape).await {
        Ok(mut mesh) => {
            let judged = Box::pin(run_and_judge(args, &mut mesh, &history, dir.path())).await;
            mesh.stop();
            judged
        }
        Err(error) => Err(error.context("start the mesh")),
    };
    if !matches!(judged, Ok(true)) {
        keep(args, &history, dir.path())?;
    }
    judged
}

/// Copies the history and every log to where a person finds them.
fn keep(args: &Args, history: &History, dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(&args.keep)
        .with_context(|| format!("create {}", args.keep.display()))?;
    history.save(&args.keep.join("history.jsonl"))?;
    // One directory a run, which carries its random name.
    let copied = Command::new("cp")
        .arg("-r")
        .arg(dir)
        .arg(&args.keep)
        .status();
    copied.context("keep the logs")?;
    say(&format!("history and logs are in {}", args.keep.display()));
    Ok(())
}

async fn run_and_judge(
    args: &Args,
    mesh: &mut Mesh,
    history: &Arc<History>,
    dir: &Path,
) -> anyhow::Result<bool> {
    let observers = Observers::start(mesh).await?;
    let stop = CancellationToken::new();
    let load = Load {
        proxies: mesh.proxies.clone(),
        clients: args.clients,
        first: 0,
        pace: Duration::from_millis(args.pace_ms),
    };
    let outsiders = {
        let (load, history, stop) = (load.clone(), history.clone(), stop.clone());
        tokio::spawn(async move { client::run(&load, &history, &stop).await })
    };
    let insiders = insiders(args.pace_ms, mesh, dir)?;
    let mut timeline = Timeline::default();
    let unwell = Box::pin(torment(args, mesh, &mut timeline)).await;
    stop.cancel();
    outsiders.await??;
    for (mut child, out) in insiders {
        // They end when their input does.
        drop(child.stdin.take());
        child.wait()?;
        history.load(&out)?;
    }
    let unwell = unwell?;
    let observed = observers.end(mesh).await?;
    observed.save(dir, &timeline)?;
    let finals = read_all(mesh, &history.with(keys_of)).await?;
    let promise = Promise {
        durable: args.durability > 0,
        linear: args.durability > 0,
    };
    Ok(history.with(|records| {
        let mut findings = check::judge(records, &finals, promise);
        let mut checked = check::checked(records, &finals, promise);
        let (found, of) = observed.judge(records, &finals, &timeline, promise.durable);
        findings.extend(found);
        checked.extend(of);
        report(args, records, &findings, &checked, &unwell)
    }))
}

/// Clients in each host's place, at the proxy there.
pub(crate) fn insiders(
    pace_ms: u64,
    mesh: &Mesh,
    dir: &Path,
) -> anyhow::Result<Vec<(Child, PathBuf)>> {
    let own = std::env::current_exe()?;
    let mut insiders = Vec::new();
    for (index, (host, proxy)) in HOSTS.iter().zip(&mesh.proxies).enumerate() {
        let out = dir.join(format!("insider-{host}.jsonl"));
        let first = 1_000 + 100 * u32::try_from(index)?;
        let child = mesh
            .net()
            .place(host)?
            .command(&own)
            .arg("chaos-insider")
            .args([format!("--proxy={proxy}"), format!("--first={first}")])
            .arg(format!("--pace-ms={pace_ms}"))
            .arg("--out")
            .arg(&out)
            .stdin(Stdio::piped())
            .spawn()
            .context("start clients inside a host's place")?;
        insiders.push((child, out));
    }
    Ok(insiders)
}

/// Clients of one host, until the input ends.
///
/// # Errors
/// When a client died, or what they saw can't be written.
pub async fn insider(args: InsiderArgs) -> anyhow::Result<bool> {
    let history = Arc::new(History::default());
    let stop = CancellationToken::new();
    let load = Load {
        proxies: args.proxy,
        clients: INSIDERS,
        first: args.first,
        pace: Duration::from_millis(args.pace_ms),
    };
    let ender = stop.clone();
    std::thread::spawn(move || {
        let mut nothing = String::new();
        // Whatever ends the input ends the run.
        let _ = std::io::stdin().read_line(&mut nothing);
        ender.cancel();
    });
    client::run(&load, &history, &stop).await?;
    history.save(&args.out)?;
    Ok(true)
}

/// One fault after the other until the time is over. Returns what did not become well again.
async fn torment(
    args: &Args,
    mesh: &mut Mesh,
    timeline: &mut Timeline,
) -> anyhow::Result<Vec<String>> {
    let kinds = kinds(&args.faults)?;
    let mut random = SmallRng::seed_from_u64(args.seed);
    let end = Instant::now() + Duration::from_secs(60 * u64::from(args.minutes));
    let mut unwell = Vec::new();
    let mut happened: BTreeMap<Kind, u32> = BTreeMap::new();
    while Instant::now() < end {
        let fault = Fault::draw(&mut random, &kinds);
        say(&format!(
            "{:?} for {} ms",
            fault.kind,
            fault.lasts.as_millis()
        ));
        timeline.begin(format!("{:?}", fault.kind), fault.kind.is_planned());
        if let Err(error) = fault::happen(mesh, fault).await {
            say(&format!("  could not be done: {error:#}"));
        }
        *happened.entry(fault.kind).or_default() += 1;
        let ended_us = now_us();
        match mesh.wait_steady(CALM, HEAL_LIMIT).await {
            Ok(took) => {
                // The calm after it is peace, in which no promise is excused.
                timeline.well(ended_us + took.as_micros() as u64);
                say(&format!("  well after {} ms", took.as_millis()));
            }
            Err(error) => {
                say(&format!("  NOT WELL: {error:#}"));
                unwell.push(format!("after {:?}: {error:#}", fault.kind));
                // The next faults would only show the same.
                break;
            }
        }
    }
    say(&format!("faults: {happened:?}"));
    unwell.extend(mesh.complaints());
    Ok(unwell)
}

/// Every key that clients wrote, and how.
fn keys_of(records: &[Record]) -> BTreeMap<String, Asked> {
    let mut keys = BTreeMap::new();
    for record in records {
        if !keys.contains_key(&record.key) {
            keys.insert(record.key.clone(), record.kind);
        }
    }
    keys
}

/// Reads every key that the clients wrote.
async fn read_all(mesh: &Mesh, keys: &BTreeMap<String, Asked>) -> anyhow::Result<Finals> {
    let mut finals = Finals::default();
    for (key, kind) in keys {
        let mut lists = vec![];
        match kind {
            Asked::Add => lists.push(key.clone()),
            Asked::Once => {
                lists.push(key.clone());
                let tally = redis::cmd("HGETALL").arg(check::tally(key)).to_owned();
                let tally = read(mesh, &tally).await?;
                finals.executed.insert(key.clone(), tally);
            }
            Asked::Block => lists.extend([key.clone(), check::twin(key)]),
            Asked::Count => {
                let value: Option<u64> = read(mesh, redis::cmd("GET").arg(key)).await?;
                finals.counters.insert(key.clone(), value.unwrap_or(0));
            }
            Asked::Set | Asked::Get => {}
        }
        for list in lists {
            let all = redis::cmd("LRANGE").arg(&list).arg(0).arg(-1).to_owned();
            let values = read(mesh, &all).await?;
            finals.lists.insert(list, values);
        }
    }
    Ok(finals)
}

/// A run of an hour is not given up for one connection: each proxy is asked in turn.
async fn read<T: redis::FromRedisValue>(mesh: &Mesh, ask: &redis::Cmd) -> anyhow::Result<T> {
    let mut last = None;
    for proxy in mesh.proxies.iter().cycle().take(READ_ATTEMPTS) {
        let answer = tokio::time::timeout(READ_LIMIT, async {
            ask.query_async(&mut client::connect(proxy).await?).await
        });
        match answer.await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => last = Some(error.to_string()),
            Err(_) => last = Some("no answer in time".to_owned()),
        }
    }
    bail!("the data can't be read at the end: {last:?}")
}

/// Prints the verdict; returns whether every promise was kept.
fn report(
    args: &Args,
    records: &[Record],
    findings: &[Finding],
    checked: &[Checked],
    unwell: &[String],
) -> bool {
    let told = |outcome| records.iter().filter(|r| r.outcome == outcome).count();
    say(&format!(
        "seed {}, {} min, durability {}: {} requests: {} acknowledged, {} refused, {} of unknown \
         outcome; longest wait {} ms",
        args.seed,
        args.minutes,
        args.durability,
        records.len(),
        told(Outcome::Acked),
        told(Outcome::Refused),
        told(Outcome::Unknown),
        records
            .iter()
            .map(|r| r.to_us - r.from_us)
            .max()
            .unwrap_or(0)
            / 1_000,
    ));
    let mut words: BTreeMap<&str, usize> = BTreeMap::new();
    for error in records.iter().filter_map(|r| r.error.as_deref()) {
        *words.entry(error).or_default() += 1;
    }
    for (error, count) in words {
        say(&format!("  {count} x {error}"));
    }
    for finding in findings {
        let word = if finding.broken { "BROKEN" } else { "allowed" };
        say(&format!("{word}: {}: {}", finding.check, finding.what));
    }
    for what in unwell {
        say(&format!("BROKEN: not well again: {what}"));
    }
    let verdicts = check::verdicts(findings, checked);
    verdicts.iter().for_each(|(line, _)| say(line));
    let kept = unwell.is_empty()
        && findings.iter().all(|f| !f.broken)
        && verdicts.iter().all(|(_, kept)| *kept);
    say(if kept {
        "every promise was kept"
    } else {
        "PROMISES WERE BROKEN"
    });
    kept
}

#[allow(clippy::print_stdout)] // The report is what this program is for.
fn say(line: &str) {
    println!("{line}");
}
