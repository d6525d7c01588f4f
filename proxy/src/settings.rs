//! Settings of the process: file < environment < flags; a field that does not exist is refused.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use serde::Deserialize;
use slotmesh_runtime::settings::SettingsError;

use crate::tls::{MinVersion, TlsFiles};

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
    /// PEM file of the certificate that clients with TLS are shown, with those between it and the root;
    /// it turns TLS on, at the same port.
    #[arg(long, env = "SLOTMESH_PROXY_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// PEM file of the certificate's private key.
    #[arg(long, env = "SLOTMESH_PROXY_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// Oldest version of TLS that is spoken: 1.2 or 1.3 [default: 1.2].
    #[arg(long, env = "SLOTMESH_PROXY_TLS_MIN_VERSION")]
    tls_min_version: Option<String>,
    /// Refuses clients without TLS.
    #[arg(long, env = "SLOTMESH_PROXY_TLS_REQUIRED", num_args = 0..=1, default_missing_value = "true")]
    tls_required: Option<bool>,
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
    /// `None`: clients do not speak TLS.
    pub tls: Option<TlsFiles>,
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
    #[error("{0} needs both --tls-cert and --tls-key; name the two files, or leave it out")]
    Tls(&'static str),
    #[error("--tls-min-version must be 1.2 or 1.3, not {0:?}")]
    TlsVersion(String),
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
        let tls = tls_files(&over, &under)?;
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
            tls,
        })
    }
}

fn tls_files(over: &Given, under: &Given) -> Result<Option<TlsFiles>, Invalid> {
    let first = |one: &Option<PathBuf>, other: &Option<PathBuf>| {
        let given = one.clone().or_else(|| other.clone());
        given.filter(|path| !path.as_os_str().is_empty())
    };
    let cert = first(&over.tls_cert, &under.tls_cert);
    let key = first(&over.tls_key, &under.tls_key);
    let min_version = over.tls_min_version.as_ref();
    let min_version = min_version.or(under.tls_min_version.as_ref());
    let min_version = match min_version.map(String::as_str) {
        None | Some("1.2") => MinVersion::Tls12,
        Some("1.3") => MinVersion::Tls13,
        Some(other) => return Err(Invalid::TlsVersion(other.to_owned())),
    };
    let required = over.tls_required.or(under.tls_required).unwrap_or(false);
    match (cert, key) {
        (Some(cert), Some(key)) => Ok(Some(TlsFiles {
            cert,
            key,
            min_version,
            required,
        })),
        (None, None) if required => Err(Invalid::Tls("--tls-required")),
        (None, None) => Ok(None),
        (Some(_), None) => Err(Invalid::Tls("--tls-cert")),
        (None, Some(_)) => Err(Invalid::Tls("--tls-key")),
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

    #[test]
    fn tls_is_whole_or_refused() {
        let with = |extra: &[&str]| {
            let own = ["--proxy-id", "p", "--instance", "i", "--data", "/x"];
            load(&[&own, extra].concat())
        };
        let both = ["--tls-cert", "c", "--tls-key", "k"];
        let tls = with(&[&both[..], &["--tls-required", "--tls-min-version", "1.3"]].concat());
        let tls = tls.unwrap().tls.unwrap();
        assert_eq!((tls.min_version, tls.required), (MinVersion::Tls13, true));
        let tls = with(&[&both[..], &["--tls-required", "false"]].concat());
        assert!(!tls.unwrap().tls.unwrap().required);
        assert_eq!(with(&[]).unwrap().tls, None);
        let refused: [&[&str]; 4] = [
            &both[..2],
            &both[2..],
            &["--tls-required"],
            &["--tls-min-version", "1.1"],
        ];
        for flags in refused {
            let error = with(flags).unwrap_err().to_string();
            assert!(error.contains("--tls-"), "{error}");
        }
    }
}
