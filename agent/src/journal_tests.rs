//! What survives: everything that was acknowledged, and nothing that was torn.

use slotmesh_proto::agent::v1::{ExecuteStepRequest, ExecuteStepResponse};

use super::*;
use crate::journal::record::{Begun, Ended, FenceMark, ShardEpoch, StepKey};

fn epoch(epoch: u64) -> Fact {
    Fact::Epoch(ShardEpoch {
        instance_id: "r".into(),
        shard_id: "s".into(),
        epoch,
    })
}

fn key(attempt: u32) -> StepKey {
    StepKey {
        task_id: "t".into(),
        step: "0/critical".into(),
        attempt,
    }
}

fn begun(attempt: u32) -> Fact {
    let request = ExecuteStepRequest {
        task_id: "t".into(),
        step: "0/critical".into(),
        attempt,
        ..ExecuteStepRequest::default()
    };
    Fact::Begun(Begun {
        request,
        deadline_unix_ms: 9,
    })
}

fn ended(attempt: u32, message: &str) -> Fact {
    let response = ExecuteStepResponse {
        message: message.into(),
        ..Default::default()
    };
    Fact::Ended(Box::new(Ended {
        key: key(attempt),
        response,
    }))
}

fn summary(journal: &Journal) -> (u64, u64, usize, Option<String>) {
    journal.read(|m| {
        let outcome = m.outcome(&key(1)).map(|r| r.message.clone());
        (m.term(), m.epoch("r", "s"), m.unfinished().count(), outcome)
    })
}

#[tokio::test]
async fn facts_survive_and_only_rise() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    journal
        .append([Fact::Term(7), epoch(3), begun(1), begun(2)])
        .await
        .unwrap();
    journal
        .append([Fact::Term(6), epoch(2), ended(1, "done")])
        .await
        .unwrap();
    let before = summary(&journal);
    assert_eq!(before, (7, 3, 1, Some("done".into())));
    drop(journal);
    assert_eq!(summary(&Journal::open(dir.path()).unwrap()), before);
}

#[tokio::test]
async fn a_torn_end_is_cut_off_at_every_length_and_writing_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let journal = Journal::open(dir.path()).unwrap();
    journal.append([Fact::Term(1), epoch(1)]).await.unwrap();
    let whole = std::fs::metadata(&path).unwrap().len();
    journal.append([ended(1, "torn")]).await.unwrap();
    drop(journal);
    let bytes = std::fs::read(&path).unwrap();
    for len in whole..bytes.len() as u64 {
        std::fs::write(&path, &bytes[..len as usize]).unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!(summary(&journal), (1, 1, 0, None), "cut at {len}");
        journal.append([epoch(2)]).await.unwrap();
        drop(journal);
        assert_eq!(
            summary(&Journal::open(dir.path()).unwrap()).1,
            2,
            "cut at {len}"
        );
    }
    // A last entry with its length and not its bytes on disk.
    let mut zeros = bytes.clone();
    zeros[whole as usize + 12..].fill(0);
    std::fs::write(&path, zeros).unwrap();
    assert_eq!(
        summary(&Journal::open(dir.path()).unwrap()),
        (1, 1, 0, None)
    );
}

#[tokio::test]
async fn damage_in_the_middle_is_an_error_and_nothing_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let journal = Journal::open(dir.path()).unwrap();
    journal
        .append([Fact::Term(1), epoch(1), epoch(2)])
        .await
        .unwrap();
    drop(journal);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[HEADER_BYTES as usize + FRAME_BYTES] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let error = Journal::open(dir.path()).unwrap_err();
    assert!(
        matches!(
            error,
            JournalError::Damaged {
                at: HEADER_BYTES,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[tokio::test]
async fn a_newer_or_foreign_file_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    for (bytes, word) in [
        (b"SMAJ\x63\0\0\0".as_slice(), "newer"),
        (b"PK\x03\x04abcd", "not a journal"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
}

#[tokio::test]
async fn a_journal_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let owner = Journal::open(dir.path()).unwrap();
    assert!(matches!(
        Journal::open(dir.path()),
        Err(JournalError::InUse { .. })
    ));
    drop(owner);
    Journal::open(dir.path()).unwrap();
}

#[tokio::test]
async fn a_long_life_is_compacted_to_what_still_matters() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    let mark = FenceMark {
        node_id: "a".into(),
        epoch: 4,
        ..FenceMark::default()
    };
    journal
        .append([
            Fact::Term(3),
            epoch(4),
            Fact::Fenced(mark.clone()),
            begun(0),
        ])
        .await
        .unwrap();
    let long = "x".repeat(20_000);
    for attempt in 1..=300 {
        journal.append([ended(attempt, &long)]).await.unwrap();
    }
    let grown = std::fs::metadata(dir.path().join("journal")).unwrap().len();
    assert!(grown > COMPACT_BYTES);
    drop(journal);
    let journal = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.read(|m| m.fence("a").cloned()), Some(mark));
    assert!(journal.read(|m| m.begun(&key(0)).is_some() && m.outcome(&key(300)).is_some()));
}

#[tokio::test]
async fn outcomes_are_kept_in_a_bounded_number() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    for attempt in 1..=1_100 {
        journal.append([ended(attempt, "")]).await.unwrap();
    }
    assert!(journal.read(|m| m.outcome(&key(1)).is_none() && m.outcome(&key(1_100)).is_some()));
}

#[tokio::test]
async fn a_write_that_failed_is_forgotten_and_the_next_one_finds_a_journal_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    journal.append([epoch(3)]).await.unwrap();
    {
        // The disk is full in the middle of an entry.
        let mut inner = journal.lock();
        inner.file.write_all(&[7; 5]).unwrap();
        inner.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
    }
    journal.append([epoch(4)]).await.unwrap_err();
    assert_eq!(summary(&journal).1, 3, "only what is durable is known");
    journal.append([Fact::Term(9)]).await.unwrap();
    let before = summary(&journal);
    drop(journal);
    let again = Journal::open(dir.path()).unwrap();
    assert_eq!(summary(&again), before);
    again.append([epoch(5)]).await.unwrap();
}
