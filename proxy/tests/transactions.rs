//! MULTI, EXEC, DISCARD and WATCH through the proxy: the same bytes as one Redis gives, and what a
//! cluster does instead where it must.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::time::Duration;

use support::fixture::fixture;
use support::node::Node;
use support::talk::Talk;

/// Transactions of up to two clients, one a line: a command that begins with `2:` is the second one's.
const SCRIPTS: &str = "
MULTI | SET a 1 | GET a | INCR a | EXEC | GET a
MULTI | EXEC | EXEC | DISCARD | UNWATCH
MULTI | SET a 1 | DISCARD | GET a | EXEC | MULTI | DISCARD
MULTI | MULTI | SET a 1 | EXEC | GET a
MULTI | WATCH a | SET a 1 | EXEC
MULTI | WATCH | SET a 1 | EXEC
MULTI | MULTI x | SET a 1 | EXEC | GET a
MULTI | SET a 1 | EXEC x | EXEC | GET a
MULTI | DISCARD x | DISCARD | EXEC
MULTI | SET a | SET a 1 | EXEC | GET a
MULTI | SET a 1 | NOSUCH b c | EXEC | GET a
MULTI | CONFIG NOSUCH | EXEC | MULTI | OBJECT NOSUCH | EXEC
MULTI | SAVE | SET a 1 | EXEC | MULTI | SHUTDOWN | DISCARD
SET a x | MULTI | INCR a | LPUSH a b | SET a 2 | EXEC | GET a
MULTI | HSET h f v g w | HGETALL h | SADD s a | SMEMBERS s | EXEC
MULTI | ZADD z 1.5 a | ZSCORE z a | ZRANGE z 0 -1 WITHSCORES | EXEC
MULTI | SELECT 3 | SET a three | EXEC | GET a | SELECT 0 | GET a
SET a 0 | MULTI | SELECT 9 | SET a 9 | SELECT 0 | GET a | EXEC | GET a
MULTI | SELECT 999 | SELECT x | SELECT | EXEC
MULTI | SELECT 999 | SELECT x | SET a 1 | EXEC | GET a
MULTI | SELECT 5 | NOSUCH | EXEC | SET a 1 | SELECT 0 | GET a
SET a 1 | MULTI | SWAPDB 0 1 | GET a | EXEC | GET a | SELECT 1 | GET a
SET a 1 | MULTI | MOVE a 2 | COPY b c DB 3 | EXISTS a | EXEC
SET a 1 | MULTI | DBSIZE | KEYS * | FLUSHALL | DBSIZE | EXEC
SET a 1 | MULTI | FLUSHDB | GET a | SCAN 0 | RANDOMKEY | EXEC
MULTI | PING | PING hello | ECHO x | PUBLISH c m | SPUBLISH c m | EXEC
MULTI | PING a b | EXEC | PING
MULTI | BLPOP nokey 0 | BRPOP nokey 0 | BLMOVE a b LEFT LEFT 0 | EXEC
RPUSH l a b | MULTI | BLPOP l 0 | BZPOPMIN z 0 | BLMPOP 0 1 l LEFT | EXEC
MULTI | XADD s 1-1 a b | XREAD BLOCK 0 STREAMS s $ | XREAD STREAMS s 0 | EXEC
MULTI | WAIT 0 0 | BLPOP x notanumber | EXEC
MULTI | EVAL return{1,KEYS[1]} 1 a | EVAL return+redis.call('incr','n') 0 | EXEC
RPUSH l 3 1 2 | MULTI | SORT l | SORT l STORE m | LRANGE m 0 -1 | EXEC
MULTI | MSET a 1 b 2 c 3 | MGET a b c x | DEL a b | EXISTS a b c | EXEC
MULTI | CLIENT SETNAME joe | CLIENT GETNAME | SET a 1 | EXEC | CLIENT GETNAME
MULTI | CLIENT SETNAME joe | NOSUCH | EXEC | CLIENT GETNAME
MULTI | COMMAND COUNT x | SET a 1 | EXEC
MULTI | UNWATCH | SET a 1 | EXEC
MULTI | SET a 1 | RESET | EXEC | GET a
MULTI | INFO nosuchsection | EXEC
WATCH | WATCH a | MULTI | SET a 1 | EXEC | GET a
WATCH a | 2:SET a 2 | MULTI | SET a 1 | EXEC | GET a
WATCH a b c | 2:SET c 2 | MULTI | SET a 1 | EXEC | MULTI | SET a 3 | EXEC
WATCH a | WATCH b | 2:SET b 2 | MULTI | SET a 1 | EXEC | GET a
WATCH a | 2:SET a 2 | MULTI | EXEC | MULTI | EXEC
WATCH a | 2:SET a 2 | MULTI | NOSUCH | EXEC | MULTI | GET a | EXEC
WATCH a | 2:SET a 2 | UNWATCH | MULTI | SET a 1 | EXEC
WATCH a | 2:SET a 2 | MULTI | DISCARD | MULTI | SET a 1 | EXEC
WATCH a | SET a 2 | MULTI | SET a 1 | EXEC | GET a
WATCH a | 2:SET b 2 | MULTI | SET a 1 | EXEC
SET a 1 | WATCH a | 2:FLUSHALL | MULTI | PING | EXEC
WATCH a | 2:FLUSHALL | MULTI | PING | EXEC
SET a 1 | WATCH a | 2:SWAPDB 0 1 | MULTI | PING | EXEC
SELECT 5 | WATCH a | 2:SET a 1 | MULTI | PING | EXEC
SELECT 5 | WATCH a | 2:SELECT 5 | 2:SET a 1 | MULTI | PING | EXEC
WATCH a | SELECT 5 | WATCH a | 2:SET a 1 | MULTI | PING | EXEC | SET a 5
WATCH a | SELECT 5 | MULTI | SET a 5 | EXEC | GET a | SELECT 0 | GET a
WATCH a | MULTI | SELECT 7 | SET a 7 | EXEC | GET a | SELECT 0 | GET a
WATCH a | 2:SET a 1 | MULTI | SELECT 7 | SET a 7 | EXEC | GET a
WATCH a | MULTI | CLIENT SETNAME x | GET a | CLIENT GETNAME | EXEC
WATCH a | 2:SET a 1 | MULTI | CLIENT SETNAME x | EXEC | CLIENT GETNAME
WATCH a | 2:SET a 1 | RESET | MULTI | PING | EXEC
WATCH a | MULTI | SET a 1 | EXEC | 2:SET a 2 | MULTI | GET a | EXEC
SET a 1 PX 40 | WATCH a | sleep | MULTI | PING | EXEC
SET a 1 PX 40 | sleep | WATCH a | MULTI | PING | EXEC
";

fn scripts() -> impl Iterator<Item = Vec<&'static str>> {
    let lines = SCRIPTS.lines().filter(|line| !line.is_empty());
    lines.map(|line| line.split(" | ").collect())
}

/// Runs a script at one place; gives all replies.
async fn run(script: &[&str], mut clients: [Talk; 2]) -> Vec<String> {
    let mut replies = Vec::new();
    for line in script {
        let reply = match line.split_once("2:") {
            _ if *line == "sleep" => {
                tokio::time::sleep(Duration::from_millis(60)).await; // a key expires
                continue;
            }
            Some(("", line)) => clients[1].ask(line).await,
            _ => clients[0].ask(line).await,
        };
        replies.push(format!("{line} -> {reply}"));
    }
    replies
}

#[tokio::test(flavor = "multi_thread")]
async fn every_script_gives_the_bytes_of_one_redis() {
    let (fixture, redis) = (fixture(1, 1).await, Node::start());
    for resp3 in [false, true] {
        for script in scripts() {
            redis.admin(&["FLUSHALL"]);
            fixture.nodes[0].admin(&["FLUSHALL"]);
            let (mut direct, mut proxied) = (Vec::new(), Vec::new());
            for _ in 0..2 {
                direct.push(Talk::direct(&redis).await);
                proxied.push(Talk::connect(fixture.proxy.address).await);
            }
            if resp3 {
                for talk in direct.iter_mut().chain(&mut proxied) {
                    talk.resp3().await;
                }
            }
            let want = run(&script, direct.try_into().ok().unwrap()).await;
            let got = run(&script, proxied.try_into().ok().unwrap()).await;
            assert_eq!(got, want, "resp3: {resp3}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_scripts_give_the_same_bytes() {
    let (fixture, redis) = (fixture(1, 1).await, Node::start());
    for script in scripts() {
        if script
            .iter()
            .any(|line| line.starts_with("2:") || *line == "sleep")
        {
            continue;
        }
        redis.admin(&["FLUSHALL"]);
        fixture.nodes[0].admin(&["FLUSHALL"]);
        let mut direct = Talk::direct(&redis).await;
        let mut proxied = Talk::connect(fixture.proxy.address).await;
        let (mut want, mut got) = (Vec::new(), Vec::new());
        for (talk, replies) in [(&mut direct, &mut want), (&mut proxied, &mut got)] {
            for line in &script {
                talk.say(line).await;
            }
            for line in &script {
                replies.push(format!("{line} -> {}", talk.hear().await));
            }
        }
        assert_eq!(got, want);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_runs_one_block_per_shard_and_orders_the_replies() {
    let fixture = fixture(3, 1).await;
    let mut talk = Talk::connect(fixture.proxy.address).await;
    for resp3 in [false, true] {
        fixture
            .nodes
            .iter()
            .for_each(|node| drop(node.admin(&["FLUSHALL"])));
        if resp3 {
            talk.resp3().await;
        }
        talk.expect("MULTI", "+OK\r\n").await;
        for line in [
            "SET a 1",
            "SET b 2",
            "SET c 3",
            "GET a",
            "PING",
            "LPUSH a x",
            "GET c",
            "HSET h f v",
            "HGETALL h",
        ] {
            talk.expect(line, "+QUEUED\r\n").await;
        }
        let map = if resp3 { "%1" } else { "*2" };
        let wrong = "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n";
        let want = format!(
            "*9\r\n+OK\r\n+OK\r\n+OK\r\n$1\r\n1\r\n+PONG\r\n{wrong}$1\r\n3\r\n:1\r\n{map}\r\n$1\r\nf\r\n$1\r\nv\r\n"
        );
        talk.expect("EXEC", &want).await;
        talk.expect("GET b", "$1\r\n2\r\n").await;
        // SELECT reaches every shard's block, and the client stays there.
        for line in ["SET a 0", "SET b 0"] {
            talk.expect(line, "+OK\r\n").await;
        }
        talk.expect("MULTI", "+OK\r\n").await;
        for line in [
            "SET b zero",
            "SELECT 9",
            "SET a nine",
            "SET b nine",
            "CLIENT GETNAME",
        ] {
            talk.expect(line, "+QUEUED\r\n").await;
        }
        let null = if resp3 { "_" } else { "$-1" };
        let want = format!("*5\r\n+OK\r\n+OK\r\n+OK\r\n+OK\r\n{null}\r\n");
        talk.expect("EXEC", &want).await;
        talk.expect("GET a", "$4\r\nnine\r\n").await;
        talk.expect("SELECT 0", "+OK\r\n").await;
        talk.expect("MGET a b", "*2\r\n$1\r\n0\r\n$4\r\nzero\r\n")
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_spans_shards_is_refused_and_spoils_the_transaction() {
    const CROSS: &str = "-CROSSSLOT Keys in request don't hash to the same slot\r\n";
    const ABORT: &str = "-EXECABORT Transaction discarded because of previous errors.\r\n";
    let fixture = fixture(3, 1).await;
    let mut talk = Talk::connect(fixture.proxy.address).await;
    for line in [
        "MGET a b",
        "MSET a 1 b 2",
        "RENAME a b",
        "DEL a b c",
        "FLUSHALL",
        "DBSIZE",
    ] {
        talk.expect("MULTI", "+OK\r\n").await;
        talk.expect("SET a 1", "+QUEUED\r\n").await;
        talk.expect(line, CROSS).await;
        talk.expect("EXEC", ABORT).await;
        talk.expect("GET a", "$-1\r\n").await;
    }
    // All keys of a watch, and of its transaction, are of one shard.
    talk.expect("WATCH a b", CROSS).await;
    talk.expect("WATCH a", "+OK\r\n").await;
    talk.expect("WATCH b", CROSS).await;
    talk.expect("MULTI", "+OK\r\n").await;
    talk.expect("SET b 1", CROSS).await;
    talk.expect("EXEC", ABORT).await;
    talk.expect("WATCH {a}1 {a}2", "+OK\r\n").await;
    talk.expect("MULTI", "+OK\r\n").await;
    talk.expect("SET {a}3 1", "+QUEUED\r\n").await;
    talk.expect("EXEC", "*1\r\n+OK\r\n").await;
}

fn clients(node: &Node) -> usize {
    node.admin(&["CLIENT", "LIST", "TYPE", "normal"])
        .matches("id=")
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_watch_with_it() {
    let fixture = fixture(1, 1).await;
    let mut first = Talk::connect(fixture.proxy.address).await;
    first.expect("SET a 1", "+OK\r\n").await;
    let before = clients(&fixture.nodes[0]);
    first.expect("WATCH a", "+OK\r\n").await;
    assert_eq!(clients(&fixture.nodes[0]), before + 1);
    drop(first);
    support::wait_for("the line of the watch to be closed", || {
        (clients(&fixture.nodes[0]) == before).then_some(())
    })
    .await;
    // One that ends its watch leaves a clean line for the next.
    let mut second = Talk::connect(fixture.proxy.address).await;
    for n in 0..20 {
        second.expect("WATCH a", "+OK\r\n").await;
        second.expect(&format!("SET a {n}"), "+OK\r\n").await;
        second.expect("UNWATCH", "+OK\r\n").await;
        second.expect("WATCH a", "+OK\r\n").await;
        second.expect("MULTI", "+OK\r\n").await;
        second.expect("GET a", "+QUEUED\r\n").await;
        let value = n.to_string();
        let want = format!("*1\r\n${}\r\n{value}\r\n", value.len());
        second.expect("EXEC", &want).await;
    }
    // One for the watch, and one that asked whether the node is well.
    assert!(clients(&fixture.nodes[0]) <= before + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_whose_node_or_rights_are_gone_counts_as_touched() {
    let fixture = fixture(1, 1).await;
    let node = &fixture.nodes[0];
    let mut talk = Talk::connect(fixture.proxy.address).await;
    talk.expect("SET a 1", "+OK\r\n").await;
    for gone in ["fence", "kill"] {
        talk.expect("WATCH a", "+OK\r\n").await;
        talk.expect("MULTI", "+OK\r\n").await;
        talk.expect("SET a 2", "+QUEUED\r\n").await;
        if gone == "fence" {
            node.fence(1);
        } else {
            node.admin(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
            // Answered over a new connection: the proxy has seen that the old ones are gone.
            let mut other = Talk::connect(fixture.proxy.address).await;
            other.expect("GET a", "$1\r\n1\r\n").await;
        }
        talk.expect("EXEC", "*-1\r\n").await;
        node.unfence(1);
        talk.expect("GET a", "$1\r\n1\r\n").await;
    }
    talk.expect("WATCH a", "+OK\r\n").await;
    talk.expect("MULTI", "+OK\r\n").await;
    talk.expect("EXEC", "*0\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_node_queues_nothing_and_executes_what_takes_no_memory() {
    const OOM: &str = "OOM command not allowed when used memory > 'maxmemory'.\r\n";
    let fixture = fixture(1, 1).await;
    let node = &fixture.nodes[0];
    let mut talk = Talk::connect(fixture.proxy.address).await;
    let fill = |bytes: &str| {
        assert_eq!(
            node.admin(&["CONFIG", "SET", "maxmemory", bytes]),
            "+OK\r\n"
        )
    };
    // Longer than a good answer of the node holds.
    let pause = || tokio::time::sleep(Duration::from_millis(20));
    talk.expect("SET a 1", "+OK\r\n").await;
    talk.expect("MULTI", "+OK\r\n").await;
    fill("1");
    pause().await;
    talk.expect("SET a 2", &format!("-{OOM}")).await;
    fill("0");
    pause().await;
    talk.expect("SET a 3", "+QUEUED\r\n").await;
    let aborted = "-EXECABORT Transaction discarded because of";
    talk.expect(
        "EXEC",
        "-EXECABORT Transaction discarded because of previous errors.\r\n",
    )
    .await;
    for (line, want) in [
        ("SET a 4", format!("{aborted}: {OOM}")),
        ("PING", "*3\r\n$1\r\n1\r\n$-1\r\n+PONG\r\n".to_owned()),
    ] {
        talk.expect("MULTI", "+OK\r\n").await;
        for line in ["GET a", "GET nothing", line] {
            talk.expect(line, "+QUEUED\r\n").await;
        }
        fill("1");
        pause().await;
        talk.expect("EXEC", &want).await;
        fill("0");
        pause().await;
    }
    talk.expect("GET a", "$1\r\n1\r\n").await;
}
