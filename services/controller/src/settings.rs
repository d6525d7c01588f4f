//! Settings of a controller: flag, then environment, then file, then default.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::Parser;
use serde::Deserialize;
use slotmesh_runtime::settings::{self, SettingsError};

use crate::store::{EtcdSettings, EtcdTls, EtcdUser};

/// Where the one truth is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreChoice {
    /// In this process, persisted below its data directory. For one controller.
    Embedded,
    /// In etcd, at these endpoints (`host:port`, or with `http://` or `https://` before it).
    Etcd(Vec<String>),
}

impl FromStr for StoreChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "embedded" {
            return Ok(Self::Embedded);
        }
        let endpoints: Vec<_> = text
            .strip_prefix("etcd://")
            .unwrap_or_default()
            .split(',')
            .filter(|e| !e.is_empty())
            .map(str::to_owned)
            .collect();
        if endpoints.is_empty() {
            return Err(format!(
                "store is `embedded` or `etcd://HOST:PORT,…`, not `{text}`"
            ));
        }
        Ok(Self::Etcd(endpoints))
    }
}

/// The controller: keeps topology and tasks, decides, publishes.
#[derive(Debug, Parser)]
#[command(name = "slotmesh-controller", version)]
pub struct Flags {
    /// Settings file (TOML); flags and environment win over it.
    #[arg(long, env = "SLOTMESH_CONTROLLER_CONFIG")]
    config: Option<PathBuf>,
    /// Name of this controller among its peers.
    #[arg(long, env = "SLOTMESH_CONTROLLER_ID")]
    id: Option<String>,
    /// Address of the gRPC API. Port 0 takes a free one.
    #[arg(long, env = "SLOTMESH_CONTROLLER_LISTEN")]
    listen: Option<SocketAddr>,
    /// Address of metrics and readiness, as HTTP [default: a free port of this machine].
    #[arg(long, env = "SLOTMESH_CONTROLLER_ADMIN_LISTEN")]
    admin_listen: Option<SocketAddr>,
    /// host:port under which agents, proxies and other controllers reach it; default: as bound.
    #[arg(long, env = "SLOTMESH_CONTROLLER_ADVERTISE")]
    advertise: Option<String>,
    /// `embedded`, or `etcd://HOST:PORT,…`.
    #[arg(long, env = "SLOTMESH_CONTROLLER_STORE")]
    store: Option<StoreChoice>,
    /// Directory of the embedded store and of controller.json.
    #[arg(long, env = "SLOTMESH_CONTROLLER_DATA")]
    data: Option<PathBuf>,
    /// User of etcd, when it asks for one.
    #[arg(long, env = "SLOTMESH_CONTROLLER_ETCD_USER")]
    etcd_user: Option<String>,
    /// File with that user's password; only its first line counts.
    #[arg(long, env = "SLOTMESH_CONTROLLER_ETCD_PASSWORD_FILE")]
    etcd_password_file: Option<PathBuf>,
    /// PEM file with the authority that signed etcd's certificates; with it, etcd is reached by TLS.
    #[arg(long, env = "SLOTMESH_CONTROLLER_ETCD_CA")]
    etcd_ca: Option<PathBuf>,
    /// PEM file with this controller's certificate, when etcd asks for one.
    #[arg(long, env = "SLOTMESH_CONTROLLER_ETCD_CERT")]
    etcd_cert: Option<PathBuf>,
    /// PEM file with the key of that certificate.
    #[arg(long, env = "SLOTMESH_CONTROLLER_ETCD_KEY")]
    etcd_key: Option<PathBuf>,
    /// Instances that are given patches by themselves at a time; 0: none. The same on every controller
    /// [default: 1].
    #[arg(long, env = "SLOTMESH_CONTROLLER_AUTO_UPGRADES")]
    auto_upgrades: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    id: Option<String>,
    listen: Option<SocketAddr>,
    admin_listen: Option<SocketAddr>,
    advertise: Option<String>,
    store: Option<String>,
    data: Option<PathBuf>,
    etcd_user: Option<String>,
    etcd_password_file: Option<PathBuf>,
    etcd_ca: Option<PathBuf>,
    etcd_cert: Option<PathBuf>,
    etcd_key: Option<PathBuf>,
    auto_upgrades: Option<usize>,
}

/// How etcd is reached: names of files, never what is in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EtcdAccess {
    user: Option<String>,
    password_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

/// Why etcd can't be reached as told.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error("read {flag} {}", path.display())]
    Read {
        flag: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{given} is given without {missing}: give both, or neither")]
    Half {
        given: &'static str,
        missing: &'static str,
    },
    #[error("{endpoint}: https needs --etcd-ca, the authority that signed etcd's certificate")]
    NoAuthority { endpoint: String },
    #[error("{endpoint}: --etcd-ca is given, so all members are reached by https")]
    Plain { endpoint: String },
}

impl EtcdAccess {
    /// Reads the files.
    ///
    /// # Errors
    /// When one can't be read, or the settings contradict each other.
    pub fn resolve(&self, endpoints: &[String]) -> Result<EtcdSettings, AccessError> {
        let pair = |a: (&'static str, bool), b: (&'static str, bool)| match (a.1, b.1) {
            (true, false) => Err(AccessError::Half {
                given: a.0,
                missing: b.0,
            }),
            (false, true) => Err(AccessError::Half {
                given: b.0,
                missing: a.0,
            }),
            _ => Ok(()),
        };
        pair(
            ("--etcd-user", self.user.is_some()),
            ("--etcd-password-file", self.password_file.is_some()),
        )?;
        pair(
            ("--etcd-cert", self.cert.is_some()),
            ("--etcd-key", self.key.is_some()),
        )?;
        if self.cert.is_some() && self.ca.is_none() {
            let (given, missing) = ("--etcd-cert", "--etcd-ca");
            return Err(AccessError::Half { given, missing });
        }
        let user = match (&self.user, &self.password_file) {
            (Some(name), Some(path)) => {
                let text = read("--etcd-password-file", path)?;
                let text = String::from_utf8_lossy(&text);
                Some(EtcdUser {
                    name: name.clone(),
                    password: text.lines().next().unwrap_or_default().to_owned(),
                })
            }
            _ => None,
        };
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((read("--etcd-cert", cert)?, read("--etcd-key", key)?)),
            _ => None,
        };
        let tls = match &self.ca {
            Some(path) => Some(EtcdTls {
                ca: read("--etcd-ca", path)?,
                identity,
            }),
            None => None,
        };
        let endpoints = endpoints.iter().map(|e| endpoint(e, tls.is_some()));
        Ok(EtcdSettings {
            endpoints: endpoints.collect::<Result<_, _>>()?,
            user,
            tls,
        })
    }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, AccessError> {
    std::fs::read(path).map_err(|source| AccessError::Read {
        flag,
        path: path.to_owned(),
        source,
    })
}

fn endpoint(given: &str, tls: bool) -> Result<String, AccessError> {
    let endpoint = given.to_owned();
    match (given.split_once("://"), tls) {
        (Some(("https", _)), false) => Err(AccessError::NoAuthority { endpoint }),
        (Some(("http", _)), true) => Err(AccessError::Plain { endpoint }),
        (Some(_), _) => Ok(endpoint),
        (None, true) => Ok(format!("https://{given}")),
        (None, false) => Ok(format!("http://{given}")),
    }
}

/// What the controller runs with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name among its peers.
    pub id: String,
    /// Address of the gRPC API.
    pub listen: SocketAddr,
    /// Address of metrics and readiness.
    pub admin_listen: SocketAddr,
    /// As others reach it; `None`: as bound.
    pub advertise: Option<String>,
    /// Where the one truth is kept.
    pub store: StoreChoice,
    /// Its directory.
    pub data: PathBuf,
    /// How etcd is reached.
    pub etcd: EtcdAccess,
    /// Instances that are given patches by themselves at a time; 0: none.
    pub auto_upgrades: usize,
}

impl Settings {
    /// Merges the command line with the settings file that it names.
    ///
    /// # Errors
    /// When the file can't be read or has a field or value that is not understood.
    pub fn load(flags: Flags) -> Result<Self, SettingsError> {
        let file: File = settings::load(flags.config.as_deref())?;
        let from_file = |text: String| {
            StoreChoice::from_str(&text).map_err(|message| SettingsError::Parse {
                path: flags.config.clone().unwrap_or_default(),
                message,
            })
        };
        let store = match (flags.store, file.store) {
            (Some(store), _) => store,
            (None, Some(text)) => from_file(text)?,
            (None, None) => StoreChoice::Embedded,
        };
        Ok(Self {
            id: flags
                .id
                .or(file.id)
                .unwrap_or_else(|| "controller-1".into()),
            listen: flags
                .listen
                .or(file.listen)
                .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 7400))),
            admin_listen: flags
                .admin_listen
                .or(file.admin_listen)
                .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0))),
            advertise: flags.advertise.or(file.advertise),
            store,
            data: flags
                .data
                .or(file.data)
                .unwrap_or_else(|| "slotmesh-controller".into()),
            etcd: EtcdAccess {
                user: flags.etcd_user.or(file.etcd_user),
                password_file: flags.etcd_password_file.or(file.etcd_password_file),
                ca: flags.etcd_ca.or(file.etcd_ca),
                cert: flags.etcd_cert.or(file.etcd_cert),
                key: flags.etcd_key.or(file.etcd_key),
            },
            auto_upgrades: flags
                .auto_upgrades
                .or(file.auto_upgrades)
                .unwrap_or(slotmesh_task::auto::AT_A_TIME),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("controller.toml");
        std::fs::write(&path, "id = \"c9\"\nstore = \"etcd://a:1,b:2\"\n").unwrap();
        let config = path.to_str().unwrap();
        let flags = Flags::parse_from(["x", "--config", config, "--id", "c1"]);
        let settings = Settings::load(flags).unwrap();
        assert_eq!(settings.id, "c1");
        assert_eq!(
            settings.store,
            StoreChoice::Etcd(vec!["a:1".into(), "b:2".into()])
        );
        assert_eq!(settings.listen.port(), 7400);
        std::fs::write(&path, "store = \"zookeeper\"\n").unwrap();
        let refused = Settings::load(Flags::parse_from(["x", "--config", config])).unwrap_err();
        assert!(refused.to_string().contains("zookeeper"));
    }

    #[test]
    fn secrets_are_read_from_files_and_are_in_no_log_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let access = EtcdAccess {
            user: Some("mesh".into()),
            password_file: Some(file("password", "s3cret\n")),
            ca: Some(file("ca", "authority")),
            cert: Some(file("cert", "certificate")),
            key: Some(file("key", "k3y")),
        };
        let settings = access.resolve(&["a:1".into()]).unwrap();
        assert_eq!(settings.endpoints, ["https://a:1"]);
        assert_eq!(settings.user.as_ref().unwrap().password, "s3cret");
        let logged = format!("{access:?} {settings:?}");
        assert!(!logged.contains("s3cret"), "{logged}");
        let key = format!("{:?}", b"k3y");
        assert!(
            !logged.contains("k3y") && !logged.contains(&key),
            "{logged}"
        );
    }

    #[test]
    fn access_that_contradicts_itself_is_refused_by_the_name_of_the_flag() {
        let said = |access: EtcdAccess, endpoint: &str| {
            let refused = access.resolve(&[endpoint.to_owned()]).unwrap_err();
            refused.to_string()
        };
        let none = EtcdAccess::default;
        assert!(said(none(), "https://a:1").contains("--etcd-ca"));
        let user = Some("u".to_owned());
        assert!(said(EtcdAccess { user, ..none() }, "a:1").contains("--etcd-password-file"));
        let cert = Some("c".into());
        assert!(said(EtcdAccess { cert, ..none() }, "a:1").contains("--etcd-key"));
        let ca = Some("/does/not/exist".into());
        assert!(said(EtcdAccess { ca, ..none() }, "a:1").contains("/does/not/exist"));
    }
}
