//! The command line: what can be said, and who does it.
//!
//! Flags and their defaults are a contract with scripts; what a command does is in
//! [`operate`], [`up`] and [`demo`].

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use slotmesh_proto::store::v1::TaskState;

use crate::{
    artifact::ArtifactCommand, demo, failure::Failure, lost_writes::LostWritesCommand, operate,
    proxies::ProxyCommand, render::Output, up, upgrade::UpgradeArgs,
};

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed: the task did not end Done, or no controller could be reached
  2  usage: the command line can't be read
  3  refused: the request was not accepted and changed nothing

Environment:
  SLOTMESH_CONTROLLER  address of a controller, as --controller
  SLOTMESH_ENGINES     a directory with engines, as <name>/redis-server (slotmesh up)
  SLOTMESH_LOG         log filter of `slotmesh up`, such as debug";

/// Operates a mesh of Redis instances: shards, replicas and the proxies before them.
#[derive(Debug, Parser)]
#[command(name = "slotmesh", version, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    /// Address of any controller, HOST:PORT; more of them, separated by commas, for when one dies.
    #[arg(long, global = true, env = "SLOTMESH_CONTROLLER", value_name = "ADDR")]
    pub controller: Option<String>,
    /// How results are written to stdout.
    #[arg(long, short = 'o', global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Says on stderr which controller is asked, and under which trace id.
    #[arg(long, short = 'v', global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs a whole mesh on this machine until SIGINT or SIGTERM.
    Up(UpArgs),
    /// Starts a mesh, switches every shard over under load, and shows what clients noticed.
    Demo(DemoArgs),
    /// What users create and connect to.
    #[command(subcommand)]
    Instance(InstanceCommand),
    /// Makes replicas the primaries of their shards; clients wait for milliseconds, none fails.
    Switchover(SwitchoverArgs),
    /// Nodes of an instance: replaced on another host, or preferred when a primary is lost.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Gives a shard another primary although nobody knows that its own has stopped; may lose data.
    Failover(FailoverArgs),
    /// What needs care: who leads, silent hosts, shards that do not serve, tasks that wait.
    Status,
    /// Which node was the primary of which epoch, since when and why; newest first.
    Epochs {
        #[arg(value_name = "INSTANCE")]
        instance: String,
        /// Only this shard's.
        #[arg(long, value_name = "SHARD", default_value = "")]
        shard: String,
    },
    /// Writes that only a lost primary had: what was kept of them, and sending some again.
    #[command(subcommand)]
    LostWrites(LostWritesCommand),
    /// Users of clients, with rules in the words of Redis's ACL SETUSER.
    #[command(subcommand)]
    Account(AccountCommand),
    /// Parameters of engines and proxies, changed while they serve.
    #[command(subcommand)]
    Parameters(ParametersCommand),
    /// How many replicas must have a write before it is acknowledged.
    #[command(subcommand)]
    Durability(DurabilityCommand),
    /// Programs that hosts may run: engines and proxies, several versions of each.
    #[command(subcommand)]
    Artifact(ArtifactCommand),
    /// What an instance runs, node by node, and what is listed that is newer.
    Version {
        #[arg(value_name = "INSTANCE")]
        instance: String,
    },
    /// Gives an instance's nodes another engine; clients wait for milliseconds, none fails.
    Upgrade(UpgradeArgs),
    /// What operators asked for, and how far it is.
    #[command(subcommand)]
    Task(TaskCommand),
    /// Machines with an agent.
    #[command(subcommand)]
    Host(HostCommand),
    /// Processes that clients connect to.
    #[command(subcommand)]
    Proxy(ProxyCommand),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ArchitectureArg {
    /// One shard.
    Standard,
    /// Slots spread over several shards.
    Cluster,
}

impl ArchitectureArg {
    /// Its name in settings and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Cluster => "cluster",
        }
    }
}

/// Flags of `slotmesh up`. What is not given is taken from the data directory, or else is the default.
#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// Directory that holds everything: ports, store, Redis data, logs. Made if missing.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Kind of the instance [default: cluster].
    #[arg(long, value_enum)]
    pub architecture: Option<ArchitectureArg>,
    /// Number of shards [default: 2; 1 for standard].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub shards: Option<u32>,
    /// Replicas of each shard [default: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=5))]
    pub replicas: Option<u32>,
    /// Number of proxies [default: 2].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub proxies: Option<u32>,
    /// Worker threads of each proxy [default: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub workers: Option<u32>,
    /// A version such as 7.0 from an .engines directory, or a path [default: redis-server on PATH].
    #[arg(long, value_name = "VERSION|PATH")]
    pub engine: Option<String>,
    /// `embedded`, or `etcd://HOST:PORT,…` [default: embedded].
    #[arg(long, value_name = "STORE")]
    pub store: Option<String>,
    /// Number of controllers; more than one needs an etcd [default: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(up::CONTROLLERS_MAX)))]
    pub controllers: Option<u32>,
    #[command(flatten)]
    pub etcd: up::EtcdArgs,
    /// Engine parameter of the instance that is created, such as enable-debug-command=yes; may be
    /// repeated.
    #[arg(long = "parameter", value_name = "NAME=VALUE", value_parser = name_value)]
    pub parameters: Vec<(String, String)>,
}

#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Engine of the nodes, as `slotmesh up --engine`.
    #[arg(long, value_name = "VERSION|PATH")]
    pub engine: Option<String>,
    /// Clients that load the mesh.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub clients: u32,
}

#[derive(Debug, Subcommand)]
pub enum InstanceCommand {
    /// Creates an instance; its task ends when the instance serves.
    Create(CreateArgs),
    /// Every instance.
    List,
    /// One instance with its shards and nodes.
    Describe {
        #[arg(value_name = "INSTANCE")]
        instance: String,
    },
    /// Sets when tasks may begin that are scheduled for the maintenance window.
    Maintain {
        #[arg(value_name = "INSTANCE")]
        instance: String,
        /// HH:MM-HH:MM in UTC, at least an hour, also over midnight; empty: any time.
        #[arg(long, value_name = "WINDOW")]
        window: String,
    },
    /// Sets which patches of the engine are installed by themselves, in the maintenance window.
    AutoUpgrade(crate::auto_upgrade::AutoUpgradeArgs),
    /// Sets after how many seconds without its host a node is replaced by one on another; 0: never.
    ReplaceAfter {
        #[arg(value_name = "INSTANCE")]
        instance: String,
        #[arg(value_name = "SECONDS")]
        seconds: u32,
    },
    /// Stops the processes of an instance and removes its data.
    Delete {
        #[arg(value_name = "INSTANCE")]
        instance: String,
        #[command(flatten)]
        start: StartArgs,
    },
}

/// Flags of everything that starts a task.
#[derive(Debug, Clone, Args)]
pub struct StartArgs {
    /// Makes a repeat of the request safe: same token and same request, same task.
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// Waits for the end of the task and shows its progress.
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Clone, Args)]
pub struct CreateArgs {
    /// Name shown in lists; the id if not given.
    #[arg(long, default_value = "")]
    pub name: String,
    #[arg(long, value_enum, default_value_t = ArchitectureArg::Cluster)]
    pub architecture: ArchitectureArg,
    /// Number of shards [default: 2; 1 for standard].
    #[arg(long, value_name = "N")]
    pub shards: Option<u32>,
    /// Replicas of each shard [default: 1].
    #[arg(long, value_name = "N")]
    pub replicas: Option<u32>,
    /// Replicas that must have a write before it is acknowledged.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub durability: u32,
    /// After this many seconds without its host a node is replaced by one on another; 0: never
    /// [default: 600].
    #[arg(long, value_name = "SECONDS")]
    pub replace_after: Option<u32>,
    /// Number of proxies [default: 2].
    #[arg(long, value_name = "N")]
    pub proxies: Option<u32>,
    /// Worker threads of each proxy [default: 1].
    #[arg(long, value_name = "N")]
    pub workers: Option<u32>,
    /// Engine as an agent names it, or a path on the hosts [default: the agents' choice].
    #[arg(long, default_value = "")]
    pub engine: String,
    /// File whose first line is the password of user `default`; without it, clients need none.
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// Engine parameter, such as maxmemory=100mb; may be repeated.
    #[arg(long = "parameter", value_name = "NAME=VALUE", value_parser = name_value)]
    pub parameters: Vec<(String, String)>,
    #[command(flatten)]
    pub start: StartArgs,
}

#[derive(Debug, Clone, Args)]
pub struct SwitchoverArgs {
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    /// Replica that becomes primary; one for each shard to switch, up to 50.
    #[arg(long = "target", value_name = "NODE", required = true)]
    pub targets: Vec<String>,
    #[command(flatten)]
    pub schedule: ScheduleArgs,
    #[command(flatten)]
    pub start: StartArgs,
}

/// When a task may begin; without a flag: now.
#[derive(Debug, Clone, Default, Args)]
#[group(multiple = false)]
pub struct ScheduleArgs {
    /// At this time, such as 2026-11-22T03:00:00Z; at most 30 days ahead.
    #[arg(long, value_name = "TIME")]
    pub at: Option<String>,
    /// In the instance's next maintenance window.
    #[arg(long)]
    pub in_window: bool,
}

#[derive(Debug, Clone, Args)]
pub struct FailoverArgs {
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    #[arg(long, value_name = "SHARD")]
    pub shard: String,
    /// Your word that writes which only the present primary has may be lost. It is audited.
    #[arg(long, required = true)]
    pub accept_data_loss: bool,
    /// Who becomes primary [default: the node with most of the data].
    #[arg(long, value_name = "NODE", default_value = "")]
    pub target: String,
    #[command(flatten)]
    pub start: StartArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ChoiceArg {
    /// Try again from where it is.
    Retry,
    /// Put back what was before.
    Undo,
    /// Go on although data may be lost.
    AcceptLoss,
    /// Begin no further shard (upgrade).
    Pause,
    /// Begin shards again (upgrade).
    Resume,
    /// Give up the way back of shards that bake now (upgrade).
    Finalize,
}

#[derive(Debug, Subcommand)]
pub enum AccountCommand {
    /// Makes an account, or replaces one whole.
    Set(AccountSetArgs),
    /// Every account; `default` is not listed before it is set.
    List {
        #[arg(value_name = "INSTANCE")]
        instance: String,
    },
    /// Removes accounts; their clients are cut off.
    Remove {
        #[arg(value_name = "INSTANCE")]
        instance: String,
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, Clone, Args)]
pub struct AccountSetArgs {
    /// File whose first line is the account's password; only its hash is sent.
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Such as: on '>password' '~cache:*' +@all -flushall. Applied one by one to a new account.
    #[arg(
        value_name = "RULE",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub rules: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum ParametersCommand {
    /// Sets parameters on every running node and proxy; what an engine refuses changes nothing.
    Set(ParametersSetArgs),
    /// Engine parameters that were set, and all parameters of proxies.
    Show {
        #[arg(value_name = "INSTANCE")]
        instance: String,
    },
}

#[derive(Debug, Clone, Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("changes").required(true).multiple(true))]
pub struct ParametersSetArgs {
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    /// Engine parameter, such as maxmemory-policy=allkeys-lru; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_value, group = "changes")]
    pub engine: Vec<(String, String)>,
    /// Parameter of proxies, such as split=slot; an empty value is the default. May be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_value, group = "changes")]
    pub proxy: Vec<(String, String)>,
}

#[derive(Debug, Subcommand)]
pub enum DurabilityCommand {
    /// Writes that fewer replicas confirm in time are answered WAITFAIL. 0: at once, as Redis does.
    Set {
        #[arg(value_name = "INSTANCE")]
        instance: String,
        /// At most the number of replicas of a shard.
        #[arg(value_name = "REPLICAS")]
        replicas: u32,
        /// Makes a repeated call do nothing more.
        #[arg(long, value_name = "TOKEN", default_value = "")]
        client_token: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// Tasks, newest first.
    List {
        /// Only those of this instance.
        #[arg(long, value_name = "INSTANCE", default_value = "")]
        instance: String,
        /// Only of this kind, such as SwitchOver; may be repeated.
        #[arg(long = "kind", value_name = "KIND")]
        kinds: Vec<String>,
        /// Only in this state, such as needs-operator; may be repeated.
        #[arg(long = "state", value_name = "STATE", value_parser = task_state)]
        states: Vec<i32>,
        /// Only those that change this shard.
        #[arg(long, value_name = "SHARD", default_value = "")]
        shard: String,
        /// Only those created since this time, such as 2026-11-22T03:00:00Z.
        #[arg(long, value_name = "TIME", default_value = "")]
        since: String,
        /// At most this many.
        #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
        limit: u32,
    },
    /// One task.
    Show {
        #[arg(value_name = "TASK")]
        task: String,
        /// Also what each of its steps is made of, and until which it can be cancelled.
        #[arg(long)]
        steps: bool,
    },
    /// Shows a task's events until it ends; exits 0 only when it ends Done.
    Watch {
        #[arg(value_name = "TASK")]
        task: String,
        /// First event to show.
        #[arg(long, default_value_t = 1, value_name = "N")]
        from: u64,
    },
    /// Asks a task to stop; refused past its point of no return.
    Cancel {
        #[arg(value_name = "TASK")]
        task: String,
        #[arg(long, value_name = "TOKEN", default_value = "")]
        client_token: String,
    },
    /// Gives a task that waits for its time another one; without a flag: now.
    Reschedule {
        #[arg(value_name = "TASK")]
        task: String,
        #[command(flatten)]
        schedule: ScheduleArgs,
        #[arg(long, value_name = "TOKEN", default_value = "")]
        client_token: String,
    },
    /// Tells a task that can't go on by itself how to; `task show` lists what it offers.
    Resolve {
        #[arg(value_name = "TASK")]
        task: String,
        #[arg(value_enum)]
        choice: ChoiceArg,
        #[arg(long, value_name = "TOKEN", default_value = "")]
        client_token: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Replaces a node that is no primary by one on another host, whether its own is lost or well.
    Replace {
        #[arg(value_name = "INSTANCE")]
        instance: String,
        #[arg(value_name = "NODE")]
        node: String,
        /// Where the new one runs [default: the best host].
        #[arg(long, value_name = "HOST", default_value = "")]
        to: String,
        #[command(flatten)]
        start: StartArgs,
    },
    /// Which of several replicas with the same data is promoted: the highest; 0: never.
    Priority {
        #[arg(value_name = "INSTANCE")]
        instance: String,
        #[arg(value_name = "NODE")]
        node: String,
        #[arg(value_name = "PRIORITY")]
        priority: u32,
        #[arg(long, value_name = "TOKEN", default_value = "")]
        client_token: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Every host whose agent is connected.
    List,
    /// Moves every primary off a host by switchovers, before work on it; its replicas stay.
    Drain {
        #[arg(value_name = "HOST")]
        host: String,
        /// Longest time until the last one has moved, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60,
              value_parser = clap::value_parser!(u32).range(1..=3600))]
        within: u32,
    },
}

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    /// A [`Failure`] that knows its exit code.
    pub async fn run(self) -> Result<(), Failure> {
        let output = self.output;
        match self.command {
            Command::Up(args) => up::run(args, output).await,
            Command::Demo(args) => demo::run(args, output).await,
            command => {
                let address = self.controller.ok_or_else(|| {
                    Failure::Usage(
                        "which controller? give --controller HOST:PORT or set SLOTMESH_CONTROLLER"
                            .to_owned(),
                    )
                })?;
                operate::run(&address, command, output, self.verbose).await
            }
        }
    }
}

fn task_state(text: &str) -> Result<i32, String> {
    let name = text.replace('-', "_").to_ascii_uppercase();
    TaskState::from_str_name(&format!("TASK_STATE_{name}"))
        .map(i32::from)
        .ok_or_else(|| {
            "expected scheduled, pending, running, done, rolled-back, cancelled or needs-operator"
                .to_owned()
        })
}

fn name_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
