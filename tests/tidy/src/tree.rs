//! What may lie where.

use std::collections::BTreeSet;

use crate::{assert_none, paths, root};

/// Everything at the top. One directory a plane; a newcomer sees the whole in one screen.
const TOP: &[&str] = &[
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "Makefile",
    "README.md",
    "agent",
    "clippy.toml",
    "deny.toml",
    "deploy",
    "docs",
    "proto",
    "proxy",
    "rustfmt.toml",
    "services",
    "tests",
];

#[test]
fn the_top_holds_nothing_but_what_a_newcomer_needs() {
    let paths = paths();
    let found: BTreeSet<&str> = paths
        .iter()
        .filter_map(|path| path.split('/').next())
        .collect();
    let allowed: BTreeSet<&str> = TOP.iter().copied().collect();
    let extra: Vec<_> = found
        .difference(&allowed)
        .map(ToString::to_string)
        .collect();
    assert_none("not an entry of the top", &extra);
}

#[test]
fn modules_are_files_beside_their_directory() {
    // Beside a test program, a file would be one more test program.
    let wrong = |path: &String| path.ends_with("/mod.rs") && !path.contains("/tests/");
    let found: Vec<_> = paths().into_iter().filter(wrong).collect();
    assert_none("foo.rs beside foo/, no mod.rs", &found);
}

#[test]
fn every_crate_keeps_the_lints_of_the_workspace() {
    let manifests = paths()
        .into_iter()
        .filter(|path| path.ends_with("/Cargo.toml"));
    let mut complaints = Vec::new();
    for path in manifests {
        let text = std::fs::read_to_string(root().join(&path)).expect("a manifest can be read");
        // Generated code, which nobody lints.
        if path != "proto/Cargo.toml" && !text.contains("[lints]\nworkspace = true") {
            complaints.push(path);
        }
    }
    assert_none("[lints] workspace = true", &complaints);
}
