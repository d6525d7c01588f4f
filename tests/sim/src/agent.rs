//! A host's agent: the real journal's memory, the real machines, around them what its session,
//! executor and node workers do.
//!
//! Invariant: what survives a crash is what was journaled; everything else is dropped in the middle
//! of whatever it did.

mod exchange;
pub mod fencer;
mod guard;
mod handover;
mod promote;
mod seats;
mod steps;
mod worker;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
};

use rand::Rng;
use slotmesh_agent::{
    controllers::CommitAnswer,
    executor::response,
    journal::record::{Fact, Memory, ShardEpoch},
    node::Assigned,
};
use slotmesh_proto::agent::v1::{
    Assignment, Desired, ExecuteStepRequest, ExecuteStepResponse, HostReport, NodeReport,
    ProcessState, ProxyReport, StepOutcome, execute_step_request::Act,
};

use crate::{
    ctx::Event,
    fiber::{Answers, Fiber, World, sleep},
    msg::{ConnId, Input, Party, Rpc, Stream, Timer},
    plan::{Point, Script},
    redis::Answer,
    sched::{MS, Micros, SEC},
    variant::Variant,
};

/// Between reports, as the real session has it.
const REPORT_EVERY: Micros = 500 * MS;
/// Between reports of changes.
const REPORT_SPACING: Micros = 3 * MS;
/// A session on which nothing comes for so long is given up.
const SILENCE: Micros = 2 * SEC;

/// An answer to a call of a worker.
#[derive(Debug)]
pub(crate) enum Got {
    /// Of the node; `None`: its process is gone.
    Admin(Option<Answer>),
    /// Of the target, to a login.
    Login(bool),
    /// Of a controller.
    Commit(CommitAnswer),
    /// Of another agent.
    Promise(bool),
    /// Of a controller; `None`: the store did not answer it.
    Confirm(Option<bool>),
}

/// One node of this host.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    pub(crate) node: usize,
    pub(crate) name: String,
    /// It was started once, so there is something to start again.
    pub(crate) ran: Rc<Cell<bool>>,
    /// With which engine last.
    pub(crate) engine: Rc<RefCell<String>>,
}

/// A step on its way to a worker.
#[derive(Debug)]
pub(crate) struct StepCall {
    pub(crate) call: u64,
    pub(crate) from: Party,
    pub(crate) request: ExecuteStepRequest,
}

/// What the workers of an agent share.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) index: usize,
    pub(crate) me: Party,
    pub(crate) world: World,
    pub(crate) memory: Rc<RefCell<Memory>>,
    /// What is on its disk, so to say.
    pub(crate) seats: Rc<RefCell<Vec<Seat>>>,
    pub(crate) answers: Answers<Got>,
    pub(crate) assigned: RefCell<BTreeMap<String, Assigned>>,
    /// An assignment has come that the guard has not seen.
    pub(crate) news: Cell<bool>,
    pub(crate) steps: RefCell<BTreeMap<usize, VecDeque<StepCall>>>,
    pub(crate) reports: RefCell<BTreeMap<usize, NodeReport>>,
    /// Connections to targets, and the calls that wait for their login.
    pub(crate) targets: RefCell<BTreeMap<ConnId, u64>>,
    pub(crate) rights: RefCell<guard::Rights>,
    pub(crate) controllers: usize,
    pub(crate) preferred: RefCell<Option<usize>>,
    /// Trials of engines, by step and attempt, and when they are over.
    pub(crate) trials: RefCell<BTreeMap<(String, u32), Micros>>,
}

impl Host {
    /// Makes facts durable: after a moment in which a crash forgets them.
    pub(crate) async fn append(&self, facts: impl IntoIterator<Item = Fact>) {
        let news: Vec<Fact> = facts
            .into_iter()
            .filter(|f| !self.memory.borrow().knows(f))
            .collect();
        if news.is_empty() {
            return;
        }
        let wait = self.world.borrow_mut().rng.random_range(100..1_500);
        sleep(&self.world, self.me, wait).await;
        for fact in news {
            self.memory.borrow_mut().learn(fact);
        }
        self.world.borrow_mut().point(Point::Journaled);
    }

    pub(crate) fn now(&self) -> Micros {
        self.world.borrow().now()
    }

    /// Its data is gone, and whoever looks after it knows.
    pub(crate) fn is_removed(&self, node: usize) -> bool {
        self.world.borrow().removed.contains(&Party::Node(node))
    }

    pub(crate) fn variant(&self) -> Variant {
        self.world.borrow().variant
    }
}

/// See the module.
#[derive(Debug)]
pub struct Agent {
    index: usize,
    world: World,
    seats: Rc<RefCell<Vec<Seat>>>,
    /// Nodes that it may be given, by shard.
    spare: Vec<(usize, usize)>,
    memory: Rc<RefCell<Memory>>,
    host: Option<Rc<Host>>,
    fibers: Vec<Fiber>,
    session: Option<ConnId>,
    heard: Micros,
    turn: usize,
    revision: u64,
    sent: (Micros, Vec<NodeReport>),
    /// Of the last report of this session.
    number: u64,
    controllers: usize,
    /// Proxies of this host that were ended for good.
    removed: BTreeSet<usize>,
}

impl Agent {
    /// An agent with an empty journal.
    #[must_use]
    pub fn new(
        index: usize,
        world: World,
        nodes: Vec<(usize, String)>,
        spare: Vec<(usize, usize)>,
        controllers: usize,
    ) -> Self {
        let ran = || Rc::new(Cell::new(true));
        let seats = nodes.into_iter().map(|(node, name)| Seat {
            node,
            name,
            ran: ran(),
            engine: Rc::default(),
        });
        Self {
            index,
            world,
            seats: Rc::new(RefCell::new(seats.collect())),
            spare,
            memory: Rc::default(),
            host: None,
            fibers: Vec::new(),
            session: None,
            heard: 0,
            turn: index,
            revision: 0,
            sent: (0, Vec::new()),
            number: 0,
            controllers,
            removed: BTreeSet::new(),
        }
    }

    fn party(&self) -> Party {
        Party::Agent(self.index)
    }

    /// Begins a life, with the journal of the lives before.
    pub fn start(&mut self) {
        let me = self.party();
        self.world.borrow_mut().born(me);
        let now = self.world.borrow().now();
        let host = Rc::new(Host {
            index: self.index,
            me,
            world: Rc::clone(&self.world),
            memory: Rc::clone(&self.memory),
            seats: Rc::clone(&self.seats),
            answers: Answers::default(),
            assigned: RefCell::default(),
            news: Cell::default(),
            steps: RefCell::default(),
            reports: RefCell::default(),
            targets: RefCell::default(),
            rights: RefCell::new(guard::Rights::since(now)),
            controllers: self.controllers,
            preferred: RefCell::default(),
            trials: RefCell::default(),
        });
        self.revision = 0;
        self.sent = (0, Vec::new());
        let seats = self.seats.borrow().clone();
        for seat in seats {
            self.look_after(&host, seat);
        }
        let guard = guard::run(Rc::clone(&host));
        self.fibers.push(Fiber::new(guard));
        self.host = Some(host);
        let mut ctx = self.world.borrow_mut();
        ctx.timer(me, 1, Timer::Connect);
        ctx.timer(me, REPORT_EVERY, Timer::Tick);
    }

    /// Dies.
    pub fn crash(&mut self) {
        self.fibers.clear();
        self.host = None;
        self.session = None;
        self.world.borrow_mut().died(self.party());
    }

    /// Something happens to it.
    pub fn handle(&mut self, input: Input) {
        let Some(host) = self.host.clone() else {
            return;
        };
        match input {
            Input::Rpc(_, Rpc::AdminReply { call, answer }) => {
                host.answers.put(call, Got::Admin(answer.map(|a| *a)));
            }
            Input::Rpc(_, Rpc::CommitReply { call, answer }) => {
                host.answers.put(call, Got::Commit(answer));
            }
            Input::Rpc(from, Rpc::Promise { call, request }) => {
                let promised = host.promise(&request);
                let reply = Rpc::PromiseReply { call, promised };
                self.world.borrow_mut().rpc(self.party(), from, reply);
            }
            Input::Rpc(_, Rpc::PromiseReply { call, promised }) => {
                host.answers.put(call, Got::Promise(promised));
            }
            Input::Rpc(_, Rpc::ConfirmReply { call, confirmed }) => {
                host.answers.put(call, Got::Confirm(confirmed));
            }
            Input::Rpc(from, Rpc::Step { call, request }) => {
                self.step(&host, from, call, *request);
            }
            Input::Stream(conn, message) => self.stream(&host, conn, message),
            Input::Closed(conn) => self.closed(&host, conn),
            Input::Timer(Timer::Connect) if self.session.is_none() => self.connect(&host),
            Input::Timer(Timer::Tick) => {
                let now = self.world.borrow().now();
                // It may be cut off from the store; another one may not be.
                let unheard = host.rights.borrow().is_unheard(now);
                let silent = self.heard + SILENCE < now || unheard;
                if let Some(conn) = self.session
                    && silent
                {
                    self.world.borrow_mut().close(self.party(), conn);
                    self.closed(&host, conn);
                }
                self.report(&host, true);
                self.world
                    .borrow_mut()
                    .timer(self.party(), REPORT_EVERY, Timer::Tick);
            }
            _ => {}
        }
        // Until nothing changes any more: one worker's act may be another's condition.
        let mut at = 0;
        while at < self.fibers.len() {
            if self.fibers[at].poll() {
                drop(self.fibers.remove(at));
            } else {
                at += 1;
            }
        }
        self.report(&host, false);
    }

    fn stream(&mut self, host: &Rc<Host>, conn: ConnId, message: Stream) {
        match message {
            Stream::Assignment(assignment) if self.session == Some(conn) => {
                self.heard = self.world.borrow().now();
                self.assign(host, *assignment);
            }
            Stream::LeaseKept {
                number,
                ttl_ms,
                revision,
            } if self.session == Some(conn) => {
                self.heard = self.world.borrow().now();
                host.rights.borrow_mut().kept(number, ttl_ms, revision);
            }
            Stream::Heartbeat if self.session == Some(conn) => {
                self.heard = self.world.borrow().now();
            }
            Stream::TargetLoginAnswer(ok) => {
                if let Some(call) = host.targets.borrow().get(&conn) {
                    host.answers.put(*call, Got::Login(ok));
                }
            }
            _ => {}
        }
    }

    fn connect(&mut self, host: &Rc<Host>) {
        let to = self.turn % self.controllers;
        self.turn += 1;
        let mut ctx = self.world.borrow_mut();
        let me = self.party();
        let conn = ctx.open(me, Party::Controller(to));
        let session = ctx.call();
        let register = Stream::Register {
            host: self.index,
            session,
        };
        ctx.send(me, conn, register);
        self.session = Some(conn);
        self.number = 0;
        self.heard = ctx.now();
        drop(ctx);
        *host.preferred.borrow_mut() = Some(to);
        self.report(host, true);
    }

    fn closed(&mut self, host: &Rc<Host>, conn: ConnId) {
        if self.session == Some(conn) {
            self.session = None;
            *host.preferred.borrow_mut() = None;
            let mut ctx = self.world.borrow_mut();
            let wait = ctx.rng.random_range(20 * MS..200 * MS);
            ctx.timer(self.party(), wait, Timer::Connect);
        } else if let Some(call) = host.targets.borrow_mut().remove(&conn) {
            host.answers.put(call, Got::Login(false));
        }
    }

    /// As the real session takes an assignment: never an older one.
    fn assign(&mut self, host: &Rc<Host>, assignment: Assignment) {
        let term = self.memory.borrow().term();
        if assignment.term < term || assignment.revision < self.revision {
            return;
        }
        self.revision = assignment.revision;
        self.remove_proxies(&assignment);
        self.seat(host, &assignment);
        let host = Rc::clone(host);
        self.fibers.push(Fiber::new(async move {
            host.append([Fact::Term(assignment.term)]).await;
            host.news.set(true);
            let mut assigned = host.assigned.borrow_mut();
            for spec in assignment.nodes {
                let newer = assigned
                    .get(&spec.node_id)
                    .is_none_or(|old: &Assigned| old.revision <= assignment.revision);
                if newer {
                    let node = spec.node_id.clone();
                    let (term, revision) = (assignment.term, assignment.revision);
                    assigned.insert(
                        node,
                        Assigned {
                            term,
                            revision,
                            spec,
                        },
                    );
                }
            }
        }));
    }

    fn remove_proxies(&mut self, assignment: &Assignment) {
        let removed = (assignment.proxies.iter()).filter(|p| p.desired() == Desired::Removed);
        for proxy in removed.filter_map(|p| p.proxy_id.strip_prefix('p')?.parse().ok()) {
            self.removed.insert(proxy);
            let mut ctx = self.world.borrow_mut();
            ctx.removed.insert(Party::Proxy(proxy));
            let (now, gone) = (ctx.now(), Script::Crash(Party::Proxy(proxy), 0));
            ctx.queue.at(now, Event::Script(gone));
        }
    }

    /// Processes of proxies that are gone for good.
    fn removed_proxies(&self) -> Vec<ProxyReport> {
        let ctx = self.world.borrow();
        let gone = (self.removed.iter()).filter(|p| ctx.life(Party::Proxy(**p)).is_none());
        gone.map(|proxy| ProxyReport {
            proxy_id: format!("p{proxy}"),
            state: ProcessState::Removed.into(),
            ..ProxyReport::default()
        })
        .collect()
    }

    /// As the real executor takes a step.
    fn step(&mut self, host: &Rc<Host>, from: Party, call: u64, request: ExecuteStepRequest) {
        self.world.borrow_mut().point(Point::StepReceived);
        let me = self.party();
        // Beside the node, and not journaled.
        let staged = match &request.act {
            Some(Act::StageEngine(order)) => Some(host.stage(&request, order)),
            _ => settled(host, &request),
        };
        if let Some(response) = staged {
            let response = Box::new(response);
            self.world
                .borrow_mut()
                .rpc(me, from, Rpc::StepReply { call, response });
            return;
        }
        let node = (self.seats.borrow().iter())
            .find(|s| s.name == node_of(&request))
            .map(|s| s.node);
        let host = Rc::clone(host);
        self.fibers.push(Fiber::new(async move {
            let epoch = ShardEpoch {
                instance_id: request.instance_id.clone(),
                shard_id: request.shard_id.clone(),
                epoch: request.epoch,
            };
            host.append([Fact::Term(request.term), Fact::Epoch(epoch)])
                .await;
            match node {
                Some(node) => {
                    let queued = StepCall {
                        call,
                        from,
                        request,
                    };
                    host.steps
                        .borrow_mut()
                        .entry(node)
                        .or_default()
                        .push_back(queued);
                    host.world.borrow_mut().timer(host.me, 1, Timer::Call(0));
                }
                None => {
                    let refusal = response(StepOutcome::NoEffect, "the node is not on this host");
                    let response = Box::new(refusal);
                    host.world
                        .borrow_mut()
                        .rpc(host.me, from, Rpc::StepReply { call, response });
                }
            }
        }));
    }

    fn report(&mut self, host: &Rc<Host>, always: bool) {
        let Some(conn) = self.session else { return };
        let now = self.world.borrow().now();
        let nodes: Vec<NodeReport> = host.reports.borrow().values().cloned().collect();
        if !always && (nodes == self.sent.1 || now < self.sent.0 + REPORT_SPACING) {
            return;
        }
        self.sent = (now, nodes.clone());
        self.number += 1;
        host.rights.borrow_mut().reporting(self.number, now);
        let report = HostReport {
            nodes,
            proxies: self.removed_proxies(),
            number: self.number,
            ..HostReport::default()
        };
        self.world
            .borrow_mut()
            .send(self.party(), conn, Stream::HostReport(report));
    }

    /// For the checks at the end.
    #[must_use]
    pub fn has_unfinished(&self) -> bool {
        self.memory.borrow().unfinished().next().is_some()
    }
}

fn node_of(request: &ExecuteStepRequest) -> &str {
    match &request.act {
        Some(Act::Probe(it)) => &it.node_id,
        Some(Act::EnsureUsers(it)) => &it.node_id,
        Some(Act::HandOver(it)) => &it.node_id,
        Some(Act::TakeBack(it)) => &it.node_id,
        Some(Act::Promote(it)) => &it.node_id,
        Some(Act::StageEngine(it)) => &it.node_id,
        None => "",
    }
}

/// The real answer of the journal.
pub(crate) fn settled(host: &Host, request: &ExecuteStepRequest) -> Option<ExecuteStepResponse> {
    if host.variant() == Variant::Forgetful {
        return None;
    }
    slotmesh_agent::executor::settled_by(&host.memory.borrow(), request)
}
