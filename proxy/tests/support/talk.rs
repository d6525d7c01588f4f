//! A client that asks one thing at a time and sees each reply's bytes, at a proxy or at a node.

use std::net::SocketAddr;

use slotmesh_resp::{ReplyScanner, Scan, write};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::LIMIT;
use super::node::Node;

pub(crate) struct Talk {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Talk {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            input: Vec::new(),
        }
    }

    /// To a node itself, whose default user may do everything from now on.
    pub(crate) async fn direct(node: &Node) -> Self {
        let open = [
            "ACL", "SETUSER", "default", "on", "nopass", "~*", "&*", "+@all",
        ];
        assert_eq!(node.admin(&open), "+OK\r\n");
        Self::connect(node.address).await
    }

    pub(crate) async fn resp3(&mut self) {
        assert!(self.ask("HELLO 3").await.starts_with('%'));
    }

    /// Sends words that are separated by spaces.
    pub(crate) async fn say(&mut self, line: &str) {
        self.tell(&line.split(' ').collect::<Vec<_>>()).await;
    }

    /// Sends words, whatever is in them.
    pub(crate) async fn tell(&mut self, words: &[&str]) {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        let mut frame = Vec::new();
        write::encode_command(&mut frame, &words);
        self.stream.write_all(&frame).await.unwrap();
    }

    /// The next reply, or push.
    pub(crate) async fn hear(&mut self) -> String {
        loop {
            if let Ok(Scan::Complete { consumed, .. }) = ReplyScanner::new().scan(&self.input) {
                let reply: Vec<u8> = self.input.drain(..consumed).collect();
                return String::from_utf8_lossy(&reply).into_owned();
            }
            let read = timeout(LIMIT, self.stream.read_buf(&mut self.input)).await;
            let seen = String::from_utf8_lossy(&self.input).into_owned();
            let count = read.unwrap_or_else(|_| panic!("waited for a reply, got {seen:?}"));
            assert!(count.unwrap() > 0, "closed after {seen:?}");
        }
    }

    /// Waits until the connection ends, with nothing more said.
    pub(crate) async fn ended(&mut self) {
        let read = timeout(LIMIT, self.stream.read_buf(&mut self.input)).await;
        let seen = String::from_utf8_lossy(&self.input).into_owned();
        let count = read.unwrap_or_else(|_| panic!("waited for the end, got {seen:?}"));
        assert_eq!(count.unwrap(), 0, "{seen:?}");
    }

    pub(crate) async fn ask(&mut self, line: &str) -> String {
        self.say(line).await;
        self.hear().await
    }

    pub(crate) async fn expect(&mut self, line: &str, want: &str) {
        assert_eq!(self.ask(line).await, want, "{line}");
    }
}
