//! What a run found, for people and for scripts.

use serde::Serialize;

use super::Told;
use crate::report::{Percentiles, table};

/// The result of a run. Times in milliseconds.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub engine_version: String,
    pub switchovers: u32,
    pub failed_switchovers: u32,
    #[serde(flatten)]
    pub told: Told,
    pub hold: Percentiles,
    pub critical: Percentiles,
    pub task: Percentiles,
    #[serde(skip)]
    pub(super) hold_ms: Vec<f64>,
    #[serde(skip)]
    pub(super) critical_ms: Vec<f64>,
    #[serde(skip)]
    pub(super) task_ms: Vec<f64>,
}

impl Report {
    pub(super) fn finish(&mut self) {
        self.hold = Percentiles::of(&mut self.hold_ms);
        self.critical = Percentiles::of(&mut self.critical_ms);
        self.task = Percentiles::of(&mut self.task_ms);
    }

    /// Nothing lost, nothing doubled, nothing seen by a client, every switchover done.
    pub fn kept_every_promise(&self) -> bool {
        self.told.is_true() && self.failed_switchovers == 0
    }

    /// A table, and the first errors below it.
    pub fn text(&self) -> String {
        let mut rows = vec![
            ("engine", self.engine_version.clone()),
            (
                "switchovers done / failed",
                format!("{} / {}", self.switchovers, self.failed_switchovers),
            ),
        ];
        rows.extend(self.told.rows());
        rows.extend([
            ("hold, ms", self.hold.to_string()),
            ("critical section, ms", self.critical.to_string()),
            ("whole task, ms", self.task.to_string()),
        ]);
        table(rows, &self.told.error_samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switchover_that_failed_breaks_the_promise() {
        assert!(Report::default().kept_every_promise());
        let failed = Report {
            failed_switchovers: 1,
            ..Report::default()
        };
        assert!(!failed.kept_every_promise());
    }
}
