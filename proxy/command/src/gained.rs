//! What commands have gained since: options and operations that only the newer of two engines has.
//!
//! Engines say since when they have a command, not what each of its words was understood from on, so
//! this is by hand, from what they answer, and of Redis 8.4, Valkey 8.1 and Valkey 9.0 from their public
//! documentation. It is not all that was ever added, but each write that the older of two engines in
//! [`crate::Release`]'s range would refuse, and reads that have a new word.
//!
//! Invariant: a word counts only where it can be nothing but that option.

use crate::keys::Arguments;
use crate::lookup::Command;
use crate::release::{Release, Since, unknown_subcommand};

/// Something that a command has gained.
struct Gain {
    commands: &'static [&'static str],
    at: At,
    since: Since,
    /// What an engine answers that does not have it.
    refusal: Refusal,
}

/// Where it stands.
enum At {
    /// Whatever is that argument.
    Any(usize),
    /// One of the words is that argument.
    Word(usize, &'static [&'static str]),
    /// One of the words is an argument from there on.
    From(usize, &'static [&'static str]),
    /// One of the words begins a pair of arguments, the first of which is that one.
    Pair(usize, &'static [&'static str]),
    /// One of the words is an option of XADD: what is behind the id is data.
    BeforeId(&'static [&'static str]),
    /// One of the words is an option of SET, and not what another one of its options is given.
    OfSet(&'static [&'static str]),
    /// One of the words is an option of XREADGROUP: what is behind STREAMS are keys.
    BeforeStreams(&'static [&'static str]),
}

enum Refusal {
    Arity,
    Syntax,
    StreamId,
    Subcommand,
}

const REFERENCES: &[&str] = &["keepref", "delref", "acked"];

const GAINS: &[Gain] = &[
    Gain {
        commands: &["set"],
        at: At::OfSet(&["ifeq"]),
        since: Since::each((8, 4), (8, 1)),
        refusal: Refusal::Syntax,
    },
    Gain {
        commands: &["set"],
        at: At::OfSet(&["ifne", "ifdeq", "ifdne"]),
        since: Since::redis(8, 4),
        refusal: Refusal::Syntax,
    },
    Gain {
        commands: &["xreadgroup"],
        at: At::BeforeStreams(&["claim"]),
        since: Since::redis(8, 4),
        refusal: Refusal::Syntax,
    },
    Gain {
        commands: &["expire", "pexpire", "expireat", "pexpireat", "xsetid"],
        at: At::Any(3),
        since: Since::both(7, 0),
        refusal: Refusal::Arity,
    },
    Gain {
        commands: &["xgroup|create", "xgroup|setid"],
        at: At::From(5, &["entriesread"]),
        since: Since::both(7, 0),
        refusal: Refusal::Subcommand,
    },
    Gain {
        commands: &["bitcount"],
        at: At::Any(4),
        since: Since::both(7, 0),
        refusal: Refusal::Syntax,
    },
    Gain {
        commands: &["bitpos"],
        at: At::Any(5),
        since: Since::both(7, 0),
        refusal: Refusal::Syntax,
    },
    Gain {
        commands: &["zrank", "zrevrank"],
        at: At::Any(3),
        since: Since::both(7, 2),
        refusal: Refusal::Arity,
    },
    Gain {
        commands: &["hscan"],
        at: At::Pair(3, &["novalues"]),
        since: Since::each((7, 4), (8, 0)),
        refusal: Refusal::Syntax,
    },
    Gain {
        commands: &["zscan"],
        at: At::Pair(3, &["noscores"]),
        since: Since::valkey(8, 0),
        refusal: Refusal::Syntax,
    },
    Gain {
        commands: &["bitop"],
        at: At::Word(1, &["diff", "diff1", "andor", "one"]),
        since: Since::redis(8, 2),
        refusal: Refusal::Syntax,
    },
    Gain {
        commands: &["xtrim"],
        at: At::From(2, REFERENCES),
        since: Since::redis(8, 2),
        refusal: Refusal::Syntax,
    },
    Gain {
        commands: &["xadd"],
        at: At::BeforeId(REFERENCES),
        since: Since::redis(8, 2),
        refusal: Refusal::StreamId,
    },
];

/// Whether the command has gained anything of which this module knows.
pub(crate) fn has_gained(name: &str) -> bool {
    GAINS.iter().any(|gain| gain.commands.contains(&name))
}

/// What an engine of this release answers to a word of this call that it does not understand.
pub(crate) fn refusal<A: Arguments + ?Sized>(
    command: &Command,
    release: Release,
    args: &A,
) -> Option<Vec<u8>> {
    let of_it = |gain: &&Gain| gain.commands.contains(&command.name);
    let mut gains = GAINS.iter().filter(of_it);
    let gain = gains.find(|gain| !gain.since.includes(release) && gain.at.is_in(args))?;
    Some(match gain.refusal {
        Refusal::Arity => {
            let name = command.name;
            format!("ERR wrong number of arguments for '{name}' command").into_bytes()
        }
        Refusal::Syntax => b"ERR syntax error".to_vec(),
        Refusal::StreamId => b"ERR Invalid stream ID specified as stream command argument".to_vec(),
        Refusal::Subcommand => unknown_subcommand(release, args),
    })
}

impl At {
    fn is_in<A: Arguments + ?Sized>(&self, args: &A) -> bool {
        let count = args.count();
        let is_one = |at: usize, words: &[&str]| is_one(args, at, words);
        match *self {
            Self::Any(at) => count > at,
            Self::Word(at, words) => count > at && is_one(at, words),
            Self::From(first, words) => (first..count).any(|at| is_one(at, words)),
            Self::Pair(first, words) => (first..count).step_by(2).any(|at| is_one(at, words)),
            Self::BeforeId(words) => is_option_from(2, args, words, |at| match () {
                () if is_one(at, &["nomkstream", "=", "~"]) => Some(1),
                // Its threshold may stand behind a sign.
                () if is_one(at, &["maxlen", "minid"]) => {
                    let is_sign = at + 1 < count && is_one(at + 1, &["=", "~"]);
                    Some(2 + usize::from(is_sign))
                }
                () if is_one(at, &["limit"]) => Some(2),
                () => None,
            }),
            Self::OfSet(words) => is_option_from(3, args, words, |at| {
                let takes_one = is_one(at, &["ex", "px", "exat", "pxat"])
                    || is_one(at, &["ifeq", "ifne", "ifdeq", "ifdne"]);
                Some(1 + usize::from(takes_one))
            }),
            Self::BeforeStreams(words) => is_option_from(4, args, words, |at| match () {
                () if is_one(at, &["noack"]) => Some(1),
                () if is_one(at, &["count", "block", "claim"]) => Some(2),
                () => None,
            }),
        }
    }
}

fn is_one<A: Arguments + ?Sized>(args: &A, at: usize, words: &[&str]) -> bool {
    let given = args.argument(at);
    let is = |word: &&str| given.eq_ignore_ascii_case(word.as_bytes());
    words.iter().any(is)
}

/// One of the words stands where an option does, from `at` on; `length` says of another option how many
/// arguments it is, and of what is none that there are no more.
fn is_option_from<A: Arguments + ?Sized>(
    mut at: usize,
    args: &A,
    words: &[&str],
    length: impl Fn(usize) -> Option<usize>,
) -> bool {
    while at < args.count() {
        if is_one(args, at, words) {
            return true;
        }
        match length(at) {
            Some(length) => at += length,
            None => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::release::Product;

    fn refused(release: (u32, u32), call: &str) -> Option<String> {
        refused_by(Product::Redis, release, call)
    }

    fn refused_by(product: Product, release: (u32, u32), call: &str) -> Option<String> {
        let args: Vec<&str> = call.split(' ').collect();
        let command = crate::resolve(args.as_slice()).unwrap();
        let release = Release::new(product, release.0, release.1, 0);
        let text = command.refusal(release, args.as_slice())?;
        Some(String::from_utf8(text).unwrap())
    }

    #[test]
    fn an_option_is_refused_in_the_words_of_the_engine_that_lacks_it() {
        for (release, call, want) in [
            (
                (6, 2),
                "EXPIRE k 9 NX",
                "wrong number of arguments for 'expire'",
            ),
            ((7, 0), "zrank z m withscore", "wrong number of arguments"),
            (
                (6, 2),
                "xgroup create s g 0 MKSTREAM ENTRIESREAD 1",
                "for 'create'. Try XGROUP",
            ),
            ((7, 2), "hscan h 0 count 5 novalues", "syntax error"),
            ((8, 0), "bitop DIFF d a b", "syntax error"),
            (
                (7, 0),
                "xadd s nomkstream maxlen ~ 9 limit 1 ACKED * f v",
                "Invalid stream ID",
            ),
            ((7, 0), "xadd s keepref maxlen 5 * f v", "Invalid stream ID"),
            ((7, 0), "xtrim s maxlen 5 delref", "syntax error"),
        ] {
            let refused = refused(release, call).unwrap_or_else(|| panic!("{call} passes"));
            assert!(refused.contains(want), "{call}: {refused}");
        }
    }

    #[test]
    fn what_is_no_option_passes_and_so_does_what_the_release_has() {
        for (release, call) in [
            ((6, 2), "expire k 9"),
            ((7, 0), "expire k 9 nx"),
            ((7, 0), "hscan h 0 match novalues"),
            ((7, 0), "bitop and diff a b"),
            ((7, 0), "xadd s * keepref v"),
            ((7, 0), "xadd s maxlen 5 1-1 delref v"),
            ((7, 0), "xadd s 5-* acked v"),
            ((8, 2), "xadd s keepref maxlen 5 * f v"),
            ((6, 2), "bitcount k 0 -1"),
        ] {
            assert_eq!(refused(release, call), None, "{call}");
        }
    }

    #[test]
    fn a_condition_of_set_is_refused_where_it_is_one_and_the_engine_has_none() {
        let (redis, valkey) = (Product::Redis, Product::Valkey);
        for (product, release, call) in [
            (valkey, (8, 0), "set k v IFEQ x"),
            (redis, (8, 2), "set k v px 5 get ifne x"),
            (redis, (7, 0), "set k v ifdeq 0123"),
            (valkey, (8, 1), "set k v ifdne 0123"),
            (
                redis,
                (8, 2),
                "xreadgroup group g c count 5 claim 9 streams s >",
            ),
        ] {
            let refused = refused_by(product, release, call);
            assert_eq!(refused.as_deref(), Some("ERR syntax error"), "{call}");
        }
        for (product, release, call) in [
            (valkey, (8, 1), "set k v ifeq x"),
            (valkey, (8, 1), "set k v ifeq ifne"),
            (redis, (8, 4), "set k v ifeq ifdne get"),
            (redis, (7, 0), "set ifeq ifne"),
            (redis, (7, 0), "set k v ex 5 nx"),
            (
                redis,
                (7, 0),
                "xreadgroup group claim claim streams claim >",
            ),
        ] {
            assert_eq!(refused_by(product, release, call), None, "{call}");
        }
    }
}
