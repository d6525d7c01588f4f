//! A mesh over the places of a [`Net`]: one etcd, three controllers, three hosts, each in a place of
//! its own, as on that many machines.
//!
//! Invariant: every process is known by its place and pid; what a fault kills is started again with
//! the same arguments when the fault ends.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use slotmesh_ctl::api::Api;
use slotmesh_harness::{programs, signals, wait_until};
use slotmesh_proto::{
    instance::v1::{CreateInstanceRequest, Shard},
    store::v1::{InstanceState, NodeRole},
};

use super::net::Net;

/// Controllers' places.
pub(super) const CONTROLLERS: [&str; 3] = ["c1", "c2", "c3"];
/// Hosts' places.
pub(super) const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
/// The store's place.
pub(super) const STORE: &str = "store";
/// Where the clients and this program are.
pub(super) const OPS: &str = "ops";

const STORE_PORT: u16 = 2379;
const CONTROLLER_PORT: u16 = 7000;
const AGENT_PORT: u16 = 7100;
/// Processes listen within seconds; a loaded machine may take longer.
const START_LIMIT: Duration = Duration::from_secs(60);
/// After the last fault: a lease, a failover, a full sync.
pub(super) const HEAL_LIMIT: Duration = Duration::from_secs(90);

/// What is asked of the instance.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// Shards.
    pub(super) shards: u32,
    /// Replicas of each.
    pub(super) replicas: u32,
    /// Replicas that must have a write before it is acknowledged.
    pub(super) durability: u32,
    /// Reads wait for what they may have seen, too.
    pub(super) read_gate: bool,
}

/// The processes of a run.
#[derive(Debug)]
pub(super) struct Mesh {
    net: Net,
    dir: PathBuf,
    running: BTreeMap<String, Child>,
    /// The instance under test.
    pub(super) instance: String,
    /// Its endpoints, in the order of the hosts.
    pub(super) proxies: Vec<String>,
}

impl Mesh {
    /// Starts everything and waits until the instance serves.
    ///
    /// # Errors
    /// Says what was waited for.
    pub(super) async fn start(net: Net, dir: &Path, shape: &Shape) -> anyhow::Result<Self> {
        let mut mesh = Self {
            net,
            dir: dir.to_owned(),
            running: BTreeMap::new(),
            instance: String::new(),
            proxies: Vec::new(),
        };
        let mut api = wait_until(START_LIMIT, "a controller to answer", async || {
            mesh.launch_all()?;
            mesh.api().await
        })
        .await?;
        wait_until(START_LIMIT, "the hosts to register", async || {
            let request = slotmesh_proto::fleet::v1::ListHostsRequest {};
            let hosts = api
                .call(|api| async move { api.fleet().list_hosts(request).await })
                .await?;
            anyhow::ensure!(
                hosts.hosts.len() == HOSTS.len(),
                "{} are",
                hosts.hosts.len()
            );
            Ok::<_, anyhow::Error>(())
        })
        .await?;
        mesh.create(&mut api, shape).await?;
        mesh.wait_healthy(START_LIMIT).await?;
        Ok(mesh)
    }

    async fn create(&mut self, api: &mut Api, shape: &Shape) -> anyhow::Result<()> {
        let request = CreateInstanceRequest {
            name: "chaos".into(),
            shard_count: shape.shards,
            replicas_per_shard: Some(shape.replicas),
            proxy_count: Some(3),
            durability: shape.durability,
            client_token: "chaos".into(),
            ..CreateInstanceRequest::default()
        };
        let created = api
            .call(|api| {
                let request = request.clone();
                async move { api.instances().create_instance(request).await }
            })
            .await?;
        self.instance = created.instance_id;
        if shape.read_gate {
            let request = slotmesh_proto::instance::v1::UpdateParametersRequest {
                instance_id: self.instance.clone(),
                proxy: [("read_gate".to_owned(), "yes".to_owned())].into(),
                ..Default::default()
            };
            wait_until(START_LIMIT, "the parameter to be taken", async || {
                api.call(|api| {
                    let request = request.clone();
                    async move { api.instances().update_parameters(request).await }
                })
                .await
            })
            .await?;
        }
        let id = self.instance.clone();
        let found = wait_until(START_LIMIT, "the instance to run", async || {
            let found = api.describe_instances(std::slice::from_ref(&id)).await?;
            let one = found.into_iter().next().context("it is not there")?;
            let serves = one.state() == InstanceState::Running
                && one.proxies.iter().all(|p| !p.address.is_empty());
            anyhow::ensure!(serves, "it is {:?}", one.state());
            Ok::<_, anyhow::Error>(one)
        })
        .await?;
        let mut proxies = found.proxies;
        proxies.sort_by(|a, b| a.host_id.cmp(&b.host_id));
        self.proxies = proxies.into_iter().map(|p| p.address).collect();
        Ok(())
    }

    /// A connection to whichever controller answers.
    ///
    /// # Errors
    /// When none does.
    pub(super) async fn api(&self) -> anyhow::Result<Api> {
        let mut last = None;
        for name in CONTROLLERS {
            let address = format!("{}:{CONTROLLER_PORT}", self.net.place(name)?.ip);
            match Api::connect(&address).await {
                Ok(mut api) => match api.describe_instances(&[]).await {
                    Ok(_) => return Ok(api),
                    Err(error) => last = Some(error),
                },
                Err(error) => last = Some(error),
            }
        }
        bail!("no controller answers: {last:?}")
    }

    /// The shards as a controller shows them.
    ///
    /// # Errors
    /// When none answers.
    pub(super) async fn shards(&self) -> anyhow::Result<Vec<Shard>> {
        Ok(self.api().await?.describe_shards(&self.instance).await?)
    }

    /// Waits until every shard serves with all its nodes, and every proxy answers.
    ///
    /// # Errors
    /// Says what is missing.
    pub(super) async fn wait_healthy(&mut self, limit: Duration) -> anyhow::Result<()> {
        wait_until(
            limit,
            "every shard to serve with all its nodes",
            async || {
                self.launch_all()?;
                for shard in self.shards().await? {
                    anyhow::ensure!(
                        shard.mode == "Serving",
                        "shard {} is {}",
                        shard.shard_id,
                        shard.mode
                    );
                    let mut replicas = shard
                        .nodes
                        .iter()
                        .filter(|n| n.current_role() != NodeRole::Primary);
                    let behind = replicas.find(|n| !n.in_sync);
                    if let Some(node) = behind {
                        bail!("{} is not in sync", node.node_id);
                    }
                }
                for proxy in &self.proxies {
                    let mut connection = super::client::connect(proxy).await?;
                    redis::cmd("PING")
                        .query_async::<()>(&mut connection)
                        .await?;
                }
                Ok(())
            },
        )
        .await
    }

    /// The pid of what runs in a place.
    #[must_use]
    pub(super) fn pid(&self, name: &str) -> Option<u32> {
        self.running.get(name).map(Child::id)
    }

    /// The network that it runs on.
    #[must_use]
    pub(super) fn net(&self) -> &Net {
        &self.net
    }

    /// Directory of a place.
    #[must_use]
    pub(super) fn dir_of(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Pid and place of a shard's primary or of its first replica.
    ///
    /// # Errors
    /// When the shards can't be seen, or there is no such node with a process.
    pub(super) async fn node(&self, index: usize, primary: bool) -> anyhow::Result<(u32, String)> {
        let shards = self.shards().await?;
        let shard = &shards[index % shards.len()];
        let found = shard
            .nodes
            .iter()
            .find(|n| (n.current_role() == NodeRole::Primary) == primary && n.pid > 0);
        let node = found.context("no such node runs now")?;
        Ok((node.pid, node.host_id.clone()))
    }

    /// Starts what does not run, as systemd would: a controller ends when it finds no store.
    ///
    /// # Errors
    /// When it can't be started.
    pub(super) fn launch_all(&mut self) -> anyhow::Result<()> {
        let names = [STORE].into_iter().chain(CONTROLLERS).chain(HOSTS);
        for name in names {
            self.launch(name)?;
        }
        Ok(())
    }

    /// Starts the process of a place, if it does not run.
    ///
    /// # Errors
    /// When it can't be started.
    pub(super) fn launch(&mut self, name: &str) -> anyhow::Result<()> {
        if let Some(child) = self.running.get_mut(name)
            && child.try_wait()?.is_none()
        {
            return Ok(());
        }
        let place = self.net.place(name)?.clone();
        let dir = self.dir_of(name);
        std::fs::create_dir_all(&dir)?;
        let (program, arguments) = self.command_of(name, &place.ip, &dir)?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join("log"))?;
        let child = place
            .command(&program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        self.running.insert(name.to_owned(), child);
        Ok(())
    }

    fn command_of(
        &self,
        name: &str,
        ip: &str,
        dir: &Path,
    ) -> anyhow::Result<(PathBuf, Vec<String>)> {
        let text = |path: &Path| path.display().to_string();
        let store = format!("{}:{STORE_PORT}", self.net.place(STORE)?.ip);
        if name == STORE {
            let (client, peer) = (
                format!("http://{ip}:{STORE_PORT}"),
                format!("http://{ip}:2380"),
            );
            let arguments = [
                "--name=store".to_owned(),
                format!("--data-dir={}", text(&dir.join("data"))),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=store={peer}"),
            ];
            return Ok((PathBuf::from("etcd"), arguments.into()));
        }
        let data = text(&dir.join("d"));
        if CONTROLLERS.contains(&name) {
            let arguments = [
                format!("--id={name}"),
                format!("--listen={ip}:{CONTROLLER_PORT}"),
                format!("--store=etcd://{store}"),
                format!("--data={data}"),
            ];
            return Ok((programs::path("slotmesh-controller")?, arguments.into()));
        }
        let mut arguments = vec![
            format!("--host-id={name}"),
            format!("--listen={ip}:{AGENT_PORT}"),
            format!("--data={data}"),
        ];
        for controller in CONTROLLERS {
            let address = &self.net.place(controller)?.ip;
            arguments.push(format!("--controller={address}:{CONTROLLER_PORT}"));
        }
        Ok((programs::path("slotmesh-agent")?, arguments))
    }

    /// Kills what runs in a place; its own children live on.
    ///
    /// # Errors
    /// When it is gone already.
    pub(super) fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let child = self.running.get_mut(name).context("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Kills everything of the run but the place where this program is.
    pub(super) fn stop(&mut self) {
        for (_, child) in std::mem::take(&mut self.running) {
            signals::kill_blocking(child.id(), Duration::from_secs(5));
        }
        for place in self.net.places.iter().filter(|p| p.name != OPS) {
            self.net.empty(&place.namespace);
        }
    }
}
