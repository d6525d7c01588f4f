//! Decimal numbers exactly as Redis reads them.
//!
//! The strictness matters: bytes that we accept are forwarded as they are, so a length that we read
//! in another way than the node does would put the two out of step on a shared connection.

/// Reads a whole slice as a signed decimal: no sign `+`, no leading zero, no space, no overflow.
#[must_use]
pub fn parse_i64(digits: &[u8]) -> Option<i64> {
    let (negative, digits) = match digits {
        [b'0'] => return Some(0),
        [b'-', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    // 19 digits hold every i64; what is longer cannot be one.
    if digits.is_empty() || digits.len() > 19 || digits[0] == b'0' {
        return None;
    }
    let mut value: u64 = 0;
    for &byte in digits {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        value = value * 10 + u64::from(digit); // 19 nines are below 2^64
    }
    if negative {
        0i64.checked_sub_unsigned(value)
    } else {
        i64::try_from(value).ok()
    }
}

/// The usual length line: `buf[at]` is its type byte, then 1 to 9 digits and CR, and one more byte is
/// there. Gives the number and the position behind the line. Anything else is `None`: the careful
/// path decides whether it is incomplete, unusual or wrong.
#[inline]
pub(crate) fn short_length(buf: &[u8], at: usize) -> Option<(u32, usize)> {
    const DIGITS_MAX: usize = 9; // fits u32 without a check
    let digits = buf.get(at + 1..)?;
    let mut value: u32 = 0;
    let mut len = 0;
    for &byte in digits.iter().take(DIGITS_MAX) {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            break;
        }
        value = value * 10 + u32::from(digit);
        len += 1;
    }
    let strict = len == 1 || (len > 1 && digits[0] != b'0');
    if strict && len + 1 < digits.len() && digits[len] == b'\r' {
        Some((value, at + 1 + len + 2))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_redis_reads_and_nothing_else() {
        let good: &[(&str, i64)] = &[
            ("0", 0),
            ("1", 1),
            ("-1", -1),
            ("10", 10),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
        ];
        for (text, value) in good {
            assert_eq!(parse_i64(text.as_bytes()), Some(*value), "{text}");
        }
        let bad = [
            "",
            "-",
            "-0",
            "+1",
            "01",
            "00",
            " 1",
            "1 ",
            "1a",
            "a",
            "--1",
            "1-",
            "9223372036854775808",
            "-9223372036854775809",
            "99999999999999999999",
        ];
        for text in bad {
            assert_eq!(parse_i64(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn the_short_path_takes_only_what_the_careful_path_reads_alike() {
        let lines = [
            "$0\r\n",
            "$3\r\n",
            "$64\r\n",
            "$123456789\r\n",
            "$1234567890\r\n",
            "$00\r\n",
            "$03\r\n",
            "$\r\n",
            "$-1\r\n",
            "$3\r",
            "$3",
            "$",
            "$3x\r\n",
            "$3\rx",
        ];
        for line in lines {
            let bytes = line.as_bytes();
            if let Some((value, next)) = short_length(bytes, 0) {
                let cr = line.find('\r').unwrap();
                assert_eq!(parse_i64(&bytes[1..cr]), Some(i64::from(value)), "{line:?}");
                assert_eq!(next, cr + 2, "{line:?}");
            }
        }
        assert_eq!(short_length(b"$3\r\n", 0), Some((3, 4)));
        assert_eq!(short_length(b"$03\r\n", 0), None);
        assert_eq!(short_length(b"$3\r", 0), None);
    }
}
