//! From samples to medians and ratios.
//!
//! Invariant: a ratio's two sides are of the same round and cell.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use crate::proxy::{load::Cell, report::median};

/// One measurement of one mode.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    pub(super) requests_per_second: f64,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
    /// CPU time for one request.
    pub(super) proxy_us: f64,
    pub(super) primary_us: f64,
    /// Of all replicas together.
    pub(super) replicas_us: f64,
    /// Writes for each time that the primary was asked for its replicas; 0: it was not.
    pub(super) batch: f64,
}

/// One mode in one cell; a sample for each round.
#[derive(Debug)]
struct Row {
    cell: Cell,
    durability: u32,
    samples: Vec<Sample>,
}

impl Row {
    fn median(&self, of: fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(of))
    }

    /// Against the asynchronous mode.
    fn ratio(&self, base: &Self, of: fn(&Sample) -> f64) -> f64 {
        let pairs = self.samples.iter().zip(&base.samples);
        median(pairs.map(|(own, other)| of(own) / of(other)))
    }
}

/// All that was measured.
#[derive(Debug, Default)]
pub(super) struct Report {
    rows: Vec<Row>,
}

const HEADINGS: [&str; 10] = [
    "cell",
    "k",
    "req/s",
    "x",
    "p50 ms",
    "x",
    "p99 ms",
    "x",
    "batch",
    "CPU us: proxy, primary, replicas",
];

impl Report {
    pub(super) fn add(&mut self, cell: Cell, durability: u32, sample: Sample) {
        let is_it = |row: &&mut Row| row.cell == cell && row.durability == durability;
        match self.rows.iter_mut().find(is_it) {
            Some(row) => row.samples.push(sample),
            None => self.rows.push(Row {
                cell,
                durability,
                samples: vec![sample],
            }),
        }
    }

    pub(super) fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(HEADINGS);
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_by_key(|row| (row.cell.pipeline, row.cell.clients, row.durability));
        for row in rows {
            let base = self
                .rows
                .iter()
                .find(|r| r.cell == row.cell && r.durability == 0);
            let Some(base) = base else { continue };
            let cpu = format!(
                "{:.2} (x {:.2}), {:.2} (x {:.2}), {:.2}",
                row.median(|s| s.proxy_us),
                row.ratio(base, |s| s.proxy_us),
                row.median(|s| s.primary_us),
                row.ratio(base, |s| s.primary_us),
                row.median(|s| s.replicas_us),
            );
            table.add_row([
                row.cell.name(),
                row.durability.to_string(),
                format!("{:.0}", row.median(|s| s.requests_per_second)),
                format!("{:.2}", row.ratio(base, |s| s.requests_per_second)),
                format!("{:.3}", row.median(|s| s.p50_ms)),
                format!("{:.2}", row.ratio(base, |s| s.p50_ms)),
                format!("{:.3}", row.median(|s| s.p99_ms)),
                format!("{:.2}", row.ratio(base, |s| s.p99_ms)),
                format!("{:.1}", row.median(|s| s.batch)),
                cpu,
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let rounds = self.rows.first().map_or(0, |row| row.samples.len());
        let mut text = table.trim_fmt();
        let _ = writeln!(
            text,
            "\nmedians of {rounds} rounds; x: against k = 0 in the same round"
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_formed_inside_a_round() {
        let cell = Cell {
            test: "set",
            pipeline: 1,
            clients: 1,
        };
        let sample = |requests_per_second| Sample {
            requests_per_second,
            p50_ms: 1.0,
            p99_ms: 2.0,
            proxy_us: 3.0,
            primary_us: 4.0,
            replicas_us: 5.0,
            batch: 6.0,
        };
        let mut report = Report::default();
        // The machine is ten times slower in the second round.
        for (plain, durable) in [(100.0, 80.0), (10.0, 8.0), (100.0, 80.0)] {
            report.add(cell, 0, sample(plain));
            report.add(cell, 1, sample(durable));
        }
        let ratio = report.rows[1].ratio(&report.rows[0], |s| s.requests_per_second);
        assert!((ratio - 0.8).abs() < 1e-9);
        assert!(report.text().contains("0.80"), "{}", report.text());
    }
}
