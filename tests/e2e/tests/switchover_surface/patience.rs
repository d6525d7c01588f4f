//! Clients that wait through switchovers, and clients that come and go or mix everything in one
//! pipeline.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use redis::Value;

use crate::stage::{REPLY_LIMIT, SHARDS, Stage, together};

/// How long a client has waited when the next entry is added, in turn: longer than proxies hold
/// requests, since "from now on" is when its request reaches a node.
const WAITS_MS: [u64; 3] = [500, 600, 700];
const READERS: usize = 8;

/// Waits without an end, all the time; what is added after the last switchover comes at once.
pub(crate) fn endless(stage: &Stage) -> anyhow::Result<u64> {
    let mut waiting = Vec::new();
    for proxy in 0..2 {
        for shard in SHARDS {
            for (kind, ask) in [("BLPOP", "BLPOP"), ("BZPOPMAX", "BZPOPMAX")] {
                let mut link = stage.link(proxy)?;
                let key = format!("endless:{kind}:{proxy}{shard}");
                link.send(&format!("{ask} {key} 0"))?;
                waiting.push((kind, key, link));
            }
        }
    }
    let mut rounds = 0;
    while stage.is_open() {
        for (_, key, link) in &mut waiting {
            if let Some(frame) = link.frame(Duration::from_millis(10))? {
                bail!("{key} had nothing, and {frame:?} came");
            }
            rounds += 1;
        }
    }
    let mut giver = stage.link(0)?;
    for (kind, key, link) in &mut waiting {
        let give = match *kind {
            "BLPOP" => format!("RPUSH {key} item"),
            _ => format!("ZADD {key} 1 item"),
        };
        let _: u64 = giver.ask(&give)?;
        let words: Vec<String> = link.reply().context(key.clone())?;
        ensure!(words[1] == "item", "{key}: {words:?}");
    }
    Ok(rounds)
}

/// Waits for the next entry of a stream, whatever its last one is when a switchover interrupts it.
pub(crate) fn next_entry(stage: &Stage) -> anyhow::Result<u64> {
    let parts = (0..READERS)
        .map(|reader| {
            Box::new(move || {
                wait_for_next(stage, reader).with_context(|| format!("reader {reader}"))
            }) as Box<_>
        })
        .collect();
    Ok(together::<u64>(parts)?.into_iter().sum())
}

/// One stream's entries: its key, and each with its id.
type Entries = (String, Vec<(String, Value)>);

fn wait_for_next(stage: &Stage, number: usize) -> anyhow::Result<u64> {
    let (mut reader, mut writer) = (stage.link(number)?, stage.link(number + 1)?);
    let key = format!("next:{number}{}", SHARDS[number / 2 % 2]);
    let mut added = 0;
    while stage.is_open() {
        let _: String = writer.ask(&format!("XADD {key} * entry before"))?;
        reader.send(&format!("XREAD BLOCK 5000 STREAMS {key} $"))?;
        let wait = WAITS_MS[(added / 2 + number) % WAITS_MS.len()];
        if let Some(early) = reader.frame(Duration::from_millis(wait))? {
            bail!("nothing was added, and {early:?} was read");
        }
        let id: String = writer.ask(&format!("XADD {key} * entry wanted"))?;
        let read: Option<Vec<Entries>> = reader.reply()?;
        let Some(read) = read else {
            bail!("the reader was not given {id}, which was added when it had waited {wait} ms");
        };
        ensure!(read[0].1[0].0 == id, "{id} was added, {read:?} was read");
        added += 2;
    }
    Ok(added as u64)
}

/// Subscribes, hears one message, and leaves, again and again, in RESP3 beside other commands.
pub(crate) fn comers(stage: &Stage) -> anyhow::Result<u64> {
    let parts = (0..2)
        .map(|proxy| Box::new(move || come_and_go(stage, proxy)) as Box<_>)
        .collect();
    Ok(together::<u64>(parts)?.into_iter().sum())
}

fn come_and_go(stage: &Stage, proxy: usize) -> anyhow::Result<u64> {
    let (mut ear, mut mouth) = (stage.link3(proxy)?, stage.link(proxy + 1)?);
    let mut rounds = 0;
    while stage.is_open() {
        let channel = format!("coming:{proxy}:{}", rounds % 4);
        for (subscribe, publish) in [
            ("SUBSCRIBE", "PUBLISH"),
            ("PSUBSCRIBE", "PUBLISH"),
            ("SSUBSCRIBE", "SPUBLISH"),
        ] {
            ear.send(&format!("{subscribe} {channel}"))?;
            ear.expect_push(&subscribe.to_lowercase())?;
            let receivers: u64 = mouth.ask(&format!("{publish} {channel} {rounds}"))?;
            ensure!(receivers == 1, "{publish} to {receivers} of 1 {subscribe}");
            ear.expect_push(&subscribe.to_lowercase().replace("subscribe", "message"))?;
            let leave = subscribe.replace("SUB", "UNSUB");
            ear.send(&format!("{leave} {channel}"))?;
            ear.expect_push(&leave.to_lowercase())?;
        }
        let said: String = ear.ask(&format!("ECHO {rounds}"))?;
        ensure!(said == rounds.to_string(), "ECHO {rounds} said {said}");
        rounds += 1;
        stage.pause();
    }
    Ok(rounds)
}

/// All classes in one pipeline: the replies come in the order of the requests.
pub(crate) fn pipelines(stage: &Stage) -> anyhow::Result<u64> {
    let parts = (0..2)
        .map(|proxy| Box::new(move || pipeline(stage, proxy)) as Box<_>)
        .collect();
    Ok(together::<u64>(parts)?.into_iter().sum())
}

fn pipeline(stage: &Stage, proxy: usize) -> anyhow::Result<u64> {
    let mut link = stage.link(proxy)?;
    let [a, b] = SHARDS.map(|shard| format!("pipeline:{proxy}{shard}"));
    let mut round: u64 = 0;
    while stage.is_open() {
        round += 1;
        let steps = [
            (format!("INCR {a}"), round.to_string()),
            (format!("INCR {b}"), round.to_string()),
            (format!("MGET {a} {b}"), format!("{round} {round}")),
            (format!("RPUSH {b}:list {round}"), "1".to_owned()),
            (format!("BLPOP {b}:list 1"), format!("{b}:list {round}")),
            ("MULTI".to_owned(), "OK".to_owned()),
            (format!("INCR {a}:block"), "QUEUED".to_owned()),
            (format!("INCR {b}:block"), "QUEUED".to_owned()),
            ("EXEC".to_owned(), format!("{round} {round}")),
            (
                format!("SUNIONSTORE {b}:set {a}:none {b}:none"),
                "0".to_owned(),
            ),
            (format!("WATCH {a}"), "OK".to_owned()),
            (format!("GET {a}"), round.to_string()),
            ("UNWATCH".to_owned(), "OK".to_owned()),
            (format!("SET {a}:copied {round}"), "OK".to_owned()),
            (format!("RENAME {a}:copied {b}:copied"), "OK".to_owned()),
            (format!("GET {b}:copied"), round.to_string()),
            (format!("EVAL return{{KEYS[1]}} 1 {b}"), b.clone()),
            (format!("ECHO {round}"), round.to_string()),
        ];
        for (command, _) in &steps {
            link.send(command)?;
        }
        let deadline = Instant::now() + REPLY_LIMIT;
        for (command, wanted) in &steps {
            let reply: Value = link.reply().with_context(|| command.clone())?;
            let said = words(reply)?;
            ensure!(
                said == *wanted,
                "{command} in a pipeline said {said}, not {wanted}"
            );
        }
        ensure!(Instant::now() < deadline, "a pipeline took {REPLY_LIMIT:?}");
        stage.pause();
    }
    Ok(round)
}

/// A reply as words with spaces between.
fn words(reply: Value) -> anyhow::Result<String> {
    Ok(match reply {
        Value::Array(members) => {
            let members: Result<Vec<_>, _> = members.into_iter().map(words).collect();
            members?.join(" ")
        }
        other => redis::from_redis_value(other)?,
    })
}
