//! The embedded store's file: one redb database, written by one writer, one commit a batch.
//!
//! Invariant: after a commit returns, the file holds every unleased key of that revision, and the
//! revision itself. Leased keys are never written: their owners don't outlive the process.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use redb::{Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use super::state::{Change, Write};
use crate::store::{KeyValue, StoreError};

/// Of the file. Raise it when a table changes in a way that an older build would misread.
const SCHEMA: u64 = 1;
const FILE: &str = "store.redb";
/// The whole store is in our own memory, so the file needs little cache of its own.
const CACHE_BYTES: usize = 8 * 1024 * 1024;

/// key → (create revision, mod revision, value)
const ITEMS: TableDefinition<&str, (u64, u64, &[u8])> = TableDefinition::new("items");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const META_SCHEMA: &str = "schema";
const META_REVISION: &str = "revision";

#[derive(Debug)]
pub(super) struct Disk {
    database: Database,
}

/// What a file held when it was opened.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) disk: Disk,
    pub(super) revision: u64,
    pub(super) items: Vec<KeyValue>,
}

impl Disk {
    #[cfg(test)]
    pub(super) fn of(database: Database) -> Self {
        Self { database }
    }

    /// Blocks. The revision has risen by one since the file was closed: at it, the leased keys
    /// vanished.
    pub(super) fn open(dir: &Path) -> Result<Opened, StoreError> {
        let path = dir.join(FILE);
        // Records hold secrets: nobody else on this host may read them.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| io(&path, e))?;
        if !path.exists() {
            make_file(dir, &path)?;
        }
        let database = Builder::new()
            .set_cache_size(CACHE_BYTES)
            // A damaged file becomes an error that names it, not a panic.
            .set_check_integrity_on_open(true)
            .create(&path)
            .map_err(|error| open_error(&path, error))?;
        let disk = Self { database };
        let (revision, items) = disk.load(&path)?;
        Ok(Opened {
            disk,
            revision,
            items,
        })
    }

    fn load(&self, path: &Path) -> Result<(u64, Vec<KeyValue>), StoreError> {
        let schema = self
            .schema()
            .map_err(|error| broken("read the store's schema", error))?;
        if schema.is_some_and(|found| found > SCHEMA) {
            return Err(StoreError::NewerSchema {
                what: path.display().to_string(),
                found: u32::try_from(schema.unwrap_or(u64::MAX)).unwrap_or(u32::MAX),
                known: u32::try_from(SCHEMA).unwrap_or(u32::MAX),
            });
        }
        self.start()
            .map_err(|error| broken("start the store's file", error))?;
        self.items()
            .map_err(|error| broken("read the store", error))
    }

    fn schema(&self) -> Result<Option<u64>, redb::Error> {
        let read = self.database.begin_read()?;
        match read.open_table(META) {
            Ok(meta) => Ok(meta.get(META_SCHEMA)?.map(|value| value.value())),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn start(&self) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        {
            let mut meta = write.open_table(META)?;
            let revision = meta.get(META_REVISION)?.map_or(0, |value| value.value());
            meta.insert(META_SCHEMA, SCHEMA)?;
            meta.insert(META_REVISION, revision + 1)?;
            write.open_table(ITEMS)?;
        }
        write.commit()?;
        Ok(())
    }

    fn items(&self) -> Result<(u64, Vec<KeyValue>), redb::Error> {
        let read = self.database.begin_read()?;
        let revision = read
            .open_table(META)?
            .get(META_REVISION)?
            .map_or(0, |value| value.value());
        let mut items = Vec::new();
        for entry in read.open_table(ITEMS)?.iter()? {
            let (key, value) = entry?;
            let (create_revision, mod_revision, value) = value.value();
            items.push(KeyValue {
                key: key.value().to_owned(),
                value: value.to_vec(),
                mod_revision,
                create_revision,
            });
        }
        Ok((revision, items))
    }

    /// Blocks until all changes are on disk, or none.
    pub(super) fn commit(&self, changes: &[Change]) -> Result<(), StoreError> {
        self.write(changes)
            .map_err(|error| broken("write the store's file", error))
    }

    fn write(&self, changes: &[Change]) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        {
            let mut items = write.open_table(ITEMS)?;
            for write in changes.iter().flat_map(|change| &change.writes) {
                match write {
                    Write::Put(stored) if stored.lease.is_none() => {
                        let item = &stored.item;
                        let value = (item.create_revision, item.mod_revision, &item.value[..]);
                        items.insert(item.key.as_str(), value)?;
                    }
                    Write::Put(stored) => {
                        items.remove(stored.item.key.as_str())?;
                    }
                    Write::Delete(key) => {
                        items.remove(key.as_str())?;
                    }
                }
            }
            if let Some(last) = changes.last() {
                write
                    .open_table(META)?
                    .insert(META_REVISION, last.revision)?;
            }
        }
        write.commit()?;
        Ok(())
    }
}

/// Makes the file beside its place and moves it there: a process that is killed in between leaves
/// nothing that the next one could not open.
fn make_file(dir: &Path, path: &Path) -> Result<(), StoreError> {
    let new = path.with_extension("new");
    if let Err(error) = fs::remove_file(&new)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(io(&new, error));
    }
    let file = OpenOptions::new()
        .create_new(true)
        .append(true)
        .mode(0o600)
        .open(&new);
    drop(file.map_err(|e| io(&new, e))?);
    let database = Builder::new().create(&new);
    drop(database.map_err(|error| open_error(&new, error))?);
    fs::rename(&new, path).map_err(|e| io(path, e))?;
    let dir_file = fs::File::open(dir).and_then(|d| d.sync_all());
    dir_file.map_err(|e| io(dir, e))
}

fn open_error(path: &Path, error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::Unavailable {
            doing: "open the data directory: another process has it open",
            source: Some(Box::new(error)),
        },
        error => StoreError::Corrupt {
            reason: format!("open {}", path.display()),
            source: Some(Box::new(error)),
        },
    }
}

fn io(path: &Path, error: std::io::Error) -> StoreError {
    StoreError::Corrupt {
        reason: format!("create {}", path.display()),
        source: Some(Box::new(error)),
    }
}

fn broken(doing: &str, error: redb::Error) -> StoreError {
    StoreError::Corrupt {
        reason: doing.to_owned(),
        source: Some(Box::new(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_a_newer_schema_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let opened = Disk::open(dir.path()).unwrap();
        let write = opened.disk.database.begin_write().unwrap();
        write
            .open_table(META)
            .unwrap()
            .insert(META_SCHEMA, SCHEMA + 1)
            .unwrap();
        write.commit().unwrap();
        drop(opened);
        for _ in 0..2 {
            let error = Disk::open(dir.path()).unwrap_err();
            assert!(matches!(
                error,
                StoreError::NewerSchema {
                    found: 2,
                    known: 1,
                    ..
                }
            ));
            assert!(
                error
                    .to_string()
                    .contains("start the slotmesh version that wrote it")
            );
        }
    }

    #[test]
    fn a_damaged_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        drop(Disk::open(dir.path()).unwrap());
        fs::write(dir.path().join(FILE), b"not a database").unwrap();
        let error = Disk::open(dir.path()).unwrap_err();
        assert!(matches!(&error, StoreError::Corrupt { reason, .. } if reason.contains(FILE)));
    }

    #[test]
    fn a_file_that_was_never_finished_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("store.new"), b"half of a file").unwrap();
        let opened = Disk::open(dir.path()).unwrap();
        assert!(opened.items.is_empty());
        assert!(!dir.path().join("store.new").exists());
    }

    #[test]
    fn only_the_owner_may_read_the_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("data");
        drop(Disk::open(&inner).unwrap());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&inner), mode(&inner.join(FILE))), (0o700, 0o600));
    }
}
