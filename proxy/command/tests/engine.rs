//! The table against a real engine: every command that it has, and its own idea of their keys.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use slotmesh_command::{Flag, all, lookup, resolve};

const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A redis-server from PATH on a private socket, gone when it is dropped.
struct Engine {
    child: Child,
    stream: BufReader<UnixStream>,
    _directory: tempfile::TempDir,
}

#[derive(Debug, Clone, PartialEq)]
enum Reply {
    Text(String),
    Error(String),
    Int(i64),
    Items(Vec<Reply>),
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

    fn call(&mut self, args: &[&str]) -> Reply {
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
    fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            other => panic!("{other:?} is no text"),
        }
    }

    fn int(&self) -> i64 {
        match self {
            Self::Int(value) => *value,
            other => panic!("{other:?} is no integer"),
        }
    }

    fn items(&self) -> &[Reply] {
        match self {
            Self::Items(items) => items,
            other => panic!("{other:?} is no array"),
        }
    }
}

fn check_entry(entry: &Reply) {
    let entry = entry.items();
    // Modules may show their names in upper case.
    let name = &*entry[0].text().to_lowercase();
    let ours = all().find(|command| command.name == name);
    let ours = ours.unwrap_or_else(|| panic!("the table lacks {name}"));
    let flags: Vec<&str> = entry[2].items().iter().map(Reply::text).collect();
    let arity = entry[1].int();
    for argc in 1..12_i64 {
        let theirs = if arity < 0 {
            argc >= -arity
        } else {
            argc == arity
        };
        // Half a pair is refused by the table, by the engine's code later. A module's command says
        // that it takes any number, and refuses what lacks a key.
        let odd_pairs = matches!(name, "mset" | "msetnx") && argc % 2 == 0;
        if theirs && !odd_pairs && !flags.contains(&"module") {
            assert!(
                ours.check_arity(argc as usize),
                "{name} with {argc} arguments"
            );
        }
    }
    assert_eq!(
        ours.flags.has(Flag::Write),
        flags.contains(&"write"),
        "{name}"
    );
    assert_eq!(
        ours.flags.has(Flag::ReadOnly),
        flags.contains(&"readonly"),
        "{name}"
    );
    assert_eq!(
        ours.flags.has(Flag::PubSub),
        flags.contains(&"pubsub"),
        "{name}"
    );
    let first_key = usize::try_from(entry[3].int()).unwrap();
    if let Some(key) = ours.only_key() {
        assert_eq!(key, first_key, "{name}");
    } else if first_key == 0 && !flags.contains(&"movablekeys") {
        assert!(
            ours.key_specs().is_empty(),
            "{name} has keys that the engine does not know"
        );
    }
    entry[9].items().iter().for_each(check_entry);
}

#[test]
fn every_command_of_the_engine_is_in_the_table_and_takes_as_many_arguments() {
    let commands = Engine::start().call(&["COMMAND"]);
    assert!(commands.items().len() > 200);
    commands.items().iter().for_each(check_entry);
}

/// Real commands; each is given to COMMAND GETKEYS and to the table.
const CALLS: &str = "
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

#[test]
fn keys_are_where_the_engine_finds_them() {
    let mut engine = Engine::start();
    let calls: Vec<&str> = CALLS
        .lines()
        .flat_map(|line| line.split('|'))
        .filter(|call| !call.is_empty())
        .collect();
    assert!(calls.len() > 100);
    for call in calls {
        let args: Vec<&str> = call.split(' ').collect();
        let getkeys = [&["COMMAND", "GETKEYS"], args.as_slice()].concat();
        let theirs = engine.call(&getkeys);
        let mut theirs: Vec<&str> = match &theirs {
            Reply::Items(items) => items.iter().map(Reply::text).collect(),
            other => panic!("{call}: {other:?}"),
        };
        let command = resolve(args.as_slice()).unwrap_or_else(|error| panic!("{call}: {error}"));
        let keys = command.keys(args.as_slice()).unwrap();
        let mut ours: Vec<&str> = keys.map(|key| args[key]).collect();
        // The engine lists a destination now first, now last.
        theirs.sort_unstable();
        ours.sort_unstable();
        assert_eq!(ours, theirs, "{call}");
    }
}

#[test]
fn refusals_are_worded_like_the_engines() {
    let mut engine = Engine::start();
    for call in [
        "FOO a b",
        "foo",
        "GET",
        "CONFIG",
        "CONFIG GET",
        "CONFIG FOO",
        "MSET a 1 b",
        "XGROUP",
    ] {
        let args: Vec<&str> = call.split(' ').collect();
        let Reply::Error(theirs) = engine.call(&args) else {
            panic!("{call} is accepted")
        };
        let ours = resolve(args.as_slice()).unwrap_err().to_string();
        assert_eq!(ours.trim_end(), theirs.trim_end(), "{call}");
    }
    assert!(lookup(b"foo").is_none());
}
