//! A real engine on a private socket, and its answers: what the proxy's own crates are compared with.
//!
//! Invariant: the engine is gone when it is dropped. Every function panics where the engine is not
//! there or does not answer: this is for tests, and a test can't go on then.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

/// To start, and for each answer; machines that run tests are slow at times.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// A running engine, and one connection to it.
#[derive(Debug)]
pub struct Engine {
    child: Child,
    socket: PathBuf,
    stream: BufReader<UnixStream>,
    _directory: tempfile::TempDir,
}

/// What it answered, in RESP2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A status or a bulk string.
    Text(Vec<u8>),
    Error(String),
    Int(i64),
    Nil,
    Items(Vec<Reply>),
}

impl Engine {
    /// The redis-server from PATH.
    ///
    /// # Panics
    /// See the crate.
    #[must_use]
    pub fn start() -> Self {
        Self::start_from(Path::new("redis-server"), &[])
    }

    /// Another one, with options of its own.
    ///
    /// # Panics
    /// See the crate.
    #[must_use]
    pub fn start_from(binary: &Path, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory for the engine");
        let socket = directory.path().join("s");
        let mut child = Command::new(binary)
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(&socket)
            .arg("--dir")
            .arg(directory.path())
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("start {}: {error}", binary.display()));
        let log = BufReader::new(child.stdout.take().expect("its output is piped"));
        let (ready, is_ready) = mpsc::sync_channel(1);
        // Reads on to the end, so that the engine never waits for a full pipe.
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                if line.to_lowercase().contains("ready to accept connections") {
                    let _ = ready.send(());
                }
            }
        });
        is_ready
            .recv_timeout(TIMEOUT)
            .expect("the engine says that it is ready");
        Self {
            child,
            stream: BufReader::new(connect(&socket)),
            socket,
            _directory: directory,
        }
    }

    /// Another connection to it.
    ///
    /// # Panics
    /// See the crate.
    #[must_use]
    pub fn connect(&self) -> UnixStream {
        connect(&self.socket)
    }

    /// One command, and its reply.
    ///
    /// # Panics
    /// See the crate.
    pub fn call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Reply {
        let mut request = format!("*{}\r\n", args.len()).into_bytes();
        for arg in args.iter().map(AsRef::as_ref) {
            request.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
            request.extend_from_slice(arg);
            request.extend_from_slice(b"\r\n");
        }
        let sent = self.stream.get_mut().write_all(&request);
        sent.expect("the engine takes a command");
        self.reply()
    }

    fn reply(&mut self) -> Reply {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line);
        assert!(matches!(read, Ok(1..)), "the engine answers: {read:?}");
        let (kind, rest) = line.trim_end().split_at(1);
        let number = || rest.parse().expect("a number");
        match kind {
            "+" => Reply::Text(rest.as_bytes().to_vec()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Int(number()),
            "$" | "*" if rest == "-1" => Reply::Nil,
            "$" => {
                let size = usize::try_from(number()).expect("a size");
                let mut text = vec![0; size + 2];
                let read = self.stream.read_exact(&mut text);
                read.expect("the rest of an answer");
                text.truncate(size);
                Reply::Text(text)
            }
            "*" => Reply::Items((0..number()).map(|_| self.reply()).collect()),
            _ => panic!("the engine answers {line:?}"),
        }
    }
}

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("the engine listens");
    let set = stream.set_read_timeout(Some(TIMEOUT));
    set.expect("a timeout for answers");
    stream
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may have died already; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Reply {
    /// # Panics
    /// When it is no text.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) => std::str::from_utf8(text).expect("text"),
            other => panic!("{other:?} is no text"),
        }
    }

    /// # Panics
    /// When it is no integer.
    #[must_use]
    pub fn int(&self) -> i64 {
        match self {
            Self::Int(value) => *value,
            other => panic!("{other:?} is no integer"),
        }
    }

    /// # Panics
    /// When it is no list.
    #[must_use]
    pub fn items(&self) -> &[Self] {
        match self {
            Self::Items(items) => items,
            other => panic!("{other:?} is no list"),
        }
    }

    /// The texts of a list.
    ///
    /// # Panics
    /// When it is no list of texts.
    #[must_use]
    pub fn texts(&self) -> Vec<String> {
        let texts = self.items().iter().map(Self::text);
        texts.map(str::to_owned).collect()
    }

    /// The value behind this word in a flat map.
    ///
    /// # Panics
    /// When it is no map, or has no such word.
    #[must_use]
    pub fn field(&self, name: &str) -> &Self {
        let mut pairs = self.items().chunks(2);
        let found = pairs.find(|pair| pair[0].text() == name);
        &found.unwrap_or_else(|| panic!("has {name}"))[1]
    }
}
