//! A proxy whose clients are to go elsewhere, as they see it: real sockets, real nodes, and a controller that
//! says so.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use slotmesh_proto::handover::v1::to_taker::Message as Given;
use slotmesh_proto::topology::v1 as pb;
use slotmesh_proto::topology::v1::watch_request::Message as Said;
use slotmesh_proto::topology::v1::watch_response::Message;
use support::Proxy;
use support::controller::Controller;
use support::handover::{Peer, door, metric, wait_metric};
use support::node::{Node, snapshot};
use support::raw::{Raw, http_get};
use support::talk::Talk;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

struct Fixture {
    proxy: Proxy,
    controller: Controller,
    controller_address: String,
    node: Node,
    data: tempfile::TempDir,
}

async fn fixture() -> Fixture {
    let node = Node::start_with_epoch(1);
    let (controller, address) = Controller::start(snapshot(1, vec![node.route(0, 1, 1)])).await;
    let data = tempfile::tempdir().unwrap();
    let arguments = ["--workers", "2", "--controller", &address.to_string()];
    let proxy = Proxy::start(data.path(), &arguments).await;
    controller.wait_level("s0", pb::HoldLevel::Applied, 1).await;
    Fixture {
        proxy,
        controller,
        controller_address: address.to_string(),
        node,
        data,
    }
}

impl Fixture {
    /// When that was said.
    fn leave(&self, endpoint: &str, within_ms: u32) -> Instant {
        self.controller.say(Message::Leave(pb::Leave {
            endpoint: endpoint.to_owned(),
            within_ms,
        }));
        Instant::now()
    }

    async fn talk(&self) -> Talk {
        Talk::connect(self.proxy.address).await
    }

    async fn wait_refused(&self) {
        let deadline = Instant::now() + support::LIMIT;
        loop {
            match TcpStream::connect(self.proxy.address).await {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => return,
                other => assert!(Instant::now() < deadline, "{other:?}"),
            }
        }
    }
}

/// Pipelines without a pause, until the connection ends; how many replies came. It ends between two.
async fn pipelines(mut raw: Raw, key: String) -> u64 {
    const LENGTH: u64 = 20;
    let mut count = 0;
    loop {
        let batch = format!("INCR {key}\r\n").repeat(LENGTH as usize);
        use tokio::io::AsyncWriteExt as _;
        if raw.stream.write_all(batch.as_bytes()).await.is_err() {
            return count;
        }
        let replies: String = (1..=LENGTH)
            .map(|n| format!(":{}\r\n", count + n))
            .collect();
        let mut got = vec![0; replies.len()];
        let first = tokio::time::timeout(support::LIMIT, raw.stream.read(&mut got)).await;
        let first = first.expect("a reply or the end").unwrap_or(0);
        if first == 0 {
            return count;
        }
        let rest = raw.stream.read_exact(&mut got[first..]);
        let rest = tokio::time::timeout(support::LIMIT, rest).await;
        rest.expect("the rest of the replies")
            .expect("all replies or none");
        assert_eq!(String::from_utf8_lossy(&got), replies);
        count += LENGTH;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_clients_are_closed_between_two_pipelines_and_new_ones_are_refused() {
    let fixture = fixture().await;
    let mut clients = Vec::new();
    for number in 0..8 {
        let raw = Raw::connect(fixture.proxy.address).await;
        clients.push(tokio::spawn(pipelines(raw, format!("n{number}"))));
    }
    let began = fixture.leave("127.0.0.2:1", 16_000);
    fixture.wait_refused().await;
    assert!(began.elapsed() < Duration::from_secs(5), "refused at once");
    let ready = http_get(fixture.proxy.admin, "/ready").await;
    assert!(
        ready.contains("503") && ready.contains("elsewhere"),
        "{ready}"
    );
    let mut direct = Talk::direct(&fixture.node).await;
    for (number, client) in clients.into_iter().enumerate() {
        let count = client.await.unwrap().to_string();
        let want = format!("${}\r\n{count}\r\n", count.len());
        direct.expect(&format!("GET n{number}"), &want).await;
    }
    let empty = |said: &Said| matches!(said, Said::Report(r) if r.clients == 0 && r.commands > 100);
    fixture.controller.wait_heard("no clients", empty).await;
    assert!(began.elapsed() < Duration::from_secs(16));
    assert_eq!(metric(fixture.proxy.admin, "departed_total").await, 8);
    assert_eq!(metric(fixture.proxy.admin, "departed_late").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_in_the_midst_of_something_or_waits_stays() {
    let fixture = fixture().await;
    let (mut multi, mut waits) = (fixture.talk().await, fixture.talk().await);
    let (mut listens, mut idle) = (fixture.talk().await, fixture.talk().await);
    multi.expect("MULTI", "+OK\r\n").await;
    waits.say("BLPOP list 0").await;
    listens.say("SUBSCRIBE news").await;
    listens.hear().await;
    idle.expect("PING", "+PONG\r\n").await;
    let mut direct = Talk::direct(&fixture.node).await;
    let began = fixture.leave("", 10_000);
    idle.ended().await;
    multi.expect("SET k 1", "+QUEUED\r\n").await;
    multi.expect("EXEC", "*1\r\n+OK\r\n").await;
    multi.ended().await;
    direct.expect("RPUSH list a", ":1\r\n").await;
    assert_eq!(waits.hear().await, "*2\r\n$4\r\nlist\r\n$1\r\na\r\n");
    waits.ended().await;
    assert!(began.elapsed() < Duration::from_secs(9));
    direct.say("PUBLISH news x").await;
    assert!(listens.hear().await.contains("news"));
    listens.ended().await;
    let took = began.elapsed();
    assert!(
        took > Duration::from_secs(9) && took < Duration::from_secs(14),
        "{took:?}"
    );
    wait_metric(fixture.proxy.admin, "clients", 0).await;
    assert_eq!(metric(fixture.proxy.admin, "departed_total").await, 3);
    assert_eq!(metric(fixture.proxy.admin, "departed_late").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_idle_clients_do_not_come_back_at_one_time() {
    let fixture = fixture().await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..2000 {
        let mut stream = TcpStream::connect(fixture.proxy.address).await.unwrap();
        clients.spawn(async move {
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
            Instant::now()
        });
    }
    wait_metric(fixture.proxy.admin, "clients", 2000).await;
    let began = fixture.leave("", 0);
    // The same once more, as on another stream, changes nothing.
    fixture.leave("", 1_000);
    let mut ends: Vec<Duration> = clients
        .join_all()
        .await
        .into_iter()
        .map(|end| end - began)
        .collect();
    ends.sort_unstable();
    let (first, last) = (ends[0], ends[1999]);
    assert!(
        first > Duration::from_secs(1),
        "{first:?}: not before its time"
    );
    assert!(
        last - first > Duration::from_secs(3),
        "{first:?} to {last:?}"
    );
    assert!(last < Duration::from_secs(15), "{last:?}");
    let most = ends.windows(700).map(|some| some[699] - some[0]).min();
    assert!(most > Some(Duration::from_millis(500)), "700 in {most:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_hands_over_to_nobody() {
    let fixture = fixture().await;
    fixture.leave("127.0.0.2:1", 60_000);
    fixture.wait_refused().await;
    let door = door(fixture.data.path());
    let answer = tokio::task::spawn_blocking(move || {
        let mut peer = Peer::connect(&door);
        peer.ask(1, "p1");
        peer.hear()
    });
    match answer.await.unwrap() {
        Some(Given::Refused(refused)) => assert!(refused.reason.contains("elsewhere")),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_to_stay_after_all_keeps_who_is_left_takes_others_hands_over_and_may_leave_again() {
    let fixture = fixture().await;
    let mut left = fixture.talk().await;
    left.expect("MULTI", "+OK\r\n").await;
    for _ in 0..2 {
        let began = fixture.leave("127.0.0.2:1", 5_000);
        fixture.wait_refused().await;
        wait_metric(fixture.proxy.admin, "leaving", 1).await;
        let stay = || fixture.controller.say(Message::Stay(pb::Stay {}));
        stay();
        // The same once more, as on another stream, changes nothing.
        stay();
        wait_metric(fixture.proxy.admin, "leaving", 0).await;
        let mut new = fixture.talk().await;
        // Longer than any of them would have been left.
        while began.elapsed() < Duration::from_secs(6) {
            new.expect("PING", "+PONG\r\n").await;
        }
        left.expect("PING", "+QUEUED\r\n").await;
        let ready = http_get(fixture.proxy.admin, "/ready").await;
        assert!(ready.contains("200"), "{ready}");
    }
    let door = door(fixture.data.path());
    let answer = tokio::task::spawn_blocking(move || {
        let mut peer = Peer::connect(&door);
        peer.ask(1, "p1");
        peer.hear()
    });
    let answer = answer.await.unwrap();
    assert!(matches!(answer, Some(Given::Offer(_))), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_be_handed_over_is_told_to_reconnect_and_closed_between_two_requests() {
    let fixture = fixture().await;
    let mut told = fixture.talk().await;
    told.resp3().await;
    let on = "CLIENT MAINT_NOTIFICATIONS ON moving-endpoint-type";
    told.expect(&format!("{on} internal-ip"), "+OK\r\n").await;
    let mut none = fixture.talk().await;
    none.resp3().await;
    none.expect(&format!("{on} none"), "+OK\r\n").await;
    let (mut idle, mut stays) = (fixture.talk().await, fixture.talk().await);
    idle.expect("SET k 1", "+OK\r\n").await;
    stays.expect("MULTI", "+OK\r\n").await;
    let (door, stop) = (door(fixture.data.path()), Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    // A process that takes nobody.
    let taker = tokio::task::spawn_blocking(move || {
        let mut peer = Peer::connect(&door);
        peer.ask(1, "p1");
        while !stopped.load(Ordering::Relaxed) {
            match peer.hear() {
                Some(Given::Listener(_)) => peer.adopt(0, Vec::new()),
                Some(Given::Batch(batch)) => {
                    peer.adopt(batch.number, (0..batch.clients.len() as u32).collect());
                }
                Some(Given::Rest(_) | Given::Offer(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    });
    let push = told.hear().await;
    let own = fixture.proxy.address.to_string();
    assert!(push.starts_with(">4\r\n$6\r\nMOVING\r\n:"), "{push}");
    assert!(
        push.ends_with(&format!(":30\r\n${}\r\n{own}\r\n", own.len())),
        "{push}"
    );
    let push = none.hear().await;
    assert!(push.ends_with(":30\r\n_\r\n"), "{push}");
    idle.ended().await;
    stays.expect("SET k 2", "+QUEUED\r\n").await;
    let closed = metric(fixture.proxy.admin, "departed_total").await;
    assert_eq!(closed, 1, "who was told has time, who is in MULTI stays");
    stays.expect("EXEC", "*1\r\n+OK\r\n").await;
    stays.ended().await;
    stop.store(true, Ordering::Relaxed);
    taker.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_wants_to_be_told_goes_with_it_to_the_process_that_takes_over() {
    let fixture = fixture().await;
    let mut told = fixture.talk().await;
    told.resp3().await;
    let on = "CLIENT MAINT_NOTIFICATIONS ON moving-endpoint-type external-ip";
    told.expect(on, "+OK\r\n").await;
    let door = door(fixture.data.path());
    let take_over = ["--workers", "1", "--take-over", door.to_str().unwrap()];
    let controller = ["--controller", &fixture.controller_address];
    let arguments = [&take_over[..], &controller].concat();
    let new = Proxy::start(fixture.data.path(), &arguments).await;
    wait_metric(new.admin, "clients", 1).await;
    let serves = |said: &Said| matches!(said, Said::Hello(h) if h.proxy_id == "p1");
    fixture.controller.wait_heard("the first", serves).await;
    fixture.controller.wait_heard("the second", serves).await;
    fixture.leave("127.0.0.9:1", 60_000);
    let push = told.hear().await;
    assert!(push.ends_with(":14\r\n$11\r\n127.0.0.9:1\r\n"), "{push}");
    // The process of before still has the socket, and serves nobody by it.
    fixture.wait_refused().await;
    assert_eq!(metric(fixture.proxy.admin, "leaving").await, 0);
    assert_eq!(metric(new.admin, "leaving").await, 1);
}
