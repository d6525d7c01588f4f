//! A primary that was away for two failovers, between real engines: the end of its own history is
//! found among those that the shard remembers, and kept.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use rustix::process::Signal;
use slotmesh_agent::{control::Control, probe::Info};
use slotmesh_proto::{
    agent::v1::{LostWrites, StepOutcome},
    store::v1::{Departure, FenceProof},
};
use slotmesh_resp::write::encode_command;

use crate::{
    controller::password,
    failover::{is_detached, keys_of, lost, promote, read_lost, without_pings, write},
    hosts::{AtExit, Mesh, eventually, fetched_engines, kill},
};

const ADMIN: &str = "keeper";

/// The third node: an engine of which no agent knows.
struct Third {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Third {
    async fn start(engine: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port().to_string();
        drop(free);
        let child = Command::new(if engine.is_empty() {
            "redis-server"
        } else {
            engine
        })
        .args(["--port", &port, "--dir"])
        .arg(dir.path())
        .args(["--save", "", "--user"])
        .args(["default", "on", "nopass", "~*", "&*", "+@all"])
        .args(["--user", ADMIN, "on", ">keeper", "~*", "&*", "+@all"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
        let third = Self {
            child,
            address: format!("127.0.0.1:{port}"),
            _dir: dir,
        };
        eventually("the third node to answer", async || {
            Control::tcp(&third.address, ADMIN, "keeper").await.is_ok()
        })
        .await;
        third
    }

    async fn admin(&self) -> Control {
        Control::tcp(&self.address, ADMIN, "keeper").await.unwrap()
    }
}

impl Drop for Third {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn departure(epoch: u64, info: &Info) -> Departure {
    let history = info.history();
    Departure {
        epoch,
        replid: history.replid2.to_owned(),
        offset: history.second_offset,
    }
}

/// Lets `user` feed from a node.
async fn let_follow(admin: &mut Control, user: &str) {
    let secret = format!(">{}", password(user));
    let rights = [
        "ACL",
        "SETUSER",
        user,
        "on",
        &secret,
        "+psync",
        "+replconf",
        "+ping",
    ];
    admin.call(&rights).await.unwrap();
}

/// `a` has 100 writes that `b` never got; `b` took its place and died; the third one took `b`'s. The
/// shard remembers where the histories parted, or of the first failover nothing any more.
async fn away_for_two_failovers(engine: &str, remembers_both: bool) -> (Mesh, LostWrites) {
    let mut mesh = Mesh::provisioned(engine).await;
    let controller = mesh.controller.clone();
    let mut first = mesh.proxy_connection().await;
    write(&mut first, 0..50).await;
    let has = async |mesh: &Mesh, keys| keys_of(mesh, 1).await == keys;
    eventually("b to have it all", async || has(&mesh, 50).await).await;
    mesh.stop_agent(0).await;

    controller.change(lost);
    is_detached(&controller).await;
    write(&mut first, 50..150).await;
    controller.change(|record| record.target = Some(1));
    let answer = promote(&mut mesh, FenceProof::Exited).await;
    assert_eq!(answer.outcome(), StepOutcome::Done, "{}", answer.message);
    let mut at_b = mesh.admin(1).await;
    let parted = departure(2, &Info::read(&mut at_b, "replication").await.unwrap());
    controller.change(|record| {
        record.primary = 1;
        record.detached = false;
        record.target = None;
        record.departures = vec![parted.clone()];
    });
    controller
        .until("the grant", 1, |n| n.granted_epoch == 2)
        .await;
    let mut second = mesh.proxy_connection().await;
    write(&mut second, 150..160).await;

    let third = Third::start(engine).await;
    let_follow(&mut at_b, "third").await;
    let mut at_c = third.admin().await;
    let (host, port) = controller.record().addresses[1]
        .rsplit_once(':')
        .map(|(h, p)| (h.to_owned(), p.to_owned()))
        .unwrap();
    at_c.call(&["CONFIG", "SET", "masteruser", "third"])
        .await
        .unwrap();
    at_c.call(&["CONFIG", "SET", "masterauth", &password("third")])
        .await
        .unwrap();
    at_c.call(&["REPLICAOF", &host, &port]).await.unwrap();
    eventually("the third one to have it all", async || {
        let size = at_c.call(&["DBSIZE"]).await;
        size.is_ok_and(|size| size.as_int() == Some(60))
    })
    .await;
    mesh.stop_agent(1).await;
    kill(controller.node(1).unwrap().pid, Signal::KILL);
    at_c.call(&["REPLICAOF", "NO", "ONE"]).await.unwrap();
    let next = departure(3, &Info::read(&mut at_c, "replication").await.unwrap());
    assert_ne!(next.replid, parted.replid, "{engine}");
    let_follow(&mut at_c, "rp-3-a").await;
    controller.change(|record| {
        record.epoch = 3;
        record.closed_epoch = 2;
        record.addresses[1].clone_from(&third.address);
        record.previous = (next.replid.clone(), next.offset);
        record.departures = match remembers_both {
            true => vec![parted, next],
            false => vec![next],
        };
    });
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    controller
        .until("following the third", 0, |n| {
            n.link_up && n.assigned_epoch == 3
        })
        .await;
    assert_eq!(keys_of(&mesh, 0).await, 60, "{engine}");
    let kept = async || controller.lost_writes("h-a").len() == 1;
    eventually("the report of lost writes", kept).await;
    let lost = controller.lost_writes("h-a").remove(0);
    (mesh, lost)
}

fn writes(keys: std::ops::Range<u32>) -> Vec<u8> {
    let mut expected = vec![];
    encode_command(&mut expected, &[b"SELECT", b"0"]);
    for key in keys {
        let key = format!("k-{key}");
        encode_command(&mut expected, &[b"SET", key.as_bytes(), b"v"]);
    }
    expected
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_primary_wrote_before_two_failovers_is_kept_on_every_engine() {
    for engine in [String::new()].into_iter().chain(fetched_engines()) {
        let (mesh, lost) = away_for_two_failovers(&engine, true).await;
        assert!(lost.complete && lost.why.is_empty(), "{engine}: {lost:?}");
        assert_eq!((lost.epoch, lost.commands), (1, 100), "{engine}");
        let file = read_lost(&mesh, &lost.file).await.unwrap();
        assert_eq!(without_pings(&file), writes(50..150), "{engine}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_whose_failover_is_forgotten_keeps_all_that_it_has_and_says_that_it_is_no_proof()
{
    let (mesh, lost) = away_for_two_failovers("", false).await;
    assert!(!lost.complete, "{lost:?}");
    assert!(
        lost.why.contains("no failover that is remembered"),
        "{lost:?}"
    );
    assert_eq!((lost.epoch, lost.commands), (1, 150));
    let file = read_lost(&mesh, &lost.file).await.unwrap();
    // The history itself begins by naming the database.
    let expected = [writes(0..0), writes(0..150)].concat();
    assert!(without_pings(&file) == expected, "{}", file.escape_ascii());
}
