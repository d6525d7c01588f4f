//! Clients of the load, each with its own connection, its own keys and its own ledger.
//!
//! The library is redis-rs, one half of the clients in RESP2 and one half in RESP3. A request that
//! fails is counted and never repeated here: the mesh has to make that unnecessary.

use std::time::Duration;

use redis::{AsyncConnectionConfig, RedisError, RedisResult, aio::MultiplexedConnection};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Target,
    ledger::{Kind, Ledger},
};

/// Longer than the longest hold that a proxy allows, so that a wait is seen as a wait.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// After an error, so that a dead mesh isn't asked a million times.
const ERROR_PAUSE: Duration = Duration::from_millis(20);

/// Commands of one pipeline: this many INCR, SET and RPUSH.
const PIPELINE_INCR: u64 = 8;
const PIPELINE_SET: u64 = 4;
const PIPELINE_PUSH: u64 = 4;

/// Acknowledges its second argument whatever became of the writes: the worst script there is.
const SCRIPT: &str =
    "redis.pcall('INCR', KEYS[1]) redis.pcall('RPUSH', KEYS[2], ARGV[1]) return ARGV[1]";

/// All clients of a run.
#[derive(Debug)]
pub(super) struct Clients {
    workers: JoinSet<Ledger>,
    stop: CancellationToken,
}

impl Clients {
    /// Connects all of them before the first one starts to write.
    pub(super) async fn start(
        target: &Target,
        count: u32,
        pace: Duration,
        run: &str,
    ) -> anyhow::Result<Self> {
        let mut clients = Vec::new();
        for number in 0..count {
            clients.push(Client::connect(target, pace, run, number).await?);
        }
        let (mut workers, stop) = (JoinSet::new(), CancellationToken::new());
        for client in clients {
            workers.spawn(client.run(stop.clone()));
        }
        Ok(Self { workers, stop })
    }

    pub(super) async fn stop(mut self) -> anyhow::Result<Vec<Ledger>> {
        self.stop.cancel();
        let mut ledgers = Vec::new();
        while let Some(ledger) = self.workers.join_next().await {
            ledgers.push(ledger?);
        }
        Ok(ledgers)
    }
}

/// Opens a connection with the wait times of this load.
///
/// # Errors
/// As the library says.
pub async fn connect(address: &str, resp3: bool) -> RedisResult<MultiplexedConnection> {
    let protocol = if resp3 { "?protocol=resp3" } else { "" };
    let client = redis::Client::open(format!("redis://{address}/{protocol}"))?;
    let config = AsyncConnectionConfig::new()
        .set_response_timeout(Some(RESPONSE_TIMEOUT))
        .set_connection_timeout(Some(CONNECT_TIMEOUT));
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
}

struct Client {
    kind: Kind,
    addresses: [String; 2],
    resp3: bool,
    pace: Duration,
    connection: MultiplexedConnection,
    /// Through another proxy, where there is one; readers read here.
    second: MultiplexedConnection,
    ledger: Ledger,
}

impl Client {
    async fn connect(
        target: &Target,
        pace: Duration,
        run: &str,
        number: u32,
    ) -> anyhow::Result<Self> {
        let count = target.proxies.len();
        anyhow::ensure!(count > 0, "there is no proxy to connect to");
        let at = |n: u32| target.proxies[n as usize % count].clone();
        let addresses = [at(number), at(number + 1)];
        let resp3 = (number / 5) % 2 == 1;
        Ok(Self {
            kind: Kind::of(number),
            connection: connect(&addresses[0], resp3).await?,
            second: connect(&addresses[1], resp3).await?,
            addresses,
            resp3,
            pace,
            ledger: Ledger::new(run, number),
        })
    }

    async fn run(mut self, stop: CancellationToken) -> Ledger {
        while !stop.is_cancelled() {
            let done = match self.kind {
                Kind::Plain => self.plain().await,
                Kind::Pipelined => self.pipelined().await,
                Kind::Script => self.script().await,
                Kind::Transaction => self.transaction().await,
                Kind::Reader => self.reader().await,
            };
            if let Err(error) = done {
                self.recover(&error).await;
            }
            if !self.pace.is_zero() {
                tokio::time::sleep(self.pace).await;
            }
        }
        self.ledger
    }

    async fn recover(&mut self, error: &RedisError) {
        self.ledger.failed(self.kind, error);
        tokio::time::sleep(ERROR_PAUSE).await;
        if error.is_unrecoverable_error() || error.is_timeout() {
            // A failure to connect shows as the next request's error on the dead connection.
            if let Ok(again) = connect(&self.addresses[0], self.resp3).await {
                self.connection = again;
            }
            if let Ok(again) = connect(&self.addresses[1], self.resp3).await {
                self.second = again;
            }
        }
    }

    async fn plain(&mut self) -> RedisResult<()> {
        let ledger = &mut self.ledger;
        ledger.counted_ambiguous += 1;
        let counter = ledger.keys.counter();
        let started = Instant::now();
        redis::cmd("INCR")
            .arg(counter)
            .query_async::<u64>(&mut self.connection)
            .await?;
        ledger.answered(started.elapsed(), 1);
        ledger.counted_ambiguous -= 1;
        ledger.counted += 1;
        let ids = ledger.set.take(1);
        let key = ledger.keys.id(ids.start);
        let started = Instant::now();
        redis::cmd("SET")
            .arg(key)
            .arg(ids.start)
            .query_async::<()>(&mut self.connection)
            .await?;
        ledger.answered(started.elapsed(), 1);
        ledger.set.acknowledge(ids);
        Ok(())
    }

    async fn pipelined(&mut self) -> RedisResult<()> {
        let ledger = &mut self.ledger;
        let mut pipe = redis::pipe();
        let (set, pushed) = (
            ledger.set.take(PIPELINE_SET),
            ledger.pushed.take(PIPELINE_PUSH),
        );
        ledger.counted_ambiguous += PIPELINE_INCR;
        for _ in 0..PIPELINE_INCR {
            pipe.cmd("INCR").arg(ledger.keys.counter());
        }
        for id in set.clone() {
            pipe.cmd("SET").arg(ledger.keys.id(id)).arg(id);
        }
        for id in pushed.clone() {
            pipe.cmd("RPUSH").arg(ledger.keys.list(id)).arg(id);
        }
        let started = Instant::now();
        pipe.query_async::<Vec<redis::Value>>(&mut self.connection)
            .await?;
        ledger.answered(
            started.elapsed(),
            PIPELINE_INCR + PIPELINE_SET + PIPELINE_PUSH,
        );
        ledger.counted_ambiguous -= PIPELINE_INCR;
        ledger.counted += PIPELINE_INCR;
        ledger.set.acknowledge(set);
        ledger.pushed.acknowledge(pushed);
        Ok(())
    }

    async fn script(&mut self) -> RedisResult<()> {
        let ledger = &mut self.ledger;
        let ids = ledger.pushed.take(1);
        ledger.counted_ambiguous += 1;
        let mut eval = redis::cmd("EVAL");
        eval.arg(SCRIPT)
            .arg(2)
            .arg(ledger.keys.counter())
            .arg(ledger.keys.list(ids.start));
        let started = Instant::now();
        eval.arg(ids.start)
            .query_async::<String>(&mut self.connection)
            .await?;
        ledger.answered(started.elapsed(), 1);
        ledger.counted_ambiguous -= 1;
        ledger.counted += 1;
        ledger.pushed.acknowledge(ids);
        Ok(())
    }

    async fn transaction(&mut self) -> RedisResult<()> {
        let ledger = &mut self.ledger;
        let ids = ledger.pushed.take(1);
        ledger.counted_ambiguous += 1;
        let mut pipe = redis::pipe();
        pipe.atomic().cmd("INCR").arg(ledger.keys.counter());
        pipe.cmd("RPUSH")
            .arg(ledger.keys.list(ids.start))
            .arg(ids.start);
        let started = Instant::now();
        pipe.query_async::<(u64, u64)>(&mut self.connection).await?;
        ledger.answered(started.elapsed(), 2);
        ledger.counted_ambiguous -= 1;
        ledger.counted += 1;
        ledger.pushed.acknowledge(ids);
        Ok(())
    }

    async fn reader(&mut self) -> RedisResult<()> {
        let ledger = &mut self.ledger;
        let (key, value) = (ledger.keys.register(), ledger.register + 1);
        let mut set = redis::cmd("SET");
        let started = Instant::now();
        set.arg(&key)
            .arg(value)
            .query_async::<()>(&mut self.connection)
            .await?;
        ledger.answered(started.elapsed(), 1);
        ledger.register = value;
        let mut get = redis::cmd("GET");
        let started = Instant::now();
        let read: Option<u64> = get.arg(&key).query_async(&mut self.second).await?;
        ledger.answered(started.elapsed(), 1);
        if read.unwrap_or_default() < value {
            ledger.stale_reads += 1;
        }
        Ok(())
    }
}
