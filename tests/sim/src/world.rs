//! One run of one seed: builds the mesh, lets everything happen, checks what must hold.
//!
//! Invariant: what happens depends on the seed and the variant alone.

mod act;
mod end;
mod first;
mod lost;
mod moved;
mod stage;
mod story;
mod upgraded;

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use slotmesh_task::{Spec, State as TaskState, Task, failover::is_parked, wire};
use slotmesh_topology::{Mode, Shard};

use crate::{
    agent::{Agent, fencer::Fencer},
    check::Violation,
    client::Client,
    controller::Controller,
    ctx::{Ctx, Event},
    fiber,
    msg::{Input, Party, Rpc, Timer},
    node::Node,
    plan::{self, Profile, Shape},
    proxy::Proxy,
    sched::{MS, Micros, SEC},
    store::{Store, Value},
    trace::Trace,
    variant::Variant,
};

/// The mesh must serve for the first time within this.
const PROVISION_LIMIT: Micros = 20 * SEC;
/// After the last accident everything must have ended and serve again within this: the longest
/// waits of the machines (preflight, settle, a lease, a stalled write) one after the other.
const CALM_DOWN_LIMIT: Micros = 60 * SEC;
/// An operator comes this long after the accidents: what can go on by itself has gone on by then.
const OPERATOR: Micros = 20 * SEC;
/// How long clients are watched once everything has ended.
const PROGRESS: Micros = 300 * MS;
/// More events mean a loop.
const EVENTS_MAX: u64 = 3_000_000;
/// Longest wait of a client while everything fails: the longest hold, and what the network adds.
const WAIT_LIMIT: Micros = crate::proxy::HELD_MAX + 500 * MS;
/// Longest wait of a client while nothing fails but primaries change.
const PLANNED_LIMIT: Micros = 250 * MS;

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The rule that was broken, if any.
    pub violation: Option<Violation>,
    /// Of everything that happened.
    pub hash: u64,
    /// How much happened.
    pub events: u64,
    /// What went wrong on purpose.
    pub profile: Profile,
    /// Switchovers that moved a primary.
    pub moved: usize,
    /// Switchovers that ended without effect.
    pub returned: usize,
    /// Writes that were acknowledged.
    pub acknowledged: usize,
    /// Writes of which the clients know nothing.
    pub ambiguous: usize,
    /// Failovers that were declared.
    pub failovers: usize,
    /// Replacements of nodes that were begun, and of them that were done.
    pub replacements: (usize, usize),
    /// Upgrades that were begun, those that were done, and those that left all as it was.
    pub upgrades: (usize, usize, usize),
    /// Acknowledged writes that asynchronous failovers left behind.
    pub left_behind: usize,
    /// Leaders that the store elected for itself.
    pub elections: usize,
    /// Watches that had missed what the store had forgotten.
    pub compacted: usize,
    /// Errors that clients saw.
    pub errors: usize,
    /// Longest wait of a client for a reply.
    pub longest: Micros,
    /// The last events, if text was asked for.
    pub lines: Vec<String>,
}

/// See the module.
pub struct World {
    ctx: fiber::World,
    shape: Shape,
    store: Store,
    controllers: Vec<Controller>,
    agents: Vec<Agent>,
    fencers: Vec<Fencer>,
    nodes: Vec<Node>,
    proxies: Vec<Proxy>,
    clients: Vec<Client>,
    stalled: BTreeMap<Party, (Micros, VecDeque<(u64, Input)>)>,
    healed: bool,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl World {
    /// The mesh of a seed, with nothing started.
    #[must_use]
    pub fn new(seed: u64, variant: Variant, trace: Trace) -> Self {
        let mut ctx = Ctx::new(seed, variant, trace);
        let shape = Shape::of(&mut ctx.rng);
        Self::of(shape, ctx)
    }

    /// As [`Self::new`], with this going wrong.
    #[must_use]
    pub fn with(profile: Profile, seed: u64, variant: Variant, trace: Trace) -> Self {
        let mut ctx = Ctx::new(seed, variant, trace);
        let shape = Shape::with(profile, &mut ctx.rng);
        Self::of(shape, ctx)
    }

    fn of(shape: Shape, mut ctx: Ctx) -> Self {
        ctx.checks.durable = shape.durability > 0;
        let ctx = Rc::new(RefCell::new(ctx));
        let instance = Rc::new(first::instance(shape));
        let (nodes, shards) = first::shards(shape, &instance);
        let store = Store::with(first::records(&instance, &shards));
        let agents = (0..shape.hosts)
            .map(|host| {
                let first = &nodes[..shape.shards * shape.nodes];
                let here = first.iter().filter(|n| n.host == host);
                let here = here.map(|n| (n.index, n.name.clone())).collect();
                let spare = (0..shape.shards).flat_map(|shard| {
                    let spare = shape.spare_of(host, shard);
                    spare.map(move |node| (shard, node))
                });
                let spare = spare.collect();
                Agent::new(host, Rc::clone(&ctx), here, spare, shape.controllers)
            })
            .collect();
        let controllers = (0..shape.controllers)
            .map(|i| Controller::new(i, Rc::clone(&ctx), Rc::clone(&instance)))
            .collect();
        let proxies = (0..shape.proxies)
            .map(|i| Proxy::new(i, shape.controllers, shape.durability))
            .collect();
        let mut keys = first::Keys {
            next: 0,
            shards: shape.shards as u16,
        };
        let clients = (0..shape.clients)
            .map(|i| Client::new(i, shape.proxies, keys.of_client()))
            .collect();
        Self {
            ctx,
            shape,
            store,
            controllers,
            agents,
            fencers: (0..shape.hosts).map(Fencer::new).collect(),
            nodes,
            proxies,
            clients,
            stalled: BTreeMap::new(),
            healed: false,
        }
    }

    /// Runs to the end, or to the first broken rule.
    #[must_use]
    pub fn run(mut self) -> Outcome {
        self.start();
        if self.until(
            PROVISION_LIMIT,
            "provisioning: the instance serves",
            Self::serves,
        ) {
            for client in &mut self.clients {
                client.start(&mut self.ctx.borrow_mut());
            }
            plan::schedule(&mut self.ctx.borrow_mut(), self.shape);
            let trouble = plan::TROUBLE + 20 * SEC;
            let healed = self.until(trouble, "the plan ends", |w| w.healed);
            let calm = healed && self.until(CALM_DOWN_LIMIT, LIVENESS, Self::is_calm);
            if calm {
                let since = self.ctx.borrow().now();
                let went_on = |w: &Self| w.progressed_since(since);
                if !self.allows_standstill() && self.until(6 * SEC, PROGRESSES, went_on) {
                    let end = self.ctx.borrow().now() + PROGRESS;
                    self.until(SEC, "time passes", |w| w.ctx.borrow().now() >= end);
                }
                self.check_end();
            }
        }
        self.outcome()
    }

    fn start(&mut self) {
        let shape = self.shape;
        self.ctx.borrow_mut().say(|| format!("{shape:?}"));
        self.store.start(&mut self.ctx.borrow_mut());
        self.controllers.iter_mut().for_each(Controller::start);
        self.agents.iter_mut().for_each(Agent::start);
        for fencer in &mut self.fencers {
            fencer.start(&mut self.ctx.borrow_mut());
        }
        for proxy in &mut self.proxies {
            proxy.start(&mut self.ctx.borrow_mut());
        }
    }

    /// Lets things happen until a condition holds; a rule is broken if it does not in time.
    fn until(&mut self, limit: Micros, rule: &'static str, done: impl Fn(&Self) -> bool) -> bool {
        let end = self.ctx.borrow().now() + limit;
        loop {
            if done(self) {
                return true;
            }
            let event = {
                let mut ctx = self.ctx.borrow_mut();
                if ctx.checks.violation.is_some() {
                    return false;
                }
                if ctx.now() > end || ctx.trace.events() > EVENTS_MAX {
                    let state = self.state();
                    ctx.checks.fail(rule, || state);
                    return false;
                }
                ctx.queue.pop()
            };
            let Some(event) = event else { return false };
            self.happen(event);
            self.check_now();
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::To(party, life, input) => self.deliver(party, life, *input),
            Event::Break(conn) => self.ctx.borrow_mut().break_conn(conn),
            Event::Script(script) => self.act(script),
        }
    }

    fn deliver(&mut self, party: Party, life: u64, input: Input) {
        {
            let mut ctx = self.ctx.borrow_mut();
            if ctx.life(party) != Some(life) {
                // Whoever asked a process that has died since gets to know that.
                if let Input::Rpc(from, Rpc::Admin { call, .. }) = input {
                    let gone = Rpc::AdminReply { call, answer: None };
                    ctx.local(party, from, gone);
                }
                return;
            }
            let now = ctx.now();
            let wakes = matches!(input, Input::Timer(Timer::Wake));
            if let Some((until, waiting)) = self.stalled.get_mut(&party)
                && (now < *until || (!waiting.is_empty() && !wakes))
            {
                waiting.push_back((life, input));
                return;
            }
            ctx.trace.mix(&[now, party.number(), life]);
        }
        if matches!(input, Input::Timer(Timer::Wake)) {
            let mut ctx = self.ctx.borrow_mut();
            ctx.stopped.remove(&party);
            let now = ctx.now();
            ctx.woken.insert(party, now);
            drop(ctx);
            if let Some((_, waiting)) = self.stalled.remove(&party) {
                for (life, input) in waiting {
                    if self.ctx.borrow().life(party) == Some(life) {
                        self.give(party, input);
                    }
                }
            }
            return;
        }
        self.give(party, input);
    }

    fn give(&mut self, party: Party, input: Input) {
        match party {
            Party::Store => self.store.handle(&mut self.ctx.borrow_mut(), input),
            Party::Controller(i) => self.controllers[i].handle(input),
            Party::Agent(i) => self.agents[i].handle(input),
            Party::Node(i) => self.nodes[i].handle(&mut self.ctx.borrow_mut(), input),
            Party::Proxy(i) => self.proxies[i].handle(&mut self.ctx.borrow_mut(), input),
            Party::Client(i) => self.clients[i].handle(&mut self.ctx.borrow_mut(), input),
            Party::Fencer(i) => self.fencers[i].handle(&mut self.ctx.borrow_mut(), input),
        }
    }

    fn tasks(&self) -> impl Iterator<Item = Task> + '_ {
        self.store.items.values().filter_map(|s| match &s.value {
            Value::Task(record) => wire::task_from(record).ok(),
            _ => None,
        })
    }

    fn shards(&self) -> impl Iterator<Item = Shard> + '_ {
        self.store.items.values().filter_map(|s| match &s.value {
            Value::Shard(record) => slotmesh_topology::wire::shard_from(record).ok(),
            _ => None,
        })
    }

    fn serves(&self) -> bool {
        self.tasks().all(|t| t.state == TaskState::Done)
    }

    fn allows_standstill(&self) -> bool {
        self.ctx.borrow().checks.data_was_lost && self.shards().any(|s| s.mode != Mode::Serving)
    }

    /// Every task has ended, every shard serves with all its replicas.
    fn is_calm(&self) -> bool {
        let lost = self.ctx.borrow().checks.data_was_lost;
        let serving = |s: Shard| match s.mode {
            Mode::Serving => s.members.iter().all(|m| m.in_sync || m.node == s.primary),
            Mode::Fenced(_) => lost,
            Mode::Provisioning | Mode::Handover(_) | Mode::FailingOver(_) => false,
        };
        let ended = |t: Task| t.state.is_ended() && !waits(&t);
        // A record may not tell yet that its primary has died.
        let lives = |s: Shard| s.mode != Mode::Serving || self.takes_writes(&s);
        self.tasks().all(ended)
            && self.shards().all(serving)
            && self.shards().all(lives)
            && self.shards().all(|s| self.has_let_go(&s))
    }

    fn waits_for_operator(&self) -> bool {
        self.tasks().any(|t| waits(&t))
    }

    fn progressed_since(&self, since: Micros) -> bool {
        self.clients
            .iter()
            .all(|c| c.progress.iter().all(|at| *at > since))
    }

    /// What went wrong, in a line.
    fn state(&self) -> String {
        let tasks: Vec<String> = self
            .tasks()
            .filter(|t| !t.state.is_ended())
            .map(|t| format!("{} {:?} {:?}", t.id, t.state, t.spec))
            .collect();
        let shards: Vec<String> = self
            .shards()
            .map(|s| {
                let behind: Vec<_> = s
                    .members
                    .iter()
                    .filter(|m| !m.in_sync)
                    .map(|m| m.node.to_string())
                    .collect();
                format!(
                    "{}: {} epoch {} behind {behind:?}",
                    s.id,
                    s.mode.name(),
                    s.epoch
                )
            })
            .collect();
        format!("tasks {tasks:?}; shards {shards:?}")
    }
}

fn is_replacement(task: &Task) -> bool {
    matches!(task.spec, Spec::Replace(_))
}

fn is_upgrade(task: &Task) -> bool {
    matches!(task.spec, Spec::Upgrade(_))
}

/// It waits for an operator in the middle of its work.
fn waits(task: &Task) -> bool {
    is_parked(task) || has_menu(task) && task.is_parked()
}

fn has_menu(task: &Task) -> bool {
    is_replacement(task) || is_upgrade(task)
}

const LIVENESS: &str = "liveness: after the accidents every task ends and every shard serves";
const PROGRESSES: &str = "liveness: after the accidents every client goes on at every shard";
