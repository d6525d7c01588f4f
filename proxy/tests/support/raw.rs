//! A client that sees the bytes.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::LIMIT;

pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
}

impl Raw {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self {
            stream: TcpStream::connect(address).await.unwrap(),
        }
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Reads exactly what is expected.
    pub(crate) async fn expect(&mut self, want: &str) {
        let mut got = vec![0; want.len()];
        let mut at = 0;
        while at < got.len() {
            let read = timeout(LIMIT, self.stream.read(&mut got[at..])).await;
            let seen = String::from_utf8_lossy(&got[..at]).into_owned();
            let count = read.unwrap_or_else(|_| panic!("waited for {want:?}, got {seen:?}"));
            let count = count.unwrap();
            assert!(count > 0, "closed after {seen:?}, wanted {want:?}");
            at += count;
            if !want.as_bytes().starts_with(&got[..at]) {
                // The rest of it says more, an error's text above all.
                let mut rest = [0; 512];
                let more = timeout(Duration::from_millis(50), self.stream.read(&mut rest)).await;
                got.truncate(at);
                got.extend_from_slice(&rest[..more.map_or(0, |m| m.unwrap_or(0))]);
                panic!("wanted {want:?}, got {:?}", String::from_utf8_lossy(&got));
            }
        }
    }

    /// Reads a line, without its end.
    pub(crate) async fn line(&mut self) -> String {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let byte = timeout(LIMIT, self.stream.read_u8()).await;
            line.push(byte.expect("waited for a line").unwrap());
        }
        String::from_utf8_lossy(&line[..line.len() - 2]).into_owned()
    }

    /// Reads a bulk string.
    pub(crate) async fn bulk(&mut self) -> String {
        let line = self.line().await;
        let len = line.strip_prefix('$').and_then(|len| len.parse().ok());
        let len: usize = len.unwrap_or_else(|| panic!("wanted a bulk string, got {line:.200}"));
        let mut bytes = vec![0; len + 2];
        let read = timeout(LIMIT, self.stream.read_exact(&mut bytes)).await;
        read.expect("waited for a bulk string").unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }

    /// Reads a bulk string, or nil as 0.
    pub(crate) async fn bulk_or_nil(&mut self) -> String {
        let line = self.line().await;
        if line == "$-1" {
            return "0".to_owned();
        }
        let len: usize = (line.strip_prefix('$'))
            .and_then(|len| len.parse().ok())
            .unwrap_or_else(|| panic!("wanted a bulk string, got {line:?}"));
        let text = self.line().await;
        assert_eq!(text.len(), len);
        text
    }

    /// True if nothing comes within a short time.
    pub(crate) async fn is_silent(&mut self) -> bool {
        let mut byte = [0];
        timeout(Duration::from_millis(50), self.stream.read(&mut byte))
            .await
            .is_err()
    }

    /// Reads to the end of the connection.
    pub(crate) async fn rest(&mut self) -> String {
        let mut rest = Vec::new();
        let read = timeout(LIMIT, self.stream.read_to_end(&mut rest)).await;
        let _ = read.expect("the connection ends");
        String::from_utf8_lossy(&rest).into_owned()
    }
}

impl Raw {
    /// What comes until nothing comes any more for a while.
    pub(crate) async fn heard(&mut self) -> String {
        let mut all = Vec::new();
        let mut part = vec![0; 64 * 1024];
        let mut patience = Duration::from_millis(500);
        while let Ok(read) = timeout(patience, self.stream.read(&mut part)).await {
            match read.unwrap() {
                0 => break,
                count => all.extend_from_slice(&part[..count]),
            }
            patience = Duration::from_millis(30);
        }
        String::from_utf8_lossy(&all).into_owned()
    }

    /// The next bytes, at least one.
    pub(crate) async fn some(&mut self) -> String {
        let mut part = vec![0; 64 * 1024];
        let read = timeout(LIMIT, self.stream.read(&mut part)).await;
        let count = read.expect("waited for some bytes").unwrap();
        assert!(count > 0, "the connection ended");
        String::from_utf8_lossy(&part[..count]).into_owned()
    }

    /// An integer reply.
    pub(crate) async fn integer(&mut self) -> i64 {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            let read = timeout(LIMIT, self.stream.read_exact(&mut byte)).await;
            read.expect("waited for an integer").unwrap();
            line.push(byte[0]);
        }
        let text = String::from_utf8_lossy(&line).into_owned();
        let digits = text.strip_prefix(':').map(str::trim_end);
        let number = digits.and_then(|digits| digits.parse().ok());
        number.unwrap_or_else(|| panic!("wanted an integer, got {text:?}"))
    }
}

/// The body of an answer of the admin port.
pub(crate) async fn http_get(address: SocketAddr, path: &str) -> String {
    let mut raw = Raw::connect(address).await;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    raw.send(request.as_bytes()).await;
    raw.rest().await
}
