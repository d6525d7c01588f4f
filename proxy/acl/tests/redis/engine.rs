//! A real Redis to compare users with, and what its answers look like once their order is settled.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use slotmesh_command::lookup;

const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A redis-server from PATH on a private socket, gone when it is dropped.
pub(crate) struct Engine {
    child: Child,
    stream: BufReader<UnixStream>,
    _directory: tempfile::TempDir,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Reply {
    Text(Vec<u8>),
    Error(String),
    Int(i64),
    Nil,
    Items(Vec<Reply>),
}

impl Engine {
    pub(crate) fn start() -> Self {
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
            .recv_timeout(START_TIMEOUT)
            .expect("redis-server says that it is ready");
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(START_TIMEOUT)).unwrap();
        Self {
            child,
            stream: BufReader::new(stream),
            _directory: directory,
        }
    }

    pub(crate) fn call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Reply {
        let mut request = format!("*{}\r\n", args.len()).into_bytes();
        for arg in args.iter().map(AsRef::as_ref) {
            request.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
            request.extend_from_slice(arg);
            request.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&request).unwrap();
        self.reply()
    }

    fn reply(&mut self) -> Reply {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        let (kind, rest) = line.trim_end().split_at(1);
        match kind {
            "+" => Reply::Text(rest.as_bytes().to_vec()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Int(rest.parse().unwrap()),
            "$" | "*" if rest == "-1" => Reply::Nil,
            "$" => {
                let mut text = vec![0; rest.parse::<usize>().unwrap() + 2];
                self.stream.read_exact(&mut text).unwrap();
                text.truncate(text.len() - 2);
                Reply::Text(text)
            }
            "*" => {
                let count: usize = rest.parse().unwrap();
                Reply::Items((0..count).map(|_| self.reply()).collect())
            }
            _ => panic!("redis-server answers {line:?}"),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may have died already; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Reply {
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Text(text) => std::str::from_utf8(text).unwrap(),
            other => panic!("not a text: {other:?}"),
        }
    }

    pub(crate) fn items(&self) -> &[Reply] {
        match self {
            Self::Items(items) => items,
            other => panic!("not a list: {other:?}"),
        }
    }

    /// The value behind this word in a flat map.
    pub(crate) fn field(&self, name: &str) -> &Reply {
        let pairs = self.items().chunks(2);
        let mut found = pairs.filter(|pair| pair[0].text() == name);
        &found.next().unwrap_or_else(|| panic!("has {name}"))[1]
    }

    pub(crate) fn texts(&self) -> Vec<String> {
        self.items()
            .iter()
            .map(|item| item.text().to_owned())
            .collect()
    }
}

/// Rules of a selector with its single commands in alphabetical order, which is the order of a random
/// hash in Redis, and without those that Redis 7.0 does not have.
pub(crate) fn settled(rules: &str) -> String {
    let single = |rule: &&str| rule.starts_with(['+', '-']) && !rule[1..].starts_with('@');
    let (mut singles, others): (Vec<&str>, Vec<&str>) = rules.split(' ').partition(single);
    singles.retain(|rule| in_redis_7_0(&rule[1..]));
    singles.sort_unstable();
    [others, singles].concat().join(" ")
}

fn in_redis_7_0(name: &str) -> bool {
    let (name, sub) = name.split_once('|').unwrap_or((name, ""));
    let command = lookup(name.as_bytes()).unwrap();
    // A first argument is no subcommand.
    let sub = command.subcommand(sub.as_bytes()).unwrap_or(command);
    sub.in_redis_7_0()
}

/// A whole line of ACL LIST, each selector settled.
pub(crate) fn settled_line(line: &str) -> String {
    let parts = line.split(" (").map(|part| match part.strip_suffix(')') {
        Some(inside) => format!("{})", settled(inside)),
        None => settled(part),
    });
    parts.collect::<Vec<_>>().join(" (")
}
