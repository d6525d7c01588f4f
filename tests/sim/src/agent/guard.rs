//! The right to serve of this host's primaries: the real decision and the real promises, around them
//! what the agent's guard does.
//!
//! Invariant: what has no right is fenced again at every look; a right is counted from before it was
//! asked for; the fencer watches from before the first right is given until after the last is gone.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
    time::Duration,
};

use slotmesh_agent::{
    fence::{UserKind, parse_user},
    lease::{Boot, MARGIN, Right, Sight, TTL, decide, is_guarded, promises::Promises},
    node::Assigned,
};
use slotmesh_proto::agent::v1::{NodeSpec, PromiseNotToPromoteRequest};

use super::{Got, Host, Seat};
use crate::{
    fiber::Fiber,
    msg::{Party, Rpc, Watched},
    plan::{Point, Script},
    redis::{Admin, Answer},
    sched::{MS, Micros},
    variant::Variant,
};

/// As the real guard has them.
const LOOK_EVERY: Micros = 50 * MS;
const ASK_EVERY: Micros = 500 * MS;
const ASK_AGAIN: Micros = 150 * MS;
const ASK_WITHIN: Micros = 400 * MS;
const HARD_AFTER: Micros = 250 * MS;
const TRY_WITHIN: Micros = 200 * MS;
const TRIES: usize = 2;
const UNANSWERED_MAX: usize = 1_024;
const UNHEARD_MAX: Duration = Duration::from_millis(1_200);

/// What the right to serve rests on; gone with the agent's life.
#[derive(Debug)]
pub(crate) struct Rights {
    started: Boot,
    sent: VecDeque<(u64, Boot)>,
    /// Until when the lease gives a right, and the revision at which it began.
    kept: Option<(Boot, u64)>,
    /// By node: epoch and end of what all replicas' agents have promised.
    promised: BTreeMap<String, (u64, Boot)>,
    fenced: BTreeSet<String>,
    fenced_since: BTreeMap<String, Micros>,
    /// Fenced nodes that were found without any right to take.
    bare: BTreeSet<String>,
    /// Primaries that the fencer was told of.
    watched: BTreeSet<String>,
    ask_at: BTreeMap<String, Micros>,
    busy: BTreeSet<String>,
    /// What this agent has promised to others.
    pub(crate) given: Promises,
}

pub(crate) fn boot(now: Micros) -> Boot {
    Boot(now / MS)
}

impl Rights {
    pub(crate) fn since(now: Micros) -> Self {
        Self {
            started: boot(now),
            sent: VecDeque::new(),
            kept: None,
            promised: BTreeMap::new(),
            fenced: BTreeSet::new(),
            fenced_since: BTreeMap::new(),
            bare: BTreeSet::new(),
            watched: BTreeSet::new(),
            ask_at: BTreeMap::new(),
            busy: BTreeSet::new(),
            given: Promises::since(boot(now)),
        }
    }

    pub(crate) fn reporting(&mut self, number: u64, now: Micros) {
        if self.sent.len() >= UNANSWERED_MAX {
            self.sent.pop_front();
        }
        if number == 1 {
            self.sent.clear();
        }
        self.sent.push_back((number, boot(now)));
    }

    pub(crate) fn kept(&mut self, number: u64, ttl_ms: u32, revision: u64) {
        let found = self.sent.iter().find(|(n, _)| *n == number).copied();
        let Some((number, sent)) = found else { return };
        self.sent.retain(|(n, _)| *n > number);
        let ttl = Duration::from_millis(ttl_ms.into()).min(TTL);
        let until = sent.plus(ttl.saturating_sub(MARGIN));
        let until = match self.kept {
            Some((old, since)) if since == revision => old.max(until),
            _ => until,
        };
        self.kept = Some((until, revision));
    }

    /// As the real lease: reports of this session are not answered, by controllers that know of leases.
    pub(crate) fn is_unheard(&self, now: Micros) -> bool {
        let oldest = self.sent.front().map(|(_, sent)| *sent);
        self.kept.is_some() && oldest.is_some_and(|sent| sent.until(boot(now)) > UNHEARD_MAX)
    }

    fn sight(&self, spec: &NodeSpec, revision: u64, now: Micros, lifts_early: bool) -> Sight {
        let kept = self
            .kept
            .filter(|(_, since)| lifts_early || revision >= *since);
        let promised = self.promised.get(&spec.node_id);
        Sight {
            now: boot(now),
            started: self.started,
            replaceable: !spec.replica_agents.is_empty(),
            leased: kept.map(|(until, _)| until),
            promised: promised
                .filter(|(epoch, _)| *epoch == spec.epoch)
                .map(|(_, until)| *until),
            fenced: self.fenced.contains(&spec.node_id),
        }
    }
}

impl Host {
    fn right(&self, spec: &NodeSpec, revision: u64) -> Right {
        let early = self.variant() == Variant::LiftsEarly;
        let sight = self
            .rights
            .borrow()
            .sight(spec, revision, self.now(), early);
        decide(&sight)
    }

    /// Whether a node may be given rights.
    pub(crate) fn may_serve(&self, assigned: &Assigned) -> bool {
        if self.variant() == Variant::NoSelfFence || !is_guarded(&assigned.spec) {
            return true;
        }
        let right = self.right(&assigned.spec, assigned.revision);
        let watched = (self.rights.borrow().watched).contains(&assigned.spec.node_id);
        watched && matches!(right, Right::Serve { .. } | Right::Ask { .. })
    }

    /// For the step that promotes.
    pub(crate) fn has_promised(&self, instance: &str, shard: &str) -> bool {
        let left = self
            .rights
            .borrow()
            .given
            .left(instance, shard, boot(self.now()));
        left.is_some() && self.variant() != Variant::IgnoresPromise
    }

    /// Somebody asks for a promise.
    pub(crate) fn promise(&self, request: &PromiseNotToPromoteRequest) -> bool {
        let known = self
            .memory
            .borrow()
            .epoch(&request.instance_id, &request.shard_id);
        let now = boot(self.now());
        let given = self.rights.borrow_mut().given.give(request, known, now);
        given.is_ok()
    }
}

/// Looks until the agent dies.
pub(crate) async fn run(host: Rc<Host>) {
    let mut work: Vec<Fiber> = Vec::new();
    loop {
        let seats = host.seats.borrow().clone();
        look(&host, &seats, &mut work);
        let until = host.now() + LOOK_EVERY;
        let wake = crate::msg::Timer::Call(0);
        host.world.borrow_mut().timer(host.me, LOOK_EVERY, wake);
        // Asking and fencing run beside it: their answers wake it.
        loop {
            work.retain_mut(|fiber| !fiber.poll());
            if host.now() >= until || host.news.take() {
                break;
            }
            pending_once().await;
        }
    }
}

/// Until the agent's next event.
async fn pending_once() {
    let mut first = true;
    std::future::poll_fn(|_| {
        if std::mem::take(&mut first) {
            return std::task::Poll::Pending;
        }
        std::task::Poll::Ready(())
    })
    .await;
}

fn look(host: &Rc<Host>, seats: &[Seat], work: &mut Vec<Fiber>) {
    let assigned = host.assigned.borrow().clone();
    // As long as it knows nothing, what the fencer was told before stands.
    if assigned.is_empty() {
        return;
    }
    let (mut watched, mut keep) = (Vec::new(), Vec::new());
    let mut serving = BTreeSet::new();
    for seat in seats {
        let Some(assigned) = assigned.get(&seat.name).filter(|a| is_guarded(&a.spec)) else {
            let mut rights = host.rights.borrow_mut();
            rights.fenced.remove(&seat.name);
            rights.promised.remove(&seat.name);
            rights.ask_at.remove(&seat.name);
            rights.fenced_since.remove(&seat.name);
            rights.bare.remove(&seat.name);
            continue;
        };
        let watch = |until: Boot| Watched {
            node: seat.node,
            until: until.0 * MS,
            replicas: (assigned.spec.users.iter())
                .filter(|user| user.replication)
                .count(),
        };
        match host.right(&assigned.spec, assigned.revision) {
            Right::Serve { until } => {
                lift(host, &seat.name);
                serving.insert(seat.name.clone());
                watched.extend(until.map(watch));
            }
            Right::Ask { until } => {
                lift(host, &seat.name);
                serving.insert(seat.name.clone());
                watched.push(watch(until));
                work.extend(ask(host, assigned));
            }
            Right::Unproven => {
                keep.push(seat.node);
                work.extend(ask(host, assigned));
            }
            Right::Fence if host.variant() == Variant::NoSelfFence => {}
            Right::Fence => {
                if !host.rights.borrow().bare.contains(&seat.name) {
                    keep.push(seat.node);
                }
                work.extend(fence(host, seat));
            }
        }
    }
    if host.variant() != Variant::NoSelfFence {
        let pet = Rpc::Pet { watched, keep };
        host.world
            .borrow_mut()
            .local(host.me, Party::Fencer(host.index), pet);
    }
    host.rights.borrow_mut().watched = serving;
}

fn lift(host: &Host, node: &str) {
    let mut rights = host.rights.borrow_mut();
    rights.fenced.remove(node);
    rights.fenced_since.remove(node);
    rights.bare.remove(node);
}

/// Asks the agents of all replicas, unless that is under way or was just done.
fn ask(host: &Rc<Host>, assigned: &Assigned) -> Option<Fiber> {
    let (now, node) = (host.now(), assigned.spec.node_id.clone());
    {
        let mut rights = host.rights.borrow_mut();
        let key = format!("ask {node}");
        if rights.ask_at.get(&node).is_some_and(|at| now < *at) || !rights.busy.insert(key) {
            return None;
        }
    }
    let (host, spec) = (Rc::clone(host), assigned.spec.clone());
    Some(Fiber::new(async move {
        let asked = host.now();
        let request = PromiseNotToPromoteRequest {
            instance_id: spec.instance_id.clone(),
            shard_id: spec.shard_id.clone(),
            epoch: spec.epoch,
            ttl_ms: u32::try_from(TTL.as_millis()).unwrap_or(u32::MAX),
        };
        let calls: Vec<u64> = spec
            .replica_agents
            .iter()
            .map(|to| send(&host, to, &request))
            .collect();
        let (mut all, mut refused) = (true, false);
        for call in calls {
            let left = (asked + ASK_WITHIN).saturating_sub(host.now()).max(1);
            match host.answers.get(&host.world, host.me, call, left).await {
                Some(Got::Promise(true)) => {}
                Some(Got::Promise(false)) => (all, refused) = (false, true),
                _ => all = false,
            }
        }
        let mut rights = host.rights.borrow_mut();
        if all {
            let until = boot(asked).plus(TTL.saturating_sub(MARGIN));
            rights.promised.insert(node.clone(), (spec.epoch, until));
            host.world.borrow_mut().point(Point::Promised);
        } else if refused {
            rights.promised.remove(&node);
        }
        let pause = if all { ASK_EVERY } else { ASK_AGAIN };
        rights.ask_at.insert(node.clone(), host.now() + pause);
        rights.busy.remove(&format!("ask {node}"));
    }))
}

fn send(host: &Host, to: &str, request: &PromiseNotToPromoteRequest) -> u64 {
    let mut ctx = host.world.borrow_mut();
    let call = ctx.call();
    if let Some(index) = to.strip_prefix('h').and_then(|i| i.parse().ok()) {
        let ask = Rpc::Promise {
            call,
            request: request.clone(),
        };
        ctx.rpc(host.me, Party::Agent(index), ask);
    }
    call
}

/// Takes what the node has: writes first, everything a little later.
fn fence(host: &Rc<Host>, seat: &Seat) -> Option<Fiber> {
    let now = host.now();
    let hard = {
        let mut rights = host.rights.borrow_mut();
        rights.fenced.insert(seat.name.clone());
        let since = *rights.fenced_since.entry(seat.name.clone()).or_insert(now);
        if !rights.busy.insert(format!("sever {}", seat.name)) {
            return None;
        }
        now >= since + HARD_AFTER
    };
    let (host, seat) = (Rc::clone(host), seat.clone());
    Some(Fiber::new(async move {
        let taken = sever(&host, &seat, hard).await;
        let mut rights = host.rights.borrow_mut();
        rights.busy.remove(&format!("sever {}", seat.name));
        if !taken && rights.fenced.contains(&seat.name) {
            rights.bare.insert(seat.name.clone());
        }
    }))
}

/// Whether there was something to take.
async fn sever(host: &Host, seat: &Seat, hard: bool) -> bool {
    for _ in 0..TRIES {
        if host.world.borrow().life(Party::Node(seat.node)).is_none() {
            return false;
        }
        if let Some(taken) = take(host, seat, hard).await {
            return taken;
        }
    }
    if host.world.borrow().life(Party::Node(seat.node)).is_some() {
        host.kill(seat.node);
    }
    false
}

async fn take(host: &Host, seat: &Seat, hard: bool) -> Option<bool> {
    let Answer::Users(users) = admin(host, seat, Admin::Users).await? else {
        return None;
    };
    let mut taken = false;
    for (name, user) in &users {
        let proxy = parse_user(name).is_some_and(|(kind, _)| kind == UserKind::Proxy);
        if proxy && user.full {
            admin(host, seat, Admin::SoftFence(name.clone())).await?;
            taken = true;
        }
    }
    if hard && !users.is_empty() {
        admin(host, seat, Admin::Delete(users.into_keys().collect())).await?;
        taken = true;
    }
    Some(taken)
}

async fn admin(host: &Host, seat: &Seat, command: Admin) -> Option<Answer> {
    let call = {
        let mut ctx = host.world.borrow_mut();
        let call = ctx.call();
        ctx.local(
            host.me,
            Party::Node(seat.node),
            Rpc::Admin { call, command },
        );
        call
    };
    match host
        .answers
        .get(&host.world, host.me, call, TRY_WITHIN)
        .await
    {
        Some(Got::Admin(answer)) => answer,
        _ => None,
    }
}

impl Host {
    /// SIGKILL.
    pub(crate) fn kill(&self, node: usize) {
        let mut ctx = self.world.borrow_mut();
        let now = ctx.now();
        let kill = Script::Kill(node, ctx.life(Party::Node(node)).unwrap_or(0));
        ctx.queue.at(now, crate::ctx::Event::Script(kill));
    }
}
