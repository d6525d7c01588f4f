//! Glob patterns against a real Redis, and against patterns made to take forever.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use slotmesh_acl::{matches, matches_nocase};
use slotmesh_command::all;
use slotmesh_engine::{Engine, Reply};

fn config() -> Config {
    Config {
        cases: 3000,
        failure_persistence: None,
        ..Config::default()
    }
}

/// Few different bytes, so that much matches, and those with a meaning.
fn text(letters: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(select(letters), 0..9)
}

const IN_TEXTS: &[u8] = b"aabbcAB-]^\\*\xff\x80";
const IN_PATTERNS: &[u8] = b"aabbcAB-]^\\**??[[[\xff\x80";

#[test]
fn patterns_match_what_they_match_in_redis() {
    let engine = RefCell::new(Engine::start());
    let cases = (
        text(IN_PATTERNS),
        proptest::collection::vec(text(IN_TEXTS), 1..20),
    );
    let check = |(pattern, texts): (Vec<u8>, Vec<Vec<u8>>)| {
        // KEYS does not even look at keys if it is asked for all.
        if pattern == b"*" {
            return Ok(());
        }
        let mut engine = engine.borrow_mut();
        engine.call(&["FLUSHALL"]);
        for text in &texts {
            engine.call(&[b"SET", &text[..], b"1"]);
        }
        let Reply::Items(found) = engine.call(&[b"KEYS", &pattern[..]]) else {
            return Err(TestCaseError::fail("KEYS answers with a list"));
        };
        for text in texts {
            let theirs = found.contains(&Reply::Text(text.clone()));
            prop_assert_eq!(
                matches(&pattern, &text),
                theirs,
                "{:?}",
                text.escape_ascii().to_string()
            );
        }
        Ok(())
    };
    TestRunner::new(config())
        .run(&cases, check)
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn case_is_disregarded_as_in_redis() {
    let engine = RefCell::new(Engine::start());
    let letters = select(&b"gGeEtTsSxX**?[[]-^a"[..]);
    let patterns = proptest::collection::vec(letters, 1..7);
    let names: Vec<&str> = all()
        .filter(|command| command.in_redis_7_0() && !command.name.contains('|'))
        .map(|command| command.name)
        .collect();
    let check = |pattern: Vec<u8>| {
        let call: [&[u8]; 5] = [b"COMMAND", b"LIST", b"FILTERBY", b"PATTERN", &pattern];
        let theirs = engine.borrow_mut().call(&call).texts();
        for name in &names {
            let theirs = theirs.iter().any(|one| one == name);
            prop_assert_eq!(
                matches_nocase(&pattern, name.as_bytes()),
                theirs,
                "{}",
                name
            );
        }
        Ok(())
    };
    TestRunner::new(config())
        .run(&patterns, check)
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn no_pattern_takes_long() {
    let text = [b'a'; 20_000];
    let stars = b"a*".repeat(999);
    let many = [&stars[..], b"b"].concat();
    let classes = [&b"*[a-z]".repeat(900)[..], b"b"].concat();
    let start = Instant::now();
    assert!(!matches(&many, &text));
    assert!(!matches(&classes, &text));
    assert!(
        !matches(&b"*a".repeat(1001), &text),
        "more stars than Redis follows"
    );
    assert!(matches(&b"*a".repeat(1000), &text));
    // It takes milliseconds; with every star tried again it would outlast the universe.
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
}
