//! Rules for the rights that most accounts have.
//!
//! Invariant: applied to a new user, each list is accepted as it is. Who may log in, and with which
//! password, is said beside it (`on`, `#<hash>`).

/// Reads every key and receives every message; changes nothing.
pub const READ_ONLY: &[&str] = &[
    "~*",
    "&*",
    "+@read",
    "+@connection",
    "+@transaction",
    "+@pubsub",
    "-@dangerous",
    "-@write",
    // Called dangerous because they may take long.
    "+keys",
    "+sort_ro",
    "-publish",
    "-spublish",
    // Names without which clients don't even connect, though they read no key.
    "+command",
    "+info",
    "+cluster|slots",
    "+cluster|shards",
    "+cluster|nodes",
    "+cluster|info",
    "+cluster|keyslot",
    "+cluster|myid",
    "+eval_ro",
    "+evalsha_ro",
    "+fcall_ro",
    "+script|load",
    "+script|exists",
];

/// Everything that works on keys and messages; nothing that changes or shows the server.
pub const READ_WRITE: &[&str] = &[
    "~*",
    "&*",
    "+@all",
    "-@admin",
    "-@dangerous",
    // Of what is called dangerous, what ordinary programs use.
    "+info",
    "+keys",
    "+sort",
    "+sort_ro",
    "+flushdb",
    "+flushall",
    "+swapdb",
    "+role",
    "+cluster|slots",
    "+cluster|shards",
    "+cluster|nodes",
    "+cluster|info",
    "+cluster|keyslot",
    "+cluster|myid",
    "+restore",
];

/// Everything.
pub const ADMIN: &[&str] = &["~*", "&*", "+@all"];
