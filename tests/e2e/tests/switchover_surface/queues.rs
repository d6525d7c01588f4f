//! Items in queues and streams: each acknowledged one is taken exactly once.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use anyhow::{Context, bail, ensure};
use redis::Value;

use crate::stage::{SHARDS, Stage, together};

const CONSUMERS: usize = 2;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Left,
    Right,
    Move,
    Lowest,
    Several,
}

const KINDS: [Kind; 5] = [
    Kind::Left,
    Kind::Right,
    Kind::Move,
    Kind::Lowest,
    Kind::Several,
];

impl Kind {
    fn key(self, shard: &str) -> String {
        format!("queue:{self:?}{shard}")
    }

    fn add(self, shard: &str, item: u64) -> String {
        let key = self.key(shard);
        match self {
            Self::Lowest => format!("ZADD {key} {item} {item}"),
            Self::Right => format!("LPUSH {key} {item}"),
            _ => format!("RPUSH {key} {item}"),
        }
    }

    fn take(self, shard: &str) -> String {
        let key = self.key(shard);
        match self {
            Self::Left => format!("BLPOP {key} 1"),
            Self::Right => format!("BRPOP {key} other{shard} 1"),
            Self::Move => format!("BLMOVE {key} taken{shard} LEFT RIGHT 1"),
            Self::Lowest => format!("BZPOPMIN {key} 1"),
            Self::Several => format!("BLMPOP 1 1 {key} LEFT COUNT 1"),
        }
    }

    /// The item in a reply of [`Kind::take`].
    fn item(self, reply: Value) -> anyhow::Result<Option<u64>> {
        if reply == Value::Nil {
            return Ok(None);
        }
        let text = match self {
            Self::Move => redis::from_redis_value(reply)?,
            Self::Left | Self::Right => redis::from_redis_value::<(String, String)>(reply)?.1,
            Self::Lowest => redis::from_redis_value::<(String, String, String)>(reply)?.1,
            Self::Several => redis::from_redis_value::<(String, Vec<String>)>(reply)?
                .1
                .concat(),
        };
        Ok(Some(text.parse()?))
    }
}

pub(crate) fn popped_once(stage: &Stage) -> anyhow::Result<u64> {
    let queues: Vec<_> = KINDS
        .into_iter()
        .flat_map(|kind| SHARDS.map(|shard| (kind, shard)))
        .collect();
    let is_produced = AtomicBool::new(false);
    let is_produced = &is_produced;
    let mut parts: Vec<Box<dyn FnOnce() -> anyhow::Result<Vec<u64>> + Send + '_>> = Vec::new();
    for &(kind, shard) in &queues {
        for consumer in 0..CONSUMERS {
            parts.push(Box::new(move || {
                consume(stage, kind, shard, consumer, is_produced)
                    .with_context(|| format!("{kind:?} {shard}, consumer {consumer}"))
            }));
        }
    }
    let all = &queues;
    parts.push(Box::new(move || {
        let produced = produce(stage, |item| {
            let (kind, shard) = all[item as usize % all.len()];
            kind.add(shard, item)
        });
        is_produced.store(true, Relaxed);
        Ok((0..produced?).collect())
    }));
    let mut taken = together(parts)?;
    let produced = taken.pop().unwrap_or_default().len() as u64;
    once_each(produced, taken.into_iter().flatten())?;
    let mut link = stage.link(0)?;
    for (index, (kind, shard)) in queues.iter().enumerate() {
        if matches!(kind, Kind::Move) {
            let moved: Vec<u64> = link.ask(&format!("LRANGE taken{shard} 0 -1"))?;
            let wanted = (0..produced).filter(|i| *i as usize % queues.len() == index);
            let wanted: Vec<u64> = wanted.collect();
            ensure!(
                moved.len() == wanted.len(),
                "{} of {} were moved",
                moved.len(),
                wanted.len()
            );
            let mut sorted = moved;
            sorted.sort_unstable();
            ensure!(sorted == wanted, "other items were moved than were added");
        }
    }
    Ok(produced)
}

/// Adds items 0, 1, 2 … until the stage is closed; returns how many.
fn produce(stage: &Stage, command: impl Fn(u64) -> String) -> anyhow::Result<u64> {
    let mut links = [stage.link(0)?, stage.link(1)?];
    let mut item = 0;
    while stage.is_open() {
        let _: Value = links[item as usize % 2].ask(&command(item))?;
        item += 1;
        stage.pause();
    }
    Ok(item)
}

fn consume(
    stage: &Stage,
    kind: Kind,
    shard: &str,
    consumer: usize,
    is_produced: &AtomicBool,
) -> anyhow::Result<Vec<u64>> {
    let mut link = stage.link(consumer)?;
    let mut taken = Vec::new();
    loop {
        let was_produced = is_produced.load(Relaxed);
        match kind.item(link.ask(&kind.take(shard))?)? {
            Some(item) => taken.push(item),
            None if was_produced => return Ok(taken),
            None => {}
        }
    }
}

fn once_each(produced: u64, taken: impl Iterator<Item = u64>) -> anyhow::Result<()> {
    let mut times: HashMap<u64, u32> = HashMap::new();
    for item in taken {
        *times.entry(item).or_default() += 1;
    }
    let lost: Vec<u64> = (0..produced).filter(|i| !times.contains_key(i)).collect();
    let doubled: Vec<u64> = times.iter().filter(|t| *t.1 > 1).map(|t| *t.0).collect();
    ensure!(
        lost.is_empty(),
        "of {produced} items these were lost: {lost:?}"
    );
    ensure!(
        doubled.is_empty(),
        "of {produced} items these came twice: {doubled:?}"
    );
    Ok(())
}

pub(crate) fn read_once(stage: &Stage) -> anyhow::Result<u64> {
    let mut link = stage.link(0)?;
    for shard in SHARDS {
        let _: Value = link.ask(&format!("XGROUP CREATE stream{shard} g $ MKSTREAM"))?;
    }
    let is_produced = AtomicBool::new(false);
    let is_produced = &is_produced;
    let mut parts: Vec<Box<dyn FnOnce() -> anyhow::Result<Vec<u64>> + Send + '_>> = Vec::new();
    for shard in SHARDS {
        for consumer in 0..CONSUMERS {
            parts.push(Box::new(move || read(stage, shard, consumer, is_produced)));
        }
    }
    parts.push(Box::new(move || {
        let produced = produce(stage, |item| {
            let shard = SHARDS[item as usize / 2 % 2];
            format!("XADD stream{shard} * item {item}")
        });
        is_produced.store(true, Relaxed);
        Ok((0..produced?).collect())
    }));
    let mut taken = together(parts)?;
    let produced = taken.pop().unwrap_or_default().len() as u64;
    once_each(produced, taken.into_iter().flatten())?;
    for shard in SHARDS {
        let pending: Vec<Value> = link.ask(&format!("XPENDING stream{shard} g"))?;
        ensure!(
            pending[0] == Value::Int(0),
            "acknowledged entries are pending: {pending:?}"
        );
    }
    Ok(produced)
}

/// One stream's entries: its key, and each with an id and its fields.
type Entries = (String, Vec<(String, (String, u64))>);

fn read(
    stage: &Stage,
    shard: &str,
    consumer: usize,
    is_produced: &AtomicBool,
) -> anyhow::Result<Vec<u64>> {
    let mut link = stage.link(consumer)?;
    let mut taken = Vec::new();
    loop {
        let was_produced = is_produced.load(Relaxed);
        let read: Option<Vec<Entries>> = link.ask(&format!(
            "XREADGROUP GROUP g c{consumer} COUNT 5 BLOCK 1000 STREAMS stream{shard} >"
        ))?;
        let Some(read) = read else {
            if was_produced {
                return Ok(taken);
            }
            continue;
        };
        for (id, (_, item)) in read.into_iter().flat_map(|stream| stream.1) {
            taken.push(item);
            let done: u64 = link.ask(&format!("XACK stream{shard} g {id}"))?;
            if done != 1 {
                bail!("XACK of {id} that was just read said {done}");
            }
        }
    }
}
