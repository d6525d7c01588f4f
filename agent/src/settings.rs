//! What the operator may say: flags over environment over file.
//!
//! Invariant: a [`Settings`] is complete and makes sense; whatever does not is refused with the name
//! of the flag.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
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
    pub zone: String,
    pub stop_all_on_exit: bool,
    /// How long the primaries are moved away before the agent ends; `None`: they are not.
    pub drain: Option<Duration>,
    /// This program, as the fencer; `None`: there is none.
    pub fencer_binary: Option<PathBuf>,
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
