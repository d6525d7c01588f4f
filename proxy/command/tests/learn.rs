//! Learning against real engines: a command that the table knows, learned as if it did not, must be
//! the same command. That holds for every engine, since nodes of any version may be asked.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use slotmesh_command::{
    Arguments, Class, Command, Flag, LearnError, Part, all, learn, lookup, resolve,
};
use slotmesh_engine::{Engine, Reply};
use support::calls;

/// Their keys are found by the engine's code: it says so, and we refuse to guess.
const BY_CODE: &[&str] = &["migrate", "sort", "sort_ro"];

/// The engine in PATH, and those that are fetched for tests, if they are there.
fn engines() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    let fetched = ["redis-6.2", "redis-7.0", "redis-8.2", "valkey-8.0"].map(|name| {
        let binary = root
            .unwrap()
            .join(".engines")
            .join(name)
            .join("redis-server");
        (name.to_owned(), binary)
    });
    let fetched = fetched.into_iter().filter(|(_, binary)| binary.is_file());
    let in_path = ("path".to_owned(), PathBuf::from("redis-server"));
    std::iter::once(in_path).chain(fetched).collect()
}

fn part(reply: &Reply) -> Part {
    match reply {
        Reply::Text(text) => Part::Text(text.clone()),
        Reply::Error(text) => panic!("an error inside an entry: {text}"),
        Reply::Int(value) => Part::Int(*value),
        Reply::Nil => Part::Nil,
        Reply::Items(items) => Part::List(items.iter().map(part).collect()),
    }
}

/// Every command that this engine has and that the table knows, as ours and as learned.
fn learn_all(engine: &str, entries: &Reply) -> Vec<(&'static Command, &'static Command)> {
    let mut pairs = Vec::new();
    for entry in entries.items() {
        let name = entry.items()[0].text().to_lowercase();
        let Some(ours) = lookup(name.as_bytes()) else {
            continue; // words that catch browsers
        };
        let disguised = format!("{engine}.{name}");
        let learned = learn(disguised.as_bytes(), &part(entry)).unwrap();
        assert_eq!(learned.name, disguised);
        pairs.push((ours, learned));
        for sub in entry.items().get(9).map_or(&[][..], Reply::items) {
            let name = sub.items()[0].text();
            let (_, word) = name.split_once('|').unwrap();
            let theirs = learned.subcommand(word.as_bytes());
            pairs.push((
                all().find(|ours| ours.name == name).unwrap(),
                theirs.unwrap_or_else(|| panic!("{name} is not learned")),
            ));
        }
    }
    pairs
}

fn keys<A: Arguments + ?Sized>(command: &Command, args: &A) -> Option<BTreeSet<usize>> {
    Some(command.keys(args).ok()?.collect())
}

fn is_told(command: &Command) -> bool {
    !matches!(command.class, Class::Refused(_))
}

fn check_facts(engine: &str, ours: &Command, learned: &Command) {
    let context = format!("{} of {engine}", ours.name);
    if !is_told(learned) {
        // What has rules since 7.0 had none before.
        let by_code = BY_CODE.contains(&ours.name);
        let old = engine == "redis-6.2" && learned.flags.has(Flag::MovableKeys);
        assert!(by_code || old, "{context} is not understood");
        return;
    }
    // An older engine may have known fewer keys or flags; the newest is what the table was made from.
    if engine != "redis-8.2" {
        return;
    }
    assert_eq!(learned.only_key(), ours.only_key(), "{context}");
    assert_eq!(learned.arity, ours.arity, "{context}");
    assert_eq!(learned.flags, ours.flags, "{context}");
    assert_eq!(learned.key_specs(), ours.key_specs(), "{context}");
    let class = match learned.class {
        Class::SingleKey => ours.only_key().is_some(),
        Class::Blocking => ours.flags.has(Flag::Blocking),
        Class::Keyless => ours.key_specs().is_empty(),
        Class::SameSlot => !ours.key_specs().is_empty() && ours.only_key().is_none(),
        _ => false,
    };
    assert!(class, "{context}: {:?}", learned.class);
}

/// Real calls: the learned command finds the keys that the table finds.
fn check_calls(engine: &str, pairs: &[(&Command, &Command)]) {
    let mut compared = 0;
    for call in calls() {
        let named = |name: String| pairs.iter().find(|(ours, _)| ours.name == name);
        let plain = call[0].to_lowercase();
        let sub = call
            .get(1)
            .map_or_else(String::new, |sub| sub.to_lowercase());
        let pair = named(format!("{plain}|{sub}")).or_else(|| named(plain));
        let Some((_, learned)) = pair.filter(|(_, learned)| is_told(learned)) else {
            continue;
        };
        // Engines before 7.0 do not tell subcommands apart; the table does.
        let ours = resolve(call.as_slice()).unwrap();
        let (ours, learned) = (keys(ours, call.as_slice()), keys(learned, call.as_slice()));
        assert_eq!(learned, ours, "{engine}: {}", call.join(" "));
        compared += 1;
    }
    let least = if engine == "redis-6.2" { 60 } else { 100 };
    assert!(compared > least, "{engine}: only {compared} calls compared");
}

/// Any arguments: whatever the table finds, the learned command finds.
fn check_random_calls(engine: &str, pairs: &[(&Command, &Command)]) {
    let word = prop_oneof![
        proptest::sample::select(vec!["STORE", "storedist", "STREAMS", "KEYS", "a", "", "-1"]),
        proptest::sample::select(vec!["0", "1", "2", "3", "7", "x", "18446744073709551615"]),
    ];
    let arguments = proptest::collection::vec(word, 0..12);
    let mut runner = TestRunner::new(Config::with_cases(300));
    let told: Vec<_> = pairs
        .iter()
        .filter(|(_, learned)| is_told(learned))
        .collect();
    let compare = |mut args: Vec<&'static str>| {
        args.insert(0, "name");
        for (ours, learned) in &told {
            if ours.check_arity(args.len()) {
                prop_assert!(learned.check_arity(args.len()), "{engine}: {}", ours.name);
                let (ours_keys, keys) = (ours.keys(args.as_slice()), learned.keys(args.as_slice()));
                prop_assert_eq!(ours_keys.is_ok(), keys.is_ok(), "{}: {}", engine, ours.name);
                let same = ours_keys
                    .into_iter()
                    .flatten()
                    .eq(keys.into_iter().flatten());
                prop_assert!(same, "{engine}: {}", ours.name);
            }
        }
        Ok(())
    };
    runner.run(&arguments, compare).unwrap();
}

#[test]
fn what_a_node_tells_of_a_known_command_makes_the_same_command() {
    for (name, binary) in engines() {
        let mut engine = Engine::start_from(&binary, &[]);
        let entries = engine.call(&["COMMAND"]);
        let count = engine.call(&["COMMAND", "COUNT"]).int();
        assert_eq!(entries.items().len(), usize::try_from(count).unwrap());
        let pairs = learn_all(&name, &entries);
        assert!(pairs.len() > 200, "{name}: {} commands", pairs.len());
        for (ours, learned) in &pairs {
            check_facts(&name, ours, learned);
        }
        check_calls(&name, &pairs);
        if name == "redis-8.2" {
            check_random_calls(&name, &pairs);
        }
    }
}

#[test]
fn what_no_node_knows_is_not_learned() {
    let mut engine = Engine::start();
    let reply = engine.call(&["COMMAND", "INFO", "no.such.command"]);
    let told = learn(b"no.such.command", &part(&reply.items()[0]));
    assert_eq!(told.unwrap_err(), LearnError::Unknown);
}

#[test]
fn workers_that_learn_a_command_at_once_agree() {
    let reply = Engine::start().call(&["COMMAND", "INFO", "get"]);
    let entry = part(&reply.items()[0]);
    let learned: Vec<&Command> = std::thread::scope(|scope| {
        let learn = || learn(b"learned.at.once", &entry).unwrap();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(learn)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(learned.iter().all(|one| std::ptr::eq(*one, learned[0])));
    assert_eq!(learned[0].only_key(), Some(1));
}

/// A shared object made of `support/module.c`.
fn built_module(directory: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/module.c");
    let module = directory.join("module.so");
    let status = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"])
        .args([&module, &source])
        .status();
    assert!(status.expect("there is a C compiler").success());
    module
}

/// Each is given to COMMAND GETKEYS and to the learned command.
const MODULE_CALLS: &[(&str, Class)] = &[
    ("demo.one k v", Class::SingleKey),
    ("demo.set k v", Class::SingleKey),
    ("DEMO.SECOND x k", Class::SingleKey),
    ("demo.all a b c", Class::SameSlot),
    ("demo.pairs x a 1 b 2", Class::SameSlot),
    ("demo.two a b c", Class::SameSlot),
];

#[test]
fn a_real_modules_commands_are_routed_by_their_keys_or_refused() {
    let directory = tempfile::tempdir().unwrap();
    let module = built_module(directory.path());
    for (name, binary) in engines() {
        let mut engine = Engine::start_from(&binary, &["--loadmodule", module.to_str().unwrap()]);
        // Every engine tells it anew, under a name that no other has told.
        let mut learned = |command: &str| {
            let reply = engine.call(&["COMMAND", "INFO", command]);
            learn(
                format!("{name}.{command}").as_bytes(),
                &part(&reply.items()[0]),
            )
            .unwrap()
        };
        for refused in ["demo.last", "demo.hidden"] {
            let command = learned(refused);
            assert!(
                !is_told(command),
                "{name}: {refused} is {:?}",
                command.class
            );
        }
        assert_eq!(learned("demo.none").class, Class::Keyless, "{name}");
        let admin = learned("demo.admin");
        assert!(
            admin.flags.has(Flag::Admin) && admin.class == Class::Keyless,
            "{name}"
        );
        for (call, class) in MODULE_CALLS {
            let args: Vec<&str> = call.split(' ').collect();
            let command = learned(args[0]);
            assert_eq!(command.class, *class, "{name}: {call}");
        }
        for (call, _) in MODULE_CALLS {
            let args: Vec<&str> = call.split(' ').collect();
            let theirs = engine.call(&[&["COMMAND", "GETKEYS"], args.as_slice()].concat());
            let theirs: Vec<&str> = theirs.items().iter().map(Reply::text).collect();
            let command = lookup(format!("{name}.{}", args[0]).as_bytes()).unwrap();
            let ours = command.keys(args.as_slice()).unwrap();
            assert_eq!(
                ours.map(|key| args[key]).collect::<Vec<_>>(),
                theirs,
                "{name}: {call}"
            );
        }
    }
}
