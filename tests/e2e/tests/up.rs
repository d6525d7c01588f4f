//! `slotmesh up` as scripts and people use it: its first line, its end, its refusals.

#![allow(clippy::unwrap_used)]

use std::{fs, net::TcpListener, time::Duration};

use slotmesh_e2e::{client, connect, ctl, finish, json, json_file};
use slotmesh_harness::{Etcd, Mesh, MeshOptions, mesh::Home, programs, signals, wait_until};
use tokio::process::Command;

const LIMIT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn the_first_line_is_the_contract_and_the_default_shape_is_there() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let line: serde_json::Value = serde_json::from_str(&mesh.first_line).unwrap();
    let mut fields: Vec<_> = line
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    fields.sort_unstable();
    assert_eq!(
        fields,
        ["controller", "instance", "nodes", "pids", "proxies"]
    );
    assert!(
        line["instance"].as_str().unwrap().starts_with("r-"),
        "{line}"
    );
    assert_eq!(line["proxies"].as_array().unwrap().len(), 2, "{line}");
    assert_eq!(
        line["pids"]["agents"].as_array().unwrap().len(),
        3,
        "{line}"
    );
    assert_eq!(
        line["pids"]["proxies"].as_array().unwrap().len(),
        2,
        "{line}"
    );
    let nodes = line["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 4, "two shards, each with one replica: {line}");
    for node in nodes {
        let mut fields: Vec<_> = node
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        fields.sort_unstable();
        assert_eq!(fields, ["addr", "host", "id", "pid", "role", "shard"]);
        let pid = u32::try_from(node["pid"].as_u64().unwrap()).unwrap();
        assert!(signals::is_alive(pid), "{node}");
        let twin = nodes
            .iter()
            .find(|n| n["shard"] == node["shard"] && n["id"] != node["id"]);
        assert_ne!(
            twin.unwrap()["host"],
            node["host"],
            "both nodes of a shard on one host"
        );
    }
    let controller = u32::try_from(line["pids"]["controller"].as_u64().unwrap()).unwrap();
    assert_eq!(
        controller,
        mesh.bound_pid("controller/controller.json".as_ref())
            .unwrap()
    );
}

#[tokio::test]
async fn what_one_proxy_stores_the_other_finds_in_both_protocols_and_across_shards() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    for (writer, reader, resp3) in [(0, 1, false), (1, 0, true)] {
        let mut write = connect(&mesh.contract.proxies[writer], resp3)
            .await
            .unwrap();
        let mut read = connect(&mesh.contract.proxies[reader], resp3)
            .await
            .unwrap();
        let keys: Vec<String> = (0..40).map(|n| format!("key:{resp3}:{n}")).collect();
        let mut set = redis::cmd("MSET");
        for (n, key) in keys.iter().enumerate() {
            set.arg(key).arg(n);
        }
        let () = set.query_async(&mut write).await.unwrap();
        let values: Vec<usize> = redis::cmd("MGET")
            .arg(&keys)
            .query_async(&mut read)
            .await
            .unwrap();
        assert_eq!(values, (0..40).collect::<Vec<_>>());
        for command in ["EXISTS", "TOUCH", "DEL"] {
            let count: u32 = redis::cmd(command)
                .arg(&keys)
                .query_async(&mut read)
                .await
                .unwrap();
            assert_eq!(count, 40, "{command}");
        }
        let count: u32 = redis::cmd("UNLINK")
            .arg(&keys)
            .query_async(&mut read)
            .await
            .unwrap();
        assert_eq!(count, 0, "UNLINK after DEL");
    }
}

#[tokio::test]
async fn sigterm_stops_everything_and_a_new_start_finds_data_and_endpoints() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let first = mesh.contract.clone();
    let mut connection = client(&mesh, 0).await.unwrap();
    let () = redis::cmd("SET")
        .arg("kept")
        .arg("yes")
        .query_async(&mut connection)
        .await
        .unwrap();

    let (status, home) = mesh.stop().await.unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(home.processes(), Vec::<u32>::new(), "a process is left");

    let mesh = Mesh::start_in(home, &MeshOptions::default()).await.unwrap();
    assert_eq!(mesh.contract.instance, first.instance);
    assert_eq!(mesh.contract.proxies, first.proxies);
    assert_eq!(mesh.contract.controller, first.controller);
    let mut connection = client(&mesh, 1).await.unwrap();
    let kept: String = redis::cmd("GET")
        .arg("kept")
        .query_async(&mut connection)
        .await
        .unwrap();
    assert_eq!(kept, "yes");
}

#[tokio::test]
async fn a_killed_up_starts_again_with_instance_data_and_endpoints_and_the_same_nodes() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let first = mesh.contract.clone();
    let mut connection = client(&mesh, 0).await.unwrap();
    let () = redis::cmd("SET")
        .arg("kept")
        .arg("yes")
        .query_async(&mut connection)
        .await
        .unwrap();

    let home = mesh.kill_up().await.unwrap();
    let served: String = redis::cmd("GET")
        .arg("kept")
        .query_async(&mut connection)
        .await
        .unwrap();
    assert_eq!(served, "yes", "clients go on without up");

    let mesh = Mesh::start_in(home, &MeshOptions::default()).await.unwrap();
    assert_eq!(mesh.contract.instance, first.instance);
    assert_eq!(mesh.contract.proxies, first.proxies);
    assert_eq!(
        mesh.contract.nodes, first.nodes,
        "nodes were adopted, not restarted"
    );
    assert_eq!(
        mesh.contract.pids.proxies, first.pids.proxies,
        "proxies were adopted"
    );
    assert!(
        mesh.contract
            .pids
            .agents
            .iter()
            .all(|pid| !first.pids.agents.contains(pid))
    );
    let served: String = redis::cmd("GET")
        .arg("kept")
        .query_async(&mut connection)
        .await
        .unwrap();
    assert_eq!(served, "yes", "the same connection still serves");

    let (_, home) = mesh.stop().await.unwrap();
    assert_eq!(
        home.processes(),
        Vec::<u32>::new(),
        "adopted processes are stopped, too"
    );
}

#[tokio::test]
async fn a_durable_mesh_that_was_stopped_in_order_serves_again_without_an_operator() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let instance = mesh.instance().to_owned();
    let set = ctl(&mesh, &["durability", "set", &instance, "1"]).await;
    assert!(set.unwrap().status.success());
    let mut connection = client(&mesh, 0).await.unwrap();
    for number in 0..50 {
        let mut set = redis::cmd("SET");
        let set = set.arg(format!("kept:{number}")).arg(number);
        let () = set.query_async(&mut connection).await.unwrap();
    }
    let (_, home) = mesh.stop().await.unwrap();

    // Every process is new, so no offset can be compared; but each primary ended with all it had.
    let mesh = Mesh::start_in(home, &MeshOptions::default()).await.unwrap();
    let mut connection = client(&mesh, 0).await.unwrap();
    for number in 0..50 {
        let mut get = redis::cmd("GET");
        let get = get.arg(format!("kept:{number}"));
        let kept: Option<u32> = get.query_async(&mut connection).await.unwrap();
        assert_eq!(kept, Some(number));
    }
    let mut set = redis::cmd("SET");
    let () = set
        .arg("new")
        .arg(1)
        .query_async(&mut connection)
        .await
        .unwrap();
}

#[tokio::test]
async fn an_up_that_is_killed_while_it_starts_is_continued_by_the_next_one() {
    let mut home = Home::new().unwrap();
    for kill_after_ms in [50, 300, 700, 1_500] {
        let mut up = home.up(&MeshOptions::default()).unwrap().spawn().unwrap();
        // Not to wait for something: to be somewhere else in the start each time.
        tokio::time::sleep(Duration::from_millis(kill_after_ms)).await;
        up.kill().await.unwrap();
    }
    let mesh = Mesh::start_in(home, &MeshOptions::default()).await.unwrap();
    let instances = json(
        &ctl(&mesh, &["--output", "json", "instance", "list"])
            .await
            .unwrap(),
    );
    assert_eq!(
        instances.unwrap().as_array().unwrap().len(),
        1,
        "made twice"
    );
    let mut connection = client(&mesh, 0).await.unwrap();
    let () = redis::cmd("SET")
        .arg("k")
        .arg("v")
        .query_async(&mut connection)
        .await
        .unwrap();
    home = mesh.stop().await.unwrap().1;
    assert_eq!(home.processes(), Vec::<u32>::new());
}

#[tokio::test]
async fn sigterm_while_it_starts_leaves_nothing_behind() {
    for signal_after_ms in [30, 200, 600, 1_200] {
        let home = Home::new().unwrap();
        let mut up = home.up(&MeshOptions::default()).unwrap().spawn().unwrap();
        tokio::time::sleep(Duration::from_millis(signal_after_ms)).await;
        signals::terminate(up.id().unwrap()).unwrap();
        let ended = tokio::time::timeout(LIMIT, up.wait()).await;
        let status = ended.expect("up ends within its limit").unwrap();
        assert_eq!(
            home.processes(),
            Vec::<u32>::new(),
            "after {signal_after_ms} ms: {status}"
        );
    }
}

#[tokio::test]
async fn the_etcd_store_serves_and_survives_a_kill_of_up() {
    let etcd = Etcd::start().await.unwrap();
    let options = MeshOptions {
        store: Some(etcd.store()),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    let first = mesh.contract.clone();
    let replica = first
        .nodes
        .iter()
        .find(|n| n.role == "replica")
        .unwrap()
        .id
        .clone();
    let switched = ctl(
        &mesh,
        &[
            "switchover",
            mesh.instance(),
            "--target",
            &replica,
            "--wait",
        ],
    );
    let switched = switched.await.unwrap();
    assert!(
        switched.status.success(),
        "{}",
        String::from_utf8_lossy(&switched.stderr)
    );

    let home = mesh.kill_up().await.unwrap();
    let mesh = Mesh::start_in(home, &MeshOptions::default()).await.unwrap();
    assert_eq!(mesh.contract.instance, first.instance);
    assert_eq!(mesh.contract.proxies, first.proxies);
    let now = mesh
        .contract
        .nodes
        .iter()
        .find(|n| n.id == replica)
        .unwrap();
    assert_eq!(now.role, "primary", "the record of the switchover was kept");
}

#[tokio::test]
async fn a_second_up_and_another_shape_are_refused_and_harm_nothing() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let refused = up(&mesh.data().display().to_string(), &[]).await;
    assert_eq!(refused.0, Some(3));
    assert!(refused.1.contains("another `slotmesh up`"), "{}", refused.1);
    let mut connection = client(&mesh, 0).await.unwrap();
    let () = redis::cmd("PING")
        .query_async(&mut connection)
        .await
        .unwrap();

    let (_, home) = mesh.stop().await.unwrap();
    let refused = up(&home.data().display().to_string(), &["--shards", "7"]).await;
    assert_eq!(refused.0, Some(3));
    assert!(refused.1.contains("--shards 7 (it has 2)"), "{}", refused.1);
    assert_eq!(home.processes(), Vec::<u32>::new());
}

#[tokio::test]
async fn a_directory_of_a_newer_version_and_a_port_in_use_are_clear_errors() {
    let home = Home::new().unwrap();
    fs::create_dir_all(home.data()).unwrap();
    fs::write(home.data().join("mesh.json"), r#"{"schema":99}"#).unwrap();
    let refused = up(&home.data().display().to_string(), &[]).await;
    assert_eq!(refused.0, Some(3));
    assert!(refused.1.contains("newer slotmesh"), "{}", refused.1);
    assert_eq!(
        json_file(&home.data().join("mesh.json")).unwrap()["schema"],
        99
    );

    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let (_, home) = mesh.stop().await.unwrap();
    let port = json_file(&home.data().join("mesh.json")).unwrap()["controller_port"].clone();
    let taken = TcpListener::bind(format!("127.0.0.1:{port}")).unwrap();
    let failed = up(&home.data().display().to_string(), &[]).await;
    assert_eq!(failed.0, Some(1));
    assert!(
        failed
            .1
            .contains(&format!("port 127.0.0.1:{port} of the controller")),
        "{}",
        failed.1
    );
    assert_eq!(home.processes(), Vec::<u32>::new());
    drop(taken);
    Mesh::start_in(home, &MeshOptions::default()).await.unwrap();
}

#[tokio::test]
async fn a_standard_instance_without_replica_serves() {
    let options = MeshOptions {
        architecture: Some("standard".into()),
        replicas: Some(0),
        proxies: Some(1),
        ..MeshOptions::default()
    };
    let mesh = Mesh::start(&options).await.unwrap();
    assert_eq!(mesh.contract.nodes.len(), 1);
    let mut connection = client(&mesh, 0).await.unwrap();
    let value: u32 = redis::cmd("INCR")
        .arg("n")
        .query_async(&mut connection)
        .await
        .unwrap();
    assert_eq!(value, 1);
}

#[tokio::test]
async fn a_controller_or_an_agent_that_dies_is_started_again_on_the_same_port() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    for file in ["controller/controller.json", "hosts/host-1/agent.json"] {
        let path = mesh.data().join(file);
        let before = json_file(&path).unwrap();
        let pid = mesh.bound_pid(file.as_ref()).unwrap();
        signals::kill(pid).unwrap();
        let after = wait_until(LIMIT, "the process to be back", async || {
            let now = json_file(&path)?;
            anyhow::ensure!(now["pid"] != before["pid"], "still the old file");
            anyhow::Ok(now)
        });
        assert_eq!(after.await.unwrap()["address"], before["address"], "{file}");
    }
    let instances = wait_until(LIMIT, "the API to answer again", async || {
        json(&ctl(&mesh, &["--output", "json", "instance", "list"]).await?)
    });
    assert_eq!(instances.await.unwrap()[0]["instance_id"], mesh.instance());
}

/// Runs `up` where it is expected to end by itself: exit code and stderr.
async fn up(data: &str, more: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(programs::path("slotmesh").unwrap());
    command
        .args(["up", "--output", "json", "--data", data])
        .args(more);
    let output = finish(command).await.unwrap();
    assert!(
        output.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}
