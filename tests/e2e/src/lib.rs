//! What the end-to-end tests share: clients, witnesses that see every error, the ctl as a program.

pub mod clock;
pub mod controllers;
pub mod load;
pub mod upgrades;

use std::{
    collections::BTreeMap,
    future::Future,
    io::ErrorKind,
    path::Path,
    process::{Output, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context, bail};
use redis::aio::MultiplexedConnection;
use slotmesh_ctl::api::Api;
use slotmesh_harness::{Mesh, programs};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

/// A ctl command ends at once, or after its task, which has a deadline of its own.
const CTL_LIMIT: Duration = Duration::from_secs(90);
/// Longer than the longest hold of a proxy.
const RAW_LIMIT: Duration = Duration::from_secs(10);

/// A client of one of the mesh's proxies, in RESP2.
///
/// # Errors
/// When it can't connect.
pub async fn client(mesh: &Mesh, proxy: usize) -> anyhow::Result<MultiplexedConnection> {
    connect(&mesh.contract.proxies[proxy], false).await
}

/// A client of an address, in RESP2 or RESP3.
///
/// # Errors
/// When it can't connect.
pub async fn connect(address: &str, resp3: bool) -> anyhow::Result<MultiplexedConnection> {
    let connected = slotmesh_bench::switchover::connect(address, resp3).await;
    connected.with_context(|| format!("connect to {address}"))
}

/// Runs the ctl against the mesh and waits for its end.
///
/// # Errors
/// When it can't be run or does not end.
pub fn ctl(
    mesh: &Mesh,
    arguments: &[&str],
) -> impl Future<Output = anyhow::Result<Output>> + use<> {
    let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
    let controller = mesh.contract.controller.clone();
    async move {
        let mut command = Command::new(programs::path("slotmesh")?);
        command.args(["--controller", &controller]).args(arguments);
        finish(command).await
    }
}

/// (id, pid) of every proxy that serves, in the order of their ids.
///
/// # Errors
/// When the ctl can't be asked, or says something else.
pub async fn proxy_pids(mesh: &Mesh) -> anyhow::Result<Vec<(String, u64)>> {
    let listed = json(&ctl(mesh, &["-o", "json", "proxy", "list"]).await?)?;
    let listed = listed.as_array().context("a list of proxies")?;
    let one = |proxy: &serde_json::Value| {
        let id = proxy["proxy_id"].as_str().context("a proxy's id")?;
        let pid = proxy["pid"].as_u64().context("a proxy's pid")?;
        anyhow::Ok((id.to_owned(), pid))
    };
    let mut all: Vec<_> = listed.iter().map(one).collect::<Result<_, _>>()?;
    // A process that does not serve calls itself by its proxy and pid.
    all.retain(|(id, _)| !id.contains('.'));
    all.sort();
    Ok(all)
}

/// Runs a command that must end by itself.
///
/// # Errors
/// When it can't be run or does not end.
pub async fn finish(mut command: Command) -> anyhow::Result<Output> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(CTL_LIMIT, command.output()).await;
    output
        .with_context(|| format!("{command:?} did not end in {CTL_LIMIT:?}"))?
        .context("run it")
}

/// The JSON that a command printed.
///
/// # Errors
/// With what it said, when it failed or printed something else.
pub fn json(output: &Output) -> anyhow::Result<serde_json::Value> {
    if !output.status.success() {
        bail!(
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    serde_json::from_slice(&output.stdout).context("read its JSON")
}

/// Reads a JSON file.
///
/// # Errors
/// When there is none, or it is none.
pub fn json_file(path: &Path) -> anyhow::Result<serde_json::Value> {
    let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
}

/// Node ids by role: (shard, primary, replicas).
///
/// # Errors
/// When the API does not answer.
pub async fn roles(mesh: &Mesh) -> anyhow::Result<Vec<(String, String, Vec<String>)>> {
    let mut shards: Vec<(String, String, Vec<String>)> = Vec::new();
    for node in mesh.nodes().await? {
        if shards.last().is_none_or(|(shard, ..)| *shard != node.shard) {
            shards.push((node.shard.clone(), String::new(), Vec::new()));
        }
        let Some((_, primary, replicas)) = shards.last_mut() else {
            continue;
        };
        match node.role.as_str() {
            "primary" => *primary = node.id,
            _ => replicas.push(node.id),
        }
    }
    Ok(shards)
}

/// Clients that increment counters without a pause and note every error, while a test breaks things.
#[derive(Debug)]
pub struct Witnesses {
    stop: CancellationToken,
    workers: Vec<JoinHandle<Seen>>,
}

/// What one witness saw.
#[derive(Debug)]
pub struct Seen {
    address: String,
    key: String,
    pub acknowledged: u64,
    pub errors: Vec<String>,
    pub longest: Duration,
}

impl Witnesses {
    /// Some on every proxy.
    ///
    /// # Errors
    /// When one can't connect.
    pub async fn start(addresses: &[String], each: usize) -> anyhow::Result<Self> {
        // Several groups may watch one mesh, each with counters of its own.
        static GROUPS: AtomicU32 = AtomicU32::new(0);
        let group = GROUPS.fetch_add(1, Relaxed);
        let stop = CancellationToken::new();
        let mut workers = Vec::new();
        for (number, address) in addresses.iter().flat_map(|a| vec![a; each]).enumerate() {
            let connection = connect(address, number % 2 == 1).await?;
            let seen = Seen {
                address: address.clone(),
                key: format!("witness:{group}:{number}"),
                acknowledged: 0,
                errors: Vec::new(),
                longest: Duration::ZERO,
            };
            workers.push(tokio::spawn(witness(connection, seen, stop.clone())));
        }
        Ok(Self { stop, workers })
    }

    /// Stops them; every acknowledged increment must be there, and there must be no error.
    ///
    /// # Errors
    /// With what was seen.
    pub async fn testify(self) -> anyhow::Result<Vec<Seen>> {
        self.stop.cancel();
        let mut all = Vec::new();
        for worker in self.workers {
            let seen = worker.await?;
            if !seen.errors.is_empty() {
                bail!("a client of {} saw errors: {:?}", seen.address, seen.errors);
            }
            let mut connection = connect(&seen.address, false).await?;
            let value: Option<u64> = redis::cmd("GET")
                .arg(&seen.key)
                .query_async(&mut connection)
                .await?;
            if value.unwrap_or_default() != seen.acknowledged {
                bail!(
                    "{} increments were acknowledged, {value:?} are there",
                    seen.acknowledged
                );
            }
            all.push(seen);
        }
        Ok(all)
    }
}

async fn witness(
    mut connection: MultiplexedConnection,
    mut seen: Seen,
    stop: CancellationToken,
) -> Seen {
    while !stop.is_cancelled() && seen.errors.len() < 3 {
        let started = Instant::now();
        let mut increment = redis::cmd("INCR");
        match increment
            .arg(&seen.key)
            .query_async::<u64>(&mut connection)
            .await
        {
            Ok(_) => seen.acknowledged += 1,
            Err(error) => seen.errors.push(error.to_string()),
        }
        seen.longest = seen.longest.max(started.elapsed());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    seen
}

/// Sends raw bytes and reads until the peer closes or `enough` is there.
///
/// # Errors
/// When neither happens in time.
pub async fn raw(address: &str, bytes: &[u8], enough: &str) -> anyhow::Result<String> {
    let mut socket = TcpStream::connect(address).await?;
    // The peer may close before it has read everything.
    let sent = socket.write_all(bytes).await;
    let mut answer = Vec::new();
    let read = async {
        loop {
            match socket.read_buf(&mut answer).await {
                Ok(0) => return Ok(()),
                Ok(_) if !enough.is_empty() && contains(&answer, enough) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    };
    match timeout(RAW_LIMIT, read).await {
        Ok(done) => done?,
        Err(_) => bail!(
            "no {enough:?} in {RAW_LIMIT:?} (sent: {sent:?}): {:?}",
            text(&answer)
        ),
    }
    Ok(text(&answer))
}

fn contains(bytes: &[u8], part: &str) -> bool {
    bytes
        .windows(part.len())
        .any(|window| window == part.as_bytes())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Everything about the instance that a refused request must not change.
///
/// # Errors
/// When the API does not answer.
pub async fn snapshot(mesh: &Mesh) -> anyhow::Result<String> {
    let mut api: Api = mesh.api().await?;
    let mut instances = api.describe_instances(&[]).await?;
    // In one order.
    let parameters: Vec<_> = instances
        .iter_mut()
        .flat_map(|i| [&mut i.engine_parameters, &mut i.proxy_parameters])
        .map(|map| std::mem::take(map).into_iter().collect::<BTreeMap<_, _>>())
        .collect();
    let mut shards = api.describe_shards(mesh.instance()).await?;
    for node in shards.iter_mut().flat_map(|s| &mut s.nodes) {
        // It moves by itself: replicas ping their primary.
        node.replication_offset = 0;
    }
    let tasks = ctl(mesh, &["--output", "json", "task", "list"]).await?;
    Ok(format!(
        "{instances:#?}\n{parameters:#?}\n{shards:#?}\n{}",
        text(&tasks.stdout)
    ))
}
