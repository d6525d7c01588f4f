//! What clients did and what they were told: the raw material of every check, kept when one fails.
//!
//! Invariant: an operation is `Refused` only when the reply proves that nothing was executed, and
//! `Unknown` whenever anything is in doubt; only then may a check hold a missing effect, or one too
//! many, against the mesh.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

/// What a client was told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, and acknowledged.
    Acked,
    /// Certainly not executed.
    Refused,
    /// Executed or not: nobody knows.
    Unknown,
}

/// What was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// Adds `value` to a set or list: an id that nobody else adds.
    Add,
    /// Adds one to a counter.
    Count,
    /// Sets a register to `value`.
    Set,
    /// Reads a register: `value` is what was there, 0 for nothing.
    Get,
    /// Runs a script that does its work once for an id, and counts how often it was asked.
    Once,
    /// A block of commands that add `value` to two lists of one slot.
    Block,
}

/// One operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Which client.
    pub client: u32,
    /// What was asked.
    pub kind: Kind,
    /// Of which key.
    pub key: String,
    /// With which value, or what was read.
    pub value: u64,
    /// Of an element: how long its list was with it, by the answer; 0: not known.
    #[serde(default)]
    pub place: u64,
    /// When it was sent, by the machine's monotonic clock.
    pub from_us: u64,
    /// When its answer, or the loss of the connection, was known.
    pub to_us: u64,
    /// What the client was told.
    pub outcome: Outcome,
    /// The words of an error.
    pub error: Option<String>,
}

/// All that clients did, in the order in which they learned of it.
#[derive(Debug, Default)]
pub struct History {
    records: Mutex<Vec<Record>>,
}

/// Microseconds of the machine's monotonic clock, which every process of a run reads alike.
#[must_use]
pub fn now_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000_000 + nanos / 1_000
}

impl History {
    /// Remembers an operation.
    pub fn push(&self, record: Record) {
        self.records
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(record);
    }

    /// How many so far.
    pub fn len(&self) -> usize {
        self.records
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Whether nothing was done yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Looks at everything. There may be millions, so nothing is copied.
    pub fn with<T>(&self, look: impl FnOnce(&[Record]) -> T) -> T {
        look(&self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds what another process wrote with [`History::save`].
    ///
    /// # Errors
    /// When the file can't be read, or a line is not what was written there.
    pub fn load(&self, path: &Path) -> anyhow::Result<()> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        for line in BufReader::new(file).lines() {
            self.push(serde_json::from_str(&line?)?);
        }
        Ok(())
    }

    /// Writes one JSON object a line.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut out = BufWriter::new(file);
        self.with(|records| {
            for record in records {
                serde_json::to_writer(&mut out, record)?;
                out.write_all(b"\n")?;
            }
            anyhow::Ok(())
        })?;
        out.flush()
            .with_context(|| format!("write {}", path.display()))
    }
}
