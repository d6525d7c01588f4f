//! Clients that put their connection into every state there is, and die at any byte of it.
//!
//! Each new connection is first looked at: it must be as new, whoever had its place before.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use anyhow::Context;

use super::{Crowd, DATABASES, Stage, address};
use crate::{
    random::Random,
    wire::{Connection, Value, Words, encode, words},
};

/// Names of the ordinary clients' keys, so that a state that leaks hits them.
const KEYS: &[&str] = &[
    "t:0:1", "n:0:2", "l:0:3", "h:0:4", "s:0:5", "t:1:1", "l:2:7",
];
/// A database that no ordinary client uses: whatever lands elsewhere was led there.
const OWN_DATABASE: usize = DATABASES + 1;
const ACTS_MAX: usize = 12;
/// A misfit reads now and then, never for long.
const READ_LIMIT: Duration = Duration::from_millis(20);

/// Until the ordinary clients are done.
pub(super) fn live(crowd: &Crowd, number: usize, stage: &Stage) {
    let stream = u64::try_from(number).unwrap_or_default() + 1_000_000;
    let mut random = Random::new(crowd.seed, stream);
    while !stage.over.load(Relaxed) {
        match once(address(crowd, number), &mut random) {
            Ok(()) => {}
            Err(error) => stage.complain(format!("misfit {number}: {error:#}")),
        }
        stage.deaths.fetch_add(1, Relaxed);
    }
}

/// One connection's life. What it does after it was looked at may fail.
fn once(address: &str, random: &mut Random) -> anyhow::Result<()> {
    let mut connection = Connection::open(address)?;
    is_new(&mut connection)?;
    let mut frames = Vec::new();
    encode(
        &mut frames,
        &["SELECT".to_owned(), OWN_DATABASE.to_string()],
    );
    for _ in 0..random.between(1, ACTS_MAX) {
        encode(&mut frames, &act(random));
    }
    // At any byte, also within a frame; with replies unread, or some read.
    let cut = random.between(0, frames.len());
    let _ = connection.send(&frames[..cut]);
    if random.percent(40) {
        connection.set_read_limit(READ_LIMIT)?;
        for _ in 0..random.below(6) {
            if connection.read().is_err() {
                break;
            }
        }
    }
    Ok(())
}

/// No trace of another client on a connection that was just opened.
fn is_new(connection: &mut Connection) -> anyhow::Result<()> {
    let error = |text: &str| Value::Error(text.as_bytes().to_vec());
    let expected: &[(&[&str], Value)] = &[
        (&["CLIENT", "GETNAME"], Value::Null),
        (&["EXEC"], error("ERR EXEC without MULTI")),
        (&["GET", "judge:poison"], Value::Null),
        (&["PING"], Value::Status(b"PONG".to_vec())),
        (&["CLIENT", "GETREDIR"], Value::Number(-1)),
    ];
    let mut frames = Vec::new();
    for (command, _) in expected {
        encode(&mut frames, command);
    }
    connection.send(&frames)?;
    for (command, wanted) in expected {
        let reply = connection.read().with_context(|| command.join(" "))?;
        anyhow::ensure!(
            reply == *wanted,
            "a new connection is not as new: {}: {reply:?}, not {wanted:?}",
            command.join(" ")
        );
    }
    Ok(())
}

fn act(random: &mut Random) -> Words {
    let key = *random.pick(KEYS);
    let other = *random.pick(KEYS);
    match random.below(24) {
        0 => words(&["HELLO", "3", "SETNAME", "misfit"]),
        1 => words(&["HELLO", "2"]),
        2 | 3 => words(&["SUBSCRIBE", "news", key]),
        4 => words(&["PSUBSCRIBE", "*"]),
        5 => words(&["SSUBSCRIBE", key]),
        6 | 7 => words(&["MULTI"]),
        8 => words(&["EXEC"]),
        9 => words(&["WATCH", key]),
        10 => words(&["SELECT", &(OWN_DATABASE + random.below(3)).to_string()]),
        11 => words(&["CLIENT", "REPLY", *random.pick(&["OFF", "SKIP", "ON"])]),
        12 => words(&["CLIENT", "SETNAME", "misfit"]),
        13 => words(&[
            "CLIENT",
            "TRACKING",
            "ON",
            *random.pick(&["BCAST", "NOLOOP", "OPTIN"]),
        ]),
        14 => words(&["BLPOP", "nothing", *random.pick(&["0", "0.05", "1"])]),
        15 => words(&["BLMOVE", "{q}a", "{q}b", "LEFT", "LEFT", "0.1"]),
        16 => words(&["XREAD", "BLOCK", "50", "STREAMS", "nostream", "$"]),
        17 => words(&["PUBLISH", "news", "to everybody"]),
        18 => words(&["MGET", key, other, "judge:poison"]),
        19 => words(&["SET", "judge:poison", "poison"]),
        20 => words(&["SET", key, "poison"]),
        21 => words(&["DEL", key, other]),
        22 => words(&["GET", key]),
        _ => words(&[
            "MSET",
            key,
            "poison",
            other,
            "poison",
            "judge:poison",
            "poison",
        ]),
    }
}
