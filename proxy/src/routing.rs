//! Where each slot's requests go, as every worker sees it: built by the watch, never changed.
//!
//! Invariants: a shard keeps its number for the life of the process; its epoch never falls.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use slotmesh_acl::Users;
use slotmesh_command::Release;
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
    /// The user that sees messages at every node of the shard, at any epoch.
    pub observer: Option<Login>,
    /// The other nodes, by node id.
    pub replicas: Vec<SocketAddr>,
}

/// How to log in at a node.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Login").field(&self.username).finish()
    }
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
    /// Accounts of clients.
    pub users: Arc<Users>,
    pub hold_budget_us: u64,
    pub hold_bytes_max: u64,
    /// Replicas that must have a write before it is acknowledged; 0: it is at once.
    pub durability: u32,
    /// Parameters of proxies as they were given, for CONFIG GET.
    pub proxy_parameters: BTreeMap<String, String>,
    pub parameters: Parameters,
    /// An engine that may have to serve again: what it does not know is not sent to any node.
    pub held_back: Option<Release>,
}

/// When a write counts as done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Durability {
    /// Replicas that must have it; 0: none.
    pub replicas: u32,
    /// How long to wait for them.
    pub timeout_ms: u32,
    /// They must have it on their disks, and the primary too, where the engine can say so.
    pub fsync: bool,
    /// Reads wait for what they may have seen.
    pub reads: bool,
    /// A node may follow that has no channels of shards, and would refuse a message to one.
    pub plain_channels: bool,
}

impl InstanceSettings {
    /// As durability and parameters say.
    #[must_use]
    pub fn durability(&self) -> Durability {
        Durability {
            replicas: self.durability,
            timeout_ms: self.parameters.durability_timeout_ms,
            fsync: self.parameters.durability_fsync,
            reads: self.parameters.read_gate,
            plain_channels: self.held_back.is_some_and(|release| {
                let sharded = slotmesh_command::lookup(b"spublish");
                sharded.is_some_and(|command| !command.is_known_to(release))
            }),
        }
    }
}

/// Parameters of proxies, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Parts of split commands are made for each slot instead of each shard.
    pub split_by_slot: bool,
    /// Scripts must name their keys by KEYS alone.
    pub script_check: bool,
    /// Dedicated connections to one node in one worker.
    pub private_connections_max: usize,
    /// What a slow subscriber may leave unread: at once, or for so many seconds.
    pub pubsub_hard_bytes: usize,
    pub pubsub_soft_bytes: usize,
    pub pubsub_soft_s: u64,
    /// An idle client is closed after this; 0: never.
    pub timeout_s: u64,
    /// READONLY, READWRITE and CLUSTER are answered.
    pub cluster_compat: bool,
    /// Requests of a client without a reply, before it is no longer read.
    pub session_processing_max: u32,
    /// Bytes of operands that a command over several shards may gather.
    pub job_bytes_max: usize,
    /// Clients of a proxy; `None`: as the process was told.
    pub clients_max: Option<usize>,
    /// How long a write waits for its replicas.
    pub durability_timeout_ms: u32,
    pub durability_fsync: bool,
    pub read_gate: bool,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            split_by_slot: false,
            script_check: false,
            private_connections_max: 512,
            pubsub_hard_bytes: 32 * 1024 * 1024,
            pubsub_soft_bytes: 8 * 1024 * 1024,
            pubsub_soft_s: 60,
            timeout_s: 0,
            cluster_compat: true,
            session_processing_max: 1024,
            job_bytes_max: 256 * 1024 * 1024,
            clients_max: None,
            durability_timeout_ms: 1000,
            durability_fsync: false,
            read_gate: false,
        }
    }
}

impl Parameters {
    /// Reads what was given. The controller has checked names and ranges; a newer one's names, and
    /// what cannot be read, leave the default.
    #[must_use]
    pub fn read(given: &BTreeMap<String, String>) -> Self {
        let mut all = Self::default();
        for (name, value) in given {
            let flag = value == "1";
            match name.as_str() {
                "durability_timeout_ms" => read_into(value, &mut all.durability_timeout_ms),
                "durability_fsync" => all.durability_fsync = value == "yes",
                "read_gate" => all.read_gate = value == "yes",
                "split" => all.split_by_slot = value == "slot",
                "script_check_enable" => all.script_check = flag,
                "cluster_compat_enable" => all.cluster_compat = flag,
                "private_connections_max" => read_into(value, &mut all.private_connections_max),
                "timeout" => read_into(value, &mut all.timeout_s),
                "max_session_processing" => read_into(value, &mut all.session_processing_max),
                "job_bytes_max" => read_into(value, &mut all.job_bytes_max),
                "maxclients" => all.clients_max = value.parse().ok(),
                "client_output_buffer_limit_pubsub" => {
                    let mut words = value.split_ascii_whitespace();
                    let mut word = || words.next().unwrap_or_default();
                    read_into(word(), &mut all.pubsub_hard_bytes);
                    read_into(word(), &mut all.pubsub_soft_bytes);
                    read_into(word(), &mut all.pubsub_soft_s);
                }
                _ => {}
            }
        }
        all
    }
}

fn read_into<T: std::str::FromStr>(value: &str, field: &mut T) {
    if let Ok(value) = value.parse() {
        *field = value;
    }
}

impl Default for InstanceSettings {
    fn default() -> Self {
        Self {
            databases: 256,
            users: Arc::new(Users::open(None)),
            hold_budget_us: 5_000_000,
            hold_bytes_max: 64 * 1024 * 1024,
            durability: 0,
            proxy_parameters: BTreeMap::new(),
            parameters: Parameters::default(),
            held_back: None,
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

    /// The shard that serves a slot (below 16,384), or [`NO_SHARD`].
    #[must_use]
    pub fn shard_of_slot(&self, slot: u16) -> ShardNo {
        self.slots[usize::from(slot)]
    }

    /// The slot ranges (both ends included) of each shard that has some, by index.
    #[must_use]
    pub fn slot_ranges(&self) -> Vec<Vec<(u16, u16)>> {
        let mut ranges: BTreeMap<ShardNo, Vec<(u16, u16)>> = BTreeMap::new();
        for (slot, no) in self.slots.iter().enumerate() {
            let slot = slot as u16;
            let own = ranges.entry(*no).or_default();
            match own.last_mut() {
                Some((_, last)) if *last + 1 == slot => *last = slot,
                _ => own.push((slot, slot)),
            }
        }
        let shards = self.all_shards().into_iter();
        shards.filter_map(|no| ranges.remove(&no)).collect()
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
