//! Requests in order, with their raw frames beside them.
//!
//! Invariant: the bytes of the queue are exactly the frames of its entries, one after the other. So
//! a request that turns out not executed still has its bytes, without a copy of its own: the window
//! of a connection (sent and unanswered, then unsent) is one such queue, and so are the held ones.

use std::collections::VecDeque;

use super::retry::{Delivery, Effect};

/// Capacity that an empty queue keeps. Above the usual window of a busy connection (a few hundred
/// requests), below what would matter with hundreds of nodes.
const RETAINED_BYTES: usize = 256 * 1024;
/// Answered bytes at the front are cut off when there are this many, and they are the larger part.
const COMPACT_BYTES: usize = 64 * 1024;

/// What the reply to a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One command of a client: its reply is the client's.
    Single,
    /// As `Single`, but the node's number of receivers is made the client's.
    Publish,
    /// A part of a split command; `aux` is the gather, `part` the position in it.
    Part,
    /// As `Single`, of a script by its digest: its text goes ahead if the node may not have it.
    Script,
    /// MULTI … EXEC in one piece; `aux` is the number of replies to come.
    Block,
    /// A request of a job; `aux` is the job, `seq` the position in its round.
    Job,
    /// MULTI … EXEC of a job, as `Job`; `part` is the number of replies to come.
    JobBlock,
    /// A block of an EXEC in several parts; `aux` is the EXEC, `seq` the part, `part` the number of
    /// replies to come.
    Weave,
    /// As `Single`, but the client is told nothing.
    Touch,
    /// Ours: the reply is swallowed.
    Select,
    /// Ours: makes the node track.
    Track,
    /// Ours: makes a script known to the node.
    Load,
    /// Ours: opens the connection.
    Login,
    /// Ours: asks whether the node answers.
    Ping,
    /// Ours: makes the next `Confirm` cover what was read.
    Mark,
    /// Ours: asks how many replicas have what came before it. See `super::durable`.
    Confirm,
}

impl Kind {
    /// Not a client's: the connection's own.
    pub fn is_own(self) -> bool {
        matches!(
            self,
            Self::Select
                | Self::Load
                | Self::Login
                | Self::Track
                | Self::Ping
                | Self::Mark
                | Self::Confirm
        )
    }
}

/// A request on its way.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Slot of the client; with `generation`, so that a reply for one that left is dropped.
    pub client: u32,
    pub generation: u32,
    /// Position among the client's requests.
    pub seq: u32,
    /// Length of the frame.
    pub len: u32,
    pub aux: u32,
    /// Position among the parts of a split command; [`Self::CACHING`] for one on a client's own lane.
    pub part: u16,
    pub db: u16,
    pub kind: Kind,
    pub effect: Effect,
    /// When it was first held; 0 = never.
    pub held_at_us: u64,
}

impl Entry {
    /// CLIENT CACHING was called for it.
    pub const CACHING: u16 = 1;

    /// An entry of the connection itself.
    pub fn own(kind: Kind) -> Self {
        Self {
            client: u32::MAX,
            generation: 0,
            seq: 0,
            len: 0,
            aux: 0,
            part: 0,
            db: 0,
            kind,
            effect: Effect::Read,
            held_at_us: 0,
        }
    }

    /// The entry, waiting since then if it does not wait already.
    #[must_use]
    pub fn held_since(mut self, now_us: u64) -> Self {
        if self.held_at_us == 0 {
            self.held_at_us = now_us.max(1);
        }
        self
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct FrameQueue {
    entries: VecDeque<Entry>,
    bytes: Vec<u8>,
    /// Where the first entry's frame begins in `bytes`.
    head: usize,
    /// How far `bytes` was given to the socket; only used where the queue is a connection's window.
    sent: usize,
}

impl FrameQueue {
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of all frames.
    pub fn bytes_len(&self) -> usize {
        self.bytes.len() - self.head
    }

    #[inline]
    pub fn push(&mut self, mut entry: Entry, frame: &[u8]) {
        entry.len = frame.len() as u32; // at most FRAME_BYTES_MAX of the codec
        self.bytes.extend_from_slice(frame);
        self.entries.push_back(entry);
    }

    /// Appends an entry whose frame is written in place.
    pub fn push_with(&mut self, mut entry: Entry, write: impl FnOnce(&mut Vec<u8>)) {
        let from = self.bytes.len();
        write(&mut self.bytes);
        entry.len = (self.bytes.len() - from) as u32;
        self.entries.push_back(entry);
    }

    #[inline]
    pub fn front(&self) -> Option<&Entry> {
        self.entries.front()
    }

    /// Oldest first.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = &Entry> {
        self.entries.iter()
    }

    pub fn front_frame(&self) -> &[u8] {
        let len = self.entries.front().map_or(0, |e| e.len as usize);
        &self.bytes[self.head..self.head + len]
    }

    /// True if the first request's last byte was sent.
    pub fn front_delivery(&self) -> Delivery {
        let len = self.entries.front().map_or(0, |e| e.len as usize);
        if self.head + len <= self.sent {
            Delivery::Full
        } else {
            Delivery::Partial
        }
    }

    #[inline]
    pub fn pop(&mut self) -> Option<Entry> {
        let entry = self.entries.pop_front()?;
        self.head += entry.len as usize;
        self.sent = self.sent.max(self.head);
        if self.entries.is_empty() {
            self.clear_bytes();
        } else if self.head >= COMPACT_BYTES && self.head * 2 >= self.bytes.len() {
            self.bytes.drain(..self.head);
            self.sent -= self.head;
            self.head = 0;
        }
        Some(entry)
    }

    /// Moves the first request to the end of `other`, where it waits since `now_us`.
    pub fn pop_into(&mut self, other: &mut Self, now_us: u64) {
        if let Some(entry) = self.front().copied() {
            other.push(entry.held_since(now_us), self.front_frame());
            self.pop();
        }
    }

    /// Moves the first request to the end of `other` as it is: it has its reply.
    pub fn pass_into(&mut self, other: &mut Self) {
        if let Some(entry) = self.front().copied() {
            other.push(entry, self.front_frame());
            self.pop();
        }
    }

    /// Moves the first request before all of `other`: it was refused again and stays the oldest.
    pub fn pop_before(&mut self, other: &mut Self, now_us: u64) {
        let Some(entry) = self.front().map(|e| e.held_since(now_us)) else {
            return;
        };
        let frame = self.front_frame();
        if let Some(head) = other.head.checked_sub(frame.len()) {
            // Where it was before, most of the time: nothing else has to move.
            other.bytes[head..other.head].copy_from_slice(frame);
            other.head = head;
        } else {
            let mut bytes = frame.to_vec();
            bytes.extend_from_slice(&other.bytes[other.head..]);
            other.bytes = bytes;
            other.head = 0;
        }
        self.pop();
        other.entries.push_front(entry);
    }

    /// Takes out the requests of one client, without their frames.
    pub fn take_of(&mut self, client: u32, generation: u32) -> Vec<Entry> {
        let (mut kept, mut taken) = (Self::default(), Vec::new());
        while let Some(entry) = self.front().copied() {
            if (entry.client, entry.generation) == (client, generation) {
                taken.push(entry);
            } else {
                kept.push(entry, self.front_frame());
            }
            self.pop();
        }
        *self = kept;
        taken
    }

    #[inline]
    pub fn unsent(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    #[inline]
    pub fn mark_sent(&mut self, bytes: usize) {
        self.sent += bytes;
        debug_assert!(self.sent <= self.bytes.len());
    }

    fn clear_bytes(&mut self) {
        self.head = 0;
        self.sent = 0;
        if self.bytes.capacity() > RETAINED_BYTES {
            self.bytes = Vec::new();
            self.entries = VecDeque::new();
        } else {
            self.bytes.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(frames: &[&str]) -> FrameQueue {
        let mut queue = FrameQueue::default();
        for frame in frames {
            queue.push(Entry::own(Kind::Single), frame.as_bytes());
        }
        queue
    }

    fn text(queue: &mut FrameQueue) -> Vec<String> {
        let mut all = Vec::new();
        while !queue.is_empty() {
            all.push(String::from_utf8_lossy(queue.front_frame()).into_owned());
            queue.pop();
        }
        all
    }

    #[test]
    fn only_what_waits_is_marked_as_waiting() {
        let mut a = queue(&["one", "two"]);
        let (mut kept, mut waiting) = (FrameQueue::default(), FrameQueue::default());
        a.pass_into(&mut kept);
        a.pop_into(&mut waiting, 7);
        assert_eq!(kept.front().unwrap().held_at_us, 0);
        assert_eq!(waiting.front().unwrap().held_at_us, 7);
        kept.pop_into(&mut waiting, 9);
        waiting.pop();
        assert_eq!(waiting.front().unwrap().held_at_us, 9);
    }

    #[test]
    fn frames_keep_their_order_through_moves_and_a_refused_one_stays_first() {
        let mut a = queue(&["one", "two", "three"]);
        let mut b = queue(&["zero"]);
        a.pop_into(&mut b, 1);
        a.pop_before(&mut b, 1);
        assert_eq!(text(&mut b), ["two", "zero", "one"]);
        assert_eq!(text(&mut a), ["three"]);
    }

    #[test]
    fn delivery_is_full_only_when_the_last_byte_was_sent() {
        let mut queue = queue(&["one", "two"]);
        queue.mark_sent(5);
        assert_eq!(queue.front_delivery(), Delivery::Full);
        queue.pop();
        assert_eq!(queue.front_delivery(), Delivery::Partial);
        assert_eq!(queue.unsent(), b"o");
    }

    #[test]
    fn a_long_window_is_compacted_and_stays_whole() {
        let mut queue = FrameQueue::default();
        let frame = vec![b'x'; 1000];
        for round in 0..500_u32 {
            let entry = Entry {
                seq: round,
                ..Entry::own(Kind::Single)
            };
            queue.push(entry, &frame);
            queue.mark_sent(frame.len());
            if round >= 10 {
                assert_eq!(queue.pop().unwrap().seq, round - 10);
            }
            assert!(queue.bytes.len() < 2 * COMPACT_BYTES + frame.len());
        }
        assert_eq!(queue.bytes_len(), 10 * frame.len());
        assert!(queue.unsent().is_empty());
    }
}
