//! The fencer of a host: a process of its own that ends primaries whose agent has fallen silent.
//!
//! Invariant: it kills nothing that its replicas are content with, so an agent's death alone stops
//! no node.

use crate::{
    ctx::{Ctx, Event},
    msg::{Input, Party, Rpc, Timer, Watched},
    plan::Script,
    redis::{Admin, Answer},
    sched::{MS, Micros},
};

/// By how much the end of a right is behind the agent's own end of it.
const GRACE: Micros = 500 * MS;
/// Between looks at what nobody speaks for.
const LOOK_EVERY: Micros = 100 * MS;
/// A replica that has acknowledged nothing for longer is not content.
const LAG_MAX_S: u64 = 2;

/// See the module.
#[derive(Debug)]
pub struct Fencer {
    index: usize,
    watched: Vec<(Watched, u64)>,
    asked: Vec<(u64, usize)>,
}

impl Fencer {
    /// A fencer that watches nothing yet.
    #[must_use]
    pub fn new(index: usize) -> Self {
        Self {
            index,
            watched: Vec::new(),
            asked: Vec::new(),
        }
    }

    fn party(&self) -> Party {
        Party::Fencer(self.index)
    }

    /// Begins.
    pub fn start(&mut self, ctx: &mut Ctx) {
        ctx.born(self.party());
        ctx.timer(self.party(), LOOK_EVERY, Timer::Tick);
    }

    /// Dies.
    pub fn crash(&mut self, ctx: &mut Ctx) {
        ctx.died(self.party());
        *self = Self::new(self.index);
    }

    /// Something happens to it.
    pub fn handle(&mut self, ctx: &mut Ctx, input: Input) {
        match input {
            Input::Rpc(_, Rpc::Pet { watched, keep }) => {
                let with_process = |w: Watched| Some((w, ctx.life(Party::Node(w.node))?));
                self.watched.retain(|(w, _)| keep.contains(&w.node));
                self.watched
                    .extend(watched.into_iter().filter_map(with_process));
            }
            Input::Rpc(_, Rpc::AdminReply { call, answer }) => {
                let Some(at) = self.asked.iter().position(|(c, _)| *c == call) else {
                    return;
                };
                let (_, node) = self.asked.swap_remove(at);
                self.judge(ctx, node, answer.map(|a| *a));
            }
            Input::Timer(Timer::Tick) => {
                self.look(ctx);
                ctx.timer(self.party(), LOOK_EVERY, Timer::Tick);
            }
            _ => {}
        }
    }

    fn overdue(&self, ctx: &Ctx) -> Vec<(Watched, u64)> {
        let over = |w: &Watched| ctx.now() >= w.until + GRACE;
        self.watched
            .iter()
            .filter(|(w, _)| over(w))
            .copied()
            .collect()
    }

    fn look(&mut self, ctx: &mut Ctx) {
        // What did not answer the last look is as bad as what answers wrongly.
        for (_, node) in std::mem::take(&mut self.asked) {
            self.judge(ctx, node, None);
        }
        for (watched, life) in self.overdue(ctx) {
            let node = Party::Node(watched.node);
            if ctx.life(node) == Some(life) {
                let call = ctx.call();
                self.asked.push((call, watched.node));
                let command = Admin::Info;
                ctx.local(self.party(), node, Rpc::Admin { call, command });
            }
        }
    }

    fn judge(&mut self, ctx: &mut Ctx, node: usize, answer: Option<Answer>) {
        let overdue = self.overdue(ctx);
        let Some((watched, life)) = overdue.iter().find(|(w, _)| w.node == node) else {
            return;
        };
        let content = match answer {
            Some(Answer::Info(text)) => contented(&text) >= watched.replicas,
            _ => false,
        };
        if !content && ctx.life(Party::Node(node)) == Some(*life) {
            ctx.say(|| format!("fencer {}: node {node} has no right any more", self.index));
            let now = ctx.now();
            ctx.queue.at(now, Event::Script(Script::Kill(node, *life)));
        }
    }
}

/// Replicas that are online and have acknowledged lately.
fn contented(info: &str) -> usize {
    let replicas = info
        .lines()
        .filter(|l| l.starts_with("slave") && l.contains("state=online"));
    let lag = |line: &str| {
        line.rsplit_once("lag=")
            .and_then(|(_, lag)| lag.trim().parse().ok())
    };
    replicas
        .filter(|line| lag(line).is_some_and(|lag: u64| lag <= LAG_MAX_S))
        .count()
}
