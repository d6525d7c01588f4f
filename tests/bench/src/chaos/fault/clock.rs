//! Clocks of a place that show another time than those of the others.
//!
//! Its processes run with `libfaketime`, which reads what to show from a file. Engines run without it:
//! with their allocator it does not start.
//!
//! Invariant: only what tells the time of day is bent; time that passes does not, for no kernel lets
//! that jump. What is written here is back at the truth before a fault ends.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use tokio::time::sleep;

/// Where the distribution has it.
const LIBRARIES: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
];
/// The programs look into the file so often.
const NOTICED: Duration = Duration::from_millis(1_100);
const TRUTH: &str = "+0";

/// How a clock is bent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bend {
    /// An hour ahead.
    Ahead,
    /// An hour behind.
    Behind,
    /// It goes at half the speed.
    Slow,
}

fn file(dir: &Path) -> PathBuf {
    dir.join("clock")
}

/// The environment of a place's processes; none where the library is not installed.
///
/// # Errors
/// When the place's directory can't be written.
pub(crate) fn environment(dir: &Path) -> anyhow::Result<Vec<(&'static str, String)>> {
    let Some(library) = LIBRARIES.iter().find(|l| Path::new(l).exists()) else {
        return Ok(Vec::new());
    };
    let clock = file(dir);
    if !clock.exists() {
        std::fs::write(&clock, TRUTH)?;
    }
    Ok(vec![
        ("LD_PRELOAD", (*library).to_owned()),
        ("FAKETIME_TIMESTAMP_FILE", clock.display().to_string()),
        ("FAKETIME_CACHE_DURATION", "1".to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("NO_FAKE_STAT", "1".to_owned()),
        ("PATH", engines_without(dir)?),
    ])
}

/// A search path in which the engine's name is one that runs without the library.
fn engines_without(dir: &Path) -> anyhow::Result<String> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = std::env::var("PATH").unwrap_or_default();
    let name = "redis-server";
    let own = dir.join("bin");
    let engine = std::env::split_paths(&path)
        .map(|p| p.join(name))
        .find(|p| p.exists())
        .context("no redis-server in PATH")?;
    std::fs::create_dir_all(&own)?;
    let script = own.join(name);
    let text = format!(
        "#!/bin/sh\nunset LD_PRELOAD\nexec {} \"$@\"\n",
        engine.display()
    );
    if std::fs::read_to_string(&script).is_ok_and(|old| old == text) {
        return Ok(format!("{}:{path}", own.display()));
    }
    // Never written where it is: somebody may be about to run it.
    let new = own.join("new");
    std::fs::write(&new, text)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755))?;
    std::fs::rename(&new, &script)?;
    Ok(format!("{}:{path}", own.display()))
}

/// Bends the clock of a place, and sets it right again.
///
/// # Errors
/// When its processes do not run with the library.
pub(super) async fn bend(dir: &Path, bend: Bend, lasts: Duration) -> anyhow::Result<()> {
    let clock = file(dir);
    anyhow::ensure!(
        clock.exists(),
        "clocks are true: libfaketime is not installed (package faketime)"
    );
    let shows = match bend {
        Bend::Ahead => "+3600",
        Bend::Behind => "-3600",
        Bend::Slow => "+0 x0.5",
    };
    replace(&clock, shows)?;
    sleep(lasts.max(NOTICED)).await;
    replace(&clock, TRUTH)?;
    sleep(NOTICED).await;
    Ok(())
}

/// A reader sees the old or the new one whole.
fn replace(file: &Path, text: &str) -> anyhow::Result<()> {
    let new = file.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, file).context("set a clock")
}
