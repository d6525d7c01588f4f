//! Leases: times until which keys live.
//!
//! Invariant: a lease that has ended never lives again.

use std::collections::BTreeMap;

use super::LeaseId;
use crate::sched::Micros;

#[derive(Debug)]
struct Lease {
    ttl: Micros,
    until: Micros,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Leases {
    next: LeaseId,
    live: BTreeMap<LeaseId, Lease>,
}

impl Leases {
    pub(super) fn grant(&mut self, now: Micros, ttl: Micros) -> LeaseId {
        self.next += 1;
        let until = now + ttl;
        self.live.insert(self.next, Lease { ttl, until });
        self.next
    }

    /// False when it has ended.
    pub(super) fn keep(&mut self, now: Micros, lease: LeaseId) -> bool {
        let found = self.live.get_mut(&lease);
        found.map(|l| l.until = now + l.ttl).is_some()
    }

    pub(super) fn lives(&self, lease: LeaseId) -> bool {
        self.live.contains_key(&lease)
    }

    /// Every lease has all its time again: a new leader of the store does not know how much was left.
    pub(super) fn extend(&mut self, from: Micros) {
        for lease in self.live.values_mut() {
            lease.until = from + lease.ttl;
        }
    }

    /// Takes out those that have ended.
    pub(super) fn expired(&mut self, now: Micros) -> Vec<LeaseId> {
        let over = |l: &Lease| l.until <= now;
        let ended: Vec<LeaseId> = (self.live.iter())
            .filter(|(_, l)| over(l))
            .map(|(id, _)| *id)
            .collect();
        self.live.retain(|_, l| !over(l));
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_at_its_time_unless_it_is_kept_or_all_are_extended() {
        let mut leases = Leases::default();
        let (a, b) = (leases.grant(0, 10), leases.grant(0, 10));
        assert!(leases.keep(5, a));
        assert_eq!(leases.expired(10), [b]);
        assert!(!leases.keep(11, b) && leases.lives(a));
        leases.extend(14);
        assert!(leases.expired(23).is_empty());
        assert_eq!(leases.expired(24), [a]);
    }
}
