//! What a ZUNION and its kin are asked for.
//!
//! Invariant: keys come before options, and an engine looks at the keys' types before it reads the
//! options: their errors are kept until then.

use slotmesh_resp::parse_i64;

use super::super::score::{Aggregate, parse_weight};
use super::super::{NEGATIVE_LIMIT, NOT_AN_INTEGER, SYNTAX, is};
use super::combine::Operation;

const NO_FLOAT: &str = "ERR weight value is not a float";

#[derive(Debug)]
pub(super) enum Output {
    Members,
    /// Members with their scores.
    Scores,
    /// 0: no limit.
    Cardinality {
        limit: u64,
    },
    Store(Vec<u8>),
}

#[derive(Debug)]
pub(super) struct Arguments {
    pub(super) operation: Operation,
    pub(super) keys: Vec<Vec<u8>>,
    /// One for each key.
    pub(super) weights: Vec<f64>,
    pub(super) aggregate: Aggregate,
    pub(super) output: Output,
    /// An error in the options.
    pub(super) late_error: Option<&'static str>,
}

impl Arguments {
    /// # Errors
    /// Errors that an engine finds before it looks at a key.
    pub(super) fn parse(name: &str, mut words: Vec<Vec<u8>>) -> Result<Self, String> {
        let operation = match name {
            "zunion" | "zunionstore" => Operation::Union,
            "zdiff" | "zdiffstore" => Operation::Diff,
            _ => Operation::Inter,
        };
        let stores = name.ends_with("store");
        let at = if stores { 2 } else { 1 };
        let count = parse_i64(&words[at]).ok_or(NOT_AN_INTEGER)?;
        let count = match usize::try_from(count) {
            Ok(count) if count > 0 => count,
            _ => {
                return Err(format!(
                    "ERR at least 1 input key is needed for '{name}' command"
                ));
            }
        };
        if count > words.len() - at - 1 {
            return Err(SYNTAX.to_owned());
        }
        let options = words.split_off(at + 1 + count);
        let keys = words.split_off(at + 1);
        let output = if stores {
            Output::Store(words.swap_remove(1))
        } else if name == "zintercard" {
            Output::Cardinality { limit: 0 }
        } else {
            Output::Members
        };
        let mut arguments = Self {
            operation,
            weights: vec![1.0; keys.len()],
            keys,
            aggregate: Aggregate::Sum,
            output,
            late_error: None,
        };
        arguments.late_error = arguments.take_options(&options).err();
        Ok(arguments)
    }

    fn take_options(&mut self, mut options: &[Vec<u8>]) -> Result<(), &'static str> {
        while let [option, rest @ ..] = options {
            let combines = self.operation != Operation::Diff
                && !matches!(self.output, Output::Cardinality { .. });
            options = if combines && rest.len() >= self.keys.len() && is(option, "weights") {
                let (weights, rest) = rest.split_at(self.keys.len());
                for (weight, text) in self.weights.iter_mut().zip(weights) {
                    *weight = parse_weight(text).ok_or(NO_FLOAT)?;
                }
                rest
            } else if let (true, [how, rest @ ..]) = (combines && is(option, "aggregate"), rest) {
                self.aggregate = aggregate(how).ok_or(SYNTAX)?;
                rest
            } else if is(option, "withscores")
                && matches!(self.output, Output::Members | Output::Scores)
            {
                self.output = Output::Scores;
                rest
            } else if let (Output::Cardinality { limit }, [value, rest @ ..]) =
                (&mut self.output, rest)
                && is(option, "limit")
            {
                *limit = parse_i64(value)
                    .and_then(|limit| u64::try_from(limit).ok())
                    .ok_or(NEGATIVE_LIMIT)?;
                rest
            } else {
                return Err(SYNTAX);
            };
        }
        Ok(())
    }
}

fn aggregate(word: &[u8]) -> Option<Aggregate> {
    [
        ("sum", Aggregate::Sum),
        ("min", Aggregate::Min),
        ("max", Aggregate::Max),
    ]
    .into_iter()
    .find_map(|(name, how)| is(word, name).then_some(how))
}
