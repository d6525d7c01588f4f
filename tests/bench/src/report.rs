//! What the reports of several measurements have in common.

use std::{fmt, io::Write as _};

use comfy_table::{Table, presets};
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    Text,
    Json,
}

impl Output {
    /// Prints a report in this form.
    ///
    /// # Errors
    /// When it can't be written.
    pub(crate) fn print<R: Serialize>(
        self,
        report: &R,
        text: impl FnOnce(&R) -> String,
    ) -> anyhow::Result<()> {
        let text = match self {
            Self::Json => serde_json::to_string_pretty(report)?,
            Self::Text => text(report),
        };
        writeln!(std::io::stdout().lock(), "{text}")?;
        Ok(())
    }
}

/// Of the times of a run in milliseconds, by nearest rank.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

/// The value below which this part of the sorted values is, by nearest rank; 0 when there are none.
pub(crate) fn at_rank(sorted: &[f64], part: f64) -> f64 {
    let rank = (part * sorted.len() as f64).ceil() as usize;
    let value = sorted.get(rank.saturating_sub(1));
    value.copied().unwrap_or_default()
}

impl Percentiles {
    /// All 0 when there are no values.
    pub(crate) fn of(values: &mut [f64]) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            p50_ms: at_rank(values, 0.5),
            p99_ms: at_rank(values, 0.99),
            max_ms: at_rank(values, 1.0),
        }
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            p50_ms,
            p99_ms,
            max_ms,
        } = self;
        write!(f, "p50 {p50_ms:.1}  p99 {p99_ms:.1}  max {max_ms:.1}")
    }
}

/// Two columns, and what went wrong below them.
pub(crate) fn table(rows: Vec<(&str, String)>, wrong: &[String]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in rows {
        table.add_row([name.to_owned(), value]);
    }
    let mut text = table.trim_fmt();
    for sample in wrong {
        text.push_str("\n! ");
        text.push_str(sample);
    }
    text
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
}
