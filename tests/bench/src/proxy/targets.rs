//! What is measured: our proxy, one Redis directly, twemproxy, and proxies that run already.
//!
//! Invariant: every target has shards of its own kind and number behind it, and what was started here
//! is gone when its value is dropped.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use slotmesh_ctl::up::contract::Contract;
use slotmesh_harness::{RedisServer, engines, foreign, ports, wait_until};
use tempfile::TempDir;

pub(crate) const SLOTMESH: &str = "slotmesh";
pub(crate) const DIRECT: &str = "direct";
pub(crate) const TWEMPROXY: &str = "twemproxy";

const START_LIMIT: Duration = Duration::from_secs(15);
/// Another process may take a free port first.
const TRIES: u32 = 3;

/// One thing to measure, and the process whose time counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) pid: u32,
    /// Whether clients speak TLS.
    pub(crate) tls: bool,
}

impl Target {
    pub(crate) fn new(name: &str, address: &str, pid: u32) -> anyhow::Result<Self> {
        let parts = address.rsplit_once(':');
        let (host, port) = parts.with_context(|| format!("{address:?} is not HOST:PORT"))?;
        let port = port
            .parse()
            .with_context(|| format!("{port:?} is no port"))?;
        Ok(Self {
            name: name.to_owned(),
            host: host.to_owned(),
            port,
            pid,
            tls: false,
        })
    }

    /// The same process, through TLS.
    pub(crate) fn with_tls(&self, port: u16) -> Self {
        Self {
            name: format!("{} TLS", self.name),
            port,
            tls: true,
            ..self.clone()
        }
    }
}

/// What proves who a server is, for as long as it is measured.
#[derive(Debug)]
pub(crate) struct Certificate {
    cert: String,
    key: String,
    _directory: TempDir,
}

impl Certificate {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let [cert, key] = foreign::certificate(directory.path())?;
        Ok(Self {
            cert,
            key,
            _directory: directory,
        })
    }

    /// As an agent wants it for its proxies.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let named = |name: &str, value: &str| {
            let name = format!("SLOTMESH_AGENT_PROXY_TLS_{name}");
            (name, value.to_owned())
        };
        vec![named("CERT", &self.cert), named("KEY", &self.key)]
    }
}

/// The one proxy of a mesh.
pub(crate) fn of_mesh(contract: &Contract) -> anyhow::Result<Target> {
    let (address, pid) = contract
        .proxies
        .first()
        .zip(contract.pids.proxies.first())
        .context("the mesh has no proxy")?;
    Target::new(SLOTMESH, address, *pid)
}

/// `--peer NAME=HOST:PORT:PID`.
#[derive(Debug, Clone)]
pub(crate) struct PeerSpec(Target);

impl PeerSpec {
    pub(crate) fn target(&self) -> Target {
        self.0.clone()
    }
}

impl FromStr for PeerSpec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let wanted = || anyhow!("{text:?} is not NAME=HOST:PORT:PID");
        let (name, rest) = text.split_once('=').ok_or_else(wanted)?;
        let (address, pid) = rest.rsplit_once(':').ok_or_else(wanted)?;
        let taken = [SLOTMESH, DIRECT, TWEMPROXY].contains(&name);
        ensure!(
            !name.is_empty() && !taken,
            "{name:?} cannot be a peer's name"
        );
        Ok(Self(Target::new(
            name,
            address,
            pid.parse().map_err(|_| wanted())?,
        )?))
    }
}

/// Plain servers: one to be measured directly, the others behind twemproxy.
#[derive(Debug)]
pub(crate) struct Servers {
    direct: RedisServer,
    direct_tls: Option<u16>,
    twemproxy: Twemproxy,
}

impl Servers {
    /// With a certificate, the direct one listens with TLS too.
    pub(crate) async fn start(
        engine: &str,
        shards: u32,
        certificate: Option<&Certificate>,
    ) -> anyhow::Result<Self> {
        let engine = engines::find(engine)?;
        let direct_tls = certificate.map(|_| ports::free()).transpose()?;
        let port = direct_tls.unwrap_or_default().to_string();
        let direct = match certificate {
            None => RedisServer::start(&engine, &[]).await?,
            Some(Certificate { cert, key, .. }) => {
                let files = ["--tls-cert-file", cert, "--tls-key-file", key];
                let listens = ["--tls-port", &port, "--tls-auth-clients", "no"];
                RedisServer::start(&engine, &[files, listens].concat()).await?
            }
        };
        let mut behind = Vec::new();
        for _ in 0..shards {
            behind.push(RedisServer::start(&engine, &[]).await?);
        }
        Ok(Self {
            direct,
            direct_tls,
            twemproxy: Twemproxy::start(behind).await?,
        })
    }

    pub(crate) fn direct(&self) -> anyhow::Result<Vec<Target>> {
        let plain = Target::new(DIRECT, &self.direct.address, self.direct.pid())?;
        let tls = self.direct_tls.map(|port| plain.with_tls(port));
        Ok([Some(plain), tls].into_iter().flatten().collect())
    }

    pub(crate) fn twemproxy(&self) -> anyhow::Result<Target> {
        Target::new(
            TWEMPROXY,
            &self.twemproxy.address,
            self.twemproxy.process.id(),
        )
    }
}

/// A nutcracker with its default settings over some servers; killed when dropped.
#[derive(Debug)]
struct Twemproxy {
    process: Child,
    address: String,
    _behind: Vec<RedisServer>,
    _directory: TempDir,
}

impl Twemproxy {
    async fn start(mut behind: Vec<RedisServer>) -> anyhow::Result<Self> {
        let mut last = anyhow!("twemproxy was not tried");
        for _ in 0..TRIES {
            match Self::try_start(behind).await {
                Ok(proxy) => return Ok(proxy),
                Err((servers, error)) => (behind, last) = (servers, error),
            }
        }
        Err(last)
    }

    /// Gives the servers back if it does not come to life.
    async fn try_start(
        behind: Vec<RedisServer>,
    ) -> Result<Self, (Vec<RedisServer>, anyhow::Error)> {
        let (process, address, directory) = match spawn(&behind) {
            Ok(spawned) => spawned,
            Err(error) => return Err((behind, error)),
        };
        let mut proxy = Self {
            process,
            address,
            _behind: behind,
            _directory: directory,
        };
        let served = wait_until(START_LIMIT, "twemproxy to answer PING", async || {
            let mut client = slotmesh_ctl::redis::Client::connect(&proxy.address).await?;
            client.call(&[b"PING"]).await.map(|_| ())
        })
        .await;
        match served {
            Ok(()) => Ok(proxy),
            Err(error) => Err((std::mem::take(&mut proxy._behind), error)),
        }
    }
}

fn spawn(behind: &[RedisServer]) -> anyhow::Result<(Child, String, TempDir)> {
    let directory = tempfile::Builder::new().prefix("sm-twem-").tempdir()?;
    let (port, stats) = (ports::free()?, ports::free()?);
    let servers: String = behind
        .iter()
        .map(|server| format!("   - {}:1\n", server.address))
        .collect();
    let settings = format!(
        "bench:\n  listen: 127.0.0.1:{port}\n  hash: fnv1a_64\n  distribution: ketama\n  \
         redis: true\n  servers:\n{servers}"
    );
    let path = directory.path().join("nutcracker.yml");
    fs::write(&path, settings)?;
    let process = Command::new("nutcracker")
        .arg("-c")
        .arg(&path)
        .arg("-o")
        .arg(directory.path().join("log"))
        .args(["-s", &stats.to_string(), "-a", "127.0.0.1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start nutcracker (package nutcracker)")?;
    Ok((process, format!("127.0.0.1:{port}"), directory))
}

impl Drop for Twemproxy {
    fn drop(&mut self) {
        // It may have died already; then there is nothing left to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_a_name_an_address_and_a_pid() {
        let peer: PeerSpec = "predixy=127.0.0.1:7617:42".parse().unwrap();
        let target = Target {
            name: "predixy".into(),
            host: "127.0.0.1".into(),
            port: 7617,
            pid: 42,
            tls: false,
        };
        assert_eq!(peer.target(), target);
        for text in [
            "",
            "x",
            "x=1:2",
            "=h:1:2",
            "direct=h:1:2",
            "x=h:70000:2",
            "x=h:1:y",
        ] {
            assert!(text.parse::<PeerSpec>().is_err(), "{text}");
        }
    }
}
