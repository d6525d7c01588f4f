//! A controller's copy of the records, as a watch shows them.
//!
//! Invariant: it may be behind; whoever writes compares the revisions that it holds.

use std::collections::{BTreeMap, BTreeSet};

use slotmesh_task::Task;
use slotmesh_topology::Shard;

use crate::store::{Key, Stored, Value, Watched};

/// A record and when it was written.
#[derive(Clone, Debug)]
pub(crate) struct Versioned<T> {
    pub(crate) value: T,
    pub(crate) mod_revision: u64,
}

/// The records, as the watch shows them.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    pub(crate) revision: u64,
    pub(crate) shards: BTreeMap<usize, Versioned<Shard>>,
    pub(crate) tasks: BTreeMap<String, Versioned<Task>>,
    pub(crate) locks: BTreeSet<usize>,
}

impl Mirror {
    pub(crate) fn take(&mut self, changes: Vec<Watched>) {
        for Watched {
            key,
            stored,
            revision,
        } in changes
        {
            self.revision = self.revision.max(revision);
            match (key, stored) {
                (
                    Key::Shard(index),
                    Some(Stored {
                        value: Value::Shard(r),
                        mod_revision,
                        ..
                    }),
                ) => {
                    if let Ok(value) = slotmesh_topology::wire::shard_from(&r) {
                        self.shards.insert(
                            index,
                            Versioned {
                                value,
                                mod_revision,
                            },
                        );
                    }
                }
                (
                    Key::Task(id),
                    Some(Stored {
                        value: Value::Task(r),
                        mod_revision,
                        ..
                    }),
                ) => {
                    if let Ok(value) = slotmesh_task::wire::task_from(&r) {
                        self.tasks.insert(
                            id,
                            Versioned {
                                value,
                                mod_revision,
                            },
                        );
                    }
                }
                (Key::Lock(shard), Some(_)) => drop(self.locks.insert(shard)),
                (Key::Lock(shard), None) => drop(self.locks.remove(&shard)),
                _ => {}
            }
        }
    }
}
