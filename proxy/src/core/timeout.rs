//! The timeout argument of commands that wait.
//!
//! Invariant: an argument that cannot be read is left to the node, which refuses it in its own words.

use slotmesh_command::Command;
use slotmesh_resp::{Args, Parsed, RequestParser, parse_i64, write};

use super::spec::Request;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// A decimal fraction.
    Seconds,
    /// A whole number.
    Milliseconds,
}

/// When a command stops waiting, and where it says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timeout {
    /// Index of the argument.
    at: usize,
    unit: Unit,
    pub(super) until_us: u64,
}

impl Timeout {
    /// Of a command that came now. `None`: it waits for ever, or will be refused.
    pub(super) fn of(command: &Command, request: Request<'_>, now_us: u64) -> Option<Self> {
        let (at, unit) = match command.name {
            "blmpop" | "bzmpop" => (1, Unit::Seconds),
            "xread" | "xreadgroup" => (block_option(request)?, Unit::Milliseconds),
            "wait" | "waitaof" => (request.len() - 1, Unit::Milliseconds),
            _ => (request.len() - 1, Unit::Seconds),
        };
        let text = request.arg(at);
        let us = match unit {
            Unit::Seconds => {
                let seconds: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
                (seconds.is_finite() && seconds > 0.0).then_some((seconds * 1e6) as u64)?
            }
            Unit::Milliseconds => {
                let ms = u64::try_from(parse_i64(text)?).ok().filter(|ms| *ms > 0)?;
                ms.saturating_mul(1000)
            }
        };
        let until_us = now_us.saturating_add(us);
        Some(Self { at, unit, until_us })
    }

    /// In a form that another process reads: the argument, whether it counts milliseconds, and how
    /// many of them are left.
    pub(super) fn parts(&self, now_us: u64) -> (u32, bool, u64) {
        let left_ms = self.until_us.saturating_sub(now_us).div_ceil(1000).max(1);
        (self.at as u32, self.unit == Unit::Milliseconds, left_ms)
    }

    pub(super) fn of_parts((at, in_ms, left_ms): (u32, bool, u64), now_us: u64) -> Self {
        Self {
            at: at as usize,
            unit: if in_ms {
                Unit::Milliseconds
            } else {
                Unit::Seconds
            },
            until_us: now_us.saturating_add(left_ms.saturating_mul(1000)),
        }
    }

    /// The command with the time that is left.
    pub(super) fn rewrite(&self, frame: &[u8], now_us: u64) -> Option<Vec<u8>> {
        /// Less could be rounded to 0 by a node, which is for ever.
        const LEAST_MS: u64 = 2;
        let left_ms = self.until_us.saturating_sub(now_us).div_ceil(1000);
        let left_ms = left_ms.max(LEAST_MS);
        let text = match self.unit {
            Unit::Seconds => format!("{}.{:03}", left_ms / 1000, left_ms % 1000),
            Unit::Milliseconds => left_ms.to_string(),
        };
        let mut args = Args::new();
        let parsed = RequestParser::new().parse(frame, &mut args);
        let Ok(Parsed::Complete { .. }) = parsed else {
            return None;
        };
        let mut out = Vec::with_capacity(frame.len() + text.len());
        write::write_array_header(&mut out, args.len());
        for (at, word) in args.iter(frame).enumerate() {
            write::write_bulk(&mut out, if at == self.at { text.as_bytes() } else { word });
        }
        Some(out)
    }
}

/// Where the milliseconds of XREAD's BLOCK are: of several the last one counts.
fn block_option(request: Request<'_>) -> Option<usize> {
    let words = 1..request.len();
    let options = words.take_while(|at| !request.is(*at, "streams"));
    let at = options.filter(|at| request.is(*at, "block")).last()?;
    (at + 1 < request.len()).then_some(at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(line: &str) -> (Vec<u8>, Args) {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        let (mut frame, mut args) = (Vec::new(), Args::new());
        write::encode_command(&mut frame, &words);
        RequestParser::new().parse(&frame, &mut args).unwrap();
        (frame, args)
    }

    fn check(line: &str, passed_us: u64, want: Option<&str>) {
        let (bytes, args) = frame(line);
        let request = Request {
            frame: &bytes,
            args: &args,
        };
        let command = slotmesh_command::resolve(&request).unwrap();
        let timeout = Timeout::of(command, request, 1_000);
        let got = timeout.map(|t| t.rewrite(&bytes, 1_000 + passed_us).unwrap());
        assert_eq!(got, want.map(|line| frame(line).0), "{line}");
    }

    #[test]
    fn the_time_that_is_left_is_written_where_the_timeout_was() {
        check("BLPOP a b 1.5", 500_000, Some("BLPOP a b 1.000"));
        check(
            "BLMPOP 2 1 a LEFT",
            1_999_999,
            Some("BLMPOP 0.002 1 a LEFT"),
        );
        check(
            "BLMOVE a b LEFT LEFT 3",
            100,
            Some("BLMOVE a b LEFT LEFT 3.000"),
        );
        check("WAIT 1 100", 40_500, Some("WAIT 1 60"));
        check(
            "XREAD BLOCK 9 COUNT 2 BLOCK 100 STREAMS s $",
            1_000,
            Some("XREAD BLOCK 9 COUNT 2 BLOCK 99 STREAMS s $"),
        );
    }

    #[test]
    fn no_end_and_nonsense_have_no_time_left() {
        for line in [
            "BLPOP a 0",
            "BLPOP a -1",
            "BLPOP a x",
            "WAIT 0 0",
            "XREAD BLOCK 0 STREAMS s 0",
        ] {
            check(line, 0, None);
        }
    }
}
