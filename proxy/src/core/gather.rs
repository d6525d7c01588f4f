//! Split commands: one request of a client becomes a part per shard, and the parts' replies become
//! one reply.
//!
//! Invariant: a gather exists as long as one of its parts has no reply; its objects come from a
//! free list and keep their memory.

use slotmesh_resp::{Protocol, ReplyScanner, Scan, parse_i64, write};

/// How the replies of the parts become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Merge {
    /// Arrays whose elements go back to the places of their keys (MGET). The error of a part stands
    /// at each of its places.
    Elements,
    /// Integers are added (DEL, EXISTS, DBSIZE).
    Sum,
    /// All the same, or the first error (MSET, FLUSHALL, SCRIPT LOAD).
    First,
    /// The first that is no error, else the first error (SCRIPT KILL).
    Any,
    /// Arrays are appended (KEYS).
    Concat,
    /// Arrays of 0 and 1: 1 where all parts have 1 (SCRIPT EXISTS).
    All,
}

/// Whose reply it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub(super) client: u32,
    pub(super) generation: u32,
    pub(super) seq: u32,
    pub(super) protocol: Protocol,
}

#[derive(Debug)]
struct Gather {
    owner: Owner,
    merge: Merge,
    missing: u16,
    /// For `Elements`: the part of each key, in key order.
    places: Vec<u16>,
    /// Where each part's reply lies in `bytes`.
    parts: Vec<(usize, usize)>,
    bytes: Vec<u8>,
}

/// A gather that held more is freed instead of kept.
const RETAINED_BYTES: usize = 64 * 1024;
/// As many as a busy worker has open at once.
const KEPT_MAX: usize = 1024;

/// All open gathers of a worker.
#[derive(Debug, Default)]
pub(super) struct Gathers {
    open: Vec<Option<Gather>>,
    free: Vec<u32>,
    spare: Vec<Gather>,
}

impl Gathers {
    /// Opens a gather of `parts` parts; returns its number for the entries.
    pub(super) fn open(&mut self, owner: Owner, merge: Merge, parts: u16, places: &[u16]) -> u32 {
        let mut gather = self.spare.pop().unwrap_or_else(|| Gather {
            owner,
            merge,
            missing: 0,
            places: Vec::new(),
            parts: Vec::new(),
            bytes: Vec::new(),
        });
        (gather.owner, gather.merge, gather.missing) = (owner, merge, parts);
        gather.places.extend_from_slice(places);
        gather.parts.resize(usize::from(parts), (0, 0));
        let number = self.free.pop().unwrap_or_else(|| {
            self.open.push(None);
            (self.open.len() - 1) as u32
        });
        self.open[number as usize] = Some(gather);
        number
    }

    /// Takes the reply of a part. When it was the last one, writes the whole reply to `out` and
    /// says whose it is.
    pub(super) fn part(
        &mut self,
        number: u32,
        part: u16,
        reply: &[u8],
        out: &mut Vec<u8>,
    ) -> Option<Owner> {
        let slot = self.open.get_mut(number as usize)?;
        let gather = slot.as_mut()?;
        let from = gather.bytes.len();
        gather.bytes.extend_from_slice(reply);
        gather.parts[usize::from(part)] = (from, gather.bytes.len());
        gather.missing -= 1;
        if gather.missing > 0 {
            return None;
        }
        let mut gather = slot.take()?;
        self.free.push(number);
        gather.write(out);
        let owner = gather.owner;
        gather.places.clear();
        gather.parts.clear();
        gather.bytes.clear();
        if self.spare.len() < KEPT_MAX && gather.bytes.capacity() <= RETAINED_BYTES {
            self.spare.push(gather);
        }
        Some(owner)
    }
}

impl Gather {
    fn replies(&self) -> impl Iterator<Item = &[u8]> {
        self.parts.iter().map(|&(from, to)| &self.bytes[from..to])
    }

    fn write(&self, out: &mut Vec<u8>) {
        let is_error = |r: &&[u8]| matches!(r.first(), Some(b'-' | b'!'));
        let error = self.replies().find(is_error);
        match (self.merge, error) {
            (Merge::Elements, _) => self.write_elements(out),
            (Merge::Any, _) => {
                let good = self.replies().find(|r| !is_error(r));
                out.extend_from_slice(good.or(error).unwrap_or_default());
            }
            (_, Some(error)) => out.extend_from_slice(error),
            (Merge::First, None) => {
                out.extend_from_slice(self.replies().next().unwrap_or_default())
            }
            (Merge::Sum, None) => write::write_int(out, self.replies().map(integer).sum()),
            (Merge::Concat, None) => {
                let members = self.replies().map(|r| array(r).0).sum();
                write::write_array_header(out, members);
                self.replies()
                    .for_each(|r| out.extend_from_slice(array(r).1));
            }
            (Merge::All, None) => self.write_all(out),
        }
    }

    fn write_elements(&self, out: &mut Vec<u8>) {
        write::write_array_header(out, self.places.len());
        let mut rests: smallvec::SmallVec<[&[u8]; 16]> = smallvec::SmallVec::new();
        for reply in self.replies() {
            rests.push(if reply.first() == Some(&b'-') {
                reply
            } else {
                array(reply).1
            });
        }
        for &place in &self.places {
            let rest = &mut rests[usize::from(place)];
            if rest.first() == Some(&b'-') {
                out.extend_from_slice(rest); // stays: it stands at each place of this part
                continue;
            }
            match ReplyScanner::new().scan(rest) {
                Ok(Scan::Complete { consumed, .. }) => {
                    out.extend_from_slice(&rest[..consumed]);
                    *rest = &rest[consumed..];
                }
                // A node that answers fewer elements than it was asked for.
                _ => write::write_null(out, self.owner.protocol),
            }
        }
    }

    fn write_all(&self, out: &mut Vec<u8>) {
        let mut all: Vec<i64> = Vec::new();
        for reply in self.replies() {
            let values = (array(reply).1)
                .split_inclusive(|b| *b == b'\n')
                .map(integer);
            if all.is_empty() {
                all = values.collect();
            } else {
                all.iter_mut()
                    .zip(values)
                    .for_each(|(a, v)| *a = (*a).min(v));
            }
        }
        write::write_array_header(out, all.len());
        all.into_iter().for_each(|v| write::write_int(out, v));
    }
}

/// The value of `:123\r\n`.
fn integer(reply: &[u8]) -> i64 {
    let digits = reply
        .get(1..reply.len().saturating_sub(2))
        .unwrap_or_default();
    parse_i64(digits).unwrap_or(0)
}

/// Number of members of an array (or set), and its members' bytes.
fn array(reply: &[u8]) -> (usize, &[u8]) {
    let Some(end) = memchr::memchr(b'\n', reply) else {
        return (0, &[]);
    };
    let count = parse_i64(reply.get(1..end - 1).unwrap_or_default()).unwrap_or(0);
    (usize::try_from(count).unwrap_or(0), &reply[end + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(merge: Merge, places: &[u16], replies: &[&str], want: &str) {
        // In every order of arrival of up to three parts.
        for rotation in 0..replies.len() {
            let owner = Owner {
                client: 3,
                generation: 1,
                seq: 9,
                protocol: Protocol::Resp2,
            };
            let mut gathers = Gathers::default();
            let number = gathers.open(owner, merge, replies.len() as u16, places);
            let mut out = Vec::new();
            let mut done = None;
            for step in 0..replies.len() {
                let part = (rotation + step) % replies.len();
                assert!(done.is_none());
                let reply = replies[part].as_bytes();
                done = gathers.part(number, part as u16, reply, &mut out);
            }
            assert_eq!(done.unwrap().seq, 9);
            assert_eq!(String::from_utf8_lossy(&out), want);
        }
    }

    #[test]
    fn elements_return_to_the_places_of_their_keys() {
        let replies = ["*2\r\n$1\r\na\r\n$-1\r\n", "*1\r\n$1\r\nb\r\n"];
        check(
            Merge::Elements,
            &[0, 1, 0],
            &replies,
            "*3\r\n$1\r\na\r\n$1\r\nb\r\n$-1\r\n",
        );
        let replies = ["-ERR no\r\n", "*1\r\n$1\r\nb\r\n"];
        check(
            Merge::Elements,
            &[0, 1, 0],
            &replies,
            "*3\r\n-ERR no\r\n$1\r\nb\r\n-ERR no\r\n",
        );
    }

    #[test]
    fn sums_and_firsts_give_the_first_error() {
        check(Merge::Sum, &[], &[":2\r\n", ":3\r\n"], ":5\r\n");
        check(
            Merge::Sum,
            &[],
            &[":2\r\n", "-ERR a\r\n", "-ERR b\r\n"],
            "-ERR a\r\n",
        );
        check(Merge::First, &[], &["+OK\r\n", "+OK\r\n"], "+OK\r\n");
        check(Merge::First, &[], &["+OK\r\n", "-OOM x\r\n"], "-OOM x\r\n");
    }

    #[test]
    fn arrays_are_appended_or_compared() {
        let replies = ["*1\r\n$1\r\na\r\n", "*0\r\n", "*1\r\n$1\r\nb\r\n"];
        check(Merge::Concat, &[], &replies, "*2\r\n$1\r\na\r\n$1\r\nb\r\n");
        let replies = ["*2\r\n:1\r\n:0\r\n", "*2\r\n:1\r\n:1\r\n"];
        check(Merge::All, &[], &replies, "*2\r\n:1\r\n:0\r\n");
    }

    #[test]
    fn a_finished_gather_gives_its_number_back() {
        let owner = Owner {
            client: 0,
            generation: 1,
            seq: 0,
            protocol: Protocol::Resp2,
        };
        let mut gathers = Gathers::default();
        let first = gathers.open(owner, Merge::Sum, 1, &[]);
        assert!(gathers.part(first, 0, b":1\r\n", &mut Vec::new()).is_some());
        assert_eq!(gathers.open(owner, Merge::Sum, 1, &[]), first);
    }
}
