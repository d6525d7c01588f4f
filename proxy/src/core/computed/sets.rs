//! SDIFF, SINTER, SUNION, their STORE forms and SINTERCARD.
//!
//! Invariant: each shard combines its own keys first, so one request a shard fetches everything, and
//! a key of another type is refused by its node, whatever the other keys hold.

use std::collections::{HashMap, HashSet};

use slotmesh_resp::{parse_i64, write};

use super::super::job::{Answers, Job, Round, Step};
use super::super::retry::Effect;
use super::store::Store;
use super::{NEGATIVE_LIMIT, SYNTAX, is, read};
use crate::routing::ShardNo;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Union,
    Inter,
    Diff,
}

#[derive(Debug)]
enum Output {
    Members,
    /// 0: no limit.
    Cardinality {
        limit: u64,
    },
    Store(Vec<u8>),
}

#[derive(Debug)]
enum Phase {
    Begin,
    Fetch,
    Store(Store),
}

#[derive(Debug)]
pub(super) struct Sets {
    operation: Operation,
    keys: Vec<Vec<u8>>,
    output: Output,
    phase: Phase,
}

impl Sets {
    pub(super) fn begin(name: &str, mut words: Vec<Vec<u8>>) -> Result<Self, String> {
        let operation = match name {
            "sunion" | "sunionstore" => Operation::Union,
            "sdiff" | "sdiffstore" => Operation::Diff,
            _ => Operation::Inter,
        };
        let (keys, output) = if name == "sintercard" {
            cardinality_of(words)?
        } else if name.ends_with("store") {
            let keys = words.split_off(2);
            (keys, Output::Store(words.swap_remove(1)))
        } else {
            (words.split_off(1), Output::Members)
        };
        Ok(Self {
            operation,
            keys,
            output,
            phase: Phase::Begin,
        })
    }

    /// One request for each shard that has keys.
    fn fetch(&self, round: &mut Round<'_>) {
        let mut groups: Vec<(ShardNo, Vec<&[u8]>)> = Vec::new();
        let mut group_of: HashMap<ShardNo, usize> = HashMap::new();
        for key in &self.keys {
            let shard = round.shard_of(key);
            let at = *group_of.entry(shard).or_insert_with(|| {
                let verb: &[u8] = match self.operation {
                    Operation::Inter => b"SINTER",
                    // What is taken away is the union of all but the first key.
                    Operation::Diff if groups.is_empty() => b"SDIFF",
                    _ => b"SUNION",
                };
                groups.push((shard, vec![verb]));
                groups.len() - 1
            });
            groups[at].1.push(key);
        }
        for (shard, command) in groups {
            round.ask(shard, Effect::Read, &command);
        }
    }

    fn combine(&mut self, answers: &Answers, round: &mut Round<'_>) -> Step {
        if let Some(error) = read::first_error(answers) {
            return round.pass(error);
        }
        let Some(mut operands) = (answers.iter())
            .map(|answer| read::bulks(answer))
            .collect::<Option<Vec<_>>>()
        else {
            return round.fail(read::UNREADABLE);
        };
        let members = match self.operation {
            Operation::Union => union(&operands),
            Operation::Diff => diff(&operands),
            Operation::Inter => {
                operands.sort_by_key(Vec::len);
                inter(&operands)
            }
        };
        match &mut self.output {
            Output::Members => round.done(|out, protocol| {
                write::write_set_header(out, protocol, members.len());
                (members.iter()).for_each(|member| write::write_bulk(out, member));
            }),
            Output::Cardinality { limit } => {
                let all = members.len() as i64;
                let limit = i64::try_from(*limit).unwrap_or(i64::MAX);
                let count = if limit == 0 { all } else { all.min(limit) };
                round.done(|out, _| write::write_int(out, count))
            }
            Output::Store(destination) => {
                let destination = std::mem::take(destination);
                let passes = [(&[][..], &members[..])];
                let store = Store::begin(destination, b"SADD", &passes, members.len(), round);
                self.phase = Phase::Store(store);
                Step::Asked
            }
        }
    }
}

impl Job for Sets {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        match &mut self.phase {
            Phase::Begin => {
                self.fetch(round);
                self.phase = Phase::Fetch;
                Step::Asked
            }
            Phase::Fetch => self.combine(&answers, round),
            Phase::Store(store) => store.next(&answers, round),
        }
    }
}

/// `SINTERCARD numkeys key … [LIMIT limit]`.
fn cardinality_of(mut words: Vec<Vec<u8>>) -> Result<(Vec<Vec<u8>>, Output), String> {
    let count = parse_i64(&words[1])
        .and_then(|count| usize::try_from(count).ok())
        .filter(|count| *count > 0)
        .ok_or("ERR numkeys should be greater than 0")?;
    if count > words.len() - 2 {
        return Err("ERR Number of keys can't be greater than number of args".to_owned());
    }
    let options = words.split_off(2 + count);
    let mut limit = 0;
    for option in options.chunks(2) {
        let [name, value] = option else {
            return Err(SYNTAX.to_owned());
        };
        if !is(name, "limit") {
            return Err(SYNTAX.to_owned());
        }
        limit = parse_i64(value)
            .and_then(|limit| u64::try_from(limit).ok())
            .ok_or(NEGATIVE_LIMIT)?;
    }
    Ok((words.split_off(2), Output::Cardinality { limit }))
}

fn union<'a>(operands: &[Vec<&'a [u8]>]) -> Vec<&'a [u8]> {
    let mut seen = HashSet::new();
    let all = operands.iter().flatten().copied();
    all.filter(|member| seen.insert(*member)).collect()
}

fn diff<'a>(operands: &[Vec<&'a [u8]>]) -> Vec<&'a [u8]> {
    let Some((first, others)) = operands.split_first() else {
        return Vec::new();
    };
    let mut left: HashSet<&[u8]> = first.iter().copied().collect();
    for member in others.iter().flatten() {
        left.remove(member);
    }
    (first.iter().copied())
        .filter(|member| left.contains(member))
        .collect()
}

/// The members of all operands; the first is the smallest.
fn inter<'a>(operands: &[Vec<&'a [u8]>]) -> Vec<&'a [u8]> {
    let Some((first, others)) = operands.split_first() else {
        return Vec::new();
    };
    // In how many operands each was found, without a gap.
    let mut found: HashMap<&[u8], usize> = first.iter().map(|member| (*member, 0)).collect();
    for (at, operand) in others.iter().enumerate() {
        for member in operand {
            if let Some(count) = found.get_mut(member)
                && *count == at
            {
                *count += 1;
            }
        }
    }
    (first.iter().copied())
        .filter(|member| found[member] == others.len())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operands<'a>(texts: &[&'a str]) -> Vec<Vec<&'a [u8]>> {
        let members = |text: &&'a str| text.split_ascii_whitespace().map(str::as_bytes).collect();
        texts.iter().map(members).collect()
    }

    #[test]
    fn operations_keep_what_they_should() {
        let three = operands(&["a b c", "b c d", "c b x"]);
        assert_eq!(inter(&three), operands(&["b c"])[0]);
        assert_eq!(union(&three), operands(&["a b c d x"])[0]);
        assert_eq!(diff(&three), operands(&["a"])[0]);
        assert!(inter(&operands(&["", "a"])).is_empty());
        assert_eq!(diff(&operands(&["a b", ""])), operands(&["a b"])[0]);
    }
}
