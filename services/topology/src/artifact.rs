//! A program that hosts may run: whose it is, which version, and where it comes from.
//!
//! Invariant: an [`Artifact`] has passed [`Artifact::check`]: its name is part of a key of the store
//! and of a path on every host, and its source is of a kind that every agent can fetch.

use std::fmt;

/// Longest release note, in bytes: it is read in a terminal.
pub const RELEASE_NOTE_MAX: usize = 4096;
/// Longest source, in bytes, as web servers take them.
pub const SOURCE_MAX: usize = 2048;
/// Bytes of a SHA-256.
pub const SHA256_LENGTH: usize = 32;

/// As a program prints it. Valkey counts on from Redis 7.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

impl Version {
    /// From `7.0.15`; nothing but three numbers.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(number);
        let version = Self {
            major: parts.next()??,
            minor: parts.next()??,
            patch: parts.next()??,
        };
        parts.next().is_none().then_some(version)
    }
}

/// Without a sign and leading zeros, so that one version has one spelling.
fn number(text: &str) -> Option<u32> {
    let is_plain =
        text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    is_plain.then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Whose program it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Product {
    /// redis-server.
    Redis,
    /// valkey-server.
    Valkey,
    /// slotmesh-proxy.
    Proxy,
}

impl Product {
    /// Every product.
    pub const ALL: [Self; 3] = [Self::Redis, Self::Valkey, Self::Proxy];

    /// First part of the names of its artifacts.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Valkey => "valkey",
            Self::Proxy => "proxy",
        }
    }

    /// Whether a node can be made of it.
    #[must_use]
    pub fn is_engine(self) -> bool {
        self != Self::Proxy
    }
}

/// How urgent it is to have a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Routine.
    Low,
    /// Recommended.
    Medium,
    /// Important.
    High,
}

impl Level {
    /// Its name as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// One version of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// Whose.
    pub product: Product,
    /// Which.
    pub version: Version,
    /// How urgent.
    pub level: Level,
    /// What is new, for people.
    pub release_note: String,
    /// Of the program's file.
    pub sha256: [u8; SHA256_LENGTH],
    /// `file:///path`, `http://…` or `https://…`.
    pub source: String,
    /// When it was added.
    pub created_unix_ms: u64,
}

/// Why something is not an artifact.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArtifactError {
    /// Too long.
    #[error("the release note has {0} bytes; at most {RELEASE_NOTE_MAX} are kept")]
    ReleaseNote(usize),
    /// Neither a file nor a URL.
    #[error(
        "source {0:?} is not file:///ABSOLUTE/PATH, http://… or https://…, of at most {SOURCE_MAX} \
         bytes without spaces"
    )]
    Source(String),
}

impl Artifact {
    /// Its name: what an instance's engine may be.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}-{}", self.product.name(), self.version)
    }

    /// Whether this may be kept.
    ///
    /// # Errors
    /// When a field is out of its bounds.
    pub fn check(&self) -> Result<(), ArtifactError> {
        if self.release_note.len() > RELEASE_NOTE_MAX {
            return Err(ArtifactError::ReleaseNote(self.release_note.len()));
        }
        let rest = |scheme: &str| self.source.strip_prefix(scheme).unwrap_or_default();
        let is_known = rest("file://").starts_with('/')
            || ["http://", "https://"]
                .into_iter()
                .any(|s| !rest(s).is_empty());
        let is_plain = self.source.len() <= SOURCE_MAX
            && !self
                .source
                .contains(|c: char| c.is_whitespace() || c.is_control());
        if is_known && is_plain {
            return Ok(());
        }
        Err(ArtifactError::Source(self.source.clone()))
    }

    /// Whether both name the same program; notes and levels may differ.
    #[must_use]
    pub fn is_same_program(&self, other: &Self) -> bool {
        self.name() == other.name() && self.sha256 == other.sha256 && self.source == other.source
    }
}

/// The product and version that such a name stands for; `None`: it is no artifact's name.
#[must_use]
pub fn parse_name(name: &str) -> Option<(Product, Version)> {
    Product::ALL.into_iter().find_map(|product| {
        let version = name.strip_prefix(product.name())?.strip_prefix('-')?;
        Some((product, Version::parse(version)?))
    })
}

/// What an engine says of itself in reports: `7.0.15`, `valkey-8.0.1`.
#[must_use]
pub fn parse_reported(text: &str) -> Option<(Product, Version)> {
    match text.strip_prefix("valkey-") {
        Some(version) => Some((Product::Valkey, Version::parse(version)?)),
        None => Some((Product::Redis, Version::parse(text)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artifact(source: &str) -> Artifact {
        Artifact {
            product: Product::Redis,
            version: Version::parse("7.0.15").unwrap(),
            level: Level::Low,
            release_note: String::new(),
            sha256: [1; SHA256_LENGTH],
            source: source.to_owned(),
            created_unix_ms: 0,
        }
    }

    #[test]
    fn versions_order_by_their_numbers_and_have_one_spelling() {
        let of = |text| Version::parse(text);
        assert!(of("7.0.15") > of("7.0.9") && of("8.0.0") > of("7.4.1"));
        for wrong in ["7.0", "7.0.15.1", "07.0.1", "7.0.x", "", "7.0.", "+7.0.1"] {
            assert_eq!(of(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_name_says_the_product_and_the_version_and_nothing_else() {
        let name = artifact("file:///a").name();
        assert_eq!(name, "redis-7.0.15");
        assert_eq!(
            parse_name(&name),
            Some((Product::Redis, Version::parse("7.0.15").unwrap()))
        );
        for other in [
            "redis-7.0",
            "redis",
            "keydb-7.0.15",
            "/usr/bin/redis-server",
            "redis-7.0",
        ] {
            assert_eq!(parse_name(other), None, "{other:?}");
        }
    }

    #[test]
    fn only_sources_that_every_agent_can_fetch_are_taken() {
        for right in [
            "file:///opt/redis-server",
            "http://a/b",
            "https://a.b:1/c?d",
        ] {
            assert_eq!(artifact(right).check(), Ok(()), "{right}");
        }
        let long = format!("http://a/{}", "x".repeat(SOURCE_MAX));
        for wrong in [
            "file://relative",
            "ftp://a/b",
            "/opt/redis",
            "http://",
            "http://a b",
            "",
            &long,
        ] {
            assert!(artifact(wrong).check().is_err(), "{wrong}");
        }
    }
}
