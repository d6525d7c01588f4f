//! The arithmetic of sorted sets.
//!
//! Invariant: operands are visited in an engine's order; see the module above.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use super::super::score::{Aggregate, number};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Union,
    Inter,
    Diff,
}

/// The members of one key with their scores, and the weight of the key.
#[derive(Debug)]
pub(super) struct Operand<'a> {
    pub(super) members: Vec<(&'a [u8], f64)>,
    pub(super) weight: f64,
}

type Members<'a> = Vec<(&'a [u8], f64)>;

/// The result, in the order of a sorted set.
pub(super) fn combine<'a>(
    operation: Operation,
    aggregate: Aggregate,
    operands: &mut [Operand<'a>],
) -> Members<'a> {
    if operation != Operation::Diff {
        operands.sort_by_key(|operand| operand.members.len()); // stable
    }
    let mut members = match operation {
        Operation::Union => union(aggregate, operands),
        Operation::Inter => inter(aggregate, operands),
        Operation::Diff => diff(operands),
    };
    members.sort_unstable_by(|(a, a_score), (b, b_score)| {
        let scores = a_score.partial_cmp(b_score).unwrap_or(Ordering::Equal);
        scores.then_with(|| a.cmp(b))
    });
    members
}

fn union<'a>(aggregate: Aggregate, operands: &[Operand<'a>]) -> Members<'a> {
    let mut sums: HashMap<&[u8], f64> = HashMap::new();
    for operand in operands {
        for (member, score) in &operand.members {
            let value = number(operand.weight * score);
            sums.entry(member)
                .and_modify(|sum| *sum = aggregate.apply(*sum, value))
                .or_insert(value);
        }
    }
    sums.into_iter().collect()
}

fn inter<'a>(aggregate: Aggregate, operands: &[Operand<'a>]) -> Members<'a> {
    let Some((first, others)) = operands.split_first() else {
        return Vec::new();
    };
    // With the number of operands that had it, without a gap.
    let begin = |(member, score): &(&'a [u8], f64)| (*member, (number(first.weight * score), 0));
    let mut sums: HashMap<&[u8], (f64, usize)> = first.members.iter().map(begin).collect();
    for (at, operand) in others.iter().enumerate() {
        for (member, score) in &operand.members {
            if let Some((sum, count)) = sums.get_mut(member)
                && *count == at
            {
                // Not made a number first: engines do not either, and MIN and MAX ignore NaN.
                *sum = aggregate.apply(*sum, score * operand.weight);
                *count += 1;
            }
        }
    }
    (sums.into_iter())
        .filter(|(_, (_, count))| *count == others.len())
        .map(|(member, (sum, _))| (member, sum))
        .collect()
}

fn diff<'a>(operands: &[Operand<'a>]) -> Members<'a> {
    let Some((first, others)) = operands.split_first() else {
        return Vec::new();
    };
    let taken: HashSet<&[u8]> = (others.iter())
        .flat_map(|operand| operand.members.iter().map(|(member, _)| *member))
        .collect();
    (first.members.iter().copied())
        .filter(|(member, _)| !taken.contains(member))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operand<'a>(members: &[(&'a str, f64)], weight: f64) -> Operand<'a> {
        Operand {
            members: members.iter().map(|(m, s)| (m.as_bytes(), *s)).collect(),
            weight,
        }
    }

    #[test]
    fn sums_begin_with_the_smallest_operand() {
        // 0.1 + (0.2 + 0.3) and (0.1 + 0.2) + 0.3 differ in the last bit.
        let make = || {
            [
                operand(&[("m", 0.1), ("x", 0.0), ("y", 0.0)], 1.0),
                operand(&[("m", 0.2)], 1.0),
                operand(&[("m", 0.3), ("x", 0.0)], 1.0),
            ]
        };
        let result = combine(Operation::Inter, Aggregate::Sum, &mut make());
        assert_eq!(result, [(b"m".as_slice(), (0.2 + 0.3) + 0.1)]);
        let result = combine(Operation::Union, Aggregate::Sum, &mut make());
        assert_eq!(result[2].1, (0.2 + 0.3) + 0.1);
    }

    #[test]
    fn equal_scores_are_ordered_by_bytes() {
        let mut operands = [
            operand(&[("b", 0.0), ("a", -0.0)], 1.0),
            operand(&[("ab", 1.0), ("aa", 1.0), ("a\u{ff}", 1.0)], 0.0),
        ];
        let result = combine(Operation::Union, Aggregate::Sum, &mut operands);
        let names: Vec<&[u8]> = result.iter().map(|(m, _)| *m).collect();
        assert_eq!(
            names,
            [b"a".as_slice(), b"aa", b"ab", "a\u{ff}".as_bytes(), b"b"]
        );
    }

    #[test]
    fn a_difference_keeps_the_first_scores() {
        let mut operands = [
            operand(&[("a", 1.5), ("b", 2.5)], 1.0),
            operand(&[("b", 9.0)], 1.0),
            operand(&[], 1.0),
        ];
        let result = combine(Operation::Diff, Aggregate::Sum, &mut operands);
        assert_eq!(result, [(b"a".as_slice(), 1.5)]);
    }
}
