//! What a process that takes over says of it to whoever started it: a small file beside `proxy.json`.
//!
//! Invariant: the file is whole whenever it is read, and names the process that it is about. It is for
//! programs; a file that cannot be written is logged and stops nothing.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
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
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Report {
    path: PathBuf,
    known: Mutex<Known>,
}

impl Report {
    pub(crate) fn new(data: &Path) -> Self {
        Self {
            path: data.join(FILE),
            known: Mutex::default(),
        }
    }

    /// It begins to take over.
    pub(crate) fn begin(&self) {
        self.change(|known| {
            *known = Known {
                pid: std::process::id(),
                release: env!("CARGO_PKG_VERSION"),
                began_unix_ms: unix_ms(),
                ..Known::default()
            };
        });
    }

    pub(super) fn asking(&self) {
        self.change(|known| known.phase = Phase::Asking);
    }

    pub(super) fn serving(&self) {
        self.change(|known| {
            known.phase = Phase::Serving;
            known.serving_unix_ms = unix_ms();
        });
    }

    /// So many clients have come, and so many cannot for now.
    pub(super) fn settled(&self, taken: u64, left: u64) {
        self.change(|known| {
            known.phase = Phase::Done;
            (known.taken, known.left) = (taken, left);
            if known.settled_unix_ms == 0 {
                known.settled_unix_ms = unix_ms();
            }
        });
    }

    pub(crate) fn failed(&self, error: &TakeError) {
        self.give_up(error.code(), error.to_string());
    }

    /// With a reason that is none of a hand-over's own.
    pub(crate) fn give_up(&self, code: &'static str, reason: String) {
        self.change(|known| {
            known.phase = Phase::Failed;
            (known.code, known.reason) = (code, reason);
        });
    }

    /// Writes it once more. False: that is not possible.
    pub(super) fn is_written(&self) -> bool {
        self.change(|_| {})
    }

    fn change(&self, change: impl FnOnce(&mut Known)) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut known);
        let written = serde_json::to_vec(&*known)
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
