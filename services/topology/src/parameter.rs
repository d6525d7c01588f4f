//! Parameters of engines and of proxies: which there are, who may set them, and their ranges.
//!
//! **Invariant:** a parameter on which fencing, addresses or files of the mesh depend is never a
//! user's. What an engine's other parameters mean is the engine's to say.

use std::collections::BTreeMap;

/// Most engine parameters of an instance, and of a request that creates one: more than engines have.
pub const ENGINE_MAX: usize = 512;
/// Most parameters of a request that changes them.
pub const CHANGES_MAX: usize = 512;
/// Longest name.
pub const NAME_LENGTH_MAX: usize = 64;
/// Longest value.
pub const VALUE_BYTES_MAX: usize = 1024;

/// The mesh's own engine parameters. `primary…` and `slave…` are other engines' and older words.
const RESERVED: &[&str] = &[
    "aclfile",
    "appenddirname",
    "appendfilename",
    "appendonly",
    "bind",
    "daemonize",
    "databases",
    "dbfilename",
    "dir",
    "include",
    "loadmodule",
    "logfile",
    "masterauth",
    "masteruser",
    "pidfile",
    "port",
    "primaryauth",
    "primaryuser",
    "protected-mode",
    "rename-command",
    "replicaof",
    "requirepass",
    "slaveof",
    "supervised",
    "unixsocket",
    "unixsocketperm",
    "user",
];

/// Beginnings of names that are the mesh's own too.
const RESERVED_PREFIXES: &[&str] = &[
    "cluster-",
    "min-replicas-",
    "min-slaves-",
    "replica-announce-",
    "slave-announce-",
    "tls-",
];

/// What an engine takes only when it starts, and since when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BootOnly {
    /// Name.
    pub name: &'static str,
    /// Its values.
    pub values: Values,
    /// Unknown before version 7.0, where what it permits needs no permission.
    pub since_7_0: bool,
}

/// Settable only when an instance is created. A value that an engine refuses at start would keep
/// all its nodes from starting, so values are checked here.
pub const BOOT_ONLY: &[BootOnly] = &[
    boot_only("enable-debug-command", PERMISSION, true),
    boot_only("enable-module-command", PERMISSION, true),
    boot_only("enable-protected-configs", PERMISSION, true),
    boot_only("io-threads", Values::Number { min: 1, max: 128 }, false),
    boot_only(
        "tcp-backlog",
        Values::Number {
            min: 1,
            max: 65_535,
        },
        false,
    ),
];

const PERMISSION: Values = Values::OneOf(&["no", "yes", "local"]);

const fn boot_only(name: &'static str, values: Values, since_7_0: bool) -> BootOnly {
    BootOnly {
        name,
        values,
        since_7_0,
    }
}

/// Which values a parameter has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Values {
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A whole number, both ends included.
    Number {
        /// Least.
        min: u64,
        /// Greatest.
        max: u64,
    },
    /// `hard soft seconds`: bytes, bytes, seconds; 0 is no limit.
    BufferLimit,
}

impl Values {
    /// Whether it is one of them.
    #[must_use]
    pub fn hold(self, value: &str) -> bool {
        match self {
            Self::OneOf(words) => words.contains(&value),
            Self::Number { min, max } => number(value).is_some_and(|n| (min..=max).contains(&n)),
            Self::BufferLimit => {
                let words: Vec<_> = value.split(' ').collect();
                words.len() == 3 && words.iter().all(|word| number(word).is_some())
            }
        }
    }
}

impl std::fmt::Display for Values {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OneOf(words) => write!(f, "one of {}", words.join(", ")),
            Self::Number { min, max } => write!(f, "{min} to {max}"),
            Self::BufferLimit => f.write_str("\"hard soft seconds\", in bytes and seconds"),
        }
    }
}

/// Digits only: no sign, no blank.
fn number(text: &str) -> Option<u64> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
}

/// A parameter of proxies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProxyParameter {
    /// Name.
    pub name: &'static str,
    /// Without being set.
    pub default: &'static str,
    /// What it may be.
    pub values: Values,
    /// What it does.
    pub about: &'static str,
}

/// Every parameter of proxies.
pub const PROXY: &[ProxyParameter] = &[
    ProxyParameter {
        name: "client_output_buffer_limit_pubsub",
        default: "33554432 8388608 60",
        values: Values::BufferLimit,
        about: "unread messages of a subscriber before it is closed",
    },
    ProxyParameter {
        name: "cluster_compat_enable",
        default: "1",
        values: SWITCH,
        about: "CLUSTER commands answer as one node that has all slots",
    },
    ProxyParameter {
        name: "durability_fsync",
        default: "no",
        values: YES_NO,
        about: "durable writes are on the disks of the primary and the replicas that confirm them",
    },
    ProxyParameter {
        name: "durability_timeout_ms",
        default: "1000",
        values: Values::Number {
            min: 10,
            max: 5_000,
        },
        about: "how long a durable write waits for its replicas, in milliseconds",
    },
    ProxyParameter {
        name: HOLD_BUDGET,
        default: "5000",
        values: Values::Number {
            min: 100,
            max: 60_000,
        },
        about: "longest time that a request waits for a shard, in milliseconds",
    },
    ProxyParameter {
        name: "job_bytes_max",
        default: "268435456",
        values: Values::Number {
            min: 1 << 20,
            max: 4 << 30,
        },
        about: "memory of one command that the proxy computes itself",
    },
    ProxyParameter {
        name: "max_session_processing",
        default: "1024",
        values: Values::Number {
            min: 10,
            max: 10_000_000,
        },
        about: "requests of one client under way before it is not read for a while",
    },
    ProxyParameter {
        name: "maxclients",
        default: "10000",
        values: Values::Number {
            min: 1,
            max: 1_000_000,
        },
        about: "clients of one proxy",
    },
    ProxyParameter {
        name: "private_connections_max",
        default: "512",
        values: Values::Number {
            min: 1,
            max: 10_000,
        },
        about: "connections for blocked clients and transactions, to one node from one worker",
    },
    ProxyParameter {
        name: "read_gate",
        default: "no",
        values: YES_NO,
        about: "in durable mode reads wait, too, until replicas have what they may have seen",
    },
    ProxyParameter {
        name: "rt_threshold_ms",
        default: "500",
        values: Values::Number {
            min: 30,
            max: 2_000,
        },
        about: "a slower command is a slow one, in milliseconds",
    },
    ProxyParameter {
        name: "script_check_enable",
        default: "0",
        values: SWITCH,
        about: "refuse scripts that take keys from anywhere but KEYS",
    },
    ProxyParameter {
        name: "split",
        default: "shard",
        values: Values::OneOf(&["shard", "slot"]),
        about: "parts of a command with several keys: one a shard, or one a slot",
    },
    ProxyParameter {
        name: "timeout",
        default: "0",
        values: Values::Number {
            min: 0,
            max: 100_000,
        },
        about: "idle seconds before a client is closed; 0: never",
    },
];

const YES_NO: Values = Values::OneOf(&["no", "yes"]);
const SWITCH: Values = Values::OneOf(&["0", "1"]);
const HOLD_BUDGET: &str = "hold_budget_ms";

/// Why a parameter is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// Not a name, or a value that could start another line of a configuration.
    #[error("a parameter's name or value is malformed")]
    Malformed,
    /// Too many at once or in all.
    #[error("at most {CHANGES_MAX} parameters in a request and {ENGINE_MAX} of an instance")]
    TooMany,
    /// On which the mesh depends.
    #[error("parameter {0} is set by slotmesh")]
    Reserved(String),
    /// Settable only at creation.
    #[error("parameter {0} can only be given when the instance is created")]
    BootOnly(String),
    /// Not in the table.
    #[error("there is no proxy parameter {name}; there are {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// Outside of its range.
    #[error("parameter {name} is {values}")]
    Value {
        /// Which.
        name: &'static str,
        /// What it may be.
        values: Values,
    },
}

/// The name as it is kept: engines take names in any case.
#[must_use]
pub fn engine_name(name: &str) -> String {
    name.to_ascii_lowercase()
}

/// Whether the engine parameter is the mesh's own. `name` as [`engine_name`] gives it.
#[must_use]
pub fn is_reserved(name: &str) -> bool {
    RESERVED.contains(&name) || RESERVED_PREFIXES.iter().any(|p| name.starts_with(p))
}

/// What an engine takes only when it starts, if `name` is one of these.
#[must_use]
pub fn boot_only_of(name: &str) -> Option<&'static BootOnly> {
    BOOT_ONLY.iter().find(|p| p.name == name)
}

/// Checks an engine parameter of a new instance.
///
/// # Errors
/// When it is malformed, the mesh's own, or would keep a node from starting.
pub fn check_new(name: &str, value: &str) -> Result<(), ParameterError> {
    let name = well_formed(name, value)?;
    match boot_only_of(&name) {
        Some(known) if !known.values.hold(value) => Err(ParameterError::Value {
            name: known.name,
            values: known.values,
        }),
        _ => Ok(()),
    }
}

/// Checks an engine parameter that is to be set while nodes run.
///
/// # Errors
/// When it is malformed, the mesh's own, or settable only at creation.
pub fn check_change(name: &str, value: &str) -> Result<(), ParameterError> {
    let name = well_formed(name, value)?;
    if boot_only_of(&name).is_some() {
        return Err(ParameterError::BootOnly(name));
    }
    Ok(())
}

fn well_formed(name: &str, value: &str) -> Result<String, ParameterError> {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let name_ok = (1..=NAME_LENGTH_MAX).contains(&name.len()) && name.bytes().all(is_word);
    // They may end up in a configuration file: nothing may start a line of its own there.
    let value_ok = value.len() <= VALUE_BYTES_MAX && !value.bytes().any(|b| b.is_ascii_control());
    if !name_ok || !value_ok {
        return Err(ParameterError::Malformed);
    }
    let name = engine_name(name);
    if is_reserved(&name) {
        return Err(ParameterError::Reserved(name));
    }
    Ok(name)
}

/// Checks a parameter of proxies; an empty value stands for the default.
///
/// # Errors
/// When there is none of that name, or the value is outside of its range.
pub fn check_proxy(name: &str, value: &str) -> Result<(), ParameterError> {
    let Some(known) = PROXY.iter().find(|p| p.name == name) else {
        let known: Vec<_> = PROXY.iter().map(|p| p.name).collect();
        return Err(ParameterError::Unknown {
            name: name.chars().take(NAME_LENGTH_MAX).collect(),
            known: known.join(", "),
        });
    };
    if value.is_empty() || known.values.hold(value) {
        return Ok(());
    }
    Err(ParameterError::Value {
        name: known.name,
        values: known.values,
    })
}

/// The value of a parameter of proxies: as set, or its default.
#[must_use]
pub fn proxy_value<'a>(set: &'a BTreeMap<String, String>, known: &ProxyParameter) -> &'a str {
    set.get(known.name).map_or(known.default, String::as_str)
}

/// Longest time that a proxy holds a request before it answers with an error.
#[must_use]
pub fn hold_budget_ms(set: &BTreeMap<String, String>) -> u64 {
    let text = set.get(HOLD_BUDGET);
    text.and_then(|t| number(t))
        .unwrap_or(crate::route::HOLD_BUDGET_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_mesh_depends_on_is_nobody_elses() {
        for name in [
            "replicaof",
            "MasterAuth",
            "port",
            "cluster-enabled",
            "tls-port",
            "replica-announce-ip",
            "min-replicas-to-write",
            "databases",
            "user",
            "loadmodule",
        ] {
            let reserved = Err(ParameterError::Reserved(name.to_ascii_lowercase()));
            assert_eq!(check_change(name, "1"), reserved, "{name}");
            assert_eq!(check_new(name, "1"), reserved, "{name}");
        }
        for name in ["maxmemory", "save", "hz", "notify-keyspace-events"] {
            assert_eq!(check_change(name, ""), Ok(()), "{name}");
        }
        assert_eq!(
            check_change("hz", "1\nuser x on"),
            Err(ParameterError::Malformed)
        );
        assert_eq!(check_change("h z", "1"), Err(ParameterError::Malformed));
    }

    #[test]
    fn permissions_are_given_at_creation_only_and_with_a_value_that_starts() {
        assert_eq!(check_new("enable-debug-command", "yes"), Ok(()));
        assert!(check_new("enable-debug-command", "maybe").is_err());
        assert_eq!(
            check_change("Enable-Debug-Command", "yes"),
            Err(ParameterError::BootOnly("enable-debug-command".into()))
        );
    }

    #[test]
    fn parameters_of_proxies_have_ranges_that_hold_their_defaults() {
        for known in PROXY {
            assert_eq!(check_proxy(known.name, known.default), Ok(()), "{known:?}");
            assert_eq!(check_proxy(known.name, ""), Ok(()));
            assert!(check_proxy(known.name, "-1").is_err(), "{known:?}");
            assert!(check_proxy(known.name, "1 2").is_err(), "{known:?}");
        }
        for (name, value) in [
            ("split", "key"),
            ("hold_budget_ms", "99"),
            ("hold_budget_ms", "60001"),
            ("timeout", "+5"),
            ("job_bytes_max", "1048575"),
            ("client_output_buffer_limit_pubsub", "1 2 3 4"),
        ] {
            let refused = check_proxy(name, value).unwrap_err().to_string();
            assert!(refused.contains(name), "{refused}");
        }
        let unknown = check_proxy("speed", "1").unwrap_err().to_string();
        assert!(unknown.contains("rt_threshold_ms"), "{unknown}");
    }

    #[test]
    fn the_hold_budget_is_as_set_or_the_default() {
        let mut set = BTreeMap::new();
        assert_eq!(hold_budget_ms(&set), crate::route::HOLD_BUDGET_MS);
        set.insert(HOLD_BUDGET.to_owned(), "700".to_owned());
        assert_eq!(hold_budget_ms(&set), 700);
    }
}
