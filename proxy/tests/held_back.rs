//! While an upgrade of the engine is under way, a client cannot tell by its commands which of the two
//! engines serves it: the newer one's are answered as the older one has answered them.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use slotmesh_command::{Class, Command, Product, Release};
use slotmesh_proto::topology::v1 as pb;
use support::Proxy;
use support::controller::Controller;
use support::node::{Node, engine, snapshot};
use support::talk::Talk;

/// A shard of one engine, then of a newer one that has followed it.
struct Upgrade {
    old: Node,
    new: Node,
    controller: Controller,
    proxy: Proxy,
    _directory: tempfile::TempDir,
}

impl Upgrade {
    /// Before it: the old engine serves, at epoch 1. `None`: the engines have not been fetched.
    async fn begin(from: &str, to: &str) -> Option<Self> {
        let old = Node::start_engine(&engine(from)?, &[]);
        let new = Node::start_engine(&engine(to)?, &[]);
        old.grant(1);
        new.replicate(&old);
        let directory = tempfile::tempdir().unwrap();
        let (controller, address) = Controller::start(snapshot(1, vec![old.route(0, 1, 1)])).await;
        let arguments = ["--controller", &address.to_string(), "--workers", "1"];
        let proxy = Proxy::start(directory.path(), &arguments).await;
        controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
        Some(Self {
            old,
            new,
            controller,
            proxy,
            _directory: directory,
        })
    }

    /// The new one serves, at epoch 2, and what the old one does not know is held back.
    async fn switch(&self, held_back: &str) {
        self.controller.hold_back(held_back);
        self.new.wait_offset(&self.old);
        assert_eq!(self.new.admin(&["REPLICAOF", "NO", "ONE"]), "+OK\r\n");
        self.new.grant(2);
        self.controller.change(self.new.route(0, 1, 2));
        let applied = self.controller.wait_level("s0", pb::HoldLevel::Applied, 2);
        applied.await;
    }

    async fn client(&self) -> Talk {
        Talk::connect(self.proxy.address).await
    }

    /// The answer to each call, each by a client of its own: some change what their client may do.
    async fn answers(&self, calls: &[String]) -> Vec<String> {
        let mut answers = Vec::new();
        for call in calls {
            answers.push(self.client().await.ask(call).await);
        }
        answers
    }
}

/// A call of each command that only the newer of two engines has, with as many words as it takes.
fn newer_calls(old: Release, new: Release) -> Vec<String> {
    // Those of channels a proxy asks nodes in its own words, which are in what these answer.
    let reaches_a_node =
        |c: &&Command| !matches!(c.class, Class::Proxy | Class::Refused(_) | Class::PubSub);
    let is_newer = |c: &&Command| !c.is_known_to(old) && c.is_known_to(new);
    let commands = slotmesh_command::all().filter(reaches_a_node);
    let calls = commands.filter(is_newer).map(|command| {
        // As the proxy writes what it asks nodes itself.
        let name = command.name.to_ascii_uppercase();
        let words: Vec<&str> = name.split('|').collect();
        // One more where it takes more: without an argument some are the proxy's to answer.
        let taken = command.arity.unsigned_abs() as usize + usize::from(command.arity < 0);
        // A name alone is a container of subcommands.
        let fill = (words.len()..taken).map(|_| "1");
        [&words[..], &fill.collect::<Vec<_>>()].concat().join(" ")
    });
    calls.collect()
}

/// Besides the commands that are newer: calls of older ones with newer `options`.
async fn nobody_can_tell(from: (&str, &str, Release), to: (&str, Release), options: &[&str]) {
    let (old, version, known) = from;
    let Some(upgrade) = Upgrade::begin(old, to.0).await else {
        return;
    };
    let newer = newer_calls(known, to.1);
    assert!(!newer.is_empty(), "{known:?}");
    for data in ["SET b x", "XADD s 1-1 f v", "HSET h f 1", "ZADD z 1 m"] {
        let answer = upgrade.client().await.ask(data).await;
        assert!(!answer.starts_with('-'), "{answer}");
    }
    let mut calls = newer.clone();
    calls.extend(options.iter().map(ToString::to_string));
    let before = upgrade.answers(&calls).await;
    upgrade.switch(version).await;
    upgrade.old.replicate(&upgrade.new);
    let bake = upgrade.answers(&calls).await;
    for ((call, before), bake) in calls.iter().zip(before).zip(bake) {
        assert_eq!(bake, before, "{call}");
    }
    let mut talk = upgrade.client().await;
    talk.expect("SET a 1", "+OK\r\n").await;
    talk.expect("WAIT 1 5000", ":1\r\n").await;
    // So it could take over: it has all, and has refused nothing.
    upgrade.old.wait_offset(&upgrade.new);
    let stats = upgrade.old.admin(&["INFO", "stats"]);
    assert!(stats.contains("unexpected_error_replies:0\r"), "{stats}");
    // Finalized: what the new engine knows, clients may use.
    upgrade.controller.hold_back("");
    let ends = async {
        while upgrade
            .client()
            .await
            .ask(&newer[0])
            .await
            .contains("unknown")
        {
            tokio::task::yield_now().await;
        }
    };
    let ended = tokio::time::timeout(support::LIMIT, ends).await;
    ended.expect("waited for nothing to be held back");
    for call in &newer {
        let answer = upgrade.client().await.ask(call).await;
        let is_unknown = answer.starts_with("-ERR unknown command");
        assert!(!is_unknown, "{call}: {answer}");
    }
}

fn redis(major: u32, minor: u32) -> Release {
    Release::new(Product::Redis, major, minor, 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_can_tell_redis_8_2_from_the_7_0_that_may_have_to_serve_again() {
    let from = ("redis-7.0", "redis-7.0.15", redis(7, 0));
    let options = [
        "ZRANK z m WITHSCORE",
        "HSCAN h 0 NOVALUES",
        "BITOP DIFF b b b",
        "XTRIM s MAXLEN 5 DELREF",
        "XADD s KEEPREF MAXLEN 5 * f v",
    ];
    nobody_can_tell(from, ("redis-8.2", redis(8, 2)), &options).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_can_tell_redis_7_0_from_the_6_2_that_may_have_to_serve_again() {
    let from = ("redis-6.2", "redis-6.2.14", redis(6, 2));
    let options = [
        "SPUBLISH c m",
        "EXPIRE b 9000 NX",
        "pexpireat b 99999999999999 XX",
        "XSETID s 9-9 ENTRIESADDED 9 MAXDELETEDID 0-1",
        "XGROUP CREATE s g 0 ENTRIESREAD 1",
        "BITCOUNT b 0 -1 BIT",
        "BITPOS b 1 0 -1 BIT",
    ];
    nobody_can_tell(from, ("redis-7.0", redis(7, 0)), &options).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_can_tell_valkey_8_0_from_the_redis_7_0_that_may_have_to_serve_again() {
    let from = ("redis-7.0", "redis-7.0.15", redis(7, 0));
    let to = Release::new(Product::Valkey, 8, 0, 0);
    let options = [
        "ZREVRANK z m WITHSCORE",
        "HSCAN h 0 NOVALUES",
        "ZSCAN z 0 COUNT 5 NOSCORES",
    ];
    nobody_can_tell(from, ("valkey-8.0", to), &options).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_with_a_newer_command_is_aborted_and_a_scripts_call_is_not_seen() {
    let Some(upgrade) = Upgrade::begin("redis-7.0", "redis-8.2").await else {
        return;
    };
    upgrade.switch("redis-7.0.15").await;
    let mut talk = upgrade.client().await;
    talk.expect("HSET h f 1", ":1\r\n").await;
    talk.expect("MULTI", "+OK\r\n").await;
    talk.expect("HSET h f 2", "+QUEUED\r\n").await;
    let refused = talk.ask("HPEXPIRE h 9000 FIELDS 1 f").await;
    assert!(
        refused.starts_with("-ERR unknown command 'HPEXPIRE'"),
        "{refused}"
    );
    let aborted = "-EXECABORT Transaction discarded because of previous errors.\r\n";
    talk.expect("EXEC", aborted).await;
    talk.expect("HGET h f", "$1\r\n1\r\n").await;
    let script = "return redis.call('HPEXPIRE', KEYS[1], 9000, 'FIELDS', 1, 'f')";
    let mut other = upgrade.client().await;
    other.tell(&["EVAL", script, "1", "h"]).await;
    assert_eq!(
        other.hear().await,
        "*1\r\n:1\r\n",
        "what docs say of scripts"
    );
}
