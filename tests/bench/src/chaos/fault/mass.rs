//! All processes of a host at once, and several hosts at once.
//!
//! Invariant: the clients inside of a host's place live on: a fault of theirs would prove nothing.

use std::time::Duration;

use anyhow::Context as _;
use rand::seq::IndexedRandom;
use slotmesh_harness::signals;
use tokio::time::sleep;

use super::super::mesh::{HOSTS, Mesh};

/// What runs in a host's place but for clients and observers.
fn of_host(mesh: &Mesh, host: &str) -> anyhow::Result<Vec<u32>> {
    let place = mesh.net().place(host)?;
    let mut pids = mesh.net().pids(&place.namespace)?;
    let own = std::env::current_exe().context("find the running program")?;
    pids.retain(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|e| e != own));
    Ok(pids)
}

/// SIGKILL of everything on a host: its power fails.
///
/// # Errors
/// When its processes can't be found.
pub(super) async fn kill(mesh: &Mesh, which: usize, lasts: Duration) -> anyhow::Result<()> {
    let (_, host) = mesh.node(which, true).await?;
    for pid in of_host(mesh, &host)? {
        // One of them may have ended with another.
        let _ = signals::kill(pid);
    }
    sleep(lasts).await;
    Ok(())
}

/// SIGSTOP of everything on a host: it is moved to another machine, or swaps.
///
/// # Errors
/// When its processes can't be found.
pub(super) async fn freeze(mesh: &Mesh, which: usize, lasts: Duration) -> anyhow::Result<()> {
    let (_, host) = mesh.node(which, true).await?;
    let pids = of_host(mesh, &host)?;
    for pid in &pids {
        let _ = signals::freeze(*pid);
    }
    sleep(lasts).await;
    for pid in &pids {
        let _ = signals::thaw(*pid);
    }
    Ok(())
}

/// Cuts two of three hosts off.
///
/// # Errors
/// When the kernel refuses.
pub(super) async fn cut_most(mesh: &Mesh, which: usize, lasts: Duration) -> anyhow::Result<()> {
    let spared = HOSTS[which % HOSTS.len()];
    let cut = HOSTS.iter().filter(|h| **h != spared);
    let done = cut.into_iter().try_for_each(|h| mesh.net().cut(h));
    if done.is_ok() {
        sleep(lasts).await;
    }
    let healed = HOSTS.iter().map(|h| mesh.net().heal(h));
    done.and(healed.fold(Ok(()), Result::and))
}

/// SIGTERM of one process of any kind, as at an update of its host.
///
/// # Errors
/// When there is none.
pub(super) async fn terminate(
    mesh: &Mesh,
    pids: &[u32],
    which: usize,
    lasts: Duration,
) -> anyhow::Result<()> {
    let host = HOSTS[which % HOSTS.len()];
    let all: Vec<u32> = of_host(mesh, host)?
        .into_iter()
        .chain(pids.iter().copied())
        .collect();
    let mut random = <rand::rngs::SmallRng as rand::SeedableRng>::seed_from_u64(which as u64);
    signals::terminate(*all.choose(&mut random).context("nothing runs")?)?;
    sleep(lasts).await;
    Ok(())
}
