//! The operator's command line, and a whole mesh on one machine.
//!
//! A library, so that the tests can drive what the binary does without parsing its output.

pub mod api;
pub mod artifact;
pub mod auto_upgrade;
pub mod change;
pub mod command;
pub mod demo;
mod drain;
pub mod failure;
mod gates;
pub mod lost_writes;
pub mod nodes;
pub mod operate;
pub mod progress;
pub mod proxies;
pub mod redis;
pub mod render;
pub mod status;
pub mod tasks;
pub mod up;
pub mod upgrade;
pub mod version;
pub mod views;
