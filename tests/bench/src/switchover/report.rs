//! What a run found, for people and for scripts.

use comfy_table::{Table, presets};
use serde::Serialize;

use super::ledger::Ledger;

/// Samples of errors in a report.
const SAMPLES_MAX: usize = 10;

/// The result of a run. Times in milliseconds.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub engine_version: String,
    pub clients: u32,
    pub seconds: f64,
    pub switchovers: u32,
    pub failed_switchovers: u32,
    /// Round trips that clients waited for.
    pub requests: u64,
    /// Commands in them.
    pub commands: u64,
    /// Acknowledged writes.
    pub acknowledged: u64,
    /// Acknowledged and not there at the end.
    pub lost: u64,
    /// There more often than was asked for.
    pub duplicated: u64,
    /// Reads that went back behind an acknowledged write of the same client.
    pub stale_reads: u64,
    pub client_errors: u64,
    pub longest_stall_ms: f64,
    pub hold: Percentiles,
    pub critical: Percentiles,
    pub task: Percentiles,
    /// The first errors, for a person to read.
    pub error_samples: Vec<String>,
    #[serde(skip)]
    pub(super) hold_ms: Vec<f64>,
    #[serde(skip)]
    pub(super) critical_ms: Vec<f64>,
    #[serde(skip)]
    pub(super) task_ms: Vec<f64>,
}

/// Of the switchovers of a run, by nearest rank.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

impl Percentiles {
    fn of(values: &mut [f64]) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let rank = (part * values.len() as f64).ceil() as usize;
            values
                .get(rank.saturating_sub(1))
                .copied()
                .unwrap_or_default()
        };
        Self {
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: at(1.0),
        }
    }
}

impl Report {
    pub(super) fn add(&mut self, ledger: &Ledger) {
        self.requests += ledger.requests;
        self.commands += ledger.commands;
        self.acknowledged += ledger.acknowledged();
        self.client_errors += ledger.errors;
        self.stale_reads += ledger.stale_reads;
        let stall = ledger.longest_stall.as_secs_f64() * 1000.0;
        self.longest_stall_ms = self.longest_stall_ms.max(stall);
        for sample in &ledger.samples {
            self.sample(sample.clone());
        }
    }

    pub(super) fn sample(&mut self, text: String) {
        if self.error_samples.len() < SAMPLES_MAX {
            self.error_samples.push(text);
        }
    }

    pub(super) fn finish(&mut self) {
        self.hold = Percentiles::of(&mut self.hold_ms);
        self.critical = Percentiles::of(&mut self.critical_ms);
        self.task = Percentiles::of(&mut self.task_ms);
    }

    /// Nothing lost, nothing doubled, nothing seen by a client, every switchover done.
    pub fn kept_every_promise(&self) -> bool {
        let broken = self.lost + self.duplicated + self.stale_reads + self.client_errors;
        broken == 0 && self.failed_switchovers == 0
    }

    /// A table, and the first errors below it.
    pub fn text(&self) -> String {
        let times = |p: &Percentiles| {
            format!(
                "p50 {:.1}  p99 {:.1}  max {:.1}",
                p.p50_ms, p.p99_ms, p.max_ms
            )
        };
        let rows = [
            ("engine", self.engine_version.clone()),
            (
                "switchovers done / failed",
                format!("{} / {}", self.switchovers, self.failed_switchovers),
            ),
            (
                "clients, seconds",
                format!("{}, {:.1}", self.clients, self.seconds),
            ),
            (
                "requests (commands)",
                format!("{} ({})", self.requests, self.commands),
            ),
            ("acknowledged writes", self.acknowledged.to_string()),
            ("lost", self.lost.to_string()),
            ("duplicated", self.duplicated.to_string()),
            ("stale reads", self.stale_reads.to_string()),
            ("client errors", self.client_errors.to_string()),
            (
                "longest client stall, ms",
                format!("{:.1}", self.longest_stall_ms),
            ),
            ("hold, ms", times(&self.hold)),
            ("critical section, ms", times(&self.critical)),
            ("whole task, ms", times(&self.task)),
        ];
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        for (name, value) in rows {
            table.add_row([name.to_owned(), value]);
        }
        let mut text = table.trim_fmt();
        for sample in &self.error_samples {
            text.push_str("\n! ");
            text.push_str(sample);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let mut values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        let p = Percentiles::of(&mut values);
        assert_eq!((p.p50_ms, p.p99_ms, p.max_ms), (100.0, 198.0, 200.0));
        assert_eq!(Percentiles::of(&mut []), Percentiles::default());
    }

    #[test]
    fn any_broken_promise_shows() {
        assert!(Report::default().kept_every_promise());
        for broken in [
            Report {
                lost: 1,
                ..Report::default()
            },
            Report {
                duplicated: 1,
                ..Report::default()
            },
            Report {
                stale_reads: 1,
                ..Report::default()
            },
            Report {
                client_errors: 1,
                ..Report::default()
            },
            Report {
                failed_switchovers: 1,
                ..Report::default()
            },
        ] {
            assert!(!broken.kept_every_promise());
        }
    }
}
