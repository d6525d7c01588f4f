//! Commands over several shards, compared with one engine that has all the keys: the same bytes, but
//! for the order of a set's members.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

#[path = "computed/dice.rs"]
mod dice;
#[path = "computed/pair.rs"]
mod pair;
mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use dice::{KEYS, dice, fill_hyperloglog, pipelined, set_case, sorted_case};
use pair::{Connection, World, assert_same, shown, words, world, world_with};
use rand::Rng as _;
use slotmesh_resp::Value;

#[tokio::test(flavor = "multi_thread")]
async fn set_operations_are_those_of_one_engine() {
    world()
        .await
        .run(|world| {
            let mut dice = dice(1);
            for protocol in ["2", "3"] {
                let mut pair = world.pair(protocol);
                for case in 0..700 {
                    if case % 20 == 0 {
                        dice.refill(&mut pair, &["set"]);
                    }
                    set_case(&mut dice, &mut pair);
                }
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sorted_set_operations_are_those_of_one_engine() {
    world()
        .await
        .run(|world| {
            let mut dice = dice(2);
            for protocol in ["2", "3"] {
                let mut pair = world.pair(protocol);
                for case in 0..1000 {
                    if case % 20 == 0 {
                        dice.refill(&mut pair, &["zset", "zset", "set"]);
                    }
                    sorted_case(&mut dice, &mut pair);
                }
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn common_subsequences_are_those_of_one_engine() {
    world()
        .await
        .run(|world| {
            let mut dice = dice(3);
            for protocol in ["2", "3"] {
                let mut pair = world.pair(protocol);
                pair.both("SADD k0 a");
                for _ in 0..300 {
                    let (a, b) = (dice.key(), dice.key());
                    for key in [&a, &b] {
                        let letters = dice.pick(&["ab", "abcd", "abcdefghijklmnopqrstuvwxyz"]);
                        let length = dice.0.random_range(0..60);
                        let text: String = (0..length).map(|_| dice.pick_char(letters)).collect();
                        if key != "k0" && text.is_empty() {
                            pair.both(&format!("DEL {key}"));
                        } else if key != "k0" {
                            pair.both(&format!("SET {key} {text}"));
                        }
                    }
                    let tail = dice.pick(&[
                        "",
                        " LEN",
                        " IDX",
                        " IDX WITHMATCHLEN",
                        " IDX MINMATCHLEN 2",
                        " idx minmatchlen 3 withmatchlen",
                        " IDX MINMATCHLEN -1",
                        " LEN IDX",
                        " FOO",
                        " MINMATCHLEN",
                        " MINMATCHLEN x",
                        " LEN MINMATCHLEN 2",
                        " WITHMATCHLEN",
                    ]);
                    pair.same(&format!("LCS {a} {b}{tail}"));
                }
                // More cells than an engine allocates by default.
                let text = "x".repeat(20_000);
                pair.both(&format!("MSET big {text} big2 {text} big3 {text}"));
                for other in ["big2", "big3"] {
                    pair.same(&format!("LCS big {other}"));
                }
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hyperloglogs_are_those_of_one_engine() {
    world()
        .await
        .run(|world| {
            let mut dice = dice(4);
            let mut pair = world.pair("2");
            for case in 0..400 {
                if case % 20 == 0 {
                    pair.flush();
                    for number in 0..KEYS {
                        fill_hyperloglog(&mut dice, &mut pair, number);
                    }
                }
                let keys = dice.keys().join(" ");
                if dice.one_in(2) {
                    pair.same(&format!("PFCOUNT {keys}"));
                } else {
                    let to = dice.key();
                    let merged = pair.same(&format!("PFMERGE {to} {keys}"));
                    if merged == b"+OK\r\n" {
                        pair.same_key(&to); // the same bytes
                    }
                }
            }
            pair.same("DBSIZE"); // no key of ours is left
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_renamed_and_copied_as_in_one_engine() {
    world()
        .await
        .run(|world| {
            let mut dice = dice(5);
            let mut pair = world.pair("2");
            for case in 0..500 {
                if case % 25 == 0 {
                    dice.refill(&mut pair, &["set", "zset", "string", "hash", "nothing"]);
                }
                let (from, to) = (dice.key(), dice.key());
                match dice.0.random_range(0..3) {
                    0 => drop(pair.same(&format!("RENAME {from} {to}"))),
                    1 => drop(pair.same(&format!("RENAMENX {from} {to}"))),
                    _ => {
                        let tail = dice.pick(&[
                            "",
                            " REPLACE",
                            " DB 3",
                            " DB 3 REPLACE",
                            " replace db 0",
                            " DB 256",
                            " DB -1",
                            " DB x",
                            " DB",
                            " FOO",
                            " REPLACE FOO",
                            " DB 99999999999",
                        ]);
                        pair.same(&format!("COPY {from} {to}{tail}"));
                        if tail.contains("DB 3") {
                            pair.same("SELECT 3");
                            pair.same_key(&to);
                            pair.same("SELECT 0");
                        }
                    }
                }
                pair.same_key(&from);
                pair.same_key(&to);
                pair.same("DBSIZE");
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn databases_are_those_of_one_engine() {
    world()
        .await
        .run(|world| {
            let mut pair = world.pair("2");
            for number in 0..20 {
                pair.both(&format!("SET k{number} {number}"));
            }
            for number in 0..10 {
                pair.same(&format!("MOVE k{number} 5"));
                pair.same(&format!("COPY k1{number} k1{number} DB 7"));
            }
            for line in [
                "MOVE k0 5",
                "MOVE k11 0",
                "MOVE k11 256",
                "MOVE k11 x",
                "COPY k11 k11",
            ] {
                pair.same(line);
            }
            for line in [
                "DBSIZE",
                "SWAPDB 0 5",
                "DBSIZE",
                "GET k3",
                "GET k11",
                "EXISTS k0 k1 k2",
            ] {
                pair.same(line);
            }
            for line in [
                "SELECT 7", "DBSIZE", "FLUSHDB", "DBSIZE", "SELECT 5", "DBSIZE",
            ] {
                pair.same(line);
            }
            for line in ["SWAPDB 0 256", "SWAPDB x 1", "SELECT 256", "SUNION k11 k12"] {
                pair.same(line);
            }
            pair.same("RENAME k11 k13");
            pair.same("COPY k13 k14 DB 0");
            pair.same("GET k13");
            pair.same("SELECT 0");
            pair.same("GET k14");
            pair.same("DBSIZE");
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_keeps_its_order_around_them() {
    let test = |world: &World| {
        let mut dice = dice(6);
        let mut pair = world.pair("2");
        for _ in 0..60 {
            let lines: Vec<String> = (0..40).map(|_| pipelined(&mut dice)).collect();
            for line in &lines {
                pair.engine.send(&words(line));
                pair.proxy.send(&words(line));
            }
            for line in &lines {
                let (want, got) = (pair.engine.reply(), pair.proxy.reply());
                assert_same(&words(line), &want, &got);
            }
        }
    };
    world().await.run(test).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_node_refuses_with_the_engines_words_and_nothing_is_stored() {
    world()
        .await
        .run(|world| {
            let mut pair = world.pair("2");
            for line in [
                "SADD k1 a",
                "SADD k2 b",
                "ZADD k3 1 a",
                "PFADD k4 a",
                "PFADD k5 b",
            ] {
                pair.both(line);
            }
            for node in world.nodes.iter().chain([&world.engine]) {
                assert_eq!(node.admin(&["CONFIG", "SET", "maxmemory", "1"]), "+OK\r\n");
            }
            for to in ["d1", "d2", "d3"] {
                for line in [
                    "SUNIONSTORE d k1 k2",
                    "ZUNIONSTORE d 2 k1 k3",
                    "PFMERGE d k4 k5",
                ] {
                    let reply = pair.same(&line.replace(" d", &format!(" {to}")));
                    assert!(reply.starts_with(b"-OOM "), "{}", shown(&reply));
                }
                pair.same(&format!("COPY k1 {to}"));
                pair.same(&format!("EXISTS {to}"));
            }
            pair.same("DBSIZE");
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_increment_is_lost_while_its_key_is_renamed() {
    world()
        .await
        .run(|world| {
            let done = AtomicBool::new(false);
            let sum = std::thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let mut connection = Connection::open(world.proxy.address);
                    let mut count = 0;
                    while !done.load(Ordering::Relaxed) {
                        assert_eq!(connection.call(&words("INCR counter"))[0], b':');
                        count += 1;
                        for _ in 0..10 {
                            connection.call(&words("GET other"));
                        }
                    }
                    count
                });
                let mut connection = Connection::open(world.proxy.address);
                let number = |connection: &mut Connection, key: &str| {
                    let reply = connection.call(&words(&format!("GETDEL {key}")));
                    Value::decode(&reply)
                        .unwrap()
                        .unwrap()
                        .0
                        .as_int()
                        .unwrap_or(0)
                };
                let (mut sum, mut moved) = (0, 0);
                while moved < 200 {
                    let key = format!("k{moved}");
                    let reply = connection.call(&words(&format!("RENAME counter {key}")));
                    match shown(&reply).as_str() {
                        "+OK\r\n" => {
                            sum += number(&mut connection, &key);
                            moved += 1;
                        }
                        "-ERR no such key\r\n" => {}
                        error => {
                            assert!(error.contains("kept changing") || error.contains("try again"));
                            number(&mut connection, &key);
                        }
                    }
                }
                done.store(true, Ordering::Relaxed);
                let count: i64 = writer.join().unwrap();
                (sum + number(&mut connection, "counter"), count)
            });
            assert_eq!(sum.0, sum.1);
        })
        .await;
}

/// Its node moves a part of it to a larger table with each read, which changes the order of its
/// members, and with it the dumped bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_key_is_renamed_while_it_is_read() {
    let test = |world: &World| {
        for (kind, read) in [
            ("HSET", "HGET counter f1"),
            ("SADD", "SISMEMBER counter f1"),
        ] {
            let mut connection = Connection::open(world.proxy.address);
            let mut fill = words(&format!("{kind} counter"));
            for number in 0..66_000 {
                fill.push(format!("f{number}").into_bytes());
                if kind == "HSET" {
                    fill.push(b"value".to_vec());
                }
            }
            assert_eq!(shown(&connection.call(&fill)), ":66000\r\n");
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut connection = Connection::open(world.proxy.address);
                    while !done.load(Ordering::Relaxed) {
                        connection.call(&words(read));
                    }
                });
                let reply = connection.call(&words("RENAME counter k1"));
                done.store(true, Ordering::Relaxed);
                assert_eq!(shown(&reply), "+OK\r\n");
            });
            assert_eq!(connection.call(&words("DBSIZE")), b":1\r\n");
            connection.call(&words("DEL k1"));
        }
    };
    world().await.run(test).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_operands_pass() {
    world()
        .await
        .run(|world| {
            let mut pair = world.pair("2");
            for (key, from) in [("k1", 0), ("k2", 50_000), ("k3", 75_000)] {
                for first in (from..from + 100_000).step_by(10_000) {
                    let list: Vec<String> =
                        (first..first + 10_000).map(|n| format!("m{n}")).collect();
                    pair.both(&format!("SADD {key} {}", list.join(" ")));
                }
            }
            pair.same("SINTERCARD 3 k1 k2 k3");
            pair.same("SUNIONSTORE d k1 k2 k3");
            pair.same_key("d");
            pair.same("ZINTERSTORE d 3 k1 k2 k3 WEIGHTS 1 2 0.3");
            pair.same_key("d");
            pair.same("RENAME d k4");
            pair.same_key("k4");
            let text = "x".repeat(20_000_000);
            pair.both(&format!("SET big {text}"));
            for to in ["b1", "b2", "b3"] {
                pair.same(&format!("COPY big {to}"));
                pair.same(&format!("GET {to}"));
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zero_keeps_its_sign_where_one_engine_keeps_it() {
    let test = |world: &pair::World| {
        let mut pair = world.pair("2");
        let long = "m".repeat(100);
        // Small ones, one with a long member, and one with many members: engines keep these two alike.
        for (count, more) in [(3, ""), (3, long.as_str()), (300, "")] {
            let zeros: Vec<String> = (0..count).map(|n| format!("0 m{n}")).collect();
            pair.both(&format!("ZADD k1 {} 5 x{more}", zeros.join(" ")));
            pair.both("ZADD k2 7 y");
            pair.same("ZUNION 2 k1 k2 WEIGHTS -1 1 WITHSCORES");
            pair.same("ZUNIONSTORE d 2 k1 k2 WEIGHTS -1 1");
            pair.same_key("d");
            pair.same("ZUNIONSTORE d 2 k1 k2 WEIGHTS -0 -0");
            pair.same_key("d");
            pair.flush();
        }
    };
    world().await.run(test).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_are_split_by_slot_if_the_instance_says_so() {
    world_with(&[("split", "slot")])
        .await
        .run(|world| {
            let mut pair = world.pair("2");
            let keys = "k1 {a}1 {b}1 {a}2 k2 {c}1 {b}2 {a}1 k1 none";
            pair.same(&format!("MSET {}", keys.replace(' ', " x ") + " y"));
            pair.same(&format!("MGET {keys}"));
            for name in ["EXISTS", "TOUCH", "UNLINK", "DEL"] {
                pair.same(&format!("{name} {keys}"));
            }
            // Six slots, however many of them are on one shard.
            assert_eq!(world.calls("mget"), 6);
            assert_eq!(world.calls("mset"), 6);
            assert_eq!(world.calls("exists"), 6);
        })
        .await;
    world()
        .await
        .run(|world| {
            let mut pair = world.pair("2");
            pair.same("MGET k1 {a}1 {b}1 {a}2 k2 {c}1 {b}2 {a}1 k1 none");
            assert!(world.calls("mget") <= 3);
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_in_several_rounds_waits_until_its_shards_take_writes_again() {
    let test = |world: &World| {
        let mut pair = world.pair("2");
        let lines = [
            ("RENAME k1 r1", "+OK\r\n"),
            ("SUNIONSTORE d k2 k3", ":2\r\n"),
            ("ZINTERSTORE e 2 k4 k5", ":1\r\n"),
            ("PFMERGE h1 h2 h3", "+OK\r\n"),
            ("SMOVE k2 k3 a", ":1\r\n"),
            ("COPY k4 c", ":1\r\n"),
        ];
        for line in [
            "SET k1 v",
            "SADD k2 a",
            "SADD k3 b",
            "ZADD k4 1 a",
            "ZADD k5 2 a",
        ] {
            pair.both(line);
        }
        for line in ["PFADD h2 a b", "PFADD h3 c d"] {
            pair.both(line);
        }
        world.nodes.iter().for_each(|node| node.fence(1));
        let mut waiting: Vec<(Connection, &str)> = Vec::new();
        for (line, want) in lines {
            let mut connection = Connection::open(world.proxy.address);
            connection.send(&words(line));
            assert!(connection.is_silent(), "{line}");
            waiting.push((connection, want));
        }
        world.nodes.iter().for_each(|node| node.grant(1));
        for (mut connection, want) in waiting {
            assert_eq!(shown(&connection.reply()), want);
        }
        for (line, want) in lines {
            assert_eq!(shown(&pair.engine.call(&words(line))), want);
        }
        for key in ["k1", "r1", "k2", "k3", "d", "e", "h1", "c"] {
            pair.same_key(key);
        }
        pair.same("DBSIZE");
    };
    world().await.run(test).await;
}
