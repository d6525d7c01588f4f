//! `$` in XREAD: whatever is added to a stream from now on.
//!
//! Invariant: "now" is when the command was first issued. So that it means the same when the command
//! is issued again, at another node and later, the end of each such stream is asked for just before
//! the command, on the same line.

use slotmesh_resp::{Args, Parsed, RequestParser, write};

use super::spec::Request;

/// Before every entry.
const EMPTY: &[u8] = b"0-0";

/// A stream that is read from its end.
#[derive(Debug)]
pub(super) struct Tail {
    /// Index of the `$`.
    at: usize,
    key: Vec<u8>,
    /// The last entry's id, once it is known.
    id: Option<Vec<u8>>,
}

/// Those of one command. Most have none.
#[derive(Debug, Default)]
pub(super) struct Tails {
    all: Vec<Tail>,
    /// Answers to come.
    missing: usize,
}

impl Tails {
    pub(super) fn of(request: Request<'_>) -> Self {
        let streams = (1..request.len()).find(|at| request.is(*at, "streams"));
        let first = streams.map_or(request.len(), |at| at + 1);
        let count = (request.len() - first) / 2;
        let tail = |n: usize| Tail {
            at: first + count + n,
            key: request.arg(first + n).to_vec(),
            id: None,
        };
        let tails = (0..count).map(tail);
        Self {
            all: tails.filter(|tail| request.arg(tail.at) == b"$").collect(),
            missing: 0,
        }
    }

    /// The questions, if an end is not known yet.
    pub(super) fn ask(&mut self, out: &mut Vec<u8>) {
        self.missing = 0;
        if self.all.iter().all(|tail| tail.id.is_some()) {
            return;
        }
        self.missing = self.all.len();
        for tail in &self.all {
            let question: &[&[u8]] = &[b"XREVRANGE", &tail.key, b"+", b"-", b"COUNT", b"1"];
            write::encode_command(out, question);
        }
    }

    /// True if nothing has to be asked any more.
    pub(super) fn are_known(&self) -> bool {
        self.missing == 0 && self.all.iter().all(|tail| tail.id.is_some())
    }

    /// True if the next reply is the answer to a question.
    pub(super) fn is_asking(&self) -> bool {
        self.missing > 0
    }

    pub(super) fn answered(&mut self, reply: &[u8]) {
        let at = self.all.len() - self.missing;
        self.missing -= 1;
        if reply.first() == Some(&b'*') {
            // An array of one entry, which is an array that begins with the id.
            let id = reply.split(|b| *b == b'\n').nth(3);
            self.all[at].id = Some(id.map_or(EMPTY, <[u8]>::trim_ascii_end).to_vec());
        }
    }

    /// The command with ids instead of `$`, if all are known.
    pub(super) fn rewrite(&self, frame: &[u8]) -> Option<Vec<u8>> {
        if self.all.is_empty() || self.all.iter().any(|tail| tail.id.is_none()) {
            return None;
        }
        let mut args = Args::new();
        let Ok(Parsed::Complete { .. }) = RequestParser::new().parse(frame, &mut args) else {
            return None;
        };
        let mut out = Vec::with_capacity(frame.len() + 32 * self.all.len());
        write::write_array_header(&mut out, args.len());
        for (at, word) in args.iter(frame).enumerate() {
            let tail = self.all.iter().find(|tail| tail.at == at);
            let id = tail.and_then(|tail| tail.id.as_deref());
            write::write_bulk(&mut out, id.unwrap_or(word));
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(line: &str) -> Vec<u8> {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        let mut frame = Vec::new();
        write::encode_command(&mut frame, &words);
        frame
    }

    #[test]
    fn an_end_that_is_known_takes_the_place_of_its_sign() {
        let frame = encoded("XREAD BLOCK 0 STREAMS $ b c $ 7-1 $");
        let mut args = Args::new();
        RequestParser::new().parse(&frame, &mut args).unwrap();
        let mut tails = Tails::of(Request {
            frame: &frame,
            args: &args,
        });
        let mut asked = Vec::new();
        tails.ask(&mut asked);
        let mut want = encoded("XREVRANGE $ + - COUNT 1");
        want.extend(encoded("XREVRANGE c + - COUNT 1"));
        assert_eq!(asked, want);
        assert_eq!(tails.rewrite(&frame), None);
        tails.answered(b"*1\r\n*2\r\n$3\r\n5-2\r\n*2\r\n$1\r\nf\r\n$1\r\nv\r\n");
        assert!(tails.is_asking());
        tails.answered(b"*0\r\n");
        assert!(!tails.is_asking());
        let want = encoded("XREAD BLOCK 0 STREAMS $ b c 5-2 7-1 0-0");
        assert_eq!(tails.rewrite(&frame), Some(want));
    }
}
