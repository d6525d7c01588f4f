//! `slotmesh-bench upgrade`: engines exchanged under a load with books, there, back, and there again.
//!
//! Invariant: the load runs from before the first process is exchanged until every node is in sync
//! again, and nothing of it is repeated by the clients.

mod args;
mod holds;
mod moved;
mod report;
mod waits;

use std::{collections::BTreeSet, path::Path, time::Duration};

use anyhow::{Context as _, bail};
use slotmesh_ctl::{api::Api, progress, up::engine};
use slotmesh_harness::{Mesh, RedisServer, engines, programs, wait_until};
use slotmesh_proto::{
    instance::v1::{FinalizeBy, ModifyInstanceMinorVersionRequest, Shard},
    store::v1::{NodeRole, OperatorChoice, TaskState},
    task::v1::{ResolveTaskRequest, Task},
};
use tokio::{
    process::Command,
    time::{Instant, sleep},
};

pub use self::{
    args::{Architecture, Args, Method},
    report::Report,
};
use self::{
    holds::{Anchor, Switch, switches},
    moved::{Hosts, Members},
    report::{Calm, Hold, WayBack},
    waits::Waits,
};
use crate::{
    chaos::history::now_us,
    failover::timeline,
    probe::Probe,
    switchover::{Load, Target, connect},
};

/// Of one task without its bake: engines are tried, processes exchanged one by one.
const TASK_LIMIT: Duration = Duration::from_secs(300);
/// Until replicas follow again.
const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// Load before anything is changed: what clients wait for on this machine as it is.
const CALM: Duration = Duration::from_secs(3);
/// Keys of one request that fills the shards.
const FILL_BATCH: u32 = 500;

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
    hosts: Hosts,
    anchor: Anchor,
}

/// What looks on.
struct Watch {
    waits: Waits,
    probe: Probe,
    /// Ids of the shards, in the order of the waits.
    shards: Vec<String>,
}

impl Watch {
    /// How late a thread woke at most that wanted nothing else, in milliseconds.
    fn late_ms(&self, from: Instant, to: Instant) -> f64 {
        let us = |at: Instant| now_us().saturating_sub(at.elapsed().as_micros() as u64);
        self.probe.late_ms(us(from), us(to))
    }
}

impl<'a> Run<'a> {
    async fn start(args: &'a Args, kind: Architecture, number: u32) -> anyhow::Result<Self> {
        let mesh = Mesh::start(&kind.options(args)).await?;
        let (target, api) = (Target::of(&mesh), mesh.api().await?);
        let hosts = match args.method {
            Method::CrossHost => Hosts::add(&mesh, args.replicas + 1).await?,
            Method::Auto | Method::InPlace => Hosts::default(),
        };
        Ok(Self {
            args,
            kind,
            number,
            mesh,
            target,
            api,
            hosts,
            anchor: Anchor::now(),
        })
    }

    /// New nodes take the places of those that are there.
    fn is_moved(&self) -> bool {
        self.args.method == Method::CrossHost || self.kind == Architecture::Standalone
    }

    async fn go(mut self, report: &mut Report) -> anyhow::Result<()> {
        let to = engines::find(&self.args.to)?;
        let name = list(&self.mesh, &to).await?;
        report.from = engine::version(&engines::find(&self.args.from)?).await?;
        report.to.clone_from(&name);
        self.in_sync().await?;
        fill(&self.target, self.args.keys).await?;
        let shards = self.shards().await?;
        let plain = RedisServer::start(&engines::find("")?, &[]).await?;
        let load = &self.args.load;
        let load = Load::start(&self.target, load.clients, load.pace()).await?;
        let watch = Watch {
            waits: Waits::start(&self.target, &shards, &plain.address).await?,
            probe: Probe::start()?,
            shards: shards.into_iter().map(|s| s.shard_id).collect(),
        };
        self.anchor = Anchor::now();
        sleep(CALM).await;
        let changed = Instant::now();
        let went = self.there_and_back(&name, &watch, report).await;
        self.note_calm(&watch, changed, report);
        let wrong = watch.waits.stop().await;
        watch.probe.end();
        // What was found by now is to be seen, also of a mesh that is not well in the end.
        if let Err(error) = self.in_sync().await {
            report.told.sample(format!("{error:#}"));
        }
        match load.audit().await {
            Ok(told) => report.told.merge(told),
            Err(error) => {
                report.failed += 1;
                report.told.sample(format!("{error:#}"));
            }
        }
        report.told.client_errors += wrong.len() as u64;
        wrong.into_iter().for_each(|what| report.told.sample(what));
        let lost = timeline::failovers(&self.api, &self.target.instance, self.anchor.wall).await?;
        let of_mesh = |t: Task| format!("mesh {}: a failover: {}", self.number + 1, said(&t));
        report.failovers.extend(lost.into_iter().map(of_mesh));
        went?;
        self.hosts.stop().await?;
        self.mesh.stop().await?;
        Ok(())
    }

    async fn there_and_back(
        &mut self,
        name: &str,
        watch: &Watch,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        if self.args.back {
            let before = self.mesh.full_copies();
            let task = self.begin(name, FinalizeBy::Operator).await?;
            let bakes = |t: &Task| {
                let mut shards = t.shards.iter();
                shards.all(|s| s.phase == "Bake" && s.rollback == "Open")
            };
            let there = self.until(&task, "every shard's bake, the way back open", bakes);
            let Some(there) = given(there.await, report) else {
                return Ok(());
            };
            report.full_copies += self.copies_since(before);
            self.go_back(&there, watch, report).await?;
        }
        let (before, members) = (self.mesh.full_copies(), Members::of(&self.shards().await?));
        let began = Instant::now();
        let task = self.begin(name, FinalizeBy::Auto).await?;
        let done = |t: &Task| t.state() == TaskState::Done;
        let task = self.until(&task, "the upgrade to be done", done).await;
        if let Some(task) = given(task, report) {
            let took = began.elapsed().as_secs_f64() * 1000.0;
            report.task_ms.push(took);
            report.upgrades += 1;
            let mut there = BTreeSet::new();
            for switch in self.switches(&task).await {
                let way = match there.insert(switch.shard.clone()) {
                    true => "there",
                    false => "roles",
                };
                self.note(&task, &switch, way, watch, report);
            }
            self.in_sync().await?;
            let after = Members::of(&self.shards().await?);
            let wrong = members.wrong(&after, self.is_moved(), self.args.preserve_roles);
            report.failed += u32::from(!wrong.is_empty());
            wrong.into_iter().for_each(|what| report.told.sample(what));
        }
        report.full_copies += self.copies_since(before);
        Ok(())
    }

    /// Of nodes that are exchanged where they are; a new one has to copy.
    fn copies_since(&self, before: usize) -> usize {
        match self.is_moved() {
            true => 0,
            false => self.mesh.full_copies().saturating_sub(before),
        }
    }

    /// Takes all shards back; notes the switches of both ways, and when writes were served again.
    async fn go_back(
        &mut self,
        there: &Task,
        watch: &Watch,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let copies = self.mesh.full_copies();
        let word = Instant::now();
        let request = ResolveTaskRequest {
            task_id: there.task_id.clone(),
            choice: OperatorChoice::Undo.into(),
            client_token: Api::token(None),
        };
        self.api.tasks().resolve_task(request).await?;
        let ended = |t: &Task| t.state() == TaskState::Cancelled;
        let back = self.until(&there.task_id, "the way back", ended).await;
        let Some(back) = given(back, report) else {
            return Ok(());
        };
        for switch in self.switches(&back).await {
            if switch.turned_back.is_none() {
                self.note(there, &switch, "there", watch, report);
                continue;
            }
            self.note(&back, &switch, "back", watch, report);
            self.note_way_back(&switch, word, watch, report);
        }
        self.in_sync().await?;
        report.ways_back += 1;
        report.full_copies_back += self.copies_since(copies);
        Ok(())
    }

    /// The committed switches of an ended task.
    async fn switches(&mut self, task: &Task) -> Vec<Switch> {
        let events = timeline::of_task(&mut self.api, &task.task_id, self.anchor.wall);
        switches(&events.await, self.anchor)
    }

    fn note(
        &self,
        task: &Task,
        switch: &Switch,
        way: &'static str,
        watch: &Watch,
        report: &mut Report,
    ) {
        let Some(at) = watch.shards.iter().position(|id| *id == switch.shard) else {
            return;
        };
        let shard = task.shards.iter().find(|s| s.shard_id == switch.shard);
        let (from, to) = (switch.declared, switch.closed);
        // What the machine did while that client waited, and not a moment longer.
        let (wanted, acknowledged) = watch.waits.longest(at, from, to).unwrap_or((from, to));
        report.holds.push(Hold {
            mesh: self.number + 1,
            architecture: self.kind.name(),
            shard: switch.shard.clone(),
            way,
            hold_ms: shard.map_or(0.0, |s| s.hold_ms),
            critical_ms: shard.map_or(0.0, |s| s.critical_ms),
            wait_ms: ms(wanted, acknowledged),
            plain_ms: watch.waits.plain_ms(wanted, acknowledged),
            late_ms: watch.late_ms(wanted, acknowledged),
            parts: switch.words.clone(),
        });
    }

    fn note_way_back(&self, switch: &Switch, word: Instant, watch: &Watch, report: &mut Report) {
        let at = watch.shards.iter().position(|id| *id == switch.shard);
        let first = at.and_then(|at| watch.waits.first_since(at, switch.committed));
        let Some(first) = first else {
            let shard = &switch.shard;
            let what = format!("shard {shard}: no write was acknowledged after it went back");
            report.failed += 1;
            report.told.sample(what);
            return;
        };
        report.back.push(WayBack {
            mesh: self.number + 1,
            architecture: self.kind.name(),
            shard: switch.shard.clone(),
            to_turn_ms: ms(word, switch.turned_back.unwrap_or(word)),
            to_declared_ms: ms(word, switch.declared),
            to_writes_ms: ms(word, first),
            wait_ms: at.map_or(0.0, |at| watch.waits.longest_ms(at, word, switch.closed)),
            plain_ms: watch.waits.plain_ms(word, first),
            late_ms: watch.late_ms(word, first),
        });
    }

    /// What clients waited for before anything was changed, and since.
    fn note_calm(&self, watch: &Watch, changed: Instant, report: &mut Report) {
        let (before, plain_before) = watch.waits.percentiles(changed - CALM, changed);
        let now = Instant::now();
        let (since, plain_since) = watch.waits.percentiles(changed, now);
        report.calm.push(Calm {
            mesh: self.number + 1,
            architecture: self.kind.name(),
            before,
            since,
            plain_before,
            plain_since,
            late_before_ms: watch.late_ms(changed - CALM, changed),
            late_since_ms: watch.late_ms(changed, now),
        });
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
            method: self.args.method.of_request().into(),
            preserve_roles: self.args.preserve_roles && !together,
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

fn ms(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1000.0
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
