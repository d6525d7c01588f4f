//! One host with one proxy of real processes, a redis-server behind it, and a catalogue of programs.

use std::{
    fs,
    net::TcpListener as StdListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use prost::Message as _;
use rustix::process::Signal;
use sha2::{Digest as _, Sha256};
use slotmesh_agent::{process::Process, settings::Settings};
use slotmesh_proto::{
    agent::v1::{Desired, HandoverState, ProcessState, ProxyReport, ProxySpec},
    artifact::v1::{
        AddArtifactRequest, AddArtifactResponse, Artifact, ListArtifactsRequest,
        ListArtifactsResponse, RemoveArtifactRequest, RemoveArtifactResponse,
        artifact_service_server::{ArtifactService, ArtifactServiceServer},
    },
    store::v1::{Product, ReleaseLevel},
    topology::v1 as topology,
};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::{
    controller::{Controller, password},
    hosts::{Agent, eventually, settings},
};

pub(crate) const PROXY: &str = "p-1";
const INSTANCE: &str = "r-1";
/// A program is fetched, asked and started, and tests itself, on a machine that may do much else.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(60);

/// The proxy's program, of the profile of this test.
pub(crate) fn program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let find = || {
        if let Some(given) = std::env::var_os("SLOTMESH_PROGRAMS") {
            return PathBuf::from(given).join("slotmesh-proxy");
        }
        let agent = Path::new(env!("CARGO_BIN_EXE_slotmesh-agent"));
        let mut build = Command::new(env!("CARGO"));
        // All programs as the tests of the whole mesh build them: with other features each of the two
        // would build everything again.
        build.args(["build", "--quiet", "--bins"]);
        for program in [
            "slotmesh-ctl",
            "slotmesh-controller",
            "slotmesh-agent",
            "slotmesh-proxy",
        ] {
            build.args(["--package", program]);
        }
        if agent.parent().is_some_and(|dir| dir.ends_with("release")) {
            build.arg("--release");
        }
        let built = build.status().unwrap();
        assert!(built.success(), "slotmesh-proxy can't be built");
        agent.with_file_name("slotmesh-proxy")
    };
    PROGRAM.get_or_init(find).clone()
}

/// A catalogue that says what it is told to.
#[derive(Debug, Clone, Default)]
struct Catalogue(Arc<Mutex<Vec<Artifact>>>);

#[tonic::async_trait]
impl ArtifactService for Catalogue {
    async fn list_artifacts(
        &self,
        request: Request<ListArtifactsRequest>,
    ) -> Result<Response<ListArtifactsResponse>, Status> {
        let name = request.into_inner().name;
        let all = self.0.lock().unwrap().clone();
        let named = all
            .into_iter()
            .filter(|a| name.is_empty() || a.name == name);
        Ok(Response::new(ListArtifactsResponse {
            artifacts: named.collect(),
        }))
    }

    async fn add_artifact(
        &self,
        _: Request<AddArtifactRequest>,
    ) -> Result<Response<AddArtifactResponse>, Status> {
        Err(Status::unimplemented("the test adds"))
    }

    async fn remove_artifact(
        &self,
        _: Request<RemoveArtifactRequest>,
    ) -> Result<Response<RemoveArtifactResponse>, Status> {
        Err(Status::unimplemented("nothing is removed"))
    }
}

/// See the module. All its processes are killed when it is dropped.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) controller: Controller,
    pub(crate) dir: TempDir,
    catalogue: Catalogue,
    catalogue_address: String,
    redis: Child,
}

impl World {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let free = StdListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let redis = redis(dir.path(), port);
        eventually("redis-server", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .is_ok()
        })
        .await;
        let catalogue = Catalogue::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let catalogue_address = listener.local_addr().unwrap().to_string();
        let server = tonic::transport::Server::builder()
            .add_service(ArtifactServiceServer::new(catalogue.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        let world = Self {
            controller: Controller::start().await,
            dir,
            catalogue,
            catalogue_address,
            redis,
        };
        world.save_topology(port);
        world
    }

    /// No controller here serves topologies, so the proxy starts from a saved one.
    fn save_topology(&self, port: u16) {
        let slots = topology::SlotRange {
            first: 0,
            last: 16383,
        };
        let route = topology::ShardRoute {
            shard_id: "s-1".to_owned(),
            slots: vec![slots],
            epoch: 1,
            primary_node_id: "a".to_owned(),
            primary_address: format!("127.0.0.1:{port}"),
            username: "px-1".to_owned(),
            password: password("px-1"),
            ..Default::default()
        };
        let snapshot = topology::Snapshot {
            revision: 1,
            settings: Some(topology::InstanceSettings {
                instance_id: INSTANCE.to_owned(),
                architecture: topology::Architecture::Standard.into(),
                databases: 16,
                ..Default::default()
            }),
            shards: vec![route],
        };
        let body = snapshot.encode_to_vec();
        let sum = Sha256::digest(&body);
        let file = [&b"SMPXTOP1"[..], &sum, &body].concat();
        fs::create_dir_all(self.proxy_dir()).unwrap();
        fs::write(self.proxy_dir().join("topology.pb"), file).unwrap();
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn proxy_dir(&self) -> PathBuf {
        self.data().join("proxies").join(PROXY)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.proxy_dir().join("proxy.log")).unwrap_or_default()
    }

    pub(crate) fn settings(&self) -> Settings {
        let mut settings = settings(&self.controller, "h-p", self.data());
        settings.proxy_binary = program();
        settings.controllers.push(self.catalogue_address.clone());
        settings
    }

    pub(crate) async fn start_agent(&self) -> Agent {
        Agent::start(self.settings()).await
    }

    /// An agent in a process of its own.
    pub(crate) fn spawn_agent(&self) -> tokio::process::Child {
        let controllers = format!("{},{}", self.controller.address, self.catalogue_address);
        tokio::process::Command::new(env!("CARGO_BIN_EXE_slotmesh-agent"))
            .args(["--host-id", "h-p", "--controller", &controllers, "--data"])
            .arg(self.data())
            .arg("--proxy-binary")
            .arg(program())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// Lists a program; its name.
    pub(crate) fn add(&self, version: &str, script: &str) -> String {
        let name = format!("proxy-{version}");
        let path = self.dir.path().join(&name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
        self.catalogue.0.lock().unwrap().push(Artifact {
            name: name.clone(),
            product: Product::Proxy.into(),
            version: version.to_owned(),
            level: ReleaseLevel::Low.into(),
            sha256: hex::encode(Sha256::digest(script)),
            source: format!("file://{}", path.display()),
            ..Default::default()
        });
        name
    }

    /// Another release of the proxy, in all but its number the one that was built.
    pub(crate) fn add_release(&self, version: &str) -> String {
        self.add_that_does(version, &format!("exec {} \"$@\"", program().display()))
    }

    /// A program that says of itself that it is this version, and does that.
    pub(crate) fn add_that_does(&self, version: &str, what: &str) -> String {
        let says = format!("[ \"$1\" = --version ] && echo slotmesh-proxy {version} && exit 0");
        self.add(version, &format!("#!/bin/sh\n{says}\n{what}\n"))
    }

    /// What a sum says is no longer what the file has.
    pub(crate) fn spoil(&self, name: &str) {
        fs::write(self.dir.path().join(name), "#!/bin/sh\nexit 0\n").unwrap();
    }

    pub(crate) fn assign(&self, program: &str, generation: u64) {
        self.assign_with(program, generation, |_| {});
    }

    /// As [`World::assign`], with more of the assignment said.
    pub(crate) fn assign_with(
        &self,
        program: &str,
        generation: u64,
        more: impl FnOnce(&mut ProxySpec),
    ) {
        let mut spec = ProxySpec {
            proxy_id: PROXY.to_owned(),
            instance_id: INSTANCE.to_owned(),
            desired: Desired::Running.into(),
            workers: 2,
            program: program.to_owned(),
            generation,
            ..ProxySpec::default()
        };
        more(&mut spec);
        self.controller.change(|record| record.proxies = vec![spec]);
    }

    /// Waits until a process serves that was started for this.
    pub(crate) async fn until_runs(&self, program: &str, generation: u64) -> ProxyReport {
        let what = format!("{program:?} of generation {generation} to serve");
        self.controller
            .until_proxy_in(EXCHANGE_LIMIT, &what, |p| {
                p.state() == ProcessState::Running
                    && p.program.as_deref() == Some(program)
                    && p.generation == generation
            })
            .await
    }

    /// Waits until the change to this has failed, and why.
    pub(crate) async fn until_failed(&self, program: &str, generation: u64) -> ProxyReport {
        let what = format!("{program} of generation {generation} to fail");
        self.controller
            .until_proxy_in(EXCHANGE_LIMIT, &what, |p| {
                p.handover.as_ref().is_some_and(|h| {
                    h.state() == HandoverState::Failed
                        && (h.program.as_str(), h.generation) == (program, generation)
                })
            })
            .await
    }

    /// The process that proxy.json names, if it lives.
    pub(crate) fn serving(&self) -> Option<Process> {
        let text = fs::read(self.proxy_dir().join("proxy.json")).ok()?;
        let known: serde_json::Value = serde_json::from_slice(&text).ok()?;
        Process::find(u32::try_from(known["pid"].as_u64()?).ok()?)
    }

    /// The program in the record of what serves.
    pub(crate) fn started_from(&self, process: Process) -> PathBuf {
        let text = fs::read(self.proxy_dir().join("runs.json")).unwrap_or_default();
        let known: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        let run = &known["serving"];
        let is_of = run["process"]["pid"].as_u64() == Some(process.pid.into());
        let path = run["origin"]["path"].as_str().filter(|_| is_of);
        PathBuf::from(path.unwrap_or_default())
    }

    /// Waits until nobody is left but who serves and those that it or its like have relieved.
    pub(crate) async fn until_alone_with_spares(&self) {
        eventually("every process to be known", async || {
            let text = fs::read(self.proxy_dir().join("runs.json")).unwrap_or_default();
            let known: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
            let spares = known["spares"].as_array().map_or(0, Vec::len);
            known["attempt"].is_null() && self.processes().len() == spares + 1
        })
        .await;
    }

    /// Processes of the proxy, however they came about.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let dir = self.proxy_dir();
        let all = fs::read_dir("/proc").unwrap().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let found = pids.filter_map(Process::find);
        found.filter(|process| process.runs_in(&dir)).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(4_000);
            println!(
                "the proxy's log ends with:\n{}",
                log.get(from..).unwrap_or(&log)
            );
        }
        for process in self.processes() {
            process.signal(Signal::KILL);
        }
        let _ = self.redis.kill();
        let _ = self.redis.wait();
    }
}

fn redis(dir: &Path, port: u16) -> Child {
    let port = port.to_string();
    Command::new("redis-server")
        .args(["--port", &port, "--bind", "127.0.0.1", "--save", ""])
        .args(["--appendonly", "no", "--user", "px-1", "on"])
        .arg(format!(">{}", password("px-1")))
        .args(["~*", "&*", "+@all", "--dir"])
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}
