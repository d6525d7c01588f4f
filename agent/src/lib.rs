//! The host plane: runs the nodes and proxies of one host, executes steps, fences.
//!
//! Invariants: an agent's death alone stops no process, and its restart adopts what runs; a process
//! that the record does not name stays fenced; nothing is promoted except by a step that a leader
//! ordered; no primary serves beyond its host's right to.

pub mod app;
pub mod artifact;
pub mod capture;
pub mod control;
pub mod controllers;
pub mod drain;
pub mod executor;
pub mod fence;
pub mod fencer;
pub mod handover;
pub mod host;
pub mod journal;
pub mod lease;
pub mod metrics;
pub mod node;
pub mod probe;
pub mod process;
pub mod promote;
pub mod proxy;
pub mod pulse;
pub mod reports;
pub mod session;
pub mod settings;
pub mod supervisor;
