//! Replies of both protocols: where they end, what they are, and never by how they were cut.

use proptest::prelude::*;

use super::*;

const SAMPLES: &[(&str, ReplyKind)] = &[
    ("+OK\r\n", ReplyKind::Simple),
    ("+\r\n", ReplyKind::Simple),
    ("-ERR no\r\n", ReplyKind::Error),
    (":1234\r\n", ReplyKind::Int),
    ("$-1\r\n", ReplyKind::Bulk),
    ("$0\r\n\r\n", ReplyKind::Bulk),
    ("$4\r\na\r\nb\r\n", ReplyKind::Bulk),
    ("*-1\r\n", ReplyKind::Array),
    ("*0\r\n", ReplyKind::Array),
    ("*2\r\n$1\r\na\r\n:5\r\n", ReplyKind::Array),
    (
        "*2\r\n*1\r\n*1\r\n*0\r\n*2\r\n+a\r\n-b\r\n",
        ReplyKind::Array,
    ),
    ("_\r\n", ReplyKind::Null),
    ("#t\r\n", ReplyKind::Bool),
    (",3.25\r\n", ReplyKind::Double),
    (",inf\r\n", ReplyKind::Double),
    (
        "(3492890328409238509324850943850943825024385\r\n",
        ReplyKind::BigNumber,
    ),
    ("=15\r\ntxt:Some string\r\n", ReplyKind::Verbatim),
    ("!10\r\nERR a\r\nbcd\r\n", ReplyKind::BlobError),
    ("%2\r\n+a\r\n:1\r\n+b\r\n*1\r\n:2\r\n", ReplyKind::Map),
    ("~2\r\n+a\r\n+b\r\n", ReplyKind::Set),
    (
        ">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n",
        ReplyKind::Push,
    ),
    ("|1\r\n+ttl\r\n:3600\r\n$1\r\nv\r\n", ReplyKind::Bulk),
    ("|1\r\n+k\r\n*1\r\n*1\r\n:1\r\n-ERR x\r\n", ReplyKind::Error),
    ("|0\r\n|1\r\n+a\r\n+b\r\n:7\r\n", ReplyKind::Int),
    ("*2\r\n|1\r\n+ttl\r\n:1\r\n:1\r\n:2\r\n", ReplyKind::Array),
];

/// Feeds pieces and lists the replies that were found, and the error that ended it.
fn feed<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<(Vec<u8>, ReplyKind)>, Option<ProtocolError>) {
    let (mut scanner, mut buf, mut replies) = (ReplyScanner::new(), Vec::new(), Vec::new());
    for piece in pieces {
        buf.extend_from_slice(piece);
        let mut start = 0;
        loop {
            match scanner.scan(&buf[start..]) {
                Ok(Scan::Complete { consumed, kind }) => {
                    assert!(scanner.is_idle());
                    replies.push((buf[start..start + consumed].to_vec(), kind));
                    start += consumed;
                }
                Ok(Scan::Incomplete { missing }) => {
                    assert!(missing > 0);
                    break;
                }
                Err(error) => return (replies, Some(error)),
            }
        }
        buf.drain(..start);
    }
    (replies, None)
}

#[test]
fn every_type_ends_where_it_ends() {
    for (text, kind) in SAMPLES {
        let expected = vec![(text.as_bytes().to_vec(), *kind)];
        assert_eq!(
            feed([text.as_bytes()]),
            (expected.clone(), None),
            "{text:?}"
        );
        assert_eq!(
            feed(text.as_bytes().chunks(1)),
            (expected, None),
            "{text:?} by byte"
        );
        for cut in 1..text.len() {
            let mut scanner = ReplyScanner::new();
            let scan = scanner.scan(&text.as_bytes()[..cut]).unwrap();
            assert!(
                matches!(scan, Scan::Incomplete { .. }),
                "{text:?} cut at {cut}: {scan:?}"
            );
        }
    }
}

#[test]
fn replies_follow_each_other_without_a_gap() {
    let all: String = SAMPLES.iter().map(|(text, _)| *text).collect();
    let expected: Vec<_> = SAMPLES
        .iter()
        .map(|(text, kind)| (text.as_bytes().to_vec(), *kind))
        .collect();
    assert_eq!(feed([all.as_bytes()]), (expected.clone(), None));
    for size in 1..40 {
        assert_eq!(
            feed(all.as_bytes().chunks(size)),
            (expected.clone(), None),
            "by {size}"
        );
    }
}

#[test]
fn streamed_types_are_refused_at_once() {
    // RESP3 has them, no engine sends them: waiting for their end would be waiting for ever.
    for text in [
        "$?\r\n",
        "*?\r\n",
        "%?\r\n",
        "~?\r\n",
        ">?\r\n",
        "*1\r\n$?\r\n",
    ] {
        for (replies, error) in [feed([text.as_bytes()]), feed(text.as_bytes().chunks(1))] {
            assert!(replies.is_empty());
            assert_eq!(error, Some(ProtocolError::InvalidReplyLength), "{text:?}");
        }
    }
    for text in [";4\r\nabcd\r\n", ".\r\n", "*1\r\n.\r\n"] {
        let (_, error) = feed([text.as_bytes()]);
        assert!(
            matches!(error, Some(ProtocolError::UnknownReplyType(_))),
            "{text:?}"
        );
    }
}

#[test]
fn an_attribute_is_part_of_what_it_is_about() {
    let attribute = "|2\r\n+a\r\n%1\r\n+b\r\n*0\r\n*1\r\n+c\r\n|1\r\n+d\r\n+e\r\n+f\r\n";
    let cases = [
        (format!("{attribute}$1\r\nv\r\n"), ReplyKind::Bulk),
        (format!("{attribute}{attribute}-ERR\r\n"), ReplyKind::Error),
        (format!("{attribute}>1\r\n+x\r\n"), ReplyKind::Push),
        (format!("{attribute}*0\r\n"), ReplyKind::Array),
        (
            format!("*2\r\n{attribute}:1\r\n{attribute}:2\r\n"),
            ReplyKind::Array,
        ),
        (
            format!("%1\r\n{attribute}+k\r\n{attribute}+v\r\n"),
            ReplyKind::Map,
        ),
    ];
    for (text, kind) in cases {
        let reply = (text.clone().into_bytes(), kind);
        let expected = (vec![reply.clone(), reply], None);
        let twice = text.repeat(2);
        assert_eq!(feed([twice.as_bytes()]), expected, "{text:?}");
        assert_eq!(
            feed(twice.as_bytes().chunks(1)),
            expected,
            "{text:?} by byte"
        );
    }
}

#[test]
fn bytes_that_are_no_reply_are_an_error() {
    let cases = [
        ("x\r\n", ProtocolError::UnknownReplyType(b'x')),
        ("\r\n", ProtocolError::UnknownReplyType(b'\r')),
        ("*1\r\n@", ProtocolError::UnknownReplyType(b'@')),
        ("$-2\r\n", ProtocolError::InvalidReplyLength),
        ("$x\r\n", ProtocolError::InvalidReplyLength),
        ("$?\r\n", ProtocolError::InvalidReplyLength),
        ("$4294967296\r\n", ProtocolError::InvalidReplyLength),
        ("*-2\r\n", ProtocolError::InvalidReplyLength),
        ("%-1\r\n", ProtocolError::InvalidReplyLength),
        ("~-1\r\n", ProtocolError::InvalidReplyLength),
        ("+OK\rx", ProtocolError::InvalidReplyLine),
    ];
    for (text, error) in cases {
        assert_eq!(feed([text.as_bytes()]).1, Some(error), "{text:?}");
        assert_eq!(
            feed(text.as_bytes().chunks(1)).1,
            Some(error),
            "{text:?} by byte"
        );
    }
}

#[test]
fn endless_nesting_costs_no_stack_and_endless_counts_no_memory() {
    let deep = b"*1\r\n".repeat(1_000_000);
    let scan = ReplyScanner::new().scan(&deep);
    assert_eq!(scan, Ok(Scan::Incomplete { missing: 1 }));
    let wide = b"*4294967295\r\n".repeat(1000);
    assert_eq!(
        ReplyScanner::new().scan(&wide),
        Ok(Scan::Incomplete { missing: 1 })
    );
}

#[test]
fn a_big_body_is_skipped_by_its_length() {
    let mut scanner = ReplyScanner::new();
    let mut buf = b"$1000000\r\n".to_vec();
    assert_eq!(
        scanner.scan(&buf),
        Ok(Scan::Incomplete { missing: 1_000_002 })
    );
    assert_eq!(scanner.kind(), Some(ReplyKind::Bulk));
    buf.resize(500_010, b'x');
    assert_eq!(
        scanner.scan(&buf),
        Ok(Scan::Incomplete { missing: 500_002 })
    );
}

#[test]
fn what_was_sent_on_early_need_not_be_kept() {
    let reply = b"*2\r\n$10\r\n0123456789\r\n:1\r\n+OK\r\n";
    for cut in 1..reply.len() - 5 {
        let mut scanner = ReplyScanner::new();
        let mut buf = reply[..cut].to_vec();
        if let Scan::Complete { consumed, .. } = scanner.scan(&buf).unwrap() {
            assert_eq!(consumed, 25);
            continue;
        }
        let settled = scanner.settled(buf.len());
        buf.drain(..settled);
        scanner.discard(settled);
        buf.extend_from_slice(&reply[cut..]);
        let scan = scanner.scan(&buf).unwrap();
        let expected = Scan::Complete {
            consumed: 25 - settled,
            kind: ReplyKind::Array,
        };
        assert_eq!(scan, expected, "cut at {cut}");
    }
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let samples: Vec<Vec<u8>> = SAMPLES
        .iter()
        .map(|(text, _)| text.as_bytes().to_vec())
        .collect();
    prop_oneof![
        3 => proptest::sample::select(samples),
        1 => proptest::collection::vec(any::<u8>(), 0..50).prop_map(|body| {
            let mut out = Vec::new();
            crate::write::write_bulk(&mut out, &body);
            out
        }),
        1 => proptest::sample::select(vec![b"*3\r\n".to_vec(), b"|1\r\n".to_vec(), b"%1\r\n".to_vec()]),
        1 => proptest::collection::vec(any::<u8>(), 0..4),
    ]
}

proptest! {
    #[test]
    fn pieces_do_not_matter(frames in proptest::collection::vec(frame(), 0..12), size in 1usize..30) {
        let bytes = frames.concat();
        let expected = feed([&bytes[..]]);
        prop_assert_eq!(&feed(bytes.chunks(size)), &expected);
        prop_assert_eq!(&feed(bytes.chunks(1)), &expected);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        feed([&bytes[..]]);
    }
}
