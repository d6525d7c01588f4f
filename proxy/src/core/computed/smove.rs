//! SMOVE from one shard to another.
//!
//! Invariant: the member is added before it is removed, so whatever ends half-way leaves it in both
//! sets, never in none.

use slotmesh_resp::write;

use super::super::job::{Answers, Job, Round, Step};
use super::super::retry::Effect;
use super::{fail_half_done, read};

const WRONG_TYPE: &[u8] = b"WRONGTYPE Operation against a key holding the wrong kind of value";
const HALF_DONE: &str = "the member is in the destination, and may still be in the source";

#[derive(Clone, Copy, Debug)]
enum Phase {
    Begin,
    Look,
    Add,
    Remove,
}

#[derive(Debug)]
pub(super) struct Smove {
    source: Vec<u8>,
    destination: Vec<u8>,
    member: Vec<u8>,
    phase: Phase,
}

impl Smove {
    pub(super) fn begin(words: Vec<Vec<u8>>) -> Self {
        let mut words = words.into_iter().skip(1);
        let mut word = || words.next().unwrap_or_default();
        Self {
            source: word(),
            destination: word(),
            member: word(),
            phase: Phase::Begin,
        }
    }

    /// A source that does not exist gives 0 before any type is looked at; a source without the
    /// member gives 0 after both are.
    fn look(&mut self, answers: &Answers, round: &mut Round<'_>) -> Step {
        let [exists, is_member, kind] = &answers[..] else {
            return round.fail(read::UNREADABLE);
        };
        if read::integer(exists) == Some(0) {
            return zero(round);
        }
        if let Some(error) = read::first_error(answers) {
            return round.pass(error);
        }
        if !matches!(kind.as_slice(), b"+set\r\n" | b"+none\r\n") {
            return round.fail(WRONG_TYPE);
        }
        if read::integer(is_member) == Some(0) {
            return zero(round);
        }
        let command: [&[u8]; 3] = [b"SADD", &self.destination, &self.member];
        round.ask_owner(&self.destination, Effect::Write, &command);
        self.phase = Phase::Add;
        Step::Asked
    }
}

impl Job for Smove {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        let command: [&[u8]; 3] = [b"SREM", &self.source, &self.member];
        match self.phase {
            Phase::Begin => {
                round.ask_owner(&self.source, Effect::Read, &[b"EXISTS", &self.source]);
                let is_member: [&[u8]; 3] = [b"SISMEMBER", &self.source, &self.member];
                round.ask_owner(&self.source, Effect::Read, &is_member);
                let kind: [&[u8]; 2] = [b"TYPE", &self.destination];
                round.ask_owner(&self.destination, Effect::Read, &kind);
                self.phase = Phase::Look;
                Step::Asked
            }
            Phase::Look => self.look(&answers, round),
            Phase::Add => match read::first_error(&answers) {
                Some(error) => round.pass(error),
                None => {
                    round.ask_owner(&self.source, Effect::Write, &command);
                    self.phase = Phase::Remove;
                    Step::Asked
                }
            },
            Phase::Remove => match read::first_error(&answers) {
                Some(error) => fail_half_done(round, HALF_DONE, error),
                // 0: another client took it first. It may have moved it to the same destination, so
                // it must not be taken out there.
                None => round.pass(answers.first().map(Vec::as_slice).unwrap_or_default()),
            },
        }
    }
}

fn zero(round: &mut Round<'_>) -> Step {
    round.done(|out, _| write::write_int(out, 0))
}
