//! A hand-over while clients are in states that few are in: all of it travels, or stays and is told.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::collections::BTreeMap;

use slotmesh_proto::handover::v1 as pb;
use support::fixture::{Fixture, fixture};
use support::handover::{Peer, door, successor, take_back, wait_metric};
use support::raw::Raw;
use support::talk::Talk;
use tokio_util::sync::CancellationToken;

const FORGET: &str = ">2\r\n$10\r\ninvalidate\r\n_\r\n";

/// What a monitor shows of the numbered writes, until the last one of each shard came.
async fn watch(mut talk: Talk, last: tokio::sync::watch::Receiver<u64>) -> BTreeMap<u64, u32> {
    let mut seen = BTreeMap::new();
    loop {
        let line = talk.hear().await;
        let Some(at) = line.find("\"mon:") else {
            continue;
        };
        let digits = line[at + 5..].split('"').next().unwrap();
        *seen.entry(digits.parse().unwrap()).or_default() += 1;
        let all = *last.borrow();
        if all > 0 && seen.len() as u64 == all {
            return seen;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn monitors_see_every_command_once_there_and_back() {
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(2, 2).await;
    let (tell, last) = tokio::sync::watch::channel(0);
    let mut monitors = Vec::new();
    for _ in 0..6 {
        let mut talk = Talk::connect(old.address).await;
        talk.expect("MONITOR", "+OK\r\n").await;
        monitors.push(tokio::spawn(watch(talk, last.clone())));
    }
    // What is said to nodes for those who listen is shown to those who monitor.
    let mut listeners = Vec::new();
    for number in 0..4 {
        let mut talk = Talk::connect(old.address).await;
        let answer = talk.ask(&format!("SUBSCRIBE channel:{number}")).await;
        assert!(answer.contains("subscribe"), "{answer}");
        listeners.push(talk);
    }
    let stop = CancellationToken::new();
    let writer = {
        let (stop, address) = (stop.clone(), old.address);
        tokio::spawn(async move {
            let mut talk = Talk::connect(address).await;
            let mut number = 0_u64;
            loop {
                let ends = stop.is_cancelled();
                number += 1;
                if ends {
                    tell.send_replace(number);
                }
                talk.expect(&format!("SET mon:{number} x"), "+OK\r\n").await;
                if ends {
                    return number;
                }
            }
        })
    };
    let old_door = door(data.path());
    let new = successor(data.path(), 3).await;
    wait_metric(new.admin, "clients", 11).await;
    wait_metric(old.admin, "clients", 0).await;
    assert_eq!(take_back(old_door).await, "");
    wait_metric(old.admin, "clients", 11).await;
    wait_metric(new.admin, "clients", 0).await;
    stop.cancel();
    let written = writer.await.unwrap();
    for monitor in monitors {
        let seen = monitor.await.unwrap();
        let twice: Vec<_> = seen.iter().filter(|(_, count)| **count != 1).collect();
        assert!(twice.is_empty(), "{twice:?}");
        assert_eq!(seen.len() as u64, written);
    }
}

/// A client that tracks hears of a change by name, or, as long as its new process has just begun to listen
/// at the nodes, that everything may have changed.
async fn is_told(talk: &mut Talk, writer: &mut Talk, first: &[&str], later: &[&str]) {
    let told = ">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nk\r\n";
    let mut reads = first;
    loop {
        for read in reads {
            talk.say(read).await;
            while talk.hear().await.starts_with('>') {}
        }
        reads = later;
        writer.expect("SET k 2", "+OK\r\n").await;
        match talk.hear().await {
            heard if heard == told => return,
            heard => assert_eq!(heard, FORGET),
        }
    }
}

async fn tracks_on(shards: u32) {
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(shards, 2).await;
    let mut writer = Talk::connect(old.address).await;
    writer.expect("SET k 1", "+OK\r\n").await;
    let mut tracker = Talk::connect(old.address).await;
    tracker.resp3().await;
    tracker.expect("CLIENT TRACKING ON", "+OK\r\n").await;
    tracker.expect("GET k", "$1\r\n1\r\n").await;
    let mut prefixed = Talk::connect(old.address).await;
    prefixed.resp3().await;
    let on = "CLIENT TRACKING ON BCAST PREFIX a: PREFIX k";
    prefixed.expect(on, "+OK\r\n").await;
    let info = prefixed.ask("CLIENT TRACKINGINFO").await;
    let mut opts_in = Talk::connect(old.address).await;
    opts_in.resp3().await;
    opts_in.expect("CLIENT TRACKING ON OPTIN", "+OK\r\n").await;
    opts_in.expect("CLIENT CACHING YES", "+OK\r\n").await;

    let new = successor(data.path(), 2).await;
    wait_metric(new.admin, "taken_over_clients", 4).await;
    for client in [&mut tracker, &mut prefixed, &mut opts_in] {
        assert_eq!(
            client.hear().await,
            FORGET,
            "what it has read may have changed"
        );
    }
    is_told(
        &mut opts_in,
        &mut writer,
        &["GET k"],
        &["CLIENT CACHING YES", "GET k"],
    )
    .await;
    is_told(&mut tracker, &mut writer, &["GET k"], &["GET k"]).await;
    is_told(&mut prefixed, &mut writer, &[], &[]).await;
    prefixed.say("CLIENT TRACKINGINFO").await;
    let mut now = prefixed.hear().await;
    while now.starts_with('>') {
        now = prefixed.hear().await;
    }
    assert_eq!(now, info);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_track_are_told_to_forget_once_and_track_on() {
    tracks_on(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_the_node_tracks_for_track_on_too() {
    tracks_on(1).await;
}

async fn redirects_on(shards: u32) {
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(shards, 3).await;
    let mut writer = Talk::connect(old.address).await;
    writer.expect("SET k 1", "+OK\r\n").await;
    let mut pairs = Vec::new();
    for _ in 0..4 {
        let mut listener = Talk::connect(old.address).await;
        let id = listener.ask("CLIENT ID").await;
        let id = id.trim_end().strip_prefix(':').unwrap().to_owned();
        listener.ask("SUBSCRIBE __redis__:invalidate").await;
        let mut tracker = Talk::connect(old.address).await;
        let on = format!("CLIENT TRACKING ON REDIRECT {id}");
        tracker.expect(&on, "+OK\r\n").await;
        tracker.expect("GET k", "$1\r\n1\r\n").await;
        pairs.push((listener, tracker));
    }
    let new = successor(data.path(), 3).await;
    wait_metric(new.admin, "taken_over_clients", 9).await;
    wait_metric(old.admin, "clients", 0).await;
    let head = "*3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n";
    let forget = format!("{head}$-1\r\n");
    for (listener, _) in &mut pairs {
        assert_eq!(listener.hear().await, forget);
    }
    // The node tracks anew from here on, at the latest.
    for (_, tracker) in &mut pairs {
        tracker.expect("GET k", "$1\r\n1\r\n").await;
    }
    writer.expect("SET k 2", "+OK\r\n").await;
    for (listener, tracker) in &mut pairs {
        // What was read before the node tracked is told as everything; what was read since, by name.
        let heard = listener.hear().await;
        let named = format!("{head}*1\r\n$1\r\nk\r\n");
        assert!(heard == named || heard == forget, "{heard:?}");
        let info = tracker.ask("CLIENT TRACKINGINFO").await;
        assert!(!info.contains("broken"), "{info}");
        tracker.expect("GET k", "$1\r\n2\r\n").await;
    }
    writer.expect("SET k 3", "+OK\r\n").await;
    for (listener, _) in &mut pairs {
        while listener.hear().await == forget {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_told_by_redirection_comes_with_those_who_tell() {
    redirects_on(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_told_by_redirection_of_the_node_comes_too() {
    redirects_on(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_waits_and_wants_no_reply_gets_none() {
    let Fixture {
        nodes,
        proxy: old,
        data,
    } = fixture(1, 1).await;
    let mut skips = Raw::connect(old.address).await;
    skips.send(b"CLIENT REPLY SKIP\r\nBLPOP q 0\r\n").await;
    nodes[0].wait_blocked(1).await;
    let new = successor(data.path(), 1).await;
    wait_metric(new.admin, "taken_over_clients", 1).await;
    let mut writer = Talk::connect(new.address).await;
    writer.expect("RPUSH q x", ":1\r\n").await;
    skips.send(b"PING\r\n").await;
    skips.expect("+PONG\r\n").await;
    writer.expect("LLEN q", ":0\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_that_was_ended_does_not_come_back_with_the_old_process() {
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(1, 2).await;
    let mut operator = Talk::connect(old.address).await;
    let mut writer = Talk::connect(old.address).await;
    operator
        .expect("CLIENT PAUSE 600000 WRITE", "+OK\r\n")
        .await;
    let old_door = door(data.path());
    let new = successor(data.path(), 2).await;
    wait_metric(new.admin, "taken_over_clients", 2).await;
    writer.say("SET k v").await;
    operator.expect("GET k", "$-1\r\n").await; // the pause came with them
    operator.expect("CLIENT UNPAUSE", "+OK\r\n").await;
    assert_eq!(writer.hear().await, "+OK\r\n");
    assert_eq!(take_back(old_door).await, "");
    wait_metric(old.admin, "clients", 2).await;
    writer.expect("SET k w", "+OK\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_listens_to_something_else_than_was_announced_stays_and_is_announced_again() {
    use pb::to_giver::Message as Said;
    use pb::to_taker::Message as Heard;
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(1, 1).await;
    let mut listener = Talk::connect(old.address).await;
    listener.resp3().await;
    listener.ask("SUBSCRIBE a").await;
    let door = door(data.path());
    let (announced, hears) = std::sync::mpsc::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel();
    let talk = tokio::task::spawn_blocking(move || {
        let mut peer = Peer::connect(&door);
        peer.ask_with(1, "p1", 5);
        let mut announcements = Vec::new();
        loop {
            match peer.hear().expect("the other side talks on") {
                Heard::Listener(_) => peer.adopt(0, vec![]),
                Heard::Batch(batch) => {
                    assert!(batch.clients.is_empty(), "{batch:?}");
                    peer.adopt(batch.number, vec![]);
                }
                Heard::Announce(announce) => {
                    announcements.push(announce.clients[0].channels.clone());
                    if announcements.len() == 2 {
                        return announcements;
                    }
                    announced.send(()).unwrap();
                    may_go_on.recv().unwrap();
                    peer.say(Said::Ready(pb::Ready { ready: true }));
                }
                _ => {}
            }
        }
    });
    tokio::task::spawn_blocking(move || hears.recv().unwrap())
        .await
        .unwrap();
    listener.ask("UNSUBSCRIBE a").await;
    listener.ask("SUBSCRIBE b").await;
    go_on.send(()).unwrap();
    let announcements = talk.await.unwrap();
    assert_eq!(announcements, [vec![b"a".to_vec()], vec![b"b".to_vec()]]);
    // The conversation is over: it is served where it was.
    let mut writer = Talk::direct(&_nodes[0]).await;
    writer.expect("PUBLISH a lost", ":0\r\n").await;
    writer.expect("PUBLISH b x", ":1\r\n").await;
    assert_eq!(
        listener.hear().await,
        ">3\r\n$7\r\nmessage\r\n$1\r\nb\r\n$1\r\nx\r\n"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listeners_that_cannot_travel_keep_nobody_else_back() {
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(1, 1).await;
    let mut stuck = Vec::new();
    for _ in 0..100 {
        let mut talk = Talk::connect(old.address).await;
        talk.resp3().await;
        talk.ask("SUBSCRIBE a").await;
        talk.say("WAIT 1 60000").await;
        stuck.push(talk);
    }
    let mut free = Vec::new();
    for _ in 0..5 {
        let mut talk = Talk::connect(old.address).await;
        talk.ask("SUBSCRIBE b").await;
        free.push(talk);
    }
    let new = successor(data.path(), 1).await;
    wait_metric(new.admin, "taken_over_clients", 5).await;
    let mut writer = Talk::connect(new.address).await;
    writer.ask("PUBLISH b x").await;
    for talk in &mut free {
        assert!(talk.hear().await.ends_with("$1\r\nx\r\n"));
    }
}
