//! One selector: commands together with the keys and channels that they may touch.
//!
//! Invariant: a selector allows a command if it allows the command itself, each key and each channel.

use slotmesh_command::{Arguments, Command};

use crate::check::{self, Denied};
use crate::commands::CommandSet;
use crate::description::SelectorDescription;
use crate::patterns::{ChannelPatterns, KeyPatterns};
use crate::rules::RuleProblem;
use crate::words;

/// A new one allows nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Selector {
    pub(crate) commands: CommandSet,
    pub(crate) keys: KeyPatterns,
    pub(crate) channels: ChannelPatterns,
}

/// What becomes of a command's name that we don't know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unknown {
    Refused,
    /// It was known to whoever stored the rule: a module's command that no node has told us of yet.
    Kept,
}

impl Selector {
    /// `(+get ~a)`: the parentheses included.
    pub(crate) fn parse(rule: &[u8], unknown: Unknown) -> Result<Self, RuleProblem> {
        let mut selector = Self::default();
        // Redis takes what it cannot split for nothing at all.
        let rules = words::split(&rule[1..rule.len() - 1]).unwrap_or_default();
        for rule in rules {
            selector.apply(&rule, unknown)?;
        }
        Ok(selector)
    }

    pub(crate) fn apply(&mut self, rule: &[u8], unknown: Unknown) -> Result<(), RuleProblem> {
        let rule = std::str::from_utf8(rule).map_err(|_| RuleProblem::Syntax)?;
        let is = |word: &str| rule.eq_ignore_ascii_case(word);
        if is("allkeys") || is("~*") {
            self.keys.allow_all();
        } else if is("resetkeys") {
            self.keys.reset();
        } else if is("allchannels") || is("&*") {
            self.channels.allow_all();
        } else if is("resetchannels") {
            self.channels.reset();
        } else if is("allcommands") || is("+@all") {
            self.commands.allow_all();
        } else if is("nocommands") || is("-@all") {
            self.commands.deny_all();
        } else if rule.starts_with(['~', '%']) {
            self.keys.add(rule)?;
        } else if let Some(pattern) = rule.strip_prefix('&') {
            self.channels.add(pattern)?;
        } else if rule.starts_with(['+', '-']) {
            self.commands.apply(rule, unknown)?;
        } else {
            return Err(RuleProblem::Syntax);
        }
        Ok(())
    }

    pub(crate) fn is_unrestricted(&self) -> bool {
        self.commands.all() && self.keys.all() && self.channels.all()
    }

    pub(crate) fn check<A: Arguments + ?Sized>(
        &self,
        command: &Command,
        args: &A,
    ) -> Result<(), Denied> {
        if !self.commands.allow(command, args) {
            return Err(Denied::Command);
        }
        if !self.keys.all() {
            let refused = |&(at, needs): &_| !self.keys.allow(args.argument(at), needs);
            if let Some((at, _)) = command.needs(args).find(refused) {
                return Err(Denied::Key(at));
            }
        }
        if !self.channels.all() {
            let refused = |&at: &usize| {
                let channel = args.argument(at);
                !match check::channel_kind(command) {
                    check::ChannelKind::Pattern => self.channels.allow_pattern(channel),
                    _ => self.channels.allow(channel),
                }
            };
            if let Some(at) = check::channels(command, args).find(refused) {
                return Err(Denied::Channel(at));
            }
        }
        Ok(())
    }

    pub(crate) fn describe(&self) -> SelectorDescription {
        SelectorDescription {
            commands: self.commands.describe().join(" "),
            keys: self.keys.describe().join(" "),
            channels: self.channels.describe().join(" "),
        }
    }

    /// As ACL LIST shows it, without parentheses.
    pub(crate) fn line(&self) -> String {
        let mut words = self.keys.describe();
        words.extend(self.channel_rules());
        words.extend(self.commands.describe());
        words.join(" ")
    }

    pub(crate) fn to_rules(&self) -> Vec<String> {
        let mut rules = self.keys.to_rules();
        rules.extend(self.channel_rules());
        rules.extend(self.commands.describe());
        rules
    }

    fn channel_rules(&self) -> Vec<String> {
        let mut rules = self.channels.describe();
        if !self.channels.all() {
            rules.insert(0, "resetchannels".to_owned());
        }
        rules
    }
}
