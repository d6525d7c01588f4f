//! What the command table means for this proxy: effects, and what nodes let a proxy's user do.
//!
//! Invariant: a command that is sent to a node is one that an unfenced primary permits. So `NOPERM`
//! can only mean that the shard's epoch is being ended.

use slotmesh_command::{Arguments, Class, Command, Flag};
use slotmesh_resp::Args;

use super::retry::Effect;

/// Commands that engines file under "dangerous" and that proxies' users may call all the same.
/// The agents' rule for `px-*` users names the same ones.
const DANGEROUS_ALLOWED: &[&str] = &[
    "keys",
    "sort",
    "sort_ro",
    "flushall",
    "flushdb",
    "swapdb",
    "restore",
    "info",
    "role",
    "debug",
    "pfdebug",
    "pfselftest",
    "config|get",
    "config|resetstat",
    "slowlog|get",
    "slowlog|len",
    "slowlog|reset",
    "slowlog|help",
    "latency|doctor",
    "latency|graph",
    "latency|help",
    "latency|histogram",
    "latency|history",
    "latency|latest",
    "latency|reset",
    "client|list",
    "client|no-evict",
    "client|unblock",
    "module|list",
    "save",
    "bgsave",
    "bgrewriteaof",
    "lastsave",
];

/// Those of them that belong to users' data: what scripts may call.
pub(super) const DANGEROUS_DATA: &[&str] = &[
    "keys", "sort", "sort_ro", "flushall", "flushdb", "swapdb", "restore", "info", "role",
];

/// Refused on a cluster, where no single answer would be true; one shard answers for itself.
pub(super) const FOR_ONE_SHARD: &[&str] = &["save", "bgsave", "bgrewriteaof", "lastsave"];

/// One command as it was parsed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    pub frame: &'a [u8],
    pub args: &'a Args,
}

impl<'a> Request<'a> {
    #[inline]
    pub(super) fn arg(&self, index: usize) -> &'a [u8] {
        self.args.get(self.frame, index).unwrap_or_default()
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.args.len()
    }

    /// True if argument `index` is this word, in any case.
    pub(super) fn is(&self, index: usize, word: &str) -> bool {
        self.arg(index).eq_ignore_ascii_case(word.as_bytes())
    }
}

impl Arguments for Request<'_> {
    fn count(&self) -> usize {
        self.len()
    }

    fn argument(&self, index: usize) -> &[u8] {
        self.arg(index)
    }
}

/// What executing a command can do to the data.
#[inline]
pub(super) fn effect(command: &Command) -> Effect {
    if command.class != Class::SingleKey
        && let Some(effect) = script_effect(command.name)
    {
        return effect;
    }
    // What the proxy can answer itself (PING in a transaction) changes nothing at a node either.
    if command.flags.has(Flag::ReadOnly) || command.class == Class::Proxy {
        Effect::Read
    } else {
        Effect::Write
    }
}

fn script_effect(name: &str) -> Option<Effect> {
    match name {
        "eval" | "evalsha" | "fcall" => Some(Effect::Script),
        "eval_ro" | "evalsha_ro" | "fcall_ro" => Some(Effect::ReadScript),
        _ => None,
    }
}

/// True if a proxy's user at a node may call it.
pub(super) fn is_permitted(command: &Command) -> bool {
    !(command.flags.has(Flag::Admin) || command.flags.has(Flag::Dangerous))
        || DANGEROUS_ALLOWED.contains(&command.name)
}

/// What a command is called to a client: `config get` for `config|get`.
pub(super) fn shown(command: &Command) -> String {
    command.name.replace('|', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> &'static Command {
        slotmesh_command::all().find(|c| c.name == name).unwrap()
    }

    #[test]
    fn effects_follow_the_engines_flags_but_for_scripts() {
        assert_eq!(effect(named("get")), Effect::Read);
        assert_eq!(effect(named("incr")), Effect::Write);
        assert_eq!(effect(named("publish")), Effect::Write);
        assert_eq!(effect(named("eval")), Effect::Script);
        assert_eq!(effect(named("evalsha_ro")), Effect::ReadScript);
        assert_eq!(effect(named("mget")), Effect::Read);
    }

    #[test]
    fn administration_is_never_sent_to_a_node() {
        assert!(is_permitted(named("set")) && is_permitted(named("flushall")));
        assert!(!is_permitted(named("config|set")) && !is_permitted(named("shutdown")));
    }
}
