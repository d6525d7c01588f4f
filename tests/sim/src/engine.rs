//! The engines that nodes are made of here: names as assignments have them, and what the real table
//! of releases says of their files.
//!
//! Invariant: whether one engine loads what another has written is decided by that table alone.

use slotmesh_topology::{artifact::parse_name, compatibility::release_of};

/// What agents start where nothing else is assigned.
const DEFAULT: &str = "redis-7.0.15";
/// Another patch of it: each loads the other's files.
pub const PATCH: &str = "redis-7.0.16";
/// A release whose files the default can't load, and with commands that it does not know.
pub const NEXT: &str = "redis-8.2.3";

/// The engine by its name as an artifact.
fn full(name: &str) -> &str {
    match name {
        "" => DEFAULT,
        name => name,
    }
}

/// As INFO has it.
#[must_use]
pub fn version(name: &str) -> &str {
    let name = full(name);
    name.strip_prefix("redis-").unwrap_or(name)
}

/// Version of the files that it writes, and the highest that it loads.
#[must_use]
pub fn format(name: &str) -> u32 {
    let release = parse_name(full(name)).and_then(release_of);
    release.map_or(0, |release| release.rdb)
}

/// Whether it knows the commands that [`NEXT`] was the first to have.
#[must_use]
pub fn knows_newer(name: &str) -> bool {
    format(name) >= format(NEXT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_one_loads_what_the_default_has_written_and_not_the_other_way_round() {
        assert!(format(NEXT) > format(""));
        assert_eq!(format(PATCH), format(""));
        assert_eq!((version(""), version(NEXT)), ("7.0.15", "8.2.3"));
        assert!(knows_newer(NEXT) && !knows_newer(PATCH));
    }
}
