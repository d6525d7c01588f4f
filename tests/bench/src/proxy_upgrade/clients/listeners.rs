//! Clients that wait for what others do: elements of a list, messages, lines of MONITOR, changes of a key.
//!
//! Invariant: what comes is numbered by who sends it, and a listener ends when it has the last number.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{sleep, timeout};

use super::{
    super::{
        book::Row,
        wire::{Wire, shown},
    },
    Berth, Feed,
};

/// A key that is changed several times a second is told of within this.
const PUSH_LIMIT: Duration = Duration::from_secs(10);

/// `number:microseconds` as its sender wrote it.
fn stamped(text: &str) -> anyhow::Result<(u64, u64)> {
    let parsed = text
        .split_once(':')
        .and_then(|(number, at_us)| Some((number.parse().ok()?, at_us.parse().ok()?)));
    parsed.with_context(|| format!("{} instead of what was sent", shown(text)))
}

/// The last word of a reply.
fn last_word(reply: &str) -> &str {
    reply.trim_end().rsplit("\r\n").next().unwrap_or_default()
}

/// BLPOP of its own list, again and again.
pub(super) async fn blocked(berth: &Berth, feed: &Feed, wire: &mut Wire) -> anyhow::Result<()> {
    let line = format!("BLPOP pu:{}:list 0", berth.number);
    let mut row = Row::new(berth.book.clone(), line.clone(), 1);
    loop {
        wire.say(&line).await?;
        let Some(element) = heard(berth, feed, &row, wire).await? else {
            return Ok(());
        };
        anyhow::ensure!(element.starts_with("*2\r\n"), "{}", shown(&element));
        let (number, at_us) = stamped(last_word(&element))?;
        row.came(number);
        berth.book.came(at_us);
        if feed.is_last(number) {
            return wire.is_quiet();
        }
    }
}

/// Hears of one topic.
pub(super) async fn subscribed(berth: &Berth, feed: &Feed, wire: &mut Wire) -> anyhow::Result<()> {
    let whose = format!("{:?} {}", berth.kind, berth.number);
    // It has come in the middle.
    let mut row: Option<Row> = None;
    loop {
        let none = Row::new(berth.book.clone(), whose.clone(), 0);
        let known = row.as_ref().unwrap_or(&none);
        let Some(message) = heard(berth, feed, known, wire).await? else {
            return Ok(());
        };
        let is_one = ["message\r\n", "pmessage\r\n", "smessage\r\n"]
            .iter()
            .any(|word| message.contains(word));
        anyhow::ensure!(is_one, "{} instead of a message", shown(&message));
        let (number, at_us) = stamped(last_word(&message))?;
        row.get_or_insert_with(|| Row::new(berth.book.clone(), whose.clone(), number))
            .came(number);
        berth.book.came(at_us);
        if feed.is_last(number) {
            return wire.is_quiet();
        }
    }
}

/// Reads MONITOR and counts the marks among its lines.
pub(super) async fn monitor(berth: &Berth, feed: &Feed, wire: &mut Wire) -> anyhow::Result<()> {
    let whose = format!("monitor {}", berth.number);
    let mut row: Option<Row> = None;
    loop {
        let none = Row::new(berth.book.clone(), whose.clone(), 0);
        let known = row.as_ref().unwrap_or(&none);
        let Some(line) = heard(berth, feed, known, wire).await? else {
            return Ok(());
        };
        anyhow::ensure!(line.starts_with('+'), "{} instead of a line", shown(&line));
        let Some((_, mark)) = line.split_once("\"pu:mark\" \"") else {
            continue;
        };
        let (number, at_us) = stamped(mark.trim_end().trim_end_matches('"'))?;
        row.get_or_insert_with(|| Row::new(berth.book.clone(), whose.clone(), number))
            .came(number);
        berth.book.came(at_us);
        if feed.is_last(number) {
            return Ok(());
        }
    }
}

/// Reads a key, is told that it has changed, reads it again.
pub(super) async fn tracking(berth: &Berth, feed: &Feed, wire: &mut Wire) -> anyhow::Result<()> {
    loop {
        wire.say("GET pu:mark").await?;
        let mut told = false;
        let value = loop {
            let reply = wire.hear().await?;
            if !reply.starts_with('>') {
                break reply;
            }
            told = true;
        };
        if value != "_\r\n" {
            let (number, at_us) = stamped(last_word(&value))?;
            berth.book.came(at_us);
            if feed.is_last(number) {
                return Ok(());
            }
        }
        if told {
            continue;
        }
        let push = tokio::select! {
            push = timeout(PUSH_LIMIT, wire.hear_however_long()) => push,
            () = berth.give_up.cancelled() => {
                berth.book.lost(1, format!("tracking {}: not told of the last change", berth.number));
                return Ok(());
            }
        };
        match push {
            Ok(push) => {
                let push = push?;
                let is_one = push.starts_with('>') && push.contains("invalidate");
                anyhow::ensure!(is_one, "{} instead of a change", shown(&push));
            }
            Err(_) => {
                let whose = berth.number;
                berth
                    .book
                    .lost(1, format!("tracking {whose}: no change in {PUSH_LIMIT:?}"));
            }
        }
        // So that not every change is read, as a cache would not.
        sleep(berth.pace / 4).await;
    }
}

/// What comes next; nothing more once the run is over, which is a loss.
async fn heard(
    berth: &Berth,
    feed: &Feed,
    row: &Row,
    wire: &mut Wire,
) -> anyhow::Result<Option<String>> {
    tokio::select! {
        heard = wire.hear_however_long() => Ok(Some(heard?)),
        () = berth.give_up.cancelled() => {
            let (next, last) = (row.next(), feed.last());
            let missing = (last + 1).saturating_sub(next).max(1);
            let whose = berth.number;
            berth.book.lost(missing, format!("{whose}: waits for {next} of {last} at the end"));
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stamp_is_the_last_word() {
        let message = "*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$5\r\n17:99\r\n";
        assert_eq!(stamped(last_word(message)).unwrap(), (17, 99));
        assert!(stamped("17").is_err());
    }
}
