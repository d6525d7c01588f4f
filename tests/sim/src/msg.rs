//! All that parties say to each other.
//!
//! Messages of the contract are the real ones (`slotmesh_proto`); those of Redis are the model's.

use slotmesh_agent::controllers::CommitAnswer;
use slotmesh_proto::{agent::v1 as agent, topology::v1 as topology};

use crate::{
    redis::{Admin, Answer, Op, Psync},
    store::{StoreReply, StoreRequest, Watched},
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
        };
        kind * 1_000 + index as u64
    }
}

/// A connection's number.
pub type ConnId = u64;

/// On a connection, in order.
#[derive(Clone, Debug)]
pub enum Stream {
    /// Agent to controller: the session begins.
    Register(usize),
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
    /// Store to controller.
    Watched(Vec<Watched>),
    /// Controller to store.
    Subscribe,
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
