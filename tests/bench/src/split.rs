//! `slotmesh-bench split`: a primary is cut off together with a proxy and clients, and the engines
//! themselves say, in their MONITOR streams, which client writes each of them accepted when.
//!
//! Invariant: nobody of ours is asked who was the primary; an engine shows a command there only when
//! it executes it, with the machine's clock, which all of them share.

mod stream;

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use slotmesh_harness::wait_until;
use slotmesh_proto::{instance::v1::Node, store::v1::NodeRole};
use tokio::time::sleep;

use self::stream::Stream;
use crate::chaos::{
    in_a_network, insiders,
    mesh::{HEAL_LIMIT, Mesh, Shape},
    net::Net,
    places,
};

/// From its last contact to the end of a primary's right: a lease of 3 s less a margin of 0.8 s.
const RIGHT: Duration = Duration::from_millis(2_200);
/// A lease, its guard, a promotion; and a machine that has other things to do.
const NEXT_LIMIT: Duration = Duration::from_secs(30);
/// Clients write without a pause longer than this while nothing is wrong.
const WRITES_LIMIT: Duration = Duration::from_secs(20);
/// How long both are listened to after the next primary's first write.
const LISTEN: Duration = Duration::from_secs(1);

/// Flags of `slotmesh-bench split`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Partitions, one after another.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub count: u32,
    /// Pause of a client between two requests, in milliseconds.
    #[arg(long, default_value_t = 5)]
    pub pace_ms: u64,
    /// What a machine that is short of CPU may add to the end of the old primary's right.
    #[arg(long, default_value_t = 0)]
    pub slack_ms: u64,
    /// Set by the program itself, within the network that it made: this run's number.
    #[arg(long, hide = true)]
    pub inside: Option<u32>,
}

/// What the engines said of one partition, in milliseconds since the cut.
#[derive(Debug, Clone, PartialEq)]
struct Split {
    /// Client writes that the old primary accepted since.
    accepted: usize,
    /// The last of them.
    last_old_ms: f64,
    /// The first one that the next primary accepted.
    first_new_ms: f64,
}

impl Split {
    fn is_kept(&self, slack: Duration) -> bool {
        let right_ms = (RIGHT + slack).as_secs_f64() * 1e3;
        self.last_old_ms <= right_ms && self.last_old_ms < self.first_new_ms
    }
}

/// Makes a network, cuts, listens, and removes it. Returns whether no two primaries accepted writes.
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
    let dir = tempfile::Builder::new().prefix("sms-").tempdir()?;
    let net = Net::of(run, &places())?;
    let shape = Shape {
        shards: 1,
        replicas: 2,
        ..Shape::default()
    };
    let mut mesh = Mesh::start(net, dir.path(), &shape)
        .await
        .context("start the mesh")?;
    // One group is inside whatever is cut off.
    let clients = insiders(args.pace_ms, &mesh, dir.path())?;
    let judged = Box::pin(judge(args, &mut mesh)).await;
    for (mut client, _) in clients {
        // They end when their input does.
        drop(client.stdin.take());
        client.wait()?;
    }
    mesh.stop();
    judged
}

async fn judge(args: &Args, mesh: &mut Mesh) -> anyhow::Result<bool> {
    let slack = Duration::from_millis(args.slack_ms);
    let mut kept = true;
    for number in 1..=args.count {
        let split = Box::pin(split(mesh)).await?;
        kept &= split.is_kept(slack);
        say(&format!(
            "{number}: the old primary accepted {} writes since the cut, the last after {:.0} ms; the \
             next one its first after {:.0} ms: {}",
            split.accepted,
            split.last_old_ms,
            split.first_new_ms,
            if split.is_kept(slack) {
                "kept"
            } else {
                "BROKEN"
            }
        ));
    }
    Ok(kept)
}

fn directory(node: &Node) -> anyhow::Result<PathBuf> {
    let link = format!("/proc/{}/cwd", node.pid);
    std::fs::read_link(&link).with_context(|| format!("read {link}"))
}

/// One partition, from the first look to the return of everybody.
async fn split(mesh: &mut Mesh) -> anyhow::Result<Split> {
    mesh.wait_healthy(HEAL_LIMIT).await?;
    let shard = mesh.shards().await?.into_iter().next();
    let nodes = shard.context("the instance has no shard")?.nodes;
    // What comes from a node is replication, not a client's.
    let peers: Vec<String> = nodes.iter().map(|n| n.address.clone()).collect();
    let mut streams = Vec::new();
    for node in &nodes {
        streams.push(Stream::open(directory(node)?, peers.clone()).await?);
    }
    let is_primary = |n: &Node| n.current_role() == NodeRole::Primary;
    let old = nodes.iter().position(is_primary).context("no primary")?;
    let host = &nodes[old].host_id;
    wait_until(WRITES_LIMIT, "a client's write", async || {
        anyhow::ensure!(streams[old].count() > 0, "none was seen");
        anyhow::Ok(())
    })
    .await?;
    let before = SystemTime::now();
    mesh.net().cut(host)?;
    // Until the link is down the others may still write at the old one.
    let after = SystemTime::now();
    let next = wait_until(NEXT_LIMIT, "a write at another primary", async || {
        let others = (0..streams.len()).filter(|n| *n != old);
        let first = others.filter_map(|n| streams[n].first_since(after)).min();
        first.context("no other node accepts any")
    })
    .await?;
    sleep(LISTEN).await;
    mesh.net().heal(host)?;
    mesh.wait_healthy(HEAL_LIMIT).await?;
    // Only now: also what it would have accepted on its return.
    let accepted = streams[old].since(after);
    anyhow::ensure!(
        !accepted.is_empty(),
        "no client inside wrote after the cut, so that nothing was shown"
    );
    let ms = |at: SystemTime| match at.duration_since(before) {
        Ok(since) => since.as_secs_f64() * 1e3,
        Err(early) => -early.duration().as_secs_f64() * 1e3,
    };
    Ok(Split {
        accepted: accepted.len(),
        last_old_ms: accepted.last().map_or(0.0, |at| ms(*at)),
        first_new_ms: ms(next),
    })
}

#[allow(clippy::print_stdout)] // The report is what this program is for.
fn say(line: &str) {
    println!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_too_late_or_beside_another_primarys_is_a_split() {
        let split = |last_old_ms, first_new_ms| Split {
            accepted: 1,
            last_old_ms,
            first_new_ms,
        };
        let none = Duration::ZERO;
        assert!(split(2_200.0, 3_300.0).is_kept(none));
        assert!(!split(2_201.0, 3_300.0).is_kept(none));
        assert!(split(2_201.0, 3_300.0).is_kept(Duration::from_millis(10)));
        assert!(!split(1_000.0, 999.0).is_kept(none));
    }
}
