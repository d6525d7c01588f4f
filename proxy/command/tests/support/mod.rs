//! A real engine to compare the table with, and the calls that it is asked about.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A redis-server from PATH on a private socket, gone when it is dropped.
pub(crate) struct Engine {
    child: Child,
    stream: BufReader<UnixStream>,
    _directory: tempfile::TempDir,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Reply {
    Text(String),
    Error(String),
    Int(i64),
    Nil,
    Items(Vec<Reply>),
}

impl Engine {
    /// The one from PATH.
    pub(crate) fn start() -> Self {
        Self::start_from(Path::new("redis-server"), &[])
    }

    pub(crate) fn start_from(binary: &Path, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
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

    pub(crate) fn call(&mut self, args: &[&str]) -> Reply {
        let mut frame = format!("*{}\r\n", args.len());
        for arg in args {
            frame.push_str(&format!("${}\r\n{arg}\r\n", arg.len()));
        }
        self.stream.get_mut().write_all(frame.as_bytes()).unwrap();
        self.read()
    }

    fn read(&mut self) -> Reply {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        let (kind, rest) = line.trim_end().split_at(1);
        match kind {
            "+" => Reply::Text(rest.to_owned()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Int(rest.parse().unwrap()),
            "*" | "$" if rest == "-1" => Reply::Nil,
            "$" => {
                let mut body = vec![0; rest.parse::<usize>().unwrap() + 2];
                self.stream.read_exact(&mut body).unwrap();
                body.truncate(body.len() - 2);
                Reply::Text(String::from_utf8(body).unwrap())
            }
            "*" => {
                let count: usize = rest.parse().unwrap();
                Reply::Items((0..count).map(|_| self.read()).collect())
            }
            _ => panic!("unexpected reply {line:?}"),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Reply {
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            other => panic!("{other:?} is no text"),
        }
    }

    pub(crate) fn int(&self) -> i64 {
        match self {
            Self::Int(value) => *value,
            other => panic!("{other:?} is no integer"),
        }
    }

    pub(crate) fn items(&self) -> &[Reply] {
        match self {
            Self::Items(items) => items,
            other => panic!("{other:?} is no array"),
        }
    }
}

/// Real commands; each is given to COMMAND GETKEYS and to the table.
pub(crate) const CALLS: &str = "
GET k|SET k v EX 10 GET|GETEX k PERSIST|APPEND k v|INCRBY k 5|GETRANGE k 0 1|SETBIT k 1 1
BITFIELD k GET u8 0|BITCOUNT k|BITPOS k 1|BITOP AND d a b|BITOP NOT d a|LCS a b LEN
MGET a b c|MSET a 1 b 2 c 3|MSETNX a 1 b 2|DEL a|DEL a b|UNLINK a b c|EXISTS a a|TOUCH a b
EXPIRE k 10 NX|TTL k|PERSIST k|TYPE k|DUMP k|RESTORE k 0 x|RENAME a b|RENAMENX a b|COPY a b DB 1
MOVE k 1|OBJECT ENCODING k|OBJECT FREQ k|MEMORY USAGE k SAMPLES 5
SORT k|SORT k BY w_* LIMIT 0 5 GET # GET o_* ASC ALPHA STORE d|SORT k STORE a STORE b|SORT_RO k BY x
HSET h f v g w|HGETALL h|HSCAN h 0 COUNT 5|HRANDFIELD h 2 WITHVALUES
LPUSH l a b|LRANGE l 0 -1|LMOVE a b LEFT RIGHT|RPOPLPUSH a b|LMPOP 2 a b LEFT COUNT 3|LPOS l x
BLPOP a b c 0|BRPOP a 1|BLMOVE a b LEFT LEFT 0|BRPOPLPUSH a b 0|BLMPOP 0 2 a b LEFT
SADD s a|SMOVE a b m|SINTER a b c|SINTERSTORE d a b|SUNIONSTORE d a|SDIFF a b|SINTERCARD 2 a b LIMIT 1
ZADD z 1 a|ZRANGESTORE d z 0 -1|ZUNIONSTORE d 2 a b WEIGHTS 1 2|ZINTERSTORE d 1 a|ZDIFFSTORE d 2 a b
ZUNION 2 a b WITHSCORES|ZINTER 2 a b|ZDIFF 2 a b|ZINTERCARD 2 a b|ZMPOP 2 a b MIN COUNT 2
BZPOPMIN a b 0|BZPOPMAX a 0|BZMPOP 0 2 a b MIN|ZRANK z m|ZRANGEBYSCORE z 0 1 LIMIT 0 1
GEOADD g 1 2 m|GEODIST g a b|GEOSEARCHSTORE d g FROMMEMBER m BYRADIUS 1 km ASC
GEORADIUS g 1 2 3 km STORE d|GEORADIUS g 1 2 3 km COUNT 5 STOREDIST d|GEORADIUS_RO g 1 2 3 km
GEORADIUSBYMEMBER g m 3 km STORE d|GEORADIUSBYMEMBER g m 3 km
PFADD p a|PFCOUNT a b|PFMERGE d a b
XADD x * f v|XLEN x|XREAD COUNT 2 STREAMS a b 0 0|XREAD BLOCK 0 STREAMS a $
XREADGROUP GROUP g c COUNT 1 BLOCK 5 NOACK STREAMS a b > >|XREADGROUP GROUP streams c STREAMS a >
XGROUP CREATE x g $ MKSTREAM|XGROUP SETID x g 0|XINFO STREAM x FULL|XINFO GROUPS x|XACK x g 1-1
XCLAIM x g c 0 1-1|XAUTOCLAIM x g c 0 0|XTRIM x MAXLEN 5|XDEL x 1-1
EVAL return 2 a b x|EVAL return 1 a|EVALSHA abc 1 a b|EVAL_RO return 2 a b|FCALL f 2 a b x|FCALL_RO f 1 a
WATCH a b";

pub(crate) fn calls() -> Vec<Vec<&'static str>> {
    let calls = CALLS.lines().flat_map(|line| line.split('|'));
    let calls = calls.filter(|call| !call.is_empty());
    calls.map(|call| call.split(' ').collect()).collect()
}
