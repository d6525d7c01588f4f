//! When which fault was on: what is missing meanwhile may be its doing.
//!
//! Invariant: windows are in order and do not overlap; a fault is over when all is well again, or the
//! run is.

use super::history::now_us;

/// From the loss of a primary to its successor: a lease, a second witness, a starved machine.
const DETECTED_US: u64 = 10_000_000;
/// From a change of a primary to our knowing that a proxy has it.
const NOTICED_US: u64 = 1_000_000;

/// A fault and its time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Window {
    /// Which.
    pub kind: String,
    /// A planned move: no client may notice it.
    pub planned: bool,
    /// It began then.
    pub from_us: u64,
    /// All was well again then.
    pub well_us: u64,
}

/// All faults of a run so far.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    windows: Vec<Window>,
    /// Times in which a shard had a new primary that nobody had asked for.
    moves: Vec<(u64, u64)>,
}

impl Timeline {
    /// A fault begins.
    pub fn begin(&mut self, kind: String, planned: bool) {
        self.windows.push(Window {
            kind,
            planned,
            from_us: now_us(),
            well_us: u64::MAX,
        });
    }

    /// All has been well again since then.
    pub fn well(&mut self, since_us: u64) {
        if let Some(last) = self.windows.last_mut() {
            last.well_us = since_us;
        }
    }

    /// All of them.
    #[must_use]
    pub fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// Whether an unplanned fault, or what it left for `after_us`, touches this time.
    #[must_use]
    pub fn is_troubled(&self, from_us: u64, to_us: u64, after_us: u64) -> bool {
        let touched = |w: &Window| {
            !w.planned && w.from_us <= to_us && from_us <= w.well_us.saturating_add(after_us)
        };
        let moved = |(begun, done): &(u64, u64)| {
            *begun <= to_us && from_us <= done.saturating_add(after_us)
        };
        self.windows.iter().any(touched) || self.moves.iter().any(moved)
    }

    /// A shard changed its primary, and proxies noticed it between these times. Unless that was
    /// planned, it was lost before, also if no fault was on any more. Says whether it was in peace.
    pub fn moved(&mut self, first_us: u64, last_us: u64) -> bool {
        let on =
            |w: &&Window| w.from_us <= first_us && first_us <= w.well_us.saturating_add(NOTICED_US);
        let planned = self.windows.iter().filter(on).any(|w| w.planned);
        if !planned {
            let begun_us = first_us.saturating_sub(DETECTED_US);
            self.moves.push((begun_us, last_us));
        }
        !self.windows.iter().any(|w| on(&w))
    }

    /// Of these windows, in order.
    #[must_use]
    pub fn of(windows: Vec<Window>) -> Self {
        Self {
            windows,
            moves: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unplanned_faults_and_their_aftermath_are_trouble() {
        let window = |planned, from_us, well_us| Window {
            kind: "x".into(),
            planned,
            from_us,
            well_us,
        };
        let line = Timeline::of(vec![window(true, 100, 200), window(false, 300, 400)]);
        assert!(!line.is_troubled(120, 130, 50));
        assert!(line.is_troubled(290, 300, 50));
        assert!(line.is_troubled(440, 450, 50));
        assert!(!line.is_troubled(451, 460, 50));
    }

    #[test]
    fn a_change_of_primary_that_nobody_asked_for_is_trouble_whenever_it_comes() {
        let window = |planned, from_us, well_us| Window {
            kind: "x".into(),
            planned,
            from_us,
            well_us,
        };
        let second = 1_000_000;
        let windows = vec![window(true, 100 * second, 101 * second)];
        let mut line = Timeline::of(windows);
        assert!(!line.moved(100 * second + 10, 100 * second + 20));
        assert!(!line.is_troubled(99 * second, 102 * second, 0));
        assert!(line.moved(200 * second, 201 * second));
        assert!(line.is_troubled(195 * second, 195 * second, 0));
        assert!(line.is_troubled(202 * second, 202 * second, second));
        assert!(!line.is_troubled(203 * second, 203 * second, second));
    }

    #[test]
    fn a_fault_that_never_became_well_is_on_to_the_end() {
        let mut line = Timeline::default();
        line.begin("x".into(), false);
        assert!(line.is_troubled(now_us() + 1_000_000_000, now_us() + 1_000_000_001, 0));
        line.well(now_us());
        assert!(!line.is_troubled(now_us() + 1_000_000_000, now_us() + 1_000_000_001, 0));
    }
}
