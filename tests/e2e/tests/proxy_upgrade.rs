//! Proxies are exchanged over the whole mesh: by the operator's words, one after the other, and no
//! client notices; a bad version is gone back from.

#![allow(clippy::unwrap_used)]

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Output, time::Duration};

use slotmesh_e2e::{Witnesses, connect, ctl, proxy_pids};
use slotmesh_harness::{Mesh, MeshOptions, programs, signals, wait_until};
use tempfile::TempDir;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(120);

/// A mesh, and programs that pass for releases of its proxy.
struct Releases {
    mesh: Mesh,
    dir: TempDir,
}

impl Releases {
    async fn start() -> Self {
        let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
        assert!(mesh.contract.proxies.len() >= 2, "{:?}", mesh.contract);
        let dir = tempfile::tempdir().unwrap();
        Self { mesh, dir }
    }

    /// Lists a release that does what the built one does, after `first`.
    async fn add(&self, version: &str, first: &str) {
        let built = programs::path("slotmesh-proxy").unwrap();
        self.add_that_does(
            version,
            &format!("{first}\nexec {} \"$@\"", built.display()),
        )
        .await;
    }

    async fn add_that_does(&self, version: &str, what: &str) {
        let path: PathBuf = self.dir.path().join(version);
        let says = format!("[ \"$1\" = --version ] && echo slotmesh-proxy {version} && exit 0");
        fs::write(&path, format!("#!/bin/sh\n{says}\n{what}\n")).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
        let file = path.display().to_string();
        let words = ["artifact", "add", "proxy", version, "--file", &file];
        let added = self.ctl(&words).await;
        assert!(added.status.success(), "{added:?}");
    }

    async fn ctl(&self, words: &[&str]) -> Output {
        ctl(&self.mesh, words).await.unwrap()
    }

    async fn upgrade(&self, version: &str) -> Output {
        let words = ["proxy", "upgrade", self.mesh.instance(), "--to", version];
        self.ctl(&[&words[..], &["--bake", "1", "--wait"]].concat())
            .await
    }

    /// (id, pid) of every proxy, in the order of their ids.
    async fn pids(&self) -> Vec<(String, u64)> {
        let all = proxy_pids(&self.mesh).await.unwrap();
        assert_eq!(all.len(), self.mesh.contract.proxies.len(), "{all:?}");
        all
    }

    /// Programs that agents have started what serves from; empty: their own.
    fn programs(&self) -> Vec<String> {
        let hosts = fs::read_dir(self.mesh.data().join("hosts"))
            .unwrap()
            .flatten();
        let proxies =
            hosts.flat_map(|h| fs::read_dir(h.path().join("proxies")).into_iter().flatten());
        let runs = proxies
            .flatten()
            .map(|p| fs::read(p.path().join("runs.json")).unwrap());
        let runs = runs.map(|text| serde_json::from_slice::<serde_json::Value>(&text).unwrap());
        runs.map(|runs| {
            let program = &runs["serving"]["origin"]["key"]["program"];
            program.as_str().unwrap_or("nothing").to_owned()
        })
        .collect()
    }
}

/// Of a process, as it was started.
fn flags(pid: u64) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    String::from_utf8_lossy(&line).replace('\0', " ")
}

#[tokio::test]
async fn proxies_are_upgraded_back_and_forth_and_restarted_and_no_client_notices() {
    let releases = Releases::start().await;
    let mesh = &releases.mesh;
    releases.add("0.9.0", "").await;
    releases.add("0.9.1", "").await;
    let first = releases.pids().await;
    let witnesses = Witnesses::start(&mesh.contract.proxies, 3).await.unwrap();
    // Waits over all of it, at its place in the queue.
    let mut waiting = connect(&mesh.contract.proxies[0], false).await.unwrap();
    let waiting = tokio::spawn(async move {
        let mut pop = redis::cmd("BLPOP");
        pop.arg("to-come").arg(0);
        pop.query_async::<(String, String)>(&mut waiting).await
    });
    for version in ["0.9.0", "0.9.1", "0.9.0"] {
        let output = releases.upgrade(version).await;
        assert!(output.status.success(), "{version}: {output:?}");
        let program = format!("proxy-{version}");
        assert!(
            releases.programs().iter().all(|p| *p == program),
            "{version}"
        );
    }
    let upgraded = releases.pids().await;
    let changed = first
        .iter()
        .zip(&upgraded)
        .all(|(a, b)| a.0 == b.0 && a.1 != b.1);
    assert!(changed, "{first:?} {upgraded:?}");

    let (one, pid) = &upgraded[0];
    let words = ["proxy", "restart", mesh.instance(), "--proxy", one];
    let output = releases
        .ctl(&[&words[..], &["--workers", "3", "--bake", "1", "--wait"]].concat())
        .await;
    assert!(output.status.success(), "{output:?}");
    let restarted = releases.pids().await;
    assert_ne!(restarted[0].1, *pid);
    assert!(flags(restarted[0].1).contains("--workers 3"));
    assert!(!flags(restarted[1].1).contains("--workers 3"));
    assert_eq!(restarted[1..], upgraded[1..]);

    let mut pusher = connect(&mesh.contract.proxies[1], false).await.unwrap();
    let push: redis::RedisResult<u32> = redis::cmd("RPUSH")
        .arg("to-come")
        .arg("x")
        .query_async(&mut pusher)
        .await;
    push.unwrap();
    let popped = timeout(LIMIT, waiting).await.expect("it to be woken");
    assert_eq!(popped.unwrap().unwrap().1, "x");
    witnesses.testify().await.unwrap();
}

#[tokio::test]
async fn a_bad_version_halts_at_the_first_proxy_and_is_gone_back_from() {
    let releases = Releases::start().await;
    let mesh = &releases.mesh;
    releases
        .add_that_does("0.9.1", "echo 'no library for it' >&2; exit 3")
        .await;
    // It serves, and dies while it is watched.
    releases.add("0.9.2", "(sleep 4; kill -9 $$) &").await;
    let first = releases.pids().await;
    let witnesses = Witnesses::start(&mesh.contract.proxies, 3).await.unwrap();
    let output = releases.upgrade("0.9.1").await;
    assert!(!output.status.success(), "{output:?}");
    assert_eq!(releases.pids().await, first, "nothing has happened");
    witnesses.testify().await.unwrap();

    let words = ["proxy", "upgrade", mesh.instance(), "--to", "0.9.2"];
    let output = releases
        .ctl(&[&words[..], &["--bake", "20", "--wait"]].concat())
        .await;
    assert!(!output.status.success(), "{output:?}");
    wait_until(LIMIT, "the proxies of before", async || {
        let now = releases.pids().await;
        anyhow::ensure!(now == first, "{now:?}, not {first:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    assert!(releases.programs().iter().all(String::is_empty));
    let after = Witnesses::start(&mesh.contract.proxies, 3).await.unwrap();
    after.testify().await.unwrap();
}

#[tokio::test]
async fn nobody_notices_agents_that_die_in_the_middle() {
    let releases = Releases::start().await;
    let mesh = &releases.mesh;
    releases.add("0.9.0", "sleep 0.3").await;
    let witnesses = Witnesses::start(&mesh.contract.proxies, 3).await.unwrap();
    let words = [
        "proxy",
        "upgrade",
        mesh.instance(),
        "--to",
        "0.9.0",
        "--bake",
        "1",
        "--wait",
    ];
    let upgrade = tokio::spawn(ctl(mesh, &words));
    let mut hosts: Vec<PathBuf> = fs::read_dir(mesh.data().join("hosts"))
        .unwrap()
        .flatten()
        .map(|host| host.path())
        .collect();
    // Each as soon as it has begun a process for it.
    wait_until(
        LIMIT,
        "every agent of a proxy to be killed in the middle",
        async || {
            hosts.retain(|host| {
                fs::read_dir(host.join("proxies")).is_ok_and(|mut p| p.next().is_some())
            });
            let begun = hosts.iter().position(|host| {
                let proxies = fs::read_dir(host.join("proxies")).unwrap().flatten();
                let mut runs = proxies.map(|p| fs::read_to_string(p.path().join("runs.json")));
                runs.any(|text| text.is_ok_and(|text| text.contains("proxy-0.9.0")))
            });
            if let Some(host) = begun.map(|at| hosts.remove(at)) {
                signals::kill(mesh.bound_pid(&host.join("agent.json"))?)?;
            }
            anyhow::ensure!(hosts.is_empty(), "{hosts:?} not yet");
            anyhow::Ok(())
        },
    )
    .await
    .unwrap();
    let output = upgrade.await.unwrap().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(releases.programs().iter().all(|p| p == "proxy-0.9.0"));
    witnesses.testify().await.unwrap();
}
