//! What the clients of each kind saw: requests and how long they took, and everything that was wrong.
//!
//! Invariant: whatever is wrong is counted when it is found, by the client that finds it, and a client
//! is intact only if it says so itself, at the end, on the connection that it made at the begin.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::wire::is_closed;
use crate::chaos::history::now_us;

/// Of one kind, in the report.
const WORDS_MAX: usize = 5;
/// An hour of the default load.
const SAMPLES_MAX: usize = 20_000_000;

/// What a connection is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Says nothing.
    Idle,
    /// Eight INCR at a time; replies must be consecutive.
    Pipelined,
    /// A transaction open nearly all the time.
    Multi,
    /// A key watched nearly all the time; some are changed by another connection.
    Watch,
    /// Waits for numbered elements of a list.
    Blocked,
    /// Listens to numbered messages, by channel, pattern or shard channel.
    Subscribed,
    /// MONITOR, which must show numbered marks.
    Monitor,
    /// CLIENT TRACKING in RESP3: must be told of each change of a key.
    Tracking,
    /// Those that push, publish and mark for the others.
    Plain,
    /// Connects, asks one thing, and goes.
    New,
}

impl Kind {
    pub(super) const ALL: [Self; 10] = [
        Self::Idle,
        Self::Pipelined,
        Self::Multi,
        Self::Watch,
        Self::Blocked,
        Self::Subscribed,
        Self::Monitor,
        Self::Tracking,
        Self::Plain,
        Self::New,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Pipelined => "pipelined",
            Self::Multi => "MULTI open",
            Self::Watch => "WATCH held",
            Self::Blocked => "BLPOP waiting",
            Self::Subscribed => "subscribed",
            Self::Monitor => "MONITOR",
            Self::Tracking => "tracking",
            Self::Plain => "writers for them",
            Self::New => "new connections",
        }
    }
}

/// One request, or one message from its sender to its receiver. Microseconds of the steady clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) from_us: u64,
    pub(super) to_us: u64,
}

/// Of one kind.
#[derive(Debug, Clone, Default)]
pub(super) struct Page {
    pub(super) connections: u64,
    /// Connections that were the same and whole at the end.
    pub(super) intact: u64,
    pub(super) errors: u64,
    /// Connections that were closed, and nothing else was wrong with them: their process may have died.
    pub(super) closed: u64,
    /// Replies, messages, elements that did not come.
    pub(super) lost: u64,
    /// That came again, or were done again.
    pub(super) repeated: u64,
    pub(super) samples: Vec<Sample>,
    pub(super) words: Vec<String>,
}

/// All kinds.
#[derive(Debug, Clone, Default)]
pub(super) struct Books {
    pages: Arc<Mutex<BTreeMap<Kind, Page>>>,
}

impl Books {
    pub(super) fn of(&self, kind: Kind) -> Book {
        Book {
            kind,
            all: self.clone(),
        }
    }

    fn with<T>(&self, kind: Kind, act: impl FnOnce(&mut Page) -> T) -> T {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        act(pages.entry(kind).or_default())
    }

    /// Everything so far.
    pub(super) fn pages(&self) -> BTreeMap<Kind, Page> {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.clone()
    }

    /// Wrong things so far: a hand-over that made some is found while it is fresh.
    pub(super) fn wrong(&self) -> u64 {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let each = pages
            .values()
            .map(|p| p.errors + p.closed + p.lost + p.repeated);
        each.sum()
    }
}

/// The books as the clients of one kind write them.
#[derive(Debug, Clone)]
pub(super) struct Book {
    kind: Kind,
    all: Books,
}

impl Book {
    pub(super) fn connected(&self) {
        self.all.with(self.kind, |page| page.connections += 1);
    }

    pub(super) fn intact(&self) {
        self.all.with(self.kind, |page| page.intact += 1);
    }

    /// Something was asked for, or sent, at `from_us`, and has come now.
    pub(super) fn came(&self, from_us: u64) {
        let to_us = now_us();
        self.all.with(self.kind, |page| {
            if page.samples.len() < SAMPLES_MAX {
                page.samples.push(Sample { from_us, to_us });
            }
        });
    }

    /// A client is out, for this reason.
    pub(super) fn out(&self, who: impl std::fmt::Display, why: &anyhow::Error) {
        let what = format!("client {who}: {why:#}");
        match is_closed(why) {
            true => self.note(|page| &mut page.closed, 1, what),
            false => self.error(what),
        }
    }

    pub(super) fn error(&self, what: impl std::fmt::Display) {
        self.note(|page| &mut page.errors, 1, what);
    }

    pub(super) fn lost(&self, count: u64, what: impl std::fmt::Display) {
        self.note(|page| &mut page.lost, count, what);
    }

    pub(super) fn repeated(&self, count: u64, what: impl std::fmt::Display) {
        self.note(|page| &mut page.repeated, count, what);
    }

    fn note(
        &self,
        which: impl FnOnce(&mut Page) -> &mut u64,
        count: u64,
        what: impl std::fmt::Display,
    ) {
        self.all.with(self.kind, |page| {
            *which(page) += count;
            if page.words.len() < WORDS_MAX {
                page.words.push(format!("at {} us: {what}", now_us()));
            }
        });
    }
}

/// Numbers that must come one after the other.
#[derive(Debug)]
pub(super) struct Row {
    book: Book,
    whose: String,
    next: u64,
}

impl Row {
    /// `next` is the first one.
    pub(super) fn new(book: Book, whose: String, next: u64) -> Self {
        Self { book, whose, next }
    }

    pub(super) fn came(&mut self, number: u64) {
        let (whose, next) = (&self.whose, self.next);
        if number < next {
            self.book
                .repeated(1, format!("{whose}: {number} when {next} was next"));
            return;
        }
        if number > next {
            self.book.lost(
                number - next,
                format!("{whose}: {number} when {next} was next"),
            );
        }
        self.next = number + 1;
    }

    pub(super) fn next(&self) -> u64 {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_counts_what_is_missing_and_what_comes_again() {
        let books = Books::default();
        let mut row = Row::new(books.of(Kind::Subscribed), "a".to_owned(), 1);
        for number in [1, 2, 5, 6, 5, 7] {
            row.came(number);
        }
        let page = &books.pages()[&Kind::Subscribed];
        assert_eq!((page.lost, page.repeated, page.errors), (2, 1, 0));
        assert_eq!((page.words.len(), books.wrong(), row.next()), (2, 3, 8));
    }
}
