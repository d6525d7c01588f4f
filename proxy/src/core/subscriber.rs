//! A worker's own subscriptions at the nodes: one connection per shard for all its clients.
//!
//! Invariants: everything that clients listen to on a shard is subscribed on every connection here
//! that goes there; a topic is *confirmed* when the node of each of its shards has said so, and no
//! client is told that it listens to one that is not. How a connection follows its shard to another
//! primary without losing a message is `subscriber_move.rs`.

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use slotmesh_resp::{Protocol, write};

use super::Core;
use super::line::{LineEvent, LineNo, Opening, Use};
use super::passing_topics::{Cut, Origin, divert};
use super::pubsub_count::Audience;
use super::pubsub_frame::Heard;
use super::pubsub_topics::{Name, Spread, Topic, TopicKind, Topics, Waiters};
use super::subscriber_limits::{Limits, SlowReaders};
use super::subscriber_move::Next;
use crate::routing::{Login, RoutingTable, ShardNo, ShardRoute};

/// First and longest wait after a connection is lost, as those of lanes.
const BACKOFF_FIRST_US: u64 = 2_000;
const BACKOFF_CAP_US: u64 = 250_000;
/// A connection that nobody needs stays for a while: clients that subscribe for a moment come again.
const IDLE_US: u64 = 10_000_000;

/// Something that was asked of a node.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) uid: u64,
    kind: TopicKind,
    name: Name,
    subscribes: bool,
}

/// A connection with everything of its shard subscribed.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) line: LineNo,
    pub(super) address: SocketAddr,
    /// What the node has to answer, in order.
    pub(super) expected: VecDeque<Expected>,
    /// Topics that it has not confirmed.
    pub(super) pending: HashSet<u64>,
    /// What comes before this message was delivered already.
    pub(super) skip_until: Option<Name>,
}

/// The subscriptions at one shard.
#[derive(Debug, Default)]
pub(super) struct Feed {
    /// Topics of this shard alone.
    topics: usize,
    pub(super) current: Option<Side>,
    /// The one that will take over.
    pub(super) next: Option<Next>,
    pub(super) retry_at_us: u64,
    /// A primary that is lost, while nobody has its place.
    pub(super) vacant: Option<SocketAddr>,
    backoff_us: u64,
    idle_since_us: Option<u64>,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct PubSub {
    pub(super) topics: Topics,
    pub(super) waiters: Waiters,
    /// By shard.
    pub(super) feeds: Vec<Feed>,
    /// Topics of all shards.
    everywhere: usize,
    pub(super) audience: Arc<Audience>,
    pub(super) slow: SlowReaders,
    /// While clients go to another process, or come from one.
    pub(super) cuts: Vec<Cut>,
}

impl PubSub {
    pub(super) fn is_confirmed(&self, topic: &Topic, shards: usize) -> bool {
        let on = |shard: ShardNo| {
            let feed = self.feeds.get(usize::from(shard));
            feed.is_some_and(|feed| feed.has(topic.uid))
        };
        match topic.spread {
            Spread::One(shard) => on(shard),
            Spread::All => (0..shards as ShardNo).all(|no| self.is_closed(no) || on(no)),
        }
    }

    /// True if the shard has no route: nothing can come from it.
    fn is_closed(&self, shard: ShardNo) -> bool {
        let feed = self.feeds.get(usize::from(shard));
        feed.is_none_or(|feed| feed.retry_at_us == u64::MAX)
    }
}

impl Feed {
    fn has(&self, uid: u64) -> bool {
        let has = |side: &Side| !side.pending.contains(&uid);
        self.current.as_ref().is_some_and(has)
            // Until the marker is published everything that was asked for comes before it.
            && (self.next.as_ref()).is_none_or(|next| next.asked_us.is_none() || has(&next.side))
    }

    pub(super) fn sides(&mut self) -> impl Iterator<Item = &mut Side> {
        let next = self.next.as_mut().map(|next| &mut next.side);
        self.current.iter_mut().chain(next)
    }
}

impl Core {
    /// The process's counts, in which this worker counts its clients too.
    pub fn share_audience(&mut self, audience: Arc<Audience>) {
        self.pubsub.audience = audience;
    }

    /// Someone wants a topic that nobody had.
    pub(super) fn add_topic(&mut self, kind: TopicKind, name: &Name, uid: u64, spread: Spread) {
        match spread {
            Spread::One(shard) => self.feed(shard).topics += 1,
            Spread::All => self.pubsub.everywhere += 1,
        }
        for shard in self.shards_of(spread) {
            self.ask_sides(shard, kind, name, uid, true);
            self.steer_feed(shard);
        }
    }

    /// Nobody wants a topic any more.
    pub(super) fn remove_topic(&mut self, topic: &Topic) {
        if topic.counted {
            self.pubsub.audience.change(topic.kind, &topic.name, 0, -1);
        }
        match topic.spread {
            Spread::One(shard) => self.feed(shard).topics -= 1,
            Spread::All => self.pubsub.everywhere -= 1,
        }
        for shard in self.shards_of(topic.spread) {
            self.ask_sides(shard, topic.kind, &topic.name, topic.uid, false);
            self.steer_feed(shard);
        }
    }

    fn shards_of(&self, spread: Spread) -> Vec<ShardNo> {
        match spread {
            Spread::One(shard) => vec![shard],
            Spread::All => self.table.all_shards(),
        }
    }

    pub(super) fn feed(&mut self, shard: ShardNo) -> &mut Feed {
        let feeds = &mut self.pubsub.feeds;
        if feeds.len() <= usize::from(shard) {
            feeds.resize_with(usize::from(shard) + 1, Feed::default);
        }
        &mut feeds[usize::from(shard)]
    }

    /// Subscribes on all connections to a shard, or takes it back.
    fn ask_sides(&mut self, shard: ShardNo, kind: TopicKind, name: &Name, uid: u64, on: bool) {
        let lines: Vec<LineNo> = self.feed(shard).sides().map(|side| side.line).collect();
        for line in lines {
            self.ask_side(shard, line, kind, name, uid, on);
        }
    }

    pub(super) fn ask_side(
        &mut self,
        shard: ShardNo,
        line: LineNo,
        kind: TopicKind,
        name: &Name,
        uid: u64,
        subscribes: bool,
    ) {
        let Some(side) = self.feed(shard).sides().find(|side| side.line == line) else {
            return;
        };
        if subscribes {
            side.pending.insert(uid);
        } else {
            side.pending.remove(&uid);
        }
        side.expected.push_back(Expected {
            uid,
            kind,
            name: Arc::clone(name),
            subscribes,
        });
        let word = if subscribes {
            kind.subscribe()
        } else {
            kind.unsubscribe()
        };
        self.write_line(line, |out| write::encode_command(out, &[word, name]));
    }

    /// A new routing table.
    pub(super) fn apply_pubsub(&mut self, table: &RoutingTable) {
        if self.pubsub.topics.is_empty() && self.pubsub.feeds.is_empty() {
            return;
        }
        self.rehome_topics(table);
        for shard in 0..table.shards.len() {
            self.steer_feed(shard as ShardNo);
        }
    }

    /// Slots may have moved: a channel is then served by another shard.
    fn rehome_topics(&mut self, table: &RoutingTable) {
        let moved = |topic: &&mut Topic| match topic.spread {
            Spread::One(shard) => shard != table.shard_of(&topic.name),
            Spread::All => false,
        };
        let mut found = Vec::new();
        for topic in self.pubsub.topics.iter_mut().filter(moved) {
            let Spread::One(from) = topic.spread else {
                continue;
            };
            let to = table.shard_of(&topic.name);
            if to == crate::routing::NO_SHARD {
                continue; // it stays where it was until somebody serves it
            }
            topic.spread = Spread::One(to);
            found.push((topic.kind, Arc::clone(&topic.name), topic.uid, from, to));
        }
        for (kind, name, uid, from, to) in found {
            self.feed(from).topics -= 1;
            self.feed(to).topics += 1;
            self.ask_sides(from, kind, &name, uid, false);
            self.ask_sides(to, kind, &name, uid, true);
        }
    }

    /// Opens and closes connections as the route and the topics of a shard ask for.
    pub(super) fn steer_feed(&mut self, shard: ShardNo) {
        let route = self.table.shards.get(usize::from(shard)).cloned().flatten();
        let (everywhere, now_us) = (self.pubsub.everywhere, self.now_us);
        let feed = self.feed(shard);
        let Some(route) = route else {
            feed.retry_at_us = u64::MAX;
            return self.close_feed(shard);
        };
        if feed.retry_at_us == u64::MAX {
            feed.retry_at_us = 0;
        }
        if feed.topics + everywhere == 0 {
            let idle_since_us = *feed.idle_since_us.get_or_insert(now_us);
            let gone = feed
                .current
                .as_ref()
                .is_some_and(|side| side.address != route.address);
            self.close_next(shard);
            if gone || idle_since_us + IDLE_US <= now_us {
                self.close_feed(shard);
            }
            self.out.unsteady = true;
            return;
        }
        feed.idle_since_us = None;
        let Some(address) = feed.address(&route) else {
            return; // its route comes
        };
        let vacant = feed.vacant.is_some();
        if let Some(side) = feed
            .current
            .take_if(|side| vacant && side.address != address)
        {
            self.close_line(side.line);
            self.uncount_topics(shard);
        }
        let feed = self.feed(shard);
        match feed.current.as_ref().map(|side| side.address) {
            // What was opened beforehand takes over where no one delivers any more.
            None if (feed.next.as_ref()).is_some_and(|n| n.side.address == address) => {
                self.take_over(shard, true);
            }
            Some(_) if vacant => {}
            None if feed.retry_at_us <= now_us => {
                let side = self.open_side(shard, &route, address);
                self.feed(shard).current = Some(side);
            }
            None => self.out.unsteady = true,
            Some(at) => self.steer_next(shard, &route, at),
        }
    }

    /// A connection on which everything of the shard is asked for.
    pub(super) fn open_side(
        &mut self,
        shard: ShardNo,
        route: &Arc<ShardRoute>,
        address: SocketAddr,
    ) -> Side {
        let login = route.observer.clone().unwrap_or_else(|| Login {
            username: route.username.clone(),
            password: route.password.clone(),
        });
        let line = self.open_line(Opening {
            user: Use::Feed(shard),
            shard,
            epoch: route.epoch,
            address,
            login,
            protocol: Protocol::Resp2,
        });
        let mut side = Side {
            line,
            address,
            expected: VecDeque::new(),
            pending: HashSet::new(),
            skip_until: None,
        };
        let mut asked = Vec::new();
        for topic in self.pubsub.topics.iter().filter(|topic| topic.is_on(shard)) {
            side.pending.insert(topic.uid);
            side.expected.push_back(Expected {
                uid: topic.uid,
                kind: topic.kind,
                name: Arc::clone(&topic.name),
                subscribes: true,
            });
            write::encode_command(&mut asked, &[topic.kind.subscribe(), &topic.name]);
        }
        for (marker, uid) in self.cut_renewed(Origin::Messages(shard)) {
            side.pending.insert(uid);
            write::encode_command(&mut asked, &[TopicKind::Channel.subscribe(), &marker]);
            side.expected.push_back(Expected {
                uid,
                kind: TopicKind::Channel,
                name: marker,
                subscribes: true,
            });
        }
        self.write_line(line, |out| out.extend_from_slice(&asked));
        side
    }

    fn close_feed(&mut self, shard: ShardNo) {
        self.close_next(shard);
        if let Some(side) = self.feed(shard).current.take() {
            self.close_line(side.line);
            self.uncount_topics(shard);
        }
    }

    /// Topics of a shard are not confirmed any more.
    fn uncount_topics(&mut self, shard: ShardNo) {
        let PubSub {
            topics, audience, ..
        } = &mut self.pubsub;
        for topic in topics.iter_mut().filter(|topic| topic.is_on(shard)) {
            if std::mem::take(&mut topic.counted) {
                let clients = topic.clients.len() as i64;
                audience.change(topic.kind, &topic.name, -clients, -1);
            }
        }
    }

    /// Something happened to one of the connections.
    pub(super) fn feed_event(&mut self, no: LineNo, shard: ShardNo, event: LineEvent<'_>) {
        match event {
            LineEvent::Ready => {
                self.feed(shard).backoff_us = BACKOFF_FIRST_US;
            }
            LineEvent::Reply(frame) => self.feed_heard(no, shard, frame),
            LineEvent::Lost(_) => self.feed_lost(no, shard),
        }
    }

    fn feed_lost(&mut self, no: LineNo, shard: ShardNo) {
        let now_us = self.now_us;
        self.counters.subscriber_lines_lost += 1;
        let feed = self.feed(shard);
        let backoff_us = feed.backoff_us.max(BACKOFF_FIRST_US);
        feed.backoff_us = (backoff_us * 2).min(BACKOFF_CAP_US);
        feed.retry_at_us = now_us + backoff_us;
        self.out.unsteady = true;
        let feed = self.feed(shard);
        if feed.current.as_ref().is_some_and(|side| side.line == no) {
            feed.current = None;
            self.uncount_topics(shard);
        } else if feed.next.as_ref().is_some_and(|next| next.side.line == no) {
            feed.next = None;
            return;
        }
        self.steer_feed(shard);
    }

    fn feed_heard(&mut self, no: LineNo, shard: ShardNo, frame: &[u8]) {
        let is_next = self
            .feed(shard)
            .next
            .as_ref()
            .is_some_and(|n| n.side.line == no);
        match Heard::read(frame) {
            Heard::Message {
                kind,
                topic,
                channel,
            } => {
                if !self.moves(shard, is_next, kind, channel, frame) {
                    self.deliver_message(shard, kind, topic, frame);
                }
            }
            Heard::Confirmed => self.feed_confirmed(no, shard, None),
            Heard::Error(words) => self.feed_confirmed(no, shard, Some(words)),
            Heard::Other => {}
        }
    }

    /// The node has answered the oldest question of a connection.
    fn feed_confirmed(&mut self, no: LineNo, shard: ShardNo, error: Option<&[u8]>) {
        let Some(side) = self.feed(shard).sides().find(|side| side.line == no) else {
            return;
        };
        let Some(done) = side.expected.pop_front() else {
            return;
        };
        if done.subscribes {
            side.pending.remove(&done.uid);
            match error {
                None => self.settle_topic(done.kind, &done.name),
                Some(words) => self.fail_topic(done.kind, &done.name, words),
            }
        }
        self.mark_move(shard);
    }

    /// A message for all clients that listen to a topic: written once for each protocol.
    pub(super) fn deliver_message(
        &mut self,
        shard: ShardNo,
        kind: TopicKind,
        topic: &[u8],
        frame: &[u8],
    ) {
        let Some(topic) = self.pubsub.topics.get(kind, topic) else {
            return;
        };
        // The same but for the first byte: an array for those to whom it is one, a push for others.
        self.scratch.clear();
        self.scratch.push(b'>');
        self.scratch.extend_from_slice(&frame[1..]);
        let limits = Limits::of(&self.table);
        for (&slot, &generation) in &topic.clients {
            let Some(client) = self.sessions.get_same(slot, generation) else {
                continue;
            };
            let bytes = match client.state.protocol {
                Protocol::Resp2 => frame,
                Protocol::Resp3 => &self.scratch,
            };
            if !self.pubsub.cuts.is_empty()
                && divert(
                    &mut self.pubsub.cuts,
                    Origin::Messages(shard),
                    (slot, generation),
                    bytes,
                )
            {
                continue;
            }
            let slow = &mut self.pubsub.slow;
            if slow.push(
                &mut self.sessions,
                (slot, generation),
                bytes,
                limits,
                self.now_us,
            ) {
                self.out.unsteady = true;
            }
        }
    }

    /// Acts on what is due. Returns when to look again.
    pub(super) fn pubsub_on_time(&mut self) -> Option<u64> {
        let now_us = self.now_us;
        while let Some(number) = self.pubsub.waiters.take_late(now_us) {
            self.fail_waiter(number, TOO_LATE);
        }
        let limits = Limits::of(&self.table);
        let (closed, slow) = self
            .pubsub
            .slow
            .close_late(&mut self.sessions, limits, now_us);
        self.counters.closed_subscribers += closed;
        let mut due = [slow, self.pubsub.waiters.deadline_us()]
            .into_iter()
            .flatten()
            .min();
        for shard in 0..self.pubsub.feeds.len() as ShardNo {
            self.move_on_time(shard);
            let feed = self.feed(shard);
            let idle = feed.idle_since_us.filter(|_| feed.current.is_some());
            let waits = feed.current.is_none() && feed.idle_since_us.is_none();
            if idle.is_some_and(|at| at + IDLE_US <= now_us)
                || (waits && feed.retry_at_us <= now_us)
            {
                self.steer_feed(shard);
            }
            let at = self.feed(shard).deadline_us(now_us);
            due = [due, at].into_iter().flatten().min();
        }
        due
    }
}

impl Feed {
    fn deadline_us(&self, now_us: u64) -> Option<u64> {
        let retry = Some(self.retry_at_us).filter(|at| *at > now_us && *at != u64::MAX);
        let idle = self.idle_since_us.map(|at| at + IDLE_US);
        let next = self.next.as_ref().and_then(Next::deadline_us);
        let idle = idle.filter(|_| self.current.is_some());
        [retry, idle, next].into_iter().flatten().min()
    }
}

const TOO_LATE: &[u8] = b"ERR slotmesh: a shard of these channels could not be reached in time; \
    nothing was subscribed";
