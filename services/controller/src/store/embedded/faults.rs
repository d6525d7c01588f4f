//! What the embedded store does when its disk fails: nothing is acknowledged that was not kept.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use redb::{Database, StorageBackend, backends::InMemoryBackend};

use super::{EmbeddedStore, disk::Disk, state::State};
use crate::store::{Store, StoreError, Txn, TxnOutcome};

/// A disk that fills up when told to.
#[derive(Debug)]
struct Disklike {
    memory: InMemoryBackend,
    full: Arc<AtomicBool>,
}

impl Disklike {
    fn room(&self) -> io::Result<()> {
        match self.full.load(Ordering::SeqCst) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

impl StorageBackend for Disklike {
    fn len(&self) -> io::Result<u64> {
        self.memory.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.memory.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.room()?;
        self.memory.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.room()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.room()?;
        self.memory.write(offset, data)
    }
}

#[tokio::test]
async fn what_the_disk_did_not_keep_is_neither_acknowledged_nor_visible() {
    let full = Arc::new(AtomicBool::new(false));
    let backend = Disklike {
        memory: InMemoryBackend::new(),
        full: full.clone(),
    };
    let database = Database::builder().create_with_backend(backend).unwrap();
    let store = EmbeddedStore::start(State::new(0, []), Some(Arc::new(Disk::of(database))));
    let mut watch = store.watch("/", 1).await.unwrap();

    let kept = store.txn(Txn::new().put("/a", "kept")).await.unwrap();
    assert_eq!(kept, TxnOutcome::Committed { revision: 1 });
    full.store(true, Ordering::SeqCst);
    let lost = store.txn(Txn::new().put("/a", "lost")).await.unwrap_err();
    assert!(matches!(&lost, StoreError::Corrupt { reason, .. } if reason.contains("restart")));

    // Space comes back, but what the file holds is unknown: only opening it again tells.
    full.store(false, Ordering::SeqCst);
    assert!(store.txn(Txn::new().put("/a", "late")).await.is_err());
    assert_eq!(store.get("/a").await.unwrap().unwrap().value, b"kept");
    assert_eq!(watch.next().await.unwrap().revision, 1);
    assert_eq!(store.list("/").await.unwrap().revision, 1);
    store.shutdown().await;
    assert!(watch.next().await.is_err(), "and a watch saw nothing of it");
}
