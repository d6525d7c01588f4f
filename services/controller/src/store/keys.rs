//! Where each record is in the store, and how it is written there.
//!
//! Invariant: every key of ours is below [`ROOT`], is made by [`Key`]'s `Display` and read back by
//! [`Key::parse`]; every value is a record that says its schema. Formats are in
//! `proto/slotmesh/store/v1`.

use std::fmt;

use prost::Message;
use slotmesh_proto::store::v1 as records;

use super::{KeyValue, StoreError};

/// One etcd may serve others too; everything of ours is below this.
pub const ROOT: &str = "/slotmesh/";
pub const INSTANCES: &str = "/slotmesh/instance/";
pub const SHARDS: &str = "/slotmesh/shard/";
pub const CONTROLLERS: &str = "/slotmesh/controller/";
pub const HOSTS: &str = "/slotmesh/host/";
pub const PROXIES: &str = "/slotmesh/proxy/";
pub const LOCKS: &str = "/slotmesh/lock/";
/// Tasks and their events: one listing of all tasks passes over the events of all.
pub const TASKS: &str = "/slotmesh/task/";
pub const IDEMPOTENCY: &str = "/slotmesh/idem/";
/// Which node was the primary of which epoch; never changed by anything but a failover's end.
pub const AUDIT: &str = "/slotmesh/audit/";
/// Files with what lost primaries wrote beyond their successors.
pub const LOST: &str = "/slotmesh/lost/";

/// Programs that hosts may run.
pub const ARTIFACTS: &str = "/slotmesh/artifact/";

/// Ids are parts of keys, so they are short and hold no separator.
pub const MAX_ID_BYTES: usize = 100;

/// Schema of every record this build writes, and the newest that it reads.
pub const RECORD_SCHEMA: u32 = 1;

/// The key of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key<'a> {
    Meta,
    Leader,
    Controller {
        controller: &'a str,
    },
    Instance {
        instance: &'a str,
    },
    Shard {
        instance: &'a str,
        shard: &'a str,
    },
    Host {
        host: &'a str,
    },
    Proxy {
        proxy: &'a str,
    },
    Lock {
        instance: &'a str,
        shard: &'a str,
    },
    Idempotency {
        token: &'a str,
    },
    Task {
        task: &'a str,
    },
    TaskEvent {
        task: &'a str,
        number: u64,
    },
    Audit {
        instance: &'a str,
        shard: &'a str,
        epoch: u64,
    },
    Lost {
        instance: &'a str,
        shard: &'a str,
        epoch: u64,
        node: &'a str,
    },
    Artifact {
        name: &'a str,
    },
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Meta => write!(f, "{ROOT}meta"),
            Self::Leader => write!(f, "{ROOT}ctl/leader"),
            Self::Controller { controller } => write!(f, "{CONTROLLERS}{}", id(controller)),
            Self::Instance { instance } => write!(f, "{INSTANCES}{}", id(instance)),
            Self::Shard { instance, shard } => {
                write!(f, "{SHARDS}{}/{}", id(instance), id(shard))
            }
            Self::Host { host } => write!(f, "{HOSTS}{}", id(host)),
            Self::Proxy { proxy } => write!(f, "{PROXIES}{}", id(proxy)),
            Self::Lock { instance, shard } => write!(f, "{LOCKS}{}/{}", id(instance), id(shard)),
            Self::Idempotency { token } => write!(f, "{IDEMPOTENCY}{}", id(token)),
            Self::Task { task } => write!(f, "{TASKS}{}", id(task)),
            // Padded, so that events list in the order in which they were written.
            Self::TaskEvent { task, number } => write!(f, "{TASKS}{}/ev/{number:010}", id(task)),
            // Padded, as above.
            Self::Audit {
                instance,
                shard,
                epoch,
            } => write!(f, "{AUDIT}{}/{}/{epoch:010}", id(instance), id(shard)),
            Self::Lost {
                instance,
                shard,
                epoch,
                node,
            } => {
                let shard = format!("{}/{}", id(instance), id(shard));
                write!(f, "{LOST}{shard}/{epoch:010}/{}", id(node))
            }
            Self::Artifact { name } => write!(f, "{ARTIFACTS}{}", id(name)),
        }
    }
}

impl From<Key<'_>> for String {
    fn from(key: Key<'_>) -> Self {
        key.to_string()
    }
}

impl<'a> Key<'a> {
    /// None for a key that is not ours or that a newer build has added: pass it over.
    pub fn parse(key: &'a str) -> Option<Self> {
        let parts: Vec<&str> = key.strip_prefix(ROOT)?.split('/').collect();
        let parsed = match parts[..] {
            ["meta"] => Self::Meta,
            ["ctl", "leader"] => Self::Leader,
            ["controller", controller] => Self::Controller { controller },
            ["instance", instance] => Self::Instance { instance },
            ["shard", instance, shard] => Self::Shard { instance, shard },
            ["host", host] => Self::Host { host },
            ["proxy", proxy] => Self::Proxy { proxy },
            ["lock", instance, shard] => Self::Lock { instance, shard },
            ["idem", token] => Self::Idempotency { token },
            ["task", task] => Self::Task { task },
            ["task", task, "ev", number] => Self::TaskEvent {
                task,
                number: number.parse().ok()?,
            },
            ["audit", instance, shard, epoch] => Self::Audit {
                instance,
                shard,
                epoch: epoch.parse().ok()?,
            },
            ["artifact", name] => Self::Artifact { name },
            ["lost", instance, shard, epoch, node] => Self::Lost {
                instance,
                shard,
                epoch: epoch.parse().ok()?,
                node,
            },
            _ => return None,
        };
        parts.iter().all(|part| valid_id(part)).then_some(parsed)
    }
}

/// Prefix of the shards of one instance.
pub fn shards_of(instance: &str) -> String {
    format!("{SHARDS}{}/", id(instance))
}

/// Prefix of the locks on shards of one instance.
pub fn locks_of(instance: &str) -> String {
    format!("{LOCKS}{}/", id(instance))
}

/// Prefix of one task's events.
pub fn events_of(task: &str) -> String {
    format!("{TASKS}{}/ev/", id(task))
}

/// Prefix of the epochs of every shard of one instance.
pub fn epochs_of(instance: &str) -> String {
    format!("{AUDIT}{}/", id(instance))
}

/// Prefix of the files of one instance.
pub fn lost_of(instance: &str) -> String {
    format!("{LOST}{}/", id(instance))
}

/// Whether this may be part of a key. Ids from outside are checked with it where they come in.
pub fn valid_id(id: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
    !id.is_empty() && id.len() <= MAX_ID_BYTES && id.bytes().all(allowed)
}

fn id(id: &str) -> &str {
    assert!(
        valid_id(id),
        "ids are checked where they come in, this one was not: {id:?}"
    );
    id
}

/// A message that is kept in the store.
pub trait Record: Message + Default {
    const NAME: &'static str;
    fn schema(&self) -> u32;
    fn set_schema(&mut self, schema: u32);
}

/// The value to put: the record with this build's schema.
pub fn encode<R: Record>(mut record: R) -> Vec<u8> {
    record.set_schema(RECORD_SCHEMA);
    record.encode_to_vec()
}

/// Reads a record back. One of a newer schema is refused: writing it again would lose its fields.
pub fn decode<R: Record>(item: &KeyValue) -> Result<R, StoreError> {
    let corrupt = |reason: &str, source| StoreError::Corrupt {
        reason: format!("{} at {}: {reason}", R::NAME, item.key),
        source,
    };
    let record = R::decode(&item.value[..])
        .map_err(|error| corrupt("not a record", Some(Box::new(error))))?;
    match record.schema() {
        0 => Err(corrupt("it does not say its schema", None)),
        found if found > RECORD_SCHEMA => Err(StoreError::NewerSchema {
            what: format!("{} at {}", R::NAME, item.key),
            found,
            known: RECORD_SCHEMA,
        }),
        _ => Ok(record),
    }
}

macro_rules! records {
    ($($name:ident),* $(,)?) => {
        $(impl Record for records::$name {
            const NAME: &'static str = stringify!($name);

            fn schema(&self) -> u32 {
                self.schema
            }

            fn set_schema(&mut self, schema: u32) {
                self.schema = schema;
            }
        })*
    };
}

records!(
    Meta,
    LeaderRecord,
    ControllerRecord,
    InstanceRecord,
    ShardRecord,
    HostRecord,
    ProxyRecord,
    LockRecord,
    IdempotencyRecord,
    TaskRecord,
    TaskEventRecord,
    EpochRecord,
    LostWritesRecord,
    ArtifactRecord,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_below_the_root_and_reads_back() {
        let keys = [
            Key::Meta,
            Key::Leader,
            Key::Controller { controller: "c-1" },
            Key::Instance { instance: "i-1" },
            Key::Shard {
                instance: "i-1",
                shard: "s-0",
            },
            Key::Host { host: "h1" },
            Key::Proxy { proxy: "p.1" },
            Key::Lock {
                instance: "i-1",
                shard: "s-0",
            },
            Key::Idempotency { token: "a_b" },
            Key::Task { task: "t-1" },
            Key::TaskEvent {
                task: "t-1",
                number: 12,
            },
            Key::Audit {
                instance: "i-1",
                shard: "s-0",
                epoch: 7,
            },
            Key::Lost {
                instance: "i-1",
                shard: "s-0",
                epoch: 7,
                node: "n-2",
            },
        ];
        for key in keys {
            let text = key.to_string();
            assert!(text.starts_with(ROOT), "{text}");
            assert_eq!(Key::parse(&text), Some(key));
        }
        assert_eq!(Key::parse("/slotmesh/shard/i-1"), None);
        assert_eq!(Key::parse("/slotmesh/shard//s"), None);
        assert_eq!(Key::parse("/other/meta"), None);
    }

    #[test]
    fn prefixes_of_one_instance_do_not_reach_into_another() {
        let other = Key::Shard {
            instance: "i-10",
            shard: "s",
        }
        .to_string();
        assert!(!other.starts_with(&shards_of("i-1")));
        let own = Key::Shard {
            instance: "i-1",
            shard: "s",
        }
        .to_string();
        assert!(own.starts_with(&shards_of("i-1")));
        assert!(
            Key::TaskEvent {
                task: "t",
                number: 1
            }
            .to_string()
            .starts_with(&events_of("t"))
        );
    }

    #[test]
    fn events_list_in_the_order_of_their_numbers() {
        let key = |number| Key::TaskEvent { task: "t", number }.to_string();
        assert!(key(9) < key(10) && key(99) < key(1000));
    }

    #[test]
    #[should_panic(expected = "ids are checked where they come in")]
    fn an_id_with_a_separator_never_becomes_a_key() {
        let _ = Key::Host { host: "a/../b" }.to_string();
    }

    #[test]
    fn a_record_of_a_newer_schema_is_refused_with_what_to_do() {
        let item = |schema| KeyValue {
            key: "/slotmesh/lock/i/s".into(),
            value: records::LockRecord {
                schema,
                task_id: "t".into(),
            }
            .encode_to_vec(),
            mod_revision: 1,
            create_revision: 1,
        };
        assert_eq!(
            decode::<records::LockRecord>(&item(1)).unwrap().task_id,
            "t"
        );
        let newer = decode::<records::LockRecord>(&item(2)).unwrap_err();
        assert!(
            newer
                .to_string()
                .contains("LockRecord at /slotmesh/lock/i/s has schema 2")
        );
        let none = decode::<records::LockRecord>(&item(0)).unwrap_err();
        assert!(matches!(none, StoreError::Corrupt { .. }));
    }
}
