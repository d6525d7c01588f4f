//! A real etcd with one member, for one test.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{ports, wait_until};

const START_LIMIT: Duration = Duration::from_secs(20);
/// Another process may take a free port first.
const TRIES: u32 = 3;

/// A running etcd; killed when dropped.
#[derive(Debug)]
pub struct Etcd {
    process: Child,
    /// `host:port` of the client API.
    pub address: String,
    _dir: TempDir,
}

impl Etcd {
    /// Starts the etcd on PATH and waits until it is healthy.
    ///
    /// # Errors
    /// When there is none, or it does not become healthy.
    pub async fn start() -> anyhow::Result<Self> {
        let mut last = None;
        for _ in 0..TRIES {
            match Self::try_start().await {
                Ok(etcd) => return Ok(etcd),
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) => Err(error),
            None => bail!("etcd was not tried"),
        }
    }

    async fn try_start() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("sm-etcd-").tempdir()?;
        let address = format!("127.0.0.1:{}", ports::free()?);
        let (client, peer) = (
            format!("http://{address}"),
            format!("http://127.0.0.1:{}", ports::free()?),
        );
        let log = std::fs::File::create(dir.path().join("etcd.log"))?;
        let process = Command::new("etcd")
            .args(["--name", "test", "--data-dir"])
            .arg(dir.path().join("data"))
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--initial-cluster", &format!("test={peer}")])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start etcd (package etcd-server)")?;
        let etcd = Self {
            process,
            address,
            _dir: dir,
        };
        wait_until(START_LIMIT, "etcd to be healthy", async || {
            healthy(&etcd.address).await
        })
        .await?;
        Ok(etcd)
    }

    /// As `slotmesh up --store` takes it.
    pub fn store(&self) -> String {
        format!("etcd://{}", self.address)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

async fn healthy(address: &str) -> anyhow::Result<()> {
    let mut socket = TcpStream::connect(address).await?;
    socket.write_all(b"GET /health HTTP/1.0\r\n\r\n").await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    if !answer.contains("\"true\"") {
        bail!("it says {:?}", answer.lines().last().unwrap_or_default());
    }
    Ok(())
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may have died already; then there is nothing left to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signals;

    #[tokio::test]
    async fn an_etcd_is_gone_when_it_is_dropped() {
        let etcd = Etcd::start().await.unwrap();
        let pid = etcd.pid();
        assert!(signals::is_alive(pid));
        drop(etcd);
        assert!(!signals::is_alive(pid));
    }
}
