//! The last good topology on local disk, so that a proxy starts while no controller answers.
//!
//! Invariant: the file is either whole or not there: it is written beside, synced, and renamed; its
//! checksum is compared before it is believed. It holds credentials, so only its owner may read it.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use prost::Message as _;
use sha2::{Digest as _, Sha256};
use slotmesh_proto::topology::v1::Snapshot;

/// Name in the data directory.
const FILE: &str = "topology.pb";
/// Begins the file and names its format; a later format has another last byte.
const MAGIC: &[u8; 8] = b"SMPXTOP1";
const MAGIC_LEN: usize = MAGIC.len();
const HEADER_LEN: usize = MAGIC_LEN + 32;

/// Why there is no saved topology to start from.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    #[error("read or write {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} was written by a newer release; upgrade this process", path.display())]
    Newer { path: PathBuf },
    #[error("{} is damaged", path.display())]
    Damaged { path: PathBuf },
}

/// Writes the topology to the data directory.
///
/// # Errors
/// The system refuses.
pub fn save(dir: &Path, snapshot: &Snapshot) -> Result<(), SavedError> {
    let body = snapshot.encode_to_vec();
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&Sha256::digest(&body));
    bytes.extend_from_slice(&body);
    write_private(&dir.join(FILE), &bytes)
}

/// Replaces a file by one that only its owner may read.
///
/// # Errors
/// The system refuses.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), SavedError> {
    // Another process may use the same directory, for as long as a hand-over takes.
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let write = || -> io::Result<()> {
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| SavedError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Reads it back; `None` if there is none yet.
///
/// # Errors
/// The file cannot be read, is damaged, or is of a newer release.
pub fn load(dir: &Path) -> Result<Option<Snapshot>, SavedError> {
    let path = dir.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(SavedError::Io { path, source }),
    };
    if bytes.len() < HEADER_LEN || bytes[..MAGIC_LEN - 1] != MAGIC[..MAGIC_LEN - 1] {
        return Err(SavedError::Damaged { path });
    }
    if bytes[MAGIC_LEN - 1] != MAGIC[MAGIC_LEN - 1] {
        return Err(SavedError::Newer { path });
    }
    let body = &bytes[HEADER_LEN..];
    if Sha256::digest(body).as_slice() != &bytes[MAGIC_LEN..HEADER_LEN] {
        return Err(SavedError::Damaged { path });
    }
    Snapshot::decode(body)
        .map(Some)
        .map_err(|_| SavedError::Damaged { path })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_was_saved_is_loaded_and_only_the_owner_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path()).unwrap(), None);
        let snapshot = Snapshot {
            revision: 9,
            ..Default::default()
        };
        save(dir.path(), &snapshot).unwrap();
        save(dir.path(), &snapshot).unwrap();
        assert_eq!(load(dir.path()).unwrap(), Some(snapshot));
        let mode = fs::metadata(dir.path().join(FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_or_newer_file_is_named_as_such() {
        let dir = tempfile::tempdir().unwrap();
        save(
            dir.path(),
            &Snapshot {
                revision: 9,
                ..Default::default()
            },
        )
        .unwrap();
        let path = dir.path().join(FILE);
        let good = fs::read(&path).unwrap();
        for (at, newer) in [(0, false), (MAGIC_LEN - 1, true), (MAGIC_LEN, false)] {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            fs::write(&path, &bad).unwrap();
            let error = load(dir.path()).unwrap_err();
            assert_eq!(matches!(error, SavedError::Newer { .. }), newer, "{error}");
        }
    }
}
