//! A controller's copy of the records, as a watch shows them.
//!
//! Invariant: it may be behind, and then shows an earlier state whole; whoever writes compares the revisions that it holds.

use std::collections::BTreeMap;

use slotmesh_task::Task;
use slotmesh_topology::{Instance, InstanceState, Shard};

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
    /// Which task has which shard, and when it got it.
    pub(crate) owners: BTreeMap<usize, (String, u64)>,
    /// Which controller leads, if the records say so.
    pub(crate) leader: Option<usize>,
    /// The newest term that was seen.
    pub(crate) term: u64,
    /// Hosts that have a right to serve, and since which revision.
    pub(crate) hosts: BTreeMap<usize, u64>,
    /// The instance is being removed.
    pub(crate) is_deleting: bool,
    /// The instance's engine.
    pub(crate) engine: String,
}

impl Mirror {
    /// The instance as its record would be.
    pub(crate) fn instance(&self, first: &Instance) -> Instance {
        let mut instance = first.clone();
        if self.is_deleting {
            instance.state = InstanceState::Deleting;
        }
        instance.engine.clone_from(&self.engine);
        instance
    }

    /// Everything anew: what is not listed is gone.
    pub(crate) fn list(&mut self, revision: u64, items: Vec<Watched>) {
        *self = Self {
            revision,
            term: self.term,
            ..Self::default()
        };
        self.take(items);
    }

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
                (
                    Key::Leader,
                    Some(Stored {
                        value: Value::Leader(controller, _),
                        create_revision,
                        ..
                    }),
                ) => {
                    self.leader = Some(controller);
                    self.term = create_revision;
                }
                (Key::Leader, None) => self.leader = None,
                (
                    Key::Lock(shard),
                    Some(Stored {
                        value: Value::Lock(task),
                        mod_revision,
                        ..
                    }),
                ) => drop(self.owners.insert(shard, (task, mod_revision))),
                (Key::Lock(shard), None) => drop(self.owners.remove(&shard)),
                (Key::Host(host), Some(stored)) => {
                    self.hosts.insert(host, stored.create_revision);
                }
                (Key::Host(host), None) => drop(self.hosts.remove(&host)),
                (
                    Key::Engine,
                    Some(Stored {
                        value: Value::Engine(engine),
                        ..
                    }),
                ) => self.engine = engine,
                (Key::Instance, stored) => self.is_deleting = stored.is_some(),
                (Key::Shard(index), None) => drop(self.shards.remove(&index)),
                _ => {}
            }
        }
    }
}
