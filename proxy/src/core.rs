//! The I/O-free core of a worker: bytes of clients and nodes in, bytes and orders out.
//!
//! Invariants: it touches no socket, clock or thread; what it does depends only on what it was
//! given, so that a worker, a test and a simulation run the same code. Replies leave in the order
//! of the requests of each client. Per command on the common path it allocates nothing.
//!
//! [`retry`] and [`hold`] decide what happens to requests while a shard changes its primary; they
//! stand alone and are used by the simulation too.

mod accounts;
mod acl;
mod answer;
mod blocking;
mod busy;
pub mod call;
pub mod client;
mod clients;
mod cluster;
mod computed;
mod config;
mod confined;
pub mod departing;
mod dispatch;
mod durable;
mod extra;
mod fanout;
mod fanout_merge;
mod filter;
mod gather;
mod health;
mod held_back;
pub mod hold;
mod idle;
mod info;
mod info_text;
mod job;
pub mod lane;
pub mod lanes;
pub mod line;
mod local;
mod login;
mod maintenance;
mod monitor;
mod monitor_line;
mod multi;
pub mod outbox;
pub mod passing;
pub mod passing_lines;
pub mod passing_looks;
pub mod passing_topics;
mod pause;
mod pool;
mod private;
mod pubsub;
pub mod pubsub_count;
mod pubsub_frame;
mod pubsub_query;
mod pubsub_topics;
mod queue;
pub mod retry;
mod script_check;
mod script_flags;
pub mod scripts;
pub mod sessions;
mod sort;
mod spec;
mod special;
mod split;
mod stash;
mod subscriber;
mod subscriber_limits;
mod subscriber_move;
mod tails;
mod tally;
mod timeout;
mod tracking;
mod tracking_ear;
mod tracking_mail;
mod tracking_options;
mod tracking_own;
mod tracking_remote;
mod tracking_script;
mod tracking_table;
mod transaction;
mod unblock;
mod unknown;
mod vacancy;
mod waiting;
mod walk;
mod watching;
mod weave;
mod weave_blocks;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use slotmesh_acl::AclLog;
use slotmesh_command::Release;
use slotmesh_resp::Args;

use self::client::{ClientState, Pause};
use self::departing::Departing;
use self::gather::Gathers;
use self::health::Health;
use self::job::Jobs;
use self::lane::{Lane, LaneNo};
use self::lanes::Lanes;
use self::line::{Lines, is_line};
use self::outbox::Outbox;
use self::private::Privates;
use self::scripts::ScriptCache;
use self::sessions::{CloseReason, Sessions};
use self::waiting::Waits;
use self::weave::Weaves;
use crate::routing::{RoutingTable, ShardNo};

pub use self::answer::NodeFault;
pub(crate) use self::pubsub_frame::HIDDEN;

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
    /// Requests that were executed and not confirmed by enough replicas.
    pub unconfirmed: u64,
    /// Requests that were held for too long.
    pub hold_overdue: u64,
    /// Requests that failed because a later one of their client ran before they could be repeated.
    pub overtaken: u64,
    pub held_requests: u64,
    pub held_max_us: u64,
    pub closed_backlog: u64,
    pub node_losses: u64,
    /// Clients that did not read their messages fast enough.
    pub closed_subscribers: u64,
    /// Connections for messages that were lost; their shards' messages may be missing.
    pub subscriber_lines_lost: u64,
    /// Changes of a primary in which the old one's messages could not be followed to their end.
    pub subscriber_moves_forced: u64,
    /// Clients that were told where to go.
    pub departures_told: u64,
    /// Clients that were closed between two requests, to go elsewhere.
    pub departed: u64,
    /// Clients that were closed because they had not left in time.
    pub departed_late: u64,
}

/// Facts of the process that replies mention.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Random per process, as Redis's `run_id`.
    pub run_id: String,
    pub port: u16,
    pub pid: u32,
    /// host:port that operators want clients to be told, if it is not the one they came by.
    pub advertise: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub struct Core {
    pub sessions: Sessions,
    pub counters: Counters,
    pub out: Outbox,
    identity: Arc<Identity>,
    lanes: Lanes,
    gathers: Gathers,
    jobs: Jobs,
    lines: Lines,
    scripts: Arc<ScriptCache>,
    seen_scripts: scripts::Seen,
    tally: tally::Tally,
    learned: unknown::Learned,
    busy: busy::Busy,
    pubsub: subscriber::PubSub,
    monitors: monitor::Monitors,
    trackers: tracking::Trackers,
    privates: Privates,
    waits: Waits,
    health: Health,
    weaves: Weaves,
    paused: Option<pause::Paused>,
    /// Commands that it does not know are not let through.
    held_back: Option<Release>,
    /// Writes are confirmed by replicas.
    durable: bool,
    acl_log: Arc<Mutex<AclLog>>,
    /// When to look for idle clients again.
    idle_at_us: u64,
    departing: Option<Box<Departing>>,
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
            lanes: Lanes::default(),
            gathers: Gathers::default(),
            jobs: Jobs::default(),
            lines: Lines::default(),
            scripts: Arc::default(),
            seen_scripts: scripts::Seen::default(),
            tally: tally::Tally::default(),
            learned: unknown::Learned::default(),
            busy: busy::Busy::default(),
            privates: Privates::default(),
            waits: Waits::default(),
            health: Health::default(),
            weaves: Weaves::default(),
            pubsub: subscriber::PubSub::default(),
            monitors: monitor::Monitors::default(),
            trackers: tracking::Trackers::default(),
            paused: None,
            held_back: None,
            durable: false,
            acl_log: Arc::default(),
            idle_at_us: 0,
            departing: None,
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

    /// Uses a log of denials that other workers use too.
    pub fn share_acl_log(&mut self, log: Arc<Mutex<AclLog>>) {
        self.acl_log = log;
    }

    /// The time of this turn: since some start, and since the epoch of Unix.
    pub fn set_now(&mut self, now_us: u64, now_unix_us: u64) {
        self.now_us = now_us.max(1);
        self.now_unix_us = now_unix_us;
    }

    /// The time of this turn, since some start.
    #[must_use]
    pub fn now_us(&self) -> u64 {
        self.now_us
    }

    /// Puts a routing table in force.
    pub fn apply(&mut self, table: Arc<RoutingTable>) {
        let lanes = table.shards.len() * 2;
        while self.lanes.shared_len() < lanes {
            let (held_sum, scripts) = (Arc::clone(&self.held_sum), Arc::clone(&self.scripts));
            let lane = Lane::new(self.lanes.shared_len() as LaneNo, held_sum, scripts);
            self.lanes.push_shared(lane);
        }
        let before = Arc::clone(self.users());
        let began = !std::mem::replace(&mut self.ready, true);
        let vacated = self.vacated_by(&table);
        self.table = Arc::clone(&table);
        let parameters = &table.settings.parameters;
        self.sessions.in_flight_max = parameters.session_processing_max;
        self.jobs.bytes_max = parameters.job_bytes_max;
        self.held_back = table.settings.held_back;
        if began || before != *self.users() {
            self.refresh_accounts(&before); // with those that came when nobody knew
        }
        self.apply_durability();
        for (no, route) in table.shards.iter().enumerate() {
            for lane in [no * 2, no * 2 + 1] {
                match route {
                    Some(route) => self.lanes[lane].set_route(route, self.now_us, &mut self.out),
                    None => self.drop_lane(lane as LaneNo),
                }
            }
        }
        self.renew_own_lanes();
        self.settle_abandoned();
        self.vacate(&vacated);
        self.apply_pubsub(&table);
        self.apply_monitors();
        self.apply_tracking();
        self.renew_privates();
        self.renew_waits();
        self.renew_watches();
        self.renew_health();
        self.out.unsteady = true; // a parameter may have a deadline
        self.out.freed = true;
    }

    /// Both lanes of a shard, for what is reported of it.
    #[must_use]
    pub fn level_of(&self, shard: ShardNo) -> Option<&hold::Level> {
        let [a, b] = [0, 1].map(|i| self.lanes.get(usize::from(shard) * 2 + i));
        let (a, b) = (a?.level.as_ref()?, b?.level.as_ref()?);
        let held = matches!(a, hold::Level::Held { .. });
        (a == b && !(held && self.own_lanes_run(shard))).then_some(a)
    }

    /// Takes a client in; returns its slot.
    pub fn open_client(&mut self, state: ClientState) -> u32 {
        let known = state.authenticated;
        let user = self.users().get(state.user().as_bytes()).cloned();
        let slot = self.sessions.open(state);
        match user {
            Some(user) if known || self.is_open() => self.log_in(slot, &user),
            _ => {}
        }
        self.restore(slot);
        self.restore_topics(slot);
        self.restore_sources(slot);
        self.restore_tracking(slot);
        self.depart_newcomer(slot);
        slot
    }

    /// A client is gone. Its requests run on; their replies are dropped.
    pub fn close_client(&mut self, slot: u32) -> Option<ClientState> {
        self.release_private(slot);
        let left = self.leave_topics(slot);
        self.end_monitoring(slot);
        self.end_tracking(slot);
        let mut state = self.sessions.close(slot)?;
        state.subscriptions = left.map(|left| {
            let copied = left
                .names
                .map(|names| names.iter().map(|name| name.to_vec()).collect());
            Box::new(copied)
        });
        Some(state)
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
        if is_line(lane) {
            return self.line_unsent(lane);
        }
        self.lanes[lane as usize].flight.unsent()
    }

    /// The node's socket took that much.
    pub fn lane_sent(&mut self, lane: LaneNo, bytes: usize) {
        if is_line(lane) {
            return self.line_sent(lane, bytes);
        }
        let lane = &mut self.lanes[lane as usize];
        lane.flight.mark_sent(bytes);
        if !lane.flight.unsent().is_empty() {
            lane.note_alive(self.now_us); // large, and the node is taking it
        }
    }

    /// The lane is no longer in the list of touched ones.
    pub fn lane_untouch(&mut self, lane: LaneNo) {
        if is_line(lane) {
            return self.line_untouch(lane);
        }
        self.lanes[lane as usize].untouch();
    }

    /// The node's socket takes bytes again.
    pub fn lane_touch(&mut self, lane: LaneNo) {
        if is_line(lane) {
            return self.touch_line(lane);
        }
        self.lanes[lane as usize].touch(&mut self.out);
    }

    /// Gives a connection up: its requests are settled, and the worker is told to close it.
    pub fn lane_abandon(&mut self, lane: LaneNo) {
        if is_line(lane) {
            return self.line_lost(lane);
        }
        self.out.abandoned.push(lane);
        self.settle_abandoned();
    }

    /// Takes the beginning of a reply that is kept for this lane.
    pub fn take_lane_input(&mut self, lane: LaneNo) -> Vec<u8> {
        if is_line(lane) {
            return self
                .line_input(lane)
                .map(std::mem::take)
                .unwrap_or_default();
        }
        std::mem::take(&mut self.lanes[lane as usize].input)
    }

    /// Keeps the beginning of a reply.
    pub fn keep_lane_input(&mut self, lane: LaneNo, input: Vec<u8>) {
        if !is_line(lane) {
            self.lanes[lane as usize].input = input;
        } else if let Some(kept) = self.line_input(lane) {
            *kept = input;
        }
    }

    /// The connection that was ordered stands.
    pub fn lane_connected(&mut self, lane: LaneNo) {
        if is_line(lane) {
            return self.line_connected(lane);
        }
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
        for no in self.lanes.numbers() {
            let lane = &mut self.lanes[no as usize];
            if lane.on_time(self.now_us, &mut self.out) {
                self.lane_abandon(no);
            }
            self.fail_overdue(no, budget_us);
            let lane = &mut self.lanes[no as usize];
            lane.check_room(held_max, self.now_us, &mut self.out);
            next = [next, lane.deadline_us(budget_us)]
                .into_iter()
                .flatten()
                .min();
        }
        self.settle_abandoned();
        let lines = self.lines_on_time();
        let busy = self.busy_on_time();
        let pubsub = self.pubsub_on_time();
        let monitors = self.monitors_on_time();
        let tracking = self.tracking_on_time();
        let private = self.private_on_time();
        let paused = self.pause_on_time();
        let idle = self.close_idle();
        let departing = self.depart_on_time();
        self.out.unsteady = false;
        [
            next, busy, lines, pubsub, monitors, tracking, private, paused, idle, departing,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Jobs go on whose answers came. Clients that waited for room are read again if there is some.
    pub fn resume_stalled(&mut self) {
        self.tell_forgotten();
        self.close_own_lanes();
        self.send_redirected();
        self.run_jobs();
        self.run_weaves();
        self.resume_waits();
        if !std::mem::take(&mut self.out.freed) {
            return;
        }
        self.resume_parked();
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
