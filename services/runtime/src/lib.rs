//! What every slotmesh process needs and no domain word: logs and traces, metrics, signals,
//! settings files, sockets' paths, backoff.

pub mod backoff;
pub mod metrics;
pub mod settings;
pub mod shutdown;
pub mod socket;
pub mod telemetry;
