//! Users of a node's engine: which rights each kind has, and how rights are taken away and deleted.
//!
//! Invariant: a fence changes command rules only, never passwords or keys, so that it applies to
//! live connections and can be lifted by granting again.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use slotmesh_proto::agent::v1::EpochUser;

use crate::{
    artifact::{self, Version},
    control::{Control, ControlError, strings},
};

/// Only administration over the unix socket uses it; it is in the node's boot configuration.
pub const ADMIN_USER: &str = "slotmesh-admin";

/// What a proxy may do for its clients: all but administration, and of the commands that engines
/// file under "dangerous" or "admin" those that belong to users' data, that client libraries call,
/// or that proxies permit by the accounts that they keep. SORT may read any key by pattern, which is
/// no danger in an instance of one owner. What changes who serves, stops the process, or touches
/// other users of the engine stays out: REPLICAOF, FAILOVER, SHUTDOWN, ACL, CONFIG SET, CLIENT KILL
/// and PAUSE. MONITOR is the observer's.
const PROXY_RIGHTS: &[&str] = &[
    "+@all",
    "-@admin",
    "-@dangerous",
    "+info",
    "+keys",
    "+sort",
    "+flushall",
    "+flushdb",
    "+swapdb",
    "+restore",
    "+role",
    // The engine's own enable-debug-command still guards it.
    "+debug",
    "+config|get",
    "+config|resetstat",
    "+slowlog",
    "+latency",
    "+memory",
    "+client|unblock",
    "+client|list",
    "+client|info",
    "+script",
    "+object",
    "+command",
    "+lolwut",
    "+wait",
    "+pfdebug",
    "+pfselftest",
    "+cluster|keyslot",
    "+module|list",
    "+acl|whoami",
    "+save",
    "+bgsave",
    "+bgrewriteaof",
    "+lastsave",
];

/// One of those that came last, and that every engine lists by this name.
const NEWEST_RIGHT: &str = "+debug";

/// Commands that came with 7.0.
const PROXY_RIGHTS_SINCE_7_0: &[&str] = &["+sort_ro", "+function", "+client|no-evict"];

/// Commands that came with 7.2.
const PROXY_RIGHTS_SINCE_7_2: &[&str] = &["+client|no-touch", "+waitaof"];

/// Engines before 7.0 file all of CLIENT under administration.
const PROXY_RIGHTS_BEFORE_7_0: &[&str] = &[
    "+client|setname",
    "+client|getname",
    "+client|id",
    "+client|reply",
    "+client|tracking",
    "+client|caching",
    "+client|getredir",
    "+client|trackinginfo",
];

/// What proxies use to receive messages, to monitor and to ask a node about itself, at any epoch.
/// Nothing here reads or writes a key, so nothing here needs a fence.
const OBSERVER_RIGHTS: &[&str] = &[
    "resetkeys",
    "&*",
    "-@all",
    "+subscribe",
    "+psubscribe",
    "+unsubscribe",
    "+punsubscribe",
    "+ping",
    "+monitor",
    "+info",
    "+select",
    "+auth",
    "+hello",
    "+role",
    "+client|setname",
    "+client|id",
    "+client|tracking",
    "+client|caching",
    "+slowlog|get",
    "+slowlog|len",
    "+command",
];

/// Commands that came with 7.0.
const OBSERVER_RIGHTS_SINCE_7_0: &[&str] = &["+ssubscribe", "+sunsubscribe"];

/// Enough for PSYNC, with FAILOVER too, and for GETACK.
const REPLICATION_RIGHTS: &[&str] = &["resetchannels", "-@all", "+psync", "+replconf", "+ping"];

/// Of everything that can be executed only plain reads are left. A mere `-@write` would let scripts
/// through, whose `redis.pcall` swallows the refusal, and the client would take it for an answer.
const SOFT_FENCE: &[&str] = &["-@all", "+@read", "+@connection"];

/// Which rights an engine has names for: it refuses a rule with a command that it does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Before7_0,
    Since7_0,
    Since7_2,
}

impl Dialect {
    /// Of an engine; `None`: it has not said its version.
    pub fn of(version: Option<Version>) -> Self {
        match version {
            Some(version) if version < artifact::REDIS_7_0 => Self::Before7_0,
            Some(version) if version >= artifact::REDIS_7_2 => Self::Since7_2,
            _ => Self::Since7_0,
        }
    }

    fn proxy_rights<'a>(self) -> impl Iterator<Item = &'a str> {
        let more: [&[&str]; 2] = match self {
            Self::Before7_0 => [PROXY_RIGHTS_BEFORE_7_0, &[]],
            Self::Since7_0 => [PROXY_RIGHTS_SINCE_7_0, &[]],
            Self::Since7_2 => [PROXY_RIGHTS_SINCE_7_0, PROXY_RIGHTS_SINCE_7_2],
        };
        let more = more.into_iter().flatten();
        PROXY_RIGHTS.iter().chain(more).copied()
    }

    fn observer_rights<'a>(self) -> impl Iterator<Item = &'a str> {
        let more: &[&str] = match self {
            Self::Before7_0 => &[],
            Self::Since7_0 | Self::Since7_2 => OBSERVER_RIGHTS_SINCE_7_0,
        };
        OBSERVER_RIGHTS.iter().chain(more).copied()
    }
}

/// A user as the engine lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownUser {
    /// Lower-case hex of SHA-256, as `ACL LIST` shows it.
    pub password_sha256: String,
    /// Not soft-fenced. Only meaningful for a proxy's user.
    pub full: bool,
    /// With the rights that this release gives; an older agent gave fewer. Only meaningful when full.
    pub current: bool,
}

pub type KnownUsers = BTreeMap<String, KnownUser>;

/// `px-<epoch>` and `rp-<epoch>-<node>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserKind {
    Proxy,
    Replication,
}

/// Whether the name is one of an observer: no user of an epoch, so no fence and no deletion finds it.
pub fn is_observer(name: &str) -> bool {
    name.strip_prefix("ob-")
        .is_some_and(|rest| !rest.is_empty())
}

/// Kind and epoch of a user of an epoch; `None` for any other name.
pub fn parse_user(name: &str) -> Option<(UserKind, u64)> {
    if let Some(epoch) = name.strip_prefix("px-") {
        return Some((UserKind::Proxy, epoch.parse().ok()?));
    }
    let (epoch, node) = name.strip_prefix("rp-")?.split_once('-')?;
    if node.is_empty() {
        return None;
    }
    Some((UserKind::Replication, epoch.parse().ok()?))
}

pub fn password_sha256(password: &str) -> String {
    hex::encode(Sha256::digest(password.as_bytes()))
}

/// Reads `ACL LIST`; users that are not ours are left out.
pub fn parse_acl_list<'a>(lines: impl Iterator<Item = &'a str>) -> KnownUsers {
    lines.filter_map(parse_acl_line).collect()
}

fn parse_acl_line(line: &str) -> Option<(String, KnownUser)> {
    let mut words = line.split_ascii_whitespace();
    if words.next()? != "user" {
        return None;
    }
    let name = words.next()?;
    parse_user(name)?;
    let mut user = KnownUser {
        password_sha256: String::new(),
        full: false,
        current: false,
    };
    for word in words {
        if let Some(hash) = word.strip_prefix('#') {
            user.password_sha256 = hash.to_owned();
        }
        // Every engine describes the rules from `+@all` or from `-@all` on.
        user.full |= word == "+@all";
        user.current |= word == NEWEST_RIGHT;
    }
    Some((name.to_owned(), user))
}

/// Users of this engine.
pub async fn known_users(control: &mut Control) -> Result<KnownUsers, ControlError> {
    let reply = control.call(&["ACL", "LIST"]).await?;
    let lines = strings(&reply);
    Ok(parse_acl_list(lines.iter().map(String::as_str)))
}

/// Creates the user with full rights of its kind, or gives them back to it.
pub async fn grant(
    control: &mut Control,
    user: &EpochUser,
    dialect: Dialect,
) -> Result<(), ControlError> {
    let secret = format!("#{}", password_sha256(&user.password));
    let mut args = vec!["ACL", "SETUSER", &user.name, "on", "resetpass", &secret];
    if user.replication {
        args.extend(REPLICATION_RIGHTS);
    } else {
        args.extend(["~*", "&*"]);
        args.extend(dialect.proxy_rights());
    }
    control.call(&args).await.map(drop)
}

/// Creates the observer, or gives it the rights that this release knows. One command, so that its
/// live connections never lack a right that they have before and after.
pub async fn grant_observer(
    control: &mut Control,
    user: &str,
    password: &str,
    dialect: Dialect,
) -> Result<(), ControlError> {
    let secret = format!("#{}", password_sha256(password));
    let mut args = vec!["ACL", "SETUSER", user, "on", "resetpass", &secret];
    args.extend(dialect.observer_rights());
    control.call(&args).await.map(drop)
}

/// Gives a soft-fenced proxy user its rights back; passwords stay as they are.
pub async fn restore(
    control: &mut Control,
    user: &str,
    dialect: Dialect,
) -> Result<(), ControlError> {
    let mut args = vec!["ACL", "SETUSER", user];
    args.extend(dialect.proxy_rights());
    control.call(&args).await.map(drop)
}

/// Takes everything but reads from a user, on live connections too.
pub async fn soft_fence(control: &mut Control, user: &str) -> Result<(), ControlError> {
    // SETUSER would create a user that does not exist; it then has no password and is off.
    let mut args = vec!["ACL", "SETUSER", user];
    args.extend(SOFT_FENCE);
    control.call(&args).await.map(drop)
}

/// Deletes users, which closes their connections.
pub async fn delete(control: &mut Control, users: &[String]) -> Result<(), ControlError> {
    let mut args = vec!["ACL", "DELUSER"];
    args.extend(users.iter().map(String::as_str));
    control.call(&args).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_are_parsed() {
        assert_eq!(parse_user("px-7"), Some((UserKind::Proxy, 7)));
        assert_eq!(parse_user("rp-12-n-3"), Some((UserKind::Replication, 12)));
        for name in [
            "px-", "px-x", "px--1", "rp-1", "rp-1-", "rp--n", "ob-1", "default", ADMIN_USER,
        ] {
            assert_eq!(parse_user(name), None, "{name}");
        }
    }

    #[test]
    fn a_fenced_user_is_told_from_a_granted_one() {
        let users = parse_acl_list(
            [
                "user default off nopass sanitize-payload ~* &* +@all",
                "user px-3 on sanitize-payload #ab12 ~* &* +@all -@admin -@dangerous +info",
                "user px-4 on sanitize-payload #ab12 ~* &* +@all -@admin +info +debug",
                "user px-2 on #cd34 ~* &* -@all +@read +@connection",
                "user rp-3-n1 on #ef56 resetchannels -@all +psync +replconf +ping",
            ]
            .into_iter(),
        );
        assert_eq!(users.len(), 4);
        assert!(users["px-4"].current && !users["px-3"].current);
        assert!(users["px-3"].full && !users["px-2"].full && !users["rp-3-n1"].full);
        assert_eq!(users["px-2"].password_sha256, "cd34");
    }
}
