//! What befalls one message of a task's own calls: it is lost, comes twice, comes late, or is answered
//! with an error; or its sending is the moment at which somebody dies.
//!
//! Invariant: while nothing is laid, nothing is counted and nothing changes; a message is named by its
//! call, its ends and how many of the kind went before it, so a name means the same in every run up
//! to the first accident.

use std::collections::BTreeMap;

use slotmesh_agent::{controllers::CommitAnswer, executor::response};
use slotmesh_proto::agent::v1::{HostReport, ProcessState, StepOutcome};

use crate::{
    msg::{Party, Rpc, Stream},
    plan::Script,
    redis::{Admin, Answer, PsyncAnswer},
    sched::Micros,
    store::{Key, StoreReply, StoreRequest},
};

/// What happens to one message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tamper {
    /// It is lost.
    Lose,
    /// It comes twice.
    Repeat,
    /// It comes late.
    Delay(Micros),
    /// It is not delivered; who asked gets an error.
    Fail,
}

/// The calls that tasks are made of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Call {
    /// A controller writes records.
    Txn,
    /// A controller learns that a shard's record has changed.
    Watch,
    /// An agent is told what its nodes should be.
    Assign,
    /// A proxy is told of a shard's record.
    Route,
    /// A proxy says how far it has come.
    Level,
    /// An agent says that a process runs.
    Up,
    /// That it has come to follow its primary.
    Linked,
    /// That fewer may follow it than before.
    Revoked,
    /// That one has ended.
    Exit,
    /// That one follows nobody any more.
    Detached,
    /// That one is removed.
    Removed,
    /// The leader asks an agent for a step.
    Step,
    /// An agent changes something in its node.
    Act,
    /// The old primary's agent reaches the target.
    Login,
    /// The old primary asks the target to take over.
    TakeOver,
    /// The old primary's agent commits.
    Commit,
    /// The next primary's agent asks whether it should still promote.
    Confirm,
}

impl Call {
    /// Whether there is an answer to it.
    #[must_use]
    pub fn is_answered(self) -> bool {
        matches!(
            self,
            Self::Txn
                | Self::Step
                | Self::Act
                | Self::Login
                | Self::TakeOver
                | Self::Commit
                | Self::Confirm
        )
    }

    /// Whether it goes over a connection, or a local socket, that delivers each message once.
    #[must_use]
    pub fn comes_once(self) -> bool {
        !matches!(self, Self::Txn | Self::Step | Self::Commit | Self::Confirm)
    }
}

/// One call of a run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Leg {
    /// Which.
    pub call: Call,
    /// Who asks.
    pub from: Party,
    /// Whom.
    pub to: Party,
    /// The first of these is 1.
    pub nth: u32,
}

/// One message: of a call, the question or the answer to it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Message {
    /// Which call.
    pub leg: Leg,
    /// Its answer.
    pub is_answer: bool,
}

/// What follows from a message.
#[derive(Clone, Debug)]
pub enum Deed {
    /// To the message itself.
    Tamper(Tamper),
    /// To somebody, at that moment.
    Script(Script),
}

/// All that is laid.
#[derive(Debug, Default)]
pub struct Ambushes {
    on: bool,
    waiting: Vec<(Message, Deed)>,
    /// What happens to every question.
    every: Option<Tamper>,
    counts: BTreeMap<(Call, Party, Party), u32>,
    open: BTreeMap<u64, Leg>,
    last: BTreeMap<(Call, Party, Party), Leg>,
    /// As their agents have said last: whether nodes follow, and who may follow them.
    told: BTreeMap<String, (bool, usize)>,
    /// What passed, in order.
    pub passed: Vec<Message>,
}

impl Ambushes {
    /// Counts from now on.
    pub fn begin(&mut self) {
        self.on = true;
    }

    /// This is to happen, once.
    pub fn lay(&mut self, message: Message, deed: Deed) {
        self.waiting.push((message, deed));
    }

    /// This is to happen to every question.
    pub fn lay_for_all(&mut self, tamper: Tamper) {
        self.every = Some(tamper);
    }

    /// All that was laid has happened.
    #[must_use]
    pub fn are_met(&self) -> bool {
        self.waiting.is_empty()
    }

    fn asked(&mut self, call: Call, from: Party, to: Party, number: Option<u64>) -> Vec<Deed> {
        let count = self.counts.entry((call, from, to)).or_default();
        *count += 1;
        let nth = *count;
        let leg = Leg {
            call,
            from,
            to,
            nth,
        };
        match number {
            Some(number) => drop(self.open.insert(number, leg)),
            None => drop(self.last.insert((call, from, to), leg)),
        }
        let mut deeds = self.pass(Message {
            leg,
            is_answer: false,
        });
        if deeds.is_empty() && number.is_some() {
            deeds.extend(self.every.map(Deed::Tamper));
        }
        deeds
    }

    fn pass(&mut self, message: Message) -> Vec<Deed> {
        self.passed.push(message);
        let mut deeds = Vec::new();
        self.waiting.retain(|(laid, deed)| {
            let is_it = *laid == message;
            if is_it {
                deeds.push(deed.clone());
            }
            !is_it
        });
        deeds
    }

    /// What is to happen to this one.
    pub fn rpc(&mut self, from: Party, to: Party, message: &Rpc) -> Vec<Deed> {
        if !self.on {
            return Vec::new();
        }
        let (call, number) = match message {
            Rpc::Store { call, request } if writes_records(request) => (Call::Txn, *call),
            Rpc::Step { call, .. } => (Call::Step, *call),
            Rpc::Commit { call, .. } => (Call::Commit, *call),
            Rpc::Confirm { call, .. } => (Call::Confirm, *call),
            Rpc::Admin { call, command } if !matches!(command, Admin::Info | Admin::Users) => {
                (Call::Act, *call)
            }
            Rpc::StoreReply { call, .. }
            | Rpc::StepReply { call, .. }
            | Rpc::CommitReply { call, .. }
            | Rpc::ConfirmReply { call, .. }
            | Rpc::AdminReply { call, .. } => {
                let leg = self.open.remove(call);
                return leg.map_or_else(Vec::new, |leg| {
                    self.pass(Message {
                        leg,
                        is_answer: true,
                    })
                });
            }
            _ => return Vec::new(),
        };
        self.asked(call, from, to, Some(number))
    }

    /// As [`Self::rpc`], of a connection.
    pub fn stream(&mut self, from: Party, to: Party, message: &Stream) -> Vec<Deed> {
        if !self.on {
            return Vec::new();
        }
        let call = match message {
            Stream::Watched(changes) if changes.iter().any(|c| matches!(c.key, Key::Shard(_))) => {
                Call::Watch
            }
            Stream::Assignment(_) => Call::Assign,
            Stream::Routes { .. } => Call::Route,
            Stream::ProxyReport { shards, .. } if !shards.is_empty() => Call::Level,
            Stream::HostReport(report) => match self.news_of(report) {
                Some(call) => call,
                None => return Vec::new(),
            },
            Stream::TargetLogin { .. } => Call::Login,
            Stream::Psync(psync) if psync.failover => Call::TakeOver,
            Stream::TargetLoginAnswer(_) => return self.answered(Call::Login, from, to),
            Stream::PsyncAnswer(_) => return self.answered(Call::TakeOver, from, to),
            _ => return Vec::new(),
        };
        self.asked(call, from, to, None)
    }

    /// The most important thing that a report says.
    fn news_of(&mut self, report: &HostReport) -> Option<Call> {
        let (mut linked, mut revoked) = (false, false);
        for node in &report.nodes {
            let now = (node.link_up, node.replication_users.len());
            let before = self.told.insert(node.node_id.clone(), now);
            linked |= now.0 && before.is_some_and(|(link_up, _)| !link_up);
            revoked |= before.is_some_and(|(_, users)| now.1 < users);
        }
        match state_of(report) {
            Some(Call::Up) if linked => Some(Call::Linked),
            None if revoked => Some(Call::Revoked),
            news => news,
        }
    }

    fn answered(&mut self, call: Call, from: Party, to: Party) -> Vec<Deed> {
        let leg = self.last.remove(&(call, to, from));
        leg.map_or_else(Vec::new, |leg| {
            self.pass(Message {
                leg,
                is_answer: true,
            })
        })
    }
}

fn writes_records(request: &StoreRequest) -> bool {
    let StoreRequest::Txn(txn) = request else {
        return false;
    };
    let is_lease = |key: &Key| matches!(key, Key::Host(_) | Key::Leader);
    let keys = txn.puts.iter().map(|(key, _)| key).chain(&txn.deletes);
    keys.into_iter().any(|key| !is_lease(key))
}

/// The most important thing that a report says by itself.
fn state_of(report: &HostReport) -> Option<Call> {
    let any = |says: &dyn Fn(ProcessState, &slotmesh_proto::agent::v1::NodeReport) -> bool| {
        report.nodes.iter().any(|n| says(n.state(), n))
    };
    if any(&|state, _| state == ProcessState::Removed) {
        Some(Call::Removed)
    } else if any(&|state, n| state == ProcessState::Stopped && !n.exited_run_id.is_empty()) {
        Some(Call::Exit)
    } else if any(&|_, n| n.detached) {
        Some(Call::Detached)
    } else if any(&|state, n| state == ProcessState::Running && n.granted_epoch == 0) {
        Some(Call::Up)
    } else {
        None
    }
}

/// The answer that says that a question failed, and had no effect.
pub(crate) fn refusal_of(message: &Rpc) -> Option<Rpc> {
    Some(match message {
        Rpc::Store { call, .. } => Rpc::StoreReply {
            call: *call,
            reply: StoreReply::Conflict,
        },
        Rpc::Step { call, .. } => Rpc::StepReply {
            call: *call,
            response: Box::new(response(StepOutcome::NoEffect, "refused on purpose")),
        },
        Rpc::Commit { call, .. } => Rpc::CommitReply {
            call: *call,
            answer: CommitAnswer::Unreachable,
        },
        Rpc::Confirm { call, .. } => Rpc::ConfirmReply {
            call: *call,
            confirmed: None,
        },
        Rpc::Admin { call, .. } => Rpc::AdminReply {
            call: *call,
            answer: Some(Box::new(Answer::Err("ERR refused on purpose"))),
        },
        _ => return None,
    })
}

/// As [`refusal_of`], of a connection.
pub(crate) fn refusal_on(message: &Stream) -> Option<Stream> {
    Some(match message {
        Stream::TargetLogin { .. } => Stream::TargetLoginAnswer(false),
        Stream::Psync(_) => Stream::PsyncAnswer(PsyncAnswer::Err("ERR refused on purpose")),
        _ => return None,
    })
}
