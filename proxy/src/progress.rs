//! How far the workers are with each shard, put together for the controller.
//!
//! Invariant: a shard's state is reported only when every worker has reached it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use slotmesh_proto::topology::v1 as pb;
use tokio::sync::Notify;

use crate::core::hold::Level;
use crate::core::lane::LaneNo;
use crate::core::outbox::HoldSample;
use crate::metrics::Published;
use crate::routing::{Routing, ShardNo};
use crate::worker::Notice;

/// Finished holds that wait for a controller to hear of them; the oldest are forgotten.
const HOLDS_MAX: usize = 1024;

/// See the module.
#[derive(Debug)]
pub struct Progress {
    workers: Vec<Arc<Published>>,
    routing: Arc<Routing>,
    state: Mutex<State>,
    /// Something changed that the controller waits for.
    pub changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Per shard, what each worker said last.
    levels: BTreeMap<ShardNo, Vec<Option<Level>>>,
    dirty: BTreeSet<ShardNo>,
    holds: BTreeMap<(ShardNo, u64), HoldSample>,
    /// Per worker and lane: whose primary of which epoch does not answer it, and since when.
    troubles: BTreeMap<(usize, LaneNo), (ShardNo, u64, Instant)>,
    faults: BTreeMap<ShardNo, Recent>,
}

/// What was counted lately: in the part of a window that is under way, and in the one before it.
#[derive(Debug)]
struct Recent {
    since: Instant,
    now: u64,
    before: u64,
}

/// Half of the time that [`Recent`] looks back at most.
const PART: Duration = Duration::from_secs(5);

impl Recent {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            now: 0,
            before: 0,
        }
    }

    fn add(&mut self, count: u64, now: Instant) {
        self.roll(now);
        self.now += count;
    }

    fn sum(&mut self, now: Instant) -> u64 {
        self.roll(now);
        self.now + self.before
    }

    fn roll(&mut self, now: Instant) {
        let parts = now.saturating_duration_since(self.since).as_secs() / PART.as_secs();
        if parts == 0 {
            return;
        }
        let over = std::mem::take(&mut self.now);
        self.before = if parts == 1 { over } else { 0 };
        self.since = now;
    }
}

impl Progress {
    /// Of a process with these workers.
    #[must_use]
    pub fn new(workers: Vec<Arc<Published>>, routing: Arc<Routing>) -> Self {
        Self {
            workers,
            routing,
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Takes what a worker said.
    pub fn note(&self, notice: Notice) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match notice {
            Notice::Level {
                worker,
                shard,
                level,
            } => {
                let count = self.workers.len();
                let levels = state
                    .levels
                    .entry(shard)
                    .or_insert_with(|| vec![None; count]);
                levels[worker] = Some(level);
                if agreed(levels).is_some() {
                    state.dirty.insert(shard);
                    self.changed.notify_one();
                }
            }
            Notice::Hold { shard, sample } => {
                if state.holds.len() >= HOLDS_MAX {
                    state.holds.pop_first();
                }
                let sum = state
                    .holds
                    .entry((shard, sample.epoch))
                    .or_insert(HoldSample {
                        requests: 0,
                        longest_us: 0,
                        ..sample
                    });
                sum.requests += sample.requests;
                sum.longest_us = sum.longest_us.max(sample.longest_us);
                // The controller closes the change soon; it wants to know what it cost.
                self.changed.notify_one();
            }
            Notice::Trouble {
                worker,
                trouble,
                since,
            } => {
                let lane = (worker, trouble.lane);
                match since {
                    Some(since) => {
                        let seen = (trouble.shard, trouble.epoch, since);
                        state.troubles.insert(lane, seen);
                        self.changed.notify_one();
                    }
                    None => drop(state.troubles.remove(&lane)),
                }
            }
            Notice::Faults { shard, count } => {
                let now = Instant::now();
                let recent = state.faults.entry(shard);
                recent.or_insert_with(|| Recent::new(now)).add(count, now);
            }
        }
    }

    /// States of all shards, for the first message of a stream. What was to be reported is in it.
    pub fn all_shards(&self) -> Vec<pb::ShardState> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.dirty.clear();
        let all: Vec<ShardNo> = state.levels.keys().copied().collect();
        all.into_iter()
            .filter_map(|shard| self.shard_state(&state, shard))
            .collect()
    }

    /// Clients wait for what a controller will say: a shard is held, or its primary does not answer.
    pub fn awaits_news(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut levels = state.levels.values().flatten().flatten();
        !state.troubles.is_empty() || levels.any(|level| matches!(level, Level::Held { .. }))
    }

    /// What is new since the last report.
    pub fn report(&self) -> pb::Report {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let dirty = std::mem::take(&mut state.dirty);
        let holds = std::mem::take(&mut state.holds);
        let table = self.routing.load();
        let id = |shard: ShardNo| {
            let route = table
                .shards
                .get(usize::from(shard))
                .and_then(Option::as_ref);
            route.map(|route| route.shard_id.clone())
        };
        let mut report = pb::Report {
            shards: dirty
                .into_iter()
                .filter_map(|s| self.shard_state(&state, s))
                .collect(),
            holds: holds
                .into_values()
                .filter_map(|sample| {
                    Some(pb::HoldSample {
                        shard_id: id(sample.shard)?,
                        epoch: sample.epoch,
                        longest_us: sample.longest_us,
                        requests: sample.requests,
                    })
                })
                .collect(),
            troubles: troubles(&state)
                .into_iter()
                .filter_map(|(shard, (epoch, since))| {
                    Some(pb::Trouble {
                        shard_id: id(shard)?,
                        epoch,
                        since_ms: since.elapsed().as_millis() as u64,
                    })
                })
                .collect(),
            faults: recent_faults(&mut state.faults)
                .into_iter()
                .filter_map(|(shard, count)| {
                    Some(pb::ShardFaults {
                        shard_id: id(shard)?,
                        count,
                    })
                })
                .collect(),
            ..pb::Report::default()
        };
        for worker in &self.workers {
            let counters = worker.load();
            report.clients += worker.clients() as u32;
            report.commands += counters.commands;
            report.errors += counters.errors;
            report.held_max_us = report.held_max_us.max(counters.held_max_us);
            report.held_requests += counters.held_requests;
        }
        report
    }

    fn shard_state(&self, state: &State, shard: ShardNo) -> Option<pb::ShardState> {
        let level = agreed(state.levels.get(&shard)?)?;
        let table = self.routing.load();
        let route = table
            .shards
            .get(usize::from(shard))
            .and_then(Option::as_ref)?;
        let (epoch, kind, task_id) = match level {
            Level::Held { epoch, task_id } => (*epoch, pb::HoldLevel::Held, task_id.clone()),
            Level::Applied { epoch } => (*epoch, pb::HoldLevel::Applied, String::new()),
        };
        Some(pb::ShardState {
            shard_id: route.shard_id.clone(),
            epoch,
            level: kind.into(),
            task_id,
        })
    }
}

/// Per shard the newest epoch at which a lane is in trouble, and since when.
fn troubles(state: &State) -> BTreeMap<ShardNo, (u64, Instant)> {
    let mut all: BTreeMap<ShardNo, (u64, Instant)> = BTreeMap::new();
    for &(shard, epoch, since) in state.troubles.values() {
        let seen = all.entry(shard).or_insert((epoch, since));
        if epoch > seen.0 {
            *seen = (epoch, since);
        } else if epoch == seen.0 {
            seen.1 = seen.1.min(since);
        }
    }
    all
}

/// Of each shard that had some.
fn recent_faults(faults: &mut BTreeMap<ShardNo, Recent>) -> Vec<(ShardNo, u64)> {
    let now = Instant::now();
    let counts = faults.iter_mut().map(|(no, recent)| (*no, recent.sum(now)));
    counts.filter(|(_, count)| *count > 0).collect()
}

/// What all workers say, if it is the same.
fn agreed(levels: &[Option<Level>]) -> Option<&Level> {
    let first = levels.first()?.as_ref()?;
    levels
        .iter()
        .all(|level| level.as_ref() == Some(first))
        .then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::outbox::Trouble;
    use crate::routing::{InstanceSettings, RoutingTable, ShardRoute};

    #[test]
    fn faults_are_told_for_ten_seconds_and_then_forgotten() {
        let began = Instant::now();
        let at = |s| began + Duration::from_secs(s);
        let mut recent = Recent::new(began);
        recent.add(3, at(1));
        recent.add(4, at(6));
        assert_eq!(recent.sum(at(7)), 7);
        assert_eq!(recent.sum(at(12)), 4);
        assert_eq!(recent.sum(at(18)), 0);
        recent.add(1, at(60));
        assert_eq!(recent.sum(at(60)), 1);
    }

    #[test]
    fn a_shard_is_held_only_when_every_worker_holds_it() {
        let routing = Arc::new(Routing::default());
        let route = ShardRoute {
            shard_id: "s".to_owned(),
            index: 0,
            epoch: 1,
            address: ([127, 0, 0, 1], 1).into(),
            username: String::new(),
            password: String::new(),
            hold: None,
            target: None,
            observer: None,
            replicas: Vec::new(),
        };
        let shards = vec![Some(Arc::new(route))];
        routing.publish(RoutingTable::new(
            1,
            InstanceSettings::default(),
            shards,
            &[],
        ));
        let progress = Progress::new(vec![Arc::default(), Arc::default()], routing);
        let held = Level::Held {
            epoch: 1,
            task_id: "t".to_owned(),
        };
        progress.note(Notice::Level {
            worker: 0,
            shard: 0,
            level: held.clone(),
        });
        assert!(progress.report().shards.is_empty());
        progress.note(Notice::Level {
            worker: 1,
            shard: 0,
            level: held,
        });
        let report = progress.report();
        assert_eq!(report.shards.len(), 1);
        assert_eq!(report.shards[0].level(), pb::HoldLevel::Held);
        assert!(
            progress.awaits_news(),
            "clients wait for the end of the hold"
        );
        for worker in 0..2 {
            let applied = Level::Applied { epoch: 2 };
            progress.note(Notice::Level {
                worker,
                shard: 0,
                level: applied,
            });
        }
        assert!(!progress.awaits_news(), "nobody waits");
        let _ = progress.report();
        assert!(progress.report().shards.is_empty());
        let trouble = |lane, since_us: Option<u64>| Notice::Trouble {
            worker: 1,
            trouble: Trouble {
                lane,
                shard: 0,
                epoch: 1,
                since_us,
            },
            since: since_us.map(|_| Instant::now()),
        };
        progress.note(trouble(0, Some(7)));
        progress.note(trouble(1, Some(8)));
        progress.note(trouble(0, None));
        let troubles = progress.report().troubles;
        assert_eq!((troubles.len(), troubles[0].epoch), (1, 1));
        progress.note(trouble(1, None));
        assert!(progress.report().troubles.is_empty());
        let sample = |longest_us, requests| {
            let sample = HoldSample {
                shard: 0,
                epoch: 2,
                longest_us,
                requests,
            };
            Notice::Hold { shard: 0, sample }
        };
        progress.note(sample(10, 3));
        progress.note(sample(7, 4));
        let holds = progress.report().holds;
        assert_eq!(
            (holds.len(), holds[0].longest_us, holds[0].requests),
            (1, 10, 7)
        );
    }
}
