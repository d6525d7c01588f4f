//! Two masters never both accept writes, by the word of the engines: the program that shows it, run
//! for a short time.

#![allow(clippy::unwrap_used)]

use std::process::Command;

/// Of a machine on which the other tests run as well. What is promised is 2.2 s.
const SLACK: &str = "--slack-ms=300";

#[test]
fn two_masters_never_both_accept_writes() {
    // Only root may make networks.
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: needs root");
        return;
    }
    let mut split = Command::new(env!("CARGO_BIN_EXE_slotmesh-bench"));
    let output = split.args(["split", "--count=2", SLACK]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.matches(": kept").count() == 2,
        "{}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
