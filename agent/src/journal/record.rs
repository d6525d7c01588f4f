//! What the journal says, and what is remembered of it: the newest of each thing, and a bounded
//! number of outcomes.
//!
//! The messages are a contract between releases of the agent: tags are added, never renumbered.

use std::collections::{BTreeMap, VecDeque};

use slotmesh_proto::agent::v1::{ExecuteStepRequest, ExecuteStepResponse, LostWrites};

/// A leader repeats a step within a task's life; one host never runs as many steps in that time.
const OUTCOMES_MAX: usize = 1_000;
/// One a failover of a primary on this host, until an operator has seen to it.
const CAPTURES_MAX: usize = 256;

#[derive(Clone, PartialEq, prost::Message)]
pub struct Entry {
    #[prost(oneof = "Fact", tags = "1, 2, 3, 4, 5, 6, 7, 8")]
    pub fact: Option<Fact>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Fact {
    /// The highest term of a leader that ordered anything here.
    #[prost(uint64, tag = "1")]
    Term(u64),
    #[prost(message, tag = "2")]
    Epoch(ShardEpoch),
    /// Written before a step's first effect.
    #[prost(message, tag = "3")]
    Begun(Begun),
    #[prost(message, boxed, tag = "4")]
    Ended(Box<Ended>),
    /// A hand-over is about to fence, or has fenced, this node.
    #[prost(message, tag = "5")]
    Fenced(FenceMark),
    /// Rights were restored by the leader, or the node is gone.
    #[prost(string, tag = "6")]
    Unfenced(String),
    #[prost(message, tag = "7")]
    Stood(Standing),
    /// What a lost primary wrote beyond its successor was kept, or nothing could be.
    #[prost(message, tag = "8")]
    Captured(Captured),
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ShardEpoch {
    #[prost(string, tag = "1")]
    pub instance_id: String,
    #[prost(string, tag = "2")]
    pub shard_id: String,
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, prost::Message)]
pub struct StepKey {
    #[prost(string, tag = "1")]
    pub task_id: String,
    #[prost(string, tag = "2")]
    pub step: String,
    #[prost(uint32, tag = "3")]
    pub attempt: u32,
}

impl StepKey {
    pub fn of(request: &ExecuteStepRequest) -> Self {
        Self {
            task_id: request.task_id.clone(),
            step: request.step.clone(),
            attempt: request.attempt,
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Begun {
    #[prost(message, required, tag = "1")]
    pub request: ExecuteStepRequest,
    #[prost(uint64, tag = "2")]
    pub deadline_unix_ms: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Ended {
    #[prost(message, required, tag = "1")]
    pub key: StepKey,
    #[prost(message, required, tag = "2")]
    pub response: ExecuteStepResponse,
}

/// A soft fence that a hand-over put on a node: no convergence may lift it by an older assignment.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FenceMark {
    #[prost(string, tag = "1")]
    pub node_id: String,
    #[prost(string, tag = "2")]
    pub run_id: String,
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    #[prost(uint64, tag = "4")]
    pub term: u64,
    #[prost(string, tag = "5")]
    pub target_address: String,
    /// Newest frozen assignment of this hand-over that was seen; 0: none yet.
    #[prost(uint64, tag = "6")]
    pub frozen_revision: u64,
}

/// In which role a process was last seen to agree with the record. A process that is a primary
/// against it was promoted since, most likely by a hand-over of which this agent has not heard yet.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Standing {
    #[prost(string, tag = "1")]
    pub node_id: String,
    #[prost(string, tag = "2")]
    pub run_id: String,
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    /// Newest frozen assignment of this epoch that was seen; 0: none since the last pre-warming.
    #[prost(uint64, tag = "4")]
    pub frozen_revision: u64,
    /// Newest membership of this epoch that it agreed with.
    #[prost(uint64, tag = "5")]
    pub membership: u64,
}

/// See [`crate::capture`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Captured {
    /// Of the lost primary; another process of the node has another history.
    #[prost(string, tag = "1")]
    pub run_id: String,
    /// With no file: there was nothing to keep.
    #[prost(message, required, tag = "2")]
    pub lost: LostWrites,
}

/// The journal's sum.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    term: u64,
    epochs: BTreeMap<(String, String), u64>,
    begun: BTreeMap<StepKey, Begun>,
    ended: BTreeMap<StepKey, ExecuteStepResponse>,
    ended_order: VecDeque<StepKey>,
    fences: BTreeMap<String, FenceMark>,
    standings: BTreeMap<String, Standing>,
    /// In the order in which they were made.
    captures: VecDeque<Captured>,
}

impl Memory {
    pub fn term(&self) -> u64 {
        self.term
    }

    pub fn epoch(&self, instance_id: &str, shard_id: &str) -> u64 {
        let key = (instance_id.to_owned(), shard_id.to_owned());
        self.epochs.get(&key).copied().unwrap_or(0)
    }

    pub fn outcome(&self, key: &StepKey) -> Option<&ExecuteStepResponse> {
        self.ended.get(key)
    }

    /// Steps whose end is not recorded.
    pub fn unfinished(&self) -> impl Iterator<Item = &Begun> {
        self.begun.values()
    }

    pub fn begun(&self, key: &StepKey) -> Option<&Begun> {
        self.begun.get(key)
    }

    pub fn fence(&self, node_id: &str) -> Option<&FenceMark> {
        self.fences.get(node_id)
    }

    pub fn standing(&self, node_id: &str) -> Option<&Standing> {
        self.standings.get(node_id)
    }

    pub fn captures(&self) -> impl Iterator<Item = &Captured> {
        self.captures.iter()
    }

    /// Whether what a process had beyond its successor of `epoch` was looked at. A process can be
    /// lost as the primary of more than one epoch.
    pub fn has_captured(&self, node_id: &str, run_id: &str, epoch: u64) -> bool {
        self.captures
            .iter()
            .any(|c| c.lost.node_id == node_id && c.run_id == run_id && c.lost.epoch == epoch)
    }

    /// Facts that change nothing need not be written.
    pub fn knows(&self, fact: &Fact) -> bool {
        match fact {
            Fact::Term(term) => *term <= self.term,
            Fact::Epoch(it) => it.epoch <= self.epoch(&it.instance_id, &it.shard_id),
            Fact::Fenced(mark) => self.fences.get(&mark.node_id) == Some(mark),
            Fact::Unfenced(node_id) => !self.fences.contains_key(node_id),
            Fact::Stood(it) => self.standings.get(&it.node_id) == Some(it),
            Fact::Captured(it) => self.captures.contains(it),
            Fact::Begun(_) | Fact::Ended(_) => false,
        }
    }

    pub fn learn(&mut self, fact: Fact) {
        match fact {
            Fact::Term(term) => self.term = self.term.max(term),
            Fact::Epoch(it) => {
                let epoch = self
                    .epochs
                    .entry((it.instance_id, it.shard_id))
                    .or_default();
                *epoch = it.epoch.max(*epoch);
            }
            Fact::Begun(begun) => {
                self.begun.insert(StepKey::of(&begun.request), begun);
            }
            Fact::Ended(ended) => self.end(ended.key, ended.response),
            Fact::Fenced(mark) => {
                self.fences.insert(mark.node_id.clone(), mark);
            }
            Fact::Unfenced(node_id) => {
                self.fences.remove(&node_id);
            }
            Fact::Stood(it) => {
                self.standings.insert(it.node_id.clone(), it);
            }
            Fact::Captured(it) => {
                self.captures.push_back(it);
                while self.captures.len() > CAPTURES_MAX {
                    self.captures.pop_front();
                }
            }
        }
    }

    fn end(&mut self, key: StepKey, response: ExecuteStepResponse) {
        self.begun.remove(&key);
        if self.ended.insert(key.clone(), response).is_none() {
            self.ended_order.push_back(key);
        }
        while self.ended_order.len() > OUTCOMES_MAX {
            if let Some(oldest) = self.ended_order.pop_front() {
                self.ended.remove(&oldest);
            }
        }
    }

    /// Everything, as the shortest journal that says the same.
    pub fn facts(&self) -> Vec<Fact> {
        let mut facts = vec![Fact::Term(self.term)];
        facts.extend(self.epochs.iter().map(|((instance_id, shard_id), epoch)| {
            Fact::Epoch(ShardEpoch {
                instance_id: instance_id.clone(),
                shard_id: shard_id.clone(),
                epoch: *epoch,
            })
        }));
        facts.extend(self.fences.values().cloned().map(Fact::Fenced));
        facts.extend(self.standings.values().cloned().map(Fact::Stood));
        facts.extend(self.captures.iter().cloned().map(Fact::Captured));
        facts.extend(self.begun.values().cloned().map(Fact::Begun));
        facts.extend(self.ended_order.iter().filter_map(|key| {
            let response = self.ended.get(key)?.clone();
            Some(Fact::Ended(Box::new(Ended {
                key: key.clone(),
                response,
            })))
        }));
        facts
    }
}
