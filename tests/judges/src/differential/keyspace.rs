//! Everything that a server holds, type by type, as it can be compared with another's.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::bail;

use super::{
    compare::{pairs, sorted},
    generate::DATABASES,
};
use crate::wire::{Connection, Value, Words, encode, words};

/// A key's expiry may differ by the time between the two executions of a relative EXPIRE.
const CLOCK_TOLERANCE_MS: i64 = 10_000;
/// A walk over a few keys that takes more steps never ends.
const SCAN_STEPS_MAX: usize = 100_000;

#[derive(Debug, PartialEq)]
struct Held {
    kind: String,
    expires_ms: i64,
    content: Value,
}

/// Compares all databases; `None` when they are the same, else the first difference.
///
/// # Errors
/// One of the two does not answer.
pub(super) fn difference(
    ours: &mut Connection,
    one: &mut Connection,
    step: usize,
) -> anyhow::Result<Option<String>> {
    for database in 0..DATABASES {
        let select = ["SELECT".to_owned(), database.to_string()];
        let (a, b) = (ours.call(&select)?, one.call(&select)?);
        if a != b {
            return Ok(Some(format!(
                "SELECT {database}: ours {a:?}, one Redis {b:?}"
            )));
        }
        let expected = keys(one)?;
        for (how, found) in [("KEYS *", keys(ours)?), ("SCAN", scan(ours, step)?)] {
            let missing: Vec<_> = expected.difference(&found).collect();
            let extra: Vec<_> = found.difference(&expected).collect();
            if !missing.is_empty() || !extra.is_empty() {
                return Ok(Some(format!(
                    "{how} in database {database}: missing {missing:?}, extra {extra:?}"
                )));
            }
        }
        let size = Value::Number(i64::try_from(expected.len())?);
        let counted = ours.call(&["DBSIZE"])?;
        if counted != size {
            return Ok(Some(format!(
                "DBSIZE in database {database}: {counted:?}, not {size:?}"
            )));
        }
        let (a, b) = (contents(ours, &expected)?, contents(one, &expected)?);
        for (key, theirs) in b {
            let held = a.get(&key);
            if held.is_none_or(|held| !alike(held, &theirs)) {
                let key = key.escape_ascii();
                return Ok(Some(format!(
                    "key {key} in database {database}:\n  ours      {held:?}\n  one Redis {theirs:?}"
                )));
            }
        }
    }
    Ok(None)
}

fn alike(ours: &Held, one: &Held) -> bool {
    let time = ours.expires_ms == one.expires_ms
        || (ours.expires_ms > 0
            && one.expires_ms > 0
            && (ours.expires_ms - one.expires_ms).abs() <= CLOCK_TOLERANCE_MS);
    time && ours.kind == one.kind && ours.content == one.content
}

fn keys(server: &mut Connection) -> anyhow::Result<BTreeSet<Value>> {
    match server.call(&["KEYS", "*"])? {
        Value::Array(keys) => Ok(keys.into_iter().collect()),
        other => bail!("KEYS *: {other:?}"),
    }
}

/// A whole walk; SCAN may say a key twice.
fn scan(server: &mut Connection, step: usize) -> anyhow::Result<BTreeSet<Value>> {
    let mut found = BTreeSet::new();
    let mut cursor = b"0".to_vec();
    for _ in 0..SCAN_STEPS_MAX {
        let reply = server.call(&[
            b"SCAN".to_vec(),
            cursor,
            b"COUNT".to_vec(),
            step.to_string().into(),
        ])?;
        let [next, keys] = reply.items() else {
            // Shown as what was found: the judge goes on with the other keys.
            return Ok(BTreeSet::from([reply]));
        };
        found.extend(keys.items().iter().cloned());
        cursor = next.bytes().to_vec();
        if cursor == b"0" {
            return Ok(found);
        }
    }
    bail!("SCAN does not end")
}

fn contents(
    server: &mut Connection,
    keys: &BTreeSet<Value>,
) -> anyhow::Result<BTreeMap<Vec<u8>, Held>> {
    let keys: Vec<Vec<u8>> = keys.iter().map(|key| key.bytes().to_vec()).collect();
    let commands = keys.iter().flat_map(|key| {
        ["TYPE", "PEXPIRETIME"].map(|name| vec![name.as_bytes().to_vec(), key.clone()])
    });
    let heads = pipeline(server, commands.collect())?;
    let kinds: Vec<String> = heads
        .iter()
        .step_by(2)
        .map(|kind| String::from_utf8_lossy(kind.bytes()).into_owned())
        .collect();
    let asked = kinds
        .iter()
        .zip(&keys)
        .flat_map(|(kind, key)| reads(kind, key));
    let mut replies = pipeline(server, asked.collect())?.into_iter();
    let mut all = BTreeMap::new();
    for ((key, kind), head) in keys.into_iter().zip(kinds).zip(heads.chunks(2)) {
        let expires_ms = match head[1] {
            Value::Number(at) => at,
            ref other => bail!("PEXPIRETIME: {other:?}"),
        };
        let count = reads(&kind, &key).len();
        let found: Vec<Value> = replies.by_ref().take(count).collect();
        let content = content(&kind, found);
        all.insert(
            key,
            Held {
                kind,
                expires_ms,
                content,
            },
        );
    }
    Ok(all)
}

/// What must be asked to know a value.
fn reads(kind: &str, key: &[u8]) -> Vec<Words> {
    let ask = |head: &[&str], tail: &[&str]| {
        let mut all = words(head);
        all.push(key.to_vec());
        all.extend(words(tail));
        all
    };
    match kind {
        "string" => vec![ask(&["GET"], &[]), ask(&["PFCOUNT"], &[])],
        "set" => vec![ask(&["SMEMBERS"], &[])],
        "zset" => vec![ask(&["ZRANGE"], &["0", "-1", "WITHSCORES"])],
        "hash" => vec![ask(&["HGETALL"], &[])],
        "list" => vec![ask(&["LRANGE"], &["0", "-1"])],
        "stream" => vec![
            ask(&["XRANGE"], &["-", "+"]),
            ask(&["XINFO", "GROUPS"], &[]),
            ask(&["XINFO", "STREAM"], &[]),
        ],
        _ => Vec::new(),
    }
}

fn content(kind: &str, found: Vec<Value>) -> Value {
    match (kind, found.as_slice()) {
        // The same set of elements may be encoded in several ways.
        ("string", [value, Value::Number(count)]) if value.bytes().starts_with(b"HYLL") => {
            Value::Number(*count)
        }
        ("string", [value, _]) => value.clone(),
        ("set", [value]) => sorted(value),
        ("hash", [value]) => pairs(value),
        ("stream", [entries, groups, about]) => {
            let items = about.items();
            // How the tree is built inside is nobody's business.
            let outside = items
                .chunks(2)
                .filter(|pair| !pair[0].bytes().starts_with(b"radix"));
            let about = outside.flatten().cloned().collect();
            Value::Array(vec![entries.clone(), groups.clone(), Value::Array(about)])
        }
        _ => Value::Array(found),
    }
}

fn pipeline(server: &mut Connection, commands: Vec<Words>) -> anyhow::Result<Vec<Value>> {
    // Few enough that neither side's buffers fill up while nobody reads.
    const AT_ONCE: usize = 64;
    let mut replies = Vec::new();
    for some in commands.chunks(AT_ONCE) {
        let mut frames = Vec::new();
        for command in some {
            encode(&mut frames, command);
        }
        server.send(&frames)?;
        for _ in some {
            replies.push(server.read()?);
        }
    }
    Ok(replies)
}
