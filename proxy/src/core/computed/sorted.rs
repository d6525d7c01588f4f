//! ZDIFF, ZINTER, ZUNION, their STORE forms and ZINTERCARD.
//!
//! Invariant: scores are added in an engine's order (smallest operand first, equal ones in the order
//! of their keys), so that sums are the same to the last bit; and they are shown as the instance's
//! engine shows them, by asking it where versions differ.

mod arguments;
mod combine;

use std::collections::HashMap;

use slotmesh_resp::{Protocol, write};

use self::arguments::{Arguments, Output};
use self::combine::Operand;
use super::super::job::{Answers, Job, Round, Step};
use super::super::retry::Effect;
use super::store::Store;
use super::{read, score};

const WRONG_TYPE: &[u8] = b"WRONGTYPE Operation against a key holding the wrong kind of value";

/// Shows numbers as the engine does. It touches no key.
const SHOW: &[u8] =
    b"local t = {} for i = 1, #ARGV do t[i] = {double = tonumber(ARGV[i])} end return t";

#[derive(Debug)]
enum Phase {
    Begin,
    /// There is an error in the arguments; an engine looks at the keys' types before.
    CheckTypes(&'static str),
    Fetch,
    Show(Shown),
    Store(Store),
}

#[derive(Debug)]
pub(super) struct Sorted {
    arguments: Arguments,
    phase: Phase,
}

/// A result that waits for texts of its scores.
#[derive(Debug)]
struct Shown {
    members: Vec<(Vec<u8>, f64)>,
    texts: Texts,
    /// Numbers whose texts are missing.
    asked: Vec<f64>,
}

/// The engine's texts of numbers, by their bits.
type Texts = HashMap<u64, Vec<u8>>;

impl Sorted {
    pub(super) fn begin(name: &'static str, words: Vec<Vec<u8>>) -> Result<Self, String> {
        Ok(Self {
            arguments: Arguments::parse(name, words)?,
            phase: Phase::Begin,
        })
    }

    fn ask_operands(&mut self, round: &mut Round<'_>) -> Step {
        let keys = &self.arguments.keys;
        if let Some(error) = self.arguments.late_error {
            for key in keys {
                round.ask_owner(key, Effect::Read, &[b"TYPE", key]);
            }
            self.phase = Phase::CheckTypes(error);
            return Step::Asked;
        }
        for key in keys {
            // One of the two is refused, or both find nothing.
            let sorted: [&[u8]; 5] = [b"ZRANGE", key, b"0", b"-1", b"WITHSCORES"];
            round.ask_owner(key, Effect::Read, &sorted);
            round.ask_owner(key, Effect::Read, &[b"SMEMBERS", key]);
        }
        self.phase = Phase::Fetch;
        Step::Asked
    }

    fn combine(&mut self, answers: &Answers, round: &mut Round<'_>) -> Step {
        let mut operands = Vec::with_capacity(self.arguments.keys.len());
        for (pair, weight) in answers.chunks_exact(2).zip(&self.arguments.weights) {
            match operand(&pair[0], &pair[1], *weight) {
                Ok(operand) => operands.push(operand),
                Err(Some(error)) => return round.pass(error),
                Err(None) => return round.fail(read::UNREADABLE),
            }
        }
        let Arguments {
            operation,
            aggregate,
            ..
        } = self.arguments;
        let members = combine::combine(operation, aggregate, &mut operands);
        match &mut self.arguments.output {
            Output::Cardinality { limit } => {
                let all = members.len() as i64;
                let limit = i64::try_from(*limit).unwrap_or(i64::MAX);
                let count = if limit == 0 { all } else { all.min(limit) };
                round.done(|out, _| write::write_int(out, count))
            }
            Output::Store(destination) => {
                let destination = std::mem::take(destination);
                let scores: Vec<String> = members.iter().map(|(_, s)| score::exact(*s)).collect();
                let mut words: Vec<&[u8]> = Vec::with_capacity(members.len() * 2);
                let mut negative_zeros: Vec<&[u8]> = Vec::new();
                for (score, (member, value)) in scores.iter().zip(&members) {
                    if *value == 0.0 && value.is_sign_negative() {
                        // A small sorted set forgets that sign, and the large one that it becomes
                        // here member by member had forgotten it; an engine makes it large at once.
                        negative_zeros.extend([score.as_bytes(), *member]);
                        words.extend([&b"1"[..], *member]);
                    } else {
                        words.extend([score.as_bytes(), *member]);
                    }
                }
                let passes = [(&[][..], &words[..]), (&[&b"XX"[..]], &negative_zeros)];
                let store = Store::begin(destination, b"ZADD", &passes, members.len(), round);
                self.phase = Phase::Store(store);
                Step::Asked
            }
            Output::Members => round.done(|out, _| {
                write::write_array_header(out, members.len());
                (members.iter()).for_each(|(member, _)| write::write_bulk(out, member));
            }),
            Output::Scores => {
                let shown = Shown::new(&members, answers);
                self.show(shown, round)
            }
        }
    }

    fn show(&mut self, shown: Shown, round: &mut Round<'_>) -> Step {
        if shown.asked.is_empty() {
            return round.done(|out, protocol| shown.write(out, protocol));
        }
        let numbers: Vec<String> = shown.asked.iter().map(|v| score::exact(*v)).collect();
        let mut command: Vec<&[u8]> = vec![b"EVAL", SHOW, b"0"];
        command.extend(numbers.iter().map(String::as_bytes));
        round.ask_owner(&self.arguments.keys[0], Effect::ReadScript, &command);
        self.phase = Phase::Show(shown);
        Step::Asked
    }
}

impl Job for Sorted {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        match &mut self.phase {
            Phase::Begin => self.ask_operands(round),
            Phase::CheckTypes(error) => {
                if let Some(error) = read::first_error(&answers) {
                    return round.pass(error);
                }
                let fits = |kind: &Vec<u8>| {
                    matches!(kind.as_slice(), b"+zset\r\n" | b"+set\r\n" | b"+none\r\n")
                };
                if answers.iter().all(fits) {
                    round.fail(error.as_bytes())
                } else {
                    round.fail(WRONG_TYPE)
                }
            }
            Phase::Fetch => self.combine(&answers, round),
            Phase::Show(shown) => {
                if let Some(error) = read::first_error(&answers) {
                    return round.pass(error);
                }
                if !shown.learn(&answers) {
                    return round.fail(read::UNREADABLE);
                }
                round.done(|out, protocol| shown.write(out, protocol))
            }
            Phase::Store(store) => store.next(&answers, round),
        }
    }
}

/// The operand out of the answers of ZRANGE and SMEMBERS; or the error, if one can be told.
fn operand<'a>(
    sorted: &'a [u8],
    set: &'a [u8],
    weight: f64,
) -> Result<Operand<'a>, Option<&'a [u8]>> {
    let fail = |answer: &'a [u8]| read::is_error(answer) && !read::is_wrong_type(answer);
    if let Some(error) = [sorted, set].into_iter().find(|answer| fail(answer)) {
        return Err(Some(error));
    }
    let members = if !read::is_error(set) && set != b"*0\r\n" {
        let members = read::bulks(set).ok_or(None)?;
        members.into_iter().map(|member| (member, 1.0)).collect()
    } else if !read::is_error(sorted) {
        let words = read::bulks(sorted).ok_or(None)?;
        let pair = |pair: &[&'a [u8]]| Some((pair[0], score::parse(pair[1])?));
        let members: Option<Vec<_>> = words.chunks_exact(2).map(pair).collect();
        members.ok_or(None)?
    } else if !read::is_error(set) {
        Vec::new()
    } else {
        return Err(Some(set));
    };
    Ok(Operand { members, weight })
}

impl Shown {
    /// Texts are known of numbers that all engines show alike, and of those that came from a node.
    fn new(members: &[(&[u8], f64)], answers: &Answers) -> Self {
        let mut shown = Self {
            members: (members.iter())
                .map(|(member, score)| (member.to_vec(), *score))
                .collect(),
            texts: Texts::new(),
            asked: Vec::new(),
        };
        let mut missing: HashMap<u64, f64> = (members.iter())
            .filter(|(_, value)| !score::is_common(*value))
            .map(|(_, value)| (value.to_bits(), *value))
            .collect();
        if missing.is_empty() {
            return shown;
        }
        for sorted in answers.iter().step_by(2) {
            for pair in read::bulks(sorted).unwrap_or_default().chunks_exact(2) {
                if let Some(value) = score::parse(pair[1])
                    && missing.remove(&value.to_bits()).is_some()
                {
                    shown.texts.insert(value.to_bits(), pair[1].to_vec());
                }
            }
        }
        shown.asked = missing.into_values().collect();
        shown
    }

    /// Takes the texts that were asked for. False: that was no answer to it.
    fn learn(&mut self, answers: &Answers) -> bool {
        let answer = answers.first().map(Vec::as_slice).unwrap_or_default();
        let texts = read::bulks(answer).unwrap_or_default();
        let asked = std::mem::take(&mut self.asked);
        if texts.len() != asked.len() {
            return false;
        }
        let known = asked.iter().zip(texts);
        self.texts
            .extend(known.map(|(value, text)| (value.to_bits(), text.to_vec())));
        true
    }

    fn write(&self, out: &mut Vec<u8>, protocol: Protocol) {
        let count = self.members.len();
        match protocol {
            Protocol::Resp2 => write::write_array_header(out, count * 2),
            Protocol::Resp3 => write::write_array_header(out, count),
        }
        for (member, value) in &self.members {
            if protocol == Protocol::Resp3 {
                write::write_array_header(out, 2);
            }
            write::write_bulk(out, member);
            let text = match self.texts.get(&value.to_bits()) {
                Some(text) => std::borrow::Cow::Borrowed(text.as_slice()),
                None => score::exact(*value).into_bytes().into(),
            };
            match protocol {
                Protocol::Resp2 => write::write_bulk(out, &text),
                Protocol::Resp3 => {
                    out.push(b',');
                    out.extend_from_slice(&text);
                    out.extend_from_slice(b"\r\n");
                }
            }
        }
    }
}
