//! Rules of the repository that no compiler checks, each one a test.
//!
//! A rule here is one that we would otherwise repeat in reviews. It names the file and the line,
//! and says what to do.
#![cfg(test)]

mod imports;
mod protos;
mod readme;
mod sources;
mod tree;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A text file that is, or will be, in the repository.
struct TextFile {
    /// From the root, with `/`.
    path: String,
    text: String,
}

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    root.expect("this crate is at tests/tidy").to_owned()
}

/// Paths of all files that git keeps or would keep: what is ignored is nobody's business.
fn paths() -> Vec<String> {
    let listed = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(root())
        .output()
        .expect("git is installed");
    assert!(
        listed.status.success(),
        "git ls-files: {}",
        String::from_utf8_lossy(&listed.stderr)
    );
    let text = String::from_utf8(listed.stdout).expect("paths are text");
    let paths = text
        .split('\0')
        .filter(|path| !path.is_empty())
        .map(str::to_owned);
    // A file that was deleted and not committed yet is still listed.
    let mut paths: Vec<_> = paths.filter(|path| root().join(path).is_file()).collect();
    paths.sort();
    paths.dedup();
    assert!(!paths.is_empty(), "the repository has files");
    paths
}

/// All files that are text; binary files have no rules.
fn texts() -> Vec<TextFile> {
    let read = |path: String| {
        let bytes = fs::read(root().join(&path)).expect("a listed file can be read");
        Some(TextFile {
            path,
            text: String::from_utf8(bytes).ok()?,
        })
    };
    paths().into_iter().filter_map(read).collect()
}

fn texts_with(extension: &str) -> Vec<TextFile> {
    let wanted = |file: &TextFile| {
        Path::new(&file.path)
            .extension()
            .is_some_and(|e| e == extension)
    };
    texts().into_iter().filter(wanted).collect()
}

/// Fails with all complaints at once.
fn assert_none(rule: &str, complaints: &[String]) {
    assert!(
        complaints.is_empty(),
        "{rule}:\n  {}",
        complaints.join("\n  ")
    );
}
