//! The data plane: takes Redis clients, keeps pipelined connections to the primaries of the shards,
//! and makes a change of a primary a short wait.
//!
//! Invariants: a worker thread owns all of its state; nothing is locked or allocated per command on
//! the common path; the proxy never lowers an epoch and never infers a role from a node.

pub mod admin;
pub mod app;
pub mod controllers;
pub mod core;
pub mod handover;
pub mod listener;
pub mod metrics;
pub mod progress;
pub mod routing;
pub mod saved;
pub mod settings;
pub mod switchboard;
pub mod tls;
pub mod topology;
pub mod watch;
pub mod worker;
