//! CLIENT TRACKING by the node itself, for clients of an instance of one shard: each has a lane of its
//! own, on which the node tracks; so what NOLOOP, OPTIN and BCAST mean, how many notices there are
//! and where they stand among the replies is the node's own.
//!
//! Invariants: a client with such a lane reads over it, or has the node note the keys there before
//! it reads them elsewhere. Where the node has forgotten what the client has read (the connection is
//! lost, the primary changes), the client, or whom it redirects to, is told to forget everything,
//! and again once the node tracks anew.

use std::collections::BTreeSet;

use slotmesh_command::{Class, Command};
use slotmesh_resp::{Protocol, write};

use super::Core;
use super::client::Client;
use super::dispatch::Flow;
use super::lane::{Lane, LaneNo, Own};
use super::outbox::Order;
use super::queue::{Entry, Kind};
use super::retry::Effect;
use super::spec::{self, Request};
use super::tracking::Tracking;
use super::tracking_mail::Mail;
use super::tracking_options::{Mode, Options};
use super::tracking_table::ClientNo;
use crate::routing::ShardNo;

/// What a client has for itself.
#[derive(Debug)]
pub(super) struct OwnTracking {
    pub(super) lane: LaneNo,
    /// Whom it redirects to is told what comes by it.
    pub(super) mail: Option<Mail>,
    /// The node has noted the keys of the next command.
    noted: bool,
}

/// Of all such clients of a worker.
#[derive(Debug, Default)]
pub(super) struct Owns {
    /// Lanes whose client is gone, but not yet all that it asked.
    leaving: Vec<LaneNo>,
    /// Clients whose mail was lost, and when to try again.
    pub(super) lost: Vec<(ClientNo, u64)>,
}

impl Tracking {
    /// The lane of its commands, and whether CLIENT CACHING belongs to the next.
    pub(super) fn own_lane(&self) -> Option<(LaneNo, u16)> {
        let own = self.own.as_ref()?;
        let part = if self.caching { Entry::CACHING } else { 0 };
        Some((own.lane, part))
    }
}

impl Client {
    pub(super) fn own_tracking(&self) -> Option<&OwnTracking> {
        self.extra.as_ref()?.tracking.as_ref()?.own.as_ref()
    }

    pub(super) fn own_tracking_mut(&mut self) -> Option<&mut OwnTracking> {
        self.extra.as_mut()?.tracking.as_mut()?.own.as_mut()
    }
}

/// What tells a node to track so; `mail` is what it calls whom it is to tell instead.
pub(super) fn frames(
    options: &Options,
    prefixes: &BTreeSet<Vec<u8>>,
    mail: Option<i64>,
) -> Vec<Vec<u8>> {
    let mut words: Vec<Vec<u8>> = vec![b"CLIENT".into(), b"TRACKING".into(), b"ON".into()];
    match options.mode {
        Mode::All => {}
        Mode::OptIn => words.push(b"OPTIN".into()),
        Mode::OptOut => words.push(b"OPTOUT".into()),
        Mode::Broadcast => words.push(b"BCAST".into()),
    }
    if options.no_loop {
        words.push(b"NOLOOP".into());
    }
    if let Some(id) = mail {
        words.extend([b"REDIRECT".to_vec(), id.to_string().into_bytes()]);
    }
    let encode = |words: &[Vec<u8>]| {
        let mut frame = Vec::new();
        let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
        write::encode_command(&mut frame, &words);
        frame
    };
    let mut frames = Vec::new();
    let mut named = words.clone();
    for prefix in prefixes.iter().filter(|prefix| !prefix.is_empty()) {
        named.extend([b"PREFIX".to_vec(), prefix.clone()]);
    }
    if named.len() > words.len() {
        frames.push(encode(&named));
    }
    // All keys, named as such, would overlap with every other prefix.
    if frames.is_empty() || prefixes.contains(&b""[..]) {
        frames.push(encode(&words));
    }
    frames
}

impl Core {
    /// A lane for one client, if there may be one more.
    pub(super) fn open_own_lane(&mut self, slot: u32) -> Option<OwnTracking> {
        let shard = self.table.only_shard()?;
        let max = self.table.settings.parameters.private_connections_max;
        let client = self.sessions.get(slot)?;
        if self.lanes.own_len() >= max {
            return None;
        }
        let protocol = client.state.protocol;
        let own = Own {
            client: (slot, client.generation),
            shard,
            setup: Vec::new(),
            caching: b"YES",
            tracked: false,
        };
        let lane = self
            .lanes
            .open_own(shard, |no, like| Lane::new_own(no, own, protocol, like));
        Some(OwnTracking {
            lane,
            mail: None,
            noted: false,
        })
    }

    /// Has the node track as the client's options say; `added` are the prefixes that are new.
    pub(super) fn steer_own_lane(&mut self, slot: u32, added: &BTreeSet<Vec<u8>>) {
        let Some(client) = self.sessions.get(slot) else {
            return;
        };
        let extra = client.extra.as_ref();
        let Some(tracking) = extra.and_then(|extra| extra.tracking.as_ref()) else {
            return;
        };
        let (Some(own), options) = (&tracking.own, &tracking.options) else {
            return;
        };
        let id = match &own.mail {
            _ if options.redirect == 0 => None,
            None => return self.open_mail(slot),
            Some(Mail { id: None, .. }) => return,
            Some(mail) => mail.id,
        };
        let (no, now) = (own.lane, frames(options, added, id));
        let setup = frames(options, &options.prefixes, id);
        let out = options.mode == Mode::OptOut;
        self.set_up_lane(no, now, setup, if out { b"NO" } else { b"YES" });
    }

    pub(super) fn set_up_lane(
        &mut self,
        no: LaneNo,
        now: Vec<Vec<u8>>,
        setup: Vec<Vec<u8>>,
        caching: &'static [u8],
    ) {
        let lane = &mut self.lanes[no as usize];
        if let Some(own) = &mut lane.own {
            own.caching = caching;
        }
        lane.track(now, setup, self.now_us, &mut self.out);
        if !lane.has_route()
            && let Some(Some(route)) = self.table.shards.get(usize::from(lane.shard()))
        {
            lane.set_route(route, self.now_us, &mut self.out);
        }
    }

    /// A node that was told to track does.
    pub(super) fn lane_tracks(&mut self, no: LaneNo) {
        let Some(own) = &mut self.lanes[no as usize].own else {
            return;
        };
        let again = std::mem::replace(&mut own.tracked, true);
        let (slot, generation) = own.client;
        let owner = self.sessions.get_same(slot, generation);
        let extra = owner.and_then(|client| client.extra.as_ref());
        let tracking = extra.and_then(|extra| extra.tracking.as_ref());
        match tracking.map(|tracking| tracking.waiting.is_some()) {
            Some(true) => self.answer_tracking(slot, b"+OK\r\n"),
            // What was read until now may have changed unseen.
            Some(false) if again => self.tell((slot, generation), None),
            _ => {}
        }
    }

    /// A node says what was not asked, over a lane: that keys have changed, if it is a client's own.
    #[cold]
    pub(super) fn lane_push(&mut self, no: LaneNo, push: &[u8]) {
        let lane = &self.lanes[no as usize];
        let Some(own) = &lane.own else { return };
        let (slot, generation) = own.client;
        let keeps = lane.durable.is_asking();
        let Some(client) = self.sessions.get_same(slot, generation) else {
            return;
        };
        if keeps || client.stash.is_some() {
            // A reply that came ahead of it waits for one from elsewhere, or to be confirmed.
            self.push_behind(slot, generation, push);
        } else {
            self.sessions.push(slot, generation, push);
        }
    }

    /// Tells clients whose node has forgotten what they have read.
    pub(super) fn tell_forgotten(&mut self) {
        for no in std::mem::take(&mut self.out.forgotten) {
            let Some(own) = &mut self.lanes[no as usize].own else {
                continue;
            };
            let client = own.client;
            self.tell(client, None);
            let owner = self.sessions.get_same(client.0, client.1);
            let own = owner.and_then(Client::own_tracking_mut);
            if let Some(Mail { line, .. }) = own.and_then(|own| own.mail.take()) {
                if let Some(own) = &mut self.lanes[no as usize].own {
                    own.setup.clear(); // its number is another one's soon
                }
                self.close_line(line);
                self.open_mail(client.0);
            }
        }
    }

    /// The client of a lane is gone, or wants it no more: what it asked is still done.
    pub(super) fn release_own_lane(&mut self, own: &OwnTracking) {
        if let Some(mail) = &own.mail {
            self.close_line(mail.line);
        }
        self.trackers.owns.leaving.push(own.lane);
        self.out.unsteady = true;
    }

    /// Closes lanes without a client once nothing is left on them.
    pub(super) fn close_own_lanes(&mut self) {
        if self.trackers.owns.leaving.is_empty() {
            return;
        }
        let lanes = &self.lanes;
        let quiet = |no: &mut LaneNo| lanes[*no as usize].is_quiet();
        let quiet: Vec<_> = self.trackers.owns.leaving.extract_if(.., quiet).collect();
        for no in quiet {
            self.end_busy(no);
            self.out.orders.push(Order::Hangup { lane: no });
            self.lanes.close_own(no);
        }
    }

    /// A new routing table.
    pub(super) fn renew_own_lanes(&mut self) {
        for no in self.lanes.own_numbers() {
            let lane = &mut self.lanes[no as usize];
            if !lane.has_route() {
                continue;
            }
            match self.table.shards.get(usize::from(lane.shard())) {
                Some(Some(route)) => lane.set_route(route, self.now_us, &mut self.out),
                _ => self.drop_lane(no),
            }
        }
    }

    /// There is more than one shard now: whoever has a lane is told by ear from now on.
    pub(super) fn leave_own_lanes(&mut self) {
        let only = self.table.only_shard();
        let clients: Vec<ClientNo> = (self.trackers.clients.iter())
            .map(|(slot, generation)| (*slot, *generation))
            .collect();
        for client in clients {
            let Some(owner) = self.sessions.get_same(client.0, client.1) else {
                continue;
            };
            let in_flight = owner.in_flight() > 0;
            let extra = owner.extra.as_mut();
            let Some(tracking) = extra.and_then(|extra| extra.tracking.as_mut()) else {
                continue;
            };
            let lanes = &self.lanes;
            let stays = |own: &mut OwnTracking| only != Some(lanes[own.lane as usize].shard());
            let Some(own) = tracking.own.take_if(stays) else {
                continue;
            };
            tracking.moving = in_flight;
            let prefixes = tracking.options.prefixes.clone();
            self.release_own_lane(&own);
            self.trackers.by_ear += 1;
            self.trackers.table.add_prefixes(client, prefixes.iter());
            self.tell(client, None);
        }
    }

    /// True if something is in flight over a client's own lane to a shard.
    pub(super) fn own_lanes_run(&self, shard: ShardNo) -> bool {
        let mut lanes = self.lanes.own_numbers().map(|no| &self.lanes[no as usize]);
        lanes.any(|lane| lane.shard() == shard && lane.in_flight > 0)
    }

    /// The client speaks another protocol from now on; nothing of it is in flight.
    pub(super) fn speak_on_own_lane(&mut self, slot: u32, protocol: Protocol) {
        let client = self.sessions.get(slot);
        if let Some(own) = client.and_then(Client::own_tracking) {
            self.lanes[own.lane as usize].speak(protocol, self.now_us, &mut self.out);
        }
    }

    /// What is to be done for a client that tracks before its command goes its way. `Some`: that is
    /// not now, or was done here.
    pub(super) fn track_on_own_lane(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Option<Flow> {
        let client = self.sessions.get_mut(slot)?;
        let (in_flight, queues) = (client.in_flight(), client.state.transaction.is_some());
        let subscribes = client.is_subscriber();
        let tracking = client.extra.as_mut()?.tracking.as_mut()?;
        tracking.moving &= in_flight > 0;
        if tracking.moving {
            return Some(Flow::NotYet);
        }
        let wanted = tracking.wants_reads();
        let own = tracking.own.as_mut()?;
        if command.name == "ping" && !queues && !subscribes && request.len() <= 2 {
            // Behind the notices that the node has already sent.
            let shard = self.lanes[own.lane as usize].shard();
            return Some(self.forward(slot, shard, Kind::Single, Effect::Read, 0, request.frame));
        }
        if !wanted
            || std::mem::take(&mut own.noted)
            || !self.reads_elsewhere(slot, command, request)
        {
            return None;
        }
        self.note_on_own_lane(slot, command, request)
    }

    /// True if a command is not for the client's lane, though it may read keys.
    fn reads_elsewhere(&self, slot: u32, command: &Command, request: Request<'_>) -> bool {
        let Some(client) = self.sessions.get(slot).filter(|client| !client.is_muted()) else {
            return false; // it gets no reply that it could keep
        };
        match &client.state.transaction {
            None => match command.class {
                Class::Walk => command.only_key().is_some(),
                Class::Blocking => command.may_wait(&request),
                _ => false,
            },
            Some(transaction) => {
                command.name == "exec" && (transaction.mixed || client.watching().is_some())
            }
        }
    }

    /// Has the node note the keys of a command that goes over another connection.
    fn note_on_own_lane(
        &mut self,
        slot: u32,
        command: &Command,
        request: Request<'_>,
    ) -> Option<Flow> {
        let client = self.sessions.get(slot)?;
        let keys = super::tracking_script::keys_read(client, command, &request);
        let shard = self.lanes[client.own_tracking()?.lane as usize].shard();
        if keys.is_empty() {
            return None;
        }
        if client.in_flight() > 0 {
            return Some(Flow::NotYet);
        }
        let mut words: Vec<&[u8]> = vec![b"EXISTS"];
        words.extend(keys.iter().map(Vec::as_slice));
        let mut frame = Vec::new();
        write::encode_command(&mut frame, &words);
        let effect = slotmesh_command::lookup(b"exists").map_or(Effect::Read, spec::effect);
        if self.forward(slot, shard, Kind::Touch, effect, 0, &frame) == Flow::NoRoom {
            return Some(Flow::NoRoom);
        }
        let client = self.sessions.get_mut(slot)?;
        client.own_tracking_mut()?.noted = true;
        Some(Flow::NotYet)
    }
}
