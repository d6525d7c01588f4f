//! What is needed to start a process of a proxy, and the files in its directory through which it is
//! found again.
//!
//! Invariant: every process of a proxy has the proxy's directory as its own and names it in its
//! arguments, so that one which was not recorded can be found; and the port, once chosen, is kept.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use slotmesh_proto::agent::v1::ProxySpec;

use super::runs::{Attempt, Key, Named};
use crate::{
    host::Host,
    node::files::{free_port, make_private_dir},
    process::{Output, Process, write_atomic},
    settings::ProxyTls,
};

/// What all processes of a proxy say.
pub(super) const LOG: &str = "proxy.log";
const KEPT: &str = "spec.json";
const BOUND: &str = "proxy.json";
const TAKE_OVER: &str = "take-over.json";

/// What the proxy writes when it begins to serve.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Bound {
    pid: u32,
    pub(super) address: String,
    #[serde(default)]
    pub(super) admin_address: String,
    /// Releases that hand nothing over have none.
    #[serde(default)]
    handover: PathBuf,
}

/// What a process writes that takes over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TakeOver {
    pid: u32,
    /// Why it has taken nothing; empty: it has, or has not tried yet.
    pub(super) reason: String,
    /// What kind of failure it was.
    code: String,
    phase: String,
    /// Clients that have come.
    pub(super) taken: u32,
}

impl TakeOver {
    /// The process that serves did not want to hand over.
    pub(super) fn is_refused(&self) -> bool {
        self.code == "refused"
    }

    /// It has the listener, and clients.
    pub(super) fn has_clients(&self) -> bool {
        matches!(self.phase.as_str(), "serving" | "done")
    }
}

/// What is kept to start it again with no controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) instance_id: String,
    pub(super) workers: u32,
    /// Empty until it was bound for the first time.
    pub(super) address: String,
    #[serde(default)]
    program: String,
    #[serde(default)]
    generation: u64,
    /// That it listens on, if it is free when it is first started.
    #[serde(default)]
    port: u16,
    /// A process of another generation that hands nothing over is ended.
    #[serde(default)]
    pub(super) cold: bool,
}

impl Kept {
    /// What an assignment says, at the endpoint that the proxy has.
    pub(super) fn assigned(spec: ProxySpec, address: String) -> Self {
        Self {
            instance_id: spec.instance_id,
            workers: spec.workers,
            address,
            program: spec.program,
            generation: spec.generation,
            port: u16::try_from(spec.port).unwrap_or_default(),
            cold: spec.cold,
        }
    }

    pub(super) fn key(&self) -> Key {
        Key {
            program: self.program.clone(),
            generation: self.generation,
        }
    }
}

impl Bound {
    /// The process, if it lives and is of this directory.
    pub(super) fn named(&self, dir: &Path) -> Option<Named> {
        let process = Process::find(self.pid)?;
        process.runs_in(dir).then(|| Named {
            process,
            door: self.handover.clone(),
        })
    }

    pub(super) fn is_of(&self, process: Process) -> bool {
        self.pid == process.pid
    }
}

/// What a process is told of TLS.
fn tls_args(tls: &ProxyTls) -> Vec<String> {
    let given = [
        ("--tls-cert", tls.cert.display().to_string()),
        ("--tls-key", tls.key.display().to_string()),
        ("--tls-min-version", tls.min_version.clone()),
        ("--tls-required", tls.required.to_string()),
    ];
    let flags = given.into_iter();
    flags
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect()
}

/// The directory of one proxy.
#[derive(Debug, Clone)]
pub(super) struct ProxyDir(PathBuf);

impl ProxyDir {
    pub(super) fn new(proxies: &Path, proxy_id: &str) -> Self {
        Self(proxies.join(proxy_id))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn log(&self) -> PathBuf {
        self.0.join(LOG)
    }

    pub(super) fn bound(&self) -> Option<Bound> {
        self.read(BOUND)
    }

    /// What this process says about taking over; releases before it say nothing.
    pub(super) fn take_over(&self, process: Process) -> Option<TakeOver> {
        let said: Option<TakeOver> = self.read(TAKE_OVER);
        said.filter(|said| said.pid == process.pid)
    }

    pub(super) fn kept(&self) -> Option<Kept> {
        self.read(KEPT)
    }

    pub(super) fn keep(&self, kept: &Kept) -> io::Result<()> {
        make_private_dir(&self.0)?;
        let text = serde_json::to_vec(kept).map_err(io::Error::other)?;
        write_atomic(&self.0.join(KEPT), &text, 0o600)
    }

    /// The process that serves or is to, for agents of before.
    pub(super) fn record(&self, process: Process) -> io::Result<()> {
        process.save(&self.0.join("process"))
    }

    pub(super) fn recorded(&self) -> Option<Process> {
        Process::load(&self.0.join("process"))
    }

    pub(super) fn forget(&self) {
        let _ = fs::remove_file(self.0.join("process"));
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.0.join(name)).ok()?).ok()
    }

    /// Starts the process of an attempt.
    pub(super) fn spawn(
        &self,
        host: &Host,
        proxy_id: &str,
        kept: &Kept,
        attempt: &Attempt,
    ) -> io::Result<Process> {
        let dir = self.0.canonicalize()?;
        let ip = host.advertise_ip;
        let listen = match kept.address.as_str() {
            "" => SocketAddr::new(ip, first_port(ip, kept.port)?).to_string(),
            address => address.to_owned(),
        };
        let given = [
            ("--proxy-id", proxy_id.to_owned()),
            ("--instance", kept.instance_id.clone()),
            ("--listen", listen),
            ("--admin-listen", SocketAddr::new(ip, 0).to_string()),
            ("--workers", attempt.workers.max(1).to_string()),
            ("--controller", host.controllers.addresses().join(",")),
            ("--data", dir.display().to_string()),
            ("--host-id", host.host_id.clone()),
        ];
        let mut args: Vec<String> = vec![];
        for (flag, value) in given {
            args.extend([flag.to_owned(), value]);
        }
        if let Some(tls) = &host.proxy_tls {
            args.extend(tls_args(tls));
        }
        match &attempt.giver {
            Some(door) => args.extend(["--take-over".to_owned(), door.display().to_string()]),
            // Nobody serves; what is written there is of the dead.
            None => drop(fs::remove_file(dir.join(BOUND))),
        }
        Process::spawn(&attempt.origin.path, &args, &dir, LOG, Output::Append)
    }

    /// The process of an attempt whose agent died before it recorded it. One that is known may have taken
    /// over from the same process before.
    pub(super) fn find(&self, attempt: &Attempt, known: &[Process]) -> Option<Process> {
        match &attempt.giver {
            Some(door) => {
                let marks = [format!("--take-over\0{}\0", door.display())];
                Process::find_other_in(&self.0, &marks, known)
            }
            None => self.stray(known),
        }
    }

    /// The oldest process of this proxy that is not known.
    pub(super) fn stray(&self, known: &[Process]) -> Option<Process> {
        let dir = self.0.canonicalize().ok()?;
        let marks = [format!("--data\0{}\0", dir.display())];
        Process::find_other_in(&dir, &marks, known)
    }
}

/// The wanted port, if it is free.
fn first_port(ip: IpAddr, wanted: u16) -> io::Result<u16> {
    let is_free = |port| TcpListener::bind((ip, port)).is_ok();
    match wanted {
        0 => free_port(ip),
        port if is_free(port) => Ok(port),
        _ => free_port(ip),
    }
}
