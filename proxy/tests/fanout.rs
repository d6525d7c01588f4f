//! Commands of the whole instance: INFO, CONFIG, SLOWLOG, DEBUG, COMMAND, and names that only nodes
//! know.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use support::Proxy;
use support::fixture::{Fixture, fixture};
use support::node::{Node, snapshot};
use support::talk::Talk;

impl Fixture {
    /// No reply may name where a node listens.
    fn assert_hidden(&self, reply: &str) {
        for node in &self.nodes {
            let port = node.address.port().to_string();
            assert!(!reply.contains(&port), "{port} in {reply}");
        }
    }
}

/// A line of INFO.
fn line<'t>(info: &'t str, key: &str) -> &'t str {
    let mut lines = info.lines().filter_map(|line| line.split_once(':'));
    let found = lines.find(|(name, _)| *name == key);
    found.unwrap_or_else(|| panic!("no {key} in {info}")).1
}

#[tokio::test(flavor = "multi_thread")]
async fn info_adds_up_shards_and_shows_the_proxys_own() {
    for shards in [1, 3] {
        let fixture = fixture(shards, 2).await;
        let mut talk = fixture.talk().await;
        let mut other = fixture.talk().await;
        other.expect("PING", "+PONG\r\n").await;
        for n in 0..30 {
            talk.expect(&format!("SET k{n} 1"), "+OK\r\n").await;
        }
        talk.expect("SELECT 9", "+OK\r\n").await;
        talk.expect("SETEX x 100 1", "+OK\r\n").await;
        let info = talk.ask("INFO everything").await;
        fixture.assert_hidden(&info);
        let port = fixture.proxy.address.port().to_string();
        assert_eq!(line(&info, "tcp_port"), port);
        assert_eq!(line(&info, "process_id"), std::process::id().to_string());
        assert_eq!(line(&info, "connected_clients"), "2");
        assert_eq!(line(&info, "role"), "master");
        assert_eq!(line(&info, "cluster_enabled"), "0");
        assert_eq!(line(&info, "shards"), shards.to_string());
        assert_eq!(line(&info, "db0"), "keys=30,expires=0,avg_ttl=0");
        assert!(line(&info, "db9").starts_with("keys=1,expires=1,"));
        assert!(
            line(&info, "cmdstat_set").starts_with("calls=30,"),
            "{info}"
        );
        assert!(
            line(&info, "cmdstat_ping").starts_with("calls=1,"),
            "{info}"
        );
        assert!(
            line(&info, "cmdstat_select").starts_with("calls=1,"),
            "{info}"
        );
        let version = line(&info, "redis_version").to_owned();
        assert_eq!(info.matches("# Memory\r\n").count(), 1);
        let keyspace = talk.ask("INFO keyspace").await;
        assert!(!keyspace.contains("# Memory"), "{keyspace}");
        talk.expect("INFO nosuchsection", "$0\r\n\r\n").await;
        let hello = talk.ask("HELLO 3").await;
        assert!(hello.contains(&version), "{hello}");
        let verbatim = talk.ask("INFO server").await;
        assert!(verbatim.starts_with('='), "{verbatim}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_count_what_the_proxy_refuses_and_can_be_reset() {
    let fixture = fixture(2, 2).await;
    let mut talk = fixture.talk().await;
    talk.expect("CONFIG RESETSTAT", "+OK\r\n").await;
    assert!(talk.ask("SET k").await.starts_with("-ERR wrong number"));
    assert!(
        talk.ask("EXEC")
            .await
            .starts_with("-ERR EXEC without MULTI")
    );
    let info = talk.ask("INFO everything").await;
    assert_eq!(line(&info, "errorstat_ERR"), "count=2");
    assert_eq!(line(&info, "total_error_replies"), "2");
    assert!(
        line(&info, "cmdstat_set").contains("rejected_calls=1"),
        "{info}"
    );
    talk.expect("CONFIG RESETSTAT", "+OK\r\n").await;
    let info = talk.ask("INFO everything").await;
    assert_eq!(line(&info, "total_error_replies"), "0");
    assert!(!info.contains("errorstat_ERR"));
}

#[tokio::test(flavor = "multi_thread")]
async fn config_shows_both_kinds_of_parameters_and_no_secret() {
    let fixture = fixture(3, 2).await;
    let mut talk = fixture.talk().await;
    let all = talk.ask("CONFIG GET *").await;
    fixture.assert_hidden(&all);
    assert!(!all.contains(support::node::ADMIN));
    let port = fixture.proxy.address.port();
    let want = format!(
        "*2\r\n$4\r\nport\r\n${}\r\n{port}\r\n",
        port.to_string().len()
    );
    talk.expect("CONFIG GET port", &want).await;
    talk.expect(
        "CONFIG GET MASTERAUTH",
        "*2\r\n$10\r\nmasterauth\r\n$0\r\n\r\n",
    )
    .await;
    talk.expect("CONFIG GET split", "*2\r\n$5\r\nsplit\r\n$5\r\nshard\r\n")
        .await;
    talk.expect(
        "CONFIG GET databases",
        "*2\r\n$9\r\ndatabases\r\n$3\r\n256\r\n",
    )
    .await;
    talk.expect("CONFIG GET nosuch", "*0\r\n").await;
    let two = talk.ask("CONFIG GET maxmem*y hash_max* databases").await;
    assert!(
        two.contains("maxmemory\r\n") && two.contains("databases"),
        "{two}"
    );
    talk.expect("CONFIG REWRITE", "+OK\r\n").await;
    let failed = "-ERR CONFIG SET failed (possibly related to argument";
    for (set, error) in [
        (
            "CONFIG SET timeout x",
            format!("{failed} 'timeout') - argument couldn't be parsed into an integer\r\n"),
        ),
        (
            "CONFIG SET hz 10 hz 11",
            format!("{failed} 'hz') - duplicate parameter\r\n"),
        ),
        (
            "CONFIG SET port 1",
            format!(
                "{failed} 'port') - Unable to listen on this port. slotmesh: start a proxy with \
                 it\r\n"
            ),
        ),
        (
            "CONFIG SET hz 10 port",
            "-ERR wrong number of arguments for 'config|set' command\r\n".to_owned(),
        ),
    ] {
        talk.expect(set, &error).await;
    }
    // As it is already.
    talk.expect("CONFIG SET databases 256 appendonly no", "+OK\r\n")
        .await;
    talk.resp3().await;
    talk.expect("CONFIG GET split", "%1\r\n$5\r\nsplit\r\n$5\r\nshard\r\n")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_commands_of_all_shards_are_one_list_without_addresses() {
    let fixture = fixture(3, 2).await;
    for node in &fixture.nodes {
        node.admin(&["CONFIG", "SET", "slowlog-log-slower-than", "0"]);
    }
    let mut talk = fixture.talk().await;
    talk.expect("SLOWLOG RESET", "+OK\r\n").await;
    for n in 0..30 {
        talk.expect(&format!("SET k{n} 1"), "+OK\r\n").await;
    }
    let shown = talk.ask("SLOWLOG GET -1").await;
    assert_eq!(shown.matches("\r\nSET\r\n").count(), 30, "{shown}");
    assert!(!shown.contains("127.0.0.1"), "{shown}");
    assert!(talk.ask("SLOWLOG GET").await.starts_with("*10\r\n"));
    assert!(talk.ask("SLOWLOG GET 3").await.starts_with("*3\r\n"));
    let refused = "-ERR count should be greater than or equal to -1\r\n";
    talk.expect("SLOWLOG GET -2", refused).await;
    let len = talk.ask("SLOWLOG LEN").await;
    let len: i64 = len.trim_start_matches(':').trim_end().parse().unwrap();
    assert!(len > 30, "{len}");
}

#[tokio::test(flavor = "multi_thread")]
async fn debug_goes_where_its_key_is_or_everywhere_and_ends_no_node() {
    let fixture = fixture(3, 2).await;
    let mut talk = fixture.talk().await;
    talk.expect("DEBUG POPULATE 2500 p 20", "+OK\r\n").await;
    talk.expect("DBSIZE", ":2500\r\n").await;
    for n in [0, 1, 2, 3, 2499] {
        let object = talk.ask(&format!("DEBUG OBJECT p:{n}")).await;
        assert!(object.starts_with("+Value at:"), "{object}");
        talk.expect(&format!("STRLEN p:{n}"), ":20\r\n").await;
    }
    let before = talk.ask("DEBUG DIGEST").await;
    talk.expect("DEBUG RELOAD", "+OK\r\n").await;
    talk.expect("DEBUG DIGEST", &before).await;
    talk.expect("SET p:0 other", "+OK\r\n").await;
    assert_ne!(talk.ask("DEBUG DIGEST").await, before);
    talk.expect("DEBUG SET-ACTIVE-EXPIRE 0", "+OK\r\n").await;
    for ends in ["SEGFAULT", "panic", "RESTART"] {
        let refused = talk.ask(&format!("DEBUG {ends}")).await;
        assert!(refused.starts_with("-ERR slotmesh: 'debug"), "{refused}");
    }
    talk.expect("DBSIZE", ":2500\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn merged_reports_keep_their_types() {
    let fixture = fixture(3, 2).await;
    let mut talk = fixture.talk().await;
    for n in 0..10 {
        talk.expect(&format!("SET k{n} 1"), "+OK\r\n").await;
    }
    talk.resp3().await;
    let memory = talk.ask("MEMORY STATS").await;
    assert!(
        memory.starts_with('%') && memory.contains("\r\nkeys.count\r\n:10\r\n"),
        "{memory}"
    );
    assert!(memory.contains("\r\nfragmentation\r\n,"), "{memory}");
    let calls = talk.ask("LATENCY HISTOGRAM set").await;
    let want = "%1\r\n$3\r\nset\r\n%2\r\n$5\r\ncalls\r\n:10\r\n$14\r\nhistogram_usec\r\n%";
    assert!(calls.starts_with(want), "{calls}");
    let stats = talk.ask("FUNCTION STATS").await;
    let want = "%2\r\n$14\r\nrunning_script\r\n_\r\n$7\r\nengines\r\n%1\r\n$3\r\nLUA\r\n%2\r\n";
    assert!(stats.starts_with(want), "{stats}");
    assert!(talk.ask("KEYS *").await.starts_with("*10\r\n"));
    assert!(talk.ask("COMMAND DOCS get").await.starts_with('%'));
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_are_described_by_the_engine() {
    let fixture = fixture(3, 2).await;
    let mut talk = fixture.talk().await;
    let direct = fixture.nodes[0].admin(&["COMMAND", "COUNT"]);
    talk.expect("COMMAND COUNT", &direct).await;
    talk.expect(
        "COMMAND GETKEYS MSET a 1 b 2",
        "*2\r\n$1\r\na\r\n$1\r\nb\r\n",
    )
    .await;
    talk.expect("COMMAND INFO nosuch", "*1\r\n$-1\r\n").await;
    assert!(talk.ask("LOLWUT").await.contains("Redis ver."));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_only_nodes_know_is_sent_where_its_key_is() {
    let renamed = ["--rename-command", "LPOS", "where.is"];
    let nodes: Vec<Node> = (0..3).map(|_| Node::start_with(&renamed)).collect();
    let data = tempfile::tempdir().unwrap();
    let routes = (0..3).map(|i| nodes[i as usize].route(i, 3, 1)).collect();
    nodes.iter().for_each(|node| node.grant(1));
    slotmesh_proxy::saved::save(data.path(), &snapshot(1, routes)).unwrap();
    let proxy = Proxy::start(data.path(), &["--workers", "1"]).await;
    let mut talk = Talk::connect(proxy.address).await;
    for n in 0..10 {
        talk.expect(&format!("RPUSH l{n} a b c"), ":3\r\n").await;
        talk.expect(&format!("Where.Is l{n} c"), ":2\r\n").await;
    }
    talk.expect("MULTI", "+OK\r\n").await;
    talk.expect("where.is l0 b", "+QUEUED\r\n").await;
    talk.expect("EXEC", "*1\r\n:1\r\n").await;
    let unknown = "-ERR unknown command 'no.such', with args beginning with: 'a' 'b' \r\n";
    talk.expect("no.such a b", unknown).await;
    talk.expect("no.such a b", unknown).await;
    let arity = "-ERR wrong number of arguments for 'where.is' command\r\n";
    talk.expect("where.is", arity).await;
}
