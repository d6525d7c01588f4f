//! Programs of the mesh's catalogue that are on this host, several versions side by side.
//!
//! Invariant: a program is in its place (`artifacts/NAME/SHA256/program`) only after its sum was
//! right and it said of itself, on this host, that it is what the catalogue says. What a process was
//! started from stays for as long as that process may be started again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use slotmesh_proto::artifact::v1::{
    self as api, ListArtifactsRequest, artifact_service_client::ArtifactServiceClient,
};
use slotmesh_topology::{artifact::Artifact, wire};
use tokio::{
    sync::Mutex,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{ArtifactError, fetch, parse_version, said};
use crate::{controllers::Controllers, handover::driver::chain, node::files::make_private_dir};

/// Of one controller; there are others, and the host's own copy.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two looks at what nobody needs any more.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// How long a listed program is kept after its last use: the longest bake, and a day. The engine that
/// an upgrade goes back to, and the one that it has staged and only then bakes, are there until it is
/// over, also when their source is not.
const UNUSED_MAX: Duration = Duration::from_secs(8 * 24 * 3600);
/// After a failure the same program is not fetched again for so long, so that a node that is tried
/// again every few seconds does not load the source.
const FAILURE_MEMORY: Duration = Duration::from_secs(15);
/// Names whose failure is remembered.
const FAILURES_MAX: usize = 64;
const PROGRAM: &str = "program";
/// What the names begin with of directories that programs are fetched into.
const FETCH: &str = ".fetch-";

/// See the module.
#[derive(Debug)]
pub struct Catalogue {
    dir: PathBuf,
    controllers: Controllers,
    /// One fetch at a time: hosts have one disk and one network, and two nodes often want the same.
    failures: Mutex<BTreeMap<String, (Instant, String)>>,
}

/// What the controllers say of a name.
enum Listed {
    As(Box<Artifact>),
    Not,
    /// None of them answered.
    Unknown,
}

impl Catalogue {
    /// Over the programs in this directory.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new(dir: PathBuf, controllers: Controllers) -> io::Result<Self> {
        make_private_dir(&dir)?;
        Ok(Self {
            dir,
            controllers,
            failures: Mutex::default(),
        })
    }

    /// Where the program of this name is, after it was fetched if need be. Without a controller to
    /// ask, what is here already is used.
    pub async fn provide(&self, name: &str) -> Result<PathBuf, ArtifactError> {
        let artifact = match self.ask(name).await {
            Listed::As(artifact) => artifact,
            Listed::Not => return Err(ArtifactError::NotListed { name: name.into() }),
            Listed::Unknown => {
                return newest(&self.dir.join(name))
                    .ok_or_else(|| ArtifactError::Unreachable { name: name.into() });
            }
        };
        let mut failures = self.failures.lock().await;
        let sum = hex::encode(artifact.sha256);
        // The same sum under another name fails for another reason.
        let tried = format!("{name}/{sum}");
        if let Some((when, why)) = failures.get(&tried)
            && when.elapsed() < FAILURE_MEMORY
        {
            return Err(ArtifactError::Refused {
                name: name.into(),
                why: why.clone(),
            });
        }
        let provided = self.stage(&artifact, &sum).await;
        match provided {
            Ok(path) => {
                failures.remove(&tried);
                Ok(path)
            }
            Err(why) => {
                if failures.len() >= FAILURES_MAX {
                    failures.clear();
                }
                failures.insert(tried, (Instant::now(), why.clone()));
                tracing::warn!(artifact = name, why, "artifact refused");
                Err(ArtifactError::Refused {
                    name: name.into(),
                    why,
                })
            }
        }
    }

    async fn stage(&self, artifact: &Artifact, sum: &str) -> Result<PathBuf, String> {
        let name = artifact.name();
        let place = self.dir.join(&name).join(sum);
        let program = place.join(PROGRAM);
        if program.exists() {
            mark(&place, SystemTime::now());
            return Ok(program);
        }
        let fresh = self.dir.join(format!("{FETCH}{name}"));
        let path = |e: io::Error| format!("write {}: {e}", fresh.display());
        // Of an agent that died at it.
        remove(&fresh).map_err(path)?;
        make_private_dir(&fresh).map_err(path)?;
        let staged = self.check(artifact, &fresh).await.and_then(|()| {
            make_private_dir(&self.dir.join(&name)).map_err(path)?;
            fs::rename(&fresh, &place).map_err(path)
        });
        if staged.is_err() {
            let _ = remove(&fresh);
        }
        staged?;
        tracing::info!(artifact = %name, source = %artifact.source, "artifact staged");
        Ok(program)
    }

    /// Fetches, and lets the program say what it is.
    async fn check(&self, artifact: &Artifact, fresh: &Path) -> Result<(), String> {
        let to = fresh.join(PROGRAM);
        let fetched = {
            let (source, sum, to) = (artifact.source.clone(), artifact.sha256, to.clone());
            spawn_blocking(move || fetch::fetch(&source, &sum, &to)).await
        };
        match fetched {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(chain(&error)),
            Err(error) => return Err(error.to_string()),
        }
        let (product, version) = said(&to, parse_version).await.map_err(|e| chain(&e))?;
        if (product, version) == (artifact.product, artifact.version) {
            return Ok(());
        }
        Err(format!(
            "it says of itself that it is {}-{version}: add it as that",
            product.name()
        ))
    }

    async fn ask(&self, name: &str) -> Listed {
        let Some(listed) = self.list(name).await else {
            return Listed::Unknown;
        };
        let artifacts = listed.into_iter();
        let mut artifacts = artifacts.filter_map(|a| wire::artifact::from_message(a).ok());
        match artifacts.find(|a| a.name() == name) {
            Some(artifact) => Listed::As(Box::new(artifact)),
            None => Listed::Not,
        }
    }

    /// From whichever controller answers first.
    async fn list(&self, name: &str) -> Option<Vec<api::Artifact>> {
        for address in self.controllers.addresses() {
            let Ok(channel) = self.controllers.channel(&address) else {
                continue;
            };
            let request = ListArtifactsRequest { name: name.into() };
            let mut client = ArtifactServiceClient::new(channel);
            if let Ok(Ok(answer)) = timeout(ASK_TIMEOUT, client.list_artifacts(request)).await {
                return Some(answer.into_inner().artifacts);
            }
        }
        None
    }

    /// Removes, every now and then, what is no longer listed or was not used for long. `used` are the
    /// names that nodes of this host are made of.
    pub async fn keep_clean(
        &self,
        used: impl Fn() -> BTreeSet<String> + Send + Sync,
        stop: CancellationToken,
    ) {
        loop {
            // Without a controller too: an exchange that makes one unused may be the next thing.
            mark_used(&self.dir, &used(), SystemTime::now());
            tokio::select! {
                () = sleep(SWEEP_EVERY) => {}
                () = stop.cancelled() => return,
            }
            let Some(listed) = self.list("").await else {
                continue;
            };
            // Nothing is staged while this holds.
            let _one = self.failures.lock().await;
            let listed: BTreeMap<_, _> = listed.into_iter().map(|a| (a.name, a.sha256)).collect();
            if let Err(error) = sweep(&self.dir, &listed, &used(), SystemTime::now()) {
                tracing::warn!(%error, "unused artifacts not removed");
            }
        }
    }
}

/// For the sweep: what is used now is unused from now on at the earliest, however long ago its process
/// was started.
fn mark_used(dir: &Path, used: &BTreeSet<String>, now: SystemTime) {
    let programs = used.iter().filter(|name| !name.is_empty());
    let programs = programs.filter_map(|name| newest(&dir.join(name)));
    for place in programs.filter_map(|p| p.parent().map(Path::to_owned)) {
        if place.starts_with(dir) {
            mark(&place, now);
        }
    }
}

fn mark(place: &Path, now: SystemTime) {
    let _ = fs::File::open(place).and_then(|f| f.set_modified(now));
}

/// Removes programs that no node is made of and that are not listed, or unused for long, and what is
/// left of fetches that were cut short. Nothing may be fetched meanwhile.
fn sweep(
    dir: &Path,
    listed: &BTreeMap<String, String>,
    used: &BTreeSet<String>,
    now: SystemTime,
) -> io::Result<()> {
    for name in entries(dir)? {
        let (path, name) = (name.path(), name.file_name().to_string_lossy().into_owned());
        if name.starts_with(FETCH) {
            remove(&path)?;
            continue;
        }
        if used.contains(&name) || name.starts_with('.') {
            continue;
        }
        for place in entries(&path)? {
            let is_listed = listed.get(&name).map(String::as_str) == place.file_name().to_str();
            let age = place.metadata().and_then(|m| m.modified());
            let age = age.ok().and_then(|at| now.duration_since(at).ok());
            if is_listed && age.is_none_or(|age| age < UNUSED_MAX) {
                continue;
            }
            tracing::info!(artifact = %name, "unused artifact removed");
            remove(&place.path())?;
        }
        // Refused when something is left in it.
        let _ = fs::remove_dir(&path);
    }
    Ok(())
}

fn entries(dir: &Path) -> io::Result<Vec<fs::DirEntry>> {
    fs::read_dir(dir)?.collect()
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The program that was used last, of all that were ever listed by this name.
fn newest(dir: &Path) -> Option<PathBuf> {
    let places = entries(dir).ok()?.into_iter();
    let with_age = places.filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())));
    let (_, place) = with_age.max()?;
    Some(place.join(PROGRAM)).filter(|p| p.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_listed_or_used_stays_and_the_rest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, sum: &str| {
            let place = dir.path().join(name).join(sum);
            fs::create_dir_all(&place).unwrap();
            fs::write(place.join(PROGRAM), b"x").unwrap();
        };
        put("redis-7.0.15", "aa");
        put("redis-6.2.14", "bb");
        put("redis-8.2.3", "cc");
        put("redis-8.2.3", "dd");
        let listed = [("redis-7.0.15", "aa"), ("redis-8.2.3", "dd")];
        let listed = listed.map(|(n, s)| (n.to_owned(), s.to_owned())).into();
        let used = ["redis-6.2.14".to_owned()].into();
        let there = |name: &str, sum: &str| dir.path().join(name).join(sum).exists();
        let now = SystemTime::now();
        sweep(dir.path(), &listed, &used, now).unwrap();
        assert!(there("redis-7.0.15", "aa"), "it is listed");
        assert!(there("redis-6.2.14", "bb"), "a node is made of it");
        assert!(there("redis-8.2.3", "dd"), "it is listed with this sum");
        assert!(!there("redis-8.2.3", "cc"), "it is listed with another sum");
        sweep(dir.path(), &listed, &used, now + UNUSED_MAX).unwrap();
        assert!(!there("redis-7.0.15", "aa"), "nothing used it for long");
        assert!(there("redis-6.2.14", "bb"), "a node is made of it");
    }

    #[test]
    fn what_was_used_until_now_stays_for_as_long_as_an_upgrade_may_go_back() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("redis-7.0.15").join("aa");
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join(PROGRAM), b"x").unwrap();
        let listed = [("redis-7.0.15".to_owned(), "aa".to_owned())].into();
        let used = ["redis-7.0.15".to_owned(), String::new()].into();
        let started = SystemTime::now();
        mark(&place, started);
        // The node was started long ago, and now makes way for another engine.
        let exchanged = started + UNUSED_MAX * 2;
        mark_used(dir.path(), &used, exchanged);
        let longest_bake = Duration::from_secs(7 * 24 * 3600);
        let none = BTreeSet::new();
        sweep(dir.path(), &listed, &none, exchanged + longest_bake).unwrap();
        assert!(place.exists(), "an upgrade may go back to it");
        sweep(dir.path(), &listed, &none, exchanged + UNUSED_MAX).unwrap();
        assert!(!place.exists(), "nothing used it for long");
    }

    #[test]
    fn what_a_killed_agent_had_begun_to_fetch_goes() {
        let dir = tempfile::tempdir().unwrap();
        let begun = dir.path().join(format!("{FETCH}redis-7.0.15"));
        fs::create_dir_all(&begun).unwrap();
        fs::write(begun.join(PROGRAM), b"x").unwrap();
        let (listed, used) = (BTreeMap::new(), BTreeSet::new());
        sweep(dir.path(), &listed, &used, SystemTime::now()).unwrap();
        assert!(!begun.exists());
    }

    #[test]
    fn without_a_controller_the_newest_copy_is_used() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(newest(&dir.path().join("redis-7.0.15")), None);
        let place = dir.path().join("redis-7.0.15").join("aa");
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join(PROGRAM), b"x").unwrap();
        let found = newest(&dir.path().join("redis-7.0.15")).unwrap();
        assert_eq!(found, place.join(PROGRAM));
    }
}
