//! What the mesh costs and what its changes do to clients, measured from outside.
//!
//! A library, so that the end-to-end tests run the same load and the same audit, only shorter.

pub mod args;
pub mod calm;
pub mod chaos;
pub mod durable;
pub mod failover;
mod probe;
pub mod proxy;
pub mod proxy_upgrade;
pub mod report;
pub mod split;
pub mod switchover;
pub mod upgrade;
