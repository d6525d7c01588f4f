//! From the name of an engine to a binary that runs and a version.
//!
//! Invariant: what is returned has answered `--version` on this host, so a missing library or a
//! wrong architecture is found before a node is touched.

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, time::timeout};

/// A binary that needs longer to print its version is not going to serve.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error("engine {name:?} is unknown on this host: start the agent with --engine {name}=PATH")]
    Unknown { name: String },
    #[error(
        "engine {name:?}: no {binary} on PATH: install it, or start the agent with --engine-default PATH"
    )]
    NotOnPath { name: String, binary: String },
    #[error("engine {path} does not run: {why}")]
    DoesNotRun { path: PathBuf, why: String },
}

/// An engine binary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    pub path: PathBuf,
    pub version: Version,
}

/// As the binary prints it. Valkey counts on from Redis 7.2, so both order alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl Version {
    pub const REDIS_7_0: Self = Self {
        major: 7,
        minor: 0,
        patch: 0,
    };

    pub const REDIS_7_2: Self = Self {
        major: 7,
        minor: 2,
        patch: 0,
    };

    /// From `redis-server --version` and its kin.
    pub fn parse(text: &str) -> Option<Self> {
        let word = text
            .split_ascii_whitespace()
            .find_map(|w| w.strip_prefix("v="))?;
        Self::parse_number(word)
    }

    /// From `7.0.15`.
    pub fn parse_number(word: &str) -> Option<Self> {
        let mut parts = word.split(['.', '-']);
        let mut next = || parts.next()?.parse().ok();
        Some(Self {
            major: next()?,
            minor: next()?,
            patch: next().unwrap_or(0),
        })
    }
}

/// What the operator told the agent about engines.
#[derive(Debug, Clone)]
pub struct Engines {
    default: String,
    named: BTreeMap<String, PathBuf>,
}

impl Engines {
    pub fn new(default: String, named: BTreeMap<String, PathBuf>) -> Self {
        Self { default, named }
    }

    /// Names that a node may ask for.
    pub fn names(&self) -> Vec<String> {
        let mut names = vec![self.default.clone()];
        names.extend(self.named.keys().filter(|n| **n != self.default).cloned());
        names
    }

    /// Finds the binary of `name` (empty: the default) and asks it for its version.
    pub async fn resolve(&self, name: &str) -> Result<Engine, ArtifactError> {
        let path = self.locate(name)?;
        let version = ask_version(&path).await?;
        Ok(Engine { path, version })
    }

    fn locate(&self, name: &str) -> Result<PathBuf, ArtifactError> {
        let name = if name.is_empty() { &self.default } else { name };
        if let Some(path) = self.named.get(name) {
            return Ok(path.clone());
        }
        if name.contains('/') {
            return Ok(PathBuf::from(name));
        }
        // A bare version or any other word must be declared; only the default may come from PATH.
        if name != self.default {
            return Err(ArtifactError::Unknown {
                name: name.to_owned(),
            });
        }
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .map(|dir| dir.join(name))
            .find(|candidate| is_executable(candidate))
            .ok_or_else(|| ArtifactError::NotOnPath {
                name: name.to_owned(),
                binary: name.to_owned(),
            })
    }
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

async fn ask_version(path: &Path) -> Result<Version, ArtifactError> {
    let failed = |why: String| ArtifactError::DoesNotRun {
        path: path.to_owned(),
        why,
    };
    let run = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(VERSION_TIMEOUT, run)
        .await
        .map_err(|_| failed("no answer to --version".to_owned()))?
        .map_err(|error| failed(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Version::parse(&text).ok_or_else(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        let last = error
            .lines()
            .last()
            .unwrap_or("it printed no version")
            .to_owned();
        failed(last)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_both_families_are_read() {
        let redis = "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64";
        let valkey = "Valkey server v=8.0.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64";
        assert_eq!(
            Version::parse(redis),
            Some(Version {
                major: 7,
                minor: 0,
                patch: 15
            })
        );
        assert_eq!(
            Version::parse(valkey),
            Some(Version {
                major: 8,
                minor: 0,
                patch: 1
            })
        );
        assert_eq!(Version::parse("cat (GNU coreutils) 9.1"), None);
    }

    #[tokio::test]
    async fn an_undeclared_engine_is_refused_with_the_flag_that_declares_it() {
        let engines = Engines::new("redis-server".into(), BTreeMap::new());
        let error = engines.resolve("valkey-8").await.unwrap_err().to_string();
        assert!(error.contains("--engine valkey-8=PATH"), "{error}");
        let error = engines.resolve("/bin/true").await.unwrap_err().to_string();
        assert!(error.contains("/bin/true"), "{error}");
    }
}
