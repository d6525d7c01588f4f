//! Those that do what the others wait for: push elements, publish messages, set marks.
//!
//! Invariant: numbers are sent once, in order, and the last one is known before it is sent.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{
    super::wire::{Wire, integer},
    Berth, Feed,
};
use crate::chaos::history::now_us;

/// Messages are sent so often, several at a time.
const PUBLISH_TICK: Duration = Duration::from_millis(4);
/// Behind its time, a publisher sends at most so many at once.
const PUBLISH_BATCH_MAX: u64 = 64;
/// Between two marks.
const MARK_PACE: Duration = Duration::from_millis(20);

/// Pushes an element to each of these clients' lists, once in each pace.
pub(super) async fn pusher(
    berth: &Berth,
    feed: &Feed,
    lists: &[usize],
    wire: &mut Wire,
) -> anyhow::Result<()> {
    let mut turn = interval(berth.pace);
    turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 1.. {
        let goes_on = berth.goes_on(Duration::ZERO).await;
        if goes_on {
            turn.tick().await;
        } else {
            feed.ends_with(number);
        }
        for list in lists {
            let from_us = now_us();
            let line = format!("RPUSH pu:{list}:list {number}:{from_us}");
            integer(&wire.ask(&line).await?)?;
            berth.book.came(from_us);
        }
        if !goes_on {
            break;
        }
    }
    Ok(())
}

/// Publishes at a rate, topic after topic.
pub(super) async fn publisher(
    berth: &Berth,
    feed: &Feed,
    topics: &[String],
    per_second: u64,
    wire: &mut Wire,
) -> anyhow::Result<()> {
    let (began, count) = (Instant::now(), topics.len() as u64);
    let mut turn = interval(PUBLISH_TICK);
    turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sent = 0;
    while berth.goes_on(Duration::ZERO).await {
        turn.tick().await;
        let due = began.elapsed().as_micros() as u64 * per_second / 1_000_000;
        let batch = due.saturating_sub(sent).min(PUBLISH_BATCH_MAX);
        publish(berth, topics, sent, batch, wire).await?;
        sent += batch;
    }
    // Up to the end of a round, and one round more.
    let rest = (count - sent % count) % count;
    publish(berth, topics, sent, rest, wire).await?;
    sent += rest;
    feed.ends_with(sent / count + 1);
    publish(berth, topics, sent, count, wire).await
}

async fn publish(
    berth: &Berth,
    topics: &[String],
    first: u64,
    batch: u64,
    wire: &mut Wire,
) -> anyhow::Result<()> {
    let (from_us, count) = (now_us(), topics.len() as u64);
    let line = |n: u64| {
        let topic = &topics[(n % count) as usize];
        format!("{topic} {}:{from_us}\n", n / count + 1)
    };
    let lines: String = (first..first + batch).map(line).collect();
    wire.say(&lines).await?;
    for _ in 0..batch {
        integer(&wire.hear().await?)?;
    }
    if batch > 0 {
        berth.book.came(from_us);
    }
    Ok(())
}

/// Sets a key that is monitored and tracked.
pub(super) async fn marker(berth: &Berth, feed: &Feed, wire: &mut Wire) -> anyhow::Result<()> {
    for number in 1.. {
        let goes_on = berth.goes_on(MARK_PACE).await;
        if !goes_on {
            feed.ends_with(number);
        }
        let from_us = now_us();
        wire.expect(&format!("SET pu:mark {number}:{from_us}"), "+OK\r\n")
            .await?;
        berth.book.came(from_us);
        if !goes_on {
            break;
        }
    }
    Ok(())
}
