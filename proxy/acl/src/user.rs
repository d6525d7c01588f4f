//! One user: whether it may log in, its passwords, and what it may do.
//!
//! Invariant: whatever rules were applied, [`User::to_rules`] applied to a new user gives the same one;
//! a rule that is refused changes nothing.

use std::fmt;

use sha2::{Digest, Sha256};
use slotmesh_command::{Arguments, Command, Needs, all};
use subtle::ConstantTimeEq;

use crate::check::Denied;
use crate::description::UserDescription;
use crate::rules::{RuleError, RuleProblem};
use crate::selector::{Selector, Unknown};
use crate::words;

/// A user of clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    name: String,
    on: bool,
    /// Every password is right.
    nopass: bool,
    /// Kept because ACL LIST shows it; it changes nothing here.
    sanitize: Option<Sanitize>,
    passwords: Vec<PasswordHash>,
    root: Selector,
    selectors: Vec<Selector>,
    /// Kept up with each rule, for the hot path.
    unrestricted: bool,
}

/// SHA-256 of a password. It is a secret too, so it is not shown to whoever debugs.
#[derive(Clone, Copy, PartialEq, Eq)]
struct PasswordHash([u8; 32]);

impl fmt::Debug for PasswordHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("PasswordHash")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sanitize {
    Skip,
    Always,
}

/// How passwords are kept.
#[must_use]
pub fn sha256(password: &[u8]) -> [u8; 32] {
    Sha256::digest(password).into()
}

impl User {
    /// As ACL SETUSER makes one: it is off and may do nothing.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            on: false,
            nopass: false,
            sanitize: None,
            passwords: Vec::new(),
            root: Selector::default(),
            selectors: Vec::new(),
            unrestricted: false,
        }
    }

    /// The user `default` of a server that nobody has set up: everything, without a password.
    #[must_use]
    pub fn default_open() -> Self {
        let mut user = Self::new("default");
        (user.on, user.nopass, user.unrestricted) = (true, true, true);
        user.root.keys.allow_all();
        user.root.channels.allow_all();
        user.root.commands.allow_all();
        user
    }

    /// Whether ACL SETUSER takes this name; if not, `ERR Usernames can't contain spaces or null
    /// characters`.
    #[must_use]
    pub fn is_name(name: &[u8]) -> bool {
        let spaces = name.iter().any(|&byte| byte == 0 || words::is_space(byte));
        !spaces && std::str::from_utf8(name).is_ok()
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// An `off` user cannot log in; connections that have logged in go on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Whether any password does. New connections have `default` at once if it is so.
    #[must_use]
    pub fn is_nopass(&self) -> bool {
        self.nopass
    }

    /// Applies all rules of an ACL SETUSER, or none. Selectors may be spread over several arguments.
    ///
    /// # Errors
    /// The first rule that is refused; its text is the error reply.
    pub fn set<R: AsRef<[u8]>>(&mut self, rules: &[R]) -> Result<(), RuleError> {
        let mut changed = self.clone();
        for rule in merge(rules)? {
            changed.apply(&rule)?;
        }
        *self = changed;
        Ok(())
    }

    /// Applies one rule.
    ///
    /// # Errors
    /// It is refused; nothing is changed.
    pub fn apply(&mut self, rule: &[u8]) -> Result<(), RuleError> {
        self.apply_or(rule, Unknown::Refused)
    }

    /// As [`Self::apply`] for a rule of [`Self::to_rules`], maybe of another process: commands of modules
    /// that this one knows nothing of are kept by name.
    ///
    /// # Errors
    /// It is refused; nothing is changed.
    pub fn apply_stored(&mut self, rule: &[u8]) -> Result<(), RuleError> {
        self.apply_or(rule, Unknown::Kept)
    }

    fn apply_or(&mut self, rule: &[u8], unknown: Unknown) -> Result<(), RuleError> {
        let applied = self.change(rule, unknown);
        self.unrestricted = self.root.is_unrestricted();
        applied.map_err(|problem| RuleError::refused(rule, problem))
    }

    fn change(&mut self, rule: &[u8], unknown: Unknown) -> Result<(), RuleProblem> {
        let is = |word: &str| rule.eq_ignore_ascii_case(word.as_bytes());
        match rule {
            [] => {}
            _ if is("on") => self.on = true,
            _ if is("off") => self.on = false,
            _ if is("skip-sanitize-payload") => self.sanitize = Some(Sanitize::Skip),
            _ if is("sanitize-payload") => self.sanitize = Some(Sanitize::Always),
            _ if is("nopass") => {
                self.nopass = true;
                self.passwords.clear();
            }
            _ if is("resetpass") => {
                self.nopass = false;
                self.passwords.clear();
            }
            [b'>', password @ ..] => self.add_password(sha256(password)),
            [b'#', hash @ ..] => self.add_password(parse_hash(hash)?),
            [b'<', password @ ..] => self.remove_password(sha256(password))?,
            [b'!', hash @ ..] => self.remove_password(parse_hash(hash)?)?,
            [b'(', .., b')'] => self.selectors.push(Selector::parse(rule, unknown)?),
            _ if is("clearselectors") => self.selectors.clear(),
            _ if is("reset") => {
                *self = Self {
                    sanitize: Some(Sanitize::Always),
                    ..Self::new(&self.name)
                };
            }
            _ => self.root.apply(rule, unknown)?,
        }
        Ok(())
    }

    fn add_password(&mut self, hash: [u8; 32]) {
        let hash = PasswordHash(hash);
        if !self.passwords.contains(&hash) {
            self.passwords.push(hash);
        }
        self.nopass = false;
    }

    /// This password and no other.
    pub(crate) fn require(&mut self, hash: [u8; 32]) {
        self.passwords.clear();
        self.add_password(hash);
    }

    fn remove_password(&mut self, hash: [u8; 32]) -> Result<(), RuleProblem> {
        let at = self.passwords.iter().position(|known| known.0 == hash);
        let at = at.ok_or(RuleProblem::NoSuchPassword)?;
        self.passwords.remove(at);
        Ok(())
    }

    /// Whether this is a password of the user. Takes as long for each one that is not.
    #[must_use]
    pub fn check_password(&self, password: &[u8]) -> bool {
        let given = sha256(password);
        let same = |known: &PasswordHash| bool::from(known.0.ct_eq(&given));
        // All are compared, whichever is right.
        let right = self.passwords.iter().filter(|known| same(known)).count();
        self.nopass || right > 0
    }

    /// Whether everything is allowed, so that nothing needs to be checked.
    #[inline]
    #[must_use]
    pub fn is_unrestricted(&self) -> bool {
        self.unrestricted
    }

    /// Whether the user may run a command, of the right arity, with these arguments.
    ///
    /// # Errors
    /// Why not; if several selectors deny it, the denial that came furthest.
    pub fn check<A: Arguments + ?Sized>(&self, command: &Command, args: &A) -> Result<(), Denied> {
        if self.unrestricted {
            return Ok(());
        }
        let mut worst = Denied::Command;
        for selector in self.every_selector() {
            match selector.check(command, args) {
                Ok(()) => return Ok(()),
                Err(denied) if denied.weight() > worst.weight() => worst = denied,
                Err(_) => {}
            }
        }
        Err(worst)
    }

    /// Whether a selector allows the command and the reading of every key that there may be.
    #[must_use]
    pub fn may_read_all_keys<A: Arguments + ?Sized>(&self, command: &Command, args: &A) -> bool {
        let allows = |selector: &Selector| {
            selector.check(command, args).is_ok() && selector.keys.allow_all_keys(Needs::READ)
        };
        self.unrestricted || self.every_selector().any(allows)
    }

    /// Whether one selector allows all of these commands of the table, whatever their arguments are:
    /// with `needs` on every key, and on every channel if it may write. So much a user needs for a
    /// script whose calls nobody checks.
    pub fn may_run_any(&self, needs: Needs, commands: impl Fn(&Command) -> bool) -> bool {
        let allows = |selector: &Selector| {
            let mut calls = all().filter(|command| commands(command));
            selector.keys.allow_all_keys(needs)
                && (selector.channels.all() || !needs.write)
                && calls.all(|command| selector.commands.allow_any(command))
        };
        self.unrestricted || self.every_selector().any(allows)
    }

    /// Whether a subscription to this channel may stay; see [`Self::loses_channels_of`].
    #[must_use]
    pub fn may_subscribe(&self, channel: &[u8]) -> bool {
        self.every_selector().any(|one| one.channels.allow(channel))
    }

    /// Whether a subscription to this pattern may stay.
    #[must_use]
    pub fn may_psubscribe(&self, pattern: &[u8]) -> bool {
        self.every_selector()
            .any(|one| one.channels.allow_pattern(pattern))
    }

    /// Whether `old`, the same user before a change, had channels that this one lacks. Only then must
    /// its subscribers be looked at; those with a channel that is not allowed any more are closed.
    #[must_use]
    pub fn loses_channels_of(&self, old: &Self) -> bool {
        if self.every_selector().any(|one| one.channels.all()) {
            return false;
        }
        let kept = |pattern: &String| {
            let mut lists = self.every_selector().map(|one| one.channels.patterns());
            lists.any(|patterns| patterns.contains(pattern))
        };
        let loses =
            |one: &Selector| one.channels.all() || !one.channels.patterns().iter().all(kept);
        old.every_selector().any(loses)
    }

    pub(crate) fn every_selector(&self) -> impl Iterator<Item = &Selector> {
        std::iter::once(&self.root).chain(&self.selectors)
    }

    /// What ACL LIST shows behind `user <name> `.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut words: Vec<String> = self.flags().into_iter().map(str::to_owned).collect();
        words.extend(self.password_rules());
        words.push(self.root.line());
        words.extend(self.selectors.iter().map(|one| format!("({})", one.line())));
        words.join(" ")
    }

    /// What ACL GETUSER answers.
    #[must_use]
    pub fn description(&self) -> UserDescription {
        UserDescription {
            flags: self.flags(),
            passwords: self.password_hashes().collect(),
            root: self.root.describe(),
            selectors: self.selectors.iter().map(Selector::describe).collect(),
        }
    }

    /// Rules that make a new user into this one; passwords as `#<hash>`.
    #[must_use]
    pub fn to_rules(&self) -> Vec<String> {
        let mut rules: Vec<String> = self.flags().into_iter().map(str::to_owned).collect();
        rules.extend(self.password_rules());
        rules.extend(self.root.to_rules());
        rules.extend(self.selectors.iter().map(|selector| {
            let words = selector.to_rules();
            let words: Vec<String> = words.iter().map(|word| words::quote(word)).collect();
            format!("({})", words.join(" "))
        }));
        rules
    }

    fn flags(&self) -> Vec<&'static str> {
        let mut flags = vec![if self.on { "on" } else { "off" }];
        if self.nopass {
            flags.push("nopass");
        }
        match self.sanitize {
            Some(Sanitize::Skip) => flags.push("skip-sanitize-payload"),
            Some(Sanitize::Always) => flags.push("sanitize-payload"),
            None => {}
        }
        flags
    }

    fn password_rules(&self) -> impl Iterator<Item = String> {
        self.password_hashes().map(|hash| format!("#{hash}"))
    }

    fn password_hashes(&self) -> impl Iterator<Item = String> {
        self.passwords.iter().map(|hash| hex::encode(hash.0))
    }
}

/// 64 digits in lower case.
fn parse_hash(text: &[u8]) -> Result<[u8; 32], RuleProblem> {
    let digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if !text.iter().all(digit) {
        return Err(RuleProblem::NotAHash);
    }
    let mut hash = [0; 32];
    hex::decode_to_slice(text, &mut hash).map_err(|_| RuleProblem::NotAHash)?;
    Ok(hash)
}

/// Joins the arguments of a selector that was spread over several: `(+get` `~a)`.
fn merge<R: AsRef<[u8]>>(rules: &[R]) -> Result<Vec<Vec<u8>>, RuleError> {
    let mut merged: Vec<Vec<u8>> = Vec::with_capacity(rules.len());
    let mut open: Option<(&[u8], Vec<u8>)> = None;
    for rule in rules.iter().map(AsRef::as_ref) {
        let closes = rule.last() == Some(&b')');
        if rule.first() == Some(&b'(') && !closes {
            // One that opens within another replaces it, as in Redis.
            open = Some((rule, rule.to_vec()));
        } else if let Some((_, text)) = &mut open {
            text.push(b' ');
            text.extend_from_slice(rule);
            if closes {
                merged.extend(open.take().map(|(_, text)| text));
            }
        } else {
            merged.push(rule.to_vec());
        }
    }
    match open {
        Some((start, _)) => Err(RuleError::unmatched(start)),
        None => Ok(merged),
    }
}
