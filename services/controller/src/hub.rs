//! What agents and proxies report to this controller: the observed side of every decision.
//!
//! Nothing here is stored: on reconnect each peer says again what is so. Peers have their stream
//! here, or at another controller that relays what they say; of two streams of one peer the one that
//! the peer opened last counts.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use slotmesh_proto::{agent::v1 as agent, topology::v1 as topology};
use slotmesh_task::{Fleet, HoldLevel, ProxyView, wire};
use slotmesh_topology::{Epoch, HostId, InstanceId, NodeId, ProxyId, ShardId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{clock, doubts::Doubts};

/// A proxy that has not been heard for this long is not waited for: three heartbeats.
pub const FRESH_FOR: Duration = Duration::from_millis(1_500);
/// Most holds remembered; each belongs to a switchover that is about to read it.
const HOLDS_MAX: usize = 4_096;
/// Holds of one proxy that wait to be relayed; they are relayed within milliseconds.
const HOLDS_UNSENT_MAX: usize = 256;

/// A host with a session.
#[derive(Clone, Debug)]
pub struct HostEntry {
    /// What its agent said at first.
    pub register: agent::Register,
    /// The session it came with, so that an old session's end does not remove a new one.
    pub(crate) session: u64,
    /// Its stream is at this controller.
    pub(crate) here: bool,
    /// Cancelled when the leader knows another agent as this host.
    refused: CancellationToken,
    /// Its newest report, for relaying, and when it came.
    pub(crate) report: Option<(u64, agent::HostReport)>,
    /// Files that it keeps; None before its first report.
    pub(crate) lost_writes: Option<Vec<agent::LostWrites>>,
    /// The [`Peers::version`] of its newest report.
    pub(crate) version: u64,
}

/// A proxy with a stream.
#[derive(Clone, Debug, Default)]
pub struct ProxyEntry {
    /// What it said at first.
    pub hello: topology::Hello,
    /// Its newest counters.
    pub report: topology::Report,
    pub(crate) session: u64,
    heard_ms: u64,
    pub(crate) here: bool,
    pub(crate) version: u64,
    /// What it has said of each shard, and in which version; for relaying.
    pub(crate) shards: BTreeMap<String, (u64, topology::ShardState)>,
    pub(crate) holds: VecDeque<(u64, topology::HoldSample)>,
}

#[derive(Debug, Default)]
pub(crate) struct Peers {
    pub(crate) hosts: BTreeMap<HostId, HostEntry>,
    pub(crate) proxies: BTreeMap<ProxyId, ProxyEntry>,
    /// Longest wait in each hold, by proxy.
    holds: BTreeMap<(InstanceId, ShardId, u64), BTreeMap<ProxyId, u64>>,
    sessions: u64,
    /// Rises with everything that is said.
    pub(crate) version: u64,
}

/// What became of a relayed peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Relayed {
    /// It counts; the number ends it.
    Taken(u64),
    /// The peer has opened a newer stream elsewhere.
    Older,
    /// Another agent, at this address, has a session as the host.
    InUse(String),
}

/// Shared by the streams (which report) and the leader (which decides).
#[derive(Clone, Debug)]
pub struct Hub {
    fleet: Arc<watch::Sender<Fleet>>,
    peers: Arc<Mutex<Peers>>,
    /// Shows [`Peers::version`].
    news: Arc<watch::Sender<u64>>,
    doubts: Doubts,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            fleet: Arc::new(watch::Sender::new(Fleet::default())),
            peers: Arc::new(Mutex::new(Peers::default())),
            news: Arc::new(watch::Sender::new(0)),
            doubts: Doubts::default(),
        }
    }
}

impl Hub {
    /// Changed whenever something observed changed.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Fleet> {
        self.fleet.subscribe()
    }

    /// What keeps lost primaries from being replaced, as the driver says.
    #[must_use]
    pub fn doubts(&self) -> &Doubts {
        &self.doubts
    }

    /// Looks at what is observed.
    pub fn read<R>(&self, look: impl FnOnce(&Fleet) -> R) -> R {
        look(&self.fleet.borrow())
    }

    fn peers<R>(&self, act: impl FnOnce(&mut Peers) -> R) -> R {
        act(&mut self.peers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// As `peers`, for what relays have to tell.
    fn tell<R>(&self, act: impl FnOnce(&mut Peers) -> R) -> R {
        let (done, version) = self.peers(|peers| {
            peers.version += 1;
            (act(peers), peers.version)
        });
        self.news.send_replace(version);
        done
    }

    /// Changed whenever a peer has said something.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Looks at the streams.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&Peers) -> R) -> R {
        self.peers(|peers| look(peers))
    }

    /// Address of another agent that has a session as the same host. Two that both run its nodes
    /// would give the record two processes for one name.
    #[must_use]
    pub fn other_agent(&self, register: &agent::Register) -> Option<String> {
        let host: HostId = register.host_id.as_str().into();
        self.peers(|peers| {
            let known = &peers.hosts.get(&host)?.register;
            (known.agent_instance != register.agent_instance).then(|| known.agent_address.clone())
        })
    }

    /// A host's agent has opened a session here; the number ends it.
    pub fn host_opened(&self, register: agent::Register) -> u64 {
        self.open_host(register, true)
    }

    /// A host has a session at another controller.
    pub fn host_relayed(&self, register: agent::Register) -> Relayed {
        if let Some(address) = self.other_agent(&register) {
            return Relayed::InUse(address);
        }
        let is_older = self.peers(|peers| {
            let known = peers.hosts.get(&HostId::from(register.host_id.as_str()));
            known.is_some_and(|known| known.register.opened_unix_us > register.opened_unix_us)
        });
        if is_older {
            return Relayed::Older;
        }
        Relayed::Taken(self.open_host(register, false))
    }

    fn open_host(&self, register: agent::Register, here: bool) -> u64 {
        let host: HostId = register.host_id.as_str().into();
        let session = self.tell(|peers| {
            peers.sessions += 1;
            let entry = HostEntry {
                register,
                session: peers.sessions,
                here,
                refused: CancellationToken::new(),
                report: None,
                lost_writes: None,
                version: peers.version,
            };
            peers.hosts.insert(host.clone(), entry);
            peers.sessions
        });
        self.fleet.send_modify(|fleet| {
            fleet.hosts.insert(host);
        });
        session
    }

    /// Cancelled when the leader refuses this session.
    #[must_use]
    pub fn host_refusal(&self, host: &HostId, session: u64) -> CancellationToken {
        self.peers(|peers| {
            let entry = peers.hosts.get(host).filter(|h| h.session == session);
            entry.map(|h| h.refused.clone()).unwrap_or_default()
        })
    }

    /// The leader knows another agent as this host: the session here ends.
    pub(crate) fn refuse_host(&self, host: &HostId, agent_instance: &str) {
        self.peers(|peers| {
            let entry = peers.hosts.get(host);
            let refused = entry.filter(|h| h.here && h.register.agent_instance == agent_instance);
            if let Some(entry) = refused {
                entry.refused.cancel();
            }
        });
    }

    /// The session has ended. What was reported stays, as history, and grows stale.
    pub fn host_closed(&self, host: &HostId, session: u64) {
        let is_current = self.tell(|peers| {
            let current = peers.hosts.get(host).is_some_and(|h| h.session == session);
            if current {
                peers.hosts.remove(host);
            }
            current
        });
        if is_current {
            self.fleet.send_modify(|fleet| {
                fleet.hosts.remove(host);
            });
        }
    }

    /// Hosts with a lease, and zones of those that are known.
    pub fn hosts_known(&self, leases: BTreeSet<HostId>, zones: BTreeMap<HostId, String>) {
        self.fleet.send_if_modified(|fleet| {
            let changed = fleet.leases != leases || fleet.zones != zones;
            (fleet.leases, fleet.zones) = (leases, zones);
            changed
        });
    }

    /// A new term begins: what was reported to an earlier one may be long over. Peers report all
    /// that is so again before the leader decides from it.
    pub fn begin_term(&self) {
        self.doubts.clear();
        self.fleet.send_modify(|fleet| {
            fleet.nodes.clear();
            fleet.proxy_processes.clear();
        });
    }

    /// Keeps only what the records still name, so that it does not grow with time.
    pub fn forget_others(&self, nodes: &BTreeSet<NodeId>, proxies: &BTreeSet<ProxyId>) {
        self.fleet.send_modify(|fleet| {
            fleet.nodes.retain(|node, _| nodes.contains(node));
            fleet.proxy_processes.retain(|id, _| proxies.contains(id));
        });
    }

    /// A host's report. One that an older session of the host delivers late is left out (false): it
    /// could name a process that has ended since.
    pub fn host_reported(&self, host: &HostId, session: u64, report: &agent::HostReport) -> bool {
        let is_current = self.tell(|peers| {
            let version = peers.version;
            let entry = peers.hosts.get_mut(host).filter(|h| h.session == session);
            entry.is_some_and(|entry| {
                entry.report = entry.here.then(|| (clock::now_ms(), report.clone()));
                entry.lost_writes = Some(report.lost_writes.clone());
                entry.version = version;
                true
            })
        });
        if !is_current {
            return false;
        }
        let now_ms = clock::now_ms();
        self.fleet.send_modify(|fleet| {
            for node in &report.nodes {
                let view = wire::node_view(node, now_ms);
                fleet.nodes.insert(node.node_id.as_str().into(), view);
            }
            for proxy in &report.proxies {
                let id = proxy.proxy_id.as_str().into();
                fleet.proxy_processes.insert(id, wire::proxy_process(proxy));
            }
        });
        true
    }

    /// A proxy has opened its stream here; the number ends it.
    pub fn proxy_opened(&self, hello: topology::Hello) -> u64 {
        self.open_proxy(hello, true)
    }

    /// A proxy has its stream at another controller.
    pub fn proxy_relayed(&self, hello: topology::Hello) -> Relayed {
        let is_older = self.peers(|peers| {
            let known = peers.proxies.get(&ProxyId::from(hello.proxy_id.as_str()));
            known.is_some_and(|known| known.hello.opened_unix_us > hello.opened_unix_us)
        });
        if is_older {
            return Relayed::Older;
        }
        Relayed::Taken(self.open_proxy(hello, false))
    }

    fn open_proxy(&self, hello: topology::Hello, here: bool) -> u64 {
        let proxy: ProxyId = hello.proxy_id.as_str().into();
        let mut view = ProxyView {
            instance: hello.instance_id.as_str().into(),
            host: hello.host_id.as_str().into(),
            address: hello.address.clone(),
            fresh: true,
            pid: hello.pid,
            ..ProxyView::default()
        };
        apply_shards(&mut view, &hello.shards);
        let session = self.tell(|peers| {
            peers.sessions += 1;
            let mut entry = ProxyEntry {
                session: peers.sessions,
                heard_ms: clock::now_ms(),
                here,
                version: peers.version,
                ..ProxyEntry::default()
            };
            keep_shards(&mut entry, &hello.shards);
            entry.hello = hello;
            peers.proxies.insert(proxy.clone(), entry);
            peers.sessions
        });
        self.fleet.send_modify(|fleet| {
            fleet.proxies.insert(proxy, view);
        });
        session
    }

    /// The stream has ended: the proxy is not waited for.
    pub fn proxy_closed(&self, proxy: &ProxyId, session: u64) {
        let is_current = self.tell(|peers| {
            let current = peers
                .proxies
                .get(proxy)
                .is_some_and(|p| p.session == session);
            if current {
                peers.proxies.remove(proxy);
            }
            current
        });
        if is_current {
            self.fleet.send_modify(|fleet| {
                fleet.proxies.remove(proxy);
            });
        }
    }

    /// A proxy's report; false when it is of an older stream.
    pub fn proxy_reported(&self, proxy: &ProxyId, session: u64, report: topology::Report) -> bool {
        let (shards, troubles) = (report.shards.clone(), report.troubles.clone());
        let counted = (report.commands, report.errors, Some(report.clients));
        let faults = report.faults.iter();
        let faults = faults.map(|f| (f.shard_id.as_str().into(), f.count));
        let faults: BTreeMap<ShardId, u64> = faults.collect();
        let instance = self.tell(|peers| {
            let version = peers.version;
            let entry = peers
                .proxies
                .get_mut(proxy)
                .filter(|p| p.session == session)?;
            entry.heard_ms = clock::now_ms();
            entry.version = version;
            let instance: InstanceId = entry.hello.instance_id.as_str().into();
            let holds = report.holds.clone();
            if entry.here {
                keep_shards(entry, &report.shards);
                entry
                    .holds
                    .extend(holds.iter().map(|h| (version, h.clone())));
                let surplus = entry.holds.len().saturating_sub(HOLDS_UNSENT_MAX);
                entry.holds.drain(..surplus);
            }
            entry.report = report;
            for hold in holds {
                let key = (instance.clone(), ShardId::from(hold.shard_id), hold.epoch);
                let ended = peers.holds.entry(key).or_default();
                let longest = ended.entry(proxy.clone()).or_default();
                *longest = hold.longest_us.max(*longest);
            }
            let surplus = peers.holds.len().saturating_sub(HOLDS_MAX);
            (0..surplus).for_each(|_| drop(peers.holds.pop_first()));
            Some(instance)
        });
        if instance.is_none() {
            return false;
        }
        self.fleet.send_if_modified(|fleet| {
            let Some(view) = fleet.proxies.get_mut(proxy) else {
                return false;
            };
            let before = view.clone();
            view.fresh = true;
            apply_shards(view, &shards);
            view.troubles = troubles
                .iter()
                .map(|t| (t.shard_id.as_str().into(), (Epoch(t.epoch), t.since_ms)))
                .collect();
            let is_news = *view != before;
            // Counters always rise: nobody is woken for them.
            (view.commands, view.errors, view.clients) = counted;
            view.faults = faults;
            is_news
        });
        true
    }

    /// Marks proxies that have fallen silent. Called a few times a second.
    pub fn age(&self) {
        let limit = clock::now_ms()
            .saturating_sub(u64::try_from(FRESH_FOR.as_millis()).unwrap_or(u64::MAX));
        let silent: BTreeSet<ProxyId> = self.peers(|peers| {
            let is_silent =
                |(id, p): (&ProxyId, &ProxyEntry)| (p.heard_ms < limit).then(|| id.clone());
            peers.proxies.iter().filter_map(is_silent).collect()
        });
        self.fleet.send_if_modified(|fleet| {
            let mut changed = false;
            for (id, view) in &mut fleet.proxies {
                if view.fresh && silent.contains(id) {
                    view.fresh = false;
                    changed = true;
                }
            }
            changed
        });
    }

    /// Longest wait of a request in the hold that `epoch` ended, over all proxies.
    #[must_use]
    pub fn longest_hold_us(&self, instance: &InstanceId, shard: &ShardId, epoch: Epoch) -> u64 {
        let key = (instance.clone(), shard.clone(), epoch.0);
        let longest = |peers: &mut Peers| peers.holds.get(&key)?.values().max().copied();
        self.peers(longest).unwrap_or_default()
    }

    /// Whether every proxy that is heard has said how long the hold was that `epoch` ended.
    pub(crate) fn holds_are_known(
        &self,
        instance: &InstanceId,
        shard: &ShardId,
        epoch: Epoch,
    ) -> bool {
        let fresh = self.read(|fleet| fleet.fresh_proxies(instance).count());
        let key = (instance.clone(), shard.clone(), epoch.0);
        self.peers(|peers| peers.holds.get(&key).map_or(0, BTreeMap::len)) >= fresh
    }

    /// Hosts with a session.
    #[must_use]
    pub fn hosts(&self) -> Vec<HostEntry> {
        self.peers(|peers| peers.hosts.values().cloned().collect())
    }

    /// Address of a host's agent, while it has a session.
    #[must_use]
    pub fn agent_address(&self, host: &HostId) -> Option<String> {
        self.peers(|peers| {
            peers
                .hosts
                .get(host)
                .map(|h| h.register.agent_address.clone())
        })
    }

    /// Proxies with a stream.
    #[must_use]
    pub fn proxies(&self) -> Vec<ProxyEntry> {
        self.peers(|peers| peers.proxies.values().cloned().collect())
    }
}

fn keep_shards(entry: &mut ProxyEntry, shards: &[topology::ShardState]) {
    let version = entry.version;
    let states = shards
        .iter()
        .map(|s| (s.shard_id.clone(), (version, s.clone())));
    entry.shards.extend(states);
}

fn apply_shards(view: &mut ProxyView, shards: &[topology::ShardState]) {
    for state in shards {
        let level = match state.level() {
            topology::HoldLevel::Unspecified => continue,
            topology::HoldLevel::Applied => HoldLevel::Applied,
            topology::HoldLevel::Held => HoldLevel::Held,
        };
        view.shards.insert(
            state.shard_id.as_str().into(),
            (Epoch(state.epoch), level, state.task_id.as_str().into()),
        );
    }
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
