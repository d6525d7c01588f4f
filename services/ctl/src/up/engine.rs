//! Finds the redis-server or valkey-server that `--engine` means.
//!
//! A name with a slash is a path and nothing else; a version is looked up in `.engines`
//! directories; nothing at all is what PATH has. Links are not followed: on Debian redis-server is a
//! link to redis-check-rdb, and the program decides by its name what it is.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, time::timeout};

use crate::failure::Failure;

/// It only prints a line; a loaded machine may take a while to load the program.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

const BINARIES: [&str; 2] = ["redis-server", "valkey-server"];

/// The binary that an `--engine` value means; the empty value means the one on PATH.
///
/// # Errors
/// [`Failure::RefusedHere`] that says where was looked and how to get engines.
pub fn find(wanted: &str) -> Result<PathBuf, Failure> {
    if wanted.is_empty() {
        return on_path(&env::var_os("PATH").unwrap_or_default()).ok_or_else(|| {
            Failure::RefusedHere(
                "there is no redis-server on PATH; install the package redis-server, or give --engine PATH"
                    .to_owned(),
            )
        });
    }
    if wanted.contains('/') {
        let path = Path::new(wanted);
        return match std::path::absolute(path) {
            Ok(path) if is_program(&path) => Ok(path),
            Ok(_) => Err(Failure::RefusedHere(format!(
                "engine {wanted} is not an executable file"
            ))),
            Err(error) => Err(Failure::RefusedHere(format!("engine {wanted}: {error}"))),
        };
    }
    let dirs = engine_dirs();
    find_version(wanted, &dirs).ok_or_else(|| {
        let mut known: Vec<String> = dirs.iter().flat_map(|d| names_in(d)).collect();
        known.sort();
        known.dedup();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        Failure::RefusedHere(format!(
            "engine {wanted} is not here (known: {known}); deploy/engines/fetch brings engines to .engines, \
             SLOTMESH_ENGINES names another directory, and a path with a slash is taken as it is"
        ))
    })
}

/// Runs the engine's `--version`, so that a wrong program is found before anything is started.
///
/// # Errors
/// [`Failure::RefusedHere`] when it is no Redis or Valkey server that runs here.
pub async fn version(program: &Path) -> Result<String, Failure> {
    let refused = |why: String| {
        Failure::RefusedHere(format!("engine {} can't be used: {why}", program.display()))
    };
    let mut command = Command::new(program);
    command
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = match timeout(VERSION_TIMEOUT, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(refused(error.to_string())),
        Err(_) => return Err(refused(format!("no --version after {VERSION_TIMEOUT:?}"))),
    };
    // "Redis server v=7.0.15 sha=… ", "Valkey server v=8.0.2 …"
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said
        .split_whitespace()
        .find_map(|word| word.strip_prefix("v="));
    match version {
        Some(version) => Ok(version.to_owned()),
        None => {
            let error = String::from_utf8_lossy(&output.stderr);
            let line = error
                .lines()
                .chain(said.lines())
                .next()
                .unwrap_or("nothing")
                .to_owned();
            Err(refused(format!("its --version says: {line}")))
        }
    }
}

/// What a shape remembers of `--engine`: a path made absolute, anything else as it is.
pub fn normalized(wanted: &str) -> String {
    if !wanted.contains('/') {
        return wanted.to_owned();
    }
    let absolute = std::path::absolute(wanted).unwrap_or_else(|_| PathBuf::from(wanted));
    absolute.display().to_string()
}

fn find_version(wanted: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    for dir in dirs {
        let mut names = names_in(dir);
        // The newest of several that start alike, as far as the order of names shows it.
        names.sort_by(|a, b| b.cmp(a));
        let exact = names
            .iter()
            .find(|n| *n == wanted || **n == format!("redis-{wanted}"));
        let starts = format!("redis-{wanted}.");
        let named = format!("{wanted}.");
        let alike = || {
            names
                .iter()
                .find(|n| n.starts_with(&starts) || n.starts_with(&named))
        };
        if let Some(program) = exact
            .or_else(alike)
            .and_then(|name| program_in(&dir.join(name)))
        {
            return Some(program);
        }
    }
    None
}

fn engine_dirs() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = env::var_os("SLOTMESH_ENGINES")
        .map(PathBuf::from)
        .into_iter()
        .collect();
    if let Ok(cwd) = env::current_dir() {
        dirs.push(cwd.join(".engines"));
    }
    if let Ok(program) = env::current_exe() {
        dirs.extend(program.ancestors().skip(1).map(|d| d.join(".engines")));
    }
    dirs
}

fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let dirs = entries
        .flatten()
        .filter(|e| program_in(&e.path()).is_some());
    dirs.filter_map(|e| e.file_name().into_string().ok())
        .collect()
}

fn program_in(dir: &Path) -> Option<PathBuf> {
    let places = BINARIES
        .iter()
        .flat_map(|b| [dir.join(b), dir.join("bin").join(b)]);
    places
        .filter_map(|p| std::path::absolute(p).ok())
        .find(|p| is_program(p))
}

fn on_path(path: &OsStr) -> Option<PathBuf> {
    let mut places = BINARIES
        .iter()
        .flat_map(|b| env::split_paths(path).map(move |dir| dir.join(b)));
    places.find(|p| p.is_absolute() && is_program(p))
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engines(names: &[&str]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let home = dir.path().join(name);
            fs::create_dir_all(&home).unwrap();
            let program = home.join("redis-server");
            fs::write(&program, "#!/bin/sh\n").unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let dirs = vec![dir.path().to_owned()];
        (dir, dirs)
    }

    #[test]
    fn a_version_is_found_by_its_short_and_its_long_name() {
        let (_dir, dirs) = engines(&["redis-6.2", "redis-7.0", "valkey-8.0"]);
        for (wanted, found) in [
            ("7.0", "redis-7.0"),
            ("redis-6.2", "redis-6.2"),
            ("valkey-8", "valkey-8.0"),
            ("6", "redis-6.2"),
        ] {
            let program = find_version(wanted, &dirs).unwrap_or_else(|| panic!("{wanted}"));
            assert!(
                program.ends_with(format!("{found}/redis-server")),
                "{wanted}: {program:?}"
            );
        }
        assert_eq!(find_version("9", &dirs), None);
    }

    #[tokio::test]
    async fn a_program_that_is_no_engine_is_refused_with_what_it_said() {
        let refused = version(Path::new("/bin/sh")).await.unwrap_err().to_string();
        assert!(
            refused.contains("engine /bin/sh can't be used"),
            "{refused}"
        );
        let (_dir, dirs) = engines(&["redis-7.0"]);
        let program = find_version("7.0", &dirs).unwrap();
        fs::write(&program, "#!/bin/sh\necho Redis server v=7.0.15 sha=0\n").unwrap();
        assert_eq!(version(&program).await.unwrap(), "7.0.15");
    }

    #[test]
    fn a_path_must_be_a_program() {
        let (dir, _) = engines(&["redis-7.0"]);
        let program = dir.path().join("redis-7.0/redis-server");
        assert!(find(program.to_str().unwrap()).is_ok());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(find(program.to_str().unwrap()).is_err());
        assert!(find("/nonexistent/redis-server").is_err());
    }
}
