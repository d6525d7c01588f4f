//! The request parser against a real engine: the same bytes, the same commands, the same error.
//!
//! The engine is asked through ECHO and through bad input, since what it answers shows how it read.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::Path;

use slotmesh_engine::Engine;
use slotmesh_resp::{Args, Limits, Parsed, RequestParser, rewrite_inline, write};

/// Everything that the engine answers to these bytes, which nothing follows, or QUIT.
fn answers(engine: &Engine, bytes: &[u8], end: &[u8]) -> Vec<u8> {
    let mut stream = engine.connect();
    // It may close before it has read everything; what it said is there all the same.
    let _ = stream.write_all(&[bytes, end].concat());
    if end.is_empty() {
        // What is not whole would be waited for.
        stream.shutdown(Shutdown::Write).unwrap();
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

const QUIT: &[u8] = b"*1\r\n$4\r\nQUIT\r\n";

/// What an engine that knows only ECHO and QUIT would answer, reading with our parser.
fn our_answers(bytes: &[u8], end: &[u8], limits: Limits) -> Vec<u8> {
    let bytes = [bytes, end].concat();
    let (mut parser, mut args, mut rest) = (RequestParser::new(), Args::new(), &bytes[..]);
    let (mut answers, mut line) = (Vec::new(), Vec::new());
    loop {
        let mut frame = rest;
        let parsed = parser
            .parse_within(rest, &mut args, limits)
            .and_then(|parsed| {
                if let Parsed::Inline { consumed } = parsed {
                    rewrite_inline(&rest[..consumed], &mut line, &mut args)?;
                    frame = &line;
                }
                Ok(parsed)
            });
        let consumed = match parsed {
            Ok(Parsed::Complete { consumed } | Parsed::Inline { consumed }) => consumed,
            Ok(Parsed::Empty { consumed }) => {
                rest = &rest[consumed..];
                continue;
            }
            Ok(Parsed::Incomplete { .. }) => return answers,
            Err(error) => {
                write::write_error(&mut answers, error.reply());
                return answers;
            }
        };
        let args: Vec<&[u8]> = args.iter(frame).collect();
        match args.as_slice() {
            [name, word] if name.eq_ignore_ascii_case(b"echo") => {
                write::write_bulk(&mut answers, word);
            }
            [name, ..] if name.eq_ignore_ascii_case(b"echo") => {
                let text = "ERR wrong number of arguments for 'echo' command";
                write::write_error(&mut answers, text);
            }
            [name, ..] if name.eq_ignore_ascii_case(b"quit") => {
                write::write_simple(&mut answers, "OK");
                return answers;
            }
            [name, words @ ..] => {
                let mut text = [b"ERR unknown command '", *name].concat();
                text.extend_from_slice(b"', with args beginning with: ");
                for word in words {
                    text.extend_from_slice(&[b"'", *word, b"' "].concat());
                }
                write::write_error(&mut answers, text);
            }
            [] => {} // a line of other white space than blanks
        }
        rest = &rest[consumed..];
    }
}

/// Compares what both say, with the bytes shown as text.
fn check(engine: &Engine, request: &[u8], end: &[u8], limits: Limits) {
    let shown = |bytes: &[u8]| bytes.escape_ascii().to_string();
    let request_shown = shown(&request[..request.len().min(60)]);
    let (ours, theirs) = (
        our_answers(request, end, limits),
        answers(engine, request, end),
    );
    if ours.len().max(theirs.len()) < 1000 {
        assert_eq!(shown(&ours), shown(&theirs), "{request_shown}");
    }
    assert!(
        ours == theirs,
        "{request_shown}: {} and {} bytes",
        ours.len(),
        theirs.len()
    );
}

#[test]
fn the_engine_reads_every_request_as_we_do() {
    let engine = Engine::start();
    // Whether the engine minds a line of little more than 64 KiB depends on how its reads cut it; of
    // this one it sees more than that before it sees the end.
    let long = "a".repeat(300_000);
    let echo = "*2\r\n$4\r\nECHO\r\n";
    let requests = [
        format!("{echo}$2\r\nhi\r\n"),
        format!("{echo}$0\r\n\r\n"),
        format!("*0\r\n*-1\r\n*-7\r\n\r\n\n{echo}$2\r\nhi\r\n"),
        // What Redis does not check: the bytes behind a line's CR and behind a body.
        format!("{echo}$2\rXhiYZ{echo}$1\r\nx\r\n"),
        "*2\rX$4\rXECHOXX$1\rXaXX".to_owned(),
        "echo hi\r\necho there\n  ECHO   x  \r\n".to_owned(),
        "echo \"a b\"\necho 'a b'\necho \"\\x41\\n\\\"\"\necho '\\''\necho pre\"x y\"\n".to_owned(),
        "echo \"\\xzz\"\necho \"\"\necho ''\necho a\\nb\necho \"\\a\\b\\t\\r\\q\"\n".to_owned(),
        "echo \"a\"b\n".to_owned(),
        "echo \"a\n".to_owned(),
        "echo 'a\n".to_owned(),
        "echo a\x0bb\n".to_owned(),
        "*3000000000\r\n".to_owned(),
        "*x\r\n".to_owned(),
        "*01\r\n".to_owned(),
        "*+1\r\n".to_owned(),
        "*\r\n".to_owned(),
        "* 1\r\n".to_owned(),
        "*-0\r\n".to_owned(),
        "*99999999999999999999\r\n".to_owned(),
        format!("{echo}$-1\r\n"),
        format!("{echo}$x\r\n"),
        format!("{echo}$536870913\r\n"),
        format!("{echo}$02\r\nhi\r\n"),
        format!("{echo}$ 2\r\nhi\r\n"),
        format!("{echo}fooz\r\n"),
        format!("{echo}\r\n"),
        format!("{echo}$2\r\nhi\r\n*1\r\n:1\r\n"),
        long.clone(),
        format!("*{long}"),
        format!("{echo}${long}"),
        format!("{echo}${}\r\n{long}\r\n", long.len()),
    ];
    for request in &requests {
        check(&engine, request.as_bytes(), QUIT, Limits::Authenticated);
    }
}

/// Numbers that a count or a length may be given as.
const NUMBERS: &[&str] = &[
    "",
    "-",
    "+",
    " ",
    "-0",
    "+0",
    "+1",
    "00",
    "01",
    "1 ",
    " 1",
    "1a",
    "0x1",
    "1e0",
    "1.0",
    "\t1",
    "-1",
    "-2",
    "-2147483648",
    "-2147483649",
    "-9223372036854775808",
    "-9223372036854775809",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "99999999999999999999999999999999999999",
    "?",
    "*",
    "$",
];

#[test]
fn hostile_numbers_are_answered_as_the_engine_answers_them() {
    let engine = Engine::start();
    for number in NUMBERS {
        for request in [
            format!("*{number}\r\n"),
            format!("*2\r\n$4\r\nECHO\r\n${number}\r\n"),
            format!("*1\r\n${number}\r\nECHO\r\n"),
            format!("*2\r\n$4\r\nECHO\r\n$2\r\nhi\r\n*{number}\r\n"),
        ] {
            check(&engine, request.as_bytes(), b"", Limits::Authenticated);
        }
    }
    // The bound of a body, and one more.
    for length in ["536870912", "536870913"] {
        let request = format!("*2\r\n$4\r\nECHO\r\n${length}\r\nx");
        check(&engine, request.as_bytes(), b"", Limits::Authenticated);
    }
    // Redis 6.2 refuses what Redis 7.0 waits for, and a node of either may be behind us.
    for count in ["1048577", "2147483647"] {
        let request = format!("*{count}\r\n");
        assert!(answers(&engine, request.as_bytes(), b"").is_empty());
        let ours = our_answers(request.as_bytes(), b"", Limits::Authenticated);
        assert_eq!(ours, b"-ERR Protocol error: invalid multibulk length\r\n");
    }
}

#[test]
fn a_wrong_type_byte_is_repeated_as_the_engine_repeats_it() {
    let engine = Engine::start();
    // To Redis a zero byte is the end of what has come, so it waits for more; we do not.
    for byte in 1..=u8::MAX {
        // An argument of another type, also of RESP3, and a nested array.
        let mut request = b"*2\r\n$4\r\nECHO\r\n_1\r\n$1\r\na\r\n".to_vec();
        request[14] = byte;
        if byte != b'$' {
            check(&engine, &request, b"", Limits::Authenticated);
        }
    }
}

#[test]
fn a_line_that_is_no_array_is_a_command() {
    let engine = Engine::start();
    for line in [
        "$4\r\n",
        ":1\r\n",
        "+OK\r\n",
        "-ERR\r\n",
        "_\r\n",
        "#t\r\n",
        "%1\r\n",
        "~1\r\n",
        ">1\r\n",
        "|1\r\n",
        "(1\r\n",
        "!1\r\n",
        "=1\r\n",
        ",1\r\n",
        "$?\r\n",
        "\x0c\r\n",
        "\x0b\n",
        "\r\r\n",
        "a\rb\n",
        "\"\"\n",
        "\"\\x0\"\n",
        "\"\\",
        "'\\'\n",
        "\"a\"\x0b\n",
        "\"a\"\x0c\n",
        "'a'\x0b\n",
        "a'b'\n",
        "a\"b\"c\n",
    ] {
        check(&engine, line.as_bytes(), b"", Limits::Authenticated);
        check(
            &engine,
            &[line.as_bytes(), b"echo hi\n"].concat(),
            QUIT,
            Limits::Authenticated,
        );
    }
}

#[test]
fn strangers_are_cut_where_the_engine_cuts_them() {
    let engine = Engine::start_from(Path::new("redis-server"), &["--requirepass", "x"]);
    for request in [
        "*11\r\n",
        "*11\r\n$4\r\nECHO\r\n",
        "*1048576\r\n",
        "*2\r\n$16385\r\n",
        "*2\r\n$536870912\r\n",
        "*2\r\n$536870913\r\n",
        "*10\r\n$16384\r\n",
        "*-11\r\n",
        "*x\r\n",
    ] {
        check(&engine, request.as_bytes(), b"", Limits::Unauthenticated);
    }
}

/// What hostile streams are made of.
const TOKENS: &[&str] = &[
    "*2\r\n$4\r\nECHO\r\n$2\r\nhi\r\n",
    "*2\r\n$4\r\nECHO\r\n",
    "*1\r\n",
    "*2\r\n",
    "*3\r\n",
    "*0\r\n",
    "*-1\r\n",
    "$1\r\n",
    "$2\r\n",
    "$4\r\n",
    "$0\r\n\r\n",
    "$-1\r\n",
    "$4\r\nECHO\r\n",
    "$4\r\nquit\r\n",
    "a\r\n",
    "ab\r\n",
    "\r\n",
    "\r",
    "\n",
    " ",
    "*",
    "$",
    "2",
    "9",
    "-",
    "echo ",
    "ECHO",
    "quit",
    "\"",
    "'",
    "\\",
    "\"a b\"",
    "'a\\'b'",
    "\\x41",
    "echo \"\\x41\\n\"\r\n",
    "echo hi\n",
    ":",
    "%1\r\n",
    "|",
    "_\r\n",
    "\t",
    "\x0b",
];

#[test]
fn made_up_streams_are_answered_as_the_engine_answers_them() {
    let engine = Engine::start();
    let mut state: u64 = 0x5107_3e5b;
    let mut below = |bound: usize| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 33) as usize % bound
    };
    for _ in 0..3000 {
        let count = 1 + below(8);
        let stream: String = (0..count).map(|_| TOKENS[below(TOKENS.len())]).collect();
        check(&engine, stream.as_bytes(), b"", Limits::Authenticated);
    }
}
