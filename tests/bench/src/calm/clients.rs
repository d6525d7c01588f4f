//! Clients that want little, and note how long they waited for it.
//!
//! Invariant: a wait counts from when the client wanted the request, connecting included; and nothing
//! is ever repeated.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use redis::{RedisResult, aio::MultiplexedConnection};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::chaos::client::connect;

/// Between two requests of a client.
const PACE: Duration = Duration::from_millis(50);
/// Keys of one client.
const KEYS: u64 = 100;
/// Different words of errors that are kept.
const ERRORS_MAX: usize = 50;

/// What clients saw in some time.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Tally {
    requests: u64,
    errors: u64,
    /// Waits of more than a second.
    slow: u64,
    longest: Duration,
}

impl Tally {
    fn add(&mut self, waited: Duration, failed: bool) {
        self.requests += 1;
        self.errors += u64::from(failed);
        self.slow += u64::from(waited > Duration::from_secs(1));
        self.longest = self.longest.max(waited);
    }

    /// For people.
    pub(super) fn shown(&self) -> String {
        format!(
            "{} requests, {} errors, {} waited over 1 s, longest {} ms",
            self.requests,
            self.errors,
            self.slow,
            self.longest.as_millis()
        )
    }
}

/// What all clients saw.
#[derive(Default, Debug)]
pub(super) struct Seen {
    inner: Mutex<Inner>,
}

#[derive(Default, Debug)]
struct Inner {
    total: Tally,
    minute: Tally,
    errors: BTreeMap<String, u64>,
}

impl Seen {
    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self, waited: Duration, answer: &RedisResult<()>) {
        self.with(|inner| {
            inner.total.add(waited, answer.is_err());
            inner.minute.add(waited, answer.is_err());
            let Err(error) = answer else { return };
            let words = error.to_string();
            if inner.errors.len() < ERRORS_MAX || inner.errors.contains_key(&words) {
                *inner.errors.entry(words).or_default() += 1;
            }
        });
    }

    /// Since this was last asked.
    pub(super) fn minute(&self) -> Tally {
        self.with(|inner| std::mem::take(&mut inner.minute))
    }

    /// Since the beginning.
    pub(super) fn total(&self) -> Tally {
        self.with(|inner| inner.total)
    }

    /// Words of errors, and how often each was heard.
    pub(super) fn errors(&self) -> BTreeMap<String, u64> {
        self.with(|inner| inner.errors.clone())
    }
}

/// Runs clients until `stop`.
pub(super) async fn run(
    proxies: Vec<String>,
    clients: u32,
    seen: Arc<Seen>,
    stop: CancellationToken,
) {
    let mut all = JoinSet::new();
    for number in 0..clients {
        let address = proxies[number as usize % proxies.len()].clone();
        let (seen, stop) = (seen.clone(), stop.clone());
        all.spawn(async move { stop.run_until_cancelled(one(number, address, seen)).await });
    }
    while all.join_next().await.is_some() {}
}

async fn one(number: u32, address: String, seen: Arc<Seen>) {
    let mut connection = None;
    for turn in 0u64.. {
        let began = Instant::now();
        let answer = ask(&mut connection, &address, number, turn).await;
        if answer.is_err() {
            connection = None;
        }
        seen.note(began.elapsed(), &answer);
        tokio::time::sleep(PACE).await;
    }
}

async fn ask(
    connection: &mut Option<MultiplexedConnection>,
    address: &str,
    number: u32,
    turn: u64,
) -> RedisResult<()> {
    let open = match connection {
        Some(open) => open,
        None => connection.insert(connect(address).await?),
    };
    let key = format!("calm-{number}-{}", turn % KEYS);
    let command = match turn.is_multiple_of(2) {
        true => redis::cmd("SET").arg(key).arg(turn).to_owned(),
        false => redis::cmd("GET").arg(key).to_owned(),
    };
    command.query_async::<()>(open).await
}
