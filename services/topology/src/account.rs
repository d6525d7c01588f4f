//! Users of clients: a name and rules in the words of ACL SETUSER.
//!
//! **Invariant:** no password in clear text gets into a record. Apart from that rules are opaque
//! here; the proxies give them their meaning.

/// Longest name.
pub const NAME_LENGTH_MAX: usize = 64;
/// Most accounts of an instance.
pub const ACCOUNTS_MAX: usize = 128;
/// Most rules of an account.
pub const RULES_MAX: usize = 256;
/// Longest rule.
pub const RULE_BYTES_MAX: usize = 4 << 10;
/// Of all accounts of an instance: they are one record, and a store takes about 1 MiB at once.
pub const BYTES_MAX: usize = 512 << 10;
/// The account of clients that do not log in.
pub const DEFAULT: &str = "default";

/// A user of clients.
#[derive(Clone, PartialEq, Eq)]
pub struct Account {
    /// What a client logs in as.
    pub name: String,
    /// Applied one by one to a new user.
    pub rules: Vec<String>,
}

impl std::fmt::Debug for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Account")
            .field("name", &self.name)
            .field("rules", &self.rules.len())
            .finish()
    }
}

/// Why accounts are not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccountError {
    /// The name is no name.
    #[error("an account's name has 1 to {NAME_LENGTH_MAX} characters of A-Z a-z 0-9 . _ -")]
    Name,
    /// The same name twice in one request.
    #[error("account {0} is named twice")]
    Twice(String),
    /// A rule holds a password in clear text.
    #[error(
        "account {0}: a rule holds a password in clear text; send #<sha256 in hex> instead of \
         >password, and !<sha256 in hex> instead of <password"
    )]
    PlainPassword(String),
    /// Too many rules, or one too long.
    #[error("account {0}: at most {RULES_MAX} rules of at most {RULE_BYTES_MAX} bytes each")]
    Rules(String),
    /// Too many accounts.
    #[error("at most {ACCOUNTS_MAX} accounts, and {BYTES_MAX} bytes for all of them")]
    TooMany,
    /// `default` stays.
    #[error("account default cannot be removed; turn it off with the rule `off`")]
    Default,
}

/// The accounts after a change: those of `changed` replace what was there of their names, and those
/// of `removed` go. Doing it twice is doing it once.
///
/// # Errors
/// When an account is malformed, too many would be there, or `default` would go.
pub fn change(
    current: &[Account],
    changed: &[Account],
    removed: &[String],
) -> Result<Vec<Account>, AccountError> {
    if removed.iter().any(|name| name == DEFAULT) {
        return Err(AccountError::Default);
    }
    for (index, account) in changed.iter().enumerate() {
        check(account)?;
        let name = &account.name;
        if changed[..index].iter().any(|a| a.name == *name) || removed.contains(name) {
            return Err(AccountError::Twice(name.clone()));
        }
    }
    let stays = |a: &&Account| {
        !removed.contains(&a.name) && !changed.iter().any(|change| change.name == a.name)
    };
    let mut next: Vec<Account> = current.iter().filter(stays).cloned().collect();
    next.extend_from_slice(changed);
    next.sort_by(|a, b| a.name.cmp(&b.name));
    let bytes: usize = next
        .iter()
        .flat_map(|a| &a.rules)
        .map(|rule| rule.len())
        .sum();
    if next.len() > ACCOUNTS_MAX || bytes > BYTES_MAX {
        return Err(AccountError::TooMany);
    }
    Ok(next)
}

fn check(account: &Account) -> Result<(), AccountError> {
    let name = &account.name;
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || name.len() > NAME_LENGTH_MAX || !name.bytes().all(is_word) {
        return Err(AccountError::Name);
    }
    let too_long = |rule: &String| rule.len() > RULE_BYTES_MAX;
    if account.rules.len() > RULES_MAX || account.rules.iter().any(too_long) {
        return Err(AccountError::Rules(name.clone()));
    }
    if account.rules.iter().any(|r| r.starts_with(['>', '<'])) {
        return Err(AccountError::PlainPassword(name.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(name: &str, rules: &[&str]) -> Account {
        Account {
            name: name.to_owned(),
            rules: rules.iter().map(|r| (*r).to_owned()).collect(),
        }
    }

    #[test]
    fn an_account_replaces_what_was_there_of_its_name_and_twice_is_once() {
        let old = [account("b", &["on"]), account("default", &["off"])];
        let new = [account("a", &["on"]), account("b", &["off"])];
        let next = change(&old, &new, &[]).unwrap();
        assert_eq!(next, [new[0].clone(), new[1].clone(), old[1].clone()]);
        assert_eq!(change(&next, &new, &["x".into()]).unwrap(), next);
        let gone = change(&next, &[], &["a".into()]).unwrap();
        assert_eq!(gone, [new[1].clone(), old[1].clone()]);
    }

    #[test]
    fn what_is_no_account_is_refused() {
        let long = "x".repeat(RULE_BYTES_MAX + 1);
        let many = vec!["on"; RULES_MAX + 1];
        let bad: [(Account, AccountError); 6] = [
            (account("", &[]), AccountError::Name),
            (account("a b", &[]), AccountError::Name),
            (account(&"x".repeat(65), &[]), AccountError::Name),
            (
                account("a", &["on", ">secret"]),
                AccountError::PlainPassword("a".into()),
            ),
            (account("a", &[&long]), AccountError::Rules("a".into())),
            (account("a", &many), AccountError::Rules("a".into())),
        ];
        for (bad, error) in bad {
            assert_eq!(change(&[], &[bad], &[]), Err(error));
        }
        let twice = [account("a", &[]), account("a", &[])];
        assert_eq!(
            change(&[], &twice, &[]),
            Err(AccountError::Twice("a".into()))
        );
        assert_eq!(
            change(&[], &[], &["default".into()]),
            Err(AccountError::Default)
        );
        let full: Vec<_> = (0..=ACCOUNTS_MAX)
            .map(|n| account(&n.to_string(), &[]))
            .collect();
        assert_eq!(change(&[], &full, &[]), Err(AccountError::TooMany));
    }

    #[test]
    fn rules_are_not_shown_in_logs() {
        let shown = format!("{:?}", account("a", &["#0123abcd"]));
        assert!(!shown.contains("0123abcd"), "{shown}");
    }
}
