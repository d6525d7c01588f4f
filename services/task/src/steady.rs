//! Whether the wall clock has just jumped: maintenance windows are read from it.
//!
//! A jump is seen by the machine's other clock, which only counts. Nobody can say whether the time before
//! a jump or the one after it was right, and clocks that jump often jump back. Invariant: for a while
//! after a jump, in either direction, no window counts as open. What is under way goes on.

/// Clocks that are corrected are slowed down or sped up by less than a thousandth; this is no correction
/// but a jump, also after a minute without a look.
pub const JUMP_MS: u64 = 5_000;
/// After a jump: longer than a time daemon takes to find out that it was wrong.
pub const REST_MS: u64 = 5 * 60 * 1_000;

/// What was read last.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock {
    last: Option<(u64, u64)>,
    jumped_ms: Option<u64>,
    jumped_by_ms: i64,
}

impl Clock {
    /// Notes both clocks, and says for how many more milliseconds windows do not count; 0: they do.
    /// `counted_ms` only counts, from any begin.
    pub fn look(&mut self, wall_ms: u64, counted_ms: u64) -> u64 {
        if let Some((wall_before, counted_before)) = self.last {
            let passed = counted_ms.saturating_sub(counted_before);
            let expected_ms = wall_before.saturating_add(passed);
            if wall_ms.abs_diff(expected_ms) > JUMP_MS {
                self.jumped_ms = Some(counted_ms);
                let by_ms = i64::try_from(i128::from(wall_ms) - i128::from(expected_ms));
                self.jumped_by_ms = self.jumped_by_ms.saturating_add(by_ms.unwrap_or(0));
            }
        }
        self.last = Some((wall_ms, counted_ms));
        let rests_until = self.jumped_ms.map_or(0, |at| at.saturating_add(REST_MS));
        rests_until.saturating_sub(counted_ms)
    }

    /// By how much it has jumped forward, all jumps together.
    #[must_use]
    pub fn jumped_by_ms(&self) -> i64 {
        self.jumped_by_ms
    }

    /// Something else says that the wall clock is wrong: as after a jump.
    pub fn distrust(&mut self, counted_ms: u64) {
        self.jumped_ms = Some(counted_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000_000;

    #[test]
    fn time_that_passes_evenly_is_no_jump_however_long_nobody_looks() {
        let mut clock = Clock::default();
        assert_eq!(clock.look(NOW, 50), 0);
        assert_eq!(clock.look(NOW + 3_600_000, 50 + 3_600_500), 0);
        assert_eq!(clock.look(NOW + 3_600_250, 50 + 3_600_250), 0);
    }

    #[test]
    fn a_jump_either_way_makes_windows_rest_and_then_they_count_again() {
        for jumped in [NOW + 3_600_000, NOW - 3_600_000] {
            let mut clock = Clock::default();
            clock.look(NOW, 0);
            assert_eq!(clock.look(jumped, 250), REST_MS);
            assert_eq!(clock.look(jumped + 60_000, 60_250), REST_MS - 60_000);
            assert_eq!(clock.look(jumped + REST_MS, 250 + REST_MS), 0);
        }
    }

    #[test]
    fn a_clock_that_is_not_trusted_rests_as_after_a_jump() {
        let mut clock = Clock::default();
        clock.distrust(50);
        assert_eq!(clock.look(NOW, 250), REST_MS - 200);
    }

    #[test]
    fn jumping_back_is_another_jump() {
        let mut clock = Clock::default();
        clock.look(NOW, 0);
        clock.look(NOW + 3_600_000, 1_000);
        assert_eq!(clock.jumped_by_ms(), 3_599_000);
        assert_eq!(clock.look(NOW + 2_000, 2_000), REST_MS);
        assert_eq!(clock.jumped_by_ms(), 0);
    }
}
