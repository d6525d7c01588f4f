//! What one client was told: the side of the books that the mesh can't change.
//!
//! Acknowledged means that the reply said so. Ambiguous means that no reply said anything: such a
//! write may be there once or not at all, and neither is a broken promise by itself.

use std::{collections::HashSet, time::Duration};

/// Ids in one list key, so that no list grows without bound.
pub(super) const LIST_LENGTH: u64 = 1_000;
/// Enough to see what went wrong.
const SAMPLES_MAX: usize = 5;

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One command at a time: INCR, and SET of unique ids.
    Plain,
    /// Sixteen commands at a time: INCR, SET and RPUSH of unique ids.
    Pipelined,
    /// EVAL whose writes are under pcall, which swallows their errors.
    Script,
    /// MULTI, INCR and RPUSH of a unique id, EXEC.
    Transaction,
    /// SET through one proxy, GET through another: a read must not go back.
    Reader,
}

impl Kind {
    pub(super) fn of(client: u32) -> Self {
        match client % 5 {
            0 => Self::Plain,
            1 => Self::Pipelined,
            2 => Self::Script,
            3 => Self::Transaction,
            _ => Self::Reader,
        }
    }
}

/// The books of one client.
#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) keys: Keys,
    pub(super) counted: u64,
    pub(super) counted_ambiguous: u64,
    /// Unique ids written with SET, counted from 0.
    pub(super) set: Ids,
    /// Unique ids written with RPUSH, counted from 0.
    pub(super) pushed: Ids,
    /// Last value that a SET of the reader's register was acknowledged for.
    pub(super) register: u64,
    pub(super) requests: u64,
    pub(super) commands: u64,
    pub(super) errors: u64,
    pub(super) stale_reads: u64,
    pub(super) longest_stall: Duration,
    pub(super) samples: Vec<String>,
}

/// A row of ids, of which some are ambiguous.
#[derive(Debug, Default)]
pub(super) struct Ids {
    pub(super) next: u64,
    pub(super) ambiguous: HashSet<u64>,
}

/// The keys of one client, which no other one writes.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    /// Script and transaction need theirs in one slot; the others are spread.
    pub(super) fn new(run: &str, client: u32) -> Self {
        let prefix = match Kind::of(client) {
            Kind::Script | Kind::Transaction => format!("bench:{{{run}:{client}}}"),
            _ => format!("bench:{run}:{client}"),
        };
        Self { prefix }
    }

    pub(super) fn counter(&self) -> String {
        format!("{}:counter", self.prefix)
    }

    pub(super) fn register(&self) -> String {
        format!("{}:register", self.prefix)
    }

    pub(super) fn id(&self, id: u64) -> String {
        format!("{}:id:{id}", self.prefix)
    }

    /// The list that an id is pushed to.
    pub(super) fn list(&self, id: u64) -> String {
        format!("{}:list:{}", self.prefix, id / LIST_LENGTH)
    }
}

impl Ids {
    /// The next `count` ids; they are ambiguous until [`Ids::acknowledge`].
    pub(super) fn take(&mut self, count: u64) -> std::ops::Range<u64> {
        let range = self.next..self.next + count;
        self.next = range.end;
        self.ambiguous.extend(range.clone());
        range
    }

    pub(super) fn acknowledge(&mut self, ids: std::ops::Range<u64>) {
        for id in ids {
            self.ambiguous.remove(&id);
        }
    }

    pub(super) fn acknowledged(&self) -> u64 {
        self.next - self.ambiguous.len() as u64
    }
}

impl Ledger {
    pub(super) fn new(run: &str, client: u32) -> Self {
        Self {
            keys: Keys::new(run, client),
            counted: 0,
            counted_ambiguous: 0,
            set: Ids::default(),
            pushed: Ids::default(),
            register: 0,
            requests: 0,
            commands: 0,
            errors: 0,
            stale_reads: 0,
            longest_stall: Duration::ZERO,
            samples: Vec::new(),
        }
    }

    /// Acknowledged writes.
    pub(super) fn acknowledged(&self) -> u64 {
        self.counted + self.set.acknowledged() + self.pushed.acknowledged() + self.register
    }

    pub(super) fn answered(&mut self, took: Duration, commands: u64) {
        self.requests += 1;
        self.commands += commands;
        self.longest_stall = self.longest_stall.max(took);
    }

    pub(super) fn failed(&mut self, kind: Kind, what: impl std::fmt::Display) {
        self.errors += 1;
        if self.samples.len() < SAMPLES_MAX {
            self.samples.push(format!("{kind:?}: {what}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_ambiguous_until_it_is_acknowledged() {
        let mut ids = Ids::default();
        let first = ids.take(3);
        assert_eq!(ids.acknowledged(), 0);
        let second = ids.take(2);
        ids.acknowledge(second);
        assert_eq!((ids.acknowledged(), ids.ambiguous.len()), (2, 3));
        ids.acknowledge(first);
        assert_eq!((ids.acknowledged(), ids.ambiguous.len()), (5, 0));
    }
}
