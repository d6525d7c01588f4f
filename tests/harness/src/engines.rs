//! The engines that slotmesh is tested with, from `.engines` of the repository.

use std::path::PathBuf;

/// Names as `slotmesh up --engine` takes them.
pub const ALL: [&str; 4] = ["redis-6.2", "redis-7.0", "redis-8.2", "valkey-8.0"];

/// The program of an engine: a name of [`ALL`], a version, a path, or "" for the one on PATH.
///
/// # Errors
/// Says how to get it.
pub fn find(name: &str) -> anyhow::Result<PathBuf> {
    Ok(slotmesh_ctl::up::engine::find(name)?)
}
