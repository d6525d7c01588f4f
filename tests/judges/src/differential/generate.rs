//! Random commands over a small set of keys, so that they meet each other's results.
//!
//! Every key has a type that it mostly has, in a few databases; most names lie on different shards,
//! some share a slot by a hash tag. Nothing here is random on the server or depends on its clock.

use crate::{random::Random, wire::Words};

/// Databases in use: few, so that SWAPDB, MOVE and COPY find something.
pub(super) const DATABASES: usize = 4;
/// Names of each type.
const NAMES: usize = 6;
/// Kinds of values, as the first letter of a key: text, set, sorted set, hash, list, stream, HLL.
const KINDS: &[u8] = b"tszhlxp";
const SCORES: &[&str] = &[
    "0",
    "1",
    "-1",
    "2",
    "3",
    "1.5",
    "0.1",
    "0.2",
    "0.3",
    "-2.25",
    "inf",
    "-inf",
    "1e10",
    "1e-5",
    "9007199254740993",
    "3.0",
    "17",
    "1e300",
    "-0.0",
];
/// What takes the place of an argument when a command is to be wrong.
const WRONG: &[&str] = &[
    "",
    "foo",
    "-1",
    "0",
    "1.5",
    "nan",
    "99999999999999999999",
    "WITHSCORES",
    "LIMIT",
    "REPLACE",
    "DB",
    "WEIGHTS",
    "AGGREGATE",
    "2",
    "1000",
];

/// The words that one more element takes.
type Elements = fn(usize) -> Vec<Vec<u8>>;

/// Makes the commands of one round.
#[derive(Debug)]
pub(super) struct Generator {
    random: Random,
    /// Stream entries get rising ids.
    entries: u64,
    /// Far in the future, so that nothing expires while it is compared.
    expire_base_ms: u64,
}

impl Generator {
    pub(super) fn new(random: Random, now_ms: u64) -> Self {
        Self {
            random,
            entries: 0,
            expire_base_ms: now_ms + 100_000_000,
        }
    }

    pub(super) fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// The next command.
    pub(super) fn command(&mut self) -> Words {
        let mut words = match self.random.below(100) {
            0..38 => self.write(),
            38..76 => self.computed(),
            76..90 => self.read(),
            90..96 => self.split(),
            _ => self.database(),
        };
        if self.random.percent(4) {
            self.spoil(&mut words);
        }
        words
    }

    /// A transaction of simple commands, from MULTI to EXEC.
    pub(super) fn transaction(&mut self) -> Vec<Words> {
        let mut block = vec![text(&["MULTI"])];
        for _ in 0..self.random.between(0, 6) {
            block.push(match self.random.below(10) {
                0..5 => self.write(),
                5..8 => self.read(),
                8 => self.split(),
                _ => self.computed(),
            });
        }
        block.push(text(&["EXEC"]));
        block
    }

    fn any_key(&mut self) -> Vec<u8> {
        let kind = *self.random.pick(KINDS);
        self.name(kind)
    }

    /// Mostly a key that has this kind of value.
    fn key(&mut self, kind: u8) -> Vec<u8> {
        match self.random.below(100) {
            0..88 => self.name(kind),
            88..98 => self.any_key(),
            // Present nowhere, and names that need care.
            98 => b"missing".to_vec(),
            _ => self
                .random
                .pick(&[&b""[..], b"\r\n\0\xff", b"{}a"])
                .to_vec(),
        }
    }

    fn name(&mut self, kind: u8) -> Vec<u8> {
        let number = self.random.below(NAMES);
        let kind = char::from(kind);
        // A third share one slot.
        let name = if number.is_multiple_of(3) {
            format!("{{tag}}{kind}{number}")
        } else {
            format!("{kind}{number}")
        };
        name.into_bytes()
    }

    fn keys(&mut self, kind: u8, most: usize) -> Vec<Vec<u8>> {
        let count = self.random.between(1, most);
        // Of another kind that the command takes too, now and then.
        let other = if kind == b'z' { b's' } else { kind };
        (0..count)
            .map(|_| {
                let kind = if self.random.percent(15) { other } else { kind };
                self.key(kind)
            })
            .collect()
    }

    fn member(&mut self) -> Vec<u8> {
        match self.random.below(10) {
            0..6 => self.random.below(12).to_string().into_bytes(),
            6..9 => format!("m{}", self.random.below(12)).into_bytes(),
            _ => self
                .random
                .pick(&[&b""[..], b"\xff\0", b"a long member of a set"])
                .to_vec(),
        }
    }

    fn text_value(&mut self) -> Vec<u8> {
        let length = *self.random.pick(&[0, 1, 3, 8, 20, 60, 60, 300]);
        (0..length).map(|_| *self.random.pick(b"abcd")).collect()
    }

    /// So many elements that the engine holds them in another form, and no reply is small.
    fn many(&mut self, kind: u8, key: Vec<u8>) -> Words {
        let numbers = 0..self.random.between(150, 700);
        let (name, each): (&str, Elements) = match kind {
            b's' => ("SADD", |n| vec![number(n * 7)]),
            b'z' => ("ZADD", |n| vec![number(n % 50), number(n)]),
            b'h' => ("HSET", |n| vec![number(n), vec![b'v'; n % 90]]),
            b'l' => ("RPUSH", |n| vec![vec![b'e'; n % 90]]),
            b'p' => ("PFADD", |n| vec![number(n * 3)]),
            _ => return with(&["SET"], [key, vec![b'b'; 900]]),
        };
        with(&[name], std::iter::once(key).chain(numbers.flat_map(each)))
    }

    fn write(&mut self) -> Words {
        let kind = *self.random.pick(KINDS);
        let key = self.key(kind);
        match self.random.below(100) {
            0..2 => return self.many(kind, key),
            2..8 => return self.expiry(key),
            8..11 => return vec![b"DEL".to_vec(), key],
            _ => {}
        }
        match kind {
            b't' => self.write_text(key),
            b's' => self.members("SADD", "SREM", key),
            b'z' => self.write_scores(key),
            b'h' => {
                let (field, value) = (self.member(), self.text_value());
                with(&["HSET"], [key, field, value])
            }
            b'l' => {
                let push = *self.random.pick(&["RPUSH", "LPUSH"]);
                with(&[push], [key, self.member()])
            }
            b'x' => self.write_stream(key),
            _ => {
                let first = self.random.below(3000);
                let count = *self.random.pick(&[0, 1, 5, 100]);
                let elements = (first..first + count).map(|n| format!("e{n}").into_bytes());
                with(&["PFADD"], std::iter::once(key).chain(elements))
            }
        }
    }

    fn write_text(&mut self, key: Vec<u8>) -> Words {
        let value = self.text_value();
        match self.random.below(8) {
            0 => with(&["APPEND"], [key, value]),
            1 => with(&["SETRANGE"], [key, number(self.random.below(30)), value]),
            2 => {
                let mut words = with(&["SET"], [key, value]);
                let when = self.future();
                words.extend([b"PXAT".to_vec(), when]);
                words
            }
            3 => {
                let more = *self.random.pick(&["NX", "XX", "GET", "KEEPTTL"]);
                let mut words = with(&["SET"], [key, value]);
                words.push(more.into());
                words
            }
            _ => with(&["SET"], [key, value]),
        }
    }

    fn members(&mut self, add: &str, remove: &str, key: Vec<u8>) -> Words {
        let name = if self.random.percent(80) { add } else { remove };
        let count = self.random.between(1, 6);
        let members: Vec<_> = (0..count).map(|_| self.member()).collect();
        with(&[name], std::iter::once(key).chain(members))
    }

    fn write_scores(&mut self, key: Vec<u8>) -> Words {
        if self.random.percent(15) {
            return with(&["ZREM"], [key, self.member()]);
        }
        let count = self.random.between(1, 5);
        let mut words = with(&["ZADD"], [key]);
        for _ in 0..count {
            words.push(self.random.pick(SCORES).as_bytes().to_vec());
            words.push(self.member());
        }
        words
    }

    fn write_stream(&mut self, key: Vec<u8>) -> Words {
        self.entries += 1;
        match self.random.below(10) {
            0 => with(
                &["XGROUP", "CREATE"],
                [key, b"g".to_vec(), b"0".to_vec(), b"MKSTREAM".to_vec()],
            ),
            1 => with(&["XTRIM"], [key, b"MAXLEN".to_vec(), b"3".to_vec()]),
            2 => {
                let id = format!("{}-0", self.entries.saturating_sub(3));
                with(&["XDEL"], [key, id.into_bytes()])
            }
            _ => {
                let id = format!("{}-0", self.entries);
                let (field, value) = (self.member(), self.text_value());
                with(&["XADD"], [key, id.into_bytes(), field, value])
            }
        }
    }

    fn future(&mut self) -> Vec<u8> {
        let later = u64::try_from(self.random.below(1_000)).unwrap_or_default() * 1_000_000;
        (self.expire_base_ms + later).to_string().into_bytes()
    }

    fn expiry(&mut self, key: Vec<u8>) -> Words {
        match self.random.below(4) {
            0 => with(&["PERSIST"], [key]),
            1 => with(&["EXPIRE"], [key, b"50000".to_vec()]),
            _ => {
                let when = self.future();
                with(&["PEXPIREAT"], [key, when])
            }
        }
    }

    fn computed(&mut self) -> Words {
        match self.random.below(12) {
            0 | 1 => self.sets(),
            2..5 => self.sorted_sets(),
            5 => {
                let (from, to) = (self.key(b's'), self.key(b's'));
                with(&["SMOVE"], [from, to, self.member()])
            }
            6 => self.lcs(),
            7 => {
                let keys = self.keys(b'p', 4);
                with(&[*self.random.pick(&["PFCOUNT", "PFMERGE"])], keys)
            }
            8 | 9 => {
                let kind = *self.random.pick(KINDS);
                let name = *self.random.pick(&["RENAME", "RENAMENX"]);
                let (from, to) = (self.key(kind), self.key(kind));
                with(&[name], [from, to])
            }
            _ => self.copy(),
        }
    }

    fn copy(&mut self) -> Words {
        let kind = *self.random.pick(KINDS);
        let (from, to) = (self.key(kind), self.key(kind));
        let mut words = with(&["COPY"], [from, to]);
        if self.random.percent(40) {
            words.push(b"DB".to_vec());
            words.push(number(self.random.below(DATABASES)));
        }
        if self.random.percent(50) {
            words.push(b"REPLACE".to_vec());
        }
        words
    }

    fn sets(&mut self) -> Words {
        let name = *self.random.pick(&["SDIFF", "SINTER", "SUNION"]);
        let keys = self.keys(b's', 5);
        match self.random.below(5) {
            0 | 1 => with(&[name], keys),
            2 | 3 => {
                let to = self.key(b's');
                with(&[&format!("{name}STORE")], std::iter::once(to).chain(keys))
            }
            _ => {
                let mut words = counted("SINTERCARD", keys);
                self.maybe_limit(&mut words);
                words
            }
        }
    }

    fn maybe_limit(&mut self, words: &mut Words) {
        if self.random.percent(50) {
            words.push(b"LIMIT".to_vec());
            words.push(number(self.random.below(4)));
        }
    }

    fn sorted_sets(&mut self) -> Words {
        let name = *self.random.pick(&[
            "ZDIFF",
            "ZINTER",
            "ZUNION",
            "ZINTER",
            "ZUNION",
            "ZINTERCARD",
        ]);
        let keys = self.keys(b'z', 4);
        let count = keys.len();
        if name == "ZINTERCARD" {
            let mut words = counted(name, keys);
            self.maybe_limit(&mut words);
            return words;
        }
        let store = self.random.percent(50);
        let mut words = if store {
            let to = self.key(b'z');
            let mut words = with(&[&format!("{name}STORE")], [to, number(count)]);
            words.extend(keys);
            words
        } else {
            counted(name, keys)
        };
        if name != "ZDIFF" {
            if self.random.percent(40) {
                words.push(b"WEIGHTS".to_vec());
                for _ in 0..count {
                    words.push(self.random.pick(SCORES).as_bytes().to_vec());
                }
            }
            if self.random.percent(40) {
                words.push(b"AGGREGATE".to_vec());
                words.push(self.random.pick(&["SUM", "MIN", "max"]).as_bytes().to_vec());
            }
        }
        if !store && self.random.percent(60) {
            words.push(b"WITHSCORES".to_vec());
        }
        words
    }

    fn lcs(&mut self) -> Words {
        let (a, b) = (self.key(b't'), self.key(b't'));
        let mut words = with(&["LCS"], [a, b]);
        match self.random.below(4) {
            0 => {}
            1 => words.push(b"LEN".to_vec()),
            _ => {
                words.push(b"IDX".to_vec());
                if self.random.percent(50) {
                    words.push(b"MINMATCHLEN".to_vec());
                    words.push(number(self.random.below(5)));
                }
                if self.random.percent(50) {
                    words.push(b"WITHMATCHLEN".to_vec());
                }
            }
        }
        words
    }

    fn read(&mut self) -> Words {
        let kind = *self.random.pick(KINDS);
        let key = self.key(kind);
        if self.random.percent(25) {
            let name = *self.random.pick(&["TYPE", "PTTL", "PEXPIRETIME", "EXISTS"]);
            return with(&[name], [key]);
        }
        let (head, tail): (&str, &[&str]) = match kind {
            b't' => ("GET", &[]),
            b's' => ("SMEMBERS", &[]),
            b'z' => ("ZRANGE", &["0", "-1", "WITHSCORES"]),
            b'h' => ("HGETALL", &[]),
            b'l' => ("LRANGE", &["0", "-1"]),
            b'x' => ("XRANGE", &["-", "+"]),
            _ => ("PFCOUNT", &[]),
        };
        let mut words = with(&[head], [key]);
        words.extend(text(tail));
        words
    }

    fn split(&mut self) -> Words {
        let count = self.random.between(1, 6);
        let names = [
            "MGET", "MSET", "DEL", "UNLINK", "EXISTS", "TOUCH", "MSETNX", "EXISTS", "MGET",
        ];
        let name = *self.random.pick(&names);
        let mut words = text(&[name]);
        for _ in 0..count {
            let kind = if name.starts_with('M') {
                b't'
            } else {
                *self.random.pick(KINDS)
            };
            words.push(self.key(kind));
            if name.starts_with("MSET") {
                words.push(self.text_value());
            }
        }
        words
    }

    fn database(&mut self) -> Words {
        let (a, b) = (self.random.below(DATABASES), self.random.below(DATABASES));
        match self.random.below(20) {
            0..8 => with(&["SELECT"], [number(a)]),
            8..10 => with(&["SWAPDB"], [number(a), number(b)]),
            10..15 => {
                let key = self.any_key();
                with(&["MOVE"], [key, number(a)])
            }
            15 => text(&["FLUSHDB"]),
            16 => text(&["DBSIZE"]),
            17 => text(&["RANDOMKEY"]),
            _ => with(
                &["KEYS"],
                [self
                    .random
                    .pick(&["*", "s*", "?1", "*tag*", "[x-z]*"])
                    .as_bytes()
                    .to_vec()],
            ),
        }
    }

    /// Too many, too few, or other arguments.
    fn spoil(&mut self, words: &mut Words) {
        let wrong = self.random.pick(WRONG).as_bytes().to_vec();
        match self.random.below(4) {
            0 => words.push(wrong),
            1 if words.len() > 1 => {
                words.pop();
            }
            _ if words.len() > 1 => {
                let at = self.random.between(1, words.len() - 1);
                words[at] = wrong;
            }
            _ => {}
        }
    }
}

fn text(words: &[&str]) -> Words {
    crate::wire::words(words)
}

fn number(number: usize) -> Vec<u8> {
    number.to_string().into_bytes()
}

fn with(head: &[&str], tail: impl IntoIterator<Item = Vec<u8>>) -> Words {
    let mut words = text(head);
    words.extend(tail);
    words
}

/// A command that says first how many keys follow.
fn counted(name: &str, keys: Vec<Vec<u8>>) -> Words {
    let mut words = with(&[name], [number(keys.len())]);
    words.extend(keys);
    words
}
