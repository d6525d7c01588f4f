//! What one client must see of its own keys, command by command.
//!
//! Nobody else writes these keys in this database, so every reply is known before it comes.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::{
    random::Random,
    wire::{Value, Words, words},
};

/// Keys of each type: few, so that most commands find something.
const KEYS: usize = 12;
const LIST_MAX: usize = 40;
const TEXT_MAX: usize = 2_000;

#[derive(Debug)]
pub(super) struct Model {
    /// Clients of one database differ by it.
    prefix: usize,
    texts: HashMap<Vec<u8>, Vec<u8>>,
    numbers: HashMap<Vec<u8>, i64>,
    lists: HashMap<Vec<u8>, VecDeque<Vec<u8>>>,
    hashes: HashMap<Vec<u8>, HashMap<Vec<u8>, Vec<u8>>>,
    sets: HashMap<Vec<u8>, HashSet<Vec<u8>>>,
}

impl Model {
    pub(super) fn new(prefix: usize) -> Self {
        Self {
            prefix,
            texts: HashMap::new(),
            numbers: HashMap::new(),
            lists: HashMap::new(),
            hashes: HashMap::new(),
            sets: HashMap::new(),
        }
    }

    /// Commands with their replies; at least `count`, a few more when the last is a transaction.
    pub(super) fn batch(&mut self, random: &mut Random, count: usize) -> Vec<(Words, Value)> {
        let mut batch = Vec::with_capacity(count);
        while batch.len() < count {
            if random.percent(2) {
                self.transaction(random, &mut batch);
            } else {
                batch.push(self.command(random));
            }
        }
        batch
    }

    fn transaction(&mut self, random: &mut Random, batch: &mut Vec<(Words, Value)>) {
        batch.push((words(&["MULTI"]), ok()));
        let mut replies = Vec::new();
        for _ in 0..random.between(0, 5) {
            let (command, reply) = self.single(random);
            batch.push((command, Value::Status(b"QUEUED".to_vec())));
            replies.push(reply);
        }
        batch.push((words(&["EXEC"]), Value::Array(replies)));
    }

    fn command(&mut self, random: &mut Random) -> (Words, Value) {
        match random.below(100) {
            0..70 => self.single(random),
            70..94 => self.several(random),
            // The proxy's own answers and errors keep their place among the nodes'.
            94..96 => {
                let text = text(random);
                (vec![b"ECHO".to_vec(), text.clone()], Value::Bulk(text))
            }
            96 => (words(&["PING"]), Value::Status(b"PONG".to_vec())),
            97 => (
                words(&["GET"]),
                Value::Error(b"ERR wrong number of arguments for 'get' command".to_vec()),
            ),
            98 => (
                words(&["NOSUCH", "a"]),
                Value::Error(
                    b"ERR unknown command 'NOSUCH', with args beginning with: 'a' ".to_vec(),
                ),
            ),
            _ => {
                let key = self.key(random, 'l');
                if self.lists.get(&key).is_none_or(VecDeque::is_empty) {
                    return (vec![b"LLEN".to_vec(), key], Value::Number(0));
                }
                let error = "WRONGTYPE Operation against a key holding the wrong kind of value";
                let reply = Value::Error(error.as_bytes().to_vec());
                (vec![b"GET".to_vec(), key], reply)
            }
        }
    }

    /// A command with one key.
    fn single(&mut self, random: &mut Random) -> (Words, Value) {
        match random.below(5) {
            0 => self.text(random),
            1 => self.number(random),
            2 => self.list(random),
            3 => self.hash(random),
            _ => self.set(random),
        }
    }

    fn text(&mut self, random: &mut Random) -> (Words, Value) {
        let key = self.key(random, 't');
        let value = text(random);
        match random.below(4) {
            0 => {
                self.texts.insert(key.clone(), value.clone());
                (vec![b"SET".to_vec(), key, value], ok())
            }
            1 => {
                let held = self.texts.entry(key.clone()).or_default();
                if held.len() > TEXT_MAX {
                    return (vec![b"STRLEN".to_vec(), key], size(held.len()));
                }
                held.extend_from_slice(&value);
                let length = size(held.len());
                (vec![b"APPEND".to_vec(), key, value], length)
            }
            _ => {
                let reply = bulk(self.texts.get(&key));
                (vec![b"GET".to_vec(), key], reply)
            }
        }
    }

    fn number(&mut self, random: &mut Random) -> (Words, Value) {
        let key = self.key(random, 'n');
        if random.percent(40) {
            let held = self.numbers.get(&key).map(|n| n.to_string().into_bytes());
            return (vec![b"GET".to_vec(), key], bulk(held.as_ref()));
        }
        let by = i64::try_from(random.below(1000)).unwrap_or_default() - 500;
        let held = self.numbers.entry(key.clone()).or_default();
        *held += by;
        let command = vec![b"INCRBY".to_vec(), key, by.to_string().into_bytes()];
        (command, Value::Number(*held))
    }

    fn list(&mut self, random: &mut Random) -> (Words, Value) {
        let key = self.key(random, 'l');
        let held = self.lists.entry(key.clone()).or_default();
        match random.below(4) {
            0 | 1 if held.len() < LIST_MAX => {
                let value = text(random);
                held.push_back(value.clone());
                (vec![b"RPUSH".to_vec(), key, value], size(held.len()))
            }
            2 => {
                let mut command = vec![b"LRANGE".to_vec(), key];
                command.extend(words(&["0", "3"]));
                let some = held.iter().take(4).cloned().map(Value::Bulk);
                (command, Value::Array(some.collect()))
            }
            _ => {
                let first = held.pop_front();
                (vec![b"LPOP".to_vec(), key], bulk(first.as_ref()))
            }
        }
    }

    fn hash(&mut self, random: &mut Random) -> (Words, Value) {
        let key = self.key(random, 'h');
        let field = format!("f{}", random.below(8)).into_bytes();
        let held = self.hashes.entry(key.clone()).or_default();
        match random.below(4) {
            0 | 1 => {
                let value = text(random);
                let new = held.insert(field.clone(), value.clone()).is_none();
                let command = vec![b"HSET".to_vec(), key, field, value];
                (command, Value::Number(i64::from(new)))
            }
            2 => {
                let reply = bulk(held.get(&field));
                (vec![b"HGET".to_vec(), key, field], reply)
            }
            _ => {
                let gone = held.remove(&field).is_some();
                let command = vec![b"HDEL".to_vec(), key, field];
                (command, Value::Number(i64::from(gone)))
            }
        }
    }

    fn set(&mut self, random: &mut Random) -> (Words, Value) {
        let key = self.key(random, 's');
        let member = random.below(20).to_string().into_bytes();
        let held = self.sets.entry(key.clone()).or_default();
        let (name, reply) = match random.below(4) {
            0 | 1 => ("SADD", held.insert(member.clone())),
            2 => ("SISMEMBER", held.contains(&member)),
            _ => ("SREM", held.remove(&member)),
        };
        let command = vec![name.as_bytes().to_vec(), key, member];
        (command, Value::Number(i64::from(reply)))
    }

    /// A command whose keys lie on several shards.
    fn several(&mut self, random: &mut Random) -> (Words, Value) {
        let count = random.between(1, 8);
        let keys: Vec<_> = (0..count).map(|_| self.key(random, 't')).collect();
        let named = |name: &str, keys: &[Vec<u8>]| {
            let mut command = words(&[name]);
            command.extend_from_slice(keys);
            command
        };
        match random.below(6) {
            0 => {
                let mut command = words(&["MSET"]);
                for key in keys {
                    let value = text(random);
                    self.texts.insert(key.clone(), value.clone());
                    command.extend([key, value]);
                }
                (command, ok())
            }
            1 => {
                let count = keys
                    .iter()
                    .filter(|k| self.texts.remove(*k).is_some())
                    .count();
                let name = *random.pick(&["DEL", "UNLINK"]);
                (named(name, &keys), size(count))
            }
            2 => {
                let count = keys.iter().filter(|k| self.texts.contains_key(*k)).count();
                let name = *random.pick(&["EXISTS", "TOUCH"]);
                (named(name, &keys), size(count))
            }
            _ => {
                let values = keys.iter().map(|key| bulk(self.texts.get(key)));
                let values = values.collect();
                (named("MGET", &keys), Value::Array(values))
            }
        }
    }

    fn key(&self, random: &mut Random, kind: char) -> Vec<u8> {
        let number = random.below(KEYS);
        format!("{kind}:{}:{number}", self.prefix).into_bytes()
    }
}

/// Mostly short; some cross the buffers' ends.
fn text(random: &mut Random) -> Vec<u8> {
    let length = match random.below(1000) {
        0..700 => random.below(20),
        700..990 => random.below(300),
        _ => random.below(70_000),
    };
    let first = random.below(256);
    (0..length)
        .map(|n| u8::try_from((first + n * 7) % 256).unwrap_or_default())
        .collect()
}

fn ok() -> Value {
    Value::Status(b"OK".to_vec())
}

fn size(count: usize) -> Value {
    Value::Number(i64::try_from(count).unwrap_or(i64::MAX))
}

fn bulk(held: Option<&Vec<u8>>) -> Value {
    held.map_or(Value::Null, |held| Value::Bulk(held.clone()))
}
