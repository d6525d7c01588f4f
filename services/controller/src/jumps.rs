//! Whether this process's wall clock has jumped: watched from the start of the process, so that whoever
//! begins to lead knows of jumps before that.
//!
//! Invariant: it only makes windows rest, and counts beside that clock; no time of a record depends on it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use slotmesh_task::steady::Clock;
use tokio_util::sync::CancellationToken;

use crate::clock;

/// Between two looks while nobody else does: two jumps of which the second takes back the first are seen as
/// such when they are further apart.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The process's view of its clock; its clones are the same one.
#[derive(Debug, Clone)]
pub struct Jumps(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    began: Instant,
    clock: Clock,
}

impl Default for Jumps {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Inner {
            began: Instant::now(),
            clock: Clock::default(),
        })))
    }
}

impl Jumps {
    /// Milliseconds that only count.
    #[must_use]
    pub fn counted_ms(&self) -> u64 {
        self.lock().counted_ms()
    }

    /// Looks at the clock; for how many more milliseconds windows do not count, 0: they do.
    #[must_use]
    pub fn look(&self) -> u64 {
        let mut inner = self.lock();
        let counted_ms = inner.counted_ms();
        inner.clock.look(clock::now_ms(), counted_ms)
    }

    /// By how much the clock has jumped forward, all jumps together.
    #[must_use]
    pub fn jumped_ms(&self) -> i64 {
        self.lock().clock.jumped_by_ms()
    }

    /// Something else says that the clock is wrong.
    pub fn distrust(&self) {
        let mut inner = self.lock();
        let counted_ms = inner.counted_ms();
        inner.clock.distrust(counted_ms);
    }

    /// Looks until `stop`.
    pub async fn watch(self, stop: CancellationToken) {
        let mut tick = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            let _ = self.look();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn counted_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
