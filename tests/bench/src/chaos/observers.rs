//! Whoever watches a run from beside it: the nodes' monitors, the proxies' topologies, an audience of
//! published messages; and their part of the verdict.
//!
//! Invariant: all of them watch before the first fault and until everything is well after the last.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use slotmesh_harness::wait_until;
use slotmesh_topology::Slot;
use tokio::sync::Mutex;

use super::{
    check::{Checked, Finals, Finding},
    history::{Kind, Outcome, Record},
    hold,
    losses::{self, Known},
    mesh::{HOSTS, Mesh},
    monitor::{Monitors, Seen},
    pubsub::{self, Audience},
    timeline::Timeline,
    topology::{self, Proxies, Watch},
};

/// Until every node is watched.
const ATTACH_LIMIT: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub(super) struct Observers {
    monitors: Monitors,
    topologies: Watch,
    audience: Audience,
}

/// What they saw.
#[derive(Debug)]
pub(super) struct Observed {
    seen: Seen,
    proxies: Proxies,
    channels: Vec<pubsub::Channel>,
    tails: Vec<losses::Tail>,
    newest: BTreeMap<String, u64>,
    /// First and last slot, and whose they are.
    slots: Vec<(u32, u32, String)>,
}

impl Observers {
    /// Watches a mesh that serves.
    ///
    /// # Errors
    /// When a node can't be monitored, or a channel not be subscribed to.
    pub(super) async fn start(mesh: &Mesh) -> anyhow::Result<Self> {
        let mut hosts = Vec::new();
        for host in HOSTS {
            let ip = mesh.net().place(host)?.ip.clone();
            hosts.push((mesh.dir_of(host).join("d"), ip));
        }
        let monitors = Monitors::start(hosts.iter().map(|(dir, _)| dir.clone()).collect());
        let shards = mesh.shards().await?;
        let nodes: usize = shards.iter().map(|s| s.nodes.len()).sum();
        // Shared: the condition is asked again and again.
        let monitors = Arc::new(Mutex::new(monitors));
        wait_until(ATTACH_LIMIT, "every node to be monitored", async || {
            let attached = monitors.lock().await.attached();
            anyhow::ensure!(attached >= nodes, "{attached} of {nodes} are");
            Ok(())
        })
        .await?;
        let monitors = Arc::into_inner(monitors).context("the monitors are in use")?;
        let monitors = monitors.into_inner();
        monitors.load_begins();
        Ok(Self {
            monitors,
            topologies: Watch::start(hosts),
            audience: Audience::start(&mesh.proxies).await?,
        })
    }

    /// Ends, once the load has, and reads what was captured of lost primaries.
    ///
    /// # Errors
    /// When an observer died, or a file of lost writes can't be read.
    pub(super) async fn end(self, mesh: &Mesh) -> anyhow::Result<Observed> {
        let channels = self.audience.end().await;
        let seen = self.monitors.end().await?;
        let proxies = self.topologies.end().await?;
        let mut api = mesh.api().await?;
        let tails = losses::tails(&mut api, &mesh.instance).await?;
        let shards = mesh.shards().await?;
        let mut slots = Vec::new();
        for shard in &shards {
            let of = shard.slots.iter();
            slots.extend(of.map(|r| (r.first, r.last, shard.shard_id.clone())));
        }
        let newest = shards.into_iter().map(|s| (s.shard_id, s.epoch));
        Ok(Observed {
            seen,
            proxies,
            channels,
            tails,
            newest: newest.collect(),
            slots,
        })
    }
}

/// Write commands that clients know to have been executed.
fn acked(records: &[Record]) -> u64 {
    let acked = records.iter().filter(|r| r.outcome == Outcome::Acked);
    let commands = |record: &Record| match record.kind {
        Kind::Get => 0,
        Kind::Block => 2,
        _ => 1,
    };
    acked.map(commands).sum()
}

impl Observed {
    /// C5, C7, C8, C9 and C10.
    pub(super) fn judge(
        &self,
        records: &[Record],
        finals: &Finals,
        timeline: &Timeline,
        durable: bool,
    ) -> (Vec<Finding>, Vec<Checked>) {
        let known = Known {
            finals,
            tails: &self.tails,
            lives: &self.seen.lives,
            durable,
        };
        let (mut findings, mut checked) = (Vec::new(), Vec::new());
        let mut timeline = timeline.clone();
        let changes = topology::changes(&self.proxies);
        let in_peace = changes
            .iter()
            .filter(|(first, last)| timeline.moved(*first, *last));
        let in_peace = in_peace.count();
        if in_peace > 0 {
            findings.push(Finding {
                check: "C8 changes of primaries in peace",
                broken: false,
                what: format!("{in_peace} of {}", changes.len()),
                count: in_peace,
            });
        }
        let acked = acked(records)
            + self
                .channels
                .iter()
                .map(pubsub::Channel::acked)
                .sum::<u64>();
        for (found, of) in [
            self.seen.judge(acked),
            topology::judge(&self.proxies, &self.seen.routed, &self.newest),
            pubsub::judge(&self.channels, &timeline),
            losses::judge(records, known, |key| self.shard_of(key)),
            hold::judge(records, finals, &timeline, durable, |key| {
                self.shard_of(key)
            }),
        ] {
            findings.extend(found);
            checked.push(of);
        }
        (findings, checked)
    }

    fn shard_of(&self, key: &str) -> String {
        let slot = u32::from(Slot::of(key.as_bytes()).number());
        let of = |(first, last, _): &&(u32, u32, String)| (*first..=*last).contains(&slot);
        let found = self.slots.iter().find(of);
        found.map(|(_, _, shard)| shard.clone()).unwrap_or_default()
    }

    /// Keeps the last lines of every node, what subscribers missed, and when which fault was on.
    ///
    /// # Errors
    /// When they can't be written.
    pub(super) fn save(&self, dir: &Path, timeline: &Timeline) -> anyhow::Result<()> {
        self.seen.save(&dir.join("monitor"))?;
        let mut lines: Vec<String> = timeline
            .windows()
            .iter()
            .map(|w| format!("{w:?}"))
            .collect();
        lines.extend(self.channels.iter().flat_map(pubsub::Channel::gaps));
        std::fs::write(dir.join("messages.txt"), lines.join("\n")).context("keep what was missed")
    }
}
