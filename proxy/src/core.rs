//! The I/O-free core of a worker: bytes of clients and nodes in, bytes and orders out.
//!
//! Invariants: it touches no socket, clock or thread; what it does depends only on what it was
//! given, so that a worker, a test and a simulation run the same code. Replies leave in the order
//! of the requests of each client. Per command on the common path it allocates nothing.
//!
//! [`retry`] and [`hold`] decide what happens to requests while a shard changes its primary; they
//! stand alone and are used by the simulation too.

mod answer;
pub mod client;
mod dispatch;
mod gather;
pub mod hold;
pub mod lane;
mod local;
mod login;
mod multi;
pub mod outbox;
mod pool;
mod queue;
pub mod retry;
pub mod sessions;
mod spec;
mod split;
mod stash;
mod transaction;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use slotmesh_resp::Args;

use self::client::{ClientState, Pause};
use self::gather::Gathers;
use self::lane::{Lane, LaneNo};
use self::outbox::Outbox;
use self::sessions::{CloseReason, Sessions};
use crate::routing::{RoutingTable, ShardNo};

pub use self::answer::NodeFault;

/// What a worker counts. Plain integers; the worker copies them out once per turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub commands: u64,
    /// Error replies of any cause.
    pub errors: u64,
    pub protocol_errors: u64,
    /// Requests sent again because the node had not executed them.
    pub retries: u64,
    /// Requests answered with an error because nobody knows whether they were executed.
    pub outcome_unknown: u64,
    /// Requests that were held for too long.
    pub hold_overdue: u64,
    /// Requests that failed because a later one of their client ran before they could be repeated.
    pub overtaken: u64,
    pub held_requests: u64,
    pub held_max_us: u64,
    pub closed_backlog: u64,
    pub node_losses: u64,
}

/// Facts of the process that replies mention.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Random per process, as Redis's `run_id`.
    pub run_id: String,
    pub port: u16,
    pub pid: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Core {
    pub sessions: Sessions,
    pub counters: Counters,
    pub out: Outbox,
    identity: Arc<Identity>,
    lanes: Vec<Lane>,
    gathers: Gathers,
    table: Arc<RoutingTable>,
    /// A table was put in force. Before that nobody can say who may do what.
    ready: bool,
    held_sum: Arc<AtomicU64>,
    /// Clients whose next command waits for room.
    stalled: Vec<(u32, u32)>,
    scratch: Vec<u8>,
    args: Args,
    split: split::Plan,
    now_us: u64,
    now_unix_us: u64,
}

impl Core {
    /// A core without a route. `held_sum` is shared by the workers of a process.
    #[must_use]
    pub fn new(identity: Arc<Identity>, held_sum: Arc<AtomicU64>) -> Self {
        Self {
            sessions: Sessions::default(),
            counters: Counters::default(),
            out: Outbox::default(),
            identity,
            lanes: Vec::new(),
            gathers: Gathers::default(),
            table: Arc::default(),
            ready: false,
            held_sum,
            stalled: Vec::new(),
            scratch: Vec::new(),
            args: Args::new(),
            split: split::Plan::default(),
            now_us: 1,
            now_unix_us: 0,
        }
    }

    /// The time of this turn: since some start, and since the epoch of Unix.
    pub fn set_now(&mut self, now_us: u64, now_unix_us: u64) {
        self.now_us = now_us.max(1);
        self.now_unix_us = now_unix_us;
    }

    /// Puts a routing table in force.
    pub fn apply(&mut self, table: Arc<RoutingTable>) {
        let lanes = table.shards.len() * 2;
        while self.lanes.len() < lanes {
            let lane = Lane::new(self.lanes.len() as LaneNo, Arc::clone(&self.held_sum));
            self.lanes.push(lane);
        }
        let was_open = self.is_open();
        self.table = Arc::clone(&table);
        self.ready = true;
        if self.is_open() && !was_open {
            self.sessions.authenticate_all(); // those that came when it was not known, or was asked
        }
        for (no, route) in table.shards.iter().enumerate() {
            for lane in [no * 2, no * 2 + 1] {
                match route {
                    Some(route) => self.lanes[lane].set_route(route, self.now_us, &mut self.out),
                    None => self.drop_lane(lane as LaneNo),
                }
            }
        }
        self.settle_abandoned();
        self.out.freed = true;
    }

    /// Both lanes of a shard, for what is reported of it.
    #[must_use]
    pub fn level_of(&self, shard: ShardNo) -> Option<&hold::Level> {
        let [a, b] = [0, 1].map(|i| self.lanes.get(usize::from(shard) * 2 + i));
        let (a, b) = (a?.level.as_ref()?, b?.level.as_ref()?);
        (a == b).then_some(a)
    }

    /// True if it is known that clients need no password.
    fn is_open(&self) -> bool {
        self.ready && self.table.settings.password_sha256.is_none()
    }

    /// Takes a client in; returns its slot.
    pub fn open_client(&mut self, mut state: ClientState) -> u32 {
        if self.is_open() {
            state.authenticated = true;
        }
        self.sessions.open(state)
    }

    /// A client is gone. Its requests run on; their replies are dropped.
    pub fn close_client(&mut self, slot: u32) -> Option<ClientState> {
        self.sessions.close(slot)
    }

    /// The client sends no more; what it asked for is still answered.
    pub fn client_hung_up(&mut self, slot: u32) {
        self.sessions.leave(slot);
        if self.sessions.is_done(slot) {
            self.sessions.doom(slot, CloseReason::Done);
        }
    }

    /// What is to be sent to a node.
    #[must_use]
    pub fn lane_unsent(&self, lane: LaneNo) -> &[u8] {
        self.lanes[lane as usize].flight.unsent()
    }

    /// The node's socket took that much.
    pub fn lane_sent(&mut self, lane: LaneNo, bytes: usize) {
        let lane = &mut self.lanes[lane as usize];
        lane.flight.mark_sent(bytes);
        if !lane.flight.unsent().is_empty() {
            lane.note_alive(self.now_us); // large, and the node is taking it
        }
    }

    /// The lane is no longer in the list of touched ones.
    pub fn lane_untouch(&mut self, lane: LaneNo) {
        self.lanes[lane as usize].untouch();
    }

    /// The node's socket takes bytes again.
    pub fn lane_touch(&mut self, lane: LaneNo) {
        self.lanes[lane as usize].touch(&mut self.out);
    }

    /// Gives a connection up: its requests are settled, and the worker is told to close it.
    pub fn lane_abandon(&mut self, lane: LaneNo) {
        self.out.abandoned.push(lane);
        self.settle_abandoned();
    }

    /// The beginning of a reply that is kept for this lane; give it back with what follows.
    pub fn lane_input(&mut self, lane: LaneNo) -> &mut Vec<u8> {
        &mut self.lanes[lane as usize].input
    }

    /// The connection that was ordered stands.
    pub fn lane_connected(&mut self, lane: LaneNo) {
        self.lanes[lane as usize].connected(self.now_us, &mut self.out);
    }

    /// Acts on all that is due. Returns when to call again; call only if `out.unsteady` was set
    /// since, or that time has come.
    pub fn on_time(&mut self) -> Option<u64> {
        let (budget_us, held_max) = {
            let settings = &self.table.settings;
            (settings.hold_budget_us, settings.hold_bytes_max)
        };
        let mut next: Option<u64> = None;
        for no in 0..self.lanes.len() {
            let lane = &mut self.lanes[no];
            if lane.on_time(self.now_us, &mut self.out) {
                self.lane_abandon(no as LaneNo);
            }
            self.fail_overdue(no as LaneNo, budget_us);
            let lane = &mut self.lanes[no];
            lane.check_room(held_max, self.now_us, &mut self.out);
            next = [next, lane.deadline_us(budget_us)]
                .into_iter()
                .flatten()
                .min();
        }
        self.settle_abandoned();
        self.out.unsteady = false;
        next
    }

    /// Clients that waited for room are read again if there is some.
    pub fn resume_stalled(&mut self) {
        if !std::mem::take(&mut self.out.freed) {
            return;
        }
        for (slot, generation) in std::mem::take(&mut self.stalled) {
            if let Some(client) = self.sessions.get_same(slot, generation)
                && client.pause == Pause::Stalled
            {
                client.pause = Pause::None;
                self.sessions.resumed.push((slot, generation));
            }
        }
    }
}

#[cfg(test)]
mod tests;
