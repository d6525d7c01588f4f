//! Engines that stand still, can't save, or come back without their data.
//!
//! Invariant: a node is asked as its agent asks it, over its own socket; what it was told ends by
//! itself.

use std::{path::Path, time::Duration};

use slotmesh_harness::signals;
use tokio::time::{Instant, sleep};

use super::{
    super::mesh::{Mesh, dir_of_node},
    disk,
};

/// How often it is looked for a child that saves.
const LOOK: Duration = Duration::from_millis(10);
/// Computes until its time is over.
const SCRIPT: &str = "local function now() local t = redis.call('TIME') return t[1] * 1000 + t[2] / 1000 end \
     local start = now() while now() - start < tonumber(ARGV[1]) do end return 1";

/// Lets a shard's primary sleep in its main thread.
///
/// # Errors
/// When it can't be asked.
pub(super) async fn sleep_within(pid: u32, lasts: Duration) -> anyhow::Result<()> {
    let mut admin = Mesh::admin(pid).await?;
    let mut debug = redis::cmd("DEBUG");
    debug.arg("SLEEP").arg(lasts.as_secs_f32().to_string());
    // It may be killed for it.
    let _: redis::RedisResult<()> = debug.query_async(&mut admin).await;
    Ok(())
}

/// Lets a shard's primary compute in its main thread.
///
/// # Errors
/// When it can't be asked.
pub(super) async fn compute(pid: u32, lasts: Duration) -> anyhow::Result<()> {
    let mut admin = Mesh::admin(pid).await?;
    let mut eval = redis::cmd("EVAL");
    let millis = u64::try_from(lasts.as_millis())?;
    eval.arg(SCRIPT).arg(0).arg(millis);
    let _: redis::RedisResult<()> = eval.query_async(&mut admin).await;
    Ok(())
}

/// No child of a primary that saves lives, while a replica needs all of its data.
///
/// # Errors
/// When the nodes can't be found.
pub(super) async fn break_saves(primary: u32, replica: u32, lasts: Duration) -> anyhow::Result<()> {
    replace_data(replica, disk::wipe)?;
    let mut admin = Mesh::admin(primary).await?;
    let save: redis::RedisResult<()> = redis::cmd("BGSAVE").query_async(&mut admin).await;
    // One may be under way.
    drop(save);
    let end = Instant::now() + lasts;
    while Instant::now() < end {
        for child in children(primary) {
            let _ = signals::kill(child);
        }
        sleep(LOOK).await;
    }
    Ok(())
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let text = text.unwrap_or_default();
    text.split_whitespace().flat_map(str::parse).collect()
}

/// Changes what a node keeps and kills it; its agent starts it again on that.
///
/// # Errors
/// When the files can't be changed; then it goes on.
pub(super) fn replace_data(
    pid: u32,
    change: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let dir = dir_of_node(pid)?;
    // So that it writes nothing meanwhile, and nobody starts another one.
    signals::freeze(pid)?;
    let changed = change(&dir);
    match &changed {
        Ok(()) => signals::kill(pid)?,
        Err(_) => signals::thaw(pid)?,
    }
    changed
}
