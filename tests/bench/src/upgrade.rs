//! `slotmesh-bench upgrade`: engines exchanged under a load with books, there, back, and there again.
//!
//! Invariant: the load runs from before the first process is exchanged until every node is in sync
//! again, and nothing of it is repeated by the clients.

mod report;
mod waits;

use std::{path::Path, time::Duration};

use anyhow::{Context as _, bail};
use slotmesh_ctl::{api::Api, progress, up::engine};
use slotmesh_harness::{Mesh, MeshOptions, engines, programs, wait_until};
use slotmesh_proto::{
    instance::v1::{FinalizeBy, ModifyInstanceMinorVersionRequest, Shard},
    store::v1::{NodeRole, OperatorChoice, TaskState},
    task::v1::{ResolveTaskRequest, Task},
};
use tokio::{process::Command, time::Instant};

pub use self::report::Report;
use self::{
    report::{BackTimes, ShardTimes},
    waits::Waits,
};
use crate::{
    args::LoadArgs,
    switchover::{Load, Target, connect},
};

/// Of one task without its bake: engines are tried, processes exchanged one by one.
const TASK_LIMIT: Duration = Duration::from_secs(300);
/// Until replicas follow again.
const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// After the switch back has been committed, a proxy has its new route within milliseconds.
const WRITES_LIMIT: Duration = Duration::from_secs(10);
/// Keys of one request that fills the shards.
const FILL_BATCH: u32 = 500;

/// Flags of `slotmesh-bench upgrade`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Engine that the meshes are made of, as `slotmesh up --engine`.
    #[arg(long, default_value = "redis-7.0", value_name = "NAME|PATH")]
    pub from: String,
    /// Engine that they get.
    #[arg(long, default_value = "redis-8.2", value_name = "NAME|PATH")]
    pub to: String,
    /// Kinds of instances; may be repeated; both by default.
    #[arg(long, value_enum)]
    pub architecture: Vec<Architecture>,
    /// Meshes of each kind, one after the other.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub count: u32,
    /// Shards of a cluster.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub shards: u32,
    /// Replicas of each shard.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=5))]
    pub replicas: u32,
    /// Keys that are there before.
    #[arg(long, default_value_t = 20_000, value_name = "N")]
    pub keys: u32,
    /// How long the old primary follows with the old engine, in seconds.
    #[arg(long, default_value_t = 2, value_name = "SECONDS")]
    pub bake: u32,
    /// Shards that are upgraded at a time, once the first one is done.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub parallel: u32,
    /// Goes back in the bake of a first upgrade, before the one that stays.
    #[arg(long)]
    pub back: bool,
    #[command(flatten)]
    pub load: LoadArgs,
}

/// What kind of instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Architecture {
    Standard,
    Cluster,
}

impl Architecture {
    fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Cluster => "cluster",
        }
    }
}

/// Upgrades mesh after mesh and prints what came of it; returns whether every promise was kept.
///
/// # Errors
/// When a mesh can't be started, or the measurement itself failed.
pub async fn main(args: Args) -> anyhow::Result<bool> {
    let kinds = match &args.architecture[..] {
        [] => &[Architecture::Standard, Architecture::Cluster][..],
        some => some,
    };
    let mut report = Report::default();
    for number in 0..args.count {
        for kind in kinds {
            let run = Run::start(&args, *kind, number).await?;
            Box::pin(run.go(&mut report)).await?;
        }
    }
    report.finish();
    args.load.output.print(&report, Report::text)?;
    Ok(report.broken().is_empty())
}

/// One mesh.
struct Run<'a> {
    args: &'a Args,
    kind: Architecture,
    number: u32,
    mesh: Mesh,
    target: Target,
    api: Api,
}

/// Of the shards of an upgrade, in their order.
type Primaries = Vec<(String, String)>;

impl<'a> Run<'a> {
    async fn start(args: &'a Args, kind: Architecture, number: u32) -> anyhow::Result<Self> {
        let options = MeshOptions {
            architecture: Some(kind.name().to_owned()),
            shards: (kind == Architecture::Cluster).then_some(args.shards),
            replicas: Some(args.replicas),
            engine: Some(args.from.clone()),
            ..MeshOptions::default()
        };
        let mesh = Mesh::start(&options).await?;
        let (target, api) = (Target::of(&mesh), mesh.api().await?);
        Ok(Self {
            args,
            kind,
            number,
            mesh,
            target,
            api,
        })
    }

    async fn go(mut self, report: &mut Report) -> anyhow::Result<()> {
        let to = engines::find(&self.args.to)?;
        let name = list(&self.mesh, &to).await?;
        report.from = engine::version(&engines::find(&self.args.from)?).await?;
        report.to.clone_from(&name);
        self.in_sync().await?;
        fill(&self.target, self.args.keys).await?;
        let shards = self.api.describe_shards(&self.target.instance).await?;
        let load = &self.args.load;
        let load = Load::start(&self.target, load.clients, load.pace()).await?;
        let waits = Waits::start(&self.target, &shards).await?;
        let went = self.there_and_back(&name, &waits, report).await;
        let wrong = waits.stop().await;
        report.told.merge(load.audit().await?);
        report.told.client_errors += wrong.len() as u64;
        wrong.into_iter().for_each(|what| report.told.sample(what));
        went?;
        self.mesh.stop().await?;
        Ok(())
    }

    async fn there_and_back(
        &mut self,
        name: &str,
        waits: &Waits,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        if self.args.back {
            let before = self.mesh.full_copies();
            let primaries = self.primaries().await?;
            let began = Instant::now();
            let task = self.begin(name, FinalizeBy::Operator).await?;
            let bakes = |t: &Task| {
                let mut shards = t.shards.iter();
                shards.all(|s| s.phase == "Bake" && s.rollback == "Open")
            };
            let task = self.until(&task, "every shard's bake, the way back open", bakes);
            let Some(task) = given(task.await, report) else {
                return Ok(());
            };
            self.note(&task, began, waits, report);
            report.full_copies += self.mesh.full_copies() - before;
            self.go_back(&task, &primaries, waits, report).await?;
        }
        let before = self.mesh.full_copies();
        let began = Instant::now();
        let task = self.begin(name, FinalizeBy::Auto).await?;
        let done = |t: &Task| t.state() == TaskState::Done;
        let task = self.until(&task, "the upgrade to be done", done).await;
        if let Some(task) = given(task, report) {
            let took = began.elapsed().as_secs_f64() * 1000.0;
            report.task_ms.push(took);
            report.upgrades += 1;
            self.note(&task, began, waits, report);
            self.in_sync().await?;
        }
        report.full_copies += self.mesh.full_copies() - before;
        Ok(())
    }

    /// Takes all shards back and notes when writes reach the old primaries.
    async fn go_back(
        &mut self,
        task: &Task,
        primaries: &Primaries,
        waits: &Waits,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let copies = self.mesh.full_copies();
        let word = Instant::now();
        let request = ResolveTaskRequest {
            task_id: task.task_id.clone(),
            choice: OperatorChoice::Undo.into(),
            client_token: Api::token(None),
        };
        self.api.tasks().resolve_task(request).await?;
        let mut writes: Vec<Option<Instant>> = vec![None; primaries.len()];
        wait_until(TASK_LIMIT, "writes on the old primaries", async || {
            let now = self.primaries().await?;
            for (at, (was, is)) in primaries.iter().zip(&now).enumerate() {
                if was == is {
                    writes[at].get_or_insert_with(Instant::now);
                }
            }
            let back = writes.iter().flatten().count();
            anyhow::ensure!(back == writes.len(), "{back} of {} are", writes.len());
            Ok(())
        })
        .await?;
        let mut firsts = Vec::new();
        for (at, since) in writes.into_iter().flatten().enumerate() {
            let what = "a write on an old primary";
            let first = wait_until(WRITES_LIMIT, what, async || {
                waits.first_since(at, since).context("none yet")
            });
            firsts.push(first.await?);
        }
        let ended = |t: &Task| t.state() == TaskState::Cancelled;
        let ended = self.until(&task.task_id, "the way back", ended).await;
        if given(ended, report).is_none() {
            return Ok(());
        }
        self.in_sync().await?;
        report.ways_back += 1;
        report.full_copies_back += self.mesh.full_copies() - copies;
        for (at, (first, (shard, _))) in firsts.into_iter().zip(primaries).enumerate() {
            report.back.push(BackTimes {
                mesh: self.number + 1,
                architecture: self.kind.name(),
                shard: shard.clone(),
                to_writes_ms: (first - word).as_secs_f64() * 1000.0,
                wait_ms: waits.longest_ms(at, word, Instant::now()),
            });
        }
        Ok(())
    }

    fn note(&self, task: &Task, began: Instant, waits: &Waits, report: &mut Report) {
        let now = Instant::now();
        for (at, shard) in task.shards.iter().enumerate() {
            report.shards.push(ShardTimes {
                mesh: self.number + 1,
                architecture: self.kind.name(),
                shard: shard.shard_id.clone(),
                hold_ms: shard.hold_ms,
                critical_ms: shard.critical_ms,
                wait_ms: waits.longest_ms(at, began, now),
            });
        }
    }

    async fn begin(&self, name: &str, finalize: FinalizeBy) -> anyhow::Result<String> {
        // Those that wait for an operator's word wait for it together.
        let together = finalize == FinalizeBy::Operator;
        let request = ModifyInstanceMinorVersionRequest {
            instance_id: self.target.instance.clone(),
            minor_version: name.to_owned(),
            client_token: Api::token(None),
            bake_seconds: Some(self.args.bake),
            canary_shards: together.then_some(0),
            parallel_shards: match together {
                true => self.args.shards,
                false => self.args.parallel,
            },
            finalize: finalize.into(),
            ..ModifyInstanceMinorVersionRequest::default()
        };
        let mut instances = self.api.instances();
        let answer = instances.modify_instance_minor_version(request).await;
        let answer = answer.with_context(|| format!("begin the upgrade to {name}"))?;
        Ok(answer.into_inner().task_id)
    }

    /// Waits for the claim to be true of a task.
    ///
    /// # Errors
    /// When it ends before, or takes too long.
    async fn until(
        &self,
        task_id: &str,
        what: &str,
        claim: impl Fn(&Task) -> bool,
    ) -> anyhow::Result<Task> {
        let limit = TASK_LIMIT + Duration::from_secs(u64::from(self.args.bake));
        let found = wait_until(limit, what, async || {
            let task = self.api.clone().task(task_id).await?;
            let is_so = claim(&task);
            // Both end the wait.
            if is_so || progress::has_ended(task.state()) {
                return Ok((is_so, task));
            }
            bail!("{}", said(&task))
        });
        match found.await? {
            (true, task) => Ok(task),
            (false, task) => bail!("it ended before {what}: {}", said(&task)),
        }
    }

    async fn shards(&self) -> anyhow::Result<Vec<Shard>> {
        let mut api = self.api.clone();
        Ok(api.describe_shards(&self.target.instance).await?)
    }

    async fn primaries(&self) -> anyhow::Result<Primaries> {
        let primary = |shard: &Shard| {
            let mut nodes = shard.nodes.iter();
            let found = nodes.find(|n| n.current_role() == NodeRole::Primary);
            let id = found.map(|n| n.node_id.clone()).unwrap_or_default();
            (shard.shard_id.clone(), id)
        };
        Ok(self.shards().await?.iter().map(primary).collect())
    }

    async fn in_sync(&self) -> anyhow::Result<()> {
        wait_until(SYNC_LIMIT, "every replica to be in sync", async || {
            for shard in self.shards().await? {
                let is_well = |n: &slotmesh_proto::instance::v1::Node| {
                    n.in_sync || n.current_role() == NodeRole::Primary
                };
                anyhow::ensure!(shard.nodes.iter().all(is_well), "{:?}", shard.nodes);
            }
            Ok(())
        })
        .await
    }
}

fn said(task: &Task) -> String {
    let shards = task.shards.iter();
    let each = shards.map(|s| format!("; shard {}: {} {}", s.shard_id, s.phase, s.message));
    format!(
        "{:?} {}{}",
        task.state(),
        task.message,
        each.collect::<String>()
    )
}

/// A task that did not come to what was wanted is a finding, not the end of the measurement.
fn given(task: anyhow::Result<Task>, report: &mut Report) -> Option<Task> {
    task.map_err(|error| {
        report.failed += 1;
        report.told.sample(format!("{error:#}"));
    })
    .ok()
}

/// Lists the engine in the mesh's catalogue; its name there.
async fn list(mesh: &Mesh, program: &Path) -> anyhow::Result<String> {
    let version = engine::version(program).await?;
    let is_valkey = program.display().to_string().contains("valkey");
    let product = if is_valkey { "valkey" } else { "redis" };
    let mut command = Command::new(programs::path("slotmesh")?);
    command.args(["--controller", &mesh.contract.controller]);
    command.args(["artifact", "add", product, &version, "--file"]);
    let output = command.arg(program).output().await?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("list {product} {version}: {why}");
    }
    Ok(format!("{product}-{version}"))
}

async fn fill(target: &Target, keys: u32) -> anyhow::Result<()> {
    let proxy = target.proxies.first().context("there is no proxy")?;
    let mut connection = connect(proxy, false).await?;
    for first in (0..keys).step_by(FILL_BATCH as usize) {
        let mut pipe = redis::pipe();
        for n in first..keys.min(first + FILL_BATCH) {
            pipe.cmd("SET").arg(format!("there:{n}")).arg(n).ignore();
        }
        let filled: redis::RedisResult<()> = pipe.query_async(&mut connection).await;
        filled.context("fill the shards")?;
    }
    Ok(())
}
