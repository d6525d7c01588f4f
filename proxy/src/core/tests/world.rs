//! A small world around the core: clients, and nodes that understand a few commands, with rights
//! that can be taken, and connections that deliver as much or as little as a test wants.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use slotmesh_resp::{Args, Parsed, RequestParser, write};

use crate::core::client::ClientState;
use crate::core::hold::HoldOrder;
use crate::core::lane::LaneNo;
use crate::core::outbox::Order;
use crate::core::sessions::NoOutlet;
use crate::core::{Core, Identity};
use crate::routing::{InstanceSettings, RoutingTable, ShardRoute};

/// xorshift: the same seed gives the same run.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    Full,
    /// Reads and connection commands only.
    Fenced,
}

type Data = BTreeMap<(u16, Vec<u8>), Vec<u8>>;

#[derive(Default)]
pub(super) struct Node {
    pub(super) data: Data,
    pub(super) users: HashMap<String, Rights>,
    pub(super) down: bool,
    /// Commands that took effect, of any client.
    pub(super) executed: u64,
    /// Replicas that have everything.
    pub(super) replicas: i64,
}

#[derive(Default)]
struct Wire {
    node: usize,
    user: Option<String>,
    db: u16,
    multi: Option<Vec<Vec<Vec<u8>>>>,
    aborted: bool,
    to_node: Vec<u8>,
    to_core: Vec<u8>,
    kept: Vec<u8>,
}

pub(super) struct World {
    pub(super) core: Core,
    pub(super) nodes: Vec<Node>,
    wires: HashMap<LaneNo, Wire>,
    pub(super) replies: HashMap<u32, Vec<u8>>,
    pub(super) now_us: u64,
    /// As if other workers held something too.
    pub(super) held_sum: Arc<AtomicU64>,
    removed: Vec<bool>,
    routes: Vec<ShardRoute>,
    settings: InstanceSettings,
    revision: u64,
}

pub(super) fn command(words: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    let words: Vec<&[u8]> = words.iter().map(|w| w.as_bytes()).collect();
    write::encode_command(&mut out, &words);
    out
}

fn address(node: usize) -> SocketAddr {
    ([127, 0, 0, 1], 7000 + node as u16).into()
}

impl World {
    /// Each shard has one node, of the same number, and epoch 1.
    pub(super) fn new(shards: usize) -> Self {
        let identity = Identity {
            run_id: "r".to_owned(),
            port: 1,
            pid: 1,
            advertise: None,
        };
        let held_sum = Arc::new(AtomicU64::new(0));
        let core = Core::new(Arc::new(identity), Arc::clone(&held_sum));
        let mut world = Self {
            core,
            nodes: Vec::new(),
            wires: HashMap::new(),
            replies: HashMap::new(),
            now_us: 1000,
            held_sum,
            removed: vec![false; shards],
            routes: Vec::new(),
            settings: InstanceSettings::default(),
            revision: 0,
        };
        world.core.set_now(world.now_us, world.now_us);
        for shard in 0..shards {
            world.add_node(&[("px-1", Rights::Full)]);
            world.routes.push(ShardRoute {
                shard_id: shard.to_string(),
                index: shard as u32,
                epoch: 1,
                address: address(shard),
                username: "px-1".to_owned(),
                password: "secret".to_owned(),
                hold: None,
                target: None,
                observer: None,
                replicas: Vec::new(),
            });
        }
        world.publish();
        world
    }

    pub(super) fn add_node(&mut self, users: &[(&str, Rights)]) -> usize {
        let users = users
            .iter()
            .map(|(name, rights)| ((*name).to_owned(), *rights))
            .collect();
        self.nodes.push(Node {
            users,
            ..Node::default()
        });
        self.nodes.len() - 1
    }

    pub(super) fn set_settings(&mut self, change: impl FnOnce(&mut InstanceSettings)) {
        change(&mut self.settings);
        self.publish();
    }

    /// Changes a shard's route and puts it in force.
    pub(super) fn route(&mut self, shard: usize, change: impl FnOnce(&mut ShardRoute)) {
        change(&mut self.routes[shard]);
        self.publish();
    }

    /// The shard has no primary, or has its old one again.
    pub(super) fn remove(&mut self, shard: usize, removed: bool) {
        self.removed[shard] = removed;
        self.publish();
    }

    pub(super) fn hold(&mut self, shard: usize, task: &str, max_hold_us: u64) {
        let order = HoldOrder {
            task_id: task.to_owned(),
            max_hold_us,
        };
        self.route(shard, |route| route.hold = Some(order));
    }

    /// The shard's primary is `node` from now on, one epoch higher.
    pub(super) fn switch(&mut self, shard: usize, node: usize) {
        self.route(shard, |route| {
            route.epoch += 1;
            route.username = format!("px-{}", route.epoch);
            route.address = address(node);
            route.hold = None;
        });
    }

    fn publish(&mut self) {
        self.revision += 1;
        let count = self.routes.len();
        let ranges: Vec<_> = (0..count)
            .map(|i| {
                (
                    i as u16,
                    (16384 * i / count) as u16,
                    (16384 * (i + 1) / count - 1) as u16,
                )
            })
            .collect();
        let shards = self
            .routes
            .iter()
            .zip(&self.removed)
            .map(|(r, removed)| (!removed).then(|| Arc::new(r.clone())))
            .collect();
        let settings = self.settings.clone();
        self.core.apply(Arc::new(RoutingTable::new(
            self.revision,
            settings,
            shards,
            &ranges,
        )));
        self.obey();
    }

    /// So many replicas must have a write; with or without a gate for reads.
    pub(super) fn set_durability(&mut self, replicas: u32, read_gate: &str) {
        self.settings.durability = replicas;
        self.settings.parameters.read_gate = read_gate == "yes";
        self.publish();
    }

    pub(super) fn connect(&mut self) -> u32 {
        let slot = self.core.open_client(ClientState::new(1, None, 0));
        self.replies.insert(slot, Vec::new());
        slot
    }

    /// A client sends; what is not used yet is kept, as a worker does.
    pub(super) fn send(&mut self, slot: u32, bytes: &[u8]) {
        let Some(client) = self.core.sessions.get_mut(slot) else {
            return;
        };
        let mut input = std::mem::take(&mut client.state.input);
        input.extend_from_slice(bytes);
        let used = self.core.client_bytes(slot, &input);
        input.drain(..used);
        if let Some(client) = self.core.sessions.get_mut(slot) {
            client.state.input = input;
        }
    }

    /// What follows without any node: orders, time, resumed clients, replies to clients.
    pub(super) fn obey(&mut self) {
        loop {
            for order in std::mem::take(&mut self.core.out.orders) {
                match order {
                    Order::Hangup { lane } => drop(self.wires.remove(&lane)),
                    Order::Prepare { .. } => {}
                    Order::Dial { lane, address } => self.dial(lane, address),
                }
            }
            self.core.resume_stalled();
            for (slot, _) in std::mem::take(&mut self.core.sessions.resumed) {
                self.send(slot, b"");
            }
            if self.core.out.orders.is_empty() && self.core.sessions.resumed.is_empty() {
                break;
            }
        }
        self.core.seal_batches();
        for lane in std::mem::take(&mut self.core.out.touched) {
            self.core.lane_untouch(lane);
            let unsent = self.core.lane_unsent(lane).to_vec();
            if let Some(wire) = self.wires.get_mut(&lane) {
                wire.to_node.extend_from_slice(&unsent);
                self.core.lane_sent(lane, unsent.len());
            }
        }
        for slot in std::mem::take(&mut self.core.sessions.touched) {
            let Some(client) = self.core.sessions.get_mut(slot) else {
                continue;
            };
            client.touched = false;
            let unsent = client.state.output[client.sent..].to_vec();
            self.replies
                .entry(slot)
                .or_default()
                .extend_from_slice(&unsent);
            self.core.sessions.mark_sent(slot, unsent.len());
        }
    }

    fn dial(&mut self, lane: LaneNo, to: SocketAddr) {
        let node = usize::from(to.port() - 7000);
        if self.nodes[node].down {
            self.core.lane_lost(lane);
            return;
        }
        self.wires.insert(
            lane,
            Wire {
                node,
                ..Wire::default()
            },
        );
        self.core.lane_connected(lane);
    }

    pub(super) fn pass(&mut self, us: u64) {
        self.now_us += us;
        self.core.set_now(self.now_us, self.now_us);
        self.core.on_time();
        self.obey();
    }

    pub(super) fn lanes(&self) -> Vec<LaneNo> {
        let mut lanes: Vec<_> = self.wires.keys().copied().collect();
        lanes.sort_unstable();
        lanes
    }

    /// The node of a lane executes up to `commands`; its answers are on their way.
    pub(super) fn run_node(&mut self, lane: LaneNo, commands: usize) -> usize {
        let Some(wire) = self.wires.get_mut(&lane) else {
            return 0;
        };
        let node = &mut self.nodes[wire.node];
        let (mut args, mut done) = (Args::new(), 0);
        while done < commands {
            let mut parser = RequestParser::new();
            let parsed = parser.parse(&wire.to_node, &mut args);
            let Ok(Parsed::Complete { consumed }) = parsed else {
                break;
            };
            let words: Vec<Vec<u8>> = args.iter(&wire.to_node).map(<[u8]>::to_vec).collect();
            wire.to_node.drain(..consumed);
            wire.execute(node, words);
            done += 1;
        }
        done
    }

    /// Up to `bytes` of a node's answers arrive.
    pub(super) fn deliver(&mut self, lane: LaneNo, bytes: usize) {
        let Some(wire) = self.wires.get_mut(&lane) else {
            return;
        };
        let count = bytes.min(wire.to_core.len());
        let mut buf = std::mem::take(&mut wire.kept);
        buf.extend(wire.to_core.drain(..count));
        let used = self.core.node_bytes(lane, &buf, &mut NoOutlet).unwrap();
        buf.drain(..used);
        if let Some(wire) = self.wires.get_mut(&lane) {
            wire.kept = buf;
        }
        self.obey();
    }

    /// A connection breaks. What the node has executed stays executed.
    pub(super) fn cut(&mut self, lane: LaneNo) {
        self.wires.remove(&lane);
        self.core.lane_lost(lane);
        self.obey();
    }

    /// Everything goes as far as it can without time passing.
    pub(super) fn settle(&mut self) {
        self.obey();
        loop {
            let mut done = 0;
            for lane in self.lanes() {
                done += self.run_node(lane, usize::MAX);
                let waiting = self.wires.get(&lane).map_or(0, |w| w.to_core.len());
                done += waiting;
                self.deliver(lane, usize::MAX);
            }
            if done == 0 {
                return;
            }
        }
    }

    pub(super) fn take_replies(&mut self, slot: u32) -> String {
        self.obey();
        let bytes = std::mem::take(self.replies.get_mut(&slot).unwrap());
        String::from_utf8(bytes).unwrap()
    }
}

fn is_read(name: &str) -> bool {
    matches!(name, "GET" | "MGET" | "AUTH" | "SELECT" | "HELLO" | "PING")
}

impl Wire {
    fn execute(&mut self, node: &mut Node, words: Vec<Vec<u8>>) {
        let name = String::from_utf8_lossy(&words[0]).to_uppercase();
        let out = &mut self.to_core;
        if name == "AUTH" || name == "HELLO" {
            let at = if name == "AUTH" { 1 } else { 3 };
            let user = String::from_utf8_lossy(&words[at]).into_owned();
            if !node.users.contains_key(&user) {
                return write::write_error(out, "WRONGPASS invalid username-password pair");
            }
            self.user = Some(user);
            return write::write_simple(out, "OK");
        }
        let rights = self
            .user
            .as_ref()
            .and_then(|user| node.users.get(user))
            .copied();
        if rights.is_none_or(|r| r == Rights::Fenced && !is_read(&name)) {
            let lower = name.to_lowercase();
            let text = format!("NOPERM no permissions to run the '{lower}' command");
            self.aborted |= self.multi.is_some();
            if name == "EXEC" && self.multi.take().is_some() {
                self.aborted = false;
                let text = format!("EXECABORT Transaction discarded because of: {text}");
                return write::write_error(out, text);
            }
            return write::write_error(out, text);
        }
        match (name.as_str(), &mut self.multi) {
            ("MULTI", _) => {
                self.multi = Some(Vec::new());
                self.aborted = false;
                write::write_simple(out, "OK");
            }
            ("EXEC", multi) => match multi.take() {
                None => write::write_error(out, "ERR EXEC without MULTI"),
                Some(_) if std::mem::take(&mut self.aborted) => {
                    write::write_error(out, "EXECABORT Transaction discarded.");
                }
                Some(queue) => {
                    write::write_array_header(out, queue.len());
                    for words in queue {
                        apply(out, node, &mut self.db, &words);
                    }
                }
            },
            (_, Some(queue)) => {
                queue.push(words);
                write::write_simple(out, "QUEUED");
            }
            _ => apply(out, node, &mut self.db, &words),
        }
    }
}

fn apply(out: &mut Vec<u8>, node: &mut Node, db: &mut u16, words: &[Vec<u8>]) {
    let name = String::from_utf8_lossy(&words[0]).to_uppercase();
    let text = |at: usize| String::from_utf8_lossy(&words[at]).into_owned();
    let key = |at: usize| (*db, words[at].clone());
    let bulk = |out: &mut Vec<u8>, value: Option<&Vec<u8>>| match value {
        Some(value) => write::write_bulk(out, value),
        None => write::write_null(out, slotmesh_resp::Protocol::Resp2),
    };
    node.executed += u64::from(!is_read(&name));
    match name.as_str() {
        "SELECT" => {
            *db = text(1).parse().unwrap();
            write::write_simple(out, "OK");
        }
        "PING" => write::write_simple(out, "PONG"),
        "WAIT" => write::write_int(out, node.replicas),
        "SPUBLISH" => write::write_int(out, 0),
        "GET" => bulk(out, node.data.get(&key(1))),
        "SET" => {
            node.data.insert(key(1), words[2].clone());
            write::write_simple(out, "OK");
        }
        "INCR" | "EVAL" => {
            let at = if name == "INCR" { 1 } else { 3 };
            let entry = node.data.entry(key(at)).or_insert_with(|| b"0".to_vec());
            let next = String::from_utf8_lossy(entry).parse::<i64>().unwrap() + 1;
            *entry = next.to_string().into_bytes();
            write::write_int(out, next);
        }
        "MGET" => {
            write::write_array_header(out, words.len() - 1);
            (1..words.len()).for_each(|at| bulk(out, node.data.get(&key(at))));
        }
        "MSET" => {
            for at in (1..words.len()).step_by(2) {
                node.data.insert(key(at), words[at + 1].clone());
            }
            write::write_simple(out, "OK");
        }
        "DEL" => {
            let gone = (1..words.len()).filter(|at| node.data.remove(&key(*at)).is_some());
            write::write_int(out, gone.count() as i64);
        }
        other => write::write_error(out, format!("ERR unknown command '{other}'")),
    }
}
