//! What is learned from an entry, which entries are refused, and that the table stays above them.

use super::*;
use crate::{CommandError, lookup, resolve};

fn text(word: &str) -> Part {
    Part::Text(word.as_bytes().to_vec())
}

fn texts(words: &str) -> Part {
    Part::List(words.split_ascii_whitespace().map(text).collect())
}

fn list(parts: impl IntoIterator<Item = Part>) -> Part {
    Part::List(parts.into_iter().collect())
}

/// `index=1` or `keynumidx=0,firstkey=1`: a map as the flat list that RESP2 makes of it.
fn map(fields: &str) -> Part {
    list(fields.split(',').flat_map(|field| {
        let (key, value) = field.split_once('=').unwrap();
        let value = value.parse().map_or_else(|_| text(value), Part::Int);
        [text(key), value]
    }))
}

/// `RW; index: index=1; range: lastkey=0,keystep=1,limit=0`
fn spec(line: &str) -> Part {
    let parts: Vec<&str> = line.split("; ").collect();
    let found = |part: &str| {
        let (kind, fields) = part.split_once(": ").unwrap_or((part, "none=0"));
        list([text("type"), text(kind), text("spec"), map(fields)])
    };
    list([
        text("flags"),
        texts(parts[0]),
        text("begin_search"),
        found(parts[1]),
        text("find_keys"),
        found(parts[2]),
    ])
}

fn entry(name: &str, arity: i64, flags: &str, range: [i64; 3], specs: &[&str]) -> Part {
    list([
        text(name),
        Part::Int(arity),
        texts(flags),
        Part::Int(range[0]),
        Part::Int(range[1]),
        Part::Int(range[2]),
        texts("@slow"),
        list([]),
        list(specs.iter().map(|line| spec(line))),
        list([]),
    ])
}

const FIRST: &str = "RW; index: index=1; range: lastkey=0,keystep=1,limit=0";

fn keys(line: &str) -> Vec<usize> {
    let args: Vec<&str> = line.split(' ').collect();
    let command = resolve(args.as_slice()).unwrap_or_else(|error| panic!("{line}: {error}"));
    command.keys(args.as_slice()).unwrap().collect()
}

#[test]
fn a_modules_command_is_routed_by_the_rules_of_its_entry() {
    let cases = [
        (
            "json.get",
            "readonly module",
            FIRST,
            "JSON.GET k $",
            Class::SingleKey,
            &[1][..],
        ),
        (
            "json.mget",
            "readonly module",
            "RO access; index: index=1; range: lastkey=-2,keystep=1,limit=0",
            "json.mget a b $",
            Class::SameSlot,
            &[1, 2],
        ),
        (
            "json.mset",
            "write module",
            "RW; index: index=1; range: lastkey=-1,keystep=3,limit=0",
            "json.mset a $ 1 b $ 2",
            Class::SameSlot,
            &[1, 4],
        ),
        (
            "mod.counted",
            "write module movablekeys",
            "RW; index: index=2; keynum: keynumidx=0,firstkey=1,keystep=1",
            "mod.counted x 2 a b c",
            Class::SameSlot,
            &[3, 4],
        ),
        (
            "mod.streams",
            "readonly movablekeys",
            "RO; keyword: keyword=STREAMS,startfrom=1; range: lastkey=-1,keystep=1,limit=2",
            "mod.streams count 1 streams a b 0 0",
            Class::SameSlot,
            &[4, 5],
        ),
        (
            "mod.wait",
            "write module blocking",
            FIRST,
            "mod.wait k",
            Class::Blocking,
            &[1],
        ),
    ];
    for (name, flags, rule, call, class, expected) in cases {
        let command = learn(name.as_bytes(), &entry(name, -1, flags, [1, 1, 1], &[rule])).unwrap();
        assert_eq!((command.name, command.class), (name, class));
        assert_eq!(keys(call), expected, "{call}");
        assert!(command.is_learned() && !command.has_subcommands());
        assert_eq!(command.is_write(), flags.contains("write"), "{name}");
    }
}

#[test]
fn a_call_without_its_only_key_has_too_few_arguments() {
    learn(
        b"arity.one",
        &entry("ARITY.ONE", -1, "module", [1, 1, 1], &[FIRST]),
    )
    .unwrap();
    let error = resolve(["arity.one"].as_slice()).unwrap_err();
    assert_eq!(error, CommandError::WrongArity("arity.one"));
    assert_eq!(keys("Arity.One k"), [1]);
    let command = learn(
        b"arity.more",
        &entry("arity.more", 4, "", [1, 1, 1], &[FIRST]),
    )
    .unwrap();
    assert_eq!(command.arity, 4);
}

#[test]
fn engines_without_rules_are_understood_by_their_three_numbers() {
    let old = |name: &str, flags: &str, range: [i64; 3]| {
        let Part::List(mut fields) = entry(name, -2, flags, range, &[]) else {
            unreachable!()
        };
        fields.truncate(7);
        learn(name.as_bytes(), &Part::List(fields)).unwrap()
    };
    assert_eq!(old("old.none", "module", [0, 0, 0]).class, Class::Keyless);
    assert_eq!(old("old.one", "module", [2, 2, 1]).only_key(), Some(2));
    old("old.pairs", "module", [1, -1, 2]);
    assert_eq!(keys("old.pairs a 1 b 2"), [1, 3]);
    old("old.two", "module", [2, 3, 1]);
    assert_eq!(keys("old.two x a b y"), [2, 3]);
    let movable = old("old.movable", "module movablekeys", [1, 1, 1]);
    assert!(matches!(movable.class, Class::Refused(_)));
}

#[test]
fn keys_that_only_the_engines_code_finds_are_refused() {
    let cases: &[(&str, &str, &[&str])] = &[
        (
            "un.begin",
            "write",
            &["RW; unknown; range: lastkey=0,keystep=1,limit=0"],
        ),
        ("un.find", "write", &["RW; index: index=1; unknown"]),
        ("un.part", "write", &[FIRST, "RW; unknown; unknown"]),
        (
            "un.incomplete",
            "write movablekeys",
            &["RW incomplete; index: index=1; range: lastkey=0,keystep=1,limit=0"],
        ),
        // The module answers "which keys?" by a function of its own.
        ("un.function", "write module movablekeys", &[FIRST]),
        ("un.none", "write module movablekeys", &[]),
        ("un.many", "write", &[FIRST; SPECS_MAX + 1]),
        (
            "un.zero",
            "write",
            &["RW; index: index=0; range: lastkey=0,keystep=1,limit=0"],
        ),
        (
            "un.step",
            "write",
            &["RW; index: index=1; range: lastkey=-1,keystep=0,limit=0"],
        ),
        (
            "un.limit",
            "write",
            &["RW; index: index=1; range: lastkey=-1,keystep=1,limit=-1"],
        ),
        (
            "un.far",
            "write",
            &["RW; index: index=9999999999; range: lastkey=0,keystep=1,limit=0"],
        ),
        (
            "un.word",
            "write",
            &[
                "RW; keyword: keyword=K,startfrom=-9223372036854775808; range: lastkey=0,keystep=1,limit=0",
            ],
        ),
    ];
    for (name, flags, rules) in cases {
        let command = learn(name.as_bytes(), &entry(name, -1, flags, [1, 1, 1], rules)).unwrap();
        assert!(
            matches!(command.class, Class::Refused(_)),
            "{name}: {:?}",
            command.class
        );
        assert!(
            command.is_learned() && command.only_key().is_none(),
            "{name}"
        );
    }
}

#[test]
fn flags_that_guard_are_kept_and_new_ones_are_passed_over() {
    let Part::List(mut fields) = entry("flag.it", -1, "admin future_flag noscript", [0, 0, 0], &[])
    else {
        unreachable!()
    };
    fields[6] = texts("@slow @dangerous");
    let flags = learn(b"flag.it", &Part::List(fields)).unwrap().flags;
    for flag in [Flag::Admin, Flag::Dangerous, Flag::NoScript] {
        assert!(flags.has(flag), "{flag:?}");
    }
    assert!(!flags.has(Flag::Write));
}

#[test]
fn subcommands_are_learned_with_their_command() {
    let Part::List(mut fields) = entry("Sub.It", -2, "module", [0, 0, 0], &[]) else {
        unreachable!()
    };
    fields[9] = list([
        entry(
            "Sub.It|Get",
            -3,
            "readonly module",
            [2, 2, 1],
            &["RO; index: index=2; range: lastkey=0,keystep=1,limit=0"],
        ),
        entry("sub.it|help", 2, "module", [0, 0, 0], &[]),
    ]);
    let command = learn(b"sub.it", &Part::List(fields)).unwrap();
    assert!(command.has_subcommands());
    let get = command.subcommand(b"GET").unwrap();
    assert_eq!((get.name, get.only_key()), ("sub.it|get", Some(2)));
    assert_eq!(keys("sub.it get k"), [2]);
    let error = resolve(["sub.it", "foo"].as_slice()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "ERR unknown subcommand 'foo'. Try SUB.IT HELP."
    );
}

#[test]
fn the_table_stays_above_what_nodes_say() {
    let lie = entry("get", -1, "write", [0, 0, 0], &[]);
    let command = learn(b"GET", &lie).unwrap();
    assert!(!command.is_learned() && command.only_key() == Some(1));
    // And the first word counts, whatever another node says later.
    let first = learn(
        b"twice.told",
        &entry("twice.told", -1, "", [1, 1, 1], &[FIRST]),
    )
    .unwrap();
    let second = learn(b"TWICE.told", &entry("twice.told", -1, "", [0, 0, 0], &[])).unwrap();
    assert!(std::ptr::eq(first, second));
    assert!(std::ptr::eq(lookup(b"Twice.Told").unwrap(), first));
    assert!(learned().any(|command| std::ptr::eq(command, first)));
}

#[test]
fn what_is_no_entry_is_refused() {
    assert_eq!(
        learn(b"no.such", &Part::Nil).unwrap_err(),
        LearnError::Unknown
    );
    let good = |name: &str| entry(name, -1, "", [0, 0, 0], &[]);
    let long = "x".repeat(NAME_BYTES_MAX + 1);
    let cases: &[(&str, Part)] = &[
        ("bad.int", Part::Int(1)),
        ("bad.empty", list([])),
        ("bad.words", texts("a b c d e f g")),
        ("bad.arity", entry("bad.arity", 1 << 40, "", [0, 0, 0], &[])),
        ("bad|name", good("bad|name")),
        ("bad name", good("bad name")),
        ("bad\r\nname", good("bad")),
        (&long, good(&long)),
        ("", good("")),
    ];
    for (name, part) in cases {
        assert_eq!(
            learn(name.as_bytes(), part).unwrap_err(),
            LearnError::Malformed,
            "{name}"
        );
        assert!(lookup(name.as_bytes()).is_none(), "{name}");
    }
}
