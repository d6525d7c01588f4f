//! Accounts and parameters of an instance that serves: what is kept, what is refused, how fast.

#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, time::Duration};

use slotmesh_e2e::{ctl, json, roles, snapshot};
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use slotmesh_proto::{
    instance::v1::{
        UpdateAccountsRequest, UpdateParametersRequest,
        instance_service_client::InstanceServiceClient,
    },
    store::v1::NodeRole,
    topology::v1::Account,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::Instant,
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

const LIMIT: Duration = Duration::from_secs(60);

async fn service(mesh: &Mesh) -> InstanceServiceClient<Channel> {
    let uri = format!("http://{}", mesh.contract.controller);
    InstanceServiceClient::connect(uri).await.unwrap()
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().unwrap().reason
}

fn node_dir(mesh: &Mesh, host: &str, node: &str) -> PathBuf {
    mesh.data()
        .join("hosts")
        .join(host)
        .join("nodes")
        .join(node)
}

/// `CONFIG GET` past proxies and agents, at each node in the order of the API.
async fn on_nodes(mesh: &Mesh, name: &str) -> Vec<String> {
    let mut values = Vec::new();
    for node in mesh.nodes().await.unwrap() {
        let dir = node_dir(mesh, &node.host, &node.id);
        let secret = std::fs::read_to_string(dir.join("admin.secret")).unwrap();
        let Ok(mut socket) = UnixStream::connect(dir.join("admin.sock")).await else {
            values.push("no process".to_owned());
            continue;
        };
        let ask = format!(
            "AUTH slotmesh-admin {}\r\nCONFIG GET {name}\r\nQUIT\r\n",
            secret.trim()
        );
        socket.write_all(ask.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        // +OK *2 $n name $n value +OK
        let lines: Vec<_> = answer.split("\r\n").collect();
        values.push(lines.get(5).copied().unwrap_or(&answer).to_owned());
    }
    values
}

async fn set_engine(mesh: &Mesh, parameter: &str) -> std::process::Output {
    let arguments = ["parameters", "set", mesh.instance(), "--engine", parameter];
    ctl(mesh, &arguments).await.unwrap()
}

#[tokio::test]
async fn an_engine_parameter_survives_a_restart_and_a_switchover_and_a_refused_one_changes_nothing()
{
    let options = MeshOptions {
        parameters: vec!["enable-debug-command=yes".into(), "save=".into()],
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let count = mesh.nodes().await.unwrap().len();
    let done = set_engine(&mesh, "save=3600 1 300 10").await;
    assert!(done.status.success(), "{done:?}");
    assert!(
        set_engine(&mesh, "Maxmemory-Samples=9")
            .await
            .status
            .success()
    );
    assert_eq!(on_nodes(&mesh, "save").await, vec!["3600 1 300 10"; count]);

    let before = snapshot(&mesh).await.unwrap();
    for (parameter, words) in [
        ("maxmemory=lots", "argument must be a memory value"),
        ("no-such-thing=1", "Unknown option"),
        ("replicaof=x 1", "is set by slotmesh"),
        ("enable-debug-command=no", "when the instance is created"),
    ] {
        let refused = set_engine(&mesh, parameter).await;
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(3), "{parameter}: {said}");
        assert!(said.contains(words), "{parameter}: {said}");
    }
    assert_eq!(snapshot(&mesh).await.unwrap(), before);

    let nodes = mesh.nodes().await.unwrap();
    let killed = nodes.iter().find(|n| n.role == "primary").unwrap();
    signals::kill(killed.pid).unwrap();
    wait_until(LIMIT, "another process with the parameters", async || {
        let now = mesh.nodes().await?;
        let again = now
            .iter()
            .any(|n| n.id == killed.id && n.pid != killed.pid && n.pid != 0);
        let values = on_nodes(&mesh, "maxmemory-samples").await;
        anyhow::ensure!(again && values == vec!["9"; count], "{values:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    wait_until(LIMIT, "every replica to be in sync", async || {
        let shards = mesh.api().await?.describe_shards(mesh.instance()).await?;
        let mut nodes = shards.iter().flat_map(|s| &s.nodes);
        let behind = nodes.find(|n| !n.in_sync && n.current_role() != NodeRole::Primary);
        anyhow::ensure!(behind.is_none(), "{behind:?}");
        anyhow::ensure!(shards.iter().all(|s| s.mode == "Serving"), "{shards:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    for (_, _, replicas) in roles(&mesh).await.unwrap() {
        let arguments = [
            "switchover",
            mesh.instance(),
            "--wait",
            "--target",
            &replicas[0],
        ];
        let done = ctl(&mesh, &arguments).await.unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{said}");
    }
    assert_eq!(on_nodes(&mesh, "save").await, vec!["3600 1 300 10"; count]);
    assert_eq!(
        on_nodes(&mesh, "enable-debug-command").await,
        vec!["yes"; count]
    );
}

#[tokio::test]
async fn an_engine_parameter_is_changed_while_a_client_hardly_notices() {
    let mesh = Mesh::start(&MeshOptions {
        architecture: Some("standard".into()),
        ..MeshOptions::default()
    })
    .await
    .unwrap();
    let mut service = service(&mesh).await;
    let mut took = Vec::new();
    for n in 0..30 {
        let request = UpdateParametersRequest {
            instance_id: mesh.instance().to_owned(),
            engine: [("timeout".to_owned(), n.to_string())].into(),
            ..Default::default()
        };
        let before = Instant::now();
        service.update_parameters(request).await.unwrap();
        took.push(before.elapsed());
        // Nothing that a node is told later may undo it, not even for a moment.
        assert_eq!(on_nodes(&mesh, "timeout").await, vec![n.to_string(); 2]);
    }
    took.sort();
    println!("a change takes {:?}, at worst {:?}", took[15], took[29]);
    assert!(took[15] < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn accounts_are_set_listed_and_removed_and_no_password_is_kept() {
    let mesh = Mesh::start(&MeshOptions {
        shards: Some(3),
        ..MeshOptions::default()
    })
    .await
    .unwrap();
    let id = mesh.instance().to_owned();
    let run = async |arguments: &[&str]| {
        let mut all = vec!["--output", "json", "account"];
        all.extend(arguments);
        json(&ctl(&mesh, &all).await.unwrap()).unwrap().to_string()
    };
    let rules = ["on", ">top-secret", "~web:*", "-@all", "+get"];
    let mut arguments = vec!["set", &id, "web"];
    arguments.extend(rules);
    let set = run(&arguments).await;
    assert!(set.contains("\"~web:*\",\"-@all\",\"+get\""), "{set}");
    assert!(!set.contains("top-secret"), "{set}");
    run(&["set", &id, "other", "off"]).await;
    let left = run(&["remove", &id, "other", "never-was"]).await;
    assert_eq!(left, set, "only `web` is left, as it was");
    assert_eq!(run(&["list", &id]).await, set);

    let mut service = service(&mesh).await;
    for (name, rule, removed, expected) in [
        ("a", ">clear", "", "PASSWORD_IN_CLEAR"),
        ("a b", "on", "", "ACCOUNT_INVALID"),
        ("a", "on", "default", "ACCOUNT_DEFAULT"),
        ("a", "on", "a", "ACCOUNT_INVALID"),
    ] {
        let request = UpdateAccountsRequest {
            instance_id: id.clone(),
            accounts: vec![Account {
                name: name.to_owned(),
                rules: vec![rule.to_owned()],
            }],
            removed: vec![removed.to_owned()],
            ..UpdateAccountsRequest::default()
        };
        let refused = service.update_accounts(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert_eq!(reason(&refused), expected);
    }
    let nobody = UpdateAccountsRequest {
        instance_id: "r-nobody".into(),
        ..Default::default()
    };
    let refused = service.update_accounts(nobody).await.unwrap_err();
    assert_eq!(
        (refused.code(), &*reason(&refused)),
        (Code::NotFound, "INSTANCE_NOT_FOUND")
    );
    assert_eq!(run(&["list", &id]).await, set);
}

#[tokio::test]
async fn parameters_of_proxies_are_shown_with_their_defaults_and_checked() {
    let mesh = Mesh::start(&MeshOptions {
        replicas: Some(0),
        ..MeshOptions::default()
    })
    .await
    .unwrap();
    let run = async |arguments: &[&str]| {
        let mut all = vec!["--output", "json", "parameters"];
        all.extend(arguments);
        ctl(&mesh, &all).await.unwrap()
    };
    let id = mesh.instance();
    let shown = json(&run(&["show", id]).await).unwrap();
    assert_eq!(shown["proxy"]["split"], "shard");
    let set = ["set", id, "--proxy", "split=slot", "--proxy", "timeout=300"];
    let shown = json(&run(&set).await).unwrap();
    assert_eq!(shown["proxy"]["split"], "slot");
    let shown = json(&run(&["set", id, "--proxy", "split="]).await).unwrap();
    assert_eq!(shown["proxy"]["split"], "shard");
    assert_eq!(shown["proxy"]["timeout"], "300");
    for wrong in ["split=key", "speed=9", "maxclients=0"] {
        let refused = run(&["set", id, "--proxy", wrong]).await;
        assert_eq!(refused.status.code(), Some(3), "{wrong}");
    }
}
