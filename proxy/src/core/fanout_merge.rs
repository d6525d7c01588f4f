//! Answers of all shards as one: SLOWLOG, LATENCY, MEMORY STATS, FUNCTION STATS, DEBUG DIGEST.
//!
//! Invariant: they came as RESP2, and are written as the client's protocol has them: what engines
//! send as a map or a double is one again.

use slotmesh_resp::{Protocol, Value, write};

/// Numbers of slow commands are those of the nodes times this plus the shard, so that they differ.
/// A cursor's bound of shards.
const SHARDS_MAX: i64 = 1024;

fn items(value: Value) -> Vec<Value> {
    match value {
        Value::Array(items) | Value::Set(items) => items,
        Value::Map(pairs) => pairs
            .into_iter()
            .flat_map(|(key, value)| [key, value])
            .collect(),
        _ => Vec::new(),
    }
}

fn int_at(value: &Value, at: usize) -> i64 {
    let item = value.as_items().and_then(|items| items.get(at));
    item.and_then(Value::as_int).unwrap_or(0)
}

/// Newest first. A node's client is this proxy, whose inner address is nobody's business.
pub(super) fn slow(values: Vec<Value>, limit: i64) -> Value {
    let many = values.len() > 1;
    let mut all = Vec::new();
    for (shard, value) in values.into_iter().enumerate() {
        for entry in items(value) {
            let mut fields = items(entry);
            if let (true, Some(Value::Int(number))) = (many, fields.first_mut()) {
                *number = number.saturating_mul(SHARDS_MAX) + shard as i64;
            }
            if let Some(address) = fields.get_mut(4) {
                *address = Value::Bulk(Vec::new());
            }
            all.push(Value::Array(fields));
        }
    }
    if many {
        all.sort_by_key(|entry| std::cmp::Reverse((int_at(entry, 1), int_at(entry, 0))));
    }
    if let Ok(limit) = usize::try_from(limit) {
        all.truncate(limit);
    }
    Value::Array(all)
}

/// Name, time of the newest, its milliseconds, and the greatest: one entry an event.
pub(super) fn latest(values: &[Value]) -> Value {
    let mut events: Vec<Vec<Value>> = Vec::new();
    for entry in values.iter().filter_map(Value::as_items).flatten() {
        let fields = entry.as_items().unwrap_or_default();
        let known = events
            .iter_mut()
            .find(|event| event.first() == fields.first());
        let Some(known) = known else {
            events.push(fields.to_vec());
            continue;
        };
        let max = int_at(entry, 3).max(known.get(3).and_then(Value::as_int).unwrap_or(0));
        if int_at(entry, 1) > known.get(1).and_then(Value::as_int).unwrap_or(0) {
            *known = fields.to_vec();
        }
        if let Some(field) = known.get_mut(3) {
            *field = Value::Int(max);
        }
    }
    Value::Array(events.into_iter().map(Value::Array).collect())
}

/// As long as one node remembers.
pub(super) fn history(values: Vec<Value>) -> Value {
    const REMEMBERED: usize = 160;
    let mut all: Vec<Value> = values.into_iter().flat_map(items).collect();
    all.sort_by_key(|sample| int_at(sample, 0));
    let older = all.len().saturating_sub(REMEMBERED);
    Value::Array(all.split_off(older))
}

/// XOR, as a node makes its own from those of its keys: equal data gives an equal digest.
pub(super) fn digest(values: &[Value]) -> Value {
    let mut all = [0_u8; 40];
    for text in values.iter().filter_map(Value::as_bytes) {
        for (sum, digit) in all.iter_mut().zip(text) {
            *sum ^= char::from(*digit).to_digit(16).unwrap_or(0) as u8;
        }
    }
    let digit = |digit: &u8| char::from_digit(u32::from(*digit), 16).unwrap_or('0');
    Value::Simple(all.iter().map(digit).collect())
}

pub(super) fn running(values: Vec<Value>) -> Value {
    let busy =
        |value: &Value| matches!(value.as_items(), Some([_, shown, ..]) if *shown != Value::Null);
    let at = values.iter().position(busy).unwrap_or(0);
    values.into_iter().nth(at).unwrap_or(Value::Null)
}

/// FUNCTION STATS: its engines are a map of maps.
pub(super) const RUNNING_DEPTH: u32 = 3;

/// Writes flat pairs, as RESP2 has them, as a map, and the values in it likewise, down to a depth.
pub(super) fn write_map(out: &mut Vec<u8>, protocol: Protocol, value: &Value, depth: u32) {
    let Some(fields) = value.as_items() else {
        return value.encode(out, protocol);
    };
    let named =
        |pair: &[Value]| pair.len() == 2 && matches!(pair[0], Value::Bulk(_) | Value::Simple(_));
    if depth == 0 || !fields.chunks(2).all(named) {
        return value.encode(out, protocol);
    }
    write::write_map_header(out, protocol, fields.len() / 2);
    for pair in fields.chunks_exact(2) {
        pair[0].encode(out, protocol);
        // The words of the command that runs are a list, whatever they look like.
        match pair[0].as_bytes() {
            Some(b"command") => pair[1].encode(out, protocol),
            _ => write_map(out, protocol, &pair[1], depth - 1),
        }
    }
}

/// How many calls took at most so many microseconds.
type Buckets = Vec<(i64, i64)>;

/// Command by command: calls, and how many took at most so long.
pub(super) fn write_histogram(out: &mut Vec<u8>, protocol: Protocol, values: &[Value]) {
    let mut commands: Vec<(Vec<u8>, i64, Buckets)> = Vec::new();
    for fields in values.iter().filter_map(Value::as_items) {
        for pair in fields.chunks_exact(2) {
            let name = pair[0].as_bytes().unwrap_or_default();
            let details = pair[1].as_items().unwrap_or_default();
            let calls = int_at(&pair[1], 1);
            let buckets = details.get(3).and_then(Value::as_items).unwrap_or_default();
            let buckets: Vec<(i64, i64)> = (buckets.chunks_exact(2))
                .map(|b| (b[0].as_int().unwrap_or(0), b[1].as_int().unwrap_or(0)))
                .collect();
            match commands.iter_mut().find(|(known, ..)| known == name) {
                Some((_, sum, known)) => {
                    *sum += calls;
                    *known = add_buckets(known, &buckets);
                }
                None => commands.push((name.to_vec(), calls, buckets)),
            }
        }
    }
    write::write_map_header(out, protocol, commands.len());
    for (name, calls, buckets) in &commands {
        write::write_bulk(out, name);
        write::write_map_header(out, protocol, 2);
        write::write_bulk(out, b"calls");
        write::write_int(out, *calls);
        write::write_bulk(out, b"histogram_usec");
        write::write_map_header(out, protocol, buckets.len());
        for (bound, count) in buckets {
            write::write_int(out, *bound);
            write::write_int(out, *count);
        }
    }
}

/// Counts are of all calls up to a bound, so a bound that one side lacks has its count of the bound
/// before.
fn add_buckets(a: &[(i64, i64)], b: &[(i64, i64)]) -> Vec<(i64, i64)> {
    let mut bounds: Vec<i64> = a.iter().chain(b).map(|(bound, _)| *bound).collect();
    bounds.sort_unstable();
    bounds.dedup();
    let up_to = |buckets: &[(i64, i64)], bound: i64| {
        let before = buckets.iter().filter(|(b, _)| *b <= bound);
        before.map(|(_, count)| *count).max().unwrap_or(0)
    };
    let sum = |bound: &i64| (*bound, up_to(a, *bound) + up_to(b, *bound));
    bounds.iter().map(sum).collect()
}

/// Sums of amounts, averages of ratios; the databases of all shards.
pub(super) fn write_memory(out: &mut Vec<u8>, protocol: Protocol, values: &[Value]) {
    let mut order: Vec<&[u8]> = Vec::new();
    let lists: Vec<&[Value]> = values.iter().filter_map(Value::as_items).collect();
    for pair in lists.iter().flat_map(|fields| fields.chunks_exact(2)) {
        let name = pair[0].as_bytes().unwrap_or_default();
        if !order.contains(&name) {
            order.push(name);
        }
    }
    write::write_map_header(out, protocol, order.len());
    for name in order {
        write::write_bulk(out, name);
        let pairs = lists.iter().flat_map(|fields| fields.chunks_exact(2));
        let same = pairs.filter(|pair| pair[0].as_bytes() == Some(name));
        let same: Vec<Value> = same.map(|pair| pair[1].clone()).collect();
        match same.first() {
            Some(Value::Array(_)) => write_memory(out, protocol, &same),
            Some(Value::Int(_)) => {
                write::write_int(out, same.iter().filter_map(Value::as_int).sum());
            }
            _ => {
                let numbers = same.iter().filter_map(Value::as_str);
                let numbers: Vec<f64> = numbers.filter_map(|text| text.parse().ok()).collect();
                let average = numbers.iter().sum::<f64>() / numbers.len().max(1) as f64;
                write::write_double(out, protocol, average);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: i64, time: i64) -> Value {
        let words = Value::Array(vec![Value::Bulk(b"get".to_vec())]);
        let address = Value::Bulk(b"10.0.0.1:5".to_vec());
        let name = Value::Bulk(Vec::new());
        Value::Array(vec![
            Value::Int(number),
            Value::Int(time),
            Value::Int(1),
            words,
            address,
            name,
        ])
    }

    #[test]
    fn slow_commands_are_sorted_by_time_and_their_numbers_differ() {
        let a = Value::Array(vec![entry(1, 30), entry(0, 10)]);
        let b = Value::Array(vec![entry(0, 20)]);
        let merged = slow(vec![a.clone(), b.clone()], 2);
        let shown = merged.as_items().unwrap();
        let numbers: Vec<_> = shown.iter().map(|e| (int_at(e, 0), int_at(e, 1))).collect();
        assert_eq!(numbers, [(1024, 30), (1, 20)]);
        let addresses = shown.iter().map(|e| &e.as_items().unwrap()[4]);
        assert!(addresses.into_iter().all(|a| *a == Value::Bulk(Vec::new())));
        assert_eq!(slow(vec![a, b], -1).as_items().unwrap().len(), 3);
    }

    #[test]
    fn buckets_count_all_calls_up_to_their_bound() {
        let merged = add_buckets(&[(1, 2), (4, 5)], &[(2, 1), (8, 9)]);
        assert_eq!(merged, [(1, 2), (2, 3), (4, 6), (8, 14)]);
    }

    #[test]
    fn an_event_is_listed_once_with_its_newest_time_and_its_maximum() {
        let event = |time, last, max| {
            let name = Value::Bulk(b"command".to_vec());
            let fields = [time, last, max].map(Value::Int);
            Value::Array(vec![Value::Array([&[name][..], &fields].concat())])
        };
        let merged = latest(&[event(5, 9, 9), event(7, 1, 3)]);
        assert_eq!(merged, event(7, 1, 9));
    }
}
