//! Who of this process listens to what, counted over its workers: a node sees one connection where
//! there are many clients, and PUBLISH must answer with the number of clients.
//!
//! Invariant: a topic is counted here exactly as long as the worker's connection has it confirmed,
//! with the clients that it has then. Nothing is locked as long as nobody subscribes.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::pubsub_topics::{Name, TopicKind};

/// Clients and connections of this process that listen to one topic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    clients: i64,
    lines: i64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Audience {
    /// Topics that are counted: a look at it tells most commands that they need no lock.
    topics: AtomicU64,
    serial: AtomicU64,
    /// Clients of the process that monitor.
    monitors: AtomicU64,
    counts: Mutex<[HashMap<Name, Count>; 3]>,
    /// Ids that clients of the process redirect their invalidations to, and how many do.
    targets: Mutex<BTreeMap<u64, u32>>,
    /// Clients of another process may come.
    expects: AtomicBool,
}

impl Audience {
    /// A number that no other worker of the process gets.
    pub(super) fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn monitor_began(&self) {
        self.monitors.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn monitor_ended(&self) {
        self.monitors.fetch_sub(1, Ordering::Relaxed);
    }

    /// True if a client of any worker monitors.
    pub(super) fn is_monitored(&self) -> bool {
        self.monitors.load(Ordering::Relaxed) > 0
    }

    /// A client redirects its invalidations to another one from now on.
    pub(super) fn redirect_began(&self, target: u64) {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        *targets.entry(target).or_default() += 1;
    }

    pub(super) fn redirect_ended(&self, target: u64) {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = targets.get_mut(&target) {
            *count -= 1;
            if *count == 0 {
                targets.remove(&target);
            }
        }
    }

    /// True if a client of the process redirects its invalidations to this one.
    pub(super) fn is_target(&self, id: u64) -> bool {
        let targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        targets.contains_key(&id)
    }

    /// Whether clients of another process may come: one that is not here may be on its way.
    pub(crate) fn expect_clients(&self, expects: bool) {
        self.expects.store(expects, Ordering::Relaxed);
    }

    pub(super) fn expects_clients(&self) -> bool {
        self.expects.load(Ordering::Relaxed)
    }

    /// So many clients and connections more, or fewer.
    pub(super) fn change(&self, kind: TopicKind, name: &Name, clients: i64, lines: i64) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let of_kind = &mut counts[kind as usize];
        let count = of_kind.entry(Arc::clone(name)).or_default();
        count.clients += clients;
        count.lines += lines;
        if *count == Count::default() {
            of_kind.remove(name);
        }
        let topics: usize = counts.iter().map(HashMap::len).sum();
        self.topics.store(topics as u64, Ordering::Relaxed);
    }

    /// True if nobody of the process listens to anything.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.topics.load(Ordering::Relaxed) == 0
    }

    /// How many clients got a message, of which a node says that `found` connections and patterns
    /// of connections did.
    pub(super) fn receivers(&self, sharded: bool, channel: &[u8], found: i64) -> i64 {
        if found <= 0 || self.is_empty() {
            return found;
        }
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let more = |count: &Count| count.clients - count.lines;
        let kind = TopicKind::of_messages(sharded);
        let mut all = found + counts[kind as usize].get(channel).map_or(0, more);
        if !sharded {
            let patterns = counts[TopicKind::Pattern as usize].iter();
            let matching = patterns.filter(|(name, _)| slotmesh_acl::matches(name, channel));
            all += matching.map(|(_, count)| more(count)).sum::<i64>();
        }
        all.max(0)
    }

    /// How many clients listen to a channel, if a node knows `found` connections.
    pub(super) fn subscribers(&self, kind: TopicKind, channel: &[u8], found: i64) -> i64 {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let more = counts[kind as usize].get(channel);
        (found + more.map_or(0, |count| count.clients - count.lines)).max(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_counts_clients_and_not_connections() {
        let audience = Audience::default();
        assert_eq!(
            audience.receivers(false, b"news", 2),
            2,
            "others' connections"
        );
        let (news, all): (Name, Name) = (b"news"[..].into(), b"n*"[..].into());
        audience.change(TopicKind::Channel, &news, 10, 1);
        audience.change(TopicKind::Pattern, &all, 3, 1);
        audience.change(TopicKind::Channel, &news, 5, 1); // another worker
        // Two connections with the channel, one with the pattern, and one of another proxy.
        assert_eq!(audience.receivers(false, b"news", 4), 10 + 5 + 3 + 1);
        assert_eq!(audience.receivers(true, b"news", 1), 1);
        assert_eq!(audience.receivers(false, b"other", 0), 0);
        assert_eq!(audience.subscribers(TopicKind::Channel, b"news", 3), 16);
        audience.change(TopicKind::Channel, &news, -15, -2);
        audience.change(TopicKind::Pattern, &all, -3, -1);
        assert!(audience.is_empty());
    }
}
