//! For how long a leader has seen what the record says of time.
//!
//! A record says when by the clock of whoever wrote it; that clock may jump before the next look, and the
//! next leader's may differ. Invariant: no limit runs out before one leader has counted all of it, by a
//! clock that only counts. Who leads next counts anew.

use super::ShardUpgrade;

/// Of the part of a shard, in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Ages {
    /// Since its phase, or what was done in it last.
    pub phase_ms: u64,
    /// The same, with the time before this leader's as its clock says: for what a new leader must not
    /// begin again.
    pub whole_phase_ms: u64,
    /// Since the last phase of its switch.
    pub switch_ms: u64,
    /// Since the old primary does not follow the new one.
    pub behind_ms: u64,
}

/// What a leader remembers of that.
#[derive(Clone, Copy, Default, Debug)]
pub struct Watch {
    phase: Mark,
    switch: Mark,
    behind: Mark,
}

/// A time of the record.
#[derive(Clone, Copy, Default, Debug)]
struct Mark {
    since_ms: u64,
    first_counted_ms: u64,
    /// How old it was then, by the clock.
    told_ms: u64,
}

impl Watch {
    /// Looks at the record. `counted_ms` only counts, from any begin.
    pub fn look(&mut self, part: &ShardUpgrade, now_ms: u64, counted_ms: u64) -> Ages {
        let switch_ms = part.switch.as_ref().map_or(0, |s| s.phase_since_ms);
        let behind_ms = part.rollback.as_ref().map_or(0, |r| r.behind_since_ms);
        let phase_ms = self.phase.look(part.phase_since_ms, now_ms, counted_ms);
        Ages {
            phase_ms,
            whole_phase_ms: self.phase.told_ms.saturating_add(phase_ms),
            switch_ms: self.switch.look(switch_ms, now_ms, counted_ms),
            behind_ms: self.behind.look(behind_ms, now_ms, counted_ms),
        }
    }
}

impl Mark {
    fn look(&mut self, since_ms: u64, now_ms: u64, counted_ms: u64) -> u64 {
        if self.since_ms != since_ms {
            *self = Self {
                since_ms,
                first_counted_ms: counted_ms,
                told_ms: now_ms.saturating_sub(since_ms),
            };
        }
        counted_ms.saturating_sub(self.first_counted_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Decision, FOLLOW_MS_MAX, NODE_MS_MAX, UpgradePhase, View,
        story::{BAKE_MS, Story, options},
    };
    use super::*;

    const HOUR_MS: u64 = 60 * 60 * 1_000;

    /// A replica is being exchanged.
    fn exchanging() -> Story {
        let mut story = Story::new(&options());
        while story.act() {}
        assert_eq!(story.part().phase, UpgradePhase::Replicas);
        story
    }

    fn decide(story: &Story, ages: Ages) -> Decision {
        super::super::decide(View {
            ages,
            ..story.view()
        })
    }

    #[test]
    fn a_jump_of_the_clock_neither_ends_a_phase_nor_keeps_it_from_ending() {
        let mut story = exchanging();
        let (mut watch, began_ms) = (Watch::default(), story.part().phase_since_ms);
        assert_eq!(watch.look(story.part(), began_ms, 50).phase_ms, 0);
        for jumped_ms in [began_ms + 2 * HOUR_MS, began_ms / 2] {
            story.stage.now_ms = jumped_ms;
            let ages = watch.look(story.part(), jumped_ms, 1_050);
            let early = decide(&story, ages);
            let Decision::Wait { until_ms, .. } = early else {
                panic!("{early:?}");
            };
            assert_eq!(until_ms, jumped_ms + NODE_MS_MAX - 1_000);
            let ages = watch.look(story.part(), jumped_ms, 50 + NODE_MS_MAX);
            let late = decide(&story, ages);
            assert!(matches!(late, Decision::TurnBack { .. }), "{late:?}");
        }
    }

    #[test]
    fn a_new_leader_gives_each_limit_its_whole_time_whatever_its_clock_says() {
        let mut story = exchanging();
        story.stage.now_ms = story.part().phase_since_ms + 2 * HOUR_MS;
        let mut watch = Watch::default();
        let ages = watch.look(story.part(), story.stage.now_ms, 7);
        assert_eq!((ages.phase_ms, ages.whole_phase_ms), (0, 2 * HOUR_MS));
        let wait = decide(&story, ages);
        assert!(matches!(wait, Decision::Wait { .. }), "{wait:?}");
    }

    /// The old primary follows with the old engine.
    fn baking() -> Story {
        let mut story = Story::new(&options());
        story.run_to(UpgradePhase::Bake);
        story.settle(2);
        assert_eq!(story.part().phase, UpgradePhase::Bake);
        story
    }

    #[test]
    fn a_bake_goes_on_under_a_new_leader_and_a_jump_does_not_end_it() {
        let story = baking();
        let part = story.part();
        let (began_ms, half) = (part.phase_since_ms, BAKE_MS / 2);
        let mut watch = Watch::default();
        let ages = watch.look(part, began_ms + half, 0);
        assert_eq!((ages.phase_ms, ages.whole_phase_ms), (0, half));
        let ages = watch.look(part, began_ms + HOUR_MS, 10);
        assert_eq!(ages.whole_phase_ms, half + 10);
        for (baked_ms, is_over) in [(BAKE_MS - 1, false), (BAKE_MS, true)] {
            let ages = Ages {
                whole_phase_ms: baked_ms,
                ..Ages::default()
            };
            let next = decide(&story, ages);
            assert_eq!(matches!(next, Decision::Close { .. }), is_over, "{next:?}");
        }
    }

    #[test]
    fn an_old_primary_that_was_cut_off_before_a_jump_has_its_time_to_come_back() {
        let mut story = baking();
        story.stage.member("a").in_sync = false;
        assert!(story.act(), "that it does not follow is written down");
        let behind_since_ms = story.part().rollback.as_ref().unwrap().behind_since_ms;
        assert!(behind_since_ms > 0);
        let mut watch = Watch::default();
        watch.look(story.part(), behind_since_ms, 5);
        story.stage.pass(HOUR_MS);
        for (counted_ms, closes) in [(4 + FOLLOW_MS_MAX, false), (5 + FOLLOW_MS_MAX, true)] {
            let ages = watch.look(story.part(), story.stage.now_ms, counted_ms);
            let next = decide(&story, ages);
            assert_eq!(matches!(next, Decision::Close { .. }), closes, "{next:?}");
        }
    }
}
