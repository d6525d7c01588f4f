//! Why primaries that look lost are not replaced: for operators, beside the log.
//!
//! Invariant: only a driver writes it, and what it wrote ends with its term; a controller that does
//! not lead shows nothing here and asks the leader.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use slotmesh_topology::{InstanceId, ShardId};

type Shard = (InstanceId, ShardId);

/// What the leader has against declaring primaries lost. Shared by the driver and the services.
#[derive(Clone, Debug, Default)]
pub struct Doubts {
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    brake: String,
    brakes: u64,
    hosts: usize,
    silent: usize,
    suspected: BTreeMap<Shard, String>,
}

/// Numbers for the metrics page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// The brake is on.
    pub is_braked: bool,
    /// How often it was put on since this process began.
    pub brakes: u64,
    /// Hosts that are known.
    pub hosts: usize,
    /// Those of them without a lease.
    pub silent: usize,
    /// Primaries that look lost and are not replaced.
    pub suspected: usize,
}

impl Doubts {
    fn with<R>(&self, act: impl FnOnce(&mut Known) -> R) -> R {
        act(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What a term's end leaves is nobody's word any more.
    pub(crate) fn clear(&self) {
        self.with(|known| {
            *known = Known {
                brakes: known.brakes,
                ..Known::default()
            };
        });
    }

    /// What is seen of hosts now; true when the brake was put on, or let go.
    pub(crate) fn see_hosts(&self, brake: Option<&str>, hosts: usize, silent: usize) -> bool {
        self.with(|known| {
            (known.hosts, known.silent) = (hosts, silent);
            let brake = brake.unwrap_or_default();
            let has_turned = brake.is_empty() != known.brake.is_empty();
            if has_turned && !brake.is_empty() {
                known.brakes += 1;
            }
            brake.clone_into(&mut known.brake);
            has_turned
        })
    }

    /// A primary looks lost and is not replaced; true when that is news.
    pub(crate) fn suspect(&self, shard: Shard, what: &str) -> bool {
        self.with(|known| {
            let is_news = known.suspected.get(&shard).is_none_or(|old| old != what);
            if is_news {
                known.suspected.insert(shard, what.to_owned());
            }
            is_news
        })
    }

    /// Nothing against it any more.
    pub(crate) fn trust(&self, shard: &Shard) {
        self.with(|known| known.suspected.remove(shard));
    }

    /// Forgets shards that are gone.
    pub(crate) fn keep_only(&self, shards: &BTreeSet<Shard>) {
        self.with(|known| known.suspected.retain(|shard, _| shards.contains(shard)));
    }

    /// Why the shard's primary is not replaced; empty: it does not look lost.
    #[must_use]
    pub fn of(&self, shard: &Shard) -> String {
        self.with(|known| known.suspected.get(shard).cloned().unwrap_or_default())
    }

    /// Why silent hosts make no failover; empty: they do.
    #[must_use]
    pub fn brake(&self) -> String {
        self.with(|known| known.brake.clone())
    }

    /// For the metrics page.
    #[must_use]
    pub fn numbers(&self) -> Numbers {
        self.with(|known| Numbers {
            is_braked: !known.brake.is_empty(),
            brakes: known.brakes,
            hosts: known.hosts,
            silent: known.silent,
            suspected: known.suspected.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_brake_is_news_when_it_turns_and_is_gone_with_the_term() {
        let doubts = Doubts::default();
        assert!(!doubts.see_hosts(None, 3, 0));
        assert!(doubts.see_hosts(Some("2 of 3"), 3, 2));
        assert!(
            !doubts.see_hosts(Some("3 of 3"), 3, 3),
            "on is on, whatever the number"
        );
        assert_eq!(doubts.brake(), "3 of 3");
        let shard = ("r".into(), "0".into());
        assert!(doubts.suspect(shard.clone(), "silent"));
        assert!(!doubts.suspect(shard.clone(), "silent"));
        assert_eq!(doubts.of(&shard), "silent");
        let seen = doubts.numbers();
        assert_eq!((seen.is_braked, seen.brakes, seen.silent), (true, 1, 3));
        doubts.clear();
        let left = doubts.numbers();
        assert_eq!((left.is_braked, left.brakes, left.suspected), (false, 1, 0));
        assert_eq!(doubts.of(&shard), "");
    }
}
