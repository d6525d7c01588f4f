//! What the upgrades of a run did to each shard and to clients, and whether that is what is promised.

use serde::Serialize;

use crate::{
    report::{Percentiles, table},
    switchover::Told,
};

/// Of a shard's switch to the next engine, in all.
const HOLD_MS_MAX: f64 = 100.0;
/// Of the way back, as its clients see it.
const BACK_MS_MAX: f64 = 1_000.0;

/// One shard in one upgrade. Times in milliseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct ShardTimes {
    pub(super) mesh: u32,
    pub(super) architecture: &'static str,
    pub(super) shard: String,
    /// What the proxies say that they held.
    pub(super) hold_ms: f64,
    pub(super) critical_ms: f64,
    /// What a client that only writes to this shard waited for longest, from the upgrade's begin to
    /// its end.
    pub(super) wait_ms: f64,
}

/// One shard on its way back.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct BackTimes {
    pub(super) mesh: u32,
    pub(super) architecture: &'static str,
    pub(super) shard: String,
    /// From the operator's word to the first write that was acknowledged once the old primary was
    /// the primary again.
    pub(super) to_writes_ms: f64,
    /// What a client that only writes to this shard waited for longest since the operator's word.
    pub(super) wait_ms: f64,
}

/// The result of a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub from: String,
    pub to: String,
    pub upgrades: u32,
    pub failed: u32,
    pub ways_back: u32,
    /// Copies in full that nodes took while they were upgraded where they are.
    pub full_copies: usize,
    /// The same on the way back, where the old engine may not be able to read the next one's files.
    pub full_copies_back: usize,
    #[serde(flatten)]
    pub told: Told,
    pub hold: Percentiles,
    pub wait: Percentiles,
    /// Whole tasks, bake included.
    pub task: Percentiles,
    pub back_to_writes: Percentiles,
    pub back_wait: Percentiles,
    pub(super) shards: Vec<ShardTimes>,
    pub(super) back: Vec<BackTimes>,
    #[serde(skip)]
    pub(super) task_ms: Vec<f64>,
}

impl Report {
    pub(super) fn finish(&mut self) {
        let of = |values: Vec<f64>| Percentiles::of(&mut { values });
        self.hold = of(self.shards.iter().map(|s| s.hold_ms).collect());
        self.wait = of(self.shards.iter().map(|s| s.wait_ms).collect());
        self.back_to_writes = of(self.back.iter().map(|b| b.to_writes_ms).collect());
        self.back_wait = of(self.back.iter().map(|b| b.wait_ms).collect());
        self.task = Percentiles::of(&mut self.task_ms);
    }

    /// What was promised and was not so.
    pub fn broken(&self) -> Vec<String> {
        let mut broken = Vec::new();
        let mut unless = |kept: bool, what: String| {
            if !kept {
                broken.push(what);
            }
        };
        unless(
            self.failed == 0,
            format!("{} upgrades were not done", self.failed),
        );
        unless(
            self.told.is_true(),
            "clients saw errors, or what they were told is not true".to_owned(),
        );
        unless(
            self.full_copies == 0,
            format!("{} copies in full", self.full_copies),
        );
        unless(
            self.hold.max_ms <= HOLD_MS_MAX,
            format!(
                "a shard was held for {:.1} ms, over {HOLD_MS_MAX}",
                self.hold.max_ms
            ),
        );
        unless(
            self.back_wait.max_ms <= BACK_MS_MAX,
            format!(
                "a client waited {:.0} ms on the way back, over {BACK_MS_MAX}",
                self.back_wait.max_ms
            ),
        );
        broken
    }

    /// A table, each shard, and what went wrong.
    pub fn text(&self) -> String {
        let mut rows = vec![
            ("engines", format!("{} to {}", self.from, self.to)),
            (
                "upgrades done / failed, ways back",
                format!("{} / {}, {}", self.upgrades, self.failed, self.ways_back),
            ),
            (
                "copies in full: upgrades, ways back",
                format!("{}, {}", self.full_copies, self.full_copies_back),
            ),
        ];
        rows.extend(self.told.rows());
        rows.extend([
            ("a shard's hold by its proxies, ms", self.hold.to_string()),
            ("a client's longest wait, ms", self.wait.to_string()),
            ("whole task, ms", self.task.to_string()),
        ]);
        if !self.back.is_empty() {
            rows.extend([
                (
                    "back: word to writes on the old primary, ms",
                    self.back_to_writes.to_string(),
                ),
                (
                    "back: a client's longest wait, ms",
                    self.back_wait.to_string(),
                ),
            ]);
        }
        let mut wrong = self.told.error_samples.clone();
        wrong.extend(self.broken().into_iter().map(|b| format!("BROKEN: {b}")));
        let mut text = String::new();
        for s in &self.shards {
            text += &format!(
                "mesh {} ({}), shard {}: held {:.1} ms, critical {:.1} ms, a client waited {:.1} ms\n",
                s.mesh, s.architecture, s.shard, s.hold_ms, s.critical_ms, s.wait_ms
            );
        }
        for b in &self.back {
            text += &format!(
                "mesh {} ({}), shard {}, back: writes after {:.1} ms, a client waited {:.1} ms\n",
                b.mesh, b.architecture, b.shard, b.to_writes_ms, b.wait_ms
            );
        }
        text + &table(rows, &wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(spoil: impl FnOnce(&mut Report)) -> Report {
        let mut report = Report::default();
        spoil(&mut report);
        report.finish();
        report
    }

    #[test]
    fn each_promise_is_looked_at() {
        assert_eq!(finished(|_| {}).broken(), Vec::<String>::new());
        let held = ShardTimes {
            hold_ms: 100.1,
            ..ShardTimes::default()
        };
        let waited = BackTimes {
            wait_ms: 1_000.1,
            ..BackTimes::default()
        };
        let spoiled = [
            finished(|r| r.failed = 1),
            finished(|r| r.told.lost = 1),
            finished(|r| r.full_copies = 1),
            finished(|r| r.shards.push(held)),
            finished(|r| r.back.push(waited)),
        ];
        for report in spoiled {
            assert_eq!(report.broken().len(), 1, "{report:?}");
        }
        // The old engine may have to copy.
        assert!(finished(|r| r.full_copies_back = 2).broken().is_empty());
    }
}
