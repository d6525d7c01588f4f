//! The request parser against a real engine: the same bytes, the same commands, the same error.
//!
//! The engine is asked through ECHO and through bad input, since what it answers shows how it read.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use slotmesh_resp::{Args, Parsed, RequestParser, Value, rewrite_inline};

const TIMEOUT: Duration = Duration::from_secs(20);

/// A redis-server from PATH on a private socket, gone when it is dropped.
struct Engine {
    child: Child,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Engine {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let mut child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(&socket)
            .arg("--dir")
            .arg(directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("redis-server is on PATH");
        let log = BufReader::new(child.stdout.take().unwrap());
        let (ready, is_ready) = mpsc::sync_channel(1);
        // Reads on to the end, so that the engine never waits for a full pipe.
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                if line.to_lowercase().contains("ready to accept connections") {
                    ready.send(()).unwrap();
                }
            }
        });
        is_ready
            .recv_timeout(TIMEOUT)
            .expect("redis-server says that it is ready");
        Self {
            child,
            socket,
            _directory: directory,
        }
    }

    /// Everything that it answers to these bytes, followed by QUIT.
    fn answers(&self, bytes: &[u8]) -> Vec<Value> {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let bytes = [bytes, b"*1\r\n$4\r\nQUIT\r\n"].concat();
        // It may close before it has read everything; what it said is there all the same.
        let _ = stream.write_all(&bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let (mut values, mut rest) = (Vec::new(), &answer[..]);
        while let Some((value, consumed)) = Value::decode(rest).unwrap() {
            values.push(value);
            rest = &rest[consumed..];
        }
        assert!(rest.is_empty(), "half a reply: {rest:?}");
        values
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// What an engine that knows only ECHO and QUIT would answer, reading with our parser.
fn our_answers(bytes: &[u8]) -> Vec<Value> {
    let bytes = [bytes, b"*1\r\n$4\r\nQUIT\r\n"].concat();
    let (mut parser, mut args, mut rest) = (RequestParser::new(), Args::new(), &bytes[..]);
    let mut answers = Vec::new();
    let mut line = Vec::new();
    loop {
        let mut frame = rest;
        let parsed = parser.parse(rest, &mut args).and_then(|parsed| {
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
                answers.push(Value::Error(format!("ERR {error}")));
                return answers;
            }
        };
        let args: Vec<&[u8]> = args.iter(frame).collect();
        match args.as_slice() {
            [name, word] if name.eq_ignore_ascii_case(b"echo") => {
                answers.push(Value::Bulk(word.to_vec()));
            }
            [b"QUIT"] => {
                answers.push(Value::Simple("OK".into()));
                return answers;
            }
            other => panic!("not for this test: {other:?}"),
        }
        rest = &rest[consumed..];
    }
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
        let shown: String = request.chars().take(60).collect();
        assert_eq!(
            our_answers(request.as_bytes()),
            engine.answers(request.as_bytes()),
            "{shown:?}"
        );
    }
}
