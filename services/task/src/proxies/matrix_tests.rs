//! Every write of a change of proxies, with every fault right before or after it: how each run ends.
//!
//! Invariants: a run ends, or waits for an operator who has a choice, in bounded time; one proxy is
//! changed at a time; with a fault at one place all others serve at every moment; at the end each proxy
//! is there once, the old one or its successor, and takes clients.

use super::{
    story::{NAMES, NEW, Story, options},
    *,
};
use crate::spec::State;

/// In model time: the longest waits of two proxies, one after the other.
const RUN_MS_MAX: u64 = 2 * (OTHERS_MS_MAX + 2 * HANDOVER_MS_MAX + UNFIT_MS_MAX);
const TICK_MS: u64 = 1_000;
/// An agent that restarts, and one that is away for longer than anybody waits.
const AWAY_MS: [u64; 2] = [10_000, 20 * 60_000];
const DRAIN_MS: u64 = 60_000;
const SPARES: [&str; 2] = ["host-x", "host-y"];
const HOSTS: [&str; 5] = ["host-a", "host-b", "host-c", "host-x", "host-y"];
/// More writes than any run has, as a guard against one without an end.
const WRITES_MAX: usize = 1_000;
/// For how long one that comes and goes is heard, or not: as long as no bake.
const FLAP_MS: u64 = 6_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Upgrade,
    Restart,
    Rebuild,
    /// Of the instance's only proxy.
    RebuildAlone,
    /// The first one takes no more clients: it could not be opened again, and was left so.
    RestartCold,
}

impl Kind {
    const ALL: [Self; 5] = [
        Self::Upgrade,
        Self::Restart,
        Self::Rebuild,
        Self::RebuildAlone,
        Self::RestartCold,
    ];
}

/// Which of a proxy's two places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// Its own.
    Old,
    /// Its successor's; its own where there is none.
    New,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    /// Before the write: nobody wrote it.
    LeaderBefore,
    /// After the write, before anything was heard of it.
    LeaderAfter,
    /// The agent is away for so long.
    Agent(Place, u64),
    /// The process ends; its agent starts another one.
    Process(Place),
    /// For ever.
    Host(Place),
    /// It is heard, and not, for ever.
    Flaps(Place),
    Cancel,
}

const FAULTS: [Fault; 13] = [
    Fault::LeaderBefore,
    Fault::LeaderAfter,
    Fault::Agent(Place::Old, AWAY_MS[0]),
    Fault::Agent(Place::New, AWAY_MS[0]),
    Fault::Agent(Place::Old, AWAY_MS[1]),
    Fault::Agent(Place::New, AWAY_MS[1]),
    Fault::Process(Place::Old),
    Fault::Process(Place::New),
    Fault::Host(Place::Old),
    Fault::Host(Place::New),
    Fault::Flaps(Place::Old),
    Fault::Flaps(Place::New),
    Fault::Cancel,
];

impl Fault {
    /// Nobody has to notice it.
    fn is_nothing(self) -> bool {
        match self {
            Self::LeaderBefore | Self::LeaderAfter => true,
            Self::Agent(_, ms) => ms == AWAY_MS[0],
            _ => false,
        }
    }

    /// It ends a process that serves, or hides it.
    fn ends_a_process(self) -> bool {
        matches!(self, Self::Process(_) | Self::Host(_) | Self::Flaps(_))
    }
}

struct Run {
    kind: Kind,
    story: Story,
    fault: Option<(usize, Fault)>,
    writes: usize,
    /// A host whose agent returns at this time.
    returns: Option<(&'static str, u64)>,
    /// What nobody hears until the leader has its reports.
    unheard: Option<Fleet>,
    struck: Option<ProxyId>,
    flaps: Option<ProxyId>,
    /// Since when newcomers have nobody.
    closed_ms: Option<u64>,
    began_ms: u64,
}

impl Run {
    fn new(kind: Kind, fault: Option<(usize, Fault)>) -> Self {
        let named = |names: &[&str], rebuild: Option<Rebuild>| Options {
            program: None,
            proxies: names.iter().map(|n| (*n).to_owned()).collect(),
            rebuild,
            ..options()
        };
        let options = match kind {
            Kind::Upgrade => Options {
                proxies: vec!["pa".into(), "pb".into()],
                ..options()
            },
            Kind::Restart | Kind::RestartCold => named(&["pa", "pb"], None),
            Kind::Rebuild | Kind::RebuildAlone => {
                let rebuild = Rebuild {
                    host: None,
                    drain_ms: DRAIN_MS,
                };
                let all = if kind == Kind::Rebuild { 2 } else { 1 };
                named(&NAMES[..all], Some(rebuild))
            }
        };
        let mut story = Story::before();
        match kind {
            Kind::RebuildAlone => {
                story.leave_alone();
                // Its clients take their time.
                story.stays = true;
            }
            Kind::RestartCold => {
                let reopened = story.placement(NAMES[0]).reopened();
                story.instance.proxies[0] = reopened;
                let pid = story.process(NAMES[0]).pid;
                story.left.insert(pid);
                story.deaf = true;
            }
            _ => {}
        }
        for host in SPARES {
            story.stage.fleet.hosts.insert(host.into());
        }
        let planned = story.plan(&options).unwrap();
        story.task.spec = crate::Spec::Proxies(planned.changes);
        Self {
            kind,
            began_ms: story.stage.now_ms,
            story,
            fault,
            writes: 0,
            returns: None,
            unheard: None,
            struck: None,
            flaps: None,
            closed_ms: None,
        }
    }

    /// To its end; says how it ended, or what was broken.
    fn run(mut self) -> Result<(State, usize), String> {
        loop {
            self.write_all()?;
            self.serves()?;
            self.is_open()?;
            if self.is_over()? {
                self.is_whole()?;
                return Ok((self.story.task.state, self.writes));
            }
            if self.story.stage.now_ms > self.began_ms + RUN_MS_MAX {
                return self.broken("it does not end");
            }
            if let Some(heard) = self.unheard.take() {
                self.story.stage.fleet = heard;
            }
            self.story.converge();
            self.story.stage.now_ms += TICK_MS;
            let now_ms = self.story.stage.now_ms;
            let flaps = self.flaps.as_ref();
            if let Some(seen) = flaps.and_then(|p| self.story.stage.fleet.proxies.get_mut(p)) {
                seen.fresh = !(now_ms / FLAP_MS).is_multiple_of(2);
            }
            if let Some((host, _)) = self.returns.take_if(|(_, at_ms)| now_ms >= *at_ms) {
                self.story.away.remove(host);
                self.story.stage.fleet.hosts.insert(host.into());
            }
        }
    }

    fn broken<T>(&self, what: &str) -> Result<T, String> {
        let (phases, events) = (self.story.phases(), &self.story.events);
        Err(format!("{what}: {phases:?} {events:?}"))
    }

    /// All that can be written now, with the fault at its place.
    fn write_all(&mut self) -> Result<(), String> {
        while let Some((proxy, write)) = self.story.decided() {
            let again = self.story.decided();
            if again.is_none_or(|(_, again)| again != write) {
                return self.broken("the same view is decided upon differently");
            }
            let fault = self.fault.filter(|(at, _)| *at == self.writes);
            self.writes += 1;
            if self.writes > WRITES_MAX {
                return self.broken("it does not come to rest");
            }
            match fault {
                Some((_, Fault::LeaderBefore)) => self.depose(),
                Some((_, fault)) => {
                    self.story.commit(proxy.as_str(), write);
                    self.strike(&proxy, fault);
                }
                None => self.story.commit(proxy.as_str(), write),
            }
        }
        self.story.act();
        Ok(())
    }

    /// Another one leads, and has heard nobody yet.
    fn depose(&mut self) {
        let fleet = &mut self.story.stage.fleet;
        self.unheard = Some(fleet.clone());
        fleet.proxy_processes.clear();
        fleet.proxies.clear();
        self.story.since_ms = self.story.stage.now_ms;
    }

    fn strike(&mut self, proxy: &ProxyId, fault: Fault) {
        let at = |place| self.at(proxy, place);
        match fault {
            Fault::LeaderBefore | Fault::LeaderAfter => self.depose(),
            Fault::Cancel => {
                let is_open = self.story.task.is_cancellable();
                self.story.task.cancel_requested |= is_open;
            }
            Fault::Agent(place, ms) => {
                let (_, host) = at(place);
                self.story.away.insert(host);
                self.story.stage.fleet.hosts.remove(&host.into());
                self.returns = Some((host, self.story.stage.now_ms + ms));
            }
            Fault::Process(place) => {
                let (name, _) = at(place);
                self.struck = Some(name.clone());
                let fleet = &mut self.story.stage.fleet;
                fleet.proxies.remove(&name);
                if let Some(process) = fleet.proxy_processes.get_mut(&name) {
                    process.state = ProcessState::Stopped;
                    process.error = "killed".into();
                }
            }
            Fault::Host(place) => {
                let (name, host) = at(place);
                self.struck = Some(name);
                self.story.lose(host);
            }
            Fault::Flaps(place) => self.flaps = Some(at(place).0),
        }
    }

    fn at(&self, proxy: &ProxyId, place: Place) -> (ProxyId, &'static str) {
        let part = self.story.part(proxy.as_str());
        let successor = part.successor.as_ref().filter(|_| place == Place::New);
        let (name, host) = match successor {
            Some(successor) => (successor.proxy.clone(), successor.host.clone()),
            None => (proxy.clone(), part.host.clone()),
        };
        let host = HOSTS.into_iter().find(|h| *h == host.as_str()).unwrap();
        (name, host)
    }

    /// At every moment every proxy serves, itself or by its successor, but for the one that was struck. One
    /// that drains serves the clients that it has: until its successor is given up, newcomers that come
    /// when that one was struck have the others.
    fn serves(&self) -> Result<(), String> {
        let heard = self.heard();
        let runs = |id: &ProxyId| {
            let is_placed = self.story.instance.proxies.iter().any(|p| p.proxy == *id);
            let process = heard.proxy_processes.get(id);
            let is_up = process.is_some_and(|p| p.state == ProcessState::Running);
            is_placed && is_up && heard.proxies.get(id).is_some_and(|p| p.fresh)
        };
        let seats: Vec<bool> = self
            .names()
            .iter()
            .map(|name| {
                let part = self.story.changes().part(&(*name).into());
                let successor = part.and_then(|p| p.successor.as_ref());
                runs(&(*name).into()) || successor.is_some_and(|s| runs(&s.proxy))
            })
            .collect();
        let serving = seats.iter().filter(|serves| **serves).count();
        let strikes = self.fault.is_some_and(|(_, fault)| fault.ends_a_process());
        match serving + usize::from(strikes) >= seats.len() {
            true => Ok(()),
            false => self.broken(&format!("who serves is {seats:?}")),
        }
    }

    /// All that can be heard, also while a new leader has not.
    fn heard(&self) -> &Fleet {
        self.unheard.as_ref().unwrap_or(&self.story.stage.fleet)
    }

    fn names(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::RebuildAlone => &NAMES[..1],
            _ => &NAMES,
        }
    }

    /// Newcomers have a proxy, also when a successor is lost: again as soon as that is known.
    fn is_open(&mut self) -> Result<(), String> {
        let now_ms = self.story.stage.now_ms;
        let heard = self.heard();
        let is_up = |p: &slotmesh_topology::Placement| {
            let process = heard.proxy_processes.get(&p.proxy);
            process.is_some_and(|process| process.state == ProcessState::Running)
                && heard.proxies.contains_key(&p.proxy)
        };
        let mut placed = self.story.instance.proxies.iter();
        let is_open = placed.any(|p| p.sends_away().is_none() && is_up(p));
        let strikes_own = |struck: &ProxyId| NAMES.contains(&struck.as_str());
        let is_over = self.story.task.state.is_ended();
        if is_open || is_over || self.struck.as_ref().is_some_and(strikes_own) {
            self.closed_ms = None;
            return Ok(());
        }
        let since_ms = *self.closed_ms.get_or_insert(now_ms);
        match now_ms - since_ms <= TICK_MS {
            true => Ok(()),
            false => self.broken("newcomers have nobody"),
        }
    }

    /// It has ended, or an operator can say how it goes on.
    fn is_over(&self) -> Result<bool, String> {
        let task = &self.story.task;
        if task.is_parked() || task.state == State::NeedsOperator {
            return match menu(task).is_empty() {
                true => self.broken("nobody can say how it goes on"),
                false => Ok(true),
            };
        }
        Ok(task.state.is_ended())
    }

    /// Each proxy is there once, and none of them sends its clients away.
    fn is_whole(&self) -> Result<(), String> {
        let placed = &self.story.instance.proxies;
        if placed.len() != self.names().len() || placed.iter().any(|p| p.leaving.is_some()) {
            return self.broken(&format!("the instance has {placed:?}"));
        }
        let is_as_asked = |part: &Change| match (part.phase, &part.successor) {
            (ProxyPhase::Done, Some(successor)) => {
                placed.iter().any(|p| p.proxy == successor.proxy)
            }
            (ProxyPhase::Done, None) => {
                let mut own = placed.iter().filter(|p| p.proxy == part.proxy);
                own.any(|p| match self.kind {
                    Kind::Upgrade => p.program == NEW,
                    Kind::Restart => p.generation > 0,
                    Kind::RestartCold => self.takes_clients(p),
                    Kind::Rebuild | Kind::RebuildAlone => false,
                })
            }
            _ => placed.iter().any(|p| p.proxy == part.proxy),
        };
        match self.story.changes().proxies.iter().all(is_as_asked) {
            true => Ok(()),
            false => self.broken(&format!("the instance has {placed:?}")),
        }
    }
}

impl Run {
    /// It has another process than the one that takes no more.
    fn takes_clients(&self, placement: &slotmesh_topology::Placement) -> bool {
        let process = self.heard().proxy_processes.get(&placement.proxy);
        placement.generation > 0 && process.is_some_and(|p| !self.story.left.contains(&p.pid))
    }
}

#[test]
fn every_write_with_every_fault_ends_in_bounded_time_with_everybody_else_serving() {
    let mut broken = Vec::new();
    let mut runs = 0;
    for kind in Kind::ALL {
        let (state, writes) = Run::new(kind, None).run().unwrap();
        assert_eq!(state, State::Done, "{kind:?} without a fault");
        for fault in FAULTS {
            for at in 0..writes {
                runs += 1;
                let what = match Run::new(kind, Some((at, fault))).run() {
                    Err(what) => what,
                    Ok((state, _)) if fault.is_nothing() && state != State::Done => {
                        format!("it ends {state:?}")
                    }
                    Ok(_) => continue,
                };
                broken.push(format!("{kind:?} | write {at} | {fault:?} | {what}"));
            }
        }
    }
    assert!(runs > 300, "only {runs} runs");
    assert!(
        broken.is_empty(),
        "{} of {runs} runs:\n{}",
        broken.len(),
        broken.join("\n")
    );
}
