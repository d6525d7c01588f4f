//! The copy of a node's data that a trial loads: a snapshot that the node's engine writes, taken out of
//! the node's directory as soon as it is there.
//!
//! Invariant: none is begun for which there is no room in memory and on disk, twice over, and none
//! beside a snapshot that the node needs itself.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime},
};

use tokio::time::sleep;

use crate::{
    control::{Control, ControlError},
    handover::driver::chain,
    node::files::NodeDir,
    probe::Info,
};

/// Between looks at a snapshot that is being written.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What an engine needs besides its data.
const SPARE_BYTES: u64 = 64 << 20;
/// Fewest bytes of a key in the stream of changes: `$1`, its only byte, and the ends of both lines.
const KEY_BYTES_MIN: u64 = 7;

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) bytes: u64,
    /// Of the node, as the copy was begun.
    pub(super) keys: u64,
    /// By how many it may differ: writes that came between the count and the copy.
    pub(super) tolerance: u64,
}

impl Copied {
    /// Whether so many keys are those of the copy.
    pub(super) fn is(&self, keys: u64) -> bool {
        keys.abs_diff(self.keys) <= self.tolerance
    }
}

#[derive(Debug, Clone, Copy)]
struct Count {
    keys: u64,
    offset: u64,
}

/// Has the node write a snapshot and takes it to `to`.
///
/// # Errors
/// Says what is missing.
pub(super) async fn copy(node: &mut Control, dir: &NodeDir, to: &Path) -> Result<Copied, String> {
    if dir.resumes() {
        return Err("its process is making way for another engine: try later".to_owned());
    }
    let info = look(node).await?;
    let memory = info.number("used_memory");
    room(memory, to.parent().unwrap_or(to))?;
    let before = identity(&dir.snapshot());
    let (first, second) = begin(node).await?;
    loop {
        let info = look(node).await?;
        if info.text("rdb_bgsave_in_progress") == "0" {
            if info.text("rdb_last_bgsave_status") != "ok" {
                return Err("the node could not write a snapshot: see its log".to_owned());
            }
            break;
        }
        sleep(LOOK_EVERY).await;
    }
    let snapshot = dir.snapshot();
    if identity(&snapshot) == before || dir.resumes() {
        return Err("the node has not written a snapshot: try again".to_owned());
    }
    fs::rename(&snapshot, to).map_err(|e| format!("take the snapshot: {e}"))?;
    let bytes = to.metadata().map_or(0, |m| m.len());
    Ok(Copied {
        bytes,
        keys: first.keys,
        tolerance: first.keys.abs_diff(second.keys)
            + second.offset.saturating_sub(first.offset) / KEY_BYTES_MIN,
    })
}

/// Begins it; the node's state just before and just after.
async fn begin(node: &mut Control) -> Result<(Count, Count), String> {
    loop {
        let before = count(node).await?;
        match node.call(&["BGSAVE"]).await {
            Ok(_) => return Ok((before, count(node).await?)),
            Err(ControlError::Refused(words)) if is_busy(&words) => sleep(LOOK_EVERY).await,
            Err(error) => return Err(format!("begin a snapshot of the node: {}", chain(&error))),
        }
    }
}

/// It writes its append-only file anew, or another snapshot. The trial's own limit bounds the wait.
fn is_busy(words: &str) -> bool {
    ["progress", "Another child process is active"]
        .iter()
        .any(|busy| words.contains(busy))
}

async fn count(node: &mut Control) -> Result<Count, String> {
    let info = look(node).await?;
    Ok(Count {
        keys: info.keys(),
        offset: info.offset(),
    })
}

async fn look(node: &mut Control) -> Result<Info, String> {
    Info::read(node, "default")
        .await
        .map_err(|error| format!("the node does not answer: {}", chain(&error)))
}

/// Which file it is: an engine writes another one and moves it there.
fn identity(path: &Path) -> Option<(u64, Option<SystemTime>)> {
    let meta = path.metadata().ok()?;
    Some((meta.ino(), meta.modified().ok()))
}

/// Whether a copy of so many bytes fits, on disk and in memory.
fn room(bytes: u64, place: &Path) -> Result<(), String> {
    let disk = rustix::fs::statvfs(place).map_err(|e| format!("look at the disk: {e}"))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    fits(bytes, free, available(&meminfo))
}

fn fits(bytes: u64, disk: u64, memory: Option<u64>) -> Result<(), String> {
    let mb = |bytes: u64| bytes.div_ceil(1 << 20);
    let wanted = bytes.saturating_mul(2).saturating_add(SPARE_BYTES);
    if disk < wanted {
        return Err(format!(
            "the trial needs {} MB of free disk for a copy of the node's data, the host has {} MB: \
             make room",
            mb(wanted),
            mb(disk)
        ));
    }
    let wanted = bytes.saturating_add(bytes / 4).saturating_add(SPARE_BYTES);
    match memory {
        Some(memory) if memory < wanted => Err(format!(
            "the trial needs {} MB of free memory for a copy of the node's data, the host has {} \
             MB: make room, or move the node to another host first",
            mb(wanted),
            mb(memory)
        )),
        _ => Ok(()),
    }
}

/// Memory that can be had without swapping, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_twice_on_disk_or_once_in_memory_is_refused() {
        const GB: u64 = 1 << 30;
        assert_eq!(fits(GB, 3 * GB, Some(2 * GB)), Ok(()));
        assert_eq!(fits(GB, 3 * GB, None), Ok(()));
        let why = fits(GB, 2 * GB, Some(2 * GB)).unwrap_err();
        assert!(why.contains("disk"), "{why}");
        let why = fits(GB, 3 * GB, Some(GB)).unwrap_err();
        assert!(why.contains("memory"), "{why}");
    }

    #[test]
    fn a_count_may_differ_by_what_was_written_meanwhile_and_no_more() {
        let copied = Copied {
            bytes: 1,
            keys: 100,
            tolerance: 2,
        };
        assert!(copied.is(98) && copied.is(102));
        assert!(!copied.is(97) && !copied.is(103));
    }

    #[test]
    fn a_node_that_writes_another_file_is_waited_for() {
        assert!(is_busy("ERR Background save already in progress"));
        assert!(is_busy(
            "ERR Another child process is active (AOF?): can't BGSAVE right now. Use BGSAVE SCHEDULE \
             in order to schedule a BGSAVE whenever possible."
        ));
        assert!(!is_busy(
            "NOPERM this user has no permissions to run the 'bgsave' command"
        ));
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:  8 kB\nMemFree: 1 kB\nMemAvailable:    4096 kB\n";
        assert_eq!(available(text), Some(4 << 20));
        assert_eq!(available(""), None);
    }
}
