//! The data directory of a mesh on one machine: what is in it, and whose it is.
//!
//! `mesh.json` holds what a restart must find unchanged: the shape, the ports, the instance. It is
//! replaced whole, by rename, so that a kill leaves the old or the new one.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{ErrorKind, Write},
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow};
use rand::Rng;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{EtcdArgs, Settings, control};
use crate::failure::Failure;

/// Version of the directory's format; raised when an older `slotmesh` could not use it.
pub(super) const SCHEMA: u64 = 1;

/// Below Linux's range for outgoing connections, so that none takes a port of ours between two
/// starts; above the ports that well-known services have.
const PORTS: std::ops::Range<u16> = 12_000..32_000;
/// Almost every try succeeds; this many failures mean that there is another cause.
const PORT_TRIES_MAX: u32 = 1_000;

/// `mesh.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MeshFile {
    pub(super) schema: u64,
    pub(super) mesh_id: String,
    #[serde(flatten)]
    pub(super) shape: Shape,
    pub(super) controller_port: u16,
    /// Of the second and later controllers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) more_controller_ports: Vec<u16>,
    /// How etcd was reached last.
    #[serde(default, skip_serializing_if = "EtcdArgs::is_empty")]
    pub(super) etcd: EtcdArgs,
    pub(super) agents: Vec<AgentPlace>,
    /// Client token with which the instance was, or will be, created.
    pub(super) instance_token: String,
    /// The instance, once it is known.
    pub(super) instance_id: Option<String>,
}

/// What can't change between two starts with the same directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) architecture: String,
    pub(super) shards: u32,
    pub(super) replicas: u32,
    pub(super) proxies: u32,
    pub(super) workers: u32,
    pub(super) engine: String,
    pub(super) store: String,
    /// Of the engines, as the instance was created.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) parameters: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AgentPlace {
    pub(super) host_id: String,
    pub(super) port: u16,
}

/// The directory, locked for this process until dropped.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) dir: PathBuf,
    pub(super) file: MeshFile,
    _lock: File,
}

impl Layout {
    /// Opens or makes the directory and locks it.
    ///
    /// # Errors
    /// Refused when another `slotmesh up` has it, when a newer version wrote it, when it is no data
    /// directory, or when the settings ask for another shape than it has.
    pub(super) fn open(settings: &Settings) -> Result<Self, Failure> {
        let dir = &settings.data;
        fs::create_dir_all(dir)
            .with_context(|| format!("make data directory {}", dir.display()))?;
        let dir = dir
            .canonicalize()
            .with_context(|| format!("find {}", dir.display()))?;
        let lock = lock(&dir)?;
        let file = match read_mesh_file(&dir)? {
            Some(mut file) => {
                file.accepts(settings, &dir)?;
                if file.has_new_access(settings)? {
                    write_mesh_file(&dir, &file)?;
                }
                file
            }
            None => {
                require_empty(&dir)?;
                let file = MeshFile::first(settings)?;
                write_mesh_file(&dir, &file)?;
                file
            }
        };
        let layout = Self {
            dir,
            file,
            _lock: lock,
        };
        for sub in control::dirs(&layout)
            .into_iter()
            .chain([layout.dir.join("logs")])
        {
            fs::create_dir_all(&sub).with_context(|| format!("make {}", sub.display()))?;
        }
        Ok(layout)
    }

    /// Keeps which instance is served.
    ///
    /// # Errors
    /// When the file can't be written.
    pub(super) fn keep_instance(
        &mut self,
        token: String,
        id: Option<String>,
    ) -> anyhow::Result<()> {
        if self.file.instance_token == token && self.file.instance_id == id {
            return Ok(());
        }
        self.file.instance_token = token;
        self.file.instance_id = id;
        write_mesh_file(&self.dir, &self.file)
    }

    /// Where a process of ours logs.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }

    /// The own directory of one simulated host's agent.
    pub(super) fn host_dir(&self, host_id: &str) -> PathBuf {
        self.dir.join("hosts").join(host_id)
    }

    /// Fails when somebody else listens where this mesh must.
    ///
    /// # Errors
    /// Names the port, whose it is, and where it is kept.
    pub(super) fn require_free_ports(&self) -> Result<(), Failure> {
        let ports = self.file.controller_ports().enumerate();
        let controllers = ports.map(|(index, port)| match index {
            0 => ("the controller".to_owned(), port),
            _ => (format!("controller {}", index + 1), port),
        });
        let agents = self
            .file
            .agents
            .iter()
            .map(|a| (format!("the agent of {}", a.host_id), a.port));
        for (whose, port) in controllers.chain(agents) {
            if let Err(error) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
                let file = self.dir.join("mesh.json");
                return Err(Failure::Local(anyhow!(
                    "port 127.0.0.1:{port} of {whose} can't be used: {error}; stop what listens there, \
                     or change the port in {} while the mesh is down",
                    file.display()
                )));
            }
        }
        Ok(())
    }
}

impl MeshFile {
    fn first(settings: &Settings) -> Result<Self, Failure> {
        let shape = Shape::from_settings(settings)?;
        let controllers = settings.controllers.unwrap_or(1);
        control::check(&shape.store, controllers, &settings.etcd)?;
        let hosts = shape.hosts();
        let mut ports = free_ports((hosts + controllers) as usize)?.into_iter();
        let mut next_port = || ports.next().ok_or_else(|| anyhow!("too few free ports"));
        let controller_port = next_port()?;
        let more_controller_ports = (1..controllers)
            .map(|_| next_port())
            .collect::<anyhow::Result<Vec<_>>>()?;
        let agents = (1..=hosts)
            .map(|n| {
                Ok(AgentPlace {
                    host_id: format!("host-{n}"),
                    port: next_port()?,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mesh_id = uuid::Uuid::now_v7().to_string();
        Ok(Self {
            schema: SCHEMA,
            instance_token: format!("up-{mesh_id}"),
            mesh_id,
            shape,
            controller_port,
            more_controller_ports,
            etcd: settings.etcd.clone().absolute()?,
            agents,
            instance_id: None,
        })
    }

    /// Of every controller.
    pub(super) fn controller_ports(&self) -> impl Iterator<Item = u16> {
        let more = self.more_controller_ports.iter().copied();
        std::iter::once(self.controller_port).chain(more)
    }

    fn accepts(&self, asked: &Settings, dir: &Path) -> Result<(), Failure> {
        let controllers = self.controller_ports().count();
        let count = u32::try_from(controllers).unwrap_or(u32::MAX);
        control::check(&self.shape.store, count, &asked.etcd)?;
        self.shape.accepts(asked, count, dir)
    }

    /// Takes over how etcd is reached from now on: passwords and certificates are renewed.
    fn has_new_access(&mut self, asked: &Settings) -> anyhow::Result<bool> {
        let next = asked.etcd.clone().absolute()?;
        let is_new = !next.is_empty() && next != self.etcd;
        if is_new {
            self.etcd = next;
        }
        Ok(is_new)
    }
}

impl Shape {
    fn from_settings(settings: &Settings) -> Result<Self, Failure> {
        let architecture = settings
            .architecture
            .clone()
            .unwrap_or_else(|| "cluster".to_owned());
        let standard = architecture == "standard";
        let shards = settings.shards.unwrap_or(if standard { 1 } else { 2 });
        if standard && shards != 1 {
            return Err(Failure::Usage(format!(
                "a standard instance has one shard, not {shards}; use --architecture cluster"
            )));
        }
        Ok(Self {
            architecture,
            shards,
            replicas: settings.replicas.unwrap_or(1),
            proxies: settings.proxies.unwrap_or(2),
            workers: settings.workers.unwrap_or(1),
            engine: settings.engine.clone().unwrap_or_default(),
            store: settings
                .store
                .clone()
                .unwrap_or_else(|| "embedded".to_owned()),
            parameters: settings.parameters.clone(),
        })
    }

    /// Simulated hosts: enough that no two nodes of a shard share one.
    pub(super) fn hosts(&self) -> u32 {
        (self.replicas + 1).max(3)
    }

    /// Refuses settings that ask for something else than the directory has.
    fn accepts(&self, asked: &Settings, controllers: u32, dir: &Path) -> Result<(), Failure> {
        let number = |n: Option<u32>| n.map(|n| n.to_string());
        let words = |all: &BTreeMap<String, String>| {
            let words: Vec<_> = all.iter().map(|(n, v)| format!("{n}={v}")).collect();
            words.join(" ")
        };
        let has_parameters = match words(&self.parameters) {
            words if words.is_empty() => "none".to_owned(),
            words => words,
        };
        let asked_parameters = words(&asked.parameters);
        let pairs = [
            (
                "architecture",
                &self.architecture,
                asked.architecture.clone(),
            ),
            ("shards", &self.shards.to_string(), number(asked.shards)),
            (
                "replicas",
                &self.replicas.to_string(),
                number(asked.replicas),
            ),
            ("proxies", &self.proxies.to_string(), number(asked.proxies)),
            ("workers", &self.workers.to_string(), number(asked.workers)),
            ("engine", &self.engine, asked.engine.clone()),
            ("store", &self.store, asked.store.clone()),
            (
                "controllers",
                &controllers.to_string(),
                number(asked.controllers),
            ),
            (
                "parameter",
                &has_parameters,
                Some(asked_parameters).filter(|asked| !asked.is_empty()),
            ),
        ];
        let conflicts: Vec<String> = pairs
            .into_iter()
            .filter_map(|(name, has, asked)| {
                let asked = asked.filter(|asked| asked != has)?;
                let has = if has.is_empty() {
                    "redis-server on PATH"
                } else {
                    has
                };
                Some(format!("--{name} {asked} (it has {has})"))
            })
            .collect();
        if conflicts.is_empty() {
            return Ok(());
        }
        Err(Failure::RefusedHere(format!(
            "{} holds a mesh of another shape: {}; leave these flags out to start it as it is, or use another directory",
            dir.display(),
            conflicts.join(", ")
        )))
    }
}

fn lock(dir: &Path) -> Result<File, Failure> {
    let path = dir.join("up.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Failure::RefusedHere(format!(
            "another `slotmesh up` runs with {}; stop it first, or use another directory",
            dir.display()
        ))),
        Err(error) => Err(Failure::Local(
            anyhow::Error::new(error).context(format!("lock {}", path.display())),
        )),
    }
}

fn read_mesh_file(dir: &Path) -> Result<Option<MeshFile>, Failure> {
    let path = dir.join("mesh.json");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(anyhow::Error::new(error)
                .context(format!("read {}", path.display()))
                .into());
        }
    };
    #[derive(Deserialize)]
    struct Versioned {
        schema: u64,
    }
    let unreadable =
        |error: serde_json::Error| Failure::RefusedHere(format!("{}: {error}", path.display()));
    let Versioned { schema } = serde_json::from_str(&text).map_err(unreadable)?;
    if schema > SCHEMA {
        return Err(Failure::RefusedHere(format!(
            "{} was written by a newer slotmesh (format {schema}, this one knows up to {SCHEMA}); \
             start it with that version, or use another directory",
            dir.display()
        )));
    }
    serde_json::from_str(&text).map(Some).map_err(unreadable)
}

fn write_mesh_file(dir: &Path, file: &MeshFile) -> anyhow::Result<()> {
    let path = dir.join("mesh.json");
    let new = dir.join("mesh.json.new");
    let write = || -> anyhow::Result<()> {
        let mut out = File::create(&new)?;
        out.write_all(serde_json::to_string_pretty(file)?.as_bytes())?;
        out.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(dir)?.sync_all()?;
        Ok(())
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// A directory that holds something else is not ours to fill.
fn require_empty(dir: &Path) -> Result<(), Failure> {
    let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    for entry in entries {
        let name = entry
            .with_context(|| format!("list {}", dir.display()))?
            .file_name();
        if name != "up.lock" && name != "mesh.json.new" {
            return Err(Failure::RefusedHere(format!(
                "{} holds other files (such as {}) and no mesh.json; use an empty or new directory",
                dir.display(),
                name.display()
            )));
        }
    }
    Ok(())
}

fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let mut held = Vec::new();
    let mut ports = HashSet::new();
    for _ in 0..PORT_TRIES_MAX {
        if held.len() == count {
            break;
        }
        let port = rand::rng().random_range(PORTS);
        // Held until all are chosen; then free for the processes that will listen there.
        if let (true, Ok(listener)) = (
            !ports.contains(&port),
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)),
        ) {
            ports.insert(port);
            held.push(listener);
        }
    }
    if held.len() < count {
        return Err(anyhow!(
            "found only {} of {count} free ports on 127.0.0.1",
            held.len()
        ));
    }
    Ok(ports.into_iter().collect())
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
