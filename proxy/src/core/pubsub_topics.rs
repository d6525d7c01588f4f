//! What the clients of a worker listen to: for each channel, pattern and shard channel its clients,
//! and the SUBSCRIBEs that wait for a node.
//!
//! Invariants: a topic exists as long as a client has it or waits for it; a client is among a
//! topic's clients exactly if the topic is in the client's own list.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use super::client::NAME_BYTES;
use crate::routing::ShardNo;

/// A channel or pattern. Shared by all that mention it.
pub(super) type Name = Arc<[u8]>;

/// The three namespaces of what can be listened to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TopicKind {
    Channel,
    Pattern,
    ShardChannel,
}

impl TopicKind {
    pub(super) const ALL: [Self; 3] = [Self::Channel, Self::Pattern, Self::ShardChannel];

    /// The namespace of PUBLISH or SPUBLISH.
    pub(super) fn of_messages(sharded: bool) -> Self {
        if sharded {
            Self::ShardChannel
        } else {
            Self::Channel
        }
    }

    pub(super) fn subscribe(self) -> &'static [u8] {
        match self {
            Self::Channel => b"subscribe",
            Self::Pattern => b"psubscribe",
            Self::ShardChannel => b"ssubscribe",
        }
    }

    pub(super) fn unsubscribe(self) -> &'static [u8] {
        match self {
            Self::Channel => b"unsubscribe",
            Self::Pattern => b"punsubscribe",
            Self::ShardChannel => b"sunsubscribe",
        }
    }
}

/// Which nodes may have something to say about a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    One(ShardNo),
    /// Patterns, and channels that keys' shards publish to.
    All,
}

/// Something that clients listen to.
#[derive(Debug)]
pub(super) struct Topic {
    /// Tells it from an earlier one of this name.
    pub(super) uid: u64,
    pub(super) kind: TopicKind,
    pub(super) name: Name,
    pub(super) spread: Spread,
    /// Slots, and generations.
    pub(super) clients: BTreeMap<u32, u32>,
    /// SUBSCRIBEs that hold on to it, and whether they still wait for it.
    pub(super) waiting: Vec<(u64, bool)>,
    /// It is in the process's counts.
    pub(super) counted: bool,
}

impl Topic {
    pub(super) fn is_on(&self, shard: ShardNo) -> bool {
        self.spread == Spread::All || self.spread == Spread::One(shard)
    }

    fn is_unused(&self) -> bool {
        self.clients.is_empty() && self.waiting.is_empty()
    }
}

/// All topics of a worker.
#[derive(Debug, Default)]
pub(super) struct Topics {
    by_name: [HashMap<Name, Topic>; 3],
    made: u64,
}

impl Topics {
    pub(super) fn get(&self, kind: TopicKind, name: &[u8]) -> Option<&Topic> {
        self.by_name[kind as usize].get(name)
    }

    pub(super) fn get_mut(&mut self, kind: TopicKind, name: &[u8]) -> Option<&mut Topic> {
        self.by_name[kind as usize].get_mut(name)
    }

    /// The topic, made if there is none.
    pub(super) fn take_up(
        &mut self,
        kind: TopicKind,
        name: &[u8],
        spread: Spread,
    ) -> (&mut Topic, bool) {
        let of_kind = &mut self.by_name[kind as usize];
        let new = !of_kind.contains_key(name);
        self.made += u64::from(new);
        let (uid, name): (u64, Name) = (self.made, name.into());
        let topic = of_kind.entry(Arc::clone(&name)).or_insert_with(|| Topic {
            uid,
            kind,
            name,
            spread,
            clients: BTreeMap::new(),
            waiting: Vec::new(),
            counted: false,
        });
        (topic, new)
    }

    /// Forgets the topic if nobody has it any more.
    pub(super) fn drop_unused(&mut self, kind: TopicKind, name: &[u8]) -> Option<Topic> {
        let of_kind = &mut self.by_name[kind as usize];
        of_kind.get(name).filter(|topic| topic.is_unused())?;
        of_kind.remove(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Topic> {
        self.by_name.iter().flat_map(HashMap::values)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Topic> {
        self.by_name.iter_mut().flat_map(HashMap::values_mut)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_name.iter().all(HashMap::is_empty)
    }
}

/// What one client listens to.
#[derive(Debug, Default)]
pub(super) struct Subscriber {
    /// By [`TopicKind`].
    pub(super) names: [BTreeSet<Name>; 3],
}

impl Subscriber {
    pub(super) fn is_empty(&self) -> bool {
        self.names.iter().all(BTreeSet::is_empty)
    }

    /// Bytes that its names take of a message, as good as.
    pub(super) fn bytes_len(&self) -> usize {
        let names = self.names.iter().flatten();
        names.map(|name| NAME_BYTES + name.len()).sum()
    }

    /// The number in a confirmation: shard channels are counted apart.
    pub(super) fn count(&self, kind: TopicKind) -> usize {
        let len = |kind: TopicKind| self.names[kind as usize].len();
        match kind {
            TopicKind::ShardChannel => len(kind),
            _ => len(TopicKind::Channel) + len(TopicKind::Pattern),
        }
    }
}

/// A SUBSCRIBE whose topics are not all confirmed.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) slot: u32,
    pub(super) generation: u32,
    /// Of its reply.
    pub(super) ticket: (u32, u32),
    pub(super) kind: TopicKind,
    /// As they were given.
    pub(super) names: Vec<Name>,
    pub(super) missing: usize,
}

/// All SUBSCRIBEs that wait, oldest first.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    pub(super) waiting: HashMap<u64, Waiter>,
    deadlines: VecDeque<(u64, u64)>,
    made: u64,
}

impl Waiters {
    pub(super) fn add(&mut self, waiter: Waiter, until_us: u64) -> u64 {
        self.made += 1;
        self.waiting.insert(self.made, waiter);
        self.deadlines.push_back((until_us, self.made));
        self.made
    }

    /// The next one whose time is over.
    pub(super) fn take_late(&mut self, now_us: u64) -> Option<u64> {
        while let Some((until_us, number)) = self.deadlines.front().copied() {
            let waits = self.waiting.contains_key(&number);
            if waits && until_us > now_us {
                return None;
            }
            self.deadlines.pop_front();
            if waits {
                return Some(number);
            }
        }
        None
    }

    pub(super) fn deadline_us(&self) -> Option<u64> {
        self.deadlines.front().map(|(until_us, _)| *until_us)
    }
}
