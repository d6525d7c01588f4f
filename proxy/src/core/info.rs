//! INFO: what the nodes say, merged, with what is the proxy's own in its place.
//!
//! Invariants: no reply names an address or a path of a node; counts of clients and of commands that
//! never reach a node are those of this process.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use slotmesh_command::Command;
use slotmesh_resp::{Value, parse_i64, write};
use slotmesh_topology::Slot;

use super::call::{Call, PeerRequest};
use super::dispatch::{Flow, NOT_SERVED};
use super::info_text::{InfoText, Section};
use super::job::{Answers, Job, Round, Step};
use super::retry::Effect;
use super::spec::Request;
use super::{Core, Identity, tally};
use crate::routing::{NO_SHARD, RoutingTable, ShardNo};

const NO_SUCH_NODE: &[u8] = b"ERR no such db node";
const NOT_AN_INTEGER: &[u8] = b"ERR value is not an integer or out of range";

/// INFO of the whole instance.
#[derive(Debug)]
struct Info {
    sections: Vec<Vec<u8>>,
    identity: Arc<Identity>,
    client_id: u64,
    started: bool,
}

/// INFO of one node.
#[derive(Debug)]
struct NodeInfo {
    sections: Vec<Vec<u8>>,
    place: (i64, Option<i64>),
    port: u16,
    started: bool,
}

/// The shard with this index.
pub(super) fn shard_at(table: &RoutingTable, index: i64) -> Option<ShardNo> {
    let is_it = |no: &ShardNo| {
        let route = table.shards.get(usize::from(*no)).and_then(Option::as_ref);
        route.is_some_and(|route| i64::from(route.index) == index)
    };
    table.all_shards().into_iter().find(is_it)
}

impl Core {
    pub(super) fn info(&mut self, slot: u32, request: Request<'_>) -> Flow {
        if request.len() == 3 && request.is(1, "key") {
            return self.info_key(slot, request.arg(2));
        }
        let client_id = self.sessions.get(slot).map_or(0, |c| c.state.id);
        let job = Info {
            sections: words_from(request, 1),
            identity: Arc::clone(&self.identity),
            client_id,
            started: false,
        };
        self.start_job(slot, Box::new(job))
    }

    /// INFO KEY: where a key is.
    fn info_key(&mut self, slot: u32, key: &[u8]) -> Flow {
        let shard = self.table.shard_of(key);
        let Some(Some(route)) = self.table.shards.get(usize::from(shard)) else {
            return self.refuse(slot, NOT_SERVED.as_bytes());
        };
        let text = format!("slot:{} node_index:{}", Slot::of(key).number(), route.index);
        self.reply_with(slot, |out| write::write_bulk(out, text.as_bytes()))
    }

    /// IINFO and RIINFO.
    pub(super) fn info_by_index(
        &mut self,
        slot: u32,
        command: &Command,
        request: Request<'_>,
    ) -> Flow {
        let replica = command.name == "riinfo";
        let index = parse_i64(request.arg(1));
        let replica = replica.then(|| parse_i64(request.arg(2)));
        let (Some(index), None | Some(Some(_))) = (index, replica) else {
            return self.reply_error(slot, NOT_AN_INTEGER);
        };
        let job = NodeInfo {
            sections: words_from(request, if replica.is_some() { 3 } else { 2 }),
            place: (index, replica.flatten()),
            port: self.identity.port,
            started: false,
        };
        self.start_job(slot, Box::new(job))
    }

    /// What this worker has to say about itself in INFO, for whichever worker asks.
    pub(super) fn peer_info(&mut self, request: &PeerRequest) -> Option<Vec<u8>> {
        let mut reply = Vec::new();
        match request.words.first()?.as_slice() {
            b"info" => {
                let text = self.own_numbers();
                write::write_bulk(&mut reply, text.as_bytes());
            }
            b"resetstat" => {
                self.tally.reset();
                write::write_simple(&mut reply, "OK");
            }
            _ => return None,
        }
        Some(reply)
    }

    fn own_numbers(&self) -> String {
        let counters = &self.counters;
        let mut text = String::new();
        for (name, number) in [
            ("workers", 1),
            ("connected_clients", self.sessions.len() as u64),
            ("paused_clients", self.paused_clients()),
            ("commands", counters.commands),
            ("errors", counters.errors),
            ("own_errors", self.tally.errors_sum()),
            ("protocol_errors", counters.protocol_errors),
            ("retries", counters.retries),
            ("outcome_unknown", counters.outcome_unknown),
            ("hold_overdue", counters.hold_overdue),
            ("held_requests", counters.held_requests),
            ("node_losses", counters.node_losses),
        ] {
            let _ = writeln!(text, "number|{name}|{number}");
        }
        self.tally.write(&mut text);
        text
    }
}

pub(super) fn words_from(request: Request<'_>, first: usize) -> Vec<Vec<u8>> {
    (first..request.len())
        .map(|at| request.arg(at).to_vec())
        .collect()
}

fn info_command(sections: &[Vec<u8>]) -> Vec<&[u8]> {
    let sections = sections.iter().map(Vec::as_slice);
    std::iter::once(&b"INFO"[..]).chain(sections).collect()
}

/// The text of a bulk string; an error stays one.
fn text_of(answer: &[u8]) -> Result<InfoText, &[u8]> {
    match Value::decode(answer) {
        Ok(Some((Value::Bulk(text), _))) => Ok(InfoText::parse(&String::from_utf8_lossy(&text))),
        _ => Err(answer),
    }
}

impl Job for Info {
    fn next(&mut self, mut answers: Answers, round: &mut Round<'_>) -> Step {
        let shards = round.table.all_shards();
        if !std::mem::replace(&mut self.started, true) {
            let command = info_command(&self.sections);
            for shard in shards {
                round.ask(shard, Effect::Read, &command);
            }
            round.call(Call::Peers(PeerRequest {
                client_id: self.client_id,
                words: vec![b"info".to_vec()],
            }));
            return Step::Asked;
        }
        let own = Own::read(&answers.pop().unwrap_or_default());
        let mut texts = Vec::with_capacity(answers.len());
        for answer in &answers {
            match text_of(answer) {
                Ok(text) => texts.push(text),
                Err(error) => return round.pass(error),
            }
        }
        let mut text = InfoText::merge(&texts);
        text.hide_places(self.identity.port);
        self.put_own(&mut text, &own);
        if self.wants_proxy() {
            text.sections.push(own.section(round.table));
        }
        let text = text.write();
        round.done(|out, protocol| {
            write::write_verbatim(out, protocol, *b"txt", text.as_bytes());
        })
    }
}

impl Info {
    fn wants_proxy(&self) -> bool {
        let wants = |section: &Vec<u8>| {
            let names: [&[u8]; 4] = [b"proxy", b"default", b"all", b"everything"];
            names.iter().any(|name| section.eq_ignore_ascii_case(name))
        };
        self.sections.is_empty() || self.sections.iter().any(wants)
    }

    /// Puts what is the proxy's in the place of what is a node's.
    fn put_own(&self, text: &mut InfoText, own: &Own) {
        if let Some(server) = text.section("Server") {
            server.replace("process_id", self.identity.pid);
            server.replace("run_id", &self.identity.run_id);
        }
        if let Some(clients) = text.section("Clients") {
            clients.replace("connected_clients", own.number("connected_clients"));
            clients.add("blocked_clients", own.number("paused_clients"));
        }
        if let Some(stats) = text.section("Stats") {
            let all = own.number("own_errors");
            stats.add("total_error_replies", all);
        }
        if let Some(errors) = text.section("Errorstats") {
            for (code, count) in &own.errors {
                let key = format!("errorstat_{code}");
                let before = errors.get(&key).and_then(|v| v.strip_prefix("count="));
                let before: u64 = before.and_then(|v| v.parse().ok()).unwrap_or(0);
                errors.lines.retain(|(name, _)| *name != key);
                errors
                    .lines
                    .push((key, format!("count={}", before + count)));
            }
        }
        if let Some(commands) = text.section("Commandstats") {
            own.put_calls(commands);
        }
    }
}

/// What all workers of the process have counted.
#[derive(Debug, Default)]
struct Own {
    numbers: BTreeMap<String, u64>,
    /// Calls, rejected, failed; by name.
    calls: BTreeMap<String, [u64; 3]>,
    errors: BTreeMap<String, u64>,
}

impl Own {
    fn read(answer: &[u8]) -> Self {
        let mut own = Self::default();
        let decoded = Value::decode(answer).ok().flatten();
        let workers = decoded.as_ref().and_then(|(value, _)| value.as_items());
        for text in workers.into_iter().flatten().filter_map(Value::as_str) {
            text.lines().for_each(|line| own.read_line(line));
        }
        own
    }

    fn read_line(&mut self, line: &str) {
        let words: Vec<&str> = line.split('|').collect();
        let number = |at: usize| words.get(at).and_then(|w| w.parse().ok()).unwrap_or(0_u64);
        let [kind, name, ..] = words[..] else {
            return;
        };
        match kind {
            "number" => *self.numbers.entry(name.to_owned()).or_default() += number(2),
            "error" => *self.errors.entry(name.to_owned()).or_default() += number(2),
            _ => {
                let sums = self.calls.entry(name.replace(':', "|")).or_default();
                (0..3).for_each(|at| sums[at] += number(2 + at));
            }
        }
    }

    fn number(&self, name: &str) -> u64 {
        self.numbers.get(name).copied().unwrap_or(0)
    }

    fn put_calls(&self, section: &mut Section) {
        let name_of = |key: &str| key.strip_prefix("cmdstat_").unwrap_or(key).to_owned();
        section
            .lines
            .retain(|(key, _)| !tally::counts_here(&name_of(key)));
        for (name, [calls, rejected, failed]) in &self.calls {
            let key = format!("cmdstat_{name}");
            let mut sums = [*calls, 0, *rejected, *failed];
            if let Some(at) = section.lines.iter().position(|(known, _)| *known == key) {
                let (_, line) = section.lines.remove(at);
                let field = |name: &str| {
                    let mut fields = line.split(',').filter_map(|f| f.split_once('='));
                    let found = fields.find(|(known, _)| *known == name);
                    found.and_then(|(_, v)| v.parse().ok()).unwrap_or(0_u64)
                };
                let known = ["calls", "usec", "rejected_calls", "failed_calls"].map(field);
                (0..4).for_each(|at| sums[at] += known[at]);
            }
            let [calls, usec, rejected, failed] = sums;
            let per_call = usec as f64 / calls.max(1) as f64;
            let line = format!(
                "calls={calls},usec={usec},usec_per_call={per_call:.2},\
                 rejected_calls={rejected},failed_calls={failed}"
            );
            section.lines.push((key, line));
        }
    }

    fn section(&self, table: &RoutingTable) -> Section {
        let mut lines = vec![
            ("shards".to_owned(), table.all_shards().len().to_string()),
            ("topology_revision".to_owned(), table.revision.to_string()),
        ];
        let own = self.numbers.iter();
        lines.extend(own.map(|(name, number)| (name.clone(), number.to_string())));
        Section {
            name: "Proxy".to_owned(),
            lines,
        }
    }
}

impl Job for NodeInfo {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if std::mem::replace(&mut self.started, true) {
            let answer = answers.first().map(Vec::as_slice).unwrap_or_default();
            let mut text = match text_of(answer) {
                Ok(text) => text,
                Err(error) => return round.pass(error),
            };
            text.hide_places(self.port);
            let text = text.write();
            return round.done(|out, protocol| {
                write::write_verbatim(out, protocol, *b"txt", text.as_bytes());
            });
        }
        let (index, replica) = self.place;
        let shard = shard_at(round.table, index).unwrap_or(NO_SHARD);
        let command = info_command(&self.sections);
        match replica.map(usize::try_from) {
            _ if shard == NO_SHARD => return round.fail(NO_SUCH_NODE),
            None => round.ask(shard, Effect::Read, &command),
            Some(Ok(replica)) => round.ask_replica(shard, replica, &command),
            Some(Err(_)) => return round.fail(NO_SUCH_NODE),
        }
        Step::Asked
    }
}
