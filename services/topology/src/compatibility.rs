//! Which engine may follow which: the versions of their files, as data, and what follows from them.
//!
//! An engine loads files of its own version of the format and of older ones. So the next engine must
//! not have a lower one; and the way back is by a copy where both have the same, otherwise only by the
//! replication stream of a node that never stopped to follow.
//!
//! Invariant: what is not in the table is refused, except for another patch of the same release.

use crate::artifact::{Product, Version, parse_name};

/// A release: its patches have the same format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    /// Whose.
    pub product: Product,
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Version of the files that it writes, and the highest that it loads.
    pub rdb: u32,
}

const fn release(product: Product, major: u32, minor: u32, rdb: u32) -> Release {
    Release {
        product,
        major,
        minor,
        rdb,
    }
}

/// Releases that nodes may be made of. Older ones lack what epochs are made of: users.
pub const RELEASES: [Release; 11] = [
    release(Product::Redis, 6, 0, 9),
    release(Product::Redis, 6, 2, 9),
    release(Product::Redis, 7, 0, 10),
    release(Product::Redis, 7, 2, 11),
    release(Product::Redis, 7, 4, 12),
    release(Product::Redis, 8, 0, 12),
    release(Product::Redis, 8, 2, 12),
    release(Product::Valkey, 7, 2, 11),
    release(Product::Valkey, 8, 0, 11),
    release(Product::Valkey, 8, 1, 11),
    release(Product::Valkey, 9, 0, 80),
];

/// The last format that both products write and read alike.
const COMMON_RDB: u32 = 11;

/// An engine in one version.
pub type Engine = (Product, Version);

/// How a shard can go back once its primary runs the next engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WayBack {
    /// The old engine loads the new one's files.
    ByCopy,
    /// Only a node that has followed by the stream all the time can take over again.
    ByStream,
}

/// Why an engine may not follow another one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No row of the table.
    #[error(
        "{0} is of no release whose data format this version of slotmesh knows; upgrade slotmesh \
         first"
    )]
    Unknown(String),
    /// The proxy is no engine.
    #[error("{0} is no engine")]
    NoEngine(String),
    /// It can't load what the present one writes.
    #[error(
        "{to} can't load the data of {from}: that writes files of version {writes}, {to} loads up to \
         {loads}; going there would lose the data (restore a backup of before, or copy key by key)"
    )]
    Format {
        /// The present one.
        from: String,
        /// The next one.
        to: String,
        /// Version of the present one's files.
        writes: u32,
        /// Highest that the next one loads.
        loads: u32,
    },
    /// The same format, but older commands.
    #[error(
        "{to} is an older release than {from}: it would refuse newer commands and types that the \
         data may have by now; only another patch of the same release can be gone back to"
    )]
    Older {
        /// The present one.
        from: String,
        /// The next one.
        to: String,
    },
    /// The products went apart after 7.2.
    #[error("{to} does not go on from {from}: {why}")]
    Apart {
        /// The present one.
        from: String,
        /// The next one.
        to: String,
        /// Why.
        why: &'static str,
    },
}

/// As artifacts are named.
#[must_use]
pub fn name((product, version): Engine) -> String {
    format!("{}-{version}", product.name())
}

/// The engine of that name; `None`: it is no engine's.
#[must_use]
pub fn named(name: &str) -> Option<Engine> {
    parse_name(name).filter(|(product, _)| product.is_engine())
}

/// Whether `new` may know commands that `old` does not: patches of one release know the same.
#[must_use]
pub fn knows_more(old: Engine, new: Engine) -> bool {
    !is_same_release(old, new)
}

/// The table's row of an engine.
#[must_use]
pub fn release_of((product, version): Engine) -> Option<Release> {
    let is_its =
        |r: &&Release| (r.product, r.major, r.minor) == (product, version.major, version.minor);
    RELEASES.iter().find(is_its).copied()
}

fn is_same_release(a: Engine, b: Engine) -> bool {
    a.0 == b.0 && (a.1.major, a.1.minor) == (b.1.major, b.1.minor)
}

/// Whether nodes of engine `from` may be upgraded to `to`, and how one could go back.
///
/// # Errors
/// When they may not: why, for an operator.
pub fn upgrade(from: Engine, to: Engine) -> Result<WayBack, Refusal> {
    if let Some(proxy) = [from, to].into_iter().find(|(p, _)| !p.is_engine()) {
        return Err(Refusal::NoEngine(name(proxy)));
    }
    // Whether the release is known or not.
    if is_same_release(from, to) {
        return Ok(WayBack::ByCopy);
    }
    let known = |engine| release_of(engine).ok_or_else(|| Refusal::Unknown(name(engine)));
    let (old, new) = (known(from)?, known(to)?);
    let names = || (name(from), name(to));
    if new.rdb < old.rdb {
        let (from, to) = names();
        return Err(Refusal::Format {
            from,
            to,
            writes: old.rdb,
            loads: new.rdb,
        });
    }
    if old.product != new.product {
        let (from, to) = names();
        let why = match new.product {
            // A later Redis has a number that a later Valkey's is above, and a format that it can't read.
            Product::Valkey if old.rdb > COMMON_RDB => {
                "Redis 7.4 and later write a format that Valkey does not read"
            }
            Product::Valkey => return Ok(way_back(old, new)),
            _ => "Redis reads no data of Valkey's releases",
        };
        return Err(Refusal::Apart { from, to, why });
    }
    if (new.major, new.minor) < (old.major, old.minor) {
        let (from, to) = names();
        return Err(Refusal::Older { from, to });
    }
    Ok(way_back(old, new))
}

fn way_back(old: Release, new: Release) -> WayBack {
    match old.rdb == new.rdb {
        true => WayBack::ByCopy,
        false => WayBack::ByStream,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::parse_reported;

    fn check(from: &str, to: &str) -> Result<WayBack, String> {
        let engine = |text| parse_reported(text).unwrap();
        upgrade(engine(from), engine(to)).map_err(|e| e.to_string())
    }

    #[test]
    fn the_next_release_follows_and_the_way_back_is_by_copy_only_in_the_same_format() {
        for (from, to, back) in [
            ("6.2.14", "7.0.15", WayBack::ByStream),
            ("7.0.15", "8.2.3", WayBack::ByStream),
            ("6.2.14", "8.2.3", WayBack::ByStream),
            ("7.4.1", "8.2.3", WayBack::ByCopy),
            ("7.0.9", "7.0.15", WayBack::ByCopy),
            ("7.0.15", "7.0.9", WayBack::ByCopy),
            ("7.0.15", "valkey-8.0.1", WayBack::ByStream),
            ("7.2.5", "valkey-8.0.1", WayBack::ByCopy),
            ("valkey-8.0.1", "valkey-8.1.0", WayBack::ByCopy),
            ("valkey-8.1.0", "valkey-9.0.0", WayBack::ByStream),
        ] {
            assert_eq!(check(from, to), Ok(back), "{from} to {to}");
        }
    }

    #[test]
    fn what_would_lose_data_is_refused_in_words_that_say_so() {
        for (from, to, word) in [
            ("8.2.3", "7.0.15", "would lose the data"),
            ("7.0.15", "6.2.14", "would lose the data"),
            ("8.2.3", "7.4.1", "older release"),
            ("valkey-8.1.0", "valkey-8.0.1", "older release"),
            ("7.4.1", "valkey-8.0.1", "loads up to 11"),
            ("8.2.3", "valkey-8.1.0", "loads up to 11"),
            ("8.2.3", "valkey-9.0.0", "does not read"),
            ("valkey-8.0.1", "8.2.3", "reads no data of Valkey"),
            ("7.0.15", "99.0.0", "upgrade slotmesh first"),
        ] {
            let refused = check(from, to).unwrap_err();
            assert!(refused.contains(word), "{from} to {to}: {refused}");
        }
    }

    #[test]
    fn a_release_that_is_not_in_the_table_has_its_patches_all_the_same() {
        assert_eq!(check("9.9.1", "9.9.2"), Ok(WayBack::ByCopy));
        assert!(check("9.9.1", "9.10.0").is_err());
    }
}
