//! Parameters and accounts: all nodes or none, stored, described, and told to proxies.

#![allow(clippy::unwrap_used)] // A test may: its panic is the finding.

#[allow(dead_code)] // Other tests use the rest.
mod support;

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

use slotmesh_proto::{
    instance::v1::{self as api, instance_service_client::InstanceServiceClient},
    topology::v1::Account,
};
use support::{Mesh, wait_for};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

type Client = InstanceServiceClient<Channel>;

/// A mesh with an instance of two shards that serves through one fake proxy.
async fn serving() -> (Mesh, Client, String) {
    let mut mesh = Mesh::start(2).await;
    let mut client = InstanceServiceClient::new(mesh.channel().await);
    let request = api::CreateInstanceRequest {
        proxy_count: Some(1),
        parameters: [("HZ".to_owned(), "20".to_owned())].into(),
        ..Default::default()
    };
    let created = wait_for("the creation to be admitted", async || {
        client.create_instance(request.clone()).await.ok()
    })
    .await
    .into_inner();
    let id = created.instance_id;
    mesh.add_proxy(&id, &format!("{id}-proxy-0")).await;
    wait_for("routes of both shards", async || {
        (mesh.routes.lock().unwrap().len() == 2).then_some(())
    })
    .await;
    (mesh, client, id)
}

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = |(n, v): &(&str, &str)| ((*n).to_owned(), (*v).to_owned());
    pairs.iter().map(owned).collect()
}

async fn engine(client: &mut Client, id: &str, pairs: &[(&str, &str)]) -> Result<u64, Status> {
    let request = api::UpdateParametersRequest {
        instance_id: id.to_owned(),
        engine: map(pairs),
        ..Default::default()
    };
    let answer = client.update_parameters(request).await?;
    Ok(answer.into_inner().revision)
}

async fn accounts(
    client: &mut Client,
    id: &str,
    changed: &[(&str, &[&str])],
    removed: &[&str],
) -> Result<u64, Status> {
    let account = |(name, rules): &(&str, &[&str])| Account {
        name: (*name).to_owned(),
        rules: rules.iter().map(|r| (*r).to_owned()).collect(),
    };
    let request = api::UpdateAccountsRequest {
        instance_id: id.to_owned(),
        accounts: changed.iter().map(account).collect(),
        removed: removed.iter().map(|n| (*n).to_owned()).collect(),
        ..api::UpdateAccountsRequest::default()
    };
    let answer = client.update_accounts(request).await?;
    Ok(answer.into_inner().revision)
}

async fn described(client: &mut Client, id: &str) -> api::Instance {
    let request = api::DescribeInstancesRequest {
        instance_ids: vec![id.to_owned()],
    };
    let answer = client.describe_instances(request).await.unwrap();
    answer.into_inner().instances.remove(0)
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().unwrap().reason
}

/// The value that each node has.
fn on_nodes(mesh: &Mesh, name: &str) -> Vec<Option<String>> {
    let all = mesh.parameters.lock().unwrap();
    all.values().map(|node| node.get(name).cloned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_is_set_on_every_node_stored_and_described() {
    let (mesh, mut client, id) = serving().await;
    let revision = engine(&mut client, &id, &[("MaxMemory", "5mb"), ("save", "")])
        .await
        .unwrap();
    assert_eq!(on_nodes(&mesh, "MaxMemory"), vec![Some("5mb".into()); 4]);
    assert_eq!(on_nodes(&mesh, "save"), vec![Some(String::new()); 4]);
    let shown = described(&mut client, &id).await.engine_parameters;
    assert_eq!(
        shown,
        map(&[("hz", "20"), ("maxmemory", "5mb"), ("save", "")])
    );
    // Again: nothing to store, and no later revision.
    let again = engine(&mut client, &id, &[("maxmemory", "5mb")]).await;
    assert_eq!(again.unwrap(), revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_that_refuses_leaves_all_as_before_and_its_words_are_the_error() {
    let (mesh, mut client, id) = serving().await;
    engine(&mut client, &id, &[("maxmemory", "5mb")])
        .await
        .unwrap();
    let before = mesh.parameters.lock().unwrap().clone();
    let bad = format!("{id}-1-0");
    let refused = engine(&mut client, &id, &[("maxmemory", &bad)])
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(refused.message(), format!("ERR {bad} does not like it"));
    assert_eq!(reason(&refused), "ENGINE_REFUSED");
    assert_eq!(*mesh.parameters.lock().unwrap(), before);
    let shown = described(&mut client, &id).await.engine_parameters;
    assert_eq!(shown["maxmemory"], "5mb");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_at_once_are_all_made_and_one_is_fast() {
    let (mesh, mut client, id) = serving().await;
    engine(&mut client, &id, &[("timeout", "1")]).await.unwrap();
    let mut took: Vec<_> = Vec::new();
    for n in 0..20 {
        let before = Instant::now();
        let value = n.to_string();
        engine(&mut client, &id, &[("timeout", &value)])
            .await
            .unwrap();
        took.push(before.elapsed());
    }
    took.sort();
    println!("median of 20 changes: {:?}, worst {:?}", took[10], took[19]);
    let mut changes = tokio::task::JoinSet::new();
    for n in 0..10 {
        let (mut client, id) = (client.clone(), id.clone());
        changes.spawn(async move {
            let (same, own) = (n.to_string(), format!("own-{n}"));
            engine(&mut client, &id, &[("same", &same), (&own, "1")]).await
        });
    }
    let revisions: BTreeSet<u64> = changes.join_all().await.into_iter().flatten().collect();
    assert_eq!(revisions.len(), 10, "each has its revision");
    let stored = described(&mut client, &id).await.engine_parameters;
    assert_eq!(
        on_nodes(&mesh, "same"),
        vec![Some(stored["same"].clone()); 4]
    );
    assert!((0..10).all(|n| stored.contains_key(&format!("own-{n}"))));
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_of_proxies_are_published_and_an_empty_value_is_the_default() {
    let (mesh, mut client, id) = serving().await;
    let mut set = async |pairs: &[(&str, &str)]| {
        let request = api::UpdateParametersRequest {
            instance_id: id.clone(),
            proxy: map(pairs),
            ..Default::default()
        };
        client.update_parameters(request).await.map(drop)
    };
    set(&[("split", "slot"), ("hold_budget_ms", "700")])
        .await
        .unwrap();
    wait_for("the proxy to be told", async || {
        let settings = mesh.settings.lock().unwrap();
        (settings.hold_budget_ms == 700 && settings.proxy_parameters["split"] == "slot")
            .then_some(())
    })
    .await;
    let unknown = set(&[("speed", "1")]).await.unwrap_err();
    assert_eq!(reason(&unknown), "PARAMETER_UNKNOWN");
    set(&[("split", "")]).await.unwrap();
    wait_for("the default", async || {
        let settings = mesh.settings.lock().unwrap();
        (!settings.proxy_parameters.contains_key("split")).then_some(())
    })
    .await;
    let shown = described(&mut client, &id).await.proxy_parameters;
    assert_eq!(
        (&*shown["split"], &*shown["hold_budget_ms"]),
        ("shard", "700")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_replaced_whole_published_and_survive_a_restart() {
    let (mut mesh, mut client, id) = serving().await;
    let secret = format!("#{}", "ab".repeat(32));
    accounts(
        &mut client,
        &id,
        &[("web", &["on", &secret, "~*", "+@all"]), ("x", &["on"])],
        &[],
    )
    .await
    .unwrap();
    let revision = accounts(&mut client, &id, &[("web", &["off"])], &["x", "y"])
        .await
        .unwrap();
    let again = accounts(&mut client, &id, &[("web", &["off"])], &["x"]).await;
    assert_eq!(again.unwrap(), revision, "doing it twice is doing it once");
    let expected = [Account {
        name: "web".into(),
        rules: vec!["off".into()],
    }];
    wait_for("the proxy to be told", async || {
        (mesh.settings.lock().unwrap().accounts == expected).then_some(())
    })
    .await;
    for (changed, removed, expected) in [
        (
            &[("web", &["on", ">secret"][..])][..],
            &[][..],
            "PASSWORD_IN_CLEAR",
        ),
        (&[("w b", &[][..])], &[], "ACCOUNT_INVALID"),
        (&[], &["default"], "ACCOUNT_DEFAULT"),
    ] {
        let refused = accounts(&mut client, &id, changed, removed)
            .await
            .unwrap_err();
        assert_eq!(reason(&refused), expected);
        assert!(!refused.message().contains("secret\""), "{refused:?}");
    }
    mesh.restart().await;
    let request = api::DescribeAccountsRequest {
        instance_id: id.clone(),
    };
    let found = wait_for("the restarted controller", async || {
        client.describe_accounts(request.clone()).await.ok()
    })
    .await;
    assert_eq!(found.into_inner().accounts, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_names_the_observer_and_the_replicas() {
    let (mesh, _, id) = serving().await;
    let routes = mesh.routes.lock().unwrap();
    let (first, second) = (&routes["0"], &routes["1"]);
    assert_eq!(first.observer_username, "ob-1");
    assert_ne!(first.observer_password, second.observer_password);
    let replica = format!("{id}-0-1");
    assert_eq!(first.replicas.len(), 1);
    assert_eq!(first.replicas[0].node_id, replica);
    assert_eq!(first.replicas[0].address, support::address_of(&replica));
}
