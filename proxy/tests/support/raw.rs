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
            assert!(
                want.as_bytes().starts_with(&got[..at]),
                "{:?}",
                String::from_utf8_lossy(&got)
            );
        }
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
