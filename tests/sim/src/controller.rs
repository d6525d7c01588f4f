//! A controller: sessions, topology streams, hosts' leases, delegated commits and, while it leads,
//! the driver; while it does not, what its peers say is relayed to who does.
//!
//! Invariant: what it sends is derived by the real model (`assignment::node`, `route::shard`) from
//! records that a watch showed it; what it writes is a transition of the real `Shard`.

mod change;
mod commit;
mod driver;
mod lease;
mod mirror;
mod peers;
mod write;

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use rand::Rng;
use slotmesh_proto::{agent::v1::Assignment, topology::v1 as topology};
use slotmesh_task::Fleet;
use slotmesh_topology::{Instance, InstanceState, NodeRole, assignment, route};

use self::mirror::{Mirror, Versioned};
use crate::{
    fiber::{Answers, Fiber, World, wait_until},
    msg::{ConnId, Input, Party, Rpc, Stream, Timer},
    sched::{MS, Micros, SEC},
    store::{HOST_TTL, LEADER_TTL, StoreReply, StoreRequest},
};

/// A call of the store is given up after this time; it may still take effect.
const STORE_TIMEOUT: Micros = SEC;
/// How long a writer waits for its own write to appear in its mirror.
const CATCH_UP: Micros = 5 * SEC;
/// A proxy that has not been heard for so long is not waited for.
const FRESH_FOR_MS: u64 = 1_500;
const HEARTBEAT: Micros = 200 * MS;

/// What the loops of one controller share.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) me: Party,
    pub(crate) world: World,
    pub(crate) instance: Rc<Instance>,
    pub(crate) mirror: RefCell<Mirror>,
    pub(crate) fleet: RefCell<Fleet>,
    heard: RefCell<BTreeMap<usize, u64>>,
    pub(crate) answers: Answers<StoreReply>,
    pub(crate) steps: Answers<slotmesh_proto::agent::v1::ExecuteStepResponse>,
    /// Through which connection each host is heard, and in which of its sessions.
    pub(crate) agents: RefCell<BTreeMap<usize, (u64, ConnId)>>,
    /// What hosts hold here: their right to serve.
    pub(crate) leases: RefCell<BTreeMap<ConnId, lease::Held>>,
    /// The term that it believes to hold.
    pub(crate) term: RefCell<Option<u64>>,
    /// Something that decisions depend on has changed.
    pub(crate) news: RefCell<u64>,
}

impl Desk {
    pub(crate) fn now_ms(&self) -> u64 {
        self.world.borrow().now_ms()
    }

    /// Asks the store; `None`: no answer, whatever that means.
    pub(crate) async fn store(&self, request: StoreRequest) -> Option<StoreReply> {
        let call = {
            let mut ctx = self.world.borrow_mut();
            let call = ctx.call();
            ctx.rpc(self.me, Party::Store, Rpc::Store { call, request });
            call
        };
        self.answers
            .get(&self.world, self.me, call, STORE_TIMEOUT)
            .await
    }

    /// Waits until the mirror shows a revision; false when it does not in time.
    pub(crate) async fn shows(&self, revision: u64) -> bool {
        let caught_up = || self.mirror.borrow().revision >= revision;
        wait_until(&self.world, self.me, CATCH_UP, caught_up).await
    }

    /// As the instance's record is now.
    pub(crate) fn present_instance(&self) -> Instance {
        self.mirror.borrow().instance(&self.instance)
    }

    fn changed(&self) {
        *self.news.borrow_mut() += 1;
    }
}

/// See the module.
#[derive(Debug)]
pub struct Controller {
    index: usize,
    world: World,
    instance: Rc<Instance>,
    desk: Option<Rc<Desk>>,
    life: u64,
    watch: Option<ConnId>,
    /// Hosts and proxies by their stream.
    hosts: BTreeMap<ConnId, peers::Host>,
    proxies: BTreeMap<ConnId, peers::Proxy>,
    /// Followers that relay to this leader, with what they brought.
    relays: BTreeMap<ConnId, peers::Relay>,
    /// To the leader, while this is not it.
    relay: Option<(ConnId, usize)>,
    sent: BTreeMap<ConnId, Assignment>,
    routed: BTreeMap<ConnId, Vec<topology::ShardRoute>>,
    /// What was published last: revision of the mirror, and the newest stream.
    published: (u64, u64, usize, ConnId),
    fibers: Vec<Fiber>,
    driver: Option<Fiber>,
    /// The lease is kept for so long as this leader knows.
    lease_until: Micros,
    /// Until then every host passes for leased.
    presumed_until: Micros,
    campaign: Option<u64>,
    keepalive: Option<(u64, Micros)>,
}

impl Controller {
    /// A controller of an instance.
    #[must_use]
    pub fn new(index: usize, world: World, instance: Rc<Instance>) -> Self {
        Self {
            index,
            world,
            instance,
            desk: None,
            life: 0,
            watch: None,
            hosts: BTreeMap::new(),
            proxies: BTreeMap::new(),
            relays: BTreeMap::new(),
            relay: None,
            sent: BTreeMap::new(),
            routed: BTreeMap::new(),
            published: (0, 0, 0, 0),
            fibers: Vec::new(),
            driver: None,
            lease_until: 0,
            presumed_until: 0,
            campaign: None,
            keepalive: None,
        }
    }

    fn party(&self) -> Party {
        Party::Controller(self.index)
    }

    /// Begins a life that knows nothing.
    pub fn start(&mut self) {
        let me = self.party();
        self.life = self.world.borrow_mut().born(me);
        self.presumed_until = self.world.borrow().now() + HOST_TTL;
        self.desk = Some(Rc::new(Desk {
            me,
            world: Rc::clone(&self.world),
            instance: Rc::clone(&self.instance),
            mirror: RefCell::default(),
            fleet: RefCell::default(),
            heard: RefCell::default(),
            answers: Answers::default(),
            steps: Answers::default(),
            agents: RefCell::default(),
            leases: RefCell::default(),
            term: RefCell::default(),
            news: RefCell::default(),
        }));
        let mut ctx = self.world.borrow_mut();
        let first = 1 + self.index as u64 * 5 * MS;
        ctx.timer(me, first, Timer::Connect);
        ctx.timer(me, first, Timer::Tick);
    }

    /// Dies.
    pub fn crash(&mut self) {
        let (index, world, instance) = (
            self.index,
            Rc::clone(&self.world),
            Rc::clone(&self.instance),
        );
        self.world.borrow_mut().died(self.party());
        *self = Self::new(index, world, instance);
    }

    /// The instance as it was in the beginning.
    #[must_use]
    pub fn first_instance(&self) -> Option<Rc<Instance>> {
        self.desk.as_ref().map(|d| Rc::clone(&d.instance))
    }

    /// The term that it believes to hold.
    #[must_use]
    pub fn believes(&self) -> Option<u64> {
        self.desk.as_ref().and_then(|d| *d.term.borrow())
    }

    /// An operator asks for something.
    pub fn asked(&mut self, ask: Ask) {
        if let Some(desk) = self.desk.clone() {
            self.fibers.push(Fiber::new(write::admit(desk, ask)));
            self.settle();
        }
    }

    /// Something happens to it.
    pub fn handle(&mut self, input: Input) {
        let Some(desk) = self.desk.clone() else {
            return;
        };
        match input {
            Input::Rpc(_, Rpc::StoreReply { call, reply }) => {
                self.store_answered(&desk, call, reply)
            }
            Input::Rpc(_, Rpc::StepReply { call, response }) => desk.steps.put(call, *response),
            Input::Rpc(from, Rpc::Commit { call, request }) => {
                let commit = commit::serve(Rc::clone(&desk), from, call, request);
                self.fibers.push(Fiber::new(commit));
            }
            Input::Rpc(from, Rpc::Confirm { call, request }) => {
                let confirm = commit::confirm(Rc::clone(&desk), from, call, request);
                self.fibers.push(Fiber::new(confirm));
            }
            Input::Stream(conn, message) => self.stream(&desk, conn, message),
            Input::Closed(conn) => self.closed(&desk, conn),
            Input::Timer(Timer::Connect) if self.watch.is_none() => {
                let mut ctx = self.world.borrow_mut();
                let conn = ctx.open(self.party(), Party::Store);
                let shown = desk.mirror.borrow().revision;
                let from = (shown > 0).then_some(shown + 1);
                ctx.send(self.party(), conn, Stream::Subscribe(from));
                self.watch = Some(conn);
            }
            Input::Timer(Timer::Tick) => self.tick(&desk),
            _ => {}
        }
        self.settle();
    }

    fn settle(&mut self) {
        let mut at = 0;
        while at < self.fibers.len() {
            if self.fibers[at].poll() {
                drop(self.fibers.remove(at));
            } else {
                at += 1;
            }
        }
        if self.driver.as_mut().is_some_and(Fiber::poll) {
            self.driver = None;
            if let Some(desk) = self.desk.clone() {
                self.depose(&desk);
            }
        }
        self.publish();
    }

    fn store_answered(&mut self, desk: &Rc<Desk>, call: u64, reply: StoreReply) {
        let now = self.world.borrow().now();
        match reply {
            StoreReply::Term(term) if self.campaign == Some(call) => {
                self.campaign = None;
                if let (Some(term), None) = (term, self.believes()) {
                    *desk.term.borrow_mut() = Some(term);
                    self.begin_term(desk);
                    self.lease_until = now + LEADER_TTL;
                    self.driver = Some(Fiber::new(driver::run(Rc::clone(desk), term)));
                }
            }
            StoreReply::Lasts(lasts) if self.keepalive.is_some_and(|(c, _)| c == call) => {
                // Counted from when it was asked: the store may have counted from earlier.
                let asked = self.keepalive.take().map_or(0, |(_, at)| at);
                if lasts {
                    self.lease_until = asked + LEADER_TTL;
                } else {
                    self.depose(desk);
                }
            }
            reply => desk.answers.put(call, reply),
        }
    }

    fn depose(&mut self, desk: &Rc<Desk>) {
        *desk.term.borrow_mut() = None;
        self.driver = None;
        for conn in self.relays.keys().copied().collect::<Vec<_>>() {
            self.world.borrow_mut().close(self.party(), conn);
            self.closed(desk, conn);
        }
    }

    fn tick(&mut self, desk: &Rc<Desk>) {
        let me = self.party();
        let now = self.world.borrow().now();
        match self.believes() {
            Some(_) if self.lease_until <= now => self.depose(desk),
            Some(term) => {
                let mut ctx = self.world.borrow_mut();
                let call = ctx.call();
                self.keepalive = Some((call, now));
                let request = StoreRequest::KeepAlive(term);
                ctx.rpc(me, Party::Store, Rpc::Store { call, request });
            }
            None => {
                let mut ctx = self.world.borrow_mut();
                let call = ctx.call();
                self.campaign = Some(call);
                let request = StoreRequest::Campaign {
                    controller: self.index,
                    life: self.life,
                };
                ctx.rpc(me, Party::Store, Rpc::Store { call, request });
            }
        }
        self.age(desk);
        self.note_leases(desk);
        self.relay_on(desk);
        let mut ctx = self.world.borrow_mut();
        for conn in self
            .hosts
            .keys()
            .chain(self.proxies.keys())
            .chain(self.relays.keys())
        {
            ctx.send(me, *conn, Stream::Heartbeat);
        }
        let jitter = ctx.rng.random_range(0..20 * MS);
        ctx.timer(me, HEARTBEAT + jitter, Timer::Tick);
    }

    fn stream(&mut self, desk: &Rc<Desk>, conn: ConnId, message: Stream) {
        let from_watch = self.watch == Some(conn);
        match message {
            Stream::Watched(changes) if from_watch => desk.mirror.borrow_mut().take(changes),
            Stream::Listed(revision, items) if from_watch => {
                desk.mirror.borrow_mut().list(revision, items);
            }
            Stream::Compacted if from_watch => {
                let list = Stream::Subscribe(None);
                self.world.borrow_mut().send(self.party(), conn, list);
            }
            message => return self.peer(desk, conn, message),
        }
        self.note_leases(desk);
        self.relay_on(desk);
        desk.changed();
    }

    /// Sends every agent and proxy what has changed for it.
    fn publish(&mut self) {
        let Some(desk) = self.desk.clone() else {
            return;
        };
        let mirror = desk.mirror.borrow();
        let term = mirror.term;
        if mirror.shards.is_empty() || term == 0 {
            return;
        }
        let streams = self.hosts.keys().chain(self.proxies.keys());
        let newest = streams.clone().max().copied().unwrap_or(0);
        let now = (term, mirror.revision, streams.count(), newest);
        if self.published == now {
            return;
        }
        self.published = now;
        let me = self.party();
        for (conn, host) in &self.hosts {
            let mut next = self.assignment(&mirror, host.index, term);
            let old = self.sent.get(conn);
            next.revision = old.map_or(mirror.revision, |o| o.revision);
            // What proves that nothing changed before its lease began is news, too.
            let leased = mirror.hosts.get(&host.index).copied().unwrap_or(0);
            if old != Some(&next) || next.revision < leased {
                next.revision = mirror.revision;
                self.sent.insert(*conn, next.clone());
                let message = Stream::Assignment(Box::new(next));
                self.world.borrow_mut().send(me, *conn, message);
            }
        }
        let shards: Vec<topology::ShardRoute> = (mirror.shards.values())
            .filter_map(|s| route::shard(&self.instance, &s.value))
            .collect();
        if shards.len() < mirror.shards.len() {
            return;
        }
        for conn in self.proxies.keys() {
            if self.routed.get(conn) != Some(&shards) {
                self.routed.insert(*conn, shards.clone());
                let message = Stream::Routes {
                    revision: mirror.revision,
                    shards: shards.clone(),
                };
                self.world.borrow_mut().send(me, *conn, message);
            }
        }
    }

    fn assignment(&self, mirror: &Mirror, host: usize, term: u64) -> Assignment {
        let name = format!("h{host}");
        let instance = mirror.instance(&self.instance);
        let mut nodes = Vec::new();
        for shard in mirror.shards.values().map(|s| &s.value) {
            let here = shard.members.iter().filter(|m| m.host.as_str() == name);
            nodes.extend(here.map(|m| {
                let mut spec = assignment::node(&instance, shard, m);
                if assignment::is_primary(&spec) {
                    let others = shard.members.iter().filter(|o| o.node != m.node);
                    let others = others.filter(|o| o.role != NodeRole::ReadOnly);
                    spec.replica_agents = others.map(|o| o.host.to_string()).collect();
                }
                spec
            }));
            let gone = shard.roster.gone.iter().filter(|g| g.host.as_str() == name);
            nodes.extend(gone.map(|g| assignment::gone(&instance, shard, &g.node)));
        }
        // Proxies are there from the beginning: only that they are to go is said here.
        let removed = instance
            .proxies
            .iter()
            .filter(|p| p.host.as_str() == name && instance.state == InstanceState::Deleting);
        let proxies = removed.map(|placed| assignment::proxy(&instance, placed));
        Assignment {
            term,
            nodes,
            proxies: proxies.collect(),
            ..Assignment::default()
        }
    }
}

/// What an operator asks.
#[derive(Clone, Debug)]
pub enum Ask {
    /// A switchover.
    SwitchOver {
        /// Chooses shards and targets.
        choice: u64,
        /// The client's token.
        token: u64,
    },
    /// A node to another host.
    Move {
        /// Chooses shard and node.
        choice: u64,
        /// The client's token.
        token: u64,
    },
    /// Another engine for all nodes.
    Upgrade {
        /// Chooses which, and how.
        choice: u64,
        /// The client's token.
        token: u64,
    },
    /// Take the primaries off a host.
    Drain {
        /// Which host.
        host: usize,
        /// The client's token.
        token: u64,
    },
    /// Remove the instance.
    Decommission,
    /// Cancel what is under way.
    Cancel,
    /// What an operator says to what waits for one.
    Choose(slotmesh_task::Choice),
}
