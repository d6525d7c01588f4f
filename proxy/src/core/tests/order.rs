//! Any interleaving of clients, shards, pieces and switchovers gives each client the replies that a
//! single Redis would have given it.
//!
//! Each client has keys of its own, so that a model predicts each reply byte for byte: a reply out
//! of order, a command lost or executed twice all show.

use std::collections::{BTreeMap, VecDeque};

use super::world::{Rights, Rng, World, command};

struct Client {
    slot: u32,
    id: usize,
    model: BTreeMap<String, i64>,
    unsent: VecDeque<u8>,
    expected: String,
}

impl Client {
    fn key(&self, rng: &mut Rng) -> String {
        format!("c{}:{}", self.id, rng.below(7))
    }

    fn say(&mut self, words: &[&str]) {
        self.unsent.extend(command(words));
    }

    fn value(&self, key: &str) -> String {
        match self.model.get(key) {
            Some(value) => format!("${}\r\n{value}\r\n", value.to_string().len()),
            None => "$-1\r\n".to_owned(),
        }
    }

    fn incr(&mut self, key: &str) -> i64 {
        let value = self.model.entry(key.to_owned()).or_default();
        *value += 1;
        *value
    }

    fn ask(&mut self, rng: &mut Rng) {
        let (a, b, c) = (self.key(rng), self.key(rng), self.key(rng));
        match rng.below(8) {
            0 | 1 => {
                self.say(&["INCR", &a]);
                let value = self.incr(&a);
                self.expected += &format!(":{value}\r\n");
            }
            2 => {
                self.say(&["GET", &a]);
                self.expected += &self.value(&a);
            }
            3 => {
                self.say(&["MGET", &a, &b, &c, &a]);
                let values = [&a, &b, &c, &a].map(|key| self.value(key)).concat();
                self.expected += &format!("*4\r\n{values}");
            }
            4 => {
                self.say(&["MSET", &a, "5", &b, "6", &a, "7"]);
                self.model.insert(b, 6);
                self.model.insert(a.clone(), 7);
                if let Some(value) = self.model.get_mut(&a) {
                    *value = 7;
                }
                self.expected += "+OK\r\n";
            }
            5 => {
                self.say(&["DEL", &a, &b, &c]);
                let gone = [a, b, c]
                    .iter()
                    .filter(|k| self.model.remove(*k).is_some())
                    .count();
                self.expected += &format!(":{gone}\r\n");
            }
            6 => {
                self.say(&["ECHO", "hello"]);
                self.expected += "$5\r\nhello\r\n";
            }
            _ => {
                self.say(&["MULTI"]);
                self.say(&["INCR", &a]);
                self.say(&["GET", &a]);
                self.say(&["EXEC"]);
                let value = self.incr(&a);
                self.expected += "+OK\r\n+QUEUED\r\n+QUEUED\r\n";
                self.expected += &format!("*2\r\n:{value}\r\n{}", self.value(&a));
            }
        }
    }
}

struct Run {
    world: World,
    rng: Rng,
    clients: Vec<Client>,
    /// Primary of each shard.
    primaries: Vec<usize>,
    epochs: Vec<u64>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut world = World::new(3);
        let clients = (0..4)
            .map(|id| Client {
                slot: world.connect(),
                id,
                model: BTreeMap::new(),
                unsent: VecDeque::new(),
                expected: String::new(),
            })
            .collect();
        let rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        Self {
            world,
            rng,
            clients,
            primaries: vec![0, 1, 2],
            epochs: vec![1; 3],
        }
    }

    fn step(&mut self, switchovers: Switchovers) {
        let lanes = self.world.lanes();
        match self.rng.below(20) {
            0..=5 => {
                let at = self.rng.below(self.clients.len());
                let client = &mut self.clients[at];
                client.ask(&mut self.rng);
                let count = self.rng.below(client.unsent.len() + 1);
                let bytes: Vec<u8> = client.unsent.drain(..count).collect();
                let slot = client.slot;
                self.world.send(slot, &bytes);
            }
            6..=8 => self.world.obey(),
            9..=13 if !lanes.is_empty() => {
                let lane = lanes[self.rng.below(lanes.len())];
                let commands = self.rng.below(4);
                self.world.run_node(lane, commands);
            }
            14..=17 if !lanes.is_empty() => {
                let lane = lanes[self.rng.below(lanes.len())];
                let bytes = self.rng.below(60);
                self.world.deliver(lane, bytes);
            }
            18 => {
                let us = self.rng.below(3_000) as u64;
                self.world.pass(us);
            }
            19 if switchovers == Switchovers::Some => self.switch_a_little(),
            _ => {}
        }
    }

    /// Some part of a switchover, in any order that a fence allows.
    fn switch_a_little(&mut self) {
        let shard = self.rng.below(3);
        let old = self.primaries[shard];
        let user = format!("px-{}", self.epochs[shard]);
        match self.rng.below(5) {
            0 => self.world.hold(shard, "t", 50_000),
            1 => drop(self.world.nodes[old].users.insert(user, Rights::Fenced)),
            2 => self.world.route(shard, |route| route.hold = None),
            _ if self.world.nodes[old].users.get(&user) == Some(&Rights::Fenced) => {
                // Fenced: no write can come any more, so the data may move.
                let new = self.world.add_node(&[]);
                self.world.nodes[new].data = self.world.nodes[old].data.clone();
                self.epochs[shard] += 1;
                self.primaries[shard] = new;
                let user = format!("px-{}", self.epochs[shard]);
                self.world.nodes[new].users.insert(user, Rights::Full);
                self.world.switch(shard, new);
            }
            _ => {}
        }
    }

    fn finish(&mut self, seed: u64) {
        // Rights come back only when nothing is on its way: see the scenario of an undone fence.
        self.world.settle();
        for shard in 0..3 {
            let user = format!("px-{}", self.epochs[shard]);
            self.world.nodes[self.primaries[shard]]
                .users
                .insert(user, Rights::Full);
            self.world.route(shard, |route| route.hold = None);
        }
        for client in &mut self.clients {
            let rest: Vec<u8> = client.unsent.drain(..).collect();
            self.world.send(client.slot, &rest);
        }
        for _ in 0..20 {
            self.world.pass(6_000);
            self.world.settle();
        }
        for client in &self.clients {
            let got = self.world.take_replies(client.slot);
            assert_eq!(got, client.expected, "seed {seed}, client {}", client.id);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Switchovers {
    None,
    Some,
}

/// `SLOTMESH_SEEDS` asks for more seeds than the few hundred of an ordinary run.
fn run(first: u64, count: u64, switchovers: Switchovers) {
    let asked = std::env::var("SLOTMESH_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok());
    for seed in first..first + asked.unwrap_or(count) {
        let mut run = Run::new(seed);
        for _ in 0..600 {
            run.step(switchovers);
        }
        run.finish(seed);
    }
}

#[test]
fn replies_come_in_request_order_under_any_interleaving() {
    run(1, 150, Switchovers::None);
}

#[test]
fn nothing_is_lost_repeated_or_reordered_by_switchovers() {
    run(1000, 300, Switchovers::Some);
}
