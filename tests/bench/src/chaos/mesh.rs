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
use redis::{AsyncConnectionConfig, aio::MultiplexedConnection};
use slotmesh_ctl::api::Api;
use slotmesh_harness::{programs, signals, wait_until};
use slotmesh_proto::{
    instance::v1::{CreateInstanceRequest, Shard},
    store::v1::{InstanceState, NodeRole},
    task::v1::{EpochChange, ListEpochsRequest},
};
use tokio::time::{Instant, sleep};

use super::{
    fault::{clock, disk},
    net::Net,
};

/// Controllers' places.
pub(crate) const CONTROLLERS: [&str; 3] = ["c1", "c2", "c3"];
/// Hosts' places.
pub(crate) const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
/// The store's place.
pub(crate) const STORE: &str = "store";
/// Where the clients and this program are.
pub(crate) const OPS: &str = "ops";

const STORE_PORT: u16 = 2379;
const CONTROLLER_PORT: u16 = 7000;
const AGENT_PORT: u16 = 7100;
/// Processes listen within seconds; a loaded machine may take longer.
const START_LIMIT: Duration = Duration::from_secs(60);
/// After the last fault: a lease, a failover, a full sync.
pub(crate) const HEAL_LIMIT: Duration = Duration::from_secs(90);

/// One look whether it is still so.
const GLANCE: Duration = Duration::from_millis(500);

/// The account of agents at their nodes.
const ADMIN: &str = "slotmesh-admin";
/// A command that makes a node stand still, and some.
const ADMIN_LIMIT: Duration = Duration::from_secs(15);
/// What the API gives at most.
const EPOCHS_MAX: u32 = 1_000;

/// What is asked of the instance, and of the machine below it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shape {
    /// Shards.
    pub(crate) shards: u32,
    /// Replicas of each.
    pub(crate) replicas: u32,
    /// Replicas that must have a write before it is acknowledged.
    pub(crate) durability: u32,
    /// Reads wait for what they may have seen, too.
    pub(crate) read_gate: bool,
    /// Hosts and store have disks of their own, where the kernel has loop devices.
    pub(crate) disks: bool,
    /// Clocks of controllers and hosts can be bent, where the library for it is installed.
    pub(crate) clocks: bool,
    /// How far every process of the mesh stands back for others, -20 to 19.
    pub(crate) nice: i32,
    /// Of the nodes, a name that agents know or a path; empty: the agents' default.
    pub(crate) engine: String,
}

/// The processes of a run.
#[derive(Debug)]
pub(crate) struct Mesh {
    net: Net,
    dir: PathBuf,
    nice: i32,
    running: BTreeMap<String, Child>,
    complaints: Vec<String>,
    /// Places with a disk of their own.
    disks: Vec<PathBuf>,
    clocks: bool,
    /// The instance under test.
    pub(crate) instance: String,
    /// Its endpoints, in the order of the hosts.
    pub(crate) proxies: Vec<String>,
}

impl Mesh {
    /// Starts everything and waits until the instance serves.
    ///
    /// # Errors
    /// Says what was waited for.
    pub(crate) async fn start(net: Net, dir: &Path, shape: &Shape) -> anyhow::Result<Self> {
        let mut mesh = Self {
            net,
            dir: dir.to_owned(),
            nice: shape.nice,
            running: BTreeMap::new(),
            complaints: Vec::new(),
            disks: Vec::new(),
            clocks: shape.clocks,
            instance: String::new(),
            proxies: Vec::new(),
        };
        if shape.disks {
            mesh.mount_disks();
        }
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

    /// Without them faults of disks can't be done, and say so; all others can.
    fn mount_disks(&mut self) {
        for name in HOSTS.into_iter().chain([STORE]) {
            let dir = self.data_of(name);
            if disk::mount(&dir).is_ok() {
                self.disks.push(dir);
            }
        }
    }

    async fn create(&mut self, api: &mut Api, shape: &Shape) -> anyhow::Result<()> {
        let request = CreateInstanceRequest {
            name: "chaos".into(),
            shard_count: shape.shards,
            replicas_per_shard: Some(shape.replicas),
            proxy_count: Some(3),
            durability: shape.durability,
            engine: shape.engine.clone(),
            client_token: "chaos".into(),
            // For faults in which an engine stands still, which it does for its admin only.
            parameters: [("enable-debug-command".to_owned(), "yes".to_owned())].into(),
            ..CreateInstanceRequest::default()
        };
        // A loaded machine's hosts come and go while all of them start.
        let created = wait_until(START_LIMIT, "the instance to be taken", async || {
            api.call(|api| {
                let request = request.clone();
                async move { api.instances().create_instance(request).await }
            })
            .await
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
    pub(crate) async fn api(&self) -> anyhow::Result<Api> {
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

    /// A connection to one controller.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) async fn api_at(&self, name: &str) -> anyhow::Result<Api> {
        let address = format!("{}:{CONTROLLER_PORT}", self.net.place(name)?.ip);
        Ok(Api::connect(&address).await?)
    }

    /// Where the store is asked.
    ///
    /// # Errors
    /// When it has no place.
    pub(crate) fn store(&self) -> anyhow::Result<String> {
        Ok(format!("http://{}:{STORE_PORT}", self.net.place(STORE)?.ip))
    }

    /// A promise was broken that no client of the load can see.
    pub(crate) fn complain(&mut self, what: String) {
        self.complaints.push(what);
    }

    /// What was complained of since this was last asked.
    pub(crate) fn complaints(&mut self) -> Vec<String> {
        std::mem::take(&mut self.complaints)
    }

    /// The shards as a controller shows them.
    ///
    /// # Errors
    /// When none answers.
    pub(crate) async fn shards(&self) -> anyhow::Result<Vec<Shard>> {
        Ok(self.api().await?.describe_shards(&self.instance).await?)
    }

    /// Waits until every shard serves with all its nodes, and every proxy answers.
    ///
    /// # Errors
    /// Says what is missing.
    pub(crate) async fn wait_healthy(&mut self, limit: Duration) -> anyhow::Result<()> {
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

    /// Waits until the mesh is well and stays so for a while: a process that has just been started
    /// again is looked for a second later, and until then the records say that nothing has happened.
    /// Returns how long it took until then.
    ///
    /// # Errors
    /// Says what is missing.
    pub(crate) async fn wait_steady(
        &mut self,
        steady: Duration,
        limit: Duration,
    ) -> anyhow::Result<Duration> {
        let began = Instant::now();
        loop {
            let left = limit.saturating_sub(began.elapsed());
            self.wait_healthy(left).await?;
            let took = began.elapsed();
            sleep(steady).await;
            if self.wait_healthy(GLANCE).await.is_ok() {
                return Ok(took);
            }
        }
    }

    /// The pid of what runs in a place.
    #[must_use]
    pub(crate) fn pid(&self, name: &str) -> Option<u32> {
        self.running.get(name).map(Child::id)
    }

    /// The network that it runs on.
    #[must_use]
    pub(crate) fn net(&self) -> &Net {
        &self.net
    }

    /// Directory of a place.
    #[must_use]
    pub(crate) fn dir_of(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where the process of a place keeps its data; its log is elsewhere.
    #[must_use]
    pub(crate) fn data_of(&self, name: &str) -> PathBuf {
        let data = if name == STORE { "data" } else { "d" };
        self.dir_of(name).join(data)
    }

    /// Pid and place of a shard's primary or of its first replica.
    ///
    /// # Errors
    /// When the shards can't be seen, or there is no such node with a process.
    pub(crate) async fn node(&self, index: usize, primary: bool) -> anyhow::Result<(u32, String)> {
        let shards = self.shards().await?;
        let shard = &shards[index % shards.len()];
        let found = shard
            .nodes
            .iter()
            .find(|n| (n.current_role() == NodeRole::Primary) == primary && n.pid > 0);
        let node = found.context("no such node runs now")?;
        Ok((node.pid, node.host_id.clone()))
    }

    /// A connection to a node as its agent has one, past all proxies.
    ///
    /// # Errors
    /// When the node can't be asked.
    pub(crate) async fn admin(pid: u32) -> anyhow::Result<MultiplexedConnection> {
        let dir = dir_of_node(pid)?;
        let secret = std::fs::read_to_string(dir.join("admin.secret"))
            .with_context(|| format!("read the secret of {}", dir.display()))?;
        let socket = dir.join("admin.sock");
        let url = format!(
            "unix://{}?user={ADMIN}&pass={}",
            socket.display(),
            secret.trim()
        );
        let config = AsyncConnectionConfig::new()
            .set_response_timeout(Some(ADMIN_LIMIT))
            .set_connection_timeout(Some(ADMIN_LIMIT));
        let client = redis::Client::open(url)?;
        let connection = client.get_multiplexed_async_connection_with_config(&config);
        connection.await.context("reach a node by its socket")
    }

    /// Every change of a primary since the instance is there, oldest first, as audited.
    ///
    /// # Errors
    /// When no controller answers.
    pub(crate) async fn epochs(&self) -> anyhow::Result<Vec<EpochChange>> {
        let request = ListEpochsRequest {
            instance_id: self.instance.clone(),
            shard_id: String::new(),
            page_size: EPOCHS_MAX,
        };
        let answer = self
            .api()
            .await?
            .call(|api| {
                let request = request.clone();
                async move { api.tasks().list_epochs(request).await }
            })
            .await?;
        let mut epochs = answer.epochs;
        epochs.sort_by(|a, b| (&a.shard_id, a.epoch).cmp(&(&b.shard_id, b.epoch)));
        Ok(epochs)
    }

    /// Starts what does not run, as systemd would: a controller ends when it finds no store.
    ///
    /// # Errors
    /// When it can't be started.
    pub(crate) fn launch_all(&mut self) -> anyhow::Result<()> {
        self.launch_missing().map(drop)
    }

    /// As [`Mesh::launch_all`]; says what it had to start.
    ///
    /// # Errors
    /// When it can't be started.
    pub(crate) fn launch_missing(&mut self) -> anyhow::Result<Vec<&'static str>> {
        let mut missing = Vec::new();
        for name in [STORE].into_iter().chain(CONTROLLERS).chain(HOSTS) {
            if self.launch(name)? {
                missing.push(name);
            }
        }
        Ok(missing)
    }

    /// Starts the process of a place, if it does not run; whether it had to.
    ///
    /// # Errors
    /// When it can't be started.
    pub(crate) fn launch(&mut self, name: &str) -> anyhow::Result<bool> {
        if let Some(child) = self.running.get_mut(name)
            && child.try_wait()?.is_none()
        {
            return Ok(false);
        }
        let place = self.net.place(name)?.clone();
        let dir = self.dir_of(name);
        std::fs::create_dir_all(&dir)?;
        let (program, arguments) = self.command_of(name, &place.ip)?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join("log"))?;
        let mut bent = Vec::new();
        if self.clocks && name != STORE {
            bent = clock::environment(&dir)?;
        }
        let child = place
            .command(Path::new("nice"))
            .envs(bent)
            .arg(format!("--adjustment={}", self.nice))
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        self.running.insert(name.to_owned(), child);
        Ok(true)
    }

    fn command_of(&self, name: &str, ip: &str) -> anyhow::Result<(PathBuf, Vec<String>)> {
        let text = |path: &Path| path.display().to_string();
        let store = format!("{}:{STORE_PORT}", self.net.place(STORE)?.ip);
        if name == STORE {
            let (client, peer) = (
                format!("http://{ip}:{STORE_PORT}"),
                format!("http://{ip}:2380"),
            );
            let arguments = [
                "--name=store".to_owned(),
                format!("--data-dir={}", text(&self.data_of(name))),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=store={peer}"),
            ];
            return Ok((PathBuf::from("etcd"), arguments.into()));
        }
        let data = text(&self.data_of(name));
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
    pub(crate) fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let child = self.running.get_mut(name).context("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Kills everything of the run but the place where this program is.
    pub(crate) fn stop(&mut self) {
        for (_, child) in std::mem::take(&mut self.running) {
            signals::kill_blocking(child.id(), Duration::from_secs(5));
        }
        for place in self.net.places.iter().filter(|p| p.name != OPS) {
            self.net.empty(&place.namespace);
        }
        for dir in self.disks.drain(..) {
            disk::unmount(&dir);
        }
    }
}

/// Where a node's files are.
///
/// # Errors
/// When it has no process.
pub(crate) fn dir_of_node(pid: u32) -> anyhow::Result<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/cwd")).context("find the node's files")
}
