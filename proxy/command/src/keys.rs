//! Which arguments of a command are keys, by the engines' own rules (Redis's key specifications).
//!
//! Invariant: finding keys allocates nothing and reads only the arguments that the rules name. What
//! an engine would take for a key is found; a command that an engine would refuse may yield fewer.

use crate::rights::Rights;

/// The arguments of a command; argument 0 is its name.
pub trait Arguments {
    fn count(&self) -> usize;
    /// Argument `index`, which is below `count`.
    fn argument(&self, index: usize) -> &[u8];
}

impl<T: AsRef<[u8]>> Arguments for [T] {
    fn count(&self) -> usize {
        self.len()
    }

    fn argument(&self, index: usize) -> &[u8] {
        self[index].as_ref()
    }
}

/// What is done with a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    /// Not a key: a sharded Pub/Sub channel, which has a slot like one.
    Channel,
}

/// One rule: where keys begin and how many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeySpec {
    pub access: Access,
    pub(crate) rights: Rights,
    pub(crate) begin: Begin,
    pub(crate) find: Find,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    Index(usize),
    /// Behind the first `word` at or after `from`; a negative `from` counts from the end, backwards.
    Keyword {
        word: &'static str,
        from: i32,
    },
    /// Behind the last STORE that is not another option's value (SORT).
    SortStore,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Find {
    /// To `last`, counted from the first key, or from the command's end if negative; with a `limit`,
    /// only the first of `limit` equal parts of the rest are keys.
    Range { last: i32, step: usize, limit: i32 },
    /// As many as the argument `count` places behind the beginning says; the first key is `first` behind it.
    Counted {
        count: usize,
        first: usize,
        step: usize,
    },
}

impl Find {
    pub(crate) const ONE: Self = Self::Range {
        last: 0,
        step: 1,
        limit: 0,
    };
}

/// The keys cannot be told. Every engine refuses such a command with its own text, so any shard may
/// be asked for that text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("the number of keys is not a number")]
    NotANumber,
    #[error("more keys are announced than there are arguments")]
    TooMany,
}

/// Most rules of one command; loading the table checks it.
pub(crate) const SPECS_MAX: usize = 3;

/// The positions of a command's keys, in the order of its rules.
#[derive(Debug, Clone, Copy, Default)]
pub struct Keys {
    runs: [Run; SPECS_MAX],
    len: usize,
}

/// `first, first + step, …` up to and including `last`.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    first: usize,
    last: usize,
    step: usize,
}

impl Keys {
    pub(crate) const NONE: Self = Self {
        runs: [Run {
            first: 0,
            last: 0,
            step: 0,
        }; SPECS_MAX],
        len: 0,
    };

    /// From `first` on, before `end`.
    pub(crate) fn run(first: usize, end: usize) -> Self {
        let mut keys = Self::NONE;
        if first < end {
            let last = end - 1;
            keys.runs[0] = Run {
                first,
                last,
                step: 1,
            };
            keys.len = 1;
        }
        keys
    }

    pub(crate) fn find<A: Arguments + ?Sized>(
        specs: &[KeySpec],
        args: &A,
    ) -> Result<Self, KeyError> {
        let mut keys = Self::default();
        for spec in specs {
            if let Some(run) = spec.run(args)? {
                keys.runs[keys.len] = run;
                keys.len += 1;
            }
        }
        Ok(keys)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Iterator for Keys {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let run = self.runs[..self.len].first_mut()?;
        let key = run.first;
        if key + run.step <= run.last {
            run.first += run.step;
        } else {
            self.runs.copy_within(1.., 0);
            self.len -= 1;
        }
        Some(key)
    }
}

impl KeySpec {
    /// Position of the key if the rule is "one key, always there".
    pub(crate) fn fixed(&self) -> Option<usize> {
        match (self.begin, self.find) {
            (Begin::Index(at), Find::ONE) => Some(at),
            _ => None,
        }
    }

    pub(crate) fn is_key(&self) -> bool {
        self.access != Access::Channel
    }

    /// True if three numbers say it all, as before Redis 7.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(
            (self.begin, self.find),
            (Begin::Index(_), Find::Range { limit: 0, .. })
        )
    }

    /// How many arguments make one group (MSET: key and value), and where the groups begin.
    pub(crate) fn groups(&self) -> Option<(usize, usize)> {
        match (self.begin, self.find) {
            (
                Begin::Index(at),
                Find::Range {
                    last: -1,
                    step,
                    limit: 0,
                },
            ) if step > 1 => Some((at, step)),
            _ => None,
        }
    }

    fn run<A: Arguments + ?Sized>(&self, args: &A) -> Result<Option<Run>, KeyError> {
        let argc = args.count();
        let begin = match self.begin {
            Begin::Index(at) => Some(at),
            Begin::Keyword { word, from } => after_keyword(args, word, from),
            Begin::SortStore => sort_store(args),
        };
        let Some(begin) = begin.filter(|&begin| begin < argc) else {
            return Ok(None);
        };
        let (first, last, step) = match self.find {
            Find::Range { last, step, limit } => {
                let last = last as isize; // i32 always fits
                let end = match (last, limit) {
                    (0.., _) => begin as isize + last,
                    (_, 0) => argc as isize + last,
                    (_, limit) => begin as isize + (argc - begin) as isize / limit as isize + last,
                };
                (begin, end, step)
            }
            Find::Counted { count, first, step } => {
                let Some(at) = Some(begin + count).filter(|&at| at < argc) else {
                    return Ok(None);
                };
                let count = number(args.argument(at))?;
                let first = begin + first;
                // Every key is an argument of its own, so a larger count is wrong by itself.
                if count > argc.saturating_sub(first) / step {
                    return Err(KeyError::TooMany);
                }
                (
                    first,
                    first as isize + (count as isize - 1) * step as isize,
                    step,
                )
            }
        };
        let last = usize::try_from(last).unwrap_or(0).min(argc - 1);
        Ok((first <= last).then_some(Run { first, last, step }))
    }
}

fn number(text: &[u8]) -> Result<usize, KeyError> {
    let text = std::str::from_utf8(text).map_err(|_| KeyError::NotANumber)?;
    text.parse().map_err(|_| KeyError::NotANumber)
}

fn after_keyword<A: Arguments + ?Sized>(args: &A, word: &str, from: i32) -> Option<usize> {
    let is_word = |&at: &usize| args.argument(at).eq_ignore_ascii_case(word.as_bytes());
    let found = match usize::try_from(from) {
        Ok(from) => (from..args.count()).find(is_word),
        Err(_) => {
            let start = args.count().checked_sub(from.unsigned_abs() as usize)?;
            (1..=start).rev().find(is_word)
        }
    };
    found.map(|at| at + 1)
}

fn sort_store<A: Arguments + ?Sized>(args: &A) -> Option<usize> {
    let (mut at, mut store) = (2, None);
    while at < args.count() {
        let word = args.argument(at);
        // Values of options are stepped over: a pattern may be called "store".
        at += match word {
            _ if word.eq_ignore_ascii_case(b"limit") => 3,
            _ if word.eq_ignore_ascii_case(b"get") || word.eq_ignore_ascii_case(b"by") => 2,
            _ => 1,
        };
        // One at the end may be the value of another: `SORT k STORE store`.
        if word.eq_ignore_ascii_case(b"store") && at < args.count() {
            store = Some(at);
        }
    }
    store
}
