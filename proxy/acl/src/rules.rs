//! Why a rule is refused, in the words of ACL SETUSER.
//!
//! Invariant: [`RuleError::to_string`] is the whole error reply.

/// A rule that cannot be applied; the user is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    #[error("ERR Error in ACL SETUSER modifier '{rule}': {problem}")]
    Refused { rule: String, problem: RuleProblem },
    #[error("ERR Unmatched parenthesis in acl selector starting at '{rule}'.")]
    Unmatched { rule: String },
}

/// What is wrong with a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RuleProblem {
    #[error("Syntax error")]
    Syntax,
    #[error("Unknown command or category name in ACL")]
    UnknownName,
    #[error(
        "Adding a pattern after the * pattern (or the 'allkeys' flag) is not valid and does not have \
         any effect. Try 'resetkeys' to start with an empty list of patterns"
    )]
    AfterAllKeys,
    #[error(
        "Adding a pattern after the * pattern (or the 'allchannels' flag) is not valid and does not \
         have any effect. Try 'resetchannels' to start with an empty list of channels"
    )]
    AfterAllChannels,
    #[error("The password you are trying to remove from the user does not exist")]
    NoSuchPassword,
    #[error(
        "The password hash must be exactly 64 characters and contain only lowercase hexadecimal \
         characters"
    )]
    NotAHash,
    #[error("Allowing first-arg of a subcommand is not supported")]
    FirstArgOfSubcommand,
}

impl RuleError {
    pub(crate) fn refused(rule: &[u8], problem: RuleProblem) -> Self {
        Self::Refused {
            rule: shown(rule),
            problem,
        }
    }

    pub(crate) fn unmatched(rule: &[u8]) -> Self {
        Self::Unmatched { rule: shown(rule) }
    }
}

/// A client's own words, as they fit on the line of an error reply.
pub(crate) fn shown(text: &[u8]) -> String {
    let end = text.iter().position(|&byte| byte == 0);
    let text = String::from_utf8_lossy(&text[..end.unwrap_or(text.len())]);
    text.replace(['\r', '\n'], " ")
}
