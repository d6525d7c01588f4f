//! Which commands are allowed: one bit for each, and the shortest rules that say the same.
//!
//! Invariant: applying [`CommandSet::describe`]'s rules to an empty set gives the set again.

use std::collections::BTreeMap;

use slotmesh_command::{Arguments, Categories, Category, Command, Flag, all, lookup};

use crate::rules::RuleProblem;
use crate::selector::Unknown;

/// Names of all categories, in the order of ACL CAT.
pub fn categories() -> impl Iterator<Item = &'static str> {
    Category::ALL.iter().map(|category| category.name())
}

/// Commands and subcommands of a category, as ACL CAT lists them; `None`: there is no such category,
/// which is `ERR Unknown category 'name'`.
#[must_use]
pub fn commands_in(category: &[u8]) -> Option<Vec<&'static str>> {
    let category = Category::parse(std::str::from_utf8(category).ok()?)?;
    let inside = all().filter(|command| command.categories().has(category));
    Some(inside.map(|command| command.name).collect())
}

const WORDS: usize = 8;
/// The last bit is no command's: whoever may run commands that nobody knows yet has it.
const FUTURE: usize = WORDS * 64 - 1;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Bits([u64; WORDS]);

impl Bits {
    const ALL: Self = Self([u64::MAX; WORDS]);

    #[inline]
    fn has(&self, id: usize) -> bool {
        self.0[id / 64] & (1 << (id % 64)) != 0
    }

    fn set(&mut self, id: usize, allowed: bool) {
        let (word, bit) = (&mut self.0[id / 64], 1 << (id % 64));
        if allowed {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }

    /// A command with all of its subcommands.
    fn set_command(&mut self, command: &Command, allowed: bool) {
        for id in family(command).filter_map(Command::id) {
            self.set(id, allowed);
        }
    }

    fn set_category(&mut self, category: Category, allowed: bool) {
        for command in all().filter(|command| command.categories().has(category)) {
            self.set_command(command, allowed);
        }
    }
}

/// The command, then its subcommands.
fn family(command: &Command) -> impl Iterator<Item = &Command> {
    let sub = move |other: &&Command| {
        let rest = other.name.strip_prefix(command.name);
        rest.is_some_and(|rest| rest.starts_with('|'))
    };
    // Only then is there something to look for in the whole table.
    let others = command.has_subcommands().then(all).into_iter().flatten();
    let others = others.map(|other| -> &Command { other });
    std::iter::once(command).chain(others.filter(sub))
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct CommandSet {
    bits: Bits,
    /// `+select|0`: commands without subcommands that are allowed with these first arguments only.
    first_args: BTreeMap<usize, Vec<String>>,
    /// Commands that are not in the table (modules'), where they differ from [`FUTURE`].
    others: BTreeMap<String, bool>,
}

impl CommandSet {
    pub(crate) fn all(&self) -> bool {
        self.bits == Bits::ALL && !self.others.values().any(|allowed| !allowed)
    }

    pub(crate) fn allow_all(&mut self) {
        *self = Self {
            bits: Bits::ALL,
            ..Self::default()
        };
    }

    pub(crate) fn deny_all(&mut self) {
        *self = Self::default();
    }

    /// `+get`, `-config|set`, `+@read`, `+select|0`.
    pub(crate) fn apply(&mut self, rule: &str, unknown: Unknown) -> Result<(), RuleProblem> {
        let (allowed, name) = match rule.strip_prefix('+') {
            Some(name) => (true, name),
            None => (false, &rule[1..]),
        };
        if let Some(category) = name.strip_prefix('@') {
            let category = Category::parse(category).ok_or(RuleProblem::UnknownName)?;
            self.set_category(category, allowed);
            return Ok(());
        }
        match name.rsplit_once('|') {
            Some((command, argument)) if allowed => self.allow_part(command, argument, unknown),
            _ => self.set_named(name, allowed, unknown),
        }
    }

    /// `+config|get` or `+select|0`.
    fn allow_part(
        &mut self,
        name: &str,
        argument: &str,
        unknown: Unknown,
    ) -> Result<(), RuleProblem> {
        let Some(command) = find(name) else {
            return self.set_named(&format!("{name}|{argument}"), true, unknown);
        };
        if command.name.contains('|') {
            return Err(RuleProblem::FirstArgOfSubcommand);
        }
        if argument.is_empty() {
            return Err(RuleProblem::Syntax);
        }
        match command.id() {
            Some(id) if !command.has_subcommands() => {
                let known = self.first_args.entry(id).or_default();
                if !known.iter().any(|one| one.eq_ignore_ascii_case(argument)) {
                    known.push(argument.to_owned());
                }
                Ok(())
            }
            _ => self.set_named(&format!("{name}|{argument}"), true, unknown),
        }
    }

    fn set_named(
        &mut self,
        name: &str,
        allowed: bool,
        unknown: Unknown,
    ) -> Result<(), RuleProblem> {
        match find(name) {
            Some(command) if command.id().is_some() => self.set_command(command, allowed),
            Some(command) => self.set_other(command.name, allowed),
            None if unknown == Unknown::Kept => self.set_other(&name.to_lowercase(), allowed),
            None => return Err(RuleProblem::UnknownName),
        }
        Ok(())
    }

    fn set_command(&mut self, command: &Command, allowed: bool) {
        self.bits.set_command(command, allowed);
        if let Some(id) = command.id() {
            self.first_args.remove(&id);
        }
    }

    fn set_category(&mut self, category: Category, allowed: bool) {
        self.bits.set_category(category, allowed);
        let inside = all().filter(|command| command.categories().has(category));
        for id in inside.filter_map(Command::id) {
            self.first_args.remove(&id);
        }
    }

    fn set_other(&mut self, name: &str, allowed: bool) {
        let is_sub = |other: &str| {
            let rest = other.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with('|'))
        };
        self.others.retain(|other, _| !is_sub(other));
        self.others.insert(name.to_owned(), allowed);
    }

    /// Whatever its arguments are.
    pub(crate) fn allow_any(&self, command: &Command) -> bool {
        match command.id() {
            Some(id) => self.bits.has(id),
            None => self.allow_other(command.name),
        }
    }

    pub(crate) fn allow<A: Arguments + ?Sized>(&self, command: &Command, args: &A) -> bool {
        // Logging in takes no rights.
        self.allow_any(command)
            || self.allow_first_arg(command, args)
            || command.flags.has(Flag::NoAuth)
    }

    fn allow_first_arg<A: Arguments + ?Sized>(&self, command: &Command, args: &A) -> bool {
        let known = command.id().and_then(|id| self.first_args.get(&id));
        let Some(known) = known.filter(|_| args.count() > 1) else {
            return false;
        };
        let given = args.argument(1);
        let same = |one: &String| one.as_bytes().eq_ignore_ascii_case(given);
        known.iter().any(same)
    }

    /// The first arguments that a command is allowed with although it is not by itself.
    pub(crate) fn first_args(&self, command: &Command) -> &[String] {
        let known = command.id().and_then(|id| self.first_args.get(&id));
        known.map(Vec::as_slice).unwrap_or_default()
    }

    fn allow_other(&self, name: &str) -> bool {
        let parent = name.split_once('|').map(|(parent, _)| parent);
        let named = [Some(name), parent].into_iter().flatten();
        let mut said = named.filter_map(|name| self.others.get(name));
        said.next().copied().unwrap_or(self.bits.has(FUTURE))
    }

    /// The rules, as Redis finds them: everything or nothing, the categories that fit best, and then
    /// single commands until it is exact.
    pub(crate) fn describe(&self) -> Vec<String> {
        let subtract = self.bits.has(FUTURE);
        let (mut rules, mut reached) = if subtract {
            (vec!["+@all".to_owned()], Bits::ALL)
        } else {
            (vec!["-@all".to_owned()], Bits::default())
        };
        // What is left to say once the categories found so far are said.
        let mut left = self.bits.clone();
        let mut applied = Vec::new();
        while let Some(category) = best(&left, &applied, subtract) {
            reached.set_category(category, !subtract);
            left.set_category(category, subtract);
            applied.push(category);
            rules.push(format!("{}@{}", sign(!subtract), category.name()));
        }
        for command in all() {
            self.describe_command(command, &mut reached, &mut rules);
        }
        for (name, &allowed) in &self.others {
            rules.push(format!("{}{name}", sign(allowed)));
        }
        debug_assert!(all().all(|one| {
            one.id()
                .is_none_or(|id| reached.has(id) == self.bits.has(id))
        }));
        rules
    }

    fn describe_command(&self, command: &Command, reached: &mut Bits, rules: &mut Vec<String>) {
        let Some(id) = command.id() else {
            return;
        };
        let allowed = self.bits.has(id);
        if allowed != reached.has(id) {
            rules.push(format!("{}{}", sign(allowed), command.name));
            reached.set_command(command, allowed);
        }
        if !allowed {
            let known = self.first_args.get(&id).into_iter().flatten();
            rules.extend(known.map(|one| format!("+{}|{one}", command.name)));
        }
    }
}

fn sign(allowed: bool) -> char {
    if allowed { '+' } else { '-' }
}

/// A command of the table or a learned one, `name` or `name|subcommand`.
fn find(name: &str) -> Option<&'static Command> {
    match name.split_once('|') {
        None => lookup(name.as_bytes()),
        Some((name, sub)) => lookup(name.as_bytes())?.subcommand(sub.as_bytes()),
    }
}

/// The category that says most and says least that is wrong; `None` if each says more wrong than right.
fn best(left: &Bits, applied: &[Category], subtract: bool) -> Option<Category> {
    let mut best = None;
    let (mut wrong_least, mut right_most) = (usize::MAX, 0);
    for &category in Category::ALL {
        if applied.contains(&category) {
            continue;
        }
        let (right, wrong) = count(left, category, subtract);
        let better = wrong < wrong_least || (wrong == wrong_least && right > right_most);
        if right > wrong && better {
            (wrong_least, right_most, best) = (wrong, right, Some(category));
        }
    }
    best
}

/// Commands of a category that are still to be said, and those that are not to be. Only Redis 7.0's
/// count, so that its description is ours: newer ones are corrected one by one if need be.
fn count(left: &Bits, category: Category, subtract: bool) -> (usize, usize) {
    let counted = |command: &&Command| {
        let categories: Categories = command.categories();
        command.in_redis_7_0() && categories.has(category)
    };
    let ids = all().filter(counted).filter_map(Command::id);
    let (right, wrong): (Vec<usize>, Vec<usize>) = ids.partition(|&id| left.has(id) != subtract);
    (right.len(), wrong.len())
}
