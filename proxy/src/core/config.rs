//! CONFIG: parameters of the engine and of the proxies, as one list.
//!
//! Invariants: no password, address or path of a node is shown. What is set is stored by the
//! controller and set on every node before the client hears OK.

use std::collections::BTreeMap;

use slotmesh_command::Command;
use slotmesh_resp::{Value, write};
use slotmesh_topology::parameter::{self, Values};

use super::Core;
use super::call::{Call, PeerRequest};
use super::dispatch::Flow;
use super::info::words_from;
use super::job::{Answers, Job, Round, Step};
use super::retry::Effect;
use super::spec::Request;
use crate::routing::RoutingTable;

/// Shown as if they were not set.
const HIDDEN: &[&str] = &[
    "aclfile",
    "bind",
    "bind-source-addr",
    "cluster-announce-hostname",
    "cluster-announce-ip",
    "dir",
    "include",
    "logfile",
    "masterauth",
    "masteruser",
    "pidfile",
    "primaryauth",
    "primaryuser",
    "replica-announce-ip",
    "replicaof",
    "requirepass",
    "slave-announce-ip",
    "slaveof",
    "unixsocket",
    "user",
];
const HIDDEN_PORTS: &[&str] = &[
    "replica-announce-port",
    "slave-announce-port",
    "unixsocketperm",
];

/// A proxy listens where it was told to when it was started.
const NOT_HERE: &str = "Unable to listen on this port. slotmesh: start a proxy with it";

const HELP: &[&str] = &[
    "CONFIG <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "GET <pattern>",
    "    Return parameters matching the glob-like <pattern> and their values.",
    "SET <directive> <value>",
    "    Set the configuration <directive> to <value>.",
    "RESETSTAT",
    "    Reset statistics reported by the INFO command.",
    "REWRITE",
    "    Rewrite the configuration file.",
    "HELP",
    "    Prints this help.",
];

impl Core {
    pub(super) fn config(&mut self, slot: u32, command: &Command, request: Request<'_>) -> Flow {
        let port = self.identity.port;
        match command.name {
            "config|get" => {
                let patterns = words_from(request, 2);
                let job = Get {
                    patterns,
                    port,
                    started: false,
                };
                self.start_job(slot, Box::new(job))
            }
            "config|set" if request.len() % 2 == 1 => {
                let text = b"ERR wrong number of arguments for 'config|set' command";
                self.reply_error(slot, text)
            }
            "config|set" => {
                let words = words_from(request, 2);
                self.note_tracking_limit(&words);
                let pairs = words.chunks_exact(2);
                let pairs = pairs
                    .map(|pair| (lower(&pair[0]), pair[1].clone()))
                    .collect();
                let job = Set {
                    pairs,
                    port,
                    asked: Asked::Nothing,
                };
                self.start_job(slot, Box::new(job))
            }
            "config|resetstat" => {
                let client_id = self.sessions.get(slot).map_or(0, |c| c.state.id);
                let job = ResetStat {
                    client_id,
                    started: false,
                };
                self.start_job(slot, Box::new(job))
            }
            // What is set is durable already.
            "config|rewrite" => self.reply_simple(slot, "OK"),
            _ => self.reply_with(slot, |out| {
                write::write_array_header(out, HELP.len());
                HELP.iter().for_each(|line| write::write_simple(out, line));
            }),
        }
    }
}

fn lower(name: &[u8]) -> String {
    String::from_utf8_lossy(name).to_ascii_lowercase()
}

/// What a client sees in the place of a node's value.
fn shown(name: &str, value: Vec<u8>, port: u16, table: &RoutingTable) -> Vec<u8> {
    match name {
        "port" => port.to_string().into_bytes(),
        "databases" => table.settings.databases.to_string().into_bytes(),
        _ if HIDDEN.contains(&name) => Vec::new(),
        _ if HIDDEN_PORTS.contains(&name) => b"0".to_vec(),
        _ => value,
    }
}

/// Names and values in a node's reply to CONFIG GET, in its order.
fn read_pairs(answer: &[u8]) -> Option<Vec<(String, Vec<u8>)>> {
    let (value, _) = Value::decode(answer).ok().flatten()?;
    let pair = |pair: &[Value]| Some((lower(pair[0].as_bytes()?), pair[1].as_bytes()?.to_vec()));
    value.as_items()?.chunks_exact(2).map(pair).collect()
}

#[derive(Debug)]
struct Get {
    patterns: Vec<Vec<u8>>,
    port: u16,
    started: bool,
}

impl Job for Get {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if !std::mem::replace(&mut self.started, true) {
            let shard = round.any_shard();
            for pattern in &self.patterns {
                // One each: engines before 7.0 take no more.
                round.ask(shard, Effect::Read, &[b"CONFIG", b"GET", pattern]);
            }
            return Step::Asked;
        }
        let mut all: Vec<(String, Vec<u8>)> = Vec::new();
        for answer in &answers {
            let Some(pairs) = read_pairs(answer) else {
                return round.pass(answer);
            };
            for (name, value) in pairs {
                if all.iter().all(|(known, _)| *known != name) {
                    let value = shown(&name, value, self.port, round.table);
                    all.push((name, value));
                }
            }
        }
        for known in parameter::PROXY {
            let name = known.name;
            if self
                .patterns
                .iter()
                .any(|p| slotmesh_acl::matches_nocase(p, name.as_bytes()))
            {
                let given = &round.table.settings.proxy_parameters;
                let value = parameter::proxy_value(given, known).as_bytes().to_vec();
                all.retain(|(other, _)| other != name);
                all.push((name.to_owned(), value));
            }
        }
        round.done(|out, protocol| {
            write::write_map_header(out, protocol, all.len());
            for (name, value) in &all {
                write::write_bulk(out, name.as_bytes());
                write::write_bulk(out, value);
            }
        })
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Nothing,
    /// What the parameters that nobody may change are now.
    Present,
    Change,
}

#[derive(Debug)]
struct Set {
    pairs: Vec<(String, Vec<u8>)>,
    port: u16,
    asked: Asked,
}

impl Job for Set {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        match self.asked {
            Asked::Nothing => {
                if let Some(text) = self.refusal() {
                    return round.fail(text.as_bytes());
                }
                self.asked = Asked::Present;
                let shard = round.any_shard();
                for name in self.fixed() {
                    round.ask(shard, Effect::Read, &[b"CONFIG", b"GET", name.as_bytes()]);
                }
                if self.fixed().next().is_some() {
                    return Step::Asked;
                }
                self.change(round)
            }
            Asked::Present => {
                if let Err(text) = self.drop_unchanged(&answers, round.table) {
                    return round.fail(text.as_bytes());
                }
                self.change(round)
            }
            Asked::Change => {
                let answer = answers.first().map(Vec::as_slice).unwrap_or_default();
                round.pass(answer)
            }
        }
    }
}

impl Set {
    /// Why nothing can be set at all.
    fn refusal(&self) -> Option<String> {
        for (at, (name, value)) in self.pairs.iter().enumerate() {
            if self.pairs[..at].iter().any(|(other, _)| other == name) {
                return Some(failed(name, "duplicate parameter"));
            }
            let known = parameter::PROXY.iter().find(|known| known.name == name);
            if let Some(known) = known
                && let text = String::from_utf8_lossy(value)
                && parameter::check_proxy(name, &text).is_err()
            {
                return Some(failed(name, &unfit(known.values, &text)));
            }
        }
        None
    }

    /// Those that only an operator may change, or only at the creation of the instance.
    fn fixed(&self) -> impl Iterator<Item = &str> {
        let names = self.pairs.iter().map(|(name, _)| name.as_str());
        names.filter(|name| is_fixed(name))
    }

    /// Setting what is so already is no change.
    fn drop_unchanged(&mut self, answers: &Answers, table: &RoutingTable) -> Result<(), String> {
        let present: BTreeMap<String, Vec<u8>> = answers
            .iter()
            .filter_map(|a| read_pairs(a))
            .flatten()
            .collect();
        for (name, value) in self.pairs.iter().filter(|(name, _)| is_fixed(name)) {
            let Some(now) = present.get(name) else {
                return Err(unknown(name));
            };
            if shown(name, now.clone(), self.port, table) != *value {
                let why = match name.as_str() {
                    "port" => NOT_HERE,
                    _ => "can't set immutable config",
                };
                return Err(failed(name, why));
            }
        }
        self.pairs.retain(|(name, _)| !is_fixed(name));
        Ok(())
    }

    fn change(&mut self, round: &mut Round<'_>) -> Step {
        self.asked = Asked::Change;
        let (mut engine, mut proxy) = (Vec::new(), Vec::new());
        for (name, value) in &self.pairs {
            let Ok(value) = String::from_utf8(value.clone()) else {
                return round.fail(failed(name, "the value is not text").as_bytes());
            };
            if parameter::PROXY.iter().any(|known| known.name == name) {
                proxy.push((name.clone(), value));
                continue;
            }
            if name == "client-output-buffer-limit"
                && let Some(limit) = subscribers_limit(&value)
            {
                // Subscribers are clients of the proxy.
                proxy.push(("client_output_buffer_limit_pubsub".to_owned(), limit));
            }
            engine.push((name.clone(), value));
        }
        if engine.is_empty() && proxy.is_empty() {
            return round.done(|out, _| write::write_simple(out, "OK"));
        }
        round.call(Call::Parameters { engine, proxy });
        Step::Asked
    }
}

fn is_fixed(name: &str) -> bool {
    parameter::is_reserved(name) || parameter::boot_only_of(name).is_some()
}

fn unknown(name: &str) -> String {
    format!("ERR Unknown option or number of arguments for CONFIG SET - '{name}'")
}

fn failed(name: &str, why: &str) -> String {
    format!("ERR CONFIG SET failed (possibly related to argument '{name}') - {why}")
}

/// In Redis's words, where it has such parameters.
fn unfit(values: Values, given: &str) -> String {
    match values {
        Values::OneOf(words) => {
            let words = words.join(", ");
            format!("argument(s) must be one of the following: {words}")
        }
        Values::Number { .. } if slotmesh_resp::parse_i64(given.as_bytes()).is_none() => {
            "argument couldn't be parsed into an integer".to_owned()
        }
        Values::Number { min, max } => {
            format!("argument must be between {min} and {max} inclusive")
        }
        Values::BufferLimit => format!("argument must be {values}"),
    }
}

/// `hard soft seconds` of subscribers in `normal 0 0 0 pubsub 32mb 8mb 60`.
fn subscribers_limit(value: &str) -> Option<String> {
    let words: Vec<&str> = value.split_ascii_whitespace().collect();
    let at = words
        .iter()
        .position(|word| word.eq_ignore_ascii_case("pubsub"))?;
    let [hard, soft, seconds] = words.get(at + 1..at + 4)? else {
        return None;
    };
    let seconds: u64 = seconds.parse().ok()?;
    Some(format!("{} {} {seconds}", bytes(hard)?, bytes(soft)?))
}

/// `8mb` as a number, as engines read it.
fn bytes(text: &str) -> Option<u64> {
    let text = text.to_ascii_lowercase();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: u64 = match &text[digits.len()..] {
        "" | "b" => 1,
        "k" => 1000,
        "kb" => 1 << 10,
        "m" => 1_000_000,
        "mb" => 1 << 20,
        "g" => 1_000_000_000,
        "gb" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[derive(Debug)]
struct ResetStat {
    client_id: u64,
    started: bool,
}

impl Job for ResetStat {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if std::mem::replace(&mut self.started, true) {
            let error = answers.iter().find(|answer| answer.first() == Some(&b'-'));
            return match error {
                Some(error) => round.pass(error),
                None => round.done(|out, _| write::write_simple(out, "OK")),
            };
        }
        for shard in round.table.all_shards() {
            // Twice is as good as once.
            round.ask(shard, Effect::Read, &[b"CONFIG", b"RESETSTAT"]);
        }
        round.call(Call::Peers(PeerRequest {
            client_id: self.client_id,
            words: vec![b"resetstat".to_vec()],
        }));
        Step::Asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_subscribers_is_found_among_others() {
        let limit = |text| subscribers_limit(text);
        assert_eq!(limit("pubsub 32mb 8mb 60").unwrap(), "33554432 8388608 60");
        assert_eq!(
            limit("normal 0 0 0 pubsub 100000 0 0").unwrap(),
            "100000 0 0"
        );
        assert_eq!(limit("normal 0 0 0"), None);
        assert_eq!(limit("pubsub 1x 0 0"), None);
    }
}
