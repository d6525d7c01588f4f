//! Bringing an instance to life and removing it: what is still missing, and the next record.

use slotmesh_topology::{Instance, InstanceState, Mode, Placement, Shard};

use crate::observe::{Fleet, NodeView, ProcessState};

/// How long an instance may take to serve before an operator is asked.
pub const PROVISION_MS_MAX: u64 = 120_000;
/// How long the removal of its processes may take.
pub const DECOMMISSION_MS_MAX: u64 = 120_000;

/// The next act of a provision or decommission task.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Nothing to do until something changes; for what, to tell the operator.
    Wait(String),
    /// Write this record: the shard's first epoch begins.
    Begin(Box<Shard>),
    /// Everything serves: mark the instance running, end the task.
    Serve,
    /// Everything is gone: delete the records, end the task.
    Forget,
    /// It took too long; tell the operator what is missing.
    GiveUp(String),
}

/// The next act to bring the instance up.
#[must_use]
pub fn provision(
    instance: &Instance,
    shards: &[Shard],
    fleet: &Fleet,
    deadline_ms: u64,
    now_ms: u64,
) -> Decision {
    for shard in shards.iter().filter(|s| s.mode == Mode::Provisioning) {
        if let Some(begun) = begin(shard, fleet) {
            return Decision::Begin(Box::new(begun));
        }
    }
    match missing(instance, shards, fleet) {
        None => Decision::Serve,
        Some(what) if now_ms >= deadline_ms => Decision::GiveUp(what),
        Some(what) => Decision::Wait(what),
    }
}

/// The shard with all its processes named, once all of them run.
fn begin(shard: &Shard, fleet: &Fleet) -> Option<Shard> {
    let mut next = shard.begin().ok()?;
    for member in &mut next.members {
        let seen = fleet.node(&member.node)?;
        if seen.state != ProcessState::Running || seen.run_id.is_empty() || seen.loading {
            return None;
        }
        seen.run_id.clone_into(&mut member.run_id);
        seen.address.clone_into(&mut member.address);
    }
    Some(next)
}

fn missing(instance: &Instance, shards: &[Shard], fleet: &Fleet) -> Option<String> {
    for shard in shards {
        for member in &shard.members {
            let Some(seen) = fleet.node(&member.node) else {
                return Some(format!("node {} on {}", member.node, member.host));
            };
            if seen.state != ProcessState::Running {
                let state = seen.state.name();
                return Some(format!("node {} ({state}: {})", member.node, seen.error));
            }
        }
        if fleet
            .node(&shard.primary)
            .is_none_or(|n| n.granted_epoch != shard.epoch)
        {
            return Some(format!("the grant on {}", shard.primary));
        }
        if let Some(behind) = shard
            .members
            .iter()
            .find(|m| m.node != shard.primary && !m.in_sync)
        {
            return Some(format!("{} to follow {}", behind.node, shard.primary));
        }
    }
    for Placement { proxy, host, .. } in &instance.proxies {
        let Some(seen) = fleet.proxies.get(proxy).filter(|p| p.fresh) else {
            let error = fleet
                .proxy_processes
                .get(proxy)
                .map_or("", |process| process.error.as_str());
            return Some(format!("proxy {proxy} on {host} {error}"));
        };
        if shards
            .iter()
            .any(|s| seen.shards.get(&s.id).is_none_or(|(e, ..)| *e < s.epoch))
        {
            return Some(format!("proxy {proxy} to apply the topology"));
        }
    }
    None
}

/// The next act to remove the instance. Processes on hosts without an agent can't be removed now;
/// their agent removes them when it comes back, as long as the records exist.
#[must_use]
pub fn decommission(
    instance: &Instance,
    shards: &[Shard],
    fleet: &Fleet,
    deadline_ms: u64,
    now_ms: u64,
) -> Decision {
    debug_assert_eq!(instance.state, InstanceState::Deleting);
    let node = shards.iter().flat_map(|s| &s.members).find(|m| {
        fleet
            .node(&m.node)
            .is_none_or(|n| n.state != ProcessState::Removed)
    });
    // Of a host that never came back nothing is waited for: its data had been given up before.
    let gone = shards.iter().flat_map(|s| &s.roster.gone).find(|gone| {
        let is_removed = |n: &NodeView| n.state == ProcessState::Removed;
        fleet.hosts.contains(&gone.host) && !fleet.node(&gone.node).is_some_and(is_removed)
    });
    let is_there = |p: &&Placement| {
        let process = fleet.proxy_processes.get(&p.proxy);
        process.is_none_or(|process| process.state != ProcessState::Removed)
    };
    let mut gone_proxies = instance.gone_proxies.iter();
    let gone_proxy = gone_proxies.find(|p| fleet.hosts.contains(&p.host) && is_there(p));
    let proxy = instance.proxies.iter().find(is_there).or(gone_proxy);
    let what = match (proxy, node) {
        (Some(p), _) => format!("proxy {} on {} to be removed", p.proxy, p.host),
        (None, Some(member)) => format!("node {} on {} to be removed", member.node, member.host),
        (None, None) => match gone {
            Some(gone) => format!("node {} on {} to be removed", gone.node, gone.host),
            None => return Decision::Forget,
        },
    };
    if now_ms >= deadline_ms {
        Decision::GiveUp(what)
    } else {
        Decision::Wait(what)
    }
}
