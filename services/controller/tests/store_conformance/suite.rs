//! What every store must do, whatever it is made of: one function a claim.
//!
//! A claim uses keys below its own prefix and may find other keys and revisions in the store, but
//! claims run one after another, because compaction is of the whole store.

use std::{future::Future, sync::Arc, time::Duration};

use slotmesh_controller::store::{
    Event, KeyValue, MAX_TXN_OPS, MAX_VALUE_BYTES, MIN_LEASE_TTL, Store, StoreError, Txn,
    TxnOutcome, Watch, WatchEvents,
};
use tokio::{task::JoinSet, time::Instant, time::sleep, time::timeout};

/// No claim waits this long for one thing, unless the store is broken.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn run(store: Arc<dyn Store>) {
    a_compare_and_swap_has_one_winner(&store).await;
    a_key_is_created_by_one_of_many(&store).await;
    a_transaction_happens_wholly_or_not_at_all(&store).await;
    a_compare_sees_what_was_before_its_own_transaction(&store).await;
    what_is_too_large_or_makes_no_sense_is_refused(&store).await;
    a_listing_holds_the_prefix_and_nothing_else(&store).await;
    a_watch_from_the_past_sees_everything_once_in_order(&store).await;
    a_watch_sees_only_its_prefix(&store).await;
    a_cancelled_watch_loses_nothing(&store).await;
    a_watch_below_a_compaction_is_told_to_list_again(&store).await;
    an_expired_lease_takes_its_keys_along(&store).await;
    a_lease_that_is_kept_alive_keeps_its_keys(&store).await;
    a_revoked_lease_takes_its_keys_along_at_once(&store).await;
    a_key_put_without_lease_outlives_its_former_lease(&store).await;
}

/// The result, unless it takes too long: then it says what was waited for.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, future).await {
        Ok(done) => done,
        Err(_) => panic!("waited {PATIENCE:?} for {what}"),
    }
}

pub(crate) async fn commit(store: &Arc<dyn Store>, txn: Txn) -> u64 {
    match soon("a commit", store.txn(txn)).await.unwrap() {
        TxnOutcome::Committed { revision } => revision,
        TxnOutcome::Conflict => panic!("conflict where nobody else writes"),
    }
}

pub(crate) async fn get(store: &Arc<dyn Store>, key: &str) -> Option<KeyValue> {
    soon("a read", store.get(key)).await.unwrap()
}

pub(crate) async fn revision(store: &Arc<dyn Store>) -> u64 {
    soon("a listing", store.list("/")).await.unwrap().revision
}

pub(crate) async fn next(watch: &mut Watch) -> WatchEvents {
    soon("the next events of a watch", watch.next())
        .await
        .unwrap()
}

async fn a_compare_and_swap_has_one_winner(store: &Arc<dyn Store>) {
    const WRITERS: usize = 8;
    const ROUNDS: usize = 10;
    let mut last = commit(store, Txn::new().put("/cas/n", "0")).await;
    for _ in 0..ROUNDS {
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            let store = store.clone();
            let txn = Txn::new()
                .unchanged("/cas/n", last)
                .put("/cas/n", writer.to_string());
            writers.spawn(async move { (writer, store.txn(txn).await.unwrap()) });
        }
        let outcomes = soon("all writers", writers.join_all()).await;
        let winners = outcomes
            .iter()
            .filter_map(|(writer, outcome)| match outcome {
                TxnOutcome::Committed { revision } => Some((*writer, *revision)),
                TxnOutcome::Conflict => None,
            });
        let winners: Vec<_> = winners.collect();
        assert_eq!(
            winners.len(),
            1,
            "of {WRITERS} writers exactly one wins: {winners:?}"
        );
        let item = get(store, "/cas/n").await.unwrap();
        assert_eq!(item.value, winners[0].0.to_string().into_bytes());
        assert_eq!(item.mod_revision, winners[0].1);
        assert!(item.mod_revision > last);
        last = item.mod_revision;
    }
}

async fn a_key_is_created_by_one_of_many(store: &Arc<dyn Store>) {
    let mut writers = JoinSet::new();
    for writer in 0..8 {
        let store = store.clone();
        let txn = Txn::new()
            .absent("/once/a")
            .put("/once/a", writer.to_string());
        writers.spawn(async move { store.txn(txn).await.unwrap() });
    }
    let outcomes = soon("all writers", writers.join_all()).await;
    let won = outcomes
        .iter()
        .filter(|outcome| **outcome != TxnOutcome::Conflict)
        .count();
    assert_eq!(won, 1);
    let first = get(store, "/once/a").await.unwrap();
    assert_eq!(first.create_revision, first.mod_revision);

    let changed = commit(store, Txn::new().put("/once/a", "again")).await;
    let second = get(store, "/once/a").await.unwrap();
    assert_eq!(
        (second.create_revision, second.mod_revision),
        (first.create_revision, changed)
    );

    commit(store, Txn::new().delete("/once/a")).await;
    commit(
        store,
        Txn::new().absent("/once/a").put("/once/a", "new life"),
    )
    .await;
    let third = get(store, "/once/a").await.unwrap();
    assert!(
        third.create_revision > changed,
        "a create revision never comes twice"
    );
    let of_old = Txn::new()
        .created_at("/once/a", first.create_revision)
        .put("/once/b", "");
    assert_eq!(store.txn(of_old).await.unwrap(), TxnOutcome::Conflict);
    commit(
        store,
        Txn::new()
            .created_at("/once/a", third.create_revision)
            .put("/once/b", ""),
    )
    .await;
}

async fn a_transaction_happens_wholly_or_not_at_all(store: &Arc<dyn Store>) {
    let start = commit(store, Txn::new().put("/all/a", "1").put("/all/b", "1")).await;
    let b = get(store, "/all/b").await.unwrap();
    let refused = Txn::new()
        .unchanged("/all/b", b.mod_revision)
        .absent("/all/a")
        .put("/all/c", "2")
        .delete("/all/b");
    assert_eq!(store.txn(refused).await.unwrap(), TxnOutcome::Conflict);
    assert_eq!(get(store, "/all/c").await, None);
    assert_eq!(get(store, "/all/b").await, Some(b));
    assert_eq!(revision(store).await, start, "a conflict makes no revision");

    let txn = Txn::new()
        .put("/all/a", "3")
        .delete("/all/b")
        .put("/all/c", "3");
    let done = commit(store, txn).await;
    let listing = store.list("/all/").await.unwrap();
    let keys: Vec<_> = listing
        .items
        .iter()
        .map(|i| (i.key.as_str(), i.mod_revision))
        .collect();
    assert_eq!(
        keys,
        [("/all/a", done), ("/all/c", done)],
        "one revision for all"
    );

    let mut watch = store.watch("/all/", done).await.unwrap();
    let seen = next(&mut watch).await;
    assert_eq!(
        (seen.revision, seen.events.len()),
        (done, 3),
        "and a watch sees it whole"
    );

    let nothing = commit(store, Txn::new().delete("/all/absent")).await;
    assert_eq!(nothing, done, "deleting what is absent makes no revision");
}

async fn a_compare_sees_what_was_before_its_own_transaction(store: &Arc<dyn Store>) {
    let done = commit(store, Txn::new().absent("/own/a").put("/own/a", "x")).await;
    let moved = Txn::new()
        .unchanged("/own/a", done)
        .delete("/own/a")
        .put("/own/b", "x");
    commit(store, moved).await;
    assert_eq!(get(store, "/own/a").await, None);
}

async fn what_is_too_large_or_makes_no_sense_is_refused(store: &Arc<dyn Store>) {
    let before = revision(store).await;
    let large = vec![0; MAX_VALUE_BYTES + 1];
    let many = |count| (0..count).fold(Txn::new(), |txn, n| txn.put(format!("/many/{n:04}"), "x"));
    let two_large = Txn::new()
        .put("/l/a", vec![0; MAX_VALUE_BYTES])
        .put("/l/b", large.clone());
    for txn in [
        Txn::new().put("/l/a", large),
        many(MAX_TXN_OPS + 1),
        two_large,
    ] {
        let refused = store.txn(txn).await.unwrap_err();
        assert!(matches!(refused, StoreError::TooLarge { .. }), "{refused}");
    }
    let twice = Txn::new().put("/l/a", "1").delete("/l/a");
    for txn in [twice, Txn::new(), Txn::new().put("", "no key")] {
        let refused = store.txn(txn).await.unwrap_err();
        assert!(matches!(refused, StoreError::Invalid { .. }), "{refused}");
    }
    assert!(matches!(
        store.list("").await,
        Err(StoreError::Invalid { .. })
    ));
    assert!(matches!(
        store.watch("/", 0).await,
        Err(StoreError::Invalid { .. })
    ));
    assert_eq!(revision(store).await, before);

    commit(store, many(MAX_TXN_OPS)).await;
    commit(store, Txn::new().put("/l/a", vec![7; MAX_VALUE_BYTES])).await;
    assert_eq!(
        get(store, "/l/a").await.unwrap().value.len(),
        MAX_VALUE_BYTES
    );
}

async fn a_listing_holds_the_prefix_and_nothing_else(store: &Arc<dyn Store>) {
    for (n, key) in ["/list/b/1", "/list/a/2", "/list/a/1", "/list/ab/1"]
        .iter()
        .enumerate()
    {
        commit(store, Txn::new().put(*key, n.to_string())).await;
    }
    let keys = |items: &[KeyValue]| items.iter().map(|i| i.key.clone()).collect::<Vec<_>>();
    let listing = store.list("/list/a/").await.unwrap();
    assert_eq!(
        keys(&listing.items),
        ["/list/a/1", "/list/a/2"],
        "in key order"
    );
    assert_eq!(listing.revision, revision(store).await);
    assert_eq!(store.list("/list/none/").await.unwrap().items, []);

    let expected: Vec<String> = (0..400).map(|n| format!("/long/{n:04}")).collect();
    for keys in expected.chunks(MAX_TXN_OPS) {
        commit(
            store,
            keys.iter().fold(Txn::new(), |txn, key| txn.put(key, "x")),
        )
        .await;
    }
    let listing = soon("a long listing", store.list("/long/")).await.unwrap();
    assert_eq!(keys(&listing.items), expected, "however many they are");
}

/// A little of everything; returns what a watch should see of it.
async fn change(store: &Arc<dyn Store>, prefix: &str, rounds: usize) -> Vec<WatchEvents> {
    let mut expected = Vec::new();
    for n in 0..rounds {
        let (key, other) = (format!("{prefix}{}", n % 5), format!("{prefix}other"));
        let existed = get(store, &key).await;
        let (txn, deletes) = match n % 3 {
            2 if existed.is_some() => (Txn::new().delete(&key), true),
            _ => (Txn::new().put(&key, n.to_string()), false),
        };
        let revision = commit(store, txn.put(&other, n.to_string())).await;
        let mut events = Vec::new();
        for (key, deleted) in [(&key, deletes), (&other, false)] {
            events.push(match deleted {
                true => Event::Delete { key: key.clone() },
                false => Event::Put(get(store, key).await.unwrap()),
            });
        }
        expected.push(WatchEvents { revision, events });
    }
    expected
}

async fn a_watch_from_the_past_sees_everything_once_in_order(store: &Arc<dyn Store>) {
    let start = revision(store).await;
    let mut early = store.watch("/past/", start + 1).await.unwrap();
    let mut expected = change(store, "/past/", 60).await;
    let mut late = store.watch("/past/", start + 1).await.unwrap();
    let middle = expected[30].revision;
    let mut from_middle = store.watch("/past/", middle).await.unwrap();
    expected.extend(change(store, "/past/", 20).await);

    for watch in [&mut early, &mut late] {
        for expected in &expected {
            assert_eq!(&next(watch).await, expected);
        }
    }
    for expected in &expected[30..] {
        assert_eq!(&next(&mut from_middle).await, expected);
    }
    for watch in [&mut early, &mut late, &mut from_middle] {
        nothing_more(watch).await;
    }
    // A future revision is waited for, and what comes before it is not shown.
    let now = revision(store).await;
    let mut future = store.watch("/past/", now + 2).await.unwrap();
    commit(store, Txn::new().put("/past/x", "1")).await;
    let second = commit(store, Txn::new().put("/past/x", "2")).await;
    assert_eq!(next(&mut future).await.revision, second);
}

/// Watches are in order, so whatever was still to come would come before the mark.
async fn nothing_more(watch: &mut Watch) {
    let quiet = timeout(Duration::from_millis(20), watch.next()).await;
    assert!(quiet.is_err(), "a watch repeats itself: {quiet:?}");
}

async fn a_watch_sees_only_its_prefix(store: &Arc<dyn Store>) {
    let start = revision(store).await;
    let mut watch = store.watch("/only/a/", start + 1).await.unwrap();
    commit(store, Txn::new().put("/only/ab", "no").put("/only/a", "no")).await;
    let mixed = Txn::new().put("/only/a/1", "yes").put("/only/b/1", "no");
    let mixed = commit(store, mixed).await;
    let seen = next(&mut watch).await;
    assert_eq!(seen.revision, mixed);
    assert_eq!(
        seen.events.iter().map(Event::key).collect::<Vec<_>>(),
        ["/only/a/1"]
    );
}

async fn a_cancelled_watch_loses_nothing(store: &Arc<dyn Store>) {
    let start = revision(store).await;
    let mut watch = store.watch("/cancel/", start + 1).await.unwrap();
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            let mut revisions = Vec::new();
            for n in 0..50 {
                revisions.push(commit(&store, Txn::new().put("/cancel/n", n.to_string())).await);
            }
            revisions
        }
    });
    let (mut seen, start) = (Vec::new(), Instant::now());
    while seen.len() < 50 {
        assert!(
            start.elapsed() < PATIENCE,
            "waited for 50 revisions, saw {}",
            seen.len()
        );
        if let Ok(events) = timeout(Duration::from_micros(500), watch.next()).await {
            seen.push(events.unwrap().revision);
        }
    }
    assert_eq!(seen, soon("the writer", writer).await.unwrap());
}

async fn a_watch_below_a_compaction_is_told_to_list_again(store: &Arc<dyn Store>) {
    let old = commit(store, Txn::new().put("/compact/a", "1")).await;
    commit(store, Txn::new().put("/compact/a", "2")).await;
    let last = commit(store, Txn::new().put("/compact/b", "1")).await;
    store.compact(last).await.unwrap();
    store.compact(last).await.unwrap();
    store.compact(old).await.unwrap();
    let future = store.compact(last + 1000).await;
    assert!(
        matches!(future, Err(StoreError::Invalid { .. })),
        "{future:?}"
    );

    let error = match store.watch("/compact/", old).await {
        Ok(mut watch) => soon("the watch to be refused", watch.next())
            .await
            .unwrap_err(),
        Err(error) => error,
    };
    assert!(
        matches!(error, StoreError::Compacted { revision } if revision >= old),
        "{error:?}"
    );

    let listing = store.list("/compact/").await.unwrap();
    assert_eq!(listing.items.len(), 2, "values outlive the history");
    let mut watch = store
        .watch("/compact/", listing.revision + 1)
        .await
        .unwrap();
    let revision = commit(store, Txn::new().delete("/compact/a")).await;
    let events = vec![Event::Delete {
        key: "/compact/a".into(),
    }];
    assert_eq!(next(&mut watch).await, WatchEvents { revision, events });
}

async fn an_expired_lease_takes_its_keys_along(store: &Arc<dyn Store>) {
    let lease = store.grant_lease(MIN_LEASE_TTL).await.unwrap();
    let txn = Txn::new()
        .put_leased("/lease/a", "1", lease)
        .put_leased("/lease/b", "1", lease);
    let put = commit(store, txn.put("/lease/c", "stays")).await;
    let mut watch = store.watch("/lease/", put + 1).await.unwrap();
    let seen = next(&mut watch).await;
    let keys: Vec<_> = seen.events.iter().map(Event::key).collect();
    assert_eq!(keys, ["/lease/a", "/lease/b"], "all at one revision");
    assert!(
        seen.events
            .iter()
            .all(|event| matches!(event, Event::Delete { .. }))
    );
    assert_eq!(get(store, "/lease/a").await, None);
    assert!(get(store, "/lease/c").await.is_some());

    let late = store.keep_alive(lease).await;
    assert!(
        matches!(late, Err(StoreError::LeaseExpired { lease: l }) if l == lease),
        "{late:?}"
    );
    let late = store
        .txn(Txn::new().put_leased("/lease/a", "2", lease))
        .await;
    assert!(
        matches!(late, Err(StoreError::LeaseExpired { lease: l }) if l == lease),
        "{late:?}"
    );
    store.revoke(lease).await.unwrap();
}

async fn a_lease_that_is_kept_alive_keeps_its_keys(store: &Arc<dyn Store>) {
    let lease = store.grant_lease(Duration::from_millis(1)).await.unwrap();
    commit(store, Txn::new().put_leased("/kept/a", "1", lease)).await;
    let start = Instant::now();
    while start.elapsed() < MIN_LEASE_TTL * 3 {
        let ttl = store.keep_alive(lease).await.unwrap();
        assert!(
            ttl >= MIN_LEASE_TTL,
            "no lease is shorter than the shortest: {ttl:?}"
        );
        sleep(MIN_LEASE_TTL / 4).await;
    }
    assert!(get(store, "/kept/a").await.is_some());
    store.revoke(lease).await.unwrap();
}

async fn a_revoked_lease_takes_its_keys_along_at_once(store: &Arc<dyn Store>) {
    let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    let other = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    let txn = Txn::new()
        .put_leased("/revoke/a", "1", lease)
        .put_leased("/revoke/b", "1", other);
    commit(store, txn).await;
    store.revoke(lease).await.unwrap();
    store.revoke(lease).await.unwrap();
    assert_eq!(get(store, "/revoke/a").await, None);
    assert!(get(store, "/revoke/b").await.is_some());
    store.revoke(other).await.unwrap();
}

async fn a_key_put_without_lease_outlives_its_former_lease(store: &Arc<dyn Store>) {
    let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    commit(store, Txn::new().put_leased("/former/a", "1", lease)).await;
    commit(store, Txn::new().put("/former/a", "2")).await;
    store.revoke(lease).await.unwrap();
    assert_eq!(get(store, "/former/a").await.unwrap().value, b"2");
}
