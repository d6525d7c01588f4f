//! Engine parameters ahead of the record: all or none, kept when stored, undone when not.

use std::collections::HashMap;

use slotmesh_agent::control::strings;
use slotmesh_proto::agent::v1::{
    SetParametersRequest, SetParametersResponse, agent_service_client::AgentServiceClient,
};
use tokio::time::timeout;

use crate::{
    controller::{NODES, WAIT},
    hosts::{AtExit, Mesh, eventually, fetched_engines},
};

fn map(parameters: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = |(n, v): &(&str, &str)| ((*n).to_owned(), (*v).to_owned());
    parameters.iter().map(owned).collect()
}

async fn set(mesh: &Mesh, version: u64, parameters: &[(&str, &str)]) -> SetParametersResponse {
    let request = SetParametersRequest {
        node_id: NODES[0].to_owned(),
        term: 1,
        version,
        parameters: map(parameters),
        undo: false,
        timeout_ms: 2_000,
    };
    call(mesh, request).await
}

async fn call(mesh: &Mesh, request: SetParametersRequest) -> SetParametersResponse {
    let address = format!("http://{}", mesh.agent(0).address);
    let mut client = AgentServiceClient::connect(address).await.unwrap();
    timeout(WAIT, client.set_parameters(request))
        .await
        .expect("an answer")
        .unwrap()
        .into_inner()
}

async fn value(mesh: &Mesh, name: &str) -> String {
    let reply = mesh.admin(0).await.call(&["CONFIG", "GET", name]).await;
    strings(&reply.unwrap())[1].clone()
}

async fn all_or_none(engine: &str) {
    let mesh = Mesh::provisioned(engine).await;
    let before = value(&mesh, "maxmemory-samples").await;
    let refused = set(&mesh, 1, &[("maxmemory-samples", "7"), ("timeout", "soon")]).await;
    assert!(refused.running && refused.refusal.starts_with("ERR "));
    assert!(
        refused.refusal.contains("CONFIG SET"),
        "{}",
        refused.refusal
    );
    assert_eq!(value(&mesh, "maxmemory-samples").await, before);

    let done = set(
        &mesh,
        1,
        &[
            ("MaxMemory-Samples", "7"),
            ("save", "3600 1 300 10"),
            ("notify-keyspace-events", "KEA"),
        ],
    )
    .await;
    assert_eq!((done.running, done.refusal.as_str()), (true, ""));
    assert_eq!(done.previous["maxmemory-samples"], before);
    assert_eq!(done.previous["save"], "");
    assert_eq!(value(&mesh, "save").await, "3600 1 300 10");
    // A value that is cleared, and back to what was before.
    let cleared = set(&mesh, 2, &[("save", "")]).await;
    assert_eq!(cleared.previous["save"], "3600 1 300 10");
    assert_eq!(value(&mesh, "save").await, "");
    let undone = call(
        &mesh,
        SetParametersRequest {
            node_id: NODES[0].to_owned(),
            term: 1,
            version: 2,
            parameters: cleared.previous,
            undo: true,
            timeout_ms: 2_000,
        },
    )
    .await;
    assert!(undone.running);
    assert_eq!(value(&mesh, "save").await, "3600 1 300 10");
    for reserved in ["replicaof", "MasterAuth", "cluster-enabled"] {
        let refused = set(&mesh, 3, &[(reserved, "1")]).await;
        assert!(refused.refusal.contains("set by slotmesh"), "{reserved}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_are_set_all_or_none_on_every_engine() {
    all_or_none("").await;
    for engine in fetched_engines() {
        all_or_none(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assignment_of_before_does_not_undo_what_was_set_ahead() {
    let mesh = Mesh::provisioned("").await;
    mesh.controller.change(|record| {
        record.parameters = map(&[("maxmemory-samples", "6")]);
        record.parameters_version = 1;
    });
    eventually("the record's value", async || {
        value(&mesh, "maxmemory-samples").await == "6"
    })
    .await;
    set(&mesh, 2, &[("maxmemory-samples", "9")]).await;
    // News of something else, from a record that does not have it yet. The node has taken it once
    // it has deleted the user.
    mesh.admin(0)
        .await
        .call(&["ACL", "SETUSER", "rp-0-z"])
        .await
        .unwrap();
    mesh.controller.change(|record| record.engine.clear());
    eventually("a turn of the worker", async || {
        let users = mesh.admin(0).await.call(&["ACL", "USERS"]).await.unwrap();
        !strings(&users).contains(&"rp-0-z".to_owned())
    })
    .await;
    assert_eq!(value(&mesh, "maxmemory-samples").await, "9");
    // Stored, and later changed back by way of the record.
    mesh.controller.change(|record| {
        record.parameters = map(&[("maxmemory-samples", "9")]);
        record.parameters_version = 2;
    });
    mesh.controller.change(|record| {
        record.parameters = map(&[("maxmemory-samples", "4")]);
        record.parameters_version = 3;
    });
    eventually("the record's next value", async || {
        value(&mesh, "maxmemory-samples").await == "4"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_engine_takes_only_at_start_is_in_its_boot_configuration() {
    let mut engines = fetched_engines();
    engines.push(String::new());
    for engine in engines {
        let parameters = [
            ("enable-debug-command", "yes"),
            ("maxmemory-samples", "8"),
            ("save", "900 1"),
        ];
        let mut mesh = Mesh::start_as(|record| {
            record.engine.clone_from(&engine);
            record.parameters = map(&parameters);
        })
        .await;
        mesh.controller.provision().await;
        let mut proxy = mesh.proxy_connection().await;
        proxy.call(&["DEBUG", "SLEEP", "0"]).await.unwrap();
        assert_eq!(value(&mesh, "maxmemory-samples").await, "8", "{engine}");
        assert_eq!(value(&mesh, "save").await, "900 1", "{engine}");
        let report = mesh.controller.node(0).unwrap();
        assert_eq!(report.error, "", "{engine}");
        // A new life of the agent finds the parameters as they should be.
        mesh.stop_agent(0).await;
        mesh.start_agent(0, AtExit::LeaveRunning).await;
        mesh.controller
            .until("adoption", 0, |n| {
                n.error.is_empty() && n.granted_epoch == 1
            })
            .await;
    }
}

/// Two windows of what is measured, on a machine that does much else.
const MEASURED: std::time::Duration = std::time::Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_primarys_backlog_grows_with_what_is_written() {
    for engine in ["redis-6.2", "redis-8.2"] {
        let Some(engine) = crate::exchange::engine(engine) else {
            println!("skipped: {engine} is not in .engines");
            continue;
        };
        let mesh = Mesh::provisioned(&engine).await;
        let size = async || value(&mesh, "repl-backlog-size").await.parse::<u64>();
        let before = size().await.unwrap();
        let mut proxy = mesh.proxy_connection().await;
        let text = "x".repeat(200_000);
        let grown = timeout(MEASURED, async {
            while size().await.unwrap() == before {
                proxy.call(&["SET", "k", &text]).await.unwrap();
            }
        });
        grown.await.expect("a larger backlog");
        let full = crate::exchange::info(&mesh, 0).await.number("sync_full");
        assert_eq!(full, 1, "the replica was fed all the time");
    }
}
