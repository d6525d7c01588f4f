//! Replies that came before their turn: another shard is slower with an older request.
//!
//! Invariant: `slots[k]` belongs to request `head + k` of the client, and `slots[0]` is always a
//! hole, because a reply at the head is never stashed.

use std::collections::VecDeque;

/// Most replies are small; a stash that held large ones goes back to the allocator.
const RETAINED_BYTES: usize = 64 * 1024;

/// Early replies of one client in one buffer.
#[derive(Debug, Default)]
pub struct Stash {
    slots: VecDeque<Option<(usize, usize)>>,
    bytes: Vec<u8>,
    /// Bytes of replies that are still to leave; the others of `bytes` are dead.
    live: usize,
}

impl Stash {
    /// Keeps the reply to the request that is `distance` after the head (at least 1).
    pub fn put(&mut self, distance: u32, reply: &[u8]) {
        let at = distance as usize;
        debug_assert!(at > 0);
        if self.slots.len() <= at {
            self.slots.resize(at + 1, None);
        }
        debug_assert!(self.slots[at].is_none(), "two replies to one request");
        self.slots[at] = Some((self.bytes.len(), reply.len()));
        self.bytes.extend_from_slice(reply);
        self.live += reply.len();
    }

    /// The head was answered: appends the replies that are due now to `out`. Returns how many.
    pub fn advance(&mut self, out: &mut Vec<u8>) -> u32 {
        self.slots.pop_front();
        let mut count = 0;
        while let Some(Some((at, len))) = self.slots.front().copied() {
            out.extend_from_slice(&self.bytes[at..at + len]);
            self.slots.pop_front();
            self.live -= len;
            count += 1;
        }
        if self.slots.is_empty() {
            self.bytes.clear();
        } else if self.bytes.len() > RETAINED_BYTES && self.live * 2 <= self.bytes.len() {
            self.compact();
        }
        count
    }

    /// A client that always has some reply early never empties the stash: drops what has left.
    fn compact(&mut self) {
        let mut bytes = Vec::with_capacity(self.live);
        for (at, len) in self.slots.iter_mut().flatten() {
            let from = bytes.len();
            bytes.extend_from_slice(&self.bytes[*at..*at + *len]);
            *at = from;
        }
        self.bytes = bytes;
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Bytes of the replies that wait here.
    pub fn bytes_len(&self) -> usize {
        self.live
    }

    /// Empties it for another client; false if it grew too large to be worth keeping.
    pub fn recycle(&mut self) -> bool {
        self.slots.clear();
        self.bytes.clear();
        self.live = 0;
        self.bytes.capacity() <= RETAINED_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn early_replies_leave_in_request_order() {
        let mut stash = Stash::default();
        stash.put(2, b"c");
        stash.put(1, b"b");
        stash.put(4, b"e");
        let mut out = b"a".to_vec();
        assert_eq!(stash.advance(&mut out), 2);
        assert_eq!(out, b"abc");
        out.push(b'd');
        assert_eq!(stash.advance(&mut out), 1);
        assert_eq!(out, b"abcde");
        assert!(stash.is_empty() && stash.bytes_len() == 0);
    }

    #[test]
    fn replies_that_have_left_are_not_kept_by_one_that_is_always_early() {
        let mut stash = Stash::default();
        let reply = |n: u32| vec![n as u8; 10_000];
        let mut out = Vec::new();
        stash.put(1, &reply(1));
        for n in 2..1000 {
            // The next one is early too, before this one may leave.
            stash.put(3, &reply(n));
            out.clear();
            assert_eq!(stash.advance(&mut out), 1);
            assert_eq!(out, reply(n - 1));
            assert_eq!(stash.bytes_len(), 10_000);
            assert!(
                stash.bytes.len() <= 2 * RETAINED_BYTES,
                "{}",
                stash.bytes.len()
            );
        }
    }
}
