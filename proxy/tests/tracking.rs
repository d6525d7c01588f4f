//! CLIENT TRACKING through the proxy, before real nodes.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use slotmesh_proto::topology::v1 as pb;
use support::Proxy;
use support::controller::Controller;
use support::node::{ADMIN, Node, snapshot};
use support::raw::Raw;

struct Fixture {
    nodes: Vec<Node>,
    proxy: Proxy,
    _data: tempfile::TempDir,
}

async fn fixture(shards: u32, workers: u32) -> Fixture {
    fixture_with(shards, workers, 512).await
}

/// So many connections of a worker may be one client's own.
async fn fixture_with(shards: u32, workers: u32, own_connections_max: u32) -> Fixture {
    let nodes: Vec<Node> = (0..shards).map(|_| Node::start_with_epoch(1)).collect();
    let data = tempfile::tempdir().unwrap();
    let routes = (0..shards)
        .map(|i| nodes[i as usize].route(i, shards, 1))
        .collect();
    let mut snapshot = snapshot(1, routes);
    if let Some(settings) = &mut snapshot.settings {
        let parameter = "private_connections_max".to_owned();
        (settings.proxy_parameters).insert(parameter, own_connections_max.to_string());
    }
    slotmesh_proxy::saved::save(data.path(), &snapshot).unwrap();
    let proxy = Proxy::start(data.path(), &["--workers", &workers.to_string()]).await;
    Fixture {
        nodes,
        proxy,
        _data: data,
    }
}

async fn resp3(fixture: &Fixture, commands: &str) -> Raw {
    let mut raw = Raw::connect(fixture.proxy.address).await;
    raw.send(b"HELLO 3\r\n").await;
    raw.heard().await;
    raw.send(commands.as_bytes()).await;
    let count = commands.matches("\r\n").count();
    raw.expect(&"+OK\r\n".repeat(count)).await;
    raw
}

fn told(keys: &[&str]) -> String {
    let keys: Vec<_> = keys
        .iter()
        .map(|key| format!("${}\r\n{key}\r\n", key.len()))
        .collect();
    format!(
        ">2\r\n$10\r\ninvalidate\r\n*{}\r\n{}",
        keys.len(),
        keys.concat()
    )
}

const ALL: &str = ">2\r\n$10\r\ninvalidate\r\n_\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_is_told_once_of_each_key_that_changed() {
    let fixture = fixture(3, 2).await;
    let mut reader = resp3(&fixture, "CLIENT TRACKING ON\r\n").await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    for key in ["foo", "{user1000}x", "hello"] {
        reader.send(format!("GET {key}\r\n").as_bytes()).await;
        reader.expect("_\r\n").await;
        for value in 0..3 {
            writer
                .send(format!("SET {key} {value}\r\nSET other{key} 1\r\n").as_bytes())
                .await;
            writer.expect("+OK\r\n+OK\r\n").await;
        }
        reader.expect(&told(&[key])).await;
        reader.send(b"PING\r\n").await;
        reader.expect("+PONG\r\n").await;
    }
    reader
        .send(b"MGET foo {user1000}x\r\nFCALL nothing 1 k\r\n")
        .await;
    reader.expect("*2\r\n$1\r\n2\r\n$1\r\n2\r\n").await;
    reader.expect("-ERR Function not found\r\n").await;
    writer.send(b"DEL foo {user1000}x\r\n").await;
    writer.expect(":2\r\n").await;
    let heard = reader.heard().await;
    for key in ["foo", "{user1000}x"] {
        assert!(heard.contains(&told(&[key])), "{heard}");
    }
    reader.send(b"GET foo\r\n").await;
    reader.expect("_\r\n").await;
    writer.send(b"FLUSHALL\r\n").await;
    writer.expect("+OK\r\n").await;
    reader.expect(ALL).await;
    assert_eq!(
        reader.heard().await.replace(ALL, ""),
        "",
        "each shard may tell it"
    );
    reader.send(b"CLIENT TRACKING OFF\r\nGET foo\r\n").await;
    reader.expect("+OK\r\n_\r\n").await;
    writer.send(b"SET foo 9\r\n").await;
    writer.expect("+OK\r\n").await;
    assert!(reader.is_silent().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_never_follows_the_notice_that_it_is_stale() {
    let fixture = fixture(3, 1).await;
    let mut reader = resp3(&fixture, "CLIENT TRACKING ON\r\n").await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    // What the reader keeps must be what the key holds once it has heard everything.
    let mut kept = String::new();
    for n in 100..400 {
        reader.send(b"GET foo\r\nGET hello\r\nGET foo\r\n").await;
        writer.send(format!("SET foo {n}\r\n").as_bytes()).await;
        writer.expect("+OK\r\n").await;
        reader.send(b"PING end\r\n").await;
        let mut text = String::new();
        while !text.contains("end\r\n") {
            text += &reader.some().await;
        }
        let mut rest = text.as_str();
        while let Some(at) = rest.find("\r\n") {
            let line = &rest[..at];
            rest = &rest[at + 2..];
            match line {
                ">2" => kept.clear(),
                line if line.len() == 3 && line.parse::<u32>().is_ok() => kept = line.to_owned(),
                _ => {}
            }
        }
    }
    kept = if reader.heard().await.contains("invalidate") {
        String::new()
    } else {
        kept
    };
    assert!(kept.is_empty() || kept == "399", "{kept}");
}

#[tokio::test(flavor = "multi_thread")]
async fn broadcasts_tell_of_all_keys_with_a_prefix() {
    let fixture = fixture(3, 2).await;
    let all = "CLIENT TRACKING ON BCAST\r\n";
    let mut all = resp3(&fixture, all).await;
    let mut some = resp3(&fixture, "CLIENT TRACKING ON BCAST PREFIX a: PREFIX b:\r\n").await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    for key in ["a:1", "c:1", "b:2"] {
        writer.send(format!("SET {key} 1\r\n").as_bytes()).await;
        writer.expect("+OK\r\n").await;
        all.expect(&told(&[key])).await;
        if !key.starts_with('c') {
            some.expect(&told(&[key])).await;
        }
    }
    assert!(some.is_silent().await);
    // One that has switched to broadcasts is told once of what it read before.
    let mut switched = resp3(&fixture, "CLIENT TRACKING ON\r\n").await;
    switched
        .send(b"GET d\r\nCLIENT TRACKING OFF\r\nCLIENT TRACKING ON BCAST\r\n")
        .await;
    switched.expect("_\r\n+OK\r\n+OK\r\n").await;
    writer.send(b"SET d 1\r\n").await;
    writer.expect("+OK\r\n").await;
    switched.expect(&told(&["d"])).await;
    assert!(switched.is_silent().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn opting_in_and_out_concerns_the_next_command_or_transaction() {
    let fixture = fixture(1, 1).await;
    let mut opt_in = resp3(&fixture, "CLIENT TRACKING ON OPTIN\r\n").await;
    let mut opt_out = resp3(&fixture, "CLIENT TRACKING ON OPTOUT\r\n").await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    opt_in
        .send(b"GET a\r\nCLIENT CACHING YES\r\nGET b\r\nGET c\r\n")
        .await;
    opt_in.expect("_\r\n+OK\r\n_\r\n_\r\n").await;
    opt_out
        .send(b"GET a\r\nCLIENT CACHING NO\r\nGET b\r\nGET c\r\n")
        .await;
    opt_out.expect("_\r\n+OK\r\n_\r\n_\r\n").await;
    for key in ["a", "b", "c"] {
        writer.send(format!("SET {key} 1\r\n").as_bytes()).await;
        writer.expect("+OK\r\n").await;
    }
    opt_in.expect(&told(&["b"])).await;
    opt_out.expect(&(told(&["a"]) + &told(&["c"]))).await;
    opt_in
        .send(b"CLIENT CACHING YES\r\nMULTI\r\nGET a\r\nGET b\r\nEXEC\r\nGET c\r\n")
        .await;
    opt_in
        .expect("+OK\r\n+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n$1\r\n1\r\n$1\r\n1\r\n$1\r\n1\r\n")
        .await;
    for key in ["a", "b", "c"] {
        writer.send(format!("SET {key} 2\r\n").as_bytes()).await;
        writer.expect("+OK\r\n").await;
    }
    opt_in.expect(&(told(&["a"]) + &told(&["b"]))).await;
    assert!(opt_in.is_silent().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_can_be_redirected_to_a_client_of_any_worker() {
    for workers in [1, 2] {
        let fixture = fixture(3, workers).await;
        let mut listeners = Vec::new();
        // With two workers the data connection is on the other one in one of the two cases.
        for _ in 0..2 {
            let mut listener = Raw::connect(fixture.proxy.address).await;
            listener.send(b"CLIENT ID\r\n").await;
            let id = listener.integer().await;
            listener.send(b"SUBSCRIBE __redis__:invalidate\r\n").await;
            listener
                .expect("*3\r\n$9\r\nsubscribe\r\n$20\r\n__redis__:invalidate\r\n:1\r\n")
                .await;
            listeners.push((listener, id));
        }
        let mut reader = Raw::connect(fixture.proxy.address).await;
        let mut writer = Raw::connect(fixture.proxy.address).await;
        reader.send(b"CLIENT TRACKING ON REDIRECT 424242\r\n").await;
        reader
            .expect("-ERR The client ID you want redirect to does not exist\r\n")
            .await;
        for (listener, id) in &mut listeners {
            reader
                .send(format!("CLIENT TRACKING ON REDIRECT {id}\r\nCLIENT GETREDIR\r\n").as_bytes())
                .await;
            reader.expect(&format!("+OK\r\n:{id}\r\n")).await;
            let mut before = listener.heard().await; // it may be told to forget everything at first
            before = before.replace(
                "*3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n$-1\r\n",
                "",
            );
            assert_eq!(before, "");
            for key in ["foo", "hello"] {
                reader.send(format!("GET {key}\r\n").as_bytes()).await;
                assert!(reader.some().await.starts_with('$'));
                writer.send(format!("SET {key} 1\r\n").as_bytes()).await;
                writer.expect("+OK\r\n").await;
                listener
                    .expect(&format!(
                        "*3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n*1\r\n${}\r\n{key}\r\n",
                        key.len()
                    ))
                    .await;
            }
            reader.send(b"CLIENT TRACKING OFF\r\n").await;
            reader.expect("+OK\r\n").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_and_information_are_redis_s_own() {
    let fixture = fixture(3, 1).await;
    let direct = Node::start();
    let commands = [
        "CLIENT TRACKINGINFO",
        "CLIENT GETREDIR",
        "CLIENT TRACKING FOO",
        "CLIENT TRACKING ON REDIRECT 99999",
        "CLIENT TRACKING ON PREFIX a",
        "CLIENT TRACKING ON BCAST OPTIN",
        "CLIENT CACHING YES",
        "CLIENT TRACKING ON OPTIN NOLOOP",
        "CLIENT CACHING NO",
        "CLIENT CACHING FOO",
        "CLIENT CACHING YES",
        "CLIENT TRACKINGINFO",
        "CLIENT TRACKING ON BCAST",
        "CLIENT TRACKING ON OPTOUT",
        "CLIENT TRACKING OFF",
        "CLIENT TRACKING ON BCAST PREFIX foo PREFIX bar",
        "CLIENT TRACKING ON BCAST PREFIX fo",
        "CLIENT TRACKINGINFO",
        "CLIENT GETREDIR",
        "CLIENT TRACKING OFF",
        "CLIENT TRACKINGINFO",
    ];
    for protocol in ["PING", "HELLO 3"] {
        let mut one = Raw::connect(direct.address).await;
        one.send(format!("AUTH admin {ADMIN}\r\n").as_bytes()).await;
        one.expect("+OK\r\n").await;
        let mut other = Raw::connect(fixture.proxy.address).await;
        for raw in [&mut one, &mut other] {
            raw.send(format!("{protocol}\r\n").as_bytes()).await;
            raw.heard().await;
        }
        for command in commands {
            let command = format!("{command}\r\n");
            one.send(command.as_bytes()).await;
            other.send(command.as_bytes()).await;
            let (want, got) = (one.heard().await, other.heard().await);
            assert_eq!(want, got, "{command}");
        }
    }
}

/// Closes a node's connections of which CLIENT LIST says this; true if there was one.
fn kill(node: &Node, what: &str) -> bool {
    let list = node.admin(&["CLIENT", "LIST"]);
    let mut ids = Vec::new();
    for line in list.lines().filter(|line| line.contains(what)) {
        let id = line.split(' ').find_map(|word| word.split_once("id="));
        ids.push(id.unwrap().1.to_owned());
    }
    for id in &ids {
        node.admin(&["CLIENT", "KILL", "ID", id]);
    }
    !ids.is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn on_one_shard_a_client_is_told_what_one_redis_tells_it_and_no_more() {
    let fixture = fixture(1, 2).await;
    let mut own = resp3(&fixture, "CLIENT TRACKING ON NOLOOP\r\n").await;
    let mut all = resp3(&fixture, "CLIENT TRACKING ON\r\n").await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    for reader in [&mut own, &mut all] {
        reader.send(b"MGET a b c\r\n").await;
        reader.expect("*3\r\n_\r\n_\r\n_\r\n").await;
    }
    // Its own writes, plain, in a transaction, and from a script.
    own.send(b"SET a 1\r\nMULTI\r\nSET b 1\r\nEXEC\r\n").await;
    own.send(b"EVAL \"return redis.call('set', KEYS[1], '1')\" 1 c\r\nPING\r\n")
        .await;
    own.expect("+OK\r\n+OK\r\n+QUEUED\r\n*1\r\n+OK\r\n+OK\r\n+PONG\r\n")
        .await;
    all.expect(&(told(&["a"]) + &told(&["b"]) + &told(&["c"])))
        .await;
    // Behind the reply to what caused it, and before the next.
    all.send(b"GET a\r\nSET a 2\r\nPING\r\n").await;
    all.expect(&format!("$1\r\n1\r\n+OK\r\n{}+PONG\r\n", told(&["a"])))
        .await;
    own.send(b"GET a\r\n").await;
    own.expect("$1\r\n2\r\n").await;
    writer.send(b"SET a 3\r\n").await;
    own.expect(&told(&["a"])).await;
    assert!(own.is_silent().await && all.is_silent().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_over_other_connections_is_told_too() {
    let fixture = fixture(1, 1).await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    let mut some = resp3(&fixture, "CLIENT TRACKING ON OPTIN\r\n").await;
    let mut reader = resp3(&fixture, "CLIENT TRACKING ON OPTOUT\r\n").await;
    for (client, caching) in [
        (&mut some, "CLIENT CACHING YES"),
        (&mut reader, "CLIENT ID"),
    ] {
        client.send(b"WATCH w\r\n").await;
        client.expect("+OK\r\n").await;
        client.send(format!("{caching}\r\n").as_bytes()).await;
        client.line().await;
        client
            .send(b"MULTI\r\nGET a\r\nSET b 1\r\nSELECT 0\r\nEXEC\r\n")
            .await;
        let queued = "+QUEUED\r\n".repeat(3);
        client
            .expect(&format!("+OK\r\n{queued}*3\r\n_\r\n+OK\r\n+OK\r\n"))
            .await;
    }
    reader.send(b"HSCAN h 0\r\n").await;
    reader.expect("*2\r\n$1\r\n0\r\n*0\r\n").await;
    some.send(b"XREAD BLOCK 1 STREAMS s $\r\n").await;
    some.expect("_\r\n").await;
    reader.send(b"XREAD BLOCK 0 STREAMS s $\r\n").await;
    assert!(reader.is_silent().await);
    writer
        .send(b"SET a 1\r\nHSET h f v\r\nXADD s 1-1 f v\r\n")
        .await;
    reader.send(b"PING\r\n").await;
    let mut heard = String::new();
    while !heard.contains("PONG") {
        heard += &reader.some().await;
    }
    for key in ["a", "h", "s"] {
        assert!(heard.contains(&told(&[key])), "{heard}");
    }
    some.expect(&told(&["a"])).await;
    assert!(some.is_silent().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_shard_takes_nothing_from_those_who_track() {
    let (first, second) = (Node::start_with_epoch(1), Node::start_with_epoch(1));
    let (controller, address) = Controller::start(snapshot(1, vec![first.route(0, 1, 1)])).await;
    let data = tempfile::tempdir().unwrap();
    let proxy = Proxy::start(data.path(), &["--controller", &address.to_string()]).await;
    controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
    let fixture = Fixture {
        nodes: vec![first, second],
        proxy,
        _data: data,
    };
    let mut readers = [
        resp3(&fixture, "CLIENT TRACKING ON\r\n").await,
        resp3(&fixture, "CLIENT TRACKING ON BCAST PREFIX he PREFIX fo\r\n").await,
    ];
    for reader in &mut readers {
        reader.send(b"GET foo\r\nGET hello\r\n").await;
        reader.expect("_\r\n_\r\n").await;
    }
    let routes = [0, 1].map(|i| fixture.nodes[i as usize].route(i, 2, 1));
    controller.say(pb::watch_response::Message::Delta(pb::Delta {
        base_revision: 1,
        revision: 2,
        changed: routes.into(),
        ..Default::default()
    }));
    controller.wait_level("s1", pb::HoldLevel::Applied, 1).await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    for reader in &mut readers {
        reader.expect(ALL).await; // and again for each shard that is heard, in any order
        assert_eq!(reader.heard().await.replace(ALL, ""), "");
        reader.send(b"GET foo\r\nGET hello\r\n").await;
        assert!(reader.heard().await.starts_with(['_', '$']));
    }
    writer.send(b"SET foo 1\r\nSET hello 1\r\n").await;
    writer.expect("+OK\r\n+OK\r\n").await;
    for reader in &mut readers {
        let heard = reader.heard().await;
        for key in ["foo", "hello"] {
            assert!(heard.contains(&told(&[key])), "{heard}");
        }
    }
    for node in &fixture.nodes {
        assert_ne!(node.admin(&["DBSIZE"]), "0", "both shards have a key");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_bound_of_connections_clients_track_without_one_of_their_own() {
    let fixture = fixture_with(1, 1, 1).await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    for _ in 0..2 {
        let mut readers = Vec::new();
        for _ in 0..3 {
            readers.push(resp3(&fixture, "CLIENT TRACKING ON\r\n").await);
        }
        for reader in &mut readers {
            reader.send(b"GET k\r\n").await;
            assert!(!reader.some().await.starts_with('>'));
        }
        writer.send(b"INCR k\r\n").await;
        for reader in &mut readers {
            reader.expect(&told(&["k"])).await;
        }
        let list = fixture.nodes[0].admin(&["CLIENT", "LIST"]);
        let own = list.lines().filter(|line| line.contains("flags=t"));
        assert_eq!(
            own.count(),
            2,
            "a client's own, and what the others hear by"
        );
        for reader in &mut readers {
            reader.send(b"RESET\r\nPING\r\n").await;
            reader.expect("+RESET\r\n+PONG\r\n").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirected_notices_survive_the_loss_of_their_connections() {
    let fixture = fixture(1, 1).await;
    let mut listener = resp3(&fixture, "").await;
    listener.send(b"CLIENT ID\r\n").await;
    let id = listener.integer().await;
    let mut reader = Raw::connect(fixture.proxy.address).await;
    let mut writer = Raw::connect(fixture.proxy.address).await;
    let track = format!("CLIENT TRACKING ON REDIRECT {id} BCAST PREFIX a: PREFIX b:\r\n");
    reader.send(track.as_bytes()).await;
    reader.expect("+OK\r\n").await;
    // Its lane tracks; the notices come over the other one, which alone speaks RESP3.
    for what in ["", "flags=t", "resp=3"] {
        if !what.is_empty() {
            assert!(kill(&fixture.nodes[0], what), "{what}");
            listener.expect(ALL).await; // at once, and when the node tracks again
            listener.expect(ALL).await;
        }
        for key in ["a:1", "b:1"] {
            writer.send(format!("SET {key} 1\r\n").as_bytes()).await;
            writer.expect("+OK\r\n").await;
            listener.expect(&told(&[key])).await;
        }
    }
    assert!(listener.is_silent().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_of_any_shard_makes_readers_forget_everything() {
    let fixture = fixture(3, 1).await;
    let mut reader = resp3(&fixture, "CLIENT TRACKING ON\r\n").await;
    assert!(kill(&fixture.nodes[1], "user=observer"));
    reader.expect(&ALL.repeat(2)).await; // when it is lost, and when it is back
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_or_a_new_primary_makes_readers_forget_everything() {
    let (old, new) = (Node::start_with_epoch(1), Node::start());
    new.replicate(&old);
    let (controller, address) = Controller::start(snapshot(1, vec![old.route(0, 1, 1)])).await;
    let data = tempfile::tempdir().unwrap();
    let proxy = Proxy::start(data.path(), &["--controller", &address.to_string()]).await;
    controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
    let fixture = Fixture {
        nodes: vec![old, new],
        proxy,
        _data: data,
    };
    let mut reader = resp3(&fixture, "CLIENT TRACKING ON\r\n").await;
    reader.send(b"GET k\r\n").await;
    reader.expect("_\r\n").await;
    assert!(kill(&fixture.nodes[0], "flags=t"));
    reader.expect(&ALL.repeat(2)).await; // when it is lost, and when it is back
    fixture.nodes[0].fence(1);
    fixture.nodes[1].admin(&["REPLICAOF", "NO", "ONE"]);
    fixture.nodes[1].grant(2);
    controller.change(fixture.nodes[1].route(0, 1, 2));
    reader.expect(ALL).await;
    reader.send(b"GET k\r\nSET k 1\r\n").await;
    let heard = reader.heard().await;
    assert!(
        heard.starts_with("_\r\n") && heard.ends_with(&told(&["k"]))
            || heard.contains(&told(&["k"])),
        "{heard}"
    );
}
