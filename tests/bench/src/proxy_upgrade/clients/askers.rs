//! Clients that ask and are answered: with a full pipe, with a transaction open, with a key watched, and
//! those that only just come.
//!
//! Invariant: each has keys of its own, so that every answer is known before it comes.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    super::{
        book::{Book, Row},
        wire::{Wire, integer, is_closed, shown},
    },
    Berth,
};
use crate::chaos::history::now_us;

/// Commands of one pipeline.
const DEPTH: usize = 8;
/// One in so many pipelined clients hardly ever pauses, so that some pipe is full at any time.
const BUSY_ONE_IN: usize = 50;
const BUSY_PACE: Duration = Duration::from_millis(2);
/// One in so many keys that are watched is changed by another connection in each round.
const SPOILT_ONE_IN: usize = 5;
/// Between two connections that come and go.
const NEW_PACE: Duration = Duration::from_millis(20);

/// Pipelines of INCR.
pub(super) async fn pipelined(berth: &Berth, wire: &mut Wire) -> anyhow::Result<()> {
    let pace = match berth.number % BUSY_ONE_IN {
        0 => BUSY_PACE,
        _ => berth.pace,
    };
    let key = format!("pu:{}:count", berth.number);
    let mut row = Row::new(berth.book.clone(), key.clone(), 1);
    let ended = pipes(berth, &key, &mut row, pace, wire).await;
    counted(berth, &key, &row, DEPTH as u64, ended).await
}

async fn pipes(
    berth: &Berth,
    key: &str,
    row: &mut Row,
    pace: Duration,
    wire: &mut Wire,
) -> anyhow::Result<()> {
    let batch = format!("INCR {key}\n").repeat(DEPTH);
    while berth.goes_on(pace).await {
        let from_us = now_us();
        wire.say(&batch).await?;
        for _ in 0..DEPTH {
            row.came(integer(&wire.hear().await?)?);
        }
        berth.book.came(from_us);
        wire.is_quiet()?;
    }
    Ok(())
}

/// Who was closed in the middle of something can't know what of it was done: of `asked` that at most were
/// under way, each at most once, and everything that was answered.
async fn counted(
    berth: &Berth,
    key: &str,
    row: &Row,
    asked: u64,
    ended: anyhow::Result<()>,
) -> anyhow::Result<()> {
    if !ended.as_ref().is_err_and(is_closed) {
        return ended;
    }
    let mut other = Wire::connect(&berth.others_at).await?;
    let answered = row.next() - 1;
    // Adding nothing says also what no key is: 0.
    let done = integer(&other.ask(&format!("INCRBY {key} 0")).await?)?;
    if done < answered {
        let what = format!("{key}: {done} were done of {answered} that were answered");
        berth.book.lost(answered - done, what);
    }
    if done > answered + asked {
        let what = format!("{key}: {done} were done, {answered} answered, {asked} under way");
        berth.book.repeated(done - answered - asked, what);
    }
    ended
}

/// MULTI, two INCR, a pause with the transaction open, EXEC.
pub(super) async fn multi(berth: &Berth, wire: &mut Wire) -> anyhow::Result<()> {
    let key = format!("pu:{}:multi", berth.number);
    let mut row = Row::new(berth.book.clone(), key.clone(), 1);
    let ended = transactions(berth, &key, &mut row, wire).await;
    counted(berth, &key, &row, 2, ended).await
}

async fn transactions(
    berth: &Berth,
    key: &str,
    row: &mut Row,
    wire: &mut Wire,
) -> anyhow::Result<()> {
    loop {
        timed(&berth.book, wire, "MULTI", "+OK\r\n").await?;
        for _ in 0..2 {
            timed(&berth.book, wire, &format!("INCR {key}"), "+QUEUED\r\n").await?;
        }
        let goes_on = berth.goes_on(berth.pace).await;
        let from_us = now_us();
        let answer = wire.ask("EXEC").await?;
        berth.book.came(from_us);
        let counts = answer
            .strip_prefix("*2\r\n")
            .map(|rest| rest.split_inclusive("\r\n"));
        let counts = counts.ok_or_else(|| anyhow::anyhow!("EXEC: {}", shown(&answer)))?;
        for count in counts {
            row.came(integer(count)?);
        }
        wire.is_quiet()?;
        if !goes_on {
            return Ok(());
        }
    }
}

/// WATCH, a pause, MULTI, SET, a pause, EXEC: which must do nothing exactly if another connection has
/// changed the key.
pub(super) async fn watch(berth: &Berth, wire: &mut Wire) -> anyhow::Result<()> {
    let key = format!("pu:{}:watch", berth.number);
    let mut other = match berth.number % SPOILT_ONE_IN {
        0 => Some(Wire::connect(&berth.others_at).await?),
        _ => None,
    };
    let want = match other {
        Some(_) => "*-1\r\n",
        None => "*1\r\n+OK\r\n",
    };
    let mut round = 0_u64;
    loop {
        round += 1;
        timed(&berth.book, wire, &format!("WATCH {key}"), "+OK\r\n").await?;
        berth.goes_on(berth.pace / 2).await;
        if let Some(other) = &mut other {
            other
                .expect(&format!("SET {key} other:{round}"), "+OK\r\n")
                .await?;
        }
        timed(&berth.book, wire, "MULTI", "+OK\r\n").await?;
        timed(
            &berth.book,
            wire,
            &format!("SET {key} {round}"),
            "+QUEUED\r\n",
        )
        .await?;
        let goes_on = berth.goes_on(berth.pace / 2).await;
        timed(&berth.book, wire, "EXEC", want).await?;
        if !goes_on {
            return Ok(());
        }
    }
}

/// Connections that come, ask one thing, and go; they are new all the time.
pub(super) async fn newcomers(address: String, book: Book, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let from_us = now_us();
        book.connected();
        let come = async {
            let mut wire = Wire::connect(&address).await?;
            wire.expect("PING", "+PONG\r\n").await
        };
        match come.await {
            Ok(()) => {
                book.came(from_us);
                book.intact();
            }
            Err(error) => book.out("that is new", &error),
        }
        sleep(NEW_PACE).await;
    }
}

async fn timed(book: &Book, wire: &mut Wire, line: &str, want: &str) -> anyhow::Result<()> {
    let from_us = now_us();
    wire.expect(line, want).await?;
    book.came(from_us);
    Ok(())
}
