//! `slotmesh-bench calm`: a long time in which nothing dies, but everything is slow: packets are lost,
//! other programs want the processors, primaries stand still for a while.
//!
//! Invariant: no fault of this run ends, freezes or cuts off anything for longer than a mesh must bear;
//! so every change of a primary that is found at its end is a failover for nothing.

mod clients;
mod nuisance;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use slotmesh_proto::{store::v1::NodeRole, task::v1::EpochChange};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use self::{clients::Seen, nuisance::Nuisance};
use crate::chaos::{
    in_a_network,
    mesh::{Mesh, Shape},
    net::Net,
    places,
};

/// How often it is looked whether a process must be started again, and whether a minute is over.
const TURN: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// A controller that has next to no processor answers within this, or the next look will.
const LOOK_LIMIT: Duration = Duration::from_secs(20);
/// At the end everything must be well, with the processors given back.
const WELL_LIMIT: Duration = Duration::from_secs(120);

/// A busy machine, a bad network and slow engines, for long: nothing may fail over.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How long.
    #[arg(long, default_value_t = 60)]
    pub minutes: u32,
    /// Shards of the instance.
    #[arg(long, default_value_t = 2)]
    pub shards: u32,
    /// Replicas of each shard, one host each.
    #[arg(long, default_value_t = 2)]
    pub replicas: u32,
    /// Replicas that must have a write before it is acknowledged; 0: asynchronous.
    #[arg(long, default_value_t = 0)]
    pub durability: u32,
    /// Clients, each with a request every 50 ms.
    #[arg(long, default_value_t = 20)]
    pub clients: u32,
    /// One packet in so many is lost; 0: none.
    #[arg(long, default_value_t = 100)]
    pub lose_one_in: u32,
    /// Loops that want the processors for themselves, before the mesh, in half of the time.
    #[arg(long, default_value_t = 20)]
    pub loops: u32,
    /// How far the mesh stands back for them, -20 to 19. At 19 it gets less than a hundredth of a
    /// processor: then nothing serves, and no host keeps its right to.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub nice: i32,
    /// For how long a primary stands still, once in two minutes, in seconds; 0: never.
    #[arg(long, default_value_t = 3)]
    pub sleep_seconds: u32,
    /// Where the logs of a failure are kept.
    #[arg(long, default_value = "target/calm-failure")]
    pub keep: PathBuf,
    /// Set by the program itself, within the network that it made: this run's number.
    #[arg(long, hide = true)]
    pub inside: Option<u32>,
}

/// Makes the network, runs, and removes it. Returns whether nothing failed over.
///
/// # Errors
/// When the run itself failed.
pub async fn main(args: Args) -> anyhow::Result<bool> {
    if let Some(run) = args.inside {
        return Box::pin(within(&args, run)).await;
    }
    in_a_network()
}

async fn within(args: &Args, run: u32) -> anyhow::Result<bool> {
    let dir = tempfile::Builder::new().prefix("smc-").tempdir()?;
    let net = Net::of(run, &places())?;
    let shape = Shape {
        shards: args.shards,
        replicas: args.replicas,
        durability: args.durability,
        read_gate: args.durability > 0,
        nice: args.nice,
        ..Shape::default()
    };
    let judged = match Mesh::start(net, dir.path(), &shape).await {
        Ok(mut mesh) => {
            let judged = Box::pin(run_and_judge(args, &mut mesh)).await;
            mesh.stop();
            judged
        }
        Err(error) => Err(error.context("start the mesh")),
    };
    if !matches!(judged, Ok(true)) {
        std::fs::create_dir_all(&args.keep)?;
        let mut copy = std::process::Command::new("cp");
        copy.arg("-r").arg(dir.path()).arg(&args.keep);
        copy.status().context("keep the logs")?;
        say(&format!("logs are in {}", args.keep.display()));
    }
    judged
}

async fn run_and_judge(args: &Args, mesh: &mut Mesh) -> anyhow::Result<bool> {
    let before = mesh.epochs().await?;
    let primaries = primaries(mesh).await?;
    say(&format!("before: {}", shown(&before)));
    let seen = Arc::new(Seen::default());
    let stop = CancellationToken::new();
    let load = {
        let (proxies, seen, stop) = (mesh.proxies.clone(), seen.clone(), stop.clone());
        tokio::spawn(clients::run(proxies, args.clients, seen, stop))
    };
    let mut nuisance = Nuisance::new(args);
    let ran = Box::pin(go_on(args, mesh, &mut nuisance, &seen)).await;
    // Also after an error: nothing of it may outlive the run.
    nuisance.end(mesh);
    stop.cancel();
    load.await?;
    ran?;
    let well = mesh.wait_healthy(WELL_LIMIT).await;
    let after = mesh.epochs().await?;
    let changes: Vec<_> = after.iter().filter(|e| !before.contains(e)).collect();
    say(&format!("after: {}", shown(&after)));
    say(&format!(
        "{} min, durability {}: {}; primaries stood still {} times, {} periods of {} busy loops",
        args.minutes,
        args.durability,
        seen.total().shown(),
        nuisance.slept(),
        nuisance.starved(),
        args.loops,
    ));
    for (error, count) in seen.errors() {
        say(&format!("  {count} x {error}"));
    }
    for change in &changes {
        say(&format!(
            "FALSE FAILOVER: shard {} epoch {}: {} after {} at {}: {}",
            change.shard_id,
            change.epoch,
            change.primary_node_id,
            change.before_node_id,
            change.time,
            change.cause
        ));
    }
    if let Err(error) = &well {
        say(&format!("NOT WELL at the end: {error:#}"));
    }
    let kept = changes.is_empty() && well.is_ok() && self::primaries(mesh).await? == primaries;
    say(if kept {
        "PASS: no primary was changed"
    } else {
        "FAIL"
    });
    Ok(kept)
}

/// Lets the time pass, with all that is wrong in it, and says each minute how it was.
async fn go_on(
    args: &Args,
    mesh: &mut Mesh,
    nuisance: &mut Nuisance,
    seen: &Arc<Seen>,
) -> anyhow::Result<()> {
    nuisance.lose(mesh)?;
    let began = Instant::now();
    let mut turn = interval(TURN);
    turn.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut known = mesh.epochs().await?.len();
    for minute in 1..=args.minutes {
        while began.elapsed() < MINUTE * minute {
            turn.tick().await;
            // As systemd would: a controller that finds no store for long ends.
            for name in mesh.launch_missing()? {
                say(&format!("{name} had ended and was started again"));
            }
            nuisance.turn(mesh, began.elapsed()).await;
        }
        let epochs = match timeout(LOOK_LIMIT, mesh.epochs()).await {
            Ok(Ok(epochs)) => {
                let news = epochs.len().saturating_sub(known);
                known = epochs.len();
                format!("{news} changes of primaries")
            }
            Ok(Err(error)) => format!("epochs can't be seen: {error:#}"),
            Err(_) => "epochs can't be seen in time".to_owned(),
        };
        say(&format!(
            "minute {minute}: {}; {epochs}; {}",
            seen.minute().shown(),
            nuisance.minute()
        ));
    }
    Ok(())
}

/// Which process is the primary of each shard.
async fn primaries(mesh: &Mesh) -> anyhow::Result<BTreeMap<String, (String, u32)>> {
    let shards = mesh.shards().await?;
    let primary = |shard: &slotmesh_proto::instance::v1::Shard| {
        let mut nodes = shard.nodes.iter();
        let node = nodes.find(|n| n.current_role() == NodeRole::Primary)?;
        Some((shard.shard_id.clone(), (node.node_id.clone(), node.pid)))
    };
    Ok(shards.iter().filter_map(primary).collect())
}

fn shown(epochs: &[EpochChange]) -> String {
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for change in epochs {
        let epoch = last.entry(&change.shard_id).or_default();
        *epoch = change.epoch.max(*epoch);
    }
    let each = last
        .iter()
        .map(|(shard, epoch)| format!("shard {shard} epoch {epoch}"));
    format!(
        "{} audited changes: {}",
        epochs.len(),
        each.collect::<Vec<_>>().join(", ")
    )
}

#[allow(clippy::print_stdout)] // The report is what this program is for.
fn say(line: &str) {
    println!("{line}");
}
