//! Requests: Redis's texts for bad ones, and the same answer however the bytes are cut.

use proptest::prelude::*;

use super::*;

/// Everything a stream of bytes amounts to: its commands, then its error or its incomplete rest.
#[derive(Debug, PartialEq)]
struct Outcome {
    commands: Vec<Vec<Vec<u8>>>,
    error: Option<ProtocolError>,
    left: usize,
}

/// Feeds `pieces` one after the other, as a connection would.
fn feed<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, limits: Limits) -> Outcome {
    let (mut parser, mut args, mut buf) = (RequestParser::new(), Args::new(), Vec::new());
    let (mut line_frame, mut line_args) = (Vec::new(), Args::new());
    let mut outcome = Outcome {
        commands: Vec::new(),
        error: None,
        left: 0,
    };
    for piece in pieces {
        buf.extend_from_slice(piece);
        let mut start = 0;
        loop {
            match parser.parse_within(&buf[start..], &mut args, limits) {
                Ok(Parsed::Complete { consumed }) => {
                    assert!(!args.is_empty());
                    let command = args.iter(&buf[start..]).map(<[u8]>::to_vec).collect();
                    outcome.commands.push(command);
                    start += consumed;
                }
                Ok(Parsed::Inline { consumed }) => {
                    let line = &buf[start..start + consumed];
                    match crate::rewrite_inline(line, &mut line_frame, &mut line_args) {
                        Ok(()) => {
                            let command = line_args.iter(&line_frame).map(<[u8]>::to_vec).collect();
                            outcome.commands.push(command);
                        }
                        Err(error) => {
                            outcome.error = Some(error);
                            return outcome;
                        }
                    }
                    start += consumed;
                }
                Ok(Parsed::Empty { consumed }) => start += consumed,
                Ok(Parsed::Incomplete { missing }) => {
                    assert!(missing > 0);
                    break;
                }
                Err(error) => {
                    outcome.error = Some(error);
                    return outcome;
                }
            }
            assert!(parser.is_idle());
        }
        buf.drain(..start);
    }
    outcome.left = buf.len();
    outcome
}

fn whole(bytes: &[u8]) -> Outcome {
    feed([bytes], Limits::Authenticated)
}

fn bytewise(bytes: &[u8]) -> Outcome {
    feed(bytes.chunks(1), Limits::Authenticated)
}

#[test]
fn commands_are_found_in_place() {
    let bytes = b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*1\r\n$4\r\nPING\r\n";
    let (mut parser, mut args) = (RequestParser::new(), Args::new());
    assert_eq!(
        parser.parse(bytes, &mut args),
        Ok(Parsed::Complete { consumed: 20 })
    );
    assert_eq!(args.ranges(), [(8, 11), (17, 18)]);
    assert_eq!(args.get(bytes, 0), Some(&b"GET"[..]));
    assert_eq!(args.get(bytes, 2), None);
    assert_eq!(
        parser.parse(&bytes[20..], &mut args),
        Ok(Parsed::Complete { consumed: 14 })
    );
    assert_eq!(args.get(&bytes[20..], 0), Some(&b"PING"[..]));
}

#[test]
fn every_error_has_the_text_of_redis() {
    let long = "a".repeat(LINE_BYTES_MAX + 1);
    let cases: &[(&str, &str)] = &[
        ("*3000000000\r\n", "invalid multibulk length"),
        ("*1048577\r\n", "invalid multibulk length"),
        ("*x\r\n", "invalid multibulk length"),
        ("*01\r\n", "invalid multibulk length"),
        ("*+1\r\n", "invalid multibulk length"),
        ("*\r\n", "invalid multibulk length"),
        ("*1\r\n$-1\r\n", "invalid bulk length"),
        ("*1\r\n$-10\r\n", "invalid bulk length"),
        ("*1\r\n$536870913\r\n", "invalid bulk length"),
        ("*1\r\n$99999999999999999999\r\n", "invalid bulk length"),
        (
            "*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$blabla\r\n",
            "invalid bulk length",
        ),
        (
            "*3\r\n$3\r\nSET\r\n$1\r\nx\r\nfooz\r\n",
            "expected '$', got 'f'",
        ),
        ("*1\r\nfoo\r\n", "expected '$', got 'f'"),
        ("*1\r\n\r\n", "expected '$', got ' '"),
        (
            "set \"\"\"test\"\"\" test\r\n",
            "unbalanced quotes in request",
        ),
        (&long, "too big inline request"),
        (&format!("*{long}"), "too big mbulk count string"),
        (&format!("*1\r\n${long}"), "too big bulk count string"),
    ];
    for (bytes, text) in cases {
        let shown: String = bytes.chars().take(40).collect();
        for outcome in [whole(bytes.as_bytes()), bytewise(bytes.as_bytes())] {
            let error = outcome
                .error
                .unwrap_or_else(|| panic!("{shown:?} is accepted"));
            assert_eq!(
                error.to_string(),
                format!("Protocol error: {text}"),
                "{shown:?}"
            );
        }
    }
}

#[test]
fn a_line_is_too_long_with_or_without_its_end() {
    let mut ended = vec![b'a'; LINE_BYTES_MAX];
    ended.push(b'\n');
    assert_eq!(whole(&ended).error, None);
    assert_eq!(bytewise(&ended).error, None);
    ended.insert(0, b'a');
    assert_eq!(whole(&ended).error, Some(ProtocolError::TooBigInline));
    assert_eq!(bytewise(&ended).error, Some(ProtocolError::TooBigInline));
}

#[test]
fn strangers_get_small_frames_only() {
    let many = b"*11\r\n";
    let big = b"*1\r\n$16385\r\n";
    assert_eq!(
        feed([&many[..]], Limits::Unauthenticated).error,
        Some(ProtocolError::UnauthenticatedMultibulkLength)
    );
    assert_eq!(
        feed([&big[..]], Limits::Unauthenticated).error,
        Some(ProtocolError::UnauthenticatedBulkLength)
    );
    assert_eq!(
        feed([&many[..], big], Limits::Authenticated)
            .error
            .map(|_| ()),
        Some(())
    );
    assert_eq!(
        feed([&b"*10\r\n$16384\r\n"[..]], Limits::Unauthenticated).error,
        None
    );
}

#[test]
fn requests_for_nothing_are_skipped() {
    for bytes in ["*0\r\n", "*-1\r\n", "*-10\r\n", "\r\n", "\n", "  \t \r\n"] {
        let bytes = format!("{bytes}PING\r\n{bytes}");
        for outcome in [whole(bytes.as_bytes()), bytewise(bytes.as_bytes())] {
            assert_eq!(outcome.commands, [[b"PING".to_vec()]], "{bytes:?}");
            assert_eq!((outcome.error, outcome.left), (None, 0), "{bytes:?}");
        }
    }
}

#[test]
fn a_huge_count_takes_no_memory_before_its_arguments_come() {
    let (mut parser, mut args) = (RequestParser::new(), Args::new());
    let parsed = parser.parse(b"*1048576\r\n", &mut args);
    assert_eq!(parsed, Ok(Parsed::Incomplete { missing: 1 }));
    assert!(args.ranges.capacity() < 64);
}

#[test]
fn a_big_body_in_small_pieces_is_counted_down_not_searched() {
    let head = b"*2\r\n$3\r\nSET\r\n$536870912\r\n";
    let (mut parser, mut args) = (RequestParser::new(), Args::new());
    let parsed = parser.parse(head, &mut args);
    assert_eq!(
        parsed,
        Ok(Parsed::Incomplete {
            missing: 536_870_914
        })
    );
    let more = [&head[..], &[b'x'; 1000]].concat();
    assert_eq!(
        parser.parse(&more, &mut args),
        Ok(Parsed::Incomplete {
            missing: 536_869_914
        })
    );
}

#[test]
fn a_frame_is_refused_when_it_announces_more_than_the_bound() {
    // The announcing line stands just below the bound; what is before it does not matter here.
    let at = FRAME_BYTES_MAX as usize - 50;
    assert_eq!(position(at), Ok(FRAME_BYTES_MAX - 50));
    assert_eq!(position(at + 51), Err(ProtocolError::TooBigRequest));
    assert_eq!(position(usize::MAX), Err(ProtocolError::TooBigRequest));
}

#[test]
fn a_fresh_parser_continues_from_the_bytes_alone() {
    let bytes = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nhello\r\n";
    for cut in 0..bytes.len() {
        let (mut first, mut args) = (RequestParser::new(), Args::new());
        first.parse(&bytes[..cut], &mut args).unwrap();
        // Another process: only the bytes went over.
        let mut second = RequestParser::new();
        second.parse(&bytes[..cut], &mut args).unwrap();
        assert_eq!(first, second, "cut at {cut}");
        let parsed = second.parse(bytes, &mut args);
        assert_eq!(
            parsed,
            Ok(Parsed::Complete {
                consumed: bytes.len()
            }),
            "cut at {cut}"
        );
        assert_eq!(args.get(bytes, 2), Some(&b"hello"[..]), "cut at {cut}");
    }
}

#[test]
fn one_huge_command_does_not_pin_its_argument_list() {
    let (mut parser, mut args) = (RequestParser::new(), Args::new());
    let mut bytes = b"*200000\r\n".to_vec();
    for _ in 0..200_000 {
        bytes.extend_from_slice(b"$1\r\nx\r\n");
    }
    parser.parse(&bytes, &mut args).unwrap();
    assert_eq!(args.len(), 200_000);
    parser.parse(b"PING\r\n", &mut args).unwrap();
    assert!(args.ranges.capacity() <= Args::RETAINED_MAX);
}

fn command() -> impl Strategy<Value = Vec<u8>> {
    let arg = proptest::collection::vec(any::<u8>(), 0..40);
    proptest::collection::vec(arg, 1..8).prop_map(|args| {
        let mut frame = Vec::new();
        let args: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
        crate::write::encode_command(&mut frame, &args);
        frame
    })
}

/// Bytes that are mostly RESP: noise alone rarely gets past the first line.
fn almost_resp() -> impl Strategy<Value = Vec<u8>> {
    let token = prop_oneof![
        4 => command(),
        1 => Just(b"*".to_vec()),
        1 => Just(b"$".to_vec()),
        2 => Just(b"\r\n".to_vec()),
        1 => Just(b"*2\r\n".to_vec()),
        1 => Just(b"$3\r\n".to_vec()),
        1 => Just(b"get \"a b\" 'c\\'' \"\\x41\"\r\n".to_vec()),
        1 => (-3i64..2000).prop_map(|n| n.to_string().into_bytes()),
        1 => proptest::collection::vec(any::<u8>(), 0..6),
    ];
    proptest::collection::vec(token, 0..12).prop_map(|tokens| tokens.concat())
}

proptest! {
    #[test]
    fn pieces_do_not_matter(bytes in almost_resp(), cuts in proptest::collection::vec(1usize..40, 1..50)) {
        let mut pieces = Vec::new();
        let (mut rest, mut cuts) = (&bytes[..], cuts.iter().cycle());
        while let Some(&cut) = cuts.next().filter(|_| !rest.is_empty()) {
            let (piece, after) = rest.split_at(cut.min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        let expected = whole(&bytes);
        prop_assert_eq!(&feed(pieces, Limits::Authenticated), &expected);
        prop_assert_eq!(&bytewise(&bytes), &expected);
    }

    #[test]
    fn what_was_encoded_is_read_back(args in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..20)) {
        let mut frame = Vec::new();
        let slices: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
        crate::write::encode_command(&mut frame, &slices);
        let outcome = whole(&frame);
        prop_assert_eq!(outcome.commands, vec![args]);
        prop_assert_eq!(outcome.left, 0);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        whole(&bytes);
        bytewise(&bytes);
    }
}
