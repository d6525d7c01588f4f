//! The files of a node's data, and from which of them its next process starts.
//!
//! An engine that loads an append-only file forgets where in its primary's history it stands, and
//! copies everything anew. One that loads a snapshot which it wrote as a replica goes on from there,
//! if it is born a replica: of nobody, until the record names it. So a process that makes way for one
//! of another engine leaves a snapshot, and the next one makes its append-only file from that.
//!
//! Invariant: while the mark is there the snapshot is the newest data on disk, or there is none and
//! the append-only file is whole; the mark goes only when the append-only file is whole again.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::files::NodeDir;
use crate::process::write_atomic;

/// As engines name them; parameters that name them are the mesh's own.
const SNAPSHOT: &str = "dump.rdb";
/// Of engines before 7.0: one file.
const APPEND_FILE: &str = "appendonly.aof";
pub(super) const APPEND_DIR: &str = "appendonlydir";
const MANIFEST: &str = "appendonly.aof.manifest";
const MARK: &str = "resume";

/// From what a process starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// The append-only file; without one it is empty.
    Appended,
    /// The snapshot that the process before it wrote at its end, and as a replica.
    Resumed,
}

impl NodeDir {
    /// Where the engine writes a snapshot.
    pub fn snapshot(&self) -> PathBuf {
        self.path().join(SNAPSHOT)
    }

    fn mark(&self) -> PathBuf {
        self.path().join(MARK)
    }

    /// From what the next process starts.
    pub fn boot(&self) -> Boot {
        match self.resumes() && self.snapshot().exists() {
            true => Boot::Resumed,
            false => Boot::Appended,
        }
    }

    /// Whether the append-only file may be older than the snapshot.
    pub fn resumes(&self) -> bool {
        self.mark().exists()
    }

    /// Before a process is asked to end with a snapshot: one that is found afterwards is its own.
    ///
    /// # Errors
    /// When the disk refuses; nothing has changed then.
    pub fn mark_resume(&self) -> io::Result<()> {
        if self.resumes() {
            return Ok(());
        }
        remove_file(&self.snapshot())?;
        write_atomic(&self.mark(), b"", 0o600)
    }

    /// The append-only file is whole, so the next process starts from that; what is left of other
    /// starts is removed.
    ///
    /// # Errors
    /// When the disk refuses; the mark stays then.
    pub fn forget_resume(&self) -> io::Result<()> {
        remove_file(&self.mark())?;
        remove_file(&self.snapshot())?;
        // An engine since 7.0 has begun a directory of its own.
        if self.path().join(APPEND_DIR).join(MANIFEST).exists() {
            remove_file(&self.path().join(APPEND_FILE))?;
        }
        Ok(())
    }

    /// Removes the node's data, all of it, and nothing else. No process of it may run.
    ///
    /// # Errors
    /// When the disk refuses; what is left is removed by the next call.
    pub fn discard_data(&self) -> io::Result<()> {
        // The snapshot goes before the mark: the mark alone says nothing.
        remove_file(&self.snapshot())?;
        remove_file(&self.path().join(APPEND_FILE))?;
        match fs::remove_dir_all(self.path().join(APPEND_DIR)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        remove_file(&self.mark())
    }
}

/// As [`fs::remove_file`]; one that is not there is removed.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, NodeDir) {
        let nodes = tempfile::tempdir().unwrap();
        let dir = NodeDir::create(nodes.path(), "n-1").unwrap();
        (nodes, dir)
    }

    #[test]
    fn only_a_snapshot_that_was_made_for_it_is_started_from() {
        let (_nodes, dir) = dir();
        fs::write(dir.snapshot(), "old").unwrap();
        assert_eq!(dir.boot(), Boot::Appended);
        dir.mark_resume().unwrap();
        assert_eq!(dir.boot(), Boot::Appended, "it has not written one yet");
        fs::write(dir.snapshot(), "new").unwrap();
        assert_eq!(dir.boot(), Boot::Resumed);
        dir.mark_resume().unwrap();
        assert_eq!(dir.boot(), Boot::Resumed, "it is all that is there");
        dir.forget_resume().unwrap();
        assert_eq!(dir.boot(), Boot::Appended);
        assert!(!dir.snapshot().exists());
    }

    #[test]
    fn an_older_engines_append_only_file_stays_until_a_newer_one_has_its_own() {
        let (_nodes, dir) = dir();
        let old = dir.path().join(APPEND_FILE);
        fs::write(&old, "x").unwrap();
        dir.mark_resume().unwrap();
        dir.forget_resume().unwrap();
        assert!(old.exists());
        fs::create_dir(dir.path().join(APPEND_DIR)).unwrap();
        fs::write(dir.path().join(APPEND_DIR).join(MANIFEST), "x").unwrap();
        dir.forget_resume().unwrap();
        assert!(!old.exists());
    }

    #[test]
    fn discarded_data_leaves_the_nodes_other_files() {
        let (_nodes, dir) = dir();
        let secret = dir.admin_secret().unwrap();
        fs::create_dir(dir.path().join(APPEND_DIR)).unwrap();
        fs::write(dir.path().join(APPEND_FILE), "x").unwrap();
        dir.mark_resume().unwrap();
        fs::write(dir.snapshot(), "x").unwrap();
        dir.discard_data().unwrap();
        dir.discard_data().unwrap();
        assert_eq!((dir.boot(), dir.resumes()), (Boot::Appended, false));
        assert_eq!(dir.admin_secret().unwrap(), secret);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
