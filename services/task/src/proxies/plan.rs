//! Whether proxies may be given another process, and which in which order.
//!
//! Invariant: what is refused here is refused before anything is written; what can only be known when a
//! proxy's turn comes is looked at then.

use slotmesh_topology::{Instance, InstanceState, Placement};

use super::{Change, Changes, Counted, ProxyPhase};
use crate::{
    admit::{Refusal, RefusalKind, refuse},
    observe::Fleet,
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
}

/// What would be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Planned {
    /// The task's part.
    pub changes: Changes,
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
    let chosen = chosen(instance, options)?;
    let changes = Changes {
        program: options.program.clone().unwrap_or_default(),
        restart: options.program.is_none(),
        bake_ms: options.bake_ms,
        in_window: options.in_window,
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
    if chosen.iter().find(is_able).is_none() {
        return refuse(
            RefusalKind::Precondition,
            "AGENTS_TOO_OLD",
            "the agents of these proxies are of a release that hands nothing over; upgrade the \
             agents first",
        );
    }
    Ok(Planned {
        remarks: remarks(&changes, &chosen, instance, fleet),
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
    }
}

/// What an operator should know before.
fn remarks(
    changes: &Changes,
    chosen: &[&Placement],
    instance: &Instance,
    fleet: &Fleet,
) -> Vec<String> {
    let mut said = vec![format!(
        "one proxy after the other; each is watched for {} s, and goes back by itself when it is bad, \
         which ends the task",
        changes.bake_ms / 1_000
    )];
    for placement in chosen {
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
    if instance.proxies.len() == 1 {
        said.push(
            "it is the instance's only proxy: clients have no other to go to meanwhile".into(),
        );
    }
    if changes.in_window && instance.maintenance_window.is_empty() {
        said.push("the instance has no maintenance window, so any time is one".into());
    }
    said
}
