//! A whole mesh of real processes, started as a user would: with `slotmesh up`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use slotmesh_ctl::{
    api::Api,
    up::contract::{Contract, NodeEntry},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use crate::{programs, signals};

/// `up` has its own, shorter deadline and says more when it is over.
const START_LIMIT: Duration = Duration::from_secs(150);
/// `up` gives agents 30 s and the controller 10 s before it kills them.
const STOP_LIMIT: Duration = Duration::from_secs(60);
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// Killing all processes of a directory is repeated, since one of them may just be starting another.
const KILL_ROUNDS_MAX: u32 = 20;
const LOG_TAIL_LINES: usize = 30;

/// Flags of `slotmesh up`; what is None is not given.
#[derive(Debug, Clone, Default)]
pub struct MeshOptions {
    pub architecture: Option<String>,
    pub shards: Option<u32>,
    pub replicas: Option<u32>,
    pub proxies: Option<u32>,
    pub workers: Option<u32>,
    pub engine: Option<String>,
    pub store: Option<String>,
    /// Engine parameters, NAME=VALUE.
    pub parameters: Vec<String>,
    /// More flags, as they are.
    pub flags: Vec<String>,
    /// What the programs find in their environment, beside what is there.
    pub environment: Vec<(String, String)>,
    /// Directory of the programs that `up` is one of; None: those under test.
    pub programs: Option<PathBuf>,
}

impl MeshOptions {
    fn arguments(&self) -> Vec<String> {
        let number = |n: Option<u32>| n.map(|n| n.to_string());
        let flags = [
            ("--architecture", self.architecture.clone()),
            ("--shards", number(self.shards)),
            ("--replicas", number(self.replicas)),
            ("--proxies", number(self.proxies)),
            ("--workers", number(self.workers)),
            ("--engine", self.engine.clone()),
            ("--store", self.store.clone()),
        ];
        let given = flags
            .into_iter()
            .filter_map(|(flag, value)| Some([flag.to_owned(), value?]));
        let parameters = self.parameters.iter();
        let parameters = parameters.map(|p| ["--parameter".to_owned(), p.clone()]);
        let more = self.flags.iter().cloned();
        given.chain(parameters).flatten().chain(more).collect()
    }
}

/// A mesh that serves. Dropped, it is killed, and its directory is removed unless the test panics.
#[derive(Debug)]
pub struct Mesh {
    /// What `up` said first.
    pub contract: Contract,
    /// The same as it was printed.
    pub first_line: String,
    up: Child,
    _stdout: BufReader<ChildStdout>,
    home: Home,
}

/// The directory of a mesh, which may have no `up` for a while.
#[derive(Debug)]
pub struct Home {
    dir: Option<TempDir>,
    path: PathBuf,
}

impl Home {
    /// An empty one.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new() -> anyhow::Result<Self> {
        // Short, because the nodes' unix sockets are in it and may have 107 bytes in all.
        let dir = tempfile::Builder::new().prefix("sm-").tempdir()?;
        let path = dir.path().canonicalize()?;
        Ok(Self {
            dir: Some(dir),
            path,
        })
    }

    /// What `up --data` gets.
    pub fn data(&self) -> PathBuf {
        self.path.join("d")
    }

    /// What `up` writes to stderr.
    pub fn log(&self) -> PathBuf {
        self.path.join("up.log")
    }

    /// A command for `slotmesh up` with this directory, logging to [`Home::log`].
    ///
    /// # Errors
    /// When the programs can't be built.
    pub fn up(&self, options: &MeshOptions) -> anyhow::Result<Command> {
        let log = File::options().create(true).append(true).open(self.log())?;
        let program = match &options.programs {
            Some(dir) => dir.join("slotmesh"),
            None => programs::path("slotmesh")?,
        };
        let mut command = Command::new(program);
        command
            .args(["up", "--output", "json", "--data"])
            .arg(self.data());
        command.args(options.arguments());
        command.envs(
            options
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        );
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        Ok(command)
    }

    /// Pids of everything that runs in this directory or was told of it.
    pub fn processes(&self) -> Vec<u32> {
        signals::of_directory(&self.path)
    }

    fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }
}

impl Home {
    /// Ends what runs in it and leaves its files for a person to look at.
    fn keep(mut self) -> PathBuf {
        self.kill_all();
        self.dir
            .take()
            .map_or_else(|| self.path.clone(), TempDir::keep)
    }

    fn kill_all(&self) {
        for _ in 0..KILL_ROUNDS_MAX {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            // All are hit before one is waited for, so that none can start another meanwhile.
            for pid in &left {
                let _ = signals::kill(*pid);
            }
            for pid in left {
                signals::kill_blocking(pid, KILL_LIMIT);
            }
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            let kept = dir.keep();
            eprintln!(
                "the mesh's directory is kept: {}\n{}",
                kept.display(),
                self.log_tail()
            );
        }
    }
}

impl Mesh {
    /// Starts a mesh in a new directory and waits until it serves.
    ///
    /// # Errors
    /// With the end of what `up` said.
    pub async fn start(options: &MeshOptions) -> anyhow::Result<Self> {
        Self::start_in(Home::new()?, options).await
    }

    /// Starts a mesh in a directory that may have been used before.
    ///
    /// # Errors
    /// As [`Mesh::start`].
    pub async fn start_in(home: Home, options: &MeshOptions) -> anyhow::Result<Self> {
        match Self::first_line(&home, options).await {
            Ok((up, stdout, first_line)) => {
                let contract = serde_json::from_str(&first_line).context("read the first line")?;
                Ok(Self {
                    contract,
                    first_line,
                    up,
                    _stdout: stdout,
                    home,
                })
            }
            Err(error) => {
                let said = home.log_tail();
                let kept = home.keep();
                Err(error.context(format!(
                    "start a mesh in {}; it said:\n{said}",
                    kept.display()
                )))
            }
        }
    }

    async fn first_line(
        home: &Home,
        options: &MeshOptions,
    ) -> anyhow::Result<(Child, BufReader<ChildStdout>, String)> {
        let mut up = home.up(options)?.spawn().context("start slotmesh up")?;
        let stdout = up.stdout.take().context("stdout of up is not piped")?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        match timeout(START_LIMIT, stdout.read_line(&mut line)).await {
            Ok(Ok(0)) => bail!("slotmesh up ended: {}", up.wait().await?),
            Ok(Ok(_)) => Ok((up, stdout, line)),
            Ok(Err(error)) => Err(error).context("read from slotmesh up"),
            Err(_) => bail!("slotmesh up said nothing for {START_LIMIT:?}"),
        }
    }

    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.home.data()
    }

    pub fn instance(&self) -> &str {
        &self.contract.instance
    }

    /// Pid of `slotmesh up`.
    ///
    /// # Errors
    /// When it has ended.
    pub fn up_pid(&self) -> anyhow::Result<u32> {
        self.up.id().context("slotmesh up has ended")
    }

    /// A connection to the controller.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn api(&self) -> anyhow::Result<Api> {
        Ok(Api::connect(&self.contract.controller).await?)
    }

    /// What the API shows of the nodes now.
    ///
    /// # Errors
    /// When the controller does not answer.
    pub async fn nodes(&self) -> anyhow::Result<Vec<NodeEntry>> {
        let shards = self.api().await?.describe_shards(self.instance()).await?;
        let nodes = shards
            .iter()
            .flat_map(|s| s.nodes.iter().map(|n| NodeEntry::new(&s.shard_id, n)));
        Ok(nodes.collect())
    }

    /// Copies in full that the nodes have ever taken, by their logs.
    pub fn full_copies(&self) -> usize {
        let inside = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
        let hosts = inside(self.data().join("hosts"));
        let nodes = hosts.flat_map(|host| inside(host.path().join("nodes")));
        let logs = nodes.map(|node| fs::read_to_string(node.path().join("redis.log")));
        logs.map(|log| log.unwrap_or_default().matches("Full resync from").count())
            .sum()
    }

    /// The agent of one more host, in a directory beside those of `up`. Told to stop (SIGTERM) it ends with
    /// what it runs; dropped, it is killed alone.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn add_host(&self, name: &str) -> anyhow::Result<Child> {
        let dir = self.data().join("hosts").join(name);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let mut command = Command::new(programs::path("slotmesh-agent")?);
        command.args(["--host-id", name, "--controller", &self.contract.controller]);
        command.args(["--listen", "127.0.0.1:0", "--stop-all-on-exit", "--data"]);
        command.arg(&dir).current_dir(&dir).kill_on_drop(true);
        let log = fs::File::create(dir.join("agent.log"))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command.spawn().context("start slotmesh-agent")
    }

    /// Pids that processes of ours wrote down when they were bound: controller and agents.
    ///
    /// # Errors
    /// When a file is missing or can't be read.
    pub fn bound_pid(&self, file: &Path) -> anyhow::Result<u32> {
        let path = self.data().join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let value: serde_json::Value = serde_json::from_str(&text)?;
        let pid = value["pid"]
            .as_u64()
            .and_then(|pid| u32::try_from(pid).ok());
        pid.with_context(|| format!("{} has no pid: {text}", path.display()))
    }

    /// Asks `up` to stop, as Ctrl-C does, and waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn stop(mut self) -> anyhow::Result<(ExitStatus, Home)> {
        signals::terminate(self.up_pid()?)?;
        match timeout(STOP_LIMIT, self.up.wait()).await {
            Ok(exit) => Ok((exit?, self.home)),
            Err(_) => bail!(
                "slotmesh up did not stop in {STOP_LIMIT:?}:\n{}",
                self.home.log_tail()
            ),
        }
    }

    /// Kills `up` alone: everything else goes on.
    ///
    /// # Errors
    /// When it has ended already.
    pub async fn kill_up(mut self) -> anyhow::Result<Home> {
        self.up.kill().await.context("kill slotmesh up")?;
        Ok(self.home)
    }
}
