//! What every party shares: time, network, chance, the trace and the checks.
//!
//! Invariant: parties touch each other only through messages sent here.

use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    ambush::{Ambushes, Deed, Tamper, refusal_of, refusal_on},
    check::Checks,
    msg::{ConnId, Input, Party, Rpc, Stream, Timer},
    net::{Net, Weather},
    plan::{Point, Script},
    sched::{MS, Micros, Queue},
    trace::Trace,
    variant::Variant,
};

/// Whoever looks after a process that has stood still sees that it went on within this time.
const DROWSY: Micros = 100 * MS;

/// Something that is due.
#[derive(Debug)]
pub enum Event {
    /// For a party, in the life of it that is named.
    To(Party, u64, Box<Input>),
    /// The other end of a connection learns that it is gone.
    Break(ConnId),
    /// The plan's next act.
    Script(Script),
}

/// See the module.
#[derive(Debug)]
pub struct Ctx {
    /// Time and what is due.
    pub queue: Queue<Event>,
    /// Chance; of the seed alone.
    pub rng: SmallRng,
    /// Who can talk to whom.
    pub net: Net,
    /// What happened.
    pub trace: Trace,
    /// What must hold.
    pub checks: Checks,
    /// Deliberately broken, or not.
    pub variant: Variant,
    /// Acts at which the plan wants something to go wrong, and how often they were passed.
    pub points: Vec<(Point, u32, Script)>,
    /// Messages may be lost or late until then.
    pub bad_weather_until: Micros,
    /// What happens to messages of tasks.
    pub ambushes: Ambushes,
    /// Before then nothing arrives over these local sockets.
    late: std::collections::BTreeMap<(Party, Party), Micros>,
    /// Parties that were removed: nobody starts them again.
    pub removed: std::collections::BTreeSet<Party>,
    /// When a party last stood still, or something that reaches it was cut, until when.
    pub troubled: std::collections::BTreeMap<Party, Micros>,
    /// Messages on connections that hang: who sent them, and whether the sender closed after them.
    parked: Vec<(Party, ConnId, Option<Stream>)>,
    /// When parties went on that had stood still.
    pub woken: std::collections::BTreeMap<Party, Micros>,
    /// Hosts whose program of any engine but the default is damaged.
    pub spoiled: std::collections::BTreeSet<usize>,
    /// Nodes whose append-only file is not whole yet.
    pub settling: std::collections::BTreeSet<Party>,
    /// Parties that stand still.
    pub stopped: std::collections::BTreeSet<Party>,
    lives: Vec<(Party, u64, bool)>,
    calls: u64,
}

impl Ctx {
    /// Everything of a seed.
    #[must_use]
    pub fn new(seed: u64, variant: Variant, trace: Trace) -> Self {
        Self {
            queue: Queue::default(),
            rng: SmallRng::seed_from_u64(seed),
            net: Net::new(Weather::calm()),
            trace,
            checks: Checks::default(),
            variant,
            points: Vec::new(),
            bad_weather_until: 0,
            ambushes: Ambushes::default(),
            late: std::collections::BTreeMap::new(),
            removed: std::collections::BTreeSet::new(),
            troubled: std::collections::BTreeMap::new(),
            parked: Vec::new(),
            woken: std::collections::BTreeMap::new(),
            spoiled: std::collections::BTreeSet::new(),
            settling: std::collections::BTreeSet::new(),
            stopped: std::collections::BTreeSet::new(),
            lives: Vec::new(),
            calls: 0,
        }
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Micros {
        self.queue.now()
    }

    /// Milliseconds of the calendar: what decisions see.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        1_000_000 + self.now() / MS
    }

    /// A number that no other call has.
    pub fn call(&mut self) -> u64 {
        self.calls += 1;
        self.calls
    }

    /// True `per_mille` times in 1,000.
    pub fn chance(&mut self, per_mille: u32) -> bool {
        self.rng.random_range(0..1_000) < per_mille
    }

    fn life_mut(&mut self, party: Party) -> &mut (Party, u64, bool) {
        let found = self.lives.iter().position(|(p, ..)| *p == party);
        let at = found.unwrap_or_else(|| {
            self.lives.push((party, 0, false));
            self.lives.len() - 1
        });
        &mut self.lives[at]
    }

    /// The party's current life, if it is alive.
    #[must_use]
    pub fn life(&self, party: Party) -> Option<u64> {
        self.lives
            .iter()
            .find(|(p, _, alive)| *p == party && *alive)
            .map(|(_, life, _)| *life)
    }

    /// The party begins a new life.
    pub fn born(&mut self, party: Party) -> u64 {
        let life = self.life_mut(party);
        life.1 += 1;
        life.2 = true;
        life.1
    }

    /// The party is gone, and its connections with it.
    pub fn died(&mut self, party: Party) {
        self.life_mut(party).2 = false;
        let conns: Vec<ConnId> = (self.net.conns.iter())
            .filter(|(_, c)| c.ends.iter().any(|(p, _)| *p == party))
            .map(|(id, _)| *id)
            .collect();
        for conn in conns {
            self.close(party, conn);
        }
    }

    /// Something for the party itself, later.
    pub fn timer(&mut self, party: Party, after: Micros, timer: Timer) {
        if let Some(life) = self.life(party) {
            let at = self.now() + after;
            self.queue
                .at(at, Event::To(party, life, Box::new(Input::Timer(timer))));
        }
    }

    /// Opens a connection. Somebody who can't be reached shows as its loss.
    pub fn open(&mut self, from: Party, to: Party) -> ConnId {
        let (now, delay) = (self.now(), self.net.delay(&mut self.rng));
        let ends = (
            (from, self.life(from).unwrap_or(0)),
            (to, self.life(to).unwrap_or(0)),
        );
        let conn = self.net.open(ends.0, ends.1, now);
        let reachable = self.net.passes(from, to) && self.net.passes(to, from);
        if !reachable || self.life(to).is_none() {
            let wait = if reachable { delay * 2 } else { 300 * MS };
            self.queue.at(now + wait, Event::Break(conn));
        } else if let Some(at) = self.net.arrival(conn, from, now, &mut self.rng) {
            self.queue
                .at(at, Event::To(to, ends.1.1, Box::new(Input::Opened(conn))));
        } else {
            self.queue.at(now + delay, Event::Break(conn));
        }
        conn
    }

    /// Sends on a connection.
    pub fn send(&mut self, from: Party, conn: ConnId, message: Stream) {
        let now = self.now();
        let Some(link) = self.net.conns.get(&conn).filter(|c| c.up).cloned() else {
            return;
        };
        if self.net.is_hanging(conn, from, &mut self.rng) {
            return self.parked.push((from, conn, Some(message)));
        }
        let to = link.ends[usize::from(link.ends[0].0 == from)];
        let deeds = self.ambushes.stream(from, to.0, &message);
        let arrival = match self.carry_out(deeds) {
            Some(Tamper::Lose) => None,
            Some(Tamper::Delay(late)) => {
                self.net.delay_from(conn, from, now + late);
                self.net.arrival(conn, from, now, &mut self.rng)
            }
            Some(Tamper::Fail) => {
                let Some(refusal) = refusal_on(&message) else {
                    return;
                };
                return self.send(to.0, conn, refusal);
            }
            _ => self.net.arrival(conn, from, now, &mut self.rng),
        };
        match arrival {
            Some(at) => self.queue.at(
                at,
                Event::To(to.0, to.1, Box::new(Input::Stream(conn, message))),
            ),
            None => {
                // Lost: nothing passes any more, and each end notices some time later.
                if let Some(link) = self.net.conns.get_mut(&conn) {
                    link.up = false;
                }
                let wait = self.rng.random_range(MS..1_500 * MS);
                self.queue.at(now + wait, Event::Break(conn));
            }
        }
    }

    /// Closes a connection; the other end learns it after what was sent before.
    pub fn close(&mut self, from: Party, conn: ConnId) {
        let now = self.now();
        let Some(link) = self.net.conns.get(&conn).cloned() else {
            return;
        };
        if self.net.is_hanging(conn, from, &mut self.rng) {
            return self.parked.push((from, conn, None));
        }
        let to = link.ends[usize::from(link.ends[0].0 == from)];
        let at = match self.net.arrival(conn, from, now, &mut self.rng) {
            Some(at) if link.up => at,
            _ => now + self.rng.random_range(MS..500 * MS),
        };
        self.net.conns.remove(&conn);
        self.queue
            .at(at, Event::To(to.0, to.1, Box::new(Input::Closed(conn))));
    }

    /// Cuts are mended: what waited goes its way, in order.
    pub fn flush(&mut self) {
        for (from, conn, message) in std::mem::take(&mut self.parked) {
            match message {
                Some(message) => self.send(from, conn, message),
                None => self.close(from, conn),
            }
        }
    }

    /// True if messages may still come from it.
    #[must_use]
    pub fn is_open(&self, conn: ConnId) -> bool {
        self.net.conns.contains_key(&conn)
    }

    /// Both ends learn that the connection is gone.
    pub fn break_conn(&mut self, conn: ConnId) {
        let Some(link) = self.net.conns.remove(&conn) else {
            return;
        };
        for (party, life) in link.ends {
            let at = self.now() + self.rng.random_range(0..MS);
            self.queue
                .at(at, Event::To(party, life, Box::new(Input::Closed(conn))));
        }
    }

    /// Starts what is to happen at this message, and tells what happens to it.
    fn carry_out(&mut self, deeds: Vec<Deed>) -> Option<Tamper> {
        let (now, mut found) = (self.now(), None);
        for deed in deeds {
            match deed {
                Deed::Tamper(tamper) => found = Some(tamper),
                Deed::Script(script) => self.queue.at(now, Event::Script(script)),
            }
        }
        found
    }

    /// Sends without a connection.
    pub fn rpc(&mut self, from: Party, to: Party, message: Rpc) {
        let weather = self.net.weather;
        let deeds = self.ambushes.rpc(from, to, &message);
        let tamper = self.carry_out(deeds);
        if tamper == Some(Tamper::Lose) {
            return;
        }
        if tamper == Some(Tamper::Fail) {
            if let Some(refusal) = refusal_of(&message) {
                self.rpc(to, from, refusal);
            }
            return;
        }
        if !self.net.passes(from, to) || self.chance(weather.rpc_loss) {
            self.trace.mix(&[from.number(), to.number(), 404]);
            return;
        }
        let Some(life) = self.life(to) else { return };
        let now = self.now();
        if self.chance(weather.rpc_double) || tamper == Some(Tamper::Repeat) {
            let at = now + self.net.delay(&mut self.rng) * 3;
            let copy = Input::Rpc(from, message.clone());
            self.queue.at(at, Event::To(to, life, Box::new(copy)));
        }
        let late = match tamper {
            Some(Tamper::Delay(late)) => late,
            _ => 0,
        };
        let at = now + self.net.delay(&mut self.rng) + late;
        self.queue
            .at(at, Event::To(to, life, Box::new(Input::Rpc(from, message))));
    }

    /// Sends over a local socket: quick and never lost, but the other side may be gone, or the socket
    /// break: then who asked learns at once that nobody knows.
    pub fn local(&mut self, from: Party, to: Party, message: Rpc) {
        let mut at = self.now() + self.rng.random_range(20..120);
        let deeds = self.ambushes.rpc(from, to, &message);
        let message = match (self.carry_out(deeds), message) {
            (Some(Tamper::Lose), Rpc::Admin { call, .. }) => {
                return self.local(to, from, Rpc::AdminReply { call, answer: None });
            }
            (Some(Tamper::Lose), Rpc::AdminReply { call, .. }) => {
                Rpc::AdminReply { call, answer: None }
            }
            (Some(Tamper::Fail), message) => {
                if let Some(refusal) = refusal_of(&message) {
                    self.local(to, from, refusal);
                }
                return;
            }
            (Some(Tamper::Delay(late)), message) => {
                self.late.insert((from, to), at + late);
                message
            }
            (_, message) => message,
        };
        // What comes after it does not overtake it.
        if let Some(late) = self.late.get(&(from, to)) {
            at = at.max(*late + 1);
        }
        match (self.life(to), message) {
            (Some(life), message) => {
                self.queue
                    .at(at, Event::To(to, life, Box::new(Input::Rpc(from, message))));
            }
            (None, Rpc::Admin { call, .. }) => {
                if let Some(life) = self.life(from) {
                    let gone = Rpc::AdminReply { call, answer: None };
                    self.queue
                        .at(at, Event::To(from, life, Box::new(Input::Rpc(to, gone))));
                }
            }
            (None, _) => {}
        }
    }

    /// What the kernel says of a process.
    #[must_use]
    pub fn is_stopped(&self, party: Party) -> bool {
        self.stopped.contains(&party)
    }

    /// It stands still, or has just woken: whatever it does now was asked for before.
    #[must_use]
    pub fn is_asleep(&self, party: Party) -> bool {
        let woken = self.woken.get(&party);
        self.is_stopped(party) || woken.is_some_and(|at| self.now() < at + DROWSY)
    }

    /// These parties are in trouble until then.
    pub fn trouble(&mut self, parties: impl IntoIterator<Item = Party>, until: Micros) {
        for party in parties {
            let last = self.troubled.entry(party).or_default();
            *last = until.max(*last);
        }
    }

    /// An act that the plan may have an accident for.
    pub fn point(&mut self, point: Point) {
        self.trace.mix(&[9, point as u64]);
        let now = self.now();
        let mut due = Vec::new();
        for (at, left, script) in &mut self.points {
            if *at == point && *left > 0 {
                *left -= 1;
                if *left == 0 {
                    due.push(script.clone());
                }
            }
        }
        for script in due {
            self.queue.at(now, Event::Script(script));
        }
    }

    /// An event for readers.
    pub fn say(&mut self, line: impl FnOnce() -> String) {
        let now = self.now();
        self.trace.say(now, line);
    }
}
