//! Everything that can be compared with a real Redis 7.0.
#![allow(clippy::unwrap_used)]

mod glob;
mod log;
mod settled;
mod users;
