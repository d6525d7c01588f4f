//! A node's files and the engines that read them: what a process leaves when it is ended in order, and
//! what its successor makes of that.
//!
//! Invariant: no process runs with what its engine can't load.

use rand::Rng;

use super::Node;
use crate::{
    ctx::Ctx,
    engine,
    redis::{Answer, Op, Process},
    sched::MS,
};

/// What SHUTDOWN SAVE leaves: unlike the append-only file it knows its place in its history.
#[derive(Clone, Debug)]
pub struct Snapshot {
    replid: u64,
    offset: i64,
    log: Vec<Op>,
}

/// How an agent ends a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// With a snapshot, from which the next one goes on.
    Save,
    /// Its data is not wanted.
    Discard,
}

impl Node {
    /// Why an engine can't be started here, if it can't.
    pub(super) fn unstartable(&self, ctx: &Ctx, engine: &str) -> Option<&'static str> {
        if !engine.is_empty() && ctx.spoiled.contains(&self.host) {
            return Some("its program is damaged");
        }
        (self.format > engine::format(engine)).then_some("it can't load a newer engine's files")
    }

    /// The process with which an engine goes on with what is on the disk.
    pub(super) fn launch(&mut self, ctx: &mut Ctx, run_id: String, engine: &str) -> Process {
        let (replid, address) = (ctx.call(), self.address.clone());
        let mut process = match &self.snapshot {
            None => {
                let log = std::mem::take(&mut self.disk);
                Process::start(run_id, replid, address, log)
            }
            Some(Snapshot {
                replid: known,
                offset,
                log,
            }) => {
                let mut process = Process::start(run_id, replid, address, log.clone());
                process.resume(*known, *offset);
                process
            }
        };
        engine.clone_into(&mut process.engine);
        if self.snapshot.is_some() {
            ctx.settling.insert(self.party());
        }
        process
    }

    /// Its agent ends the process, which it has to be free to do.
    pub fn end(&mut self, ctx: &mut Ctx, ending: Ending) {
        let Some(process) = &self.process else {
            return;
        };
        let snapshot = Snapshot {
            replid: process.replid,
            offset: process.offset(),
            log: process.log.clone(),
        };
        if ending == Ending::Save {
            let now = ctx.now();
            ctx.checks.makes_way(&snapshot.log, now);
        }
        self.crash(ctx, usize::MAX);
        self.snapshot = (ending == Ending::Save).then_some(snapshot);
    }

    /// Its data is removed.
    pub fn discard(&mut self) {
        self.disk.clear();
        self.snapshot = None;
        self.format = 0;
    }

    /// An append-only file is begun: whole a moment later.
    pub(super) fn begin_file(&mut self, ctx: &mut Ctx, process: &Process) -> Answer {
        if process.loading_until > ctx.now() {
            return Answer::Err("LOADING");
        }
        if self.snapshot.is_some() && self.whole_at.is_none() {
            self.whole_at = Some(ctx.now() + ctx.rng.random_range(5 * MS..300 * MS));
        }
        Answer::Ok
    }

    /// From when on it is durable by itself.
    pub(super) fn settle(&mut self, ctx: &mut Ctx) {
        if self.whole_at.is_some_and(|at| at <= ctx.now()) {
            self.whole_at = None;
            self.snapshot = None;
            ctx.settling.remove(&self.party());
        }
    }

    /// A command that came in its primary's stream, as it has it in the end.
    pub(super) fn taken(&self, ctx: &mut Ctx, p: &mut Process, op: Op) -> Op {
        use crate::redis::Kind;
        if op.kind != Kind::Newer || engine::knows_newer(&p.engine) {
            return op;
        }
        p.refused += 1;
        let now = ctx.now();
        ctx.checks.diverges(&p.run_id, op.id, now);
        ctx.say(|| format!("{} refuses a command of its primary", self.name));
        Op {
            kind: Kind::Refused,
            ..op
        }
    }

    /// A client uses what only newer engines have; nothing if this one does not.
    pub fn write_newer(&mut self, ctx: &mut Ctx) {
        use crate::redis::Kind;
        let Some(mut process) = self.process.take() else {
            return;
        };
        if process.writable_as().is_some() && engine::knows_newer(&process.engine) {
            let id = ctx.call();
            let op = Op {
                id,
                key: 0,
                kind: Kind::Newer,
            };
            ctx.say(|| format!("{} executes a newer command", self.name));
            self.append(ctx, &mut process, &[op]);
        }
        self.process = Some(process);
    }
}
