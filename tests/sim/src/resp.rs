//! As much of RESP as the model's nodes and clients need.
//!
//! Invariant: nothing incomplete is taken.

/// The first command of `bytes`, and its length.
#[must_use]
pub fn command(bytes: &[u8]) -> Option<(Vec<&str>, usize)> {
    let (count, mut at) = number(bytes, b'*')?;
    let mut args = Vec::with_capacity(usize::try_from(count).ok()?);
    for _ in 0..count {
        let (len, used) = number(bytes.get(at..)?, b'$')?;
        let from = at + used;
        let to = from + usize::try_from(len).ok()?;
        args.push(std::str::from_utf8(bytes.get(from..to)?).ok()?);
        at = to + 2;
        bytes.get(at - 1)?;
    }
    Some((args, at))
}

/// What a client gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// Anything that is neither of the others.
    Status,
    /// A number, as integer or as text; `None`: nil.
    Number(Option<u64>),
    /// An array of replies.
    Array(Vec<Reply>),
    /// An error.
    Error(String),
}

/// The first reply of `bytes`, and its length.
#[must_use]
pub fn reply(bytes: &[u8]) -> Option<(Reply, usize)> {
    let end = line_end(bytes)?;
    let text = std::str::from_utf8(&bytes[1..end - 2]).ok()?;
    match bytes[0] {
        b'-' => Some((Reply::Error(text.to_owned()), end)),
        b':' => Some((Reply::Number(text.parse().ok()), end)),
        b'$' if text == "-1" => Some((Reply::Number(None), end)),
        b'$' => {
            let to = end + text.parse::<usize>().ok()?;
            let body = std::str::from_utf8(bytes.get(end..to)?).ok()?;
            bytes.get(to + 1)?;
            Some((Reply::Number(body.parse().ok()), to + 2))
        }
        b'*' => {
            let (mut at, mut items) = (end, Vec::new());
            for _ in 0..text.parse::<i64>().ok()? {
                let (item, used) = reply(bytes.get(at..)?)?;
                items.push(item);
                at += used;
            }
            Some((Reply::Array(items), at))
        }
        _ => Some((Reply::Status, end)),
    }
}

/// A command's bytes.
#[must_use]
pub fn encode(args: &[&str]) -> String {
    let mut text = format!("*{}\r\n", args.len());
    args.iter().for_each(|a| text.push_str(&bulk(a)));
    text
}

/// A bulk string's bytes.
#[must_use]
pub fn bulk(text: &str) -> String {
    format!("${}\r\n{text}\r\n", text.len())
}

/// The number of a key such as `k17`.
#[must_use]
pub fn key(text: &str) -> Option<u32> {
    text.strip_prefix('k')?.parse().ok()
}

fn line_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(2).position(|w| w == b"\r\n").map(|at| at + 2)
}

fn number(bytes: &[u8], kind: u8) -> Option<(i64, usize)> {
    if *bytes.first()? != kind {
        return None;
    }
    let end = line_end(bytes)?;
    let text = std::str::from_utf8(&bytes[1..end - 2]).ok()?;
    Some((text.parse().ok()?, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_parsed_and_a_part_of_it_is_not() {
        let text = encode(&["SET", "k1", "42"]);
        let (args, used) = command(text.as_bytes()).unwrap();
        assert_eq!((args, used), (vec!["SET", "k1", "42"], text.len()));
        for to in 0..text.len() {
            assert_eq!(command(&text.as_bytes()[..to]), None, "{to}");
        }
        let array = b"*2\r\n:1\r\n$-1\r\n";
        let items = vec![Reply::Number(Some(1)), Reply::Number(None)];
        assert_eq!(reply(array), Some((Reply::Array(items), array.len())));
        assert_eq!(reply(&array[..9]), None);
    }
}
