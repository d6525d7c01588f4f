//! Writers: commands for a node, replies for a client, in the protocol that the client speaks.
//!
//! They append to a buffer and never fail. A type that RESP2 lacks is written as Redis writes it
//! for a RESP2 client (map → flat array, null → `$-1`, double → bulk).

/// The protocol of one client, as chosen by its HELLO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    #[default]
    Resp2,
    Resp3,
}

/// A command as a multibulk frame.
pub fn encode_command(out: &mut Vec<u8>, args: &[&[u8]]) {
    write_array_header(out, args.len());
    for arg in args {
        write_bulk(out, arg);
    }
}

#[inline]
pub fn write_bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    write_header(out, b'$', bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// `text` without the leading `-`, with its code: `ERR no such key`. Line breaks become spaces.
pub fn write_error(out: &mut Vec<u8>, text: impl AsRef<[u8]>) {
    write_line(out, b'-', text.as_ref());
}

pub fn write_simple(out: &mut Vec<u8>, text: impl AsRef<[u8]>) {
    write_line(out, b'+', text.as_ref());
}

#[inline]
pub fn write_int(out: &mut Vec<u8>, value: i64) {
    out.push(b':');
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    out.extend_from_slice(b"\r\n");
}

#[inline]
pub fn write_array_header(out: &mut Vec<u8>, len: usize) {
    write_header(out, b'*', len);
}

/// A map of `len` pairs follows: each key, then its value.
pub fn write_map_header(out: &mut Vec<u8>, protocol: Protocol, len: usize) {
    match protocol {
        Protocol::Resp2 => write_header(out, b'*', len * 2),
        Protocol::Resp3 => write_header(out, b'%', len),
    }
}

pub fn write_set_header(out: &mut Vec<u8>, protocol: Protocol, len: usize) {
    write_header(
        out,
        if protocol == Protocol::Resp3 {
            b'~'
        } else {
            b'*'
        },
        len,
    );
}

/// What the server says unasked: in RESP2 an array that a subscriber takes for a message.
pub fn write_push_header(out: &mut Vec<u8>, protocol: Protocol, len: usize) {
    write_header(
        out,
        if protocol == Protocol::Resp3 {
            b'>'
        } else {
            b'*'
        },
        len,
    );
}

pub fn write_null(out: &mut Vec<u8>, protocol: Protocol) {
    out.extend_from_slice(match protocol {
        Protocol::Resp2 => b"$-1\r\n".as_slice(),
        Protocol::Resp3 => b"_\r\n",
    });
}

/// The null that stands where an array would be (EXEC after a failed WATCH, BLPOP's timeout).
pub fn write_null_array(out: &mut Vec<u8>, protocol: Protocol) {
    out.extend_from_slice(match protocol {
        Protocol::Resp2 => b"*-1\r\n".as_slice(),
        Protocol::Resp3 => b"_\r\n",
    });
}

pub fn write_bool(out: &mut Vec<u8>, protocol: Protocol, value: bool) {
    out.extend_from_slice(match (protocol, value) {
        (Protocol::Resp2, false) => b":0\r\n".as_slice(),
        (Protocol::Resp2, true) => b":1\r\n",
        (Protocol::Resp3, false) => b"#f\r\n",
        (Protocol::Resp3, true) => b"#t\r\n",
    });
}

pub fn write_double(out: &mut Vec<u8>, protocol: Protocol, value: f64) {
    let text = shortest(value);
    match protocol {
        Protocol::Resp2 => write_bulk(out, text.as_bytes()),
        Protocol::Resp3 => write_line(out, b',', text.as_bytes()),
    }
}

/// A decimal number of any length, its digits given.
pub fn write_big_number(out: &mut Vec<u8>, protocol: Protocol, digits: &[u8]) {
    match protocol {
        Protocol::Resp2 => write_bulk(out, digits),
        Protocol::Resp3 => write_line(out, b'(', digits),
    }
}

/// An error whose text may hold line breaks and any bytes; RESP2 has only one-line errors.
pub fn write_blob_error(out: &mut Vec<u8>, protocol: Protocol, text: &[u8]) {
    match protocol {
        Protocol::Resp2 => write_line(out, b'-', text),
        Protocol::Resp3 => {
            write_header(out, b'!', text.len());
            out.extend_from_slice(text);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// In RESP3, `len` pairs follow that say something of the reply behind them. RESP2 has no such thing:
/// write none.
pub fn write_attribute_header(out: &mut Vec<u8>, len: usize) {
    write_header(out, b'|', len);
}

/// Text with a three-letter format (`txt`, `mkd`); RESP2 gets the text alone.
pub fn write_verbatim(out: &mut Vec<u8>, protocol: Protocol, format: [u8; 3], text: &[u8]) {
    match protocol {
        Protocol::Resp2 => write_bulk(out, text),
        Protocol::Resp3 => {
            write_header(out, b'=', text.len() + 4);
            out.extend_from_slice(&format);
            out.push(b':');
            out.extend_from_slice(text);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// The shortest digits that read back as the same number, laid out as Redis does from 7.2 on (older
/// engines print 17 digits, and its algorithm takes a digit too many for one number in 500; all of them read
/// back the same).
fn shortest(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    const WHOLE_MAX: f64 = (i64::MAX / 2) as f64; // Redis's own bound
    if value.trunc() == value && value.abs() <= WHOLE_MAX {
        return itoa::Buffer::new().format(value as i64).to_owned();
    }
    // 1.25e-7: the digits, and where the point stands.
    let scientific = format!("{:e}", value.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let digits: String = mantissa.chars().filter(|digit| *digit != '.').collect();
    let exponent: i32 = exponent.parse().unwrap_or(0); // a double's has 3 digits
    let behind = exponent + 1 - digits.len() as i32; // zeros behind the digits; at most 17 digits
    let sign = if value < 0.0 { "-" } else { "" };
    if behind >= 0 && exponent.abs() < digits.len() as i32 + 7 {
        return format!("{sign}{digits}{}", "0".repeat(behind as usize));
    }
    if behind < 0 && (behind > -7 || exponent.abs() < 4) {
        return match usize::try_from(exponent) {
            Ok(whole) => format!("{sign}{}.{}", &digits[..=whole], &digits[whole + 1..]),
            Err(_) => {
                let zeros = exponent.unsigned_abs() as usize - 1;
                format!("{sign}0.{}{digits}", "0".repeat(zeros))
            }
        };
    }
    let plus = if exponent < 0 { "" } else { "+" };
    format!("{sign}{mantissa}e{plus}{exponent}")
}

#[inline]
fn write_header(out: &mut Vec<u8>, kind: u8, len: usize) {
    out.push(kind);
    out.extend_from_slice(itoa::Buffer::new().format(len).as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn write_line(out: &mut Vec<u8>, kind: u8, text: &[u8]) {
    out.push(kind);
    let broken = |byte: &u8| matches!(byte, b'\r' | b'\n');
    out.extend(
        text.iter()
            .map(|byte| if broken(byte) { b' ' } else { *byte }),
    );
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn doubles_look_as_redis_prints_them() {
        // From redis-server 8.2: ZADD, then ZSCORE.
        let cases = [
            (0.1, "0.1"),
            (3.0, "3"),
            (-0.0, "0"),
            (1e21, "1e+21"),
            (1.5e300, "1.5e+300"),
            (1e-7, "1e-7"),
            (-3_242_100_000_000.0, "-3242100000000"),
            (36_156_631_111_551_952.0, "36156631111551952"),
            (0.00001, "0.00001"),
            (123_456.789e10, "1234567890000000"),
            (12_345_678_901_234_567_890.0, "12345678901234567000"),
            (-2.5, "-2.5"),
            (f64::INFINITY, "inf"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (value, text) in cases {
            assert_eq!(shortest(value), text);
        }
    }

    #[test]
    fn what_resp2_lacks_is_written_as_what_it_has() {
        let both = |write: &dyn Fn(&mut Vec<u8>, Protocol)| {
            [Protocol::Resp2, Protocol::Resp3].map(|protocol| {
                let mut out = Vec::new();
                write(&mut out, protocol);
                String::from_utf8(out).unwrap()
            })
        };
        let big = both(&|out, protocol| write_big_number(out, protocol, b"12345678901234567890"));
        assert_eq!(
            big,
            [
                "$20\r\n12345678901234567890\r\n",
                "(12345678901234567890\r\n"
            ]
        );
        let error = both(&|out, protocol| write_blob_error(out, protocol, b"ERR a\r\nb"));
        assert_eq!(error, ["-ERR a  b\r\n", "!8\r\nERR a\r\nb\r\n"]);
        let text = both(&|out, protocol| write_verbatim(out, protocol, *b"mkd", b"# a\n"));
        assert_eq!(text, ["$4\r\n# a\n\r\n", "=8\r\nmkd:# a\n\r\n"]);
    }

    proptest! {
        #[test]
        fn a_double_is_read_back_as_it_was(bits in any::<u64>()) {
            let value = f64::from_bits(bits);
            let text = shortest(value);
            prop_assert!(text.len() <= 25, "{}", text);
            if !value.is_nan() {
                prop_assert_eq!(text.parse::<f64>().unwrap(), value);
            }
        }
    }
}
