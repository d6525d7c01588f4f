//! What an upgrade must not cost, on real engines: a new primary that is much slower is taken back by itself,
//! and a switch that holds for longer than was agreed to is not followed by others.

#![allow(clippy::unwrap_used)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use slotmesh_e2e::{
    client, ctl, json,
    load::Load,
    roles,
    upgrades::{LIMIT, bake, begin, fill, is_done, list, mesh_of, say, until},
};
use slotmesh_harness::{Mesh, wait_until};
use slotmesh_proto::{
    instance::v1::ModifyInstanceMinorVersionRequest, store::v1::TaskState, task::v1::Task,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

/// Longer than what is waited for here.
const BAKE_SECONDS: u32 = 3_600;
const SMALL: usize = 100;
/// Counting its bits takes a third of a millisecond where an engine does it fastest, far above what the gate
/// asks for, and little enough that a machine which does much else counts them often.
const BIG: usize = 10_000_000;
/// At a time.
const CALLS: usize = 10;
/// Before the upgrade begins: two windows of ten seconds, and many commands in them.
const MEASURED: Duration = Duration::from_secs(25);
const CALLS_BEFORE: usize = 5_000;

/// A client that has the engine count bits, of little or of much.
struct Counter {
    stop: CancellationToken,
    is_big: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
    work: JoinHandle<redis::RedisResult<()>>,
}

impl Counter {
    async fn start(mesh: &Mesh) -> Self {
        let mut connection = client(mesh, 0).await.unwrap();
        for (key, size) in [("small", SMALL), ("big", BIG)] {
            let mut set = redis::cmd("SETRANGE");
            set.arg(key).arg(size).arg("x");
            set.query_async::<()>(&mut connection).await.unwrap();
        }
        let stop = CancellationToken::new();
        let (is_big, calls) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (stopped, big, made) = (stop.clone(), is_big.clone(), calls.clone());
        let work = tokio::spawn(async move {
            while !stopped.is_cancelled() {
                let key = if big.load(Relaxed) { "big" } else { "small" };
                let mut counts = redis::pipe();
                for _ in 0..CALLS {
                    counts.cmd("BITCOUNT").arg(key).ignore();
                }
                counts.query_async::<()>(&mut connection).await?;
                made.fetch_add(CALLS, Relaxed);
                sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        });
        Self {
            stop,
            is_big,
            calls,
            work,
        }
    }

    async fn end(self) {
        self.stop.cancel();
        self.work.await.unwrap().unwrap();
    }
}

/// An engine's count does not say why a command takes longer: here it is what the client asks for, which is
/// as good as an engine that is slower at it.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_primary_whose_commands_take_many_times_as_long_is_taken_back_by_itself() {
    let (mesh, _) = mesh_of("standard", 1, "redis-6.2").await.unwrap();
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(&mesh).await.unwrap();
    let before = roles(&mesh).await.unwrap();
    let (counter, begun) = (Counter::start(&mesh).await, Instant::now());
    wait_until(LIMIT, "the old primary to be measured", async || {
        let calls = counter.calls.load(Relaxed);
        let is_long = begun.elapsed() >= MEASURED;
        anyhow::ensure!(calls >= CALLS_BEFORE && is_long, "{calls}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    let task = begin(&mesh, &name, bake(BAKE_SECONDS)).await.unwrap();
    let bakes = |t: &Task| t.shards[0].phase == "Bake" && t.shards[0].rollback == "Open";
    until(&mesh, &task, "the bake, with the way back open", bakes)
        .await
        .unwrap();
    counter.is_big.store(true, Relaxed);
    let back = |t: &Task| t.state() == TaskState::RolledBack;
    let ended = until(&mesh, &task, "it to be taken back", back).await;
    let said = ended.unwrap().message;
    assert!(said.contains("µs on average"), "{said}");
    assert_eq!(roles(&mesh).await.unwrap()[0].1, before[0].1);
    counter.end().await;
    mesh.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_that_holds_for_longer_than_agreed_pauses_the_upgrade_until_an_operator_resumes_it()
 {
    let (mesh, _) = mesh_of("cluster", 2, "redis-7.0").await.unwrap();
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(&mesh).await.unwrap();
    let words = ["--output", "json", "upgrade", mesh.instance(), "--to"];
    let words = [&words[..], &[&name, "--plan", "--max-hold", "7"]].concat();
    let plan = json(&ctl(&mesh, &words).await.unwrap()).unwrap();
    assert!(plan["remarks"].to_string().contains("7 ms"), "{plan}");

    let load = Load::start(&mesh).await.unwrap();
    let options = ModifyInstanceMinorVersionRequest {
        // No hand-over is as fast.
        max_hold_ms: Some(1),
        ..bake(1)
    };
    let task = begin(&mesh, &name, options).await.unwrap();
    let halted = |t: &Task| t.shards[0].phase == "Done" && t.message.contains("paused: a switch");
    let halted = until(&mesh, &task, "the first shard alone to be done", halted)
        .await
        .unwrap();
    assert!(halted.shards[0].hold_ms > 1.0, "{halted:#?}");
    let waits = |t: &Task| t.shards[1].message.contains("an operator to resume");
    let waiting = until(&mesh, &task, "the second one to wait", waits).await;
    assert_eq!(waiting.unwrap().shards[1].phase, "Ready");
    say(&mesh, &["resolve", &task, "resume"]).await.unwrap();
    until(&mesh, &task, "the upgrade to be done", is_done)
        .await
        .unwrap();
    load.audit().await.unwrap();
    mesh.stop().await.unwrap();
}
