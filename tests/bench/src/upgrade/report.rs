//! What the upgrades of a run did to each shard and to clients, and whether that is what is promised.

use serde::Serialize;

use crate::{
    report::{Percentiles, table},
    switchover::Told,
};

/// Of a shard's switch to the next engine, in all.
const HOLD_MS_MAX: f64 = 100.0;
/// From the operator's word to the first write at the old primary.
const BACK_MS_MAX: f64 = 1_000.0;

/// One hold of a shard. Times in milliseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Hold {
    pub(super) mesh: u32,
    pub(super) architecture: &'static str,
    pub(super) shard: String,
    /// "there" or "back".
    pub(super) way: &'static str,
    /// What the proxies say that they held; back: the longer one of both ways.
    pub(super) hold_ms: f64,
    pub(super) critical_ms: f64,
    /// What a client that only writes to this shard waited for longest while it was switched.
    pub(super) wait_ms: f64,
    /// What the client of a plain server waited for in that very time.
    pub(super) plain_ms: f64,
    /// How late a thread woke that wanted nothing else in that very time.
    pub(super) late_ms: f64,
    /// The leader's words.
    pub(super) parts: String,
}

/// One shard on its way back. Times in milliseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct WayBack {
    pub(super) mesh: u32,
    pub(super) architecture: &'static str,
    pub(super) shard: String,
    /// From the operator's word until the task said that the shard goes back.
    pub(super) to_turn_ms: f64,
    /// From the operator's word until proxies were told to hold.
    pub(super) to_declared_ms: f64,
    /// From the operator's word to the first write that was acknowledged by the old primary.
    pub(super) to_writes_ms: f64,
    /// What a client that only writes to this shard waited for longest since the operator's word.
    pub(super) wait_ms: f64,
    /// As of a hold, until that first write.
    pub(super) plain_ms: f64,
    pub(super) late_ms: f64,
}

/// What clients waited for before a mesh was changed, and from then to the end.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Calm {
    pub(super) mesh: u32,
    pub(super) architecture: &'static str,
    pub(super) before: Percentiles,
    pub(super) since: Percentiles,
    pub(super) plain_before: Percentiles,
    pub(super) plain_since: Percentiles,
    pub(super) late_before_ms: f64,
    pub(super) late_since_ms: f64,
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
    /// Primaries that were lost meanwhile: by the machine, since nobody took them away.
    pub failovers: Vec<String>,
    pub(super) holds: Vec<Hold>,
    pub(super) back: Vec<WayBack>,
    pub(super) calm: Vec<Calm>,
    #[serde(skip)]
    pub(super) task_ms: Vec<f64>,
}

impl Report {
    pub(super) fn finish(&mut self) {
        let of = |values: Vec<f64>| Percentiles::of(&mut { values });
        self.hold = of(self.holds.iter().map(|h| h.hold_ms).collect());
        self.wait = of(self.holds.iter().map(|h| h.wait_ms).collect());
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
            self.failovers.is_empty(),
            format!("{} primaries were lost", self.failovers.len()),
        );
        unless(
            self.hold.max_ms <= HOLD_MS_MAX,
            format!(
                "a shard was held for {:.1} ms, over {HOLD_MS_MAX}",
                self.hold.max_ms
            ),
        );
        unless(
            self.back_to_writes.max_ms <= BACK_MS_MAX,
            format!(
                "a way back took {:.0} ms, over {BACK_MS_MAX}",
                self.back_to_writes.max_ms
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
                "copies in full of nodes that stay: upgrades, ways back",
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
        wrong.extend(self.failovers.iter().cloned());
        wrong.extend(self.broken().into_iter().map(|b| format!("BROKEN: {b}")));
        let mut text = String::new();
        for calm in &self.calm {
            text += &calm.text();
        }
        for hold in &self.holds {
            text += &hold.text();
        }
        for back in &self.back {
            text += &back.text();
        }
        text + &table(rows, &wrong)
    }
}

impl Hold {
    fn text(&self) -> String {
        let (mesh, kind, shard, way) = (self.mesh, self.architecture, &self.shard, self.way);
        let (hold, critical, wait) = (self.hold_ms, self.critical_ms, self.wait_ms);
        let (plain, late, parts) = (self.plain_ms, self.late_ms, &self.parts);
        format!(
            "mesh {mesh} ({kind}), shard {shard}, {way}: held {hold:.1} ms, critical {critical:.1} ms, a client \
             waited {wait:.1} ms; meanwhile a plain server's {plain:.1} ms, a thread woke {late:.1} ms late\n  \
             {parts}\n"
        )
    }
}

impl WayBack {
    fn text(&self) -> String {
        let (mesh, kind, shard) = (self.mesh, self.architecture, &self.shard);
        let (turn, declared, writes) = (self.to_turn_ms, self.to_declared_ms, self.to_writes_ms);
        let (wait, plain, late) = (self.wait_ms, self.plain_ms, self.late_ms);
        format!(
            "mesh {mesh} ({kind}), shard {shard}, the word to go back: taken up after {turn:.0} ms, declared \
             after {declared:.0} ms, writes after {writes:.1} ms; a client waited {wait:.1} ms, a plain \
             server's {plain:.1} ms, a thread woke {late:.1} ms late\n"
        )
    }
}

impl Calm {
    fn text(&self) -> String {
        let (mesh, kind) = (self.mesh, self.architecture);
        let line = |when: &str, shards: Percentiles, plain: Percentiles, late: f64| {
            format!(
                "mesh {mesh} ({kind}), {when}: writes waited {shards} ms; a plain server's {plain} ms; a thread \
                 woke up to {late:.1} ms late\n"
            )
        };
        let before = line(
            "before",
            self.before,
            self.plain_before,
            self.late_before_ms,
        );
        let since = line("since", self.since, self.plain_since, self.late_since_ms);
        before + &since
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
        let held = Hold {
            hold_ms: 100.1,
            ..Hold::default()
        };
        let waited = WayBack {
            to_writes_ms: 1_000.1,
            ..WayBack::default()
        };
        let spoiled = [
            finished(|r| r.failed = 1),
            finished(|r| r.told.lost = 1),
            finished(|r| r.full_copies = 1),
            finished(|r| r.holds.push(held)),
            finished(|r| r.failovers.push("one".into())),
            finished(|r| r.back.push(waited)),
        ];
        for report in spoiled {
            assert_eq!(report.broken().len(), 1, "{report:?}");
        }
        // The old engine may have to copy.
        assert!(finished(|r| r.full_copies_back = 2).broken().is_empty());
    }
}
