//! Programs of two releases in one mesh: each of its parts gets another release's program while the
//! others run the one before, switches and fails over meanwhile, and nobody notices.
//!
//! `SLOTMESH_OTHER_PROGRAMS` names the directory with the programs of the release that the mesh begins
//! with. Without it both are this one, and what is seen is that every part may be exchanged.

#![allow(clippy::unwrap_used)]

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use slotmesh_e2e::{
    connect,
    controllers::{LIMIT, leader, sees_all_nodes, switch_over},
    ctl, json,
    load::Load,
    roles,
    upgrades::in_sync,
};
use slotmesh_harness::{EtcdCluster, Mesh, MeshOptions, programs, signals, wait_until};
use tempfile::TempDir;

const OTHER_VARIABLE: &str = "SLOTMESH_OTHER_PROGRAMS";
const CONTROLLER: &str = "slotmesh-controller";
const AGENT: &str = "slotmesh-agent";
const PROXY: &str = "slotmesh-proxy";

/// A mesh, and the directory that its `up` starts programs from.
struct Mixed {
    mesh: Mesh,
    nodes: usize,
    installed: TempDir,
    _etcd: EtcdCluster,
}

/// Puts a program there, in place of another one that may run.
fn install(from: &Path, to: &Path, program: &str) {
    let to = to.join(program);
    let _ = fs::remove_file(&to);
    let from = from.join(program);
    // Not there on another file system.
    if fs::hard_link(&from, &to).is_err() {
        fs::copy(&from, &to).unwrap();
    }
}

impl Mixed {
    async fn start() -> Self {
        let own = programs::directory().unwrap();
        let other = env::var_os(OTHER_VARIABLE).map_or(own, PathBuf::from);
        let installed = tempfile::tempdir().unwrap();
        for program in ["slotmesh", CONTROLLER, AGENT, PROXY] {
            install(&other, installed.path(), program);
        }
        let etcd = EtcdCluster::start(1).await.unwrap();
        let options = MeshOptions {
            store: Some(etcd.store()),
            flags: ["--controllers", "3"].map(str::to_owned).to_vec(),
            programs: Some(installed.path().to_owned()),
            ..MeshOptions::default()
        };
        let mesh = Mesh::start(&options).await.unwrap();
        let nodes = mesh.nodes().await.unwrap().len();
        let mixed = Self {
            mesh,
            nodes,
            installed,
            _etcd: etcd,
        };
        mixed.are_well().await;
        mixed
    }

    fn renew(&self, program: &str) {
        let own = programs::directory().unwrap();
        install(&own, self.installed.path(), program);
    }

    /// All nodes are reported, and in sync.
    async fn are_well(&self) {
        for controller in &self.mesh.contract.controllers {
            sees_all_nodes(&self.mesh, controller).await.unwrap();
        }
        in_sync(&self.mesh, self.nodes).await.unwrap();
    }

    /// Asked for at each controller. One may be given up as long as a process that was exchanged is
    /// not at home again; clients notice nothing of that either.
    async fn switches(&self) {
        self.are_well().await;
        for controller in &self.mesh.contract.controllers {
            wait_until(LIMIT, "a switchover", async || {
                switch_over(&self.mesh, controller).await
            })
            .await
            .unwrap();
        }
    }

    /// Waits until `up` has started what wrote this file again.
    async fn comes_back(&self, file: &Path, before: u32) {
        wait_until(LIMIT, "a process to be started again", async || {
            let pid = self.mesh.bound_pid(file)?;
            anyhow::ensure!(pid != before, "{pid} of {} still", file.display());
            anyhow::Ok(())
        })
        .await
        .unwrap();
    }

    /// Stopped in order, the leader steps down; the next of its name runs what is installed by now.
    async fn controller_is_renewed(&self, index: usize) {
        let dir = match index {
            0 => "controller".to_owned(),
            _ => format!("controller-{}", index + 1),
        };
        let file = PathBuf::from(dir).join("controller.json");
        let pid = self.mesh.bound_pid(&file).unwrap();
        signals::terminate(pid).unwrap();
        self.comes_back(&file, pid).await;
        let address = &self.mesh.contract.controllers[index];
        wait_until(LIMIT, "the controller to know who leads", async || {
            let known = leader(address).await?;
            anyhow::ensure!(!known.address.is_empty(), "nobody");
            anyhow::Ok(())
        })
        .await
        .unwrap();
    }

    fn hosts(&self) -> Vec<PathBuf> {
        let hosts = fs::read_dir(self.mesh.data().join("hosts")).unwrap();
        let mut hosts: Vec<PathBuf> = hosts.flatten().map(|host| host.path()).collect();
        hosts.sort();
        hosts
    }

    /// Killed, because those of `up` stop their nodes when they are stopped in order.
    async fn agent_is_renewed(&self, host: &Path) {
        let file = host.join("agent.json");
        let pid = self.mesh.bound_pid(&file).unwrap();
        signals::kill(pid).unwrap();
        self.comes_back(&file, pid).await;
    }

    async fn proxies_are_renewed(&self) {
        let words = ["-o", "json", "proxy", "list"];
        let listed = json(&ctl(&self.mesh, &words).await.unwrap()).unwrap();
        let ids = listed.as_array().unwrap().iter();
        let ids: Vec<&str> = ids.map(|p| p["proxy_id"].as_str().unwrap()).collect();
        let chosen = ids.iter().flat_map(|id| ["--proxy", id]);
        let words = ["proxy", "restart", self.mesh.instance()].into_iter();
        let words: Vec<&str> = words
            .chain(chosen)
            .chain(["--bake", "1", "--wait"])
            .collect();
        let output = ctl(&self.mesh, &words).await.unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// Their agents start others.
    async fn proxies_are_killed(&self) {
        for pid in &self.mesh.contract.pids.proxies {
            signals::kill_blocking(*pid, LIMIT);
        }
        for proxy in &self.mesh.contract.proxies {
            wait_until(LIMIT, "another process of a proxy", async || {
                let mut client = connect(proxy, false).await?;
                let get = redis::cmd("GET").arg("any").clone();
                let found: Option<String> = get.query_async(&mut client).await?;
                anyhow::Ok(found)
            })
            .await
            .unwrap();
        }
    }

    /// Its primary is killed, and a client writes again.
    async fn fails_over(&self) {
        self.are_well().await;
        let before = roles(&self.mesh).await.unwrap();
        let nodes = self.mesh.nodes().await.unwrap();
        let primary = nodes.iter().find(|n| n.id == before[0].1).unwrap();
        signals::kill(primary.pid).unwrap();
        wait_until(LIMIT, "a write on another primary", async || {
            let now = roles(&self.mesh).await?;
            anyhow::ensure!(now[0].1 != before[0].1, "{now:?}");
            let mut client = connect(&self.mesh.contract.proxies[0], false).await?;
            let mut set = redis::cmd("SET");
            set.arg("after").arg(1);
            anyhow::Ok(set.query_async::<()>(&mut client).await?)
        })
        .await
        .unwrap();
        self.are_well().await;
    }
}

impl Mixed {
    async fn controllers_are_renewed(&self) {
        self.renew(CONTROLLER);
        for index in 0..self.mesh.contract.controllers.len() {
            self.controller_is_renewed(index).await;
            self.switches().await;
        }
    }

    /// Under load, but for a failover between the first and the others.
    async fn agents_are_renewed(&self, load: Load) -> Load {
        self.renew(AGENT);
        let hosts = self.hosts();
        let (first, others) = hosts.split_first().unwrap();
        self.agent_is_renewed(first).await;
        self.switches().await;
        load.audit().await.unwrap();
        self.fails_over().await;
        let load = Load::start(&self.mesh).await.unwrap();
        for host in others {
            self.agent_is_renewed(host).await;
        }
        self.switches().await;
        load
    }
}

#[tokio::test]
async fn controllers_then_agents_then_proxies_are_another_releases_and_nobody_notices() {
    let mixed = Mixed::start().await;
    let load = Load::start(&mixed.mesh).await.unwrap();
    mixed.controllers_are_renewed().await;
    let load = mixed.agents_are_renewed(load).await;
    mixed.renew(PROXY);
    mixed.proxies_are_renewed().await;
    mixed.switches().await;
    load.audit().await.unwrap();
    mixed.mesh.stop().await.unwrap();
}

#[tokio::test]
async fn proxies_then_agents_then_controllers_are_another_releases_and_nobody_notices() {
    let mixed = Mixed::start().await;
    mixed.renew(PROXY);
    // By the controllers of that release a hand-over may be more than can be asked for.
    mixed.proxies_are_killed().await;
    let load = Load::start(&mixed.mesh).await.unwrap();
    let load = mixed.agents_are_renewed(load).await;
    mixed.controllers_are_renewed().await;
    load.audit().await.unwrap();
    mixed.mesh.stop().await.unwrap();
}
