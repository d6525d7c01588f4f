//! The switches of an upgrade as its task's events tell them: when each was declared, committed and
//! closed, and the leader's words about the parts of its hold.
//!
//! Invariant: times are the leader's, of this machine's clock; nothing is read out of the words.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::failover::timeline::Event;

/// Where the leader's clock and ours meet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Anchor {
    pub(super) wall: SystemTime,
    pub(super) at: Instant,
}

impl Anchor {
    pub(super) fn now() -> Self {
        Self {
            wall: SystemTime::now(),
            at: Instant::now(),
        }
    }

    fn instant(&self, at_ms: f64) -> Instant {
        self.at + Duration::from_secs_f64(at_ms.max(0.0) / 1000.0)
    }
}

/// One switch of a shard that was committed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Switch {
    pub(super) shard: String,
    pub(super) declared: Instant,
    pub(super) committed: Instant,
    pub(super) closed: Instant,
    /// The parts of its hold.
    pub(super) words: String,
    /// From the event with which the shard began to go back, if it did before.
    pub(super) turned_back: Option<Instant>,
}

/// The committed switches in an ended task's events, in their order.
pub(super) fn switches(events: &[Event], anchor: Anchor) -> Vec<Switch> {
    let mut found: Vec<Switch> = Vec::new();
    for (index, event) in events.iter().enumerate() {
        if event.step != "Close" {
            continue;
        }
        let mut before = events[..index]
            .iter()
            .rev()
            .filter(|e| e.shard == event.shard)
            .take_while(|e| e.step != "Close");
        let (mut declared, mut committed, mut turned_back) = (None, None, None);
        for earlier in &mut before {
            let at = Some(anchor.instant(earlier.at_ms));
            match earlier.step.as_str() {
                // A commit of the leader itself is in the place of the note that the agent's was seen.
                "Settle" | "Commit" => committed = committed.or(at),
                "Declare" => declared = declared.or(at),
                "TurnBack" => turned_back = turned_back.or(at),
                _ => {}
            }
        }
        if let (Some(declared), Some(committed)) = (declared, committed) {
            found.push(Switch {
                shard: event.shard.clone(),
                declared,
                committed,
                closed: anchor.instant(event.at_ms),
                words: event.message.clone(),
                turned_back,
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_switch_has_its_own_times_also_when_shards_take_turns() {
        let anchor = Anchor::now();
        let event = |shard: &str, step: &str, at_ms: f64| Event {
            shard: shard.into(),
            step: step.into(),
            at_ms,
            message: format!("{step} of {shard}"),
        };
        let events = [
            event("0", "Declare", 10.0),
            event("1", "Prewarm", 11.0),
            event("0", "Settle", 15.0),
            event("1", "Declare", 16.0),
            event("0", "Close", 20.0),
            event("1", "GiveBack", 21.0),
            event("0", "TurnBack", 30.0),
            event("0", "Declare", 32.0),
            event("0", "Commit", 35.0),
            event("0", "Close", 40.0),
        ];
        let found = switches(&events, anchor);
        assert_eq!(found.len(), 2, "one of shard 1 was given back: {found:?}");
        let ms = |at: Instant| (at - anchor.at).as_millis();
        let times = |s: &Switch| (ms(s.declared), ms(s.committed), ms(s.closed));
        assert_eq!(times(&found[0]), (10, 15, 20));
        assert_eq!(times(&found[1]), (32, 35, 40));
        assert_eq!(found[0].turned_back, None);
        assert_eq!(found[1].turned_back.map(ms), Some(30));
        assert_eq!(found[1].words, "Close of 0");
    }
}
