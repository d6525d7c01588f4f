//! Load that judges itself: clients that append unique ids, and witnesses that count.
//!
//! Invariant: every request's answer is looked at, and what is there in the end is exactly what was
//! acknowledged, once each and in order.

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context, ensure};
use slotmesh_harness::Mesh;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{Witnesses, connect};

/// What a client waits for in one piece, at most: a hold of 100 ms on a machine that is not free.
pub const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// Lists of each writer; in a cluster they are in different shards.
const LISTS: u32 = 7;
const WRITERS: usize = 4;
/// Witnesses on each proxy.
const WITNESSES: usize = 2;
/// Fewer writes of a writer than that show nothing.
const WRITES_MIN: usize = 20;

/// A client that appends unique ids to lists of its own, and counts what was acknowledged.
#[derive(Debug)]
struct Writer {
    stop: CancellationToken,
    work: JoinHandle<anyhow::Result<Vec<u32>>>,
    lists: String,
    address: String,
}

impl Writer {
    async fn start(proxies: &[String], group: u32, number: usize) -> anyhow::Result<Self> {
        let address = proxies[number % proxies.len()].clone();
        let mut connection = connect(&address, number % 2 == 1).await?;
        let lists = format!("ids:{group}:{number}");
        let own = lists.clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let work = tokio::spawn(async move {
            let mut acknowledged = vec![];
            for id in 0.. {
                if stopped.is_cancelled() {
                    break;
                }
                let mut push = redis::cmd("RPUSH");
                push.arg(format!("{own}:{}", id % LISTS)).arg(id);
                let answer: redis::RedisResult<u32> = push.query_async(&mut connection).await;
                answer.with_context(|| format!("{id} to {own}"))?;
                acknowledged.push(id);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(acknowledged)
        });
        Ok(Self {
            stop,
            work,
            lists,
            address,
        })
    }

    /// How many were written; what is there is what was acknowledged, once each and in order.
    async fn audit(self) -> anyhow::Result<usize> {
        self.stop.cancel();
        let acknowledged = self.work.await??;
        let mut connection = connect(&self.address, false).await?;
        for list in 0..LISTS {
            let key = format!("{}:{list}", self.lists);
            let mut range = redis::cmd("LRANGE");
            range.arg(&key).arg(0).arg(-1);
            let found: Vec<u32> = range.query_async(&mut connection).await?;
            let ids = acknowledged.iter().copied();
            let wanted: Vec<u32> = ids.filter(|id| id % LISTS == list).collect();
            ensure!(
                found == wanted,
                "{key} has {found:?}, acknowledged were {wanted:?}"
            );
        }
        Ok(acknowledged.len())
    }
}

/// Writers and witnesses on every proxy, from a test's beginning to its end.
#[derive(Debug)]
pub struct Load {
    witnesses: Witnesses,
    writers: Vec<Writer>,
}

impl Load {
    /// Starts it.
    ///
    /// # Errors
    /// When a client can't connect.
    pub async fn start(mesh: &Mesh) -> anyhow::Result<Self> {
        // There may be several in the life of a mesh, each with lists of its own.
        static GROUPS: AtomicU32 = AtomicU32::new(0);
        let group = GROUPS.fetch_add(1, Relaxed);
        let proxies = &mesh.contract.proxies;
        let witnesses = Witnesses::start(proxies, WITNESSES).await?;
        let mut writers = vec![];
        for number in 0..WRITERS {
            writers.push(Writer::start(proxies, group, number).await?);
        }
        Ok(Self { witnesses, writers })
    }

    /// Ends it, and says how many writes there were.
    ///
    /// # Errors
    /// When a client saw an error or waited for longer than [`LONGEST_WAIT`], when an acknowledged
    /// write is not there, or not once, and when there was hardly any load.
    pub async fn audit(self) -> anyhow::Result<usize> {
        let mut all = 0;
        for writer in self.writers {
            let written = writer.audit().await?;
            ensure!(written > WRITES_MIN, "hardly any load: {written}");
            all += written;
        }
        for seen in self.witnesses.testify().await? {
            ensure!(seen.longest < LONGEST_WAIT, "{seen:?}");
        }
        Ok(all)
    }
}
