//! Most hosts fall silent at once: nothing is failed over, and an operator sees why.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use serde_json::Value;
use slotmesh_e2e::{ctl, json_file};
use slotmesh_harness::{Mesh, MeshOptions, signals, wait_until};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const LIMIT: Duration = Duration::from_secs(60);

async fn status(mesh: &Mesh) -> anyhow::Result<Value> {
    let output = ctl(mesh, &["status", "--output", "json"]).await?;
    slotmesh_e2e::json(&output)
}

async fn metrics(mesh: &Mesh) -> anyhow::Result<String> {
    let file = json_file(&mesh.data().join("controller/controller.json"))?;
    let address = file["admin_address"].as_str().unwrap_or_default();
    let mut stream = TcpStream::connect(address).await?;
    let request = b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await?;
    let mut page = String::new();
    stream.read_to_string(&mut page).await?;
    Ok(page)
}

#[tokio::test]
async fn hosts_that_fall_silent_together_put_the_brake_on_and_it_is_shown_until_they_are_back() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let agent = |n: u32| {
        let file = format!("hosts/host-{n}/agent.json");
        mesh.bound_pid(file.as_ref()).unwrap()
    };
    let agents = [agent(1), agent(2)];
    for pid in agents {
        signals::freeze(pid).unwrap();
    }
    wait_until(LIMIT, "the brake to be shown", async || {
        let seen = status(&mesh).await?;
        let brake = seen["failover_brake"].as_str().unwrap_or_default();
        anyhow::ensure!(brake.starts_with("failover braked: 2 of 3 hosts"), "{seen}");
        anyhow::ensure!(seen["hosts_silent"] == 2, "{seen}");
        let page = metrics(&mesh).await?;
        let is_shown = page.contains("slotmesh_controller_failover_braked 1")
            && page.contains("slotmesh_controller_failover_brakes_total 1");
        anyhow::ensure!(is_shown, "{page}");
        Ok(())
    })
    .await
    .unwrap();
    for pid in agents {
        signals::thaw(pid).unwrap();
    }
    wait_until(LIMIT, "the brake to be let go", async || {
        let seen = status(&mesh).await?;
        anyhow::ensure!(seen["failover_brake"] == "", "{seen}");
        anyhow::ensure!(seen["hosts_silent"] == 0, "{seen}");
        Ok(())
    })
    .await
    .unwrap();
    let listed = ctl(&mesh, &["task", "list", "--kind", "Failover", "-o", "json"])
        .await
        .unwrap();
    let listed = slotmesh_e2e::json(&listed).unwrap();
    assert_eq!(listed, Value::Array(Vec::new()), "nothing was failed over");
}
