//! All that parties say to each other.
//!
//! Messages of the contract are the real ones (`slotmesh_proto`); those of Redis are the model's.

use slotmesh_agent::controllers::CommitAnswer;
use slotmesh_proto::{agent::v1 as agent, topology::v1 as topology};

use crate::{
    redis::{Admin, Answer, Op, Psync},
    store::{StoreReply, StoreRequest, Watched as Change},
};

/// Whoever can crash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Party {
    /// The store, as one.
    Store,
    /// A controller process.
    Controller(usize),
    /// The agent of a host.
    Agent(usize),
    /// A node: its current process, if any.
    Node(usize),
    /// A proxy process.
    Proxy(usize),
    /// A client.
    Client(usize),
    /// The fencer of a host.
    Fencer(usize),
}

impl Party {
    /// A number of its own, for traces.
    #[must_use]
    pub fn number(self) -> u64 {
        let (kind, index) = match self {
            Self::Store => (0, 0),
            Self::Controller(i) => (1, i),
            Self::Agent(i) => (2, i),
            Self::Node(i) => (3, i),
            Self::Proxy(i) => (4, i),
            Self::Client(i) => (5, i),
            Self::Fencer(i) => (6, i),
        };
        kind * 1_000 + index as u64
    }
}

/// A primary that a fencer looks after.
#[derive(Clone, Copy, Debug)]
pub struct Watched {
    /// Which node.
    pub node: usize,
    /// The end of its right to serve, as its agent counts it.
    pub until: crate::sched::Micros,
    /// So many replicas should follow it.
    pub replicas: usize,
}

/// A connection's number.
pub type ConnId = u64;

/// What a follower heard, on its way to the leader.
#[derive(Clone, Debug)]
pub enum Relayed {
    /// A host, its session, and what it reports, if it has reported.
    Host(usize, u64, Option<agent::HostReport>),
    /// Its session has ended.
    HostGone(usize),
    /// A proxy, levels of its shards, and its troubles.
    Proxy(usize, Vec<topology::ShardState>, Vec<topology::Trouble>),
    /// Its stream has ended.
    ProxyGone(usize),
}

/// On a connection, in order.
#[derive(Clone, Debug)]
pub enum Stream {
    /// Agent to controller: the session begins.
    Register {
        /// Which host.
        host: usize,
        /// Later sessions of a host have higher numbers.
        session: u64,
    },
    /// Controller to agent: the host's lease was renewed after its report of this number.
    LeaseKept {
        /// Of the report.
        number: u64,
        /// From when that report was sent.
        ttl_ms: u32,
        /// Of the store, when the lease was granted.
        revision: u64,
    },
    /// Follower to leader.
    Relayed(Relayed),
    /// Agent to controller.
    HostReport(agent::HostReport),
    /// Controller to agent.
    Assignment(Box<agent::Assignment>),
    /// Proxy to controller: the topology stream begins, or what changed in the proxy.
    ProxyReport {
        /// Which proxy.
        proxy: usize,
        /// Levels of its shards.
        shards: Vec<topology::ShardState>,
        /// Shards whose primary does not answer it.
        troubles: Vec<topology::Trouble>,
    },
    /// Controller to proxy: routes of a revision.
    Routes {
        /// Of the store.
        revision: u64,
        /// All shards.
        shards: Vec<topology::ShardRoute>,
    },
    /// Controller to agent or proxy: still there.
    Heartbeat,
    /// Store to controller: what changed.
    Watched(Vec<Change>),
    /// Store to controller: everything, as it was at a revision.
    Listed(u64, Vec<Change>),
    /// Store to controller: what was asked for is forgotten.
    Compacted,
    /// Controller to store: watch from a revision on; `None`: list first.
    Subscribe(Option<u64>),
    /// What clients, proxies and nodes send each other: RESP.
    Bytes(Vec<u8>),
    /// Replica to primary: log in and ask for the stream.
    Psync(Psync),
    /// Primary to replica.
    PsyncAnswer(crate::redis::PsyncAnswer),
    /// Primary to replica: operations from an offset on.
    Feed {
        /// Offset before the first of them.
        offset: i64,
        /// What to apply.
        ops: Vec<Op>,
    },
    /// Replica to primary.
    Ack(i64),
    /// Agent to target: log in as replication user, then GETACK.
    TargetLogin {
        /// `rp-<epoch>-<node>`.
        user: String,
        /// Its secret.
        password: String,
    },
    /// Target to agent.
    TargetLoginAnswer(bool),
    /// Agent to target, never answered.
    GetAck,
}

/// Without a connection: may be lost, doubled, late and out of order.
#[derive(Clone, Debug)]
pub enum Rpc {
    /// Controller to store.
    Store {
        /// Chosen by the caller.
        call: u64,
        /// What to do.
        request: StoreRequest,
    },
    /// Store to controller.
    StoreReply {
        /// Of the request.
        call: u64,
        /// What came of it.
        reply: StoreReply,
    },
    /// Controller to agent.
    Step {
        /// Chosen by the caller.
        call: u64,
        /// The step.
        request: Box<agent::ExecuteStepRequest>,
    },
    /// Agent to controller.
    StepReply {
        /// Of the request.
        call: u64,
        /// What came of it.
        response: Box<agent::ExecuteStepResponse>,
    },
    /// Agent to any controller.
    Commit {
        /// Chosen by the caller.
        call: u64,
        /// The delegated commit.
        request: agent::CommitHandoverRequest,
    },
    /// Controller to agent.
    CommitReply {
        /// Of the request.
        call: u64,
        /// As the agent reads the controller's answer.
        answer: CommitAnswer,
    },
    /// Agent to agent: a promise not to promote is asked for.
    Promise {
        /// Chosen by the caller.
        call: u64,
        /// What is asked.
        request: agent::PromiseNotToPromoteRequest,
    },
    /// Agent to agent.
    PromiseReply {
        /// Of the request.
        call: u64,
        /// Whether it is given.
        promised: bool,
    },
    /// Agent to any controller: is the promotion still what the record says?
    Confirm {
        /// Chosen by the caller.
        call: u64,
        /// What is asked.
        request: agent::ConfirmPromotionRequest,
    },
    /// Controller to agent.
    ConfirmReply {
        /// Of the request.
        call: u64,
        /// `None`: the store did not answer.
        confirmed: Option<bool>,
    },
    /// Agent to its fencer.
    Pet {
        /// All primaries that may serve, and until when.
        watched: Vec<Watched>,
        /// Nodes that stay watched as they were.
        keep: Vec<usize>,
    },
    /// Agent to its node over the local socket: never lost, but either side may die.
    Admin {
        /// Chosen by the caller.
        call: u64,
        /// What to do.
        command: Admin,
    },
    /// Node to its agent.
    AdminReply {
        /// Of the command.
        call: u64,
        /// What came of it; `None`: the process is gone, and nobody knows.
        answer: Option<Box<Answer>>,
    },
}

/// Something that happens to one party.
#[derive(Clone, Debug)]
pub enum Input {
    /// Somebody connected.
    Opened(ConnId),
    /// The connection is gone.
    Closed(ConnId),
    /// A message of a connection.
    Stream(ConnId, Stream),
    /// A message without a connection.
    Rpc(Party, Rpc),
    /// A timer that it set.
    Timer(Timer),
}

/// Timers, by what they are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Timer {
    /// Regular look around.
    Tick,
    /// A call was not answered.
    Call(u64),
    /// Connect (again).
    Connect,
    /// Something of the proxy's core is due.
    Due,
    /// Wake after a stall.
    Wake,
}
