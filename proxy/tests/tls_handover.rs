//! Clients with TLS while one process takes over from another: the same socket, the same session.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::sync::Arc;

use rustls::ClientConfig;
use rustls::version::{TLS12, TLS13};
use slotmesh_proto::handover::v1 as pb;
use support::fixture::{Fixture, fixture_with};
use support::handover::{Peer, count, door, successor_with, take_back, wait_metric};
use support::raw::Raw;
use support::talk::Talk;
use support::tls::{Certificate, tunnel};
use tokio_util::sync::CancellationToken;

/// A proxy with a certificate, and how clients with TLS reach it: by the new version and the old.
struct Place {
    fixture: Fixture,
    certificate: Certificate,
    doors: [std::net::SocketAddr; 2],
    _dir: tempfile::TempDir,
}

async fn place(shards: u32) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let certificate = Certificate::make(dir.path());
    let fixture = fixture_with(shards, 2, &certificate.flags()).await;
    let configs: [Arc<ClientConfig>; 2] =
        [&TLS13, &TLS12].map(|version| certificate.config(version, None));
    let [new, old] = configs.map(|config| tunnel(fixture.proxy.address, config));
    Place {
        doors: [new.await, old.await],
        fixture,
        certificate,
        _dir: dir,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_every_reply_comes_once_and_in_order_there_and_back_and_there_again() {
    let place = place(3).await;
    let (old, data) = (&place.fixture.proxy, place.fixture.data.path());
    let stop = CancellationToken::new();
    let clients: Vec<_> = (0..24)
        .map(|n| {
            let address = place.doors[n % 2];
            tokio::spawn(count(address, format!("count:{n}"), stop.clone()))
        })
        .collect();
    let mut idle = Vec::new();
    for n in 0..100 {
        let mut talk = Talk::connect(place.doors[n % 2]).await;
        talk.expect("PING", "+PONG\r\n").await;
        idle.push(talk);
    }
    wait_metric(old.admin, "clients", 124).await;
    let old_door = door(data);
    let flags = place.certificate.flags();
    let new = successor_with(data, 1, &flags).await;
    wait_metric(new.admin, "clients", 124).await;
    wait_metric(old.admin, "clients", 0).await;
    assert_eq!(take_back(old_door).await, "");
    wait_metric(old.admin, "clients", 124).await;
    wait_metric(new.admin, "clients", 0).await;
    // Sessions need no certificate any more: a process without one takes them.
    let third = successor_with(data, 2, &[]).await;
    wait_metric(third.admin, "clients", 124).await;
    stop.cancel();
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
    for mut client in idle {
        client.expect("ECHO x", "$1\r\nx\r\n").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_keep_all_that_they_had() {
    let place = place(2).await;
    let (old, data) = (&place.fixture.proxy, place.fixture.data.path());
    for (round, address) in place.doors.into_iter().enumerate() {
        let mut multi = Talk::connect(address).await;
        multi.expect("MULTI", "+OK\r\n").await;
        multi.expect("SET m 1", "+QUEUED\r\n").await;
        let mut blocked = Talk::connect(address).await;
        blocked.say("BLPOP q 0").await;
        let mut listener = Talk::connect(address).await;
        listener.ask("SUBSCRIBE news").await;
        let mut half = Raw::connect(address).await;
        half.send(b"*3\r\n$3\r\nSET\r\n$4\r\nha").await;
        let mut setter = Talk::connect(address).await;
        let value = "v".repeat(1_000_000);
        setter.tell(&["SET", "big", &value]).await;
        assert_eq!(setter.hear().await, "+OK\r\n");
        let mut slow = Raw::connect(address).await;
        for _ in 0..12 {
            slow.send(b"GET big\r\n").await;
        }
        // Says nothing before it is passed, and is a client with or without TLS only then.
        let unsaid = tokio::net::TcpStream::connect(old.address).await.unwrap();
        wait_metric(old.admin, "clients", 7).await;

        let old_door = door(data);
        let new = successor_with(data, 1, &place.certificate.flags()).await;
        wait_metric(new.admin, "clients", 7).await;
        multi.expect("EXEC", "*1\r\n+OK\r\n").await;
        setter.expect("RPUSH q x", ":1\r\n").await;
        assert_eq!(blocked.hear().await, "*2\r\n$1\r\nq\r\n$1\r\nx\r\n");
        // Both processes may listen for a moment yet.
        assert!(setter.ask("PUBLISH news x").await.starts_with(':'));
        assert!(listener.hear().await.contains("message"));
        half.send(b"lf\r\n$1\r\nx\r\nGET half\r\n").await;
        half.expect("+OK\r\n$1\r\nx\r\n").await;
        for _ in 0..12 {
            assert_eq!(slow.bulk().await, value);
        }
        let config = place.certificate.config(&TLS13, None);
        let name = rustls::pki_types::ServerName::from(old.address.ip());
        let connector = tokio_rustls::TlsConnector::from(config);
        let begun = connector.connect(name, unsaid).await;
        assert!(begun.is_ok(), "{begun:?}");
        drop((multi, blocked, listener, half, setter, slow, begun));
        wait_metric(new.admin, "clients", 0).await;
        assert_eq!(take_back(old_door.clone()).await, "", "round {round}");
        let is_back = || (door(data) == old_door).then_some(());
        support::wait_for("proxy.json to name the old process", is_back).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_taken_goes_on_here_and_a_release_without_tls_is_not_given_any() {
    let place = place(1).await;
    let data = place.fixture.data.path();
    let mut clients = Vec::new();
    for n in 0..20 {
        let mut talk = Talk::connect(place.doors[n % 2]).await;
        talk.expect(&format!("SET k{n} {n}"), "+OK\r\n").await;
        clients.push(talk);
    }
    for schema_max in [5, 6] {
        let door = door(data);
        let talks = tokio::task::spawn_blocking(move || {
            use pb::to_taker::Message as Heard;
            let mut peer = Peer::connect(&door);
            peer.ask_with(1, "p1", schema_max);
            let until = std::time::Instant::now() + support::LIMIT;
            let (mut batches, mut rests) = (0, 0);
            while let Some(heard) = peer.hear() {
                match heard {
                    Heard::Listener(_) => peer.adopt(0, vec![]),
                    Heard::Batch(batch) => {
                        batches += 1;
                        assert!(batch.clients.iter().all(|client| client.tls.is_some()));
                        if rests > 0 {
                            break; // not a word: they are given up and served where they were
                        }
                        let all = (0..batch.clients.len() as u32).collect();
                        peer.adopt(batch.number, all);
                    }
                    // The conversation before is not over yet.
                    Heard::Refused(_) if std::time::Instant::now() < until => {
                        peer = Peer::connect(&door);
                        peer.ask_with(1, "p1", schema_max);
                    }
                    Heard::Rest(_) if schema_max == 5 => break,
                    Heard::Rest(_) => rests += 1,
                    _ => {}
                }
            }
            batches
        });
        let batches = talks.await.unwrap();
        assert_eq!(batches > 0, schema_max == 6, "{batches}");
        for (n, client) in clients.iter_mut().enumerate() {
            let want = format!("${}\r\n{n}\r\n", n.to_string().len());
            client.expect(&format!("GET k{n}"), &want).await;
        }
    }
}
