//! Users of a node's engine: which rights each kind has, and how rights are taken away and deleted.
//!
//! Invariant: a fence changes command rules only, never passwords or keys, so that it applies to
//! live connections and can be lifted by granting again.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use slotmesh_proto::agent::v1::EpochUser;

use crate::control::{Control, ControlError, strings};

/// Only administration over the unix socket uses it; it is in the node's boot configuration.
pub const ADMIN_USER: &str = "slotmesh-admin";

/// What a proxy may do for its clients: all but administration, and of the commands that engines
/// file under "dangerous" those that belong to users' data or that client libraries call.
/// SORT may read any key by pattern, which is no danger in an instance of one owner. CLIENT's
/// harmless subcommands are in `+@all`; PAUSE, KILL and their kin hurt other clients and stay out.
const PROXY_RIGHTS: &[&str] = &[
    "+@all",
    "-@admin",
    "-@dangerous",
    "+info",
    "+keys",
    "+sort",
    "+sort_ro",
    "+flushall",
    "+flushdb",
    "+swapdb",
    "+restore",
    "+role",
];

/// Engines before 7.0 have no SORT_RO and file all of CLIENT under administration.
const PROXY_RIGHTS_OLD: &[&str] = &[
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
    "+client|setname",
    "+client|getname",
    "+client|id",
    "+client|reply",
    "+client|tracking",
    "+client|caching",
    "+client|getredir",
    "+client|trackinginfo",
];

/// Enough for PSYNC, with FAILOVER too, and for GETACK.
const REPLICATION_RIGHTS: &[&str] = &["resetchannels", "-@all", "+psync", "+replconf", "+ping"];

/// Of everything that can be executed only plain reads are left. A mere `-@write` would let scripts
/// through, whose `redis.pcall` swallows the refusal, and the client would take it for an answer.
const SOFT_FENCE: &[&str] = &["-@all", "+@read", "+@connection"];

/// A user as the engine lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownUser {
    /// Lower-case hex of SHA-256, as `ACL LIST` shows it.
    pub password_sha256: String,
    /// Not soft-fenced. Only meaningful for a proxy's user.
    pub full: bool,
}

pub type KnownUsers = BTreeMap<String, KnownUser>;

/// `px-<epoch>` and `rp-<epoch>-<node>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserKind {
    Proxy,
    Replication,
}

/// Kind and epoch of a user of ours; `None` for any other name.
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
    };
    for word in words {
        if let Some(hash) = word.strip_prefix('#') {
            user.password_sha256 = hash.to_owned();
        }
        // Every engine describes the rules from `+@all` or from `-@all` on.
        user.full |= word == "+@all";
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
    modern: bool,
) -> Result<(), ControlError> {
    let rights = match (user.replication, modern) {
        (true, _) => REPLICATION_RIGHTS,
        (false, true) => PROXY_RIGHTS,
        (false, false) => PROXY_RIGHTS_OLD,
    };
    let secret = format!("#{}", password_sha256(&user.password));
    let mut args = vec!["ACL", "SETUSER", &user.name, "on", "resetpass", &secret];
    if !user.replication {
        args.extend(["~*", "&*"]);
    }
    args.extend(rights);
    control.call(&args).await.map(drop)
}

/// Gives a soft-fenced proxy user its rights back; passwords stay as they are.
pub async fn restore(control: &mut Control, user: &str, modern: bool) -> Result<(), ControlError> {
    let mut args = vec!["ACL", "SETUSER", user];
    args.extend(if modern {
        PROXY_RIGHTS
    } else {
        PROXY_RIGHTS_OLD
    });
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
            "px-", "px-x", "px--1", "rp-1", "rp-1-", "rp--n", "default", ADMIN_USER,
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
                "user px-2 on #cd34 ~* &* -@all +@read +@connection",
                "user rp-3-n1 on #ef56 resetchannels -@all +psync +replconf +ping",
            ]
            .into_iter(),
        );
        assert_eq!(users.len(), 3);
        assert!(users["px-3"].full && !users["px-2"].full && !users["rp-3-n1"].full);
        assert_eq!(users["px-2"].password_sha256, "cd34");
    }
}
