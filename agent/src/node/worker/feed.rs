//! Whether a replica's primary has begun to send: that the link is up does not say so.
//!
//! After a full copy an engine calls the link up at once. Its primary begins to send what it has taken
//! since only when it is acknowledged; an acknowledgment that comes before the primary has noticed the
//! copy's end is dropped, and the next one comes a second later. A primary that dies in that second
//! takes with it what it never sent. Invariant: a link counts as up only once a byte has come over it
//! after the copy, or if there was no full copy.

use super::Worker;
use crate::{
    control::{Control, ControlError},
    probe::Info,
};

/// What is known of the connection that feeds a replica.
#[derive(Debug, Default)]
pub(super) struct Feed {
    /// This process was fed before this life of the agent, which is only about to look.
    is_inherited: bool,
    /// The engine's number of the connection that is known to bring the stream; 0: none.
    begun: u64,
    /// One that is not: its number, and the replica's offset when it was first seen.
    waiting: Option<(u64, u64)>,
}

/// A link that the replica calls up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sight {
    /// The engine numbers a connection anew for each full copy; one that continues keeps its number.
    pub(super) connection: u64,
    pub(super) offset: u64,
    /// It went on from another history, which a full copy would have made it forget.
    pub(super) continued: bool,
}

impl Feed {
    /// Of a process that this agent has just heard for the first time. An adopted one that is fed
    /// already has been so since before the agent looked: a second look could take a second.
    pub(super) fn of(is_adopted: bool) -> Self {
        Self {
            is_inherited: is_adopted,
            ..Self::default()
        }
    }

    /// Whether the stream has begun; `None`: the link is not up.
    pub(super) fn look(&mut self, link: Option<Sight>) -> bool {
        let is_inherited = std::mem::take(&mut self.is_inherited);
        let Some(seen) = link.filter(|seen| seen.connection > 0) else {
            self.waiting = None;
            return false;
        };
        let moved = |(connection, offset)| connection == seen.connection && offset < seen.offset;
        let has_begun = seen.connection == self.begun
            || seen.continued
            || is_inherited
            || self.waiting.is_some_and(moved);
        if has_begun {
            (self.begun, self.waiting) = (seen.connection, None);
        } else if self.waiting.is_none_or(|(c, _)| c != seen.connection) {
            self.waiting = Some((seen.connection, seen.offset));
        }
        has_begun
    }

    /// Whether the primary may still wait for an acknowledgment.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }
}

impl Worker {
    /// Corrects the report of a link that the engine calls up, and has the replica acknowledge at once
    /// what it has, at each look until the stream begins.
    pub(super) async fn look_at_feed(&mut self, info: &Info, connection: u64) {
        let link = self.report.link_up.then(|| Sight {
            connection,
            offset: self.report.offset,
            continued: info.has_continued(),
        });
        self.report.link_up = self.run.feed.look(link);
        if self.run.feed.is_waiting()
            && let Some(control) = self.admin().await
        {
            // Nobody answers it. Lost, the replica's own clock does it within a second.
            let _ = control.tell(&["REPLCONF", "GETACK", "*"]).await;
        }
    }
}

/// The number of the connection that feeds this replica; 0: there is none.
///
/// # Errors
/// The engine does not answer.
pub(super) async fn feeding_connection(control: &mut Control) -> Result<u64, ControlError> {
    let listed = control.call(&["CLIENT", "LIST", "TYPE", "master"]).await?;
    let text = String::from_utf8_lossy(listed.as_bytes().unwrap_or_default()).into_owned();
    let number = text.split_ascii_whitespace().next();
    let number = number.and_then(|field| field.strip_prefix("id=")?.parse().ok());
    Ok(number.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up(connection: u64, offset: u64) -> Option<Sight> {
        Some(Sight {
            connection,
            offset,
            continued: false,
        })
    }

    #[test]
    fn a_full_copy_counts_once_something_has_come_after_it() {
        let mut feed = Feed::of(false);
        assert!(!feed.look(up(5, 100)) && feed.is_waiting());
        assert!(!feed.look(up(5, 100)) && feed.is_waiting());
        assert!(feed.look(up(5, 114)) && !feed.is_waiting());
        assert!(feed.look(up(5, 114)), "and goes on to");
    }

    #[test]
    fn another_copy_between_two_looks_is_told_by_its_connection() {
        let mut feed = Feed::of(false);
        assert!(!feed.look(up(5, 100)));
        assert!(feed.look(up(5, 101)));
        assert!(!feed.look(up(6, 200)), "a new connection, a new copy");
        assert!(
            !feed.look(up(7, 300)),
            "its offset is no proof for the next"
        );
        assert!(feed.look(up(7, 301)));
    }

    #[test]
    fn a_link_that_continues_counts_at_once() {
        let mut feed = Feed::of(false);
        assert!(!feed.look(up(5, 100)));
        assert!(feed.look(up(5, 101)));
        assert!(!feed.look(None), "down");
        assert!(feed.look(up(5, 101)), "the same connection, resumed");
        let mut demoted = Feed::of(false);
        let continued = up(8, 56).map(|seen| Sight {
            continued: true,
            ..seen
        });
        assert!(demoted.look(continued), "on from its own history");
    }

    #[test]
    fn only_the_first_look_at_an_adopted_process_is_trusted() {
        assert!(Feed::of(true).look(up(5, 100)));
        let mut feed = Feed::of(true);
        assert!(!feed.look(None));
        assert!(!feed.look(up(5, 100)));
    }

    #[test]
    fn a_link_without_a_connection_is_not_up() {
        assert!(!Feed::of(true).look(up(0, 100)));
    }
}
