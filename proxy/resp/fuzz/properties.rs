//! What must hold for any bytes at all. The fuzzer's targets call these functions with what they make
//! up; a test on the stable compiler calls them with the corpus.
//!
//! However the bytes are cut, the outcome is the same; a promise of "at least so many more" is kept;
//! what is found lies inside the frame and means the same when written anew; and memory is in
//! proportion to the bytes that are there, whatever lengths they announce.
#![allow(dead_code)] // each target calls one of them

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use slotmesh_resp::request::{
    BULK_BYTES_MAX, LINE_BYTES_MAX, UNAUTHENTICATED_BULK_BYTES_MAX, UNAUTHENTICATED_COUNT_MAX,
};
use slotmesh_resp::write::encode_command;
use slotmesh_resp::{
    Args, Limits, Parsed, Protocol, ProtocolError, ReplyKind, ReplyScanner, RequestParser, Scan,
    Value, rewrite_inline,
};

/// Any parser may take so much before it looks at the first byte.
const MEMORY_BASE: usize = 4 * 1024;
/// An argument of 6 bytes (`$0`, CRLF, CRLF) takes 8 in a list that doubles while its old half is alive.
const REQUEST_MEMORY: usize = 6;
/// One-letter words: two bytes of line make a vector in a list that doubles, and 7 bytes of frame.
const INLINE_MEMORY: usize = 96;
/// A null of 3 bytes makes a value of 32, in a list that doubles.
const VALUE_MEMORY: usize = 64;
/// Above this, bytes are not shown one by one to a new parser each time, which costs the square.
const SMALL_MAX: usize = 512;

/// The commands of a request stream, and how it ended.
#[derive(Debug, PartialEq, Eq, Default)]
struct Requests {
    commands: Vec<Vec<Vec<u8>>>,
    error: Option<ProtocolError>,
    left: usize,
}

/// Clients' bytes, before and after login.
pub(crate) fn requests(data: &[u8]) {
    for limits in [Limits::Authenticated, Limits::Unauthenticated] {
        let whole = read_requests([data], limits);
        assert_eq!(read_requests(data.chunks(1), limits), whole, "byte by byte");
        assert_eq!(read_requests(cut(data), limits), whole, "in pieces");
        for command in &whole.commands {
            check_limits(command, limits);
            check_rewritten(command);
        }
        if data.len() <= SMALL_MAX {
            a_new_parser_reads_on(data, limits);
        }
    }
    let taken = peak_of(|| {
        let (mut parser, mut args, mut rest) = (RequestParser::new(), Args::new(), data);
        while let Ok(
            Parsed::Complete { consumed }
            | Parsed::Inline { consumed }
            | Parsed::Empty { consumed },
        ) = parser.parse(rest, &mut args)
        {
            rest = &rest[consumed..];
        }
    });
    assert_in_proportion(taken, REQUEST_MEMORY, data.len());
}

fn read_requests<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, limits: Limits) -> Requests {
    let (mut parser, mut args, mut buf) = (RequestParser::new(), Args::new(), Vec::new());
    let (mut outcome, mut promised) = (Requests::default(), 0);
    for piece in pieces {
        buf.extend_from_slice(piece);
        let mut start = 0;
        loop {
            let rest = &buf[start..];
            let parsed = parser.parse_within(rest, &mut args, limits);
            let early = rest.len() < promised && !matches!(parsed, Ok(Parsed::Incomplete { .. }));
            assert!(
                !early,
                "{promised} bytes were said to be needed, {parsed:?} came of {}",
                rest.len()
            );
            promised = 0;
            let consumed = match parsed {
                Ok(Parsed::Complete { consumed }) => {
                    check_ranges(&args, consumed);
                    outcome
                        .commands
                        .push(args.iter(rest).map(<[u8]>::to_vec).collect());
                    consumed
                }
                Ok(Parsed::Inline { consumed }) => match words(&rest[..consumed]) {
                    Ok(words) => {
                        outcome.commands.push(words);
                        consumed
                    }
                    Err(error) => {
                        outcome.error = Some(error);
                        return outcome;
                    }
                },
                Ok(Parsed::Empty { consumed }) => consumed,
                Ok(Parsed::Incomplete { missing }) => {
                    assert!(missing > 0, "nothing is missing, and nothing is there");
                    // A wrong byte may be told at once, so only bodies are promised.
                    promised = if missing > 1 { rest.len() + missing } else { 0 };
                    break;
                }
                Err(error) => {
                    outcome.error = Some(error);
                    return outcome;
                }
            };
            assert!(parser.is_idle() && consumed > 0);
            start += consumed;
        }
        buf.drain(..start);
    }
    outcome.left = buf.len();
    outcome
}

/// Arguments lie inside the frame, one behind the other.
fn check_ranges(args: &Args, consumed: usize) {
    assert!(!args.is_empty());
    let mut behind = 0;
    for &(start, end) in args.ranges() {
        assert!(behind < start && start <= end && (end as usize) < consumed);
        behind = end;
    }
}

fn check_limits(command: &[Vec<u8>], limits: Limits) {
    let longest = command.iter().map(Vec::len).max().unwrap_or(0);
    let (count, bytes) = match limits {
        Limits::Authenticated => (usize::MAX, BULK_BYTES_MAX as usize),
        // Lines have no such limits, but are short.
        Limits::Unauthenticated if command.len() > UNAUTHENTICATED_COUNT_MAX as usize => {
            (LINE_BYTES_MAX, LINE_BYTES_MAX)
        }
        Limits::Unauthenticated => (
            LINE_BYTES_MAX,
            LINE_BYTES_MAX.max(UNAUTHENTICATED_BULK_BYTES_MAX as usize),
        ),
    };
    assert!(command.len() <= count && longest <= bytes);
}

/// What was read, written in the usual form, is read again as the same.
fn check_rewritten(command: &[Vec<u8>]) {
    if command.is_empty() {
        return; // a line of nothing but a form feed
    }
    let mut frame = Vec::new();
    let words: Vec<&[u8]> = command.iter().map(Vec::as_slice).collect();
    encode_command(&mut frame, &words);
    let again = read_requests([&frame[..]], Limits::Authenticated);
    assert_eq!(again.commands, [command]);
    assert_eq!((again.error, again.left), (None, 0));
}

/// Another process gets the bytes and not the parser: it must come to the same place.
fn a_new_parser_reads_on(data: &[u8], limits: Limits) {
    let (mut resumed, mut args, mut others) = (RequestParser::new(), Args::new(), Args::new());
    for end in 1..=data.len() {
        let parsed = resumed.parse_within(&data[..end], &mut args, limits);
        let fresh = RequestParser::new().parse_within(&data[..end], &mut others, limits);
        assert_eq!(parsed, fresh);
        if !matches!(parsed, Ok(Parsed::Incomplete { .. })) {
            if parsed.is_ok() {
                assert_eq!(args.ranges(), others.ranges());
            }
            return;
        }
    }
}

fn words(line: &[u8]) -> Result<Vec<Vec<u8>>, ProtocolError> {
    let (mut frame, mut args) = (Vec::new(), Args::new());
    rewrite_inline(line, &mut frame, &mut args)?;
    Ok(args.iter(&frame).map(<[u8]>::to_vec).collect())
}

/// One line, split into words; and any words, quoted so that they are split into themselves.
pub(crate) fn inline(data: &[u8]) {
    let mut result = Ok(());
    let taken = peak_of(|| {
        let (mut frame, mut args) = (Vec::new(), Args::new());
        result = rewrite_inline(data, &mut frame, &mut args);
    });
    assert_in_proportion(taken, INLINE_MEMORY, data.len());
    if result.is_ok() {
        let found = words(data).expect("it was split before");
        check_rewritten(&found);
        let bytes: usize = found.iter().map(Vec::len).sum();
        assert!(bytes <= data.len(), "escapes only shrink");
        assert_eq!(words(&quoted(&found)), Ok(found));
    }
    let made_up: Vec<Vec<u8>> = data
        .split(|&byte| byte == b' ')
        .map(<[u8]>::to_vec)
        .collect();
    assert_eq!(words(&quoted(&made_up)), Ok(made_up));
}

/// As `redis-cli` shows strings.
fn quoted(words: &[Vec<u8>]) -> Vec<u8> {
    let mut line = Vec::new();
    for word in words {
        line.extend_from_slice(b" \"");
        for &byte in word {
            match byte {
                b'"' | b'\\' => line.extend_from_slice(&[b'\\', byte]),
                b' '..=b'~' => line.push(byte),
                _ => line.extend_from_slice(format!("\\x{byte:02x}").as_bytes()),
            }
        }
        line.push(b'"');
    }
    line
}

type Replies = (Vec<(Vec<u8>, ReplyKind)>, Option<ProtocolError>);

/// Nodes' bytes: where replies end, also when their beginning has been sent on already.
pub(crate) fn replies(data: &[u8]) {
    let whole = read_replies([data]);
    assert_eq!(read_replies(data.chunks(1)), whole, "byte by byte");
    assert_eq!(read_replies(cut(data)), whole, "in pieces");
    assert_eq!(
        read_settled(data),
        whole,
        "what is settled is taken at once"
    );
    for (reply, kind) in &whole.0 {
        let first = reply.first().copied().unwrap_or_default();
        assert!(first == b'|' || reply_kind(first) == Some(*kind));
        match Value::decode(reply) {
            Ok(decoded) => assert_eq!(decoded.map(|(_, consumed)| consumed), Some(reply.len())),
            // The scanner does not look into lines, and needs no stack.
            Err(error) => assert!(matches!(
                error,
                ProtocolError::InvalidReplyLine
                    | ProtocolError::InvalidReplyLength
                    | ProtocolError::TooDeep
            )),
        }
    }
    let taken = peak_of(|| {
        let _ = ReplyScanner::new().scan(data);
    });
    assert_eq!(taken, 0, "scanning allocates");
}

fn reply_kind(first: u8) -> Option<ReplyKind> {
    let mut scanner = ReplyScanner::new();
    // Its first byte, and what makes a whole line of it for every type.
    let _ = scanner.scan(&[first, b'4', b'\r', b'\n']);
    scanner.kind().or(match first {
        b'+' => Some(ReplyKind::Simple),
        b'-' => Some(ReplyKind::Error),
        b':' => Some(ReplyKind::Int),
        b'_' => Some(ReplyKind::Null),
        b'#' => Some(ReplyKind::Bool),
        b',' => Some(ReplyKind::Double),
        b'(' => Some(ReplyKind::BigNumber),
        _ => None,
    })
}

fn read_replies<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Replies {
    let (mut scanner, mut buf, mut replies) = (ReplyScanner::new(), Vec::new(), Vec::new());
    let mut promised = 0;
    for piece in pieces {
        buf.extend_from_slice(piece);
        let mut start = 0;
        loop {
            let rest = &buf[start..];
            let scan = scanner.scan(rest);
            let early = rest.len() < promised && !matches!(scan, Ok(Scan::Incomplete { .. }));
            assert!(
                !early,
                "{promised} bytes were said to be needed, {scan:?} came of {}",
                rest.len()
            );
            promised = 0;
            match scan {
                Ok(Scan::Complete { consumed, kind }) => {
                    assert!(scanner.is_idle() && consumed > 0);
                    replies.push((rest[..consumed].to_vec(), kind));
                    start += consumed;
                }
                Ok(Scan::Incomplete { missing }) => {
                    assert!(missing > 0, "nothing is missing, and nothing is there");
                    promised = if missing > 1 { rest.len() + missing } else { 0 };
                    break;
                }
                Err(error) => return (replies, Some(error)),
            }
        }
        buf.drain(..start);
    }
    (replies, None)
}

/// Byte by byte, and all that is settled leaves the buffer at once.
fn read_settled(data: &[u8]) -> Replies {
    let (mut scanner, mut buf, mut replies) = (ReplyScanner::new(), Vec::new(), Vec::new());
    let mut taken = Vec::new();
    for &byte in data {
        buf.push(byte);
        match scanner.scan(&buf) {
            Ok(Scan::Complete { consumed, kind }) => {
                assert_eq!(consumed, buf.len());
                taken.append(&mut buf);
                replies.push((std::mem::take(&mut taken), kind));
            }
            Ok(Scan::Incomplete { .. }) => {
                let settled = scanner.settled(buf.len());
                scanner.discard(settled);
                taken.extend(buf.drain(..settled));
            }
            Err(error) => return (replies, Some(error)),
        }
    }
    (replies, None)
}

/// Owned replies: read as far as the scanner reads, and equal to what is read of their writing.
pub(crate) fn values(data: &[u8]) {
    let mut decoded = Ok(None);
    let taken = peak_of(|| decoded = Value::decode(data));
    assert_in_proportion(taken, VALUE_MEMORY, data.len());
    let scan = ReplyScanner::new().scan(data);
    match &decoded {
        Ok(None) => assert!(matches!(scan, Ok(Scan::Incomplete { .. }))),
        Ok(Some((value, end))) => {
            assert!(matches!(scan, Ok(Scan::Complete { consumed, .. }) if consumed == *end));
            check_written(value);
        }
        Err(error) => assert!(
            scan == Err(*error) || matches!(scan, Ok(Scan::Complete { .. })),
            "{error} of bytes that are not there yet"
        ),
    }
}

fn check_written(value: &Value) {
    for protocol in [Protocol::Resp2, Protocol::Resp3] {
        let mut written = Vec::new();
        value.encode(&mut written, protocol);
        let (again, consumed) = Value::decode(&written)
            .expect("what we write can be read")
            .expect("and is whole");
        assert_eq!(consumed, written.len());
        let mut rewritten = Vec::new();
        again.encode(&mut rewritten, protocol);
        assert!(
            written == rewritten,
            "{protocol:?} is not stable: {value:?}"
        );
    }
}

/// Pieces whose lengths follow from the bytes themselves, so that a finding can be repeated.
fn cut(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut state = data.iter().fold(data.len() as u64, |state, &byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut rest = data;
    std::iter::from_fn(move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let len = ((state >> 40) as usize % 24 + 1).min(rest.len());
        let (piece, after) = rest.split_at(len);
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

fn assert_in_proportion(taken: usize, factor: usize, len: usize) {
    assert!(
        taken <= MEMORY_BASE + factor * len,
        "{len} bytes of input took {taken} bytes of memory"
    );
}

/// Counts what a thread has allocated and not freed.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The most that `work` held at one time, above what was there before.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    work();
    usize::try_from(PEAK.get() - before).expect("the peak is no valley")
}

fn note(bytes: isize) {
    // At a thread's end its counters are gone before its last memory is.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

#[allow(unsafe_code)] // an allocator is unsafe by its nature, and nothing else measures memory exactly
// SAFETY: every call is the system allocator's own; counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: the caller's promises are passed on unchanged.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        note(-(layout.size() as isize));
        // SAFETY: the caller's promises are passed on unchanged.
        unsafe { System.dealloc(memory, layout) }
    }
}
