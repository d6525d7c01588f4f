//! Somebody dies while a proxy's process is exchanged: the new one, the old one, the agent.

use std::time::Duration;

use rustix::process::Signal;
use slotmesh_agent::process::Process;
use slotmesh_proto::agent::v1::{Desired, ProcessState, ProxyReport};
use tokio::time::{Instant, sleep};

use super::{witnesses::Witnesses, world::World};
use crate::{
    binary::end,
    hosts::{Agent, eventually, kill},
};

/// The process that serves first, which is a spare now, and the one of the release that has relieved it.
async fn relieved(world: &World, release: &str) -> (ProxyReport, ProxyReport) {
    world.assign("", 0);
    let first = world.until_runs("", 0).await;
    world.assign(release, 1);
    (first, world.until_runs(release, 1).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_process_that_dies_while_the_spare_is_warm_has_failed_and_the_spare_serves() {
    let world = World::start().await;
    let release = world.add_release("0.9.0");
    let agent = world.start_agent().await;
    let (first, second) = relieved(&world, &release).await;
    kill(second.pid, Signal::KILL);
    let failed = world.until_failed(&release, 1).await;
    assert_eq!(
        (failed.state(), failed.pid),
        (ProcessState::Running, first.pid)
    );
    assert_eq!(failed.program.as_deref(), Some(""));
    let witnesses = Witnesses::connect(&first.address).await;

    // The one that was gone back from is no cause to leave the one of before.
    world.assign(&release, 2);
    let third = world.until_runs(&release, 2).await;
    world.assign("", 0);
    world.until_runs("", 0).await;
    witnesses.testify().await;
    kill(first.pid, Signal::KILL);
    let own = world
        .controller
        .until_proxy("another process of its own", |p| {
            p.program.as_deref() == Some("") && ![first.pid, third.pid].contains(&p.pid)
        });
    let own = own.await;
    assert_eq!(
        (own.address.clone(), own.state()),
        (first.address, ProcessState::Running)
    );
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_that_serves_and_can_not_write_so_is_left_alone() {
    let world = World::start().await;
    let release = world.add_release("0.9.0");
    let agent = world.start_agent().await;
    let (first, second) = relieved(&world, &release).await;
    // Nothing takes the place of a directory that is not empty, as of a file on a full disk.
    let told = world.proxy_dir().join("proxy.json");
    std::fs::remove_file(&told).unwrap();
    std::fs::create_dir_all(told.join("full")).unwrap();
    kill(second.pid, Signal::KILL);
    let witnesses = Witnesses::connect(&first.address).await;
    let until = Instant::now() + Duration::from_secs(7); // twice as long as one that does not serve may live
    while Instant::now() < until {
        assert!(Process::find(first.pid).is_some_and(|p| p.is_alive()));
        sleep(Duration::from_millis(100)).await;
    }
    assert!(witnesses.testify().await > 0);
    std::fs::remove_dir_all(&told).unwrap();
    let again = world.controller.until_proxy("the spare to serve", |p| {
        p.state() == ProcessState::Running && p.pid == first.pid
    });
    again.await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_died_starts_again_from_what_is_assigned_also_without_a_controller() {
    let world = World::start().await;
    let release = world.add_release("0.9.0");
    let agent = world.start_agent().await;
    world.assign(&release, 7);
    let first = world.until_runs(&release, 7).await;
    assert_eq!((first.version.as_str(), first.handover), ("0.9.0", None));
    kill(first.pid, Signal::KILL);
    let second = world.controller.until_proxy("another process", |p| {
        p.state() == ProcessState::Running && p.pid != first.pid
    });
    let second = second.await;
    assert_eq!(second.address, first.address);
    assert_eq!(
        (second.program.as_deref(), second.generation),
        (Some(&*release), 7)
    );
    agent.stop().await;

    let mut settings = world.settings();
    settings.controllers = vec!["127.0.0.1:1".to_owned()];
    let agent = Agent::start(settings).await;
    kill(second.pid, Signal::KILL);
    let staged = world.data().join("artifacts").join(&release);
    eventually("a process of that program", async || {
        let serves = world.serving().filter(|p| p.pid != second.pid);
        serves.is_some_and(|p| world.started_from(p).starts_with(&staged))
    })
    .await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_at_any_moment_of_it_is_followed_by_one_that_goes_on() {
    let world = World::start().await;
    let release = world.add_release("0.9.0");
    let mut agent = world.spawn_agent();
    world.assign("", 0);
    let first = world.until_runs("", 0).await;
    let witnesses = Witnesses::connect(&first.address).await;
    let mut next = (release.clone(), 1);
    let delays = [0, 0, 20, 20, 50, 50, 100, 100, 200, 200, 400, 400];
    for (generation, delay_ms) in (0..).zip(delays) {
        world.assign(&next.0, next.1);
        sleep(Duration::from_millis(delay_ms)).await; // the moment is the point
        end(&mut agent, Signal::KILL).await;
        agent = world.spawn_agent();
        let serves = world.until_runs(&next.0, next.1).await;
        assert_eq!(serves.address, first.address);
        // There by another process, back by the one of before.
        next = match next.0.is_empty() {
            true => (release.clone(), generation + 2),
            false => (String::new(), 0),
        };
    }
    assert!(witnesses.testify().await > 0);
    world.until_alone_with_spares().await;
    end(&mut agent, Signal::TERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_is_not_taken_for_the_process_that_an_agent_died_starting() {
    let world = World::start().await;
    let release = world.add_release("0.9.0");
    let agent = world.start_agent().await;
    world.assign("", 0);
    world.until_runs("", 0).await;
    world.assign(&release, 1);
    let spare = world.until_runs(&release, 1).await;
    world.assign("", 0);
    let serves = world.until_runs("", 0).await;
    agent.stop().await;
    // It has written down what it is about to start, and has not started it. The spare was started with
    // the same words.
    let path = world.proxy_dir().join("runs.json");
    let text = std::fs::read(&path).unwrap();
    let mut runs: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let mut origin = runs["spares"][0]["run"]["origin"].clone();
    origin["key"]["generation"] = 3.into();
    runs["attempt"] = serde_json::json!({
        "origin": origin, "workers": 2, "giver": runs["serving"]["door"], "process": null,
        "since_unix_ms": 0,
    });
    std::fs::write(&path, runs.to_string()).unwrap();
    assert!(Process::find(spare.pid).is_some(), "it is there still");

    world.assign(&release, 3);
    let agent = world.start_agent().await;
    let next = world.until_runs(&release, 3).await;
    assert!(![spare.pid, serves.pid].contains(&next.pid), "{next:?}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_stops_its_host_or_a_removal_ends_both_processes() {
    let world = World::start().await;
    let release = world.add_release("0.9.0");
    let mut settings = world.settings();
    settings.stop_all_on_exit = true;
    let agent = Agent::start(settings.clone()).await;
    world.assign("", 0);
    world.until_runs("", 0).await;
    world.assign(&release, 1);
    world.until_runs(&release, 1).await;
    assert_eq!(world.processes().len(), 2);
    agent.stop().await;
    assert_eq!(world.processes(), vec![]);

    // In the middle of it.
    let agent = Agent::start(settings.clone()).await;
    world.until_runs(&release, 1).await;
    world.assign("", 2);
    eventually("the new process", async || world.processes().len() == 2).await;
    agent.stop().await;
    assert_eq!(world.processes(), vec![]);

    let agent = Agent::start(settings).await;
    world.until_runs("", 2).await;
    world.assign(&release, 3);
    world.until_runs(&release, 3).await;
    world.controller.change(|record| {
        record.proxies[0].desired = Desired::Removed.into();
    });
    let removed = world
        .controller
        .until_proxy("its removal", |p| p.state() == ProcessState::Removed);
    removed.await;
    eventually("its processes to be gone", async || {
        world.processes().is_empty()
    })
    .await;
    assert!(!world.proxy_dir().exists());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_serves_and_dies_in_the_middle_is_not_the_new_ones_fault() {
    let world = World::start().await;
    // It waits a moment before it asks.
    let slow = format!("sleep 1; exec {} \"$@\"", super::world::program().display());
    let slow = world.add_that_does("0.9.0", &slow);
    let agent = world.start_agent().await;
    world.assign("", 0);
    let first = world.until_runs("", 0).await;
    world.assign(&slow, 1);
    eventually("the new process", async || world.processes().len() >= 2).await;
    kill(first.pid, Signal::KILL);
    let serves = world.until_runs(&slow, 1).await;
    assert_eq!(serves.address, first.address);
    assert!(serves.handover.is_none_or(|h| h.why.is_empty()));
    assert!(Process::find(serves.pid).is_some());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_does_not_start_any_more_gives_way_to_the_one_before() {
    let world = World::start().await;
    let works = format!("exec {} \"$@\"", super::world::program().display());
    let once = format!("case \"$*\" in *--take-over*) {works};; esac; echo 'no port' >&2; exit 1");
    let once = world.add_that_does("0.9.0", &once);
    let agent = world.start_agent().await;
    world.assign("", 0);
    let first = world.until_runs("", 0).await;
    world.assign(&once, 1);
    let second = world.until_runs(&once, 1).await;
    kill(first.pid, Signal::KILL);
    kill(second.pid, Signal::KILL);
    let back = world.until_runs("", 0).await;
    assert_eq!(back.address, first.address);
    let failed = world.until_failed(&once, 1).await;
    let why = failed.handover.unwrap().why;
    assert!(why.contains("before it served: no port"), "{why}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_has_the_clients_is_left_alone_when_it_is_the_last_and_its_word_is_late() {
    let world = World::start().await;
    // It says that it serves, but not where everybody looks.
    let told = world.proxy_dir().join("take-over.json");
    let says = r#"printf '{"pid":%s,"phase":"serving"}' $$"#;
    let heir = format!("{says} > {}; exec sleep 600", told.display());
    let heir = world.add_that_does("0.9.0", &heir);
    let agent = world.start_agent().await;
    world.assign("", 0);
    let first = world.until_runs("", 0).await;
    world.assign(&heir, 1);
    eventually("the new process", async || {
        told.exists() && world.processes().len() == 2
    })
    .await;
    kill(first.pid, Signal::KILL);
    let is_left = |process: &Process| process.pid != first.pid;
    let heir = world.processes().into_iter().find(is_left).unwrap();
    // Longer than a spare is given to serve again.
    let until = Instant::now() + Duration::from_secs(6);
    while Instant::now() < until {
        assert!(heir.is_alive(), "it was ended with everybody's clients");
        sleep(Duration::from_millis(100)).await;
    }
    agent.stop().await;
}
