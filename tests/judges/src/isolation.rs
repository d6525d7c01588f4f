//! Many clients at once, each checked against a model of its own: no reply may be wrong, none may be
//! another's, whatever other clients do to their connections.

mod framing;
mod misfit;
mod model;

use std::{
    fmt,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use anyhow::Context;

pub use self::framing::{Framing, Tried, run as framing};
use self::model::Model;
use crate::{
    random::Random,
    wire::{Connection, Value, Words, encode, show},
};

/// Databases in use: clients of different ones use the same names.
const DATABASES: usize = 16;
const PIPELINE_MAX: usize = 50;
/// Enough to see what is wrong.
const WRONG_MAX: usize = 20;

/// Who takes part.
#[derive(Debug, Clone)]
pub struct Crowd {
    /// Addresses of the instance's proxies; clients are spread over them.
    pub addresses: Vec<String>,
    pub seed: u64,
    /// Clients that send ordinary commands and check every reply.
    pub clients: usize,
    /// Commands of each.
    pub commands: usize,
    /// Clients that change the state of their connection and die at any point, until the others are
    /// done.
    pub misfits: usize,
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    pub commands: u64,
    /// Connections that misfits used up.
    pub deaths: u64,
    pub wrong: Vec<String>,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commands, ", self.commands)?;
        write!(f, "{} connections died, ", self.deaths)?;
        writeln!(f, "{} wrong", self.wrong.len())?;
        for wrong in &self.wrong {
            writeln!(f, "\n{wrong}")?;
        }
        Ok(())
    }
}

/// What the threads share.
#[derive(Debug, Default)]
struct Stage {
    commands: AtomicU64,
    deaths: AtomicU64,
    wrong: Mutex<Vec<String>>,
    over: AtomicBool,
}

impl Stage {
    fn complain(&self, what: String) {
        if let Ok(mut wrong) = self.wrong.lock()
            && wrong.len() < WRONG_MAX
            // A hundred clients see the same.
            && !wrong.iter().any(|known| tail(known) == tail(&what))
        {
            wrong.push(what);
        }
    }
}

/// A complaint without its client.
fn tail(complaint: &str) -> &str {
    complaint
        .split_once(": ")
        .map_or(complaint, |(_, tail)| tail)
}

/// Lets all of them run to the end.
///
/// # Errors
/// The instance can't be emptied first.
pub fn run(crowd: &Crowd) -> anyhow::Result<Seen> {
    let reply = Connection::open(&crowd.addresses[0])?.call(&["FLUSHALL"])?;
    anyhow::ensure!(
        reply == Value::Status(b"OK".to_vec()),
        "FLUSHALL: {reply:?}"
    );
    let stage = Stage::default();
    thread::scope(|scope| {
        for number in 0..crowd.misfits {
            let stage = &stage;
            scope.spawn(move || misfit::live(crowd, number, stage));
        }
        let clients: Vec<_> = (0..crowd.clients)
            .map(|number| {
                scope.spawn({
                    let stage = &stage;
                    move || {
                        if let Err(error) = client(crowd, number, stage) {
                            stage.complain(format!("client {number}: {error:#}"));
                        }
                    }
                })
            })
            .collect();
        for client in clients {
            // A panic is shown by the scope.
            let _ = client.join();
        }
        stage.over.store(true, Relaxed);
    });
    Ok(Seen {
        commands: stage.commands.into_inner(),
        deaths: stage.deaths.into_inner(),
        wrong: stage.wrong.into_inner().unwrap_or_default(),
    })
}

fn address(crowd: &Crowd, number: usize) -> &str {
    &crowd.addresses[number % crowd.addresses.len()]
}

/// One ordinary client.
fn client(crowd: &Crowd, number: usize, stage: &Stage) -> anyhow::Result<()> {
    let seed = u64::try_from(number)?;
    let mut random = Random::new(crowd.seed, seed);
    let address = address(crowd, number);
    let mut connection = if number.is_multiple_of(2) {
        Connection::open(address)?
    } else {
        Connection::open_resp3(address)?
    };
    let database = number % DATABASES;
    let reply = connection.call(&["SELECT".to_owned(), database.to_string()])?;
    anyhow::ensure!(reply == Value::Status(b"OK".to_vec()), "SELECT: {reply:?}");
    let mut model = Model::new(number / DATABASES);
    let mut left = crowd.commands;
    while left > 0 {
        let count = random.between(1, PIPELINE_MAX).min(left);
        left -= count;
        let batch = model.batch(&mut random, count);
        exchange(&mut connection, &batch, number, stage)?;
    }
    Ok(())
}

/// Sends a batch at once and checks each reply.
fn exchange(
    connection: &mut Connection,
    batch: &[(Words, Value)],
    number: usize,
    stage: &Stage,
) -> anyhow::Result<()> {
    let mut frames = Vec::new();
    for (command, _) in batch {
        encode(&mut frames, command);
    }
    connection.send(&frames)?;
    for (command, expected) in batch {
        let reply = connection.read().with_context(|| show(command))?;
        stage.commands.fetch_add(1, Relaxed);
        anyhow::ensure!(
            reply == *expected,
            "wrong reply of client {number}: {}\n  got      {reply:?}\n  expected {expected:?}",
            show(command)
        );
    }
    Ok(())
}
