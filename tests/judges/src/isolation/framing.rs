//! The same commands in every way that bytes may arrive: one by one, all at once, and with a gap at
//! any place of a frame. Replies must be the same, and keys must lie where their whole name says.

use std::fmt;

use anyhow::{Context, ensure};

use crate::{
    random::Random,
    wire::{Connection, Value, encode},
};

const SLOTS: u16 = 16384;
/// Lengths where buffers and length prefixes have their ends.
const LENGTHS: &[usize] = &[
    0, 1, 2, 9, 10, 15, 16, 31, 32, 63, 64, 99, 100, 127, 128, 255, 256, 511, 512, 999, 1000, 1023,
    1024, 2047, 2048, 4095, 4096, 8191, 8192, 9999, 10000, 16383, 16384, 32767, 32768, 65535,
    65536,
];
/// Larger than any buffer that one read of a proxy fills.
const FLOOD: usize = 300_000;

/// How much is tried.
#[derive(Debug, Clone)]
pub struct Framing {
    pub address: String,
    pub seed: u64,
    /// Gaps for each length; every gap is tried where a frame has no more bytes than that.
    pub gaps: usize,
    /// Streams of frames that reach over several buffers, each with other offsets.
    pub floods: usize,
}

/// What was tried.
#[derive(Debug, Default)]
pub struct Tried {
    pub keys: usize,
    pub gaps: usize,
    pub flooded: usize,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            keys,
            gaps,
            flooded,
        } = self;
        writeln!(
            f,
            "{keys} keys, {gaps} gaps, {flooded} keys in floods: all right"
        )
    }
}

/// # Errors
/// At the first reply that differs.
pub fn run(framing: &Framing) -> anyhow::Result<Tried> {
    let mut random = Random::new(framing.seed, 7);
    let mut tried = Tried::default();
    let mut sender = Connection::open(&framing.address)?;
    let mut witness = Connection::open(&framing.address)?;
    let reply = witness.call(&["FLUSHALL"])?;
    ensure!(reply == ok(), "FLUSHALL: {reply:?}");
    for length in LENGTHS {
        let key = key(&mut random, *length);
        slot_is_of_the_whole_key(&mut witness, &key)?;
        tried.keys += 1;
        with_gaps(
            framing,
            &mut random,
            &mut sender,
            &mut witness,
            &key,
            &mut tried,
        )?;
        if *length <= 1024 {
            byte_by_byte(&mut sender, &mut witness, &key)?;
        }
    }
    for number in 0..framing.floods {
        let flooded = flood(&mut random, &mut sender, &mut witness, number);
        tried.flooded += flooded.with_context(|| format!("flood {number}"))?;
    }
    Ok(tried)
}

fn ok() -> Value {
    Value::Status(b"OK".to_vec())
}

fn key(random: &mut Random, length: usize) -> Vec<u8> {
    let hashed = length > 8 && random.percent(30);
    let mut key: Vec<u8> = (0..length)
        .map(|_| *random.pick(b"abcdefghij\r\n*$0123456789"))
        .collect();
    if hashed {
        // The tag lies anywhere, also across a gap.
        let open = random.below(length - 3);
        let close = random.between(open + 1, length - 1);
        key[open] = b'{';
        key[close] = b'}';
    }
    key
}

/// As clients must see it; what the nodes hold is seen by reading over another connection.
fn slot_is_of_the_whole_key(witness: &mut Connection, key: &[u8]) -> anyhow::Result<()> {
    let said = witness.call(&[b"CLUSTER", b"KEYSLOT".as_slice(), key])?;
    let slot = slot(key);
    ensure!(
        said == Value::Number(i64::from(slot)),
        "CLUSTER KEYSLOT of a key of {} bytes: {said:?}, not {slot}",
        key.len()
    );
    Ok(())
}

/// A SET and a GET with a gap at some place. While the witness is answered, the first part has
/// arrived and was looked at.
fn with_gaps(
    framing: &Framing,
    random: &mut Random,
    sender: &mut Connection,
    witness: &mut Connection,
    key: &[u8],
    tried: &mut Tried,
) -> anyhow::Result<()> {
    let mut probe = Vec::new();
    encode(&mut probe, &[b"SET".as_slice(), key, b"0"]);
    let all = probe.len() <= framing.gaps;
    let count = if all { probe.len() - 1 } else { framing.gaps };
    for number in 0..count {
        let gap = if all {
            number + 1
        } else {
            random.between(1, probe.len() - 1)
        };
        let value = format!("{gap}:{number}").into_bytes();
        let mut frames = Vec::new();
        encode(&mut frames, &[b"SET".as_slice(), key, &value]);
        sender.send(&frames[..gap])?;
        let pong = witness.call(&["PING"])?;
        ensure!(pong == Value::Status(b"PONG".to_vec()), "PING: {pong:?}");
        sender.send(&frames[gap..])?;
        let place = || format!("a key of {} bytes with a gap at {gap}", key.len());
        let set = sender.read().with_context(place)?;
        let got = witness.call(&[b"GET".as_slice(), key])?;
        ensure!(
            set == ok() && got == Value::Bulk(value),
            "{}: {set:?}, {got:?}",
            place()
        );
        tried.gaps += 1;
    }
    Ok(())
}

fn byte_by_byte(
    sender: &mut Connection,
    witness: &mut Connection,
    key: &[u8],
) -> anyhow::Result<()> {
    let mut frames = Vec::new();
    encode(&mut frames, &[b"SET".as_slice(), key, b"one by one"]);
    encode(&mut frames, &[b"STRLEN".as_slice(), key]);
    encode(&mut frames, &[b"GET".as_slice(), key]);
    for byte in &frames {
        sender.send(std::slice::from_ref(byte))?;
    }
    let value = Value::Bulk(b"one by one".to_vec());
    let expected = [ok(), Value::Number(10), value.clone()];
    for wanted in expected {
        let reply = sender.read()?;
        ensure!(
            reply == wanted,
            "byte by byte, {} bytes: {reply:?}",
            key.len()
        );
    }
    let got = witness.call(&[b"GET".as_slice(), key])?;
    ensure!(
        got == value,
        "byte by byte, {} bytes, read: {got:?}",
        key.len()
    );
    Ok(())
}

/// Frames of all sizes in one stream: buffers end within names, lengths, keys and values.
fn flood(
    random: &mut Random,
    sender: &mut Connection,
    witness: &mut Connection,
    number: usize,
) -> anyhow::Result<usize> {
    let mut frames = Vec::new();
    // Shifts everything that follows.
    encode(&mut frames, &[b"ECHO".to_vec(), vec![b'x'; number % 1000]]);
    let mut pairs = Vec::new();
    while frames.len() < FLOOD {
        let most = *random.pick(&[1, 16, 100, 1_000, 16_384, 65_536]);
        let length = random.between(0, most);
        let key = key(random, length);
        let value = format!("{number}:{}", pairs.len()).into_bytes();
        encode(&mut frames, &[b"SET".as_slice(), &key, &value]);
        encode(&mut frames, &[b"GET".as_slice(), &key]);
        pairs.push((key, value));
    }
    sender.send(&frames)?;
    let echo = sender.read()?;
    ensure!(
        echo == Value::Bulk(vec![b'x'; number % 1000]),
        "ECHO: {echo:?}"
    );
    for (key, value) in &pairs {
        let (set, got) = (sender.read()?, sender.read()?);
        let right = set == ok() && got == Value::Bulk(value.clone());
        ensure!(right, "a key of {} bytes: {set:?}, {got:?}", key.len());
    }
    // The last of each name, seen by another connection, alone in its frame.
    let last: std::collections::HashMap<_, _> = pairs.iter().map(|(k, v)| (k, v)).collect();
    for (key, value) in last {
        let got = witness.call(&[b"GET".as_slice(), key])?;
        let right = got == Value::Bulk(value.clone());
        ensure!(right, "a key of {} bytes, read: {got:?}", key.len());
    }
    Ok(pairs.len())
}

/// CRC16 (XMODEM) of the key, or of what is between the first `{` and the next `}` if that is not
/// empty.
fn slot(key: &[u8]) -> u16 {
    let tag = key.iter().position(|b| *b == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        let close = rest.iter().position(|b| *b == b'}')?;
        (close > 0).then(|| &rest[..close])
    });
    let mut crc = 0_u16;
    for byte in tag.unwrap_or(key) {
        crc ^= u16::from(*byte) << 8;
        for _ in 0..8 {
            let carry = crc & 0x8000 != 0;
            crc <<= 1;
            if carry {
                crc ^= 0x1021;
            }
        }
    }
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use super::slot;

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(slot(b"123456789"), 0x31C3);
        assert_eq!(slot(b"{user1000}.following"), slot(b"user1000"));
        assert_eq!(slot(b"foo{}{bar}"), slot(b"foo{}{bar}"));
        assert_ne!(slot(b"foo{}{bar}"), slot(b"bar"));
        assert_eq!(slot(b"foo{{bar}}zap"), slot(b"{bar"));
    }
}
