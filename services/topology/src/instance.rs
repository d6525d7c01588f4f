//! An instance: what a user created and connects to.

use std::collections::BTreeMap;

use crate::{
    account::Account,
    artifact::Level,
    compatibility::Engine,
    id::{HostId, InstanceId, ProxyId},
};

/// Longest name of an instance.
pub const NAME_LENGTH_MAX: usize = 64;
/// Most shards of an instance: one transaction (of at most 128 operations) creates it whole.
pub const SHARDS_MAX: u32 = 100;
/// Most replicas of a shard.
pub const REPLICAS_MAX: u32 = 5;
/// Most proxies of an instance.
pub const PROXIES_MAX: u32 = 64;
/// Most removed proxies that are remembered, hosts of which may come back. Of more than that, the
/// first is forgotten: its host has been away for as many rebuilds.
pub const GONE_PROXIES_MAX: usize = 64;
/// Most workers of a proxy.
pub const WORKERS_MAX: u32 = 64;
/// Databases of an instance: the range of SELECT.
pub const DATABASES: u32 = 256;

/// After how many seconds without its host a node is replaced, where nothing else is said: longer than
/// a machine takes to start again, shorter than anybody wants to be without a second copy.
pub const REPLACE_AFTER_S: u32 = 600;

/// How keys are spread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Architecture {
    /// One shard.
    Standard,
    /// Several shards, by slot.
    Cluster,
}

/// Where an instance is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InstanceState {
    /// Its provision task has not ended.
    Creating,
    /// It serves.
    Running,
    /// Its processes are being removed.
    Deleting,
}

/// A proxy of an instance: where it runs, and which process it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// Which proxy.
    pub proxy: ProxyId,
    /// On which host.
    pub host: HostId,
    /// Artifact that it should run; empty: the agent's own.
    pub program: String,
    /// Another one asks for another process, also of the same program.
    pub generation: u64,
    /// How many were given so far: going back takes an earlier one up again, going on never does.
    pub generations: u64,
    /// Its clients are to go elsewhere; `None`: it stays.
    pub leaving: Option<Leaving>,
    /// That it listens on, if it is free when it is first started there; 0: any.
    pub port: u16,
    /// The process of before may be ended for another one: it was told to take no more clients, and hands
    /// nothing over while it has not heard that this is over.
    pub cold: bool,
    /// Worker threads of its process; 0: as the instance says.
    pub workers: u32,
}

/// Where the clients of a proxy that leaves go, and until when.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leaving {
    /// host:port of the proxy that serves in its place; empty: any other of the instance.
    pub endpoint: String,
    /// Whoever is left then is closed.
    pub until_unix_ms: u64,
    /// The one that serves in its place is lost, and there is no other: until it serves again, this one
    /// takes clients.
    pub suspended: bool,
}

impl Placement {
    /// A proxy that was not given a program yet.
    #[must_use]
    pub fn new(proxy: ProxyId, host: HostId) -> Self {
        Self {
            proxy,
            host,
            program: String::new(),
            generation: 0,
            generations: 0,
            leaving: None,
            port: 0,
            cold: false,
            workers: 0,
        }
    }

    /// With so many workers; 0: as before.
    #[must_use]
    pub fn with_workers(self, workers: u32) -> Self {
        match workers {
            0 => self,
            workers => Self { workers, ..self },
        }
    }

    /// With a process of a program that it never had before.
    #[must_use]
    pub fn advanced(&self, program: &str) -> Self {
        let generations = self.generations.max(self.generation) + 1;
        Self {
            program: program.to_owned(),
            generation: generations,
            generations,
            cold: false,
            ..self.clone()
        }
    }

    /// With the process that it had.
    #[must_use]
    pub fn returned(&self, program: &str, generation: u64) -> Self {
        Self {
            program: program.to_owned(),
            generation,
            cold: false,
            ..self.clone()
        }
    }

    /// With another process that takes clients again, after it was told to send them away.
    #[must_use]
    pub fn reopened(&self) -> Self {
        Self {
            leaving: None,
            cold: true,
            ..self.advanced(&self.program)
        }
    }

    /// With a place to which its clients are to go.
    #[must_use]
    pub fn left_for(&self, endpoint: &str, until_unix_ms: u64) -> Self {
        Self {
            leaving: Some(Leaving {
                endpoint: endpoint.to_owned(),
                until_unix_ms,
                suspended: false,
            }),
            ..self.clone()
        }
    }

    /// Where its clients are to go now.
    #[must_use]
    pub fn sends_away(&self) -> Option<&Leaving> {
        self.leaving.as_ref().filter(|leaving| !leaving.suspended)
    }
}

/// What a user created.
#[derive(Clone, PartialEq, Eq)]
pub struct Instance {
    /// Given by the controller.
    pub id: InstanceId,
    /// Given by the user.
    pub name: String,
    /// How keys are spread.
    pub architecture: Architecture,
    /// Fixed at creation.
    pub shard_count: u32,
    /// Replicas of each shard.
    pub replicas_per_shard: u32,
    /// The range of SELECT.
    pub databases: u32,
    /// Engine as an agent knows it, or a path; empty: the agent's default.
    pub engine: String,
    /// From which credentials are derived. Never logged: see the `Debug` impl.
    pub secret: Vec<u8>,
    /// SHA-256 of the clients' password; empty: none is needed.
    pub password_sha256: Vec<u8>,
    /// Where it is in its life.
    pub state: InstanceState,
    /// Which proxy runs where, and what.
    pub proxies: Vec<Placement>,
    /// Proxies that are of it no more: here until their agents have removed them, and as long as the
    /// last number is one of theirs.
    pub gone_proxies: Vec<Placement>,
    /// Worker threads of each proxy.
    pub workers_per_proxy: u32,
    /// When it was created.
    pub created_unix_ms: u64,
    /// Engine parameters.
    pub parameters: BTreeMap<String, String>,
    /// Rises with each change of them, so that an agent can tell an assignment of before a change
    /// that it has made already.
    pub parameters_version: u64,
    /// Parameters of proxies that differ from their defaults.
    pub proxy_parameters: BTreeMap<String, String>,
    /// Users of clients, in the order of their names.
    pub accounts: Vec<Account>,
    /// Replicas that must have a write before it is acknowledged; 0: it is acknowledged at once.
    pub durability: u32,
    /// `HH:MM-HH:MM` in UTC; empty: any time is one.
    pub maintenance_window: String,
    /// From which level on patches of the engine are installed by themselves; `None`: never.
    pub auto_upgrade: Option<Level>,
    /// A node whose host is gone for longer is replaced on another host; 0: never by itself.
    pub replace_after_s: u32,
    /// The oldest engine that a node runs, or may have to run again, while others run a newer one: what
    /// it does not know is not let through to any. `None`: nothing is held back.
    pub held_back: Option<Engine>,
}

impl Instance {
    /// Its proxies, and those that were.
    pub fn all_proxies(&self) -> impl Iterator<Item = &Placement> {
        self.proxies.iter().chain(&self.gone_proxies)
    }

    /// Where the clients of this proxy are to go now; `None`: it stays, or was never one of it.
    #[must_use]
    pub fn leaving(&self, proxy: &ProxyId) -> Option<&Leaving> {
        let mut all = self.all_proxies();
        all.find(|p| p.proxy == *proxy)?.sends_away()
    }

    /// An id that no proxy of it ever had: what is said of one that was is said of no other one.
    #[must_use]
    pub fn next_proxy(&self) -> ProxyId {
        let next = self.last_number().map_or(0, |last| last.saturating_add(1));
        proxy_id(&self.id, next)
    }

    /// Without those proxies that were and that are removed, but for one that has the last number: the
    /// next one is counted from it.
    #[must_use]
    pub fn without_removed(&self, is_removed: impl Fn(&Placement) -> bool) -> Self {
        let last = self.last_number();
        let is_last = |p: &Placement| last.is_some() && number(&p.proxy) == last;
        let mut next = self.clone();
        next.gone_proxies.retain(|p| is_last(p) || !is_removed(p));
        next
    }

    fn last_number(&self) -> Option<u64> {
        self.all_proxies().filter_map(|p| number(&p.proxy)).max()
    }

    /// Without this proxy, which its agent is to remove.
    #[must_use]
    pub fn without_proxy(&self, proxy: &ProxyId, now_ms: u64) -> Self {
        let mut next = self.clone();
        next.proxies.retain(|p| p.proxy != *proxy);
        let removed = self.proxies.iter().find(|p| p.proxy == *proxy);
        next.gone_proxies.extend(removed.map(|p| match &p.leaving {
            Some(_) => p.clone(),
            None => p.left_for("", now_ms),
        }));
        let surplus = next.gone_proxies.len().saturating_sub(GONE_PROXIES_MAX);
        next.gone_proxies.drain(..surplus);
        next
    }
}

/// That its id ends with.
fn number(proxy: &ProxyId) -> Option<u64> {
    let (_, number) = proxy.as_str().rsplit_once('-')?;
    number.parse().ok()
}

/// The id of an instance's proxy.
#[must_use]
pub fn proxy_id(instance: &InstanceId, number: u64) -> ProxyId {
    format!("{instance}-proxy-{number}").into()
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Instance")
            .field("id", &self.id)
            .field("architecture", &self.architecture)
            .field("shard_count", &self.shard_count)
            .field("replicas_per_shard", &self.replicas_per_shard)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
