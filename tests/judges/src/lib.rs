//! Judges of the data path: programs that try to tell an instance from one big Redis.
//!
//! They know nothing of how it is built: they speak RESP to two addresses, with code of their own.

pub mod differential;
pub mod isolation;
mod random;
pub mod wire;
