//! What happened, as a hash always and as text on demand.
//!
//! Invariant: the hash depends on every event of a run, and on nothing else.

use std::collections::VecDeque;

use crate::sched::Micros;

/// How many of the last events a failure shows.
pub const SHOWN_EVENTS: usize = 60;

/// See the module.
#[derive(Debug, Default)]
pub struct Trace {
    hash: u64,
    events: u64,
    text: bool,
    last: VecDeque<String>,
    all: bool,
}

impl Trace {
    /// With `text`, the last events are kept as text; with `all`, every one.
    #[must_use]
    pub fn new(text: bool, all: bool) -> Self {
        Self {
            text: text || all,
            all,
            ..Self::default()
        }
    }

    /// An event, as numbers that tell it from others.
    pub fn mix(&mut self, numbers: &[u64]) {
        self.events += 1;
        for number in numbers {
            // FNV-1a over whole words: order matters, and it costs little.
            self.hash = (self.hash ^ number)
                .wrapping_mul(0x0000_0100_0000_01b3)
                .rotate_left(23);
        }
    }

    /// An event for readers.
    pub fn say(&mut self, now: Micros, line: impl FnOnce() -> String) {
        self.mix(&[now]);
        if !self.text {
            return;
        }
        let line = format!("{:>10.3} ms  {}", now as f64 / 1000.0, line());
        self.last.push_back(line);
        if !self.all && self.last.len() > SHOWN_EVENTS {
            self.last.pop_front();
        }
    }

    /// The hash so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// How many events so far.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The last events, if text is kept.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.last.iter().cloned().collect()
    }
}
