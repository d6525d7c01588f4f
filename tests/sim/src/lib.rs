//! Seeded simulation of the mesh: one process, virtual time, the real decision code of controller,
//! agent and proxy around a model of Redis, of the store and of the network.
//!
//! Real: `slotmesh_topology` and `slotmesh_task` whole; of the agent the hand-over's machine, the
//! convergence, the journal's memory, the executor's fencing and the reading of `INFO`; of the proxy
//! the whole core (bytes of clients and nodes in, bytes out). Modelled: what those talk to.
//!
//! Invariant: the same seed gives the same run.

pub mod agent;
pub mod ambush;
pub mod check;
pub mod client;
pub mod controller;
pub mod ctx;
pub mod engine;
pub mod fiber;
pub mod matrix;
pub mod msg;
pub mod net;
pub mod node;
pub mod plan;
pub mod proxy;
pub mod redis;
pub mod resp;
pub mod sched;
pub mod store;
pub mod trace;
pub mod variant;
pub mod world;

pub use trace::Trace;
pub use variant::Variant;
pub use world::{Outcome, World};

/// Runs one seed.
#[must_use]
pub fn run(seed: u64, variant: Variant) -> Outcome {
    World::new(seed, variant, Trace::default()).run()
}

/// Runs one seed with this going wrong, whatever the seed would choose.
#[must_use]
pub fn run_as(profile: plan::Profile, seed: u64, variant: Variant) -> Outcome {
    World::with(profile, seed, variant, Trace::default()).run()
}

/// Runs one seed again, for its story: the last events, or all.
#[must_use]
pub fn tell(seed: u64, variant: Variant, all: bool) -> Outcome {
    World::new(seed, variant, Trace::new(true, all)).run()
}
