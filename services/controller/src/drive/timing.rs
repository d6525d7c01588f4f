//! How long each part of a hold took, for the task's events: whether the proxies were slow, the old
//! primary's agent, the store, or the machine as a whole.
//!
//! Invariant: for people only. Nothing is decided from it, and it is gone with the term.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

/// One switch of a shard, from just before its declaration is written.
#[derive(Clone, Debug)]
pub(super) struct Timing {
    began: Instant,
    /// When the declaration was in the mirror, which proxies are told from.
    declared: Option<Instant>,
    /// When the old primary's agent was asked: the proxies hold, or are not waited for any more.
    asked: Option<Instant>,
    answered: Option<Instant>,
    /// When every proxy was known to send to the new primary.
    applied: Option<Instant>,
    /// The agent's own words.
    said: String,
}

impl Timing {
    pub(super) fn begin() -> Self {
        Self {
            began: Instant::now(),
            declared: None,
            asked: None,
            answered: None,
            applied: None,
            said: String::new(),
        }
    }

    pub(super) fn declared(&mut self) {
        self.declared.get_or_insert_with(Instant::now);
    }

    pub(super) fn asked(&mut self) {
        self.asked.get_or_insert_with(Instant::now);
    }

    pub(super) fn answered(&mut self, said: String) {
        (self.answered, self.said) = (Some(Instant::now()), said);
    }

    pub(super) fn applied(&mut self) {
        self.applied.get_or_insert_with(Instant::now);
    }

    pub(super) fn is_answered(&self) -> bool {
        self.answered.is_some()
    }

    /// For how long every proxy has been known to send to the new primary.
    pub(super) fn applied_since(&self) -> Duration {
        self.applied.map_or(Duration::MAX, |at| at.elapsed())
    }

    /// When each part was over, in milliseconds since the declaration was begun to be written.
    pub(super) fn words(&self) -> String {
        let parts = [
            ("declared", self.declared),
            ("proxies held", self.asked),
            ("the agent answered", self.answered),
            ("every proxy had the new epoch", self.applied),
        ];
        let mut words = String::new();
        for (part, at) in parts {
            let Some(at) = at else { continue };
            let separator = if words.is_empty() { "" } else { ", " };
            let ms = (at - self.began).as_secs_f64() * 1000.0;
            // Writing to a string does not fail.
            let _ = write!(words, "{separator}{part} after {ms:.1}");
            if Some(at) == self.answered && !self.said.is_empty() {
                let _ = write!(words, " ({})", self.said);
            }
        }
        if !words.is_empty() {
            words.push_str(" ms");
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_hold_are_said_in_their_order_and_what_is_not_known_is_left_out() {
        let mut timing = Timing::begin();
        assert_eq!(timing.words(), "");
        let at = |ms| Some(timing.began + Duration::from_millis(ms));
        (timing.declared, timing.asked, timing.answered) = (at(3), at(5), at(11));
        timing.said = "fence 1.0, roles 1.5, commit 2.0 ms".into();
        let parts = "declared after 3.0, proxies held after 5.0, \
                     the agent answered after 11.0 (fence 1.0, roles 1.5, commit 2.0 ms)";
        assert_eq!(timing.words(), format!("{parts} ms"));
        timing.applied = at(12);
        let applied = "every proxy had the new epoch after 12.0 ms";
        assert_eq!(timing.words(), format!("{parts}, {applied}"));
    }

    #[test]
    fn the_first_time_counts() {
        let mut timing = Timing::begin();
        timing.declared();
        let first = timing.declared;
        timing.declared();
        assert_eq!(timing.declared, first);
    }
}
