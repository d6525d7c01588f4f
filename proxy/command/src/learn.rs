//! Commands that the table does not have (modules), learned from what a node says of them.
//!
//! Invariant: the table comes first, so that no node can change what a known command does; what was
//! learned stays as it is while the process lives; and a command whose keys the node cannot tell is
//! refused, never sent to a guessed shard.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::categories::Categories;
use crate::class::Class;
use crate::facts::{Flag, Flags};
use crate::keys::{Access, Begin, Find, KeySpec, SPECS_MAX};
use crate::lookup::{self, Command, Origin, Place};
use crate::release::Since;
use crate::rights::Rights;

/// Most entries that one process takes in, those that it cannot read included: each stays in memory.
/// Redis Stack has about 200 commands; a node that makes up names must not take our memory.
pub const LEARNED_MAX: usize = 4096;
/// Places for them. Half stay empty, so that a lookup compares about one name.
const PLACES: usize = 2 * LEARNED_MAX;
/// Longest name. Modules' longest have about 30 bytes.
const NAME_BYTES_MAX: usize = 128;
/// Most subcommands of one command. Redis's own reach 28 (CLUSTER).
const SUBCOMMANDS_MAX: usize = 256;
/// Furthest argument that a rule may name: more arguments than that no command has.
const POSITION_MAX: i64 = 1024 * 1024;
/// Written behind "is not for clients" in the refusal.
const KEYS_UNTOLD: &str = "the engine does not say which of its arguments are keys";

/// A node's reply as plain data: maps are lists of each key and its value, sets are lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Nil,
    Int(i64),
    Text(Vec<u8>),
    List(Vec<Part>),
}

/// Why nothing was learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LearnError {
    /// The client gets Redis's "unknown command"; ask again after some seconds, not each time.
    #[error("the node does not know the command either")]
    Unknown,
    #[error("the node's reply is no entry of COMMAND INFO")]
    Malformed,
    #[error("{LEARNED_MAX} entries have been taken in; no more will be")]
    Full,
}

/// Makes a command of a node's entry for it: the only element of its reply to `COMMAND INFO name`,
/// from any engine version and in either protocol. From then on [`crate::lookup`] finds it.
///
/// A command whose keys the engine leaves to code has the class [`Class::Refused`]; an instance with
/// one shard may pass it on all the same ([`Command::is_learned`] tells it from others).
///
/// # Errors
/// The node does not know it, or its entry cannot be read or kept.
pub fn learn(name: &[u8], entry: &Part) -> Result<&'static Command, LearnError> {
    if let Some(known) = lookup::in_table(name).or_else(|| find(name)) {
        return Ok(known);
    }
    let entry = match entry {
        Part::Nil => return Err(LearnError::Unknown),
        Part::List(fields) => Entry::read(fields).ok_or(LearnError::Malformed)?,
        Part::Int(_) | Part::Text(_) => return Err(LearnError::Malformed),
    };
    if COUNT.fetch_add(1, Ordering::Relaxed) >= LEARNED_MAX {
        COUNT.fetch_sub(1, Ordering::Relaxed);
        return Err(LearnError::Full);
    }
    let command = clean_name(name).and_then(|name| entry.command(name, None));
    keep(command.ok_or(LearnError::Malformed)?)
}

/// What nodes have told so far.
pub fn learned() -> impl Iterator<Item = &'static Command> {
    KEPT.iter().filter_map(|place| place.get().copied())
}

/// Written once each and never again, so that reading takes no lock.
static KEPT: [OnceLock<&'static Command>; PLACES] = [const { OnceLock::new() }; PLACES];
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Never inlined: known commands do not come here.
#[cold]
pub(crate) fn find(name: &[u8]) -> Option<&'static Command> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return None;
    }
    let kept = places(name).map_while(|place| place.get().copied());
    let mut kept = kept.filter(|command| command.name.as_bytes().eq_ignore_ascii_case(name));
    kept.next()
}

/// Every place, beginning where `name` belongs.
fn places(name: &[u8]) -> impl Iterator<Item = &'static OnceLock<&'static Command>> {
    // FNV-1a, blind to case.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in name {
        hash = (hash ^ u64::from(byte.to_ascii_lowercase())).wrapping_mul(0x0100_0000_01b3);
    }
    let start = (hash >> 32) as usize % PLACES;
    KEPT[start..].iter().chain(&KEPT[..start])
}

/// Another worker may learn the same name at the same time; the first one counts.
fn keep(command: Command) -> Result<&'static Command, LearnError> {
    let command: &'static Command = Box::leak(Box::new(command));
    for place in places(command.name.as_bytes()) {
        let kept = *place.get_or_init(|| command);
        if kept.name == command.name {
            return Ok(kept);
        }
    }
    Err(LearnError::Full)
}

/// In lower case, and only what may stand in an error's text.
fn clean_name(name: &[u8]) -> Option<&'static str> {
    let usual = |byte: &u8| byte.is_ascii_graphic() && *byte != b'|';
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.iter().all(usual) {
        return None;
    }
    let name = String::from_utf8(name.to_ascii_lowercase()).ok()?;
    Some(String::leak(name))
}

/// One entry of a COMMAND INFO reply, its fields not yet judged.
struct Entry<'p> {
    name: &'p [u8],
    arity: i32,
    flags: Vec<&'p [u8]>,
    /// First, last, step: all that engines before 7.0 say.
    range: [i64; 3],
    categories: &'p [Part],
    /// `None` from engines that know no such thing.
    specs: Option<&'p [Part]>,
    subcommands: &'p [Part],
}

impl<'p> Entry<'p> {
    fn read(fields: &'p [Part]) -> Option<Self> {
        let [name, arity, flags, first, last, step, more @ ..] = fields else {
            return None;
        };
        Some(Self {
            name: name.text()?,
            arity: i32::try_from(arity.int()?).ok()?,
            flags: flags
                .list()?
                .iter()
                .map(Part::text)
                .collect::<Option<_>>()?,
            range: [first.int()?, last.int()?, step.int()?],
            categories: more.first().and_then(Part::list).unwrap_or_default(),
            specs: more.get(2).and_then(Part::list),
            subcommands: more.get(3).and_then(Part::list).unwrap_or_default(),
        })
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.contains(&flag.as_bytes())
    }

    /// `None`: it cannot be read.
    fn command(&self, name: &'static str, parent: Option<&'static str>) -> Option<Command> {
        let keys = self.keys();
        let subcommands = match parent {
            None => self.subcommands(name)?,
            // Nothing is nested deeper.
            Some(_) => Box::default(),
        };
        let flags = self.flags();
        let only_key = match keys.as_deref() {
            Some([spec]) => spec.fixed(),
            _ => None,
        };
        let class = match keys.as_deref() {
            None => Class::Refused(KEYS_UNTOLD),
            Some(_) if flags.has(Flag::Blocking) => Class::Blocking,
            Some([]) => Class::Keyless,
            Some(_) if only_key.is_some() => Class::SingleKey,
            Some(_) => Class::SameSlot,
        };
        Some(Command {
            name,
            arity: with_key(self.arity, only_key),
            flags,
            class,
            keys: keys.unwrap_or_default().into(),
            subcommands,
            only_key,
            // Whether its arguments are complete is for the node to say.
            groups: None,
            origin: Origin::Node,
            categories: Categories::default(),
            id: None,
            in_redis_7_0: false,
            since: Since::EVER,
            has_gained: false,
        })
    }

    /// Those that we have a name for; newer engines may have more.
    fn flags(&self) -> Flags {
        let dangerous = self.categories.iter().filter_map(Part::text);
        let dangerous = dangerous.filter(|category| *category == b"@dangerous");
        let words = self
            .flags
            .iter()
            .copied()
            .chain(dangerous.map(|_| &b"dangerous"[..]));
        let words = words.filter_map(|word| std::str::from_utf8(word).ok());
        let known: Vec<&str> = words.filter(|word| Flags::parse(word).is_some()).collect();
        Flags::parse(&known.join(",")).unwrap_or_default()
    }

    fn subcommands(&self, parent: &'static str) -> Option<Box<[(&'static str, Place)]>> {
        if self.subcommands.len() > SUBCOMMANDS_MAX {
            return None;
        }
        let mut places = Vec::with_capacity(self.subcommands.len());
        for fields in self.subcommands {
            let entry = Entry::read(fields.list()?)?;
            let at = entry.name.iter().position(|&byte| byte == b'|')?;
            let sub = clean_name(&entry.name[at + 1..])?;
            let full = String::leak(format!("{parent}|{sub}"));
            let command: &Command = Box::leak(Box::new(entry.command(full, Some(parent))?));
            places.push((sub, Place::Learned(command)));
        }
        Some(places.into())
    }

    /// Where its keys are; `None` if only the engine's code can tell.
    fn keys(&self) -> Option<Vec<KeySpec>> {
        let movable = self.has("movablekeys");
        let specs = match self.specs {
            Some(specs) if !specs.is_empty() => specs,
            _ => return self.keys_by_range().filter(|_| !movable),
        };
        if specs.len() > SPECS_MAX {
            return None;
        }
        let keys: Vec<KeySpec> = specs.iter().map(key_spec).collect::<Option<_>>()?;
        // A module that finds keys by a function of its own is said to have movable keys, while its
        // rules are made from the three numbers that it registered, which may tell but a part.
        let by_function = self.has("module") && movable && keys.iter().all(KeySpec::is_plain);
        (!by_function).then_some(keys)
    }

    fn keys_by_range(&self) -> Option<Vec<KeySpec>> {
        let [first, last, step] = self.range;
        if first == 0 {
            return Some(Vec::new());
        }
        // From 7.0 on "last" is counted from the first key, here from the command's beginning.
        let last = if last < 0 {
            last
        } else {
            last.checked_sub(first)?
        };
        Some(vec![KeySpec {
            access: if self.has("readonly") {
                Access::Read
            } else {
                Access::Write
            },
            rights: Rights::of_old(self.has("readonly")),
            begin: Begin::Index(position(first, 1)?),
            find: Find::Range {
                last: i32::try_from(last).ok()?,
                step: position(step, 1)?,
                limit: 0,
            },
        }])
    }
}

/// A module may say "any number" and check for itself; it takes its first key at least, so that whoever
/// has checked the arity may take that key.
fn with_key(arity: i32, only_key: Option<usize>) -> i32 {
    let least = only_key.map_or(1, |key| key as i32 + 1); // at most POSITION_MAX
    if arity.unsigned_abs() < least.unsigned_abs() {
        -least
    } else {
        arity
    }
}

/// One rule: `flags`, `begin_search`, `find_keys`.
fn key_spec(spec: &Part) -> Option<KeySpec> {
    let flags = spec.field("flags")?.list()?;
    let has = |flag: &str| flags.iter().any(|one| one.text() == Some(flag.as_bytes()));
    if has("incomplete") {
        return None;
    }
    let access = if has("not_key") {
        Access::Channel
    } else if has("RO") {
        Access::Read
    } else {
        Access::Write
    };
    let (begin, find) = (spec.field("begin_search")?, spec.field("find_keys")?);
    let (at, how) = (begin.field("spec")?, find.field("spec")?);
    let begin = match begin.field("type")?.text()? {
        b"index" => Begin::Index(position(at.number("index")?, 1)?),
        b"keyword" => {
            let word = clean_word(at.field("keyword")?.text()?)?;
            let from = at.number("startfrom")?;
            position(from.checked_abs()?, 1)?;
            Begin::Keyword {
                word,
                from: i32::try_from(from).ok()?,
            }
        }
        _ => return None,
    };
    let find = match find.field("type")?.text()? {
        b"range" => Find::Range {
            last: i32::try_from(how.number("lastkey")?).ok()?,
            step: position(how.number("keystep")?, 1)?,
            limit: i32::try_from(position(how.number("limit")?, 0)?).ok()?,
        },
        b"keynum" => Find::Counted {
            count: position(how.number("keynumidx")?, 0)?,
            first: position(how.number("firstkey")?, 0)?,
            step: position(how.number("keystep")?, 1)?,
        },
        _ => return None,
    };
    Some(KeySpec {
        access,
        rights: Rights::of_flags(has),
        begin,
        find,
    })
}

fn position(number: i64, least: i64) -> Option<usize> {
    let usual = (least..=POSITION_MAX).contains(&number);
    usual.then(|| usize::try_from(number).ok()).flatten()
}

/// A keyword of a rule, kept like the command itself.
fn clean_word(word: &[u8]) -> Option<&'static str> {
    let word = std::str::from_utf8(word).ok()?;
    (!word.is_empty() && word.len() <= NAME_BYTES_MAX).then(|| &*String::leak(word.to_owned()))
}

impl Part {
    /// Whether this entry of COMMAND INFO is of a module's command.
    #[must_use]
    pub fn is_of_module(&self) -> bool {
        let fields = self.list().and_then(Entry::read);
        fields.is_some_and(|entry| entry.has("module"))
    }

    fn text(&self) -> Option<&[u8]> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    fn int(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }

    fn list(&self) -> Option<&[Part]> {
        match self {
            Self::List(parts) => Some(parts),
            _ => None,
        }
    }

    /// The value of a map's key.
    fn field(&self, key: &str) -> Option<&Part> {
        let mut pairs = self.list()?.chunks_exact(2);
        let pair = pairs.find(|pair| pair[0].text() == Some(key.as_bytes()))?;
        Some(&pair[1])
    }

    fn number(&self, key: &str) -> Option<i64> {
        self.field(key)?.int()
    }
}

#[cfg(test)]
#[path = "learn_tests.rs"]
mod tests;
