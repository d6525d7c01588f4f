//! From a command's name to its entry, in a few nanoseconds and without allocating.
//!
//! Invariant: names are matched as engines match them, without regard to case, and what is refused
//! here is refused in the words of Redis 7 and later.

use std::sync::LazyLock;

use crate::categories::Categories;
use crate::class::{self, Class};
use crate::facts::{self, Flag, Flags};
use crate::gained;
use crate::keys::{Arguments, KeyError, KeySpec, Keys, SPECS_MAX};
use crate::learn;
use crate::release::Since;

/// One command, or one subcommand (`config|get`).
#[derive(Debug)]
pub struct Command {
    /// In lower case; a subcommand's with its command's, as error texts show it.
    pub name: &'static str,
    /// Number of arguments with the name; negative: at least so many.
    pub arity: i32,
    pub flags: Flags,
    pub class: Class,
    pub(crate) keys: Box<[KeySpec]>,
    pub(crate) subcommands: Box<[(&'static str, Place)]>,
    pub(crate) only_key: Option<usize>,
    /// Where groups of arguments begin, and how many make one.
    pub(crate) groups: Option<(usize, usize)>,
    pub(crate) origin: Origin,
    pub(crate) categories: Categories,
    pub(crate) id: Option<u16>,
    pub(crate) in_redis_7_0: bool,
    pub(crate) since: Since,
    /// Some of its options are newer than it is.
    pub(crate) has_gained: bool,
}

/// Where a subcommand's entry is: the table's own are linked before the table stands.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    Table(u16),
    Learned(&'static Command),
}

/// Who told us of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Table,
    /// A node, whose COMMAND INFO we have read.
    Node,
}

/// Why a command is answered with an error at once. [`CommandError::text`] is the answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    #[error("{}", String::from_utf8_lossy(.0))]
    Unknown(Vec<u8>),
    #[error("{}", String::from_utf8_lossy(.0))]
    UnknownSubcommand(Vec<u8>),
    #[error("ERR wrong number of arguments for '{0}' command")]
    WrongArity(&'static str),
}

impl CommandError {
    /// The error reply, without the leading `-` and the line end.
    #[must_use]
    pub fn text(&self) -> Vec<u8> {
        match self {
            Self::Unknown(text) | Self::UnknownSubcommand(text) => text.clone(),
            Self::WrongArity(_) => self.to_string().into_bytes(),
        }
    }
}

impl Command {
    #[inline]
    #[must_use]
    pub fn check_arity(&self, argc: usize) -> bool {
        let wanted = self.arity.unsigned_abs() as usize;
        let enough = if self.arity < 0 {
            argc >= wanted
        } else {
            argc == wanted
        };
        // MSET's arguments come in pairs; half a pair is a wrong number of arguments.
        let whole = |(first, step): (usize, usize)| (argc - first).is_multiple_of(step);
        enough && self.groups.is_none_or(whole)
    }

    /// Position of the key of a command that has exactly one, always at the same place. A command of
    /// the right arity has that argument.
    #[inline]
    #[must_use]
    pub fn only_key(&self) -> Option<usize> {
        self.only_key
    }

    /// Positions of all keys (for SPUBLISH and its like, of the channels).
    ///
    /// # Errors
    /// The arguments announce keys that are not there; any shard refuses the command.
    pub fn keys<A: Arguments + ?Sized>(&self, args: &A) -> Result<Keys, KeyError> {
        Keys::find(&self.keys, args)
    }

    /// The rules behind [`Self::keys`].
    #[must_use]
    pub fn key_specs(&self) -> &[KeySpec] {
        &self.keys
    }

    /// Whether this call may wait for another client. XREAD without BLOCK does not.
    pub fn may_wait<A: Arguments + ?Sized>(&self, args: &A) -> bool {
        if self.class != Class::Blocking {
            return false;
        }
        let options = match self.name {
            "xread" => 1,
            // GROUP, the group's and the consumer's name come first.
            "xreadgroup" => 4,
            _ => return true,
        };
        (options..args.count())
            .map(|at| args.argument(at))
            .take_while(|word| !word.eq_ignore_ascii_case(b"streams"))
            .any(|word| word.eq_ignore_ascii_case(b"block"))
    }

    /// ACL categories: Redis 7.0's, for every command that it has. A learned command is in none, as a
    /// module's command there.
    #[must_use]
    pub fn categories(&self) -> Categories {
        self.categories
    }

    /// Place in [`all`], as long as the process lives. A learned command has none.
    #[inline]
    #[must_use]
    pub fn id(&self) -> Option<usize> {
        self.id.map(usize::from)
    }

    /// Whether Redis 7.0 has it.
    #[must_use]
    pub fn in_redis_7_0(&self) -> bool {
        self.in_redis_7_0
    }

    #[must_use]
    pub fn is_write(&self) -> bool {
        self.flags.has(Flag::Write)
    }

    #[must_use]
    pub fn has_subcommands(&self) -> bool {
        !self.subcommands.is_empty()
    }

    #[must_use]
    pub fn subcommand(&self, name: &[u8]) -> Option<&'static Command> {
        let matches = |(sub, _): &&(&str, Place)| sub.as_bytes().eq_ignore_ascii_case(name);
        match self.subcommands.iter().find(matches)?.1 {
            Place::Table(at) => TABLE.commands.get(usize::from(at)),
            Place::Learned(command) => Some(command),
        }
    }

    /// True if no table of ours has it, but a node told us of it ([`crate::learn`]).
    #[must_use]
    pub fn is_learned(&self) -> bool {
        self.origin == Origin::Node
    }
}

/// The command of this name (not a subcommand), if it is in the table or was learned from a node.
#[inline]
#[must_use]
pub fn lookup(name: &[u8]) -> Option<&'static Command> {
    TABLE.find(name).or_else(|| learn::find(name))
}

/// The command of this name in the table itself.
pub(crate) fn in_table(name: &[u8]) -> Option<&'static Command> {
    TABLE.find(name)
}

/// The command or subcommand that these arguments call, in a number that it takes.
///
/// # Errors
/// There is no such command, or the number of arguments is wrong; the text is Redis's.
pub fn resolve<A: Arguments + ?Sized>(args: &A) -> Result<&'static Command, CommandError> {
    let found = if args.count() == 0 {
        None
    } else {
        lookup(args.argument(0))
    };
    let Some(mut command) = found else {
        return Err(unknown_command(args));
    };
    if command.has_subcommands() && args.count() > 1 {
        let subcommand = command.subcommand(args.argument(1));
        command = subcommand.ok_or_else(|| unknown_subcommand(args))?;
    }
    if command.check_arity(args.count()) {
        Ok(command)
    } else {
        Err(CommandError::WrongArity(command.name))
    }
}

/// Every command and subcommand of the table. What nodes told us of is in [`crate::learned`].
pub fn all() -> impl Iterator<Item = &'static Command> {
    TABLE.commands.iter()
}

/// A browser that was made to speak to us: Redis closes such a connection without an answer.
#[must_use]
pub fn is_http(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"post") || name.eq_ignore_ascii_case(b"host:")
}

/// `ERR unknown command 'foo', with args beginning with: 'a' 'b' `
pub(crate) fn unknown_command<A: Arguments + ?Sized>(args: &A) -> CommandError {
    let name = if args.count() == 0 {
        &[][..]
    } else {
        args.argument(0)
    };
    let mut text = b"ERR unknown command '".to_vec();
    text.extend_from_slice(shown(name, SHOWN_BYTES_MAX));
    text.extend_from_slice(b"', with args beginning with: ");
    let (mut at, start) = (1, text.len());
    while at < args.count() && text.len() - start < SHOWN_BYTES_MAX {
        let left = SHOWN_BYTES_MAX - (text.len() - start);
        text.push(b'\'');
        text.extend_from_slice(shown(args.argument(at), left));
        text.extend_from_slice(b"' ");
        at += 1;
    }
    CommandError::Unknown(one_line(text))
}

/// `ERR unknown subcommand 'foo'. Try CONFIG HELP.`
pub(crate) fn unknown_subcommand<A: Arguments + ?Sized>(args: &A) -> CommandError {
    let mut text = b"ERR unknown subcommand '".to_vec();
    text.extend_from_slice(shown(args.argument(1), SHOWN_BYTES_MAX));
    text.extend_from_slice(b"'. Try ");
    text.extend_from_slice(&args.argument(0).to_ascii_uppercase());
    text.extend_from_slice(b" HELP.");
    CommandError::UnknownSubcommand(one_line(text))
}

/// How much of a client's words Redis repeats to it.
const SHOWN_BYTES_MAX: usize = 128;

/// What C's `%.*s` shows of a string: not beyond a zero byte.
pub(crate) fn shown(text: &[u8], max: usize) -> &[u8] {
    let end = text.iter().take(max).take_while(|&&byte| byte != 0).count();
    &text[..end]
}

pub(crate) fn one_line(mut text: Vec<u8>) -> Vec<u8> {
    for byte in &mut text {
        if matches!(byte, b'\r' | b'\n') {
            *byte = b' ';
        }
    }
    text
}

static TABLE: LazyLock<Table> = LazyLock::new(Table::load);

/// Slots of the hash index: about eight for each name, so that most lookups compare once.
const INDEX_LEN: usize = 2048;
const EMPTY: u16 = u16::MAX;

struct Table {
    commands: Vec<Command>,
    index: [u16; INDEX_LEN],
}

impl Table {
    #[inline]
    fn find(&self, name: &[u8]) -> Option<&Command> {
        let mut slot = hash(name)?;
        loop {
            let command = self.commands.get(usize::from(self.index[slot]))?;
            if command.name.as_bytes().eq_ignore_ascii_case(name) {
                return Some(command);
            }
            slot = (slot + 1) % INDEX_LEN;
        }
    }

    fn load() -> Self {
        let lines = |text: &'static str| {
            text.lines()
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
        };
        let facts = lines(include_str!("facts.tsv")).chain(lines(include_str!("own.tsv")));
        let facts: Vec<_> = facts.map(facts::parse_line).collect();
        let mut classes = Vec::new();
        for (class, names) in lines(include_str!("classes.txt")).map(class::parse_line) {
            classes.extend(names.map(|name| (name, class)));
        }
        for (name, _) in &classes {
            assert!(
                facts.iter().any(|fact| fact.name == *name),
                "classes.txt: no command {name}"
            );
            let times = classes.iter().filter(|(other, _)| other == name).count();
            assert!(times == 1, "classes.txt: {name} is listed {times} times");
        }
        let names: Vec<&'static str> = facts.iter().map(|fact| fact.name).collect();
        let commands = facts
            .into_iter()
            .enumerate()
            .map(|(at, fact)| {
                let id = u16::try_from(at).expect("there are few commands");
                command(fact, id, &names, &classes)
            })
            .collect();
        let mut table = Self {
            commands,
            index: [EMPTY; INDEX_LEN],
        };
        table.build_index();
        table
    }

    fn build_index(&mut self) {
        let top = self
            .commands
            .iter()
            .enumerate()
            .filter(|(_, one)| !one.name.contains('|'));
        for (at, command) in top {
            let hashed = hash(command.name.as_bytes());
            let mut slot = hashed.expect("a command's name has a usual length");
            while self.index[slot] != EMPTY {
                slot = (slot + 1) % INDEX_LEN;
            }
            self.index[slot] = u16::try_from(at).expect("there are few commands");
        }
    }
}

fn command(
    fact: facts::Fact,
    id: u16,
    names: &[&'static str],
    classes: &[(&'static str, Class)],
) -> Command {
    let facts::Fact {
        name,
        arity,
        flags,
        keys,
        categories,
        in_redis_7_0,
        since,
    } = fact;
    assert!(
        keys.len() <= SPECS_MAX,
        "{name} has {} key rules",
        keys.len()
    );
    let subcommands: Box<[_]> = names
        .iter()
        .enumerate()
        .filter_map(|(at, other)| {
            let sub = other.strip_prefix(name)?.strip_prefix('|')?;
            let at = u16::try_from(at).expect("there are few commands");
            Some((sub, Place::Table(at)))
        })
        .collect();
    let only_key = match &*keys {
        [spec] => spec.fixed(),
        _ => None,
    };
    let listed = |wanted: &str| {
        classes
            .iter()
            .find(|(listed, _)| *listed == wanted)
            .map(|(_, class)| *class)
    };
    let inherited = name.split_once('|').and_then(|(parent, _)| listed(parent));
    let class = match (listed(name), only_key) {
        (Some(class), _) => class,
        (None, Some(_)) => Class::SingleKey,
        (None, None) if !subcommands.is_empty() => Class::Keyless,
        (None, None) => inherited.unwrap_or_else(|| panic!("{name} has no class")),
    };
    if let Some(key) = only_key {
        // So that a caller who has checked the arity may take the key.
        assert!(
            arity.unsigned_abs() as usize > key,
            "{name} may lack its key"
        );
    }
    let groups = keys.iter().find_map(KeySpec::groups);
    Command {
        name,
        arity,
        flags,
        class,
        keys: keys.into(),
        subcommands,
        only_key,
        groups,
        origin: Origin::Table,
        categories,
        id: Some(id),
        in_redis_7_0,
        since,
        has_gained: gained::has_gained(name),
    }
}

/// A slot of the index from the name's ends and length, letters folded to one case by one bit. Folding
/// also joins some other bytes; the comparison that follows tells them apart. `None`: no command
/// has so short or long a name.
#[inline]
fn hash(name: &[u8]) -> Option<usize> {
    const FOLD: u64 = 0x2020_2020_2020_2020;
    let len = name.len();
    let (head, tail) = if len >= 8 {
        let head = name.first_chunk::<8>()?;
        let tail = name.last_chunk::<8>()?;
        (u64::from_le_bytes(*head), u64::from_le_bytes(*tail))
    } else if len >= 4 {
        let head = name.first_chunk::<4>()?;
        let tail = name.last_chunk::<4>()?;
        (
            u64::from(u32::from_le_bytes(*head)),
            u64::from(u32::from_le_bytes(*tail)),
        )
    } else {
        let head = u64::from(*name.first()?) << 8 | u64::from(name[len / 2]);
        (head, u64::from(name[len - 1]))
    };
    if len > NAME_BYTES_MAX {
        return None;
    }
    let mixed = (head | FOLD).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (tail | FOLD)
            .wrapping_mul(0xc2b2_ae3d_27d4_eb4f)
            .rotate_left(23)
        ^ len as u64;
    let mixed = mixed.wrapping_mul(0xff51_afd7_ed55_8ccd);
    Some((mixed >> 53) as usize) // the upper 11 bits: below INDEX_LEN
}

/// The longest name has 20 bytes (`georadiusbymember_ro`).
const NAME_BYTES_MAX: usize = 32;

#[cfg(test)]
#[path = "lookup_tests.rs"]
mod tests;
