//! Pure decisions of the controller: what is admitted, where it is placed, and what a task does
//! next.
//!
//! Every machine here is level-triggered and total: from the records and what is observed *now* it
//! derives the next act, so the same code runs in the common case, after a controller's restart,
//! and in simulation. No clock, no I/O, no async.

pub mod admit;
pub mod auto;
pub mod copied;
pub mod detect;
pub mod drain;
pub mod failover;
pub mod observe;
mod parts;
pub mod place;
pub mod provision;
pub mod proxies;
pub mod replace;
pub mod schedule;
pub mod spec;
pub mod steady;
pub mod step;
pub mod switchover;
pub mod table;
pub mod upgrade;
pub mod upkeep;
pub mod wire;

pub use observe::{
    Fleet, HoldLevel, NodeView, ProcessState, ProxyHandover, ProxyProcess, ProxyView,
};
pub use spec::{
    Choice, Copied, FailoverPhase, NodeReplacement, Phase, ReplacePhase, ShardFailover,
    ShardSwitch, Spec, State, Task,
};
