//! Which keys and channels are allowed: lists of glob patterns, or all.
//!
//! Invariant: "all" has no patterns beside it.

use slotmesh_command::Needs;

use crate::glob;
use crate::rules::RuleProblem;
use crate::words::is_space;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct KeyPatterns {
    all: bool,
    patterns: Vec<KeyPattern>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct KeyPattern {
    pattern: String,
    rights: Needs,
}

impl KeyPatterns {
    pub(crate) fn all(&self) -> bool {
        self.all
    }

    pub(crate) fn allow_all(&mut self) {
        self.all = true;
        self.patterns.clear();
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// `~pattern`, `%R~pattern`, `%W~pattern`, `%RW~pattern`.
    pub(crate) fn add(&mut self, rule: &str) -> Result<(), RuleProblem> {
        if self.all {
            return Err(RuleProblem::AfterAllKeys);
        }
        let (rights, pattern) = split(rule)?;
        check_spaces(pattern)?;
        let same = |known: &&mut KeyPattern| known.pattern == pattern;
        if let Some(known) = self.patterns.iter_mut().find(same) {
            known.rights.read |= rights.read;
            known.rights.write |= rights.write;
        } else {
            self.patterns.push(KeyPattern {
                pattern: pattern.to_owned(),
                rights,
            });
        }
        Ok(())
    }

    pub(crate) fn allow(&self, key: &[u8], needs: Needs) -> bool {
        let allows =
            |one: &KeyPattern| one.gives(needs) && glob::matches(one.pattern.as_bytes(), key);
        self.all || self.patterns.iter().any(allows)
    }

    /// Whether this may be done with every key there may be.
    pub(crate) fn allow_all_keys(&self, needs: Needs) -> bool {
        let gives_all = |one: &KeyPattern| one.gives(needs) && one.pattern == "*";
        self.all || self.patterns.iter().any(gives_all)
    }

    /// Each pattern with what may be done to its keys; `None`: everything with every key.
    pub(crate) fn listed(&self) -> Option<Vec<(String, Needs)>> {
        let all = self.patterns.iter();
        (!self.all).then(|| all.map(|one| (one.pattern.clone(), one.rights)).collect())
    }

    /// As ACL LIST shows them.
    pub(crate) fn describe(&self) -> Vec<String> {
        if self.all {
            return vec!["~*".to_owned()];
        }
        self.patterns.iter().map(KeyPattern::describe).collect()
    }

    /// As [`Self::describe`], but so that rules which follow are not refused.
    pub(crate) fn to_rules(&self) -> Vec<String> {
        let mut rules = self.describe();
        if !self.all {
            for rule in rules.iter_mut().filter(|rule| *rule == "~*") {
                *rule = "%RW~*".to_owned();
            }
        }
        rules
    }
}

impl KeyPattern {
    fn gives(&self, needs: Needs) -> bool {
        (self.rights.read || !needs.read) && (self.rights.write || !needs.write)
    }

    fn describe(&self) -> String {
        let rights = match (self.rights.read, self.rights.write) {
            (true, true) => "",
            (true, false) => "%R",
            (false, _) => "%W",
        };
        format!("{rights}~{}", self.pattern)
    }
}

fn split(rule: &str) -> Result<(Needs, &str), RuleProblem> {
    if let Some(pattern) = rule.strip_prefix('~') {
        let (read, write) = (true, true);
        return Ok((Needs { read, write }, pattern));
    }
    let letters = rule.strip_prefix('%').ok_or(RuleProblem::Syntax)?;
    // Without a `~` the pattern is empty.
    let (letters, pattern) = letters.split_once('~').unwrap_or((letters, ""));
    let mut rights = Needs::default();
    for letter in letters.bytes() {
        let right = match letter.to_ascii_lowercase() {
            b'r' => &mut rights.read,
            b'w' => &mut rights.write,
            _ => return Err(RuleProblem::Syntax),
        };
        if std::mem::replace(right, true) {
            return Err(RuleProblem::Syntax);
        }
    }
    if rights == Needs::default() {
        return Err(RuleProblem::Syntax);
    }
    Ok((rights, pattern))
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ChannelPatterns {
    all: bool,
    patterns: Vec<String>,
}

impl ChannelPatterns {
    pub(crate) fn all(&self) -> bool {
        self.all
    }

    pub(crate) fn patterns(&self) -> &[String] {
        &self.patterns
    }

    pub(crate) fn allow_all(&mut self) {
        self.all = true;
        self.patterns.clear();
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn add(&mut self, pattern: &str) -> Result<(), RuleProblem> {
        if self.all {
            return Err(RuleProblem::AfterAllChannels);
        }
        check_spaces(pattern)?;
        if !self.patterns.iter().any(|known| known == pattern) {
            self.patterns.push(pattern.to_owned());
        }
        Ok(())
    }

    pub(crate) fn allow(&self, channel: &[u8]) -> bool {
        let allows = |one: &String| glob::matches(one.as_bytes(), channel);
        self.all || self.patterns.iter().any(allows)
    }

    /// A pattern may be subscribed to only if it is listed itself: what it could match is not weighed.
    pub(crate) fn allow_pattern(&self, pattern: &[u8]) -> bool {
        self.all || self.patterns.iter().any(|one| one.as_bytes() == pattern)
    }

    pub(crate) fn describe(&self) -> Vec<String> {
        if self.all {
            return vec!["&*".to_owned()];
        }
        self.patterns.iter().map(|one| format!("&{one}")).collect()
    }
}

fn check_spaces(pattern: &str) -> Result<(), RuleProblem> {
    let spaces = pattern.bytes().any(|byte| byte == 0 || is_space(byte));
    if spaces {
        return Err(RuleProblem::Syntax);
    }
    Ok(())
}
