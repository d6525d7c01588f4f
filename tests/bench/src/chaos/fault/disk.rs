//! A disk for each place, so that it can be full, or stand still, without the others noticing.
//!
//! Invariant: it is a file with a file system in it, seen only within the run's own namespace of
//! mounts; a disk that stands still goes on by itself, even if this program is gone by then.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use anyhow::Context as _;
use tokio::time::sleep;

use super::super::net::run;

/// Sparse: only what is written takes room.
const BYTES: u64 = 4 << 30;
/// Less than this is full: no journal and no file of an engine fits.
const FULL: u64 = 64 << 10;
/// Tries to fill it to the last block.
const FILLS_MAX: u32 = 60;

/// Makes a disk for a directory, and mounts it there.
///
/// # Errors
/// When the kernel has no loop devices for us.
pub(crate) fn mount(dir: &Path) -> anyhow::Result<()> {
    let image = dir.with_extension("disk");
    std::fs::create_dir_all(dir)?;
    std::fs::File::create(&image)?.set_len(BYTES)?;
    run(Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-E", "lazy_itable_init=1"])
        .arg(&image))?;
    run(Command::new("mount")
        .args(["-o", "loop"])
        .arg(&image)
        .arg(dir))?;
    Ok(())
}

/// Takes a disk away, with whatever is still open on it. What was on it is there afterwards, for
/// whoever wants to know what happened.
pub(crate) fn unmount(dir: &Path) {
    let (kept, image) = (dir.with_extension("kept"), dir.with_extension("disk"));
    // Where something fails, less is left to read; the run's directory goes all the same.
    let _ = run(Command::new("cp").arg("-r").arg(dir).arg(&kept));
    if run(Command::new("umount").arg("--lazy").arg(dir)).is_ok() {
        let _ = std::fs::remove_dir(dir);
        let _ = std::fs::rename(&kept, dir);
    }
    let _ = std::fs::remove_file(&image);
}

fn ensure_own(dir: &Path) -> anyhow::Result<()> {
    let mut ask = Command::new("mountpoint");
    run(ask.arg("-q").arg(dir)).context("this place has no disk of its own")?;
    Ok(())
}

/// Leaves no room on a place's disk for a while.
///
/// # Errors
/// When it can't be filled; then it is as before.
pub(super) async fn fill(dir: &Path, lasts: Duration) -> anyhow::Result<()> {
    ensure_own(dir)?;
    let ballast = dir.join("ballast");
    std::fs::create_dir_all(&ballast)?;
    let filled = fill_up(dir, &ballast);
    if filled.is_ok() {
        sleep(lasts).await;
    }
    std::fs::remove_dir_all(&ballast).context("make room again")?;
    filled
}

fn fill_up(dir: &Path, ballast: &Path) -> anyhow::Result<()> {
    let mut size = u64::MAX;
    for number in 0..FILLS_MAX {
        let room = rustix::fs::statvfs(dir)?;
        let room = room.f_bavail * room.f_frsize;
        if room < FULL {
            break;
        }
        size = size.min(room);
        let mut fill = Command::new("fallocate");
        fill.arg("-l").arg(size.to_string());
        if run(fill.arg(ballast.join(number.to_string()))).is_err() {
            size = (size / 2).max(FULL);
        }
    }
    Ok(())
}

/// Lets every write to a place's disk wait for a while.
///
/// # Errors
/// When it can't be.
pub(super) async fn stall(dir: &Path, lasts: Duration) -> anyhow::Result<()> {
    ensure_own(dir)?;
    let mut thaw = freeze(dir, lasts)?;
    let ended = tokio::task::spawn_blocking(move || thaw.wait()).await??;
    anyhow::ensure!(ended.success(), "a disk was not thawed: {ended}");
    Ok(())
}

/// In a session of its own, which goes on when somebody interrupts this program.
fn freeze(dir: &Path, lasts: Duration) -> anyhow::Result<Child> {
    let script = "trap '' INT TERM HUP; fsfreeze -f \"$1\" && sleep \"$2\"; fsfreeze -u \"$1\"";
    Command::new("setsid")
        .args(["--wait", "sh", "-c", script, "sh"])
        .arg(dir)
        .arg(lasts.as_secs_f32().to_string())
        .spawn()
        .context("freeze a disk")
}

/// Spoils the files of a node that does not run.
///
/// # Errors
/// When they can't be written.
pub(super) fn spoil(node: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let mut spoiled = 0;
    for path in data(node)? {
        let file = std::fs::File::options().write(true).open(&path)?;
        let length = file.metadata()?.len();
        if length > 0 {
            // In the middle: at its end it would pass for a write that was under way.
            file.write_all_at(&[0xa5; 64], length / 2)?;
            spoiled += 1;
        }
    }
    anyhow::ensure!(spoiled > 0, "it has no data");
    Ok(())
}

/// Removes what a node keeps.
///
/// # Errors
/// When something can't be removed.
pub(super) fn wipe(node: &Path) -> anyhow::Result<()> {
    for path in data(node)? {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", path.display()));
            }
            _ => {}
        }
    }
    // Its manifest is gone, so the directory would only be in the way.
    let _ = std::fs::remove_dir_all(node.join("appendonlydir"));
    Ok(())
}

/// Snapshots and append-only files of a node.
fn data(node: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for dir in [node.to_owned(), node.join("appendonlydir")] {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        let paths = entries.flatten().map(|e| e.path());
        found.extend(paths.filter(|p| is_data(p)));
    }
    Ok(found)
}

fn is_data(path: &Path) -> bool {
    let kind = path.extension().and_then(|e| e.to_str());
    path.is_file() && matches!(kind, Some("rdb" | "aof"))
}
