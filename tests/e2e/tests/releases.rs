//! What the last release has kept, read by this one.
//!
//! `fixtures/mesh-0.1.tar.gz` is the directory of a `slotmesh up` of release 0.1 (its store, its agents'
//! journals, its proxies' topologies, its data), stopped in order: two shards of two nodes after a
//! switchover and a failover, 300 keys, an account, parameters, a window, a listed program, a scheduled
//! task. It has ports of its own, so it runs in a network of its own, and its controller lives in the
//! hour in which it was stopped: a client token is kept for a day, and a window must not open in between.
//! Where a release changes what is kept, the next one's fixture joins this one.

#![allow(clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use slotmesh_ctl::up::contract::Contract;
use slotmesh_e2e::{clock::Bent, finish, json};
use slotmesh_harness::{mesh::Home, signals, wait_until};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};

const LIMIT: Duration = Duration::from_secs(90);

/// A mesh in a network of its own.
struct Kept {
    contract: Contract,
    up: Child,
    clock: Bent,
    _home: Home,
}

impl Kept {
    async fn start(fixture: &str) -> anyhow::Result<Self> {
        let home = Home::new()?;
        let archive = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures")
            .join(fixture);
        let mut unpack = Command::new("tar");
        let parent = home.data();
        let parent = parent.parent().context("the directory's parent")?;
        unpack.arg("xzf").arg(archive).arg("-C").arg(parent);
        anyhow::ensure!(finish(unpack).await?.status.success(), "unpack {fixture}");
        let stopped = home.data().join("mesh.json").metadata()?.modified()?;
        let ago = SystemTime::now().duration_since(stopped)?.as_secs();
        let clock = Bent::install(-i64::try_from(ago)?)?;
        // One process from the first to the last: what unshare starts is the mesh.
        let mut command = Command::new("unshare");
        command
            .args(["--net", "sh", "-c"])
            .arg("ip link set lo up && exec \"$0\" up --output json --data \"$1\"")
            .arg(clock.program("slotmesh"))
            .arg(home.data());
        let log = std::fs::File::create(home.log())?;
        let mut up = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(up.stdout.take().context("its output")?);
        let mut line = String::new();
        timeout(LIMIT, lines.read_line(&mut line))
            .await
            .context("wait for the mesh to serve")??;
        let contract = serde_json::from_str(&line)
            .with_context(|| std::fs::read_to_string(home.log()).unwrap_or_default())?;
        Ok(Self {
            contract,
            up,
            clock,
            _home: home,
        })
    }

    /// A program beside the mesh.
    fn program(&self, name: impl Into<PathBuf>) -> Command {
        let pid = self.up.id().unwrap_or_default().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &pid, "--net"]).arg(name.into());
        command
    }

    async fn ctl(&self, words: &[&str]) -> anyhow::Result<serde_json::Value> {
        let mut command = self.program(self.clock.program("slotmesh"));
        command.args(["--controller", &self.contract.controller, "-o", "json"]);
        command.args(words);
        json(&finish(command).await?)
    }

    async fn redis(&self, proxy: usize, words: &[&str]) -> anyhow::Result<String> {
        let address = &self.contract.proxies[proxy];
        let (host, port) = address.rsplit_once(':').context("an address")?;
        let mut command = self.program("redis-cli");
        command.args(["-h", host, "-p", port]).args(words);
        let output = finish(command).await?;
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        signals::terminate(self.up.id().context("it has ended")?)?;
        let ended = timeout(LIMIT, self.up.wait()).await.context("its end")??;
        anyhow::ensure!(ended.success(), "{ended}");
        Ok(())
    }
}

#[tokio::test]
async fn a_mesh_that_the_last_release_has_kept_serves_with_all_that_it_had() {
    let mesh = Kept::start("mesh-0.1.tar.gz").await.unwrap();
    let instance = mesh.contract.instance.clone();
    for proxy in 0..mesh.contract.proxies.len() {
        for number in [1, 150, 300] {
            let value = mesh.redis(proxy, &["GET", &format!("key:{number}")]).await;
            assert_eq!(value.unwrap(), format!("value:{number}"));
        }
    }
    assert_eq!(mesh.redis(0, &["DBSIZE"]).await.unwrap(), "301");
    assert_eq!(
        mesh.redis(0, &["-n", "7", "GET", "seven"]).await.unwrap(),
        "7"
    );
    let list = mesh.redis(1, &["LRANGE", "list", "0", "-1"]).await.unwrap();
    assert_eq!(list, "a\nb\nc");
    assert_eq!(mesh.redis(1, &["SET", "new", "1"]).await.unwrap(), "OK");
    let reader = [
        "--no-auth-warning",
        "--user",
        "reader",
        "--pass",
        "pass-of-a-test",
    ];
    let refused = [&reader[..], &["SET", "new", "2"]].concat();
    let refused = mesh.redis(0, &refused).await.unwrap();
    assert!(refused.starts_with("NOPERM"), "{refused}");

    let described = mesh
        .ctl(&["instance", "describe", &instance])
        .await
        .unwrap();
    let text = described.to_string();
    for kept in ["\"replace_after_s\":900", "\"priority\":150"] {
        assert!(text.contains(kept), "{kept} in {text}");
    }
    let parameters = mesh.ctl(&["parameters", "show", &instance]).await.unwrap();
    assert!(
        parameters.to_string().contains("allkeys-lru"),
        "{parameters}"
    );
    let listed = mesh.ctl(&["artifact", "list"]).await.unwrap();
    assert!(listed.to_string().contains("redis-7.0.15"), "{listed}");
    let epochs = mesh.ctl(&["epochs", &instance]).await.unwrap().to_string();
    assert!(
        epochs.contains("SwitchOver") && epochs.contains("Begin"),
        "{epochs}"
    );
}

#[tokio::test]
async fn a_task_and_a_client_token_of_the_last_release_are_still_known() {
    let mesh = Kept::start("mesh-0.1.tar.gz").await.unwrap();
    let instance = mesh.contract.instance.clone();
    let target = format!("{instance}-0-0");
    let tasks = mesh.ctl(&["task", "list"]).await.unwrap();
    let scheduled = tasks.as_array().unwrap().iter().find(|t| {
        let kind = t["kind"].as_str().unwrap_or_default();
        let state = t["state"].as_str().unwrap_or_default();
        kind == "SwitchOver" && state != "done"
    });
    let id = scheduled.unwrap_or_else(|| panic!("{tasks}"))["task_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let again = ["switchover", &instance, "--target", &target, "--in-window"];
    let again = [&again[..], &["--client-token", "kept-token"]].concat();
    let again = mesh.ctl(&again).await.unwrap();
    assert_eq!(again["task_id"], id.as_str(), "{again}");
    mesh.ctl(&["task", "cancel", &id]).await.unwrap();

    // What runs on it now can be changed: the journals are this release's too.
    let replica = wait_until(LIMIT, "a replica in sync", async || {
        let shards = mesh.ctl(&["instance", "describe", &instance]).await?;
        let nodes = shards["shards"][0]["nodes"].as_array().context("nodes")?;
        let fit = nodes
            .iter()
            .find(|n| n["role"] == "replica" && n["in_sync"] == true)
            .context("none yet")?;
        fit["node_id"].as_str().map(str::to_owned).context("a name")
    })
    .await
    .unwrap();
    mesh.ctl(&["switchover", &instance, "--target", &replica, "--wait"])
        .await
        .unwrap();
    mesh.stop().await.unwrap();
}
