//! What each user of a node may do, on every engine, and which connections survive a hand-over.

use std::time::Duration;

use slotmesh_agent::{
    control::{Control, ControlError},
    fence,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    controller::{WAIT, password},
    hosts::{AtExit, Mesh, eventually, fetched_engines},
};

const OBSERVER: &str = "ob-1";

/// A connection that is told things without asking.
struct Listener(TcpStream, String);

impl Listener {
    async fn observer(address: &str, commands: &[&str]) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut listener = Self(stream, String::new());
        let login = format!("HELLO 3 AUTH {OBSERVER} {}", password(OBSERVER));
        listener.send(&login).await;
        listener.until("proto").await;
        for command in commands {
            listener.send(command).await;
        }
        listener
    }

    async fn send(&mut self, line: &str) {
        let line = format!("{line}\r\n");
        self.0.write_all(line.as_bytes()).await.unwrap();
    }

    /// Reads until what was said has `word`, and forgets all of it.
    async fn until(&mut self, word: &str) {
        let reads = async {
            while !self.1.contains(word) {
                let mut bytes = [0; 4096];
                let count = self.0.read(&mut bytes).await.unwrap();
                assert_ne!(count, 0, "closed before {word}; it had said {}", self.1);
                self.1 += &String::from_utf8_lossy(&bytes[..count]);
            }
        };
        let read = timeout(WAIT, reads).await;
        assert!(read.is_ok(), "waited for {word}; it said {}", self.1);
        self.1.clear();
    }
}

async fn is_refused(control: &mut Control, args: &[&str]) -> bool {
    match control.call(args).await {
        Err(ControlError::Refused(why)) => {
            assert!(why.starts_with("NOPERM"), "{args:?}: {why}");
            true
        }
        other => {
            println!("{args:?}: {other:?}");
            false
        }
    }
}

async fn an_observer_hears_all_of_it(engine: &str) {
    let mut mesh = Mesh::provisioned(engine).await;
    let mut listeners = vec![];
    for address in mesh.controller.record().addresses {
        let commands = ["CLIENT TRACKING ON BCAST", "SUBSCRIBE news"];
        let mut listener = Listener::observer(&address, &commands).await;
        listener.until("subscribe").await;
        let monitor = Listener::observer(&address, &["MONITOR"]).await;
        listeners.extend([listener, monitor]);
        let mut observer = Control::tcp(&address, OBSERVER, &password(OBSERVER))
            .await
            .unwrap();
        for allowed in [&["INFO"][..], &["SLOWLOG", "LEN"], &["SELECT", "7"]] {
            observer.call(allowed).await.unwrap();
        }
        for refused in [
            &["GET", "k"][..],
            &["SET", "k", "v"],
            &["PUBLISH", "news", "x"],
            &["EVAL", "return 1", "0"],
            &["CONFIG", "GET", "*"],
            &["ACL", "LIST"],
            &["KEYS", "*"],
            &["SLOWLOG", "RESET"],
            &["CLIENT", "KILL", "ID", "1"],
        ] {
            assert!(
                is_refused(&mut observer, refused).await,
                "{engine}: {refused:?}"
            );
        }
    }
    for round in 0..3 {
        let (key, message) = (format!("key-{round}"), format!("message-{round}"));
        let mut proxy = mesh.proxy_connection().await;
        proxy.call(&["SET", &key, "v"]).await.unwrap();
        proxy.call(&["PUBLISH", "news", &message]).await.unwrap();
        for pair in listeners.chunks_mut(2) {
            pair[0].until(&message).await;
            pair[1].until(&key).await;
        }
        // With the deletion of the old epoch's users.
        mesh.switch_over().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_observer_reads_no_key_and_its_connections_survive_hand_overs() {
    an_observer_hears_all_of_it("").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_observer_is_the_same_on_every_fetched_engine() {
    for engine in fetched_engines() {
        an_observer_hears_all_of_it(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_comes_back_does_not_cut_the_observer() {
    let mut mesh = Mesh::provisioned("").await;
    let address = mesh.controller.record().addresses[0].clone();
    let mut listener = Listener::observer(&address, &["SUBSCRIBE news"]).await;
    listener.until("subscribe").await;
    let mut admin = mesh.admin(0).await;
    let granted = calls_of(&mut admin, "setuser").await;
    mesh.stop_agent(0).await;
    mesh.start_agent(0, AtExit::LeaveRunning).await;
    // The new life grants again; what it converges to is reported after that.
    mesh.controller.change(|record| record.term += 1);
    eventually("the grant of the new life", async || {
        calls_of(&mut admin, "setuser").await > granted
    })
    .await;
    mesh.proxy_connection()
        .await
        .call(&["PUBLISH", "news", "still-here"])
        .await
        .unwrap();
    listener.until("still-here").await;
}

async fn a_soft_fence_leaves_reads_only(engine: &str) {
    let mut mesh = Mesh::start_as(|record| {
        record.engine = engine.to_owned();
        // Otherwise the engine itself refuses DEBUG, before it looks at rights.
        let permission = ("enable-debug-command".to_owned(), "yes".to_owned());
        record.parameters.extend([permission]);
    })
    .await;
    mesh.controller.provision().await;
    let mut admin = mesh.admin(0).await;
    let mut proxy = mesh.proxy_connection().await;
    // On a live connection, with every right that it had.
    for allowed in [
        &["SET", "k", "v"][..],
        &["CONFIG", "GET", "hz"],
        &["SLOWLOG", "GET"],
        &["SCRIPT", "LOAD", "return 1"],
        &["ACL", "WHOAMI"],
        &["MODULE", "LIST"],
        &["CLIENT", "LIST"],
        &["MEMORY", "DOCTOR"],
        &["LATENCY", "LATEST"],
        &["DEBUG", "SLEEP", "0"],
    ] {
        proxy.call(allowed).await.unwrap();
    }
    for refused in [
        &["MONITOR"][..],
        &["REPLICAOF", "NO", "ONE"],
        &["SHUTDOWN"],
        &["ACL", "LIST"],
        &["CONFIG", "SET", "hz", "10"],
        &["CONFIG", "REWRITE"],
        &["FAILOVER"],
        &["CLIENT", "KILL", "ID", "1"],
        &["CLIENT", "PAUSE", "1"],
        &["PSYNC", "?", "-1"],
    ] {
        assert!(
            is_refused(&mut proxy, refused).await,
            "{engine}: {refused:?}"
        );
    }
    // Without the agent: its convergence would lift what no hand-over has placed.
    mesh.stop_agent(0).await;
    fence::soft_fence(&mut admin, "px-1").await.unwrap();
    let old = engine.contains("6.2");
    for refused in [
        &["SET", "k", "w"][..],
        &["EVAL", "return 1", "0"],
        &["SCRIPT", "LOAD", "return 1"],
        &["DEBUG", "SLEEP", "0"],
        &["FUNCTION", "FLUSH"],
        &["CONFIG", "RESETSTAT"],
        &["PFDEBUG", "GETREG", "k"],
        &["FLUSHALL"],
        &["PUBLISH", "c", "m"],
        &["SAVE"],
        &["BGREWRITEAOF"],
    ] {
        if old && refused[0] == "FUNCTION" {
            continue;
        }
        assert!(
            is_refused(&mut proxy, refused).await,
            "{engine}: {refused:?}"
        );
    }
    proxy.call(&["GET", "k"]).await.unwrap();
}

/// How often a node has executed a subcommand of ACL; engines before 7.0 do not count those apart.
async fn calls_of(admin: &mut Control, subcommand: &str) -> Option<u64> {
    let reply = admin.call(&["INFO", "commandstats"]).await.unwrap();
    let text = String::from_utf8_lossy(reply.as_bytes().unwrap()).into_owned();
    let name = format!("cmdstat_acl|{subcommand}:calls=");
    let calls = text.lines().find_map(|l| l.strip_prefix(&name))?;
    calls.split(',').next()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_of_an_older_release_are_brought_up_to_date_once_on_every_engine() {
    let mut engines = fetched_engines();
    engines.push(String::new());
    for engine in engines {
        let mesh = Mesh::provisioned(&engine).await;
        let mut admin = mesh.admin(0).await;
        admin
            .call(&["ACL", "SETUSER", "px-1", "-debug"])
            .await
            .unwrap();
        eventually("the right that was missing", async || {
            fence::known_users(&mut admin).await.unwrap()["px-1"].current
        })
        .await;
        // Nothing is missing any more, so nothing more is granted, however often the agent looks.
        let (Some(granted), Some(looked)) = (
            calls_of(&mut admin, "setuser").await,
            calls_of(&mut admin, "list").await,
        ) else {
            continue;
        };
        eventually("more looks of the agent", async || {
            calls_of(&mut admin, "list").await >= Some(looked + 3)
        })
        .await;
        assert_eq!(calls_of(&mut admin, "setuser").await, Some(granted));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_soft_fence_takes_writes_scripts_and_debug_on_every_engine() {
    a_soft_fence_leaves_reads_only("").await;
    for engine in fetched_engines() {
        a_soft_fence_leaves_reads_only(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_ends_blocking_commands_in_time() {
    let mesh = Mesh::provisioned("").await;
    let mut admin = mesh.admin(0).await;
    let hz = admin.call(&["CONFIG", "GET", "hz"]).await.unwrap();
    assert_eq!(slotmesh_agent::control::strings(&hz), ["hz", "50"]);
    let mut proxy = mesh.proxy_connection().await;
    let before = tokio::time::Instant::now();
    proxy.call(&["BLPOP", "nothing", "0.1"]).await.unwrap();
    let took = before.elapsed();
    assert!(took >= Duration::from_millis(100), "{took:?}");
}
