//! Clients that are told of changes: a tracked cache is never stale for long, MONITOR goes on.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use redis::{PushKind, Value};

use crate::stage::{Link, REPLY_LIMIT, SHARDS, Stage, together};

/// Between a write's acknowledgement and the moment its invalidation was looked at.
const STALE_LIMIT: Duration = Duration::from_secs(2);
const KEYS: usize = 3;

/// When each write of a key was acknowledged; the number of a write is its value.
type Written = HashMap<String, Vec<Instant>>;

fn keys() -> impl Iterator<Item = String> {
    (0..KEYS).flat_map(|k| SHARDS.map(|shard| format!("cached:{k}{shard}")))
}

pub(crate) fn tracked(stage: &Stage) -> anyhow::Result<u64> {
    let written: Mutex<Written> = Mutex::default();
    let mut link = stage.link(0)?;
    for key in keys() {
        let _: String = link.ask(&format!("SET {key} 0"))?;
        lock(&written)?.insert(key, vec![Instant::now()]);
    }
    let written = &written;
    let mut parts: Vec<Box<dyn FnOnce() -> anyhow::Result<u64> + Send + '_>> = Vec::new();
    for proxy in 0..2 {
        for mode in ["", " BCAST PREFIX cached:", " NOLOOP"] {
            parts.push(Box::new(move || {
                cache(stage, proxy, mode, written)
                    .with_context(|| format!("CLIENT TRACKING ON{mode} at proxy {proxy}"))
            }));
        }
    }
    parts.push(Box::new(move || write(stage, written)));
    Ok(together(parts)?.into_iter().min().unwrap_or_default())
}

fn lock(written: &Mutex<Written>) -> anyhow::Result<std::sync::MutexGuard<'_, Written>> {
    let guard = written.lock();
    guard.map_err(|_| anyhow::anyhow!("another part of the scene panicked"))
}

fn write(stage: &Stage, written: &Mutex<Written>) -> anyhow::Result<u64> {
    let mut links = [stage.link(0)?, stage.link(1)?];
    let mut value = 0;
    while stage.is_open() {
        value += 1;
        for key in keys() {
            let _: String = links[value as usize % 2].ask(&format!("SET {key} {value}"))?;
            let now = Instant::now();
            lock(written)?.entry(key).or_default().push(now);
            stage.pause();
        }
        // Some quiet, in which a value that was missed stays in the caches.
        for _ in 0..20 {
            stage.pause();
        }
    }
    Ok(value * KEYS as u64)
}

/// Reads what is not in the cache, and looks at how old what is in it may be.
fn cache(stage: &Stage, proxy: usize, mode: &str, written: &Mutex<Written>) -> anyhow::Result<u64> {
    let mut link = stage.link3(proxy)?;
    let _: String = link.ask(&format!("CLIENT TRACKING ON{mode}"))?;
    let mut cache: HashMap<String, usize> = HashMap::new();
    let mut dropped = 0;
    while stage.is_open() {
        for key in keys() {
            if let Entry::Vacant(place) = cache.entry(key) {
                let value = link.ask(&format!("GET {}", place.key()))?;
                place.insert(value);
            }
        }
        let now = Instant::now();
        while let Some(push) = link.push(Duration::from_millis(1))? {
            dropped += invalidate(&mut cache, push)?;
        }
        let written = lock(written)?;
        for (key, value) in &cache {
            let Some(overtaken) = written.get(key).and_then(|w| w.get(value + 1)) else {
                continue;
            };
            let stale = now.saturating_duration_since(*overtaken);
            ensure!(
                stale < STALE_LIMIT,
                "{key} is {value} in the cache, {stale:?} after the next write was acknowledged"
            );
        }
    }
    Ok(dropped)
}

fn invalidate(cache: &mut HashMap<String, usize>, push: Value) -> anyhow::Result<u64> {
    let Value::Push { kind, data } = push else {
        anyhow::bail!("it is no push: {push:?}");
    };
    ensure!(kind == PushKind::Invalidate, "a push of kind {kind:?}");
    let named = data.into_iter().next().unwrap_or(Value::Nil);
    if named == Value::Nil {
        cache.clear();
        return Ok(1);
    }
    let named: Vec<String> = redis::from_redis_value(named)?;
    for key in &named {
        cache.remove(key);
    }
    Ok(named.len() as u64)
}

/// Lines may be lost in a switchover; the connection may not, and lines go on.
pub(crate) fn monitored(stage: &Stage) -> anyhow::Result<u64> {
    let mut ears = Vec::new();
    for proxy in 0..2 {
        let mut link = stage.link(proxy)?;
        let said: String = link.ask("MONITOR")?;
        ensure!(said == "OK", "MONITOR said {said}");
        ears.push(link);
    }
    let mut lines = 0;
    while stage.is_open() {
        for link in &mut ears {
            while let Some(line) = link.frame(Duration::from_millis(1))? {
                ensure!(
                    matches!(line, Value::SimpleString(_)),
                    "it is no line: {line:?}"
                );
                lines += 1;
            }
        }
    }
    let mut link = stage.link(0)?;
    for (proxy, ear) in ears.iter_mut().enumerate() {
        for shard in SHARDS {
            is_shown(ear, &mut link, &format!("mark:{proxy}{shard}"))?;
        }
    }
    Ok(lines)
}

fn is_shown(ear: &mut Link, link: &mut Link, mark: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + REPLY_LIMIT;
    while Instant::now() < deadline {
        let _: Value = link.ask(&format!("GET {mark}"))?;
        while let Some(line) = ear.frame(Duration::from_millis(50))? {
            if matches!(&line, Value::SimpleString(text) if text.contains(mark)) {
                return Ok(());
            }
        }
    }
    anyhow::bail!("MONITOR did not show {mark} in {REPLY_LIMIT:?}, after the last switchover")
}
