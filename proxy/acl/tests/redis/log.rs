//! ACL LOG against a real Redis.

use slotmesh_acl::{AclLog, Context, Denial, Entry, Reason};
use slotmesh_engine::{Engine, Reply};

fn denial(reason: Reason, object: &str) -> Denial {
    Denial {
        reason,
        context: Context::Toplevel,
        object: object.into(),
        username: b"u".to_vec(),
        client_info: "id=3".to_owned(),
    }
}

fn shown(entry: &Entry) -> String {
    let denial = &entry.denial;
    format!(
        "{} {} {} {} {}",
        entry.count,
        denial.reason.name(),
        denial.context.name(),
        String::from_utf8_lossy(&denial.object),
        String::from_utf8_lossy(&denial.username),
    )
}

#[test]
fn denials_are_grouped_as_in_redis() {
    let mut engine = Engine::start();
    let setuser = [
        "ACL", "SETUSER", "u", "on", "nopass", "+auth", "+acl", "+set", "+publish", "~a", "+multi",
        "+exec",
    ];
    engine.call(&setuser);
    engine.call(&["AUTH", "u", "any"]);
    let mut log = AclLog::default();
    let calls: &[(&[&str], Reason, &str)] = &[
        (&["GET", "a"], Reason::Command, "get"),
        (&["SET", "b", "1"], Reason::Key, "b"),
        (&["GET", "a"], Reason::Command, "get"),
        (&["PUBLISH", "c", "m"], Reason::Channel, "c"),
        (&["SET", "b", "1"], Reason::Key, "b"),
        (&["CONFIG", "GET", "x"], Reason::Command, "config|get"),
        (&["aUth", "x", "y"], Reason::Auth, "aUth"),
    ];
    // Eleven others between two alike denials are one too many for them to be grouped.
    let others: Vec<String> = (0..11).map(|n| format!("k{n}")).collect();
    let many = others.iter().chain(&others);
    for (call, reason, object) in calls {
        engine.call(call);
        let mut denial = denial(*reason, object);
        if *reason == Reason::Auth {
            denial.username = b"x".to_vec();
        }
        log.record(denial, 0);
    }
    for key in many {
        engine.call(&["SET", key, "1"]);
        log.record(denial(Reason::Key, key), 0);
    }
    engine.call(&["MULTI"]);
    engine.call(&["SET", "k0", "1"]);
    let context = Context::Multi;
    log.record(
        Denial {
            context,
            ..denial(Reason::Key, "k0")
        },
        0,
    );
    engine.call(&["EXEC"]);
    let theirs = engine.call(&["ACL", "LOG", "100"]);
    let theirs = theirs.items().iter().map(|entry| {
        let Reply::Int(count) = entry.field("count") else {
            panic!("count is a number: {entry:?}")
        };
        let text = |name| entry.field(name).text();
        format!(
            "{count} {} {} {} {}",
            text("reason"),
            text("context"),
            text("object"),
            text("username")
        )
    });
    let ours: Vec<String> = log.entries().map(shown).collect();
    assert_eq!(ours, theirs.collect::<Vec<_>>());
}

#[test]
fn denials_that_are_a_minute_apart_are_told_apart() {
    let mut log = AclLog::default();
    log.record(denial(Reason::Command, "get"), 1_000);
    log.record(denial(Reason::Command, "get"), 61_000);
    assert_eq!(
        log.entries().map(|entry| entry.count).collect::<Vec<_>>(),
        [2]
    );
    log.record(denial(Reason::Command, "get"), 121_001);
    assert_eq!(
        log.entries().map(|entry| entry.count).collect::<Vec<_>>(),
        [1, 2]
    );
    let age = log.entries().next().unwrap().age_seconds(122_501);
    assert!((age - 1.5).abs() < 1e-9, "{age}");
}

#[test]
fn the_log_is_bounded_and_can_be_emptied() {
    let mut log = AclLog::default();
    for n in 0..1000 {
        log.record(denial(Reason::Key, &n.to_string()), 0);
    }
    assert_eq!(log.entries().count(), 128);
    assert_eq!(log.entries().next().unwrap().denial.object, b"999");
    log.set_len_max(2);
    log.record(denial(Reason::Key, "last"), 0);
    assert_eq!(log.entries().count(), 2);
    log.reset();
    assert_eq!(log.entries().count(), 0);
    log.set_len_max(0);
    log.record(denial(Reason::Key, "none"), 0);
    assert_eq!(log.entries().count(), 0);
}
