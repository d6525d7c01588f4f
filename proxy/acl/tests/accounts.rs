//! What accounts are made of, without a Redis beside them.
#![allow(clippy::unwrap_used)]

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use slotmesh_acl::{ADMIN, Denied, READ_ONLY, READ_WRITE, User, Users, sha256};
use slotmesh_command::{Command, Flag, Needs, resolve};

fn user(rules: &[&str]) -> User {
    let mut user = User::new("u");
    user.set(rules).unwrap();
    user
}

fn check(user: &User, call: &str) -> Result<(), Denied> {
    let args: Vec<&str> = call.split(' ').collect();
    let command = resolve(args.as_slice()).unwrap();
    user.check(command, args.as_slice())
}

#[test]
fn only_who_may_do_everything_is_unrestricted() {
    assert!(User::default_open().is_unrestricted());
    assert!(user(ADMIN).is_unrestricted());
    assert!(user(&["+@all", "~*", "&*", "-get", "+get"]).is_unrestricted());
    let restricted: &[&[&str]] = &[
        &[],
        &["+@all", "~*"],
        &["+@all", "&*"],
        &["~*", "&*", "+@read", "+@write"],
        &["+@all", "~*", "&*", "-get"],
        &["+@all", "~*", "&*", "resetkeys"],
        &["+@all", "~*", "&*", "reset"],
        &["(+@all ~* &*)"],
        READ_ONLY,
        READ_WRITE,
    ];
    for rules in restricted {
        assert!(!user(rules).is_unrestricted(), "{rules:?}");
    }
}

#[test]
fn a_refused_rule_leaves_the_user_as_it_was() {
    let before = user(&["+get", "~a", ">secret"]);
    for rules in [
        &["+set", "+nosuch"][..],
        &["(+get +nosuch)"],
        &["+set", "("],
        &["reset", "<other"],
    ] {
        let mut after = before.clone();
        after.set(rules).unwrap_err();
        assert_eq!(after, before, "{rules:?}");
    }
}

#[test]
fn each_role_may_do_its_own() {
    let both = "GET a;MGET a b;HGETALL a;SCAN 0;PING;SELECT 3;MULTI;EXEC;WATCH a;SUBSCRIBE c;PSUBSCRIBE c*;\
        CLIENT SETNAME n;CLIENT ID;HELLO 3;AUTH a b;COMMAND;INFO;CLUSTER SLOTS;EVAL_RO s 0;RESET;QUIT;DBSIZE;KEYS *";
    let writes = "SET a b;DEL a;PUBLISH c m;EVAL s 0;EVALSHA s 0;FCALL f 0;SORT a STORE b;FLUSHDB;\
        SPUBLISH c m;LPOP a;BLPOP a 0;XADD a * b c;RENAME a b";
    let admin = "CONFIG SET a b;SHUTDOWN;DEBUG SLEEP 0;ACL SETUSER u;CLIENT KILL a;REPLICAOF a 1;MONITOR;\
        BGSAVE;MODULE LIST;SLOWLOG GET;CLUSTER RESET;MIGRATE h 1 k 0 9";
    let allowed = |rules: &[&str], calls: &str, wanted: bool| {
        let user = user(rules);
        for call in calls.split(';').map(str::trim) {
            assert_eq!(check(&user, call).is_ok(), wanted, "{call}");
        }
    };
    allowed(READ_ONLY, both, true);
    allowed(READ_ONLY, writes, false);
    allowed(READ_ONLY, admin, false);
    allowed(READ_WRITE, both, true);
    allowed(READ_WRITE, writes, true);
    allowed(READ_WRITE, admin, false);
    for calls in [both, writes, admin] {
        allowed(ADMIN, calls, true);
    }
}

#[test]
fn a_pattern_may_be_subscribed_to_only_as_it_is_listed() {
    let user = user(&["+@all", "&a*", "&c"]);
    assert_eq!(check(&user, "SUBSCRIBE ab c"), Ok(()));
    assert_eq!(check(&user, "SUBSCRIBE ab b"), Err(Denied::Channel(2)));
    assert_eq!(check(&user, "PSUBSCRIBE a*"), Ok(()));
    assert_eq!(check(&user, "PSUBSCRIBE a* ab"), Err(Denied::Channel(2)));
    assert_eq!(check(&user, "PUBLISH b ab"), Err(Denied::Channel(1)));
    assert_eq!(check(&user, "SPUBLISH ab b"), Ok(()));
    // Whoever may not listen any more may stop to.
    assert_eq!(check(&user, "UNSUBSCRIBE b"), Ok(()));
    assert_eq!(check(&user, "PUNSUBSCRIBE b*"), Ok(()));
}

#[test]
fn of_several_selectors_the_furthest_denial_is_told() {
    let user = user(&["+mget", "~key", "(+mget ~key ~otherkey)"]);
    assert_eq!(check(&user, "GET key"), Err(Denied::Command));
    assert_eq!(
        check(&user, "MGET otherkey someotherkey"),
        Err(Denied::Key(2))
    );
    assert_eq!(
        check(&user, "MGET key otherkey someotherkey"),
        Err(Denied::Key(3))
    );
    assert_eq!(check(&user, "MGET key otherkey"), Ok(()));
}

#[test]
fn rights_to_subscriptions_are_lost_only_with_their_patterns() {
    let old = user(&["&a", "&b*", "(&c)"]);
    assert!(!user(&["&a", "&b*", "&c", "&d"]).loses_channels_of(&old));
    assert!(!user(&["&*"]).loses_channels_of(&old));
    assert!(user(&["&a", "&b*"]).loses_channels_of(&old));
    let all = user(&["&*"]);
    assert!(old.loses_channels_of(&all));
    assert!(old.may_subscribe(b"bx") && !old.may_psubscribe(b"bx"));
    assert!(old.may_psubscribe(b"b*") && old.may_subscribe(b"c"));
}

#[test]
fn sort_looks_at_unnamed_keys_only_for_who_may_read_all() {
    let sort = |rules: &[&str], call: &str| {
        let args: Vec<&str> = call.split(' ').collect();
        let command = resolve(args.as_slice()).unwrap();
        user(rules).check_sort(command, args.as_slice()).is_ok()
    };
    let some = &["+sort", "+sort_ro", "%R~k", "%W~*"];
    assert!(!sort(some, "SORT k BY w_*"));
    assert!(!sort(some, "SORT_RO k LIMIT 0 1 GET #"));
    assert!(sort(some, "SORT k BY nosort STORE by*"));
    assert!(
        sort(some, "SORT k LIMIT BY *"),
        "these are numbers, though wrong ones"
    );
    assert!(sort(some, "GET k"));
    assert!(sort(&["+sort", "%R~*"], "SORT k BY w_* GET #"));
    // The selector that reads all must be the one that allows the command.
    assert!(!sort(&["+sort", "~k", "(+get ~*)"], "SORT k BY w_*"));
}

#[test]
fn scripts_whose_calls_nobody_checks_are_for_who_may_make_any_call() {
    // What scripts can call at all, and proxies may send to a node.
    let callable = |command: &Command| {
        let has = |flag| command.flags.has(flag);
        !has(Flag::NoScript)
            && !has(Flag::Admin)
            && (!has(Flag::Dangerous) || USED.contains(&command.name))
    };
    let reads = |command: &Command| callable(command) && command.flags.has(Flag::ReadOnly);
    let any = |rules: &[&str]| user(rules).may_run_any(Needs::BOTH, callable);
    let any_read = |rules: &[&str]| user(rules).may_run_any(Needs::READ, reads);
    assert!(any(ADMIN) && any(READ_WRITE));
    assert!(!any(READ_ONLY) && any_read(READ_ONLY) && any_read(READ_WRITE));
    assert!(!any(&["+@all", "&*", "~a*"]) && !any(&["+@all", "~*", "&a"]));
    assert!(!any(&["+@all", "&*", "~*", "-get"]) && !any(&["+@all", "&*", "%R~*"]));
    assert!(any_read(&["+@all", "%R~*"]) && !any_read(&["+@all", "%W~*"]));
    assert!(
        !any(&["+@read", "~*", "&*", "(+@write ~* &*)"]),
        "no selector allows both"
    );
    assert!(any(&["(+@all ~* &*)"]));
}

/// Called dangerous, but of use to ordinary programs.
const USED: &[&str] = &[
    "keys", "sort", "sort_ro", "flushall", "flushdb", "swapdb", "restore", "info", "role",
];

#[test]
fn passwords_are_kept_as_hashes_only() {
    let user = user(&["on", ">secret", ">other"]);
    assert!(user.check_password(b"secret") && user.check_password(b"other"));
    assert!(!user.check_password(b"Secret") && !user.check_password(b""));
    for shown in [
        user.describe(),
        user.to_rules().join(" "),
        format!("{user:?}"),
    ] {
        assert!(!shown.contains("secret"), "{shown}");
    }
    let hash = format!("{:x?}", sha256(b"secret"));
    assert!(
        !format!("{user:?}").contains(&hash[1..20]),
        "a hash is for nobody's log"
    );
}

#[test]
fn there_is_always_a_default_user() {
    let none: [(&str, Vec<String>); 0] = [];
    let users = Users::new(none.clone(), None).unwrap();
    assert!(users.default_user().is_nopass() && users.default_user().is_unrestricted());
    let users = Users::new(none, Some(sha256(b"secret"))).unwrap();
    assert!(!users.default_user().is_nopass() && users.default_user().is_unrestricted());
    assert!(users.authenticate(b"default", b"secret").is_some());
    assert!(users.authenticate(b"default", b"").is_none());
    let accounts = [
        ("default", vec!["off"]),
        ("b", vec!["on", "nopass"]),
        ("B", vec![]),
    ];
    let users = Users::new(accounts, Some(sha256(b"secret"))).unwrap();
    assert!(
        users.authenticate(b"default", b"secret").is_none(),
        "it is off"
    );
    assert!(users.authenticate(b"b", b"any").is_some());
    assert!(users.authenticate(b"nobody", b"any").is_none());
    let names: Vec<&str> = users.iter().map(|user| user.name()).collect();
    assert_eq!(names, ["B", "b", "default"]);
    let error = Users::new([("u", ["+get", "foo"])], None).unwrap_err();
    assert_eq!(error.name, "u");
}

#[test]
fn rules_of_a_module_that_is_not_known_yet_are_kept() {
    let stored = [
        "on",
        "-@all",
        "+mod.get",
        "-mod.conf|set",
        "+mod.conf",
        "+Mod.Set",
    ];
    assert!(
        user(&[]).apply(b"+mod.get").is_err(),
        "a client is told of a typing error"
    );
    let users = Users::new([("u", stored)], None).unwrap();
    let rules = users.get(b"u").unwrap().to_rules();
    assert_eq!(rules[2..], ["-@all", "+mod.conf", "+mod.get", "+mod.set"]);
    let again = Users::new([("u", rules)], None).unwrap();
    assert_eq!(again, users);
    let mut changed = (**again.get(b"u").unwrap()).clone();
    changed.set(&["+@all", "~*", "&*"]).unwrap();
    assert!(changed.is_unrestricted());
    changed.apply_stored(b"-mod.get").unwrap();
    assert!(!changed.is_unrestricted());
}

proptest! {
    #[test]
    fn no_bytes_make_a_rule_that_panics(rule in vec(any::<u8>(), 0..40), kind in select(&b"+-~%&(><#!)"[..])) {
        let rule = [&[kind][..], &rule, b")"].concat();
        for rule in [&rule[..], &rule[..rule.len() - 1], &rule[1..]] {
            let mut user = User::new("u");
            if user.apply(rule).is_ok() {
                let again = Users::new([("u", user.to_rules())], None).unwrap();
                prop_assert_eq!(again.get(b"u").unwrap().describe(), user.describe());
            }
        }
    }
}

#[test]
fn names_have_no_spaces() {
    assert!(User::is_name(b"alice") && User::is_name("älice".as_bytes()));
    for name in [&b"a b"[..], b"a\0", b"a\n", b"\xff"] {
        assert!(!User::is_name(name), "{name:?}");
    }
}
