//! One suite for every store: in memory, on disk, and a real etcd.
#![allow(clippy::unwrap_used)]

mod crash;
mod cut;
mod election;
mod etcd_process;
mod suite;

use std::{path::Path, sync::Arc, time::Duration};

use slotmesh_controller::store::{
    EmbeddedStore, EtcdSettings, EtcdStore, Event, Store, StoreError, Txn,
};

use self::{
    cut::Cut,
    etcd_process::EtcdProcess,
    suite::{commit, get, next, revision, soon},
};

fn in_memory() -> Arc<dyn Store> {
    Arc::new(EmbeddedStore::in_memory())
}

async fn open(dir: &Path) -> (Arc<EmbeddedStore>, Arc<dyn Store>) {
    let store = Arc::new(EmbeddedStore::open(dir).await.unwrap());
    (store.clone(), store)
}

#[tokio::test(start_paused = true)]
async fn the_store_in_memory_conforms() {
    suite::run(in_memory()).await;
}

#[tokio::test(start_paused = true)]
async fn the_store_on_disk_conforms_also_when_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = 0;
    for _ in 0..2 {
        let (embedded, store) = open(dir.path()).await;
        assert!(revision(&store).await > before);
        suite::run(store.clone()).await;
        before = revision(&store).await;
        // The claims expect to find none of their keys.
        for item in store.list("/").await.unwrap().items {
            before = commit(&store, Txn::new().delete(item.key)).await;
        }
        embedded.shutdown().await;
    }
}

#[tokio::test]
async fn etcd_conforms_also_when_it_is_restarted() {
    let mut etcd = EtcdProcess::start().await;
    let store = etcd.store().await;
    suite::run(store.clone()).await;

    // A watch outlives a crash of etcd and keeps its place.
    let start = revision(&store).await;
    let mut watch = store.watch("/crash/", start + 1).await.unwrap();
    let first = commit(&store, Txn::new().put("/crash/a", "1")).await;
    assert_eq!(next(&mut watch).await.revision, first);
    let unread = commit(&store, Txn::new().put("/crash/a", "2")).await;
    etcd.crash_and_restart().await;
    soon("a write after the restart", async {
        // Its repetition is harmless here: whichever attempt happened first, the watch sees it.
        while let Err(error) = store.txn(Txn::new().put("/crash/a", "3")).await {
            assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
        }
    })
    .await;
    assert_eq!(next(&mut watch).await.revision, unread);
    let seen = next(&mut watch).await;
    assert!(matches!(&seen.events[..], [Event::Put(item)] if item.value == b"3"));
    etcd.stop().await;
}

#[tokio::test(start_paused = true)]
async fn elections_hold_in_memory() {
    let store = in_memory();
    election::run(store.clone()).await;
    let (its_own, cut) = Cut::of(store.clone());
    election::a_silent_leader_stops_before_another_leads(&store, its_own, cut).await;
}

#[tokio::test]
async fn elections_hold_on_etcd() {
    let etcd = EtcdProcess::start().await;
    let store = etcd.store().await;
    election::run(store.clone()).await;
    let (its_own, cut) = Cut::of(etcd.store().await);
    election::a_silent_leader_stops_before_another_leads(&store, its_own, cut).await;
    etcd.stop().await;
}

#[tokio::test]
async fn what_was_acknowledged_is_on_disk_and_leased_keys_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let (embedded, store) = open(dir.path()).await;
    let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    commit(
        &store,
        Txn::new().put("/a", "1").put("/b", "1").put("/c", "1"),
    )
    .await;
    commit(&store, Txn::new().put("/a", "2").delete("/b")).await;
    let txn = Txn::new()
        .put_leased("/c", "2", lease)
        .put_leased("/d", "2", lease);
    let last = commit(&store, txn).await;
    let a = get(&store, "/a").await;
    embedded.shutdown().await;
    assert!(matches!(
        store.txn(Txn::new().delete("/a")).await,
        Err(StoreError::Unavailable { .. })
    ));

    let (_embedded, store) = open(dir.path()).await;
    let listing = store.list("/").await.unwrap();
    assert_eq!(listing.items, a.into_iter().collect::<Vec<_>>());
    assert!(
        listing.revision > last,
        "leased keys vanished at a revision of their own"
    );
    let stale = store.watch("/", last + 1).await;
    assert!(
        matches!(stale, Err(StoreError::Compacted { .. })),
        "{stale:?}"
    );
    assert!(matches!(
        store.keep_alive(lease).await,
        Err(StoreError::LeaseExpired { .. })
    ));
}

#[tokio::test]
async fn one_data_directory_has_one_user() {
    let dir = tempfile::tempdir().unwrap();
    let (_embedded, _store) = open(dir.path()).await;
    let second = EmbeddedStore::open(dir.path()).await.unwrap_err();
    assert!(
        second.to_string().contains("another process has it open"),
        "{second}"
    );
}

#[tokio::test]
async fn an_etcd_that_does_not_answer_ends_the_start_in_time() {
    // Bound, so that nobody else takes it, and never accepting.
    let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", deaf.local_addr().unwrap());
    let settings = EtcdSettings {
        endpoints: vec![endpoint],
        ..EtcdSettings::default()
    };
    let connected = soon("the attempt to end", EtcdStore::connect(&settings)).await;
    assert!(
        matches!(connected, Err(StoreError::Unavailable { .. })),
        "{connected:?}"
    );
}
