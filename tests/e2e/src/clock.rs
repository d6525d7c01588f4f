//! The programs under test, the controller with another time of day than the machine's.
//!
//! Only the controller's is bent, since only it decides by the time of day; what it measures (the
//! monotonic clock) stays as it is. libfaketime, a package of the distribution, does it.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use slotmesh_harness::programs;
use tempfile::TempDir;

const CONTROLLER: &str = "slotmesh-controller";
const OTHERS: [&str; 3] = ["slotmesh", "slotmesh-agent", "slotmesh-proxy"];

/// A directory of programs whose controller reads how far its clock is off from a file.
#[derive(Debug)]
pub struct Bent {
    directory: TempDir,
}

impl Bent {
    /// The programs, with a clock that is off by so many seconds.
    ///
    /// # Errors
    /// When the programs or faketime are not there.
    pub fn install(seconds: i64) -> anyhow::Result<Self> {
        let bent = Self {
            directory: tempfile::tempdir()?,
        };
        bent.show(seconds)?;
        let own = programs::directory()?;
        for program in OTHERS {
            let (from, to) = (own.join(program), bent.program(program));
            // Not there on another file system.
            if fs::hard_link(&from, &to).is_err() {
                fs::copy(&from, &to)?;
            }
        }
        let text = format!(
            "#!/bin/sh\nexport LD_PRELOAD='{}' FAKETIME_TIMESTAMP_FILE='{}'\n\
             export FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1\n\
             exec '{}' \"$@\"\n",
            library()?,
            bent.file().display(),
            own.join(CONTROLLER).display()
        );
        fs::write(bent.program(CONTROLLER), text)?;
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(bent.program(CONTROLLER), executable)?;
        Ok(bent)
    }

    /// From now on the clock is off by so many seconds.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn show(&self, seconds: i64) -> anyhow::Result<()> {
        // Whole, so that nobody reads half of it.
        let new = self.file().with_extension("new");
        fs::write(&new, format!("{seconds:+}"))?;
        Ok(fs::rename(new, self.file())?)
    }

    /// Where the programs are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// One of the programs, such as `slotmesh`.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    fn file(&self) -> PathBuf {
        self.directory().join("clock")
    }
}

/// What the program has the loader put before a process's own clock.
fn library() -> anyhow::Result<String> {
    let mut shown = Command::new("faketime");
    let shown = shown.args(["-m", "-f", "+0s", "sh", "-c", "printf %s \"$LD_PRELOAD\""]);
    let shown = shown.output().context("faketime (package faketime)")?;
    Ok(String::from_utf8(shown.stdout)?)
}
