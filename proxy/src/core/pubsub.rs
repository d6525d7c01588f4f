//! SUBSCRIBE, UNSUBSCRIBE and PUBLISH of clients.
//!
//! Invariants: a client's subscription begins when its confirmation takes its place among the
//! client's replies, and nothing else of the client is under way then; so no message comes before
//! the confirmation, and none that was published after it is missed.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use slotmesh_command::Command;
use slotmesh_resp::{Args, Parsed, Protocol, RequestParser, parse_i64, write};
use slotmesh_topology::Slot;

use super::Core;
use super::client::Pause;
use super::dispatch::{CROSS_SLOT, Flow, NOT_SERVED};
use super::lane::LaneNo;
use super::pubsub_topics::{Name, Spread, Subscriber, TopicKind, Waiter};
use super::queue::Kind;
use super::retry::Effect;
use super::sessions::{NoOutlet, Outlet};
use super::spec::Request;
use crate::routing::{NO_SHARD, ShardNo};

/// What a RESP2 client may call once it subscribes.
const WHILE_SUBSCRIBED: &[&str] = &[
    "subscribe",
    "unsubscribe",
    "psubscribe",
    "punsubscribe",
    "ssubscribe",
    "sunsubscribe",
    "ping",
    "quit",
    "reset",
];

impl Core {
    /// A command of the Pub/Sub class.
    pub(super) fn pubsub_command(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        match command.name {
            "publish" | "spublish" => {
                let shard = self.table.shard_of(request.arg(1));
                self.forward(slot, shard, Kind::Publish, Effect::Write, 0, request.frame)
            }
            "subscribe" => self.subscribe(slot, TopicKind::Channel, request),
            "psubscribe" => self.subscribe(slot, TopicKind::Pattern, request),
            "ssubscribe" => self.subscribe(slot, TopicKind::ShardChannel, request),
            "unsubscribe" => self.unsubscribe(slot, TopicKind::Channel, request),
            "punsubscribe" => self.unsubscribe(slot, TopicKind::Pattern, request),
            "sunsubscribe" => self.unsubscribe(slot, TopicKind::ShardChannel, request),
            _ => self.ask_about_topics(slot, command, request),
        }
    }

    /// The refusal that a RESP2 client gets once it subscribes, if the command is not one of a few.
    pub(super) fn refused_while_subscribed(&self, slot: u32, command: &Command) -> Option<String> {
        let client = self.sessions.get(slot)?;
        let bound = client.state.protocol == Protocol::Resp2 && client.is_subscriber();
        (bound && !WHILE_SUBSCRIBED.contains(&command.name)).then(|| {
            format!(
                "ERR Can't execute '{}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / \
                 RESET are allowed in this context",
                command.name
            )
        })
    }

    /// PING of a RESP2 client that subscribes looks like a message.
    pub(super) fn pong_to_subscriber(&mut self, slot: u32, request: Request<'_>) -> Flow {
        self.reply_with(slot, |out| {
            write::write_array_header(out, 2);
            write::write_bulk(out, b"pong");
            write::write_bulk(out, request.arg(1));
        })
    }

    fn spread_of(&self, kind: TopicKind, name: &[u8]) -> Spread {
        let by_nodes =
            |name: &[u8]| name.starts_with(b"__keyspace@") || name.starts_with(b"__keyevent@");
        match kind {
            TopicKind::Pattern => Spread::All,
            // Nodes publish these themselves, each for its own keys.
            TopicKind::Channel if by_nodes(name) => Spread::All,
            _ => Spread::One(self.table.shard_of(name)),
        }
    }

    /// Why these channels cannot be subscribed together.
    fn refusal_of(&self, kind: TopicKind, request: Request<'_>) -> Option<&'static str> {
        let mut names = (1..request.len()).map(|at| request.arg(at));
        let unserved = |name: &[u8]| self.spread_of(kind, name) == Spread::One(NO_SHARD);
        if names.clone().any(unserved) || !self.ready {
            return Some(NOT_SERVED);
        }
        let first = Slot::of(names.next().unwrap_or_default());
        let sharded = kind == TopicKind::ShardChannel && self.table.only_shard().is_none();
        (sharded && names.any(|name| Slot::of(name) != first)).then_some(CROSS_SLOT)
    }

    fn subscribe(&mut self, slot: u32, kind: TopicKind, request: Request<'_>) -> Flow {
        if let Some(text) = self.refusal_of(kind, request) {
            return self.refuse(slot, text.as_bytes());
        }
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        if client.in_flight() > 0 {
            return Flow::NotYet;
        }
        let waiter = Waiter {
            slot,
            generation: client.generation,
            ticket: client.ticket(),
            kind,
            names: (1..request.len())
                .map(|at| request.arg(at).into())
                .collect(),
            missing: 0,
        };
        let until_us = self.now_us + self.table.settings.hold_budget_us;
        self.take_up(waiter, until_us);
        Flow::Taken
    }

    /// Subscribes at the nodes what is new; answers at once if nothing has to be waited for.
    fn take_up(&mut self, mut waiter: Waiter, until_us: u64) {
        let kind = waiter.kind;
        let shards = self.table.shards.len();
        let mut missing = Vec::new();
        for name in waiter.names.iter().collect::<BTreeSet<_>>() {
            let spread = self.spread_of(kind, name);
            let (topic, new) = self.pubsub.topics.take_up(kind, name, spread);
            if new {
                let (name, uid) = (Arc::clone(&topic.name), topic.uid);
                self.add_topic(kind, &name, uid, spread);
            }
            let topic = self.pubsub.topics.get(kind, name);
            if topic.is_none_or(|topic| !self.pubsub.is_confirmed(topic, shards)) {
                missing.push(Arc::clone(name));
            }
        }
        if missing.is_empty() {
            return self.confirm(&waiter);
        }
        if let Some(client) = self.sessions.get_mut(waiter.slot) {
            client.pause = Pause::Quiet;
        }
        waiter.missing = missing.len();
        // It holds on to all of them: none may be forgotten while it waits for another.
        let held: HashSet<Name> = waiter.names.iter().cloned().collect();
        let number = self.pubsub.waiters.add(waiter, until_us);
        for name in held {
            let waits = missing.contains(&name);
            if let Some(topic) = self.pubsub.topics.get_mut(kind, &name) {
                topic.waiting.push((number, waits));
            }
        }
        self.out.unsteady = true;
    }

    /// Looks again whether a topic is confirmed, and answers who waited for it.
    pub(super) fn settle_topic(&mut self, kind: TopicKind, name: &Name) {
        let shards = self.table.shards.len();
        let Some(topic) = self.pubsub.topics.get(kind, name) else {
            return;
        };
        if !self.pubsub.is_confirmed(topic, shards) {
            return;
        }
        let Some(topic) = self.pubsub.topics.get_mut(kind, name) else {
            return;
        };
        if !std::mem::replace(&mut topic.counted, true) {
            let clients = topic.clients.len() as i64;
            self.pubsub.audience.change(kind, name, clients, 1);
        }
        let mut due = Vec::new();
        for (number, waits) in &mut topic.waiting {
            if std::mem::take(waits)
                && let Some(waiter) = self.pubsub.waiters.waiting.get_mut(number)
            {
                waiter.missing -= 1;
                if waiter.missing == 0 {
                    due.push(*number);
                }
            }
        }
        if due.len() > 1 {
            topic
                .waiting
                .retain(|(number, _)| due.binary_search(number).is_err());
        }
        for number in due {
            if let Some(waiter) = self.take_waiter(number) {
                self.confirm(&waiter);
                self.drop_topics(waiter.kind, &waiter.names); // its client may have left
            }
        }
    }

    /// As [`Self::settle_topic`], for all topics of a shard.
    pub(super) fn settle_shard(&mut self, shard: ShardNo) {
        let topics = self.pubsub.topics.iter();
        let on = topics.filter(|topic| topic.is_on(shard));
        let found: Vec<_> = on
            .map(|topic| (topic.kind, Arc::clone(&topic.name)))
            .collect();
        for (kind, name) in found {
            self.settle_topic(kind, &name);
        }
    }

    /// A node refuses a topic: those who wait for it hear the node's words, and so would others.
    pub(super) fn fail_topic(&mut self, kind: TopicKind, name: &Name, words: &[u8]) {
        let Some(topic) = self.pubsub.topics.get(kind, name) else {
            return;
        };
        for (number, _) in topic.waiting.clone() {
            self.fail_waiter(number, words);
        }
    }

    /// Takes a waiter out, and out of the topics that it held.
    fn take_waiter(&mut self, number: u64) -> Option<Waiter> {
        let waiter = self.pubsub.waiters.waiting.remove(&number)?;
        for name in &waiter.names {
            if let Some(topic) = self.pubsub.topics.get_mut(waiter.kind, name) {
                topic.waiting.retain(|(other, _)| *other != number);
            }
        }
        Some(waiter)
    }

    pub(super) fn fail_waiter(&mut self, number: u64, text: &[u8]) {
        let Some(waiter) = self.take_waiter(number) else {
            return;
        };
        self.drop_topics(waiter.kind, &waiter.names);
        self.counters.errors += 1;
        let mut reply = Vec::new();
        write::write_error(&mut reply, text);
        self.answer_waiter(&waiter, &reply);
    }

    fn answer_waiter(&mut self, waiter: &Waiter, reply: &[u8]) {
        let (slot, generation) = (waiter.slot, waiter.ticket.0);
        // Confirmations reach even a client that wanted no reply to this, as messages do.
        if generation != waiter.generation {
            self.sessions.push(slot, waiter.generation, reply);
        } else {
            self.sessions
                .deliver(slot, generation, waiter.ticket.1, reply, &mut NoOutlet);
        }
        self.sessions.resume_quiet(slot, waiter.generation);
    }

    /// All topics are confirmed: from here on the client listens to them.
    fn confirm(&mut self, waiter: &Waiter) {
        let (slot, generation, kind) = (waiter.slot, waiter.generation, waiter.kind);
        let Some(client) = self.sessions.get_same(slot, generation) else {
            return;
        };
        let protocol = client.state.protocol;
        let mut reply = Vec::new();
        for name in &waiter.names {
            let subscriber = client.extra_mut().subscriber.get_or_insert_default();
            let topic = self.pubsub.topics.get_mut(kind, name);
            if let Some(topic) = topic.filter(|topic| !topic.clients.contains_key(&slot)) {
                topic.clients.insert(slot, generation);
                subscriber.names[kind as usize].insert(Arc::clone(&topic.name));
                if topic.counted {
                    self.pubsub.audience.change(kind, name, 1, 0);
                }
            }
            let count = subscriber.count(kind);
            write_change(&mut reply, protocol, kind.subscribe(), Some(name), count);
        }
        self.answer_waiter(waiter, &reply);
    }

    fn unsubscribe(&mut self, slot: u32, kind: TopicKind, request: Request<'_>) -> Flow {
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        if client.in_flight() > 0 {
            return Flow::NotYet;
        }
        let (generation, protocol) = (client.generation, client.state.protocol);
        let mut none = Subscriber::default();
        let extra = client.extra.as_mut();
        let subscriber = extra
            .and_then(|extra| extra.subscriber.as_deref_mut())
            .unwrap_or(&mut none);
        let names: Vec<Name> = match request.len() {
            1 => subscriber.names[kind as usize].iter().cloned().collect(),
            len => (1..len).map(|at| request.arg(at).into()).collect(),
        };
        let mut reply = Vec::new();
        let mut left = Vec::new();
        for name in names {
            if subscriber.names[kind as usize].remove(&name) {
                left.push(Arc::clone(&name));
            }
            let count = subscriber.count(kind);
            write_change(&mut reply, protocol, kind.unsubscribe(), Some(&name), count);
        }
        if reply.is_empty() {
            let count = subscriber.count(kind);
            write_change(&mut reply, protocol, kind.unsubscribe(), None, count);
        }
        if let Some(extra) = &mut client.extra {
            extra.subscriber.take_if(|subscriber| subscriber.is_empty());
            client.tidy_extra();
        }
        for name in left {
            self.leave_topic(slot, kind, &name);
        }
        let muted = self
            .sessions
            .get(slot)
            .is_some_and(|client| client.is_muted());
        if muted {
            self.sessions.push(slot, generation, &reply);
            return Flow::Taken;
        }
        self.reply_with(slot, |out| out.extend_from_slice(&reply))
    }

    fn leave_topic(&mut self, slot: u32, kind: TopicKind, name: &Name) {
        if let Some(topic) = self.pubsub.topics.get_mut(kind, name)
            && topic.clients.remove(&slot).is_some()
            && topic.counted
        {
            self.pubsub.audience.change(kind, name, -1, 0);
        }
        self.drop_topics(kind, std::slice::from_ref(name));
    }

    fn drop_topics(&mut self, kind: TopicKind, names: &[Name]) {
        for name in names {
            if let Some(topic) = self.pubsub.topics.drop_unused(kind, name) {
                self.remove_topic(&topic);
            }
        }
    }

    /// The client leaves, or is reset: it listens to nothing any more. Returns to what it listened.
    pub(super) fn leave_topics(&mut self, slot: u32) -> Option<Box<Subscriber>> {
        let client = self.sessions.get_mut(slot)?;
        let generation = client.generation;
        let extra = client.extra.as_mut();
        let subscriber = extra.and_then(|extra| extra.subscriber.take());
        client.tidy_extra();
        let waiting = self.pubsub.waiters.waiting.iter();
        let own = |waiter: &Waiter| (waiter.slot, waiter.generation) == (slot, generation);
        let found = waiting
            .filter(|(_, waiter)| own(waiter))
            .map(|(number, _)| *number);
        for number in found.collect::<Vec<_>>() {
            if let Some(waiter) = self.take_waiter(number) {
                self.drop_topics(waiter.kind, &waiter.names);
            }
        }
        let left = subscriber?;
        for kind in TopicKind::ALL {
            for name in &left.names[kind as usize] {
                self.leave_topic(slot, kind, name);
            }
        }
        Some(left)
    }

    /// A client that came with subscriptions, from another process: it listens on, and hears nothing
    /// of it.
    pub(super) fn restore_topics(&mut self, slot: u32) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        let generation = client.generation;
        let Some(names) = client.state.subscriptions.take() else {
            return;
        };
        let mut subscriber = Box::<Subscriber>::default();
        for kind in TopicKind::ALL {
            for name in &names[kind as usize] {
                let spread = self.spread_of(kind, name);
                if spread == Spread::One(NO_SHARD) {
                    continue;
                }
                let (topic, new) = self.pubsub.topics.take_up(kind, name, spread);
                topic.clients.insert(slot, generation);
                let (name, uid, counted) = (Arc::clone(&topic.name), topic.uid, topic.counted);
                if new {
                    self.add_topic(kind, &name, uid, spread);
                } else if counted {
                    self.pubsub.audience.change(kind, &name, 1, 0);
                }
                subscriber.names[kind as usize].insert(name);
            }
        }
        if let Some(client) = self.sessions.get_mut(slot)
            && !subscriber.is_empty()
        {
            client.extra_mut().subscriber = Some(subscriber);
        }
    }

    /// The reply to a PUBLISH: the node has counted connections, the client wants clients.
    pub(super) fn answer_publish<O: Outlet>(&mut self, no: LaneNo, reply: &[u8], outlet: &mut O) {
        let found = (reply.strip_prefix(b":")).and_then(|line| line.strip_suffix(b"\r\n"));
        let found = found.and_then(parse_i64).unwrap_or(0);
        if found == 0 || self.pubsub.audience.is_empty() {
            return self.answer_published(no, reply, outlet);
        }
        let frame = self.lanes[no as usize].flight.front_frame();
        let mut args = Args::new();
        let Ok(Parsed::Complete { .. }) = RequestParser::new().parse(frame, &mut args) else {
            return self.answer_published(no, reply, outlet);
        };
        let arg = |at| args.get(frame, at).unwrap_or_default();
        let sharded = arg(0).len() == b"spublish".len();
        let count = self.pubsub.audience.receivers(sharded, arg(1), found);
        let mut reply = Vec::new();
        write::write_int(&mut reply, count);
        self.answer_published(no, &reply, outlet);
    }
}

/// One confirmation.
fn write_change(
    out: &mut Vec<u8>,
    protocol: Protocol,
    word: &[u8],
    name: Option<&Name>,
    count: usize,
) {
    write::write_push_header(out, protocol, 3);
    write::write_bulk(out, word);
    match name {
        Some(name) => write::write_bulk(out, name),
        None => write::write_null(out, protocol),
    }
    write::write_int(out, count as i64);
}
