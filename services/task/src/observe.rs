//! What is observed of the fleet: the newest reports of agents and proxies.

use std::collections::BTreeMap;

use slotmesh_topology::{Epoch, HostId, InstanceId, NodeId, NodeRole, ProxyId, ShardId, TaskId};

/// State of a supervised process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ProcessState {
    /// Nobody has reported it.
    #[default]
    Unknown,
    /// Started, not answering yet.
    Starting,
    /// Answers.
    Running,
    /// Not running, will be started again.
    Stopped,
    /// Can't be started.
    Failed,
    /// Removed with its data, as assigned.
    Removed,
}

impl ProcessState {
    /// Name as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "Unknown",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Stopped => "Stopped",
            Self::Failed => "Failed",
            Self::Removed => "Removed",
        }
    }
}

/// A node as its agent saw it last.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeView {
    /// Of its process.
    pub state: ProcessState,
    /// Why it is failed.
    pub error: String,
    /// Process id.
    pub pid: u32,
    /// host:port.
    pub address: String,
    /// Of its process; empty when not running.
    pub run_id: String,
    /// Of its engine.
    pub version: String,
    /// What the process itself says that it is.
    pub role: Option<NodeRole>,
    /// Replication offset.
    pub offset: u64,
    /// Its link to its primary is up.
    pub link_up: bool,
    /// host:port of the node that it follows.
    pub following: String,
    /// Loading a data set.
    pub loading: bool,
    /// No FAILOVER is under way in it.
    pub failover_idle: bool,
    /// Bytes used by data.
    pub used_memory: u64,
    /// Configured bound; 0: none.
    pub max_memory: u64,
    /// Over all databases.
    pub keys: u64,
    /// Epoch whose proxy user has full rights there.
    pub granted_epoch: Epoch,
    /// Epoch of the assignment that it has converged to.
    pub assigned_epoch: Epoch,
    /// Membership of that assignment.
    pub assigned_membership: u64,
    /// Of a primary: bytes that its slowest online replica has not acknowledged.
    pub lag_bytes: u64,
    /// Of the last process that its agent saw end; empty: none.
    pub exited_run_id: String,
    /// Of a process that ended in order, and with whose files this one began; empty: none known.
    pub continues_run_id: String,
    /// As assigned, it follows nobody: its offset is final.
    pub detached: bool,
    /// Its process lives and answers no pings, and no script or fork explains it.
    pub unresponsive: bool,
    /// `master_replid`.
    pub replid: String,
    /// `master_replid2`.
    pub replid2: String,
    /// `second_repl_offset`; 0: none.
    pub second_offset: u64,
    /// Of a replica: for how long its primary has said nothing.
    pub link_silent_s: u32,
    /// Bytes that it has loaded of the data set that it loads.
    pub copied_bytes: u64,
    /// Of so many; 0: it loads none.
    pub copy_total_bytes: u64,
    /// Users as which replicas may log in there, of whatever epoch.
    pub replication_users: Vec<String>,
    /// That its process was started from, as an assignment names it; `None`: its agent does not know.
    pub engine: Option<String>,
    /// The assigned engine can't be started there.
    pub trouble: Option<EngineTrouble>,
    /// Up after an exchange, and not durable by itself yet.
    pub settling: bool,
    /// Replicated commands that it refused since its start; `None`: its agent does not say.
    pub unexpected_errors: Option<u64>,
    /// Full copies that it has served since its start.
    pub sync_full: u64,
    /// Of a primary: what its commands have cost it lately, the newest window first.
    pub served: Vec<ServedWindow>,
    /// When the report came.
    pub seen_ms: u64,
}

/// What a primary's commands have cost it in some ten seconds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServedWindow {
    /// It had the rights of this epoch all the time.
    pub epoch: Epoch,
    /// From 0 on, since its agent has seen it with that epoch.
    pub number: u32,
    /// Its busiest commands.
    pub commands: Vec<CommandCost>,
}

/// What one command has cost an engine within some time, by the engine's own count.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CommandCost {
    /// As the engine says it.
    pub name: String,
    /// How often.
    pub calls: u64,
    /// All of them, in microseconds.
    pub usec: u64,
}

/// An engine that does not start on a node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EngineTrouble {
    /// Which.
    pub engine: String,
    /// How often in a row.
    pub starts: u32,
    /// The last lines of its log.
    pub why: String,
}

impl NodeView {
    /// Follows the node at `address` with an established link, and is not loading.
    #[must_use]
    pub fn follows(&self, address: &str) -> bool {
        self.state == ProcessState::Running
            && self.role == Some(NodeRole::Replica)
            && self.link_up
            && !self.loading
            && self.following == address
    }
}

/// What a proxy does with a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HoldLevel {
    /// Every worker routes it at the epoch.
    Applied,
    /// Every worker holds it and has nothing in flight.
    Held,
}

/// A proxy's process as its agent sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProxyProcess {
    /// Of the process that serves.
    pub state: ProcessState,
    /// Why it does not run.
    pub error: String,
    /// Process id.
    pub pid: u32,
    /// Artifact that it was started from; empty: the agent's own. `None`: its agent does not know, or
    /// is of a release that hands nothing over.
    pub program: Option<String>,
    /// That it was started for.
    pub generation: u64,
    /// As the program says of itself.
    pub version: String,
    /// The last hand-over that was tried.
    pub handover: Option<ProxyHandover>,
    /// Artifact of the process of before, while that one could take the clients back.
    pub spare: Option<String>,
}

impl ProxyProcess {
    /// The process of this program and generation serves.
    #[must_use]
    pub fn serves(&self, program: &str, generation: u64) -> bool {
        self.state == ProcessState::Running
            && self.program.as_deref() == Some(program)
            && self.generation == generation
    }
}

/// How far a hand-over between two processes of a proxy is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProxyHandover {
    /// As the assignment that asked for it.
    pub program: String,
    /// As the assignment that asked for it.
    pub generation: u64,
    /// It has neither failed nor been done yet.
    pub is_under_way: bool,
    /// It has failed: the process of before serves. Why.
    pub failed: Option<String>,
    /// Clients that were passed.
    pub clients: u32,
    /// How long it took, in microseconds; 0: not known.
    pub took_us: u64,
}

/// A proxy as it reported last.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProxyView {
    /// Whose proxy.
    pub instance: InstanceId,
    /// Where it runs.
    pub host: HostId,
    /// host:port for clients.
    pub address: String,
    /// Its stream is up and was heard within the last heartbeats.
    pub fresh: bool,
    /// Per shard: epoch, level, and the task of a hold.
    pub shards: BTreeMap<ShardId, (Epoch, HoldLevel, TaskId)>,
    /// Shards whose primary of this epoch does not answer it, and for how many milliseconds.
    pub troubles: BTreeMap<ShardId, (Epoch, u64)>,
    /// Requests of shards, of the last seconds, that were answered by errors which are no client's fault.
    pub faults: BTreeMap<ShardId, u64>,
    /// Of the process whose stream it is.
    pub pid: u32,
    /// Commands that this process has processed.
    pub commands: u64,
    /// Error replies among its answers, by any cause.
    pub errors: u64,
    /// Connected to it; `None`: it has not reported on this stream yet.
    pub clients: Option<u32>,
}

/// All that is observed.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    /// Nodes by id.
    pub nodes: BTreeMap<NodeId, NodeView>,
    /// Proxies by id.
    pub proxies: BTreeMap<ProxyId, ProxyView>,
    /// Hosts whose agent has a session.
    pub hosts: std::collections::BTreeSet<HostId>,
    /// Hosts whose lease is in the store; a host that is not has no right to serve any more.
    pub leases: std::collections::BTreeSet<HostId>,
    /// Zones of hosts that are known.
    pub zones: BTreeMap<HostId, String>,
    /// Proxy processes as agents supervise them.
    pub proxy_processes: BTreeMap<ProxyId, ProxyProcess>,
}

impl Fleet {
    /// The node's view, if it was ever reported.
    #[must_use]
    pub fn node(&self, node: &NodeId) -> Option<&NodeView> {
        self.nodes.get(node)
    }

    /// Fresh proxies of an instance.
    pub fn fresh_proxies<'a>(
        &'a self,
        instance: &'a InstanceId,
    ) -> impl Iterator<Item = &'a ProxyView> + 'a {
        self.proxies
            .values()
            .filter(move |p| p.fresh && p.instance == *instance)
    }

    /// Whether every fresh proxy holds the shard for this task.
    #[must_use]
    pub fn all_held(&self, instance: &InstanceId, shard: &ShardId, task: &TaskId) -> bool {
        self.fresh_proxies(instance).all(|p| {
            p.shards
                .get(shard)
                .is_some_and(|(_, level, t)| *level == HoldLevel::Held && t == task)
        })
    }

    /// Whether every fresh proxy routes the shard at `epoch` or above.
    #[must_use]
    pub fn all_applied(&self, instance: &InstanceId, shard: &ShardId, epoch: Epoch) -> bool {
        self.fresh_proxies(instance).all(|p| {
            p.shards
                .get(shard)
                .is_some_and(|(at, level, _)| *level == HoldLevel::Applied && *at >= epoch)
        })
    }
}
