//! Acts of the plan: what befalls processes, hosts, the store and the network, and what operators do.
//!
//! Invariant: once the accidents are over nothing more goes wrong.

use std::collections::VecDeque;

use rand::Rng;
use slotmesh_task::{Choice, failover::is_parked};

use super::{OPERATOR, World, has_menu, is_upgrade};
use crate::{
    controller::Ask,
    ctx::Event,
    msg::{Party, Timer},
    net::Weather,
    plan::{self, Kept, Profile, Script},
    proxy::Proxy,
    sched::{MS, Micros, SEC},
    variant::Variant,
};

impl World {
    pub(super) fn act(&mut self, script: Script) {
        let is_start = matches!(
            script,
            Script::Start(..)
                | Script::End(..)
                | Script::Discard(_)
                | Script::Restart(_)
                | Script::Kill(..)
                | Script::Name(..)
                | Script::Remove(_)
                | Script::AcceptLoss
        );
        if self.healed && !is_start && !matches!(script, Script::Mend(_)) {
            return;
        }
        self.ctx.borrow_mut().say(|| format!("plan: {script:?}"));
        match script {
            Script::Start(node, engine) => {
                let mut ctx = self.ctx.borrow_mut();
                self.nodes[node].start(&mut ctx, &engine);
                if ctx.variant == Variant::NotBornFenced {
                    self.nodes[node].unfence();
                }
            }
            Script::Crash(party, down) => self.crash(party, down),
            Script::CrashNode(node, kept) => self.crash_node(node, kept),
            Script::Kill(node, life) => {
                if self.ctx.borrow().life(Party::Node(node)) == Some(life) {
                    self.crash_node(node, Kept::All);
                }
            }
            Script::End(node, life, ending) => self.end_process(node, life, ending),
            Script::Discard(node) => {
                self.note_wiped(node);
                self.nodes[node].discard();
            }
            Script::Spoil(host) => drop(self.ctx.borrow_mut().spoiled.insert(host)),
            Script::Newer(shard) => self.write_newer(shard),
            Script::Drain(host, tries) => self.drain(host, tries),
            Script::Name(node, name) => self.nodes[node].name = name,
            Script::Remove(node) => self.remove(node),
            Script::CrashHost(host, kept, down) => {
                for node in self.shape.nodes_of(host) {
                    self.crash_node(node, kept);
                }
                self.crash(Party::Agent(host), down);
                self.crash(Party::Fencer(host), down);
            }
            Script::StallHost(host, time) => {
                self.stall(Party::Agent(host), time);
                self.stall(Party::Fencer(host), time);
                for node in self.shape.nodes_of(host) {
                    self.stall(Party::Node(node), time);
                }
            }
            Script::Restart(party) => self.restart(party),
            Script::Stall(party, time) => self.stall(party, time),
            script => self.act_around(script),
        }
    }

    /// What befalls the store and the network, and what operators do.
    fn act_around(&mut self, script: Script) {
        match script {
            Script::Elect(away) => self.store.elect(&mut self.ctx.borrow_mut(), away),
            Script::Compact => self.store.compact(),
            Script::Lag(controller, time) => {
                let mut ctx = self.ctx.borrow_mut();
                let until = ctx.now() + time;
                self.store.lag(Party::Controller(controller), until);
                // What it has missed may be forgotten by the time it asks for it.
                if ctx.chance(500) {
                    ctx.queue.at(until - 1, Event::Script(Script::Compact));
                }
            }
            Script::Tell(story, shard, number) => self.tell(story, shard, number),
            Script::Cut(pairs, time) => {
                let mut ctx = self.ctx.borrow_mut();
                ctx.net.cuts.extend(pairs.iter().copied());
                let at = ctx.now() + time;
                ctx.trouble(pairs.iter().flat_map(|(a, b)| [*a, *b]), at);
                ctx.queue.at(at, Event::Script(Script::Mend(pairs)));
            }
            Script::Mend(pairs) => {
                let mut ctx = self.ctx.borrow_mut();
                for pair in pairs {
                    ctx.net.cuts.remove(&pair);
                }
                ctx.flush();
            }
            Script::SwitchOver { choice, token } => self.ask(&Ask::SwitchOver { choice, token }),
            Script::Move { choice, token } => self.ask(&Ask::Move { choice, token }),
            Script::Upgrade { choice, token } => self.ask(&Ask::Upgrade { choice, token }),
            Script::Say(choice) => self.ask(&Ask::Choose(choice)),
            Script::Befall(kind, role, fault) => self.befall(kind, role, fault),
            Script::Cancel => self.ask(&Ask::Cancel),
            Script::AcceptLoss => self.accept_loss(),
            Script::Weather(weather) => self.weather(weather),
            Script::Heal => self.heal(),
            _ => {}
        }
    }

    fn weather(&self, weather: Weather) {
        let mut ctx = self.ctx.borrow_mut();
        ctx.net.weather = weather;
        // So bad that leases are lost.
        let slow = weather.spike > 0 && weather.spike_us >= 300 * MS;
        if weather.rpc_loss >= 100 || weather.stream_break > 0 || slow {
            ctx.bad_weather_until = plan::TROUBLE * 2;
        }
    }

    fn heal(&mut self) {
        let mut ctx = self.ctx.borrow_mut();
        ctx.net.weather = Weather::calm();
        ctx.net.cuts.clear();
        ctx.flush();
        ctx.points.clear();
        ctx.spoiled.clear();
        let at = ctx.now() + OPERATOR;
        ctx.queue.at(at, Event::Script(Script::AcceptLoss));
        self.healed = true;
        drop(ctx);
        if self.shape.profile == Profile::Moves {
            self.bring_back();
        }
    }

    /// The last resort of operators, and only where tasks say so; while any is left, again later.
    fn accept_loss(&mut self) {
        if self.tasks().any(|t| has_menu(&t) && t.is_parked()) {
            self.ask(&Ask::Choose(Choice::Retry));
        }
        // Nothing is to be waited for any more.
        if self.tasks().any(|t| is_upgrade(&t) && !t.state.is_ended()) {
            self.ask(&Ask::Choose(Choice::Resume));
            self.ask(&Ask::Choose(Choice::Finalize));
        }
        let parked = self.tasks().any(|t| is_parked(&t));
        if parked {
            self.ctx.borrow_mut().checks.loss_was_accepted = true;
            self.ask(&Ask::Choose(Choice::AcceptLoss));
        }
        let mut ctx = self.ctx.borrow_mut();
        let at = ctx.now() + SEC;
        ctx.queue.at(at, Event::Script(Script::AcceptLoss));
    }

    pub(super) fn stall(&mut self, party: Party, time: Micros) {
        let mut ctx = self.ctx.borrow_mut();
        let until = ctx.now() + time;
        if let Some((old, _)) = self.stalled.get_mut(&party)
            && *old < until
        {
            *old = until;
            ctx.checks.away(party, until);
            ctx.trouble([party], until);
            ctx.timer(party, time, Timer::Wake);
        } else if ctx.life(party).is_some() && !self.stalled.contains_key(&party) {
            self.stalled.insert(party, (until, VecDeque::new()));
            ctx.stopped.insert(party);
            ctx.checks.away(party, until);
            ctx.trouble([party], until);
            ctx.timer(party, time, Timer::Wake);
        }
    }

    pub(super) fn crash_node(&mut self, node: usize, kept: Kept) {
        self.stalled.remove(&Party::Node(node));
        let mut ctx = self.ctx.borrow_mut();
        ctx.stopped.remove(&Party::Node(node));
        let all = self.nodes[node].process.as_ref().map_or(0, |p| p.log.len());
        let kept = match kept {
            Kept::All => all,
            Kept::MostOf => all.saturating_sub(ctx.rng.random_range(1..20)),
            Kept::Nothing => 0,
        };
        self.nodes[node].crash(&mut ctx, kept);
    }

    pub(super) fn ask(&mut self, ask: &Ask) {
        for controller in &mut self.controllers {
            if controller.believes().is_some() {
                controller.asked(ask.clone());
            }
        }
    }

    pub(super) fn crash(&mut self, party: Party, down: Micros) {
        if self.ctx.borrow().life(party).is_none() {
            return;
        }
        self.stalled.remove(&party);
        self.ctx.borrow_mut().stopped.remove(&party);
        match party {
            Party::Controller(i) => self.controllers[i].crash(),
            Party::Agent(i) => self.agents[i].crash(),
            Party::Proxy(i) => {
                let shape = self.shape;
                self.proxies[i] = Proxy::new(i, shape.controllers, shape.durability);
                self.ctx.borrow_mut().died(party);
            }
            Party::Fencer(i) => self.fencers[i].crash(&mut self.ctx.borrow_mut()),
            Party::Store | Party::Node(_) | Party::Client(_) => return,
        }
        let mut ctx = self.ctx.borrow_mut();
        let at = ctx.now() + down;
        ctx.checks.away(party, at);
        ctx.queue.at(at, Event::Script(Script::Restart(party)));
    }

    fn restart(&mut self, party: Party) {
        let is_removed = self.ctx.borrow().removed.contains(&party);
        if self.ctx.borrow().life(party).is_some() || is_removed {
            return;
        }
        match party {
            Party::Controller(i) => self.controllers[i].start(),
            Party::Agent(i) => self.agents[i].start(),
            Party::Proxy(i) => self.proxies[i].start(&mut self.ctx.borrow_mut()),
            Party::Fencer(i) => self.fencers[i].start(&mut self.ctx.borrow_mut()),
            Party::Store | Party::Node(_) | Party::Client(_) => {}
        }
    }
}
