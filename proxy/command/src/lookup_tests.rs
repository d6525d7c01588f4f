//! The table loads, finds every name in any case, and refuses in Redis's words.

use proptest::prelude::*;

use super::*;
use crate::{Access, Gather, Merge};

fn words(line: &str) -> Vec<&str> {
    line.split(' ').filter(|word| !word.is_empty()).collect()
}

fn keys(line: &str) -> Result<Vec<usize>, KeyError> {
    let args = words(line);
    let command = resolve(args.as_slice()).unwrap_or_else(|error| panic!("{line}: {error}"));
    Ok(command.keys(args.as_slice())?.collect())
}

fn class(line: &str) -> Class {
    let args = words(line);
    resolve(args.as_slice())
        .unwrap_or_else(|error| panic!("{line}: {error}"))
        .class
}

#[test]
fn every_name_is_found_in_any_case() {
    assert!(all().count() > 400);
    for command in all().filter(|command| !command.name.contains('|')) {
        for name in [command.name.to_string(), command.name.to_uppercase()] {
            let found = lookup(name.as_bytes()).unwrap_or_else(|| panic!("{name} is lost"));
            assert_eq!(found.name, command.name);
        }
    }
    for (parent, sub) in all().filter_map(|command| command.name.split_once('|')) {
        let parent = lookup(parent.as_bytes()).unwrap();
        let found = parent.subcommand(sub.to_uppercase().as_bytes()).unwrap();
        assert_eq!(found.name, format!("{}|{sub}", parent.name));
    }
}

#[test]
fn what_is_no_command_is_not_found() {
    let long = "x".repeat(1000);
    for name in [
        "",
        "g",
        "ge",
        "gett",
        "config|get",
        "g\x05t",
        "\x00\x00\x00",
        &long,
    ] {
        assert!(lookup(name.as_bytes()).is_none(), "{name:?}");
    }
}

#[test]
fn lookups_compare_few_names() {
    let table = &*TABLE;
    for command in all().filter(|command| !command.name.contains('|')) {
        let first = hash(command.name.as_bytes()).unwrap();
        let steps = (0..INDEX_LEN).find(|step| {
            let at = table.index[(first + step) % INDEX_LEN];
            table.commands[usize::from(at)].name == command.name
        });
        assert!(
            steps.unwrap() <= 3,
            "{} is {steps:?} steps from its slot",
            command.name
        );
    }
}

#[test]
fn classes_are_those_of_the_design() {
    let cases = [
        ("GET k", Class::SingleKey),
        ("hset h f v", Class::SingleKey),
        ("OBJECT ENCODING k", Class::SingleKey),
        ("MEMORY USAGE k", Class::SingleKey),
        ("XGROUP CREATE k g $", Class::SingleKey),
        ("SORT_RO k", Class::SameSlot),
        ("MGET a b", Class::SplitMerge(Merge::Mget)),
        ("MSET a b", Class::SplitMerge(Merge::Mset)),
        ("DEL a", Class::SplitMerge(Merge::Sum)),
        ("SINTERSTORE d a b", Class::Computed),
        ("SORT k STORE d", Class::SameSlot),
        ("EVAL x 0", Class::SameSlot),
        ("DBSIZE", Class::AllShards(Gather::Sum)),
        ("SCRIPT LOAD x", Class::AllShards(Gather::AllOk)),
        ("SCAN 0", Class::Walk),
        ("IINFO 1 Server", Class::ByIndex),
        ("SPUBLISH c m", Class::PubSub),
        ("MULTI", Class::Transaction),
        ("XREAD STREAMS a 0", Class::Blocking),
        ("CLIENT SETINFO lib-name x", Class::Proxy),
        ("COMMAND", Class::Proxy),
        ("ACL WHOAMI", Class::Proxy),
        ("CONFIG GET x", Class::Proxy),
        ("CONFIG SET x y", Class::Proxy),
        ("ACL LIST", Class::Proxy),
        ("COMMAND GETKEYS GET k", Class::Proxy),
        ("DEBUG SLEEP 1", Class::Keyless),
    ];
    for (line, expected) in cases {
        assert_eq!(class(line), expected, "{line}");
    }
    for line in ["SHUTDOWN", "REPLICAOF NO ONE", "SAVE", "PSYNC ? -1"] {
        assert!(matches!(class(line), Class::Refused(_)), "{line}");
    }
}

#[test]
fn keys_are_found_where_they_are() {
    let cases: &[(&str, &[usize])] = &[
        ("GET k", &[1]),
        ("MSET a 1 b 2", &[1, 3]),
        ("DEL a b c", &[1, 2, 3]),
        ("EVAL s 2 a b x", &[3, 4]),
        ("EVAL s 0 x", &[]),
        ("ZUNIONSTORE d 2 a b WEIGHTS 1 2", &[1, 3, 4]),
        ("BLPOP a b 0", &[1, 2]),
        ("BZMPOP 0 2 a b MIN", &[3, 4]),
        ("XREAD COUNT 2 STREAMS a b 0 0", &[4, 5]),
        ("XREAD COUNT 2 STREAMS a b 0", &[4]),
        ("XREADGROUP GROUP streams streams STREAMS a >", &[5]),
        ("SORT k BY store GET store STORE d1 STORE d2", &[1, 9]),
        ("SORT k LIMIT store 0 GET #", &[1]),
        ("GEORADIUS k 1 2 3 km STORE d", &[1, 7]),
        ("BITOP AND d a b", &[2, 3, 4]),
        ("PFMERGE d", &[1]),
        ("STRALGO LCS KEYS a b", &[3, 4]),
        ("PING", &[]),
        ("VADD v FP32 x e", &[1]),
        ("SSUBSCRIBE a b", &[1, 2]),
    ];
    for (line, expected) in cases {
        assert_eq!(keys(line).as_deref(), Ok(*expected), "{line}");
    }
    let spublish = lookup(b"spublish").unwrap();
    assert_eq!(spublish.key_specs()[0].access, Access::Channel);
}

#[test]
fn announced_keys_that_are_not_there_are_an_error() {
    assert_eq!(keys("EVAL s 3 a b"), Err(KeyError::TooMany));
    assert_eq!(
        keys("EVAL s 18446744073709551615 a b"),
        Err(KeyError::TooMany)
    );
    for count in ["x", "-1", "99999999999999999999999"] {
        assert_eq!(
            keys(&format!("EVAL s {count} a b")),
            Err(KeyError::NotANumber),
            "{count}"
        );
    }
}

#[test]
fn refusals_have_the_words_of_redis() {
    let long = "x".repeat(200);
    let unknown = format!("foo {long} b");
    let shown = format!(
        "ERR unknown command 'foo', with args beginning with: '{}' ",
        "x".repeat(128)
    );
    let cases = [
        (
            "foo a b",
            "ERR unknown command 'foo', with args beginning with: 'a' 'b' ",
        ),
        (
            "foo",
            "ERR unknown command 'foo', with args beginning with: ",
        ),
        (&unknown, &shown),
        ("get", "ERR wrong number of arguments for 'get' command"),
        ("GET a b", "ERR wrong number of arguments for 'get' command"),
        (
            "CONFIG",
            "ERR wrong number of arguments for 'config' command",
        ),
        (
            "CONFIG GET",
            "ERR wrong number of arguments for 'config|get' command",
        ),
        (
            "config foo bar",
            "ERR unknown subcommand 'foo'. Try CONFIG HELP.",
        ),
        (
            "MSET a 1 b",
            "ERR wrong number of arguments for 'mset' command",
        ),
        (
            "MSETNX a 1 b",
            "ERR wrong number of arguments for 'msetnx' command",
        ),
    ];
    for (line, text) in cases {
        let error = resolve(words(line).as_slice()).unwrap_err();
        assert_eq!(String::from_utf8_lossy(&error.text()), *text);
        assert_eq!(error.to_string(), *text);
    }
    let error = resolve(["f\r\noo", "a\0b"].as_slice()).unwrap_err();
    assert_eq!(
        error.text(),
        b"ERR unknown command 'f  oo', with args beginning with: 'a' "
    );
}

#[test]
fn only_a_call_that_may_wait_is_said_to_wait() {
    let cases = [
        ("BLPOP a 0", true),
        ("WAIT 1 0", true),
        ("XREAD COUNT 1 STREAMS a 0", false),
        ("XREAD COUNT 1 BLOCK 0 STREAMS a 0", true),
        ("XREAD STREAMS block 0", false),
        ("XREADGROUP GROUP block c STREAMS a >", false),
        ("XREADGROUP GROUP g c BLOCK 5 STREAMS a >", true),
        ("GET k", false),
    ];
    for (line, waits) in cases {
        let args = words(line);
        let command = resolve(args.as_slice()).unwrap();
        assert_eq!(command.may_wait(args.as_slice()), waits, "{line}");
    }
}

#[test]
fn browsers_are_recognised() {
    assert!(is_http(b"POST") && is_http(b"Host:"));
    assert!(!is_http(b"GET"));
}

fn any_call() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let names: Vec<&str> = all().map(|command| command.name).collect();
    let arg = prop_oneof![
        Just(b"STORE".to_vec()),
        Just(b"STREAMS".to_vec()),
        Just(b"KEYS".to_vec()),
        (-2i64..20).prop_map(|number| number.to_string().into_bytes()),
        Just(b"9223372036854775807".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..5),
    ];
    (
        proptest::sample::select(names),
        proptest::collection::vec(arg, 0..12),
    )
        .prop_map(|(name, args)| {
            let mut call: Vec<Vec<u8>> = name.split('|').map(|word| word.into()).collect();
            call.extend(args);
            call
        })
}

proptest! {
    #[test]
    fn keys_are_arguments_whatever_is_called(call in any_call()) {
        match resolve(call.as_slice()) {
            Ok(command) => {
                if let Some(key) = command.only_key() {
                    prop_assert!(key < call.len());
                }
                for key in command.keys(call.as_slice()).into_iter().flatten() {
                    prop_assert!((1..call.len()).contains(&key));
                }
                command.may_wait(call.as_slice());
            }
            Err(error) => prop_assert!(error.text().starts_with(b"ERR ")),
        }
    }

    #[test]
    fn no_name_panics(name in proptest::collection::vec(any::<u8>(), 0..50)) {
        prop_assert!(lookup(&name).is_none_or(|command| command.name.len() == name.len()));
    }
}
