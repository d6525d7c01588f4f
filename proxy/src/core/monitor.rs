//! MONITOR, IMONITOR and RIMONITOR: what nodes execute, shown to clients.
//!
//! A worker has one monitoring connection for each node that somebody watches, whoever and how many
//! they are. Invariants: a line names no inner address; what proxies and agents do for themselves is
//! not shown; a client sees lines only behind its `+OK`.
//!
//! While a shard changes its primary, lines of the new one come once its connection monitors; what it
//! executes before that is not shown.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use slotmesh_command::{Command, Flag};
use slotmesh_resp::{Protocol, parse_i64, write};

use super::Core;
use super::call::{Call, PeerRequest, Ticket};
use super::client::Pause;
use super::dispatch::{Flow, NOT_SERVED};
use super::line::{LineEvent, LineNo, Opening, Use};
use super::monitor_line::Shown;
use super::passing_topics::{Origin, divert};
use super::sessions::NoOutlet;
use super::spec::Request;
use super::subscriber_limits::Limits;
use crate::routing::ShardNo;

const NO_SUCH_NODE: &[u8] = b"ERR no such db node";
const NO_OBSERVER: &[u8] = b"ERR slotmesh: nodes cannot be monitored: they have no user for it";
const TOO_LATE: &[u8] = b"ERR slotmesh: a node could not be reached in time";
/// Question to all workers: show these lines.
const SHOW: &[u8] = b"monitor-show";
/// Between attempts to reach a node again.
const RETRY_US: u64 = 250_000;

/// A node that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    pub shard: ShardNo,
    /// Its replica of this number; `None`: its primary.
    pub replica: Option<u16>,
}

/// Of one client.
#[derive(Debug)]
pub(super) struct Monitoring {
    pub(super) sources: Vec<Source>,
    /// Where its `+OK` belongs, until all its nodes are watched; and until when that may take.
    waiting: Option<((u32, u32), u64)>,
}

#[derive(Debug)]
struct Watched {
    line: Option<(LineNo, SocketAddr)>,
    /// The node monitors for us.
    up: bool,
    /// To where the node is now; it takes over as soon as it monitors.
    next: Option<(LineNo, SocketAddr)>,
    retry_at_us: u64,
    /// Slots and generations.
    clients: BTreeMap<u32, u32>,
}

/// All of a worker.
#[derive(Debug, Default)]
pub(super) struct Monitors {
    sources: BTreeMap<Source, Watched>,
    /// Clients without their `+OK`.
    waiting: usize,
}

impl Core {
    /// MONITOR, IMONITOR or RIMONITOR.
    pub(super) fn monitor(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        let Some(client) = self.sessions.get(slot) else {
            return Flow::Taken;
        };
        if client.is_monitoring() {
            return Flow::Taken; // as Redis does it: no reply
        }
        if client.in_flight() > 0 {
            return Flow::NotYet;
        }
        let sources = match self.sources_of(command, request) {
            Ok(sources) => sources,
            Err(text) => return self.refuse(slot, text),
        };
        let until_us = self.now_us + self.table.settings.hold_budget_us;
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        let ticket = client.ticket();
        client.pause = Pause::Quiet;
        self.watch_sources(slot, sources, Some((ticket, until_us)));
        self.confirm_monitoring(slot);
        Flow::Taken
    }

    /// A client is shown what these nodes execute, once its `+OK` is there, if it waits for one.
    pub(super) fn watch_sources(
        &mut self,
        slot: u32,
        sources: Vec<Source>,
        waiting: Option<((u32, u32), u64)>,
    ) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        let generation = client.generation;
        client.extra_mut().monitoring = Some(Box::new(Monitoring {
            sources: sources.clone(),
            waiting,
        }));
        self.monitors.waiting += usize::from(waiting.is_some());
        self.pubsub.audience.monitor_began();
        for source in sources {
            let watched = self.monitors.sources.entry(source).or_insert(Watched {
                line: None,
                up: false,
                next: None,
                retry_at_us: 0,
                clients: BTreeMap::new(),
            });
            watched.clients.insert(slot, generation);
            self.steer_source(source);
        }
        self.out.unsteady = true;
    }

    /// True if a node is watched, and will be by the same connection.
    pub(super) fn is_watched(&self, source: &Source) -> bool {
        let watched = self.monitors.sources.get(source);
        watched.is_some_and(|watched| watched.up && watched.next.is_none())
    }

    fn sources_of(
        &self,
        command: &Command,
        request: Request<'_>,
    ) -> Result<Vec<Source>, &'static [u8]> {
        let shards = self.table.all_shards();
        let routes = shards
            .iter()
            .filter_map(|no| self.table.shards[usize::from(*no)].as_ref());
        if shards.is_empty() {
            return Err(NOT_SERVED.as_bytes());
        }
        if routes.clone().any(|route| route.observer.is_none()) {
            return Err(NO_OBSERVER);
        }
        let number = |at: usize| match parse_i64(request.arg(at)) {
            Some(number) => u16::try_from(number).map_err(|_| NO_SUCH_NODE),
            None => Err(&b"ERR value is not an integer or out of range"[..]),
        };
        if command.name == "monitor" {
            let primary = |shard| Source {
                shard,
                replica: None,
            };
            return Ok(shards.into_iter().map(primary).collect());
        }
        let shard = *shards.get(usize::from(number(1)?)).ok_or(NO_SUCH_NODE)?;
        let mut source = Source {
            shard,
            replica: None,
        };
        if command.name == "rimonitor" {
            source.replica = Some(number(2)?);
            self.node_of(source).ok_or(NO_SUCH_NODE)?;
        }
        Ok(vec![source])
    }

    fn node_of(&self, source: Source) -> Option<SocketAddr> {
        let route = self.table.shards.get(usize::from(source.shard))?.as_ref()?;
        match source.replica {
            None => Some(route.address),
            Some(replica) => route.replicas.get(usize::from(replica)).copied(),
        }
    }

    /// The refusal of a command that a monitoring client may not call.
    pub(super) fn refused_while_monitoring(
        &self,
        slot: u32,
        command: &Command,
    ) -> Option<&'static str> {
        let monitors = self
            .sessions
            .get(slot)
            .is_some_and(|client| client.is_monitoring());
        let touches = command.flags.has(Flag::Write)
            || command.flags.has(Flag::ReadOnly)
            || matches!(
                command.name,
                "publish" | "spublish" | "eval" | "evalsha" | "fcall"
            );
        (monitors && touches).then_some("ERR Replica can't interact with the keyspace")
    }

    /// Connects to where a watched node is now.
    fn steer_source(&mut self, source: Source) {
        let address = self.node_of(source);
        let now_us = self.now_us;
        let Some(watched) = self.monitors.sources.get_mut(&source) else {
            return;
        };
        let target = watched.next.or(watched.line).map(|(_, address)| address);
        if address.is_none() || target == address {
            return; // a node that is gone may come back
        }
        if watched.retry_at_us > now_us {
            self.out.unsteady = true;
            return;
        }
        if let Some((line, _)) = watched.next.take() {
            self.close_line(line);
        }
        let route = self
            .table
            .shards
            .get(usize::from(source.shard))
            .cloned()
            .flatten();
        let (Some(address), Some(route)) = (address, route) else {
            return;
        };
        let Some(login) = route.observer.clone() else {
            return;
        };
        let line = self.open_line(Opening {
            user: Use::Monitor(source),
            shard: source.shard,
            epoch: route.epoch,
            address,
            login,
            protocol: Protocol::Resp2,
        });
        self.write_line(line, |out| write::encode_command(out, &[b"MONITOR"]));
        self.cut_renewed(Origin::Node(source));
        if let Some(watched) = self.monitors.sources.get_mut(&source) {
            match watched.line {
                None => watched.line = Some((line, address)),
                Some(_) => watched.next = Some((line, address)),
            }
        }
    }

    /// A new routing table.
    pub(super) fn apply_monitors(&mut self) {
        let sources: Vec<Source> = self.monitors.sources.keys().copied().collect();
        for source in sources {
            self.steer_source(source);
        }
    }

    /// Something happened to a connection that monitors.
    pub(super) fn monitor_event(&mut self, no: LineNo, source: Source, event: LineEvent<'_>) {
        match event {
            LineEvent::Ready => {}
            LineEvent::Reply(b"+OK\r\n") => self.source_up(no, source),
            LineEvent::Reply(reply) if reply.first() == Some(&b'-') => {
                self.close_line(no);
                self.source_lost(no, source, Some(reply));
            }
            LineEvent::Reply(reply) => {
                let watched = self.monitors.sources.get(&source);
                let line = watched.and_then(|watched| watched.line);
                if line.is_some_and(|(line, _)| line == no) {
                    self.cut_shown(source, reply);
                    self.show(source, reply);
                }
            }
            LineEvent::Lost(_) => self.source_lost(no, source, None),
        }
    }

    fn source_up(&mut self, no: LineNo, source: Source) {
        let Some(watched) = self.monitors.sources.get_mut(&source) else {
            return;
        };
        let next = watched.next.take_if(|(line, _)| *line == no);
        let old = if next.is_some() {
            watched.line.take()
        } else {
            None
        };
        watched.line = next.or(watched.line);
        watched.up = true;
        let clients: Vec<u32> = watched.clients.keys().copied().collect();
        if let Some((line, _)) = old {
            self.close_line(line);
        }
        if self.monitors.waiting > 0 {
            clients
                .into_iter()
                .for_each(|slot| self.confirm_monitoring(slot));
        }
    }

    fn source_lost(&mut self, no: LineNo, source: Source, words: Option<&[u8]>) {
        let retry_at_us = self.now_us + RETRY_US;
        self.out.unsteady = true;
        let Some(watched) = self.monitors.sources.get_mut(&source) else {
            return;
        };
        watched.retry_at_us = retry_at_us;
        if watched.next.take_if(|(line, _)| *line == no).is_none() {
            watched.line = None;
            watched.up = false;
            // What was opened meanwhile is as good.
            watched.line = watched.next.take();
        }
        let Some(words) = words else { return };
        let text = words
            .get(1..words.len().saturating_sub(2))
            .unwrap_or_default()
            .to_vec();
        let clients: Vec<u32> = watched.clients.keys().copied().collect();
        for slot in clients {
            self.fail_monitoring(slot, &text);
        }
    }

    /// Tells a client that it monitors, once all its nodes do.
    fn confirm_monitoring(&mut self, slot: u32) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        let generation = client.generation;
        let extra = client.extra.as_mut();
        let Some(own) = extra.and_then(|extra| extra.monitoring.as_mut()) else {
            return;
        };
        let sources = &self.monitors.sources;
        let up = |source: &Source| sources.get(source).is_some_and(|watched| watched.up);
        if !own.sources.iter().all(up) {
            return;
        }
        if let Some(((reply_generation, seq), _)) = own.waiting.take() {
            self.monitors.waiting -= 1;
            let ok = b"+OK\r\n";
            self.sessions
                .deliver(slot, reply_generation, seq, ok, &mut NoOutlet);
            self.sessions.resume_quiet(slot, generation);
        }
    }

    fn fail_monitoring(&mut self, slot: u32, text: &[u8]) {
        let client = self.sessions.get(slot);
        let extra = client.and_then(|client| client.extra.as_ref());
        let own = extra.and_then(|extra| extra.monitoring.as_ref());
        let Some(((reply_generation, seq), _)) = own.and_then(|own| own.waiting) else {
            return; // it monitors already; its node may come back
        };
        let generation = client.map_or(0, |client| client.generation);
        self.end_monitoring(slot);
        self.counters.errors += 1;
        let mut reply = Vec::new();
        write::write_error(&mut reply, text);
        self.sessions
            .deliver(slot, reply_generation, seq, &reply, &mut NoOutlet);
        self.sessions.resume_quiet(slot, generation);
    }

    /// The client leaves, or is reset.
    pub(super) fn end_monitoring(&mut self, slot: u32) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        let extra = client.extra.as_mut();
        let Some(own) = extra.and_then(|extra| extra.monitoring.take()) else {
            return;
        };
        client.tidy_extra();
        self.monitors.waiting -= usize::from(own.waiting.is_some());
        self.pubsub.audience.monitor_ended();
        for source in own.sources {
            let Some(watched) = self.monitors.sources.get_mut(&source) else {
                continue;
            };
            watched.clients.remove(&slot);
            if watched.clients.is_empty() {
                let lines = [watched.line, watched.next];
                self.monitors.sources.remove(&source);
                for (line, _) in lines.into_iter().flatten() {
                    self.close_line(line);
                }
            }
        }
    }

    /// One line for all who watch its node.
    fn show(&mut self, source: Source, line: &[u8]) {
        let Some(watched) = self.monitors.sources.get(&source) else {
            return;
        };
        let Some(shown) = Shown::read(line) else {
            return;
        };
        self.scratch.clear();
        shown.write(&mut self.scratch, self.identity.port);
        let limits = Limits::of(&self.table);
        for (&slot, &generation) in &watched.clients {
            let client = self.sessions.get_same(slot, generation);
            let extra = client.and_then(|client| client.extra.as_ref());
            let own = extra.and_then(|extra| extra.monitoring.as_ref());
            if own.is_some_and(|own| own.waiting.is_none()) {
                let (cuts, origin) = (&mut self.pubsub.cuts, Origin::Node(source));
                if !cuts.is_empty() && divert(cuts, origin, (slot, generation), &self.scratch) {
                    continue;
                }
                let (slow, bytes) = (&mut self.pubsub.slow, &self.scratch);
                let client = (slot, generation);
                if slow.push(&mut self.sessions, client, bytes, limits, self.now_us) {
                    self.out.unsteady = true;
                }
            }
        }
    }

    /// A transaction that is refused here and never reaches a node is shown all the same, to the
    /// monitors of all workers.
    pub(super) fn show_refused_exec(&mut self, slot: u32) {
        let Some(client) = self.sessions.get(slot) else {
            return;
        };
        let dirty = client
            .state
            .transaction
            .as_ref()
            .is_some_and(|queued| queued.dirty);
        if !dirty || !self.pubsub.audience.is_monitored() {
            return;
        }
        let (seconds, micros) = (self.now_unix_us / 1_000_000, self.now_unix_us % 1_000_000);
        let (db, port) = (client.state.db, self.identity.port);
        let lines = ["multi", "exec"].map(|name| {
            format!("+{seconds}.{micros:06} [{db} proxy:{port}] \"{name}\"\r\n").into_bytes()
        });
        let request = PeerRequest {
            client_id: 0,
            words: [SHOW.to_vec()].into_iter().chain(lines).collect(),
        };
        let nobody = Ticket {
            job: super::tracking_remote::REDIRECTED,
            index: 0,
        };
        self.out.calls.push((nobody, Call::Peers(request)));
    }

    /// Lines of another worker, or this one, that no node has.
    pub(super) fn peer_monitor(&mut self, request: &PeerRequest) -> Option<Vec<u8>> {
        if request.words.first()? != SHOW {
            return None;
        }
        // A client that watches several nodes sees it once.
        if let Some(source) = self.monitors.sources.keys().next().copied() {
            request.words[1..]
                .iter()
                .for_each(|line| self.show(source, line));
        }
        Some(b":1\r\n".to_vec())
    }

    /// Acts on what is due. Returns when to look again.
    pub(super) fn monitors_on_time(&mut self) -> Option<u64> {
        let now_us = self.now_us;
        let mut due = None::<u64>;
        let mut sooner = |at: u64| due = Some(due.map_or(at, |due| due.min(at)));
        let (mut retried, mut late) = (Vec::new(), Vec::new());
        for (source, watched) in &self.monitors.sources {
            if watched.retry_at_us > now_us {
                sooner(watched.retry_at_us);
            } else if watched.line.is_none() || watched.retry_at_us > 0 {
                retried.push(*source);
            }
            if self.monitors.waiting == 0 {
                continue;
            }
            for slot in watched.clients.keys() {
                let extra = self
                    .sessions
                    .get(*slot)
                    .and_then(|client| client.extra.as_ref());
                let own = extra.and_then(|extra| extra.monitoring.as_ref());
                match own.and_then(|own| own.waiting) {
                    Some((_, until_us)) if until_us <= now_us => late.push(*slot),
                    Some((_, until_us)) => sooner(until_us),
                    None => {}
                }
            }
        }
        for source in retried {
            if let Some(watched) = self.monitors.sources.get_mut(&source) {
                watched.retry_at_us = 0;
            }
            self.steer_source(source);
        }
        for slot in late {
            self.fail_monitoring(slot, TOO_LATE);
        }
        due
    }
}
