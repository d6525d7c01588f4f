//! A proxy's process is exchanged for another one, and nobody who is connected notices; whatever goes
//! wrong, one of the two serves.

mod deaths;
mod witnesses;
mod world;

use std::time::Duration;

use slotmesh_agent::{node::files::free_port, process::Process};
use slotmesh_proto::agent::v1::HandoverState;
use tokio::time::{Instant, sleep};

use self::{witnesses::Witnesses, world::World};
use crate::hosts::eventually;

/// A process has 30 seconds to come to serve.
const NEVER_LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_exchanged_and_goes_back_and_no_client_notices() {
    let world = World::start().await;
    let release = world.add_release("0.9.0");
    let agent = world.start_agent().await;
    world.assign("", 0);
    let first = world.until_runs("", 0).await;
    assert!(first.handover.is_none() && !first.spare_warm, "{first:?}");
    let witnesses = Witnesses::connect(&first.address).await;

    world.assign(&release, 1);
    let second = world.until_runs(&release, 1).await;
    assert_eq!(second.address, first.address);
    assert_eq!(second.version, "0.9.0");
    assert_ne!(second.pid, first.pid);
    let done = second.handover.unwrap();
    assert_eq!((done.state(), done.generation), (HandoverState::Done, 1));
    assert!(second.spare_warm, "the process of before is there");
    let spare = (second.spare_program.as_str(), second.spare_generation);
    assert_eq!(spare, ("", 0));

    for generation in 2..5 {
        world.assign("", 0);
        let back = world.until_runs("", 0).await;
        assert_eq!(back.pid, first.pid, "the process of before takes back");
        world.assign(&release, generation);
        let again = world.until_runs(&release, generation).await;
        assert_ne!(again.pid, second.pid, "another try is another process");
    }
    // A restart: the same program, a process of its own.
    let before = world.until_runs(&release, 4).await;
    world.assign(&release, 5);
    let restarted = world.until_runs(&release, 5).await;
    assert_ne!(restarted.pid, before.pid);
    assert!(witnesses.testify().await > 0);
    let seen = &agent.metrics;
    let (relieved, back) = (seen.proxy_hand_overs.get(), seen.proxy_taken_back.get());
    assert_eq!(
        (relieved, back, seen.proxy_hand_overs_failed.get()),
        (5, 3, 0)
    );
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_not_what_it_should_be_touches_nothing_and_is_tried_once() {
    let world = World::start().await;
    let marks = world.dir.path().join("started");
    let dies = format!(
        "echo x >> {}; echo 'no library for it' >&2; exit 3",
        marks.display()
    );
    let dies = world.add_that_does("0.9.1", &dies);
    let lies = world.add("0.9.2", "#!/bin/sh\necho slotmesh-proxy 0.1.7\n");
    let mute = world.add("0.9.3", "#!/bin/sh\necho 'no such thing' >&2; exit 1\n");
    let spoiled = world.add_release("0.9.4");
    world.spoil(&spoiled);
    let agent = world.start_agent().await;
    world.assign("", 0);
    let first = world.until_runs("", 0).await;
    let witnesses = Witnesses::connect(&first.address).await;
    let bad = [
        (dies.as_str(), "no library for it"),
        (&lies, "0.1.7"),
        (&mute, "no such thing"),
        (&spoiled, "SHA-256"),
        ("proxy-0.9.5", "no artifact proxy-0.9.5 is listed"),
        ("redis-7.0.15", "no proxy"),
    ];
    for (generation, (program, why)) in (1..).zip(bad) {
        world.assign(program, generation);
        let failed = world.until_failed(program, generation).await;
        let said = failed.handover.unwrap().why;
        assert!(said.contains(why), "{program}: {said}");
        assert_eq!(
            (failed.pid, failed.program.as_deref()),
            (first.pid, Some(""))
        );
    }
    // Once for each that was assigned.
    world.assign(&dies, 100);
    world.until_failed(&dies, 100).await;
    let started = std::fs::read_to_string(&marks).unwrap();
    assert_eq!(started.lines().count(), 2);
    assert_eq!(world.processes().len(), 1, "nothing of them is left");

    // Back to what serves: there is nothing to do, and nothing to complain about.
    world.assign("", 0);
    let quiet = world
        .controller
        .until_proxy("no complaint", |p| p.handover.is_none());
    assert_eq!(quiet.await.pid, first.pid);
    let good = world.add_release("0.9.6");
    world.assign(&good, 101);
    world.until_runs(&good, 101).await;
    witnesses.testify().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_never_takes_over_is_ended_and_the_one_before_serves() {
    let world = World::start().await;
    let idle = world.add_that_does("0.9.1", "exec sleep 600");
    let agent = world.start_agent().await;
    world.assign("", 0);
    let first = world.until_runs("", 0).await;
    let witnesses = Witnesses::connect(&first.address).await;
    world.assign(&idle, 1);
    eventually("the process to be started", async || {
        world.processes().len() == 2
    })
    .await;
    // Its time is longer than a test waits for anything else.
    let deadline = Instant::now() + NEVER_LIMIT;
    while world.processes().len() > 1 {
        assert!(Instant::now() < deadline, "waited for it to be ended");
        sleep(Duration::from_millis(50)).await;
    }
    let failed = world.until_failed(&idle, 1).await;
    let why = failed.handover.unwrap().why;
    assert!(why.contains("in time"), "{why}");
    assert_eq!(failed.pid, first.pid);
    assert_eq!(
        world.processes(),
        Process::find(first.pid).into_iter().collect::<Vec<_>>()
    );
    witnesses.testify().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_first_started_on_the_port_that_is_wanted_if_that_is_free() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_port = taken.local_addr().unwrap().port();
    let port = free_port("127.0.0.1".parse().unwrap()).unwrap();
    for (wanted, is_had) in [(taken_port, false), (port, true)] {
        let world = World::start().await;
        let agent = world.start_agent().await;
        world.assign_with("", 1, |spec| spec.port = wanted.into());
        let first = world.until_runs("", 1).await;
        let has = first.address.ends_with(&format!(":{wanted}"));
        assert_eq!(has, is_had, "{first:?}, wanted {wanted}");
        agent.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_may_be_ended_hands_over_if_it_does_and_is_ended_if_it_refuses() {
    let world = World::start().await;
    // As if the process that serves would not be relieved.
    let refused = r#"case " $* " in
*" --take-over "*)
    echo "{\"pid\":$$,\"reason\":\"it leaves\",\"code\":\"refused\"}" > take-over.json
    exit 1;;
esac"#;
    let exec = format!("exec {} \"$@\"", world::program().display());
    let refused = world.add_that_does("0.9.1", &format!("{refused}\n{exec}"));
    let agent = world.start_agent().await;
    world.assign("", 1);
    let first = world.until_runs("", 1).await;
    let witnesses = Witnesses::connect(&first.address).await;
    world.assign_with("", 2, |spec| spec.cold = true);
    let second = world.until_runs("", 2).await;
    let done = second.handover.map(|h| h.state());
    assert_eq!(done, Some(HandoverState::Done));
    assert!(witnesses.testify().await > 0);

    world.assign(&refused, 3);
    let failed = world.until_failed(&refused, 3).await;
    let why = failed.handover.unwrap().why;
    assert!(why.contains("it leaves"), "{why}: nothing allows to end it");
    assert_eq!(failed.pid, second.pid);
    world.assign_with(&refused, 4, |spec| spec.cold = true);
    let fourth = world.until_runs(&refused, 4).await;
    assert_eq!(fourth.address, first.address);
    assert_ne!(fourth.pid, second.pid);
    let ended = Process::find(second.pid).is_none_or(|p| !p.is_alive());
    assert!(ended, "it is ended before another one opens its port");
    // As ever, from then on.
    world.assign("", 5);
    let fifth = world.until_runs("", 5).await;
    let done = fifth.handover.map(|h| h.state());
    assert_eq!(done, Some(HandoverState::Done));
    agent.stop().await;
}
