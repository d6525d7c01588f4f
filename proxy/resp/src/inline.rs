//! Commands typed as a line, with Redis's quoting, made into ordinary frames.
//!
//! A quoted argument is not a slice of the line, so the line is rewritten as a multibulk frame; from
//! there on an inline command is a command like any other, also for the node that executes it.

use crate::request::Args;
use crate::{ProtocolError, write};

/// Replaces `frame` with the multibulk form of the inline command `line` and lists its arguments,
/// whose positions are those in `frame`. The line is at most
/// [`LINE_BYTES_MAX`](crate::request::LINE_BYTES_MAX) long, so this may allocate.
///
/// # Errors
/// A quote is not closed, or something follows a closing quote at once.
pub fn rewrite_inline(
    line: &[u8],
    frame: &mut Vec<u8>,
    args: &mut Args,
) -> Result<(), ProtocolError> {
    let parts = split(line)?;
    frame.clear();
    args.clear();
    write::write_array_header(frame, parts.len());
    for part in &parts {
        write::write_bulk(frame, part);
        let end = frame.len() - 2;
        // Both fit: the line is short, and escapes only shrink it.
        args.push((end - part.len()) as u32, end as u32);
    }
    Ok(())
}

/// C's `isspace` in the C locale.
pub(crate) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r')
}

fn split(line: &[u8]) -> Result<Vec<Vec<u8>>, ProtocolError> {
    let mut parts = Vec::new();
    let mut rest = line;
    loop {
        let start = rest.iter().position(|&byte| !is_space(byte));
        let Some(start) = start else { return Ok(parts) };
        let (part, after) = take_part(&rest[start..])?;
        parts.push(part);
        rest = after;
    }
}

/// One argument; a quote may also open in its middle, and the closing one ends it.
fn take_part(mut rest: &[u8]) -> Result<(Vec<u8>, &[u8]), ProtocolError> {
    let mut part = Vec::new();
    loop {
        match rest {
            [] | [b' ' | b'\n' | b'\r' | b'\t', ..] => return Ok((part, rest)),
            [b'"', after @ ..] => {
                rest = take_double_quoted(after, &mut part)?;
                return closed(part, rest);
            }
            [b'\'', after @ ..] => {
                rest = take_single_quoted(after, &mut part)?;
                return closed(part, rest);
            }
            [byte, after @ ..] => {
                part.push(*byte);
                rest = after;
            }
        }
    }
}

fn closed(part: Vec<u8>, rest: &[u8]) -> Result<(Vec<u8>, &[u8]), ProtocolError> {
    match rest.first() {
        Some(&byte) if !is_space(byte) => Err(ProtocolError::UnbalancedQuotes),
        _ => Ok((part, rest)),
    }
}

fn take_double_quoted<'b>(
    mut rest: &'b [u8],
    part: &mut Vec<u8>,
) -> Result<&'b [u8], ProtocolError> {
    loop {
        let (byte, after) = match rest {
            [] => return Err(ProtocolError::UnbalancedQuotes),
            [b'"', after @ ..] => return Ok(after),
            [b'\\', b'x', high, low, after @ ..]
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                (hex(*high) << 4 | hex(*low), after)
            }
            [b'\\', escaped, after @ ..] => (unescape(*escaped), after),
            [byte, after @ ..] => (*byte, after),
        };
        part.push(byte);
        rest = after;
    }
}

fn take_single_quoted<'b>(
    mut rest: &'b [u8],
    part: &mut Vec<u8>,
) -> Result<&'b [u8], ProtocolError> {
    loop {
        let (byte, after) = match rest {
            [] => return Err(ProtocolError::UnbalancedQuotes),
            [b'\\', b'\'', after @ ..] => (b'\'', after),
            [b'\'', after @ ..] => return Ok(after),
            [byte, after @ ..] => (*byte, after),
        };
        part.push(byte);
        rest = after;
    }
}

fn unescape(byte: u8) -> u8 {
    match byte {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 0x08,
        b'a' => 0x07,
        other => other,
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit - b'A' + 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(line: &str) -> Result<Vec<String>, ProtocolError> {
        let parts = split(line.as_bytes())?;
        Ok(parts
            .iter()
            .map(|part| String::from_utf8_lossy(part).into_owned())
            .collect())
    }

    #[test]
    fn lines_split_as_redis_splits_them() {
        let cases: &[(&str, &[&str])] = &[
            ("PING", &["PING"]),
            ("  SET  a\tb \r\n", &["SET", "a", "b"]),
            ("set a \"b c\"", &["set", "a", "b c"]),
            ("set a 'b c'", &["set", "a", "b c"]),
            (r#"x "\x41\x4a\xzz\n\q\"" "#, &["x", "AJxzz\nq\""]),
            (r#"x '\n\'' "#, &["x", r"\n'"]),
            ("x \"\"", &["x", ""]),
            ("pre\"fix ed\" y", &["prefix ed", "y"]),
            ("", &[]),
            (" \r\n", &[]),
        ];
        for (line, expected) in cases {
            assert_eq!(parts(line).as_deref().unwrap(), *expected, "{line:?}");
        }
    }

    #[test]
    fn unbalanced_quotes_are_refused() {
        for line in [
            "\"",
            "'",
            "set \"a",
            "set 'a",
            "set \"a\"b c",
            "'a'b",
            r#"set "a\"#,
        ] {
            assert_eq!(
                parts(line),
                Err(ProtocolError::UnbalancedQuotes),
                "{line:?}"
            );
        }
    }

    #[test]
    fn the_rewritten_frame_is_canonical_and_its_arguments_point_into_it() {
        let (mut frame, mut args) = (b"old".to_vec(), Args::new());
        rewrite_inline(b"set k \"a b\"\r\n", &mut frame, &mut args).unwrap();
        assert_eq!(frame, b"*3\r\n$3\r\nset\r\n$1\r\nk\r\n$3\r\na b\r\n");
        let args: Vec<&[u8]> = args.iter(&frame).collect();
        assert_eq!(args, [&b"set"[..], b"k", b"a b"]);
    }
}
