//! Scores of sorted sets: read, combined and written as engines do it.
//!
//! Invariant: no score is ever NaN, and a written score reads back as the same number.

/// Within these bounds all engines print a number alike: up to 7.0 they print 17 digits, of which
/// zeros are left out; later ones print as few as tell it from its neighbours, with an exponent
/// beyond so many decimals.
const COMMON_DIGITS: usize = 15;
const COMMON_DECIMALS: i32 = 6;
const PLAIN_BELOW: f64 = 1e15;
const PLAIN_FROM: f64 = 1e-4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aggregate {
    Sum,
    Min,
    Max,
}

impl Aggregate {
    pub(super) fn apply(self, sum: f64, value: f64) -> f64 {
        match self {
            Self::Sum => number(sum + value), // inf - inf
            Self::Min if value < sum => value,
            Self::Max if value > sum => value,
            Self::Min | Self::Max => sum,
        }
    }
}

/// What engines take instead of NaN.
pub(super) fn number(value: f64) -> f64 {
    if value.is_nan() { 0.0 } else { value }
}

/// A score as a node writes it.
pub(super) fn parse(text: &[u8]) -> Option<f64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A weight as a client writes it. What C reads and engines refuse is refused: white space in front,
/// NaN, and what is too large or too small for a double. Hexadecimal numbers are refused as well,
/// which engines would take.
pub(super) fn parse_weight(text: &[u8]) -> Option<f64> {
    let value = parse(text)?;
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let digits = digits.strip_prefix(b"+").unwrap_or(digits);
    let said_infinite = matches!(digits.first(), Some(b'i' | b'I'));
    let mantissa = digits.split(|b| matches!(b, b'e' | b'E')).next();
    let said_zero = !mantissa
        .unwrap_or_default()
        .iter()
        .any(|b| matches!(b, b'1'..=b'9'));
    let fits = if value.is_infinite() {
        said_infinite
    } else {
        value != 0.0 || said_zero
    };
    (fits && !value.is_nan()).then_some(value)
}

/// 17 significant digits, as C's `%.17g`: what engines up to 7.0 print, and what all read exactly.
pub(super) fn exact(value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let (digits, exponent) = decimal(value);
    let sign = if value.is_sign_negative() { "-" } else { "" };
    let (first, rest) = digits.split_at(1);
    let dot = if rest.is_empty() { "" } else { "." };
    if !(-4..17).contains(&exponent) {
        let (mark, size) = (if exponent < 0 { '-' } else { '+' }, exponent.abs());
        return format!("{sign}{first}{dot}{rest}e{mark}{size:02}");
    }
    match usize::try_from(exponent) {
        Err(_) => {
            let zeros = "0".repeat(exponent.unsigned_abs() as usize - 1);
            format!("{sign}0.{zeros}{digits}")
        }
        Ok(point) if point + 1 >= digits.len() => {
            format!("{sign}{digits:0<width$}", width = point + 1)
        }
        Ok(point) => format!("{sign}{}.{}", &digits[..=point], &digits[point + 1..]),
    }
}

/// True if all engines print this number alike, which is as [`exact`] does.
pub(super) fn is_common(value: f64) -> bool {
    let size = value.abs();
    let is_short = || {
        let (digits, exponent) = decimal(value);
        let decimals = digits.len() as i32 - 1 - exponent;
        digits.len() <= COMMON_DIGITS && decimals <= COMMON_DECIMALS
    };
    value.is_infinite() || size == 0.0 || ((PLAIN_FROM..PLAIN_BELOW).contains(&size) && is_short())
}

/// Up to 17 digits without zeros at the end, and the power of ten of the first.
fn decimal(value: f64) -> (String, i32) {
    let text = format!("{:.16e}", value.abs());
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    let kept = digits.trim_end_matches('0');
    let kept = if kept.is_empty() { "0" } else { kept };
    (kept.to_owned(), exponent.parse().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_texts_are_those_of_redis_7_0() {
        let cases = [
            ("0.1", "0.10000000000000001"),
            ("1e21", "1e+21"),
            ("123456789012345680000", "1.2345678901234568e+20"),
            ("1e17", "1e+17"),
            ("12345678901234567", "12345678901234568"),
            ("1e16", "10000000000000000"),
            ("0.00001", "1.0000000000000001e-05"),
            ("0.0001", "0.0001"),
            ("1e-7", "9.9999999999999995e-08"),
            ("-1.25e-9", "-1.25e-09"),
            ("0.001234567", "0.001234567"),
            ("1234567890123.125", "1234567890123.125"),
            ("5e-324", "4.9406564584124654e-324"),
            ("1.7976931348623157e308", "1.7976931348623157e+308"),
            ("999999999999999934464", "1e+21"),
            ("-0", "-0"),
            ("100", "100"),
            ("3", "3"),
            ("-2.5", "-2.5"),
            ("inf", "inf"),
            ("-inf", "-inf"),
        ];
        for (text, want) in cases {
            assert_eq!(exact(text.parse().unwrap()), want, "{text}");
        }
    }

    #[test]
    fn only_texts_that_all_engines_share_are_common() {
        for text in ["0", "1", "-2.5", "0.0625", "inf", "123456.015625"] {
            assert!(is_common(text.parse().unwrap()), "{text}");
        }
        for text in ["0.1", "1e15", "1e20", "0.00005", "98911.9619915925", "0.3"] {
            assert!(!is_common(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn weights_are_taken_as_engines_take_them() {
        for text in [
            "1",
            "+1",
            "-1.5",
            "1.",
            ".5",
            "1e3",
            "inf",
            "-Infinity",
            "0e9",
            "-0",
        ] {
            assert!(parse_weight(text.as_bytes()).is_some(), "{text}");
        }
        for text in [
            "", " 1", "1 ", "nan", "1e400", "-1e400", "1e-400", "x", "e5", ".",
        ] {
            assert!(parse_weight(text.as_bytes()).is_none(), "{text}");
        }
    }

    #[test]
    fn infinities_that_meet_make_zero() {
        let (inf, one) = (f64::INFINITY, 1.0);
        assert_eq!(Aggregate::Sum.apply(inf, -inf), 0.0);
        assert_eq!(Aggregate::Sum.apply(inf, one), inf);
        assert_eq!(Aggregate::Min.apply(one, f64::NAN), one);
        assert_eq!(Aggregate::Max.apply(one, f64::NAN), one);
        assert_eq!(number(0.0 * inf), 0.0);
    }
}
