//! `slotmesh demo`: what this is all about, in half a minute.
//!
//! A mesh is started, clients load it, every shard is switched over, one by one and then all at
//! once, and the clients say what they noticed. It succeeds only if they noticed nothing.

mod load;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use slotmesh_proto::{
    instance::v1::{Shard, SwitchOverRequest},
    store::v1::NodeRole,
    task::v1 as task,
};
use slotmesh_runtime::telemetry;
use tokio::time::{MissedTickBehavior, interval, sleep};

use self::load::Load;
use crate::{
    api::Api,
    command::DemoArgs,
    failure::Failure,
    progress::{self, Watcher},
    render::{self, Output, Text, show},
    up::{self, Settings, contract::Contract, engine},
};

/// Of the whole demo, its start included; it takes about a quarter of this.
const LIMIT: Duration = Duration::from_secs(120);
/// Load before the first switchover, between two, and after the last one.
const QUIET: Duration = Duration::from_millis(1500);
const SHOW_INTERVAL: Duration = Duration::from_millis(500);

/// What the clients noticed.
#[derive(Debug, Serialize)]
struct Summary {
    seconds: f64,
    requests: u64,
    errors: u64,
    lost_writes: u64,
    longest_wait_ms: f64,
    switchovers: Vec<Switched>,
}

#[derive(Debug, Serialize)]
struct Switched {
    shard: String,
    to: String,
    hold_ms: f64,
    critical_ms: f64,
}

/// Runs the demo in a temporary directory and removes it.
///
/// # Errors
/// When a client noticed anything, or the mesh could not be started.
pub async fn run(args: DemoArgs, output: Output) -> Result<(), Failure> {
    // Its own display says what happens; the log is for who asks for it.
    let _telemetry = std::env::var_os("SLOTMESH_LOG").map(|_| telemetry::init("slotmesh-demo"));
    let dir = TempDir::new()?;
    render::note(&format!("starting a mesh in {}", dir.0.display()));
    let settings = Settings {
        data: dir.0.clone(),
        engine: args.engine.as_deref().map(engine::normalized),
        ..Settings::default()
    };
    let clients = args.clients;
    let summary = up::with_mesh(settings, LIMIT, async |contract| {
        perform(contract, clients).await
    })
    .await?;
    show(output, &summary)?;
    if summary.errors > 0 || summary.lost_writes > 0 {
        return Err(Failure::Local(anyhow!(
            "clients noticed: {} errors, {} lost writes",
            summary.errors,
            summary.lost_writes
        )));
    }
    Ok(())
}

async fn perform(contract: &Contract, clients: u32) -> Result<Summary, Failure> {
    render::note(&contract.text());
    let mut api = Api::connect(&contract.controller).await?;
    let load = Load::start(&contract.proxies, clients)
        .await
        .context("connect the clients")?;
    let live = Live::start(&load);
    let switched = switch_everything(&mut api, contract, &live).await;
    sleep(QUIET).await;
    live.stop().await;
    let done = load.stop().await;
    let switchovers = switched?;
    let lost_writes = done
        .lost_writes(&contract.proxies[0])
        .await
        .context("count lost writes")?;
    Ok(Summary {
        seconds: done.took.as_secs_f64(),
        requests: done.requests,
        errors: done.errors,
        lost_writes,
        longest_wait_ms: done.longest_wait.as_secs_f64() * 1000.0,
        switchovers,
    })
}

/// Each shard by itself, then all of them in one request.
async fn switch_everything(
    api: &mut Api,
    contract: &Contract,
    live: &Live,
) -> Result<Vec<Switched>, Failure> {
    let mut done = Vec::new();
    let shard_count = api.describe_shards(&contract.instance).await?.len();
    for index in 0..shard_count {
        sleep(QUIET).await;
        let shards = api.describe_shards(&contract.instance).await?;
        let targets = shards.get(index).and_then(replica_of).into_iter().collect();
        switch(api, contract, targets, live, &mut done).await?;
    }
    sleep(QUIET).await;
    let shards = api.describe_shards(&contract.instance).await?;
    let targets = shards.iter().filter_map(replica_of).collect();
    switch(api, contract, targets, live, &mut done).await?;
    Ok(done)
}

fn replica_of(shard: &Shard) -> Option<String> {
    let replica = shard
        .nodes
        .iter()
        .find(|n| n.current_role() == NodeRole::Replica)?;
    Some(replica.node_id.clone())
}

async fn switch(
    api: &mut Api,
    contract: &Contract,
    targets: Vec<String>,
    live: &Live,
    done: &mut Vec<Switched>,
) -> Result<(), Failure> {
    live.say(&format!("switchover to {}", targets.join(", ")));
    let request = SwitchOverRequest {
        instance_id: contract.instance.clone(),
        target_primary_node_ids: targets,
        client_token: uuid::Uuid::now_v7().to_string(),
        ..SwitchOverRequest::default()
    };
    let task_id = api.switch_over(request).await?;
    let task = progress::watch(api, &task_id, 1, &mut Silent).await?;
    progress::require_done(&task)?;
    for shard in task.shards {
        live.say(&format!(
            "shard {} is served by {} now; requests waited up to {:.1} ms",
            shard.shard_id, shard.to_node_id, shard.hold_ms
        ));
        done.push(Switched {
            shard: shard.shard_id,
            to: shard.to_node_id,
            hold_ms: shard.hold_ms,
            critical_ms: shard.critical_ms,
        });
    }
    Ok(())
}

/// The live display has the terminal; a task's own progress would be too much.
#[derive(Debug)]
struct Silent;

impl Watcher for Silent {
    fn event(&mut self, _: &task::TaskEvent, _: Option<&task::Task>) -> Result<(), Failure> {
        Ok(())
    }
}

impl Text for Summary {
    fn text(&self) -> String {
        let mut text = format!(
            "\nin {:.1} s of load: {} requests, {} errors, {} lost writes, longest wait of a client {:.1} ms\n",
            self.seconds, self.requests, self.errors, self.lost_writes, self.longest_wait_ms
        );
        for s in &self.switchovers {
            text.push_str(&format!(
                "  shard {} to {}: requests held up to {:.1} ms, nobody could write for {:.1} ms\n",
                s.shard, s.to, s.hold_ms, s.critical_ms
            ));
        }
        text.trim_end().to_owned()
    }
}

/// Shows requests a second, errors and the longest wait while the load runs.
#[derive(Debug)]
struct Live {
    bar: ProgressBar,
    on_terminal: bool,
    ticker: tokio::task::JoinHandle<()>,
}

impl Live {
    fn start(load: &Load) -> Self {
        use std::io::IsTerminal;
        let on_terminal = std::io::stderr().is_terminal();
        let bar = if on_terminal {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        let (counters, shown) = (load.counters(), bar.clone());
        let ticker = tokio::spawn(async move {
            let mut ticks = interval(SHOW_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut before = 0;
            // The first tick comes at once.
            ticks.tick().await;
            loop {
                ticks.tick().await;
                let now = counters.requests();
                let text = format!(
                    "{:>8.0} requests/s  {} errors  longest wait {:.1} ms",
                    (now - before) as f64 / SHOW_INTERVAL.as_secs_f64(),
                    counters.errors(),
                    counters.take_longest_wait().as_secs_f64() * 1000.0
                );
                before = now;
                if on_terminal {
                    shown.set_message(text);
                    shown.tick();
                } else {
                    render::note(&text);
                }
            }
        });
        Self {
            bar,
            on_terminal,
            ticker,
        }
    }

    fn say(&self, text: &str) {
        if self.on_terminal {
            self.bar.println(text);
        } else {
            render::note(text);
        }
    }

    async fn stop(self) {
        self.ticker.abort();
        // Aborted on purpose: its result says nothing.
        let _ = self.ticker.await;
        self.bar.finish_and_clear();
    }
}

/// A directory of this run, removed with it.
#[derive(Debug)]
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> anyhow::Result<Self> {
        let dir: &Path = &std::env::temp_dir();
        // The last digits of a v7 id are random; the name is short, as unix sockets need it.
        let id = uuid::Uuid::now_v7().simple().to_string();
        let path = dir.join(format!("slotmesh-{}", &id[id.len() - 8..]));
        std::fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            render::note(&format!("can't remove {}: {error}", self.0.display()));
        }
    }
}
