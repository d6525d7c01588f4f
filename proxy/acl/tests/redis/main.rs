//! Everything that can be compared with a real Redis 7.0.
#![allow(clippy::unwrap_used)]

mod engine;
mod glob;
mod log;
mod users;
