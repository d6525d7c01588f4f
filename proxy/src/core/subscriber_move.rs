//! How a worker's subscriptions follow their shard to another primary without losing a message.
//!
//! Messages are replicated, so during a planned change a connection to the old primary and one to the
//! new one both receive all of them, each in the same order, but not at the same moment. A *marker*,
//! a message on a channel of ours that the new primary must have executed, cuts both streams at the
//! same place: the old connection delivers what comes before it, the new one what comes after it.
//!
//! Invariant: while both stand, each message is delivered by exactly one of them. If the old one dies,
//! or hears nothing of the marker in time, the new one goes on behind the last message that the old
//! one delivered.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use slotmesh_resp::{Protocol, write};

use super::Core;
use super::lane::lane_no;
use super::passing_topics::Origin;
use super::pubsub_frame::{HIDDEN, Heard};
use super::pubsub_topics::{Name, TopicKind};
use super::queue::{Entry, Kind};
use super::subscriber::Side;
use crate::routing::{ShardNo, ShardRoute};

/// How long the old connection may lag behind the new one. A replica that follows at all is
/// milliseconds behind.
const MARKER_LIMIT_US: u64 = 2_000_000;
/// What is kept of the new connection's messages before the marker, for the case that the old one
/// dies: some seconds of busy channels.
const BEFORE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// And after it. Past it the old connection is too far behind.
const AFTER_BYTES_MAX: usize = 64 * 1024 * 1024;
/// No topic has this number.
const MARKER_UID: u64 = 0;

/// The connection that will take over.
#[derive(Debug)]
pub(super) struct Next {
    pub(super) side: Side,
    marker: Name,
    /// The marker was published; last time.
    pub(super) asked_us: Option<u64>,
    /// It came here.
    seen_us: Option<u64>,
    frames: VecDeque<Box<[u8]>>,
    bytes: usize,
    /// So many of the frames came before the marker.
    before: usize,
    /// What the old connection delivered last.
    last: Vec<u8>,
}

impl Next {
    pub(super) fn deadline_us(&self) -> Option<u64> {
        Some(self.seen_us.or(self.asked_us)? + MARKER_LIMIT_US)
    }

    fn keep(&mut self, frame: &[u8]) {
        self.bytes += frame.len();
        self.frames.push_back(frame.into());
        while self.seen_us.is_none() && self.bytes > BEFORE_BYTES_MAX {
            let dropped = self.frames.pop_front();
            self.bytes -= dropped.map_or(self.bytes, |frame| frame.len());
        }
    }

    /// The marker came on the new connection.
    fn cut(&mut self, now_us: u64) {
        if self.seen_us.is_none() {
            self.seen_us = Some(now_us);
            self.before = self.frames.len();
        }
    }

    /// How many of the frames were delivered already, as far as can be told.
    fn delivered(&self, by_marker: bool) -> usize {
        if by_marker {
            return if self.seen_us.is_some() {
                self.before
            } else {
                self.frames.len()
            };
        }
        let mut frames = self.frames.iter();
        let last = frames.rposition(|frame| **frame == *self.last);
        last.map_or(0, |at| at + 1)
    }
}

impl Core {
    /// A shard's current connection goes to `at`: is another one needed?
    pub(super) fn steer_next(&mut self, shard: ShardNo, route: &Arc<ShardRoute>, at: SocketAddr) {
        let wanted = if at != route.address {
            Some(route.address)
        } else {
            // Held: the change is about to happen, and everything can be subscribed beforehand.
            let target = route.target.filter(|_| route.hold.is_some());
            target.filter(|target| *target != at)
        };
        let now_us = self.now_us;
        let feed = self.feed(shard);
        if feed.next.as_ref().map(|next| next.side.address) == wanted {
            return self.mark_move(shard);
        }
        self.close_next(shard);
        let Some(address) = wanted else { return };
        if self.feed(shard).retry_at_us > now_us {
            self.out.unsteady = true;
            return;
        }
        let serial = self.pubsub.audience.next_serial();
        let mut marker = HIDDEN.to_vec();
        marker.extend_from_slice(format!(":{}:{serial}", self.identity.run_id).as_bytes());
        let side = self.open_side(shard, route, address);
        let marker: Name = marker.into();
        let line = side.line;
        let feed = self.feed(shard);
        let old = feed.current.as_ref().map(|side| side.line);
        feed.next = Some(Next {
            side,
            marker: Arc::clone(&marker),
            asked_us: None,
            seen_us: None,
            frames: VecDeque::new(),
            bytes: 0,
            before: 0,
            last: Vec::new(),
        });
        for line in [Some(line), old].into_iter().flatten() {
            self.ask_side(shard, line, TopicKind::Channel, &marker, MARKER_UID, true);
        }
    }

    /// The change does not take place, or goes elsewhere.
    pub(super) fn close_next(&mut self, shard: ShardNo) {
        let feed = self.feed(shard);
        let Some(next) = feed.next.take() else { return };
        let current = feed.current.as_ref().map(|side| side.line);
        self.close_line(next.side.line);
        if let Some(line) = current {
            self.ask_side(
                shard,
                line,
                TopicKind::Channel,
                &next.marker,
                MARKER_UID,
                false,
            );
        }
    }

    /// Publishes the marker once everything is subscribed on the new connection and it goes to the
    /// primary.
    pub(super) fn mark_move(&mut self, shard: ShardNo) {
        let route = self.table.shards.get(usize::from(shard)).cloned().flatten();
        let feed = self.feed(shard);
        let (Some(route), Some(next), Some(old)) = (route, &feed.next, &feed.current) else {
            return;
        };
        let ready = next.side.expected.is_empty() && !old.pending.contains(&MARKER_UID);
        if ready && next.asked_us.is_none() && next.side.address == route.address {
            self.publish_marker(shard);
        }
    }

    fn publish_marker(&mut self, shard: ShardNo) {
        let now_us = self.now_us;
        let Some(next) = &mut self.feed(shard).next else {
            return;
        };
        next.asked_us = Some(now_us);
        let marker = Arc::clone(&next.marker);
        let mut frame = Vec::new();
        write::encode_command(&mut frame, &[b"PUBLISH", &marker, b""]);
        // It may be sent twice, so it may be repeated; only the first one counts.
        let entry = Entry::own(Kind::Single);
        let lane = &mut self.lanes[lane_no(shard, Protocol::Resp2) as usize];
        lane.submit(entry, &frame, now_us, &mut self.out);
        self.out.unsteady = true;
    }

    /// Looks at a message in the light of a move. True: it must not be delivered now.
    pub(super) fn moves(
        &mut self,
        shard: ShardNo,
        is_next: bool,
        kind: TopicKind,
        channel: &[u8],
        frame: &[u8],
    ) -> bool {
        let now_us = self.now_us;
        let feed = self.feed(shard);
        if Heard::is_hidden(channel) {
            if kind == TopicKind::Channel {
                self.marker_heard(shard, is_next, channel);
            }
            return true;
        }
        if let Some(next) = &mut feed.next {
            if is_next {
                next.keep(frame);
                if next.seen_us.is_some() && next.bytes > AFTER_BYTES_MAX {
                    next.seen_us = Some(now_us.saturating_sub(MARKER_LIMIT_US));
                    self.out.unsteady = true;
                }
                return true;
            }
            next.last.clear();
            next.last.extend_from_slice(frame);
        }
        let feed = self.feed(shard);
        (feed.current.as_ref()).is_some_and(|side| side.skip_until.is_some())
    }

    fn marker_heard(&mut self, shard: ShardNo, is_next: bool, channel: &[u8]) {
        if !is_next {
            self.cut_heard(Origin::Messages(shard), channel);
        }
        let now_us = self.now_us;
        let feed = self.feed(shard);
        if let Some(next) = (feed.next.as_mut()).filter(|next| *next.marker == *channel) {
            if !is_next {
                return self.take_over(shard, false);
            }
            next.cut(now_us);
            self.out.unsteady = true;
        } else if let Some(side) = &mut feed.current
            && !is_next
            && side.skip_until.as_deref() == Some(channel)
        {
            side.skip_until = None;
        }
    }

    /// The new connection delivers from now on: behind the marker that has come on the old one, or,
    /// without that, behind what the old one delivered last.
    pub(super) fn take_over(&mut self, shard: ShardNo, forced: bool) {
        let feed = self.feed(shard);
        let Some(mut next) = feed.next.take() else {
            return;
        };
        let old = feed.current.take();
        let delivered = next.delivered(!forced);
        if !forced && next.seen_us.is_none() {
            next.side.skip_until = Some(Arc::clone(&next.marker));
        }
        let line = next.side.line;
        feed.current = Some(next.side);
        if let Some(old) = old {
            self.close_line(old.line);
        }
        self.counters.subscriber_moves_forced += u64::from(forced);
        for frame in next.frames.iter().skip(delivered) {
            if let Heard::Message { kind, topic, .. } = Heard::read(frame) {
                self.deliver_message(shard, kind, topic, frame);
            }
        }
        self.ask_side(
            shard,
            line,
            TopicKind::Channel,
            &next.marker,
            MARKER_UID,
            false,
        );
        self.settle_shard(shard);
    }

    /// Acts on what is due in a move.
    pub(super) fn move_on_time(&mut self, shard: ShardNo) {
        let now_us = self.now_us;
        let Some(next) = &self.feed(shard).next else {
            let feed = self.feed(shard);
            if feed.current.is_some() && feed.retry_at_us <= now_us && feed.retry_at_us > 0 {
                feed.retry_at_us = 0;
                self.steer_feed(shard);
            }
            return;
        };
        if next.deadline_us().is_none_or(|at| at > now_us) {
            return;
        }
        if next.seen_us.is_some() {
            self.take_over(shard, true);
        } else {
            self.publish_marker(shard); // it was held for too long
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(frames: &[&[u8]], last: &[u8]) -> Next {
        let mut next = Next {
            side: Side {
                line: 0,
                address: ([127, 0, 0, 1], 1).into(),
                expected: VecDeque::new(),
                pending: std::collections::HashSet::new(),
                skip_until: None,
            },
            marker: b"m"[..].into(),
            asked_us: None,
            seen_us: None,
            frames: VecDeque::new(),
            bytes: 0,
            before: 0,
            last: last.to_vec(),
        };
        frames.iter().for_each(|frame| next.keep(frame));
        next
    }

    #[test]
    fn the_marker_cuts_the_new_stream_and_without_it_the_last_message_does() {
        let mut cut = next(&[b"a", b"b"], b"b");
        assert_eq!(
            cut.delivered(true),
            2,
            "the old one was first: all of it is old"
        );
        cut.cut(5);
        cut.keep(b"c");
        assert_eq!(cut.delivered(true), 2);
        assert_eq!(next(&[b"a", b"b", b"c"], b"b").delivered(false), 2);
        assert_eq!(next(&[b"a", b"b"], b"older").delivered(false), 0);
        assert_eq!(next(&[b"a", b"b"], b"").delivered(false), 0);
    }

    #[test]
    fn what_is_kept_before_the_marker_is_bounded() {
        let mut next = next(&[], b"");
        let frame = vec![b'x'; 1024 * 1024];
        for _ in 0..20 {
            next.keep(&frame);
            assert!(next.bytes <= BEFORE_BYTES_MAX);
        }
        assert_eq!(next.frames.len() * frame.len(), next.bytes);
    }
}
