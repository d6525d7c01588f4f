//! Keys that a command reads without naming them: SORT's BY and GET patterns.
//!
//! Invariant: every pattern from which the engine may form a key is found; whether those keys are on
//! the right shard is for the caller to judge, from the pattern's hash tag.

use crate::keys::Arguments;
use crate::lookup::Command;

/// A pattern whose `*` is replaced by each element that is sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern<'a> {
    pub option: PatternOption,
    /// What decides the slot of every key that is formed, if something does.
    pub hash_tag: Option<&'a [u8]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatternOption {
    By,
    Get,
}

impl Command {
    /// The patterns of a call of SORT or SORT_RO. `GET #` and patterns without `*` read no key.
    pub fn patterns<'a, A: Arguments + ?Sized>(
        &self,
        args: &'a A,
    ) -> impl Iterator<Item = Pattern<'a>> + use<'a, A> {
        let sorts = matches!(self.name, "sort" | "sort_ro");
        let mut at = if sorts { 2 } else { usize::MAX };
        std::iter::from_fn(move || {
            // Values of options are stepped over: one may be called "by".
            while at < args.count() {
                let word = args.argument(at);
                let is = |option: &str| word.eq_ignore_ascii_case(option.as_bytes());
                let (option, len) = if is("by") {
                    (Some(PatternOption::By), 2)
                } else if is("get") {
                    (Some(PatternOption::Get), 2)
                } else if is("limit") {
                    (None, 3)
                } else if is("store") {
                    (None, 2)
                } else {
                    (None, 1)
                };
                let value = (at + 1 < args.count()).then(|| args.argument(at + 1));
                at += len;
                if let (Some(option), Some(value)) = (option, value)
                    && value.contains(&b'*')
                {
                    let hash_tag = hash_tag(value);
                    return Some(Pattern { option, hash_tag });
                }
            }
            None
        })
    }
}

/// The tag of every key that the pattern can form: it must be closed before the `*`.
fn hash_tag(pattern: &[u8]) -> Option<&[u8]> {
    let fixed = pattern.split(|&byte| byte == b'*').next()?;
    let open = fixed.iter().position(|&byte| byte == b'{')?;
    let tag = &fixed[open + 1..];
    let close = tag.iter().position(|&byte| byte == b'}')?;
    (close > 0).then(|| &tag[..close])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lookup;

    #[test]
    fn patterns_are_found_with_their_tags() {
        use PatternOption::{By, Get};
        type Found<'a> = (PatternOption, Option<&'a str>);
        let cases: &[(&str, &[Found])] = &[
            ("SORT k", &[]),
            ("SORT k BY nosort GET # GET o_*", &[(Get, None)]),
            (
                "sort_ro k by w_* get {t}_*->f",
                &[(By, None), (Get, Some("t"))],
            ),
            ("SORT k BY {a}{b}* LIMIT 0 1", &[(By, Some("a"))]),
            ("SORT k BY x{a}*{b}", &[(By, Some("a"))]),
            ("SORT k BY *{a}", &[(By, None)]),
            ("SORT k BY {*}", &[(By, None)]),
            ("SORT k BY {}*", &[(By, None)]),
            ("SORT k BY {a*}", &[(By, None)]),
            ("SORT k STORE by LIMIT get * DESC", &[]),
            ("SORT k BY", &[]),
            ("SORT k GET by* BY get*", &[(Get, None), (By, None)]),
            ("GET by w_*", &[]),
            ("MGET k BY w_*", &[]),
        ];
        for (line, expected) in cases {
            let args: Vec<&str> = line.split(' ').collect();
            let command = lookup(args[0].as_bytes()).unwrap();
            let found: Vec<Found> = command
                .patterns(args.as_slice())
                .map(|found| {
                    let tag = found.hash_tag.map(|tag| std::str::from_utf8(tag).unwrap());
                    (found.option, tag)
                })
                .collect();
            assert_eq!(found, *expected, "{line}");
        }
    }
}
