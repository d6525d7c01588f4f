//! The fuzzer's corpus, replayed by the stable compiler: what was once found stays found, and the
//! properties hold for every input that reaches something new.
#![allow(clippy::unwrap_used)]

#[path = "../fuzz/properties.rs"]
mod properties;

use std::path::Path;

/// Small enough to read in a moment and to keep in the repository.
const FILES_MAX: usize = 200;

fn replay(target: &str, property: fn(&[u8])) -> usize {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = std::fs::read_dir(&corpus)
        .unwrap_or_else(|error| panic!("{}: {error}", corpus.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    for file in &files {
        let bytes = std::fs::read(file).unwrap();
        // So that the failure names its input.
        std::panic::catch_unwind(|| property(&bytes))
            .unwrap_or_else(|_| panic!("{target}: {}", file.display()));
    }
    assert!(!files.is_empty(), "{target} has no corpus");
    files.len()
}

#[test]
fn the_properties_hold_for_the_whole_corpus() {
    let count = replay("request", properties::requests)
        + replay("inline", properties::inline)
        + replay("reply", properties::replies)
        + replay("value", properties::values);
    assert!(
        count < FILES_MAX,
        "{count} files: minimize the corpus (make fuzz-corpus)"
    );
}
