//! PFCOUNT and PFMERGE over several shards.
//!
//! Invariants: counting writes nothing. Merging never loses what is added to the destination
//! meanwhile: its own node merges, in one block, values that other shards' keys had; they stand under
//! names that exist only inside that block.

use slotmesh_resp::write;

use super::super::job::{Answers, Job, Round, Step};
use super::super::retry::Effect;
use super::registers::{Invalid, Registers};
use super::{hidden_name, read, store};

#[derive(Debug)]
pub(super) struct Count {
    keys: Vec<Vec<u8>>,
}

impl Count {
    pub(super) fn begin(mut words: Vec<Vec<u8>>) -> Self {
        Self {
            keys: words.split_off(1),
        }
    }
}

impl Job for Count {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if answers.is_empty() {
            ask_values(&self.keys, round);
            return Step::Asked;
        }
        match merged(&answers) {
            Ok(registers) => round.done(|out, _| write::write_int(out, registers.count())),
            Err(refusal) => refusal.end(round),
        }
    }
}

#[derive(Debug)]
enum Phase {
    Begin,
    Fetch,
    Store,
    Reason { aborted: Vec<u8> },
}

#[derive(Debug)]
pub(super) struct Merge {
    /// The destination first.
    keys: Vec<Vec<u8>>,
    phase: Phase,
}

impl Merge {
    pub(super) fn begin(mut words: Vec<Vec<u8>>) -> Self {
        Self {
            keys: words.split_off(1),
            phase: Phase::Begin,
        }
    }

    fn store(&mut self, answers: &Answers, round: &mut Round<'_>) -> Step {
        if let Err(refusal) = merged(answers) {
            return refusal.end(round);
        }
        let destination = &self.keys[0];
        let home = round.shard_of(destination);
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut values: Vec<&[u8]> = Vec::new();
        let mut near: Vec<&[u8]> = Vec::new();
        for (key, answer) in self.keys.iter().zip(answers).skip(1) {
            if round.shard_of(key) == home {
                near.push(key);
            } else if let Some(Some(value)) = read::bulk(answer) {
                names.push(hidden_name(round.now_unix_us, names.len()));
                values.push(value);
            }
        }
        let set = |(name, value)| vec![b"SET".as_slice(), name, value];
        let names: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
        let mut block: Vec<Vec<&[u8]>> = names.iter().copied().zip(values).map(set).collect();
        let merge: [&[u8]; 2] = [b"PFMERGE", destination];
        block.push([&merge[..], &names[..], &near[..]].concat());
        if !names.is_empty() {
            block.push([&[b"DEL".as_slice()], &names[..]].concat());
        }
        round.ask_block(home, round.db, &block);
        self.phase = Phase::Store;
        Step::Asked
    }
}

impl Job for Merge {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        let answer = answers.first().map(Vec::as_slice).unwrap_or_default();
        match &self.phase {
            Phase::Begin => {
                ask_values(&self.keys, round);
                self.phase = Phase::Fetch;
                Step::Asked
            }
            Phase::Fetch => self.store(&answers, round),
            Phase::Store if answer.starts_with(b"-EXECABORT") => {
                store::ask_reason(&self.keys[0], round);
                self.phase = Phase::Reason {
                    aborted: answer.to_vec(),
                };
                Step::Asked
            }
            Phase::Store => match store::block_error(answer) {
                Some(error) => round.pass(error),
                None => round.done(|out, _| write::write_simple(out, "OK")),
            },
            Phase::Reason { aborted } => round.pass(store::reason(answer).unwrap_or(aborted)),
        }
    }
}

fn ask_values(keys: &[Vec<u8>], round: &mut Round<'_>) {
    for key in keys {
        round.ask_owner(key, Effect::Read, &[b"GET", key]);
    }
}

/// Why there is nothing to merge.
#[derive(Debug)]
enum Refusal<'a> {
    Node(&'a [u8]),
    Value(Invalid),
    Unreadable,
}

impl Refusal<'_> {
    fn end(self, round: &mut Round<'_>) -> Step {
        match self {
            Self::Node(error) => round.pass(error),
            Self::Value(invalid) => round.fail(invalid.to_string().as_bytes()),
            Self::Unreadable => round.fail(read::UNREADABLE),
        }
    }
}

/// All values as one. A missing one is empty; the first that is none decides the error.
fn merged(answers: &Answers) -> Result<Registers, Refusal<'_>> {
    let mut registers = Registers::default();
    for answer in answers {
        if read::is_error(answer) {
            return Err(Refusal::Node(answer));
        }
        let value = read::bulk(answer).ok_or(Refusal::Unreadable)?;
        if let Some(value) = value {
            registers.merge(value).map_err(Refusal::Value)?;
        }
    }
    Ok(registers)
}
