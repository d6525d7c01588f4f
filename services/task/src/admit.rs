//! Admission: what of a request is refused, before anything is written.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};
use slotmesh_proto::instance::v1 as api;
use slotmesh_topology::{
    Architecture, Mode, NodeRole, Shard,
    instance::{NAME_LENGTH_MAX, PROXIES_MAX, REPLICAS_MAX, SHARDS_MAX, WORKERS_MAX},
    parameter::{self, ParameterError},
    wire,
};

use crate::spec::{Phase, ShardSwitch};

mod change;

pub use change::{account_refusal, parameter_changes, parameter_refusal};

/// Most shards of one switchover; with it, one transaction stays below etcd's default limit.
pub const SWITCHOVER_SHARDS_MAX: usize = 50;
/// Longest client token.
pub const CLIENT_TOKEN_LENGTH_MAX: usize = 127;

/// A refusal: what the caller does next decides the kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Kind.
    pub kind: RefusalKind,
    /// A stable word for programs.
    pub reason: &'static str,
    /// For people: what is wrong and what to do.
    pub message: String,
}

/// Kinds of refusal, as gRPC codes see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// The request can't ever be right.
    Invalid,
    /// It names something that does not exist.
    NotFound,
    /// It does not fit the present state.
    Precondition,
    /// Another operation has the shard now: try again later.
    Conflict,
    /// The token was used for another request.
    AlreadyExists,
    /// Those who would have to take part do not answer: try again later.
    Unavailable,
}

pub(crate) fn refuse<T>(
    kind: RefusalKind,
    reason: &'static str,
    message: impl Into<String>,
) -> Result<T, Refusal> {
    Err(Refusal {
        kind,
        reason,
        message: message.into(),
    })
}

/// Checks a client token.
///
/// # Errors
/// When it is too long or has a character outside ASCII.
pub fn client_token(token: &str) -> Result<(), Refusal> {
    if token.len() > CLIENT_TOKEN_LENGTH_MAX || !token.is_ascii() {
        return refuse(
            RefusalKind::Invalid,
            "CLIENT_TOKEN_INVALID",
            format!("client_token has at most {CLIENT_TOKEN_LENGTH_MAX} ASCII characters"),
        );
    }
    if token.bytes().any(|b| b.is_ascii_control()) {
        return refuse(
            RefusalKind::Invalid,
            "CLIENT_TOKEN_INVALID",
            "client_token has a control character",
        );
    }
    Ok(())
}

/// Fingerprint of a request for its idempotency record.
#[must_use]
pub fn fingerprint(method: &str, body: &[u8]) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(method.as_bytes());
    hash.update([0]);
    hash.update(body);
    hash.finalize().to_vec()
}

/// The nodes that a switchover names: the list wins over the single field.
///
/// # Errors
/// When none is named, too many are, or one is named twice.
pub fn switchover_targets(request: &api::SwitchOverRequest) -> Result<Vec<&str>, Refusal> {
    let targets: Vec<&str> = if request.target_primary_node_ids.is_empty() {
        Some(request.target_primary_node_id.as_str())
            .filter(|t| !t.is_empty())
            .into_iter()
            .collect()
    } else {
        request
            .target_primary_node_ids
            .iter()
            .map(String::as_str)
            .collect()
    };
    if targets.is_empty() || targets.iter().any(|t| t.is_empty()) {
        return refuse(
            RefusalKind::Invalid,
            "TARGET_MISSING",
            "name the next primaries in target_primary_node_ids or target_primary_node_id",
        );
    }
    if targets.len() > SWITCHOVER_SHARDS_MAX {
        return refuse(
            RefusalKind::Invalid,
            "TOO_MANY_TARGETS",
            format!("at most {SWITCHOVER_SHARDS_MAX} shards are switched by one request"),
        );
    }
    let distinct: BTreeSet<_> = targets.iter().collect();
    if distinct.len() != targets.len() {
        return refuse(
            RefusalKind::Invalid,
            "TARGET_TWICE",
            "a node is named twice",
        );
    }
    Ok(targets)
}

/// What a switchover would do, shard by shard.
///
/// # Errors
/// When a node is unknown, is no replica, shares its shard with another target, or its shard is
/// not serving.
pub fn switchover(
    shards: &[Shard],
    targets: &[&str],
    now_ms: u64,
) -> Result<Vec<ShardSwitch>, Refusal> {
    if shards.iter().all(|s| s.members.len() < 2) {
        return refuse(
            RefusalKind::Precondition,
            "NO_REPLICA",
            "the instance has no replica; only instances with replicas can switch over",
        );
    }
    let mut switches: Vec<ShardSwitch> = Vec::with_capacity(targets.len());
    for target in targets {
        let found = shards.iter().find_map(|s| {
            s.members
                .iter()
                .find(|m| m.node.as_str() == *target)
                .map(|m| (s, m))
        });
        let Some((shard, member)) = found else {
            return refuse(
                RefusalKind::NotFound,
                "NODE_NOT_FOUND",
                format!("node {target} is not of this instance; DescribeInstanceShards lists them"),
            );
        };
        if member.role != NodeRole::Replica {
            return refuse(
                RefusalKind::Precondition,
                "NODE_NOT_REPLICA",
                format!("node {target} is not a replica of its shard"),
            );
        }
        if member.priority == 0 {
            return refuse(
                RefusalKind::Precondition,
                "NODE_NEVER_PROMOTED",
                format!(
                    "node {target} has priority 0, so it is never promoted; give it another one \
                     first (slotmesh node priority)"
                ),
            );
        }
        if switches.iter().any(|s| s.shard == shard.id) {
            return refuse(
                RefusalKind::Invalid,
                "ONE_NODE_PER_SHARD",
                format!("two nodes of shard {} are named; name one", shard.id),
            );
        }
        if shard.mode != Mode::Serving {
            return refuse(
                RefusalKind::Conflict,
                "SHARD_BUSY",
                format!(
                    "shard {} is {}; try again when it serves",
                    shard.id,
                    shard.mode.name()
                ),
            );
        }
        switches.push(ShardSwitch {
            shard: shard.id.clone(),
            from: shard.primary.clone(),
            to: member.node.clone(),
            from_epoch: shard.epoch,
            phase: Phase::Preflight,
            phase_since_ms: now_ms,
            message: String::new(),
            hold_us: 0,
            critical_us: 0,
        });
    }
    Ok(switches)
}

/// A CreateInstance request with its defaults filled in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewInstance {
    /// How keys are spread.
    pub architecture: Architecture,
    /// At least 1.
    pub shards: u32,
    /// Of each shard.
    pub replicas: u32,
    /// At least 1.
    pub proxies: u32,
    /// Of each proxy; at least 1.
    pub workers: u32,
    /// SHA-256 of the password, empty without one.
    pub password_sha256: Vec<u8>,
}

/// Checks a CreateInstance request and fills in its defaults.
///
/// # Errors
/// When a value is out of its range.
pub fn create(request: &api::CreateInstanceRequest) -> Result<NewInstance, Refusal> {
    let invalid = |reason, message: String| refuse(RefusalKind::Invalid, reason, message);
    let name_ok = request.name.len() <= NAME_LENGTH_MAX
        && request
            .name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if !name_ok {
        return invalid(
            "NAME_INVALID",
            format!("name has at most {NAME_LENGTH_MAX} characters of A-Z a-z 0-9 . _ -"),
        );
    }
    let architecture =
        wire::architecture_from(request.architecture()).unwrap_or(Architecture::Cluster);
    let default_shards = if architecture == Architecture::Standard {
        1
    } else {
        2
    };
    let shards = if request.shard_count == 0 {
        default_shards
    } else {
        request.shard_count
    };
    if shards > SHARDS_MAX {
        return invalid(
            "SHARD_COUNT_INVALID",
            format!("shard_count is 1 to {SHARDS_MAX}"),
        );
    }
    if architecture == Architecture::Standard && shards != 1 {
        return invalid(
            "SHARD_COUNT_INVALID",
            "a standard instance has one shard; ask for a cluster".into(),
        );
    }
    let replicas = request.replicas_per_shard.unwrap_or(1);
    if replicas > REPLICAS_MAX {
        return invalid(
            "REPLICAS_INVALID",
            format!("replicas_per_shard is 0 to {REPLICAS_MAX}"),
        );
    }
    let proxies = request.proxy_count.unwrap_or(2);
    if proxies == 0 || proxies > PROXIES_MAX {
        return invalid(
            "PROXY_COUNT_INVALID",
            format!("proxy_count is 1 to {PROXIES_MAX}"),
        );
    }
    let workers = request.workers_per_proxy.max(1);
    if workers > WORKERS_MAX {
        return invalid(
            "WORKERS_INVALID",
            format!("workers_per_proxy is 1 to {WORKERS_MAX}"),
        );
    }
    if request.parameters.len() > parameter::ENGINE_MAX {
        return Err(parameter_refusal(&ParameterError::TooMany));
    }
    for (name, value) in &request.parameters {
        parameter::check_new(name, value).map_err(|error| parameter_refusal(&error))?;
    }
    let password_sha256 = if request.password.is_empty() {
        Vec::new()
    } else {
        Sha256::digest(request.password.as_bytes()).to_vec()
    };
    Ok(NewInstance {
        architecture,
        shards,
        replicas,
        proxies,
        workers,
        password_sha256,
    })
}

#[cfg(test)]
mod tests {
    use slotmesh_topology::{Epoch, Member, slot::split_evenly};

    use super::*;

    fn shards() -> Vec<Shard> {
        split_evenly(2)
            .into_iter()
            .enumerate()
            .map(|(i, range)| Shard {
                instance: "r".into(),
                id: i.to_string().into(),
                index: u32::try_from(i).unwrap(),
                slots: vec![range],
                epoch: Epoch(1),
                primary: format!("{i}-0").into(),
                members: [
                    (0, NodeRole::Primary),
                    (1, NodeRole::Replica),
                    (2, NodeRole::Replica),
                ]
                .map(|(n, role)| Member {
                    node: format!("{i}-{n}").into(),
                    host: "h".into(),
                    role,
                    run_id: "x".into(),
                    address: "a:1".into(),
                    in_sync: true,
                    priority: slotmesh_topology::PRIORITY,
                    leaving: false,
                    engine: String::new(),
                    exchange: None,
                })
                .into(),
                mode: Mode::Serving,
                closed_epoch: Epoch(0),
                departures: Vec::new(),
                roster: Default::default(),
            })
            .collect()
    }

    fn reason(targets: &[&str]) -> &'static str {
        switchover(&shards(), targets, 0).unwrap_err().reason
    }

    #[test]
    fn switchover_rules() {
        assert_eq!(reason(&["9-9"]), "NODE_NOT_FOUND");
        assert_eq!(reason(&["0-0"]), "NODE_NOT_REPLICA");
        assert_eq!(reason(&["0-1", "0-2"]), "ONE_NODE_PER_SHARD");
        let switches = switchover(&shards(), &["0-1", "1-2"], 7).unwrap();
        assert_eq!(switches.len(), 2);
        assert_eq!(
            (switches[1].from.as_str(), switches[1].to.as_str()),
            ("1-0", "1-2")
        );
        let mut alone = shards();
        alone.iter_mut().for_each(|s| s.members.truncate(1));
        assert_eq!(
            switchover(&alone, &["0-0"], 0).unwrap_err().reason,
            "NO_REPLICA"
        );
        let mut busy = shards();
        busy[0].mode = Mode::Provisioning;
        assert_eq!(
            switchover(&busy, &["0-1"], 0).unwrap_err().reason,
            "SHARD_BUSY"
        );
    }

    #[test]
    fn the_list_of_targets_wins_and_is_bounded() {
        let request = |ids: &[&str], id: &str| api::SwitchOverRequest {
            target_primary_node_ids: ids.iter().map(|s| (*s).to_owned()).collect(),
            target_primary_node_id: id.to_owned(),
            ..Default::default()
        };
        assert_eq!(switchover_targets(&request(&["a"], "b")).unwrap(), ["a"]);
        assert_eq!(switchover_targets(&request(&[], "b")).unwrap(), ["b"]);
        let many: Vec<String> = (0..51).map(|i| i.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for (ids, id, reason) in [
            (&[][..], "", "TARGET_MISSING"),
            (&["a", ""][..], "", "TARGET_MISSING"),
            (&["a", "a"][..], "", "TARGET_TWICE"),
            (&many[..], "", "TOO_MANY_TARGETS"),
        ] {
            assert_eq!(
                switchover_targets(&request(ids, id)).unwrap_err().reason,
                reason
            );
        }
        assert_eq!(
            switchover_targets(&request(&many[..50], "")).unwrap().len(),
            50
        );
    }

    #[test]
    fn tokens_are_bounded_ascii() {
        assert!(client_token(&"x".repeat(127)).is_ok());
        assert!(client_token("").is_ok());
        assert!(client_token(&"x".repeat(128)).is_err());
        assert!(client_token("ü").is_err());
        assert_ne!(fingerprint("a", b"x"), fingerprint("b", b"x"));
    }

    #[test]
    fn create_fills_defaults_and_refuses_what_is_out_of_range() {
        let defaults = create(&api::CreateInstanceRequest::default()).unwrap();
        assert_eq!(
            (defaults.shards, defaults.replicas, defaults.proxies),
            (2, 1, 2)
        );
        let mut parameters = std::collections::HashMap::new();
        parameters.insert("maxmemory".to_owned(), "1gb\nuser x on".to_owned());
        let reserved = [("AppendOnly".to_owned(), "no".to_owned())].into();
        let bad = [
            api::CreateInstanceRequest {
                name: "a b".into(),
                ..Default::default()
            },
            api::CreateInstanceRequest {
                shard_count: 257,
                ..Default::default()
            },
            api::CreateInstanceRequest {
                replicas_per_shard: Some(6),
                ..Default::default()
            },
            api::CreateInstanceRequest {
                proxy_count: Some(0),
                ..Default::default()
            },
            api::CreateInstanceRequest {
                architecture: 1,
                shard_count: 2,
                ..Default::default()
            },
            api::CreateInstanceRequest {
                parameters,
                ..Default::default()
            },
            api::CreateInstanceRequest {
                parameters: reserved,
                ..Default::default()
            },
        ];
        for request in bad {
            assert_eq!(
                create(&request).unwrap_err().kind,
                RefusalKind::Invalid,
                "{request:?}"
            );
        }
    }
}
