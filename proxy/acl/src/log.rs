//! ACL LOG: the last denials, alike ones counted together.
//!
//! Invariant: it never holds more entries than its length, newest first.

use std::collections::VecDeque;

/// Entries that are kept unless `acllog-max-len` says otherwise.
pub const LOG_LEN_DEFAULT: usize = 128;
/// Alike denials within this time are one entry.
const GROUPING_MS: u64 = 60_000;
/// How many of the newest entries are looked at for one that is alike: a denial costs the same however
/// long the log is.
const LOOKED_AT_MAX: usize = 10;

/// What was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Command,
    Key,
    Channel,
    /// A login.
    Auth,
}

impl Reason {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Command => "command",
            Self::Key => "key",
            Self::Channel => "channel",
            Self::Auth => "auth",
        }
    }
}

/// Where the command was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    Toplevel,
    Multi,
    Lua,
}

impl Context {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Toplevel => "toplevel",
            Self::Multi => "multi",
            Self::Lua => "lua",
        }
    }
}

/// One denial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    pub reason: Reason,
    pub context: Context,
    /// The command's full name, the key, the channel, or what was called to log in (`AUTH`).
    pub object: Vec<u8>,
    pub username: Vec<u8>,
    /// As CLIENT LIST shows the client.
    pub client_info: String,
}

/// Alike denials, with the client of the last of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub count: u64,
    pub denial: Denial,
    updated_ms: u64,
}

impl Entry {
    /// `age-seconds`, a double: since the last of the denials.
    #[must_use]
    pub fn age_seconds(&self, now_ms: u64) -> f64 {
        now_ms.saturating_sub(self.updated_ms) as f64 / 1000.0
    }
}

/// The log.
#[derive(Debug)]
pub struct AclLog {
    entries: VecDeque<Entry>,
    len_max: usize,
}

impl Default for AclLog {
    fn default() -> Self {
        Self::new(LOG_LEN_DEFAULT)
    }
}

impl AclLog {
    #[must_use]
    pub fn new(len_max: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            len_max,
        }
    }

    /// A shorter log loses its oldest entries with the next denial, as in Redis.
    pub fn set_len_max(&mut self, len_max: usize) {
        self.len_max = len_max;
    }

    /// Takes a denial in. `now_ms` may be any clock's milliseconds, if it is always the same clock's.
    pub fn record(&mut self, denial: Denial, now_ms: u64) {
        let alike = |entry: &Entry| {
            let known = &entry.denial;
            known.reason == denial.reason
                && known.context == denial.context
                && now_ms.abs_diff(entry.updated_ms) <= GROUPING_MS
                && known.object == denial.object
                && known.username == denial.username
        };
        let found = self.entries.iter().take(LOOKED_AT_MAX).position(alike);
        let known = found.and_then(|at| self.entries.remove(at));
        self.entries.push_front(Entry {
            count: known.map_or(1, |known| known.count + 1),
            denial,
            updated_ms: now_ms,
        });
        self.entries.truncate(self.len_max);
    }

    /// Newest first. ACL LOG shows 10 unless told how many.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// ACL LOG RESET.
    pub fn reset(&mut self) {
        self.entries.clear();
    }
}
