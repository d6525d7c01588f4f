//! What this agent must not forget: terms, epochs, steps begun and ended, fences placed.
//!
//! An append-only file of checksummed frames. Invariant: a fact is on disk (`fdatasync`) before the
//! effect that it announces, so after a crash the journal is never behind reality. A torn last frame
//! is cut off when the file is opened; it belongs to an effect that had not begun.

pub mod record;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use prost::Message;
use sha2::{Digest, Sha256};

use self::record::{Entry, Fact, Memory};

/// Layout of the data directory and of this file. A newer one is refused, never guessed at.
pub const SCHEMA_VERSION: u32 = 1;
const MAGIC: &[u8; 4] = b"SMAJ";
const HEADER_BYTES: u64 = 8;
/// Length and checksum in front of each entry.
const FRAME_BYTES: usize = 12;
/// No entry comes near it; a longer length is damage.
const ENTRY_BYTES_MAX: u32 = 1 << 20;
/// The file is rewritten with what still matters when it outgrows this.
const COMPACT_BYTES: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("journal {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is not a journal of slotmesh-agent")]
    Foreign { path: PathBuf },
    #[error(
        "{path} was written by a newer slotmesh-agent (format {found}, this one knows {SCHEMA_VERSION}): \
         start that version again, or use another --data directory"
    )]
    Newer { path: PathBuf, found: u32 },
    #[error("{path} is in use by another slotmesh-agent: stop it, or use another --data directory")]
    InUse { path: PathBuf },
    #[error(
        "{path} is damaged at byte {at}, with intact entries after it: restore it, or remove the host"
    )]
    Damaged { path: PathBuf, at: u64 },
}

/// A handle; clones share the file.
#[derive(Debug, Clone)]
pub struct Journal {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    len: u64,
    /// Grows with what matters, so that a big journal is not rewritten at every append.
    compact_at: u64,
    /// After a failed write the end of the file is unknown: nothing may be promised before it is
    /// written anew.
    broken: bool,
    memory: Memory,
}

impl Journal {
    /// Opens or creates the journal in `dir`, and locks it for this process.
    pub fn open(dir: &Path) -> Result<Self, JournalError> {
        let path = dir.join("journal");
        let io = |source| JournalError::Io {
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(JournalError::InUse { path }),
            Err(fs::TryLockError::Error(source)) => return Err(io(source)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        let mut memory = Memory::default();
        let len = if bytes.len() < HEADER_BYTES as usize {
            // A file that died before its header was complete holds no fact.
            file.set_len(0).map_err(io)?;
            file.seek(SeekFrom::Start(0)).map_err(io)?;
            file.write_all(&header()).map_err(io)?;
            file.sync_all().map_err(io)?;
            sync_dir(dir).map_err(io)?;
            HEADER_BYTES
        } else {
            check_header(&bytes, &path)?;
            let end = replay(&bytes, &path, &mut memory)?;
            if end < bytes.len() as u64 {
                tracing::warn!(
                    at = end,
                    dropped_bytes = bytes.len() as u64 - end,
                    "torn end of journal cut off"
                );
                file.set_len(end).map_err(io)?;
                file.sync_all().map_err(io)?;
            }
            end
        };
        file.seek(SeekFrom::Start(len)).map_err(io)?;
        let inner = Inner {
            path,
            file,
            len,
            compact_at: COMPACT_BYTES.max(len),
            broken: false,
            memory,
        };
        Ok(Self {
            inner: Arc::new(Mutex::new(inner)),
        })
    }

    /// Reads what is remembered.
    pub fn read<T>(&self, read: impl FnOnce(&Memory) -> T) -> T {
        read(&self.lock().memory)
    }

    /// Makes facts durable, in one write, then remembers them.
    ///
    /// # Cancel safety
    /// The write goes on when the caller is dropped.
    pub async fn append(&self, facts: impl Into<Vec<Fact>>) -> Result<(), JournalError> {
        let facts = facts.into();
        let news = self.read(|memory| facts.iter().any(|fact| !memory.knows(fact)));
        if !news {
            return Ok(());
        }
        let journal = self.clone();
        let write = tokio::task::spawn_blocking(move || journal.lock().append(&facts));
        match write.await {
            Ok(result) => result,
            Err(join) => Err(JournalError::Io {
                path: self.lock().path.clone(),
                source: io::Error::other(join),
            }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn append(&mut self, facts: &[Fact]) -> Result<(), JournalError> {
        let io = |path: &Path, source| JournalError::Io {
            path: path.to_owned(),
            source,
        };
        if self.broken {
            // What was made durable is in memory, so it is written as a new file; what the failed write
            // left at the old one's end goes with it, and was promised to nobody.
            self.compact().map_err(|source| io(&self.path, source))?;
            self.broken = false;
            tracing::warn!(path = %self.path.display(), "journal written anew after a write that failed");
        }
        let mut frames = Vec::new();
        for fact in facts {
            if !self.memory.knows(fact) {
                frames.extend_from_slice(&frame(&Entry {
                    fact: Some(fact.clone()),
                }));
            }
        }
        let written = self
            .file
            .write_all(&frames)
            .and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            self.broken = true;
            return Err(io(&self.path, source));
        }
        self.len += frames.len() as u64;
        for fact in facts {
            self.memory.learn(fact.clone());
        }
        if self.len > self.compact_at {
            self.compact().map_err(|source| {
                self.broken = true;
                io(&self.path, source)
            })?;
        }
        Ok(())
    }

    fn compact(&mut self) -> io::Result<()> {
        let next = self.path.with_extension("next");
        let mut bytes = header().to_vec();
        for fact in self.memory.facts() {
            bytes.extend_from_slice(&frame(&Entry { fact: Some(fact) }));
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&next)?;
        file.try_lock().map_err(io::Error::other)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&next, &self.path)?;
        if let Some(dir) = self.path.parent() {
            sync_dir(dir)?;
        }
        self.file = file;
        self.len = bytes.len() as u64;
        self.compact_at = COMPACT_BYTES.max(2 * self.len);
        Ok(())
    }
}

fn header() -> [u8; HEADER_BYTES as usize] {
    let mut header = [0; HEADER_BYTES as usize];
    header[..4].copy_from_slice(MAGIC);
    header[4..].copy_from_slice(&SCHEMA_VERSION.to_le_bytes());
    header
}

fn check_header(bytes: &[u8], path: &Path) -> Result<(), JournalError> {
    let path = path.to_owned();
    if &bytes[..4] != MAGIC {
        return Err(JournalError::Foreign { path });
    }
    let found = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    if found > SCHEMA_VERSION {
        return Err(JournalError::Newer { path, found });
    }
    Ok(())
}

/// Learns every intact entry; returns where the intact part ends.
fn replay(bytes: &[u8], path: &Path, memory: &mut Memory) -> Result<u64, JournalError> {
    let mut at = HEADER_BYTES as usize;
    while let Some((entry, next)) = parse(bytes, at) {
        if let Some(fact) = entry.fact {
            memory.learn(fact);
        }
        at = next;
    }
    // A torn write can only be the last one. Damage with an intact entry behind it is no torn
    // write, and forgetting what follows it could forget a fence.
    let damaged = (at + 1..bytes.len()).any(|start| parse(bytes, start).is_some());
    if damaged {
        return Err(JournalError::Damaged {
            path: path.to_owned(),
            at: at as u64,
        });
    }
    Ok(at as u64)
}

fn frame(entry: &Entry) -> Vec<u8> {
    let payload = entry.encode_to_vec();
    // An entry is never empty: see `parse`.
    let mut frame = Vec::with_capacity(FRAME_BYTES + payload.len());
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&checksum(&payload));
    frame.extend_from_slice(&payload);
    frame
}

/// The entry at `at` and where the next one starts, if it is intact.
fn parse(bytes: &[u8], at: usize) -> Option<(Entry, usize)> {
    let head = bytes.get(at..at + FRAME_BYTES)?;
    let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    if len == 0 || len > ENTRY_BYTES_MAX {
        return None;
    }
    let end = at + FRAME_BYTES + len as usize;
    let payload = bytes.get(at + FRAME_BYTES..end)?;
    if head[4..] != checksum(payload) {
        return None;
    }
    Some((Entry::decode(payload).ok()?, end))
}

fn checksum(payload: &[u8]) -> [u8; 8] {
    let digest = Sha256::digest(payload);
    let mut sum = [0; 8];
    sum.copy_from_slice(&digest[..8]);
    sum
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
