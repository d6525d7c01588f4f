//! What must hold, checked where it could break.
//!
//! Numbers are those of the architecture's invariants (A1 to A9) and of the protocol's (I1 to I10).
//! Invariant: a check looks only at what has happened, never at what a party believes.

mod failover;
mod membership;
mod upgrade;

use std::collections::{BTreeMap, BTreeSet};

use slotmesh_topology::{Mode, Shard, wire};

use crate::{
    redis::{Kind, Op, Process, Rights},
    sched::Micros,
    store::{Compare, Key, Stored, Txn, Value},
};

/// A rule that was broken, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which rule.
    pub rule: &'static str,
    /// How.
    pub how: String,
}

/// What is known of a shard's past.
#[derive(Debug, Default)]
struct Past {
    epoch: u64,
    /// Primary and its process, by epoch.
    primaries: BTreeMap<u64, (String, String)>,
    /// Every process that a record has named.
    named: BTreeSet<String>,
    /// Processes that became primaries, and follow nobody since.
    promoted: BTreeSet<String>,
    /// Processes that have followed nobody since they began.
    born: BTreeSet<String>,
    written: u64,
    /// Every node that a record has named.
    members: BTreeSet<String>,
    /// Nodes that have left.
    left: BTreeSet<String>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Checks {
    /// The first rule that was broken.
    pub violation: Option<Violation>,
    /// Operations that died with a process's data.
    pub lost: BTreeSet<u64>,
    /// A process has lost data, so losses are not the mesh's.
    pub data_was_lost: bool,
    /// An operator has said that data may be lost.
    pub loss_was_accepted: bool,
    /// An operator has said that whoever answers is to be promoted.
    pub anybody_may_lead: bool,
    /// Operations that an asynchronous failover left behind with a lost primary.
    pub left_behind: BTreeSet<u64>,
    /// Operations of lost primaries that were kept in a file.
    pub captured: BTreeSet<u64>,
    /// Operations that a process executed when it woke, and was no primary any more.
    pub late: BTreeSet<u64>,
    /// Writes are acknowledged only once replicas have them.
    pub durable: bool,
    /// Failovers that were declared.
    pub failovers: usize,
    /// Replacements that were begun.
    pub replacements: usize,
    /// Upgrades that were begun.
    pub upgrades: usize,
    /// Failovers that a record told of since the last look: shard, the lost primary, its successor.
    pub failed_over: Vec<(usize, String, String)>,
    /// Failovers that were declared since the last look: shard, primary, its process.
    pub declared: Vec<(usize, String, String)>,
    /// Leader elections of the store.
    pub elections: usize,
    /// Watches that had missed what was compacted.
    pub compacted: usize,
    /// Nodes that have left their shard since the last look.
    pub left: Vec<(usize, String)>,
    expected: Vec<failover::Expected>,
    /// Processes that have refused a command of their primary since they copied its data.
    diverged: BTreeSet<String>,
    /// When each command that was refused was refused last.
    refused: BTreeMap<u64, Micros>,
    /// Those that nobody can have known of when the data without them was kept.
    unseen: BTreeSet<u64>,
    /// Writes that nodes had and lost when they followed another, before anybody had kept them.
    replaced: BTreeMap<u64, String>,
    /// What nodes had that were removed, and nobody else then.
    wiped: BTreeMap<u64, String>,
    /// What primaries had whose processes ended.
    ended: BTreeSet<u64>,
    /// Processes that ended.
    gone: BTreeSet<String>,
    /// Until when agents are gone or stand still.
    away: BTreeMap<usize, Micros>,
    several: BTreeMap<usize, Micros>,
    shards: BTreeMap<usize, Past>,
    routed: BTreeMap<(usize, String), u64>,
    terms: BTreeMap<usize, u64>,
    steps: BTreeSet<(usize, String)>,
}

impl Checks {
    /// A rule is broken. Only the first one counts: what follows may be its consequence.
    pub fn fail(&mut self, rule: &'static str, how: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(Violation { rule, how: how() });
        }
    }

    /// The epoch of a shard's record.
    #[must_use]
    pub fn epoch(&self, shard: usize) -> u64 {
        self.shards.get(&shard).map_or(0, |p| p.epoch)
    }

    /// A process executed a client's write.
    pub fn wrote(
        &mut self,
        shard: usize,
        (node, run_id): (&str, &str),
        user: &str,
        op: u64,
        late: bool,
    ) {
        let epoch = epoch_of(user);
        let past = self.shards.entry(shard).or_default();
        let (current, written) = (past.epoch, past.written);
        let rightful = past
            .primaries
            .get(&epoch)
            .is_some_and(|(n, r)| n == node && r == run_id);
        // The lost primary's epoch is over, and until its successor has the next one it may still
        // take writes: it is being fenced.
        let nobody_yet = epoch + 1 == current && !past.primaries.contains_key(&current);
        // What a process does that has stood still, when it goes on: nobody may take it for done,
        // once it has a successor.
        if late && epoch < current && !(rightful && nobody_yet) {
            self.late.insert(op);
            if !self.durable {
                self.left_behind.insert(op);
            }
            return;
        }
        past.written = written.max(epoch);
        if !rightful || (epoch != current && !nobody_yet) {
            self.fail(
                "A2/A4/I2: only the primary of the record's epoch takes writes",
                || format!("{node} ({run_id}) executed write {op} as {user} in epoch {current}"),
            );
        }
        if epoch < written {
            self.fail("I1: writes of an older epoch after a newer one", || {
                format!("{node} executed write {op} as {user} after a write of epoch {written}")
            });
        }
    }

    /// A user got rights.
    pub fn granted(&mut self, shard: usize, node: &str, run_id: &str, user: &str) {
        if !user.starts_with("px-") {
            return self.may_follow(shard, node, user);
        }
        let past = self.shards.entry(shard).or_default();
        let rightful =
            (past.primaries.get(&epoch_of(user))).is_some_and(|(n, r)| n == node && r == run_id);
        if !rightful {
            self.fail(
                "I2: rights only for the process that the record names",
                || format!("{node} ({run_id}) was granted {user}"),
            );
        }
    }

    /// A process is told to hand over.
    pub fn hands_over(&mut self, node: &str, process: &Process) {
        let full = process.users.iter().find(|(_, u)| u.rights == Rights::Full);
        if let Some((user, _)) = full {
            self.fail("A4: fence before promote", || {
                format!("{node} hands over, {user} may write")
            });
        }
    }

    /// A replica became a primary.
    pub fn promoted(&mut self, shard: usize, run_id: &str) {
        self.shards
            .entry(shard)
            .or_default()
            .promoted
            .insert(run_id.to_owned());
    }

    /// A process began, and follows nobody.
    pub fn began(&mut self, shard: usize, run_id: &str) {
        let past = self.shards.entry(shard).or_default();
        past.born.insert(run_id.to_owned());
    }

    /// A process follows another.
    pub fn follows(&mut self, shard: usize, run_id: &str) {
        let past = self.shards.entry(shard).or_default();
        past.born.remove(run_id);
        past.promoted.remove(run_id);
    }

    /// A process began to feed a replica.
    pub fn feeds(&mut self, shard: usize, node: &str, run_id: &str) {
        if !self.shards.entry(shard).or_default().named.contains(run_id) {
            self.fail(
                "A5/I3: a process feeds nobody before a record names it",
                || format!("{node} ({run_id}) feeds a replica"),
            );
        }
    }

    /// A replica got a piece of the stream.
    pub fn fed(&mut self, node: &str, offset: i64, process: &Process) {
        if offset != process.offset() {
            let at = process.offset();
            self.fail("model: the stream has no gap", || {
                format!("{node} is at {at}, got {offset}")
            });
        }
    }

    /// A replica's data were replaced by its primary's.
    pub fn replaced(&mut self, node: &str, process: &Process, log: &[Op]) {
        let is_write = |op: &Op| matches!(op.kind, Kind::Set | Kind::Push);
        let lost = (process.beyond(log).into_iter())
            .find(|op| !self.captured.contains(&op.id) && !self.lost.contains(&op.id));
        if let Some(op) = lost {
            // It may have followed the lost one, which lives and will be asked for them.
            self.replaced.insert(op.id, node.to_owned());
        }
        // What it did on waking, and is kept, is no reason to keep it.
        let wiped = |op: &&Op| is_write(op) && !self.captured.contains(&op.id);
        if process.log.iter().any(|op| wiped(&op)) && !log.iter().any(is_write) {
            self.fail("A5/I3: an empty primary never wipes a replica", || {
                format!("{node} had {} operations", process.log.len())
            });
        }
    }

    /// What a lost primary has beyond its successor was kept.
    pub fn captured(&mut self, ops: &[Op]) {
        self.captured.extend(ops.iter().map(|op| op.id));
    }

    /// A process ended. What a primary had that ends is on its disk, if that: nobody can read it from
    /// its backlog any more.
    pub fn ended(&mut self, shard: usize, run_id: &str, ops: &[Op]) {
        self.gone.insert(run_id.to_owned());
        let mut primaries = (self.shards.entry(shard).or_default().primaries).values();
        if primaries.any(|(_, named)| named == run_id) {
            self.ended.extend(ops.iter().map(|op| op.id));
        }
    }

    /// A process's data died with it.
    pub fn data_lost(&mut self, ops: &[Op]) {
        self.data_was_lost |= !ops.is_empty();
        self.lost.extend(ops.iter().map(|op| op.id));
    }

    /// A transaction is about to be applied.
    pub fn txn(&mut self, items: &BTreeMap<Key, Stored>, txn: &Txn, term: Option<u64>) {
        if let Some(leader) = txn.leader
            && term != Some(leader)
        {
            self.fail("A1: a deposed leader's write fails", || {
                format!("term {leader} wrote {:?} in term {term:?}", keys(txn))
            });
        }
        for (key, value) in &txn.puts {
            match (key, value) {
                (Key::Shard(index), Value::Shard(record)) => {
                    let old = match items.get(key).map(|s| &s.value) {
                        Some(Value::Shard(old)) => wire::shard_from(old).ok(),
                        _ => None,
                    };
                    match wire::shard_from(record) {
                        Ok(new) => {
                            self.record(*index, old.as_ref(), &new, txn);
                            if let Some(old) = &old {
                                self.exchanges(*index, old, &new);
                            }
                            self.lock(items, txn, *index, &new);
                        }
                        Err(error) => self.fail("A2: records are valid", || error.to_string()),
                    }
                }
                (Key::Lock(shard), Value::Lock(task))
                    if items.contains_key(key) && !takes_over(txn, *shard) =>
                {
                    self.fail("I7: one operation per shard", || {
                        format!("task {task} took shard {shard}, which is locked")
                    });
                }
                (Key::Task(_), value) => self.way_back(items.get(key).map(|s| &s.value), value),
                _ => {}
            }
        }
        for key in &txn.deletes {
            let stored = items.get(key).map(|s| &s.value);
            if let (Key::Lock(shard), Some(Value::Lock(task))) = (key, stored) {
                self.unlock(txn, task, *shard);
            }
        }
    }

    fn record(&mut self, index: usize, old: Option<&Shard>, new: &Shard, txn: &Txn) {
        let compared = txn
            .compares
            .iter()
            .any(|c| matches!(c, Compare::Unchanged(Key::Shard(i), _) if *i == index));
        if let Some(old) = old {
            if !compared || new.epoch < old.epoch || new.epoch.0 > old.epoch.0 + 1 {
                self.fail("A2/I2: the epoch rises by one, by compare-and-swap", || {
                    format!("shard {index}: {} to {}", old.epoch, new.epoch)
                });
            }
            let run_id = |s: &Shard| s.primary_member().map(|m| m.run_id.clone());
            let same = old.primary == new.primary && run_id(old) == run_id(new);
            // The epoch of a failover is nobody's until somebody is promoted.
            let began = old.failover().is_some();
            if old.epoch == new.epoch && old.epoch.0 > 0 && !same && !began {
                self.fail("A2: one primary, and one process of it, per epoch", || {
                    format!(
                        "shard {index}: {} to {} in epoch {}",
                        old.primary, new.primary, new.epoch
                    )
                });
            }
            if old.primary != new.primary {
                let failover = old.failover().and_then(|f| f.target.as_ref());
                let target = old.handover().map(|h| &h.target).or(failover);
                if target != Some(&new.primary) {
                    self.fail("I4: only the declared target is promoted", || {
                        format!("shard {index}: {} to {}", old.primary, new.primary)
                    });
                }
            }
            self.failover(index, old, new, txn);
            self.membership(index, old, new, txn);
            let token = txn.token.as_deref();
            let past = self.shards.entry(index).or_default();
            let promoted = run_id(new).is_some_and(|run_id| {
                let alone = old.failover().is_some() && past.born.contains(&run_id);
                alone || past.promoted.contains(&run_id)
            });
            if old.primary != new.primary && !promoted {
                self.fail(
                    "I4/I5: an epoch is committed after its primary was promoted",
                    || format!("shard {index}: {} in epoch {}", new.primary, new.epoch),
                );
            }
            if txn.leader.is_none() && token != old.handover().map(|h| h.token.as_str()) {
                self.fail("A1: a delegated commit presents the record's token", || {
                    format!("shard {index}: token {token:?}")
                });
            }
            if new.closed_epoch < old.closed_epoch || new.closed_epoch >= new.epoch {
                self.fail(
                    "I2: closed epochs rise and stay below the current one",
                    || format!("shard {index}: {} of {}", new.closed_epoch, new.epoch),
                );
            }
        }
        let past = self.shards.entry(index).or_default();
        past.epoch = new.epoch.0;
        (past.members).extend(new.members.iter().map(|m| m.node.to_string()));
        past.named
            .extend(new.members.iter().map(|m| m.run_id.clone()));
        if let Some(primary) = new.primary_member()
            && new.mode != Mode::Provisioning
            && new.failover().is_none()
        {
            let named = (primary.node.to_string(), primary.run_id.clone());
            past.primaries.insert(new.epoch.0, named);
        }
    }

    /// A hand-over belongs to the task that has the shard's lock.
    fn lock(&mut self, items: &BTreeMap<Key, Stored>, txn: &Txn, index: usize, new: &Shard) {
        let Some(handover) = new.handover() else {
            return;
        };
        let owner = items.get(&Key::Lock(index)).map(|s| s.value.clone());
        if owner != Some(Value::Lock(handover.task.to_string())) || txn.leader.is_none() {
            self.fail("I7: one operation per shard", || {
                format!(
                    "shard {index}: {} hands over, {owner:?} has the lock",
                    handover.task
                )
            });
        }
    }

    /// A lock goes only together with the end of its task, or of what it needs it for.
    fn unlock(&mut self, txn: &Txn, task: &str, shard: usize) {
        let ends = txn.puts.iter().any(|(key, value)| match (key, value) {
            (Key::Task(id), _) if id == task && Self::frees(value, shard) => true,
            (Key::Task(id), Value::Task(record)) => {
                id == task
                    && slotmesh_task::wire::state_from(record.state())
                        .is_some_and(slotmesh_task::State::is_ended)
            }
            _ => false,
        });
        if !ends {
            self.fail(
                "I7: a lock is freed only in the transaction that ends its task",
                || format!("task {task}"),
            );
        }
    }

    /// A proxy's connection for requests was logged in with this epoch's credential.
    pub fn routed(&mut self, proxy: usize, life: u64, shard: &str, epoch: u64) {
        let highest = self
            .routed
            .entry((proxy, format!("{shard}/{life}")))
            .or_default();
        let before = *highest;
        *highest = before.max(epoch);
        if epoch < before {
            self.fail(
                "A6/I6: a proxy never routes below the highest epoch it has applied",
                || format!("proxy {proxy} routes shard {shard} at {epoch} after {before}"),
            );
        }
    }

    /// A client was told that its write is done.
    pub fn acknowledged(&mut self, client: usize, op: u64) {
        if self.late.contains(&op) && self.durable {
            self.fail(
                "I1: what a lost primary does when it wakes is never acknowledged",
                || format!("client {client}: write {op}"),
            );
        }
    }

    /// Something may be gone that clients have seen.
    #[must_use]
    pub fn may_be_gone(&self) -> bool {
        self.data_was_lost || self.loss_was_accepted || !self.left_behind.is_empty()
    }

    /// A request waited in a proxy.
    pub fn answered(&mut self, what: &'static str, waited: Micros, limit: Micros) {
        if waited > limit {
            self.fail("A7/I9: every hold is bounded", || {
                format!("{what} took {waited} us")
            });
        }
    }

    /// An agent begins to execute a step.
    pub fn step_begun(&mut self, host: usize, key: String, term: u64) {
        let highest = self.terms.entry(host).or_default();
        let before = *highest;
        *highest = before.max(term);
        if term < before {
            self.fail("A3: an agent refuses steps of a lower term", || {
                format!("agent {host} executes {key} of term {term} after one of {before}")
            });
        }
        if self.steps.contains(&(host, key.clone())) {
            self.fail("A3: a repeated step returns its outcome", || {
                format!("agent {host} executes {key} again")
            });
        }
    }

    /// The outcome of a step is in the agent's journal.
    pub fn step_ended(&mut self, host: usize, key: String) {
        self.steps.insert((host, key));
    }
}

/// A lock is taken over only by the declaration of a failover, which compares who has it.
fn takes_over(txn: &Txn, shard: usize) -> bool {
    let compared = |c: &Compare| matches!(c, Compare::Unchanged(Key::Lock(s), _) if *s == shard);
    let declares = |(key, value): &(Key, Value)| match (key, value) {
        (Key::Shard(s), Value::Shard(record)) => {
            *s == shard && wire::shard_from(record).is_ok_and(|new| new.failover().is_some())
        }
        _ => false,
    };
    txn.compares.iter().any(compared) && txn.puts.iter().any(declares)
}

fn epoch_of(user: &str) -> u64 {
    user.strip_prefix("px-")
        .and_then(|e| e.parse().ok())
        .unwrap_or(0)
}

/// Of `rp-<epoch>-<node>`: epoch and node.
fn epoch_of_replica(user: &str) -> Option<(u64, &str)> {
    let (epoch, node) = user.strip_prefix("rp-")?.split_once('-')?;
    Some((epoch.parse().ok()?, node))
}

fn keys(txn: &Txn) -> Vec<&Key> {
    txn.puts.iter().map(|(key, _)| key).collect()
}
