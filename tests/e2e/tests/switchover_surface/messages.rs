//! Numbered messages: every subscriber gets each acknowledged one, once, in its publisher's order.

use std::{
    collections::HashMap,
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use redis::Value;

use crate::stage::{Link, Stage, together};

const PUBLISHERS: usize = 2;
/// Over both shards, however channels are spread.
const CHANNELS: usize = 4;
/// For the last messages, after the last publisher has stopped.
const TAIL_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Channels,
    Pattern,
    ShardChannels,
}

/// Messages each publisher sent to each channel of a kind: all were acknowledged.
type Sent = Vec<[u64; CHANNELS]>;

pub(crate) fn numbered(stage: &Stage) -> anyhow::Result<u64> {
    let mut ears = Vec::new();
    for kind in [Kind::Channels, Kind::Pattern, Kind::ShardChannels] {
        for proxy in 0..2 {
            ears.push((kind, proxy, subscribe(stage, kind, proxy)?));
        }
    }
    let sent: OnceLock<Sent> = OnceLock::new();
    let sent = &sent;
    let mut parts: Vec<Box<dyn FnOnce() -> anyhow::Result<u64> + Send + '_>> = Vec::new();
    for (kind, proxy, link) in ears {
        parts.push(Box::new(move || {
            let heard = listen(link, kind, sent);
            heard.map_err(|e| e.context(format!("{kind:?} at proxy {proxy}")))
        }));
    }
    parts.push(Box::new(move || {
        let publishers = (0..PUBLISHERS)
            .map(|publisher| Box::new(move || publish(stage, publisher)) as Box<_>)
            .collect();
        let done = together(publishers);
        // Ears must end even when a publisher failed.
        let _ = sent.set(done.as_ref().map_or_else(|_| Sent::new(), Clone::clone));
        Ok(done?.iter().flatten().sum())
    }));
    let mut counts = together(parts)?;
    Ok(counts.pop().unwrap_or_default())
}

fn subscribe(stage: &Stage, kind: Kind, proxy: usize) -> anyhow::Result<Link> {
    let mut link = stage.link(proxy)?;
    match kind {
        Kind::Pattern => {
            let _: Value = link.ask("PSUBSCRIBE news:*")?;
        }
        Kind::Channels | Kind::ShardChannels => {
            for channel in 0..CHANNELS {
                let _: Value = link.ask(&match kind {
                    Kind::ShardChannels => format!("SSUBSCRIBE shard:{channel}"),
                    _ => format!("SUBSCRIBE news:{channel}"),
                })?;
            }
        }
    }
    Ok(link)
}

fn publish(stage: &Stage, publisher: usize) -> anyhow::Result<[u64; CHANNELS]> {
    let mut link = stage.link(publisher)?;
    let mut sent = [0; CHANNELS];
    while stage.is_open() {
        for (channel, number) in sent.iter_mut().enumerate() {
            let text = format!("{publisher}:{number}");
            let heard: u64 = link.ask(&format!("PUBLISH news:{channel} {text}"))?;
            ensure!(
                heard == 4,
                "PUBLISH {text} said {heard}: 2 channels, 2 patterns"
            );
            let heard: u64 = link.ask(&format!("SPUBLISH shard:{channel} {text}"))?;
            ensure!(heard == 2, "SPUBLISH {text} said {heard}");
            *number += 1;
            stage.pause();
        }
    }
    Ok(sent)
}

fn listen(mut link: Link, kind: Kind, sent: &OnceLock<Sent>) -> anyhow::Result<u64> {
    let mut next: HashMap<(usize, usize), u64> = HashMap::new();
    let mut heard = 0;
    let mut deadline = None;
    loop {
        if let Some(sent) = sent.get() {
            let all = sent.iter().flatten().sum::<u64>();
            if heard >= all {
                return Ok(heard);
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + TAIL_LIMIT);
            ensure!(
                Instant::now() < deadline,
                "{} of {all} were not heard",
                all - heard
            );
        }
        let Some(frame) = link.frame(POLL)? else {
            continue;
        };
        let (channel, publisher, number) = parse(kind, frame)?;
        let wanted = next.entry((channel, publisher)).or_default();
        if number != *wanted {
            bail!("message {number} of publisher {publisher} on {channel}, not {wanted}");
        }
        *wanted += 1;
        heard += 1;
    }
}

fn parse(kind: Kind, frame: Value) -> anyhow::Result<(usize, usize, u64)> {
    let words: Vec<String> = redis::from_redis_value(frame)?;
    let message = match kind {
        Kind::Channels => "message",
        Kind::Pattern => "pmessage",
        Kind::ShardChannels => "smessage",
    };
    ensure!(words[0] == message, "it is {words:?}");
    let [.., channel, text] = &words[..] else {
        bail!("it is {words:?}");
    };
    let channel = channel.rsplit_once(':').map(|c| c.1).unwrap_or_default();
    let (publisher, number) = text.split_once(':').unwrap_or_default();
    Ok((channel.parse()?, publisher.parse()?, number.parse()?))
}
