//! The README is the first thing that anyone runs, so what it says must be so.

use std::fs;

use crate::root;

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("there is a README.md")
}

/// The text of each fenced block.
fn blocks(text: &str) -> Vec<Vec<&str>> {
    let mut blocks = Vec::new();
    let mut open = None;
    for line in text.lines() {
        match (&mut open, line.trim_start().starts_with("```")) {
            (None, true) => open = Some(Vec::new()),
            (Some(_), true) => blocks.extend(open.take()),
            (Some(block), false) => block.push(line),
            (None, false) => {}
        }
    }
    blocks
}

#[test]
fn its_first_two_commands_are_the_demo_and_the_tests() {
    let readme = readme();
    let lines = blocks(&readme).into_iter().flatten();
    let commands = lines.map(|line| line.trim().trim_start_matches("$ "));
    let commands = commands.map(|line| line.split('#').next().unwrap_or("").trim());
    // Pictures are blocks too: what is run begins with a program's name.
    let runnable = |line: &&str| {
        let program = line.split(' ').next().unwrap_or("");
        ["make", "cargo", "git", "docker", "sudo", "apt", "apt-get"].contains(&program)
            || program.starts_with("./")
    };
    let first: Vec<&str> = commands.filter(runnable).take(2).collect();
    assert_eq!(first, ["make demo", "make test"]);
}

/// The directories of a tree that is drawn with two spaces a level.
fn directories(block: &[&str]) -> Vec<String> {
    let mut parents: Vec<&str> = Vec::new();
    let mut found = Vec::new();
    for line in block {
        let depth = (line.len() - line.trim_start().len()) / 2;
        let name = line.split_whitespace().next().unwrap_or("");
        let Some(name) = name.strip_suffix('/') else {
            continue;
        };
        if depth <= parents.len() {
            parents.truncate(depth);
            parents.push(name);
            found.push(parents.join("/"));
        }
    }
    found
}

#[test]
fn its_tree_names_directories_that_exist() {
    let readme = readme();
    let tree = blocks(&readme).into_iter().map(|block| directories(&block));
    let tree = tree.max_by_key(Vec::len).unwrap_or_default();
    assert!(
        tree.iter().any(|dir| dir == "proxy/resp"),
        "README.md shows the tree: {tree:?}"
    );
    let missing: Vec<_> = tree
        .into_iter()
        .filter(|dir| !root().join(dir).is_dir())
        .collect();
    crate::assert_none("README.md's tree names what is not there", &missing);
}
