//! What the engines say of a command, read from `facts.tsv`: name, arity, flags, key positions, ACL
//! categories, since which release they have it.
//!
//! Invariant: these are facts, generated; nothing here is our decision. The files are part of the
//! program, so a line that cannot be read is our mistake and panics when the table is first used
//! (every test does).

use crate::categories::Categories;
use crate::keys::{Access, Begin, Find, KeySpec};
use crate::release::Since;
use crate::rights::Rights;

/// A set of [`Flag`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags(u32);

macro_rules! flags {
    ($($(#[$doc:meta])* $flag:ident = $text:literal,)*) => {
        /// What COMMAND INFO calls flags, and `Dangerous` for the ACL category of that name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Flag {
            $($(#[$doc])* $flag,)*
        }

        impl Flag {
            fn parse(text: &str) -> Option<Self> {
                match text {
                    $($text => Some(Self::$flag),)*
                    _ => None,
                }
            }
        }
    };
}

flags! {
    Admin = "admin",
    AllowBusy = "allow_busy",
    Asking = "asking",
    Blocking = "blocking",
    Dangerous = "dangerous",
    /// May take memory: refused by a node that is full.
    DenyOom = "denyoom",
    Fast = "fast",
    Loading = "loading",
    Module = "module",
    /// Its keys are found by looking at its arguments.
    MovableKeys = "movablekeys",
    NoAsyncLoading = "no_async_loading",
    /// Allowed before the client has logged in.
    NoAuth = "no_auth",
    NoMandatoryKeys = "no_mandatory_keys",
    /// Not allowed between MULTI and EXEC.
    NoMulti = "no_multi",
    /// Not allowed in a script.
    NoScript = "noscript",
    PubSub = "pubsub",
    ReadOnly = "readonly",
    SkipMonitor = "skip_monitor",
    SkipSlowlog = "skip_slowlog",
    SortForScript = "sort_for_script",
    MayReplicate = "may_replicate",
    Random = "random",
    Stale = "stale",
    Write = "write",
}

impl Flags {
    #[inline]
    #[must_use]
    pub fn has(self, flag: Flag) -> bool {
        self.0 & (1 << flag as u32) != 0
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        text.split(',')
            .filter(|word| !word.is_empty())
            .try_fold(Self(0), |flags, word| {
                Some(Self(flags.0 | 1 << Flag::parse(word)? as u32))
            })
    }
}

/// One line of a facts file.
pub(crate) struct Fact {
    pub(crate) name: &'static str,
    pub(crate) arity: i32,
    pub(crate) flags: Flags,
    pub(crate) keys: Vec<KeySpec>,
    pub(crate) categories: Categories,
    pub(crate) in_redis_7_0: bool,
    pub(crate) since: Since,
}

pub(crate) fn parse_line(line: &'static str) -> Fact {
    parse_columns(line).unwrap_or_else(|| panic!("facts: cannot read {line:?}"))
}

fn parse_columns(line: &'static str) -> Option<Fact> {
    let mut columns = line.split('\t');
    let (name, arity, flags, keys, categories, engines) = (
        columns.next()?,
        columns.next()?,
        columns.next()?,
        columns.next()?,
        columns.next()?,
        columns.next()?,
    );
    let specs = keys.split("; ").filter(|spec| !spec.is_empty());
    Some(Fact {
        name,
        arity: arity.parse().ok()?,
        flags: Flags::parse(flags)?,
        keys: specs.map(parse_spec).collect::<Option<_>>()?,
        categories: Categories::parse(categories)?,
        since: Since::parse(columns.next().unwrap_or_default())?,
        in_redis_7_0: engines.split(',').any(|engine| engine == "redis-7.0"),
    })
}

/// `read/r index=2 keynum=0,1,1`: access and the rights that it takes, where the first key is found,
/// how many follow.
fn parse_spec(text: &'static str) -> Option<KeySpec> {
    let mut words = text.split(' ');
    let (access, rights) = match words.next()?.split_once('/') {
        Some(("read", rights)) => (Access::Read, Rights::parse(rights)?),
        Some(("write", rights)) => (Access::Write, Rights::parse(rights)?),
        Some(_) => return None,
        None => (Access::Channel, Rights::of_flags(|_| false)),
    };
    let begin = match words.next()?.split_once('=')? {
        ("index", at) => Begin::Index(at.parse().ok()?),
        ("keyword", at) => {
            let (word, from) = at.split_once(',')?;
            Begin::Keyword {
                word,
                from: from.parse().ok()?,
            }
        }
        ("last", "STORE") => {
            return Some(KeySpec {
                access,
                rights,
                begin: Begin::SortStore,
                find: Find::ONE,
            });
        }
        _ => return None,
    };
    let (how, numbers) = words.next()?.split_once('=')?;
    let numbers = numbers
        .split(',')
        .map(str::parse)
        .collect::<Result<Vec<i32>, _>>()
        .ok()?;
    let find = match (how, numbers.as_slice()) {
        ("range", &[last, step, limit]) => Find::Range {
            last,
            step: step.try_into().ok()?,
            limit,
        },
        ("keynum", &[count, first, step]) => Find::Counted {
            count: count.try_into().ok()?,
            first: first.try_into().ok()?,
            step: step.try_into().ok()?,
        },
        _ => return None,
    };
    Some(KeySpec {
        access,
        rights,
        begin,
        find,
    })
}
