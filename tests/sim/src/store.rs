//! A model of the store: revisions, compare-and-swap, a leased leader key, watches.
//!
//! Invariant: a transaction is applied whole, at one revision, or not at all.

use std::collections::BTreeMap;

use slotmesh_proto::store::v1 as records;

use crate::{
    ctx::Ctx,
    msg::{ConnId, Input, Party, Rpc, Stream, Timer},
    plan::Point,
    sched::{MS, Micros, SEC},
};

/// How long a leader lives without keeping its lease.
pub const LEADER_TTL: Micros = 2 * SEC;

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
}

/// See the module.
#[derive(Debug, Default)]
pub struct Store {
    /// Everything.
    pub items: BTreeMap<Key, Stored>,
    /// Of the newest write.
    pub revision: u64,
    lease_until: Micros,
    watchers: Vec<ConnId>,
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

    /// Something happens to it.
    pub fn handle(&mut self, ctx: &mut Ctx, input: Input) {
        match input {
            Input::Rpc(from, Rpc::Store { call, request }) => {
                let reply = self.serve(ctx, request);
                ctx.rpc(Party::Store, from, Rpc::StoreReply { call, reply });
            }
            Input::Stream(conn, Stream::Subscribe) => {
                let all = (self.items.iter())
                    .map(|(key, stored)| Watched {
                        key: key.clone(),
                        stored: Some(stored.clone()),
                        revision: self.revision,
                    })
                    .collect();
                self.watchers.push(conn);
                ctx.send(Party::Store, conn, Stream::Watched(all));
            }
            Input::Closed(conn) => self.watchers.retain(|c| *c != conn),
            Input::Timer(Timer::Tick) => {
                if self.items.contains_key(&Key::Leader) && self.lease_until <= ctx.now() {
                    ctx.say(|| "the leader's lease has expired".into());
                    self.apply(
                        ctx,
                        &Txn {
                            deletes: vec![Key::Leader],
                            ..Txn::default()
                        },
                    );
                }
                ctx.timer(Party::Store, 50 * MS, Timer::Tick);
            }
            _ => {}
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
                if !txn.compares.iter().all(holds) {
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
                        self.lease_until = ctx.now() + LEADER_TTL;
                        let puts = vec![(Key::Leader, value)];
                        let term = self.apply(
                            ctx,
                            &Txn {
                                puts,
                                ..Txn::default()
                            },
                        );
                        ctx.say(|| format!("controller {controller} leads, term {term}"));
                        StoreReply::Term(Some(term))
                    }
                }
            }
            StoreRequest::KeepAlive(term) => {
                let lasts = self.term() == Some(term);
                if lasts {
                    self.lease_until = ctx.now() + LEADER_TTL;
                }
                StoreReply::Lasts(lasts)
            }
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
        for conn in &self.watchers {
            ctx.send(Party::Store, *conn, Stream::Watched(changes.clone()));
        }
        for (key, value) in &txn.puts {
            if let (Key::Shard(shard), Value::Shard(record)) = (key, value) {
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
                ctx.point(match &record.mode {
                    Some(records::shard_record::Mode::Handover(_)) => Point::Declared,
                    _ => Point::RecordWritten,
                });
            }
        }
        revision
    }
}
