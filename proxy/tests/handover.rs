//! One proxy takes over from another: what its clients notice, which is nothing.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::time::Duration;

use slotmesh_proto::handover::v1 as pb;
use support::LIMIT;
use support::fixture::{Fixture, fixture};
use support::handover::{Peer, count, door, successor, take_back, wait_metric};
use support::raw::Raw;
use support::talk::Talk;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

async fn run_id(talk: &mut Talk) -> String {
    let info = talk.ask("INFO server").await;
    let line = info.lines().find(|line| line.starts_with("run_id:"));
    line.unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_keep_all_that_they_had() {
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(3, 2).await;
    let mut plain = Talk::connect(old.address).await;
    plain.expect("SET k v", "+OK\r\n").await;
    plain.expect("SELECT 7", "+OK\r\n").await;
    plain.expect("CLIENT SETNAME worker", "+OK\r\n").await;
    plain.expect("SET k seven", "+OK\r\n").await;
    let id = plain.ask("CLIENT ID").await;
    let before = run_id(&mut plain).await;

    let mut modern = Talk::connect(old.address).await;
    modern.resp3().await;
    modern.expect("HSET h f 1", ":1\r\n").await;

    let mut multi = Talk::connect(old.address).await;
    multi.expect("MULTI", "+OK\r\n").await;
    multi.expect("SET m 1", "+QUEUED\r\n").await;
    multi.expect("INCR m", "+QUEUED\r\n").await;

    let mut half = Raw::connect(old.address).await;
    half.send(b"*3\r\n$3\r\nSET\r\n$4\r\nha").await;

    let mut muted = Raw::connect(old.address).await;
    muted.send(b"CLIENT REPLY OFF\r\nSET muted 1\r\n").await;
    let mut skipping = Raw::connect(old.address).await;
    skipping.send(b"CLIENT REPLY SKIP\r\n").await;
    let mut seen = Talk::connect(old.address).await;
    for key in ["muted"] {
        let deadline = tokio::time::Instant::now() + LIMIT;
        while seen.ask(&format!("GET {key}")).await != "$1\r\n1\r\n" {
            assert!(tokio::time::Instant::now() < deadline, "waited for {key}");
        }
    }

    let new = successor(data.path(), 3).await;
    assert_eq!(new.address, old.address);
    wait_metric(new.admin, "taken_over_clients", 7).await;
    wait_metric(old.admin, "clients", 0).await;

    assert_ne!(run_id(&mut plain).await, before, "another process answers");
    plain.expect("CLIENT ID", &id).await;
    plain.expect("CLIENT GETNAME", "$6\r\nworker\r\n").await;
    plain.expect("GET k", "$5\r\nseven\r\n").await;
    let listed = plain.ask("CLIENT LIST").await;
    assert!(
        listed.contains("cmd=exec") || listed.contains("cmd=incr"),
        "{listed}"
    );
    modern
        .expect("HGETALL h", "%1\r\n$1\r\nf\r\n$1\r\n1\r\n")
        .await;
    multi.expect("EXEC", "*2\r\n+OK\r\n:2\r\n").await;
    half.send(b"lf\r\n$1\r\nx\r\nGET half\r\n").await;
    half.expect("+OK\r\n$1\r\nx\r\n").await;
    muted
        .send(b"SET muted 2\r\nCLIENT REPLY ON\r\nGET muted\r\n")
        .await;
    muted.expect("+OK\r\n$1\r\n2\r\n").await;
    skipping.send(b"SET skipped 1\r\nGET skipped\r\n").await;
    skipping.expect("$1\r\n1\r\n").await;
    let mut fresh = Talk::connect(new.address).await;
    let fresh_id = fresh.ask("CLIENT ID").await;
    assert_ne!(fresh_id, id);
    fresh.expect("GET m", "$1\r\n2\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_every_reply_comes_once_and_in_order_there_and_back() {
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(3, 2).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let clients: Vec<_> = (0..40)
        .map(|n| tokio::spawn(count(old.address, format!("count:{n}"), stop.clone())))
        .collect();
    let idle: Vec<_> = {
        let mut idle = Vec::new();
        for _ in 0..400 {
            idle.push(tokio::net::TcpStream::connect(old.address).await.unwrap());
        }
        idle
    };
    wait_metric(old.admin, "clients", 440).await;
    let old_door = door(data.path());
    let new = successor(data.path(), 1).await;
    wait_metric(new.admin, "clients", 440).await;
    wait_metric(old.admin, "clients", 0).await;
    assert_eq!(take_back(old_door).await, "");
    wait_metric(old.admin, "clients", 440).await;
    wait_metric(new.admin, "clients", 0).await;
    stop.cancel();
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
    for mut client in idle {
        client.write_all(b"PING\r\n").await.unwrap();
        let mut reply = [0; 7];
        let read = tokio::time::timeout(LIMIT, client.read_exact(&mut reply)).await;
        read.expect("waited for a PING").unwrap();
        assert_eq!(&reply, b"+PONG\r\n");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_has_not_read_comes_from_the_new_process() {
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(1, 1).await;
    let mut setter = Talk::connect(old.address).await;
    let value = "v".repeat(1_000_000);
    setter.tell(&["SET", "big", &value]).await;
    assert_eq!(setter.hear().await, "+OK\r\n");
    let mut slow = Raw::connect(old.address).await;
    for _ in 0..12 {
        slow.send(b"GET big\r\n").await;
    }
    slow.send(b"PING\r\n").await;
    let new = successor(data.path(), 1).await;
    wait_metric(new.admin, "taken_over_clients", 2).await;
    for _ in 0..12 {
        assert_eq!(slow.bulk().await, value);
    }
    slow.expect("+PONG\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_at_a_node_or_is_watched_there_travels_with_its_connection() {
    let Fixture {
        nodes,
        proxy: old,
        data,
    } = fixture(2, 2).await;
    let mut writer = Talk::connect(old.address).await;
    let mut touched = Talk::connect(old.address).await;
    let mut untouched = Talk::connect(old.address).await;
    for (watcher, key) in [(&mut touched, "a"), (&mut untouched, "b")] {
        watcher.expect(&format!("WATCH {key}"), "+OK\r\n").await;
        watcher.expect("MULTI", "+OK\r\n").await;
        watcher.expect(&format!("SET {key} 2"), "+QUEUED\r\n").await;
    }
    let mut first = Talk::connect(old.address).await;
    let mut second = Talk::connect(old.address).await;
    let mut brief = Talk::connect(old.address).await;
    let shard = |text: &str| text.contains("blocked_clients:0\r");
    first.say("BLPOP q 0").await;
    while nodes
        .iter()
        .all(|node| shard(&node.admin(&["INFO", "clients"])))
    {
        tokio::task::yield_now().await;
    }
    let waits = nodes
        .iter()
        .find(|n| !shard(&n.admin(&["INFO", "clients"])))
        .unwrap();
    second.say("BLPOP q 0").await;
    waits.wait_blocked(2).await;
    brief.say("BLPOP q 2").await;
    waits.wait_blocked(3).await;
    let mut replicas = Talk::connect(old.address).await;
    replicas.say("WAIT 1 30000").await;

    let new = successor(data.path(), 1).await;
    wait_metric(new.admin, "taken_over_clients", 6).await;
    wait_metric(old.admin, "clients", 1).await;
    // The one that waits for replicas stays where it is and is answered there.
    writer.expect("SET a 1", "+OK\r\n").await;
    touched.expect("EXEC", "*-1\r\n").await;
    untouched.expect("EXEC", "*1\r\n+OK\r\n").await;
    assert_eq!(brief.hear().await, "*-1\r\n");
    writer.expect("RPUSH q 1 2", ":2\r\n").await;
    assert_eq!(first.hear().await, "*2\r\n$1\r\nq\r\n$1\r\n1\r\n");
    assert_eq!(second.hear().await, "*2\r\n$1\r\nq\r\n$1\r\n2\r\n");
    first.expect("GET a", "$1\r\n1\r\n").await;
    second.say("BLPOP q 0").await;
    waits.wait_blocked(2).await; // and the WAIT
    let listed = writer.ask("CLIENT LIST").await;
    let line = listed
        .lines()
        .find(|line| line.contains("flags=b"))
        .unwrap();
    let id = line.split(['=', ' ']).nth(1).unwrap().to_owned();
    writer
        .expect(&format!("CLIENT UNBLOCK {id} ERROR"), ":1\r\n")
        .await;
    assert!(second.hear().await.starts_with("-UNBLOCKED"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_take_what_it_asked_for_leaves_everybody_where_they_were() {
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(1, 2).await;
    let mut clients = Vec::new();
    for n in 0..10 {
        let mut client = Talk::connect(old.address).await;
        client.expect(&format!("SET k{n} {n}"), "+OK\r\n").await;
        clients.push(client);
    }
    let mut blocked = Talk::connect(old.address).await;
    blocked.say("BLPOP q 0").await;
    let door = door(data.path());
    let (told, address) = (door.clone(), old.address);
    let talks = tokio::task::spawn_blocking(move || {
        use pb::to_taker::Message as Heard;
        for (version, name, why) in [(9, "p1", "versions 9 to 9"), (1, "p2", "not p2 of i1")] {
            let mut peer = Peer::connect(&told);
            peer.ask(version, name);
            match peer.hear() {
                Some(Heard::Refused(refused)) => {
                    assert!(refused.reason.contains(why), "{}", refused.reason);
                }
                other => panic!("{other:?}"),
            }
        }
        let mut peer = Peer::connect(&told);
        peer.ask(1, "p1");
        let Some(Heard::Offer(offer)) = peer.hear() else {
            panic!("no offer")
        };
        assert_eq!((offer.address, offer.clients), (address.to_string(), 11));
        assert!(matches!(peer.hear(), Some(Heard::Listener(_))));
        // It says nothing about the listener, so that is withdrawn and the conversation ends.
        let withdrawn = Heard::Withdrawn(pb::Withdrawn { number: 0 });
        assert_eq!(peer.hear(), Some(withdrawn));
        assert_eq!(peer.hear(), None);
    });
    talks.await.unwrap();
    for (n, client) in clients.iter_mut().enumerate() {
        client
            .expect(&format!("GET k{n}"), &format!("$1\r\n{n}\r\n"))
            .await;
    }
    let mut fresh = Talk::connect(old.address).await;
    fresh.expect("PING", "+PONG\r\n").await;

    let told = door.clone();
    let talks = tokio::task::spawn_blocking(move || {
        use pb::to_taker::Message as Heard;
        let mut peer = Peer::connect(&told);
        peer.ask(1, "p1");
        let (mut batches, mut rests) = (0, 0);
        while let Some(heard) = peer.hear() {
            match heard {
                Heard::Listener(_) => peer.adopt(0, vec![]),
                Heard::Batch(batch) => {
                    batches += 1;
                    if rests > 0 {
                        continue; // not a word: they are given up and served where they were
                    }
                    let all = (0..batch.clients.len() as u32).collect();
                    peer.adopt(batch.number, all);
                }
                Heard::Rest(_) => rests += 1,
                _ => {}
            }
        }
        assert!(batches > 1 && rests > 0);
    });
    talks.await.unwrap();
    for (n, client) in clients.iter_mut().enumerate() {
        client
            .expect(&format!("GET k{n}"), &format!("$1\r\n{n}\r\n"))
            .await;
    }
    clients[0].expect("RPUSH q x", ":1\r\n").await;
    assert_eq!(blocked.hear().await, "*2\r\n$1\r\nq\r\n$1\r\nx\r\n");
}

/// Listens to numbers and says how many it heard; each must come once and in order.
async fn listen(mut talk: Talk, last: std::sync::Arc<std::sync::atomic::AtomicU64>) -> u64 {
    use std::sync::atomic::Ordering;
    let mut next = 1;
    loop {
        let message = talk.hear().await;
        let number = message.trim_end().rsplit("\r\n").next().unwrap();
        assert_eq!(number, next.to_string(), "{message:?}");
        if last.load(Ordering::Acquire) == next {
            return next;
        }
        next += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_hear_every_message_once_there_and_back() {
    use std::sync::atomic::{AtomicU64, Ordering};
    let Fixture {
        nodes: _nodes,
        proxy: old,
        data,
    } = fixture(2, 2).await;
    let last = std::sync::Arc::new(AtomicU64::new(0));
    let mut listeners = Vec::new();
    for n in 0..24 {
        let mut talk = Talk::connect(old.address).await;
        if n % 2 == 0 {
            talk.resp3().await;
        }
        let channel = n % 4;
        match n % 3 {
            0 => talk.say(&format!("SUBSCRIBE news:{channel}")).await,
            1 => talk.say(&format!("PSUBSCRIBE n*:{channel}")).await,
            _ => talk.say(&format!("SSUBSCRIBE news:{channel}")).await,
        }
        talk.hear().await;
        listeners.push(tokio::spawn(listen(talk, last.clone())));
    }
    let stop = tokio_util::sync::CancellationToken::new();
    let publisher = {
        let (stop, last, address) = (stop.clone(), last.clone(), old.address);
        tokio::spawn(async move {
            let mut talk = Talk::connect(address).await;
            for number in 1_u64.. {
                let ends = stop.is_cancelled();
                if ends {
                    last.store(number, Ordering::Release);
                }
                for channel in 0..4 {
                    for word in ["PUBLISH", "SPUBLISH"] {
                        let reply = talk.ask(&format!("{word} news:{channel} {number}")).await;
                        assert!(reply.starts_with(':'), "{reply}");
                    }
                }
                if ends {
                    return number;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            0
        })
    };
    let old_door = door(data.path());
    let new = successor(data.path(), 3).await;
    wait_metric(new.admin, "clients", 25).await;
    wait_metric(old.admin, "clients", 0).await;
    assert_eq!(take_back(old_door).await, "");
    wait_metric(old.admin, "clients", 25).await;
    wait_metric(new.admin, "clients", 0).await;
    stop.cancel();
    let published = publisher.await.unwrap();
    for listener in listeners {
        assert_eq!(listener.await.unwrap(), published);
    }
}
