//! Switchovers back and forth while clients of every other class of commands are at work: messages,
//! blocking pops, streams, transactions, commands over several shards, scripts, tracked caches.
//!
//! Each scene does its work through both proxies until it is told to stop, and then compares what
//! was acknowledged with what is there. An error reply, a lost connection, or something lost or
//! doubled breaks the promise; so does a scene that hardly did anything.

#![allow(clippy::unwrap_used)]

#[path = "switchover_surface/caches.rs"]
mod caches;
#[path = "switchover_surface/counters.rs"]
mod counters;
#[path = "switchover_surface/messages.rs"]
mod messages;
#[path = "switchover_surface/patience.rs"]
mod patience;
#[path = "switchover_surface/queues.rs"]
mod queues;
#[path = "switchover_surface/shards.rs"]
mod shards;
#[path = "switchover_surface/stage.rs"]
mod stage;

use std::{sync::Arc, thread};

use slotmesh_bench::switchover::{Options, Target, run};
use slotmesh_harness::{Mesh, MeshOptions};

use stage::{Scene, Stage};

/// Back and forth on each shard; a longer run is asked for by the environment.
const SWITCHOVERS: u32 = 6;
const SWITCHOVERS_VARIABLE: &str = "SLOTMESH_SURFACE_SWITCHOVERS";
/// Only these scenes, by their names with commas between; for looking into one.
const SCENES_VARIABLE: &str = "SLOTMESH_SURFACE_SCENES";
/// What a scene does at least in each switchover; far less than it does on a busy machine.
const ROUNDS_MIN: u64 = 1;

const SCENES: &[(&str, Scene)] = &[
    ("messages", messages::numbered),
    ("queues", queues::popped_once),
    ("streams", queues::read_once),
    ("watched counters", counters::watched),
    ("blocks over shards", counters::blocks),
    ("commands over shards", shards::computed),
    ("walks", shards::walks),
    ("scripts", shards::scripts),
    ("tracked caches", caches::tracked),
    ("monitor", caches::monitored),
    ("endless waits", patience::endless),
    ("the next entry", patience::next_entry),
    ("comers and goers", patience::comers),
    ("pipelines", patience::pipelines),
];

fn switchovers() -> u32 {
    std::env::var(SWITCHOVERS_VARIABLE).map_or(SWITCHOVERS, |text| text.parse().unwrap())
}

fn scenes() -> Vec<(&'static str, Scene)> {
    let wanted = std::env::var(SCENES_VARIABLE).ok();
    let is_wanted = |name: &str| {
        let wanted = wanted.as_deref();
        wanted.is_none_or(|w| w.split(',').any(|one| one == name))
    };
    let chosen: Vec<_> = SCENES.iter().copied().filter(|s| is_wanted(s.0)).collect();
    assert!(!chosen.is_empty(), "no scene is named {wanted:?}");
    chosen
}

async fn nobody_notices(architecture: &str, engine: Option<&str>) {
    let options = MeshOptions {
        architecture: Some(architecture.to_owned()),
        engine: engine.map(str::to_owned),
        proxies: Some(2),
        workers: Some(2),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let stage = Arc::new(Stage::new(&mesh.contract.proxies));
    let actors: Vec<_> = scenes()
        .into_iter()
        .map(|(name, scene)| {
            let stage = Arc::clone(&stage);
            (name, thread::spawn(move || scene(&stage)))
        })
        .collect();
    let load = Options {
        count: switchovers(),
        clients: 5,
        ..Options::default()
    };
    let report = run(&Target::of(&mesh), &load).await.unwrap();
    stage.close();
    let least = u64::from(load.count) * ROUNDS_MIN;
    let judge = tokio::task::spawn_blocking(move || {
        let mut broken = Vec::new();
        for (name, actor) in actors {
            match actor.join() {
                Ok(Ok(rounds)) if rounds >= least => eprintln!("{name}: {rounds} rounds"),
                Ok(Ok(rounds)) => broken.push(format!("{name}: only {rounds} rounds")),
                Ok(Err(error)) => broken.push(format!("{name}: {error:#}")),
                Err(_) => broken.push(format!("{name}: it panicked")),
            }
        }
        broken
    });
    let broken = judge.await.unwrap();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert!(report.kept_every_promise(), "{}", report.text());
    assert_eq!(report.switchovers, load.count);
    mesh.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_class_of_commands_notices_switchovers_of_a_cluster() {
    nobody_notices("cluster", None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_class_of_commands_notices_switchovers_of_a_standard_instance() {
    nobody_notices("standard", None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_class_of_commands_notices_switchovers_of_the_newest_engine() {
    nobody_notices("cluster", Some("redis-8.2")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_class_of_commands_notices_switchovers_of_valkey() {
    nobody_notices("cluster", Some("valkey-8.0")).await;
}
