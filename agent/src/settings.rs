//! What the operator may say: flags over environment over file.
//!
//! Invariant: a [`Settings`] is complete and makes sense; whatever does not is refused with the name
//! of the flag.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Parser, Subcommand};
use serde::Deserialize;
use slotmesh_runtime::settings::{SettingsError, load};

/// Below the 90 s that systemd gives a service to end.
const DRAIN_SECONDS: u32 = 60;
/// Whoever waits for longer than an hour wants a replica elsewhere first.
const DRAIN_SECONDS_MAX: u32 = 3_600;

/// Runs the nodes and proxies of one host, as its controllers assign them.
#[derive(Debug, Parser)]
#[command(name = "slotmesh-agent", version)]
pub struct Flags {
    /// Settings file (TOML); flags and environment win over it.
    #[arg(long, env = "SLOTMESH_AGENT_CONFIG")]
    pub config: Option<PathBuf>,
    /// Name of this host in the mesh, kept for ever.
    #[arg(long, env = "SLOTMESH_AGENT_HOST_ID")]
    pub host_id: Option<String>,
    /// Directory of everything that this agent keeps.
    #[arg(long, env = "SLOTMESH_AGENT_DATA")]
    pub data: Option<PathBuf>,
    /// Where the agent's gRPC API listens [default: 127.0.0.1:0].
    #[arg(long, env = "SLOTMESH_AGENT_LISTEN")]
    pub listen: Option<SocketAddr>,
    /// Where others reach nodes and proxies of this host [default: the address of --listen].
    #[arg(long, env = "SLOTMESH_AGENT_ADVERTISE_IP")]
    pub advertise_ip: Option<IpAddr>,
    /// Controllers, as host:port.
    #[arg(long, env = "SLOTMESH_AGENT_CONTROLLER", value_delimiter = ',')]
    pub controller: Vec<String>,
    /// Engine of nodes that name none: a declared name, a path, or a program on PATH
    /// [default: redis-server].
    #[arg(long, env = "SLOTMESH_AGENT_ENGINE_DEFAULT")]
    pub engine_default: Option<String>,
    /// Declares an engine, as NAME=PATH.
    #[arg(long, env = "SLOTMESH_AGENT_ENGINE", value_delimiter = ',')]
    pub engine: Vec<String>,
    /// The proxy's binary [default: slotmesh-proxy beside this one].
    #[arg(long, env = "SLOTMESH_AGENT_PROXY_BINARY")]
    pub proxy_binary: Option<PathBuf>,
    /// PEM file of the certificate that this host's proxies show to clients with TLS; it turns TLS on.
    #[arg(long, env = "SLOTMESH_AGENT_PROXY_TLS_CERT")]
    pub proxy_tls_cert: Option<PathBuf>,
    /// PEM file of the certificate's private key.
    #[arg(long, env = "SLOTMESH_AGENT_PROXY_TLS_KEY")]
    pub proxy_tls_key: Option<PathBuf>,
    /// Oldest version of TLS that proxies speak: 1.2 or 1.3 [default: 1.2].
    #[arg(long, env = "SLOTMESH_AGENT_PROXY_TLS_MIN_VERSION")]
    pub proxy_tls_min_version: Option<String>,
    /// Proxies refuse clients without TLS.
    #[arg(long, env = "SLOTMESH_AGENT_PROXY_TLS_REQUIRED")]
    pub proxy_tls_required: bool,
    /// Failure domain of this host.
    #[arg(long, env = "SLOTMESH_AGENT_ZONE")]
    pub zone: Option<String>,
    /// At SIGTERM or SIGINT stop all proxies and nodes too.
    #[arg(long, env = "SLOTMESH_AGENT_STOP_ALL_ON_EXIT")]
    pub stop_all_on_exit: bool,
    /// At SIGTERM or SIGINT move this host's primaries to other hosts first; a second signal ends that.
    #[arg(long, env = "SLOTMESH_AGENT_DRAIN")]
    pub drain: bool,
    /// Longest time for --drain, in seconds; keep the service manager's own limit above it
    /// [default: 60].
    #[arg(long, env = "SLOTMESH_AGENT_DRAIN_SECONDS")]
    pub drain_seconds: Option<u32>,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What else this program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Kills primaries whose agent is gone when they have lost their replicas; an agent starts it.
    Fencer {
        /// The agent's data directory.
        #[arg(long)]
        data: PathBuf,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    host_id: Option<String>,
    data: Option<PathBuf>,
    listen: Option<SocketAddr>,
    advertise_ip: Option<IpAddr>,
    controllers: Option<Vec<String>>,
    engine_default: Option<String>,
    engines: Option<BTreeMap<String, PathBuf>>,
    proxy_binary: Option<PathBuf>,
    proxy_tls_cert: Option<PathBuf>,
    proxy_tls_key: Option<PathBuf>,
    proxy_tls_min_version: Option<String>,
    proxy_tls_required: Option<bool>,
    zone: Option<String>,
    stop_all_on_exit: Option<bool>,
    drain: Option<bool>,
    drain_seconds: Option<u32>,
}

#[derive(Debug, Clone)]
pub struct Settings {
    pub host_id: String,
    pub data: PathBuf,
    pub listen: SocketAddr,
    pub advertise_ip: IpAddr,
    pub controllers: Vec<String>,
    pub engine_default: String,
    pub engines: BTreeMap<String, PathBuf>,
    pub proxy_binary: PathBuf,
    /// How proxies speak TLS; `None`: they do not.
    pub proxy_tls: Option<ProxyTls>,
    pub zone: String,
    pub stop_all_on_exit: bool,
    /// How long the primaries are moved away before the agent ends; `None`: they are not.
    pub drain: Option<Duration>,
    /// This program, as the fencer; `None`: there is none.
    pub fencer_binary: Option<PathBuf>,
}

/// What proxies are told of TLS. They read the files: a proxy that cannot is refused by itself, and the
/// one that serves goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyTls {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// 1.2 or 1.3.
    pub min_version: String,
    pub required: bool,
}

impl ProxyTls {
    fn resolve(flags: &Flags, file: &File) -> Result<Option<Self>, UsageError> {
        let invalid = |flag, why: &str| UsageError::Invalid {
            flag,
            why: why.to_owned(),
        };
        let first = |one: &Option<PathBuf>, other: &Option<PathBuf>| {
            one.as_ref().or(other.as_ref()).cloned()
        };
        let cert = first(&flags.proxy_tls_cert, &file.proxy_tls_cert);
        let key = first(&flags.proxy_tls_key, &file.proxy_tls_key);
        let min_version = flags.proxy_tls_min_version.as_ref();
        let min_version = min_version.or(file.proxy_tls_min_version.as_ref());
        let min_version = min_version.cloned().unwrap_or_else(|| "1.2".to_owned());
        if !["1.2", "1.3"].contains(&min_version.as_str()) {
            return Err(invalid("--proxy-tls-min-version", "1.2 or 1.3"));
        }
        let required = flags.proxy_tls_required || file.proxy_tls_required.unwrap_or(false);
        match (cert, key) {
            (Some(cert), Some(key)) => Ok(Some(Self {
                cert: absolute(&cert, "--proxy-tls-cert")?,
                key: absolute(&key, "--proxy-tls-key")?,
                min_version,
                required,
            })),
            (None, None) if required => Err(invalid(
                "--proxy-tls-required",
                "it needs --proxy-tls-cert and --proxy-tls-key",
            )),
            (None, None) => Ok(None),
            (Some(_), None) => Err(invalid("--proxy-tls-cert", "it needs --proxy-tls-key")),
            (None, Some(_)) => Err(invalid("--proxy-tls-key", "it needs --proxy-tls-cert")),
        }
    }
}

/// A file of this host, wherever a process runs. Links in it stay: whoever renews a certificate may point
/// them at another file. Only proxies need what is in it, so they say what is wrong with it.
fn absolute(path: &Path, flag: &'static str) -> Result<PathBuf, UsageError> {
    let whole = std::path::absolute(path).map_err(|error| UsageError::Invalid {
        flag,
        why: format!("{}: {error}", path.display()),
    })?;
    if let Err(error) = whole.metadata() {
        tracing::warn!(
            flag, path = %whole.display(), %error,
            "proxies of this host can't start before this file can be read"
        );
    }
    Ok(whole)
}

#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    #[error(transparent)]
    File(#[from] SettingsError),
    #[error("{flag} is missing: give it as a flag, in the environment, or in the settings file")]
    Missing { flag: &'static str },
    #[error("{flag}: {why}")]
    Invalid { flag: &'static str, why: String },
}

impl Settings {
    pub fn resolve(flags: Flags) -> Result<Self, UsageError> {
        let file: File = load(flags.config.as_deref())?;
        let proxy_tls = ProxyTls::resolve(&flags, &file)?;
        let missing = |flag| UsageError::Missing { flag };
        let host_id = flags.host_id.or(file.host_id).ok_or(missing("--host-id"))?;
        if !crate::host::is_id(&host_id) {
            let why = "letters, digits, '-', '_' and '.', at most 64".to_owned();
            return Err(UsageError::Invalid {
                flag: "--host-id",
                why,
            });
        }
        let default_listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let listen = flags.listen.or(file.listen).unwrap_or(default_listen);
        let advertise_ip = flags
            .advertise_ip
            .or(file.advertise_ip)
            .unwrap_or(listen.ip());
        if advertise_ip.is_ipv6() {
            let why = "nodes are reached over IPv4; name an IPv4 address of this host".to_owned();
            return Err(UsageError::Invalid {
                flag: "--advertise-ip",
                why,
            });
        }
        if advertise_ip.is_unspecified() {
            let why = "others can't connect to it; name an address of this host".to_owned();
            return Err(UsageError::Invalid {
                flag: "--advertise-ip",
                why,
            });
        }
        let controllers = if flags.controller.is_empty() {
            file.controllers.unwrap_or_default()
        } else {
            flags.controller
        };
        if controllers.is_empty() {
            return Err(missing("--controller"));
        }
        let mut engines = file.engines.unwrap_or_default();
        for engine in flags.engine {
            let (name, path) = engine.split_once('=').ok_or_else(|| UsageError::Invalid {
                flag: "--engine",
                why: format!("{engine:?} is not NAME=PATH"),
            })?;
            engines.insert(name.to_owned(), PathBuf::from(path));
        }
        Ok(Self {
            host_id,
            data: flags.data.or(file.data).ok_or(missing("--data"))?,
            listen,
            advertise_ip,
            controllers,
            engine_default: flags
                .engine_default
                .or(file.engine_default)
                .unwrap_or_else(|| "redis-server".to_owned()),
            engines,
            proxy_binary: flags
                .proxy_binary
                .or(file.proxy_binary)
                .unwrap_or_else(beside_us),
            proxy_tls,
            zone: flags.zone.or(file.zone).unwrap_or_default(),
            stop_all_on_exit: flags.stop_all_on_exit || file.stop_all_on_exit.unwrap_or(false),
            drain: match flags.drain || file.drain.unwrap_or(false) {
                true => Some(drain_limit(flags.drain_seconds.or(file.drain_seconds))?),
                false => None,
            },
            // Read now: after an upgrade the path would name what is not there any more.
            fencer_binary: std::env::current_exe().ok(),
        })
    }
}

fn drain_limit(seconds: Option<u32>) -> Result<Duration, UsageError> {
    match seconds.unwrap_or(DRAIN_SECONDS) {
        seconds @ 1..=DRAIN_SECONDS_MAX => Ok(Duration::from_secs(seconds.into())),
        _ => Err(UsageError::Invalid {
            flag: "--drain-seconds",
            why: format!("1 to {DRAIN_SECONDS_MAX}"),
        }),
    }
}

fn beside_us() -> PathBuf {
    const NAME: &str = "slotmesh-proxy";
    let beside = std::env::current_exe()
        .ok()
        .map(|exe| exe.with_file_name(NAME));
    beside.unwrap_or_else(|| PathBuf::from(NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(args: &[&str]) -> Result<Settings, String> {
        let flags = Flags::try_parse_from([&["slotmesh-agent"], args].concat());
        Settings::resolve(flags.map_err(|e| e.to_string())?).map_err(|e| e.to_string())
    }

    const MINIMUM: [&str; 6] = ["--host-id", "h1", "--data", "d", "--controller", "a:1,b:2"];

    #[test]
    fn the_minimum_is_host_data_and_controllers() {
        let settings = resolve(&MINIMUM).unwrap();
        assert_eq!(settings.controllers, ["a:1", "b:2"]);
        assert_eq!(settings.engine_default, "redis-server");
        assert!(settings.proxy_binary.ends_with("slotmesh-proxy"));
        assert!(resolve(&MINIMUM[2..]).unwrap_err().contains("--host-id"));
        assert!(resolve(&MINIMUM[..4]).unwrap_err().contains("--controller"));
    }

    #[test]
    fn values_that_make_no_sense_are_refused_by_the_name_of_their_flag() {
        let with = |extra: &[&str]| resolve(&[&MINIMUM, extra].concat()).unwrap_err();
        assert!(with(&["--engine", "redis-7"]).contains("--engine"));
        assert!(with(&["--drain", "--drain-seconds", "0"]).contains("--drain-seconds"));
        assert!(with(&["--listen", "0.0.0.0:0"]).contains("--advertise-ip"));
        assert!(
            resolve(&["--host-id", "../x"])
                .unwrap_err()
                .contains("--host-id")
        );
    }

    #[test]
    fn proxies_are_told_of_tls_what_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let [cert, key] = ["cert", "key"].map(|name| dir.path().join(name));
        std::fs::write(&cert, "").unwrap();
        std::fs::write(&key, "").unwrap();
        let [cert, key] = [&cert, &key].map(|path| path.to_str().unwrap());
        let with = |extra: &[&str]| resolve(&[&MINIMUM, extra].concat());
        let both = ["--proxy-tls-cert", cert, "--proxy-tls-key", key];
        let tls = with(&both).unwrap().proxy_tls.unwrap();
        assert_eq!((tls.min_version.as_str(), tls.required), ("1.2", false));
        assert_eq!(with(&[]).unwrap().proxy_tls, None);
        assert!(with(&both[..2]).unwrap_err().contains("--proxy-tls-key"));
        assert!(with(&both[2..]).unwrap_err().contains("--proxy-tls-cert"));
        let empty = with(&["--proxy-tls-cert", "", "--proxy-tls-key", key]);
        assert!(empty.unwrap_err().contains("--proxy-tls-cert"));
        assert!(with(&["--proxy-tls-required"]).is_err());
        let old = with(&[&both[..], &["--proxy-tls-min-version", "1.1"]].concat());
        assert!(old.unwrap_err().contains("1.2 or 1.3"));
    }

    #[test]
    fn a_proxys_certificate_may_be_a_link_and_need_not_be_there_yet() {
        let dir = tempfile::tempdir().unwrap();
        let [link, missing] = ["link", "missing"].map(|name| dir.path().join(name));
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let [cert, key] = [&link, &missing].map(|path| path.to_str().unwrap());
        let both = ["--proxy-tls-cert", cert, "--proxy-tls-key", key];
        let tls = resolve(&[&MINIMUM[..], &both].concat());
        let tls = tls.unwrap().proxy_tls.unwrap();
        assert_eq!((tls.cert, tls.key), (link, missing));
        let both = ["--proxy-tls-cert", "here", "--proxy-tls-key", "here"];
        let tls = resolve(&[&MINIMUM[..], &both].concat());
        assert!(tls.unwrap().proxy_tls.unwrap().cert.is_absolute());
    }

    #[test]
    fn a_flag_wins_over_the_file_and_an_unknown_field_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        let text = "host_id = \"f\"\nzone = \"z\"\n[engines]\nold = \"/opt/old\"\n";
        std::fs::write(&path, text).unwrap();
        let config = [
            "--config",
            path.to_str().unwrap(),
            "--engine",
            "new=/opt/new",
        ];
        let settings = resolve(&[&config, &MINIMUM[..]].concat()).unwrap();
        assert_eq!(
            (settings.host_id.as_str(), settings.zone.as_str()),
            ("h1", "z")
        );
        assert_eq!(settings.engines.len(), 2);
        std::fs::write(&path, "host = \"f\"\n").unwrap();
        let error = resolve(&[&config, &MINIMUM[..]].concat()).unwrap_err();
        assert!(
            error.contains("unknown field") && error.contains("host"),
            "{error}"
        );
    }
}
