//! Either side of a hand-over dies: every client is answered by the other, or hears that its process
//! is gone; nobody waits for ever, and new clients are served.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use support::LIMIT;
use support::handover::{Process, door, mesh, metric, take_back, take_over_report, wait_metric};
use support::talk::Talk;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

const CLIENTS: usize = 300;

async fn connect(address: SocketAddr) -> Vec<TcpStream> {
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(TcpStream::connect(address).await.unwrap());
    }
    clients
}

/// True: it was answered once and right. False: its process is gone.
async fn is_served(client: &mut TcpStream) -> bool {
    let ask = async {
        if client.write_all(b"PING\r\n").await.is_err() {
            return false;
        }
        let mut reply = [0; 7];
        match client.read_exact(&mut reply).await {
            Ok(_) => {
                assert_eq!(&reply, b"+PONG\r\n");
                true
            }
            Err(_) => false,
        }
    };
    timeout(LIMIT, ask)
        .await
        .expect("a client that nobody serves")
}

async fn served(clients: &mut [TcpStream]) -> usize {
    let mut served = 0;
    for client in clients {
        served += usize::from(is_served(client).await);
    }
    served
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_new_process_dies_at_any_moment() {
    let data = tempfile::tempdir().unwrap();
    let _nodes = mesh(data.path());
    let mut old = Process::start(data.path(), None);
    let (address, admin) = old.serves(data.path()).await;
    for delay_ms in [0, 20, 40, 60, 80, 120, 200] {
        let mut clients = connect(address).await;
        let mut new = Process::start(data.path(), Some(&door(data.path())));
        tokio::time::sleep(Duration::from_millis(delay_ms)).await; // the moment is the point
        new.kill();
        old.serves(data.path()).await;
        // What it had adopted went with it, nothing else.
        let alive = served(&mut clients).await;
        let mut fresh = Talk::connect(address).await;
        fresh.expect("SET k v", "+OK\r\n").await;
        drop((clients, fresh));
        wait_metric(admin, "clients", 0).await;
        assert!(alive > 0 || delay_ms > 0, "nobody survived");
    }
    old.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_process_dies_at_any_moment() {
    let data = tempfile::tempdir().unwrap();
    let _nodes = mesh(data.path());
    for delay_ms in [0, 10, 30, 50, 70, 100] {
        let mut old = Process::start(data.path(), None);
        let (address, _) = old.serves(data.path()).await;
        let mut clients = connect(address).await;
        let mut new = Process::start(data.path(), Some(&door(data.path())));
        tokio::time::sleep(Duration::from_millis(delay_ms)).await; // the moment is the point
        old.kill();
        let alive = served(&mut clients).await;
        if support::handover::serving_pid(data.path()) == Some(new.pid()) {
            let mut fresh = Talk::connect(address).await;
            fresh.expect("SET k v", "+OK\r\n").await;
        } else {
            // It had nothing to take over yet, and says so.
            let ended = new.ended().await;
            assert!(
                matches!(ended, Some(3 | 6)) && alive == 0,
                "{ended:?} {alive}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_everything_was_handed_over_the_old_process_may_die_and_the_new_one_too() {
    let data = tempfile::tempdir().unwrap();
    let _nodes = mesh(data.path());
    let mut old = Process::start(data.path(), None);
    let (address, _) = old.serves(data.path()).await;
    let mut clients = connect(address).await;
    let new = Process::start(data.path(), Some(&door(data.path())));
    let (_, admin) = new.serves(data.path()).await;
    wait_metric(admin, "taken_over_clients", CLIENTS as u64).await;
    assert_eq!(served(&mut clients).await, CLIENTS);
    let mut third = Process::start(data.path(), Some(&door(data.path())));
    let (_, admin) = third.serves(data.path()).await;
    wait_metric(admin, "taken_over_clients", CLIENTS as u64).await;
    old.kill();
    assert_eq!(served(&mut clients).await, CLIENTS);
    // The spare accepts again when the one that serves dies.
    third.kill();
    new.serves(data.path()).await;
    assert_eq!(served(&mut clients).await, 0);
    let mut fresh = Talk::connect(address).await;
    fresh.expect("PING", "+PONG\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_fails_its_trial_takes_nothing() {
    let data = tempfile::tempdir().unwrap();
    let nodes = mesh(data.path());
    let old = Process::start(data.path(), None);
    let (address, _) = old.serves(data.path()).await;
    let mut client = Talk::connect(address).await;
    client.expect("PING", "+PONG\r\n").await;
    nodes[1].freeze();
    let mut new = Process::start(data.path(), Some(&door(data.path())));
    assert_eq!(new.ended().await, Some(5));
    let told = take_over_report(data.path());
    assert_eq!(told["pid"], new.pid());
    assert_eq!(
        (told["phase"].as_str(), told["code"].as_str()),
        (Some("failed"), Some("unfit"))
    );
    assert!(!told["reason"].as_str().unwrap().is_empty());
    nodes[1].thaw();
    let log = std::fs::read_to_string(&new.log).unwrap();
    assert!(log.contains("not fit to serve"), "{log}");
    client.expect("PING", "+PONG\r\n").await;
    let mut fresh = Talk::connect(address).await;
    fresh.expect("SET k v", "+OK\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_may_open_too_few_files_takes_nothing() {
    let data = tempfile::tempdir().unwrap();
    let _nodes = mesh(data.path());
    let old = Process::start(data.path(), None);
    let (address, _) = old.serves(data.path()).await;
    let mut clients = connect(address).await;
    let files = CLIENTS as u32; // one for each would do, but for those that it needs itself
    let mut new = Process::start_with_files(data.path(), Some(&door(data.path())), files);
    assert_eq!(new.ended().await, Some(5));
    let told = take_over_report(data.path());
    let reason = told["reason"].as_str().unwrap();
    assert!(reason.contains("of 364 or more"), "{reason}");
    assert_eq!(served(&mut clients).await, CLIENTS);
    assert_eq!(support::handover::serving_pid(data.path()), Some(old.pid()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_nobody_left_to_take_over_from_a_new_process_ends_in_the_middle_of_its_trial() {
    /// A trial waits longer for a node.
    const AT_ONCE: Duration = Duration::from_secs(3);
    let data = tempfile::tempdir().unwrap();
    let nodes = mesh(data.path());
    let mut old = Process::start(data.path(), None);
    old.serves(data.path()).await;
    nodes[1].freeze();
    let mut new = Process::start(data.path(), Some(&door(data.path())));
    let path = data.path().join("take-over.json");
    support::wait_for("the new process to try itself", || {
        path.exists().then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await; // so that it is in the middle
    old.kill();
    let ended = timeout(AT_ONCE, new.ended()).await;
    nodes[1].thaw();
    let code = ended.expect("it tries on").expect("a signal ended it");
    assert!(matches!(code, 3 | 6), "{code}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_times_there_and_back() {
    let data = tempfile::tempdir().unwrap();
    let _nodes = mesh(data.path());
    let old = Process::start(data.path(), None);
    let (address, old_admin) = old.serves(data.path()).await;
    let mut clients = connect(address).await;
    let old_door = door(data.path());
    let new = Process::start(data.path(), Some(&old_door));
    let (_, new_admin) = new.serves(data.path()).await;
    wait_metric(new_admin, "clients", CLIENTS as u64).await;
    let new_door = door(data.path());
    for round in 0..10 {
        assert_eq!(take_back(old_door.clone()).await, "", "round {round}");
        wait_metric(old_admin, "clients", CLIENTS as u64).await;
        assert_eq!(take_back(new_door.clone()).await, "", "round {round}");
        wait_metric(new_admin, "clients", CLIENTS as u64).await;
    }
    assert_eq!(served(&mut clients).await, CLIENTS);
    // Each that has given says for how long a client was stopped.
    assert!(metric(old_admin, "handover_stopped_max_us").await > 0);
}
