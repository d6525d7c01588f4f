//! A node's directory: boot configuration, admin secret, port, where its unix socket is.
//!
//! Invariant: the boot configuration holds no user of any epoch and nobody's address to follow, so every
//! process is born fenced; and no password in clear text but the admin's, in a 0600 file.

use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use prost::Message;
use rand::Rng;
use sha2::{Digest, Sha256};
use slotmesh_proto::agent::v1::NodeSpec;
use slotmesh_topology::parameter;

use super::{NOWHERE, data::Boot};
use crate::{
    artifact::{self, Engine, Version},
    fence::{ADMIN_USER, password_sha256},
    process::{last_lines, write_atomic},
};

/// `sun_path` has 108 bytes, with the zero at its end.
const SOCKET_PATH_MAX: usize = 107;
/// Below the range from which the kernel takes ports of outgoing connections, so that a node's port
/// is free again when it restarts.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// Enough random tries on a host whose ports are mostly taken.
const PORT_TRIES: u32 = 200;

/// What a failover relies on, in every process.
pub const KEPT_SINCE_START: [(&str, &str); 2] = [
    // A primary that was cut off keeps the writes that only it has until somebody reads them.
    ("repl-backlog-ttl", "0"),
    // A replica notices within two seconds that its primary is silent.
    ("repl-ping-replica-period", "1"),
];

/// Where one node lives.
#[derive(Debug, Clone)]
pub struct NodeDir {
    path: PathBuf,
    socket: PathBuf,
}

impl NodeDir {
    /// Makes the directory, 0700, if it is missing.
    pub fn create(nodes: &Path, node_id: &str) -> io::Result<Self> {
        let path = Self::locate(nodes, node_id);
        make_private_dir(&path)?;
        let path = path.canonicalize()?;
        let socket = socket_path(&path)?;
        Ok(Self { path, socket })
    }

    /// Where a node's directory is or would be.
    pub fn locate(nodes: &Path, node_id: &str) -> PathBuf {
        nodes.join(node_id)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn config(&self) -> PathBuf {
        self.path.join("redis.conf")
    }

    pub fn log(&self) -> PathBuf {
        self.path.join("redis.log")
    }

    pub fn process_file(&self) -> PathBuf {
        self.path.join("process")
    }

    /// Written by the engine itself: covers a crash between its start and our record.
    pub fn engine_pid(&self) -> Option<u32> {
        fs::read_to_string(self.path.join("redis.pid"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// The admin's password, made at first use.
    pub fn admin_secret(&self) -> io::Result<String> {
        let path = self.path.join("admin.secret");
        match fs::read_to_string(&path) {
            Ok(secret) if !secret.trim().is_empty() => return Ok(secret.trim().to_owned()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut bytes = [0u8; 32];
        rand::rng().fill(&mut bytes);
        let secret = hex::encode(bytes);
        write_atomic(&path, format!("{secret}\n").as_bytes(), 0o600)?;
        Ok(secret)
    }

    /// The node's port, if it has one yet.
    pub fn port(&self) -> Option<u16> {
        fs::read_to_string(self.path.join("port"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// The node's port; chosen, and kept, at first use.
    pub fn ensure_port(&self, ip: IpAddr) -> io::Result<u16> {
        if let Some(port) = self.port() {
            return Ok(port);
        }
        let port = free_port(ip)?;
        write_atomic(
            &self.path.join("port"),
            format!("{port}\n").as_bytes(),
            0o600,
        )?;
        Ok(port)
    }

    /// Only before the node has served for the first time: afterwards others know the port.
    pub fn forget_port(&self) -> io::Result<()> {
        fs::remove_file(self.path.join("port"))
    }

    /// Whether a process of this node has ever answered.
    pub fn has_served(&self) -> bool {
        self.path.join("served").exists()
    }

    pub fn mark_served(&self) -> io::Result<()> {
        if self.has_served() {
            return Ok(());
        }
        write_atomic(&self.path.join("served"), b"", 0o600)
    }

    /// Keeps what is needed to start the process again with no controller; no secrets.
    pub fn save_spec(&self, spec: &NodeSpec) -> io::Result<()> {
        let start = start_part(spec);
        if self.load_spec().as_ref() == Some(&start) {
            return Ok(());
        }
        write_atomic(&self.path.join("spec"), &start.encode_to_vec(), 0o600)
    }

    pub fn load_spec(&self) -> Option<NodeSpec> {
        NodeSpec::decode(fs::read(self.path.join("spec")).ok()?.as_slice()).ok()
    }

    /// The same, of a node whose directory may not exist.
    pub fn peek_spec(nodes: &Path, node_id: &str) -> Option<NodeSpec> {
        let path = Self::locate(nodes, node_id).join("spec");
        NodeSpec::decode(fs::read(path).ok()?.as_slice()).ok()
    }

    /// Whether the last start failed because somebody else has the port.
    pub fn port_was_taken(&self) -> bool {
        last_lines(&self.log()).contains("Address already in use")
    }

    /// Writes the boot configuration.
    pub fn write_config(
        &self,
        ip: IpAddr,
        port: u16,
        spec: &NodeSpec,
        engine: &Engine,
    ) -> io::Result<()> {
        let secret = self.admin_secret()?;
        let place = Place {
            ip,
            port,
            path: &self.path,
            socket: &self.socket,
        };
        let text = boot_config(&place, spec, engine.version, &secret, self.boot());
        write_atomic(&self.config(), text.as_bytes(), 0o600)
    }

    /// Deletes everything of the node. No process of it may run.
    pub fn remove(&self) -> io::Result<()> {
        let _ = fs::remove_file(&self.socket);
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn start_part(spec: &NodeSpec) -> NodeSpec {
    NodeSpec {
        node_id: spec.node_id.clone(),
        instance_id: spec.instance_id.clone(),
        shard_id: spec.shard_id.clone(),
        desired: spec.desired,
        engine: spec.engine.clone(),
        databases: spec.databases,
        parameters: spec.parameters.clone(),
        ..NodeSpec::default()
    }
}

/// Where a process lives.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    pub(crate) ip: IpAddr,
    pub(crate) port: u16,
    pub(crate) path: &'a Path,
    pub(crate) socket: &'a Path,
}

/// What a process of this version is started with.
pub(crate) fn boot_config(
    place: &Place<'_>,
    spec: &NodeSpec,
    version: Version,
    admin_secret: &str,
    boot: Boot,
) -> String {
    let Place { ip, port, .. } = place;
    let path = place.path.display();
    let databases = if spec.databases == 0 {
        256
    } else {
        spec.databases
    };
    let mut lines = vec![
        "# Written by slotmesh-agent at each start of the node. Changes are overwritten."
            .to_owned(),
        format!("bind {ip}"),
        format!("port {port}"),
        "protected-mode no".to_owned(),
        format!("unixsocket \"{}\"", place.socket.display()),
        "unixsocketperm 700".to_owned(),
        "daemonize no".to_owned(),
        format!("dir \"{path}\""),
        format!("logfile \"{path}/redis.log\""),
        format!("pidfile \"{path}/redis.pid\""),
        // Born fenced: nobody but this host's agent can log in. The rights are for the engine itself:
        // while it loads its append-only file it executes as this user, and would skip the
        // transactions in it.
        "user default off ~* &* +@all".to_owned(),
        format!(
            "user {ADMIN_USER} on #{} ~* &* +@all",
            password_sha256(admin_secret)
        ),
        format!("databases {databases}"),
        format!(
            "appendonly {}",
            if boot == Boot::Appended { "yes" } else { "no" }
        ),
        "appendfsync everysec".to_owned(),
        "save \"\"".to_owned(),
        // FAILOVER names a replica as its primary sees it.
        format!("replica-announce-ip {ip}"),
        format!("replica-announce-port {port}"),
        "repl-diskless-sync yes".to_owned(),
        "repl-diskless-sync-delay 0".to_owned(),
        // Of a full sync that breaks, the replica keeps its old data.
        "repl-diskless-load swapdb".to_owned(),
        "repl-backlog-size 64mb".to_owned(),
        // Ends of blocking commands are looked for so often in a second: right to 20 ms.
        "hz 50".to_owned(),
    ];
    if let (Boot::Resumed, Some((host, port))) = (boot, NOWHERE.rsplit_once(':')) {
        // A replica from birth, or it would forget where in the history its snapshot stands.
        lines.push(format!("replicaof {host} {port}"));
    }
    lines.extend(KEPT_SINCE_START.map(|(name, value)| format!("{name} {value}")));
    if version >= artifact::REDIS_7_0 {
        // How long SHUTDOWN waits for replicas.
        lines.push("shutdown-timeout 2".to_owned());
    }
    lines.extend(boot_only_lines(spec, version));
    lines.push(String::new());
    lines.join("\n")
}

/// What the engine takes only now. All other parameters are set once the process answers, before
/// any client is let in: there a value that the engine refuses does not keep it from starting.
fn boot_only_lines(spec: &NodeSpec, version: Version) -> Vec<String> {
    let wanted = parameter::BOOT_ONLY.iter().filter_map(|known| {
        let value = spec.parameters.get(known.name)?;
        let is_known = !known.since_7_0 || version >= artifact::REDIS_7_0;
        (is_known && known.values.hold(value)).then(|| format!("{} {value}", known.name))
    });
    wanted.collect()
}

/// A directory that only this user can enter.
pub fn make_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// In the node's directory where that is short enough; otherwise in a private directory with a short
/// name, made from the long one.
pub(crate) fn socket_path(dir: &Path) -> io::Result<PathBuf> {
    let inside = dir.join("admin.sock");
    if inside.as_os_str().len() <= SOCKET_PATH_MAX {
        return Ok(inside);
    }
    let name = hex::encode(&Sha256::digest(dir.as_os_str().as_encoded_bytes())[..12]);
    let uid = rustix::process::getuid().as_raw();
    let base = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let base = base
        .filter(|b| b.is_dir() && b.as_os_str().len() < 50)
        .unwrap_or_else(|| PathBuf::from("/tmp"));
    let private = base.join(format!("slotmesh-{uid}"));
    make_private_dir(&private)?;
    // In a directory that others can write to, somebody may have been there first.
    let meta = fs::symlink_metadata(&private)?;
    if !meta.is_dir() || meta.uid() != uid || meta.mode() & 0o077 != 0 {
        return Err(io::Error::other(format!(
            "{} is not a private directory of this user: remove it, or use a shorter --data path",
            private.display()
        )));
    }
    Ok(private.join(format!("{name}.sock")))
}

/// A port that nobody has, and that no outgoing connection takes while its owner restarts.
pub fn free_port(ip: IpAddr) -> io::Result<u16> {
    for _ in 0..PORT_TRIES {
        let port = rand::rng().random_range(PORTS);
        if TcpListener::bind(SocketAddr::new(ip, port)).is_ok() {
            return Ok(port);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AddrInUse,
        format!(
            "no free port between {} and {} on {ip}",
            PORTS.start, PORTS.end
        ),
    ))
}

/// Refuses a data directory of a newer release; marks a new one.
pub fn check_schema(data: &Path, version: u32) -> io::Result<()> {
    let path = data.join("schema");
    let mut text = String::new();
    match fs::File::open(&path) {
        Ok(mut file) => file.read_to_string(&mut text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(format!("{version}\n").as_bytes())?;
            return file.sync_all();
        }
        Err(error) => return Err(error),
    };
    match text.trim().parse::<u32>() {
        Ok(found) if found <= version => Ok(()),
        Ok(found) => Err(io::Error::other(format!(
            "data directory {} was written by a newer slotmesh-agent (format {found}, this one \
             knows {version}): start that version again, or use another --data directory",
            data.display()
        ))),
        Err(_) => Err(io::Error::other(format!(
            "{} is no data directory of slotmesh-agent: use another --data directory",
            data.display()
        ))),
    }
}
