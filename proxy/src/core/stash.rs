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
    }

    /// The head was answered: appends the replies that are due now to `out`. Returns how many.
    pub fn advance(&mut self, out: &mut Vec<u8>) -> u32 {
        self.slots.pop_front();
        let mut count = 0;
        while let Some(Some((at, len))) = self.slots.front().copied() {
            out.extend_from_slice(&self.bytes[at..at + len]);
            self.slots.pop_front();
            count += 1;
        }
        if self.slots.is_empty() {
            self.bytes.clear();
        }
        count
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub fn bytes_len(&self) -> usize {
        self.bytes.len()
    }

    /// Empties it for another client; false if it grew too large to be worth keeping.
    pub fn recycle(&mut self) -> bool {
        self.slots.clear();
        self.bytes.clear();
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
}
