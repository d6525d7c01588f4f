//! What must hold of failovers: their order in the records, and that they come.
//!
//! Invariant: what is expected was true of the mesh when it was said, not of what anybody had seen.

use std::collections::BTreeSet;

use slotmesh_topology::{FenceProof, Mode, Shard};

use super::Checks;
use crate::{
    msg::Party,
    sched::{MS, Micros},
    store::{Compare, Key, Txn},
};

/// Somebody else is to be a shard's primary by then.
#[derive(Debug)]
pub(super) struct Expected {
    shard: usize,
    lost: String,
    epoch: u64,
    by: Micros,
}

/// An agent that has just started takes nothing yet; the fencer watches for it.
const SETTLES: Micros = 2_700 * MS;

impl Checks {
    /// A party is gone, or stands still, until then.
    pub fn away(&mut self, party: Party, until: Micros) {
        if let Party::Agent(host) = party {
            let last = self.away.entry(host).or_default();
            *last = until.max(*last);
        }
    }

    /// A host whose agent looks after nothing: only its fencer does.
    #[must_use]
    pub fn is_unwatched(&self, host: usize, now: Micros) -> bool {
        self.away
            .get(&host)
            .is_some_and(|until| now < until + SETTLES)
    }

    /// At the end: what was replaced is kept in a file, or the primaries have it, or the primary that
    /// took it has ended.
    pub fn look_for_captured(&mut self, present: &BTreeSet<u64>) {
        let known = [&self.captured, &self.lost, &self.ended, present];
        let gone = (self.replaced.iter()).find(|(id, _)| known.iter().all(|set| !set.contains(id)));
        if let Some((id, node)) = gone.map(|(id, node)| (*id, node.clone())) {
            self.fail("I8: what a living old primary loses is captured", || {
                format!("{node} lost write {id} and others")
            });
        }
        self.look_for_wiped(present);
    }

    /// Since when several processes of a shard take writes, if they do now.
    pub fn several_since(&mut self, shard: usize, several: bool, now: Micros) -> Micros {
        if !several {
            self.several.remove(&shard);
            return now;
        }
        *self.several.entry(shard).or_insert(now)
    }

    /// A primary is lost for good, and a replica that has caught up lives: it is to be replaced.
    pub fn expect_replaced(&mut self, shard: usize, lost: &str, by: Micros) {
        let (lost, epoch) = (lost.to_owned(), self.epoch(shard));
        let expected = Expected {
            shard,
            lost,
            epoch,
            by,
        };
        self.expected.push(expected);
    }

    /// Whether everybody was replaced in time who was to be.
    pub fn look_for_replaced(&mut self, now: Micros) {
        let due = |e: &Expected| e.by <= now;
        if !self.expected.iter().any(due) {
            return;
        }
        let (due, later) = std::mem::take(&mut self.expected)
            .into_iter()
            .partition(due);
        self.expected = later;
        let due: Vec<Expected> = due;
        for Expected {
            shard, lost, epoch, ..
        } in due
        {
            let past = self.shards.entry(shard).or_default();
            let since = past.primaries.range(epoch + 1..);
            let another = |(_, (node, _)): (&u64, &(String, String))| *node != lost;
            if !since.into_iter().any(another) {
                self.fail(
                    "D1: a lost primary is replaced while a replica that had caught up lives",
                    || format!("shard {shard}: {lost}"),
                );
            }
        }
    }

    /// From a lost primary to its successor: declared, proven, chosen, promoted, in this order.
    pub(super) fn failover(&mut self, index: usize, old: &Shard, new: &Shard, txn: &Txn) {
        match (old.failover(), new.failover()) {
            (None, Some(after)) => {
                if let Some(lost) = old.primary_member() {
                    let declared = (index, lost.node.to_string(), lost.run_id.clone());
                    self.declared.push(declared);
                }
                if new.epoch.0 != old.epoch.0 + 1 || new.closed_epoch != old.epoch {
                    self.fail("I2: a failover ends the lost epoch first", || {
                        format!("shard {index}: {} to {}", old.epoch, new.epoch)
                    });
                }
                self.lease_is_compared(index, after.proof, txn);
            }
            (Some(before), Some(after)) => {
                if after.target.is_some() && after.proof.is_none() {
                    self.fail("I4: nobody is chosen before the lost one is fenced", || {
                        format!("shard {index}: {:?}", after.target)
                    });
                }
                if before.proof.is_none() {
                    self.lease_is_compared(index, after.proof, txn);
                }
                if before.target != after.target {
                    self.had_caught_up(index, old, new);
                }
            }
            (Some(before), None) => {
                if new.mode != Mode::Serving || before.proof.is_none() {
                    self.fail(
                        "I4: a failover ends with a fenced primary and another",
                        || format!("shard {index}: {:?}", new.mode),
                    );
                }
                let (lost, next) = (old.primary.to_string(), new.primary.to_string());
                self.failed_over.push((index, lost, next));
            }
            (None, None) => {}
        }
    }

    /// Another process of a replica than the recorded one has not, whatever it loaded; the lost primary
    /// may have been started again, and nobody has more. Where every process that had caught up has
    /// ended, an asynchronous shard goes on from its disks.
    fn had_caught_up(&mut self, index: usize, old: &Shard, new: &Shard) {
        let target = new.failover().and_then(|f| f.target.as_ref());
        let Some(target) = target.filter(|t| **t != old.primary) else {
            return;
        };
        let run_id = |shard: &Shard| shard.member(target).map(|m| m.run_id.clone());
        let (was, is) = (run_id(old), run_id(new));
        let from_disks = !self.durable && self.all_have_ended(index, old);
        if was != is && !from_disks && !self.loss_was_accepted && !self.anybody_may_lead {
            self.fail(
                "F4: whoever is chosen is the process that had caught up",
                || format!("shard {index}: {target} as {is:?}, recorded as {was:?}"),
            );
        }
    }

    /// Whether the lost primary's process has ended, and those of all that had caught up with it.
    fn all_have_ended(&self, index: usize, shard: &Shard) -> bool {
        let past = self.shards.get(&index);
        let lost = past.and_then(|past| past.primaries.last_key_value());
        let mut others = shard.members.iter().filter(|m| m.node != shard.primary);
        lost.is_some_and(|(_, (_, run_id))| self.gone.contains(run_id))
            && others.all(|m| !m.in_sync || self.gone.contains(&m.run_id))
    }

    fn lease_is_compared(&mut self, index: usize, proof: Option<FenceProof>, txn: &Txn) {
        let absent = |c: &Compare| matches!(c, Compare::Absent(Key::Host(_)));
        if proof == Some(FenceProof::Lease) && !txn.compares.iter().any(absent) {
            self.fail("I4: a lease's end is compared, not believed", || {
                format!("shard {index}")
            });
        }
    }
}
