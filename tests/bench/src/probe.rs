//! A thread that wants nothing but to be woken on time: how late it is says how long anybody here may
//! have waited for a processor, whatever else is measured.
//!
//! Invariant: it notes every wake, so that a time without notes is a time in which it did not run.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::{chaos::history::now_us, report::Percentiles};

/// Between two wakes: a few in the shortest thing that is measured, and too few to be a load.
const EVERY: Duration = Duration::from_millis(1);
/// An hour.
const WAKES_MAX: usize = 3_600_000;

/// It should have woken at `due_us`, and did so later. Microseconds of the steady clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wake {
    pub(crate) due_us: u64,
    pub(crate) late_us: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Probe {
    stop: Arc<AtomicBool>,
    wakes: Arc<Mutex<Vec<Wake>>>,
    thread: JoinHandle<()>,
}

impl Probe {
    /// # Errors
    /// The system has no thread left.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let (stop, wakes) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (stopped, noted) = (Arc::clone(&stop), Arc::clone(&wakes));
        let thread = std::thread::Builder::new().name("probe".to_owned());
        let thread = thread
            .spawn(move || watch(&stopped, &noted))
            .context("start the thread that measures the machine")?;
        Ok(Self {
            stop,
            wakes,
            thread,
        })
    }

    /// How late it was at most in that time, in milliseconds.
    pub(crate) fn late_ms(&self, from_us: u64, to_us: u64) -> f64 {
        lateness(&lock(&self.wakes), &[(from_us, to_us)]).max_ms
    }

    /// Every wake, in order.
    pub(crate) fn end(self) -> Vec<Wake> {
        self.stop.store(true, Ordering::Relaxed);
        // What it has noted until then counts, however it ended.
        let _ = self.thread.join();
        std::mem::take(&mut lock(&self.wakes))
    }
}

fn watch(stop: &AtomicBool, wakes: &Mutex<Vec<Wake>>) {
    for _ in 0..WAKES_MAX {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let (from, due_us) = (Instant::now(), now_us() + EVERY.as_micros() as u64);
        // Nobody unparks it: it is the time that is measured.
        std::thread::park_timeout(EVERY);
        let late = from.elapsed().saturating_sub(EVERY);
        let late_us = late.as_micros() as u64;
        lock(wakes).push(Wake { due_us, late_us });
    }
}

fn lock(wakes: &Mutex<Vec<Wake>>) -> MutexGuard<'_, Vec<Wake>> {
    wakes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How late the wakes were that were due, or made, in one of these times (from, to).
pub(crate) fn lateness(wakes: &[Wake], times: &[(u64, u64)]) -> Percentiles {
    let within = |wake: &&Wake| {
        let mut times = times.iter();
        times
            .any(|(from_us, to_us)| wake.due_us <= *to_us && wake.due_us + wake.late_us >= *from_us)
    };
    let late = wakes.iter().filter(within);
    let mut late: Vec<f64> = late.map(|wake| wake.late_us as f64 / 1000.0).collect();
    Percentiles::of(&mut late)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_in_which_it_could_not_run_is_found_wherever_it_began() {
        let wake = |due_us, late_us| Wake { due_us, late_us };
        let wakes = [wake(1_000, 100), wake(2_100, 30_000), wake(33_100, 200)];
        let times = [(10_000, 20_000)];
        let late = lateness(&wakes, &times);
        assert!((late.max_ms - 30.0).abs() < 1e-9, "{late:?}");
        assert!(lateness(&wakes, &[(0, 1_500)]).max_ms < 1.0);
        assert!(lateness(&wakes, &[]).max_ms == 0.0);
    }

    #[test]
    fn it_wakes_all_the_time_and_says_when() {
        let probe = Probe::start().unwrap();
        let began_us = now_us();
        std::thread::park_timeout(Duration::from_millis(50));
        let wakes = probe.end();
        assert!(!wakes.is_empty());
        assert!(wakes.windows(2).all(|pair| pair[0].due_us < pair[1].due_us));
        assert!(wakes[0].due_us + 1_000_000 > began_us);
    }
}
