//! A store on disk survives SIGKILL: the process that writes is this test program, run again.

use std::{path::Path, process::Stdio, time::Duration};

use slotmesh_controller::store::{EmbeddedStore, Store, Txn, TxnOutcome};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
};

use crate::suite::soon;

const DIR: &str = "SLOTMESH_TEST_CRASH_DIR";
const KILLS: usize = 3;
const WRITES_BEFORE_KILL: usize = 40;

/// Writes two keys in each transaction and says each revision that was acknowledged.
#[tokio::test]
async fn child_that_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    let store = EmbeddedStore::open(Path::new(&dir)).await.unwrap();
    // Bounded, should nobody kill it.
    for n in 0..100_000 {
        let txn = Txn::new()
            .put("/left", n.to_string())
            .put("/right", n.to_string());
        match store.txn(txn).await.unwrap() {
            TxnOutcome::Committed { revision } => println!("\nacknowledged {revision} {n}"),
            TxnOutcome::Conflict => panic!("nothing was compared"),
        }
    }
}

#[tokio::test]
async fn what_was_acknowledged_survives_a_kill_and_a_torn_write_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut last_revision = 0;
    for _ in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "crash::child_that_writes_until_it_is_killed",
                "--nocapture",
            ])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged = (0, 0);
        let mut count = 0;
        while count < WRITES_BEFORE_KILL {
            let line = soon("the child to write", lines.next_line())
                .await
                .unwrap()
                .unwrap();
            if let Some((revision, n)) = acknowledgement(&line) {
                assert!(revision > last_revision, "revisions rise across processes");
                acknowledged = (revision, n);
                count += 1;
            }
        }
        child.start_kill().unwrap();
        // What it said before it died counts too.
        while let Ok(Some(line)) = soon("the child to end", lines.next_line()).await {
            acknowledged = acknowledgement(&line).unwrap_or(acknowledged);
        }
        soon("the child to die", child.wait()).await.unwrap();

        let store = EmbeddedStore::open(dir.path()).await.unwrap();
        let value = async |key| {
            let item = store.get(key).await.unwrap().unwrap();
            String::from_utf8(item.value)
                .unwrap()
                .parse::<u64>()
                .unwrap()
        };
        let (left, right) = (value("/left").await, value("/right").await);
        assert_eq!(left, right, "a transaction is on disk wholly or not at all");
        assert!(
            left >= acknowledged.1,
            "{left} is on disk, {acknowledged:?} was acknowledged"
        );
        last_revision = store.list("/").await.unwrap().revision;
        assert!(last_revision > acknowledged.0);
        soon("the store to close", store.shutdown()).await;
    }
}

fn acknowledgement(line: &str) -> Option<(u64, u64)> {
    let (revision, n) = line.strip_prefix("acknowledged ")?.split_once(' ')?;
    Some((revision.parse().ok()?, n.parse().ok()?))
}

/// Not a benchmark: it says in the log what a commit costs here, and that a batch shares it.
#[tokio::test]
async fn many_writers_share_commits_to_disk() {
    const WRITERS: usize = 64;
    let dir = tempfile::tempdir().unwrap();
    let store = std::sync::Arc::new(EmbeddedStore::open(dir.path()).await.unwrap());
    let start = std::time::Instant::now();
    for n in 0..WRITERS {
        let _ = store
            .txn(Txn::new().put("/one", n.to_string()))
            .await
            .unwrap();
    }
    let alone: Duration = start.elapsed();
    let start = std::time::Instant::now();
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..WRITERS {
        let store = store.clone();
        writers.spawn(async move { store.txn(Txn::new().put(format!("/{n}"), "x")).await });
    }
    let outcomes = soon("all writers", writers.join_all()).await;
    let together = start.elapsed();
    println!("{WRITERS} commits one after another: {alone:?}, at once: {together:?}");
    let mut revisions: Vec<u64> = outcomes
        .into_iter()
        .map(|outcome| match outcome.unwrap() {
            TxnOutcome::Committed { revision } => revision,
            TxnOutcome::Conflict => 0,
        })
        .collect();
    revisions.sort_unstable();
    assert!(
        revisions.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "each has its own revision"
    );
    store.shutdown().await;
}
