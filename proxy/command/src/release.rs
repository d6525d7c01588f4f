//! Which release of an engine knows which command, and what one answers that does not.
//!
//! Invariant: what is said here of a release is what the engines themselves say (`facts.tsv`); a
//! command of which they say nothing (our own, and those that were learned from a node) is called known.

use crate::gained;
use crate::keys::Arguments;
use crate::lookup::{self, Command};

/// Whose release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    Redis,
    Valkey,
}

/// An engine of some version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    product: Product,
    number: u32,
}

/// The release from which on a product has a command, as one number; `u32::MAX`: it has it in none that
/// we know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Since {
    redis: u32,
    valkey: u32,
}

impl Since {
    /// What every release has.
    pub(crate) const EVER: Self = Self {
        redis: 0,
        valkey: 0,
    };

    /// From this release of both on.
    pub(crate) const fn both(major: u32, minor: u32) -> Self {
        Self::each((major, minor), (major, minor))
    }

    /// From this release of Redis, and that of Valkey on.
    pub(crate) const fn each(redis: (u32, u32), valkey: (u32, u32)) -> Self {
        Self {
            redis: redis.0 << 16 | redis.1 << 8,
            valkey: valkey.0 << 16 | valkey.1 << 8,
        }
    }

    pub(crate) const fn redis(major: u32, minor: u32) -> Self {
        Self {
            valkey: u32::MAX,
            ..Self::both(major, minor)
        }
    }

    pub(crate) const fn valkey(major: u32, minor: u32) -> Self {
        Self {
            redis: u32::MAX,
            ..Self::both(major, minor)
        }
    }

    #[inline]
    pub(crate) fn includes(self, release: Release) -> bool {
        let since = match release.product {
            Product::Redis => self.redis,
            Product::Valkey => self.valkey,
        };
        since <= release.number
    }

    /// `redis-7.0.0,valkey-7.0.0`; empty: ever.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self::EVER);
        }
        let mut since = Self {
            redis: u32::MAX,
            valkey: u32::MAX,
        };
        for word in text.split(',') {
            let release = Release::parse(word)?;
            match release.product {
                Product::Redis => since.redis = release.number,
                Product::Valkey => since.valkey = release.number,
            }
        }
        Some(since)
    }
}

impl Release {
    /// An engine of this version; numbers above 255 count as 255.
    #[must_use]
    pub fn new(product: Product, major: u32, minor: u32, patch: u32) -> Self {
        let number = [major, minor, patch];
        let number = number.iter().fold(0, |sum, part| sum << 8 | part.min(&255));
        Self { product, number }
    }

    fn parse(text: &str) -> Option<Self> {
        let (product, version) = text.split_once('-')?;
        let product = match product {
            "redis" => Product::Redis,
            "valkey" => Product::Valkey,
            _ => return None,
        };
        let mut numbers = version.split('.').map(str::parse);
        let mut number = || numbers.next()?.ok();
        Some(Self::new(product, number()?, number()?, number()?))
    }

    /// Whether it words refusals as before Redis 7.
    fn is_before_7(self) -> bool {
        self.product == Product::Redis && self.number < 7 << 16
    }
}

impl Command {
    /// Whether an engine of this release has it.
    #[inline]
    #[must_use]
    pub fn is_known_to(&self, release: Release) -> bool {
        self.since.includes(release)
    }

    /// What an engine of this release answers to this call, if it does not know the command, or an
    /// option that it was given: without the leading `-` and the line end.
    #[must_use]
    pub fn refusal<A: Arguments + ?Sized>(&self, release: Release, args: &A) -> Option<Vec<u8>> {
        if !self.is_known_to(release) {
            return Some(unknown_to(release, args));
        }
        match self.has_gained {
            true => gained::refusal(self, release, args),
            false => None,
        }
    }
}

fn unknown_to<A: Arguments + ?Sized>(release: Release, args: &A) -> Vec<u8> {
    let name = if args.count() == 0 {
        &[][..]
    } else {
        args.argument(0)
    };
    let is_known = lookup::lookup(name).is_some_and(|command| command.is_known_to(release));
    match (is_known, release.is_before_7()) {
        (false, false) => lookup::unknown_command(args).text(),
        (false, true) => unknown_command_6(args),
        (true, _) => unknown_subcommand(release, args),
    }
}

/// Of a command that it has.
pub(crate) fn unknown_subcommand<A: Arguments + ?Sized>(release: Release, args: &A) -> Vec<u8> {
    match release.is_before_7() {
        true => unknown_subcommand_6(args),
        false => lookup::unknown_subcommand(args).text(),
    }
}

/// How much of a client's arguments Redis 6 repeats to it, what it puts around them included.
const REPEATED_BYTES_MAX: usize = 128;

/// ``ERR unknown command `foo`, with args beginning with: `a`, `b`, ``
fn unknown_command_6<A: Arguments + ?Sized>(args: &A) -> Vec<u8> {
    let mut text = b"ERR unknown command `".to_vec();
    text.extend_from_slice(lookup::shown(args.argument(0), usize::MAX));
    text.extend_from_slice(b"`, with args beginning with: ");
    let (mut at, start) = (1, text.len());
    while at < args.count() && text.len() - start < REPEATED_BYTES_MAX {
        let left = REPEATED_BYTES_MAX - (text.len() - start);
        text.push(b'`');
        text.extend_from_slice(lookup::shown(args.argument(at), left));
        text.extend_from_slice(b"`, ");
        at += 1;
    }
    lookup::one_line(text)
}

/// `ERR Unknown subcommand or wrong number of arguments for 'foo'. Try CONFIG HELP.`
fn unknown_subcommand_6<A: Arguments + ?Sized>(args: &A) -> Vec<u8> {
    let mut text = b"ERR Unknown subcommand or wrong number of arguments for '".to_vec();
    text.extend_from_slice(lookup::shown(args.argument(1), usize::MAX));
    text.extend_from_slice(b"'. Try ");
    text.extend_from_slice(&args.argument(0).to_ascii_uppercase());
    text.extend_from_slice(b" HELP.");
    lookup::one_line(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> &'static Command {
        crate::all().find(|command| command.name == name).unwrap()
    }

    fn release(text: &str) -> Release {
        Release::parse(text).unwrap()
    }

    #[test]
    fn an_engine_knows_what_its_release_has() {
        for (name, known_to, unknown_to) in [
            ("hpexpire", "redis-7.4.0", "redis-7.2.7"),
            ("hpexpire", "redis-8.2.3", "valkey-8.0.1"),
            ("get", "redis-6.0.0", "redis-0.9.9"),
            ("lpos", "redis-6.0.6", "redis-6.0.5"),
            ("function", "redis-7.0.0", "redis-6.2.14"),
            ("function|load", "valkey-8.0.1", "redis-6.2.14"),
            ("client|no-touch", "valkey-7.2.5", "redis-7.0.15"),
            ("script|show", "valkey-8.0.1", "redis-8.2.3"),
            ("vadd", "redis-8.0.1", "redis-7.4.9"),
            ("stralgo", "redis-6.2.14", "valkey-8.0.1"),
        ] {
            assert!(named(name).is_known_to(release(known_to)), "{name}");
            assert!(!named(name).is_known_to(release(unknown_to)), "{name}");
        }
        assert!(named("iinfo").is_known_to(release("redis-6.2.0")), "ours");
    }

    #[test]
    fn what_an_engine_lists_is_known_to_its_release_and_what_it_does_not_list_is_not() {
        let lines = include_str!("facts.tsv").lines();
        for line in lines.filter(|line| !line.starts_with('#')) {
            let columns: Vec<&str> = line.split('\t').collect();
            let (command, engines) = (named(columns[0]), columns[5]);
            for engine in ["redis-6.2", "redis-7.0", "valkey-8.0", "redis-8.2"] {
                let listed = engines.split(',').any(|one| one == engine);
                let known = command.is_known_to(release(&format!("{engine}.20")));
                // Redis 6.2 lists no subcommands, and QUIT nowhere; STRALGO was removed later.
                let may_be_unlisted = command.name.contains('|') && engine == "redis-6.2"
                    || matches!(command.name, "stralgo" | "quit");
                assert!(
                    known == listed || known && may_be_unlisted,
                    "{} and {engine}",
                    command.name
                );
            }
        }
    }

    #[test]
    fn a_refusal_is_worded_as_the_release_would_word_it() {
        let (old, new) = (release("redis-6.2.14"), release("redis-7.0.15"));
        let text = |release, call: &str| {
            let args: Vec<&str> = call.split(' ').collect();
            String::from_utf8(unknown_to(release, args.as_slice())).unwrap()
        };
        assert_eq!(
            text(new, "HPEXPIRE k 1"),
            "ERR unknown command 'HPEXPIRE', with args beginning with: 'k' '1' "
        );
        assert_eq!(
            text(old, "HPEXPIRE k 1"),
            "ERR unknown command `HPEXPIRE`, with args beginning with: `k`, `1`, "
        );
        assert_eq!(
            text(release("redis-7.2.4"), "script Show x"),
            "ERR unknown subcommand 'Show'. Try SCRIPT HELP."
        );
        assert_eq!(
            text(old, "latency Histogram"),
            "ERR Unknown subcommand or wrong number of arguments for 'Histogram'. Try LATENCY HELP."
        );
        assert!(text(old, "FUNCTION LIST").starts_with("ERR unknown command `FUNCTION`"));
    }
}
