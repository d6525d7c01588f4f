//! What a kill did: who is served by the other process, who is lost, and whether it may be so.
//!
//! Invariant: a client may be lost only if the process that was killed was the only one that had it: the
//! taker has those who went, the giver all others.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::{
    super::book::{Kind, Page, Sample},
    moment::{Case, Moment, Side},
    of_clients,
};

/// Samples that began so long after the kill are about something else.
const AFTER_US: u64 = 5_000_000;

/// One kill. Times in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Trial {
    #[serde(flatten)]
    pub(super) case: Case,
    pub(super) connections: u64,
    /// Clients that had gone from the giver to the taker.
    pub(super) went: u64,
    /// The same connection, whole, at the end.
    pub(super) kept: u64,
    /// Closed, and nothing else was wrong with them.
    pub(super) closed: u64,
    pub(super) errors: u64,
    pub(super) lost: u64,
    pub(super) repeated: u64,
    /// New connections that were not let in, and that were closed before they were answered.
    pub(super) new_refused: u64,
    pub(super) new_closed: u64,
    /// The longest that a client waited that was kept, for a reply or a message.
    pub(super) silence_ms: f64,
    /// The longest time without a new connection that was served.
    pub(super) new_gap_ms: f64,
    /// Clients with another process than the one that serves.
    pub(super) strays: u64,
    /// It was the taker that served afterwards.
    pub(super) taker_serves: bool,
    pub(super) words: Vec<String>,
}

impl Trial {
    pub(super) fn of(
        case: Case,
        pages: &BTreeMap<Kind, Page>,
        killed_us: u64,
        went: u64,
        strays: u64,
        taker_serves: bool,
    ) -> Self {
        let of = |what: fn(&Page) -> u64| of_clients(pages, what);
        let new = pages.get(&Kind::New).cloned().unwrap_or_default();
        // Those that feed others are at another proxy: nothing at all may be wrong with them.
        let feeding = pages.get(&Kind::Plain).cloned().unwrap_or_default();
        let known = pages.iter().filter(|(kind, _)| **kind != Kind::New);
        let (silence, words) = known.fold((0, Vec::new()), |(longest, mut words), (kind, page)| {
            words.extend(page.words.iter().take(2).cloned());
            let silence = match kind {
                // What it waits for between two reads is its own pause.
                Kind::Tracking => 0,
                _ => silence_us(&page.samples, killed_us),
            };
            (longest.max(silence), words)
        });
        Self {
            case,
            connections: of(|page| page.connections),
            went,
            kept: of(|page| page.intact),
            closed: of(|page| page.closed),
            errors: of(|page| page.errors) + feeding.errors + feeding.closed,
            lost: of(|page| page.lost) + feeding.lost,
            repeated: of(|page| page.repeated) + feeding.repeated,
            new_refused: new.errors,
            new_closed: new.closed,
            silence_ms: silence as f64 / 1000.0,
            new_gap_ms: gap_us(&new.samples, killed_us) as f64 / 1000.0,
            strays,
            taker_serves,
            words,
        }
    }

    /// Clients that had to be kept.
    fn owed(&self) -> u64 {
        match self.case.side {
            Side::Giver => self.went,
            Side::Taker => self.connections.saturating_sub(self.went),
        }
    }

    /// What was promised and was not so.
    pub(super) fn broken(&self) -> Vec<String> {
        let mut broken = Vec::new();
        let mut none = |count: u64, what: &str| {
            if count > 0 {
                broken.push(format!("{}: {count} {what}", self.case));
            }
        };
        none(
            self.owed().saturating_sub(self.kept),
            "lost that were not with the process that was killed",
        );
        let found = self.kept + self.closed + self.errors;
        none(
            self.connections.saturating_sub(found),
            "of whom nothing is known",
        );
        none(self.errors, "with errors");
        none(self.lost, "replies or messages lost");
        none(self.repeated, "repeated");
        none(self.strays, "clients with a process that does not serve");
        // Somebody has the listening socket: who comes waits in its queue.
        if self.case.side == Side::Taker || self.case.moment >= Moment::Listener {
            none(self.new_refused, "new connections were refused");
        }
        broken
    }

    pub(super) fn line(&self) -> String {
        format!(
            "{}: {} of {} had gone, {} kept, {} closed, {} errors, {} lost, {} repeated; silence {:.0} ms, of new \
             ones {:.0} ms; {} strays; the taker serves: {}",
            self.case,
            self.went,
            self.connections,
            self.kept,
            self.closed,
            self.errors,
            self.lost,
            self.repeated,
            self.silence_ms,
            self.new_gap_ms,
            self.strays,
            self.taker_serves
        )
    }
}

/// The longest that somebody waited for what came after the kill.
fn silence_us(samples: &[Sample], killed_us: u64) -> u64 {
    let then = |s: &&Sample| s.to_us >= killed_us && s.from_us <= killed_us + AFTER_US;
    let took = samples.iter().filter(then);
    took.map(|s| s.to_us.saturating_sub(s.from_us))
        .max()
        .unwrap_or(0)
}

/// The longest time between two that were served, of which the later one was after the kill.
fn gap_us(samples: &[Sample], killed_us: u64) -> u64 {
    let mut served: Vec<u64> = samples.iter().map(|s| s.to_us).collect();
    served.sort_unstable();
    let pairs = served.windows(2).filter(|pair| pair[1] >= killed_us);
    pairs.map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
}

/// The result of a run.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(super) trials: Vec<Trial>,
    /// Those that came to nothing.
    pub(super) failed: Vec<String>,
}

impl Report {
    /// What was promised and was not so.
    pub(crate) fn broken(&self) -> Vec<String> {
        let mut broken: Vec<String> = self.trials.iter().flat_map(Trial::broken).collect();
        broken.extend(self.failed.iter().cloned());
        if self.trials.is_empty() {
            broken.push("nobody was killed".to_owned());
        }
        broken
    }

    /// A line for each process and moment, and what went wrong.
    pub(crate) fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header([
            "way",
            "killed",
            "moment",
            "times",
            "had gone",
            "kept",
            "closed",
            "not owed",
            "errors",
            "lost",
            "repeated",
            "silence, ms",
            "new ones', ms",
            "taker serves",
        ]);
        let mut cases: BTreeMap<Case, Vec<&Trial>> = BTreeMap::new();
        for trial in &self.trials {
            cases.entry(trial.case).or_default().push(trial);
        }
        for (case, trials) in &cases {
            let span = |of: fn(&Trial) -> u64| {
                let (least, most) = trials.iter().fold((u64::MAX, 0), |(least, most), t| {
                    (least.min(of(t)), most.max(of(t)))
                });
                match least == most {
                    true => most.to_string(),
                    false => format!("{least}-{most}"),
                }
            };
            let sum = |of: fn(&Trial) -> u64| trials.iter().map(|t| of(t)).sum::<u64>().to_string();
            let longest = |of: fn(&Trial) -> f64| {
                let longest = trials.iter().map(|t| of(t)).fold(0.0, f64::max);
                format!("{longest:.0}")
            };
            table.add_row([
                format!("{:?}", case.way),
                format!("{:?}", case.side),
                format!("{:?}", case.moment),
                trials.len().to_string(),
                span(|t| t.went),
                span(|t| t.kept),
                span(|t| t.closed),
                span(|t| t.connections.saturating_sub(t.owed())),
                sum(|t| t.errors),
                sum(|t| t.lost),
                sum(|t| t.repeated),
                longest(|t| t.silence_ms),
                longest(|t| t.new_gap_ms),
                sum(|t| u64::from(t.taker_serves)),
            ]);
        }
        for column in table.column_iter_mut().skip(3) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut text = table.trim_fmt();
        for what in self.broken() {
            text += &format!("\n! BROKEN: {what}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::{super::moment::Way, *};

    fn trial(side: Side, went: u64, kept: u64, spoil: impl FnOnce(&mut Page)) -> Trial {
        let case = Case {
            way: Way::There,
            side,
            moment: Moment::Batches,
        };
        let mut idle = Page {
            connections: 100,
            intact: kept,
            closed: 100 - kept,
            ..Page::default()
        };
        spoil(&mut idle);
        Trial::of(
            case,
            &BTreeMap::from([(Kind::Idle, idle)]),
            0,
            went,
            0,
            false,
        )
    }

    #[test]
    fn only_who_was_with_the_process_that_was_killed_may_be_lost() {
        for (side, kept) in [(Side::Giver, 30), (Side::Taker, 70)] {
            assert!(trial(side, 30, kept, |_| {}).broken().is_empty());
            assert_eq!(trial(side, 30, kept - 1, |_| {}).broken().len(), 1);
            // What was on the way when the giver died may be the taker's.
            assert!(trial(side, 30, kept + 1, |_| {}).broken().is_empty());
        }
        let unknown = trial(Side::Giver, 30, 30, |page| page.closed -= 1);
        assert_eq!(unknown.broken().len(), 1);
        let spoiled: [fn(&mut Page); 3] = [
            |page| (page.errors, page.closed) = (1, page.closed - 1),
            |page| page.lost = 1,
            |page| page.repeated = 1,
        ];
        for spoil in spoiled {
            assert_eq!(trial(Side::Giver, 30, 30, spoil).broken().len(), 1);
        }
    }

    #[test]
    fn the_longest_times_are_those_that_reach_beyond_the_kill() {
        let sample = |from_us, to_us| Sample { from_us, to_us };
        let samples = [
            sample(0, 900),
            sample(950, 1_050),
            sample(1_100, 1_150),
            sample(2_000, 2_010),
            sample(1_000 + AFTER_US + 1, 99_000_000),
        ];
        assert_eq!(silence_us(&samples, 1_000), 100);
        assert_eq!(gap_us(&samples[..4], 1_000), 860);
        assert_eq!(gap_us(&[], 1_000), 0);
    }
}
