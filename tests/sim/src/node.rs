//! A node: its disk and its process, which answers proxies, replicas and its agent.
//!
//! Invariant: everything that the engine would refuse is refused here by the same rule.

mod commands;
mod exchange;
mod replication;

pub use exchange::{Ending, Snapshot};

use rand::Rng;

use crate::{
    ctx::Ctx,
    engine,
    msg::{ConnId, Input, Party, Rpc, Stream, Timer},
    plan::Point,
    redis::{Admin, Answer, Failover, Kind, LinkState, Op, Process, Rights, User},
    sched::{MS, Micros, SEC},
};

/// How often the engine looks around while nothing is urgent.
const CRON: Micros = 100 * MS;

/// See the module.
#[derive(Debug)]
pub struct Node {
    /// Its number.
    pub index: usize,
    /// Its shard's number.
    pub shard: usize,
    /// Its host.
    pub host: usize,
    /// As the topology names it.
    pub name: String,
    /// Where it is reached.
    pub address: String,
    /// What survives the process.
    pub disk: Vec<Op>,
    /// In whose place this stands until there is an append-only file of the same data.
    snapshot: Option<Snapshot>,
    /// When that file will be whole.
    whole_at: Option<Micros>,
    /// Version of its files, as the engine that wrote them has it.
    format: u32,
    /// The process, if it runs.
    pub process: Option<Process>,
    cron: u64,
    users: std::collections::BTreeMap<String, User>,
}

impl Node {
    /// A node that has never run.
    #[must_use]
    pub fn new(index: usize, shard: usize, host: usize, name: String) -> Self {
        Self {
            index,
            shard,
            host,
            name,
            address: address(index),
            disk: Vec::new(),
            snapshot: None,
            whole_at: None,
            format: 0,
            process: None,
            cron: 0,
            users: std::collections::BTreeMap::new(),
        }
    }

    pub(super) fn party(&self) -> Party {
        Party::Node(self.index)
    }

    /// Starts the process. Its agent does this.
    pub fn start(&mut self, ctx: &mut Ctx, engine: &str) {
        if self.process.is_some() {
            return;
        }
        if let Some(why) = self.unstartable(ctx, engine) {
            return ctx.say(|| format!("{}: {engine} does not start: {why}", self.name));
        }
        ctx.born(self.party());
        let run_id = format!("run{}", ctx.call());
        let mut process = self.launch(ctx, run_id.clone(), engine);
        ctx.say(|| {
            let all = process.log.len();
            format!("{} starts as {run_id}, {all} operations", self.name)
        });
        ctx.checks.began(self.shard, &run_id);
        process.loading_until = ctx.now() + ctx.rng.random_range(MS..40 * MS);
        self.process = Some(process);
        let phase = ctx.rng.random_range(0..CRON);
        self.cron = 0;
        ctx.timer(self.party(), phase, Timer::Tick);
    }

    /// Broken on purpose: the users of the life before are there again.
    pub fn unfence(&mut self) {
        if let Some(process) = &mut self.process {
            process.users = std::mem::take(&mut self.users);
        }
    }

    /// Ends the process; the first `kept` operations survive.
    pub fn crash(&mut self, ctx: &mut Ctx, kept: usize) {
        let Some(process) = self.process.take() else {
            return;
        };
        ctx.say(|| {
            let all = process.log.len();
            format!(
                "{} dies, {} of {all} operations survive",
                self.name,
                kept.min(all)
            )
        });
        ctx.checks.ended(self.shard, &process.run_id, &process.log);
        self.users = process.users;
        ctx.settling.remove(&self.party());
        self.whole_at = None;
        self.format = engine::format(&process.engine);
        // Until its file is whole, only the snapshot with which it began is there.
        if self.snapshot.is_some() {
            return ctx.died(self.party());
        }
        self.disk = process.log;
        let lost = self.disk.split_off(kept.min(self.disk.len()));
        ctx.checks.data_lost(&lost);
        ctx.died(self.party());
    }

    /// Something happens to it.
    pub fn handle(&mut self, ctx: &mut Ctx, input: Input) {
        let Some(mut process) = self.process.take() else {
            return;
        };
        match input {
            Input::Opened(_) => {}
            Input::Closed(conn) => self.closed(ctx, &mut process, conn),
            Input::Stream(conn, message) => self.stream(ctx, &mut process, conn, message),
            Input::Rpc(from, Rpc::Admin { call, command }) => {
                let answer = self.admin(ctx, &mut process, command);
                let reply = Rpc::AdminReply {
                    call,
                    answer: Some(Box::new(answer)),
                };
                ctx.local(self.party(), from, reply);
            }
            Input::Timer(Timer::Tick) => {
                self.tick(ctx, &mut process);
                ctx.timer(self.party(), CRON, Timer::Tick);
            }
            Input::Rpc(..) | Input::Timer(_) => {}
        }
        self.process = Some(process);
    }

    fn stream(&mut self, ctx: &mut Ctx, p: &mut Process, conn: ConnId, message: Stream) {
        let me = self.party();
        match message {
            Stream::Bytes(bytes) => {
                p.clients
                    .entry(conn)
                    .or_default()
                    .input
                    .extend_from_slice(&bytes);
                self.serve(ctx, p, conn);
            }
            Stream::TargetLogin { user, password } => {
                let ok = p.admits(&user, &password, true);
                if ok {
                    p.clients.entry(conn).or_default().user = user;
                }
                ctx.send(me, conn, Stream::TargetLoginAnswer(ok));
            }
            Stream::GetAck if p.clients.contains_key(&conn) => self.ack(ctx, p),
            Stream::Psync(psync) => self.psync(ctx, p, conn, &psync),
            Stream::PsyncAnswer(answer) if p.link_conn == Some(conn) => {
                self.psync_answered(ctx, p, conn, answer);
            }
            Stream::Feed { offset, ops } if p.link_conn == Some(conn) => {
                p.link_heard = ctx.now();
                ctx.checks.fed(&self.name, offset, p);
                let ops: Vec<Op> = ops.into_iter().map(|op| self.taken(ctx, p, op)).collect();
                self.append(ctx, p, &ops);
                if ops.iter().any(|op| op.kind == Kind::GetAck) {
                    self.ack(ctx, p);
                }
            }
            Stream::Heartbeat if p.link_conn == Some(conn) => p.link_heard = ctx.now(),
            Stream::Ack(offset) => {
                if let Some(follower) = p.followers.get_mut(&conn) {
                    follower.ack = offset;
                    follower.online = true;
                    follower.heard = ctx.now();
                    self.failover_check(ctx, p);
                    self.unblock(ctx, p);
                }
            }
            _ => {}
        }
    }

    /// Applies operations and passes them on.
    pub(super) fn append(&mut self, ctx: &mut Ctx, p: &mut Process, ops: &[Op]) {
        let offset = p.offset();
        ops.iter().for_each(|op| p.apply(*op));
        for conn in p.followers.keys() {
            let feed = Stream::Feed {
                offset,
                ops: ops.iter().map(|op| op.passed_on()).collect(),
            };
            ctx.send(self.party(), *conn, feed);
        }
    }

    pub(super) fn ack(&self, ctx: &mut Ctx, p: &Process) {
        if let Some(conn) = p.link_conn.filter(|_| p.link == LinkState::Up) {
            ctx.send(self.party(), conn, Stream::Ack(p.offset()));
        }
    }

    pub(super) fn link_lost(&mut self, ctx: &mut Ctx, p: &mut Process, conn: ConnId) {
        if p.link_conn == Some(conn) {
            p.link_conn = None;
            p.link = LinkState::Down;
            ctx.close(self.party(), conn);
        }
    }

    fn closed(&mut self, ctx: &mut Ctx, p: &mut Process, conn: ConnId) {
        p.clients.remove(&conn);
        p.followers.remove(&conn);
        if p.link_conn == Some(conn) {
            let was_up = p.link == LinkState::Up;
            p.link_conn = None;
            p.link = LinkState::Down;
            // The engine tries at once when an established link breaks, else once a second.
            if was_up {
                self.connect(ctx, p);
            }
        }
    }

    pub(super) fn drop_followers(&mut self, ctx: &mut Ctx, p: &mut Process) {
        for conn in std::mem::take(&mut p.followers).into_keys() {
            p.clients.remove(&conn);
            ctx.close(self.party(), conn);
        }
    }

    pub(super) fn become_primary(&mut self, ctx: &mut Ctx, p: &mut Process) {
        if let Some(conn) = p.link_conn.take() {
            ctx.close(self.party(), conn);
        }
        let replid = ctx.call();
        ctx.checks.promoted(self.shard, &p.run_id);
        p.unset_master(replid);
        self.drop_followers(ctx, p);
        ctx.say(|| format!("{} is promoted at {}", self.name, p.offset()));
    }

    fn follow(&mut self, ctx: &mut Ctx, p: &mut Process, address: String) {
        if p.following.as_ref() == Some(&address) {
            return;
        }
        if let Some(conn) = p.link_conn.take() {
            ctx.close(self.party(), conn);
        }
        ctx.checks.follows(self.shard, &p.run_id);
        ctx.say(|| format!("{} follows {address}", self.name));
        p.following = Some(address);
        p.link = LinkState::Down;
        self.connect(ctx, p);
    }

    /// FAILOVER ends: demoted for good, or (`back`) a primary again.
    pub(super) fn end_failover(&mut self, ctx: &mut Ctx, p: &mut Process, back: bool) {
        let Some(failover) = p.failover.take() else {
            return;
        };
        if back && failover.in_progress {
            self.become_primary(ctx, p);
        }
        let waiting: Vec<ConnId> = p
            .clients
            .iter()
            .filter(|(_, c)| !c.input.is_empty())
            .map(|(id, _)| *id)
            .collect();
        for conn in waiting {
            self.serve(ctx, p, conn);
        }
    }

    fn failover_check(&mut self, ctx: &mut Ctx, p: &mut Process) {
        let offset = p.offset();
        let Some(failover) = p.failover.as_mut().filter(|f| !f.in_progress) else {
            return;
        };
        let reached =
            (p.followers.values()).any(|f| f.online && f.address == failover.to && f.ack == offset);
        if reached {
            failover.in_progress = true;
            let to = failover.to.clone();
            ctx.point(Point::TargetCaughtUp);
            self.follow(ctx, p, to);
        }
    }

    fn admin(&mut self, ctx: &mut Ctx, p: &mut Process, command: Admin) -> Answer {
        if !matches!(command, Admin::Info | Admin::Users) {
            ctx.say(|| format!("{}: {}", self.name, command.shown()));
        }
        match command {
            Admin::Info => return Answer::Info(p.info(ctx.now())),
            Admin::Users => return Answer::Users(p.known_users()),
            Admin::Grant {
                user,
                sha,
                replication,
            } => {
                let rights = if replication {
                    Rights::Replication
                } else {
                    Rights::Full
                };
                ctx.checks.granted(self.shard, &self.name, &p.run_id, &user);
                p.users.insert(user, User { sha, rights });
            }
            Admin::Restore(user) => {
                ctx.checks.granted(self.shard, &self.name, &p.run_id, &user);
                p.users.entry(user).or_insert_with(nobody).rights = Rights::Full;
            }
            Admin::SoftFence(user) => {
                p.users.entry(user).or_insert_with(nobody).rights = Rights::Fenced;
            }
            Admin::Delete(users) => self.delete(ctx, p, &users),
            Admin::SetLogin { user, password } => p.login = (user, password),
            Admin::Follow(address) => {
                if p.failover.is_some() {
                    return Answer::Err("REPLICAOF not allowed while failing over.");
                }
                self.follow(ctx, p, address);
            }
            Admin::Capture { replid, from } => {
                // Their counting begins at 1, ours tells how many there are.
                let from = from - 1;
                if replid != p.replid.to_string() || from < p.backlog_from {
                    return Answer::Err("not of this history, or not in the backlog any more");
                }
                let ops = p.since(from);
                ctx.checks.captured(&ops);
                return Answer::Captured(ops);
            }
            Admin::Append => return self.begin_file(ctx, p),
            Admin::Promote => {
                if p.failover.is_some() {
                    return Answer::Err("REPLICAOF not allowed while failing over.");
                }
                if !p.is_primary() {
                    self.become_primary(ctx, p);
                }
            }
            Admin::Failover { to, timeout } => {
                let online = p.followers.values().any(|f| f.online && f.address == to);
                if !p.is_primary() || p.failover.is_some() || !online {
                    return Answer::Err("FAILOVER refused");
                }
                ctx.checks.hands_over(&self.name, p);
                let until = ctx.now() + timeout;
                p.failover = Some(Failover {
                    to,
                    until,
                    in_progress: false,
                });
                self.failover_check(ctx, p);
            }
            Admin::Abort => {
                if p.failover.is_none() {
                    return Answer::Err("No failover in progress.");
                }
                self.end_failover(ctx, p, true);
            }
        }
        Answer::Ok
    }

    fn delete(&mut self, ctx: &mut Ctx, p: &mut Process, users: &[String]) {
        for user in users {
            p.users.remove(user);
        }
        let gone: Vec<ConnId> = p
            .clients
            .iter()
            .filter(|(_, c)| users.contains(&c.user))
            .map(|(c, _)| *c)
            .collect();
        for conn in gone {
            p.clients.remove(&conn);
            p.followers.remove(&conn);
            ctx.close(self.party(), conn);
        }
    }

    fn tick(&mut self, ctx: &mut Ctx, p: &mut Process) {
        self.cron += 1;
        self.settle(ctx);
        let second = self.cron.is_multiple_of(SEC / CRON);
        if p.link == LinkState::Loading && p.loading_until <= ctx.now() {
            p.link = LinkState::Up;
            self.ack(ctx, p);
        }
        if p.failover
            .as_ref()
            .is_some_and(|f| !f.in_progress && f.until <= ctx.now())
        {
            ctx.say(|| format!("{}: FAILOVER timed out", self.name));
            self.end_failover(ctx, p, true);
        }
        let failing_over = p.failover.as_ref().is_some_and(|f| f.in_progress);
        if !p.is_primary() && p.link == LinkState::Down && (second || failing_over) {
            self.connect(ctx, p);
        }
        self.unblock(ctx, p);
        if second {
            self.ack(ctx, p);
            // What PING does, without its bytes: a primary is heard every second.
            for conn in p.followers.keys() {
                ctx.send(self.party(), *conn, Stream::Heartbeat);
            }
            if p.is_primary() && p.failover.is_none() && !p.log.is_empty() && ctx.chance(300) {
                let id = ctx.call();
                self.append(
                    ctx,
                    p,
                    &[Op {
                        id,
                        key: 0,
                        kind: Kind::Noop,
                    }],
                );
            }
        }
    }
}

fn nobody() -> User {
    User {
        sha: String::new(),
        rights: Rights::Fenced,
    }
}

/// Where a node is reached.
#[must_use]
pub fn address(index: usize) -> String {
    format!("10.0.0.{}:{}", index + 1, 7_000 + index)
}

/// Who is reached there.
#[must_use]
pub fn party_of(address: &str) -> Option<Party> {
    let port: usize = address.rsplit_once(':')?.1.parse().ok()?;
    Some(Party::Node(port.checked_sub(7_000)?))
}
