//! What all clients of a load were told, and what of it was not true.
//!
//! Invariant: a number here only grows; nothing that was found is taken back.

use serde::Serialize;

use super::ledger::Ledger;

/// Samples of errors in a report.
const SAMPLES_MAX: usize = 10;
/// Of one of them: a pipeline has as many errors as commands, and says all of them.
const SAMPLE_CHARS_MAX: usize = 300;

/// The ledgers of a load, added up and audited. Times in milliseconds.
#[derive(Debug, Default, Serialize)]
pub struct Told {
    pub clients: u32,
    pub seconds: f64,
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
    /// The first errors, for a person to read.
    pub error_samples: Vec<String>,
}

impl Told {
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

    /// Adds what another load was told.
    pub(crate) fn merge(&mut self, other: Self) {
        self.clients = self.clients.max(other.clients);
        self.seconds += other.seconds;
        self.requests += other.requests;
        self.commands += other.commands;
        self.acknowledged += other.acknowledged;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.stale_reads += other.stale_reads;
        self.client_errors += other.client_errors;
        self.longest_stall_ms = self.longest_stall_ms.max(other.longest_stall_ms);
        for sample in other.error_samples {
            self.sample(sample);
        }
    }

    pub(crate) fn sample(&mut self, text: String) {
        if self.error_samples.len() < SAMPLES_MAX {
            let begin = text.chars().take(SAMPLE_CHARS_MAX);
            self.error_samples.push(begin.collect());
        }
    }

    /// Nothing lost, nothing doubled, nothing seen by a client.
    pub fn is_true(&self) -> bool {
        self.lost + self.duplicated + self.stale_reads + self.client_errors == 0
    }

    /// Lines of a table.
    pub(crate) fn rows(&self) -> Vec<(&'static str, String)> {
        vec![
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
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_broken_promise_shows() {
        assert!(Told::default().is_true());
        let broken: [fn(&mut Told); 4] = [
            |told| told.lost = 1,
            |told| told.duplicated = 1,
            |told| told.stale_reads = 1,
            |told| told.client_errors = 1,
        ];
        for spoil in broken {
            let mut told = Told::default();
            spoil(&mut told);
            assert!(!told.is_true(), "{told:?}");
        }
    }
}
