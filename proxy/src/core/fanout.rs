//! Commands that concern every shard: which go to all, which to one, and how answers become one.
//!
//! Invariant: an answer is merged only if the merged one means the same as one Redis's with all the
//! data; else it is one shard's, and says nothing about data.

use slotmesh_command::{Command, Gather};
use slotmesh_resp::{Value, parse_i64, write};

use super::Core;
use super::dispatch::{CROSS_SLOT, Flow};
use super::fanout_merge::{
    RUNNING_DEPTH, digest, history, latest, running, slow, write_histogram, write_map, write_memory,
};
use super::info::words_from;
use super::job::{Answers, Job, Round, Step};
use super::queue::Kind;
use super::retry::Effect;
use super::spec::{self, Request};
use crate::routing::{NO_SHARD, ShardNo};

/// How many slow commands SLOWLOG GET shows if it is not told.
const SLOW_SHOWN: i64 = 10;
/// A node hears nobody until a script has run for its own limit, which is 5 s; each try waits 1 s.
const ALONE_TRIES: u32 = 8;
/// In the answer of such a node.
const NO_ANSWER: &[u8] = b"slotmesh: the node could not be reached";
/// Keys that DEBUG POPULATE makes in one round.
const POPULATE_ROUND: u64 = 1000;

/// DEBUG's subcommands that end a node's process, or keep it from answering for good.
const DEBUG_ENDS: &[&str] = &[
    "segfault",
    "panic",
    "restart",
    "crash-and-recover",
    "oom",
    "assert",
    "sigalrm",
];
/// Those with a key behind them.
const DEBUG_KEYED: &[&str] = &[
    "object",
    "listpack",
    "ziplist",
    "quicklist",
    "sdslen",
    "htstats-key",
    "digest-value",
];
/// Those that any node answers alike.
const DEBUG_ANYWHERE: &[&str] = &[
    "help",
    "protocol",
    "error",
    "structsize",
    "stringmatch-len",
    "mallctl",
    "mallctl-str",
    "htstats",
    "reply",
];

impl Round<'_> {
    /// A shard that answers for all.
    pub(super) fn any_shard(&self) -> ShardNo {
        self.table.all_shards().first().copied().unwrap_or(NO_SHARD)
    }
}

impl Core {
    /// A command for all shards.
    pub(super) fn fan_out(
        &mut self,
        slot: u32,
        command: &'static Command,
        gather: Gather,
        request: Request<'_>,
    ) -> Flow {
        match command.name {
            "slowlog|get" => self.slowlog(slot, request),
            "latency|latest" if self.table.only_shard().is_none() => {
                self.gather_all(slot, request, Shape::Latest)
            }
            "latency|history" if self.table.only_shard().is_none() => {
                self.gather_all(slot, request, Shape::History)
            }
            "script|kill" | "function|kill" => self.gather_alone(slot, request, Shape::Killed),
            "script|load" | "script|flush" => self.script_to_all(slot, command, gather, request),
            _ => self.send_to_all(slot, command, gather, request),
        }
    }

    /// A command without a key that one shard can answer.
    pub(super) fn keyless(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        let many = self.table.only_shard().is_none();
        match command.name {
            "debug" => self.debug(slot, command, request),
            "memory|stats" if many => self.gather_all(slot, request, Shape::Memory),
            "latency|histogram" if many => self.gather_all(slot, request, Shape::Histogram),
            // Shows the function that runs: not behind it on the same connection.
            "function|stats" => self.gather_alone(slot, request, Shape::Running),
            _ => self.send_to_owner(slot, command, request),
        }
    }

    fn debug(&mut self, slot: u32, command: &'static Command, request: Request<'_>) -> Flow {
        let word = String::from_utf8_lossy(request.arg(1)).to_ascii_lowercase();
        let word = word.as_str();
        if DEBUG_ENDS.contains(&word) {
            let text = format!(
                "ERR slotmesh: 'debug {word}' is not for clients: nodes are started and stopped by \
                 their host's agent"
            );
            return self.refuse(slot, text.as_bytes());
        }
        let effect = spec::effect(command);
        if let Some(only) = self.table.only_shard() {
            return self.forward(slot, only, Kind::Single, effect, 0, request.frame);
        }
        match word {
            _ if DEBUG_KEYED.contains(&word) && request.len() > 2 => {
                let shard = self.table.shard_of(request.arg(2));
                let same = |at| self.table.shard_of(request.arg(at)) == shard;
                if word == "digest-value" && !(3..request.len()).all(same) {
                    return self.refuse(slot, CROSS_SLOT.as_bytes());
                }
                self.forward(slot, shard, Kind::Single, effect, 0, request.frame)
            }
            _ if DEBUG_ANYWHERE.contains(&word) => self.send_to_owner(slot, command, request),
            "digest" => self.gather_all(slot, request, Shape::Digest),
            "populate" => self.populate(slot, request),
            _ => self.send_to_all(slot, command, Gather::AllOk, request),
        }
    }

    fn slowlog(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let limit = match request.len() {
            2 => Some(SLOW_SHOWN),
            _ => parse_i64(request.arg(2)),
        };
        // What is no number, a node refuses in its own words.
        self.gather_all(slot, request, Shape::Slow(limit.unwrap_or(0)))
    }

    fn gather_all(&mut self, slot: u32, request: Request<'_>, shape: Shape) -> Flow {
        self.start_gathering(slot, request, shape, false)
    }

    /// Past what each node is executing for this proxy.
    fn gather_alone(&mut self, slot: u32, request: Request<'_>, shape: Shape) -> Flow {
        self.start_gathering(slot, request, shape, true)
    }

    fn start_gathering(
        &mut self,
        slot: u32,
        request: Request<'_>,
        shape: Shape,
        alone: bool,
    ) -> Flow {
        let job = GatherAll {
            words: words_from(request, 0),
            shape,
            alone,
            asked: 0,
        };
        self.start_job(slot, Box::new(job))
    }

    /// DEBUG POPULATE count [prefix] [size]: the keys where they belong.
    fn populate(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let words = words_from(request, 2);
        let number = |at: usize| words.get(at).map(|word| parse_i64(word));
        let (Some(Some(count)), None | Some(Some(_))) = (number(0), number(2)) else {
            return self.reply_error(slot, b"ERR value is not an integer or out of range");
        };
        let job = Populate {
            next: 0,
            count: count.unsigned_abs(),
            prefix: words.get(1).cloned().unwrap_or_else(|| b"key".to_vec()),
            size: number(2)
                .flatten()
                .map_or(0, |size| size.clamp(0, 1 << 20) as usize),
        };
        self.start_job(slot, Box::new(job))
    }
}

/// How the answers of all shards become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// SLOWLOG GET, with how many to show.
    Slow(i64),
    Latest,
    History,
    Histogram,
    Memory,
    Digest,
    /// The first that is no error, else the most telling error.
    Killed,
    /// FUNCTION STATS: where something runs.
    Running,
}

/// The same question to all shards.
#[derive(Debug)]
struct GatherAll {
    words: Vec<Vec<u8>>,
    shape: Shape,
    alone: bool,
    asked: u32,
}

impl GatherAll {
    fn ask(&mut self, round: &mut Round<'_>) -> Step {
        self.asked += 1;
        let shards = round.table.all_shards();
        let words: Vec<&[u8]> = self.words.iter().map(Vec::as_slice).collect();
        if shards.is_empty() {
            round.ask(NO_SHARD, Effect::Read, &words);
        }
        for shard in shards {
            match self.alone {
                true => round.ask_aside(shard, &words),
                false => round.ask(shard, Effect::Read, &words),
            }
        }
        Step::Asked
    }
}

impl Job for GatherAll {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        let deaf = |answer: &Vec<u8>| memchr::memmem::find(answer, NO_ANSWER).is_some();
        let again = self.alone && self.asked < ALONE_TRIES && answers.iter().any(deaf);
        if self.asked == 0 || again {
            return self.ask(round);
        }
        if self.shape == Shape::Killed {
            return killed(&answers, round);
        }
        let mut values = Vec::with_capacity(answers.len());
        for answer in &answers {
            match Value::decode(answer) {
                Ok(Some((Value::Error(_), _))) | Err(_) | Ok(None) => return round.pass(answer),
                Ok(Some((value, _))) => values.push(value),
            }
        }
        let merged = match self.shape {
            Shape::Slow(limit) => slow(values, limit),
            Shape::Latest => latest(&values),
            Shape::History => history(values),
            Shape::Histogram => return round.done(|out, p| write_histogram(out, p, &values)),
            Shape::Memory => return round.done(|out, p| write_memory(out, p, &values)),
            Shape::Digest => digest(&values),
            Shape::Running => {
                let value = running(values);
                return round.done(|out, p| write_map(out, p, &value, RUNNING_DEPTH));
            }
            Shape::Killed => Value::Null,
        };
        round.done(|out, protocol| merged.encode(out, protocol))
    }
}

/// A script runs on one shard only: the others say that nothing runs.
fn killed(answers: &Answers, round: &mut Round<'_>) -> Step {
    let good = answers.iter().find(|answer| answer.first() != Some(&b'-'));
    let telling = answers
        .iter()
        .find(|answer| !answer.starts_with(b"-NOTBUSY"));
    let answer = good.or(telling).or(answers.first());
    round.pass(answer.map(Vec::as_slice).unwrap_or_default())
}

#[derive(Debug)]
struct Populate {
    next: u64,
    count: u64,
    prefix: Vec<u8>,
    size: usize,
}

impl Job for Populate {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if let Some(error) = answers.iter().find(|answer| answer.first() == Some(&b'-')) {
            return round.pass(error);
        }
        if self.next >= self.count {
            return round.done(|out, _| write::write_simple(out, "OK"));
        }
        let end = self.count.min(self.next + POPULATE_ROUND);
        for number in self.next..end {
            let key = [&self.prefix[..], b":", number.to_string().as_bytes()].concat();
            let mut value = format!("value:{number}").into_bytes();
            if self.size > 0 {
                value.resize(self.size, 0);
            }
            round.ask_owner(&key, Effect::Write, &[b"SETNX", &key, &value]);
        }
        self.next = end;
        Step::Asked
    }
}
