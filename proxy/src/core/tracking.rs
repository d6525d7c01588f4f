//! CLIENT TRACKING: clients keep what they read, and are told when it changed.
//!
//! While a client of a worker tracks, the worker hears of every changed key over one connection per
//! shard, and keeps who read what. Invariants: a read is remembered before it is sent, and its
//! reader is told behind the replies to everything that was under way then; so no value that a client
//! keeps outlives the notice. Where notices may have been missed (a connection is lost, a primary
//! changes), everybody is told to forget everything.
//!
//! On an instance of one shard the node does all of that: [`super::tracking_own`]. Elsewhere, and past
//! the number of connections for it, nodes tell changes without who made them, and several changes of
//! a key as one. So NOLOOP is taken and shown there, but a client hears of its own writes too: to be
//! told too much costs it a read, too little would leave it a stale value.

use std::collections::{BTreeMap, BTreeSet};

use slotmesh_command::Command;
use slotmesh_resp::{Protocol, write};

use super::Core;
use super::client::Pause;
use super::dispatch::Flow;
use super::pubsub_frame::members;
use super::sessions::NoOutlet;
use super::spec::Request;
use super::tracking_ear::Ear;
use super::tracking_options::{Asked, Mode, Options, read, write_info};
use super::tracking_own::{OwnTracking, Owns};
use super::tracking_remote::Remote;
use super::tracking_script::keys_read;
use super::tracking_table::{ClientNo, Readers, Table};
use crate::routing::ShardNo;

const TOO_LATE: &[u8] = b"ERR slotmesh: a shard could not be reached in time; nothing is tracked";
/// Of one client.
#[derive(Debug)]
pub(super) struct Tracking {
    pub(super) options: Options,
    /// CLIENT CACHING was called for the next command.
    pub(super) caching: bool,
    /// Whom it redirects to is gone.
    pub(super) broken: bool,
    /// Where its `+OK` belongs, until all shards are heard; and until when that may take.
    pub(super) waiting: Option<((u32, u32), u64)>,
    /// Its own lane, where the node tracks. `None`: this worker does, by its ears.
    pub(super) own: Option<OwnTracking>,
    /// What is in flight went over lanes that its commands no longer take.
    pub(super) moving: bool,
}

impl Tracking {
    /// The keys that the next command reads are to be remembered.
    pub(super) fn wants_reads(&self) -> bool {
        match self.options.mode {
            Mode::All => true,
            Mode::OptIn => self.caching,
            Mode::OptOut => !self.caching,
            Mode::Broadcast => false,
        }
    }
}

/// All of a worker.
#[derive(Debug, Default)]
pub(super) struct Trackers {
    pub(super) clients: BTreeMap<u32, u32>,
    /// So many of them without a lane of their own.
    pub(super) by_ear: usize,
    pub(super) waiting: usize,
    pub(super) owns: Owns,
    pub(super) ears: BTreeMap<ShardNo, Ear>,
    pub(super) table: Table,
    pub(super) remote: Remote,
}

impl Core {
    /// CLIENT TRACKING.
    pub(super) fn client_tracking(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let Some(client) = self.sessions.get(slot) else {
            return Flow::Taken;
        };
        if client.in_flight() > 0 {
            return Flow::NotYet;
        }
        let words: Vec<&[u8]> = (2..request.len()).map(|at| request.arg(at)).collect();
        let extra = client.extra.as_ref();
        let now = extra
            .and_then(|extra| extra.tracking.as_ref())
            .map(|own| &own.options);
        let known = |id: u64| self.sessions.iter().any(|client| client.state.id == id);
        match read(&words, now, |_| true) {
            Err(text) => self.refuse(slot, text.as_bytes()),
            Ok(Asked::Off) => {
                self.end_tracking(slot);
                self.reply_simple(slot, "OK")
            }
            Ok(Asked::On(options)) if options.redirect == 0 || known(options.redirect) => {
                self.begin_tracking(slot, options)
            }
            Ok(Asked::On(_)) => self.track_for_another(slot, &words),
        }
    }

    /// Tracks from now on; `+OK` once all shards are heard.
    fn begin_tracking(&mut self, slot: u32, options: Options) -> Flow {
        let until_us = self.now_us + self.table.settings.hold_budget_us;
        let ticket = self.sessions.get_mut(slot).map(|client| client.ticket());
        self.set_tracking(slot, options, ticket.map(|ticket| (ticket, until_us)));
        if let Some(client) = self.sessions.get_mut(slot) {
            client.pause = Pause::Quiet;
        }
        self.confirm_tracking(slot);
        Flow::Taken
    }

    pub(super) fn set_tracking(
        &mut self,
        slot: u32,
        options: Options,
        waiting: Option<((u32, u32), u64)>,
    ) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        let (generation, extra) = (client.generation, client.extra.as_mut());
        let before = extra.and_then(|extra| extra.tracking.take());
        let is_new = before.is_none();
        let redirects = [
            before.as_ref().map(|own| own.options.redirect),
            Some(options.redirect),
        ];
        let (own, prefixes) = match before {
            Some(before) => (before.own, before.options.prefixes),
            None => (self.open_own_lane(slot), BTreeSet::new()),
        };
        let added: BTreeSet<Vec<u8>> = options.prefixes.difference(&prefixes).cloned().collect();
        let by_ear = own.is_none();
        if by_ear {
            let client = (slot, generation);
            self.trackers.table.add_prefixes(client, added.iter());
        }
        self.trackers.waiting += usize::from(waiting.is_some());
        self.trackers.by_ear += usize::from(is_new && by_ear);
        self.trackers.clients.insert(slot, generation);
        self.count_redirects(redirects);
        if let Some(client) = self.sessions.get_mut(slot) {
            client.extra_mut().tracking = Some(Box::new(Tracking {
                options,
                caching: false,
                broken: false,
                waiting,
                own,
                moving: false,
            }));
        }
        if by_ear {
            self.steer_ears();
        } else {
            self.steer_own_lane(slot, &added);
        }
        self.out.unsteady = true;
    }

    /// The client leaves, is reset, or wants no more.
    pub(super) fn end_tracking(&mut self, slot: u32) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        let extra = client.extra.as_mut();
        let Some(own) = extra.and_then(|extra| extra.tracking.take()) else {
            return;
        };
        let no = (slot, client.generation);
        client.tidy_extra();
        self.trackers.waiting -= usize::from(own.waiting.is_some());
        self.trackers.clients.remove(&slot);
        self.count_redirects([Some(own.options.redirect), None]);
        if let Some(own) = own.own {
            return self.release_own_lane(&own);
        }
        self.trackers
            .table
            .remove_prefixes(no, own.options.prefixes.iter());
        self.trackers.by_ear -= 1;
        if self.trackers.by_ear == 0 {
            self.trackers.table.forget_keys();
            self.close_ears();
        }
    }

    /// The engine's limit of remembered keys is ours too. Set by whoever sees it change.
    pub(super) fn set_tracking_keys_max(&mut self, max: usize) {
        for (key, readers) in self.trackers.table.set_keys_max(max) {
            self.tell_readers(&key, readers);
        }
    }

    /// CLIENT CACHING.
    pub(super) fn client_caching(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let extra = self
            .sessions
            .get_mut(slot)
            .and_then(|client| client.extra.as_mut());
        let own = extra.and_then(|extra| extra.tracking.as_mut());
        let mode = own.as_ref().map(|own| own.options.mode);
        let text: &[u8] = match mode {
            None => {
                b"ERR CLIENT CACHING can be called only when the client is in tracking mode with \
                  OPTIN or OPTOUT mode enabled"
            }
            Some(Mode::OptIn) if request.is(2, "yes") => b"",
            Some(Mode::OptOut) if request.is(2, "no") => b"",
            _ if request.is(2, "yes") => {
                b"ERR CLIENT CACHING YES is only valid when tracking is enabled in OPTIN mode."
            }
            _ if request.is(2, "no") => {
                b"ERR CLIENT CACHING NO is only valid when tracking is enabled in OPTOUT mode."
            }
            _ => b"ERR syntax error",
        };
        if !text.is_empty() {
            return self.refuse(slot, text);
        }
        if let Some(own) = own {
            own.caching = true;
        }
        self.reply_simple(slot, "OK")
    }

    /// CLIENT TRACKINGINFO.
    pub(super) fn client_tracking_info(&mut self, slot: u32) -> Flow {
        let Some(client) = self.sessions.get(slot) else {
            return Flow::Taken;
        };
        let extra = client.extra.as_ref();
        let own = extra.and_then(|extra| extra.tracking.as_ref());
        let (caching, broken) = own.map_or((false, false), |own| (own.caching, own.broken));
        let options = own.map(|own| &own.options);
        let mut reply = Vec::new();
        write_info(&mut reply, client.state.protocol, options, caching, broken);
        self.reply_with(slot, |out| out.extend_from_slice(&reply))
    }

    /// CLIENT GETREDIR.
    pub(super) fn client_get_redirection(&mut self, slot: u32) -> Flow {
        let id = self
            .sessions
            .get(slot)
            .map_or(-1, |client| client.redirection());
        self.reply_with(slot, |out| write::write_int(out, id))
    }

    /// Remembers what a command of a tracking client reads. Called before the command goes its way.
    pub(super) fn track_reads(&mut self, slot: u32, command: &Command, request: Request<'_>) {
        let Some(client) = self.sessions.get(slot) else {
            return;
        };
        let no = (slot, client.generation);
        let extra = client.extra.as_ref();
        let Some(own) = extra.and_then(|extra| extra.tracking.as_ref()) else {
            return;
        };
        if own.own.is_some() || !own.wants_reads() {
            return;
        }
        for key in keys_read(client, command, &request) {
            let evicted = self.trackers.table.remember(&key, no);
            for (key, readers) in evicted {
                self.tell_readers(&key, readers);
            }
        }
    }

    /// The next command is not the one that CLIENT CACHING was about any more.
    pub(super) fn end_caching(&mut self, slot: u32, command: &Command) {
        if let Some(client) = self.sessions.get_mut(slot)
            && client.state.transaction.is_none()
            && !command.name.starts_with("client|")
            && let Some(extra) = &mut client.extra
            && let Some(own) = &mut extra.tracking
        {
            own.caching = false;
        }
    }

    pub(super) fn confirm_tracking(&mut self, slot: u32) {
        let client = self.sessions.get(slot);
        let has_own = client.is_some_and(|client| client.own_tracking().is_some());
        if has_own || !self.trackers.ears.values().all(Ear::is_up) {
            return;
        }
        self.answer_tracking(slot, b"+OK\r\n");
    }

    /// The reply to a CLIENT TRACKING that waits.
    pub(super) fn answer_tracking(&mut self, slot: u32, reply: &[u8]) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        let own_generation = client.generation;
        let extra = client.extra.as_mut();
        let own = extra.and_then(|extra| extra.tracking.as_mut());
        if let Some(((generation, seq), _)) = own.and_then(|own| own.waiting.take()) {
            self.trackers.waiting -= 1;
            self.sessions
                .deliver(slot, generation, seq, reply, &mut NoOutlet);
            self.sessions.resume_quiet(slot, own_generation);
        }
    }

    /// Keys have changed at a node, or all of them.
    pub(super) fn changed(&mut self, push: &[u8]) {
        let Some(keys) = push.strip_prefix(b">2\r\n$10\r\ninvalidate\r\n") else {
            return;
        };
        if keys.first() != Some(&b'*') {
            return self.tell_everybody();
        }
        let mut told: Vec<(Vec<&[u8]>, Readers)> = Vec::new();
        for (prefix, clients) in self.trackers.table.prefixes() {
            let matching: Vec<&[u8]> = members(keys)
                .filter(|key| key.starts_with(prefix))
                .collect();
            if !matching.is_empty() {
                told.push((matching, clients.iter().copied().collect()));
            }
        }
        // Nodes list what changed together by name, not by time.
        let mut changed: Vec<&[u8]> = members(keys).collect();
        changed.reverse();
        for key in changed {
            if let Some(readers) = self.trackers.table.take(key) {
                self.tell_readers(key, readers);
            }
        }
        for (matching, clients) in told {
            let mut all = Vec::new();
            write::encode_command(&mut all, &matching);
            for no in clients {
                self.tell(no, Some(&all));
            }
        }
    }

    fn tell_readers(&mut self, key: &[u8], readers: Readers) {
        let mut list = Vec::new();
        write::encode_command(&mut list, &[key]);
        for no in readers {
            // What was read before the client switched to broadcasts is told by those.
            let client = self.sessions.get_same(no.0, no.1);
            let extra = client.and_then(|client| client.extra.as_ref());
            let own = extra.and_then(|extra| extra.tracking.as_ref());
            if own.is_some_and(|own| own.options.mode != Mode::Broadcast) {
                self.tell(no, Some(&list));
            }
        }
    }

    /// Everything may have changed.
    pub(super) fn tell_everybody(&mut self) {
        self.trackers.table.forget_keys();
        let all: Vec<ClientNo> = self
            .trackers
            .clients
            .iter()
            .map(|(a, b)| (*a, *b))
            .collect();
        for no in all {
            let client = self.sessions.get_same(no.0, no.1);
            if client.is_some_and(|client| client.own_tracking().is_none()) {
                self.tell(no, None);
            }
        }
    }

    /// Tells a client, or whom it redirects to; `None`: everything.
    pub(super) fn tell(&mut self, (slot, generation): ClientNo, keys: Option<&[u8]>) {
        let Some(client) = self.sessions.get_same(slot, generation) else {
            return;
        };
        let protocol = client.state.protocol;
        let extra = client.extra.as_ref();
        let Some(own) = extra.and_then(|extra| extra.tracking.as_ref()) else {
            return;
        };
        if own.waiting.is_some() {
            return; // it has read nothing yet
        }
        let redirect = own.options.redirect;
        let mut null = Vec::new();
        write::write_null(&mut null, protocol);
        let keys = keys.unwrap_or(&null);
        if redirect != 0 {
            self.tell_another(redirect, keys);
        } else if protocol == Protocol::Resp3 {
            let mut push = b">2\r\n$10\r\ninvalidate\r\n".to_vec();
            push.extend_from_slice(keys);
            self.push_behind(slot, generation, &push);
        }
    }

    /// Gives bytes to a client behind the replies to all that is under way.
    pub(super) fn push_behind(&mut self, slot: u32, generation: u32, bytes: &[u8]) {
        let Some(client) = self.sessions.get_same(slot, generation) else {
            return;
        };
        // What waits at a node may wait for long, and is no read that a client keeps.
        if client.in_flight() == 0 || client.is_muted() || client.pause == Pause::Blocked {
            return self.sessions.push(slot, generation, bytes);
        }
        let (generation, seq) = client.ticket();
        self.sessions
            .deliver(slot, generation, seq, bytes, &mut NoOutlet);
    }

    /// Acts on what is due. Returns when to look again.
    pub(super) fn tracking_on_time(&mut self) -> Option<u64> {
        let now_us = self.now_us;
        let mut due = None::<u64>;
        let retry = self.retry_ears().into_iter().chain(self.retry_mails());
        let retry = retry.chain(self.redirects_due()).min();
        let mut sooner = |at: u64| due = Some(due.map_or(at, |due| due.min(at)));
        retry.into_iter().for_each(&mut sooner);
        let mut late = Vec::new();
        if self.trackers.waiting > 0 {
            for slot in self.trackers.clients.keys() {
                let extra = self
                    .sessions
                    .get(*slot)
                    .and_then(|client| client.extra.as_ref());
                let own = extra.and_then(|extra| extra.tracking.as_ref());
                match own.and_then(|own| own.waiting) {
                    Some((_, until_us)) if until_us <= now_us => late.push(*slot),
                    Some((_, until_us)) => sooner(until_us),
                    None => {}
                }
            }
        }
        for slot in late {
            let mut reply = Vec::new();
            write::write_error(&mut reply, TOO_LATE);
            self.answer_tracking(slot, &reply);
            self.end_tracking(slot);
        }
        due
    }
}
