//! C7: the epochs that each proxy has put in force, and those at which its requests were routed.
//!
//! A proxy saves its topology just after it is in force in all its workers, so the file shows what was
//! applied, some milliseconds late and sometimes without a step in between. Where a request was routed
//! shows at the node: the user of the connection that it came on carries the epoch.
//!
//! Invariant: a time of application is never earlier than the real one, so that a write executed at
//! an older epoch after it is an error whatever the delay.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prost::Message as _;
use slotmesh_proto::topology::v1::Snapshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{
    check::{Checked, Finding},
    history::now_us,
    monitor::epochs::Epochs,
};

/// Between two looks at the files; they change once or twice a move.
const LOOK_PAUSE: Duration = Duration::from_millis(10);
/// Before the snapshot in a proxy's file: what it is, and a checksum.
const HEADER: &[u8] = b"SMPXTOP";
const HEADER_LEN: usize = 8 + 32;
/// What a proxy logs when it can't write its file.
const UNSAVED: &[u8] = b"topology not saved";

/// What one proxy was seen to have applied, and when first.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// Per shard: by epoch, seen first then.
    shards: BTreeMap<String, BTreeMap<u64, u64>>,
    /// Per shard: now.
    now: BTreeMap<String, u64>,
    /// From a higher epoch to a lower one, and when.
    back: Vec<(String, u64, u64, u64)>,
    /// Topologies that were read.
    looks: u64,
    /// The proxy says that it could not save one, as on a full disk: then the file proves nothing
    /// about what was not applied.
    unsaved: bool,
}

impl Applied {
    /// A topology that the proxy has in force.
    pub fn note(&mut self, shards: &[(String, u64)], at_us: u64) {
        self.looks += 1;
        for (shard, epoch) in shards {
            let before = self.now.insert(shard.clone(), *epoch);
            if let Some(before) = before.filter(|before| before > epoch) {
                self.back.push((shard.clone(), before, *epoch, at_us));
            }
            let known = self.shards.entry(shard.clone()).or_default();
            known.entry(*epoch).or_insert(at_us);
        }
    }
}

/// Per proxy, by its directory: the address that its requests come from, and what it has applied.
pub type Proxies = BTreeMap<PathBuf, (String, Applied)>;

/// Judges what was applied against what was routed (`address shard` by epoch) and what the
/// controllers say at the end.
#[must_use]
pub fn judge(
    proxies: &Proxies,
    routed: &Epochs,
    newest: &BTreeMap<String, u64>,
) -> (Vec<Finding>, Checked) {
    let mut findings = routed.judge("C7 a proxy's routes went back");
    let mut found = |check, broken, what| {
        findings.push(Finding {
            check,
            broken,
            what,
            count: 1,
        });
    };
    let mut hosts: BTreeMap<&str, Vec<&Applied>> = BTreeMap::new();
    for (dir, (host, applied)) in proxies {
        hosts.entry(host).or_default().push(applied);
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        for (shard, before, epoch, at_us) in &applied.back {
            let what = format!("{name}: {shard} from {before} to {epoch} at {at_us} us");
            found("C7 an applied epoch went back", true, what);
        }
        for (shard, epoch) in newest {
            let last = applied.now.get(shard).copied().unwrap_or(0);
            if last != *epoch && dir.exists() {
                let what = format!("{name}: {shard} is at {last}, its record at {epoch}");
                found("C7 a proxy stayed behind", !applied.unsaved, what);
            }
        }
    }
    let mut compared = 0;
    for (route, epoch, _, span) in routed.spans() {
        let Some((host, shard)) = route.split_once(' ') else {
            continue;
        };
        // Of two proxies of one address nobody knows which sent it.
        let Some([applied]) = hosts.get(host).map(Vec::as_slice) else {
            continue;
        };
        let Some(known) = applied.shards.get(shard) else {
            let what = format!("{host}: {shard} at {epoch}");
            found("C7 routed but not applied", !applied.unsaved, what);
            continue;
        };
        compared += span.count;
        let next = known.range(epoch + 1..).next();
        if let Some((next, at_us)) = next
            && span.last.lo_us > *at_us
        {
            let late = span.last.lo_us - at_us;
            let what = format!(
                "{host}: {shard}: {late} us after {next} was applied, at epoch {epoch}: {}",
                span.last_line
            );
            found("C7 routed below the applied epoch", true, what);
        }
        let highest = known.keys().next_back().copied().unwrap_or(0);
        if epoch > highest {
            let what = format!("{host}: {shard} routed at {epoch}, applied {highest}");
            found("C7 routed above the applied epoch", !applied.unsaved, what);
        }
    }
    let looks: u64 = proxies.values().map(|(_, a)| a.looks).sum();
    let checked = Checked {
        check: "C7 topology",
        examined: if looks == 0 { 0 } else { compared },
        of: format!(
            "routed writes against {looks} applied topologies of {} proxies",
            proxies.len()
        ),
    };
    (findings, checked)
}

/// When each change of an epoch was seen first, and when last, over all proxies.
#[must_use]
pub fn changes(proxies: &Proxies) -> Vec<(u64, u64)> {
    let mut changes: BTreeMap<(&str, u64), (u64, u64)> = BTreeMap::new();
    for (_, applied) in proxies.values() {
        for (shard, epochs) in &applied.shards {
            // The first is that with which the run began.
            for (epoch, at_us) in epochs.iter().skip(1) {
                let seen = changes.entry((shard, *epoch)).or_insert((*at_us, *at_us));
                *seen = (seen.0.min(*at_us), seen.1.max(*at_us));
            }
        }
    }
    changes.into_values().collect()
}

/// Looks at the proxies' files for a run.
#[derive(Debug)]
pub(super) struct Watch {
    proxies: Arc<Mutex<Proxies>>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Watch {
    /// Of all proxies in these hosts' data directories, with the hosts' addresses.
    #[must_use]
    pub(super) fn start(hosts: Vec<(PathBuf, String)>) -> Self {
        let (proxies, stop) = (Arc::default(), CancellationToken::new());
        let task = tokio::spawn(watch(hosts, Arc::clone(&proxies), stop.clone()));
        Self {
            proxies,
            stop,
            task,
        }
    }

    /// Ends, and gives what was seen.
    ///
    /// # Errors
    /// When the watcher died.
    pub(super) async fn end(self) -> anyhow::Result<Proxies> {
        self.stop.cancel();
        self.task.await?;
        let mut proxies = self.proxies.lock().unwrap_or_else(PoisonError::into_inner);
        let mut proxies = std::mem::take(&mut *proxies);
        for (dir, (_, applied)) in &mut proxies {
            let log = std::fs::read(dir.join("proxy.log")).unwrap_or_default();
            applied.unsaved = log.windows(UNSAVED.len()).any(|words| words == UNSAVED);
        }
        Ok(proxies)
    }
}

async fn watch(
    hosts: Vec<(PathBuf, String)>,
    proxies: Arc<Mutex<Proxies>>,
    stop: CancellationToken,
) {
    // What a file was when it was read last: it is replaced as a whole.
    let mut seen: BTreeMap<PathBuf, u64> = BTreeMap::new();
    loop {
        // The last look comes after the end.
        let ended = timeout(LOOK_PAUSE, stop.cancelled()).await.is_ok();
        for (data, host) in &hosts {
            for dir in proxies_of(data) {
                let Some((inode, shards)) = read(&dir, seen.get(&dir).copied()) else {
                    continue;
                };
                seen.insert(dir.clone(), inode);
                let mut proxies = proxies.lock().unwrap_or_else(PoisonError::into_inner);
                let proxy = proxies.entry(dir);
                let (_, applied) = proxy.or_insert_with(|| (host.clone(), Applied::default()));
                applied.note(&shards, now_us());
            }
        }
        if ended {
            return;
        }
    }
}

fn proxies_of(data: &Path) -> BTreeSet<PathBuf> {
    let found = std::fs::read_dir(data.join("proxies"));
    let entries = found.into_iter().flatten().flatten();
    entries.map(|e| e.path()).collect()
}

/// The topology in a proxy's file, if that is another file than the one seen last.
fn read(dir: &Path, seen: Option<u64>) -> Option<(u64, Vec<(String, u64)>)> {
    let path = dir.join("topology.pb");
    let meta = std::fs::metadata(&path).ok()?;
    // A new file may get the inode of the one before the last, never of the one that it replaces.
    let mark = meta.ino() ^ meta.mtime_nsec().unsigned_abs() << 20 ^ meta.mtime().unsigned_abs();
    if Some(mark) == seen {
        return None;
    }
    let bytes = std::fs::read(&path).ok()?;
    let body = bytes
        .get(HEADER_LEN..)
        .filter(|_| bytes.starts_with(HEADER))?;
    let snapshot = Snapshot::decode(body).ok()?;
    let shards = snapshot.shards.into_iter().map(|s| (s.shard_id, s.epoch));
    Some((mark, shards.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::monitor::epochs::{Moment, Span};

    fn routed(writes: &[(u64, u64, u64)]) -> Epochs {
        let mut epochs = Epochs::default();
        for (epoch, first, last) in writes {
            let mut span = Span::of(Moment::at(*first), "first");
            span.add(Moment::at(*last), "last");
            epochs.note("1.1.1.1 s", *epoch, "", span);
        }
        epochs
    }

    fn applied(epochs: &[(u64, u64)]) -> Proxies {
        let mut applied = Applied::default();
        for (epoch, at_us) in epochs {
            applied.note(&[("s".to_owned(), *epoch)], *at_us);
        }
        [(PathBuf::from("/"), ("1.1.1.1".to_owned(), applied))].into()
    }

    fn broken(proxies: &Proxies, routed: &Epochs, newest: u64) -> Vec<&'static str> {
        let newest = [("s".to_owned(), newest)].into();
        let (findings, _) = judge(proxies, routed, &newest);
        findings.iter().map(|f| f.check).collect()
    }

    #[test]
    fn a_proxy_that_follows_its_record_is_fine_also_when_a_step_was_not_seen() {
        let routes = routed(&[(1, 5, 10), (2, 12, 15), (3, 20, 30)]);
        assert!(broken(&applied(&[(1, 0), (3, 18)]), &routes, 3).is_empty());
        let (_, checked) = judge(&applied(&[(1, 0), (3, 18)]), &routes, &BTreeMap::new());
        assert_eq!(checked.examined, 6);
        let (_, nothing) = judge(&Proxies::new(), &routes, &BTreeMap::new());
        assert_eq!(nothing.examined, 0);
    }

    #[test]
    fn changes_are_those_after_the_first() {
        let proxies = applied(&[(1, 5), (2, 10), (4, 20)]);
        assert_eq!(changes(&proxies), [(10, 10), (20, 20)]);
    }

    #[test]
    fn epochs_that_go_back_are_found() {
        let back = applied(&[(1, 0), (2, 10), (1, 20), (2, 30)]);
        assert_eq!(
            broken(&back, &Epochs::default(), 2),
            ["C7 an applied epoch went back"]
        );
        let routes = routed(&[(1, 5, 13), (2, 12, 15)]);
        let found = broken(&applied(&[(1, 0), (2, 14)]), &routes, 2);
        assert_eq!(found, ["C7 a proxy's routes went back"]);
    }

    #[test]
    fn a_route_that_is_not_the_applied_one_is_found() {
        let late = routed(&[(1, 5, 11)]);
        let found = broken(&applied(&[(1, 0), (2, 10)]), &late, 2);
        assert_eq!(found, ["C7 routed below the applied epoch"]);
        let early = routed(&[(3, 5, 11)]);
        let found = broken(&applied(&[(1, 0), (2, 10)]), &early, 2);
        assert_eq!(found, ["C7 routed above the applied epoch"]);
        let behind = broken(&applied(&[(1, 0)]), &Epochs::default(), 2);
        assert_eq!(behind, ["C7 a proxy stayed behind"]);
        // Unless it had no room for its file.
        let mut full = applied(&[(1, 0)]);
        full.values_mut()
            .for_each(|(_, applied)| applied.unsaved = true);
        let newest = [("s".to_owned(), 2)].into();
        let (findings, _) = judge(&full, &Epochs::default(), &newest);
        assert!(findings.iter().all(|f| !f.broken) && findings.len() == 1);
    }
}
