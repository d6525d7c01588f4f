//! Virtual time: everything that will happen, in one queue.
//!
//! Invariant: two events of the same instant happen in the order in which they were scheduled, so
//! that a seed always gives the same run.

use std::{cmp::Reverse, collections::BinaryHeap};

/// Microseconds since the run began.
pub type Micros = u64;
/// A millisecond.
pub const MS: Micros = 1_000;
/// A second.
pub const SEC: Micros = 1_000_000;

#[derive(Debug)]
struct Due<E> {
    at: Micros,
    number: u64,
    event: E,
}

impl<E> PartialEq for Due<E> {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl<E> Eq for Due<E> {}

impl<E> PartialOrd for Due<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Due<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Queue<E> {
    due: BinaryHeap<Reverse<Due<E>>>,
    next: u64,
    now: Micros,
}

impl<E> Default for Queue<E> {
    fn default() -> Self {
        Self {
            due: BinaryHeap::new(),
            next: 0,
            now: 0,
        }
    }
}

impl<E> Queue<E> {
    /// The time.
    #[must_use]
    pub fn now(&self) -> Micros {
        self.now
    }

    /// Lets `event` happen at `at`, or now if that is past.
    pub fn at(&mut self, at: Micros, event: E) {
        self.next += 1;
        self.due.push(Reverse(Due {
            at: at.max(self.now),
            number: self.next,
            event,
        }));
    }

    /// The next event; the time becomes its time.
    pub fn pop(&mut self) -> Option<E> {
        let Reverse(due) = self.due.pop()?;
        self.now = due.at;
        Some(due.event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_then_by_order_of_scheduling() {
        let mut queue = Queue::default();
        for (at, event) in [(2, 'c'), (1, 'a'), (1, 'b')] {
            queue.at(at, event);
        }
        let order: String = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!((order.as_str(), queue.now()), ("abc", 2));
    }
}
