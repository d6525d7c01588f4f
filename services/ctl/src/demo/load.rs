//! Clients of the demo: each knows what was acknowledged to it, so that nothing can be lost unseen.
//!
//! A client has one counter and a row of unique keys of its own. A write whose reply did not come
//! is an error and ambiguous, never "lost".

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::redis::Client;

/// One in so many requests writes a key of its own.
const UNIQUE_EVERY: u64 = 8;
/// Keys of one MGET of the final count.
const COUNT_BATCH: usize = 200;
/// After an error a client breathes, so that a dead mesh is not hammered.
const ERROR_PAUSE: Duration = Duration::from_millis(20);

/// Running clients.
#[derive(Debug)]
pub(super) struct Load {
    clients: JoinSet<Acknowledged>,
    counters: Arc<Counters>,
    stop: CancellationToken,
    started: Instant,
}

/// What all clients count together.
#[derive(Debug, Default)]
pub(super) struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    longest_wait_us: AtomicU64,
    longest_wait_ever_us: AtomicU64,
}

/// What one client was told.
#[derive(Debug)]
struct Acknowledged {
    client: u32,
    increments: u64,
    /// Keys 0 to this, less those not acknowledged.
    unique: u64,
    unknown: Vec<u64>,
}

/// The load's end.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) requests: u64,
    pub(super) errors: u64,
    pub(super) longest_wait: Duration,
    pub(super) took: Duration,
    acknowledged: Vec<Acknowledged>,
}

impl Counters {
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    pub(super) fn errors(&self) -> u64 {
        self.errors.load(Relaxed)
    }

    /// The longest wait since the last call.
    pub(super) fn take_longest_wait(&self) -> Duration {
        Duration::from_micros(self.longest_wait_us.swap(0, Relaxed))
    }

    fn count(&self, took: Duration, failed: bool) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.requests.fetch_add(1, Relaxed);
        self.errors.fetch_add(u64::from(failed), Relaxed);
        self.longest_wait_us.fetch_max(took, Relaxed);
        self.longest_wait_ever_us.fetch_max(took, Relaxed);
    }
}

impl Load {
    /// Connects all clients, spread over the proxies, and lets them run.
    pub(super) async fn start(proxies: &[String], count: u32) -> io::Result<Self> {
        let (counters, stop) = (Arc::new(Counters::default()), CancellationToken::new());
        let mut clients = JoinSet::new();
        for (client, proxy) in (0..count).zip(proxies.iter().cycle()) {
            let connection = Client::connect(proxy).await?;
            let (proxy, counters, stop) = (proxy.clone(), counters.clone(), stop.clone());
            clients.spawn(run(client, connection, proxy, counters, stop));
        }
        Ok(Self {
            clients,
            counters,
            stop,
            started: Instant::now(),
        })
    }

    pub(super) fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    pub(super) async fn stop(self) -> Done {
        self.stop.cancel();
        let acknowledged = self.clients.join_all().await;
        Done {
            requests: self.counters.requests(),
            errors: self.counters.errors(),
            longest_wait: Duration::from_micros(self.counters.longest_wait_ever_us.load(Relaxed)),
            took: self.started.elapsed(),
            acknowledged,
        }
    }
}

async fn run(
    client: u32,
    mut connection: Client,
    proxy: String,
    counters: Arc<Counters>,
    stop: CancellationToken,
) -> Acknowledged {
    let counter = counter_key(client);
    let mut told = Acknowledged {
        client,
        increments: 0,
        unique: 0,
        unknown: Vec::new(),
    };
    for turn in 1.. {
        if stop.is_cancelled() {
            break;
        }
        let started = Instant::now();
        let reply = if turn % UNIQUE_EVERY == 0 {
            let key = unique_key(client, told.unique);
            let reply = connection.call(&[b"SET", key.as_bytes(), b"1"]).await;
            let ok = matches!(&reply, Ok(value) if value.is_ok());
            if !ok {
                told.unknown.push(told.unique);
            }
            told.unique += 1;
            reply.map(|_| ok)
        } else {
            let reply = connection.call(&[b"INCR", counter.as_bytes()]).await;
            // A counter that goes back, or stands still, is the loss itself.
            let value = reply
                .as_ref()
                .ok()
                .and_then(|v| v.as_int())
                .and_then(|v| u64::try_from(v).ok());
            let ok = value.is_some_and(|v| v > told.increments);
            told.increments = told.increments.max(value.unwrap_or_default());
            reply.map(|_| ok)
        };
        let failed = !matches!(reply, Ok(true));
        counters.count(started.elapsed(), failed);
        if failed {
            tokio::time::sleep(ERROR_PAUSE).await;
        }
        if reply.is_err()
            && let Ok(again) = Client::connect(&proxy).await
        {
            connection = again;
        }
    }
    told
}

impl Done {
    /// Writes that were acknowledged and are not there, read through one proxy.
    pub(super) async fn lost_writes(&self, proxy: &str) -> io::Result<u64> {
        let mut connection = Client::connect(proxy).await?;
        let mut lost = 0;
        for told in &self.acknowledged {
            let counter = counter_key(told.client);
            let value = connection.call(&[b"GET", counter.as_bytes()]).await?;
            let value = value
                .as_int()
                .and_then(|v| u64::try_from(v).ok())
                .unwrap_or_default();
            lost += told.increments.saturating_sub(value);
            let keys: Vec<String> = (0..told.unique)
                .filter(|n| !told.unknown.contains(n))
                .map(|n| unique_key(told.client, n))
                .collect();
            for batch in keys.chunks(COUNT_BATCH) {
                let mut request: Vec<&[u8]> = vec![b"EXISTS"];
                request.extend(batch.iter().map(String::as_bytes));
                let there = connection.call(&request).await?;
                let there = there
                    .as_int()
                    .and_then(|v| usize::try_from(v).ok())
                    .ok_or_else(|| {
                        io::Error::other(format!("EXISTS was answered with {there:?}"))
                    })?;
                lost += batch.len().saturating_sub(there) as u64;
            }
        }
        Ok(lost)
    }
}

fn counter_key(client: u32) -> String {
    format!("demo:counter:{client}")
}

fn unique_key(client: u32, number: u64) -> String {
    format!("demo:unique:{client}:{number}")
}
