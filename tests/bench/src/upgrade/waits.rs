//! One client for each shard that does nothing but write, and notes when each write was wanted and when
//! it was acknowledged: what a hold looks like from outside. One more does the same to a plain server,
//! which nothing happens to: what it waits for is the machine's.
//!
//! Invariant: a write is noted once and never repeated; the next one is wanted only after it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use slotmesh_proto::instance::v1::Shard;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    failover::tags,
    report::Percentiles,
    switchover::{Target, connect},
};

/// Between two writes: much less than the holds that are looked for.
const PACE: Duration = Duration::from_millis(2);
/// Half an hour of writes of eight shards.
const NOTES_MAX: usize = 8_000_000;

#[derive(Debug, Clone, Copy)]
struct Note {
    shard: usize,
    wanted: Instant,
    acknowledged: Instant,
}

impl Note {
    fn ms(&self) -> f64 {
        (self.acknowledged - self.wanted).as_secs_f64() * 1000.0
    }
}

/// A write that was waited for: from when to when.
pub(super) type Wait = (Instant, Instant);

/// The running clients.
#[derive(Debug)]
pub(super) struct Waits {
    running: JoinSet<anyhow::Result<()>>,
    stop: CancellationToken,
    notes: Arc<Mutex<Vec<Note>>>,
    /// The number of the one that has a plain server, after all shards'.
    plain: usize,
}

impl Waits {
    /// One client for each shard, in their order, and one for the plain server at this address.
    pub(super) async fn start(
        target: &Target,
        shards: &[Shard],
        plain_server: &str,
    ) -> anyhow::Result<Self> {
        let proxy = target.proxies.first().context("there is no proxy")?;
        let notes: Arc<Mutex<Vec<Note>>> = Arc::default();
        let (mut running, stop) = (JoinSet::new(), CancellationToken::new());
        let tags = tags(proxy, shards).await?;
        let plain = tags.len();
        let shards = tags.into_iter().map(|tag| (proxy.as_str(), tag));
        let all = shards.chain([(plain_server, "plain".to_owned())]);
        for (shard, (address, tag)) in all.enumerate() {
            let mut connection = connect(address, shard % 2 == 1).await?;
            let (notes, stop) = (Arc::clone(&notes), stop.clone());
            running.spawn(async move {
                while !stop.is_cancelled() {
                    let wanted = Instant::now();
                    let mut write = redis::cmd("INCR");
                    write.arg(format!("waits:{{{tag}}}"));
                    let answer: redis::RedisResult<u64> = write.query_async(&mut connection).await;
                    answer.with_context(|| format!("a write to shard {shard}"))?;
                    let note = Note {
                        shard,
                        wanted,
                        acknowledged: Instant::now(),
                    };
                    push(&notes, note);
                    sleep(PACE).await;
                }
                Ok(())
            });
        }
        Ok(Self {
            running,
            stop,
            notes,
            plain,
        })
    }

    /// The longest wait of the plain server's client, in milliseconds.
    pub(super) fn plain_ms(&self, from: Instant, to: Instant) -> f64 {
        self.longest_ms(self.plain, from, to)
    }

    /// All waits for shards that touched that time, and all for the plain server.
    pub(super) fn percentiles(&self, from: Instant, to: Instant) -> (Percentiles, Percentiles) {
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let then = |n: &&Note| n.acknowledged >= from && n.wanted <= to;
        let (plain, shards): (Vec<&Note>, Vec<&Note>) = notes
            .iter()
            .filter(then)
            .partition(|n| n.shard == self.plain);
        let of = |notes: Vec<&Note>| {
            Percentiles::of(&mut notes.into_iter().map(Note::ms).collect::<Vec<_>>())
        };
        (of(shards), of(plain))
    }

    /// The longest wait of a shard's client for a write that was under way then.
    pub(super) fn longest(&self, shard: usize, from: Instant, to: Instant) -> Option<Wait> {
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        longest(&notes, shard, from, to).map(|n| (n.wanted, n.acknowledged))
    }

    /// The longest wait of a shard's client for a write that was under way then, in milliseconds.
    pub(super) fn longest_ms(&self, shard: usize, from: Instant, to: Instant) -> f64 {
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        longest_ms(&notes, shard, from, to)
    }

    /// When a write was first acknowledged that had been wanted since `from` or was under way then.
    pub(super) fn first_since(&self, shard: usize, from: Instant) -> Option<Instant> {
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let own = notes.iter().filter(|n| n.shard == shard);
        own.map(|n| n.acknowledged).find(|at| *at >= from)
    }

    /// Ends them; says what went wrong.
    pub(super) async fn stop(mut self) -> Vec<String> {
        self.stop.cancel();
        let mut wrong = Vec::new();
        while let Some(ended) = self.running.join_next().await {
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => wrong.push(format!("{error:#}")),
                Err(error) => wrong.push(error.to_string()),
            }
        }
        wrong
    }
}

fn push(notes: &Mutex<Vec<Note>>, note: Note) {
    let mut notes = notes.lock().unwrap_or_else(PoisonError::into_inner);
    if notes.len() < NOTES_MAX {
        notes.push(note);
    }
}

fn longest(notes: &[Note], shard: usize, from: Instant, to: Instant) -> Option<&Note> {
    let then = |n: &&Note| n.shard == shard && n.acknowledged >= from && n.wanted <= to;
    let waits = notes.iter().filter(then);
    waits.max_by(|a, b| a.ms().total_cmp(&b.ms()))
}

fn longest_ms(notes: &[Note], shard: usize, from: Instant, to: Instant) -> f64 {
    longest(notes, shard, from, to).map_or(0.0, Note::ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_counts_for_its_shard_and_for_every_window_that_it_touches() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let note = |shard, wanted, acknowledged| Note {
            shard,
            wanted: at(wanted),
            acknowledged: at(acknowledged),
        };
        let notes = [
            note(0, 0, 1),
            note(0, 10, 60),
            note(1, 10, 400),
            note(0, 70, 71),
        ];
        assert!((longest_ms(&notes, 0, at(0), at(100)) - 50.0).abs() < 1e-6);
        assert!((longest_ms(&notes, 0, at(55), at(100)) - 50.0).abs() < 1e-6);
        assert!((longest_ms(&notes, 0, at(65), at(100)) - 1.0).abs() < 1e-6);
        assert!((longest_ms(&notes, 1, at(0), at(10)) - 390.0).abs() < 1e-6);
    }
}
