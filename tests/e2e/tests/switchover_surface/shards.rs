//! Commands that need several shards, walks over all keys, and scripts: right in every round.

use std::collections::HashSet;

use anyhow::{Context, ensure};

use crate::stage::{Link, SHARDS, Stage, together};

const KEYS: usize = 20;
/// Keys that are there all the time, which each walk must find.
const PERMANENT: usize = 200;
const MEMBERS: u64 = 10;

fn at_both(
    stage: &Stage,
    play: fn(&Stage, usize, &mut Link) -> anyhow::Result<u64>,
) -> anyhow::Result<u64> {
    let clients = (0..2)
        .map(|client| {
            Box::new(move || {
                let mut link = stage.link(client)?;
                play(stage, client, &mut link).with_context(|| format!("at proxy {client}"))
            }) as Box<_>
        })
        .collect();
    Ok(together(clients)?.into_iter().min().unwrap_or_default())
}

pub(crate) fn computed(stage: &Stage) -> anyhow::Result<u64> {
    at_both(stage, compute)
}

fn compute(stage: &Stage, client: usize, link: &mut Link) -> anyhow::Result<u64> {
    let [a, b] = SHARDS.map(|shard| format!("computed:{client}{shard}"));
    let mut round = 0;
    for (key, from) in [(&a, 0), (&b, MEMBERS / 2)] {
        for member in from..from + MEMBERS {
            let _: u64 = link.ask(&format!("SADD {key}:set {member}"))?;
        }
    }
    let _: String = link.ask(&format!("SET {a}:name value"))?;
    while stage.is_open() {
        round += 1;
        let count: u64 = link.ask(&format!("SUNIONSTORE {b}:union {a}:set {b}:set"))?;
        ensure!(count == MEMBERS / 2 * 3, "SUNIONSTORE said {count}");
        let members: HashSet<u64> = link.ask(&format!("SMEMBERS {b}:union"))?;
        ensure!(members.len() as u64 == count, "SMEMBERS said {members:?}");
        // There and back again.
        for (from, to) in [(&a, &b), (&b, &a)] {
            let _: String = link.ask(&format!("RENAME {from}:name {to}:name"))?;
            let there: Vec<Option<String>> = link.ask(&format!("MGET {from}:name {to}:name"))?;
            ensure!(
                there == [None, Some("value".to_owned())],
                "after RENAME: {there:?}"
            );
        }
        let _: String = link.ask(&format!("SET {a}:original {round}"))?;
        let copied: u64 = link.ask(&format!("COPY {a}:original {b}:copy REPLACE"))?;
        let copy: u64 = link.ask(&format!("GET {b}:copy"))?;
        ensure!(
            (copied, copy) == (1, round),
            "COPY said {copied}, the copy is {copy}"
        );
        many_keys(link, client, round)?;
        stage.pause();
    }
    Ok(round)
}

fn many_keys(link: &mut Link, client: usize, round: u64) -> anyhow::Result<()> {
    let keys: Vec<String> = (0..KEYS).map(|k| format!("many:{client}:{k}")).collect();
    let pairs: Vec<String> = keys.iter().map(|k| format!("{k} {round}")).collect();
    let _: String = link.ask(&format!("MSET {}", pairs.join(" ")))?;
    let values: Vec<u64> = link.ask(&format!("MGET {}", keys.join(" ")))?;
    ensure!(
        values == [round; KEYS],
        "MGET after MSET of {round}: {values:?}"
    );
    Ok(())
}

pub(crate) fn walks(stage: &Stage) -> anyhow::Result<u64> {
    let mut link = stage.link(0)?;
    for key in 0..PERMANENT {
        let _: String = link.ask(&format!("SET permanent:{key} there"))?;
        // Too many for the small encoding, which answers all at once.
        let members: Vec<String> = (0..4).map(|n| format!("m{key}:{n}")).collect();
        let _: i64 = link.ask(&format!("SADD permanent-set {}", members.join(" ")))?;
    }
    at_both(stage, walk)
}

fn walk(stage: &Stage, _: usize, link: &mut Link) -> anyhow::Result<u64> {
    let mut steps = 0;
    while stage.is_open() {
        steps += walk_once(stage, link, "SCAN", "MATCH permanent:* COUNT 50", PERMANENT)?;
        steps += walk_once(
            stage,
            link,
            "SSCAN permanent-set",
            "COUNT 50",
            PERMANENT * 4,
        )?;
    }
    Ok(steps)
}

/// From the beginning to the end; all must be found.
fn walk_once(
    stage: &Stage,
    link: &mut Link,
    command: &str,
    options: &str,
    all: usize,
) -> anyhow::Result<u64> {
    let mut steps = 0;
    let mut cursor = "0".to_owned();
    let mut found: HashSet<String> = HashSet::new();
    loop {
        let step = format!("{command} {cursor} {options}");
        let (next, some): (String, Vec<String>) = link.ask(&step)?;
        found.extend(some);
        steps += 1;
        cursor = next;
        if cursor == "0" {
            break;
        }
        stage.pause();
    }
    let count = found.len();
    ensure!(count == all, "{command} found {count} of {all}");
    Ok(steps)
}

const SCRIPT: &str = "return redis.call('INCR', KEYS[1])";
const LIBRARY: &str = "#!lua name=counting\n\
    redis.register_function('count', function(keys) return redis.call('INCR', keys[1]) end)";

/// Loaded once, before the first switchover: nobody sees NOSCRIPT, or misses a function. A script is
/// loaded through each proxy, which remembers its text; a function is the nodes' own, so once.
pub(crate) fn scripts(stage: &Stage) -> anyhow::Result<u64> {
    let mut link = stage.link(0)?;
    let _: String = link.ask_words(&["FUNCTION", "LOAD", LIBRARY])?;
    at_both(stage, call)
}

fn call(stage: &Stage, client: usize, link: &mut Link) -> anyhow::Result<u64> {
    let sha: String = link.ask_words(&["SCRIPT", "LOAD", SCRIPT])?;
    let mut round: u64 = 0;
    while stage.is_open() {
        round += 1;
        for shard in SHARDS {
            let value: u64 = link.ask(&format!("EVALSHA {sha} 1 script:{client}{shard}"))?;
            ensure!(value == round, "EVALSHA {round} counted {value}");
            let value: u64 = link.ask(&format!("FCALL count 1 function:{client}{shard}"))?;
            ensure!(value == round, "FCALL {round} counted {value}");
        }
        let _: u64 = link.ask("WAIT 1 1000")?;
        stage.pause();
    }
    Ok(round)
}
