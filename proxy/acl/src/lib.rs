//! Accounts: users, what each may do, and the words for it, as Redis 7.0's ACL has them.
//!
//! Invariant: nothing here does I/O or reads a clock, and passwords are kept as SHA-256 only.

mod check;
mod commands;
mod description;
mod glob;
mod log;
mod patterns;
mod roles;
mod rules;
mod script_rules;
mod selector;
mod sort;
mod user;
mod users;
mod words;

pub use check::Denied;
pub use commands::{categories, commands_in};
pub use description::{SelectorDescription, UserDescription};
pub use glob::{matches, matches_nocase};
pub use log::{AclLog, Context, Denial, Entry, LOG_LEN_DEFAULT, Reason};
pub use roles::{ADMIN, READ_ONLY, READ_WRITE};
pub use rules::{RuleError, RuleProblem};
pub use script_rules::ScriptRules;
pub use user::{User, sha256};
pub use users::{Users, UsersError};
