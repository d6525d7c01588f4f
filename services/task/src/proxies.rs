//! Another process for proxies of an instance, one after the other: from what is recorded and observed,
//! the next act.
//!
//! What a proxy should run stands in its placement, a program and a generation; its agent sees to it by
//! handing the clients over, and says how that went. So there are no steps to ask for: the machine
//! writes placements, looks, and writes them back when the new process is bad.
//!
//! **Invariants.** One proxy is changed at a time, and none while another one of the instance is unwell
//! or a shard does not serve. A proxy that goes back by itself ends the task: no further one begins. No
//! shard is locked and nobody waits for a proxy, so a failover goes on whatever becomes of one.

#[cfg(test)]
mod faltering_tests;
mod health;
#[cfg(test)]
mod matrix_tests;
mod plan;
mod rebuild;
mod said;
mod spec;
#[cfg(test)]
mod story;
#[cfg(test)]
mod wait_tests;
mod write;

pub use health::{COMMANDS_MIN, TROUBLE_MS_MAX};
pub use plan::{BAKE_MS, BAKE_MS_MAX, Options, Planned, plan};
pub use rebuild::{AWAY_MS_MAX, DRAIN_MS, DRAIN_MS_MAX, SILENT_MS_MAX};
pub use said::{menu, resolved, retried};
pub use spec::{Change, Changes, Counted, ProxyPhase, Rebuild, Successor};
pub use write::{Placed, Write, ended};

use slotmesh_topology::{Instance, InstanceState, Placement, ProxyId, Shard};

use self::write::{
    HALTED, advance, end, enter, is_cold, park, turn_back, wait, wait_at_most, with, write,
};
use crate::{
    observe::{Fleet, ProcessState, ProxyProcess},
    place::Candidate,
    schedule,
    spec::Task,
};

/// For how long a proxy may be unfit to be changed when its turn has come: longer than its agent, or it,
/// takes to start again.
pub const UNFIT_MS_MAX: u64 = 60_000;
/// For how long the others, or the shards, are waited for: a failover, or a host that starts again.
pub const OTHERS_MS_MAX: u64 = 600_000;
/// From the placement's change to a new process that serves: fetching a program over a slow line. The
/// hand-over itself has bounds of its own at the agent, which says when it has failed.
pub const HANDOVER_MS_MAX: u64 = 300_000;
/// After its bake a proxy that is not well is given so long: a controller that has just begun to lead
/// has to hear it first.
pub const SETTLE_MS_MAX: u64 = 30_000;

/// The next act.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Nothing to do until something changes or the time comes.
    Wait {
        /// Look again then, whatever happens.
        until_ms: u64,
    },
    /// Write these records together.
    Write(Box<Write>),
}

/// All that the decision about one proxy depends on.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The task.
    pub task: &'a Task,
    /// What is asked for.
    pub changes: &'a Changes,
    /// How far the proxy has come.
    pub part: &'a Change,
    /// Its instance's record.
    pub instance: &'a Instance,
    /// The instance's shards.
    pub shards: &'a [Shard],
    /// What is observed.
    pub fleet: &'a Fleet,
    /// Hosts that could take a proxy.
    pub candidates: &'a [Candidate],
    /// Now.
    pub now_ms: u64,
    /// When the maintenance window opens next; `None`: it is open, or is not waited for.
    pub opens_ms: Option<u64>,
    /// Since when this controller leads: what it has not heard it could not hear before.
    pub since_ms: u64,
}

/// The next act for the proxy.
#[must_use]
pub fn decide(view: View<'_>) -> Decision {
    let part = view.part;
    if part.phase.is_ended() {
        return Decision::Wait { until_ms: u64::MAX };
    }
    if view.instance.state != InstanceState::Running {
        return end(&view, ProxyPhase::Skipped, "the instance is being removed");
    }
    let mut placements = view.instance.proxies.iter();
    let Some(placement) = placements.find(|p| p.proxy == part.proxy) else {
        return end(
            &view,
            ProxyPhase::Skipped,
            "it is not of the instance any more",
        );
    };
    match part.phase {
        ProxyPhase::Ready => ready(&view),
        ProxyPhase::Check => check(&view, placement),
        // Only this task gives placements while it is open; whoever wrote another one knows better.
        _ if part.generation > 0 && !is_ours(part, placement) => {
            let why = "its placement was changed by somebody else";
            end(&view, ProxyPhase::RolledBack, why)
        }
        ProxyPhase::HandOver => hand_over(&view, placement),
        ProxyPhase::Build => rebuild::build(&view),
        ProxyPhase::Bake if view.successor().is_some() => rebuild::bake(&view, placement),
        ProxyPhase::Drain => rebuild::drain(&view, placement),
        ProxyPhase::Bake => bake(&view, placement),
        ProxyPhase::Back => back(&view, placement),
        ProxyPhase::Parked => parked(&view, placement),
        ProxyPhase::Done | ProxyPhase::RolledBack | ProxyPhase::Skipped => {
            Decision::Wait { until_ms: u64::MAX }
        }
    }
}

/// The placement says what this task gave it, or gave it back.
fn is_ours(part: &Change, placement: &Placement) -> bool {
    let is_back = (placement.program.as_str(), placement.generation)
        == (part.from_program.as_str(), part.from_generation);
    is_back || placement.generation == part.generation
}

impl View<'_> {
    /// The proxy that is placed for this one, in phases that are about it.
    fn successor(&self) -> Option<&Successor> {
        let is_its = matches!(
            self.part.phase,
            ProxyPhase::Build | ProxyPhase::Bake | ProxyPhase::Drain
        );
        self.part.successor.as_ref().filter(|_| is_its)
    }

    /// The proxy whose process is new.
    fn subject(&self) -> &ProxyId {
        self.successor().map_or(&self.part.proxy, |s| &s.proxy)
    }

    fn process(&self) -> Option<&ProxyProcess> {
        self.fleet.proxy_processes.get(self.subject())
    }

    /// Its agent has a session.
    fn has_agent(&self) -> bool {
        self.fleet.hosts.contains(&self.part.host)
    }

    /// What the proxy's present process has counted.
    fn counted(&self) -> Counted {
        let seen = self.fleet.proxies.get(&self.part.proxy);
        seen.map_or_else(Counted::default, |p| Counted {
            commands: p.commands,
            errors: p.errors,
        })
    }

    /// A limit, for a leader that has had the time to hear everybody.
    fn limit(&self, at_ms: u64) -> u64 {
        at_ms.max(self.since_ms + SETTLE_MS_MAX)
    }

    /// This process is the one that is heard, and has what it needs.
    fn serves(&self, pid: u32) -> Result<(), String> {
        let seen = self.fleet.proxies.get(self.subject());
        let Some(seen) = seen.filter(|p| p.fresh && p.pid == pid) else {
            return Err("no controller hears its process".into());
        };
        health::behind(self, seen).map_or(Ok(()), Err)
    }
}

/// Before its turn.
fn ready(view: &View<'_>) -> Decision {
    if let Some(ended) = over(view) {
        return ended;
    }
    // What is done before a drain touches nothing that serves.
    let builds_first = view.changes.rebuild.is_some() && view.changes.in_window;
    let time_ms = schedule::time_ms(view.task, &view.instance.maintenance_window);
    if view.now_ms < time_ms && !builds_first {
        return wait(view, time_ms, "its time");
    }
    if let Some(opens_ms) = view.opens_ms.filter(|_| !builds_first) {
        return wait(view, opens_ms, "the maintenance window");
    }
    if view.changes.paused {
        return wait(view, u64::MAX, "an operator to resume");
    }
    let before = view.changes.proxies.iter();
    let mut before = before.take_while(|p| p.proxy != view.part.proxy);
    if let Some(other) = before.find(|p| !p.phase.is_ended()) {
        return wait(view, u64::MAX, &format!("proxy {}", other.proxy));
    }
    advance(view, ProxyPhase::Check, "it is its turn", |_| {})
}

/// Why a proxy that was not changed is not going to be.
fn over(view: &View<'_>) -> Option<Decision> {
    if view.task.cancel_requested {
        return Some(end(
            view,
            ProxyPhase::RolledBack,
            "cancelled before it began",
        ));
    }
    let others = view.changes.proxies.iter();
    let mut others = others.filter(|p| p.proxy != view.part.proxy && !p.on_request);
    let bad =
        others.find(|p| p.phase == ProxyPhase::RolledBack || p.phase == ProxyPhase::Parked)?;
    // Those that follow say why the first one went.
    let why = match bad.message.starts_with(HALTED) {
        true => bad.message.clone(),
        false => format!("{HALTED}proxy {}: {}", bad.proxy, bad.message),
    };
    Some(end(view, ProxyPhase::RolledBack, &why))
}

/// Whether it may be changed now.
fn check(view: &View<'_>, placement: &Placement) -> Decision {
    if let Some(ended) = over(view) {
        return ended;
    }
    let is_rebuild = view.changes.rebuild.is_some();
    if (view.opens_ms.is_some() && !is_rebuild) || view.changes.paused {
        return advance(view, ProxyPhase::Ready, "it waits once more", |_| {});
    }
    if let Some(waits) = of_the_others(view, health::shards(view)) {
        return waits;
    }
    if let Some(rebuild) = &view.changes.rebuild {
        return rebuild::begin(view, placement, rebuild);
    }
    let process = match fit(view) {
        Ok(process) => process,
        Err(why) => {
            let late = || end(view, ProxyPhase::Skipped, &why);
            return wait_at_most(view, UNFIT_MS_MAX, "it to be fit", &why, late);
        }
    };
    let program = match view.changes.restart {
        true => placement.program.as_str(),
        false => view.changes.program.as_str(),
    };
    let has_it = placement.program == program && process.serves(program, placement.generation);
    if has_it && !view.changes.restart {
        return end(view, ProxyPhase::Done, "it runs it already");
    }
    if let Some(waits) = of_the_others(view, health::others(view)) {
        return waits;
    }
    let next = Placement {
        cold: is_cold(view, placement),
        ..placement.advanced(program)
    };
    let next = next.with_workers(view.changes.workers);
    let before = view.counted();
    let task = with(view, "its agent has been told", |part| {
        enter(part, ProxyPhase::HandOver, view.now_ms);
        part.from_program.clone_from(&placement.program);
        part.from_generation = placement.generation;
        part.from_workers = placement.workers;
        part.from_version.clone_from(&process.version);
        part.generation = next.generation;
        part.before = before;
        (part.pid, part.to_version) = (0, String::new());
        (part.handover_us, part.clients) = (0, 0);
    });
    let what = match program {
        "" => "its agent's own program",
        program => program,
    };
    let message = format!("a process of {what} is to take over");
    write(task, Placed::Changed(next), "HandOver", message)
}

/// Waits for what is not this proxy's own, for longer than for that.
fn of_the_others(view: &View<'_>, what: Option<String>) -> Option<Decision> {
    let what = what?;
    let late = || {
        let why = format!("waited too long for {what}");
        end(view, ProxyPhase::RolledBack, &why)
    };
    let kind = "the others";
    Some(wait_at_most(view, OTHERS_MS_MAX, kind, &what, late))
}

/// Its process, when its agent can do what is asked for.
fn fit<'a>(view: &View<'a>) -> Result<&'a ProxyProcess, String> {
    if !view.has_agent() {
        return Err(format!(
            "the agent of host {} has no session",
            view.part.host
        ));
    }
    let process = view.fleet.proxy_processes.get(&view.part.proxy);
    let process = process.ok_or("its agent has not reported it")?;
    if process.state != ProcessState::Running {
        return Err(format!("it is {}: {}", process.state.name(), process.error));
    }
    if process.handover.as_ref().is_some_and(|h| h.is_under_way) {
        return Err("it hands over to another process already".into());
    }
    if process.program.is_none() {
        return Err(
            "its agent is of a release that hands nothing over: upgrade the agent first".into(),
        );
    }
    // One that serves nobody any more is what a restart is for.
    if !view.changes.restart {
        view.serves(process.pid)?;
    }
    Ok(process)
}

/// Its agent fetches the program, and the new process takes over.
fn hand_over(view: &View<'_>, placement: &Placement) -> Decision {
    if view.task.cancel_requested {
        return turn_back(view, placement, "an operator wants it undone", true);
    }
    let part = view.part;
    let program = view.changes.program(part);
    let is_ours = |p: &&ProxyProcess| p.serves(program, part.generation);
    if let Some(process) = view.process().filter(is_ours)
        && view.serves(process.pid).is_ok()
    {
        return advance(view, ProxyPhase::Bake, "the new process serves", |part| {
            part.pid = process.pid;
            note(part, process);
        });
    }
    if let Some(why) = failed(view, program, part.generation) {
        return turn_back(view, placement, &why, false);
    }
    let until_ms = view.limit(part.phase_since_ms + HANDOVER_MS_MAX);
    if view.now_ms >= until_ms {
        let why = match view.has_agent() {
            true => "the new process did not serve in time",
            false => "its agent has not been heard of since it was told",
        };
        return turn_back(view, placement, why, false);
    }
    Decision::Wait { until_ms }
}

/// Why its agent has given this hand-over up.
fn failed(view: &View<'_>, program: &str, generation: u64) -> Option<String> {
    let handover = view.process()?.handover.as_ref()?;
    let is_it = handover.generation == generation && handover.program == program;
    let why = handover.failed.as_ref().filter(|_| is_it)?;
    Some(format!("its agent could not hand over: {why}"))
}

/// The new process is watched.
fn bake(view: &View<'_>, placement: &Placement) -> Decision {
    if view.task.cancel_requested {
        return turn_back(view, placement, "an operator wants it undone", true);
    }
    let part = view.part;
    let program = view.changes.program(part);
    if let Some(why) = failed(view, program, part.generation) {
        return turn_back(view, placement, &why, false);
    }
    let process = view.process();
    if let Some(why) = process.and_then(|process| health::bad(view, part, process)) {
        return turn_back(view, placement, &why, false);
    }
    let is_ours = |p: &&ProxyProcess| p.serves(program, part.generation);
    let well = match process.filter(is_ours) {
        Some(process) => view.serves(process.pid).map(|()| process),
        None => Err("its agent has not reported it".into()),
    };
    let until_ms = part.phase_since_ms + view.changes.bake_ms;
    match well {
        Ok(process) if part.finalize || view.now_ms >= until_ms => {
            let message = format!("it runs {}", named(program, &process.version));
            // Some clients come after the first ones are served, and a version has to be asked for.
            advance(view, ProxyPhase::Done, &message, |part| note(part, process))
        }
        Ok(_) => Decision::Wait { until_ms },
        Err(why) => {
            // What all of them have is no fault of its new process.
            let limit_ms = match health::shards(view) {
                Some(_) => OTHERS_MS_MAX,
                None => SETTLE_MS_MAX,
            };
            let until_ms = view.limit(until_ms + limit_ms);
            match view.now_ms >= until_ms {
                true => turn_back(view, placement, &why, false),
                false => Decision::Wait { until_ms },
            }
        }
    }
}

/// What the new process says of itself, and its agent of how it came to serve.
fn note(part: &mut Change, process: &ProxyProcess) {
    part.to_version.clone_from(&process.version);
    let handover = process.handover.as_ref();
    if let Some(handover) = handover.filter(|h| h.generation == part.generation) {
        part.handover_us = handover.took_us;
        part.clients = handover.clients;
    }
}

fn named(program: &str, version: &str) -> String {
    match program {
        "" => format!("its agent's own program {version}")
            .trim_end()
            .to_owned(),
        program => program.to_owned(),
    }
}

/// Its agent gives the clients back.
fn back(view: &View<'_>, placement: &Placement) -> Decision {
    let part = view.part;
    let why = part.why_back.as_deref().unwrap_or_default();
    if part.generation == 0 {
        // An operator has it tried once more.
        let next = Placement {
            cold: is_cold(view, placement),
            ..placement.advanced(&part.from_program)
        };
        let task = with(view, why, |part| {
            part.from_generation = next.generation;
            part.generation = next.generation;
        });
        let message = "it goes back once more".to_owned();
        return write(task, Placed::Changed(next), "Back", message);
    }
    let is_back = |p: &&ProxyProcess| {
        let is_under_way = p.handover.as_ref().is_some_and(|h| h.is_under_way);
        p.serves(&part.from_program, part.from_generation) && !is_under_way
    };
    let until_ms = view.limit(part.phase_since_ms + HANDOVER_MS_MAX);
    let is_late = view.now_ms >= until_ms;
    // Its agent says so; that it is heard, too, may take longer than it matters.
    if let Some(process) = view.process().filter(is_back)
        && (is_late || view.serves(process.pid).is_ok())
    {
        return end(view, ProxyPhase::RolledBack, why);
    }
    if let Some(failed) = failed(view, &part.from_program, part.from_generation) {
        return park(
            view,
            &format!("it could not go back: {failed}; it went because {why}"),
        );
    }
    match (is_late, view.has_agent()) {
        (false, _) => Decision::Wait { until_ms },
        // What the placement says happens whenever its agent comes back.
        (true, false) => {
            let why = format!("{why}; its agent is away, and will give it back when it returns");
            end(view, ProxyPhase::RolledBack, &why)
        }
        (true, true) => park(
            view,
            &format!("it did not go back in time; it went because {why}"),
        ),
    }
}

/// An operator may leave it as it is.
fn parked(view: &View<'_>, placement: &Placement) -> Decision {
    if !view.part.finalize {
        return Decision::Wait { until_ms: u64::MAX };
    }
    // What runs may take no more clients where the record lets it be ended: whoever changes the proxy
    // next has to know.
    let process = view.process().filter(|_| !is_cold(view, placement));
    let process = process.filter(|p| p.state == ProcessState::Running);
    let running = process.and_then(|p| Some((p.program.clone()?, p.generation)));
    let next = running.map(|(program, generation)| {
        let is_before = generation == view.part.from_generation;
        let returned = placement.returned(&program, generation);
        returned.with_workers(if is_before { 0 } else { view.changes.workers })
    });
    let task = with(view, "left as it is by an operator", |part| {
        enter(part, ProxyPhase::RolledBack, view.now_ms);
    });
    let placed = next.map_or(Placed::Same, Placed::Changed);
    write(task, placed, "Ended", "left as it is by an operator".into())
}

#[cfg(test)]
#[path = "proxies_tests.rs"]
mod tests;
