//! Settings of the process: file < environment < flags; a field that does not exist is refused.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use serde::Deserialize;
use slotmesh_runtime::settings::SettingsError;

/// Default of `max_clients`, as Redis's `maxclients`.
const MAX_CLIENTS: usize = 10_000;

/// The data plane of slotmesh.
#[derive(Debug, Parser)]
#[command(name = "slotmesh-proxy", version)]
pub struct Flags {
    /// TOML file with the same names as the flags, in snake case.
    #[arg(long, env = "SLOTMESH_PROXY_CONFIG")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub given: Given,
}

/// What may be given, in the file or otherwise.
#[derive(Debug, Default, Clone, clap::Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    /// Identity of this proxy in the mesh.
    #[arg(long, env = "SLOTMESH_PROXY_PROXY_ID")]
    proxy_id: Option<String>,
    /// Instance whose clients it serves.
    #[arg(long, env = "SLOTMESH_PROXY_INSTANCE")]
    instance: Option<String>,
    /// Host that it runs on; empty when run by hand.
    #[arg(long, env = "SLOTMESH_PROXY_HOST_ID")]
    host_id: Option<String>,
    /// Where clients connect; port 0 takes a free one.
    #[arg(long, env = "SLOTMESH_PROXY_LISTEN")]
    listen: Option<SocketAddr>,
    /// Address that the mesh shows to clients, if it is not the one listened on.
    #[arg(long, env = "SLOTMESH_PROXY_ADVERTISE")]
    advertise: Option<String>,
    /// Metrics and readiness.
    #[arg(long, env = "SLOTMESH_PROXY_ADMIN_LISTEN")]
    admin_listen: Option<SocketAddr>,
    /// Worker threads.
    #[arg(long, env = "SLOTMESH_PROXY_WORKERS")]
    workers: Option<usize>,
    /// Controllers, any of them; comma-separated host:port.
    #[arg(long, env = "SLOTMESH_PROXY_CONTROLLER", value_delimiter = ',')]
    controller: Option<Vec<String>>,
    /// Directory of the saved topology and of proxy.json.
    #[arg(long, env = "SLOTMESH_PROXY_DATA")]
    data: Option<PathBuf>,
    /// Most clients at a time.
    #[arg(long, env = "SLOTMESH_PROXY_MAX_CLIENTS")]
    max_clients: Option<usize>,
    /// Socket of the process whose listener and clients it takes over ("handover" in its proxy.json).
    #[arg(long, env = "SLOTMESH_PROXY_TAKE_OVER")]
    take_over: Option<PathBuf>,
}

/// What is in force.
#[derive(Debug, Clone)]
pub struct Settings {
    pub proxy_id: String,
    pub instance: String,
    pub host_id: String,
    pub listen: SocketAddr,
    pub advertise: Option<String>,
    pub admin_listen: SocketAddr,
    pub workers: usize,
    pub controllers: Vec<String>,
    pub data: PathBuf,
    pub max_clients: usize,
    pub take_over: Option<PathBuf>,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    #[error(transparent)]
    File(#[from] SettingsError),
    #[error("--{0} must be given")]
    Missing(&'static str),
    #[error("--workers must be from 1 to {WORKERS_MAX}")]
    Workers,
}

/// More threads than any machine's cores are a typing error.
const WORKERS_MAX: usize = 1024;

impl Settings {
    /// Merges flags and environment over the file.
    ///
    /// # Errors
    /// The file cannot be used, or something that must be given is not.
    pub fn load(flags: Flags) -> Result<Self, Invalid> {
        let file: Given = slotmesh_runtime::settings::load(flags.config.as_deref())?;
        Self::merge(flags.given, file)
    }

    fn merge(over: Given, under: Given) -> Result<Self, Invalid> {
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = over.workers.or(under.workers).unwrap_or(cores);
        if workers == 0 || workers > WORKERS_MAX {
            return Err(Invalid::Workers);
        }
        Ok(Self {
            proxy_id: over
                .proxy_id
                .or(under.proxy_id)
                .ok_or(Invalid::Missing("proxy-id"))?,
            instance: over
                .instance
                .or(under.instance)
                .ok_or(Invalid::Missing("instance"))?,
            host_id: over.host_id.or(under.host_id).unwrap_or_default(),
            listen: over.listen.or(under.listen).unwrap_or(any_port),
            advertise: over.advertise.or(under.advertise),
            admin_listen: over.admin_listen.or(under.admin_listen).unwrap_or(any_port),
            workers,
            controllers: over.controller.or(under.controller).unwrap_or_default(),
            data: over.data.or(under.data).ok_or(Invalid::Missing("data"))?,
            max_clients: over
                .max_clients
                .or(under.max_clients)
                .unwrap_or(MAX_CLIENTS),
            take_over: over.take_over.or(under.take_over),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(arguments: &[&str]) -> Result<Settings, Invalid> {
        let all = ["slotmesh-proxy"].iter().chain(arguments);
        Settings::load(Flags::try_parse_from(all).unwrap())
    }

    #[test]
    fn a_flag_wins_over_the_file_and_an_unknown_field_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("proxy.toml");
        let file = path.to_str().unwrap();
        let text = "proxy_id = \"p1\"\ninstance = \"i\"\ndata = \"/x\"\nworkers = 3\n";
        std::fs::write(&path, text).unwrap();
        let settings = load(&["--config", file, "--workers", "2"]).unwrap();
        assert_eq!((settings.workers, settings.proxy_id.as_str()), (2, "p1"));
        std::fs::write(&path, "wrokers = 3\n").unwrap();
        let error = load(&["--config", file]).unwrap_err().to_string();
        assert!(error.contains("wrokers"), "{error}");
    }

    #[test]
    fn what_must_be_given_is_asked_for() {
        let error = load(&["--proxy-id", "p", "--instance", "i"]).unwrap_err();
        assert_eq!(error.to_string(), "--data must be given");
    }
}
