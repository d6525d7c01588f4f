//! Is the history of one register that of a register? (Wing and Gong's search, with Lowe's memory of
//! configurations that led nowhere.)
//!
//! Invariant: a verdict of `Linear` names an order of the operations that respects real time and in
//! which each read returns what was written last. An operation whose outcome nobody knows may have
//! happened at any time after it began, or never.

use std::collections::{BTreeSet, HashMap, HashSet};

/// What an operation did, as its client saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// Wrote this value; values are unique within a register.
    Write(u64),
    /// Read this value; 0: nothing was there.
    Read(u64),
}

/// One operation on the register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operation {
    /// What it did.
    pub act: Act,
    /// When it was sent.
    pub from_us: u64,
    /// When its answer came; `None`: nobody knows whether it happened.
    pub to_us: Option<u64>,
}

/// What the search found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// There is such an order.
    Linear,
    /// There is none; the longest that could be found ends before one of these operations.
    Broken(Vec<Operation>),
    /// The search was given up: the history is too concurrent for it.
    TooHard,
}

/// Configurations looked at, beyond one for each operation, before the search is given up; each is
/// some hundred bytes.
const CONFIGURATIONS_MAX: usize = 2_000_000;

/// Which operations have been put in order so far: all before the first, and these. Clients are few,
/// so these are few, however long the history is.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
struct Chosen {
    before: usize,
    beyond: BTreeSet<usize>,
}

impl Chosen {
    fn has(&self, index: usize) -> bool {
        index < self.before || self.beyond.contains(&index)
    }

    fn with(&self, index: usize) -> Self {
        let mut chosen = self.clone();
        chosen.beyond.insert(index);
        while chosen.beyond.remove(&chosen.before) {
            chosen.before += 1;
        }
        chosen
    }
}

/// A point of the search: what has been chosen, the value after it, and what may come next.
struct Point {
    chosen: Chosen,
    value: u64,
    next: Vec<usize>,
}

impl Point {
    fn new(chosen: Chosen, value: u64, operations: &[Operation]) -> Self {
        let next = candidates(&chosen, operations);
        Self {
            chosen,
            value,
            next,
        }
    }
}

/// Operations that may come next: begun before the first answer that is still missing. They are
/// sorted by their begin, so none after the first that began later has an earlier answer.
fn candidates(chosen: &Chosen, operations: &[Operation]) -> Vec<usize> {
    let mut first_answer = u64::MAX;
    let mut open = Vec::new();
    for (index, operation) in operations.iter().enumerate().skip(chosen.before) {
        if operation.from_us > first_answer {
            break;
        }
        if !chosen.has(index) {
            first_answer = first_answer.min(answered(operation));
            open.push(index);
        }
    }
    open.retain(|index| operations[*index].from_us <= first_answer);
    open
}

fn answered(operation: &Operation) -> u64 {
    operation.to_us.unwrap_or(u64::MAX)
}

/// The value after the operation, if it can come now.
fn after(value: u64, operation: &Operation) -> Option<u64> {
    match operation.act {
        Act::Write(written) => Some(written),
        Act::Read(read) => (read == value).then_some(value),
    }
}

/// What has to be put in order. A read that nobody heard says nothing. A write of unknown outcome
/// whose value nobody read may as well not have happened; one whose value was read happened before
/// that answer, which makes it one with an end like any other.
fn decided(history: &[Operation]) -> Vec<Operation> {
    let mut read_by: HashMap<u64, u64> = HashMap::new();
    for operation in history {
        if let (Act::Read(value), Some(to)) = (operation.act, operation.to_us) {
            let first = read_by.entry(value).or_insert(to);
            *first = to.min(*first);
        }
    }
    let with_end = history.iter().filter_map(|operation| {
        let to_us = match (operation.act, operation.to_us) {
            (_, Some(to)) => Some(to),
            (Act::Write(value), None) => read_by.get(&value).copied(),
            (Act::Read(_), None) => None,
        };
        to_us.map(|_| Operation {
            to_us,
            ..*operation
        })
    });
    let mut operations: Vec<Operation> = with_end.collect();
    operations.sort_by_key(|o| o.from_us);
    operations
}

/// Checks one register that begins empty.
#[must_use]
pub fn check(history: &[Operation]) -> Verdict {
    let operations = decided(history);
    let mut seen: HashSet<(Chosen, u64)> = HashSet::new();
    // For the report: the front of the longest order.
    let mut longest: (usize, Vec<usize>) = (0, Vec::new());
    // Depth first without recursion.
    let mut path = vec![Point::new(Chosen::default(), 0, &operations)];
    while let Some(point) = path.last_mut() {
        if point.chosen.before == operations.len() {
            return Verdict::Linear;
        }
        if seen.len() > operations.len() + CONFIGURATIONS_MAX {
            return Verdict::TooHard;
        }
        let Some(index) = point.next.pop() else {
            path.pop();
            continue;
        };
        let Some(value) = after(point.value, &operations[index]) else {
            continue;
        };
        let chosen = point.chosen.with(index);
        if !seen.insert((chosen.clone(), value)) {
            continue;
        }
        let point = Point::new(chosen, value, &operations);
        if path.len() > longest.0 {
            longest = (path.len(), point.next.clone());
        }
        path.push(point);
    }
    let front = longest.1.iter().map(|i| operations[*i]).collect();
    Verdict::Broken(front)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(act: Act, from_us: u64, to_us: u64) -> Operation {
        Operation {
            act,
            from_us,
            to_us: Some(to_us),
        }
    }

    fn lost(act: Act, from_us: u64) -> Operation {
        Operation {
            act,
            from_us,
            to_us: None,
        }
    }

    fn is_broken(history: &[Operation]) -> bool {
        matches!(check(history), Verdict::Broken(_))
    }

    #[test]
    fn a_read_returns_what_was_written_last() {
        use Act::{Read, Write};
        let good = [
            op(Read(0), 0, 1),
            op(Write(1), 2, 3),
            op(Read(1), 4, 5),
            op(Write(2), 6, 7),
            op(Read(2), 8, 9),
        ];
        assert_eq!(check(&good), Verdict::Linear);
        assert!(is_broken(&[op(Write(1), 0, 1), op(Read(0), 2, 3)]));
        assert!(is_broken(&[
            op(Write(1), 0, 1),
            op(Write(2), 2, 3),
            op(Read(1), 4, 5)
        ]));
    }

    #[test]
    fn what_overlaps_may_come_in_any_order_but_only_in_one() {
        use Act::{Read, Write};
        let two = [op(Write(1), 0, 10), op(Write(2), 0, 10)];
        for last in [1, 2] {
            let history = [two[0], two[1], op(Read(last), 11, 12)];
            assert_eq!(check(&history), Verdict::Linear);
        }
        let back = [two[0], two[1], op(Read(1), 11, 12), op(Read(2), 13, 14)];
        assert!(is_broken(&back));
    }

    #[test]
    fn a_write_of_unknown_outcome_happens_late_or_never_but_not_twice() {
        use Act::{Read, Write};
        let late = [
            op(Write(1), 0, 1),
            lost(Write(2), 2),
            op(Read(1), 3, 4),
            op(Read(2), 5, 6),
        ];
        assert_eq!(check(&late), Verdict::Linear);
        assert_eq!(check(&late[..3]), Verdict::Linear);
        let again = [&late[..], &[op(Write(3), 7, 8), op(Read(2), 9, 10)]].concat();
        assert!(is_broken(&again));
        assert!(is_broken(&[op(Read(2), 0, 1), lost(Write(2), 2)]));
    }

    /// An hour of one register: as many operations as a run has, with an unknown write at each of its
    /// faults, half of which happened.
    #[test]
    fn an_hour_is_decided_while_one_waits() {
        use Act::{Read, Write};
        let mut history = Vec::new();
        for n in 1..=200_000 {
            let at = n * 20;
            history.push(op(Write(2 * n), at, at + 12));
            history.push(op(Read(2 * n), at + 6, at + 14));
            if n % 400 == 0 {
                history.push(lost(Write(2 * n + 1), at + 3));
            }
            if n % 800 == 0 {
                history.push(op(Read(2 * n + 1), at + 15, at + 17));
            }
        }
        assert_eq!(check(&history), Verdict::Linear);
        history.push(op(Read(400), 4_000_100, 4_000_101));
        assert!(is_broken(&history));
    }

    #[test]
    fn an_acknowledged_write_that_vanished_is_found_among_many() {
        use Act::{Read, Write};
        let mut history = Vec::new();
        for n in 1..300 {
            let at = n * 10;
            history.push(op(Write(n), at, at + 12));
            history.push(op(Read(n), at + 6, at + 14));
        }
        assert_eq!(check(&history), Verdict::Linear);
        history.push(op(Read(297), 3_100, 3_101));
        assert!(is_broken(&history));
    }
}
