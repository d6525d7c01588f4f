//! What a client on its way listens to: no message is lost, and none comes twice.
//!
//! Both processes listen for the client for a while. A *marker*, a message on a channel of ours, is
//! published at every node concerned; each node says everything to both in the same order, so the
//! marker cuts both streams at the same place. Invariant: of each node, the process that gives
//! delivers what comes before the marker and the process that takes what comes after it. What the
//! other one hears is kept with its client until it is known whether the client has gone, or dropped.

use std::collections::HashMap;
use std::sync::Arc;

use slotmesh_resp::{Protocol, write};

use super::Core;
use super::client::{ClientState, Pause};
use super::lane::lane_no;
use super::pubsub_topics::{Name, TopicKind};
use super::queue::{Entry, Kind};
use crate::routing::ShardNo;

/// Topics have numbers from 1 up.
const FIRST_UID: u64 = u64::MAX / 2;

/// A client of another process, before it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listening {
    pub id: u64,
    pub protocol: Protocol,
    /// Channels, patterns and shard channels.
    pub names: [Vec<Vec<u8>>; 3],
}

/// One marker and the clients for which it matters.
#[derive(Debug)]
pub(super) struct Cut {
    marker: Name,
    uid: u64,
    /// Shards whose nodes they listen to, and whether the marker came from there.
    shards: Vec<(ShardNo, bool)>,
    /// Slots and generations, with what came behind the marker, at the process that gives.
    clients: HashMap<(u32, u32), Vec<u8>>,
    gives: bool,
    published: bool,
}

/// What is done with a message for a client. True: not delivered now.
pub(super) fn divert(cuts: &mut [Cut], shard: ShardNo, client: (u32, u32), bytes: &[u8]) -> bool {
    for cut in cuts {
        let heard = cut.shards.iter().any(|(no, heard)| *no == shard && *heard);
        let Some(late) = cut.clients.get_mut(&client) else {
            continue;
        };
        if cut.gives && heard {
            late.extend_from_slice(bytes);
        }
        return cut.gives == heard;
    }
    false
}

impl Core {
    /// Clients that listen and might travel, up to so many.
    #[must_use]
    pub fn listening(&self, max: usize, may: impl Fn(u32, u32) -> bool) -> Vec<(u32, Listening)> {
        let clients = self.sessions.numbered();
        let found = clients.filter_map(|(slot, client)| {
            let subscriber = client.extra.as_ref()?.subscriber.as_ref()?;
            let copied = |at: usize| subscriber.names[at].iter().map(|name| name.to_vec());
            may(slot, client.generation).then(|| {
                let listening = Listening {
                    id: client.state.id,
                    protocol: client.state.protocol,
                    names: [0, 1, 2].map(|at| copied(at).collect()),
                };
                (slot, listening)
            })
        });
        found.take(max).collect()
    }

    /// Opens a client that another process still has, so that it is listened for it here.
    pub fn reserve(&mut self, listening: Listening) -> u32 {
        let mut state = ClientState::new(listening.id, None, self.now_unix_us / 1000);
        state.protocol = listening.protocol;
        state.subscriptions = Some(Box::new(listening.names));
        let slot = self.sessions.open(state);
        if let Some(client) = self.sessions.get_mut(slot) {
            client.pause = Pause::Frozen;
            client.heard_us = self.now_us;
        }
        self.restore_topics(slot);
        slot
    }

    /// The client for which it was listened comes. False: it is not known any more.
    pub fn arrive(&mut self, slot: u32, generation: u32, mut state: ClientState) -> bool {
        let known = state.authenticated;
        let user = self.users().get(state.user().as_bytes()).cloned();
        let Some(client) = self.sessions.get_same(slot, generation) else {
            return false;
        };
        let after = std::mem::take(&mut client.state.output);
        state.output.extend_from_slice(&after);
        state.subscriptions = None; // they are the client's already
        let muted = state.muted;
        client.state = state;
        client.sent = 0;
        client.pause = Pause::None;
        client.set_muted(muted);
        if let Some(user) = user.filter(|_| known) {
            self.log_in(slot, &user);
        }
        self.restore(slot);
        self.sessions.touch(slot);
        true
    }

    /// Begins to listen for a marker wherever these clients (slots, generations) listen. False: not
    /// now, because a shard is on its way to another primary.
    pub fn begin_cut(&mut self, marker: &[u8], clients: &[(u32, u32)], gives: bool) -> bool {
        let shards = self.shards_heard_by(clients);
        let settled =
            |feed: &super::subscriber::Feed| feed.current.is_some() && feed.next.is_none();
        if gives && !shards.iter().all(|shard| settled(self.feed(*shard))) {
            return false;
        }
        let marker: Name = marker.into();
        let uid = FIRST_UID + self.pubsub.audience.next_serial();
        for shard in &shards {
            self.ask_marker(*shard, &marker, uid, true);
        }
        self.pubsub.cuts.push(Cut {
            marker,
            uid,
            shards: shards.into_iter().map(|shard| (shard, false)).collect(),
            clients: clients.iter().map(|key| (*key, Vec::new())).collect(),
            gives,
            published: false,
        });
        true
    }

    fn ask_marker(&mut self, shard: ShardNo, marker: &Name, uid: u64, on: bool) {
        let line = self.feed(shard).current.as_ref().map(|side| side.line);
        if let Some(line) = line {
            self.ask_side(shard, line, TopicKind::Channel, marker, uid, on);
        }
    }

    fn shards_heard_by(&mut self, clients: &[(u32, u32)]) -> Vec<ShardNo> {
        let mut shards = Vec::new();
        let all = self.table.all_shards();
        for topic in self.pubsub.topics.iter() {
            let heard =
                |(slot, generation): &(u32, u32)| topic.clients.get(slot) == Some(generation);
            if clients.iter().any(heard) {
                shards.extend(all.iter().copied().filter(|shard| topic.is_on(*shard)));
                shards.sort_unstable();
                shards.dedup();
            }
        }
        shards
    }

    /// True if the nodes have confirmed the marker, and at the process that takes everything that its
    /// clients listen to.
    #[must_use]
    pub fn is_cut_ready(&mut self, marker: &[u8]) -> bool {
        let Some(cut) = self.pubsub.cuts.iter().find(|cut| *cut.marker == *marker) else {
            return false;
        };
        let (uid, shards) = (cut.uid, cut.shards.clone());
        let (gives, clients) = (cut.gives, &cut.clients);
        let count = self.table.shards.len();
        let known = |topic: &super::pubsub_topics::Topic| {
            let mut listeners = topic.clients.iter();
            let ours = listeners.any(|(slot, of)| clients.contains_key(&(*slot, *of)));
            !ours || self.pubsub.is_confirmed(topic, count)
        };
        if !gives && !self.pubsub.topics.iter().all(known) {
            return false;
        }
        shards.iter().all(|(shard, _)| {
            let feed = self.feed(*shard);
            let current = feed.current.as_ref();
            let asked = current.is_some_and(|side| !side.pending.contains(&uid));
            asked && feed.next.is_none()
        })
    }

    /// Publishes a marker, once, at all nodes concerned.
    pub fn publish_cut(&mut self, marker: &[u8]) {
        let mut cuts = self.pubsub.cuts.iter_mut();
        let Some(cut) = cuts.find(|cut| *cut.marker == *marker && !cut.published) else {
            return;
        };
        cut.published = true;
        let mut frame = Vec::new();
        write::encode_command(&mut frame, &[b"PUBLISH", marker, b""]);
        for (shard, _) in cut.shards.clone() {
            // It may be sent twice, so it may be repeated; only the first one counts.
            let lane = &mut self.lanes[lane_no(shard, Protocol::Resp2) as usize];
            lane.submit(Entry::own(Kind::Single), &frame, self.now_us, &mut self.out);
        }
    }

    /// The marker came from a shard.
    pub(super) fn cut_heard(&mut self, shard: ShardNo, channel: &[u8]) {
        for cut in &mut self.pubsub.cuts {
            if *cut.marker == *channel {
                let own = cut.shards.iter_mut().filter(|(no, _)| *no == shard);
                own.for_each(|(_, heard)| *heard = true);
            }
        }
    }

    /// True if the marker came from everywhere.
    #[must_use]
    pub fn is_cut_heard(&self, marker: &[u8]) -> bool {
        let mut cuts = self.pubsub.cuts.iter();
        let cut = cuts.find(|cut| *cut.marker == *marker);
        cut.is_some_and(|cut| cut.shards.iter().all(|(_, heard)| *heard))
    }

    /// The marker has done its work. Clients that are still here get what came behind it.
    pub fn end_cut(&mut self, marker: &[u8]) {
        let at = self
            .pubsub
            .cuts
            .iter()
            .position(|cut| *cut.marker == *marker);
        let Some(at) = at else { return };
        let cut = self.pubsub.cuts.swap_remove(at);
        for (shard, _) in &cut.shards {
            self.ask_marker(*shard, &Arc::clone(&cut.marker), cut.uid, false);
        }
        for ((slot, generation), late) in cut.clients {
            if !late.is_empty() {
                self.sessions.push(slot, generation, &late);
            }
        }
    }
}
