//! A replica whose files no engine can load: they are moved aside, and it copies everything anew.
//!
//! Invariant: data is moved only where the record counts on another node for it, the shard's primary
//! answers as one at that moment, and the engine itself has refused the files several times in a row;
//! what was moved last is kept, and never more than that.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use slotmesh_proto::{
    agent::v1::{NodeSpec, ProcessState},
    store::v1::NodeRole,
};

use super::{Trouble, Worker};
use crate::{
    control::Control,
    handover::Role,
    node::{Assigned, files::make_private_dir},
    probe::Info,
};

/// One refusal may be of a file that was being written to, or of a disk that is about to be mended.
const REFUSALS_MIN: u32 = 3;
/// A full copy costs the primary a fork: a disk that spoils everything must not cost it one a start.
const AGAIN_AFTER: Duration = Duration::from_secs(30);
/// Of the log, since the start. A crash while it loads prints a long report.
const LOG_BYTES_MAX: u64 = 64 << 10;
/// Of a directory with what was moved; the time of the move in seconds follows.
const ASIDE: &str = "damaged-";

/// What engines from Redis 6.2 to 8.2 and Valkey 8.0 say when they can't load what is there. Not that
/// a format is newer than the engine: a copy from the primary would not be of another one.
const REFUSALS: [&str; 9] = [
    "Bad file format reading the append only file",
    "Unexpected end of file reading the append only file",
    "FATAL AOF MANIFEST FILE ERROR",
    "length. stat: No such file or directory",
    "Internal error in RDB reading",
    "Wrong RDB checksum",
    "Wrong signature trying to load DB",
    "Fatal error loading the DB: Invalid argument",
    "BUG REPORT START",
];

/// Of starts in a row.
#[derive(Debug, Default)]
pub(super) struct Damage {
    refusals: u32,
    /// Where in its log the last start begins.
    log_from: u64,
}

impl Worker {
    /// Of a process that has ended: whether it could not load its files.
    pub(super) fn note_refusal(&mut self) {
        let has_loaded = !self.run.run_id.is_empty() && !self.report.loading;
        let log = self.dir.as_ref().map(|dir| dir.log());
        let said = log.map(|log| since(&log, self.damage.log_from));
        self.damage.refusals = match said {
            Some(said) if !has_loaded && is_refusal(&said) => self.damage.refusals + 1,
            _ => 0,
        };
    }

    /// Before each start.
    pub(super) async fn mend_before_start(&mut self, assigned: Option<&Assigned>) {
        if let Some(dir) = &self.dir {
            self.damage.log_from = fs::metadata(dir.log()).map_or(0, |log| log.len());
        }
        let Some(spec) = assigned.map(|assigned| &assigned.spec) else {
            return;
        };
        if self.damage.refusals < REFUSALS_MIN || !may_be_copied(spec, &self.node_id) {
            return;
        }
        // A controller that is behind may not know yet who was promoted since.
        let known = self
            .host
            .journal
            .read(|memory| memory.epoch(&spec.instance_id, &spec.shard_id));
        if spec.epoch < known {
            return;
        }
        if !is_served_elsewhere(spec).await {
            tracing::warn!(node = %self.node_id, "its files are damaged, and its primary does not answer: left as they are");
            return;
        }
        let Some(dir) = &self.dir else { return };
        let why = match set_aside(dir.path(), now_unix_s()) {
            Ok(None) => return,
            Ok(Some(aside)) => {
                tracing::warn!(node = %self.node_id, aside = %aside.display(), "its files are damaged: moved aside, it copies everything from its primary");
                self.host.metrics.damaged_files.add(1);
                self.damage.refusals = 0;
                format!(
                    "its files were damaged and are in {} now; it copies everything from its primary",
                    aside.display()
                )
            }
            Err(error) => {
                tracing::error!(node = %self.node_id, %error, "damaged files not moved aside");
                format!(
                    "its files are damaged and can't be moved aside: {error}; remove *.rdb, *.aof and appendonlydir in {}",
                    dir.path().display()
                )
            }
        };
        self.trouble = Some(Trouble {
            state: ProcessState::Stopped,
            why,
        });
    }
}

/// What the record must say of the node. An exchange of its engine has its own ways.
fn may_be_copied(spec: &NodeSpec, node_id: &str) -> bool {
    spec.may_recopy
        && !spec.may_exchange
        && !spec.frozen
        && !spec.detached
        && spec.role() == NodeRole::Replica
        && spec.primary_node_id != node_id
        && !spec.primary_address.is_empty()
}

/// Whether the record's primary is one, and has data, now: an empty one may have lost it.
async fn is_served_elsewhere(spec: &NodeSpec) -> bool {
    let (user, password) = (&spec.observer_user, &spec.observer_password);
    let Ok(mut primary) = Control::tcp(&spec.primary_address, user, password).await else {
        return false;
    };
    match Info::read(&mut primary, "default").await {
        Ok(info) => {
            let is_primary = info.role() == Some(Role::Primary);
            is_primary && info.text("loading") == "0" && info.keys() > 0
        }
        Err(_) => false,
    }
}

fn is_refusal(said: &str) -> bool {
    REFUSALS.iter().any(|refusal| said.contains(refusal))
}

/// Moves what an engine would load; `None`: there is nothing, or it was done only just now. What was
/// moved before is removed.
///
/// # Errors
/// Something can't be moved; the rest may have been, and is next time.
fn set_aside(dir: &Path, now_unix_s: u64) -> io::Result<Option<PathBuf>> {
    let (mut data, mut before) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if is_data(&path) {
            data.push(path);
        } else if let Some(at) = moved_at(&path) {
            before.push((at, path));
        }
    }
    // A clock that was ahead must not keep the node from its copy.
    let is_soon = |at: &u64| {
        let ago = now_unix_s.checked_sub(*at);
        ago.is_some_and(|ago| ago < AGAIN_AFTER.as_secs())
    };
    if data.is_empty() || before.iter().any(|(at, _)| is_soon(at)) {
        return Ok(None);
    }
    for (_, path) in before {
        fs::remove_dir_all(path)?;
    }
    let aside = dir.join(format!("{ASIDE}{now_unix_s}"));
    make_private_dir(&aside)?;
    for path in data {
        if let Some(name) = path.file_name() {
            fs::rename(&path, aside.join(name))?;
        }
    }
    fs::File::open(dir)?.sync_all()?;
    Ok(Some(aside))
}

fn is_data(path: &Path) -> bool {
    let kind = path.extension().and_then(|kind| kind.to_str());
    matches!(kind, Some("rdb" | "aof")) || path.ends_with("appendonlydir")
}

/// When it was made, if it is a directory with what was moved.
fn moved_at(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix(ASIDE)?.parse().ok()
}

/// What a log says from a place on, at most its end.
fn since(log: &Path, from: u64) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> io::Result<String> {
        let mut file = fs::File::open(log)?;
        let len = file.metadata()?.len();
        // Shorter than it was: somebody has rotated it.
        let from = if from > len { 0 } else { from };
        file.seek(SeekFrom::Start(from.max(len.saturating_sub(LOG_BYTES_MAX))))?;
        let mut said = Vec::new();
        file.take(LOG_BYTES_MAX).read_to_end(&mut said)?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    };
    read().unwrap_or_default()
}

fn now_unix_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(dir: &Path, name: &str) {
        fs::write(dir.join(name), name).unwrap();
    }

    #[test]
    fn what_an_engine_would_load_is_moved_and_only_the_last_of_it_kept() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        for name in ["dump.rdb", "appendonly.aof", "redis.conf", "admin.secret"] {
            touch(dir, name);
        }
        fs::create_dir(dir.join("appendonlydir")).unwrap();
        touch(&dir.join("appendonlydir"), "appendonly.aof.manifest");
        let first = set_aside(dir, 1_000).unwrap().unwrap();
        assert!(first.join("dump.rdb").exists() && first.join("appendonly.aof").exists());
        assert!(first.join("appendonlydir/appendonly.aof.manifest").exists());
        assert!(dir.join("redis.conf").exists() && dir.join("admin.secret").exists());
        assert!(!dir.join("dump.rdb").exists() && !dir.join("appendonlydir").exists());
        assert_eq!(set_aside(dir, 2_000).unwrap(), None, "there is nothing");

        touch(dir, "dump.rdb");
        assert_eq!(set_aside(dir, 1_029).unwrap(), None, "only just now");
        assert!(dir.join("dump.rdb").exists());
        let second = set_aside(dir, 999).unwrap().unwrap();
        assert!(second.exists() && !first.exists(), "the clock was ahead");
    }

    #[test]
    fn only_what_the_last_start_said_counts() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("redis.log");
        let before = "Bad file format reading the append only file x\n";
        fs::write(&log, format!("{before}Ready to accept connections\n")).unwrap();
        assert!(is_refusal(&since(&log, 0)));
        assert!(!is_refusal(&since(&log, before.len() as u64)));
        assert!(is_refusal(&since(&log, 1_000)), "the log is another one");
        assert!(!is_refusal("Can't handle RDB format version 12"));
    }

    #[test]
    fn nothing_is_moved_without_the_word_of_the_record() {
        let spare = NodeSpec {
            may_recopy: true,
            role: NodeRole::Replica.into(),
            primary_node_id: "a".to_owned(),
            primary_address: "10.0.0.1:7000".to_owned(),
            ..NodeSpec::default()
        };
        assert!(may_be_copied(&spare, "b"));
        assert!(!may_be_copied(&spare, "a"), "the primary itself");
        let changes: [fn(&mut NodeSpec); 6] = [
            |spec| spec.may_recopy = false,
            |spec| spec.may_exchange = true,
            |spec| spec.frozen = true,
            |spec| spec.detached = true,
            |spec| spec.role = NodeRole::Primary.into(),
            |spec| spec.primary_address.clear(),
        ];
        for change in changes {
            let mut spec = spare.clone();
            change(&mut spec);
            assert!(!may_be_copied(&spec, "b"), "{spec:?}");
        }
    }
}
