//! Clients of every shard at every proxy, one request at a time each, that note when each request
//! was sent and answered.
//!
//! Invariant: a request is noted once, whatever became of it, and never repeated; reads and writes
//! take turns.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use redis::aio::MultiplexedConnection;
use slotmesh_proto::instance::v1::Shard;
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::chaos::{client::connect, history::now_us};

/// Keys of one client: enough to be like many, few enough for a resync to stay what it is.
const KEYS: u64 = 500;
/// After an error, so that a proxy that is gone isn't asked a million times.
const ERROR_PAUSE: Duration = Duration::from_millis(20);
/// Hash tags that are tried to find one of each shard.
const TAGS_MAX: u32 = 10_000;
/// Samples kept between two rounds: minutes of any load that a machine can make here.
const SAMPLES_MAX: usize = 4_000_000;

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) shard: usize,
    pub(super) proxy: usize,
    pub(super) is_write: bool,
    pub(super) from_us: u64,
    pub(super) to_us: u64,
    /// What the client was told, if not what it asked for.
    pub(super) error: Option<String>,
}

/// The running clients.
#[derive(Debug)]
pub(super) struct Clients {
    stop: CancellationToken,
    running: Mutex<JoinSet<()>>,
    samples: Arc<Mutex<Vec<Sample>>>,
}

#[derive(Debug)]
struct Client {
    address: String,
    /// Of all its keys, in braces: decides the shard.
    tag: String,
    shard: usize,
    proxy: usize,
    pace: Duration,
    samples: Arc<Mutex<Vec<Sample>>>,
}

impl Clients {
    /// `each` clients for every pair of shard and proxy.
    pub(super) async fn start(
        proxies: &[String],
        shards: &[Shard],
        each: u32,
        pace: Duration,
    ) -> anyhow::Result<Self> {
        let samples = Arc::default();
        let stop = CancellationToken::new();
        let mut running = JoinSet::new();
        for (shard, tag) in tags(&proxies[0], shards).await?.into_iter().enumerate() {
            for (proxy, address) in proxies.iter().enumerate() {
                for number in 0..each {
                    let client = Client {
                        address: address.clone(),
                        tag: format!("{{{tag}}}:{proxy}:{number}"),
                        shard,
                        proxy,
                        pace,
                        samples: Arc::clone(&samples),
                    };
                    running.spawn(client.run(stop.clone()));
                }
            }
        }
        Ok(Self {
            stop,
            running: Mutex::new(running),
            samples,
        })
    }

    /// Begins a round: what was noted before is of no interest.
    pub(super) fn forget(&self) {
        lock(&self.samples).clear();
    }

    /// What was noted since.
    pub(super) fn samples(&self) -> Vec<Sample> {
        lock(&self.samples).clone()
    }

    /// Ends them.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        let running = self.running.into_inner();
        running
            .unwrap_or_else(PoisonError::into_inner)
            .shutdown()
            .await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    async fn run(self, stop: CancellationToken) {
        let mut connection: Option<MultiplexedConnection> = None;
        let mut number = 0_u64;
        while !stop.is_cancelled() {
            number += 1;
            let from_us = now_us();
            let asked = match connection.take() {
                Some(connection) => Ok(connection),
                // Connecting is no request; its time is not counted.
                None => connect(&self.address).await,
            };
            let begun_us = now_us();
            let answer = match asked {
                Ok(mut asked) => {
                    let answer = self.ask(&mut asked, number).await;
                    let is_answer = !matches!(&answer, Err(e) if e.is_unrecoverable_error());
                    connection = Some(asked).filter(|_| is_answer);
                    answer
                }
                Err(error) => Err(error),
            };
            let failed = answer.is_err();
            self.note(Sample {
                shard: self.shard,
                proxy: self.proxy,
                is_write: number.is_multiple_of(2),
                from_us: if failed { from_us } else { begun_us },
                to_us: now_us(),
                error: answer.err().map(|e| e.to_string()),
            });
            sleep(if failed { ERROR_PAUSE } else { self.pace }).await;
        }
    }

    async fn ask(
        &self,
        connection: &mut MultiplexedConnection,
        number: u64,
    ) -> redis::RedisResult<()> {
        let key = format!("{}:{}", self.tag, number / 2 % KEYS);
        let mut command = redis::cmd(if number.is_multiple_of(2) {
            "SET"
        } else {
            "GET"
        });
        command.arg(key);
        if number.is_multiple_of(2) {
            command.arg(number);
        }
        let _: redis::Value = command.query_async(connection).await?;
        Ok(())
    }

    fn note(&self, sample: Sample) {
        let mut samples = lock(&self.samples);
        if samples.len() < SAMPLES_MAX {
            samples.push(sample);
        }
    }
}

/// A hash tag for each shard, in their order.
///
/// # Errors
/// When the endpoint does not say which slot a key has.
pub async fn tags(address: &str, shards: &[Shard]) -> anyhow::Result<Vec<String>> {
    let mut connection = connect(address).await?;
    let mut found: Vec<Option<String>> = vec![None; shards.len()];
    for number in 0..TAGS_MAX {
        if found.iter().all(Option::is_some) {
            break;
        }
        let tag = format!("t{number}");
        let mut slot = redis::cmd("CLUSTER");
        slot.arg("KEYSLOT").arg(&tag);
        let slot: u32 = slot.query_async(&mut connection).await?;
        let holds = |s: &Shard| s.slots.iter().any(|r| (r.first..=r.last).contains(&slot));
        if let Some(at) = shards.iter().position(holds) {
            found[at].get_or_insert(tag);
        }
    }
    let found: Option<Vec<String>> = found.into_iter().collect();
    found.context("a key of each shard")
}
