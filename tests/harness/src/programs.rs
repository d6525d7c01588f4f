//! Where the programs under test are, built from the sources that are there now.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context, bail};

const PACKAGES: [&str; 4] = [
    "slotmesh-ctl",
    "slotmesh-controller",
    "slotmesh-agent",
    "slotmesh-proxy",
];
const PROGRAMS: [&str; 4] = [
    "slotmesh",
    "slotmesh-controller",
    "slotmesh-agent",
    "slotmesh-proxy",
];

/// The directory that has all programs, in the profile of the running test.
///
/// They are built first, once in this process; `SLOTMESH_PROGRAMS` names a directory to use as it is.
///
/// # Errors
/// When they can't be built, or one of them is missing afterwards.
pub fn directory() -> anyhow::Result<PathBuf> {
    static DIRECTORY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = DIRECTORY.get_or_init(|| prepare().map_err(|error| format!("{error:#}")));
    found.clone().map_err(|error| anyhow::anyhow!(error))
}

/// One of the programs, such as `slotmesh`.
///
/// # Errors
/// As [`directory`].
pub fn path(program: &str) -> anyhow::Result<PathBuf> {
    Ok(directory()?.join(program))
}

fn prepare() -> anyhow::Result<PathBuf> {
    if let Some(given) = std::env::var_os("SLOTMESH_PROGRAMS") {
        return require_all(PathBuf::from(given));
    }
    let own = std::env::current_exe().context("find the running program")?;
    let dir = own
        .parent()
        .context("the running program is in no directory")?;
    let dir = if dir.ends_with("deps") {
        dir.parent().unwrap_or(dir)
    } else {
        dir
    };
    build(dir)?;
    require_all(dir.to_owned())
}

/// Builds what is out of date; does nothing where there is no cargo, as on a machine that only has
/// the built programs.
fn build(dir: &Path) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let known = cargo_is_there(&cargo) && root.join("Cargo.toml").is_file();
    // A program outside of a target directory was put there by somebody, with the others beside it.
    let profile = dir
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    if !known || !matches!(profile, "debug" | "release") {
        return Ok(());
    }
    let mut command = Command::new(cargo);
    command.arg("build").arg("--quiet").current_dir(root);
    command
        .args(PACKAGES.iter().flat_map(|p| ["-p", p]))
        .arg("--bins");
    if profile == "release" {
        command.arg("--release");
    }
    let output = command.output().context("run cargo build")?;
    if !output.status.success() {
        bail!(
            "cargo build of {PACKAGES:?}:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn cargo_is_there(cargo: &std::ffi::OsStr) -> bool {
    Command::new(cargo)
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success())
}

fn require_all(dir: PathBuf) -> anyhow::Result<PathBuf> {
    let missing: Vec<&&str> = PROGRAMS.iter().filter(|p| !dir.join(p).is_file()).collect();
    if !missing.is_empty() {
        bail!(
            "{missing:?} missing in {}; run cargo build --workspace",
            dir.display()
        );
    }
    Ok(dir)
}
