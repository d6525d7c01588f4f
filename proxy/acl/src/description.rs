//! What ACL GETUSER says of a user, as data.
//!
//! Invariant: the fields are those of Redis 7.0's reply, in its order.

/// ACL GETUSER.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserDescription {
    /// A set in RESP3.
    pub flags: Vec<&'static str>,
    /// SHA-256 in hexadecimal.
    pub passwords: Vec<String>,
    /// `commands`, `keys` and `channels` of the reply itself.
    pub root: SelectorDescription,
    /// A list of maps.
    pub selectors: Vec<SelectorDescription>,
}

/// One selector; each field is a bulk string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelectorDescription {
    pub commands: String,
    pub keys: String,
    pub channels: String,
}
