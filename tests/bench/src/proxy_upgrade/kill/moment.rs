//! Moments of a hand-over that can be seen from outside, and a kill in each.
//!
//! Invariant: a moment is what a file or a counter says, never a time that has passed; what was seen last
//! before the kill is kept beside the moment that was wanted.

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::bail;
use serde::{Deserialize, Serialize};
use slotmesh_harness::signals;
use tokio::runtime::Handle;

use super::super::handover::{Bound, metric, scrape};
use crate::chaos::history::now_us;

/// For a new process to start, to try itself, and to get everybody.
const MOMENT_LIMIT: Duration = Duration::from_secs(60);
/// Between looks; the shortest phases take a millisecond.
const LOOK: Duration = Duration::from_micros(200);

/// Which of the two processes dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Giver,
    Taker,
}

/// Which hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// To a new process.
    There,
    /// Back to the spare.
    Back,
}

/// When it dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// The new process has been started and has not said anything yet.
    Start,
    /// take-over.json: it tries itself.
    Trial,
    /// take-over.json: it asks.
    Asking,
    /// take-over.json: it has the listener.
    Listener,
    /// The giver has counted so many clients that have gone.
    Batches,
    /// take-over.json: everybody has come.
    Last,
    /// The giver has nobody any more, and the time of `--calm-ms` has passed since.
    Spare,
}

impl Moment {
    pub(super) const ALL: [Self; 7] = [
        Self::Start,
        Self::Trial,
        Self::Asking,
        Self::Listener,
        Self::Batches,
        Self::Last,
        Self::Spare,
    ];
}

/// One kind of kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Case {
    pub(super) way: Way,
    pub(super) side: Side,
    pub(super) moment: Moment,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { way, side, moment } = self;
        write!(f, "{way:?}, {side:?} killed at {moment:?}")
    }
}

/// How far take-over.json says that it is, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Phase {
    Trial,
    Asking,
    Serving,
    Done,
    Failed,
}

#[derive(Debug, Deserialize)]
struct TakeOver {
    pid: u32,
    phase: Phase,
    reason: String,
}

/// What is looked at.
#[derive(Debug, Clone)]
pub(super) struct Watched {
    pub(super) dir: PathBuf,
    pub(super) giver: Bound,
    pub(super) taker: u32,
    /// What the giver had counted before.
    pub(super) given_before: u64,
    /// For [`Moment::Batches`]: so many clients are to have gone.
    pub(super) gone: u64,
    /// For [`Moment::Spare`].
    pub(super) calm: Duration,
}

impl Watched {
    /// Waits for the moment, and kills. When that was, of the steady clock.
    ///
    /// # Errors
    /// The moment does not come.
    pub(super) async fn kill_at(self, case: Case) -> anyhow::Result<u64> {
        let handle = Handle::current();
        // A thread of its own: a runtime that is busy with clients would look too late.
        let killed = tokio::task::spawn_blocking(move || {
            self.wait(case.moment, &handle)?;
            let pid = match case.side {
                Side::Giver => self.giver.pid,
                Side::Taker => self.taker,
            };
            let at_us = now_us();
            signals::kill(pid)?;
            anyhow::Ok(at_us)
        });
        killed.await?
    }

    fn wait(&self, moment: Moment, handle: &Handle) -> anyhow::Result<()> {
        let until = Instant::now() + MOMENT_LIMIT;
        while !self.has_come(moment, handle)? {
            if Instant::now() >= until {
                bail!("{moment:?} has not come in {MOMENT_LIMIT:?}");
            }
            std::thread::park_timeout(LOOK);
        }
        if moment == Moment::Spare {
            std::thread::park_timeout(self.calm);
        }
        Ok(())
    }

    fn has_come(&self, moment: Moment, handle: &Handle) -> anyhow::Result<bool> {
        let wanted = match moment {
            Moment::Start => return Ok(true),
            Moment::Trial => Phase::Trial,
            Moment::Asking => Phase::Asking,
            Moment::Listener => Phase::Serving,
            Moment::Last | Moment::Spare => Phase::Done,
            Moment::Batches => {
                let given = handle.block_on(self.giver_counts(GIVEN))?;
                return Ok(given >= self.given_before + self.gone);
            }
        };
        let has_come = self.phase()?.is_some_and(|phase| phase >= wanted);
        if has_come && moment == Moment::Spare {
            return Ok(handle.block_on(self.giver_counts("slotmesh_proxy_clients"))? == 0);
        }
        Ok(has_come)
    }

    async fn giver_counts(&self, name: &str) -> anyhow::Result<u64> {
        counted(&self.giver.admin_address, name).await
    }

    /// None: the taker has not said anything.
    fn phase(&self) -> anyhow::Result<Option<Phase>> {
        let Ok(text) = std::fs::read(self.dir.join("take-over.json")) else {
            return Ok(None);
        };
        let said: TakeOver = serde_json::from_slice(&text)?;
        if said.pid == self.taker && said.phase == Phase::Failed {
            bail!("the taker gave up: {}", said.reason);
        }
        Ok((said.pid == self.taker).then_some(said.phase))
    }
}

/// Clients that another process took.
pub(super) const GIVEN: &str = "slotmesh_proxy_handed_over_clients";
/// Clients taken from another process.
pub(super) const TAKEN: &str = "slotmesh_proxy_taken_over_clients";

/// What a process has counted under this name; 0 when it has nothing of it yet.
pub(super) async fn counted(admin: &str, name: &str) -> anyhow::Result<u64> {
    let page = scrape(admin).await?;
    // Counters are written with or without their ending.
    let total = format!("{name}_total");
    Ok(metric(&page, name).or(metric(&page, &total)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(dir: &std::path::Path, taker: u32) -> Watched {
        Watched {
            dir: dir.to_owned(),
            giver: serde_json::from_str(
                r#"{"pid":1,"address":"","admin_address":"","handover":""}"#,
            )
            .unwrap(),
            taker,
            given_before: 0,
            gone: 0,
            calm: Duration::ZERO,
        }
    }

    #[tokio::test]
    async fn a_moment_is_the_takers_own_word_and_later_words_count_too() {
        let dir = tempfile::tempdir().unwrap();
        let say = |phase: &str| {
            let text = format!(r#"{{"pid":7,"phase":"{phase}","reason":"none"}}"#);
            std::fs::write(dir.path().join("take-over.json"), text).unwrap();
        };
        let handle = Handle::current();
        let own = watched(dir.path(), 7);
        assert!(own.has_come(Moment::Start, &handle).unwrap());
        assert!(!own.has_come(Moment::Trial, &handle).unwrap());
        say("serving");
        for moment in [Moment::Trial, Moment::Asking, Moment::Listener] {
            assert!(own.has_come(moment, &handle).unwrap(), "{moment:?}");
            let other = watched(dir.path(), 8).has_come(moment, &handle);
            assert!(!other.unwrap(), "{moment:?}");
        }
        assert!(!own.has_come(Moment::Last, &handle).unwrap());
        say("done");
        assert!(own.has_come(Moment::Last, &handle).unwrap());
        say("failed");
        assert!(own.has_come(Moment::Last, &handle).is_err());
    }
}
