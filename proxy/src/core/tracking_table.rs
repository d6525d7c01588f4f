//! Which clients of a worker must be told that a key changed.
//!
//! Invariant: a client that has read a key is found here until it is told; where room is short, the
//! oldest by name are told early. Clients that left are found too, and passed over.

use std::collections::{BTreeMap, BTreeSet};

use smallvec::SmallVec;

/// Keys that a worker remembers, as many as Redis does by default.
const KEYS_MAX: usize = 1_000_000;
/// And the bytes of their names.
const KEY_BYTES_MAX: usize = 128 * 1024 * 1024;

/// A slot and its generation.
pub(super) type ClientNo = (u32, u32);
pub(super) type Readers = SmallVec<[ClientNo; 2]>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Table {
    keys: BTreeMap<Box<[u8]>, Readers>,
    bytes: usize,
    /// Keys at most; `None`: as many as is usual.
    keys_max: Option<usize>,
    /// Of clients that are told of everything that begins so.
    prefixes: BTreeMap<Vec<u8>, BTreeSet<ClientNo>>,
}

impl Table {
    /// A client reads a key. Returns what had to make room.
    pub(super) fn remember(&mut self, key: &[u8], client: ClientNo) -> Vec<(Box<[u8]>, Readers)> {
        if let Some(readers) = self.keys.get_mut(key) {
            if !readers.contains(&client) {
                readers.push(client);
            }
            return Vec::new();
        }
        let evicted = self.make_room(1, key.len());
        self.bytes += key.len();
        self.keys.insert(key.into(), SmallVec::from_elem(client, 1));
        evicted
    }

    fn make_room(&mut self, keys: usize, bytes: usize) -> Vec<(Box<[u8]>, Readers)> {
        let mut evicted = Vec::new();
        let keys_max = self.keys_max.unwrap_or(KEYS_MAX);
        while self.keys.len() + keys > keys_max || self.bytes + bytes > KEY_BYTES_MAX {
            let Some((old, readers)) = self.keys.pop_first() else {
                break;
            };
            self.bytes -= old.len();
            evicted.push((old, readers));
        }
        evicted
    }

    /// Changes the limit; 0: the usual one. Returns what is too much.
    pub(super) fn set_keys_max(&mut self, max: usize) -> Vec<(Box<[u8]>, Readers)> {
        self.keys_max = Some(max).filter(|max| *max > 0 && *max < KEYS_MAX);
        self.make_room(0, 0)
    }

    /// The key changed: who has read it, to be told once.
    pub(super) fn take(&mut self, key: &[u8]) -> Option<Readers> {
        let readers = self.keys.remove(key)?;
        self.bytes -= key.len();
        Some(readers)
    }

    pub(super) fn forget_keys(&mut self) {
        self.keys.clear();
        self.bytes = 0;
    }

    pub(super) fn add_prefixes<'a>(
        &mut self,
        client: ClientNo,
        prefixes: impl Iterator<Item = &'a Vec<u8>>,
    ) {
        for prefix in prefixes {
            self.prefixes
                .entry(prefix.clone())
                .or_default()
                .insert(client);
        }
    }

    pub(super) fn remove_prefixes<'a>(
        &mut self,
        client: ClientNo,
        prefixes: impl Iterator<Item = &'a Vec<u8>>,
    ) {
        for prefix in prefixes {
            if let Some(clients) = self.prefixes.get_mut(prefix) {
                clients.remove(&client);
                if clients.is_empty() {
                    self.prefixes.remove(prefix);
                }
            }
        }
    }

    /// For each prefix that clients asked for, who they are.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = (&Vec<u8>, &BTreeSet<ClientNo>)> {
        self.prefixes.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_is_told_once_and_early_if_there_is_no_room() {
        let mut table = Table::default();
        assert!(table.remember(b"k", (1, 1)).is_empty());
        assert!(table.remember(b"k", (1, 1)).is_empty());
        assert!(table.remember(b"k", (2, 1)).is_empty());
        assert_eq!(table.take(b"k").unwrap().as_slice(), [(1, 1), (2, 1)]);
        assert!(table.take(b"k").is_none() && table.bytes == 0);
        let large = vec![b'x'; KEY_BYTES_MAX / 2];
        assert!(table.remember(&large, (1, 1)).is_empty());
        assert!(table.remember(b"a", (1, 1)).is_empty());
        let other = vec![b'y'; KEY_BYTES_MAX / 2];
        let evicted = table.remember(&other, (1, 1));
        assert_eq!(&*evicted[0].0, b"a");
    }
}
