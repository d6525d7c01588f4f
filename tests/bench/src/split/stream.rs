//! One node's MONITOR stream: when it executed a client's write.
//!
//! Invariant: the stream is of the node, not of a process: when its process ends, the next one's is
//! opened, so that nothing that the node accepts goes unseen for longer than a try takes.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    task::JoinHandle,
    time::{sleep, timeout},
};

/// Writes that this program's clients send.
const WRITES: [&str; 4] = ["SET", "RPUSH", "INCR", "EVAL"];
/// An engine answers at once, if it lives.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// Between two tries to reach a process that is not there yet.
const AGAIN: Duration = Duration::from_millis(5);
/// What a run of minutes makes.
const TIMES_MAX: usize = 10_000_000;

/// An open one; dropped, it is closed.
#[derive(Debug)]
pub(super) struct Stream {
    times: Arc<Mutex<Vec<SystemTime>>>,
    reader: JoinHandle<()>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Stream {
    /// Of the node in this directory; `peers` are the addresses of its shard's nodes.
    pub(super) async fn open(directory: PathBuf, peers: Vec<String>) -> anyhow::Result<Self> {
        let times = Arc::new(Mutex::new(Vec::new()));
        let mut lines = Some(monitor(&directory).await?);
        let noted = Arc::clone(&times);
        let reader = tokio::spawn(async move {
            loop {
                match lines.take() {
                    Some(lines) => read(lines, &peers, &noted).await,
                    None => sleep(AGAIN).await,
                }
                lines = monitor(&directory).await.ok();
            }
        });
        Ok(Self { times, reader })
    }

    fn with<T>(&self, look: impl FnOnce(&[SystemTime]) -> T) -> T {
        look(&self.times.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes seen so far.
    pub(super) fn count(&self) -> usize {
        self.with(<[SystemTime]>::len)
    }

    /// When writes were executed since then.
    pub(super) fn since(&self, from: SystemTime) -> Vec<SystemTime> {
        self.with(|times| times.iter().copied().filter(|at| *at >= from).collect())
    }

    /// The first of them.
    pub(super) fn first_since(&self, from: SystemTime) -> Option<SystemTime> {
        self.with(|times| times.iter().copied().find(|at| *at >= from))
    }
}

async fn monitor(directory: &Path) -> anyhow::Result<BufReader<UnixStream>> {
    let secret = std::fs::read_to_string(directory.join("admin.secret"))
        .with_context(|| format!("read the secret of {}", directory.display()))?;
    let open = async {
        let mut socket = UnixStream::connect(directory.join("admin.sock")).await?;
        let words = format!("AUTH slotmesh-admin {}\r\nMONITOR\r\n", secret.trim());
        socket.write_all(words.as_bytes()).await?;
        let mut lines = BufReader::new(socket);
        for _ in 0..2 {
            let mut answer = String::new();
            lines.read_line(&mut answer).await?;
            anyhow::ensure!(answer.starts_with('+'), "the node said {answer:?}");
        }
        Ok(lines)
    };
    timeout(OPEN_LIMIT, open)
        .await
        .context("open a node's MONITOR stream")?
}

/// Until the process ends.
async fn read(mut lines: BufReader<UnixStream>, peers: &[String], noted: &Mutex<Vec<SystemTime>>) {
    let mut line = Vec::new();
    while lines
        .read_until(b'\n', &mut line)
        .await
        .is_ok_and(|n| n > 0)
    {
        if let Some(at) = write_of_a_client(&String::from_utf8_lossy(&line), peers) {
            let mut times = noted.lock().unwrap_or_else(PoisonError::into_inner);
            if times.len() < TIMES_MAX {
                times.push(at);
            }
        }
        line.clear();
    }
}

/// When a line's command was executed, if it is a write, and not from another node of the shard.
fn write_of_a_client(line: &str, peers: &[String]) -> Option<SystemTime> {
    let (time, rest) = line.strip_prefix('+')?.split_once(" [")?;
    let (source, words) = rest.split_once("] ")?;
    let (_, address) = source.split_once(' ')?;
    let command = words.split('"').nth(1)?.to_ascii_uppercase();
    if !WRITES.contains(&&*command) || peers.iter().any(|p| p == address) || address == "lua" {
        return None;
    }
    let (seconds, micros) = time.split_once('.')?;
    let since =
        Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?);
    Some(SystemTime::UNIX_EPOCH + since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writes_of_clients_count() {
        let peers = ["10.77.0.17:7201".to_owned()];
        let of = |line: &str| write_of_a_client(line, &peers);
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(12_000_345);
        let line = "+12.000345 [0 10.77.0.16:40000] \"SET\" \"a b] \" \"1\"\r\n";
        assert_eq!(of(line), Some(at));
        assert_eq!(of("+12.000345 [0 10.77.0.16:1] \"get\" \"SET\"\r\n"), None);
        assert_eq!(
            of("+12.000345 [0 10.77.0.17:7201] \"SET\" \"a\" \"1\"\r\n"),
            None
        );
        assert_eq!(of("+12.000345 [0 lua] \"RPUSH\" \"a\" \"1\"\r\n"), None);
        assert_eq!(of("+OK\r\n"), None);
    }
}
