//! What a client on its way listens to, or monitors: no message is lost, and none comes twice.
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
use super::client::{Client, ClientState, NAME_BYTES, Pause, STATE_BYTES};
use super::lane::lane_no;
use super::monitor::Source;
use super::passing_looks::{Looks, LooseSource};
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
    /// Nodes that it monitors.
    pub sources: Vec<LooseSource>,
}

impl Listening {
    /// Bytes that it takes of a message, as good as.
    fn bytes_len(&self) -> usize {
        let names = self
            .names
            .iter()
            .flatten()
            .map(|name| NAME_BYTES + name.len());
        let sources = self
            .sources
            .iter()
            .map(|source| NAME_BYTES + source.shard_id.len());
        STATE_BYTES + names.sum::<usize>() + sources.sum::<usize>()
    }
}

/// Which clients that listen are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub clients_max: usize,
    /// Of what they listen to, passed by one client at most.
    pub bytes_max: usize,
    pub schema_max: u32,
}

/// Where messages come from: a shard, or a node of which everything is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Messages(ShardNo),
    Node(Source),
}

/// A place where a marker is waited for.
#[derive(Clone, Copy, Debug)]
struct Place {
    origin: Origin,
    /// The marker came.
    heard: bool,
    /// The connection is another one than when the marker was first asked for.
    renewed: bool,
}

impl Client {
    /// True if it is listened for it here, and another process still has it.
    pub(super) fn is_awaited(&self) -> bool {
        // Who listens has logged in, and its account comes with it.
        self.pause == Pause::Frozen && !self.state.authenticated
    }
}

/// One marker and the clients for which it matters.
#[derive(Debug)]
pub(super) struct Cut {
    marker: Name,
    uid: u64,
    /// Where they listen.
    places: Vec<Place>,
    /// Slots and generations, with what came behind the marker, at the process that gives.
    clients: HashMap<(u32, u32), Vec<u8>>,
    gives: bool,
    published: bool,
}

/// What is done with a message for a client. True: not delivered now.
pub(super) fn divert(cuts: &mut [Cut], origin: Origin, client: (u32, u32), bytes: &[u8]) -> bool {
    for cut in cuts {
        let heard = |place: &Place| place.origin == origin && place.heard;
        let heard = cut.places.iter().any(heard);
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
    /// What a client listens to, if it does.
    #[must_use]
    pub fn listening_of(&self, slot: u32) -> Option<Listening> {
        let client = self.sessions.get(slot)?;
        let subscriber = client.extra.as_ref()?.subscriber.as_ref();
        if subscriber.is_none() && !client.is_monitoring() {
            return None;
        }
        let copied = |at: usize| -> Vec<Vec<u8>> {
            let names = subscriber.map(|subscriber| subscriber.names[at].iter());
            names
                .into_iter()
                .flatten()
                .map(|name| name.to_vec())
                .collect()
        };
        Some(Listening {
            id: client.state.id,
            protocol: client.state.protocol,
            names: [0, 1, 2].map(copied),
            sources: self.loose_sources(slot),
        })
    }

    /// Clients that listen and can be told, in turn from a slot on.
    #[must_use]
    pub fn listening(
        &self,
        wanted: Wanted,
        from: u32,
        may: impl Fn(u32, u32) -> bool,
    ) -> Vec<(u32, Listening)> {
        let mut slots: Vec<u32> = self.sessions.slots().collect();
        let first = slots.partition_point(|slot| *slot < from);
        slots.rotate_left(first);
        let mut bytes = 0;
        let found = slots.into_iter().filter_map(|slot| {
            let generation = self.sessions.get(slot)?.generation;
            let travels = self.may_travel(slot, wanted.schema_max, true).is_ok();
            let wanted = travels && may(slot, generation);
            wanted.then(|| Some((slot, self.listening_of(slot)?)))?
        });
        let fits = found.take_while(|(_, listening)| {
            let before = bytes;
            bytes += listening.bytes_len();
            before < wanted.bytes_max
        });
        fits.take(wanted.clients_max).collect()
    }

    /// Opens a client that another process still has, so that it is listened for it here.
    pub fn reserve(&mut self, listening: Listening) -> u32 {
        let mut state = ClientState::new(listening.id, None, self.now_unix_us / 1000);
        state.protocol = listening.protocol;
        state.subscriptions = Some(Box::new(listening.names));
        state.looks = Some(Box::new(Looks {
            sources: listening.sources,
            tracking: None,
        }));
        let slot = self.sessions.open(state);
        if let Some(client) = self.sessions.get_mut(slot) {
            client.pause = Pause::Frozen;
            client.heard_us = self.now_us;
        }
        self.restore_topics(slot);
        self.restore_sources(slot);
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
        // They are the client's already.
        state.subscriptions = None;
        if let Some(looks) = &mut state.looks {
            looks.sources.clear();
        }
        let muted = state.muted;
        client.state = state;
        client.sent = 0;
        client.pause = Pause::None;
        client.set_muted(muted);
        if let Some(user) = user.filter(|_| known) {
            self.log_in(slot, &user);
        }
        self.restore(slot);
        self.restore_tracking(slot);
        self.sessions.touch(slot);
        self.depart_newcomer(slot);
        true
    }

    /// Begins to listen for a marker wherever these clients (slots, generations) listen. False: not
    /// now, because a shard is on its way to another primary.
    pub fn begin_cut(&mut self, marker: &[u8], clients: &[(u32, u32)], gives: bool) -> bool {
        let origins = self.origins_of(clients);
        if gives && !origins.iter().all(|origin| self.is_steady(*origin)) {
            return false;
        }
        let marker: Name = marker.into();
        let uid = FIRST_UID + self.pubsub.audience.next_serial();
        for origin in &origins {
            self.ask_marker(*origin, &marker, uid, true);
        }
        let place = |origin| Place {
            origin,
            heard: false,
            renewed: false,
        };
        self.pubsub.cuts.push(Cut {
            marker,
            uid,
            places: origins.into_iter().map(place).collect(),
            clients: clients.iter().map(|key| (*key, Vec::new())).collect(),
            gives,
            published: false,
        });
        true
    }

    /// True if a connection stands there, and is not about to be replaced.
    fn is_steady(&mut self, origin: Origin) -> bool {
        match origin {
            Origin::Messages(shard) => {
                let feed = self.feed(shard);
                feed.current.is_some() && feed.next.is_none()
            }
            Origin::Node(source) => self.is_watched(&source),
        }
    }

    /// Where everything is shown, a marker is too.
    fn ask_marker(&mut self, origin: Origin, marker: &Name, uid: u64, on: bool) {
        let Origin::Messages(shard) = origin else {
            return;
        };
        let line = self.feed(shard).current.as_ref().map(|side| side.line);
        if let Some(line) = line {
            self.ask_side(shard, line, TopicKind::Channel, marker, uid, on);
        }
    }

    fn origins_of(&self, clients: &[(u32, u32)]) -> Vec<Origin> {
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
        let mut sources: Vec<Source> = Vec::new();
        for (slot, _) in clients {
            sources.extend(self.sources_shown_to(*slot));
        }
        sources.sort_unstable();
        sources.dedup();
        let shards = shards.into_iter().map(Origin::Messages);
        shards
            .chain(sources.into_iter().map(Origin::Node))
            .collect()
    }

    /// The nodes that a client monitors.
    pub(super) fn sources_shown_to(&self, slot: u32) -> &[Source] {
        let extra = self.sessions.get(slot).and_then(|c| c.extra.as_ref());
        let own = extra.and_then(|extra| extra.monitoring.as_ref());
        own.map_or(&[], |own| &own.sources)
    }

    /// True if the nodes have confirmed the marker, and at the process that takes everything that its
    /// clients listen to.
    #[must_use]
    pub fn is_cut_ready(&mut self, marker: &[u8]) -> bool {
        let Some(cut) = self.pubsub.cuts.iter().find(|cut| *cut.marker == *marker) else {
            return false;
        };
        let (uid, places) = (cut.uid, cut.places.clone());
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
        places.iter().all(|place| {
            let asked = match place.origin {
                Origin::Messages(shard) => {
                    let current = self.feed(shard).current.as_ref();
                    current.is_some_and(|side| !side.pending.contains(&uid))
                }
                Origin::Node(_) => true,
            };
            asked && self.is_steady(place.origin)
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
        let shard = |place: &Place| match place.origin {
            Origin::Messages(shard) => shard,
            Origin::Node(source) => source.shard, // replicas execute it too
        };
        let mut shards: Vec<ShardNo> = cut.places.iter().map(shard).collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            // It may be sent twice, so it may be repeated; only the first one counts.
            let lane = &mut self.lanes[lane_no(shard, Protocol::Resp2) as usize];
            lane.submit(Entry::own(Kind::Single), &frame, self.now_us, &mut self.out);
        }
    }

    /// The marker came.
    pub(super) fn cut_heard(&mut self, origin: Origin, channel: &[u8]) {
        for cut in &mut self.pubsub.cuts {
            if *cut.marker == *channel {
                let own = cut.places.iter_mut().filter(|place| place.origin == origin);
                own.for_each(|place| place.heard = true);
            }
        }
    }

    /// A node shows a command: perhaps the one that publishes a marker. Nobody can guess one.
    pub(super) fn cut_shown(&mut self, source: Source, line: &[u8]) {
        for cut in &mut self.pubsub.cuts {
            let mut places = cut.places.iter_mut();
            let place = places.find(|place| place.origin == Origin::Node(source));
            if let Some(place) = place.filter(|place| !place.heard) {
                place.heard = is_publishing(line, &cut.marker);
            }
        }
    }

    /// Another connection is opened. Returns the markers that must be asked for on it, with their
    /// numbers.
    pub(super) fn cut_renewed(&mut self, origin: Origin) -> Vec<(Name, u64)> {
        let mut asked = Vec::new();
        for cut in &mut self.pubsub.cuts {
            let mut places = cut.places.iter_mut();
            let place = places.find(|place| place.origin == origin && !place.heard);
            if let Some(place) = place {
                place.renewed = true;
                asked.push((Arc::clone(&cut.marker), cut.uid));
            }
        }
        asked
    }

    /// The other process has heard the marker everywhere. On a connection that was made after it was
    /// published it never comes: there everything comes behind it.
    pub fn forgive_renewed(&mut self, marker: &[u8]) {
        for cut in &mut self.pubsub.cuts {
            if *cut.marker == *marker && !cut.gives {
                let renewed = cut.places.iter_mut().filter(|place| place.renewed);
                renewed.for_each(|place| place.heard = true);
            }
        }
    }

    /// True if the marker came from everywhere.
    #[must_use]
    pub fn is_cut_heard(&self, marker: &[u8]) -> bool {
        let mut cuts = self.pubsub.cuts.iter();
        let cut = cuts.find(|cut| *cut.marker == *marker);
        cut.is_some_and(|cut| cut.places.iter().all(|place| place.heard))
    }

    /// True if this process is the one that gives, or knows no such marker.
    #[must_use]
    pub fn gives_cut(&self, marker: &[u8]) -> bool {
        let mut cuts = self.pubsub.cuts.iter();
        cuts.find(|cut| *cut.marker == *marker)
            .is_none_or(|cut| cut.gives)
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
        for place in &cut.places {
            self.ask_marker(place.origin, &Arc::clone(&cut.marker), cut.uid, false);
        }
        for ((slot, generation), late) in cut.clients {
            if !late.is_empty() {
                self.sessions.push(slot, generation, &late);
            }
        }
    }
}

/// A line of MONITOR shows that a marker is published, and not that somebody listens for it, which
/// happens before.
fn is_publishing(line: &[u8], marker: &[u8]) -> bool {
    let at = memchr::memmem::find(line, marker);
    at.is_some_and(|at| line[..at].ends_with(b"\"PUBLISH\" \""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::Identity;

    const FEED: Origin = Origin::Messages(3);

    fn core_with_cut(gives: bool) -> Core {
        let identity = Identity {
            run_id: String::new(),
            port: 1,
            pid: 1,
            advertise: None,
        };
        let mut core = Core::new(Arc::new(identity), Arc::default());
        core.pubsub.cuts.push(Cut {
            marker: b"m"[..].into(),
            uid: FIRST_UID,
            places: vec![Place {
                origin: FEED,
                heard: false,
                renewed: false,
            }],
            clients: HashMap::from([((1, 1), Vec::new())]),
            gives,
            published: false,
        });
        core
    }

    #[test]
    fn a_marker_is_asked_for_again_on_a_new_connection_and_not_waited_for_in_vain() {
        let mut core = core_with_cut(false);
        core.forgive_renewed(b"m");
        assert!(!core.is_cut_heard(b"m"), "it may come yet");
        assert_eq!(core.cut_renewed(FEED), [(b"m"[..].into(), FIRST_UID)]);
        assert_eq!(core.cut_renewed(Origin::Messages(4)), []);
        assert!(
            divert(&mut core.pubsub.cuts, FEED, (1, 1), b"x"),
            "before it"
        );
        core.forgive_renewed(b"m");
        assert!(core.is_cut_heard(b"m"));
        assert!(
            !divert(&mut core.pubsub.cuts, FEED, (1, 1), b"x"),
            "behind it"
        );
    }

    #[test]
    fn whoever_monitors_waits_for_the_marker_and_not_for_those_who_listen_for_it() {
        let mut core = core_with_cut(false);
        let node = Source {
            shard: 3,
            replica: None,
        };
        core.pubsub.cuts[0].places[0].origin = Origin::Node(node);
        for line in [
            "\"SUBSCRIBE\" \"m\"",
            "\"UNSUBSCRIBE\" \"m\"",
            "\"GET\" \"m\"",
        ] {
            core.cut_shown(node, format!("+1.0 [0 127.0.0.1:1] {line}\r\n").as_bytes());
            assert!(!core.is_cut_heard(b"m"), "{line}");
        }
        core.cut_shown(node, b"+1.0 [0 127.0.0.1:1] \"PUBLISH\" \"m\" \"\"\r\n");
        assert!(core.is_cut_heard(b"m"));
    }

    #[test]
    fn who_gives_waits_for_the_marker_itself() {
        let mut core = core_with_cut(true);
        core.cut_renewed(FEED);
        core.forgive_renewed(b"m");
        assert!(!core.is_cut_heard(b"m") && core.gives_cut(b"m"));
        core.cut_heard(FEED, b"other");
        assert!(!core.is_cut_heard(b"m"));
        core.cut_heard(FEED, b"m");
        assert!(core.is_cut_heard(b"m"));
        assert!(divert(&mut core.pubsub.cuts, FEED, (1, 1), b"late"));
        assert_eq!(core.pubsub.cuts[0].clients[&(1, 1)], b"late");
    }
}
