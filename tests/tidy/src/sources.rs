//! What every source file keeps to.

use crate::{TextFile, assert_none, texts, texts_with};

/// Longer, and a file has more than one idea.
const MAX_LINES: usize = 600;

/// Sources of crates that decide and don't act.
const PURE_SOURCES: &[&str] = &[
    "proxy/resp/src/",
    "proxy/command/src/",
    "proxy/acl/src/",
    "services/topology/src/",
    "services/task/src/",
];
const IMPURE: &[&str] = &[
    "std::time::Instant",
    "std::time::SystemTime",
    "SystemTime::now",
    "Instant::now",
    "std::net",
    "std::fs",
    "std::thread",
    "std::process",
    "tokio::",
];

/// In two parts, so that this file keeps the rules too.
const UNFINISHED: &[(&str, &str, &str)] = &[
    (
        "tod",
        "o!(",
        "finish it, or return an error that says what is missing",
    ),
    (
        "unimplemente",
        "d!(",
        "finish it, or return an error that says what is missing",
    ),
    ("#[ignor", "e", "assert today's behaviour with a FIXME"),
    ("thread::slee", "p", "wait for a condition with a deadline"),
];
const MACHINE_PATHS: &[(&str, &str)] = &[("/wor", "k/"), ("/far", "m/")];

fn lines(file: &TextFile) -> impl Iterator<Item = (usize, &str)> {
    file.text.lines().enumerate().map(|(n, line)| (n + 1, line))
}

#[test]
fn every_file_opens_with_its_one_idea() {
    let silent = |file: &TextFile| !file.text.starts_with("//! ");
    let files = texts_with("rs")
        .into_iter()
        .filter(silent)
        .map(|file| file.path);
    assert_none(
        "open with //! and the file's job",
        &files.collect::<Vec<_>>(),
    );
}

#[test]
fn no_file_is_longer_than_one_idea() {
    let long = |file: TextFile| {
        let count = file.text.lines().count();
        (count > MAX_LINES).then(|| format!("{}: {count} lines", file.path))
    };
    let files = texts_with("rs").into_iter().filter_map(long);
    assert_none(
        "at most 600 lines: split it by idea",
        &files.collect::<Vec<_>>(),
    );
}

#[test]
fn nothing_is_left_unfinished_ignored_or_slept_over() {
    let mut complaints = Vec::new();
    for file in texts_with("rs") {
        for (start, end, remedy) in UNFINISHED {
            let needle = format!("{start}{end}");
            // Ours to forbid is code, not prose about it.
            let code = |line: &str| !line.trim_start().starts_with("//");
            let found = lines(&file).filter(|(_, line)| code(line) && line.contains(&needle));
            complaints.extend(found.map(|(n, _)| format!("{}:{n}: {needle}: {remedy}", file.path)));
        }
    }
    assert_none("finished, waited for, asserted", &complaints);
}

#[test]
fn what_is_pure_uses_no_clock_and_no_io() {
    let mut complaints = Vec::new();
    for file in texts_with("rs") {
        if !PURE_SOURCES.iter().any(|dir| file.path.starts_with(dir)) {
            continue;
        }
        // Tests may read a file of cases.
        let product = lines(&file).take_while(|(_, line)| line.trim() != "#[cfg(test)]");
        for (n, line) in product.filter(|(_, line)| !line.trim_start().starts_with("//")) {
            let found = IMPURE.iter().filter(|name| line.contains(**name));
            complaints.extend(found.map(|name| format!("{}:{n}: {name}", file.path)));
        }
    }
    assert_none("pass time and bytes in, return actions", &complaints);
}

#[test]
fn no_file_names_a_place_on_one_machine() {
    let mut complaints = Vec::new();
    for file in texts() {
        for (start, end) in MACHINE_PATHS {
            let needle = format!("{start}{end}");
            let found = lines(&file).filter(|(_, line)| line.contains(&needle));
            complaints.extend(found.map(|(n, _)| format!("{}:{n}: {needle}", file.path)));
        }
    }
    assert_none("paths are relative, or given by flags", &complaints);
}
