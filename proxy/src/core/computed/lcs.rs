//! LCS of two strings on different shards.
//!
//! Invariant: the answer is an engine's, also where several subsequences are equally long: the walk
//! back goes up only if that is strictly longer, else left. Memory is one bit a cell and two rows.

use slotmesh_resp::{parse_i64, write};

use super::super::job::{Answers, Job, Round, Step};
use super::super::retry::Effect;
use super::{NOT_AN_INTEGER, SYNTAX, is, read};

/// What an engine may allocate for it by default (`proto-max-bulk-len`), at 4 bytes a cell. It also
/// bounds how long a worker is busy with one command.
const TABLE_BYTES_MAX: u64 = 512 * 1024 * 1024;
const TOO_LARGE: &str =
    "ERR Insufficient memory, transient memory for LCS exceeds proto-max-bulk-len";
const NOT_STRINGS: &str = "ERR The specified keys must contain string values";
const AMBIGUOUS: &str = "ERR If you want both the length and indexes, please just use IDX.";

#[derive(Clone, Copy, Debug, Default)]
struct Options {
    idx: bool,
    len: bool,
    with_match_len: bool,
    min_match_len: i64,
}

#[derive(Debug)]
pub(super) struct Lcs {
    keys: [Vec<u8>; 2],
    /// An engine looks at the keys' types before it complains of the options.
    options: Result<Options, &'static str>,
}

impl Lcs {
    pub(super) fn begin(mut words: Vec<Vec<u8>>) -> Self {
        let options = parse(&words[3..]);
        let keys = [1, 2].map(|at| std::mem::take(&mut words[at]));
        Self { keys, options }
    }
}

impl Job for Lcs {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if answers.is_empty() {
            let verb: &[u8] = if self.options.is_ok() {
                b"GET"
            } else {
                b"STRLEN"
            };
            for key in &self.keys {
                round.ask_owner(key, Effect::Read, &[verb, key]);
            }
            return Step::Asked;
        }
        if let Some(error) = read::first_error(&answers) {
            return if read::is_wrong_type(error) {
                round.fail(NOT_STRINGS.as_bytes())
            } else {
                round.pass(error)
            };
        }
        let options = match self.options {
            Ok(options) => options,
            Err(text) => return round.fail(text.as_bytes()),
        };
        let [a, b] = [0, 1].map(|at| answers.get(at).and_then(|answer| read::bulk(answer)));
        let (Some(a), Some(b)) = (a, b) else {
            return round.fail(read::UNREADABLE);
        };
        answer(a.unwrap_or_default(), b.unwrap_or_default(), options, round)
    }
}

fn parse(words: &[Vec<u8>]) -> Result<Options, &'static str> {
    let mut options = Options::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if is(word, "idx") {
            options.idx = true;
        } else if is(word, "len") {
            options.len = true;
        } else if is(word, "withmatchlen") {
            options.with_match_len = true;
        } else if is(word, "minmatchlen")
            && let Some(value) = words.next()
        {
            options.min_match_len = parse_i64(value).ok_or(NOT_AN_INTEGER)?;
        } else {
            return Err(SYNTAX);
        }
    }
    if options.idx && options.len {
        return Err(AMBIGUOUS);
    }
    Ok(options)
}

fn answer(a: &[u8], b: &[u8], options: Options, round: &mut Round<'_>) -> Step {
    let cells = (a.len() as u64 + 1).saturating_mul(b.len() as u64 + 1);
    if cells.saturating_mul(4) > TABLE_BYTES_MAX {
        return round.fail(TOO_LARGE.as_bytes());
    }
    let table = Table::new(a, b);
    if options.len {
        return round.done(|out, _| write::write_int(out, table.length as i64));
    }
    let runs = table.runs(a, b);
    if !options.idx {
        let mut text = Vec::with_capacity(table.length);
        for run in runs.iter().rev() {
            text.extend_from_slice(&a[run.a..run.a + run.len]);
        }
        return round.done(|out, _| write::write_bulk(out, &text));
    }
    let runs: Vec<_> = (runs.into_iter())
        .filter(|run| run.len as i64 >= options.min_match_len)
        .collect();
    round.done(|out, protocol| {
        write::write_map_header(out, protocol, 2);
        write::write_bulk(out, b"matches");
        write::write_array_header(out, runs.len());
        for run in runs {
            write::write_array_header(out, if options.with_match_len { 3 } else { 2 });
            for from in [run.a, run.b] {
                write::write_array_header(out, 2);
                write::write_int(out, from as i64);
                write::write_int(out, (from + run.len) as i64 - 1);
            }
            if options.with_match_len {
                write::write_int(out, run.len as i64);
            }
        }
        write::write_bulk(out, b"len");
        write::write_int(out, table.length as i64);
    })
}

/// Bytes that follow each other in both strings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    a: usize,
    b: usize,
    len: usize,
}

/// Which way leads back from each pair of prefixes.
#[derive(Debug)]
struct Table {
    length: usize,
    width: usize,
    /// Set: leave out the last byte of `a`.
    up: Vec<u64>,
}

impl Table {
    fn new(a: &[u8], b: &[u8]) -> Self {
        let width = b.len();
        let mut up = vec![0_u64; (a.len() * width).div_ceil(64)];
        // Lengths for the prefix of `a` before, and for this one, up to the place in `b`.
        let mut row = vec![0_u32; width + 1];
        for (i, byte) in a.iter().enumerate() {
            let (mut diagonal, mut left) = (0, 0);
            for (j, other) in b.iter().enumerate() {
                let above = row[j + 1];
                left = if byte == other {
                    diagonal + 1
                } else if above > left {
                    let cell = i * width + j;
                    up[cell / 64] |= 1 << (cell % 64);
                    above
                } else {
                    left
                };
                row[j + 1] = left;
                diagonal = above;
            }
        }
        Self {
            length: row[width] as usize,
            width,
            up,
        }
    }

    /// The subsequence in runs, the last one first.
    fn runs(&self, a: &[u8], b: &[u8]) -> Vec<Run> {
        let (mut i, mut j) = (a.len(), b.len());
        let mut runs = Vec::new();
        let mut len = 0;
        while i > 0 && j > 0 {
            if a[i - 1] == b[j - 1] {
                (i, j, len) = (i - 1, j - 1, len + 1);
                continue;
            }
            if len > 0 {
                runs.push(Run { a: i, b: j, len });
                len = 0;
            }
            let cell = (i - 1) * self.width + j - 1;
            if self.up[cell / 64] & (1 << (cell % 64)) != 0 {
                i -= 1;
            } else {
                j -= 1;
            }
        }
        if len > 0 {
            runs.push(Run { a: i, b: j, len });
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_documentation() {
        let (a, b) = (b"ohmytext", b"mynewtext");
        let table = Table::new(a, b);
        assert_eq!(table.length, 6);
        let last = Run { a: 4, b: 5, len: 4 };
        assert_eq!(table.runs(a, b), [last, Run { a: 2, b: 0, len: 2 }]);
    }

    #[test]
    fn empty_strings_have_nothing_in_common() {
        let table = Table::new(b"", b"abc");
        assert_eq!((table.length, table.runs(b"", b"abc")), (0, Vec::new()));
        assert_eq!(Table::new(b"abc", b"").length, 0);
    }
}
