//! PUBSUB: what the whole instance listens to, put together from all shards.
//!
//! Invariant: the nodes know every proxy's subscriptions, one for each worker; only what this process
//! knows of its own clients is put in their place. Channels of the proxies' own are not shown.

use std::collections::BTreeSet;
use std::sync::Arc;

use slotmesh_command::Command;
use slotmesh_resp::{Value, write};

use super::Core;
use super::dispatch::Flow;
use super::job::{Answers, Job, Round, Step};
use super::pubsub_count::Audience;
use super::pubsub_frame::Heard;
use super::pubsub_topics::TopicKind;
use super::queue::Kind;
use super::retry::Effect;
use super::spec::Request;

impl Core {
    /// PUBSUB and its subcommands.
    pub(super) fn ask_about_topics(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        let words: Vec<Vec<u8>> = (2..request.len())
            .map(|at| request.arg(at).to_vec())
            .collect();
        let question = match command.name {
            "pubsub|channels" | "pubsub|shardchannels" if words.len() > 1 => {
                let word = String::from_utf8_lossy(request.arg(1)).into_owned();
                let text = format!(
                    "ERR unknown subcommand or wrong number of arguments for '{word}'. \
                     Try PUBSUB HELP."
                );
                return self.refuse(slot, text.as_bytes());
            }
            "pubsub|channels" => Question::Channels(TopicKind::Channel),
            "pubsub|shardchannels" => Question::Channels(TopicKind::ShardChannel),
            "pubsub|numsub" => Question::Counts(TopicKind::Channel),
            "pubsub|shardnumsub" => Question::Counts(TopicKind::ShardChannel),
            "pubsub|numpat" => Question::Patterns,
            // Any node knows the help text.
            _ => {
                let shard = self.table.keyless_shard();
                return self.forward(slot, shard, Kind::Single, Effect::Read, 0, request.frame);
            }
        };
        if matches!(question, Question::Counts(_)) && words.is_empty() {
            return self.reply_with(slot, |out| write::write_array_header(out, 0));
        }
        let job = TopicQuery {
            question,
            words,
            audience: Arc::clone(&self.pubsub.audience),
        };
        self.start_job(slot, Box::new(job))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    Channels(TopicKind),
    Counts(TopicKind),
    Patterns,
}

impl Question {
    fn word(self) -> &'static [u8] {
        match self {
            Self::Channels(TopicKind::ShardChannel) => b"SHARDCHANNELS",
            Self::Channels(_) => b"CHANNELS",
            Self::Counts(TopicKind::ShardChannel) => b"SHARDNUMSUB",
            Self::Counts(_) => b"NUMSUB",
            Self::Patterns => b"NUMPAT",
        }
    }
}

#[derive(Debug)]
struct TopicQuery {
    question: Question,
    words: Vec<Vec<u8>>,
    audience: Arc<Audience>,
}

impl Job for TopicQuery {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if answers.is_empty() {
            let mut words: Vec<&[u8]> = vec![b"PUBSUB", self.question.word()];
            words.extend(self.words.iter().map(Vec::as_slice));
            for shard in round.table.all_shards() {
                round.ask(shard, Effect::Read, &words);
            }
            if round.asks.is_empty() {
                return round.fail(super::dispatch::NOT_SERVED.as_bytes());
            }
            return Step::Asked;
        }
        if let Some(error) = answers.iter().find(|answer| answer.first() == Some(&b'-')) {
            return round.pass(error);
        }
        let values: Vec<Value> = (answers.iter())
            .filter_map(|answer| Value::decode(answer).ok().flatten())
            .map(|(value, _)| value)
            .collect();
        match self.question {
            Question::Channels(_) => {
                let names: BTreeSet<&[u8]> = (values.iter().filter_map(Value::as_items).flatten())
                    .filter_map(Value::as_bytes)
                    .filter(|name| !Heard::is_hidden(name))
                    .collect();
                round.done(|out, _| {
                    write::write_array_header(out, names.len());
                    names.iter().for_each(|name| write::write_bulk(out, name));
                })
            }
            Question::Counts(kind) => round.done(|out, _| {
                write::write_array_header(out, self.words.len() * 2);
                for (at, name) in self.words.iter().enumerate() {
                    write::write_bulk(out, name);
                    let counts = values
                        .iter()
                        .filter_map(|value| value.as_items()?.get(at * 2 + 1)?.as_int());
                    // Where more than one shard knows it, all of them know the same connections.
                    let found = counts.max().unwrap_or(0);
                    write::write_int(out, self.audience.subscribers(kind, name, found));
                }
            }),
            // Every proxy has its patterns on every shard.
            Question::Patterns => {
                let most = values.iter().filter_map(Value::as_int).max().unwrap_or(0);
                round.done(|out, _| write::write_int(out, most))
            }
        }
    }
}
