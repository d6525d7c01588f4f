//! Programs are listed, fetched by the hosts that need them, checked there, and known by what they
//! say of themselves.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;
use slotmesh_e2e::{ctl, json};
use slotmesh_harness::{Mesh, MeshOptions, engines, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

async fn does(mesh: &Mesh, words: &[&str]) -> Value {
    let all = [&["--output", "json"][..], words].concat();
    let output = ctl(mesh, &all).await.unwrap();
    json(&output).unwrap()
}

async fn refused(mesh: &Mesh, words: &[&str]) -> String {
    let output = ctl(mesh, words).await.unwrap();
    assert!(!output.status.success(), "{words:?}: {output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn engine(name: &str) -> String {
    engines::find(name).unwrap().display().to_string()
}

/// What the task of the instance's making waits for.
async fn waits_for(mesh: &Mesh, task: &str, what: &str) -> String {
    wait_until(LIMIT, what, async || {
        let task = does(mesh, &["task", "show", task]).await;
        let message = task["message"].as_str().unwrap_or_default().to_owned();
        anyhow::ensure!(message.contains(what), "{task}");
        anyhow::Ok(message)
    })
    .await
    .unwrap()
}

async fn create(mesh: &Mesh, engine: &str, more: &[&str]) -> Value {
    let words = [
        "instance",
        "create",
        "--architecture",
        "standard",
        "--replicas",
        "0",
    ];
    let words = [&words[..], &["--proxies", "1", "--engine", engine], more].concat();
    does(mesh, &words).await
}

/// Directories of programs, on all hosts.
fn staged(mesh: &Mesh, name: &str) -> Vec<PathBuf> {
    let hosts = fs::read_dir(mesh.data().join("hosts")).unwrap().flatten();
    let places = hosts.map(|h| h.path().join("artifacts").join(name));
    places.filter(|p| p.exists()).collect()
}

#[tokio::test]
async fn an_instance_is_made_of_a_listed_engine_and_says_what_it_runs() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let (old, new) = (engine("redis-6.2"), engine("redis-7.0"));
    does(
        &mesh,
        &["artifact", "add", "redis", "6.2.14", "--file", &old],
    )
    .await;
    let added = ["artifact", "add", "redis", "7.0.15", "--file", &new];
    let added = [&added[..], &["--level", "high", "--note", "mends a crash"]].concat();
    does(&mesh, &added).await;
    does(&mesh, &added).await;
    let listed = does(&mesh, &["artifact", "list"]).await;
    let names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|a| a["name"].clone())
        .collect();
    assert_eq!(
        names,
        ["redis-7.0.15", "redis-6.2.14"],
        "the newest first, each once"
    );

    let made = create(&mesh, "redis-6.2.14", &["--wait"]).await;
    let instance = made["instance_id"].as_str().unwrap();
    let versions = does(&mesh, &["version", instance]).await;
    assert_eq!(versions["engine"], "redis");
    assert_eq!(versions["minor_version"], "6.2.14");
    assert_eq!(versions["is_latest_version"], false);
    assert_eq!(versions["latest"]["name"], "redis-7.0.15");
    assert_eq!(versions["latest"]["level"], "high");
    assert_eq!(
        versions["proxies"][0]["version"],
        versions["proxy_minor_version"]
    );
    assert_eq!(
        staged(&mesh, "redis-6.2.14").len(),
        1,
        "only where it is needed"
    );

    let error = refused(&mesh, &["artifact", "remove", "redis-6.2.14"]).await;
    assert!(error.contains(instance), "{error}");
    does_silently(&mesh, &["artifact", "remove", "redis-7.0.15"]).await;
    let error = refused(&mesh, &["artifact", "remove", "redis-7.0.15"]).await;
    assert!(error.contains("no artifact"), "{error}");
}

async fn does_silently(mesh: &Mesh, words: &[&str]) {
    let output = ctl(mesh, words).await.unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
}

#[tokio::test]
async fn a_program_that_is_not_what_was_listed_is_refused_before_anything_is_touched() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let real = engine("redis-7.0");
    let own = tempfile::tempdir().unwrap();
    let file = |name: &str| own.path().join(name).display().to_string();
    // ELF of a machine that this is not: 0x28 is 32-bit ARM.
    let mut other_machine = fs::read(&real).unwrap();
    other_machine[4] = 1;
    other_machine[18] = 0x28;
    fs::write(file("foreign"), other_machine).unwrap();
    // A program whose library is not on this machine.
    let script =
        "#!/bin/sh\necho 'error while loading shared libraries: libmissing.so.1' >&2\nexit 127\n";
    fs::write(file("lacking"), script).unwrap();
    let zeros = "0".repeat(64);
    let cases = [
        (
            "7.0.1",
            real.clone(),
            vec!["--sha256", zeros.as_str()],
            "SHA-256",
        ),
        (
            "7.0.2",
            real.clone(),
            vec![],
            "it says of itself that it is redis-7.0.15",
        ),
        ("7.0.3", file("foreign"), vec![], "does not run"),
        ("7.0.4", file("lacking"), vec![], "libmissing.so.1"),
        (
            "7.0.5",
            file("nowhere"),
            vec!["--sha256", zeros.as_str()],
            "on this host",
        ),
    ];
    for (version, path, more, said) in cases {
        let name = format!("redis-{version}");
        let words = ["artifact", "add", "redis", version, "--file", &path];
        does(&mesh, &[&words[..], &more].concat()).await;
        let made = create(&mesh, &name, &[]).await;
        let message = waits_for(&mesh, made["task_id"].as_str().unwrap(), said).await;
        assert!(message.contains(&name), "{message}");
        for place in staged(&mesh, &name) {
            let kept = fs::read_dir(&place).unwrap().count();
            assert_eq!(kept, 0, "{} is left", place.display());
        }
    }
    let never = create(&mesh, "redis-9.9.9", &[]).await;
    let task = never["task_id"].as_str().unwrap();
    waits_for(&mesh, task, "no artifact redis-9.9.9 is listed").await;
    assert!(Path::new(&real).exists());
}

#[tokio::test]
async fn a_name_stands_for_one_program_until_it_is_removed() {
    let mesh = Mesh::start(&MeshOptions::default()).await.unwrap();
    let (sum, other) = ("1".repeat(64), "2".repeat(64));
    let add = |sum: &str, url: &str| {
        [
            "artifact", "add", "valkey", "8.0.1", "--url", url, "--sha256", sum,
        ]
        .map(str::to_owned)
    };
    let words = add(&sum, "http://a.example/valkey");
    does(&mesh, &words.each_ref().map(String::as_str)).await;
    let words = add(&other, "http://a.example/valkey");
    let error = refused(&mesh, &words.each_ref().map(String::as_str)).await;
    assert!(error.contains("remove it first"), "{error}");
    for (url, sum) in [
        ("ftp://a.example/valkey", &sum),
        ("http://a.example/v", &"1".repeat(63)),
    ] {
        let words = add(sum, url);
        refused(&mesh, &words.each_ref().map(String::as_str)).await;
    }
    let error = refused(&mesh, &["artifact", "remove", "../valkey"]).await;
    assert!(error.contains("no artifact"), "{error}");
}
