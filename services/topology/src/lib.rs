//! The pure model of the mesh: instances, shards, slots, epochs, and what follows from them.
//!
//! No clock, no I/O, no async. A value of a type here is valid; records and messages are parsed at
//! the edge, in [`wire`].
//!
//! **Invariant:** the primary of a shard changes only together with a rise of its epoch
//! ([`shard::Shard::commit`], [`shard::Shard::readmit`]).

pub mod account;
pub mod artifact;
pub mod assignment;
pub mod check;
pub mod compatibility;
pub mod credential;
pub mod delta;
pub mod id;
pub mod instance;
pub mod parameter;
pub mod route;
pub mod shard;
pub mod slot;
pub mod wire;

pub use id::{Epoch, HostId, InstanceId, NodeId, ProxyId, Revision, ShardId, TaskId, Term};
pub use instance::{Architecture, Instance, InstanceState, Leaving, Placement};
pub use shard::{
    DEPARTURES_MAX, Departure, Exchange, Failover, FenceProof, GONE_MAX, GoneNode, Handover,
    Lineage, Member, Mode, NodeRole, Older, PRIORITY, PRIORITY_MAX, Roster, Shard, TransitionError,
};
pub use slot::{SLOT_COUNT, Slot, SlotRange};
