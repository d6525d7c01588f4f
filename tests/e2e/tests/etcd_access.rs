//! An etcd that asks for certificates and a password: controllers get in with both, say clearly what
//! is missing, and write no secret down.

#![allow(clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use slotmesh_e2e::{
    controllers::{Controller, LIMIT, leader_after},
    finish,
};
use slotmesh_harness::{
    EtcdCluster, Mesh, MeshOptions, etcd_cluster::TlsFiles, foreign::openssl, programs, signals,
    wait_until,
};
use tokio::time::timeout;

const PASSWORD: &str = "a-password-that-is-in-no-log";
/// The store gives up connecting after 4 s.
const REFUSAL_LIMIT: Duration = Duration::from_secs(30);

/// An authority, and one certificate for servers and clients on this machine.
fn certificates(dir: &Path) -> TlsFiles {
    let new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(
        dir,
        &format!("req -x509 {new_key} -days 2 -subj /CN=test-ca -keyout ca.key -out ca.pem"),
    )
    .unwrap();
    openssl(
        dir,
        &format!("req {new_key} -subj /CN=test -keyout it.key -out it.csr"),
    )
    .unwrap();
    let extensions = "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n";
    std::fs::write(dir.join("ext"), extensions).unwrap();
    openssl(
        dir,
        "x509 -req -in it.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out it.pem",
    )
    .unwrap();
    TlsFiles {
        ca: dir.join("ca.pem"),
        cert: dir.join("it.pem"),
        key: dir.join("it.key"),
    }
}

/// A user that has what the mesh needs and no more.
fn ask_for_passwords(etcd: &EtcdCluster) {
    let ctl = |arguments: &[&str]| drop(etcd.ctl(arguments).unwrap());
    ctl(&["user", "add", "root:root-password"]);
    ctl(&["user", "grant-role", "root", "root"]);
    ctl(&["role", "add", "mesh"]);
    ctl(&[
        "role",
        "grant-permission",
        "mesh",
        "readwrite",
        "--prefix=true",
        "/slotmesh/",
    ]);
    ctl(&["user", "add", &format!("mesh:{PASSWORD}")]);
    ctl(&["user", "grant-role", "mesh", "mesh"]);
    ctl(&["auth", "enable"]);
}

struct Access {
    dir: tempfile::TempDir,
    tls: TlsFiles,
}

impl Access {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tls = certificates(dir.path());
        Self { dir, tls }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn flags(&self, password: &str) -> Vec<String> {
        let password = self.file(&format!("password-{}", password.len()), password);
        let flag = |name: &str, path: &Path| [format!("--etcd-{name}"), path.display().to_string()];
        let mut flags = vec!["--etcd-user".to_owned(), "mesh".to_owned()];
        flags.extend(flag("password-file", &password));
        flags.extend(self.tls());
        flags
    }

    fn tls(&self) -> Vec<String> {
        let flag = |name: &str, path: &Path| [format!("--etcd-{name}"), path.display().to_string()];
        let files = [
            ("ca", &self.tls.ca),
            ("cert", &self.tls.cert),
            ("key", &self.tls.key),
        ];
        files
            .iter()
            .flat_map(|(name, path)| flag(name, path))
            .collect()
    }

    /// What a controller says that does not get in.
    async fn refusal(&self, name: &str, store: &str, flags: &[String]) -> String {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let mut command = Controller::command(&dir, "c9", store, flags).unwrap();
        let exit = timeout(REFUSAL_LIMIT, command.status())
            .await
            .unwrap()
            .unwrap();
        assert!(!exit.success(), "{name}");
        std::fs::read_to_string(dir.join("controller.log")).unwrap()
    }
}

#[tokio::test]
async fn controllers_get_in_with_a_certificate_and_a_password_and_again_after_a_restart() {
    let access = Access::new();
    let mut etcd = EtcdCluster::start_with(1, Some(access.tls.clone()))
        .await
        .unwrap();
    ask_for_passwords(&etcd);
    let (store, flags) = (etcd.store(), access.flags(&format!("{PASSWORD}\n")));
    let mut controllers = Vec::new();
    for id in ["c1", "c2", "c3"] {
        let dir = access.dir.path().join(id);
        controllers.push(Controller::start(dir, id, &store, &flags).await.unwrap());
    }
    let first = leader_after(&controllers[1].address, 0).await.unwrap();
    // Its tokens are gone with it, and the leader's lease, too, unless it was quick.
    etcd.restart(0).unwrap();
    let leads = controllers.iter().position(|c| c.address == first.address);
    controllers.remove(leads.unwrap()).kill().await.unwrap();
    for controller in &controllers {
        let next = leader_after(&controller.address, first.term).await.unwrap();
        assert_ne!(next.address, first.address);
    }
    for controller in &controllers {
        let log = controller.log();
        assert!(!log.contains(PASSWORD), "{log}");
        assert!(!log.contains("PRIVATE KEY"), "{log}");
    }
}

#[tokio::test]
async fn what_is_missing_or_wrong_is_named() {
    let access = Access::new();
    let etcd = EtcdCluster::start_with(1, Some(access.tls.clone()))
        .await
        .unwrap();
    ask_for_passwords(&etcd);
    let store = etcd.store();
    let wrong = "the-wrong-password";
    let said = access.refusal("wrong", &store, &access.flags(wrong)).await;
    assert!(said.contains("authentication failed"), "{said}");
    assert!(!said.contains(wrong), "{said}");
    let said = access.refusal("none", &store, &access.tls()).await;
    assert!(said.contains("user"), "{said}");
    let said = access.refusal("plain", &store, &[]).await;
    assert!(said.contains("connect to etcd"), "{said}");
    let other = Access::new();
    let said = access
        .refusal("foreign", &store, &other.flags(PASSWORD))
        .await;
    assert!(said.contains("--etcd-ca"), "{said}");
    wait_until(LIMIT, "the right one to get in", async || {
        let dir = access.dir.path().join("right");
        Controller::start(dir, "c1", &store, &access.flags(PASSWORD))
            .await
            .map(drop)
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn up_runs_three_controllers_on_an_etcd_with_certificates_and_a_password() {
    let access = Access::new();
    let etcd = EtcdCluster::start_with(1, Some(access.tls.clone()))
        .await
        .unwrap();
    ask_for_passwords(&etcd);
    let more = ["--controllers".to_owned(), "3".to_owned()];
    let options = MeshOptions {
        architecture: Some("standard".into()),
        proxies: Some(1),
        store: Some(etcd.store()),
        flags: [access.flags(PASSWORD), more.to_vec()].concat(),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let (controllers, pids) = (&mesh.contract.controllers, &mesh.contract.pids.controllers);
    assert_eq!((controllers.len(), pids.len()), (3, 3));
    let first = leader_after(&controllers[0], 0).await.unwrap();
    for controller in controllers {
        let known = leader_after(controller, 0).await.unwrap();
        assert_eq!(known.address, first.address, "{controller}");
    }
    // A command that is given all of them outlives the leader; `up` starts that one again.
    let leads = controllers.iter().position(|c| *c == first.address);
    signals::kill(pids[leads.unwrap()]).unwrap();
    let mut command = tokio::process::Command::new(programs::path("slotmesh").unwrap());
    let window = [
        "instance",
        "maintain",
        mesh.instance(),
        "--window",
        "02:00-03:00",
    ];
    command
        .args(["--controller", &controllers.join(",")])
        .args(window);
    let output = finish(command).await.unwrap();
    assert!(output.status.success(), "{output:?}");

    // What is kept is the names of files; a second start needs no flag again.
    let (_, home) = mesh.stop().await.unwrap();
    let kept = std::fs::read_to_string(home.data().join("mesh.json")).unwrap();
    assert!(
        kept.contains("etcd_password_file") && !kept.contains(PASSWORD),
        "{kept}"
    );
    let again = Mesh::start_in(home, &MeshOptions::default()).await.unwrap();
    assert_eq!(again.contract.controllers.len(), 3);
    again.stop().await.unwrap();
}
