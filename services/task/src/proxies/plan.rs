//! Whether proxies may be given another process, and which in which order.
//!
//! Invariant: what is refused here is refused before anything is written; what can only be known when a
//! proxy's turn comes is looked at then.

use slotmesh_topology::{
    HostId, Instance, InstanceState, Placement,
    instance::{PROXIES_MAX, WORKERS_MAX},
};

use super::{Change, Changes, Counted, DRAIN_MS_MAX, ProxyPhase, Rebuild};
use crate::{
    admit::{Refusal, RefusalKind, refuse},
    observe::Fleet,
    place::{self, Candidate},
};

/// How long each proxy is watched where nothing else is said: clients of all kinds have come by.
pub const BAKE_MS: u64 = 10_000;
/// A longer one is a pause, which an operator can have.
pub const BAKE_MS_MAX: u64 = 60 * 60 * 1_000;

/// What an operator asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The artifact's name; `None`: a restart.
    pub program: Option<String>,
    /// Which, in this order; empty: all of them.
    pub proxies: Vec<String>,
    /// For how long each is watched.
    pub bake_ms: u64,
    /// In the maintenance window only.
    pub in_window: bool,
    /// On other hosts; of a restart only.
    pub rebuild: Option<Rebuild>,
    /// Workers of each from then on, of a restart only; 0: as before.
    pub workers: u32,
}

/// What would be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Planned {
    /// The task's part.
    pub changes: Changes,
    /// Of a rebuild: where each would go, as things are now.
    pub to_hosts: Vec<HostId>,
    /// What to know before.
    pub remarks: Vec<String>,
    /// All of them run it already.
    pub nothing_to_do: bool,
}

/// What a change of proxies would do.
///
/// # Errors
/// When an option is out of range, a proxy is not of the instance, or none of them could be changed.
pub fn plan(
    instance: &Instance,
    fleet: &Fleet,
    candidates: &[Candidate],
    options: &Options,
    now_ms: u64,
) -> Result<Planned, Refusal> {
    if instance.state != InstanceState::Running {
        return refuse(
            RefusalKind::Precondition,
            "INSTANCE_NOT_RUNNING",
            format!("instance {} is not running", instance.id),
        );
    }
    if options.bake_ms > BAKE_MS_MAX {
        return refuse(
            RefusalKind::Invalid,
            "BAKE_INVALID",
            format!(
                "bake_seconds is at most {}; to decide later yourself, pause the task",
                BAKE_MS_MAX / 1_000
            ),
        );
    }
    if options.workers > WORKERS_MAX {
        let why = format!("workers of a proxy are 1 to {WORKERS_MAX}; 0 leaves them as they are");
        return refuse(RefusalKind::Invalid, "WORKERS_INVALID", why);
    }
    let chosen = chosen(instance, options)?;
    let to_hosts = match &options.rebuild {
        Some(rebuild) => where_to(instance, fleet, candidates, rebuild, &chosen)?,
        None => Vec::new(),
    };
    let changes = Changes {
        program: options.program.clone().unwrap_or_default(),
        restart: options.program.is_none(),
        bake_ms: options.bake_ms,
        in_window: options.in_window,
        rebuild: options.rebuild.clone(),
        workers: options.workers,
        paused: false,
        proxies: chosen
            .iter()
            .map(|p| change(p, fleet, options.program.as_deref(), now_ms))
            .collect(),
    };
    let is_able = |p: &&&Placement| {
        let process = fleet.proxy_processes.get(&p.proxy);
        process.is_none_or(|process| process.program.is_some())
    };
    if options.rebuild.is_none() && chosen.iter().find(is_able).is_none() {
        return refuse(
            RefusalKind::Precondition,
            "AGENTS_TOO_OLD",
            "the agents of these proxies are of a release that hands nothing over; upgrade the \
             agents first",
        );
    }
    Ok(Planned {
        remarks: remarks(&changes, &chosen, instance, fleet),
        to_hosts,
        nothing_to_do: changes.proxies.iter().all(|p| p.phase == ProxyPhase::Done),
        changes,
    })
}

fn chosen<'a>(instance: &'a Instance, options: &Options) -> Result<Vec<&'a Placement>, Refusal> {
    if options.proxies.is_empty() {
        if options.program.is_none() {
            return refuse(
                RefusalKind::Invalid,
                "PROXIES_MISSING",
                "name the proxies that are to be restarted in proxy_instance_ids",
            );
        }
        return Ok(instance.proxies.iter().collect());
    }
    let mut chosen: Vec<&Placement> = Vec::new();
    for id in &options.proxies {
        let Some(placement) = instance.proxies.iter().find(|p| p.proxy.as_str() == id) else {
            return refuse(
                RefusalKind::NotFound,
                "PROXY_NOT_FOUND",
                format!(
                    "proxy {id:?} is not of instance {}; DescribeInstances lists those that are \
                     (slotmesh proxy list)",
                    instance.id
                ),
            );
        };
        if chosen.iter().any(|p| p.proxy == placement.proxy) {
            let why = format!("proxy {id} is named twice");
            return refuse(RefusalKind::Invalid, "PROXY_TWICE", why);
        }
        chosen.push(placement);
    }
    Ok(chosen)
}

fn change(placement: &Placement, fleet: &Fleet, program: Option<&str>, now_ms: u64) -> Change {
    let process = fleet.proxy_processes.get(&placement.proxy);
    let serves = |program: &str| {
        process.is_some_and(|p| p.serves(program, placement.generation))
            && placement.program == program
    };
    let has_it = program.is_some_and(serves);
    Change {
        proxy: placement.proxy.clone(),
        host: placement.host.clone(),
        phase: match has_it {
            true => ProxyPhase::Done,
            false => ProxyPhase::Ready,
        },
        phase_since_ms: now_ms,
        message: match has_it {
            true => "it runs it already".into(),
            false => String::new(),
        },
        from_program: placement.program.clone(),
        from_generation: placement.generation,
        from_workers: placement.workers,
        from_version: process.map(|p| p.version.clone()).unwrap_or_default(),
        to_version: String::new(),
        generation: 0,
        why_back: None,
        on_request: false,
        before: Counted::default(),
        pid: 0,
        handover_us: 0,
        clients: 0,
        finalize: false,
        bake_since_ms: 0,
        successor: None,
    }
}

/// Where each would go, one after the other: the host of the one before is free by then.
fn where_to(
    instance: &Instance,
    fleet: &Fleet,
    candidates: &[Candidate],
    rebuild: &Rebuild,
    chosen: &[&Placement],
) -> Result<Vec<HostId>, Refusal> {
    if rebuild.drain_ms > DRAIN_MS_MAX {
        let why = format!("drain_seconds is at most {}", DRAIN_MS_MAX / 1_000);
        return refuse(RefusalKind::Invalid, "DRAIN_INVALID", why);
    }
    if instance.proxies.len() >= PROXIES_MAX as usize {
        let why = format!(
            "the instance has {PROXIES_MAX} proxies, and a rebuild needs one more for a while"
        );
        return refuse(RefusalKind::Precondition, "TOO_MANY_PROXIES", why);
    }
    let mut taken: Vec<HostId> = instance.proxies.iter().map(|p| p.host.clone()).collect();
    if let Some(host) = &rebuild.host {
        return named(host, &taken, candidates, chosen).map(|()| vec![host.clone()]);
    }
    let mut to_hosts = Vec::with_capacity(chosen.len());
    for placement in chosen {
        let Some(host) = place::proxy(candidates, &taken, &placement.host, &fleet.zones) else {
            return refuse(
                RefusalKind::Precondition,
                "NO_OTHER_HOST",
                format!(
                    "proxy {} is on {}, and every other live host has a proxy of the instance                      already: start an agent on one more host, or restart it where it is",
                    placement.proxy, placement.host
                ),
            );
        };
        if let Some(one) = taken.iter_mut().find(|h| **h == placement.host) {
            one.clone_from(&host);
        }
        to_hosts.push(host);
    }
    Ok(to_hosts)
}

/// Whether a proxy may go to the host that an operator names.
fn named(
    host: &HostId,
    taken: &[HostId],
    candidates: &[Candidate],
    chosen: &[&Placement],
) -> Result<(), Refusal> {
    if chosen.len() > 1 {
        let why = "a host can be named for one proxy; name one, or leave the host out";
        return refuse(RefusalKind::Invalid, "HOST_FOR_ONE", why);
    }
    if chosen.iter().any(|p| p.host == *host) {
        let why =
            format!("it is on {host} already; to have another process there, restart it in place");
        return refuse(RefusalKind::Invalid, "HOST_IS_ITS_OWN", why);
    }
    if taken.contains(host) {
        let why = format!(
            "host {host} has a proxy of the instance already; one host lost would take both"
        );
        return refuse(RefusalKind::Precondition, "HOST_HAS_PROXY", why);
    }
    if !candidates.iter().any(|c| c.host == *host) {
        let why = format!(
            "no agent of host {host} is connected; ListHosts names those that are (slotmesh host list)"
        );
        return refuse(RefusalKind::Precondition, "HOST_NOT_LIVE", why);
    }
    Ok(())
}

/// What an operator should know before.
fn remarks(
    changes: &Changes,
    chosen: &[&Placement],
    instance: &Instance,
    fleet: &Fleet,
) -> Vec<String> {
    let mut said = vec![match &changes.rebuild {
        None => format!(
            "one proxy after the other; each is watched for {} s, and goes back by itself when it is \
             bad, which ends the task",
            changes.bake_ms / 1_000
        ),
        Some(rebuild) => format!(
            "one proxy after the other; its successor has another id and address, and is watched for \
             {} s before clients are sent there: those that asked for it (CLIENT MAINT_NOTIFICATIONS) \
             are told where, all are closed between two commands, and who is left after {} s is closed",
            changes.bake_ms / 1_000,
            rebuild.drain_ms / 1_000
        ),
    }];
    if changes.workers > 0 {
        said.push(format!("each has {} workers from then on", changes.workers));
    }
    for placement in chosen.iter().filter(|_| changes.rebuild.is_none()) {
        let process = fleet.proxy_processes.get(&placement.proxy);
        let why = match process.map(|p| p.program.is_some()) {
            None => "its agent has not reported it",
            Some(false) => "its agent is of a release that hands nothing over",
            Some(true) if !fleet.hosts.contains(&placement.host) => "its agent has no session",
            Some(true) => continue,
        };
        said.push(format!(
            "proxy {} will be skipped unless that changes: {why}",
            placement.proxy
        ));
    }
    if instance.proxies.len() == 1 && changes.rebuild.is_none() {
        said.push(
            "it is the instance's only proxy: clients have no other to go to meanwhile".into(),
        );
    }
    if changes.in_window && instance.maintenance_window.is_empty() {
        said.push("the instance has no maintenance window, so any time is one".into());
    }
    said
}
