//! One engine with all the keys, and a proxy before three shards, asked the same things.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use slotmesh_resp::{ReplyScanner, Scan, Value, write};

use crate::support::node::{ADMIN, Node, snapshot};
use crate::support::{LIMIT, Proxy};

/// A client that waits for each reply.
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    pub(crate) input: Vec<u8>,
}

impl Connection {
    pub(crate) fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            input: Vec::new(),
        }
    }

    pub(crate) fn send(&mut self, words: &[Vec<u8>]) {
        let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
        let mut frame = Vec::new();
        write::encode_command(&mut frame, &words);
        self.stream.write_all(&frame).unwrap();
    }

    pub(crate) fn reply(&mut self) -> Vec<u8> {
        let mut scanner = ReplyScanner::new();
        loop {
            if let Scan::Complete { consumed, .. } = scanner.scan(&self.input).unwrap() {
                return self.input.drain(..consumed).collect();
            }
            let mut piece = [0; 64 * 1024];
            let count = self.stream.read(&mut piece).expect("a reply in time");
            assert!(count > 0, "closed");
            self.input.extend_from_slice(&piece[..count]);
        }
    }

    /// True if nothing comes within a short time.
    pub(crate) fn is_silent(&mut self) -> bool {
        let short = Some(Duration::from_millis(50));
        self.stream.set_read_timeout(short).unwrap();
        let silent = self.stream.peek(&mut [0]).is_err();
        self.stream.set_read_timeout(Some(LIMIT)).unwrap();
        silent
    }

    pub(crate) fn call(&mut self, words: &[Vec<u8>]) -> Vec<u8> {
        self.send(words);
        self.reply()
    }
}

/// An engine with all the keys, and a proxy before three shards.
pub(crate) struct Pair {
    pub(crate) engine: Connection,
    pub(crate) proxy: Connection,
}

pub(crate) struct World {
    pub(crate) engine: Node,
    pub(crate) nodes: Vec<Node>,
    pub(crate) proxy: Proxy,
    _data: tempfile::TempDir,
}

pub(crate) const SHARDS: u32 = 3;

pub(crate) async fn world() -> World {
    world_with(&[]).await
}

/// With these parameters of proxies.
pub(crate) async fn world_with(parameters: &[(&str, &str)]) -> World {
    let engine = Node::start();
    let nodes: Vec<Node> = (0..SHARDS).map(|_| Node::start_with_epoch(1)).collect();
    let data = tempfile::tempdir().unwrap();
    let routes = (0..SHARDS)
        .map(|i| nodes[i as usize].route(i, SHARDS, 1))
        .collect();
    let mut snapshot = snapshot(1, routes);
    let given = parameters
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let settings = snapshot.settings.as_mut().unwrap();
    settings.proxy_parameters = given.collect::<HashMap<_, _>>();
    slotmesh_proxy::saved::save(data.path(), &snapshot).unwrap();
    let proxy = Proxy::start(data.path(), &["--workers", "1"]).await;
    World {
        engine,
        nodes,
        proxy,
        _data: data,
    }
}

impl World {
    pub(crate) fn pair(&self, protocol: &str) -> Pair {
        let mut engine = Connection::open(self.engine.address);
        assert_eq!(
            engine.call(&words(&format!("AUTH admin {ADMIN}"))),
            b"+OK\r\n"
        );
        let mut proxy = Connection::open(self.proxy.address);
        for connection in [&mut engine, &mut proxy] {
            let hello = connection.call(&words(&format!("HELLO {protocol}")));
            assert_ne!(hello[0], b'-');
        }
        Pair { engine, proxy }
    }

    /// How often the nodes executed a command, together.
    pub(crate) fn calls(&self, name: &str) -> u64 {
        let prefix = format!("cmdstat_{name}:calls=");
        let of_node = |node: &Node| {
            let info = node.admin(&["INFO", "commandstats"]);
            let line = info.lines().find_map(|line| line.strip_prefix(&prefix));
            line.map_or(0, |rest| rest.split(',').next().unwrap().parse().unwrap())
        };
        self.nodes.iter().map(of_node).sum()
    }

    /// Runs a test of blocking clients.
    pub(crate) async fn run(self, test: impl FnOnce(&Self) + Send + 'static) {
        tokio::task::spawn_blocking(move || test(&self))
            .await
            .unwrap();
    }
}

pub(crate) fn words(line: &str) -> Vec<Vec<u8>> {
    line.split(' ')
        .map(|word| word.as_bytes().to_vec())
        .collect()
}

pub(crate) fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Pair {
    /// Both must answer the same; gives the reply.
    pub(crate) fn same(&mut self, line: &str) -> Vec<u8> {
        self.same_words(&words(line))
    }

    pub(crate) fn same_words(&mut self, words: &[Vec<u8>]) -> Vec<u8> {
        let (want, got) = (self.engine.call(words), self.proxy.call(words));
        assert_same(words, &want, &got);
        want
    }

    pub(crate) fn both(&mut self, line: &str) {
        let words = words(line);
        for connection in [&mut self.engine, &mut self.proxy] {
            let reply = connection.call(&words);
            assert_ne!(reply[0], b'-', "{line}: {}", shown(&reply));
        }
    }

    pub(crate) fn flush(&mut self) {
        self.both("FLUSHALL");
    }

    /// The key holds the same on both sides, for as long.
    pub(crate) fn same_key(&mut self, key: &str) {
        let kind = shown(&self.same(&format!("TYPE {key}")));
        match kind.trim() {
            "+set" => drop(self.same(&format!("SMEMBERS {key}"))),
            "+zset" => drop(self.same(&format!("ZRANGE {key} 0 -1 WITHSCORES"))),
            "+string" => drop(self.same(&format!("GET {key}"))),
            "+hash" => drop(self.same(&format!("HGET {key} f"))),
            "+none" => {}
            other => panic!("{other}"),
        }
        let ttl = words(&format!("PTTL {key}"));
        let ttl = |c: &mut Connection| Value::decode(&c.call(&ttl)).unwrap().unwrap().0.as_int();
        let (want, got) = (
            ttl(&mut self.engine).unwrap(),
            ttl(&mut self.proxy).unwrap(),
        );
        assert_eq!(want < 0, got < 0, "{key}: ttl {want} {got}");
        assert!((want - got).abs() < 5_000, "{key}: ttl {want} {got}");
    }
}

/// Both answered the same.
pub(crate) fn assert_same(words: &[Vec<u8>], want: &[u8], got: &[u8]) {
    let line = || words.iter().map(|w| shown(w)).collect::<Vec<_>>().join(" ");
    if is_unordered(&words[0]) {
        assert_eq!(
            want[0],
            got[0],
            "{}: {} {}",
            line(),
            shown(want),
            shown(got)
        );
        assert_eq!(members(want), members(got), "{}", line());
    } else {
        assert!(
            want == got,
            "{}: engine {:?}, proxy {:?}",
            line(),
            shown(want),
            shown(got)
        );
    }
}

pub(crate) fn is_unordered(name: &[u8]) -> bool {
    let name = name.to_ascii_uppercase();
    ["SDIFF", "SINTER", "SUNION", "SMEMBERS"]
        .iter()
        .any(|n| n.as_bytes() == name)
}

pub(crate) fn members(reply: &[u8]) -> Vec<Vec<u8>> {
    let value = Value::decode(reply).unwrap().unwrap().0;
    let Some(items) = value.as_items() else {
        return vec![reply.to_vec()];
    };
    let mut all: Vec<_> = items
        .iter()
        .map(|v| v.as_bytes().unwrap().to_vec())
        .collect();
    all.sort();
    all
}
