//! The topology as this process knows it: messages of the stream in, routing tables out.
//!
//! Invariants: a message is taken whole or not at all; a shard's epoch never falls, not even after
//! the shard was removed; a shard's number never changes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use slotmesh_acl::Users;
use slotmesh_command::Release;
use slotmesh_proto::topology::v1 as pb;
use slotmesh_topology::{artifact, compatibility};

use crate::core::hold::HoldOrder;
use crate::routing::{InstanceSettings, Login, Parameters, RoutingTable, ShardNo, ShardRoute};

/// Most shards of an instance: as many as there are slots would be, and numbers fit.
const SHARDS_MAX: usize = 16_384;

/// Why a message was refused. The text goes to the controller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("delta of base revision {base}, but this proxy is on {current}")]
    Gap { base: u64, current: u64 },
    #[error("shard {shard}: epoch {given} is below {current}, which was applied")]
    LowerEpoch {
        shard: String,
        given: u64,
        current: u64,
    },
    #[error("shard {shard}: no valid {field}")]
    Field { shard: String, field: &'static str },
    #[error("settings: no valid {0}")]
    Settings(&'static str),
    #[error("more than {SHARDS_MAX} shards")]
    TooManyShards,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    revision: u64,
    settings: pb::InstanceSettings,
    shards: BTreeMap<String, pb::ShardRoute>,
    /// Numbers and highest epochs of all shards ever seen.
    known: BTreeMap<String, (ShardNo, u64)>,
}

impl Topology {
    /// The revision that is served; 0 before the first.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// All controllers, as the newest settings name them.
    #[must_use]
    pub fn controller_addresses(&self) -> &[String] {
        &self.settings.controller_addresses
    }

    /// The same as a message, for the disk.
    #[must_use]
    pub fn to_snapshot(&self) -> pb::Snapshot {
        pb::Snapshot {
            revision: self.revision,
            settings: Some(self.settings.clone()),
            shards: self.shards.values().cloned().collect(),
        }
    }

    /// The topology after a snapshot.
    ///
    /// # Errors
    /// It is not valid, or would take a shard to a lower epoch.
    pub fn with_snapshot(&self, snapshot: pb::Snapshot) -> Result<Self, Refused> {
        let mut next = self.clone();
        next.revision = snapshot.revision;
        next.settings = snapshot.settings.unwrap_or_default();
        next.shards.clear();
        next.put(snapshot.shards)?;
        next.checked()
    }

    /// The topology after a delta.
    ///
    /// # Errors
    /// It is not valid, has another base, or would take a shard to a lower epoch.
    pub fn with_delta(&self, delta: pb::Delta) -> Result<Self, Refused> {
        if delta.base_revision != self.revision {
            return Err(Refused::Gap {
                base: delta.base_revision,
                current: self.revision,
            });
        }
        let mut next = self.clone();
        next.revision = delta.revision;
        if let Some(settings) = delta.settings {
            next.settings = settings;
        }
        for id in &delta.removed_shard_ids {
            next.shards.remove(id);
        }
        next.put(delta.changed)?;
        next.checked()
    }

    fn put(&mut self, routes: Vec<pb::ShardRoute>) -> Result<(), Refused> {
        for route in routes {
            let number = self.known.len();
            if number >= SHARDS_MAX {
                return Err(Refused::TooManyShards);
            }
            let known = self
                .known
                .entry(route.shard_id.clone())
                .or_insert((number as ShardNo, 0));
            if route.epoch < known.1 {
                return Err(Refused::LowerEpoch {
                    shard: route.shard_id,
                    given: route.epoch,
                    current: known.1,
                });
            }
            known.1 = route.epoch;
            self.shards.insert(route.shard_id.clone(), route);
        }
        Ok(())
    }

    fn checked(self) -> Result<Self, Refused> {
        instance_settings(&self.settings)?;
        for route in self.shards.values() {
            ranges(route)?;
            let field = |field| Refused::Field {
                shard: route.shard_id.clone(),
                field,
            };
            // None at all: the shard has no primary now, and its slots are not served.
            let address = &route.primary_address;
            if !address.is_empty() && address.rsplit_once(':').is_none() {
                return Err(field("primary_address"));
            }
        }
        Ok(self)
    }

    /// Addresses that must be resolved for [`Self::table`].
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        self.shards
            .values()
            .flat_map(|route| {
                let target = route.hold.as_ref().map(|h| h.target_address.as_str());
                let replicas = route.replicas.iter().map(|r| r.address.as_str());
                [Some(route.primary_address.as_str()), target]
                    .into_iter()
                    .flatten()
                    .chain(replicas)
            })
            .filter(|address| !address.is_empty())
    }

    /// The routing table for the workers. `resolve` gives the socket address of a host:port.
    ///
    /// # Errors
    /// A primary's address is not resolved.
    pub fn table(
        &self,
        resolve: impl Fn(&str) -> Option<SocketAddr>,
    ) -> Result<RoutingTable, Refused> {
        let mut shards = vec![None; self.known.len()];
        let mut slots = Vec::new();
        for (id, route) in &self.shards {
            let Some(&(number, _)) = self.known.get(id) else {
                continue;
            };
            let field = |field| Refused::Field {
                shard: id.clone(),
                field,
            };
            if route.primary_address.is_empty() {
                continue;
            }
            let address = resolve(&route.primary_address);
            shards[usize::from(number)] = Some(Arc::new(ShardRoute {
                shard_id: id.clone(),
                index: route.index,
                epoch: route.epoch,
                address: address.ok_or_else(|| field("primary_address"))?,
                username: route.username.clone(),
                password: route.password.clone(),
                hold: route.hold.as_ref().map(|hold| HoldOrder {
                    task_id: hold.task_id.clone(),
                    max_hold_us: u64::from(hold.max_hold_ms) * 1000,
                }),
                target: route
                    .hold
                    .as_ref()
                    .and_then(|hold| resolve(&hold.target_address)),
                observer: (!route.observer_username.is_empty()).then(|| Login {
                    username: route.observer_username.clone(),
                    password: route.observer_password.clone(),
                }),
                replicas: (route.replicas.iter())
                    .filter_map(|replica| resolve(&replica.address))
                    .collect(),
            }));
            for (first, last) in ranges(route)? {
                slots.push((number, first, last));
            }
        }
        let settings = instance_settings(&self.settings)?;
        Ok(RoutingTable::new(self.revision, settings, shards, &slots))
    }
}

fn ranges(route: &pb::ShardRoute) -> Result<Vec<(u16, u16)>, Refused> {
    let valid = |range: &pb::SlotRange| {
        let (first, last) = (
            u16::try_from(range.first).ok()?,
            u16::try_from(range.last).ok()?,
        );
        slotmesh_topology::SlotRange::new(first, last).map(|r| (r.first(), r.last()))
    };
    let all: Option<Vec<_>> = route.slots.iter().map(valid).collect();
    all.ok_or_else(|| Refused::Field {
        shard: route.shard_id.clone(),
        field: "slots",
    })
}

fn instance_settings(settings: &pb::InstanceSettings) -> Result<InstanceSettings, Refused> {
    let default = InstanceSettings::default();
    let or = |given: u64, default: u64| if given == 0 { default } else { given };
    let databases = or(u64::from(settings.databases), u64::from(default.databases));
    let password = match settings.password_sha256.len() {
        0 => None,
        _ => Some(
            settings
                .password_sha256
                .as_slice()
                .try_into()
                .map_err(|_| Refused::Settings("password_sha256"))?,
        ),
    };
    let proxy_parameters = settings.proxy_parameters.clone().into_iter().collect();
    Ok(InstanceSettings {
        // The highest number means "unknown" inside a lane.
        databases: u16::try_from(databases)
            .ok()
            .filter(|d| *d < u16::MAX)
            .ok_or(Refused::Settings("databases"))?,
        users: Arc::new(users(&settings.accounts, password)),
        hold_budget_us: or(
            settings.hold_budget_ms.saturating_mul(1000),
            default.hold_budget_us,
        ),
        hold_bytes_max: or(settings.hold_bytes_max, default.hold_bytes_max),
        durability: settings.durability,
        parameters: Parameters::read(&proxy_parameters),
        proxy_parameters,
        held_back: release(&settings.held_back),
    })
}

/// The engine of that name; `None`: there is none, or none of which the table of commands knows.
fn release(engine: &str) -> Option<Release> {
    let (product, version) = compatibility::named(engine)?;
    let product = match product {
        artifact::Product::Redis => slotmesh_command::Product::Redis,
        artifact::Product::Valkey => slotmesh_command::Product::Valkey,
        artifact::Product::Proxy => return None,
    };
    let (major, minor, patch) = (version.major, version.minor, version.patch);
    Some(Release::new(product, major, minor, patch))
}

/// The accounts; one whose rules cannot be read may do nothing, so that neither the others nor the
/// topology suffer.
fn users(accounts: &[pb::Account], default_password: Option<[u8; 32]>) -> Users {
    let readable = |account: &&pb::Account| {
        let one = [(account.name.as_str(), &account.rules)];
        match Users::new(one, None) {
            Ok(_) => true,
            Err(error) => {
                tracing::error!(%error, "an account cannot be read and is off");
                false
            }
        }
    };
    const OFF: [String; 0] = [];
    let all = accounts.iter().map(|account| {
        let rules = if readable(&account) {
            &account.rules[..]
        } else {
            &OFF
        };
        (account.name.as_str(), rules)
    });
    Users::new(all, default_password).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(id: &str, epoch: u64, first: u32, last: u32) -> pb::ShardRoute {
        pb::ShardRoute {
            shard_id: id.to_owned(),
            slots: vec![pb::SlotRange { first, last }],
            epoch,
            primary_address: "127.0.0.1:7000".to_owned(),
            ..Default::default()
        }
    }

    fn snapshot(revision: u64, shards: Vec<pb::ShardRoute>) -> pb::Snapshot {
        pb::Snapshot {
            revision,
            settings: None,
            shards,
        }
    }

    fn delta(base: u64, changed: Vec<pb::ShardRoute>) -> pb::Delta {
        pb::Delta {
            base_revision: base,
            revision: base + 1,
            changed,
            ..Default::default()
        }
    }

    #[test]
    fn a_delta_builds_on_its_base_only() {
        let first = snapshot(4, vec![route("a", 1, 0, 8191), route("b", 1, 8192, 16383)]);
        let topology = Topology::default().with_snapshot(first).unwrap();
        assert_eq!(
            topology.with_delta(delta(3, vec![])).unwrap_err(),
            Refused::Gap {
                base: 3,
                current: 4
            }
        );
        let next = topology
            .with_delta(delta(4, vec![route("b", 2, 8192, 16383)]))
            .unwrap();
        let table = next.table(|a| a.parse().ok()).unwrap();
        assert_eq!(table.revision, 5);
        assert!(table.is_complete());
        assert_eq!(table.shards[1].as_ref().unwrap().epoch, 2);
    }

    #[test]
    fn an_epoch_never_falls_even_after_a_removal() {
        let topology = Topology::default().with_snapshot(snapshot(1, vec![route("a", 7, 0, 9)]));
        let topology = topology.unwrap();
        assert!(
            topology
                .with_snapshot(snapshot(2, vec![route("a", 6, 0, 9)]))
                .is_err()
        );
        let mut removal = delta(1, vec![]);
        removal.removed_shard_ids = vec!["a".to_owned()];
        let without = topology.with_delta(removal).unwrap();
        assert!(
            without
                .with_delta(delta(2, vec![route("a", 6, 0, 9)]))
                .is_err()
        );
        let back = without
            .with_delta(delta(2, vec![route("a", 8, 0, 9)]))
            .unwrap();
        assert_eq!(
            back.table(|a| a.parse().ok()).unwrap().number_of("a"),
            Some(0)
        );
    }

    #[test]
    fn invalid_messages_are_refused_whole() {
        let empty = Topology::default();
        assert!(
            empty
                .with_snapshot(snapshot(1, vec![route("a", 1, 9, 16384)]))
                .is_err()
        );
        let mut bad = snapshot(1, vec![]);
        let settings = pb::InstanceSettings {
            password_sha256: vec![1],
            ..Default::default()
        };
        bad.settings = Some(settings);
        assert_eq!(
            empty.with_snapshot(bad).unwrap_err(),
            Refused::Settings("password_sha256")
        );
    }
}
