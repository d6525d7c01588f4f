//! Is the history of one register that of a register? (Wing and Gong's search, with Lowe's memory of
//! configurations that led nowhere.)
//!
//! Invariant: a verdict of `Linear` names an order of the operations that respects real time and in
//! which each read returns what was written last. An operation whose outcome nobody knows may have
//! happened at any time after it began, or never.

use std::collections::HashSet;

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

/// Configurations looked at before the search is given up; each is some hundred bytes.
const CONFIGURATIONS_MAX: usize = 2_000_000;

/// Which operations have been put in order so far.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Chosen(Vec<u64>);

impl Chosen {
    fn none(operations: usize) -> Self {
        Self(vec![0; operations.div_ceil(64)])
    }

    fn has(&self, index: usize) -> bool {
        self.0[index / 64] & (1 << (index % 64)) != 0
    }

    fn flip(&mut self, index: usize) {
        self.0[index / 64] ^= 1 << (index % 64);
    }
}

struct Search<'a> {
    operations: &'a [Operation],
    chosen: Chosen,
    value: u64,
    /// Operations with a known outcome that are not chosen yet.
    left: usize,
    seen: HashSet<(Chosen, u64)>,
    /// For the report: the front of the longest order.
    longest: (usize, Vec<Operation>),
}

impl Search<'_> {
    /// Operations that may come next: begun before the first answer that is still missing. Sorted by
    /// their begin, so the scan ends early.
    fn candidates(&self) -> Vec<usize> {
        let open = || {
            let indexed = self.operations.iter().enumerate();
            indexed.filter(|(index, _)| !self.chosen.has(*index))
        };
        let first_answer = open()
            .filter_map(|(_, o)| o.to_us)
            .min()
            .unwrap_or(u64::MAX);
        open()
            .take_while(|(_, o)| o.from_us <= first_answer)
            .map(|(index, _)| index)
            .collect()
    }

    /// The value after the operation, if it can come now.
    fn after(&self, operation: &Operation) -> Option<u64> {
        match operation.act {
            Act::Write(value) => Some(value),
            Act::Read(value) => (value == self.value).then_some(value),
        }
    }
}

/// Checks one register that begins empty.
#[must_use]
pub fn check(history: &[Operation]) -> Verdict {
    // A read that nobody heard says nothing.
    let mut operations: Vec<Operation> = history
        .iter()
        .filter(|o| o.to_us.is_some() || matches!(o.act, Act::Write(_)))
        .copied()
        .collect();
    operations.sort_by_key(|o| o.from_us);
    let mut search = Search {
        chosen: Chosen::none(operations.len()),
        value: 0,
        left: operations.iter().filter(|o| o.to_us.is_some()).count(),
        seen: HashSet::new(),
        longest: (0, Vec::new()),
        operations: &operations,
    };
    // Depth first without recursion: what was chosen, the value before, and what else could be.
    let mut path: Vec<(usize, u64, Vec<usize>)> = Vec::new();
    let mut next = search.candidates();
    loop {
        if search.left == 0 {
            return Verdict::Linear;
        }
        if search.seen.len() > CONFIGURATIONS_MAX {
            return Verdict::TooHard;
        }
        let choice = loop {
            let Some(index) = next.pop() else { break None };
            let Some(value) = search.after(&operations[index]) else {
                continue;
            };
            search.chosen.flip(index);
            if search.seen.insert((search.chosen.clone(), value)) {
                break Some((index, value));
            }
            search.chosen.flip(index);
        };
        if let Some((index, value)) = choice {
            path.push((index, search.value, std::mem::take(&mut next)));
            search.value = value;
            search.left -= usize::from(operations[index].to_us.is_some());
            next = search.candidates();
            if path.len() > search.longest.0 {
                let front = next.iter().map(|i| operations[*i]).collect();
                search.longest = (path.len(), front);
            }
        } else {
            let Some((index, before, rest)) = path.pop() else {
                return Verdict::Broken(search.longest.1);
            };
            search.chosen.flip(index);
            search.left += usize::from(operations[index].to_us.is_some());
            search.value = before;
            next = rest;
        }
    }
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
