//! Accounts: who may log in at a proxy, and what it may do there.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use sha2::{Digest as _, Sha256};
use slotmesh_proto::topology::v1 as pb;
use support::Proxy;
use support::node::{Node, snapshot};
use support::raw::Raw;

struct Fixture {
    proxy: Proxy,
    _nodes: Vec<Node>,
    _data: tempfile::TempDir,
}

fn password(text: &str) -> String {
    let hash = Sha256::digest(text.as_bytes());
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("#{hex}")
}

fn account(name: &str, rules: &[&str]) -> pb::Account {
    pb::Account {
        name: name.to_owned(),
        rules: rules.iter().map(|rule| (*rule).to_owned()).collect(),
    }
}

async fn fixture(accounts: Vec<pb::Account>) -> Fixture {
    let nodes: Vec<Node> = (0..2).map(|_| Node::start_with_epoch(1)).collect();
    let data = tempfile::tempdir().unwrap();
    let routes = (0..2).map(|i| nodes[i as usize].route(i, 2, 1)).collect();
    let mut saved = snapshot(1, routes);
    saved.settings.as_mut().unwrap().accounts = accounts;
    slotmesh_proxy::saved::save(data.path(), &saved).unwrap();
    let proxy = Proxy::start(data.path(), &["--workers", "2"]).await;
    Fixture {
        proxy,
        _nodes: nodes,
        _data: data,
    }
}

/// Sends lines and expects each one's reply.
async fn talk(raw: &mut Raw, lines: &[(&str, &str)]) {
    for (line, want) in lines {
        raw.send(format!("{line}\r\n").as_bytes()).await;
        raw.expect(&format!("{want}\r\n")).await;
    }
}

const NO_AUTH: &str = "-NOAUTH Authentication required.";
const WRONG_PASS: &str = "-WRONGPASS invalid username-password pair or user is disabled.";
const NO_KEY: &str =
    "-NOPERM this user has no permissions to access one of the keys used as arguments";

#[tokio::test(flavor = "multi_thread")]
async fn a_client_gets_the_rights_of_the_account_that_it_logs_in_with() {
    let (first, second) = (password("one"), password("two"));
    let fixture = fixture(vec![
        account("default", &["off"]),
        account(
            "reader",
            &["on", &first, &second, "~app:*", "+@read", "+@connection"],
        ),
        account("gone", &["off", &first, "+@all", "~*"]),
    ])
    .await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    talk(
        &mut raw,
        &[
            ("GET app:1", NO_AUTH),
            ("AUTH one", WRONG_PASS),
            ("AUTH reader three", WRONG_PASS),
            ("AUTH gone one", WRONG_PASS),
            ("AUTH nobody one", WRONG_PASS),
            ("GET app:1", NO_AUTH),
            ("AUTH reader two", "+OK"),
            (
                "ACL WHOAMI",
                "-NOPERM this user has no permissions to run the 'acl|whoami' command",
            ),
            ("GET app:1", "$-1"),
            ("GET other", NO_KEY),
            ("MGET app:1 app:2 app:3", "*3\r\n$-1\r\n$-1\r\n$-1"),
            ("MGET app:1 other", NO_KEY),
            (
                "SET app:1 x",
                "-NOPERM this user has no permissions to run the 'set' command",
            ),
            (
                "FLUSHALL",
                "-NOPERM this user has no permissions to run the 'flushall' command",
            ),
            ("AUTH reader one", "+OK"),
        ],
    )
    .await;
    // One word for both, and the same client as another user.
    let mut raw = Raw::connect(fixture.proxy.address).await;
    talk(
        &mut raw,
        &[("AUTH reader:one", "+OK"), ("GET app:1", "$-1")],
    )
    .await;
    talk(&mut raw, &[("RESET", "+RESET"), ("GET app:1", NO_AUTH)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_command_spoils_a_transaction_and_is_logged() {
    let rules = [
        "on",
        "nopass",
        "+@all",
        "-flushall",
        "%R~*",
        "%W~own:*",
        "&news.*",
    ];
    let fixture = fixture(vec![account("app", &rules)]).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    let denied = "-NOPERM this user has no permissions to run the 'flushall' command";
    talk(
        &mut raw,
        &[
            ("ACL WHOAMI", "$7\r\ndefault"),
            ("AUTH app x", "+OK"),
            ("ACL WHOAMI", "$3\r\napp"),
            ("SET own:1 x", "+OK"),
            ("SET other x", NO_KEY),
            ("GET other", "$-1"),
            ("COPY own:1 other", NO_KEY),
            ("PUBLISH news.a x", ":0"),
            ("PUBLISH gossip x", "-NOPERM this user has no permissions to access one of the channels used as arguments"),
            ("MULTI", "+OK"),
            ("SET own:1 y", "+QUEUED"),
            ("FLUSHALL", denied),
            ("EXEC", "-EXECABORT Transaction discarded because of previous errors."),
            ("GET own:1", "$1\r\nx"),
            ("ACL DRYRUN app get x", "+OK"),
            ("ACL DRYRUN nobody get x", "-ERR User 'nobody' not found"),
            ("ACL DRYRUN app nothing", "-ERR Command 'nothing' not found"),
        ],
    )
    .await;
    raw.send(b"ACL LOG 1\r\n").await;
    raw.expect("*1\r\n*14\r\n$5\r\ncount\r\n:1\r\n$6\r\nreason\r\n$7\r\ncommand\r\n$7\r\ncontext\r\n$5\r\nmulti\r\n$6\r\nobject\r\n$8\r\nflushall\r\n$8\r\nusername\r\n$3\r\napp\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_cannot_do_what_its_account_may_not() {
    let rules = ["on", "nopass", "+@all", "-set", "~*", "&*"];
    let fixture = fixture(vec![account("app", &rules)]).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    talk(&mut raw, &[("AUTH app x", "+OK")]).await;
    raw.send(b"EVAL \"return redis.call('set','k','v')\" 1 k\r\n")
        .await;
    raw.expect("-NOPERM slotmesh: commands inside a script cannot be checked")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_instance_still_has_other_users() {
    let fixture = fixture(vec![account(
        "app",
        &["on", &password("pw"), "allcommands", "allkeys"],
    )])
    .await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    let unasked = "-ERR AUTH <password> called without any password configured for the default user. \
                   Are you sure your configuration is correct?";
    talk(
        &mut raw,
        &[
            ("SET k v", "+OK"),
            ("AUTH anything", unasked),
            ("AUTH app wrong", WRONG_PASS),
            ("AUTH app pw", "+OK"),
            ("ACL USERS", "*2\r\n$3\r\napp\r\n$7\r\ndefault"),
            ("GET k", "$1\r\nv"),
        ],
    )
    .await;
}
