//! From the name of an engine to a binary that runs and a version.
//!
//! A name is one that the operator of this host has declared, a path, or an artifact of the mesh's
//! catalogue, such as redis-7.0.15.
//!
//! Invariant: what is returned has answered `--version` on this host, so a missing library or a
//! wrong architecture is found before a node is touched.

pub mod catalogue;
mod fetch;

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

pub use slotmesh_topology::artifact::Version;
use slotmesh_topology::artifact::{Product, parse_name};
use tokio::{process::Command, time::timeout};

use self::catalogue::Catalogue;

/// A binary that needs longer to print its version is not going to serve.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error(
        "engine {name:?} is unknown on this host: add it to the catalogue and name it as that says \
         (such as redis-7.0.15), or start the agent with --engine {name}=PATH"
    )]
    Unknown { name: String },
    #[error("no artifact {name} is listed: add it (slotmesh artifact add)")]
    NotListed { name: String },
    #[error("no controller says what {name} is, and this host has no copy of it")]
    Unreachable { name: String },
    #[error("artifact {name}: {why}")]
    Refused { name: String, why: String },
    #[error(
        "engine {name:?}: no {binary} on PATH: install it, or start the agent with --engine-default PATH"
    )]
    NotOnPath { name: String, binary: String },
    #[error("program {path} does not run: {why}")]
    DoesNotRun { path: PathBuf, why: String },
}

/// An engine binary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    pub path: PathBuf,
    pub version: Version,
}

/// Since when engines differ in what the agent asks of them.
pub const REDIS_7_0: Version = Version {
    major: 7,
    minor: 0,
    patch: 0,
};
/// See above.
pub const REDIS_7_2: Version = Version {
    major: 7,
    minor: 2,
    patch: 0,
};

/// From what `--version` prints, of engines and of our own programs.
pub fn parse_version(text: &str) -> Option<(Product, Version)> {
    let mut words = text.split_ascii_whitespace();
    let product = match words.next()? {
        "Redis" => Product::Redis,
        "Valkey" => Product::Valkey,
        "slotmesh-proxy" => return Some((Product::Proxy, number(words.next()?)?)),
        _ => return None,
    };
    Some((product, engine_version(text)?))
}

/// From what an engine prints, whosever it is.
fn engine_version(text: &str) -> Option<Version> {
    let mut words = text.split_ascii_whitespace();
    number(words.find_map(|w| w.strip_prefix("v="))?)
}

/// From what a proxy's program prints.
fn proxy_version(text: &str) -> Option<Version> {
    let (product, version) = parse_version(text)?;
    (product == Product::Proxy).then_some(version)
}

/// What a process is that runs already, whatever has become of its file; `None`: no proxy of ours.
pub async fn proxy_process_version(pid: u32) -> Option<Version> {
    let program = PathBuf::from(format!("/proc/{pid}/exe"));
    said(&program, proxy_version).await.ok()
}

/// From `7.0.15`, `7.0` or `8.0.0-rc1`, as engines say of themselves.
pub fn number(word: &str) -> Option<Version> {
    let mut parts = word.split(['.', '-']);
    let mut next = || parts.next()?.parse().ok();
    Some(Version {
        major: next()?,
        minor: next()?,
        patch: next().unwrap_or(0),
    })
}

/// What the operator told the agent about engines.
#[derive(Debug)]
pub struct Engines {
    default: String,
    named: BTreeMap<String, PathBuf>,
    catalogue: Option<Arc<Catalogue>>,
}

impl Engines {
    pub fn new(default: String, named: BTreeMap<String, PathBuf>) -> Self {
        Self {
            default,
            named,
            catalogue: None,
        }
    }

    /// With the mesh's catalogue for names that this host's operator has not declared.
    #[must_use]
    pub fn with_catalogue(self, catalogue: Arc<Catalogue>) -> Self {
        Self {
            catalogue: Some(catalogue),
            ..self
        }
    }

    /// Names that a node may ask for.
    pub fn names(&self) -> Vec<String> {
        let mut names = vec![self.default.clone()];
        names.extend(self.named.keys().filter(|n| **n != self.default).cloned());
        names
    }

    /// Finds the binary of `name` (empty: the default) and asks it for its version.
    pub async fn resolve(&self, name: &str) -> Result<Engine, ArtifactError> {
        let path = match (&self.catalogue, self.listed_name(name)) {
            (Some(catalogue), Some(listed)) => catalogue.provide(listed).await?,
            _ => self.locate(name)?,
        };
        let version = said(&path, engine_version).await?;
        Ok(Engine { path, version })
    }

    /// As [`Self::resolve`], of a proxy: an artifact's name, or nothing for the program at `own`.
    pub async fn resolve_proxy(&self, name: &str, own: &Path) -> Result<Engine, ArtifactError> {
        let refused = |why: &str| ArtifactError::Refused {
            name: name.to_owned(),
            why: why.to_owned(),
        };
        let is_proxy = parse_name(name).is_some_and(|(product, _)| product == Product::Proxy);
        let path = match (&self.catalogue, name) {
            (_, "") => own.to_owned(),
            _ if !is_proxy => return Err(refused("it is no proxy")),
            (Some(catalogue), _) => catalogue.provide(name).await?,
            (None, _) => return Err(ArtifactError::NotListed { name: name.into() }),
        };
        let version = said(&path, proxy_version).await?;
        Ok(Engine { path, version })
    }

    /// The artifact that is meant, if it is one.
    fn listed_name<'a>(&self, name: &'a str) -> Option<&'a str> {
        let declared = self.named.contains_key(name) || name == self.default;
        let is_engine = parse_name(name).is_some_and(|(product, _)| product.is_engine());
        (is_engine && !declared).then_some(name)
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

/// What `read` finds in the program's own words.
async fn said<T>(path: &Path, read: fn(&str) -> Option<T>) -> Result<T, ArtifactError> {
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
    read(&text).ok_or_else(|| {
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
        let of = |text| parse_version(text).map(|(p, v)| (p, v.to_string()));
        assert_eq!(of(redis), Some((Product::Redis, "7.0.15".into())));
        assert_eq!(of(valkey), Some((Product::Valkey, "8.0.1".into())));
        assert_eq!(
            of("slotmesh-proxy 0.1.0\n"),
            Some((Product::Proxy, "0.1.0".into()))
        );
        assert_eq!(of("cat (GNU coreutils) 9.1"), None);
        let other = "KeyDB server v=6.3.4 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64";
        assert_eq!((of(other), engine_version(other)), (None, number("6.3.4")));
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
