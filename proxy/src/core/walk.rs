//! SCAN and RANDOMKEY over all shards, ISCAN over one; HSCAN, SSCAN and ZSCAN over one key.
//!
//! Invariants: a cursor carries all there is to know, so any proxy goes on with it; a shard is walked
//! from 0 to its own end, or once more from 0 if another node has become its primary: nodes order
//! their keys differently, so the old cursor would miss some.
//!
//! A cursor is `(node cursor × 64 + epoch mod 64) × 1024 + shard index`. That stays below 2^53 for
//! tables of up to 2^37 keys, which matters to clients that keep numbers as floating point. That of
//! one key's walk is `node cursor × 64 + epoch mod 64`.

use std::sync::Arc;

use slotmesh_command::Command;
use slotmesh_resp::{Value, parse_i64, write};

use super::Core;
use super::dispatch::Flow;
use super::info::{shard_at, words_from};
use super::job::{Answers, Job, Round, Step};
use super::queue::Kind;
use super::retry::Effect;
use super::spec::{self, Request};
use crate::routing::{RoutingTable, ShardNo, ShardRoute};

const SHARDS_MAX: u64 = 1024;
/// How many successive primaries of a shard are told apart.
const EPOCHS: u64 = 64;
const INVALID_CURSOR: &[u8] = b"ERR invalid cursor";
const NO_SUCH_NODE: &[u8] = b"ERR no such db node";

impl Core {
    /// A command that goes from shard to shard.
    pub(super) fn walk(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        if let Some(key) = command.only_key() {
            return self.walk_key(slot, command, request, request.arg(key));
        }
        // A cursor has to outlive its node even where there is one shard.
        if command.name != "scan" && self.table.only_shard().is_some() {
            return self.send_to_owner(slot, command, request); // as Redis does it
        }
        let job: Box<dyn Job> = match command.name {
            "scan" => match parse_cursor(request.arg(1)) {
                Some(cursor) => Box::new(Scan {
                    cursor,
                    options: words_from(request, 2),
                    asked: None,
                }),
                None => return self.reply_error(slot, INVALID_CURSOR),
            },
            _ => Box::new(RandomKey {
                random: self.now_unix_us ^ self.now_us.rotate_left(32) ^ u64::from(slot),
                asked: Vec::new(),
                sizes_known: false,
            }),
        };
        self.start_job(slot, job)
    }

    /// HSCAN, SSCAN and ZSCAN.
    fn walk_key(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
        key: &[u8],
    ) -> Flow {
        let Some(cursor) = parse_cursor(request.arg(2)) else {
            return self.reply_error(slot, INVALID_CURSOR);
        };
        let job = KeyScan {
            name: command.name,
            key: key.to_vec(),
            cursor,
            options: words_from(request, 3),
            asked_epoch: None,
        };
        self.start_job(slot, Box::new(job))
    }

    /// IINFO, RIINFO and ISCAN.
    pub(super) fn by_index(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        if command.name != "iscan" {
            return self.info_by_index(slot, command, request);
        }
        let Some(index) = parse_i64(request.arg(1)) else {
            let text = b"ERR value is not an integer or out of range";
            return self.reply_error(slot, text);
        };
        let Some(shard) = shard_at(&self.table, index) else {
            return self.reply_error(slot, NO_SUCH_NODE);
        };
        let mut frame = self.sessions.pool.take();
        write::write_array_header(&mut frame, request.len() - 1);
        write::write_bulk(&mut frame, b"SCAN");
        for at in 2..request.len() {
            write::write_bulk(&mut frame, request.arg(at));
        }
        let flow = self.forward(slot, shard, Kind::Single, spec::effect(command), 0, &frame);
        self.sessions.pool.give(frame);
        flow
    }
}

/// A cursor as Redis reads it: an unsigned number of 64 bits, with a sign if one likes.
fn parse_cursor(text: &[u8]) -> Option<u64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        digits => (false, digits),
    };
    if digits.is_empty() && text.is_empty() {
        return Some(0);
    }
    let plain = digits.iter().all(u8::is_ascii_digit);
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    plain.then_some(if negative {
        number.wrapping_neg()
    } else {
        number
    })
}

/// The first shard from this index on.
fn next_shard(table: &RoutingTable, from: u64) -> Option<(ShardNo, &Arc<ShardRoute>)> {
    let routes = table.all_shards().into_iter().filter_map(|no| {
        let route = table.shards.get(usize::from(no))?.as_ref()?;
        Some((no, route))
    });
    let mut later = routes.filter(|(_, route)| u64::from(route.index) >= from);
    later.next()
}

/// `None` if it does not fit.
fn join(node_cursor: u64, epoch: u64, index: u32) -> Option<u64> {
    let upper = node_cursor
        .checked_mul(EPOCHS)?
        .checked_add(epoch % EPOCHS)?;
    upper.checked_mul(SHARDS_MAX)?.checked_add(u64::from(index))
}

/// SCAN: one step, at one shard.
#[derive(Debug)]
struct Scan {
    cursor: u64,
    options: Vec<Vec<u8>>,
    /// The index of the shard that was asked, and its epoch then.
    asked: Option<(u64, u64)>,
}

impl Job for Scan {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        let table = round.table;
        let Some((index, epoch)) = self.asked else {
            let (index, upper) = (self.cursor % SHARDS_MAX, self.cursor / SHARDS_MAX);
            let Some((shard, route)) = next_shard(table, index) else {
                return answer(round, 0, &[]); // the shards behind it are gone
            };
            let same = u64::from(route.index) == index && route.epoch % EPOCHS == upper % EPOCHS;
            let node_cursor = if same { upper / EPOCHS } else { 0 };
            return self.ask(round, shard, route, node_cursor);
        };
        let reply = answers.first().map(Vec::as_slice).unwrap_or_default();
        let Some((node_cursor, keys)) = split_reply(reply) else {
            return round.pass(reply);
        };
        let here = next_shard(table, index).filter(|(_, route)| u64::from(route.index) == index);
        let cursor = match here {
            // It may have ended early: the last step was asked of one node and answered by another.
            Some((shard, route)) if node_cursor == 0 && route.epoch != epoch => {
                return self.ask(round, shard, route, 0);
            }
            // If the primary changed, the next step finds out and begins again.
            Some((_, route)) if node_cursor != 0 => join(node_cursor, epoch, route.index),
            _ => match next_shard(table, index + 1) {
                Some((_, route)) => join(0, route.epoch, route.index),
                None => Some(0),
            },
        };
        match cursor {
            Some(cursor) => answer(round, cursor, keys),
            None => round.fail(b"ERR slotmesh: the shard has too many keys to be walked"),
        }
    }
}

impl Scan {
    fn ask(
        &mut self,
        round: &mut Round<'_>,
        shard: ShardNo,
        route: &ShardRoute,
        node_cursor: u64,
    ) -> Step {
        self.asked = Some((u64::from(route.index), route.epoch));
        let text = node_cursor.to_string();
        let options = self.options.iter().map(Vec::as_slice);
        let command = [b"SCAN", text.as_bytes()].into_iter().chain(options);
        round.ask(shard, Effect::Read, &command.collect::<Vec<_>>());
        Step::Asked
    }
}

/// HSCAN, SSCAN or ZSCAN: one step.
#[derive(Debug)]
struct KeyScan {
    name: &'static str,
    key: Vec<u8>,
    cursor: u64,
    options: Vec<Vec<u8>>,
    /// Of the shard when it was asked.
    asked_epoch: Option<u64>,
}

impl Job for KeyScan {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        let shard = round.shard_of(&self.key);
        let route = round.table.shards.get(usize::from(shard));
        let epoch = route
            .and_then(Option::as_ref)
            .map_or(0, |route| route.epoch);
        let Some(asked) = self.asked_epoch else {
            let same = epoch % EPOCHS == self.cursor % EPOCHS;
            let node_cursor = if same { self.cursor / EPOCHS } else { 0 };
            return self.ask(round, epoch, node_cursor);
        };
        let reply = answers.first().map(Vec::as_slice).unwrap_or_default();
        let Some((node_cursor, members)) = split_reply(reply) else {
            return round.pass(reply);
        };
        if node_cursor == 0 && asked != epoch && self.cursor != 0 {
            return self.ask(round, epoch, 0); // it may have ended early, as with SCAN
        }
        let upper = node_cursor.checked_mul(EPOCHS);
        match upper.and_then(|upper| upper.checked_add(asked % EPOCHS)) {
            _ if node_cursor == 0 => answer(round, 0, members),
            Some(cursor) => answer(round, cursor, members),
            None => round.fail(b"ERR slotmesh: the key has too many members to be walked"),
        }
    }
}

impl KeyScan {
    fn ask(&mut self, round: &mut Round<'_>, epoch: u64, node_cursor: u64) -> Step {
        self.asked_epoch = Some(epoch);
        let text = node_cursor.to_string();
        let words: [&[u8]; 3] = [self.name.as_bytes(), &self.key, text.as_bytes()];
        let options = self.options.iter().map(Vec::as_slice);
        let command: Vec<&[u8]> = words.into_iter().chain(options).collect();
        round.ask_owner(&self.key, Effect::Read, &command);
        Step::Asked
    }
}

fn answer(round: &mut Round<'_>, cursor: u64, keys: &[u8]) -> Step {
    round.done(|out, _| {
        write::write_array_header(out, 2);
        write::write_bulk(out, cursor.to_string().as_bytes());
        if keys.is_empty() {
            write::write_array_header(out, 0);
        } else {
            out.extend_from_slice(keys);
        }
    })
}

/// The cursor in a reply to SCAN, and the frame of its keys.
fn split_reply(reply: &[u8]) -> Option<(u64, &[u8])> {
    let rest = reply.strip_prefix(b"*2\r\n")?;
    let (cursor, consumed) = Value::decode(rest).ok().flatten()?;
    Some((cursor.as_str()?.parse().ok()?, &rest[consumed..]))
}

/// RANDOMKEY: each shard as likely as it has keys.
#[derive(Debug)]
struct RandomKey {
    random: u64,
    /// Shards that may have keys; first DBSIZE of all, then RANDOMKEY of the last.
    asked: Vec<(ShardNo, u64)>,
    sizes_known: bool,
}

impl Job for RandomKey {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if let Some(error) = answers.iter().find(|a| a.first() == Some(&b'-')) {
            return round.pass(error);
        }
        if self.asked.is_empty() && !self.sizes_known {
            self.asked = round
                .table
                .all_shards()
                .into_iter()
                .map(|no| (no, 0))
                .collect();
            if self.asked.is_empty() {
                return round.fail(super::dispatch::NOT_SERVED.as_bytes());
            }
            for (shard, _) in &self.asked {
                round.ask(*shard, Effect::Read, &[b"DBSIZE"]);
            }
            return Step::Asked;
        }
        if !std::mem::replace(&mut self.sizes_known, true) {
            for ((_, size), answer) in self.asked.iter_mut().zip(&answers) {
                let digits = answer.get(1..answer.len().saturating_sub(2));
                *size = digits.and_then(parse_i64).unwrap_or(0).max(0) as u64;
            }
            self.asked.retain(|(_, size)| *size > 0);
        } else if let Some(key) = answers.first().filter(|answer| !answer.starts_with(b"$-1")) {
            return round.pass(key);
        }
        match self.take() {
            Some(shard) => {
                round.ask(shard, Effect::Read, &[b"RANDOMKEY"]);
                Step::Asked
            }
            None => round.done(write::write_null),
        }
    }
}

impl RandomKey {
    /// Takes out one of the shards that are left.
    fn take(&mut self) -> Option<ShardNo> {
        let all: u64 = self.asked.iter().map(|(_, size)| size).sum();
        // A round of splitmix64: the clock's low bits alone are not even.
        let mut mixed = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        self.random = mixed ^ (mixed >> 31);
        let mut at = self.random.checked_rem(all)?;
        for index in 0..self.asked.len() {
            if at < self.asked[index].1 {
                return Some(self.asked.swap_remove(index).0);
            }
            at -= self.asked[index].1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_read_as_redis_reads_them() {
        assert_eq!(parse_cursor(b"0"), Some(0));
        assert_eq!(parse_cursor(b""), Some(0));
        assert_eq!(parse_cursor(b"+7"), Some(7));
        assert_eq!(parse_cursor(b"-1"), Some(u64::MAX));
        assert_eq!(parse_cursor(b"18446744073709551615"), Some(u64::MAX));
        for bad in ["x", " 1", "1x", "18446744073709551616", "-", "+-1", "--1"] {
            assert_eq!(parse_cursor(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_reply_is_split_into_cursor_and_keys() {
        let reply = b"*2\r\n$2\r\n12\r\n*1\r\n$1\r\na\r\n";
        assert_eq!(split_reply(reply), Some((12, &b"*1\r\n$1\r\na\r\n"[..])));
        assert_eq!(split_reply(b"-ERR syntax error\r\n"), None);
    }
}
