//! Users against a real Redis 7.0: after any rules, both say the same of a user and allow it the same.

use std::cell::RefCell;

use slotmesh_engine::{Engine, Reply};

use crate::settled::{settled, settled_line};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use slotmesh_acl::{SelectorDescription, User, categories, commands_in};
use slotmesh_command::{Command, all, lookup};

/// A few seconds for all tests. They were run with 20,000, too.
const CASES: u32 = 300;

fn check_all<S>(strategy: &S, check: impl Fn(&mut Engine, S::Value) -> Result<(), TestCaseError>)
where
    S: Strategy,
{
    let engine = RefCell::new(Engine::start());
    let mut runner = TestRunner::new(Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(strategy, |value| check(&mut engine.borrow_mut(), value))
        .unwrap_or_else(|error| panic!("{error}"));
}

fn command_names() -> Vec<&'static str> {
    let known = all().filter(|command| command.in_redis_7_0());
    known.map(|command| command.name).collect()
}

fn pattern() -> impl Strategy<Value = String> {
    select(vec![
        "*", "a", "a*", "b?", "[ab]*", "", "r*", "w*", "x\"y", "\\*", "%", "~a",
    ])
    .prop_map(str::to_owned)
}

/// Rules that a selector takes, and some that it refuses.
fn selector_rule() -> impl Strategy<Value = String> {
    let words = vec![
        "allkeys",
        "resetkeys",
        "allchannels",
        "resetchannels",
        "allcommands",
        "nocommands",
        "+@all",
        "-@all",
        "+@ALL",
        "ALLKEYS",
        "~*",
        "&*",
    ];
    let parts = vec![
        "+select|0",
        "+select|1",
        "+SELECT|0",
        "+debug|Object",
        "+debug|",
        "-select|0",
        "+config|get|x",
        "+config|",
        "-config|nosuch",
        "+config|nosuch",
        "+get|a|b",
        "+",
        "-",
        "+@",
        "+@nosuch",
        "+nosuch",
        "-nosuch",
        "+|",
        "+debug|digest",
        "+@read",
        "-@write",
        "%~a",
        "%RR~a",
        "%X~a",
        "%",
        "%R",
        "%w~",
        "%rw~*",
        "foo",
        "&a b",
        "~a b",
    ];
    let sign = || select(vec!["+", "-"]);
    prop_oneof![
        3 => select(words).prop_map(str::to_owned),
        3 => select(parts).prop_map(str::to_owned),
        8 => (sign(), select(categories().collect::<Vec<_>>())).prop_map(|(sign, name)| format!("{sign}@{name}")),
        8 => (sign(), select(command_names())).prop_map(|(sign, name)| format!("{sign}{name}")),
        6 => (select(vec!["~", "%R~", "%W~", "%RW~", "&"]), pattern()).prop_map(|(kind, pattern)| kind.to_owned() + &pattern),
    ]
}

fn user_rule() -> impl Strategy<Value = String> {
    let hash = "34344e4d60c2b6d639b7bd22e18f2b0b91bc34bf0ac5f9952744435093cfb4e6";
    let words = vec![
        "on".to_owned(),
        "off".into(),
        "ON".into(),
        "nopass".into(),
        "resetpass".into(),
        "reset".into(),
        "clearselectors".into(),
        "sanitize-payload".into(),
        "skip-sanitize-payload".into(),
        String::new(),
        ">one".into(),
        ">two".into(),
        "<one".into(),
        "<two".into(),
        ">".into(),
        format!("#{hash}"),
        format!("!{hash}"),
        format!("#{}", hash.to_uppercase()),
        format!("#{}", &hash[1..]),
        "()".into(),
        "(on)".into(),
        "(".into(),
        "( +get )".into(),
        "(+get \"~a\\x62\" ~'c')".into(),
        "(+get \"~a)".into(),
        "(+get ~a)b".into(),
    ];
    let inside = proptest::collection::vec(selector_rule(), 0..5);
    prop_oneof![
        3 => select(words),
        6 => selector_rule(),
        1 => inside.prop_map(|rules| format!("({})", rules.join(" "))),
    ]
}

fn rules() -> impl Strategy<Value = Vec<String>> {
    proptest::collection::vec(user_rule(), 0..14)
}

/// Gives a user the same rules here and there, one by one, and compares what is answered.
fn set_up(engine: &mut Engine, rules: &[String]) -> Result<User, TestCaseError> {
    engine.call(&["ACL", "DELUSER", "u"]);
    let mut user = User::new("u");
    engine.call(&["ACL", "SETUSER", "u"]);
    for rule in rules {
        let theirs = match engine.call(&["ACL", "SETUSER", "u", rule]) {
            Reply::Error(text) => text,
            reply => reply.text().to_owned(),
        };
        let ours = user
            .set(&[rule])
            .map_or_else(|error| error.to_string(), |()| "OK".into());
        prop_assert_eq!(ours, theirs, "rule {:?}", rule);
    }
    Ok(user)
}

#[test]
fn any_rules_make_a_user_that_redis_describes_in_the_same_words() {
    check_all(&rules(), |engine, rules| {
        let user = set_up(engine, &rules)?;
        let lines = engine.call(&["ACL", "LIST"]).texts();
        let theirs = lines
            .iter()
            .find(|line| line.starts_with("user u "))
            .unwrap();
        let ours = format!("user u {}", user.describe());
        prop_assert_eq!(settled_line(&ours), settled_line(theirs));

        let theirs = engine.call(&["ACL", "GETUSER", "u"]);
        let ours = user.description();
        prop_assert_eq!(&ours.flags, &theirs.field("flags").texts());
        prop_assert_eq!(&ours.passwords, &theirs.field("passwords").texts());
        same_selector(&ours.root, &theirs)?;
        let selectors = theirs.field("selectors").items();
        prop_assert_eq!(ours.selectors.len(), selectors.len());
        for (ours, theirs) in ours.selectors.iter().zip(selectors) {
            same_selector(ours, theirs)?;
        }
        Ok(())
    });
}

/// Anything that looks like a rule.
fn scribble() -> impl Strategy<Value = String> {
    let starts = select(vec!["+", "-", "~", "%", "&", "(", ">", "<", "#", "!", ""]);
    let letters = select(b"+-@~%RWrw&|()<>#!\"'\\ \tgets*0x\n".to_vec());
    let rest = proptest::collection::vec(letters, 0..10);
    (starts, rest, select(vec!["", ")"]))
        .prop_map(|(start, rest, end)| format!("{start}{}{end}", String::from_utf8(rest).unwrap()))
}

#[test]
fn scribble_is_taken_or_refused_as_by_redis() {
    let many = proptest::collection::vec(scribble(), 1..40);
    check_all(&many, |engine, rules| {
        for rule in rules {
            let user = set_up(engine, std::slice::from_ref(&rule))?;
            let lines = engine.call(&["ACL", "LIST"]).texts();
            let theirs = lines
                .iter()
                .find(|line| line.starts_with("user u "))
                .unwrap();
            prop_assert_eq!(&format!("user u {}", user.describe()), theirs, "{:?}", rule);
        }
        Ok(())
    });
}

fn same_selector(ours: &SelectorDescription, theirs: &Reply) -> Result<(), TestCaseError> {
    prop_assert_eq!(
        settled(&ours.commands),
        settled(theirs.field("commands").text())
    );
    prop_assert_eq!(&ours.keys, theirs.field("keys").text());
    prop_assert_eq!(&ours.channels, theirs.field("channels").text());
    Ok(())
}

#[test]
fn several_rules_at_once_are_all_applied_or_none() {
    let spread = vec![
        "(+get",
        "~a",
        "~b)",
        "+set",
        "(+nosuch)",
        "on",
        "(",
        ")",
        "(~c",
        "nopass",
        "(+get ~a)",
    ];
    check_all(
        &subsequence(spread, 0..8).prop_shuffle(),
        |engine, rules| {
            engine.call(&["ACL", "DELUSER", "u"]);
            engine.call(&["ACL", "SETUSER", "u"]);
            let mut user = User::new("u");
            let mut call = vec!["ACL", "SETUSER", "u"];
            call.extend(&rules);
            let theirs = match engine.call(&call) {
                Reply::Error(text) => text,
                reply => reply.text().to_owned(),
            };
            let ours = user
                .set(&rules)
                .map_or_else(|error| error.to_string(), |()| "OK".into());
            prop_assert_eq!(ours, theirs);
            let lines = engine.call(&["ACL", "LIST"]).texts();
            let theirs = lines
                .iter()
                .find(|line| line.starts_with("user u "))
                .unwrap();
            prop_assert_eq!(
                settled_line(&format!("user u {}", user.describe())),
                settled_line(theirs)
            );
            Ok(())
        },
    );
}

/// A command of Redis 7.0 with arguments out of which keys may be found, enough of them.
fn call() -> impl Strategy<Value = Vec<String>> {
    let words = vec![
        "a",
        "ab",
        "b1",
        "r1",
        "w1",
        "x",
        "*",
        "a*",
        "",
        "1",
        "2",
        "0",
        "-1",
        "9",
        "KEYS",
        "STORE",
        "GET",
        "SET",
        "INCRBY",
        "OVERFLOW",
        "BY",
        "LIMIT",
        "STREAMS",
        "STOREDIST",
        "AUTH",
        "get",
        "object",
    ];
    let args = proptest::collection::vec(select(words), 10);
    (select(command_names()), args, 0..8_usize).prop_map(|(name, args, more)| {
        let command = found(name);
        let mut call: Vec<String> = name.split('|').map(str::to_owned).collect();
        let least = command.arity.unsigned_abs() as usize;
        let wanted = if command.arity < 0 {
            least + more
        } else {
            least
        };
        let wanted = wanted.max(call.len());
        let args = args.iter().cycle().take(wanted - call.len());
        call.extend(args.map(|arg| (*arg).to_owned()));
        call
    })
}

fn found(name: &str) -> &'static Command {
    match name.split_once('|') {
        None => lookup(name.as_bytes()).unwrap(),
        Some((name, sub)) => lookup(name.as_bytes())
            .unwrap()
            .subcommand(sub.as_bytes())
            .unwrap(),
    }
}

#[test]
fn any_user_may_run_what_redis_lets_it_run_and_is_told_the_same_if_not() {
    // Most calls would fail at the command already, so many users may run all or most of them.
    let start = select(vec!["+@all", "+@all", "+@read", "-@all"]);
    let calls = proptest::collection::vec(call(), 40);
    check_all(
        &(start, rules(), calls),
        |engine, (start, mut rules, calls)| {
            rules.retain(|rule| !rule.eq_ignore_ascii_case("allkeys"));
            rules.push(start.to_owned());
            let user = set_up(engine, &rules)?;
            for call in calls {
                // Of what it refuses itself, Redis checks other keys; see the test of MIGRATE.
                if call[0] != "migrate" {
                    same_check(engine, &user, &call)?;
                }
            }
            Ok(())
        },
    );
}

fn same_check(engine: &mut Engine, user: &User, call: &[String]) -> Result<(), TestCaseError> {
    let mut dry = vec!["ACL", "DRYRUN", "u"];
    dry.extend(call.iter().map(String::as_str));
    let Reply::Text(theirs) = engine.call(&dry) else {
        // A command with subcommands, called without one.
        return Ok(());
    };
    let command = lookup(call[0].as_bytes()).unwrap();
    let sub = call
        .get(1)
        .and_then(|sub| command.subcommand(sub.as_bytes()));
    let command = sub.unwrap_or(command);
    let ours = match user.check(command, call) {
        Ok(()) => b"OK".to_vec(),
        Err(denied) => denied.dry_run_text(command, call),
    };
    let shown = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
    prop_assert_eq!(
        shown(&ours),
        shown(&theirs),
        "{:?} by {}",
        call,
        user.describe()
    );
    Ok(())
}

#[test]
fn migrate_needs_the_keys_that_it_would_send() {
    let mut engine = Engine::start();
    let user = set_up(
        &mut engine,
        &["+@all", "%R~r", "%W~w", "~b"].map(str::to_owned),
    )
    .unwrap();
    let calls = [
        "h p b 0 9",
        "h p r 0 9",
        "h p w 0 9 COPY",
        "h p _ 0 9 KEYS b",
        "h p _ 0 9 KEYS b r",
        "h p _ 0 9 KEYS r KEYS b",
        "h p _ 0 9 AUTH KEYS KEYS b",
        "h p _ 0 9 AUTH2 KEYS KEYS KEYS w",
        "h p _ 0 9 REPLACE KEYS",
        "h p b 0 9 KEYS r",
        "h p r 0 9 AUTH KEYS",
    ];
    for call in calls {
        let args = call.split(' ').map(|arg| if arg == "_" { "" } else { arg });
        let call: Vec<String> = std::iter::once("migrate")
            .chain(args)
            .map(str::to_owned)
            .collect();
        same_check(&mut engine, &user, &call).unwrap();
    }
}

#[test]
fn a_user_is_the_same_after_its_rules_were_stored() {
    let mut runner = TestRunner::new(Config {
        cases: 4 * CASES,
        failure_persistence: None,
        ..Config::default()
    });
    let stored = |rules: Vec<String>| {
        let mut user = User::new("u");
        for rule in &rules {
            let _ = user.apply(rule.as_bytes());
        }
        let mut again = User::new("u");
        for rule in user.to_rules() {
            again.apply_stored(rule.as_bytes()).unwrap();
        }
        prop_assert_eq!(again.describe(), user.describe());
        prop_assert_eq!(again.to_rules(), user.to_rules());
        prop_assert_eq!(again.is_unrestricted(), user.is_unrestricted());
        Ok(())
    };
    runner
        .run(&rules(), stored)
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn categories_hold_the_commands_that_they_hold_in_redis() {
    let mut engine = Engine::start();
    let mut theirs = engine.call(&["ACL", "CAT"]).texts();
    let mut ours: Vec<_> = categories().map(str::to_owned).collect();
    assert_eq!(ours, theirs, "names, in their order");
    ours.sort_unstable();
    theirs.sort_unstable();
    for category in theirs {
        let mut theirs = engine.call(&["ACL", "CAT", &category]).texts();
        let mut ours = commands_in(category.as_bytes()).unwrap();
        ours.retain(|name| found(name).in_redis_7_0());
        ours.sort_unstable();
        theirs.sort_unstable();
        assert_eq!(ours, theirs, "@{category}");
    }
    assert_eq!(commands_in(b"nosuch"), None);
}

#[test]
fn denials_have_the_words_of_redis() {
    let mut engine = Engine::start();
    let rules = [
        "on",
        "nopass",
        "+auth",
        "+set",
        "+publish",
        "+config|get",
        "~a",
    ];
    let mut setuser = vec!["ACL", "SETUSER", "u"];
    setuser.extend(rules);
    engine.call(&setuser);
    let mut user = User::new("u");
    user.set(&rules).unwrap();
    engine.call(&["AUTH", "u", "any"]);
    let calls: &[&[&str]] = &[
        &["GET", "a"],
        &["SET", "b", "1"],
        &["PUBLISH", "c", "m"],
        &["CONFIG", "SET", "maxmemory", "1"],
        &["ACL", "WHOAMI"],
    ];
    for call in calls {
        let command = slotmesh_command::resolve(*call).unwrap();
        let denied = user.check(command, *call).unwrap_err();
        assert_eq!(
            engine.call(call),
            Reply::Error(denied.text(command)),
            "{call:?}"
        );
    }
}
