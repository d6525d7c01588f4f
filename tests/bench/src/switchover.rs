//! Switchovers back and forth under writers and readers of a foreign client library.
//!
//! Every client keeps a ledger of what was acknowledged to it; the audit at the end compares the
//! ledgers with what the shards hold. One lost, doubled or failed request breaks the promise.

mod audit;
mod client;
mod ledger;
mod load;
mod report;
mod told;

use std::{io::Write, time::Duration};

use anyhow::bail;
use slotmesh_ctl::{
    api::Api,
    failure::Failure,
    progress::{self, Watcher},
};
use slotmesh_harness::{Mesh, MeshOptions, wait_until};
use slotmesh_proto::{
    instance::v1::{Shard, SwitchOverRequest},
    store::v1::NodeRole,
    task::v1 as task,
};
use tokio::time::{Instant, sleep, timeout};

pub(crate) use self::load::Load;
pub use self::{client::connect, report::Report, told::Told};
use crate::args::LoadArgs;

/// A switchover's task has deadlines of its own that are shorter.
const TASK_LIMIT: Duration = Duration::from_secs(60);
/// After the old primary has become a replica of the new one, it is in sync within moments.
const SYNC_LIMIT: Duration = Duration::from_secs(30);
/// Load before the first switchover and after the last one.
const QUIET: Duration = Duration::from_millis(500);
const NOTE_EVERY: u32 = 25;
/// A mesh that fails this often is broken; going on would only take time.
const FAILURES_MAX: u32 = 3;

/// Flags of `slotmesh-bench switchover`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Switchovers, one shard each.
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub count: u32,
    /// Engine of the nodes, as `slotmesh up --engine`.
    #[arg(long, value_name = "NAME|PATH")]
    pub engine: Option<String>,
    /// Shards of the mesh that is started.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub shards: u32,
    /// Pause between two switchovers, in milliseconds.
    #[arg(long, default_value_t = 100, value_name = "MS")]
    pub pause_ms: u64,
    /// Measures a mesh that runs already, with the proxies of its only instance.
    #[arg(long, value_name = "ADDR")]
    pub controller: Option<String>,
    /// Endpoint to use instead of those of the instance; may be repeated.
    #[arg(long = "proxy", value_name = "ADDR", requires = "controller")]
    pub proxies: Vec<String>,
    #[command(flatten)]
    pub load: LoadArgs,
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct Target {
    pub controller: String,
    pub proxies: Vec<String>,
    pub instance: String,
}

impl Target {
    /// The instance of a mesh that a test started.
    pub fn of(mesh: &Mesh) -> Self {
        Self {
            controller: mesh.contract.controller.clone(),
            proxies: mesh.contract.proxies.clone(),
            instance: mesh.contract.instance.clone(),
        }
    }
}

/// How it is measured.
#[derive(Debug, Clone)]
pub struct Options {
    pub count: u32,
    pub clients: u32,
    pub pace: Duration,
    pub pause: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            count: 10,
            clients: 10,
            pace: Duration::from_millis(1),
            pause: Duration::from_millis(100),
        }
    }
}

/// Runs the measurement of the command line and prints it; returns whether every promise was kept.
///
/// # Errors
/// When it could not be made.
pub async fn main(args: Args) -> anyhow::Result<bool> {
    let options = Options {
        count: args.count,
        clients: args.load.clients,
        pace: args.load.pace(),
        pause: Duration::from_millis(args.pause_ms),
    };
    let report = if let Some(controller) = &args.controller {
        let target = running(controller, args.proxies.clone()).await?;
        run(&target, &options).await?
    } else {
        let mesh = Mesh::start(&MeshOptions {
            engine: args.engine.clone(),
            shards: Some(args.shards),
            ..MeshOptions::default()
        })
        .await?;
        let report = run(&Target::of(&mesh), &options).await?;
        mesh.stop().await?;
        report
    };
    args.load.output.print(&report, Report::text)?;
    Ok(report.kept_every_promise())
}

async fn running(controller: &str, proxies: Vec<String>) -> anyhow::Result<Target> {
    let mut api = Api::connect(controller).await?;
    let instances = api.describe_instances(&[]).await?;
    let [instance] = &instances[..] else {
        bail!(
            "the mesh at {controller} has {} instances, not one",
            instances.len()
        );
    };
    let own = instance
        .proxies
        .iter()
        .map(|p| p.address.clone())
        .filter(|a| !a.is_empty());
    let proxies = if proxies.is_empty() {
        own.collect()
    } else {
        proxies
    };
    Ok(Target {
        controller: controller.to_owned(),
        proxies,
        instance: instance.instance_id.clone(),
    })
}

/// Loads the target, switches its shards over in turn, and audits what the clients were told.
///
/// # Errors
/// When the measurement itself failed; broken promises are in the report.
pub async fn run(target: &Target, options: &Options) -> anyhow::Result<Report> {
    let mut api = Api::connect(&target.controller).await?;
    let mut report = Report {
        engine_version: engine_version(&mut api, target).await?,
        ..Report::default()
    };
    let load = Load::start(target, options.clients, options.pace).await?;
    sleep(QUIET).await;
    let switched = switch_all(&mut api, target, options, &mut report).await;
    sleep(QUIET).await;
    let told = load.audit().await?;
    switched?;
    report.told.merge(told);
    report.finish();
    Ok(report)
}

async fn engine_version(api: &mut Api, target: &Target) -> anyhow::Result<String> {
    let shards = api.describe_shards(&target.instance).await?;
    let nodes = shards.iter().flat_map(|s| &s.nodes);
    Ok(nodes
        .map(|n| n.engine_version.clone())
        .next()
        .unwrap_or_default())
}

async fn switch_all(
    api: &mut Api,
    target: &Target,
    options: &Options,
    report: &mut Report,
) -> anyhow::Result<()> {
    for turn in 0..options.count {
        let replica = ready_replica(api, target, turn as usize).await?;
        let started = Instant::now();
        match switch(api, target, &replica).await {
            Ok(task) => {
                report.switchovers += 1;
                report
                    .task_ms
                    .push(started.elapsed().as_secs_f64() * 1000.0);
                for shard in &task.shards {
                    report.hold_ms.push(shard.hold_ms);
                    report.critical_ms.push(shard.critical_ms);
                }
            }
            Err(failure) => {
                report.failed_switchovers += 1;
                report
                    .told
                    .sample(format!("switchover {turn} to {replica}: {failure}"));
                if report.failed_switchovers >= FAILURES_MAX {
                    return Ok(());
                }
            }
        }
        if (turn + 1) % NOTE_EVERY == 0 {
            note(turn + 1, options.count);
        }
        sleep(options.pause).await;
    }
    Ok(())
}

/// A long run says on stderr that it goes on; nobody has to read it.
fn note(done: u32, of: u32) {
    let _ = writeln!(std::io::stderr().lock(), "{done} of {of} switchovers");
}

/// A replica of the shard whose turn it is, once it is in sync.
async fn ready_replica(api: &Api, target: &Target, turn: usize) -> anyhow::Result<String> {
    wait_until(SYNC_LIMIT, "a replica in sync", async || {
        let shards = api.clone().describe_shards(&target.instance).await?;
        let shard: &Shard = shards
            .get(turn % shards.len().max(1))
            .ok_or_else(|| anyhow::anyhow!("the instance has no shards"))?;
        let mut replicas = shard
            .nodes
            .iter()
            .filter(|n| n.current_role() == NodeRole::Replica);
        match replicas.find(|n| n.in_sync && n.state == "Running") {
            Some(replica) => Ok(replica.node_id.clone()),
            None => Err(anyhow::anyhow!(
                "none in {} ({})",
                shard.shard_id,
                shard.mode
            )),
        }
    })
    .await
}

async fn switch(api: &mut Api, target: &Target, replica: &str) -> Result<task::Task, Failure> {
    let request = SwitchOverRequest {
        instance_id: target.instance.clone(),
        target_primary_node_ids: vec![replica.to_owned()],
        client_token: uuid::Uuid::now_v7().to_string(),
        ..SwitchOverRequest::default()
    };
    let task_id = api.switch_over(request).await?;
    let watched = timeout(TASK_LIMIT, progress::watch(api, &task_id, 1, &mut Silent)).await;
    let task = watched.unwrap_or_else(|_| {
        Err(Failure::TaskEnded {
            task_id: task_id.clone(),
            state: "running".to_owned(),
            message: format!("not ended after {TASK_LIMIT:?}"),
        })
    })?;
    progress::require_done(&task)?;
    Ok(task)
}

/// Nobody looks at single events here.
#[derive(Debug)]
struct Silent;

impl Watcher for Silent {
    fn event(&mut self, _: &task::TaskEvent, _: Option<&task::Task>) -> Result<(), Failure> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use slotmesh_harness::{RedisServer, engines};

    use super::{client::Clients, *};

    /// A load of half a second on a plain server, and something done to the data before the audit.
    async fn audited(spoil: &[(&str, &str)]) -> Told {
        let server = RedisServer::start(&engines::find("").unwrap(), &[])
            .await
            .unwrap();
        let target = Target {
            controller: String::new(),
            proxies: vec![server.address.clone()],
            instance: String::new(),
        };
        let pace = Options::default().pace;
        let clients = Clients::start(&target, 10, pace, "t").await.unwrap();
        sleep(Duration::from_millis(500)).await;
        let ledgers = clients.stop().await.unwrap();
        let mut told = Told::default();
        ledgers.iter().for_each(|ledger| told.add(ledger));
        let mut connection = client::connect(&server.address, false).await.unwrap();
        for (command, key) in spoil {
            let mut change = redis::cmd(command);
            change.arg(key);
            match *command {
                "INCRBY" => change.arg(3),
                "RPUSH" => change.arg(0),
                _ => &mut change,
            };
            change
                .query_async::<redis::Value>(&mut connection)
                .await
                .unwrap();
        }
        audit::audit(&target, &ledgers, &mut told).await.unwrap();
        told
    }

    #[tokio::test]
    async fn a_server_that_loses_nothing_passes_the_audit() {
        let told = audited(&[]).await;
        assert!(told.acknowledged > 100, "{told:?}");
        assert!(told.is_true(), "{told:?}");
    }

    #[tokio::test]
    async fn a_lost_key_and_a_lost_list_are_found() {
        let told = audited(&[("DEL", "bench:t:0:id:0"), ("DEL", "bench:{t:3}:list:0")]).await;
        assert!(told.lost > 1, "{told:?}");
        assert_eq!(told.duplicated, 0);
    }

    #[tokio::test]
    async fn a_write_done_twice_is_found() {
        let told = audited(&[
            ("INCRBY", "bench:{t:2}:counter"),
            ("RPUSH", "bench:t:1:list:0"),
        ])
        .await;
        assert_eq!((told.lost, told.duplicated), (0, 4), "{told:?}");
    }
}
