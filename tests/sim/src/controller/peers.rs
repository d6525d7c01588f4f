//! Sessions of agents and streams of proxies at this controller, and what followers relay.
//!
//! Invariant: of a host only its newest session counts, through whomever it is heard.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use slotmesh_proto::{agent::v1::HostReport, topology::v1 as topology};
use slotmesh_task::{HoldLevel, ProxyView};
use slotmesh_topology::Epoch;

use super::{Controller, Desk, FRESH_FOR_MS, lease};
use crate::{
    fiber::Fiber,
    msg::{ConnId, Party, Relayed, Stream},
    sched::MS,
};

/// So that the first two hosts are of one zone and the third is of another.
const HOSTS_OF_A_ZONE: usize = 2;

/// A host with a session here.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) index: usize,
    session: u64,
    report: Option<HostReport>,
}

/// A proxy with a stream here.
#[derive(Debug)]
pub(super) struct Proxy {
    index: usize,
    shards: BTreeMap<String, topology::ShardState>,
    troubles: Vec<topology::Trouble>,
}

/// What a follower has brought.
#[derive(Debug, Default)]
pub(super) struct Relay {
    hosts: BTreeSet<usize>,
    proxies: BTreeSet<usize>,
}

impl Desk {
    /// A host is heard through this connection; false when it has been heard in a newer session.
    fn host_heard(&self, host: usize, session: u64, conn: ConnId) -> bool {
        let mut agents = self.agents.borrow_mut();
        if agents
            .get(&host)
            .is_some_and(|(newest, _)| *newest > session)
        {
            return false;
        }
        agents.insert(host, (session, conn));
        let name: slotmesh_topology::HostId = format!("h{host}").into();
        let mut fleet = self.fleet.borrow_mut();
        fleet
            .zones
            .insert(name.clone(), format!("z{}", host / HOSTS_OF_A_ZONE));
        fleet.hosts.insert(name);
        true
    }

    fn host_reported(&self, report: &HostReport) {
        let now_ms = self.now_ms();
        let mut fleet = self.fleet.borrow_mut();
        for node in &report.nodes {
            let view = slotmesh_task::wire::node_view(node, now_ms);
            fleet.nodes.insert(node.node_id.as_str().into(), view);
        }
        for proxy in &report.proxies {
            let process = slotmesh_task::wire::proxy_process(proxy);
            let id = proxy.proxy_id.as_str().into();
            fleet.proxy_processes.insert(id, process);
        }
    }

    fn host_gone(&self, host: usize, conn: ConnId) {
        let mut agents = self.agents.borrow_mut();
        if agents
            .get(&host)
            .is_some_and(|(_, through)| *through == conn)
        {
            agents.remove(&host);
            let name = format!("h{host}").into();
            self.fleet.borrow_mut().hosts.remove(&name);
        }
    }

    fn proxy_heard(
        &self,
        proxy: usize,
        shards: &[topology::ShardState],
        troubles: &[topology::Trouble],
    ) {
        self.heard.borrow_mut().insert(proxy, self.now_ms());
        let mut fleet = self.fleet.borrow_mut();
        let view = fleet.proxies.entry(format!("p{proxy}").into()).or_default();
        view.instance = self.instance.id.clone();
        view.fresh = true;
        apply_shards(view, shards);
        view.troubles = (troubles.iter())
            .map(|t| (t.shard_id.as_str().into(), (Epoch(t.epoch), t.since_ms)))
            .collect();
    }

    fn proxy_gone(&self, proxy: usize) {
        let name = format!("p{proxy}").into();
        self.fleet.borrow_mut().proxies.remove(&name);
    }
}

impl Controller {
    /// An agent, a proxy or a follower says something.
    pub(super) fn peer(&mut self, desk: &Rc<Desk>, conn: ConnId, message: Stream) {
        match message {
            Stream::Register { host, session } => {
                let index = host;
                let entry = Host {
                    index,
                    session,
                    report: None,
                };
                self.hosts.insert(conn, entry);
                desk.host_heard(host, session, conn);
                self.pass_on(Relayed::Host(host, session, None));
            }
            Stream::HostReport(report) => self.host_report(desk, conn, report),
            Stream::ProxyReport {
                proxy,
                shards,
                troubles,
            } => {
                let entry = self.proxies.entry(conn).or_insert(Proxy {
                    index: proxy,
                    shards: BTreeMap::new(),
                    troubles: Vec::new(),
                });
                for shard in &shards {
                    entry.shards.insert(shard.shard_id.clone(), shard.clone());
                }
                entry.troubles.clone_from(&troubles);
                desk.proxy_heard(proxy, &shards, &troubles);
                self.pass_on(Relayed::Proxy(proxy, shards, troubles));
            }
            Stream::Relayed(relayed) => {
                if self.believes().is_none() {
                    self.world.borrow_mut().close(self.party(), conn);
                    self.relays.remove(&conn);
                    return;
                }
                self.relayed(desk, conn, relayed);
            }
            _ => return,
        }
        desk.changed();
    }

    fn host_report(&mut self, desk: &Rc<Desk>, conn: ConnId, report: HostReport) {
        let Some(host) = self.hosts.get_mut(&conn) else {
            return;
        };
        host.report = Some(report.clone());
        let (index, session, number) = (host.index, host.session, report.number);
        if desk.host_heard(index, session, conn) {
            desk.host_reported(&report);
        }
        if lease::is_due(desk, conn, number) {
            let keep = lease::keep(Rc::clone(desk), conn, index);
            self.fibers.push(Fiber::new(keep));
        }
        self.pass_on(Relayed::Host(index, session, Some(report)));
    }

    fn relayed(&mut self, desk: &Rc<Desk>, conn: ConnId, relayed: Relayed) {
        let relay = self.relays.entry(conn).or_default();
        match relayed {
            Relayed::Host(host, session, report) => {
                relay.hosts.insert(host);
                if desk.host_heard(host, session, conn)
                    && let Some(report) = report
                {
                    desk.host_reported(&report);
                }
            }
            Relayed::HostGone(host) => {
                relay.hosts.remove(&host);
                desk.host_gone(host, conn);
            }
            Relayed::Proxy(proxy, shards, troubles) => {
                relay.proxies.insert(proxy);
                desk.proxy_heard(proxy, &shards, &troubles);
            }
            Relayed::ProxyGone(proxy) => {
                relay.proxies.remove(&proxy);
                desk.proxy_gone(proxy);
            }
        }
    }

    fn pass_on(&self, relayed: Relayed) {
        if let Some((conn, _)) = self.relay {
            let message = Stream::Relayed(relayed);
            self.world.borrow_mut().send(self.party(), conn, message);
        }
    }

    /// Keeps the way to the leader; a new one begins with everything.
    pub(super) fn relay_on(&mut self, desk: &Rc<Desk>) {
        let leader = desk.mirror.borrow().leader;
        let to = leader.filter(|l| *l != self.index && self.believes().is_none());
        if self.relay.map(|(_, to)| to) == to {
            return;
        }
        let me = self.party();
        if let Some((conn, _)) = self.relay.take() {
            self.world.borrow_mut().close(me, conn);
        }
        let Some(to) = to else { return };
        let conn = self.world.borrow_mut().open(me, Party::Controller(to));
        self.relay = Some((conn, to));
        for host in self.hosts.values() {
            self.pass_on(Relayed::Host(host.index, host.session, host.report.clone()));
        }
        for proxy in self.proxies.values() {
            let shards = proxy.shards.values().cloned().collect();
            self.pass_on(Relayed::Proxy(proxy.index, shards, proxy.troubles.clone()));
        }
    }

    /// What was reported to an earlier leader may be long over; what is connected here is not.
    pub(super) fn begin_term(&mut self, desk: &Rc<Desk>) {
        desk.fleet.borrow_mut().nodes.clear();
        self.relay_on(desk);
        for host in self.hosts.values() {
            if let Some(report) = &host.report {
                desk.host_reported(report);
            }
        }
    }

    /// Shows the driver which hosts have a lease.
    pub(super) fn note_leases(&self, desk: &Rc<Desk>) {
        let mirror = desk.mirror.borrow();
        let mut leases: BTreeSet<slotmesh_topology::HostId> = (mirror.hosts.keys())
            .map(|host| format!("h{host}").into())
            .collect();
        if self.world.borrow().now() < self.presumed_until {
            let members = mirror.shards.values().flat_map(|s| &s.value.members);
            leases.extend(members.map(|m| m.host.clone()));
        }
        desk.fleet.borrow_mut().leases = leases;
    }

    pub(super) fn age(&self, desk: &Rc<Desk>) {
        let limit = desk.now_ms().saturating_sub(FRESH_FOR_MS);
        for (proxy, heard) in desk.heard.borrow().iter() {
            let id = format!("p{proxy}").into();
            if let Some(view) = desk.fleet.borrow_mut().proxies.get_mut(&id) {
                view.fresh &= *heard >= limit;
            }
        }
        desk.changed();
    }

    pub(super) fn closed(&mut self, desk: &Rc<Desk>, conn: ConnId) {
        self.sent.remove(&conn);
        self.routed.remove(&conn);
        desk.leases.borrow_mut().remove(&conn);
        if self.watch == Some(conn) {
            self.watch = None;
            let mut ctx = self.world.borrow_mut();
            ctx.timer(self.party(), 200 * MS, crate::msg::Timer::Connect);
        } else if self.relay.is_some_and(|(relay, _)| relay == conn) {
            self.relay = None;
        } else if let Some(host) = self.hosts.remove(&conn) {
            desk.host_gone(host.index, conn);
            self.pass_on(Relayed::HostGone(host.index));
        } else if let Some(proxy) = self.proxies.remove(&conn) {
            if !self.proxies.values().any(|p| p.index == proxy.index) {
                desk.proxy_gone(proxy.index);
                self.pass_on(Relayed::ProxyGone(proxy.index));
            }
        } else if let Some(relay) = self.relays.remove(&conn) {
            relay.hosts.iter().for_each(|h| desk.host_gone(*h, conn));
            relay.proxies.iter().for_each(|p| desk.proxy_gone(*p));
        }
        desk.changed();
    }
}

fn apply_shards(view: &mut ProxyView, shards: &[topology::ShardState]) {
    for state in shards {
        let level = match state.level() {
            topology::HoldLevel::Unspecified => continue,
            topology::HoldLevel::Applied => HoldLevel::Applied,
            topology::HoldLevel::Held => HoldLevel::Held,
        };
        let value = (Epoch(state.epoch), level, state.task_id.as_str().into());
        view.shards.insert(state.shard_id.as_str().into(), value);
    }
}
