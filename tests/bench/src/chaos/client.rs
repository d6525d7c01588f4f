//! Clients of five kinds, each an ordinary redis-rs client at one proxy, that write down what they
//! asked and what they were told.
//!
//! Invariant: nothing is ever repeated here, and a value is never asked for twice; so whatever is in
//! the data twice was executed twice.

use std::{sync::Arc, time::Duration};

use redis::{AsyncConnectionConfig, RedisError, RedisResult, aio::MultiplexedConnection};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    check::{tally, twin},
    history::{History, Kind, Outcome, Record, now_us},
};

/// Longer than a proxy holds; after it, nobody knows.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(8);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// After an error, so that a dead mesh isn't asked a million times.
const ERROR_PAUSE: Duration = Duration::from_millis(50);
/// Elements of one list: it is read as a whole at the end.
const LIST_MAX: u64 = 5_000;
/// Operations on one register, by all its clients: what the search for an order can take.
const REGISTER_SECONDS: u64 = 3;
/// Requests that are sent at once, and every how many of a client: proxies must keep their order.
const BURST: u64 = 8;
const BURST_EVERY: u64 = 4;
/// Clients that share a register.
const REGISTER_CLIENTS: u32 = 4;

/// Does its work at the first execution for an id, and counts all of them. It swallows the refusals of
/// a node that is no primary, on purpose: such a node would answer as if it had done the work.
const SCRIPT: &str = "\
    local times = redis.pcall('HINCRBY', KEYS[2], ARGV[1], 1) \
    if type(times) == 'table' and not string.find(times.err, 'READONLY') then return times end \
    if times == 1 then redis.pcall('RPUSH', KEYS[1], ARGV[1]) end \
    return ARGV[1]";

/// Who asks, where, and how often.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// Endpoints, dealt out in turn.
    pub(super) proxies: Vec<String>,
    /// How many clients.
    pub(super) clients: u32,
    /// Number of the first one; numbers are unique in a run.
    pub(super) first: u32,
    /// Between two requests of a client.
    pub(super) pace: Duration,
}

/// Runs all clients until `stop`.
///
/// # Errors
/// When a client died.
pub(super) async fn run(
    load: &Load,
    history: &Arc<History>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut clients = JoinSet::new();
    for number in load.first..load.first + load.clients {
        let address = load.proxies[number as usize % load.proxies.len()].clone();
        let client = Client {
            number,
            address,
            sequence: 0,
            connection: None,
            history: history.clone(),
        };
        clients.spawn(client.run(load.pace, stop.clone()));
    }
    while let Some(ended) = clients.join_next().await {
        ended?;
    }
    Ok(())
}

/// Opens a connection with the wait times of this load.
///
/// # Errors
/// As the library says.
pub(crate) async fn connect(address: &str) -> RedisResult<MultiplexedConnection> {
    let client = redis::Client::open(format!("redis://{address}/"))?;
    let config = AsyncConnectionConfig::new()
        .set_response_timeout(Some(RESPONSE_TIMEOUT))
        .set_connection_timeout(Some(CONNECT_TIMEOUT));
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
}

struct Client {
    number: u32,
    address: String,
    sequence: u64,
    connection: Option<MultiplexedConnection>,
    history: Arc<History>,
}

impl Client {
    async fn run(mut self, pace: Duration, stop: CancellationToken) {
        while !stop.is_cancelled() {
            self.sequence += 1;
            let fine = match self.connection.take() {
                Some(connection) => self.ask(connection).await,
                None => match connect(&self.address).await {
                    Ok(connection) => self.ask(connection).await,
                    // Nothing was sent.
                    Err(_) => false,
                },
            };
            let pause = if fine { pace } else { ERROR_PAUSE.max(pace) };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// A value that nobody else writes.
    fn value(&self) -> u64 {
        u64::from(self.number) << 40 | self.sequence
    }

    /// One request of this client's kind; whether it was answered as asked.
    async fn ask(&mut self, mut connection: MultiplexedConnection) -> bool {
        if self.number.is_multiple_of(5) && self.sequence.is_multiple_of(BURST_EVERY) {
            return self.burst(connection).await;
        }
        let (number, value) = (self.number, self.value());
        let part = self.sequence / LIST_MAX;
        let (kind, key) = match number % 5 {
            0 => (Kind::Add, format!("add-{number}-{part}")),
            1 => (Kind::Count, format!("count-{number}-{part}")),
            2 => (Kind::Once, format!("{{once-{number}-{part}}}")),
            3 => (Kind::Block, format!("{{block-{number}-{part}}}")),
            _ => {
                let (group, turn) = (
                    number / 5 / REGISTER_CLIENTS,
                    now_us() / 1_000_000 / REGISTER_SECONDS,
                );
                let kind = if self.sequence.is_multiple_of(2) {
                    Kind::Set
                } else {
                    Kind::Get
                };
                (kind, format!("register-{group}-{turn}"))
            }
        };
        let from_us = now_us();
        let answer = send(&mut connection, kind, &key, value).await;
        let to_us = now_us();
        let (outcome, read, error) = match answer {
            Ok(read) => (Outcome::Acked, read, None),
            Err(error) => (outcome_of(&error), None, Some(error.to_string())),
        };
        let (value, place) = match (kind, read) {
            (Kind::Get, read) => (read.unwrap_or(value), 0),
            (_, place) => (value, place.unwrap_or(0)),
        };
        let lost = error.is_some() && outcome == Outcome::Unknown;
        self.history.push(Record {
            client: number,
            kind,
            key,
            value,
            place,
            from_us,
            to_us,
            outcome,
            error,
        });
        if !lost {
            self.connection = Some(connection);
        }
        outcome == Outcome::Acked
    }

    /// Several elements at once, each with an answer of its own; whether all were answered as asked.
    async fn burst(&mut self, mut connection: MultiplexedConnection) -> bool {
        let key = format!("add-{}-{}", self.number, self.sequence / LIST_MAX);
        let mut asked = redis::pipe();
        asked.ignore_errors();
        let mut values = Vec::new();
        for _ in 0..BURST {
            asked.cmd("RPUSH").arg(&key).arg(self.value());
            values.push(self.value());
            self.sequence += 1;
        }
        let from_us = now_us();
        let answers = asked.query_async(&mut connection).await;
        let to_us = now_us();
        let answers: Vec<RedisResult<u64>> = match answers {
            Ok(answers) => answers,
            // Nobody knows of any of them.
            Err(error) => values
                .iter()
                .map(|_| Err(RedisError::clone(&error)))
                .collect(),
        };
        let mut fine = answers.len() == values.len();
        let mut lost = !fine;
        for (value, answer) in values.into_iter().zip(answers) {
            let (outcome, place, error) = match answer {
                Ok(place) => (Outcome::Acked, place, None),
                Err(error) => (outcome_of(&error), 0, Some(error.to_string())),
            };
            fine &= outcome == Outcome::Acked;
            lost |= outcome == Outcome::Unknown;
            self.history.push(Record {
                client: self.number,
                kind: Kind::Add,
                key: key.clone(),
                value,
                place,
                from_us,
                to_us,
                outcome,
                error,
            });
        }
        if !lost {
            self.connection = Some(connection);
        }
        fine
    }
}

/// Sends one request; gives what was read, if it reads, or how long a list is with its element.
async fn send(
    connection: &mut MultiplexedConnection,
    kind: Kind,
    key: &str,
    value: u64,
) -> RedisResult<Option<u64>> {
    let mut command = match kind {
        Kind::Add => redis::cmd("RPUSH"),
        Kind::Count => redis::cmd("INCR"),
        Kind::Set => redis::cmd("SET"),
        Kind::Get => redis::cmd("GET"),
        Kind::Once => redis::cmd("EVAL"),
        Kind::Block => {
            let mut block = redis::pipe();
            block.atomic().cmd("RPUSH").arg(key).arg(value);
            block.cmd("RPUSH").arg(twin(key)).arg(value);
            block.query_async::<()>(connection).await?;
            return Ok(None);
        }
    };
    match kind {
        Kind::Once => {
            let script = command.arg(SCRIPT).arg(2);
            script.arg(key).arg(tally(key)).arg(value)
        }
        Kind::Count | Kind::Get => command.arg(key),
        _ => command.arg(key).arg(value),
    };
    if kind == Kind::Add {
        return command.query_async(connection).await.map(Some);
    }
    if kind == Kind::Get {
        let read: Option<u64> = command.query_async(connection).await?;
        return Ok(Some(read.unwrap_or(0)));
    }
    command.query_async::<()>(connection).await?;
    Ok(None)
}

/// Only words that promise it prove that nothing was executed.
fn outcome_of(error: &RedisError) -> Outcome {
    let words = error.to_string();
    if words.contains("not executed") || words.contains("EXECABORT") {
        Outcome::Refused
    } else {
        Outcome::Unknown
    }
}
