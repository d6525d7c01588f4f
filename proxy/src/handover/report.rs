//! What a process that takes over says of it to whoever started it: a small file beside `proxy.json`.
//!
//! Invariant: the file is whole whenever it is read, and names the process that it is about. It is for
//! programs; a file that cannot be written is logged and stops nothing. While clients are between two
//! processes what is known only changes in memory: a disk may take longer than they can wait.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::TakeError;
use crate::saved;

const FILE: &str = "take-over.json";

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// It gets a topology and tests itself.
    #[default]
    Trial,
    /// It has asked the other process.
    Asking,
    /// New clients are its own; those of the other come.
    Serving,
    /// Everybody has come who can.
    Done,
    /// It gave up before it had anything; the other process serves as before.
    Failed,
}

#[derive(Clone, Debug, Default, Serialize)]
struct Known {
    pid: u32,
    release: &'static str,
    phase: Phase,
    /// Why it failed: a word for programs ([`TakeError::code`]), and a text for the operator.
    code: &'static str,
    reason: String,
    /// Clients that came, and that are still with the other process.
    taken: u64,
    left: u64,
    began_unix_ms: u64,
    /// 0: not yet.
    serving_unix_ms: u64,
    settled_unix_ms: u64,
    /// Counts the take-overs of this process.
    #[serde(skip)]
    number: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Report {
    path: PathBuf,
    known: Mutex<Known>,
    /// One writes at a time, so that the newest stays.
    file: Mutex<()>,
}

impl Report {
    pub(crate) fn new(data: &Path) -> Self {
        Self {
            path: data.join(FILE),
            known: Mutex::default(),
            file: Mutex::default(),
        }
    }

    /// It begins to take over.
    pub(crate) fn begin(&self) {
        self.note(|known| {
            *known = Known {
                pid: std::process::id(),
                release: env!("CARGO_PKG_VERSION"),
                began_unix_ms: unix_ms(),
                number: known.number + 1,
                ..Known::default()
            };
        });
        self.write();
    }

    pub(super) fn asking(&self) {
        self.note(|known| known.phase = Phase::Asking);
        self.write();
    }

    /// It has the listener. Only noted.
    pub(super) fn serving(&self) {
        self.note(|known| {
            known.phase = Phase::Serving;
            known.serving_unix_ms = unix_ms();
        });
    }

    /// Which take-over is reported on.
    pub(super) fn number(&self) -> u64 {
        self.known().number
    }

    /// In this take-over so many clients have come, and so many cannot for now. Only noted. False: that is
    /// known, or this process has been relieved since and takes over once more.
    pub(super) fn settled(&self, number: u64, taken: u64, left: u64) -> bool {
        let mut known = self.known();
        let is_known = known.phase == Phase::Done && (known.taken, known.left) == (taken, left);
        if known.number != number || is_known {
            return false;
        }
        known.phase = Phase::Done;
        (known.taken, known.left) = (taken, left);
        if known.settled_unix_ms == 0 {
            known.settled_unix_ms = unix_ms();
        }
        true
    }

    pub(crate) fn failed(&self, error: &TakeError) {
        self.give_up(error.code(), error.to_string());
    }

    /// With a reason that is none of a hand-over's own.
    pub(crate) fn give_up(&self, code: &'static str, reason: String) {
        self.note(|known| {
            known.phase = Phase::Failed;
            (known.code, known.reason) = (code, reason);
        });
        self.write();
    }

    fn note(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.known());
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is known. False: that is not possible.
    pub(super) fn write(&self) -> bool {
        let _file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.known().clone(); // whoever notes something does not wait for the disk
        let written = serde_json::to_vec(&known)
            .map_err(std::io::Error::from)
            .map(|text| saved::write_private(&self.path, &text));
        let written = written.and_then(|written| written.map_err(std::io::Error::other));
        if let Err(error) = &written {
            tracing::warn!(%error, "take-over.json is not written; whoever waits for it sees less");
        }
        written.is_ok()
    }
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_take_over_of_before_says_nothing_about_the_one_under_way() {
        let data = tempfile::tempdir().unwrap();
        let report = Report::new(data.path());
        report.begin();
        let first = report.number();
        assert!(report.settled(first, 7, 1));
        assert!(!report.settled(first, 7, 1), "it is known");
        assert!(report.settled(first, 8, 0), "a late one came");
        report.begin();
        assert!(!report.settled(first, 9, 0));
        assert_eq!(report.known().phase, Phase::Trial);
        assert!(report.settled(report.number(), 9, 0));
        assert!(report.write());
        let text = std::fs::read(data.path().join(FILE)).unwrap();
        let told: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(
            (&told["phase"], &told["taken"]),
            (&"done".into(), &9.into())
        );
    }
}
