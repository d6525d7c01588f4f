//! Connections break at any moment. A client may be told that an outcome is unknown; it is never
//! told something wrong, and nothing runs twice.

use super::world::{Rng, World, command};

const KEYS: usize = 5;

struct Client {
    slot: u32,
    id: usize,
    /// Which key each request was for, and whether it increments.
    asked: Vec<(usize, Ask)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    Incr,
    Get,
}

/// What is known of a key from the replies so far.
#[derive(Clone, Copy, Default)]
struct Known {
    /// Its value is at least that.
    least: i64,
    asked: i64,
    acknowledged: i64,
    unknown: i64,
}

fn run(seed: u64, durable: Option<&str>) -> u64 {
    let mut world = World::new(3);
    if let Some(read_gate) = durable {
        world.set_durability(1, read_gate);
    }
    let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut clients: Vec<Client> = (0..3)
        .map(|id| Client {
            slot: world.connect(),
            id,
            asked: Vec::new(),
        })
        .collect();
    for _ in 0..500 {
        let lanes = world.lanes();
        let lane = (!lanes.is_empty()).then(|| lanes[rng.below(lanes.len())]);
        match (rng.below(20), lane) {
            (0..=5, _) => {
                let client = &mut clients[rng.below(3)];
                let (key, incr) = (rng.below(KEYS), rng.below(3) > 0);
                let (name, ask) = if incr {
                    ("INCR", Ask::Incr)
                } else {
                    ("GET", Ask::Get)
                };
                client.asked.push((key, ask));
                world.send(
                    client.slot,
                    &command(&[name, &format!("c{}:{key}", client.id)]),
                );
            }
            (6, _) => world.nodes[rng.below(3)].replicas = rng.below(3) as i64 / 2,
            (7..=8, _) => world.obey(),
            (9..=12, Some(lane)) => drop(world.run_node(lane, rng.below(4))),
            (13..=16, Some(lane)) => world.deliver(lane, rng.below(60)),
            (17, Some(lane)) => world.cut(lane),
            (_, _) => world.pass(rng.below(3_000) as u64),
        }
    }
    for _ in 0..100 {
        world.pass(10_000);
        world.settle();
    }
    let unknown = world.core.counters.outcome_unknown;
    for client in &clients {
        check(&mut world, client, seed);
    }
    unknown
}

fn check(world: &mut World, client: &Client, seed: u64) {
    let replies = world.take_replies(client.slot);
    let mut lines = replies.split_terminator("\r\n");
    let mut known = [Known::default(); KEYS];
    for (n, &(key, ask)) in client.asked.iter().enumerate() {
        let at = format!("seed {seed}, client {}, request {n}", client.id);
        let line = lines.next().unwrap_or_else(|| panic!("{at}: no reply"));
        let known = &mut known[key];
        known.asked += i64::from(ask == Ask::Incr);
        match (ask, line.split_at(1)) {
            (Ask::Incr, (":", value)) => {
                let value: i64 = value.parse().unwrap();
                assert!(
                    (known.least + 1..=known.asked).contains(&value),
                    "{at}: {value}"
                );
                (known.least, known.acknowledged) = (value, known.acknowledged + 1);
            }
            (Ask::Incr, ("-", text)) => {
                assert!(is_unknown(text), "{at}: {text}");
                known.unknown += 1;
            }
            // Behind a read gate: it was executed, and its answer is nobody's yet.
            (Ask::Get, ("-", text)) => assert!(text.starts_with("WAITFAIL"), "{at}: {text}"),
            (Ask::Get, ("$", "-1")) => assert_eq!(known.least, 0, "{at}"),
            // It may have been asked again after a later increment whose outcome is unknown.
            (Ask::Get, ("$", _)) => {
                let value: i64 = lines.next().unwrap().parse().unwrap();
                assert!(value >= known.least, "{at}: {value}");
                known.least = value;
            }
            _ => panic!("{at}: {line}"),
        }
    }
    for (key, known) in known.iter().enumerate() {
        let name = (0, format!("c{}:{key}", client.id).into_bytes());
        let values = world.nodes.iter().filter_map(|node| node.data.get(&name));
        let value: i64 = values
            .map(|v| String::from_utf8_lossy(v).parse::<i64>().unwrap())
            .sum();
        let possible = known.acknowledged..=known.acknowledged + known.unknown;
        assert!(
            possible.contains(&value),
            "seed {seed}: {value} not in {possible:?}"
        );
    }
    assert_eq!(lines.next(), None, "seed {seed}");
}

#[test]
fn a_lost_connection_repeats_nothing_and_reorders_nothing() {
    let unknown: u64 = (1..200).map(|seed| run(seed, None)).sum();
    assert!(
        unknown > 50,
        "the test must meet what it is about: {unknown}"
    );
}

#[test]
fn the_same_is_so_while_replicas_confirm_what_is_written() {
    for read_gate in ["no", "yes"] {
        let unknown: u64 = (1..200).map(|seed| run(seed, Some(read_gate))).sum();
        assert!(
            unknown > 50,
            "the test must meet what it is about: {unknown}"
        );
    }
}

fn is_unknown(text: &str) -> bool {
    text.ends_with("is unknown") || text.ends_with("may lose it")
}
