//! Random data and commands: the same seed gives the same ones.

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::pair::Pair;

/// Random data and commands over few keys, so that operands meet.
pub(crate) struct Dice(pub(crate) StdRng);

pub(crate) const KEYS: u32 = 12;

impl Dice {
    pub(crate) fn one_in(&mut self, n: u32) -> bool {
        self.0.random_range(0..n) == 0
    }

    pub(crate) fn key(&mut self) -> String {
        format!("k{}", self.0.random_range(0..KEYS))
    }

    pub(crate) fn keys(&mut self) -> Vec<String> {
        let count = self.0.random_range(1..6);
        (0..count).map(|_| self.key()).collect()
    }

    pub(crate) fn member(&mut self) -> String {
        match self.0.random_range(0..3) {
            0 => self.0.random_range(-5..20).to_string(),
            1 => format!("m{}", self.0.random_range(0..12)),
            _ => ["a", "ab", "b", "B", "é", "aa", "z"][self.0.random_range(0..7)].to_owned(),
        }
    }

    pub(crate) fn score(&mut self) -> String {
        match self.0.random_range(0..6) {
            0 => ["inf", "-inf", "0", "-0", "1e300", "1e-300", "1e17"][self.0.random_range(0..7)]
                .to_owned(),
            1 => self.0.random_range(-3..4).to_string(),
            2 => format!("{:.2}", self.0.random_range(-2.0..2.0)),
            _ => format!("{}", self.0.random_range(-100.0..100.0)),
        }
    }

    pub(crate) fn members(&mut self, mut word: impl FnMut(&mut Self) -> String) -> String {
        // Sometimes more than what engines keep in a compact form.
        let count = if self.one_in(8) {
            200
        } else {
            self.0.random_range(1..10)
        };
        let list: Vec<String> = (0..count).map(|_| word(self)).collect();
        list.join(" ")
    }

    /// A line that fills a key: mostly with what is asked for.
    pub(crate) fn fill(&mut self, key: &str, kind: &str) -> Option<String> {
        let kind = match self.0.random_range(0..24) {
            0 => "string",
            1 => "hash",
            2..4 => "nothing",
            _ => kind,
        };
        Some(match kind {
            "set" => {
                let members = self.members(Self::member);
                format!("SADD {key} {members}")
            }
            "zset" => {
                let pair = |dice: &mut Self| format!("{} {}", dice.score(), dice.member());
                let members = self.members(pair);
                format!("ZADD {key} {members}")
            }
            "string" => format!("SET {key} {}", self.member()),
            "hash" => format!("HSET {key} f 1"),
            _ => return None,
        })
    }

    pub(crate) fn refill(&mut self, pair: &mut Pair, kinds: &[&str]) {
        pair.flush();
        for number in 0..KEYS {
            let kind = kinds[self.0.random_range(0..kinds.len())];
            if let Some(line) = self.fill(&format!("k{number}"), kind) {
                pair.both(&line);
                if self.one_in(5) {
                    pair.both(&format!("PEXPIRE k{number} 1000000"));
                }
            }
        }
    }

    pub(crate) fn pick<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.0.random_range(0..list.len())]
    }
}

pub(crate) fn dice(seed: u64) -> Dice {
    Dice(StdRng::seed_from_u64(seed))
}

impl Dice {
    pub(crate) fn pick_char(&mut self, letters: &str) -> char {
        let at = self.0.random_range(0..letters.len());
        letters.as_bytes()[at].into()
    }
}

pub(crate) fn set_case(dice: &mut Dice, pair: &mut Pair) {
    let keys = dice.keys();
    let (count, list) = (keys.len(), keys.join(" "));
    match dice.0.random_range(0..4) {
        0 => {
            let name = dice.pick(&["SDIFF", "SINTER", "SUNION", "sunion"]);
            pair.same(&format!("{name} {list}"));
        }
        1 => {
            let name = dice.pick(&["SDIFFSTORE", "SINTERSTORE", "SUNIONSTORE"]);
            let to = dice.key();
            pair.same(&format!("{name} {to} {list}"));
            pair.same_key(&to);
        }
        2 => {
            let tail = dice.pick(&["", " LIMIT 0", " limit 2", " LIMIT 1 LIMIT 3", " LIMIT"]);
            let wrong = dice.pick(&["", "", "", " LIMIT -1", " LIMIT x", " FOO", " FOO 1"]);
            pair.same(&format!("SINTERCARD {count} {list}{tail}{wrong}"));
        }
        _ => {
            let (from, to, member) = (dice.key(), dice.key(), dice.member());
            pair.same(&format!("SMOVE {from} {to} {member}"));
            pair.same_key(&from);
            pair.same_key(&to);
        }
    }
}

pub(crate) fn sorted_case(dice: &mut Dice, pair: &mut Pair) {
    let keys = dice.keys();
    let (count, mut list) = (keys.len(), keys.join(" "));
    let name = dice.pick(&["ZDIFF", "ZINTER", "ZUNION", "ZUNION", "ZINTERCARD"]);
    let stores = name != "ZINTERCARD" && dice.one_in(3);
    if dice.one_in(2) && !matches!(name, "ZDIFF" | "ZINTERCARD") {
        list += " WEIGHTS";
        for _ in 0..count {
            let weight = if dice.one_in(3) {
                "1".to_owned()
            } else {
                dice.score()
            };
            list += &format!(" {weight}");
        }
    }
    if dice.one_in(2) && !matches!(name, "ZDIFF" | "ZINTERCARD") {
        list += dice.pick(&[" AGGREGATE SUM", " AGGREGATE min", " aggregate MAX"]);
    }
    if name == "ZINTERCARD" {
        list += dice.pick(&["", " LIMIT 0", " LIMIT 1", " LIMIT 3", " limit 2"]);
    } else if !stores && dice.one_in(2) {
        list += " WITHSCORES";
    }
    if dice.one_in(8) {
        list += dice.pick(&[
            " FOO",
            " WEIGHTS",
            " WEIGHTS x y",
            " AGGREGATE",
            " AGGREGATE x",
            " LIMIT -1",
            " WITHSCORES",
            " LIMIT",
            " WEIGHTS nan 1 1 1 1 1",
            " LIMIT 1",
        ]);
    }
    if stores {
        let to = dice.key();
        pair.same(&format!("{name}STORE {to} {count} {list}"));
        pair.same_key(&to);
    } else {
        pair.same(&format!("{name} {count} {list}"));
    }
}

pub(crate) fn fill_hyperloglog(dice: &mut Dice, pair: &mut Pair, number: u32) {
    match dice.0.random_range(0..14) {
        0 => return,
        1 => {
            let line = dice.pick(&["SET k text", "SADD k a", "SET k HYLL", "SET k 17"]);
            return pair.both(&line.replace('k', &format!("k{number}")));
        }
        2 => pair.both(&format!("PFADD k{number}")),
        _ => {
            let size = [1, 10, 100, 1_000, 10_000][dice.0.random_range(0..5)];
            let first = dice.0.random_range(0..20_000);
            let list: Vec<String> = (first..first + size).map(|n| format!("e{n}")).collect();
            pair.both(&format!("PFADD k{number} {}", list.join(" ")));
        }
    }
    if dice.one_in(12) {
        // A sparse value that breaks off.
        pair.both(&format!("SETRANGE k{number} 4 \u{1}"));
    }
    if dice.one_in(6) {
        pair.both(&format!("PEXPIRE k{number} 1000000"));
    }
}

/// A command whose effect a later one may see.
pub(crate) fn pipelined(dice: &mut Dice) -> String {
    let (a, b, c) = (dice.key(), dice.key(), dice.key());
    let member = dice.member();
    match dice.0.random_range(0..9) {
        0..3 => format!("SADD {a} {member}"),
        3 => format!("SUNIONSTORE {a} {b} {c}"),
        4 => format!("SDIFF {a} {b} {c}"),
        5 => format!("SMOVE {a} {b} {member}"),
        6 => format!("RENAME {a} {b}"),
        7 => format!("SCARD {a}"),
        _ => format!("DEL {a} {b}"),
    }
}
