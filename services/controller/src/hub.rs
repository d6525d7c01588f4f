//! What agents and proxies report to this controller: the observed side of every decision.
//!
//! Nothing here is stored: on reconnect each peer says again what is so.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use slotmesh_proto::{agent::v1 as agent, topology::v1 as topology};
use slotmesh_task::{Fleet, HoldLevel, ProxyView, wire};
use slotmesh_topology::{Epoch, HostId, InstanceId, NodeId, ProxyId, ShardId};
use tokio::sync::watch;

use crate::clock;

/// A proxy that has not been heard for this long is not waited for: three heartbeats.
pub const FRESH_FOR: Duration = Duration::from_millis(1_500);
/// Most holds remembered; each belongs to a switchover that is about to read it.
const HOLDS_MAX: usize = 4_096;

/// A host with a session.
#[derive(Clone, Debug)]
pub struct HostEntry {
    /// What its agent said at first.
    pub register: agent::Register,
    /// The session it came with, so that an old session's end does not remove a new one.
    session: u64,
}

/// A proxy with a stream.
#[derive(Clone, Debug, Default)]
pub struct ProxyEntry {
    /// What it said at first.
    pub hello: topology::Hello,
    /// Its newest counters.
    pub report: topology::Report,
    session: u64,
    heard_ms: u64,
}

#[derive(Debug, Default)]
struct Peers {
    hosts: BTreeMap<HostId, HostEntry>,
    proxies: BTreeMap<ProxyId, ProxyEntry>,
    holds: BTreeMap<(InstanceId, ShardId, u64), u64>,
    sessions: u64,
}

/// Shared by the streams (which report) and the leader (which decides).
#[derive(Clone, Debug)]
pub struct Hub {
    fleet: Arc<watch::Sender<Fleet>>,
    peers: Arc<Mutex<Peers>>,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            fleet: Arc::new(watch::Sender::new(Fleet::default())),
            peers: Arc::new(Mutex::new(Peers::default())),
        }
    }
}

impl Hub {
    /// Changed whenever something observed changed.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Fleet> {
        self.fleet.subscribe()
    }

    /// Looks at what is observed.
    pub fn read<R>(&self, look: impl FnOnce(&Fleet) -> R) -> R {
        look(&self.fleet.borrow())
    }

    fn peers<R>(&self, act: impl FnOnce(&mut Peers) -> R) -> R {
        act(&mut self.peers.lock().unwrap_or_else(PoisonError::into_inner))
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

    /// A host's agent has opened a session; the number ends it.
    pub fn host_opened(&self, register: agent::Register) -> u64 {
        let host: HostId = register.host_id.as_str().into();
        let session = self.peers(|peers| {
            peers.sessions += 1;
            let session = peers.sessions;
            peers
                .hosts
                .insert(host.clone(), HostEntry { register, session });
            session
        });
        self.fleet.send_modify(|fleet| {
            fleet.hosts.insert(host);
        });
        session
    }

    /// The session has ended. What was reported stays, as history, and grows stale.
    pub fn host_closed(&self, host: &HostId, session: u64) {
        let is_current = self.peers(|peers| {
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

    /// A new term begins: what was reported to an earlier one may be long over. Peers report all
    /// that is so again before the leader decides from it.
    pub fn begin_term(&self) {
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

    /// A host's report. One that an older session of the host delivers late is left out: it could
    /// name a process that has ended since.
    pub fn host_reported(&self, host: &HostId, session: u64, report: &agent::HostReport) {
        let is_current =
            self.peers(|peers| peers.hosts.get(host).is_some_and(|h| h.session == session));
        if !is_current {
            return;
        }
        let now_ms = clock::now_ms();
        self.fleet.send_modify(|fleet| {
            for node in &report.nodes {
                let view = wire::node_view(node, now_ms);
                fleet.nodes.insert(node.node_id.as_str().into(), view);
            }
            for proxy in &report.proxies {
                let state = (wire::process_state(proxy.state()), proxy.error.clone());
                fleet
                    .proxy_processes
                    .insert(proxy.proxy_id.as_str().into(), state);
            }
        });
    }

    /// A proxy has opened its stream; the number ends it.
    pub fn proxy_opened(&self, hello: topology::Hello) -> u64 {
        let proxy: ProxyId = hello.proxy_id.as_str().into();
        let mut view = ProxyView {
            instance: hello.instance_id.as_str().into(),
            host: hello.host_id.as_str().into(),
            address: hello.address.clone(),
            fresh: true,
            shards: BTreeMap::new(),
        };
        apply_shards(&mut view, &hello.shards);
        let session = self.peers(|peers| {
            peers.sessions += 1;
            let session = peers.sessions;
            let heard_ms = clock::now_ms();
            let entry = ProxyEntry {
                hello,
                session,
                heard_ms,
                report: topology::Report::default(),
            };
            peers.proxies.insert(proxy.clone(), entry);
            session
        });
        self.fleet.send_modify(|fleet| {
            fleet.proxies.insert(proxy, view);
        });
        session
    }

    /// The stream has ended: the proxy is not waited for.
    pub fn proxy_closed(&self, proxy: &ProxyId, session: u64) {
        let is_current = self.peers(|peers| {
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

    /// A proxy's report.
    pub fn proxy_reported(&self, proxy: &ProxyId, session: u64, report: topology::Report) {
        let shards = report.shards.clone();
        let instance = self.peers(|peers| {
            let entry = peers
                .proxies
                .get_mut(proxy)
                .filter(|p| p.session == session)?;
            entry.heard_ms = clock::now_ms();
            let instance: InstanceId = entry.hello.instance_id.as_str().into();
            let holds = report.holds.clone();
            entry.report = report;
            for hold in holds {
                let key = (instance.clone(), ShardId::from(hold.shard_id), hold.epoch);
                let longest = peers.holds.entry(key).or_default();
                *longest = hold.longest_us.max(*longest);
            }
            while peers.holds.len() > HOLDS_MAX {
                peers.holds.pop_first();
            }
            Some(instance)
        });
        if instance.is_none() {
            return;
        }
        self.fleet.send_if_modified(|fleet| {
            let Some(view) = fleet.proxies.get_mut(proxy) else {
                return false;
            };
            let before = view.clone();
            view.fresh = true;
            apply_shards(view, &shards);
            *view != before
        });
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
        self.peers(|peers| peers.holds.get(&key).copied().unwrap_or_default())
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
mod tests {
    use super::*;

    fn hello() -> topology::Hello {
        topology::Hello {
            proxy_id: "p".into(),
            instance_id: "r".into(),
            ..topology::Hello::default()
        }
    }

    #[test]
    fn an_old_session_that_ends_late_does_not_remove_the_new_one() {
        let hub = Hub::default();
        let old = hub.proxy_opened(hello());
        let new = hub.proxy_opened(hello());
        hub.proxy_closed(&"p".into(), old);
        assert_eq!(hub.read(|f| f.proxies.len()), 1);
        hub.proxy_closed(&"p".into(), new);
        assert_eq!(hub.read(|f| f.proxies.len()), 0);
    }

    #[test]
    fn a_report_of_an_old_session_and_of_an_old_term_is_forgotten() {
        let hub = Hub::default();
        let register = || agent::Register {
            host_id: "h".into(),
            ..agent::Register::default()
        };
        let report = |run_id: &str| agent::HostReport {
            nodes: vec![agent::NodeReport {
                node_id: "n".into(),
                run_id: run_id.into(),
                ..agent::NodeReport::default()
            }],
            ..agent::HostReport::default()
        };
        let old = hub.host_opened(register());
        let new = hub.host_opened(register());
        hub.host_reported(&"h".into(), new, &report("now"));
        hub.host_reported(&"h".into(), old, &report("before"));
        assert_eq!(hub.read(|f| f.nodes[&"n".into()].run_id.clone()), "now");
        hub.begin_term();
        assert!(hub.read(|f| f.nodes.is_empty() && f.hosts.len() == 1));
    }

    #[test]
    fn a_host_has_one_agent_at_a_time() {
        let hub = Hub::default();
        let register = |instance: &str| agent::Register {
            host_id: "h".into(),
            agent_instance: instance.into(),
            agent_address: "a:1".into(),
            ..agent::Register::default()
        };
        let session = hub.host_opened(register("x"));
        assert_eq!(hub.other_agent(&register("x")), None, "it comes back");
        assert_eq!(hub.other_agent(&register("y")), Some("a:1".into()));
        hub.host_closed(&"h".into(), session);
        assert_eq!(hub.other_agent(&register("y")), None);
    }

    #[test]
    fn the_longest_hold_over_all_proxies_is_kept() {
        let hub = Hub::default();
        let session = hub.proxy_opened(hello());
        for longest_us in [700, 900, 300] {
            let hold = topology::HoldSample {
                shard_id: "0".into(),
                epoch: 5,
                longest_us,
                requests: 1,
            };
            let report = topology::Report {
                holds: vec![hold],
                ..topology::Report::default()
            };
            hub.proxy_reported(&"p".into(), session, report);
        }
        assert_eq!(hub.longest_hold_us(&"r".into(), &"0".into(), Epoch(5)), 900);
        assert_eq!(hub.longest_hold_us(&"r".into(), &"0".into(), Epoch(6)), 0);
    }
}
