//! The controller: it holds the one truth in a store, and only its leader changes it.

pub mod admin;
pub mod agents;
pub mod app;
pub mod clock;
pub mod doubts;
pub mod drive;
pub mod forward;
pub mod grpc;
pub mod hosts;
pub mod hub;
pub mod jumps;
pub mod leader;
pub mod mirror;
pub mod peers;
mod relay;
pub mod settings;
pub mod store;
pub(crate) mod trace;
