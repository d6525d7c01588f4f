//! `slotmesh up`: a whole mesh on one machine, in the foreground.
//!
//! It starts and supervises the controller and one agent for each simulated host; the agents run
//! nodes and proxies. Killed itself, it leaves them all running, and the next `up` with the same
//! directory takes over: it replaces controller and agents, and the new agents adopt the rest.

mod child;
pub mod contract;
mod control;
pub mod engine;
mod layout;
pub mod process;
mod serving;

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context, anyhow};
use slotmesh_runtime::{shutdown, telemetry};
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

pub use self::control::EtcdArgs;
use self::{
    child::{Child, Spec},
    contract::Contract,
    layout::Layout,
};
use crate::{
    command::{ArchitectureArg, UpArgs},
    failure::Failure,
    render::{self, Output, Text},
};

const CONTROLLER: &str = "controller";
/// See [`UpArgs`].
pub(crate) const CONTROLLERS_MAX: u32 = control::CONTROLLERS_MAX;

/// An agent stops its proxies (which drain) and its nodes (which write their files) one after the other.
const AGENT_STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// The controller only closes its store.
const CONTROLLER_STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Looking at the API one last time must not delay the stop.
const LAST_LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// Nodes and proxies are stopped by their agents; those that were may still be exiting.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// What is asked of a mesh; None leaves it to the data directory, or else to the default.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    pub data: PathBuf,
    pub architecture: Option<String>,
    pub shards: Option<u32>,
    pub replicas: Option<u32>,
    pub proxies: Option<u32>,
    pub workers: Option<u32>,
    pub engine: Option<String>,
    pub store: Option<String>,
    pub controllers: Option<u32>,
    pub etcd: EtcdArgs,
    pub parameters: BTreeMap<String, String>,
}

impl From<UpArgs> for Settings {
    fn from(args: UpArgs) -> Self {
        Self {
            data: args.data,
            architecture: args
                .architecture
                .map(ArchitectureArg::name)
                .map(str::to_owned),
            shards: args.shards,
            replicas: args.replicas,
            proxies: args.proxies,
            workers: args.workers,
            engine: args.engine.as_deref().map(engine::normalized),
            store: args.store,
            controllers: args.controllers,
            etcd: args.etcd,
            parameters: args.parameters.into_iter().collect(),
        }
    }
}

/// Runs a mesh until SIGINT or SIGTERM, and stops it.
///
/// # Errors
/// When it can't be started; then, too, nothing is left running.
pub async fn run(args: UpArgs, output: Output) -> Result<(), Failure> {
    let _telemetry = telemetry::init("slotmesh-up");
    let mut signal = std::pin::pin!(shutdown::signalled());
    let mut mesh = tokio::select! {
        biased;
        _ = &mut signal => return Ok(()),
        mesh = Mesh::launch(args.into()) => mesh?,
    };
    let served = tokio::select! {
        biased;
        _ = &mut signal => None,
        served = mesh.serve() => Some(served),
    };
    let result = match served {
        None => Ok(()),
        Some(Err(failure)) => Err(failure),
        Some(Ok(contract)) => {
            let announced = announce(&contract, &mesh, output);
            if announced.is_ok() {
                let _ = signal.await;
            }
            announced
        }
    };
    if output == Output::Text {
        render::note("stopping");
    }
    mesh.stop().await;
    result
}

fn announce(contract: &Contract, mesh: &Mesh, output: Output) -> Result<(), Failure> {
    let text = match output {
        Output::Json => serde_json::to_string(contract).context("write JSON")?,
        Output::Text => format!(
            "{}\n\ndata and logs are in {}; Ctrl-C stops everything",
            contract.text(),
            mesh.layout.dir.display()
        ),
    };
    Ok(render::line(&text)?)
}

/// The processes of a mesh on this machine.
#[derive(Debug)]
pub struct Mesh {
    layout: Layout,
    /// The first is the one that `up` asks.
    controllers: Vec<Child>,
    agents: Vec<Child>,
}

impl Mesh {
    /// Starts controller and agents, after taking the directory over from whoever left it.
    ///
    /// # Errors
    /// When something of it can't be had: the directory, an engine, a program, a port.
    pub async fn launch(settings: Settings) -> Result<Self, Failure> {
        let layout = Layout::open(&settings)?;
        let shape = &layout.file.shape;
        let engine = engine::find(&shape.engine)?;
        let version = engine::version(&engine).await?;
        let programs = Programs::find()?;
        stop_leftovers(&layout).await?;
        layout.require_free_ports()?;

        // No await from here on: a caller that gives up finds nothing started, or everything.
        info!(data = %layout.dir.display(), engine = %engine.display(), version, "starting");
        let controllers = control::specs(&layout, &programs).into_iter();
        let controllers = controllers.map(Child::start).collect();
        let mut agents = Vec::new();
        for place in &layout.file.agents {
            let dir = layout.host_dir(&place.host_id);
            std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
            let arguments = [
                ("--host-id", place.host_id.clone()),
                ("--data", dir.display().to_string()),
                ("--listen", format!("127.0.0.1:{}", place.port)),
                ("--advertise-ip", "127.0.0.1".to_owned()),
                ("--engine-default", engine.display().to_string()),
                ("--proxy-binary", programs.proxy.display().to_string()),
            ];
            let mut arguments: Vec<String> = arguments
                .into_iter()
                .flat_map(|(flag, value)| [flag.to_owned(), value])
                .collect();
            for controller in control::addresses(&layout) {
                arguments.extend(["--controller".to_owned(), controller]);
            }
            arguments.push("--stop-all-on-exit".to_owned());
            agents.push(Child::start(Spec {
                name: format!("agent of {}", place.host_id),
                program: programs.agent.clone(),
                arguments,
                log: layout.log(&format!("agent-{}", place.host_id)),
                bound_file: dir.join("agent.json"),
                stop_timeout: AGENT_STOP_TIMEOUT,
            }));
        }
        Ok(Self {
            layout,
            controllers,
            agents,
        })
    }

    /// Waits until the instance serves, creating it if there is none, and says where.
    ///
    /// # Errors
    /// What was waited for in vain, with the log that should explain it.
    pub async fn serve(&mut self) -> Result<Contract, Failure> {
        serving::bring_up(self).await
    }

    /// Stops agents, which stop nodes and proxies, then the controller; leaves nothing running.
    pub async fn stop(self) {
        let last = serving::last_known(&self, Instant::now() + LAST_LOOK_TIMEOUT).await;
        let mut stopping = tokio::task::JoinSet::new();
        for agent in self.agents {
            stopping.spawn(agent.stop());
        }
        stopping.join_all().await;
        let mut stopping = tokio::task::JoinSet::new();
        for controller in self.controllers {
            stopping.spawn(controller.stop());
        }
        stopping.join_all().await;
        let Some(last) = last else {
            return;
        };
        let known: Vec<u32> = last.grandchildren().collect();
        let mut left = process::wait_gone(&known, EXIT_TIMEOUT).await;
        left.retain(|pid| process::belongs_to(*pid, &self.layout.dir));
        if !left.is_empty() {
            warn!(pids = ?left, "nodes or proxies outlived their agents, killing them");
            if let Err(error) = process::kill_and_wait(&left).await {
                warn!(error = format!("{error:#}"), "can't stop everything");
            }
        }
    }

    fn controllers(&self) -> impl Iterator<Item = &Child> {
        self.controllers.iter()
    }

    fn agents(&self) -> impl Iterator<Item = &Child> {
        self.agents.iter()
    }

    fn children(&self) -> impl Iterator<Item = &Child> {
        self.controllers.iter().chain(&self.agents)
    }

    /// The end of the log that most likely explains why nothing goes on: of a process that died,
    /// else the controller's, which runs the tasks.
    fn telling_log(&self) -> String {
        let died = self
            .children()
            .max_by_key(|c| (c.status().deaths, c.name() == CONTROLLER));
        died.map(Child::log_tail).unwrap_or_default()
    }
}

/// Controllers and agents of an `up` that was killed: replaced, so that nobody runs unsupervised.
/// Nodes and proxies stay; the new agents adopt them.
async fn stop_leftovers(layout: &Layout) -> Result<(), Failure> {
    let hosts = layout
        .file
        .agents
        .iter()
        .map(|a| layout.host_dir(&a.host_id));
    let left: Vec<u32> = control::dirs(layout)
        .into_iter()
        .chain(hosts)
        .flat_map(|dir| process::started_with_data(&dir))
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    info!(pids = ?left, "taking over from an earlier start: replacing its controller and agents");
    Ok(process::kill_and_wait(&left).await?)
}

/// The other programs of this build, beside this one.
#[derive(Debug)]
struct Programs {
    controller: PathBuf,
    agent: PathBuf,
    proxy: PathBuf,
}

impl Programs {
    fn find() -> Result<Self, Failure> {
        let own = std::env::current_exe().context("find this program's own path")?;
        let beside = |name: &str| {
            let path = own.with_file_name(name);
            if path.is_file() {
                return Ok(path);
            }
            Err(Failure::Local(anyhow!(
                "{} is missing; build or install all programs of slotmesh together (cargo build --workspace)",
                path.display()
            )))
        };
        Ok(Self {
            controller: beside("slotmesh-controller")?,
            agent: beside("slotmesh-agent")?,
            proxy: beside("slotmesh-proxy")?,
        })
    }
}

/// Runs a mesh for as long as some work takes, and stops it in any case; ends early at a signal.
///
/// # Errors
/// Of the start, or of the work.
pub async fn with_mesh<T, F>(settings: Settings, limit: Duration, work: F) -> Result<T, Failure>
where
    F: AsyncFnOnce(&Contract) -> Result<T, Failure>,
{
    let mut signal = std::pin::pin!(shutdown::signalled());
    let mut mesh = Mesh::launch(settings).await?;
    let deadline = Instant::now() + limit;
    let done = async {
        let contract = mesh.serve().await?;
        work(&contract).await
    };
    let result = tokio::select! {
        biased;
        _ = &mut signal => Err(Failure::Local(anyhow!("interrupted"))),
        done = timeout_at(deadline, done) => done.unwrap_or_else(|_| {
            Err(Failure::Local(anyhow!("not done after {} s", limit.as_secs())))
        }),
    };
    mesh.stop().await;
    result
}
