//! From samples to medians and ratios, for people and for scripts.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::load::Cell;

/// One measurement of one target in one cell.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    /// Of the target's process, for one request.
    pub(super) cpu_us: f64,
    /// Of the whole machine: client, target and nodes.
    pub(super) host_cpu_us: f64,
    pub(super) requests_per_second: f64,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
}

/// All that was measured; a contract with scripts, field by field.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    rounds: u32,
    rows: Vec<Row>,
}

/// One target in one cell: medians over the rounds.
#[derive(Debug, Serialize)]
struct Row {
    test: &'static str,
    pipeline: u32,
    clients: u32,
    target: String,
    cpu_us_per_request: f64,
    host_cpu_us_per_request: f64,
    requests_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Our proxy's CPU time divided by this target's, in the same round; `None` without our proxy.
    slotmesh_cpu_ratio: Option<f64>,
    /// The same of requests per second.
    slotmesh_throughput_ratio: Option<f64>,
    #[serde(skip)]
    samples: Vec<Sample>,
}

impl Row {
    fn is_of(&self, cell: Cell, target: &str) -> bool {
        self.test == cell.test
            && self.pipeline == cell.pipeline
            && self.clients == cell.clients
            && self.target == target
    }

    fn cell(&self) -> Cell {
        Cell {
            test: self.test,
            pipeline: self.pipeline,
            clients: self.clients,
        }
    }

    fn summarise(&mut self) {
        let of = |field: fn(&Sample) -> f64| median(self.samples.iter().map(field));
        self.cpu_us_per_request = of(|sample| sample.cpu_us);
        self.host_cpu_us_per_request = of(|sample| sample.host_cpu_us);
        self.requests_per_second = of(|sample| sample.requests_per_second);
        self.p50_ms = of(|sample| sample.p50_ms);
        self.p99_ms = of(|sample| sample.p99_ms);
    }
}

impl Report {
    pub(super) fn new(rounds: u32) -> Self {
        Self {
            rounds,
            rows: Vec::new(),
        }
    }

    /// Adds what a target did in a round. Each target is measured once a round, so the samples of
    /// two targets at the same place are of the same round.
    pub(super) fn add(&mut self, cell: Cell, target: &str, sample: Sample) {
        let row = match self.rows.iter_mut().position(|row| row.is_of(cell, target)) {
            Some(at) => &mut self.rows[at],
            None => {
                // Rows of one cell stay together, in the order of the cells.
                let same = |row: &Row| row.cell() == cell;
                let at = self
                    .rows
                    .iter()
                    .rposition(same)
                    .map_or(self.rows.len(), |at| at + 1);
                self.rows.insert(at, empty_row(cell, target));
                &mut self.rows[at]
            }
        };
        row.samples.push(sample);
        row.summarise();
    }

    /// Fills in the ratios of one target (ours) to each other.
    pub(super) fn compare_with(&mut self, ours: &str) {
        let of_ours = |row: &&Row| row.target == ours;
        let ours: Vec<(Cell, Vec<Sample>)> = self
            .rows
            .iter()
            .filter(of_ours)
            .map(|row| (row.cell(), row.samples.clone()))
            .collect();
        for (cell, ours) in ours {
            for row in self.rows.iter_mut().filter(|row| row.cell() == cell) {
                let ratio = |field: fn(&Sample) -> f64| {
                    median(
                        ours.iter()
                            .zip(&row.samples)
                            .map(|(a, b)| field(a) / field(b)),
                    )
                };
                row.slotmesh_cpu_ratio = Some(ratio(|sample| sample.cpu_us));
                row.slotmesh_throughput_ratio = Some(ratio(|sample| sample.requests_per_second));
            }
        }
    }

    /// Cells in which our CPU time is more than `limit` times that of `target`.
    pub(super) fn above(&self, target: &str, limit: f64) -> Vec<String> {
        let rows = self.rows.iter().filter(|row| row.target == target);
        // Not a number is no proof of anything.
        rows.filter(|row| !row.slotmesh_cpu_ratio.is_some_and(|ratio| ratio <= limit))
            .map(|row| {
                format!(
                    "{}: {:.2}",
                    row.cell().name(),
                    row.slotmesh_cpu_ratio.unwrap_or(f64::NAN)
                )
            })
            .collect()
    }

    pub(super) fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header([
            "load",
            "target",
            "CPU us/req",
            "host us/req",
            "req/s",
            "p50 ms",
            "p99 ms",
            "slotmesh CPU x",
            "slotmesh req/s x",
        ]);
        let mut last = None;
        for row in &self.rows {
            let cell = row.cell();
            if last.is_some_and(|last| last != cell) {
                table.add_row([""]);
            }
            last = Some(cell);
            let ratio =
                |ratio: Option<f64>| ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
            table.add_row([
                cell.name(),
                row.target.clone(),
                format!("{:.2}", row.cpu_us_per_request),
                format!("{:.2}", row.host_cpu_us_per_request),
                format!("{:.0}", row.requests_per_second),
                format!("{:.3}", row.p50_ms),
                format!("{:.3}", row.p99_ms),
                ratio(row.slotmesh_cpu_ratio),
                ratio(row.slotmesh_throughput_ratio),
            ]);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!(
            "{table}\n\nmedians of {} rounds; \"slotmesh … x\" is ours divided by the target's, in the same round\n",
            self.rounds
        )
    }
}

fn empty_row(cell: Cell, target: &str) -> Row {
    Row {
        test: cell.test,
        pipeline: cell.pipeline,
        clients: cell.clients,
        target: target.to_owned(),
        cpu_us_per_request: 0.0,
        host_cpu_us_per_request: 0.0,
        requests_per_second: 0.0,
        p50_ms: 0.0,
        p99_ms: 0.0,
        slotmesh_cpu_ratio: None,
        slotmesh_throughput_ratio: None,
        samples: Vec::new(),
    }
}

/// The middle value, or the mean of the two middle ones; not a number if there is none.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => f64::midpoint(values[len / 2 - 1], values[len / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CELL: Cell = Cell {
        test: "get",
        pipeline: 1,
        clients: 50,
    };

    fn sample(cpu_us: f64) -> Sample {
        Sample {
            cpu_us,
            host_cpu_us: 1.0,
            requests_per_second: 100.0,
            p50_ms: 1.0,
            p99_ms: 2.0,
        }
    }

    fn report() -> Report {
        let mut report = Report::new(3);
        // The machine slows down by 10 in the second round; both feel it.
        for (ours, theirs) in [(8.0, 10.0), (80.0, 100.0), (9.0, 10.0)] {
            report.add(CELL, "slotmesh", sample(ours));
            report.add(CELL, "twemproxy", sample(theirs));
        }
        report.compare_with("slotmesh");
        report
    }

    #[test]
    fn ratios_are_formed_inside_a_round() {
        let report = report();
        let twemproxy = report
            .rows
            .iter()
            .find(|row| row.target == "twemproxy")
            .unwrap();
        assert_eq!(twemproxy.cpu_us_per_request, 10.0);
        assert_eq!(twemproxy.slotmesh_cpu_ratio, Some(0.8));
    }

    #[test]
    fn a_limit_names_the_cells_that_exceed_it() {
        assert!(report().above("twemproxy", 0.8).is_empty());
        assert_eq!(report().above("twemproxy", 0.7), ["GET P1 c50: 0.80"]);
    }

    #[test]
    fn the_middle_of_nothing_is_not_a_number() {
        assert!(median(std::iter::empty()).is_nan());
        assert_eq!(median([3.0, 1.0].into_iter()), 2.0);
        assert_eq!(median([9.0, 1.0, 2.0].into_iter()), 2.0);
    }
}
