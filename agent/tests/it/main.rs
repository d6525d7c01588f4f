//! The agent against real engine processes and a controller of a few lines.

// Helpers of tests are tests.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod binary;
mod controller;
mod damage;
mod exchange;
mod failover;
mod feed;
mod hand_over;
mod hosts;
mod lease;
mod lineage;
mod nodes;
mod parameters;
mod processes;
mod proxies;
mod resume;
mod sessions;
mod trial;
mod users;
