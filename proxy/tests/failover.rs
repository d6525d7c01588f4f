//! A primary that dies, freezes or vanishes without a word, with real nodes: what waits goes on at the
//! next primary, what may have run is answered with an error and never repeated, and other shards
//! notice nothing.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use slotmesh_proto::topology::v1 as pb;
use slotmesh_proto::topology::v1::watch_request::Message as Said;
use support::Proxy;
use support::controller::Controller;
use support::node::{Node, snapshot};
use support::raw::Raw;

const UNKNOWN: &str = "-ERR slotmesh: connection to the shard's primary was lost; \
     the outcome of this command is unknown\r\n";

/// The route while a failover is under way: nobody has its epoch yet.
fn vacant(
    lost: &Node,
    index: u32,
    shards: u32,
    epoch: u64,
    target: Option<&Node>,
) -> pb::ShardRoute {
    let hold = pb::Hold {
        task_id: "t1".to_owned(),
        target_address: target.map(|t| t.address.to_string()).unwrap_or_default(),
        max_hold_ms: 5_000,
    };
    pb::ShardRoute {
        hold: Some(hold),
        ..lost.route(index, shards, epoch)
    }
}

/// As the agents do it after the old primary is fenced: the replica follows nobody and is granted.
fn promote(to: &Node, epoch: u64) {
    assert_eq!(to.admin(&["REPLICAOF", "NO", "ONE"]), "+OK\r\n");
    to.grant(epoch);
}

struct World {
    nodes: Vec<Node>,
    controller: Controller,
    proxy: Proxy,
    _data: tempfile::TempDir,
}

impl World {
    /// Two shards: nodes 0 and 2 are primaries, 1 follows 0.
    async fn start() -> Self {
        let nodes = vec![
            Node::start_with_epoch(1),
            Node::start(),
            Node::start_with_epoch(1),
        ];
        nodes[1].replicate(&nodes[0]);
        let routes = vec![nodes[0].route(0, 2, 1), nodes[2].route(1, 2, 1)];
        let (controller, address) = Controller::start(snapshot(1, routes)).await;
        let data = tempfile::tempdir().unwrap();
        let arguments = ["--controller", &address.to_string(), "--workers", "2"];
        let proxy = Proxy::start(data.path(), &arguments).await;
        controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
        Self {
            nodes,
            controller,
            proxy,
            _data: data,
        }
    }

    fn lose(&self, target: Option<&Node>) {
        let route = vacant(&self.nodes[0], 0, 2, 2, target);
        self.controller.change(route);
    }

    fn promoted(&self) {
        promote(&self.nodes[1], 2);
        self.controller.change(self.nodes[1].route(0, 2, 2));
    }

    async fn client(&self) -> Raw {
        Raw::connect(self.proxy.address).await
    }

    async fn trouble(&self, shard: &str, epoch: u64) -> pb::Trouble {
        let is = |t: &pb::Trouble| t.shard_id == shard && t.epoch == epoch;
        let said = self
            .controller
            .wait_heard("a report of trouble", |said| match said {
                Said::Report(report) => report.troubles.iter().any(is),
                _ => false,
            })
            .await;
        let Said::Report(report) = said else {
            unreachable!()
        };
        report.troubles.into_iter().find(is).unwrap()
    }
}

/// A key of shard 0 (slots 0 to 8191) and one of shard 1.
const KEY_0: &str = "b";
const KEY_1: &str = "a";

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_primary_s_writes_are_unknown_and_all_else_goes_on_at_the_next() {
    let world = World::start().await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = world.client().await;
        client.send(format!("SET {KEY_0} 1\r\n").as_bytes()).await;
        client.expect("+OK\r\n").await;
        clients.push(client);
    }
    let [write, read, late, block] = &mut clients[..] else {
        unreachable!()
    };
    block
        .send(format!("BLPOP {{{KEY_0}}}l 0\r\n").as_bytes())
        .await;
    world.nodes[0].wait_blocked(1).await;
    world.nodes[1].wait_offset(&world.nodes[0]);
    world.nodes[0].freeze();
    write
        .send(format!("SET {KEY_0} 2\r\nGET {KEY_0}\r\n").as_bytes())
        .await;
    read.send(format!("GET {KEY_0}\r\nGET {KEY_1}\r\n").as_bytes())
        .await;
    let trouble = world.trouble("s0", 1).await;
    assert!(trouble.since_ms >= 400, "{trouble:?}");
    // Nothing more is sent to a node that says nothing, so this write is certain.
    late.send(format!("SET {KEY_0} 3\r\n").as_bytes()).await;
    assert!(late.is_silent().await);
    let began = Instant::now();
    world.lose(Some(&world.nodes[1]));
    write.expect(UNKNOWN).await;
    block.expect(UNKNOWN).await;
    assert!(
        began.elapsed() < Duration::from_millis(900),
        "{:?}",
        began.elapsed()
    );
    assert!(read.is_silent().await && late.is_silent().await);
    world.promoted();
    late.expect("+OK\r\n").await;
    world
        .controller
        .wait_level("s0", pb::HoldLevel::Applied, 2)
        .await;
    let value = write.bulk().await;
    assert!(value == "1" || value == "3", "{value}");
    let value = read.bulk().await;
    assert!(value == "1" || value == "3", "{value}");
    read.expect("$-1\r\n").await;
    world.nodes[0].thaw();
    late.send(format!("GET {KEY_0}\r\n").as_bytes()).await;
    late.expect("$1\r\n3\r\n").await;
}

/// What one client of [`count_until`] saw.
#[derive(Default)]
struct Seen {
    acknowledged: u64,
    unknown: u64,
    longest: Duration,
}

/// Increments and reads until told to stop.
async fn count_until(proxy: std::net::SocketAddr, key: String, stop: Arc<AtomicBool>) -> Seen {
    let mut client = Raw::connect(proxy).await;
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        client
            .send(format!("INCR {key}\r\nGET {key}\r\n").as_bytes())
            .await;
        let line = client.line().await;
        if line.starts_with(':') {
            seen.acknowledged += 1;
        } else {
            assert_eq!(line, UNKNOWN.trim_end());
            seen.unknown += 1;
        }
        let value: u64 = client.bulk_or_nil().await.parse().unwrap();
        let possible = seen.acknowledged..=seen.acknowledged + seen.unknown;
        assert!(
            possible.contains(&value),
            "{key}: {value} not in {possible:?}"
        );
        seen.longest = seen.longest.max(began.elapsed());
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_primary_costs_its_clients_a_wait_and_others_nothing() {
    let world = World::start().await;
    let stop = Arc::new(AtomicBool::new(false));
    let count = |tag: &str, id: u32| {
        let key = format!("{{{tag}}}{id}");
        count_until(world.proxy.address, key, Arc::clone(&stop))
    };
    let lost: Vec<_> = (0..6).map(|id| tokio::spawn(count(KEY_0, id))).collect();
    let others: Vec<_> = (0..6).map(|id| tokio::spawn(count(KEY_1, id))).collect();
    tokio::time::sleep(Duration::from_millis(200)).await; // traffic before
    // Nobody must lose what was acknowledged in this test: the replica is up to date at the end.
    world.nodes[0].admin(&["CLIENT", "PAUSE", "10000", "WRITE"]);
    world.nodes[1].wait_offset(&world.nodes[0]);
    world.nodes[0].kill();
    world.trouble("s0", 1).await;
    world.lose(None);
    tokio::time::sleep(Duration::from_millis(300)).await; // as long as choosing takes
    world.lose(Some(&world.nodes[1]));
    world.promoted();
    world
        .controller
        .wait_level("s0", pb::HoldLevel::Applied, 2)
        .await;
    tokio::time::sleep(Duration::from_millis(200)).await; // traffic after
    stop.store(true, Ordering::Relaxed);
    for (id, one) in lost.into_iter().enumerate() {
        let seen = one.await.unwrap();
        assert!(seen.unknown <= 1 && seen.acknowledged > 0);
        assert!(seen.longest < Duration::from_secs(3), "{:?}", seen.longest);
        let reply = world.nodes[1].admin(&["GET", &format!("{{{KEY_0}}}{id}")]);
        let value: u64 = reply.lines().nth(1).unwrap().parse().unwrap();
        let possible = seen.acknowledged..=seen.acknowledged + seen.unknown;
        assert!(possible.contains(&value), "{value} not in {possible:?}");
    }
    for one in others {
        let seen = one.await.unwrap();
        assert_eq!(seen.unknown, 0);
        assert!(seen.longest < Duration::from_secs(1), "{:?}", seen.longest);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribers_hear_what_is_published_after_a_failover() {
    for frozen in [false, true] {
        let world = World::start().await;
        let (mut subscriber, mut publisher) = (world.client().await, world.client().await);
        subscriber
            .send(format!("SUBSCRIBE {KEY_0}\r\n").as_bytes())
            .await;
        subscriber
            .expect(&format!("*3\r\n$9\r\nsubscribe\r\n$1\r\n{KEY_0}\r\n:1\r\n"))
            .await;
        if frozen {
            world.nodes[0].freeze();
        } else {
            world.nodes[0].kill();
        }
        world.lose(None);
        world.lose(Some(&world.nodes[1]));
        world.nodes[1].wait_subscriber(KEY_0).await;
        publisher
            .send(format!("PUBLISH {KEY_0} hi\r\n").as_bytes())
            .await;
        world.promoted();
        publisher.expect(":1\r\n").await;
        let began = Instant::now();
        let message = format!("*3\r\n$7\r\nmessage\r\n$1\r\n{KEY_0}\r\n$2\r\nhi\r\n");
        subscriber.expect(&message).await;
        assert!(began.elapsed() < Duration::from_millis(900), "{frozen}");
        world.nodes[0].thaw();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_count_as_touched_and_trackers_forget_after_a_failover() {
    let world = World::start().await;
    let (mut watcher, mut tracker) = (world.client().await, world.client().await);
    watcher
        .send(format!("SET {KEY_0} 1\r\nWATCH {KEY_0}\r\nMULTI\r\nSET {KEY_0} 2\r\n").as_bytes())
        .await;
    watcher.expect("+OK\r\n+OK\r\n+OK\r\n+QUEUED\r\n").await;
    tracker.send(b"HELLO 3\r\n").await;
    assert!(tracker.heard().await.starts_with('%'));
    tracker
        .send(format!("CLIENT TRACKING ON\r\nGET {KEY_0}\r\n").as_bytes())
        .await;
    tracker.expect("+OK\r\n$1\r\n1\r\n").await;
    world.nodes[1].wait_offset(&world.nodes[0]);
    world.nodes[0].freeze();
    world.lose(Some(&world.nodes[1]));
    world.promoted();
    // What was sent to the frozen one before would have an unknown outcome.
    let applied = pb::HoldLevel::Applied;
    world.controller.wait_level("s0", applied, 2).await;
    watcher
        .send(format!("EXEC\r\nGET {KEY_0}\r\n").as_bytes())
        .await;
    watcher.expect("*-1\r\n$1\r\n1\r\n").await;
    tracker.expect(">2\r\n$10\r\ninvalidate\r\n_\r\n").await;
    world.nodes[0].thaw();
}

/// Nobody takes the place of a dead primary: who asks one thing after the other waits for a whole
/// budget once, and then hears soon that it is no use.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_shard_without_a_successor_is_refused_soon_after_the_first_wait() {
    let world = World::start().await;
    world.controller.set_hold_budget(600);
    let mut client = world.client().await;
    client.send(format!("SET {KEY_0} 1\r\n").as_bytes()).await;
    client.expect("+OK\r\n").await;
    world.nodes[0].kill();
    let overdue = "-ERR slotmesh: the shard's primary could not be reached in time; \
         this command was not executed\r\n";
    world.trouble("s0", 1).await;
    // The trouble may have been another worker's: a command that this client's worker writes before
    // it has heard of the death has an unknown outcome, and it is the one that tells the worker.
    client.send(format!("SET {KEY_0} 1\r\n").as_bytes()).await;
    let first = client.line().await;
    let lost = "-ERR slotmesh: connection to the shard's primary was lost; \
         the outcome of this command is unknown";
    assert!([lost, overdue.trim_end()].contains(&&*first), "{first}");
    for ask in 0..5 {
        let began = Instant::now();
        client
            .send(format!("SET {KEY_0} {ask}\r\n").as_bytes())
            .await;
        client.expect(overdue).await;
        let took = began.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    client.send(format!("SET {KEY_1} 1\r\n").as_bytes()).await;
    client.expect("+OK\r\n").await;
}

/// The lost primary came back, nobody has more, and so it is chosen itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_primary_can_be_its_own_successor() {
    let world = World::start().await;
    let mut client = world.client().await;
    client.send(format!("SET {KEY_0} 1\r\n").as_bytes()).await;
    client.expect("+OK\r\n").await;
    world.lose(None);
    world
        .controller
        .wait_level("s0", pb::HoldLevel::Held, 2)
        .await;
    client.send(format!("SET {KEY_0} 2\r\n").as_bytes()).await;
    assert!(client.is_silent().await);
    world.nodes[0].grant(2);
    world.controller.change(world.nodes[0].route(0, 2, 2));
    client.expect("+OK\r\n").await;
}
