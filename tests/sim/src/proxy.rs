//! A proxy: the real I/O-free core of a worker, with the simulated network as its sockets.
//!
//! Invariant: nothing is decided here; bytes and orders are only carried.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
};

use rand::Rng;
use slotmesh_proto::topology::v1 as pb;
use slotmesh_proxy::{
    core::{
        Core, Identity,
        client::ClientState,
        hold::{HoldOrder, Level},
        lane::LaneNo,
        outbox::Order,
        sessions::NoOutlet,
    },
    routing::{InstanceSettings, Parameters, RoutingTable, ShardNo, ShardRoute},
};

use crate::{
    ctx::Ctx,
    msg::{ConnId, Input, Party, Stream, Timer},
    node::party_of,
    sched::{MS, Micros, SEC},
    variant::Variant,
};

/// Between heartbeats, as the real watch has it.
const HEARTBEAT: Micros = 500 * MS;
/// A stream on which nothing comes for so long is given up.
const SILENCE: Micros = 3 * SEC;
/// The same while clients wait for what a controller will say.
const WAITING_SILENCE: Micros = 650 * MS;
/// Between looks at that.
const LOOK_EVERY: Micros = 100 * MS;

/// Longest hold. A request that was held for the whole budget, sent to a node that is then silent
/// until its connection is given up, and is asked again counts from its first hold.
pub(crate) const HELD_MAX: Micros = 5 * SEC + 10 * SEC + 500 * MS;

/// See the module.
#[derive(Debug)]
pub struct Proxy {
    index: usize,
    core: Core,
    shards: BTreeMap<String, pb::ShardRoute>,
    revision: u64,
    lanes: BTreeMap<LaneNo, (ConnId, u64)>,
    clients: BTreeMap<ConnId, (u32, Vec<u8>)>,
    stream: Option<ConnId>,
    heard: Micros,
    turn: usize,
    controllers: usize,
    due: Option<u64>,
    /// For when a timer is set.
    armed: Option<u64>,
    life: u64,
    reports: Vec<pb::ShardState>,
    /// Per lane: shard, epoch, and since when its primary has not answered.
    troubles: BTreeMap<LaneNo, (usize, u64, u64)>,
    durability: u32,
}

impl Proxy {
    /// A proxy that has just started, without a topology.
    #[must_use]
    pub fn new(index: usize, controllers: usize, durability: u32) -> Self {
        Self {
            index,
            core: core(),
            shards: BTreeMap::new(),
            revision: 0,
            lanes: BTreeMap::new(),
            clients: BTreeMap::new(),
            stream: None,
            heard: 0,
            turn: index,
            controllers,
            due: None,
            armed: None,
            life: 0,
            reports: Vec::new(),
            troubles: BTreeMap::new(),
            durability,
        }
    }

    fn party(&self) -> Party {
        Party::Proxy(self.index)
    }

    /// Begins.
    pub fn start(&mut self, ctx: &mut Ctx) {
        self.life = ctx.born(self.party());
        ctx.timer(self.party(), 1, Timer::Connect);
        ctx.timer(self.party(), HEARTBEAT, Timer::Tick);
        ctx.timer(self.party(), LOOK_EVERY, Timer::Call(0));
    }

    /// Something happens to it.
    pub fn handle(&mut self, ctx: &mut Ctx, input: Input) {
        self.core.set_now(ctx.now(), ctx.now_ms() * 1_000);
        if self.armed.is_some_and(|at| at <= ctx.now()) {
            self.armed = None;
        }
        match input {
            Input::Opened(conn) => {
                let slot = self
                    .core
                    .open_client(ClientState::new(conn, None, ctx.now_ms()));
                self.clients.insert(conn, (slot, Vec::new()));
            }
            Input::Closed(conn) => self.closed(ctx, conn),
            Input::Stream(conn, Stream::Bytes(bytes)) => self.bytes(ctx, conn, &bytes),
            Input::Stream(conn, Stream::Routes { revision, shards }) => {
                if self.stream == Some(conn) {
                    self.heard = ctx.now();
                    self.routes(ctx, revision, shards);
                }
            }
            Input::Stream(conn, Stream::Heartbeat) if self.stream == Some(conn) => {
                self.heard = ctx.now();
            }
            Input::Timer(Timer::Connect) if self.stream.is_none() => self.connect(ctx),
            Input::Timer(Timer::Call(_)) => {
                let limit = if self.awaits_news() {
                    WAITING_SILENCE
                } else {
                    SILENCE
                };
                if let Some(conn) = self.stream
                    && self.heard + limit < ctx.now()
                {
                    ctx.close(self.party(), conn);
                    self.closed(ctx, conn);
                }
                ctx.timer(self.party(), LOOK_EVERY, Timer::Call(0));
            }
            Input::Timer(Timer::Tick) => {
                self.report(ctx, Vec::new());
                ctx.timer(self.party(), HEARTBEAT, Timer::Tick);
            }
            Input::Timer(_) | Input::Stream(..) | Input::Rpc(..) => {}
        }
        self.settle(ctx);
    }

    fn awaits_news(&self) -> bool {
        let shards = 0..ShardNo::try_from(self.shards.len()).unwrap_or(0);
        let mut levels = shards.filter_map(|shard| self.core.level_of(shard));
        !self.troubles.is_empty() || levels.any(|level| matches!(level, Level::Held { .. }))
    }

    fn connect(&mut self, ctx: &mut Ctx) {
        let to = Party::Controller(self.turn % self.controllers);
        self.turn += 1;
        let conn = ctx.open(self.party(), to);
        self.stream = Some(conn);
        self.heard = ctx.now();
        let shards = self.levels();
        self.report(ctx, shards);
    }

    fn closed(&mut self, ctx: &mut Ctx, conn: ConnId) {
        if self.stream == Some(conn) {
            self.stream = None;
            let wait = ctx.rng.random_range(20 * MS..200 * MS);
            ctx.timer(self.party(), wait, Timer::Connect);
        } else if let Some((slot, _)) = self.clients.remove(&conn) {
            self.core.close_client(slot);
        } else if let Some(lane) = self.lane_of(conn) {
            self.lanes.remove(&lane);
            self.core.lane_lost(lane);
        }
    }

    fn lane_of(&self, conn: ConnId) -> Option<LaneNo> {
        self.lanes
            .iter()
            .find(|(_, (c, _))| *c == conn)
            .map(|(lane, _)| *lane)
    }

    fn bytes(&mut self, ctx: &mut Ctx, conn: ConnId, bytes: &[u8]) {
        if let Some((slot, kept)) = self.clients.get_mut(&conn) {
            kept.extend_from_slice(bytes);
            let used = self.core.client_bytes(*slot, kept);
            kept.drain(..used);
        } else if let Some(lane) = self.lane_of(conn) {
            let mut buf = self.core.take_lane_input(lane);
            buf.extend_from_slice(bytes);
            match self.core.node_bytes(lane, &buf, &mut NoOutlet) {
                Ok(used) => {
                    let left = buf.split_off(used.min(buf.len()));
                    self.core.keep_lane_input(lane, left);
                }
                Err(error) => {
                    let index = self.index;
                    ctx.checks.fail("proxy: a node's bytes are understood", || {
                        format!("proxy {index}: {error}")
                    });
                }
            }
        }
    }

    /// As the real watch builds the table: a shard keeps its number.
    fn routes(&mut self, ctx: &mut Ctx, revision: u64, shards: Vec<pb::ShardRoute>) {
        if revision < self.revision {
            return;
        }
        self.revision = revision;
        let risen = shards.iter().any(|new| {
            self.shards
                .get(&new.shard_id)
                .is_some_and(|old| old.epoch < new.epoch)
        });
        let before = self.shards.clone();
        for route in shards {
            let old = self.shards.get(&route.shard_id);
            if old.is_none_or(|old| old.epoch <= route.epoch) {
                self.shards.insert(route.shard_id.clone(), route);
            }
        }
        self.apply(ctx);
        if risen && ctx.variant == Variant::ProxyGoesBack {
            self.settle(ctx);
            self.shards = before;
            self.core = core();
            self.lanes.clear();
            self.apply(ctx);
        }
    }

    fn apply(&mut self, ctx: &Ctx) {
        self.core.set_now(ctx.now(), ctx.now_ms() * 1_000);
        let mut ranges = Vec::new();
        let mut table = Vec::new();
        for (no, route) in self.shards.values().enumerate() {
            let no = ShardNo::try_from(no).unwrap_or(0);
            let range = |r: &pb::SlotRange| (no, r.first as u16, r.last as u16);
            ranges.extend(route.slots.iter().map(range));
            table.push(Some(Arc::new(shard_route(route))));
        }
        let settings = InstanceSettings {
            durability: self.durability,
            parameters: Parameters {
                read_gate: is_gated(self.index),
                ..Parameters::default()
            },
            ..InstanceSettings::default()
        };
        self.core.apply(Arc::new(RoutingTable::new(
            self.revision,
            settings,
            table,
            &ranges,
        )));
    }

    fn levels(&self) -> Vec<pb::ShardState> {
        let level = |(no, id): (usize, &String)| {
            let level = self.core.level_of(ShardNo::try_from(no).ok()?)?;
            Some(match level {
                Level::Held { epoch, task_id } => pb::ShardState {
                    shard_id: id.clone(),
                    epoch: *epoch,
                    level: pb::HoldLevel::Held.into(),
                    task_id: task_id.clone(),
                },
                Level::Applied { epoch } => pb::ShardState {
                    shard_id: id.clone(),
                    epoch: *epoch,
                    level: pb::HoldLevel::Applied.into(),
                    task_id: String::new(),
                },
            })
        };
        self.shards.keys().enumerate().filter_map(level).collect()
    }

    fn report(&mut self, ctx: &mut Ctx, shards: Vec<pb::ShardState>) {
        if let Some(conn) = self.stream {
            ctx.send(
                self.party(),
                conn,
                Stream::ProxyReport {
                    proxy: self.index,
                    shards,
                    troubles: self.troubles(ctx.now()),
                },
            );
        }
    }

    /// Per shard the newest epoch at which a lane is in trouble, and for how long.
    fn troubles(&self, now: Micros) -> Vec<pb::Trouble> {
        let mut all: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        for (shard, epoch, since) in self.troubles.values() {
            let seen = all.entry(*shard).or_insert((*epoch, *since));
            if *epoch > seen.0 {
                *seen = (*epoch, *since);
            } else if *epoch == seen.0 {
                seen.1 = seen.1.min(*since);
            }
        }
        let trouble = |(shard, (epoch, since)): (usize, (u64, u64))| {
            Some(pb::Trouble {
                shard_id: self.shards.keys().nth(shard)?.clone(),
                epoch,
                since_ms: now.saturating_sub(since) / MS,
            })
        };
        all.into_iter().filter_map(trouble).collect()
    }

    /// What follows, until nothing more follows; as the turn of a worker.
    fn settle(&mut self, ctx: &mut Ctx) {
        for _ in 0..16 {
            let due = self.due.is_some_and(|at| at <= ctx.now());
            if self.core.out.unsteady || due {
                self.due = self.core.on_time();
            }
            self.core.resume_stalled();
            self.read_resumed();
            self.obey(ctx);
            self.core.seal_batches();
            self.send_nodes(ctx);
            self.send_clients(ctx);
            if !self.core.out.unsteady && self.core.out.orders.is_empty() {
                break;
            }
        }
        for sample in std::mem::take(&mut self.core.out.samples) {
            ctx.checks
                .answered("a held request", sample.longest_us, HELD_MAX);
        }
        let news = std::mem::take(&mut self.core.out.troubles);
        let begins = news.iter().any(|t| t.since_us.is_some());
        for trouble in news {
            match trouble.since_us {
                Some(since) => {
                    let seen = (usize::from(trouble.shard), trouble.epoch, since);
                    self.troubles.insert(trouble.lane, seen);
                }
                None => drop(self.troubles.remove(&trouble.lane)),
            }
        }
        if begins {
            self.report(ctx, Vec::new());
        }
        if !std::mem::take(&mut self.core.out.levels).is_empty() {
            let levels = self.levels();
            if levels != self.reports {
                self.reports.clone_from(&levels);
                self.report(ctx, levels);
            }
        }
        if let Some(at) = self.due {
            let at = at.max(ctx.now() + 1);
            if self.armed.is_none_or(|armed| at < armed) {
                self.armed = Some(at);
                ctx.timer(self.party(), at - ctx.now(), Timer::Due);
            }
        }
    }

    fn read_resumed(&mut self) {
        for (slot, _) in std::mem::take(&mut self.core.sessions.resumed) {
            let found = self.clients.values_mut().find(|(s, _)| *s == slot);
            if let Some((_, kept)) = found {
                let used = self.core.client_bytes(slot, kept);
                kept.drain(..used);
            }
        }
    }

    fn obey(&mut self, ctx: &mut Ctx) {
        for order in std::mem::take(&mut self.core.out.orders) {
            match order {
                Order::Dial { lane, address } => {
                    let Some(node) = party_of(&address.to_string()) else {
                        continue;
                    };
                    let conn = ctx.open(self.party(), node);
                    let epoch = self.epoch_of(lane);
                    self.lanes.insert(lane, (conn, epoch));
                    self.core.lane_connected(lane);
                }
                Order::Prepare { .. } => {}
                Order::Hangup { lane } => {
                    if let Some((conn, _)) = self.lanes.remove(&lane) {
                        ctx.close(self.party(), conn);
                    }
                }
            }
        }
    }

    fn epoch_of(&self, lane: LaneNo) -> u64 {
        self.shards
            .values()
            .nth(lane as usize / 2)
            .map_or(0, |r| r.epoch)
    }

    fn send_nodes(&mut self, ctx: &mut Ctx) {
        for lane in std::mem::take(&mut self.core.out.touched) {
            self.core.lane_untouch(lane);
            let Some((conn, epoch)) = self.lanes.get(&lane).copied() else {
                continue;
            };
            let bytes = self.core.lane_unsent(lane).to_vec();
            if bytes.is_empty() {
                continue;
            }
            let shard = self
                .shards
                .keys()
                .nth(lane as usize / 2)
                .cloned()
                .unwrap_or_default();
            ctx.checks.routed(self.index, self.life, &shard, epoch);
            self.core.lane_sent(lane, bytes.len());
            ctx.send(self.party(), conn, Stream::Bytes(bytes));
        }
    }

    fn send_clients(&mut self, ctx: &mut Ctx) {
        for slot in std::mem::take(&mut self.core.sessions.touched) {
            let Some(client) = self.core.sessions.get_mut(slot) else {
                continue;
            };
            client.touched = false;
            let bytes = client.state.output[client.sent..].to_vec();
            let conn = self
                .clients
                .iter()
                .find(|(_, (s, _))| *s == slot)
                .map(|(conn, _)| *conn);
            if let Some(conn) = conn
                && !bytes.is_empty()
            {
                self.core.sessions.mark_sent(slot, bytes.len());
                ctx.send(self.party(), conn, Stream::Bytes(bytes));
            }
        }
    }
}

/// Whether reads through this proxy wait for what they may have seen, where writes are durable.
pub(crate) fn is_gated(index: usize) -> bool {
    index.is_multiple_of(2)
}

fn core() -> Core {
    let identity = Identity {
        run_id: "proxy".into(),
        port: 6379,
        pid: 1,
        advertise: None,
    };
    Core::new(Arc::new(identity), Arc::new(AtomicU64::new(0)))
}

fn shard_route(route: &pb::ShardRoute) -> ShardRoute {
    let address = |text: &str| text.parse::<SocketAddr>().ok();
    ShardRoute {
        shard_id: route.shard_id.clone(),
        index: route.index,
        epoch: route.epoch,
        address: address(&route.primary_address)
            .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 1))),
        username: route.username.clone(),
        password: route.password.clone(),
        hold: route.hold.as_ref().map(|hold| HoldOrder {
            task_id: hold.task_id.clone(),
            max_hold_us: u64::from(hold.max_hold_ms) * 1_000,
        }),
        target: route
            .hold
            .as_ref()
            .and_then(|hold| address(&hold.target_address)),
        observer: None,
        replicas: Vec::new(),
    }
}
