//! When two replies to one command mean the same.
//!
//! Only what Redis leaves open is forgiven: the order of what has no order, the time that passes
//! between the two executions, and which key is a random one. Error texts count.

use crate::wire::{Value, Words};

/// The two servers execute a command within this time.
const CLOCK_TOLERANCE_MS: i64 = 10_000;

/// Replies whose elements come in no order.
const UNORDERED: &[&str] = &["SDIFF", "SINTER", "SUNION", "SMEMBERS", "KEYS"];

pub(super) fn same(command: &Words, ours: &Value, one: &Value) -> bool {
    let name = name(command);
    match (name.as_str(), ours, one) {
        ("PTTL" | "PEXPIRETIME" | "TTL" | "EXPIRETIME", Value::Number(a), Value::Number(b)) => {
            a == b || (*a > 0 && *b > 0 && (a - b).abs() <= CLOCK_TOLERANCE_MS)
        }
        ("RANDOMKEY", ..) => (*ours == Value::Null) == (*one == Value::Null),
        (unordered, ..) if UNORDERED.contains(&unordered) => sorted(ours) == sorted(one),
        ("HGETALL", ..) => pairs(ours) == pairs(one),
        _ => ours == one,
    }
}

/// The same of a transaction: `block` is what was queued.
pub(super) fn same_exec(block: &[Words], ours: &Value, one: &Value) -> bool {
    match (ours, one) {
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len()
                && a.len() == block.len()
                && block.iter().zip(a).zip(b).all(|((c, a), b)| same(c, a, b))
        }
        _ => ours == one,
    }
}

pub(super) fn name(command: &Words) -> String {
    String::from_utf8_lossy(&command[0]).to_ascii_uppercase()
}

/// Sorted elements of what has no order; the kind of collection stays.
pub(super) fn sorted(value: &Value) -> Value {
    let mut value = value.clone();
    match &mut value {
        Value::Array(items) | Value::Set(items) => items.sort(),
        Value::Map(pairs) => pairs.sort(),
        _ => {}
    }
    value
}

/// A flat list of pairs, or a map, in sorted order.
pub(super) fn pairs(value: &Value) -> Value {
    let Value::Array(items) = value else {
        return sorted(value);
    };
    let mut pairs: Vec<Value> = items
        .chunks(2)
        .map(|pair| Value::Array(pair.to_vec()))
        .collect();
    pairs.sort();
    Value::Array(pairs)
}
