//! Compares the clients' ledgers with what the shards hold at the end.
//!
//! Lost: acknowledged and not there. Duplicated: there more often than was asked for. Both are read
//! through the proxies, as any client would.

use std::collections::HashMap;

use redis::{RedisResult, aio::MultiplexedConnection};

use super::{
    Target, Told,
    client::connect,
    ledger::{Ids, Keys, LIST_LENGTH, Ledger},
};

/// Keys of one EXISTS pipeline, ids of one LRANGE.
const BATCH: u64 = 500;

pub(super) async fn audit(
    target: &Target,
    ledgers: &[Ledger],
    told: &mut Told,
) -> anyhow::Result<()> {
    for (ledger, proxy) in ledgers.iter().zip(target.proxies.iter().cycle()) {
        let mut connection = connect(proxy, false).await?;
        counter(&mut connection, ledger, told).await?;
        register(&mut connection, ledger, told).await?;
        told.lost += missing_keys(&mut connection, &ledger.keys, &ledger.set).await?;
        lists(&mut connection, &ledger.keys, &ledger.pushed, told).await?;
    }
    Ok(())
}

async fn counter(
    connection: &mut MultiplexedConnection,
    ledger: &Ledger,
    told: &mut Told,
) -> RedisResult<()> {
    let mut get = redis::cmd("GET");
    let value: Option<u64> = get
        .arg(ledger.keys.counter())
        .query_async(connection)
        .await?;
    let value = value.unwrap_or_default();
    told.lost += ledger.counted.saturating_sub(value);
    told.duplicated += value.saturating_sub(ledger.counted + ledger.counted_ambiguous);
    Ok(())
}

async fn register(
    connection: &mut MultiplexedConnection,
    ledger: &Ledger,
    told: &mut Told,
) -> RedisResult<()> {
    let mut get = redis::cmd("GET");
    let value: Option<u64> = get
        .arg(ledger.keys.register())
        .query_async(connection)
        .await?;
    told.lost += u64::from(value.unwrap_or_default() < ledger.register);
    Ok(())
}

async fn missing_keys(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    ids: &Ids,
) -> RedisResult<u64> {
    let mut missing = 0;
    for first in (0..ids.next).step_by(BATCH as usize) {
        let batch = first..ids.next.min(first + BATCH);
        let mut pipe = redis::pipe();
        let acknowledged: Vec<u64> = batch.filter(|id| !ids.ambiguous.contains(id)).collect();
        for id in &acknowledged {
            pipe.cmd("GET").arg(keys.id(*id));
        }
        let found: Vec<Option<u64>> = pipe.query_async(connection).await?;
        missing += acknowledged
            .iter()
            .zip(found)
            .filter(|(id, f)| *f != Some(**id))
            .count() as u64;
    }
    Ok(missing)
}

async fn lists(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    ids: &Ids,
    told: &mut Told,
) -> RedisResult<()> {
    for first in (0..ids.next).step_by(LIST_LENGTH as usize) {
        let list = keys.list(first);
        let mut times: HashMap<u64, u64> = HashMap::new();
        // A list longer than its ids shows duplicates; twice the length is enough to see them.
        for start in (0..2 * LIST_LENGTH).step_by(BATCH as usize) {
            let mut range = redis::cmd("LRANGE");
            range.arg(&list).arg(start).arg(start + BATCH - 1);
            let part: Vec<u64> = range.query_async(connection).await?;
            if part.is_empty() {
                break;
            }
            for id in part {
                *times.entry(id).or_default() += 1;
            }
        }
        for id in first..ids.next.min(first + LIST_LENGTH) {
            let there = times.get(&id).copied().unwrap_or_default();
            told.lost += u64::from(there == 0 && !ids.ambiguous.contains(&id));
            told.duplicated += there.saturating_sub(1);
        }
    }
    Ok(())
}
