//! A real etcd of one or more members whose members can be killed and started again, with TLS and
//! users if asked for.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use tempfile::TempDir;

use crate::{ports, wait_until};

const START_LIMIT: Duration = Duration::from_secs(30);
/// Another process may take a free port first.
const TRIES: u32 = 3;

/// PEM files for etcd and for those who ask it.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// A running cluster; killed when dropped.
#[derive(Debug)]
pub struct EtcdCluster {
    members: Vec<Member>,
    tls: Option<TlsFiles>,
    dir: TempDir,
}

#[derive(Debug)]
struct Member {
    name: String,
    client: String,
    peer: String,
    process: Option<Child>,
}

impl EtcdCluster {
    /// Starts so many members without TLS and waits until all are healthy.
    ///
    /// # Errors
    /// When there is no etcd, or it does not become healthy.
    pub async fn start(members: usize) -> anyhow::Result<Self> {
        Self::start_with(members, None).await
    }

    /// As [`EtcdCluster::start`]; with TLS, clients must show a certificate of the same authority.
    ///
    /// # Errors
    /// As [`EtcdCluster::start`].
    pub async fn start_with(members: usize, tls: Option<TlsFiles>) -> anyhow::Result<Self> {
        let mut last = None;
        for _ in 0..TRIES {
            match Self::try_start(members, tls.clone()).await {
                Ok(cluster) => return Ok(cluster),
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) => Err(error),
            None => bail!("etcd was not tried"),
        }
    }

    async fn try_start(members: usize, tls: Option<TlsFiles>) -> anyhow::Result<Self> {
        let mut cluster = Self {
            members: Vec::new(),
            tls,
            dir: tempfile::Builder::new().prefix("sm-etcd-").tempdir()?,
        };
        for number in 0..members {
            cluster.members.push(Member {
                name: format!("m{number}"),
                client: format!("127.0.0.1:{}", ports::free()?),
                peer: format!("http://127.0.0.1:{}", ports::free()?),
                process: None,
            });
        }
        for index in 0..members {
            cluster.spawn(index)?;
        }
        cluster.healthy().await?;
        Ok(cluster)
    }

    fn spawn(&mut self, index: usize) -> anyhow::Result<()> {
        let peers = self.members.iter();
        let peers: Vec<_> = peers.map(|m| format!("{}={}", m.name, m.peer)).collect();
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let member = &self.members[index];
        let client = format!("{scheme}://{}", member.client);
        let log = self.dir.path().join(format!("{}.log", member.name));
        let log = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new("etcd");
        command
            .args(["--name", &member.name, "--data-dir"])
            .arg(self.dir.path().join(&member.name))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &member.peer])
            .args(["--initial-advertise-peer-urls", &member.peer])
            .args(["--initial-cluster", &peers.join(",")]);
        if let Some(tls) = &self.tls {
            command.arg("--client-cert-auth");
            command.arg("--cert-file").arg(&tls.cert);
            command.arg("--key-file").arg(&tls.key);
            command.arg("--trusted-ca-file").arg(&tls.ca);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?);
        let process = command.stderr(log).spawn();
        self.members[index].process = Some(process.context("start etcd (package etcd-server)")?);
        Ok(())
    }

    /// Waits until every running member has a leader.
    ///
    /// # Errors
    /// When one does not in time.
    pub async fn healthy(&self) -> anyhow::Result<()> {
        wait_until(START_LIMIT, "etcd to be healthy", async || {
            let status = self.status()?;
            let running = self.members.iter().filter(|m| m.process.is_some()).count();
            let led = status.iter().filter(|(_, _, leader)| *leader != 0).count();
            anyhow::ensure!(led == running, "{led} of {running} have a leader");
            anyhow::Ok(())
        })
        .await
    }

    /// As `--store` takes it.
    #[must_use]
    pub fn store(&self) -> String {
        format!("etcd://{}", self.endpoints())
    }

    fn endpoints(&self) -> String {
        let clients: Vec<_> = self.members.iter().map(|m| m.client.as_str()).collect();
        clients.join(",")
    }

    /// A file of this cluster's directory, for the test's own use.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Index of the member that leads, once one that runs does.
    ///
    /// # Errors
    /// When none does for too long.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        wait_until(START_LIMIT, "a member to lead", async || self.leads_now()).await
    }

    fn leads_now(&self) -> anyhow::Result<usize> {
        let status = self.status()?;
        let leads = |(_, id, leader): &&(String, u64, u64)| id == leader;
        let (endpoint, ..) = status.iter().find(leads).context("no member leads")?;
        let found = self
            .members
            .iter()
            .position(|m| endpoint.ends_with(&m.client));
        found.context("the leader is no member")
    }

    /// Endpoint, own id, and leader's id of each running member.
    fn status(&self) -> anyhow::Result<Vec<(String, u64, u64)>> {
        let running = self.members.iter().filter(|m| m.process.is_some());
        let endpoints: Vec<_> = running.map(|m| m.client.as_str()).collect();
        let text = self.ctl_at(&endpoints.join(","), &["endpoint", "status", "-w", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&text)?;
        let members = status.as_array().context("status of members")?.iter();
        let number = |value: &serde_json::Value| value.as_u64().unwrap_or_default();
        let read = members.map(|m| {
            (
                m["Endpoint"].as_str().unwrap_or_default().to_owned(),
                number(&m["Status"]["header"]["member_id"]),
                number(&m["Status"]["leader"]),
            )
        });
        Ok(read.collect())
    }

    /// Runs etcdctl; gives what it printed.
    ///
    /// # Errors
    /// With what it said.
    pub fn ctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.ctl_at(&self.endpoints(), arguments)
    }

    fn ctl_at(&self, endpoints: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args([
            "--command-timeout=5s",
            "--dial-timeout=3s",
            "--endpoints",
        ]);
        if let Some(tls) = &self.tls {
            let https: Vec<_> = endpoints
                .split(',')
                .map(|e| format!("https://{e}"))
                .collect();
            command.arg(https.join(","));
            command.arg("--cacert").arg(&tls.ca);
            command.arg("--cert").arg(&tls.cert);
            command.arg("--key").arg(&tls.key);
        } else {
            command.arg(endpoints);
        }
        let output = command.args(arguments).output().context("run etcdctl")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Kills a member at once.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut process) = self.members[index].process.take() {
            // It may have died already.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Starts a killed member again, with the data that it had.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn restart(&mut self, index: usize) -> anyhow::Result<()> {
        self.kill(index);
        self.spawn(index)
    }

    /// Members, running or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Never: a cluster has a member.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Where its files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for EtcdCluster {
    fn drop(&mut self) {
        for index in 0..self.members.len() {
            self.kill(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn another_member_leads_when_the_leader_is_killed_and_it_comes_back() {
        let mut etcd = EtcdCluster::start(3).await.unwrap();
        let first = etcd.leader().await.unwrap();
        etcd.kill(first);
        etcd.healthy().await.unwrap();
        assert_ne!(etcd.leader().await.unwrap(), first);
        etcd.restart(first).unwrap();
        etcd.healthy().await.unwrap();
    }
}
