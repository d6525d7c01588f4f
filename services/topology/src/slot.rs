//! Slots: CRC16 of a key's hash tag modulo 16384, as Redis Cluster has it, and ranges of them.

use crc16::{State, XMODEM};

/// Number of slots of an instance.
pub const SLOT_COUNT: u16 = 16_384;

/// One slot; always below [`SLOT_COUNT`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Slot(u16);

impl Slot {
    /// The slot of a key: only the hash tag counts, if the key has one that isn't empty.
    #[must_use]
    #[inline]
    pub fn of(key: &[u8]) -> Self {
        Self(State::<XMODEM>::calculate(hash_tag(key)) % SLOT_COUNT)
    }

    /// The slot with this number, if there is one.
    #[must_use]
    pub fn new(number: u16) -> Option<Self> {
        (number < SLOT_COUNT).then_some(Self(number))
    }

    /// Its number.
    #[must_use]
    #[inline]
    pub fn number(self) -> u16 {
        self.0
    }
}

/// The part of a key that decides its slot: between the first `{` and the next `}`, if not empty.
#[must_use]
#[inline]
pub fn hash_tag(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|b| *b == b'{') else {
        return key;
    };
    let rest = &key[open + 1..];
    match rest.iter().position(|b| *b == b'}') {
        None | Some(0) => key,
        Some(close) => &rest[..close],
    }
}

/// Consecutive slots; both ends belong to it and first ≤ last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotRange {
    first: Slot,
    last: Slot,
}

impl SlotRange {
    /// A range, if the ends are slots in order.
    #[must_use]
    pub fn new(first: u16, last: u16) -> Option<Self> {
        let (first, last) = (Slot::new(first)?, Slot::new(last)?);
        (first <= last).then_some(Self { first, last })
    }

    /// First slot.
    #[must_use]
    pub fn first(self) -> u16 {
        self.first.0
    }

    /// Last slot.
    #[must_use]
    pub fn last(self) -> u16 {
        self.last.0
    }
}

/// One range a shard, in order, sizes differing by at most one slot.
///
/// # Panics
/// When `shards` is 0 or above the number of slots.
#[must_use]
pub fn split_evenly(shards: u16) -> Vec<SlotRange> {
    assert!(shards > 0 && shards <= SLOT_COUNT);
    let (count, shards) = (u32::from(SLOT_COUNT), u32::from(shards));
    let edge = |i: u32| u16::try_from(count * i / shards).unwrap_or(SLOT_COUNT);
    (0..shards)
        .map(|i| SlotRange {
            first: Slot(edge(i)),
            last: Slot(edge(i + 1) - 1),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_slots() {
        // Values of `CLUSTER KEYSLOT`.
        for (key, slot) in [
            ("123456789", 0x31C3 % SLOT_COUNT),
            ("foo", 12182),
            ("test_key", 15118),
            ("{user1000}.following", 3443),
            ("{user1000}.followers", 3443),
            ("foo{}{bar}", 8363),
            ("", 0),
        ] {
            assert_eq!(Slot::of(key.as_bytes()).number(), slot, "{key}");
        }
        assert_eq!(hash_tag(b"foo{{bar}}zap"), b"{bar");
        assert_eq!(hash_tag(b"foo{bar}{zap}"), b"bar");
        assert_eq!(hash_tag(b"foo{bar"), b"foo{bar");
    }

    #[test]
    fn even_split_covers_every_slot_once() {
        for shards in [1, 2, 3, 7, 256, SLOT_COUNT] {
            let ranges = split_evenly(shards);
            assert_eq!(ranges.len(), usize::from(shards));
            let mut next = 0;
            for range in ranges {
                assert_eq!(range.first(), next);
                next = range.last() + 1;
            }
            assert_eq!(next, SLOT_COUNT);
        }
    }
}
