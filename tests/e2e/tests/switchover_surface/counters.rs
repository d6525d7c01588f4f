//! Counters in transactions: each acknowledged block counts, fully, and once.

use anyhow::{Context, ensure};
use redis::Value;

use crate::stage::{Link, SHARDS, Stage, together};

const CLIENTS: usize = 4;

fn in_block(link: &mut Link, command: &str) -> anyhow::Result<()> {
    let said: String = link.ask(command)?;
    let wanted = if command == "MULTI" { "OK" } else { "QUEUED" };
    ensure!(said == wanted, "{command} in a transaction said {said}");
    Ok(())
}

/// Reads and writes shared counters under WATCH: an update that another one overtook must not count.
pub(crate) fn watched(stage: &Stage) -> anyhow::Result<u64> {
    let clients = (0..CLIENTS)
        .map(|client| {
            Box::new(move || watch(stage, client).with_context(|| format!("client {client}")))
                as Box<_>
        })
        .collect();
    let counted: Vec<[u64; 2]> = together(clients)?;
    let mut link = stage.link(1)?;
    for (index, shard) in SHARDS.iter().enumerate() {
        let wanted: u64 = counted.iter().map(|c| c[index]).sum();
        let value: u64 = link.ask(&format!("GET watched{shard}"))?;
        ensure!(
            value == wanted,
            "{wanted} blocks were executed on {shard}, {value} counted"
        );
    }
    Ok(counted.iter().flatten().sum())
}

fn watch(stage: &Stage, client: usize) -> anyhow::Result<[u64; 2]> {
    let mut link = stage.link(client)?;
    let mut counted = [0; 2];
    let mut turn = client;
    while stage.is_open() {
        turn += 1;
        let shard = SHARDS[turn % 2];
        let _: String = link.ask(&format!("WATCH watched{shard}"))?;
        let value: Option<u64> = link.ask(&format!("GET watched{shard}"))?;
        let value = value.unwrap_or_default() + 1;
        in_block(&mut link, "MULTI")?;
        in_block(&mut link, &format!("SET watched{shard} {value}"))?;
        if link.ask::<Value>("EXEC")? != Value::Nil {
            counted[turn % 2] += 1;
        }
        stage.pause();
    }
    Ok(counted)
}

/// Blocks over both shards, each client with counters of its own: their replies count up by one.
pub(crate) fn blocks(stage: &Stage) -> anyhow::Result<u64> {
    let clients = (0..CLIENTS)
        .map(|client| {
            Box::new(move || block(stage, client).with_context(|| format!("client {client}")))
                as Box<_>
        })
        .collect();
    let counted: Vec<u64> = together(clients)?;
    let mut link = stage.link(0)?;
    for (client, counted) in counted.iter().enumerate() {
        for counter in ["one", "two"] {
            for shard in SHARDS {
                let value: u64 = link.ask(&format!("GET {counter}:{client}{shard}"))?;
                ensure!(
                    value == *counted,
                    "{counted} blocks were executed, {value} counted"
                );
            }
        }
    }
    Ok(counted.into_iter().sum())
}

fn block(stage: &Stage, client: usize) -> anyhow::Result<u64> {
    let mut link = stage.link(client)?;
    let mut counted = 0;
    while stage.is_open() {
        in_block(&mut link, "MULTI")?;
        for counter in ["one", "two"] {
            for shard in SHARDS {
                in_block(&mut link, &format!("INCR {counter}:{client}{shard}"))?;
            }
        }
        let values: Vec<u64> = link.ask("EXEC")?;
        counted += 1;
        ensure!(values == [counted; 4], "block {counted} said {values:?}");
        stage.pause();
    }
    Ok(counted)
}
