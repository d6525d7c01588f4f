//! Settings of a controller: flag, then environment, then file, then default.

use std::{net::SocketAddr, path::PathBuf, str::FromStr};

use clap::Parser;
use serde::Deserialize;
use slotmesh_runtime::settings::{self, SettingsError};

/// Where the one truth is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreChoice {
    /// In this process, persisted below its data directory. For one controller.
    Embedded,
    /// In etcd, at these endpoints (`host:port`).
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
    /// host:port under which agents, proxies and other controllers reach it; default: as bound.
    #[arg(long, env = "SLOTMESH_CONTROLLER_ADVERTISE")]
    advertise: Option<String>,
    /// `embedded`, or `etcd://HOST:PORT,…`.
    #[arg(long, env = "SLOTMESH_CONTROLLER_STORE")]
    store: Option<StoreChoice>,
    /// Directory of the embedded store and of controller.json.
    #[arg(long, env = "SLOTMESH_CONTROLLER_DATA")]
    data: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    id: Option<String>,
    listen: Option<SocketAddr>,
    advertise: Option<String>,
    store: Option<String>,
    data: Option<PathBuf>,
}

/// What the controller runs with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name among its peers.
    pub id: String,
    /// Address of the gRPC API.
    pub listen: SocketAddr,
    /// As others reach it; `None`: as bound.
    pub advertise: Option<String>,
    /// Where the one truth is kept.
    pub store: StoreChoice,
    /// Its directory.
    pub data: PathBuf,
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
            advertise: flags.advertise.or(file.advertise),
            store,
            data: flags
                .data
                .or(file.data)
                .unwrap_or_else(|| "slotmesh-controller".into()),
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
}
