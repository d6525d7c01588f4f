//! All users, as one immutable value that workers share.
//!
//! Invariant: there is always a user `default`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::rules::RuleError;
use crate::user::User;

/// The users of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users(BTreeMap<String, Arc<User>>);

/// Users that cannot be made; whoever has older ones keeps them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("user {name}")]
pub struct UsersError {
    pub name: String,
    pub source: RuleError,
}

impl Users {
    /// From names and rules, as they are stored. If there is no `default` among them, it may do
    /// everything, with the password of this hash or with any.
    ///
    /// # Errors
    /// A rule cannot be read.
    pub fn new<'a, R>(
        accounts: impl IntoIterator<Item = (&'a str, R)>,
        default_password_sha256: Option<[u8; 32]>,
    ) -> Result<Self, UsersError>
    where
        R: IntoIterator<Item: AsRef<[u8]>>,
    {
        let mut users = Self::open(default_password_sha256);
        for (name, rules) in accounts {
            let mut user = User::new(name);
            for rule in rules {
                let applied = user.apply_stored(rule.as_ref());
                applied.map_err(|source| UsersError {
                    name: name.to_owned(),
                    source,
                })?;
            }
            users.0.insert(name.to_owned(), Arc::new(user));
        }
        Ok(users)
    }

    /// Nobody but `default`, who may do everything, with the password of this hash or with any.
    #[must_use]
    pub fn open(default_password_sha256: Option<[u8; 32]>) -> Self {
        let mut user = User::default_open();
        if let Some(hash) = default_password_sha256 {
            user.require(hash);
        }
        Self(BTreeMap::from([(user.name().to_owned(), Arc::new(user))]))
    }

    #[must_use]
    pub fn get(&self, name: &[u8]) -> Option<&Arc<User>> {
        self.0.get(std::str::from_utf8(name).ok()?)
    }

    /// The user of connections that have not logged in, if it is [`User::is_nopass`].
    #[must_use]
    pub fn default_user(&self) -> &Arc<User> {
        self.0
            .get("default")
            .expect("there is always a default user")
    }

    /// In the order of ACL LIST and ACL USERS.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<User>> {
        self.0.values()
    }

    /// The user whom this name and password let in. `None` is `WRONGPASS invalid username-password pair
    /// or user is disabled.`
    #[must_use]
    pub fn authenticate(&self, name: &[u8], password: &[u8]) -> Option<&Arc<User>> {
        let user = self.get(name)?;
        (user.is_on() && user.check_password(password)).then_some(user)
    }

    /// The lines of ACL LIST.
    pub fn list(&self) -> impl Iterator<Item = String> {
        self.iter()
            .map(|user| format!("user {} {}", user.name(), user.describe()))
    }
}

impl Default for Users {
    fn default() -> Self {
        Self::open(None)
    }
}
