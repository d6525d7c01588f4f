//! A real etcd of one member: on free ports, in its own directory, gone with its owner.

use std::{net::TcpListener, process::Stdio, sync::Arc, time::Duration};

use slotmesh_controller::store::{EtcdSettings, EtcdStore, Store};
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep},
};

const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Another process may take a free port before etcd does.
const START_ATTEMPTS: usize = 3;

pub(crate) struct EtcdProcess {
    dir: TempDir,
    client: String,
    peer: String,
    child: Child,
}

impl EtcdProcess {
    pub(crate) async fn start() -> Self {
        for _ in 0..START_ATTEMPTS {
            // Both at once, so that they differ.
            let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
            let [client, peer] = ports.map(|port| format!("http://{}", port.local_addr().unwrap()));
            let dir = tempfile::tempdir().unwrap();
            let child = spawn(&dir, &client, &peer);
            let mut etcd = Self {
                dir,
                client,
                peer,
                child,
            };
            if etcd.answers().await {
                return etcd;
            }
        }
        panic!("etcd did not start, {START_ATTEMPTS} attempts");
    }

    pub(crate) async fn store(&self) -> Arc<dyn Store> {
        let settings = EtcdSettings {
            endpoints: vec![self.client.clone()],
            ..EtcdSettings::default()
        };
        Arc::new(EtcdStore::connect(&settings).await.unwrap())
    }

    /// SIGKILL, then a new process with the same data at the same address.
    pub(crate) async fn crash_and_restart(&mut self) {
        self.child.kill().await.unwrap();
        self.child = spawn(&self.dir, &self.client, &self.peer);
        assert!(self.answers().await, "etcd did not come back");
    }

    /// Dropping it kills it too; this also waits for its end.
    pub(crate) async fn stop(mut self) {
        self.child.kill().await.unwrap();
    }

    async fn answers(&mut self) -> bool {
        let settings = EtcdSettings {
            endpoints: vec![self.client.clone()],
            ..EtcdSettings::default()
        };
        let start = Instant::now();
        while start.elapsed() < START_TIMEOUT {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if EtcdStore::connect(&settings).await.is_ok() {
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        panic!("waited {START_TIMEOUT:?} for etcd at {}", self.client);
    }
}

fn spawn(dir: &TempDir, client: &str, peer: &str) -> Child {
    Command::new("etcd")
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .args([
            "--listen-client-urls",
            client,
            "--advertise-client-urls",
            client,
        ])
        .args([
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
        ])
        .args(["--initial-cluster", &format!("default={peer}")])
        .args(["--logger", "zap", "--log-level", "error"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("etcd is installed (`make install-deps`)")
}
