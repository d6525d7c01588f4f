//! A hand-over that is stopped or taken back at a bad moment: somebody serves, and nobody stays for ever.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::time::Duration;

use support::handover::{
    Process, door, mesh, serving_pid, take_back, take_over_report, wait_metric,
};
use support::talk::Talk;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_process_that_is_told_to_stop_ends_and_the_old_one_serves() {
    let data = tempfile::tempdir().unwrap();
    let _nodes = mesh(data.path());
    let old = Process::start(data.path(), None);
    let (address, admin) = old.serves(data.path()).await;
    for delay_ms in [30, 60, 90, 120, 200] {
        let mut clients = Vec::new();
        for _ in 0..200 {
            clients.push(tokio::net::TcpStream::connect(address).await.unwrap());
        }
        let mut new = Process::start(data.path(), Some(&door(data.path())));
        tokio::time::sleep(Duration::from_millis(delay_ms)).await; // the moment is the point
        new.terminate();
        // Before it can hear signals it dies of them.
        let ended = new.ended().await;
        assert!(matches!(ended, None | Some(0 | 7)), "{ended:?}");
        old.serves(data.path()).await;
        let mut fresh = Talk::connect(address).await;
        fresh.expect("SET k v", "+OK\r\n").await;
        drop((clients, fresh));
        wait_metric(admin, "clients", 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spare_that_could_not_take_back_is_a_spare_as_before() {
    let data = tempfile::tempdir().unwrap();
    let nodes = mesh(data.path());
    let old = Process::start(data.path(), None);
    let (address, admin) = old.serves(data.path()).await;
    let mut client = Talk::connect(address).await;
    client.expect("SET k v", "+OK\r\n").await;
    let old_door = door(data.path());
    let mut new = Process::start(data.path(), Some(&old_door));
    new.serves(data.path()).await;
    wait_metric(admin, "clients", 0).await;
    let told = take_over_report(data.path());
    assert_eq!(told["pid"], new.pid());

    nodes[1].freeze();
    let problem = take_back(old_door.clone()).await;
    nodes[1].thaw();
    assert!(problem.contains("not fit to serve"), "{problem}");
    client.expect("GET k", "$1\r\nv\r\n").await;
    assert_eq!(take_back(old_door.clone()).await, "", "asked again");
    wait_metric(admin, "clients", 1).await;
    let mut third = Process::start(data.path(), Some(&old_door));
    third.serves(data.path()).await;
    wait_metric(admin, "clients", 0).await;
    nodes[1].freeze();
    let problem = take_back(old_door).await;
    nodes[1].thaw();
    assert!(problem.contains("not fit to serve"), "{problem}");
    // It still looks after the one that serves.
    new.kill();
    third.kill();
    old.serves(data.path()).await;
    let mut fresh = Talk::connect(address).await;
    fresh.expect("GET k", "$1\r\nv\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_was_relieved_answers_those_it_has_before_it_stops() {
    let data = tempfile::tempdir().unwrap();
    let _nodes = mesh(data.path());
    let mut old = Process::start(data.path(), None);
    let (address, _) = old.serves(data.path()).await;
    let mut waits = Talk::connect(address).await;
    waits.expect("SET k v", "+OK\r\n").await;
    // Shorter than a process takes to stop at most.
    waits.say("WAIT 1 1500").await;
    let new = Process::start(data.path(), Some(&door(data.path())));
    new.serves(data.path()).await;
    old.terminate();
    assert_eq!(waits.hear().await, ":0\r\n");
    assert_eq!(old.ended().await, Some(0));
    let mut fresh = Talk::connect(address).await;
    fresh.expect("GET k", "$1\r\nv\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spare_serves_again_only_when_nobody_else_does() {
    let data = tempfile::tempdir().unwrap();
    let _nodes = mesh(data.path());
    let old = Process::start(data.path(), None);
    let (address, admin) = old.serves(data.path()).await;
    // It stays, and the first process with it for longer than the second one.
    let mut waits = Talk::connect(address).await;
    waits.expect("SET k v", "+OK\r\n").await;
    waits.say("WAIT 1 60000").await;
    let mut second = Process::start(data.path(), Some(&door(data.path())));
    second.serves(data.path()).await;
    let mut third = Process::start(data.path(), Some(&door(data.path())));
    third.serves(data.path()).await;
    second.kill();
    wait_metric(admin, "handover_left_clients", 1).await;
    for _ in 0..10 {
        assert_eq!(serving_pid(data.path()), Some(third.pid()));
        tokio::time::sleep(Duration::from_millis(50)).await; // nothing must happen
    }
    let mut client = Talk::connect(address).await;
    client.expect("GET k", "$1\r\nv\r\n").await;
    third.kill();
    old.serves(data.path()).await;
    let mut fresh = Talk::connect(address).await;
    fresh.expect("GET k", "$1\r\nv\r\n").await;
}
