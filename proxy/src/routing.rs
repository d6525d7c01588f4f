//! Where each slot's requests go, as every worker sees it: built by the watch, never changed.
//!
//! Invariants: a shard keeps its number for the life of the process; its epoch never falls.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use slotmesh_topology::{SLOT_COUNT, Slot};

use crate::core::hold::HoldOrder;

/// A shard's fixed number in this process; the index of its lanes.
pub type ShardNo = u16;

/// No shard serves the slot.
pub const NO_SHARD: ShardNo = u16::MAX;

/// Where a shard's requests go.
#[derive(Clone, PartialEq, Eq)]
pub struct ShardRoute {
    pub shard_id: String,
    pub index: u32,
    pub epoch: u64,
    pub address: SocketAddr,
    pub username: String,
    pub password: String,
    pub hold: Option<HoldOrder>,
    /// Whom to connect to beforehand while held.
    pub target: Option<SocketAddr>,
}

impl std::fmt::Debug for ShardRoute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardRoute")
            .field("shard_id", &self.shard_id)
            .field("epoch", &self.epoch)
            .field("address", &self.address)
            .field("hold", &self.hold)
            .finish_non_exhaustive()
    }
}

/// What a worker must know of the instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceSettings {
    pub databases: u16,
    /// SHA-256 of the password of `default`; none is needed without it.
    pub password_sha256: Option<[u8; 32]>,
    pub hold_budget_us: u64,
    pub hold_bytes_max: u64,
}

impl Default for InstanceSettings {
    fn default() -> Self {
        Self {
            databases: 256,
            password_sha256: None,
            hold_budget_us: 5_000_000,
            hold_bytes_max: 64 * 1024 * 1024,
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct RoutingTable {
    pub revision: u64,
    pub settings: InstanceSettings,
    slots: Box<[ShardNo]>,
    /// By number; `None`: the shard was removed.
    pub shards: Vec<Option<Arc<ShardRoute>>>,
}

impl Default for RoutingTable {
    fn default() -> Self {
        Self {
            revision: 0,
            settings: InstanceSettings::default(),
            slots: vec![NO_SHARD; usize::from(SLOT_COUNT)].into_boxed_slice(),
            shards: Vec::new(),
        }
    }
}

impl RoutingTable {
    /// A table; each shard with the slot ranges (both ends included) that it serves.
    #[must_use]
    pub fn new(
        revision: u64,
        settings: InstanceSettings,
        shards: Vec<Option<Arc<ShardRoute>>>,
        ranges: &[(ShardNo, u16, u16)],
    ) -> Self {
        let mut table = Self {
            revision,
            settings,
            shards,
            ..Self::default()
        };
        for &(shard, first, last) in ranges {
            table.slots[usize::from(first)..=usize::from(last)].fill(shard);
        }
        table
    }

    /// The shard that serves a key, or [`NO_SHARD`].
    #[inline]
    #[must_use]
    pub fn shard_of(&self, key: &[u8]) -> ShardNo {
        self.slots[usize::from(Slot::of(key).number())]
    }

    /// The shard of commands that name no key: that of slot 0.
    #[inline]
    #[must_use]
    pub fn keyless_shard(&self) -> ShardNo {
        self.slots[0]
    }

    /// The shard, if there is just one and it serves everything.
    #[must_use]
    pub fn only_shard(&self) -> Option<ShardNo> {
        let mut live = self.shards.iter().enumerate().filter(|(_, s)| s.is_some());
        let (no, _) = live.next()?;
        live.next().is_none().then_some(no as ShardNo)
    }

    /// Numbers of all shards, by their index in the instance.
    #[must_use]
    pub fn all_shards(&self) -> Vec<ShardNo> {
        let mut all: Vec<_> = (self.shards.iter().enumerate())
            .filter_map(|(no, s)| s.as_ref().map(|s| (s.index, no as ShardNo)))
            .collect();
        all.sort_unstable();
        all.into_iter().map(|(_, no)| no).collect()
    }

    /// The number of a shard by its id.
    #[must_use]
    pub fn number_of(&self, shard_id: &str) -> Option<ShardNo> {
        let is_it =
            |s: &Option<Arc<ShardRoute>>| s.as_ref().is_some_and(|s| s.shard_id == shard_id);
        self.shards.iter().position(is_it).map(|no| no as ShardNo)
    }

    /// True if every slot is served.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.slots.iter().all(|no| *no != NO_SHARD)
    }
}

/// The table that is in force, and how often it was replaced. A worker looks at the generation once
/// a turn, never per command.
#[derive(Debug, Default)]
pub struct Routing {
    table: ArcSwap<RoutingTable>,
    generation: AtomicU64,
}

impl Routing {
    /// Puts a new table in force. Wake the workers afterwards.
    pub fn publish(&self, table: RoutingTable) {
        self.table.store(Arc::new(table));
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Rises with each [`Self::publish`].
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The table in force.
    pub fn load(&self) -> Arc<RoutingTable> {
        self.table.load_full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_go_to_the_shard_of_their_range() {
        let ranges = [(0, 0, 8191), (1, 8192, 16383)];
        let table = RoutingTable::new(1, InstanceSettings::default(), Vec::new(), &ranges);
        assert_eq!(table.shard_of(b"foo"), 1); // slot 12182
        assert_eq!(table.shard_of(b"{user1000}.x"), 0); // slot 3443
        assert_eq!(table.keyless_shard(), 0);
        assert!(table.is_complete());
        assert!(!RoutingTable::default().is_complete());
    }
}
