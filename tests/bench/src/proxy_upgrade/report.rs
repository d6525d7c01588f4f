//! From what the clients saw to the verdict, per kind of connection.
//!
//! Invariant: a request counts as one during a hand-over if it was under way while clients went, and as
//! one at its start if it ended before; both are compared with those of the same run that were wholly in
//! the time right before.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::{
    book::{Kind, Page, Sample},
    handover::Seen,
};
use crate::{
    probe::{Wake, lateness},
    report::{Percentiles, at_rank},
};

/// What a request may take longer, 99 of 100 times.
const ADDED_MS_MAX: f64 = 20.0;
/// From the first client that goes to the last.
const WHOLE_MS_MAX: f64 = 1_000.0;

/// One hand-over, and the time before it in which nothing was done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    pub(super) calm_from_us: u64,
    pub(super) seen: Seen,
}

/// One kind of connection. Times in milliseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Line {
    pub(super) kind: &'static str,
    pub(super) connections: u64,
    /// The same connection, whole, at the end.
    pub(super) intact: u64,
    pub(super) errors: u64,
    pub(super) lost: u64,
    pub(super) repeated: u64,
    pub(super) requests: usize,
    pub(super) requests_before: usize,
    pub(super) requests_during: usize,
    pub(super) before: Percentiles,
    /// While the next process starts and tries itself.
    pub(super) starting: Percentiles,
    /// While clients go from process to process.
    pub(super) during: Percentiles,
    pub(super) added_starting_p99_ms: f64,
    pub(super) added_p99_ms: f64,
    /// p99 during by p99 before; 0: nothing was measured.
    pub(super) ratio_p99: f64,
    pub(super) words: Vec<String>,
}

/// How late a thread was woken that wants nothing else: what is added to any time by a machine that has
/// too much to do, ours or others'.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub struct Machine {
    pub before: Percentiles,
    pub starting: Percentiles,
    pub during: Percentiles,
}

impl Machine {
    fn of(wakes: &[Wake], changes: &[Change]) -> Self {
        let times = |of: fn(&Change) -> (u64, u64)| {
            let times: Vec<(u64, u64)> = changes.iter().map(of).collect();
            lateness(wakes, &times)
        };
        Self {
            before: times(|c| (c.calm_from_us, c.seen.asked_us)),
            starting: times(|c| (c.seen.asked_us, c.seen.serving_us)),
            during: times(|c| (c.seen.serving_us, c.seen.settled_us)),
        }
    }
}

/// The result of a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub handovers: u32,
    pub failed: u32,
    /// From the moment another process has the listener to the last client that goes.
    pub handover: Percentiles,
    /// From the moment it was asked for, with the start and the trial of the new process.
    pub whole: Percentiles,
    /// Clients that stayed with the process before, at most, after a hand-over.
    pub left_max: u64,
    /// The longest that a client was stopped, of each hand-over.
    pub stopped: Percentiles,
    pub machine: Machine,
    pub seconds: f64,
    pub(super) kinds: Vec<Line>,
    pub(super) words: Vec<String>,
}

/// Milliseconds of those that are wanted, sorted.
fn took(samples: &[Sample], wanted: impl Fn(&Sample) -> bool) -> Vec<f64> {
    let wanted = samples.iter().filter(|s| wanted(s));
    let took = wanted.map(|s| s.to_us.saturating_sub(s.from_us) as f64 / 1000.0);
    let mut took: Vec<f64> = took.collect();
    took.sort_by(f64::total_cmp);
    took
}

fn line(kind: Kind, page: Page, changes: &[Change]) -> Line {
    let within = |of: fn(&Change, &Sample) -> bool| {
        took(&page.samples, |s| changes.iter().any(|c| of(c, s)))
    };
    let mut before = within(|c, s| s.from_us >= c.calm_from_us && s.to_us < c.seen.asked_us);
    let mut starting = within(|c, s| s.to_us >= c.seen.asked_us && s.to_us < c.seen.serving_us);
    let mut during = within(|c, s| s.to_us >= c.seen.serving_us && s.from_us <= c.seen.settled_us);
    let [was, then, is] = [&before, &starting, &during].map(|times| at_rank(times, 0.99));
    let added = |times: &[f64], p99: f64| match was > 0.0 && !times.is_empty() {
        true => (p99 - was, p99 / was),
        false => (0.0, 0.0),
    };
    let (added_p99_ms, ratio_p99) = added(&during, is);
    let (added_starting_p99_ms, _) = added(&starting, then);
    Line {
        kind: kind.name(),
        connections: page.connections,
        intact: page.intact,
        errors: page.errors + page.closed,
        lost: page.lost,
        repeated: page.repeated,
        requests: page.samples.len(),
        requests_before: before.len(),
        requests_during: during.len(),
        before: Percentiles::of(&mut before),
        starting: Percentiles::of(&mut starting),
        during: Percentiles::of(&mut during),
        added_starting_p99_ms,
        added_p99_ms,
        ratio_p99,
        words: page.words,
    }
}

impl Report {
    pub(super) fn of(mut pages: BTreeMap<Kind, Page>, changes: &[Change], wakes: &[Wake]) -> Self {
        let ms = |from_us: u64, to_us: u64| to_us.saturating_sub(from_us) as f64 / 1000.0;
        let times = |of: fn(&Seen) -> u64| {
            let each = changes.iter();
            let each = each.map(|c| ms(of(&c.seen), c.seen.settled_us));
            Percentiles::of(&mut each.collect::<Vec<_>>())
        };
        let kinds = Kind::ALL.into_iter();
        Self {
            handovers: u32::try_from(changes.len()).unwrap_or(u32::MAX),
            handover: times(|seen| seen.serving_us),
            whole: times(|seen| seen.asked_us),
            left_max: changes.iter().map(|c| c.seen.left).max().unwrap_or(0),
            stopped: Percentiles::of(
                &mut changes
                    .iter()
                    .map(|c| ms(0, c.seen.stopped_us))
                    .collect::<Vec<_>>(),
            ),
            machine: Machine::of(wakes, changes),
            kinds: kinds
                .filter_map(|kind| Some(line(kind, pages.remove(&kind)?, changes)))
                .collect(),
            ..Self::default()
        }
    }

    /// What was promised and was not so.
    pub fn broken(&self) -> Vec<String> {
        let mut broken = Vec::new();
        if self.failed > 0 || self.handovers == 0 {
            broken.push(format!("{} hand-overs were not done", self.failed.max(1)));
        }
        if self.left_max > 0 {
            broken.push(format!("{} clients stayed behind", self.left_max));
        }
        if self.handover.max_ms > WHOLE_MS_MAX {
            let max_ms = self.handover.max_ms;
            broken.push(format!(
                "a hand-over took {max_ms:.0} ms, over {WHOLE_MS_MAX}"
            ));
        }
        for line in &self.kinds {
            let (kind, gone) = (line.kind, line.connections.saturating_sub(line.intact));
            if gone > 0 {
                broken.push(format!("{kind}: {gone} of {} not intact", line.connections));
            }
            let wrong = [
                ("errors", line.errors),
                ("lost", line.lost),
                ("repeated", line.repeated),
            ];
            let wrong = wrong.into_iter().filter(|(_, count)| *count > 0);
            broken.extend(wrong.map(|(what, count)| format!("{kind}: {count} {what}")));
            let added_ms = line.added_p99_ms.max(line.added_starting_p99_ms);
            if added_ms > ADDED_MS_MAX {
                broken.push(format!(
                    "{kind}: p99 + {added_ms:.1} ms, over {ADDED_MS_MAX}"
                ));
            }
        }
        broken
    }

    fn times(&self) -> String {
        let Machine {
            before,
            starting,
            during,
        } = &self.machine;
        let machine = format!(
            "\na thread that only wants to be woken was late, ms\n  before: {before}\n  starting: \
             {starting}\n  during: {during}"
        );
        format!(
            "\nhand-overs done / failed: {} / {}, {:.0} s\nlistener to last client, ms: {}\nwith start \
             and trial, ms: {}\nlongest stop of a client, each hand-over, ms: {}\nclients left behind, at \
             most: {}{machine}",
            self.handovers,
            self.failed,
            self.seconds,
            self.handover,
            self.whole,
            self.stopped,
            self.left_max
        )
    }

    /// A table of kinds, the times, and what went wrong.
    pub fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header([
            "kind",
            "connections",
            "intact",
            "errors",
            "lost",
            "repeated",
            "requests",
            "in hand-overs",
            "p99 before",
            "p99 starting",
            "p99 during",
            "added",
            "ratio",
            "max during",
        ]);
        for line in &self.kinds {
            let count = |n: u64| n.to_string();
            let time = |ms: f64| match line.requests_during {
                0 => "-".to_owned(),
                _ => format!("{ms:.2}"),
            };
            table.add_row([
                line.kind.to_owned(),
                count(line.connections),
                count(line.intact),
                count(line.errors),
                count(line.lost),
                count(line.repeated),
                line.requests.to_string(),
                line.requests_during.to_string(),
                time(line.before.p99_ms),
                time(line.starting.p99_ms),
                time(line.during.p99_ms),
                time(line.added_p99_ms),
                time(line.ratio_p99),
                time(line.during.max_ms),
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut text = table.trim_fmt();
        text += &self.times();
        let of_kinds = self.kinds.iter();
        let of_kinds = of_kinds.flat_map(|k| k.words.iter().map(|w| format!("{}: {w}", k.kind)));
        for what in self.words.iter().cloned().chain(of_kinds) {
            text += &format!("\n! {what}");
        }
        for what in self.broken() {
            text += &format!("\n! BROKEN: {what}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGE: Change = Change {
        calm_from_us: 1_000_000,
        seen: Seen {
            asked_us: 2_000_000,
            serving_us: 2_100_000,
            settled_us: 2_200_000,
            left: 0,
            stopped_us: 4_000,
        },
    };

    fn sample(from_us: u64, to_us: u64) -> Sample {
        Sample { from_us, to_us }
    }

    fn of(page: Page) -> Report {
        Report::of(BTreeMap::from([(Kind::Multi, page)]), &[CHANGE], &[])
    }

    #[test]
    fn a_request_counts_where_it_was_under_way() {
        let samples = vec![
            sample(900_000, 1_000_500),   // began too early for the time before
            sample(1_100_000, 1_102_000), // before
            sample(1_999_000, 2_001_000), // starting
            sample(2_050_000, 2_110_000), // during, though it began at the start
            sample(2_190_000, 2_230_000), // during
            sample(2_300_000, 2_301_000), // after
        ];
        let page = Page {
            samples,
            ..Page::default()
        };
        let report = of(page);
        let line = &report.kinds[0];
        assert_eq!((line.requests_before, line.requests_during), (1, 2));
        assert!((line.added_p99_ms - 58.0).abs() < 1e-6, "{line:?}");
        assert!((line.ratio_p99 - 30.0).abs() < 1e-6, "{line:?}");
        assert!(report.broken()[0].contains("p99"), "{:?}", report.broken());
    }

    #[test]
    fn each_promise_is_looked_at() {
        assert!(of(Page::default()).broken().is_empty());
        let spoiled: [fn(&mut Page); 5] = [
            |page| page.connections = 1,
            |page| page.errors = 1,
            |page| page.closed = 1,
            |page| page.lost = 1,
            |page| page.repeated = 1,
        ];
        for spoil in spoiled {
            let mut page = Page::default();
            spoil(&mut page);
            assert_eq!(of(page).broken().len(), 1);
        }
        let mut slow = CHANGE;
        slow.seen.settled_us += 900_001;
        assert_eq!(Report::of(BTreeMap::new(), &[slow], &[]).broken().len(), 1);
        assert_eq!(Report::of(BTreeMap::new(), &[], &[]).broken().len(), 1);
    }
}
