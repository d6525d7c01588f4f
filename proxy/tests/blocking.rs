//! Commands that wait, through the proxy: answered as one Redis answers them, given up with their
//! client, and issued again when the shard changes its primary.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use slotmesh_proto::topology::v1 as pb;
use support::controller::Controller;
use support::node::{Node, snapshot};
use support::talk::Talk;
use support::{Proxy, wait_for};

struct Fixture {
    nodes: Vec<Node>,
    controller: Controller,
    proxy: Proxy,
    _data: tempfile::TempDir,
}

/// With so many shards, and one node more that no route names.
async fn fixture(shards: u32) -> Fixture {
    let nodes: Vec<Node> = (0..=shards).map(|_| Node::start_with_epoch(1)).collect();
    nodes
        .iter()
        .for_each(|node| drop(node.admin(&["CONFIG", "SET", "hz", "50"])));
    let data = tempfile::tempdir().unwrap();
    let routes = (0..shards).map(|i| nodes[i as usize].route(i, shards, 1));
    let (controller, address) = Controller::start(snapshot(1, routes.collect())).await;
    let arguments = ["--controller", &address.to_string(), "--workers", "1"];
    let proxy = Proxy::start(data.path(), &arguments).await;
    controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
    Fixture {
        nodes,
        controller,
        proxy,
        _data: data,
    }
}

impl Fixture {
    async fn client(&self) -> Talk {
        Talk::connect(self.proxy.address).await
    }
}

fn blocked(node: &Node) -> usize {
    let info = node.admin(&["INFO", "clients"]);
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("blocked_clients:"));
    line.unwrap().trim().parse().unwrap()
}

async fn wait_blocked(node: &Node, count: usize) {
    wait_for(&format!("{count} blocked clients"), || {
        (blocked(node) == count).then_some(())
    })
    .await;
}

/// What is waited for, what ends it, and the end's reply.
const SERVED: &[(&str, &str, &str)] = &[
    ("BLPOP k1 0", "RPUSH k1 a", ":1\r\n"),
    ("BRPOP k1 nok 0", "RPUSH k1 a b", ":2\r\n"),
    ("BLMOVE k1 k2 LEFT RIGHT 0", "RPUSH k1 a", ":1\r\n"),
    ("BRPOPLPUSH k1 k2 0", "RPUSH k1 a", ":1\r\n"),
    ("BLMPOP 0 2 k1 k2 LEFT COUNT 2", "RPUSH k2 a b c", ":3\r\n"),
    ("BZPOPMIN k1 0", "ZADD k1 1.5 a 2 b", ":2\r\n"),
    ("BZPOPMAX k1 k2 0", "ZADD k2 1 a 2 b", ":2\r\n"),
    ("BZMPOP 0 1 k1 MAX COUNT 3", "ZADD k1 1 a 2 b", ":2\r\n"),
    (
        "XREAD BLOCK 0 STREAMS k1 $",
        "XADD k1 7-1 f v",
        "$3\r\n7-1\r\n",
    ),
    (
        "XREAD COUNT 1 BLOCK 0 STREAMS k1 k2 0 0",
        "XADD k2 7-1 f v",
        "$3\r\n7-1\r\n",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_is_answered_with_the_bytes_of_one_redis() {
    let (fixture, redis) = (fixture(1).await, Node::start());
    for resp3 in [false, true] {
        for (waits, ends, ended) in SERVED {
            let mut replies = Vec::new();
            for (node, proxied) in [(&redis, false), (&fixture.nodes[0], true)] {
                node.admin(&["FLUSHALL"]);
                let (mut first, mut second) = if proxied {
                    (fixture.client().await, fixture.client().await)
                } else {
                    (Talk::direct(node).await, Talk::direct(node).await)
                };
                if resp3 {
                    first.resp3().await;
                }
                first.say(waits).await;
                wait_blocked(node, 1).await;
                second.expect(ends, ended).await;
                replies.push(first.hear().await);
                // At once, too, and the connection goes on.
                second.expect("DEL k1 k2", &second_del(waits)).await;
                first.expect("PING", "+PONG\r\n").await;
            }
            assert_eq!(replies[0], replies[1], "{waits}, resp3: {resp3}");
        }
    }
}

/// Keys that are left after the command was served.
fn second_del(waits: &str) -> String {
    let left = match waits.split(' ').next().unwrap() {
        "BLPOP" | "BZMPOP" => 0,
        _ => 1,
    };
    format!(":{left}\r\n")
}

/// Answered at once, or when the time is over.
const ENDED: &[&str] = &[
    "BLPOP k 0.05",
    "BRPOP k 0.05",
    "BLMOVE k l LEFT LEFT 0.05",
    "BRPOPLPUSH k l 0.05",
    "BLMPOP 0.05 1 k LEFT",
    "BZPOPMIN k 0.05",
    "BZPOPMAX k 0.05",
    "BZMPOP 0.05 1 k MIN",
    "XREAD BLOCK 50 STREAMS k $",
    "XREADGROUP GROUP g c BLOCK 50 STREAMS k >",
    "XREADGROUP GROUP g c BLOCK 50 STREAMS stream >",
    "XREADGROUP GROUP g c BLOCK 50 STREAMS stream 0",
    "BLPOP list 0",
    "BLPOP string 0",
    "BLPOP list zset 0",
    "BLPOP k -1",
    "BLPOP k x",
    "BLPOP k 1e400",
    "BLPOP k 0x7FFFFFFFFFFFFFFF",
    "BLPOP k",
    "BLMPOP 0 0 k LEFT",
    "BLMPOP 0 1 k NOWHERE",
    "BZMPOP x 1 k MIN",
    "XREAD BLOCK -1 STREAMS k $",
    "XREAD BLOCK x STREAMS k $",
    "XREAD BLOCK 0 STREAMS k",
    "XREAD BLOCK",
    "WAIT 0 0",
    "WAIT 1 50",
    "WAIT x 0",
    "WAIT 1 -1",
    "WAIT 1 x",
];

#[tokio::test(flavor = "multi_thread")]
async fn errors_and_timeouts_are_those_of_one_redis() {
    let (fixture, redis) = (fixture(1).await, Node::start());
    let setup = [
        "RPUSH list a b c d e f g h",
        "SET string x",
        "ZADD zset 1 a",
        "XGROUP CREATE stream g $ MKSTREAM",
    ];
    let (mut direct, mut proxied) = (Talk::direct(&redis).await, fixture.client().await);
    for line in setup {
        assert_eq!(direct.ask(line).await, proxied.ask(line).await);
    }
    for resp3 in [false, true] {
        if resp3 {
            direct.resp3().await;
            proxied.resp3().await;
        }
        for line in ENDED {
            let (want, got) = (direct.ask(line).await, proxied.ask(line).await);
            assert_eq!(got, want, "{line}, resp3: {resp3}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn timeouts_are_right_to_fifty_milliseconds() {
    let fixture = fixture(1).await;
    let mut talk = fixture.client().await;
    for ms in [1, 20, 100, 333, 1000] {
        for line in [
            format!("BLPOP k {}.{:03}", ms / 1000, ms % 1000),
            format!("XREAD BLOCK {ms} STREAMS k $"),
        ] {
            // Never early; and late only if this machine was busy, which it is not three times.
            let mut least = u64::MAX;
            for _ in 0..3 {
                let began = Instant::now();
                talk.expect(&line, "*-1\r\n").await;
                let took = began.elapsed().as_millis() as u64;
                assert!(took >= ms, "{line} took {took} ms");
                least = least.min(took);
            }
            assert!(least <= ms + 50, "{line} took {least} ms");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_forgotten_by_the_node_at_once() {
    let fixture = fixture(1).await;
    let node = &fixture.nodes[0];
    for pipelined in [false, true] {
        let mut clients = Vec::new();
        for _ in 0..5 {
            let mut talk = fixture.client().await;
            talk.say("BLPOP k 0").await;
            if pipelined {
                talk.say("PING").await;
            }
            clients.push(talk);
        }
        wait_blocked(node, 5).await;
        drop(clients);
        let left = Instant::now();
        wait_blocked(node, 0).await;
        let took = left.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    // Nothing is popped for those who left.
    let mut talk = fixture.client().await;
    talk.expect("RPUSH k a", ":1\r\n").await;
    talk.expect("LLEN k", ":1\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pipelined_waits_behind_and_nobody_else_does() {
    let fixture = fixture(1).await;
    let (mut first, mut second) = (fixture.client().await, fixture.client().await);
    for line in ["SET x 1", "BLPOP k 0", "INCR x", "GET x"] {
        first.say(line).await;
    }
    assert_eq!(first.hear().await, "+OK\r\n");
    wait_blocked(&fixture.nodes[0], 1).await;
    second.expect("GET x", "$1\r\n1\r\n").await;
    second.expect("RPUSH k v", ":1\r\n").await;
    assert_eq!(first.hear().await, "*2\r\n$1\r\nk\r\n$1\r\nv\r\n");
    assert_eq!(first.hear().await, ":2\r\n");
    assert_eq!(first.hear().await, "$1\r\n2\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_wait_longest_are_served_first_and_databases_are_apart() {
    let fixture = fixture(1).await;
    let mut waiting = Vec::new();
    for n in 0..5 {
        let mut talk = fixture.client().await;
        talk.expect("SELECT 7", "+OK\r\n").await;
        talk.say("BLPOP k 0").await;
        wait_blocked(&fixture.nodes[0], n + 1).await;
        waiting.push(talk);
    }
    let mut talk = fixture.client().await;
    talk.expect("RPUSH k other", ":1\r\n").await;
    talk.expect("SELECT 7", "+OK\r\n").await;
    for (n, waits) in waiting.iter_mut().enumerate() {
        talk.expect(&format!("RPUSH k {n}"), ":1\r\n").await;
        let want = format!("*2\r\n$1\r\nk\r\n$1\r\n{n}\r\n");
        assert_eq!(waits.hear().await, want);
    }
    // Their lines are used again, for another database.
    let mut next = fixture.client().await;
    next.expect("BLPOP k 0", "*2\r\n$1\r\nk\r\n$5\r\nother\r\n")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_two_shards_are_refused() {
    let fixture = fixture(3).await;
    let mut talk = fixture.client().await;
    let cross = "-CROSSSLOT Keys in request don't hash to the same slot\r\n";
    talk.expect("BLPOP a b 0", cross).await;
    talk.expect("BLPOP {x}a {x}b 0.01", "*-1\r\n").await;
    talk.expect("WAIT 0 0", ":0\r\n").await;
    talk.expect("WAIT 1 30", ":0\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wait_counts_replicas_that_have_what_the_client_wrote() {
    let fixture = fixture(1).await;
    let (primary, replica) = (&fixture.nodes[0], &fixture.nodes[1]);
    replica.replicate(primary);
    let mut talk = fixture.client().await;
    for n in 0..20 {
        talk.expect(&format!("SET k {n}"), "+OK\r\n").await;
        talk.expect("WAIT 1 5000", ":1\r\n").await;
        let value = format!("\r\n{n}\r\n");
        assert!(replica.admin(&["GET", "k"]).ends_with(&value));
    }
    replica.admin(&["DEBUG", "SLEEP", "0"]);
    replica.admin(&["REPLICAOF", "NO", "ONE"]);
    talk.expect("SET k x", "+OK\r\n").await;
    let began = Instant::now();
    talk.expect("WAIT 1 200", ":0\r\n").await;
    assert!(began.elapsed() >= Duration::from_millis(200));
}

#[tokio::test(flavor = "multi_thread")]
async fn over_the_bound_a_command_is_refused_and_below_it_lines_are_shared() {
    let fixture = fixture(1).await;
    let mut waiting = Vec::new();
    for _ in 0..512 {
        let mut talk = fixture.client().await;
        talk.say("BLPOP k 0").await;
        waiting.push(talk);
        if waiting.len() == 1 {
            // The others' connections to the node overtake each other.
            wait_blocked(&fixture.nodes[0], 1).await;
        }
    }
    wait_blocked(&fixture.nodes[0], 512).await;
    let mut talk = fixture.client().await;
    let reply = talk.ask("BLPOP k 0").await;
    assert!(
        reply.starts_with("-ERR slotmesh: too many clients"),
        "{reply}"
    );
    let reply = talk.ask("WATCH k").await;
    assert!(
        reply.starts_with("-ERR slotmesh: too many clients"),
        "{reply}"
    );
    talk.expect("RPUSH k a", ":1\r\n").await;
    assert!(waiting[0].hear().await.starts_with("*2\r\n"));
    talk.expect("WATCH k", "+OK\r\n").await;
}

/// Fence, then the role, as the agent of the old primary does; without a hold at the proxy.
async fn switch(fixture: &Fixture, from: usize, to: usize, epoch: u64) {
    let (from, to) = (&fixture.nodes[from], &fixture.nodes[to]);
    from.fence(epoch);
    assert_eq!(from.admin(&["WAIT", "1", "5000"]), ":1\r\n");
    to.admin(&["REPLICAOF", "NO", "ONE"]);
    from.replicate(to);
    to.grant(epoch + 1);
    fixture.controller.change(to.route(0, 1, epoch + 1));
    fixture
        .controller
        .wait_level("s0", pb::HoldLevel::Applied, epoch + 1)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switchover_issues_what_waits_again_with_the_time_that_is_left() {
    let fixture = fixture(1).await;
    fixture.nodes[1].replicate(&fixture.nodes[0]);
    let (mut popper, mut reader, mut short) = (
        fixture.client().await,
        fixture.client().await,
        fixture.client().await,
    );
    let mut tail = fixture.client().await;
    let id = tail.ask("XADD t 5-1 f v").await;
    assert_eq!(id, "$3\r\n5-1\r\n");
    tail.say("XREAD BLOCK 0 STREAMS nothing t $ $").await;
    popper.say("BLPOP k 0").await;
    reader.say("XREAD BLOCK 60000 STREAMS s 0").await;
    let began = Instant::now();
    short.say("BLPOP other 1.2").await;
    wait_blocked(&fixture.nodes[0], 4).await;
    tokio::time::sleep(Duration::from_millis(300)).await; // so that less time is left
    switch(&fixture, 0, 1, 1).await;
    wait_blocked(&fixture.nodes[1], 4).await;
    assert_eq!(blocked(&fixture.nodes[0]), 0);
    assert_eq!(short.hear().await, "*-1\r\n");
    let took = began.elapsed().as_millis();
    assert!((1200..1300).contains(&took), "{took} ms");
    let mut talk = fixture.client().await;
    talk.expect("RPUSH k a", ":1\r\n").await;
    assert_eq!(popper.hear().await, "*2\r\n$1\r\nk\r\n$1\r\na\r\n");
    talk.expect("XADD s 1-1 f v", "$3\r\n1-1\r\n").await;
    assert!(reader.hear().await.starts_with("*1\r\n"));
    talk.expect("XADD t 5-2 f v", "$3\r\n5-2\r\n").await;
    let want = "*1\r\n*2\r\n$1\r\nt\r\n*1\r\n*2\r\n$3\r\n5-2\r\n*2\r\n$1\r\nf\r\n$1\r\nv\r\n";
    assert_eq!(tail.hear().await, want);
    // And back, with one that comes while the shard is held.
    let route = fixture.nodes[1].route(0, 1, 2);
    let hold = pb::Hold {
        task_id: "t".to_owned(),
        target_address: String::new(),
        max_hold_ms: 5_000,
    };
    fixture.controller.change(pb::ShardRoute {
        hold: Some(hold),
        ..route
    });
    fixture
        .controller
        .wait_level("s0", pb::HoldLevel::Held, 2)
        .await;
    let began = Instant::now();
    short.say("BLPOP other 0.1").await;
    assert_eq!(short.hear().await, "*-1\r\n");
    assert!(began.elapsed() < Duration::from_secs(2));
    popper.say("BLPOP k 0").await;
    switch(&fixture, 1, 0, 2).await;
    talk.expect("RPUSH k b", ":1\r\n").await;
    assert_eq!(popper.hear().await, "*2\r\n$1\r\nk\r\n$1\r\nb\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_leaves_a_pop_unknown_and_reads_again() {
    let fixture = fixture(1).await;
    let node = &fixture.nodes[0];
    let (mut popper, mut reader) = (fixture.client().await, fixture.client().await);
    popper.say("BLPOP k 0").await;
    reader.say("XREAD BLOCK 0 STREAMS s 0").await;
    wait_blocked(node, 2).await;
    node.admin(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    let reply = popper.hear().await;
    assert!(
        reply.contains("outcome of this command is unknown"),
        "{reply}"
    );
    wait_blocked(node, 1).await;
    let mut talk = fixture.client().await;
    talk.expect("XADD s 1-1 f v", "$3\r\n1-1\r\n").await;
    assert!(reader.hear().await.starts_with("*1\r\n"));
    popper.expect("PING", "+PONG\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_unblock_ends_a_wait_as_it_is_told() {
    let fixture = fixture(1).await;
    let (mut waits, mut other) = (fixture.client().await, fixture.client().await);
    let id = waits.ask("CLIENT ID").await;
    let id = id.trim().trim_start_matches(':').to_owned();
    other
        .expect(&format!("CLIENT UNBLOCK {id}"), ":0\r\n")
        .await;
    for (how, want) in [
        ("", "*-1\r\n"),
        (" TIMEOUT", "*-1\r\n"),
        (
            " ERROR",
            "-UNBLOCKED client unblocked via CLIENT UNBLOCK\r\n",
        ),
    ] {
        waits.say("BLPOP k 0").await;
        wait_blocked(&fixture.nodes[0], 1).await;
        other
            .expect(&format!("CLIENT UNBLOCK {id}{how}"), ":1\r\n")
            .await;
        assert_eq!(waits.hear().await, want);
        other
            .expect(&format!("CLIENT UNBLOCK {id}{how}"), ":0\r\n")
            .await;
    }
    waits.say("BLPOP k 0").await;
    wait_blocked(&fixture.nodes[0], 1).await;
    other.expect("RPUSH k v", ":1\r\n").await;
    assert_eq!(waits.hear().await, "*2\r\n$1\r\nk\r\n$1\r\nv\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_over_a_switchover_counts_as_touched() {
    let fixture = fixture(1).await;
    fixture.nodes[1].replicate(&fixture.nodes[0]);
    let mut talk = fixture.client().await;
    talk.expect("SET k 1", "+OK\r\n").await;
    talk.expect("WATCH k", "+OK\r\n").await;
    switch(&fixture, 0, 1, 1).await;
    talk.expect("GET k", "$1\r\n1\r\n").await;
    talk.expect("MULTI", "+OK\r\n").await;
    talk.expect("SET k 2", "+QUEUED\r\n").await;
    talk.expect("EXEC", "*-1\r\n").await;
    talk.expect("WATCH k", "+OK\r\n").await;
    talk.expect("MULTI", "+OK\r\n").await;
    talk.expect("INCR k", "+QUEUED\r\n").await;
    talk.expect("EXEC", "*1\r\n:2\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_primary_that_does_not_let_go_is_left_after_a_second() {
    let fixture = fixture(1).await;
    fixture.nodes[1].replicate(&fixture.nodes[0]);
    let (mut popper, mut reader) = (fixture.client().await, fixture.client().await);
    popper.say("BLPOP k 0").await;
    reader.say("XREAD BLOCK 0 STREAMS s 0").await;
    wait_blocked(&fixture.nodes[0], 2).await;
    fixture.nodes[1].admin(&["REPLICAOF", "NO", "ONE"]);
    fixture.nodes[1].grant(2);
    fixture.controller.change(fixture.nodes[1].route(0, 1, 2));
    let reply = popper.hear().await;
    assert!(
        reply.contains("outcome of this command is unknown"),
        "{reply}"
    );
    wait_blocked(&fixture.nodes[1], 1).await; // the reader, which may read twice
    wait_blocked(&fixture.nodes[0], 0).await;
}

/// Clients of different databases that wait, watch and die at random, over few lines.
#[tokio::test(flavor = "multi_thread")]
async fn lines_that_clients_share_one_after_the_other_leak_nothing() {
    let fixture = Arc::new(fixture(1).await);
    let mut tasks = tokio::task::JoinSet::new();
    for id in 0..24_u64 {
        let fixture = Arc::clone(&fixture);
        tasks.spawn(async move {
            let (db, mut seed) = (id % 12, id * 7919 + 1);
            let mut value = 0;
            for _ in 0..12 {
                let mut talk = fixture.client().await;
                talk.expect(&format!("SELECT {db}"), "+OK\r\n").await;
                for _ in 0..8 {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    value += 1;
                    act(&mut talk, id, value, seed >> 33).await;
                }
                if seed & 1 << 40 == 0 {
                    talk.say(&format!("BLPOP never{id} 0")).await; // and dies
                } else {
                    talk.expect(&format!("WATCH q{id}"), "+OK\r\n").await;
                }
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    let node = &fixture.nodes[0];
    wait_blocked(node, 0).await;
    let mut talk = fixture.client().await;
    for db in 0..12 {
        talk.expect(&format!("SELECT {db}"), "+OK\r\n").await;
        talk.expect("DBSIZE", ":0\r\n").await;
    }
}

async fn act(talk: &mut Talk, id: u64, value: u64, choice: u64) {
    let key = format!("q{id}");
    let bulk = |text: &str| format!("${}\r\n{text}\r\n", text.len());
    let text = value.to_string();
    match choice % 4 {
        0 => {
            talk.expect(&format!("RPUSH {key} {text}"), ":1\r\n").await;
            let want = format!("*2\r\n{}{}", bulk(&key), bulk(&text));
            talk.expect(&format!("BLPOP {key} 0"), &want).await;
        }
        1 => talk.expect(&format!("BLPOP {key} 0.01"), "*-1\r\n").await,
        2 => {
            talk.expect(&format!("WATCH {key}"), "+OK\r\n").await;
            talk.expect("MULTI", "+OK\r\n").await;
            talk.expect(&format!("RPUSH {key} {text}"), "+QUEUED\r\n")
                .await;
            talk.expect(&format!("BLPOP {key} 0"), "+QUEUED\r\n").await;
            let popped = format!("*2\r\n{}{}", bulk(&key), bulk(&text));
            talk.expect("EXEC", &format!("*2\r\n:1\r\n{popped}")).await;
        }
        _ => {
            talk.expect(&format!("WATCH {key}"), "+OK\r\n").await;
            talk.expect(&format!("SET {key} {text}"), "+OK\r\n").await;
            talk.expect(&format!("DEL {key}"), ":1\r\n").await;
            talk.expect("MULTI", "+OK\r\n").await;
            talk.expect("EXEC", "*-1\r\n").await;
        }
    }
}
