//! A proxy anew on another host: a successor beside it, which is watched before clients are sent there.
//!
//! Invariants. Until the drain the old proxy is not touched, so that going back is to take the successor
//! away. The old one is taken away only while its successor serves; where that is lost in the drain and
//! does not come back, a new process takes the old one's place, which may take no more clients.

use slotmesh_topology::{HostId, Leaving, Placement};

use super::{
    Decision, HANDOVER_MS_MAX, OTHERS_MS_MAX, Placed, ProxyPhase, Rebuild, SETTLE_MS_MAX,
    Successor, UNFIT_MS_MAX, View, health, of_the_others,
    write::{advance, end, enter, wait, wait_at_most, with, write},
};
use crate::{
    observe::{ProcessState, ProxyProcess, ProxyView},
    place,
};

/// How long clients of the old proxy are given to go where nothing else is said.
pub const DRAIN_MS: u64 = 600_000;
/// A longer drain is a pause, which an operator can have.
pub const DRAIN_MS_MAX: u64 = 60 * 60 * 1_000;
/// The host of a new proxy may be away, or not be able to start it, for so long: longer than its agent
/// takes to start again, or a controller to lead that knows where programs are.
pub const AWAY_MS_MAX: u64 = 60_000;
/// An old proxy of which neither its host nor itself has said anything for so long has no clients:
/// longer than a stream, or a session, takes to come back.
pub const SILENT_MS_MAX: u64 = 15_000;
/// An old proxy without clients is taken away when it has had the time to hear that it is to take no
/// more, and to report once after that: a client may have come since its last report.
const TOLD_MS: u64 = 2_000;

/// How a successor that is not well is waited for.
const FALTERS: &str = "its successor to be well";
/// The same in the drain.
const LOST: &str = "its successor to serve";

/// Its turn: places the successor.
pub(super) fn begin(view: &View<'_>, placement: &Placement, rebuild: &Rebuild) -> Decision {
    // One that serves nobody takes nothing from the others when it goes.
    if heard(view).is_some()
        && let Some(waits) = of_the_others(view, health::others(view))
    {
        return waits;
    }
    let host = match host(view, placement, rebuild) {
        Ok(host) => host,
        Err(why) => {
            let late = || end(view, ProxyPhase::Skipped, &why);
            return wait_at_most(view, UNFIT_MS_MAX, "a host", &why, late);
        }
    };
    let proxy = view.instance.next_proxy();
    let mut next = Placement::new(proxy.clone(), host.clone()).advanced(&placement.program);
    next.port = port(view).unwrap_or(placement.port);
    next.workers = placement.workers;
    let next = next.with_workers(view.changes.workers);
    let message = format!("proxy {proxy} on {host} is to serve in its place");
    let version = view.process().map(|p| p.version.clone());
    let task = with(view, &message, |part| {
        enter(part, ProxyPhase::Build, view.now_ms);
        part.successor = Some(Successor { proxy, host });
        part.from_program.clone_from(&placement.program);
        part.from_generation = placement.generation;
        part.from_workers = placement.workers;
        part.from_version = version.unwrap_or_default();
        part.before = view.counted();
        (part.pid, part.to_version) = (0, String::new());
    });
    write(task, Placed::Added(next), "Build", message)
}

/// Where the successor goes.
fn host(view: &View<'_>, placement: &Placement, rebuild: &Rebuild) -> Result<HostId, String> {
    let proxies = view.instance.proxies.iter();
    let taken: Vec<HostId> = proxies.map(|p| p.host.clone()).collect();
    match &rebuild.host {
        Some(host) if taken.contains(host) => {
            Err(format!("host {host} has a proxy of the instance already"))
        }
        Some(host) if !view.candidates.iter().any(|c| c.host == *host) => {
            Err(format!("the agent of host {host} has no session"))
        }
        Some(host) => Ok(host.clone()),
        None => {
            let found = place::proxy(view.candidates, &taken, &placement.host, &view.fleet.zones);
            found.ok_or_else(|| "every live host has a proxy of the instance already".into())
        }
    }
}

/// The old proxy's port: clients that are told where to go may keep it.
fn port(view: &View<'_>) -> Option<u16> {
    let seen = view.fleet.proxies.get(&view.part.proxy)?;
    let (_, port) = seen.address.rsplit_once(':')?;
    port.parse().ok()
}

/// The old proxy, while it is heard.
fn heard<'a>(view: &View<'a>) -> Option<&'a ProxyView> {
    let seen = view.fleet.proxies.get(&view.part.proxy);
    seen.filter(|seen| seen.fresh)
}

/// The successor, while the old one is not touched; or how that ends.
fn untouched<'a>(view: &View<'a>) -> Result<(&'a Successor, &'a Placement), Decision> {
    let Some((successor, placed)) = successor(view) else {
        let why = "its successor was taken away";
        return Err(end(view, ProxyPhase::RolledBack, why));
    };
    if view.task.cancel_requested {
        let why = "cancelled before clients were sent there";
        return Err(take_away(view, successor, why, true));
    }
    Ok((successor, placed))
}

/// The successor's agent starts it.
pub(super) fn build(view: &View<'_>) -> Decision {
    let (successor, placed) = match untouched(view) {
        Ok(successor) => successor,
        Err(over) => return over,
    };
    if let Ok(process) = well(view, placed) {
        return advance(view, ProxyPhase::Bake, "its successor serves", |part| {
            part.pid = process.pid;
            part.to_version.clone_from(&process.version);
            part.bake_since_ms = view.now_ms;
        });
    }
    let is_away = !view.fleet.hosts.contains(&successor.host);
    let process = view.process();
    let has_failed = process.is_some_and(|p| p.state == ProcessState::Failed);
    let limit_ms = match is_away || has_failed {
        true => AWAY_MS_MAX,
        false => HANDOVER_MS_MAX,
    };
    let until_ms = view.limit(view.part.phase_since_ms + limit_ms);
    if view.now_ms < until_ms {
        return Decision::Wait { until_ms };
    }
    let why = match is_away {
        true => format!("the agent of host {} has no session", successor.host),
        false => format!(
            "its successor did not serve in time: {}",
            lacks(view, placed)
        ),
    };
    take_away(view, successor, &why, false)
}

/// The successor, while it is placed.
fn successor<'a>(view: &View<'a>) -> Option<(&'a Successor, &'a Placement)> {
    let successor = view.part.successor.as_ref()?;
    let mut placements = view.instance.proxies.iter();
    let placed = placements.find(|p| p.proxy == successor.proxy)?;
    Some((successor, placed))
}

/// What keeps the successor from serving.
fn lacks(view: &View<'_>, placed: &Placement) -> String {
    let Some(process) = view.process() else {
        return "its agent has not reported it".into();
    };
    if process.state != ProcessState::Running {
        return format!("it is {}: {}", process.state.name(), process.error);
    }
    if process.program.is_none() {
        return "its agent is of a release that hands nothing over: upgrade the agent first".into();
    }
    match process.serves(&placed.program, placed.generation) {
        true => view.serves(process.pid).err().unwrap_or_default(),
        false => "its agent has started another program".into(),
    }
}

fn take_away(view: &View<'_>, successor: &Successor, why: &str, on_request: bool) -> Decision {
    let task = with(view, why, |part| {
        enter(part, ProxyPhase::RolledBack, view.now_ms);
        part.on_request = on_request;
    });
    let placed = Placed::Removed(successor.proxy.clone());
    write(task, placed, ProxyPhase::RolledBack.name(), why.to_owned())
}

/// The successor is watched, until it is time to send clients there.
pub(super) fn bake(view: &View<'_>, placement: &Placement) -> Decision {
    let (successor, placed) = match untouched(view) {
        Ok(successor) => successor,
        Err(over) => return over,
    };
    let process = view.process();
    if let Some(why) = process.and_then(|process| health::bad(view, view.part, process)) {
        return take_away(view, successor, &why, false);
    }
    let flaps = |what: &str| {
        let over = view.now_ms >= bake_until(view);
        over.then(|| {
            let why = format!("it was not well for a whole bake in time: {what}");
            take_away(view, successor, &why, false)
        })
    };
    let part = view.part;
    let process = match well(view, placed) {
        Ok(process) => process,
        Err(why) => {
            if let Some(over) = flaps(&why) {
                return over;
            }
            // What all of them have is no fault of the successor.
            let limit_ms = match health::shards(view) {
                Some(_) => OTHERS_MS_MAX,
                None => SETTLE_MS_MAX,
            };
            let late = || take_away(view, successor, &why, false);
            return wait_at_most(view, limit_ms, FALTERS, &why, late);
        }
    };
    if heard(view).is_some()
        && let Some(what) = health::others(view)
    {
        if let Some(over) = flaps(&what) {
            return over;
        }
        let late = || {
            let why = format!("waited too long for {what}");
            take_away(view, successor, &why, false)
        };
        return wait_at_most(view, OTHERS_MS_MAX, "the others", &what, late);
    }
    let until_ms = part.phase_since_ms + view.changes.bake_ms;
    let has_faltered = part.message.starts_with(&format!("waiting for {FALTERS}"));
    if !part.finalize && (has_faltered || view.now_ms < until_ms) {
        if let Some(over) = flaps("it comes and goes") {
            return over;
        }
        if has_faltered {
            let why = "its successor is well again, and watched anew";
            return advance(view, ProxyPhase::Bake, why, |part| {
                if part.bake_since_ms == 0 {
                    part.bake_since_ms = view.now_ms;
                }
            });
        }
        return wait(view, until_ms, "the end of its successor's bake");
    }
    if let Some(opens_ms) = view.opens_ms {
        let words = "waiting for the maintenance window";
        if part.message == words {
            return Decision::Wait { until_ms: opens_ms };
        }
        // Its bake is over; another one, if it falters until then, has a time of its own.
        let task = with(view, words, |part| part.bake_since_ms = 0);
        return write(task, Placed::Same, "Waiting", words.to_owned());
    }
    send_away(view, placement, process.pid, &process.version)
}

/// Until when the successor has to have been well for a whole bake: one wait of the longest kind fits,
/// with a whole bake before and another one after it. Who needs longer comes and goes, and would go on
/// doing so with all the clients.
fn bake_until(view: &View<'_>) -> u64 {
    match view.part.bake_since_ms {
        0 => u64::MAX,
        since_ms => view.limit(since_ms + OTHERS_MS_MAX + 2 * view.changes.bake_ms),
    }
}

/// The successor's process, when it serves.
fn well<'a>(view: &View<'a>, placed: &Placement) -> Result<&'a ProxyProcess, String> {
    let process = view.fleet.proxy_processes.get(&placed.proxy);
    match process.filter(|p| p.serves(&placed.program, placed.generation)) {
        Some(process) => view.serves(process.pid).map(|()| process),
        None => Err(lacks(view, placed)),
    }
}

/// Clients of the old one are sent to the successor.
fn send_away(view: &View<'_>, placement: &Placement, pid: u32, version: &str) -> Decision {
    let endpoint = endpoint(view);
    let drain_ms = view
        .changes
        .rebuild
        .as_ref()
        .map_or(DRAIN_MS, |r| r.drain_ms);
    let next = placement.left_for(&endpoint, view.now_ms + drain_ms);
    let message = format!(
        "its clients are sent to {endpoint}; who is left in {} s is closed",
        drain_ms / 1_000
    );
    let task = with(view, &message, |part| {
        enter(part, ProxyPhase::Drain, view.now_ms);
        (part.pid, part.to_version) = (pid, version.to_owned());
    });
    write(task, Placed::Changed(next), "Drain", message)
}

/// Where the successor serves.
fn endpoint(view: &View<'_>) -> String {
    let seen = view.fleet.proxies.get(view.subject());
    seen.map(|seen| seen.address.clone()).unwrap_or_default()
}

/// Clients of the old one go; it is taken away when none is left, or the time is over.
pub(super) fn drain(view: &View<'_>, placement: &Placement) -> Decision {
    let Some((successor, placed)) = successor(view) else {
        return stay(view, placement, None, "its successor was taken away");
    };
    let part = view.part;
    let (pid, version) = match well(view, placed) {
        Ok(process) => (process.pid, &process.version),
        // A new leader may hear it, with its clients, long before its agent.
        Err(_) if view.process().is_none() && view.serves(part.pid).is_ok() => {
            (part.pid, &part.to_version)
        }
        Err(why) => return lost(view, placement, successor, &why),
    };
    let Some(leaving) = &placement.leaving else {
        // An older leader has dropped it.
        return send_away(view, placement, pid, version);
    };
    if leaving.suspended {
        let why = "its successor serves again: clients are sent there";
        return order(view, placement, (leaving, false), "Drain", why);
    }
    let done = |why: &str| {
        let serves = format!("proxy {} on {}", successor.proxy, successor.host);
        let message = format!("{serves} serves in its place ({why})");
        let task = with(view, &message, |part| {
            enter(part, ProxyPhase::Done, view.now_ms);
        });
        let placed = Placed::Removed(placement.proxy.clone());
        write(task, placed, ProxyPhase::Done.name(), message)
    };
    if view.now_ms >= leaving.until_unix_ms {
        return done("the time to go was over");
    }
    let old = view.fleet.proxy_processes.get(&view.part.proxy);
    let told_ms = view.part.phase_since_ms + TOLD_MS;
    match (heard(view), old.filter(|_| view.has_agent())) {
        (_, Some(old)) if is_down(old) => done("its process has ended"),
        (Some(seen), _) => match seen.clients {
            Some(0) if view.now_ms >= told_ms => done("its clients have gone"),
            Some(0) => Decision::Wait { until_ms: told_ms },
            Some(clients) => {
                // In powers of two, so that few events say it.
                let most = clients.checked_next_power_of_two().unwrap_or(clients);
                wait(
                    view,
                    leaving.until_unix_ms,
                    &format!("its clients to go, {most} or less"),
                )
            }
            None => Decision::Wait {
                until_ms: leaving.until_unix_ms,
            },
        },
        // Its agent says that it runs: its clients may be there, though no controller hears it.
        (None, Some(_)) => wait(
            view,
            leaving.until_unix_ms,
            "its clients to go; it is not heard",
        ),
        (None, None) => {
            let what = "neither it nor its agent is heard";
            let late = || done("neither it nor its agent was heard");
            wait_at_most(view, SILENT_MS_MAX, "a sign of it", what, late)
        }
    }
}

fn is_down(process: &ProxyProcess) -> bool {
    !matches!(
        process.state,
        ProcessState::Running | ProcessState::Starting
    )
}

/// The successor does not serve: it is waited for, but for its process no longer than the old one has
/// time, which closes its clients then whatever is recorded.
fn lost(view: &View<'_>, placement: &Placement, successor: &Successor, why: &str) -> Decision {
    let words = format!("its successor on {} was lost: {why}", successor.host);
    let late = || stay(view, placement, Some(successor), &words);
    let limit_ms = match health::shards(view) {
        Some(_) => OTHERS_MS_MAX,
        None => AWAY_MS_MAX,
    };
    let has_host = view.fleet.hosts.contains(&successor.host);
    let is_missing = !has_host || view.process().is_none_or(is_down);
    let mut leaving = placement.leaving.iter();
    let is_over = leaving.any(|l| view.now_ms >= view.limit(l.until_unix_ms));
    if is_missing && is_over && limit_ms == AWAY_MS_MAX {
        return late();
    }
    // A leader that has just begun has not heard who is there.
    let is_known = view.process().is_some() || view.now_ms >= view.limit(0);
    if is_missing
        && is_known
        && let Some(leaving) = placement.sends_away()
        && is_alone(view, successor)
    {
        let why = format!("waiting for {LOST}: {why}; until then it takes clients");
        return order(view, placement, (leaving, true), "Suspended", &why);
    }
    wait_at_most(view, limit_ms, LOST, why, late)
}

/// Without it and its successor nobody takes clients.
fn is_alone(view: &View<'_>, successor: &Successor) -> bool {
    let others = view.instance.proxies.iter();
    let mut others = others.filter(|p| p.proxy != view.part.proxy && p.proxy != successor.proxy);
    !others.any(|p| p.sends_away().is_none() && health::unwell(view, p).is_none())
}

/// It is told that its clients may stay for now, or are to go after all: in the time that they had.
fn order(
    view: &View<'_>,
    placement: &Placement,
    (leaving, suspended): (&Leaving, bool),
    event: &'static str,
    why: &str,
) -> Decision {
    let leaving = Leaving {
        suspended,
        ..leaving.clone()
    };
    let next = Placement {
        leaving: Some(leaving),
        ..placement.clone()
    };
    let task = with(view, why, |part| {
        enter(part, ProxyPhase::Drain, view.now_ms)
    });
    write(task, Placed::Changed(next), event, why.to_owned())
}

/// The old one is to serve again. Its process may take no more clients, so another one takes over.
fn stay(
    view: &View<'_>,
    placement: &Placement,
    successor: Option<&Successor>,
    why: &str,
) -> Decision {
    let next = placement.reopened();
    let task = with(view, why, |part| {
        enter(part, ProxyPhase::Back, view.now_ms);
        part.why_back = Some(why.to_owned());
        part.generation = next.generation;
        part.from_generation = next.generation;
    });
    let placed = match successor {
        Some(successor) => Placed::Exchanged(next, successor.proxy.clone()),
        None => Placed::Changed(next),
    };
    write(task, placed, "Back", why.to_owned())
}

#[cfg(test)]
#[path = "rebuild_tests.rs"]
mod tests;
