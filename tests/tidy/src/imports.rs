//! Who may import whom: the arrows of docs/architecture.md, kept true against `cargo metadata`.

use std::{collections::BTreeMap, collections::BTreeSet, process::Command};

use serde_json::Value;

use crate::{assert_none, root};

/// Every package with the packages of ours that it may import. Whoever changes this moves an
/// arrow of the architecture: change its picture in docs/architecture.md too.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    // Leaves.
    ("proto", &[]),
    ("resp", &[]),
    ("command", &[]),
    ("runtime", &[]),
    // Who may run which command.
    ("acl", &["command"]),
    // The pure model, and pure decisions about it.
    ("topology", &["proto"]),
    ("task", &["proto", "topology"]),
    // Processes; they never import each other.
    (
        "controller",
        &["proto", "acl", "runtime", "topology", "task"],
    ),
    ("ctl", &["proto", "resp", "command", "runtime", "topology"]),
    (
        "proxy",
        &["proto", "resp", "command", "acl", "runtime", "topology"],
    ),
    (
        "agent",
        &["proto", "resp", "command", "runtime", "topology"],
    ),
];
/// These import everything.
const TESTS: &[&str] = &["harness", "tidy", "sim", "e2e", "chaos", "bench", "judges"];
/// Knows nothing of ours: what leaves are compared with in their tests.
const FOREIGN: &str = "engine";

/// No clock, no sockets, no tasks.
const PURE: &[&str] = &["resp", "command", "acl", "topology", "task"];
const IMPURE: &[&str] = &[
    "tokio",
    "tokio-util",
    "tokio-stream",
    "mio",
    "socket2",
    "rustix",
];

/// Package name without our prefix → the names of its dependencies, of every kind.
fn packages() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let packages = metadata["packages"]
        .as_array()
        .expect("metadata lists packages");
    let name = |value: &Value| {
        value["name"]
            .as_str()
            .expect("everything has a name")
            .to_owned()
    };
    let package = |package: &Value| {
        let dependencies = package["dependencies"]
            .as_array()
            .expect("a list of dependencies");
        (
            short(&name(package)).to_owned(),
            dependencies.iter().map(name).collect(),
        )
    };
    packages.iter().map(package).collect()
}

fn short(name: &str) -> &str {
    match name {
        // The operator's binary carries the project's own name.
        "slotmesh" => "ctl",
        name => name.strip_prefix("slotmesh-").unwrap_or(name),
    }
}

#[test]
fn arrows_point_down_only() {
    let packages = packages();
    let rules: BTreeMap<_, _> = MAY_IMPORT.iter().copied().collect();
    let mut complaints = Vec::new();
    for (package, dependencies) in &packages {
        if TESTS.contains(&package.as_str()) {
            continue;
        }
        if package == FOREIGN {
            let knows = dependencies
                .iter()
                .filter(|d| packages.contains_key(short(d)));
            complaints
                .extend(knows.map(|d| format!("{FOREIGN} imports {d}: it knows nothing of ours")));
            continue;
        }
        let Some(allowed) = rules.get(package.as_str()) else {
            complaints.push(format!("{package} is in no layer: add it to MAY_IMPORT"));
            continue;
        };
        let ours = dependencies
            .iter()
            .map(|d| short(d))
            .filter(|d| packages.contains_key(*d) && *d != FOREIGN);
        let wrong = ours.filter(|d| !allowed.contains(d));
        complaints.extend(wrong.map(|wrong| format!("{package} imports {wrong}")));
    }
    assert_none("who may import whom (docs/architecture.md)", &complaints);
    for (package, _) in MAY_IMPORT {
        assert!(
            packages.contains_key(*package),
            "{package} is gone: take it out of MAY_IMPORT"
        );
    }
}

#[test]
fn only_the_controller_knows_etcd() {
    let knows = |(package, dependencies): (&String, &BTreeSet<String>)| {
        dependencies
            .contains("etcd-client")
            .then(|| package.clone())
    };
    let users: Vec<_> = packages().iter().filter_map(knows).collect();
    assert_eq!(users, ["controller"]);
}

#[test]
fn pure_crates_depend_on_no_runtime() {
    let packages = packages();
    let mut complaints = Vec::new();
    for package in PURE {
        for wrong in IMPURE
            .iter()
            .filter(|name| packages[*package].contains(**name))
        {
            complaints.push(format!("{package} depends on {wrong}"));
        }
    }
    assert_none("no tokio and no sockets in what is pure", &complaints);
}
