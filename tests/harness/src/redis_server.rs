//! A redis-server of its own, without any mesh: what the mesh is compared with.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use tempfile::TempDir;

use crate::{ports, wait_until};

const START_LIMIT: Duration = Duration::from_secs(15);

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct RedisServer {
    process: Child,
    pub address: String,
    _dir: TempDir,
}

impl RedisServer {
    /// Starts `engine` without persistence on a free port, with more arguments as given.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn start(engine: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("sm-redis-").tempdir()?;
        let port = ports::free()?;
        let process = Command::new(engine)
            .args([
                "--port",
                &port.to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
            ])
            .args(["--appendonly", "no", "--dir"])
            .arg(dir.path())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", engine.display()))?;
        let address = format!("127.0.0.1:{port}");
        let server = Self {
            process,
            address,
            _dir: dir,
        };
        wait_until(START_LIMIT, "redis-server to answer PING", async || {
            let mut client = slotmesh_ctl::redis::Client::connect(&server.address).await?;
            client.call(&[b"PING"]).await.map(|_| ())
        })
        .await?;
        Ok(server)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        // It may have died already; then there is nothing left to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
