//! Scripts and functions through the proxy.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use support::Proxy;
use support::controller::Controller;
use support::fixture::fixture;
use support::node::{Node, snapshot};
use support::talk::Talk;

/// Without a blank, as words are separated by blanks.
const SCRIPT: &str = "return{KEYS[1],'one'}";
const SHA: &str = "0000000000000000000000000000000000000000";

fn sha() -> String {
    sha1_smol::Sha1::from(SCRIPT).digest().to_string()
}

fn pair(key: &str) -> String {
    format!("*2\r\n${}\r\n{key}\r\n$3\r\none\r\n", key.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_a_node_lost_runs_by_its_digest_all_the_same() {
    let fixture = fixture(3, 2).await;
    let sha = sha();
    let mut talk = Talk::connect(fixture.proxy.address).await;
    let missing = "-NOSCRIPT No matching script. Please use EVAL.\r\n";
    talk.expect(&format!("EVALSHA {sha} 1 k"), missing).await;
    talk.expect(&format!("EVAL {SCRIPT} 1 k"), &pair("k")).await;
    for protocol in [2, 3] {
        let mut talk = Talk::connect(fixture.proxy.address).await;
        talk.ask(&format!("HELLO {protocol}")).await;
        for n in 0..20 {
            let key = format!("key:{n}");
            // Most of these are on shards that have not seen the script.
            talk.expect(&format!("EVALSHA {sha} 1 {key}"), &pair(&key))
                .await;
        }
    }
    // In a transaction, in any case of letters.
    talk.expect("MULTI", "+OK\r\n").await;
    let call = format!("EvalSha {} 1 zz", sha.to_uppercase());
    talk.expect(&call, "+QUEUED\r\n").await;
    talk.expect("EXEC", &format!("*1\r\n{}", pair("zz"))).await;
    // What SCRIPT FLUSH took is gone, at every worker.
    talk.expect("SCRIPT FLUSH", "+OK\r\n").await;
    for _ in 0..4 {
        let mut talk = Talk::connect(fixture.proxy.address).await;
        talk.expect(&format!("EVALSHA {sha} 1 k"), missing).await;
    }
    talk.expect(
        &format!("SCRIPT LOAD {SCRIPT}"),
        &format!("$40\r\n{sha}\r\n"),
    )
    .await;
    talk.expect(&format!("SCRIPT EXISTS {sha} {SHA}"), "*2\r\n:1\r\n:0\r\n")
        .await;
    for node in &fixture.nodes {
        assert_eq!(node.admin(&["SCRIPT", "EXISTS", &sha]), "*1\r\n:1\r\n");
        node.admin(&["SCRIPT", "FLUSH"]); // as if it had been restarted
    }
    talk.ask(&format!("EVALSHA {sha} 1 k")).await; // finds out
    talk.expect(&format!("EVALSHA {sha} 1 k"), &pair("k")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_primary_gets_the_scripts_that_are_called() {
    let (a, b) = (Node::start_with_epoch(1), Node::start_with_epoch(2));
    let (controller, address) = Controller::start(snapshot(1, vec![a.route(0, 1, 1)])).await;
    let data = tempfile::tempdir().unwrap();
    let address = address.to_string();
    let proxy = Proxy::start(data.path(), &["--workers", "1", "--controller", &address]).await;
    let mut talk = Talk::connect(proxy.address).await;
    let sha = sha();
    loop {
        let reply = talk.ask(&format!("EVAL {SCRIPT} 1 k")).await;
        if reply == pair("k") {
            break;
        }
        assert!(
            reply.starts_with("-LOADING") || reply.starts_with("-CLUSTERDOWN"),
            "{reply}"
        );
    }
    talk.expect(&format!("EVALSHA {sha} 1 k"), &pair("k")).await;
    // Refused by the old primary, held, and sent to the new one.
    a.fence(1);
    talk.say(&format!("EVALSHA {sha} 1 k")).await;
    controller.change(b.route(0, 1, 2));
    assert_eq!(talk.hear().await, pair("k"));
    assert_eq!(b.admin(&["SCRIPT", "EXISTS", &sha]), "*1\r\n:1\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_need_their_keys_in_one_shard_and_errors_are_the_engines() {
    let fixture = fixture(3, 2).await;
    let mut talk = Talk::connect(fixture.proxy.address).await;
    talk.expect(
        "EVAL return(1) 2 a b",
        "-CROSSSLOT Keys in request don't hash to the same slot\r\n",
    )
    .await;
    talk.expect("EVAL return(1) 2 {a}1 {a}2", ":1\r\n").await;
    talk.expect("EVAL return(1) 0", ":1\r\n").await;
    talk.expect(
        "EVAL return(1) -1",
        "-ERR Number of keys can't be negative\r\n",
    )
    .await;
    talk.expect(
        "EVAL return(1) 3 a",
        "-ERR Number of keys can't be greater than number of args\r\n",
    )
    .await;
    talk.expect(
        "SCRIPT KILL",
        "-NOTBUSY No scripts in execution right now.\r\n",
    )
    .await;
    talk.expect(
        "FUNCTION KILL",
        "-NOTBUSY No scripts in execution right now.\r\n",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_script_selects_stays_its_own() {
    let fixture = fixture(2, 2).await;
    let mut talk = Talk::connect(fixture.proxy.address).await;
    let mut other = Talk::connect(fixture.proxy.address).await;
    talk.expect("SELECT 3", "+OK\r\n").await;
    let script = "redis.call('select',5)return(redis.call('set',KEYS[1],'five'))";
    talk.expect(&format!("EVAL {script} 1 k"), "+OK\r\n").await;
    talk.expect("GET k", "$-1\r\n").await;
    other.expect("GET k", "$-1\r\n").await;
    other.expect("SELECT 5", "+OK\r\n").await;
    other.expect("GET k", "$4\r\nfive\r\n").await;
    let failing = "redis.call('select',7)return(redis.call('incr',KEYS[1],'x'))";
    assert!(
        talk.ask(&format!("EVAL {failing} 1 k"))
            .await
            .starts_with("-ERR")
    );
    talk.expect("SET k three", "+OK\r\n").await;
    talk.expect("GET k", "$5\r\nthree\r\n").await;
    other.expect("SELECT 7", "+OK\r\n").await;
    other.expect("GET k", "$-1\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_are_on_every_shard() {
    let fixture = fixture(3, 2).await;
    let client = redis::Client::open(format!("redis://{}/", fixture.proxy.address)).unwrap();
    let mut redis = client.get_multiplexed_async_connection().await.unwrap();
    let library = "#!lua name=lib\nredis.register_function('where', \
        function(keys) return redis.call('incr', keys[1]) end)";
    let mut load = redis::cmd("FUNCTION");
    load.arg("LOAD").arg(library);
    assert_eq!(load.query_async::<String>(&mut redis).await.unwrap(), "lib");
    let mut talk = Talk::connect(fixture.proxy.address).await;
    for n in 0..20 {
        talk.expect(&format!("FCALL where 1 k{n}"), ":1\r\n").await;
    }
    let crossed = talk.ask("FCALL where 2 a b").await;
    assert!(crossed.starts_with("-CROSSSLOT"), "{crossed}");
    let again = load.query_async::<String>(&mut redis).await.unwrap_err();
    assert_eq!(again.detail(), Some("Library 'lib' already exists"));
    let stats = talk.ask("FUNCTION STATS").await;
    assert!(
        stats.starts_with("*4\r\n$14\r\nrunning_script\r\n$-1\r\n"),
        "{stats}"
    );
    talk.expect("FUNCTION DELETE lib", "+OK\r\n").await;
    talk.expect("FCALL where 1 k", "-ERR Function not found\r\n")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_never_ends_is_killed_and_others_hear_that_the_shard_is_busy() {
    let fixture = fixture(3, 2).await;
    for node in &fixture.nodes {
        assert_eq!(
            node.admin(&["CONFIG", "SET", "busy-reply-threshold", "10"]),
            "+OK\r\n"
        );
    }
    let mut looping = Talk::connect(fixture.proxy.address).await;
    // What is sent together with the script is answered after it.
    looping.expect("SELECT 3", "+OK\r\n").await;
    looping.say("EVAL while(true)do\nend 1 k").await;
    let mut talk = Talk::connect(fixture.proxy.address).await;
    let mut heard = String::new();
    let deadline = std::time::Instant::now() + support::LIMIT;
    while !heard.starts_with("-BUSY") {
        assert!(
            std::time::Instant::now() < deadline,
            "waited for BUSY, got {heard}"
        );
        heard = talk.ask("GET k").await;
    }
    talk.expect("SCRIPT KILL", "+OK\r\n").await;
    let killed = looping.hear().await;
    assert!(killed.contains("Script killed by user"), "{killed}");
    talk.expect("GET k", "$-1\r\n").await;
}

/// Words with blanks in them.
async fn call(talk: &mut Talk, words: &[&str]) -> String {
    talk.tell(words).await;
    talk.hear().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_of_writes_lets_scripts_that_cannot_write_go_on() {
    let fixture = fixture(3, 2).await;
    let mut talk = Talk::connect(fixture.proxy.address).await;
    let library = "#!lua name=quiet\nredis.register_function{function_name='quiet', \
        callback=function() return 1 end, flags={'no-writes'}} \
        redis.register_function('loud', function() return 2 end)";
    let loaded = call(&mut talk, &["FUNCTION", "LOAD", "REPLACE", library]).await;
    assert_eq!(loaded, "$5\r\nquiet\r\n");
    talk.expect("CLIENT PAUSE 60000 WRITE", "+OK\r\n").await;
    let flagged = "#!lua flags=no-writes\nreturn 7";
    let sha = sha1_smol::Sha1::from(flagged).digest().to_string();
    for words in [
        &["EVAL", flagged, "0"][..],
        &["EVAL_RO", "return 7", "0"],
        &["EVALSHA", &sha, "0"],
    ] {
        assert_eq!(call(&mut talk, words).await, ":7\r\n", "{words:?}");
    }
    talk.expect("FCALL quiet 0", ":1\r\n").await;
    talk.expect("MULTI", "+OK\r\n").await;
    let queued = call(&mut talk, &["EVAL", flagged, "1", "k"]).await;
    assert_eq!(queued, "+QUEUED\r\n");
    talk.expect("EXEC", "*1\r\n:7\r\n").await;
    // Those that may write wait, also in a transaction.
    let mut waiting = Vec::new();
    for words in [
        &["FCALL", "loud", "0"][..],
        &["EVAL", "return 2", "0"],
        &["EVAL", "#!lua\nreturn 2", "0"],
    ] {
        let mut other = Talk::connect(fixture.proxy.address).await;
        other.tell(words).await;
        waiting.push((other, ":2\r\n"));
    }
    let mut other = Talk::connect(fixture.proxy.address).await;
    other.expect("MULTI", "+OK\r\n").await;
    let queued = call(&mut other, &["EVAL", "return 2", "0"]).await;
    assert_eq!(queued, "+QUEUED\r\n");
    other.tell(&["EXEC"]).await;
    waiting.push((other, "*1\r\n:2\r\n"));
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !talk
        .ask("INFO clients")
        .await
        .contains("blocked_clients:4\r\n")
    {
        assert!(
            std::time::Instant::now() < until,
            "waited for four paused clients"
        );
    }
    talk.expect("CLIENT UNPAUSE", "+OK\r\n").await;
    for (mut other, want) in waiting {
        assert_eq!(other.hear().await, want);
    }
}
