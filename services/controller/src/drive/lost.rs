//! Records which agents keep what lost primaries wrote beyond their successors.
//!
//! Invariant: a record is written once, when an agent first reports the file, and goes only when the
//! host's agent, heard by this leader, does not keep the file any more.

use std::collections::{BTreeMap, BTreeSet};

use slotmesh_proto::{agent::v1 as agent, store::v1 as records};
use tracing::warn;

use super::{DriveError, Driver};
use crate::{
    clock,
    leader::LeaderOutcome,
    store::keys::{self, Key},
};

/// What one leader has seen to; a successor looks again.
#[derive(Debug, Default)]
pub(super) struct Recorded {
    keys: BTreeSet<String>,
}

impl Driver {
    /// Writes down what agents report and no record has yet.
    pub(super) async fn record_lost_writes(&mut self) -> Result<(), DriveError> {
        let recorded = &self.recorded.keys;
        let news: Vec<(String, records::LostWritesRecord)> = self.hub.look(|peers| {
            let reports = peers.hosts.values().filter_map(|entry| {
                let host = &entry.register.host_id;
                Some((host, entry.lost_writes.as_ref()?))
            });
            let all = reports.flat_map(|(host, files)| files.iter().map(move |l| (host, l)));
            all.filter_map(|(host, lost)| Some((key_of(lost)?, record(lost, host))))
                .filter(|(key, _)| !recorded.contains(key))
                .collect()
        });
        for (key, record) in news {
            let (instance, shard) = (record.instance_id.clone(), record.shard_id.clone());
            let (commands, complete) = (record.commands, record.complete);
            let txn = self.term.txn().absent(key.clone());
            match txn
                .put(key.clone(), keys::encode(record))
                .commit(&*self.store)
                .await?
            {
                LeaderOutcome::Committed { .. } => {
                    warn!(%instance, %shard, commands, complete, "writes of a lost primary were kept; see `slotmesh lost-writes list`");
                }
                // A leader before this one has written it.
                LeaderOutcome::Conflict => {}
                LeaderOutcome::Deposed => return Err(DriveError::Deposed),
            }
            self.recorded.keys.insert(key);
        }
        Ok(())
    }

    /// Forgets what nobody keeps any more, for as long as its host can be asked.
    pub(super) async fn forget_lost_writes(&mut self) -> Result<(), DriveError> {
        let kept: BTreeMap<String, BTreeSet<String>> = self.hub.look(|peers| {
            let heard = peers.hosts.values().filter_map(|entry| {
                let files = entry.lost_writes.as_ref()?;
                let files = files.iter().map(|l| l.file.clone()).collect();
                Some((entry.register.host_id.clone(), files))
            });
            heard.collect()
        });
        for item in self.store.list(keys::LOST).await?.items {
            let record: records::LostWritesRecord = match keys::decode(&item) {
                Ok(record) => record,
                Err(error) => {
                    warn!(%error, "record left where it is");
                    continue;
                }
            };
            let is_gone = kept
                .get(&record.host_id)
                .is_some_and(|files| !files.contains(&record.file));
            if is_gone {
                let txn = self
                    .term
                    .txn()
                    .unchanged(item.key.clone(), item.mod_revision);
                if txn.delete(item.key.clone()).commit(&*self.store).await?
                    == LeaderOutcome::Deposed
                {
                    return Err(DriveError::Deposed);
                }
                self.recorded.keys.remove(&item.key);
            }
        }
        Ok(())
    }
}

/// `None` when an agent says what can't be a key.
fn key_of(lost: &agent::LostWrites) -> Option<String> {
    let ids = [&lost.instance_id, &lost.shard_id, &lost.node_id];
    ids.iter().all(|id| keys::valid_id(id)).then(|| {
        Key::Lost {
            instance: &lost.instance_id,
            shard: &lost.shard_id,
            epoch: lost.epoch,
            node: &lost.node_id,
        }
        .to_string()
    })
}

fn record(lost: &agent::LostWrites, host: &str) -> records::LostWritesRecord {
    records::LostWritesRecord {
        schema: 0,
        instance_id: lost.instance_id.clone(),
        shard_id: lost.shard_id.clone(),
        epoch: lost.epoch,
        node_id: lost.node_id.clone(),
        host_id: host.to_owned(),
        file: lost.file.clone(),
        bytes: lost.bytes,
        commands: lost.commands,
        complete: lost.complete,
        unix_ms: clock::now_ms(),
        sha256: lost.sha256.clone(),
        why: lost.why.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        drive::desk::Leading,
        store::{EmbeddedStore, Store},
    };

    fn report(files: &[&str]) -> agent::HostReport {
        let lost = |file: &&str| agent::LostWrites {
            instance_id: "i-1".into(),
            shard_id: "s-0".into(),
            epoch: 4,
            node_id: "n-1".into(),
            file: (*file).to_owned(),
            commands: 7,
            complete: true,
            ..agent::LostWrites::default()
        };
        agent::HostReport {
            lost_writes: files.iter().map(lost).collect(),
            ..agent::HostReport::default()
        }
    }

    #[tokio::test]
    async fn a_reported_file_is_recorded_once_and_forgotten_when_its_host_no_longer_keeps_it() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        let leading = Leading::over(store.clone()).await;
        let hub = &leading.hub;
        let host = "h-1".into();
        let register = agent::Register {
            host_id: "h-1".into(),
            ..agent::Register::default()
        };
        let session = hub.host_opened(register);
        hub.host_reported(&host, session, &report(&["f.resp"]));
        let mut first = leading.driver();
        first.record_lost_writes().await.unwrap();
        let listed = store.list(keys::LOST).await.unwrap().items;
        assert_eq!(listed.len(), 1);
        let record: records::LostWritesRecord = keys::decode(&listed[0]).unwrap();
        assert_eq!((record.commands, record.host_id.as_str()), (7, "h-1"));
        // The next leader finds it written.
        let mut second = leading.driver();
        second.record_lost_writes().await.unwrap();
        second.forget_lost_writes().await.unwrap();
        assert_eq!(store.list(keys::LOST).await.unwrap().items, listed);
        hub.host_reported(&host, session, &report(&[]));
        second.forget_lost_writes().await.unwrap();
        assert!(store.list(keys::LOST).await.unwrap().items.is_empty());
    }
}
