//! Reads what nodes answer to jobs: whole RESP2 frames, of a few simple shapes.
//!
//! Invariant: nothing is copied, and a frame of an unexpected shape is `None`, never a guess.

use slotmesh_resp::{ReplyScanner, Scan, parse_i64};

/// A node answered in a shape that no engine uses.
pub(super) const UNREADABLE: &[u8] =
    b"ERR slotmesh: a node's answer could not be read; the command was given up";

pub(super) fn is_error(answer: &[u8]) -> bool {
    answer.first() == Some(&b'-')
}

pub(super) fn is_wrong_type(answer: &[u8]) -> bool {
    answer.starts_with(b"-WRONGTYPE ")
}

/// The first answer that is an error.
pub(super) fn first_error(answers: &[Vec<u8>]) -> Option<&Vec<u8>> {
    answers.iter().find(|answer| is_error(answer))
}

/// `:123\r\n`.
pub(super) fn integer(answer: &[u8]) -> Option<i64> {
    parse_i64(answer.strip_prefix(b":")?.strip_suffix(b"\r\n")?)
}

/// A bulk string; the inner `None` is a null.
pub(super) fn bulk(answer: &[u8]) -> Option<Option<&[u8]>> {
    if answer == b"$-1\r\n" {
        return Some(None);
    }
    let (body, rest) = next_bulk(answer)?;
    rest.is_empty().then_some(Some(body))
}

/// A flat array of bulk strings.
pub(super) fn bulks(answer: &[u8]) -> Option<Vec<&[u8]>> {
    let (count, mut rest) = header(answer, b'*')?;
    let mut all = Vec::with_capacity(count.min(answer.len()));
    for _ in 0..count {
        let (body, behind) = next_bulk(rest)?;
        all.push(body);
        rest = behind;
    }
    Some(all)
}

/// The members of an array, each as its frame.
pub(super) fn items(answer: &[u8]) -> Option<Vec<&[u8]>> {
    let (count, mut rest) = header(answer, b'*')?;
    let mut all = Vec::with_capacity(count.min(answer.len()));
    for _ in 0..count {
        let Ok(Scan::Complete { consumed, .. }) = ReplyScanner::new().scan(rest) else {
            return None;
        };
        all.push(&rest[..consumed]);
        rest = &rest[consumed..];
    }
    Some(all)
}

fn next_bulk(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = header(bytes, b'$')?;
    Some((rest.get(..len)?, rest.get(len + 2..)?))
}

/// The number in the first line, and what follows that line.
fn header(bytes: &[u8], kind: u8) -> Option<(usize, &[u8])> {
    if bytes.first() != Some(&kind) {
        return None;
    }
    let end = memchr::memchr(b'\r', bytes)?;
    let number = usize::try_from(parse_i64(&bytes[1..end])?).ok()?;
    Some((number, bytes.get(end + 2..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simple_shapes_are_read_and_others_are_not_guessed() {
        assert_eq!(integer(b":-7\r\n"), Some(-7));
        assert_eq!(integer(b"+OK\r\n"), None);
        assert_eq!(bulk(b"$3\r\na\r\n\r\n"), Some(Some(b"a\r\n".as_slice())));
        assert_eq!(bulk(b"$-1\r\n"), Some(None));
        assert_eq!(bulk(b":1\r\n"), None);
        let array = b"*2\r\n$1\r\na\r\n$0\r\n\r\n";
        assert_eq!(bulks(array), Some(vec![b"a".as_slice(), b""]));
        assert_eq!(bulks(b"*1\r\n:1\r\n"), None);
        assert_eq!(
            items(b"*2\r\n:1\r\n*1\r\n:2\r\n"),
            Some(vec![b":1\r\n".as_slice(), b"*1\r\n:2\r\n"])
        );
        assert_eq!(items(b"*-1\r\n"), None);
        assert_eq!(bulks(b"*0\r\n"), Some(vec![]));
    }
}
