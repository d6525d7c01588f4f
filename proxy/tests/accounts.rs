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

/// Nobody's error but this program's, whatever follows it.
async fn evaluate(raw: &mut Raw, script: &str, keys: &[&str], want: &str) {
    let count = keys.len().to_string();
    let words = ["EVAL", script, &count]
        .into_iter()
        .chain(keys.iter().copied());
    let words: Vec<&str> = words.collect();
    let mut frame = format!("*{}\r\n", words.len());
    for word in words {
        frame += &format!("${}\r\n{word}\r\n", word.len());
    }
    raw.send(frame.as_bytes()).await;
    let reply = raw.line().await;
    assert!(reply.starts_with(want), "{script}: {reply}");
}

const NO_COMMAND_INSIDE: &str =
    "-ERR The user executing the script can't run this command or subcommand";
const NO_KEY_INSIDE: &str = "-ERR The user executing the script can't access at least one of the keys \
                             mentioned in the command arguments";

#[tokio::test(flavor = "multi_thread")]
async fn a_script_cannot_do_what_its_account_may_not() {
    let rules = [
        "on", "nopass", "+@all", "-del", "-config", "~a:*", "%R~r:*", "%W~w:*", "&news",
    ];
    let rules = [&rules[..], &["(+hget ~h*)"]].concat();
    let fixture = fixture(vec![account("app", &rules)]).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    talk(&mut raw, &[("AUTH app x", "+OK")]).await;
    // Keys that the script does not declare go to the shard of those that it does.
    for (script, want) in [
        ("return redis.call('set','a:1','v')", "+OK"),
        ("return redis.call('set','b','v')", NO_KEY_INSIDE),
        ("return redis.pcall('set','b','v')", NO_KEY_INSIDE),
        ("return redis.call('mset','a:1','v','b','v')", NO_KEY_INSIDE),
        ("return redis.call('get','r:1')", "_"),
        ("return redis.call('set','r:1','v')", NO_KEY_INSIDE),
        ("return redis.call('set','w:1','v')", "+OK"),
        ("return redis.call('set','w:1','v','get')", NO_KEY_INSIDE),
        (
            "redis.setresp(3) return redis.call('get','w:1')",
            NO_KEY_INSIDE,
        ),
        ("return redis.call('DEL','a:1')", NO_COMMAND_INSIDE),
        ("return redis.call('hget','h1','f')", "_"),
        ("return redis.call('hset','h1','f','v')", NO_KEY_INSIDE),
        ("return redis.call('publish','news','m')", ":0"),
        (
            "return redis.call('publish','other','m')",
            "-ERR The user executing the script can't publish to the channel",
        ),
        (
            "return redis.call('sort','a:2','get','b*')",
            "-ERR GET option of SORT denied",
        ),
        ("return redis.call('sort','a:2','store','b')", NO_KEY_INSIDE),
        (
            "return redis.call('nosuch')",
            "-ERR Unknown Redis command called from script",
        ),
        ("return redis.call('config','get','x')", NO_COMMAND_INSIDE),
        ("return redis.acl_check_cmd('set','a:1','v')", ":1"),
        ("return redis.acl_check_cmd('set','b','v')", "_"),
    ] {
        let want = want.replace('_', "$-1");
        evaluate(&mut raw, script, &["a:1"], &want).await;
    }
    raw.send(b"EVAL \"return 1\" 1 b\r\n").await;
    raw.expect(&format!("{NO_KEY}\r\n")).await;
    raw.send(b"FCALL f 1 a:1\r\n").await;
    raw.expect("-NOPERM slotmesh: commands inside a function cannot be checked")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_has_no_other_way_to_the_engine() {
    let rules = ["on", "nopass", "+@all", "~a:*"];
    let fixture = fixture(vec![account("app", &rules)]).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    talk(&mut raw, &[("AUTH app x", "+OK")]).await;
    let get = "call('get','b')";
    let refused = [
        format!("return _G.redis.{get}"),
        format!("return _G['re' .. 'dis'].{get}"),
        format!("return _G._G.redis.{get}"),
        format!("return loadstring(\"return redis.{get}\")()"),
        format!("return loadstring(\"return _G.redis.{get}\")()"),
        format!(
            "local n=0 return load(function() n=n+1 return n==1 and \"return redis.{get}\" or nil end)()"
        ),
        format!("return setmetatable({{}}, {{__index = redis}}).{get}"),
        "return coroutine.wrap(redis.call)('get','b')".to_owned(),
        format!("return (function(...) return ... end)(redis).{get}"),
    ];
    for script in &refused {
        evaluate(&mut raw, script, &["a:1"], NO_KEY_INSIDE).await;
    }
    for script in [
        format!("return getmetatable(redis).__index.{get}"),
        format!("return getmetatable(_G).__index.redis.{get}"),
        format!("return getfenv(0).redis.{get}"),
        "return rawget(redis, 'call')('get','b')".to_owned(),
        format!("return rawget(_G, 'redis').{get}"),
        format!("end redis.{get} do"),
        format!("\\\" redis.{get}"),
        "return loadstring(string.dump(function() return 1 end))()".to_owned(),
        "redis.call = 1".to_owned(),
        "getmetatable('').__index = 1".to_owned(),
    ] {
        evaluate(&mut raw, &script, &["a:1"], "-ERR ").await;
    }
    let all = "local n = 0 for _ in pairs(_G) do n = n + 1 end for _ in pairs(redis) do n = n + 1 end return n";
    evaluate(&mut raw, all, &["a:1"], ":0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limited_account_calls_scripts_by_their_own_digest_also_in_a_transaction() {
    let rules = ["on", "nopass", "+@all", "~a:*"];
    let fixture = fixture(vec![account("app", &rules)]).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    let script = "return redis.call('incr',KEYS[1])";
    let sha = sha1_smol::Sha1::from(script).digest().to_string();
    let call = format!("EVALSHA {sha} 1 a:1");
    let missing = "-NOSCRIPT No matching script. Please use EVAL.";
    talk(&mut raw, &[("AUTH app x", "+OK"), (&call, missing)]).await;
    evaluate(&mut raw, script, &["a:1"], ":1").await;
    talk(
        &mut raw,
        &[
            (&call, ":2"),
            ("MULTI", "+OK"),
            (&call, "+QUEUED"),
            ("EVAL \"return redis.call('get','b')\" 1 a:1", "+QUEUED"),
            ("GET a:1", "+QUEUED"),
        ],
    )
    .await;
    raw.send(b"EXEC\r\n").await;
    raw.expect(&format!("*3\r\n:3\r\n{NO_KEY_INSIDE}")).await;
    raw.line().await;
    raw.expect("$1\r\n3\r\n").await;
    // A read-only script stays one, and a line of a script is the author's.
    let flagged = "#!lua flags=no-writes\nreturn redis.call('incr',KEYS[1])";
    let denied = "-ERR Write commands are not allowed from read-only scripts.";
    evaluate(&mut raw, flagged, &["a:1"], denied).await;
    let second = "#!lua\nreturn nosuchname";
    evaluate(
        &mut raw,
        second,
        &["a:1"],
        "-ERR user_script:2: Script attempted",
    )
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
