//! A client: pipelines commands through a proxy and remembers what it was promised.
//!
//! Invariant: every write has an id of its own, so nothing that happens to it goes unnoticed.

use std::collections::VecDeque;

use rand::Rng;

use crate::{
    ctx::Ctx,
    msg::{ConnId, Input, Party, Stream, Timer},
    resp::{self, Reply},
    sched::{MS, Micros},
};

/// Most commands on their way at once.
const PIPELINE: usize = 4;

/// What was asked.
#[derive(Clone, Debug)]
enum Ask {
    Set(u64),
    Push(u64),
    Get,
    Exec([u64; 2]),
    /// OK or QUEUED of a transaction.
    Queued,
}

/// See the module.
#[derive(Debug)]
pub struct Client {
    index: usize,
    proxies: usize,
    /// Keys: one register and one list per shard.
    keys: Vec<(u32, u32)>,
    conn: Option<ConnId>,
    input: Vec<u8>,
    asked: VecDeque<(Ask, usize, Micros)>,
    turn: usize,
    /// Writes that were acknowledged.
    pub acknowledged: Vec<u64>,
    /// What it has read through a proxy whose reads wait for what they may have seen.
    pub seen: Vec<u64>,
    /// Writes of which nobody knows.
    pub ambiguous: Vec<u64>,
    /// Error replies.
    pub errors: Vec<String>,
    /// When the last reply came that was no error, by shard.
    pub progress: Vec<Micros>,
    /// Longest wait for a reply.
    pub longest: Micros,
    /// The same, by proxy.
    pub by_proxy: Vec<Micros>,
    /// The proxy that it is connected to.
    at: usize,
    /// The last acknowledged SET, by shard, and all that may happen.
    registers: Vec<(u64, Vec<u64>)>,
    /// SETs that were read before they were acknowledged.
    early: Vec<u64>,
    /// Length of the list as last told, by shard.
    lengths: Vec<u64>,
    /// Pause between pipelines.
    pub pace: Micros,
}

impl Client {
    /// A client with keys of its own.
    #[must_use]
    pub fn new(index: usize, proxies: usize, keys: Vec<(u32, u32)>) -> Self {
        let shards = keys.len();
        Self {
            index,
            proxies,
            keys,
            conn: None,
            input: Vec::new(),
            asked: VecDeque::new(),
            turn: index,
            acknowledged: Vec::new(),
            seen: Vec::new(),
            ambiguous: Vec::new(),
            errors: Vec::new(),
            progress: vec![0; shards],
            longest: 0,
            by_proxy: vec![0; proxies],
            at: 0,
            registers: vec![(0, Vec::new()); shards],
            early: Vec::new(),
            lengths: vec![0; shards],
            pace: 34 * MS,
        }
    }

    fn party(&self) -> Party {
        Party::Client(self.index)
    }

    /// Begins.
    pub fn start(&mut self, ctx: &mut Ctx) {
        ctx.born(self.party());
        ctx.timer(self.party(), 1, Timer::Tick);
    }

    /// Something happens to it.
    pub fn handle(&mut self, ctx: &mut Ctx, input: Input) {
        match input {
            Input::Timer(_) => {
                if self.conn.is_none() {
                    self.at = self.turn % self.proxies;
                    self.turn += 1;
                    self.conn = Some(ctx.open(self.party(), Party::Proxy(self.at)));
                }
                if self.asked.len() < PIPELINE {
                    self.ask(ctx);
                }
                let wait = ctx.rng.random_range(self.pace / 2..self.pace * 2);
                ctx.timer(self.party(), wait, Timer::Tick);
            }
            Input::Stream(conn, Stream::Bytes(bytes)) if self.conn == Some(conn) => {
                self.input.extend_from_slice(&bytes);
                while let Some((reply, used)) = resp::reply(&self.input) {
                    self.input.drain(..used);
                    self.answered(ctx, &reply);
                }
            }
            Input::Closed(conn) if self.conn == Some(conn) => {
                self.conn = None;
                self.input.clear();
                for (ask, shard, _) in std::mem::take(&mut self.asked) {
                    self.unknown(&ask, shard);
                }
            }
            _ => {}
        }
    }

    fn ask(&mut self, ctx: &mut Ctx) {
        let Some(conn) = self.conn else { return };
        let (now, mut text) = (ctx.now(), String::new());
        for _ in 0..ctx.rng.random_range(1..=2) {
            let shard = ctx.rng.random_range(0..self.keys.len());
            let (register, list) = self.keys[shard];
            let (register, list) = (format!("k{register}"), format!("k{list}"));
            let id = ctx.call();
            let word = id.to_string();
            match ctx.rng.random_range(0..10) {
                0..3 => {
                    text += &resp::encode(&["SET", &register, &word]);
                    self.asked.push_back((Ask::Set(id), shard, now));
                }
                3..7 => {
                    text += &resp::encode(&["RPUSH", &list, &word]);
                    self.asked.push_back((Ask::Push(id), shard, now));
                }
                7..9 => {
                    text += &resp::encode(&["GET", &register]);
                    self.asked.push_back((Ask::Get, shard, now));
                }
                _ => {
                    let second = ctx.call();
                    text += &resp::encode(&["MULTI"]);
                    text += &resp::encode(&["RPUSH", &list, &word]);
                    text += &resp::encode(&["RPUSH", &list, &second.to_string()]);
                    text += &resp::encode(&["EXEC"]);
                    let queued = (Ask::Queued, shard, now);
                    self.asked.extend([queued.clone(), queued.clone(), queued]);
                    self.asked.push_back((Ask::Exec([id, second]), shard, now));
                }
            }
        }
        ctx.send(self.party(), conn, Stream::Bytes(text.into_bytes()));
    }

    fn waited(&mut self, time: Micros) {
        self.longest = self.longest.max(time);
        let here = &mut self.by_proxy[self.at];
        *here = time.max(*here);
    }

    /// What has no answer yet has waited, too.
    pub fn count_unanswered(&mut self, now: Micros) {
        if let Some((_, _, since)) = self.asked.front() {
            self.waited(now - *since);
        }
    }

    fn answered(&mut self, ctx: &mut Ctx, reply: &Reply) {
        let Some((ask, shard, since)) = self.asked.pop_front() else {
            let index = self.index;
            return ctx.checks.fail("A8: one reply for each request", || {
                format!("client {index} got {reply:?} for nothing")
            });
        };
        self.waited(ctx.now() - since);
        if let Reply::Error(text) = reply {
            ctx.trace.mix(&[13, self.index as u64]);
            let (index, now) = (self.index, ctx.now());
            ctx.trace
                .say(now, || format!("client {index}: {ask:?} failed: {text}"));
            self.errors.push(text.clone());
            if text.contains("unknown") || text.contains("UNCONFIRMED") || text.contains("WAITFAIL")
            {
                self.unknown(&ask, shard);
            }
            return;
        }
        self.progress[shard] = ctx.now();
        match (&ask, reply) {
            (Ask::Set(id), Reply::Status) => {
                if self.early.contains(id) {
                    let index = self.index;
                    ctx.checks
                        .fail("A8: a client's commands are executed in order", || {
                            format!("client {index} read {id} before it set it")
                        });
                }
                self.acknowledged.push(*id);
                ctx.checks.acknowledged(self.index, *id);
                // What is unknown may still happen: a proxy may hold it.
                self.registers[shard].0 = *id;
            }
            (Ask::Push(id), Reply::Number(Some(length))) => {
                self.acknowledged.push(*id);
                ctx.checks.acknowledged(self.index, *id);
                self.grew(ctx, shard, *length);
            }
            (Ask::Get, Reply::Number(value)) => self.read(ctx, shard, value.unwrap_or(0)),
            (Ask::Exec(ids), Reply::Array(items)) => {
                for (id, item) in ids.iter().zip(items) {
                    if let Reply::Number(Some(length)) = item {
                        self.acknowledged.push(*id);
                        ctx.checks.acknowledged(self.index, *id);
                        self.grew(ctx, shard, *length);
                    }
                }
            }
            (Ask::Queued, Reply::Status) => {}
            (ask, reply) => {
                let index = self.index;
                ctx.checks.fail("A8: a reply fits its request", || {
                    format!("client {index} got {reply:?} for {ask:?}")
                });
            }
        }
    }

    /// A list only grows: a length that was told before means that something was lost.
    fn grew(&mut self, ctx: &mut Ctx, shard: usize, length: u64) {
        let before = std::mem::replace(&mut self.lengths[shard], length);
        if length <= before && !ctx.checks.may_be_gone() {
            let index = self.index;
            ctx.checks.fail("A8/I5: no acknowledged write is lost", || {
                format!("client {index}: list of shard {shard} has {length} after {before}")
            });
        }
    }

    /// A client sees its own writes.
    fn read(&mut self, ctx: &mut Ctx, shard: usize, value: u64) {
        if ctx.checks.durable && value > 0 && crate::proxy::is_gated(self.at) {
            self.seen.push(value);
        }
        let (last, maybe) = &self.registers[shard];
        // A read that is repeated after its connection was lost may see a write that was sent after
        // it on that connection; then that write's outcome is unknown.
        if self
            .asked
            .iter()
            .any(|(ask, ..)| matches!(ask, Ask::Set(id) if *id == value))
        {
            self.early.push(value);
            return;
        }
        if value != *last && !maybe.contains(&value) && !ctx.checks.may_be_gone() {
            let index = self.index;
            ctx.checks.fail("A8: a client reads what it wrote", || {
                format!("client {index}: register of shard {shard} is {value}, was set to {last}")
            });
        }
    }

    fn unknown(&mut self, ask: &Ask, shard: usize) {
        match ask {
            Ask::Set(id) => {
                self.ambiguous.push(*id);
                self.registers[shard].1.push(*id);
            }
            Ask::Push(id) => self.ambiguous.push(*id),
            Ask::Exec(ids) => self.ambiguous.extend(ids),
            Ask::Get | Ask::Queued => {}
        }
    }
}
