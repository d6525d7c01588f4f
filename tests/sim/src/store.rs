//! A model of the store: revisions, compare-and-swap, leases, watches that history is compacted
//! under and that lag behind, and elections of its own, during which it answers nobody and after
//! which it may still do what was asked meanwhile.
//!
//! Invariant: a transaction is applied whole, at one revision, or not at all; a lease never ends
//! before its time, and a key that was put again belongs to the lease it was put with last.

mod history;
mod lease;
mod watch;

use std::collections::BTreeMap;

use rand::Rng;

use slotmesh_proto::store::v1 as records;

use self::{history::History, lease::Leases, watch::Watches};
use crate::{
    ctx::Ctx,
    msg::{ConnId, Input, Party, Rpc, Stream, Timer},
    plan::Point,
    sched::{MS, Micros, SEC},
};

/// How long a leader lives without keeping its lease.
pub const LEADER_TTL: Micros = 2 * SEC;
/// How long a host's right to serve lives without being kept, as the product has it.
pub const HOST_TTL: Micros = 3 * SEC;
/// How late the end of a lease is noticed at most.
const EXPIRY_LOOK: Micros = 500 * MS;
/// Of what comes in an election so many in 1,000 are done after it, whether or not somebody still
/// waits for the answer.
const DONE_LATE: u32 = 250;
/// What waits for the end of an election; a member queues no more proposals than a few thousand.
const LATE_MAX: usize = 256;

/// A lease's number.
pub type LeaseId = u64;

/// Keys.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Key {
    /// Who leads.
    Leader,
    /// A shard's record.
    Shard(usize),
    /// A task's record.
    Task(String),
    /// Who owns a shard.
    Lock(usize),
    /// A request that was admitted.
    Idem(String),
    /// A host's right to serve.
    Host(usize),
    /// Why a shard's epoch began.
    Audit(usize, u64),
    /// That the instance is being removed.
    Instance,
    /// The engine in the instance's record; as long as there is none: the agents' default.
    Engine,
}

/// Values: the real records.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// Which controller, in which life.
    Leader(usize, u64),
    /// A shard.
    Shard(records::ShardRecord),
    /// A task.
    Task(records::TaskRecord),
    /// The owner's task.
    Lock(String),
    /// The request's task.
    Idem(String),
    /// That it has one.
    Host,
    /// Cause and task.
    Audit(String),
    /// That it is so.
    Removal,
    /// Which.
    Engine(String),
}

/// A value and its revisions.
#[derive(Clone, PartialEq, Debug)]
pub struct Stored {
    /// The value.
    pub value: Value,
    /// When it was written last.
    pub mod_revision: u64,
    /// When the key was made.
    pub create_revision: u64,
    /// With which it ends.
    pub lease: Option<LeaseId>,
}

/// A change, as a watch shows it.
#[derive(Clone, Debug)]
pub struct Watched {
    /// Of what.
    pub key: Key,
    /// `None`: deleted.
    pub stored: Option<Stored>,
    /// At which revision.
    pub revision: u64,
}

/// What must hold for a transaction to be applied.
#[derive(Clone, Debug)]
pub enum Compare {
    /// The key was not written since this revision.
    Unchanged(Key, u64),
    /// There is no such key.
    Absent(Key),
    /// The leader's key was made at this revision.
    Term(u64),
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Txn {
    /// All must hold.
    pub compares: Vec<Compare>,
    /// Written.
    pub puts: Vec<(Key, Value)>,
    /// Deleted.
    pub deletes: Vec<Key>,
    /// What is put ends with this lease.
    pub lease: Option<LeaseId>,
    /// As leader of this term; `None`: a delegated commit. For the checks only.
    pub leader: Option<u64>,
    /// Of a delegated commit: the token that was presented. For the checks only.
    pub token: Option<String>,
}

/// What controllers ask.
#[derive(Clone, Debug)]
pub enum StoreRequest {
    /// A linearizable read.
    Get(Key),
    /// A transaction.
    Txn(Txn),
    /// Become leader.
    Campaign { controller: usize, life: u64 },
    /// Stay leader.
    KeepAlive(u64),
    /// A new lease.
    Grant(Micros),
    /// The lease is to live on.
    Keep(LeaseId),
}

/// What they get.
#[derive(Clone, Debug)]
pub enum StoreReply {
    /// The value, if there is one.
    Got(Option<Box<Stored>>),
    /// Applied, at this revision.
    Committed(u64),
    /// Something compared did not hold.
    Conflict,
    /// The term won, if it was won.
    Term(Option<u64>),
    /// Whether the term lasts.
    Lasts(bool),
    /// The lease.
    Granted(LeaseId),
    /// Whether the lease lives on.
    Kept(bool),
}

/// See the module.
#[derive(Debug, Default)]
pub struct Store {
    /// Everything.
    pub items: BTreeMap<Key, Stored>,
    /// Of the newest write.
    pub revision: u64,
    leases: Leases,
    leader: Option<LeaseId>,
    watches: Watches,
    history: History,
    /// It elects a leader of its own and answers nobody until then.
    away_until: Micros,
    /// What came meanwhile and will be done all the same.
    late: Vec<(Party, u64, StoreRequest)>,
}

impl Store {
    /// A store that holds the records of a new instance.
    #[must_use]
    pub fn with(items: Vec<(Key, Value)>) -> Self {
        let stored = |(key, value)| {
            let stored = Stored {
                value,
                mod_revision: 1,
                create_revision: 1,
                lease: None,
            };
            (key, stored)
        };
        Self {
            items: items.into_iter().map(stored).collect(),
            revision: 1,
            ..Self::default()
        }
    }

    /// The store begins.
    pub fn start(&self, ctx: &mut Ctx) {
        ctx.born(Party::Store);
        ctx.timer(Party::Store, 50 * MS, Timer::Tick);
    }

    /// The term of the present leader.
    #[must_use]
    pub fn term(&self) -> Option<u64> {
        self.items.get(&Key::Leader).map(|l| l.create_revision)
    }

    /// It loses its own leader: it answers nobody for a while, every watch breaks, and afterwards
    /// every lease has all its time again.
    pub fn elect(&mut self, ctx: &mut Ctx, away: Micros) {
        self.away_until = ctx.now() + away;
        self.watches.close(ctx);
        self.leases.extend(self.away_until);
        ctx.checks.elections += 1;
    }

    /// The member that a party watches is behind the others until then; requests are answered by the
    /// others.
    pub fn lag(&mut self, party: Party, until: Micros) {
        self.watches.lag(party, until);
    }

    /// It forgets what was before now.
    pub fn compact(&mut self) {
        self.history.compact(self.revision);
    }

    /// Something happens to it.
    pub fn handle(&mut self, ctx: &mut Ctx, input: Input) {
        let away = ctx.now() < self.away_until;
        if !away {
            self.catch_up(ctx);
        }
        match input {
            Input::Rpc(from, Rpc::Store { call, request })
                if away && self.late.len() < LATE_MAX && ctx.chance(DONE_LATE) =>
            {
                self.late.push((from, call, request));
            }
            Input::Rpc(_, Rpc::Store { .. }) if away => {}
            Input::Stream(conn, Stream::Subscribe(_)) if away => ctx.close(Party::Store, conn),
            Input::Rpc(from, Rpc::Store { call, request }) => self.answer(ctx, from, call, request),
            Input::Stream(conn, Stream::Subscribe(from)) => self.subscribe(ctx, conn, from),
            Input::Closed(conn) => self.watches.remove(conn),
            Input::Timer(Timer::Tick) => {
                if !away {
                    self.expire(ctx);
                    self.watches.tell(ctx, &self.history);
                }
                ctx.timer(Party::Store, 50 * MS, Timer::Tick);
            }
            _ => {}
        }
    }

    fn answer(&mut self, ctx: &mut Ctx, from: Party, call: u64, request: StoreRequest) {
        let reply = self.serve(ctx, request);
        ctx.rpc(Party::Store, from, Rpc::StoreReply { call, reply });
    }

    /// After an election: what was proposed before its end.
    fn catch_up(&mut self, ctx: &mut Ctx) {
        for (from, call, request) in std::mem::take(&mut self.late) {
            self.answer(ctx, from, call, request);
        }
    }

    /// A watch from a revision on, or a listing and a watch from there on.
    fn subscribe(&mut self, ctx: &mut Ctx, conn: ConnId, from: Option<u64>) {
        let Some(from) = from else {
            let all = (self.items.iter())
                .map(|(key, stored)| Watched {
                    key: key.clone(),
                    stored: Some(stored.clone()),
                    revision: self.revision,
                })
                .collect();
            ctx.send(Party::Store, conn, Stream::Listed(self.revision, all));
            return self.watches.add(ctx, conn, self.revision + 1);
        };
        self.watches.add(ctx, conn, from);
        self.watches.tell(ctx, &self.history);
    }

    fn expire(&mut self, ctx: &mut Ctx) {
        let late = ctx.rng.random_range(0..EXPIRY_LOOK);
        for lease in self.leases.expired(ctx.now().saturating_sub(late)) {
            let with = |s: &Stored| s.lease == Some(lease);
            let items = self.items.iter().filter(|(_, s)| with(s));
            let deletes: Vec<Key> = items.map(|(key, _)| key.clone()).collect();
            if !deletes.is_empty() {
                ctx.say(|| format!("the lease of {deletes:?} has expired"));
                let txn = Txn {
                    deletes,
                    ..Txn::default()
                };
                self.apply(ctx, &txn);
            }
        }
    }

    fn serve(&mut self, ctx: &mut Ctx, request: StoreRequest) -> StoreReply {
        match request {
            StoreRequest::Get(key) => StoreReply::Got(self.items.get(&key).cloned().map(Box::new)),
            StoreRequest::Txn(txn) => {
                let term = self.term();
                let holds = |compare: &Compare| match compare {
                    Compare::Unchanged(key, at) => {
                        self.items.get(key).is_some_and(|s| s.mod_revision == *at)
                    }
                    Compare::Absent(key) => !self.items.contains_key(key),
                    Compare::Term(at) => term == Some(*at),
                };
                let leased = txn.lease.is_none_or(|l| self.leases.lives(l));
                if !leased || !txn.compares.iter().all(holds) {
                    return StoreReply::Conflict;
                }
                ctx.checks.txn(&self.items, &txn, term);
                StoreReply::Committed(self.apply(ctx, &txn))
            }
            StoreRequest::Campaign { controller, life } => {
                let value = Value::Leader(controller, life);
                match self.items.get(&Key::Leader) {
                    Some(leader) if leader.value == value => {
                        StoreReply::Term(Some(leader.create_revision))
                    }
                    Some(_) => StoreReply::Term(None),
                    None => {
                        let lease = self.leases.grant(ctx.now(), LEADER_TTL);
                        self.leader = Some(lease);
                        let txn = Txn {
                            puts: vec![(Key::Leader, value)],
                            lease: Some(lease),
                            ..Txn::default()
                        };
                        let term = self.apply(ctx, &txn);
                        ctx.say(|| format!("controller {controller} leads, term {term}"));
                        StoreReply::Term(Some(term))
                    }
                }
            }
            StoreRequest::KeepAlive(term) => {
                let lasts = self.term() == Some(term);
                let kept = self.leader.is_some_and(|l| self.leases.keep(ctx.now(), l));
                StoreReply::Lasts(lasts && kept)
            }
            StoreRequest::Grant(ttl) => StoreReply::Granted(self.leases.grant(ctx.now(), ttl)),
            StoreRequest::Keep(lease) => StoreReply::Kept(self.leases.keep(ctx.now(), lease)),
        }
    }

    fn apply(&mut self, ctx: &mut Ctx, txn: &Txn) -> u64 {
        self.revision += 1;
        let revision = self.revision;
        let mut changes = Vec::new();
        for (key, value) in &txn.puts {
            let create_revision = self.items.get(key).map_or(revision, |s| s.create_revision);
            let stored = Stored {
                value: value.clone(),
                mod_revision: revision,
                create_revision,
                lease: txn.lease,
            };
            self.items.insert(key.clone(), stored.clone());
            changes.push(Watched {
                key: key.clone(),
                stored: Some(stored),
                revision,
            });
        }
        for key in &txn.deletes {
            self.items.remove(key);
            changes.push(Watched {
                key: key.clone(),
                stored: None,
                revision,
            });
        }
        self.history.add(&changes);
        self.watches.tell(ctx, &self.history);
        if txn.puts.iter().any(|(key, _)| matches!(key, Key::Host(_))) {
            ctx.point(Point::Leased);
        }
        let is_upgrade = |(_, value): &(Key, Value)| match value {
            Value::Task(task) => matches!(task.spec, Some(records::task_record::Spec::Upgrade(_))),
            _ => false,
        };
        if txn.puts.iter().any(is_upgrade) {
            ctx.point(Point::UpgradeWritten);
        }
        for (key, value) in &txn.puts {
            if let (Key::Shard(shard), Value::Shard(record)) = (key, value) {
                passes(ctx, *shard, record, revision);
            }
        }
        revision
    }
}

/// Tells of a record that was written, and is the moment for what waits for it.
fn passes(ctx: &mut Ctx, shard: usize, record: &records::ShardRecord, revision: u64) {
    ctx.say(|| {
        let mode = match &record.mode {
            Some(records::shard_record::Mode::Handover(h)) => {
                format!("Handover to {}", h.target_node_id)
            }
            other => format!("{other:?}").chars().take(24).collect(),
        };
        format!(
            "record of shard {shard}: epoch {}, primary {}, {mode} (revision {revision})",
            record.epoch, record.primary_node_id
        )
    });
    if let Some(point) = membership(record) {
        ctx.point(point);
    }
    if record.members.iter().any(|m| m.exchange != 0) {
        ctx.point(Point::Exchanged);
    }
    ctx.point(match &record.mode {
        Some(records::shard_record::Mode::Handover(_)) => Point::Declared,
        Some(records::shard_record::Mode::FailingOver(f)) => {
            match (f.proof, f.target_node_id.is_empty()) {
                (0, _) => Point::Lost,
                (_, true) => Point::Proven,
                (_, false) => Point::Chosen,
            }
        }
        _ => Point::RecordWritten,
    });
}

/// What a record says of who joins or leaves.
fn membership(record: &records::ShardRecord) -> Option<Point> {
    let any = |says: fn(&records::Member) -> bool| record.members.iter().any(says);
    if any(|m| m.leaving) {
        return Some(Point::Expelled);
    }
    (record.nodes_made > 0 && any(|m| m.run_id.is_empty())).then_some(Point::Joined)
}
