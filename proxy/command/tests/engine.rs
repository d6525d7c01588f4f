//! The table against a real engine: every command that it has, and its own idea of their keys.
#![allow(clippy::unwrap_used)]

mod support;

use slotmesh_command::{Flag, all, lookup, resolve};
use slotmesh_engine::{Engine, Reply};
use support::calls;

fn check_entry(entry: &Reply) {
    let entry = entry.items();
    // Modules may show their names in upper case.
    let name = &*entry[0].text().to_lowercase();
    let ours = all().find(|command| command.name == name);
    let ours = ours.unwrap_or_else(|| panic!("the table lacks {name}"));
    let flags: Vec<&str> = entry[2].items().iter().map(Reply::text).collect();
    let arity = entry[1].int();
    for argc in 1..12_i64 {
        let theirs = if arity < 0 {
            argc >= -arity
        } else {
            argc == arity
        };
        // Half a pair is refused by the table, by the engine's code later. A module's command says
        // that it takes any number, and refuses what lacks a key.
        let odd_pairs = matches!(name, "mset" | "msetnx") && argc % 2 == 0;
        if theirs && !odd_pairs && !flags.contains(&"module") {
            assert!(
                ours.check_arity(argc as usize),
                "{name} with {argc} arguments"
            );
        }
    }
    assert_eq!(
        ours.flags.has(Flag::Write),
        flags.contains(&"write"),
        "{name}"
    );
    assert_eq!(
        ours.flags.has(Flag::ReadOnly),
        flags.contains(&"readonly"),
        "{name}"
    );
    assert_eq!(
        ours.flags.has(Flag::PubSub),
        flags.contains(&"pubsub"),
        "{name}"
    );
    let first_key = usize::try_from(entry[3].int()).unwrap();
    if let Some(key) = ours.only_key() {
        assert_eq!(key, first_key, "{name}");
    } else if first_key == 0 && !flags.contains(&"movablekeys") {
        assert!(
            ours.key_specs().is_empty(),
            "{name} has keys that the engine does not know"
        );
    }
    entry[9].items().iter().for_each(check_entry);
}

#[test]
fn every_command_of_the_engine_is_in_the_table_and_takes_as_many_arguments() {
    let commands = Engine::start().call(&["COMMAND"]);
    assert!(commands.items().len() > 200);
    commands.items().iter().for_each(check_entry);
}

#[test]
fn keys_are_where_the_engine_finds_them() {
    let mut engine = Engine::start();
    let calls = calls();
    assert!(calls.len() > 100);
    for call in calls {
        let (args, call) = (&call, call.join(" "));
        let getkeys = [&["COMMAND", "GETKEYS"], args.as_slice()].concat();
        let theirs = engine.call(&getkeys);
        let mut theirs: Vec<&str> = match &theirs {
            Reply::Items(items) => items.iter().map(Reply::text).collect(),
            other => panic!("{call}: {other:?}"),
        };
        let command = resolve(args.as_slice()).unwrap_or_else(|error| panic!("{call}: {error}"));
        let keys = command.keys(args.as_slice()).unwrap();
        let mut ours: Vec<&str> = keys.map(|key| args[key]).collect();
        // The engine lists a destination now first, now last.
        theirs.sort_unstable();
        ours.sort_unstable();
        assert_eq!(ours, theirs, "{call}");
    }
}

#[test]
fn refusals_are_worded_like_the_engines() {
    let mut engine = Engine::start();
    for call in [
        "FOO a b",
        "foo",
        "GET",
        "CONFIG",
        "CONFIG GET",
        "CONFIG FOO",
        "MSET a 1 b",
        "XGROUP",
    ] {
        let args: Vec<&str> = call.split(' ').collect();
        let Reply::Error(theirs) = engine.call(&args) else {
            panic!("{call} is accepted")
        };
        let ours = resolve(args.as_slice()).unwrap_err().to_string();
        assert_eq!(ours.trim_end(), theirs.trim_end(), "{call}");
    }
    assert!(lookup(b"foo").is_none());
}
