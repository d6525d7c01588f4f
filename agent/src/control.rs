//! A connection to one node: commands one after another, each with a deadline.
//!
//! Invariant: after a missed deadline or a broken reply the connection is closed, so an answer never
//! belongs to an earlier command.

use std::{io, path::Path, time::Duration};

use slotmesh_resp::{Value, write};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout,
};

/// Local and idle, a node answers in microseconds; on a host that is short of CPU it was seen to take
/// hundreds of milliseconds. What takes longer is a node busy with a script, or swapping.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);
/// A TCP connection within a data centre.
pub const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// INFO of a node with thousands of clients stays far below it.
const REPLY_BYTES_MAX: usize = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nothing was sent.
    #[error("connect to node")]
    Connect { source: io::Error },
    /// The node said no; the command had no effect.
    #[error("node refused: {0}")]
    Refused(String),
    /// It may or may not have been executed.
    #[error("no answer to {command}")]
    Unanswered { command: String, source: io::Error },
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Stream for T {}

/// An open connection.
pub struct Control {
    stream: Option<Box<dyn Stream>>,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("open", &self.stream.is_some())
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Connects to a node's unix socket and logs in.
    pub async fn unix(path: &Path, user: &str, password: &str) -> Result<Self, ControlError> {
        let connect = UnixStream::connect(path);
        let stream = connected(timeout(CONNECT_TIMEOUT, connect).await)?;
        Self::login(Box::new(stream), user, password).await
    }

    /// Connects to a node's data port and logs in.
    pub async fn tcp(address: &str, user: &str, password: &str) -> Result<Self, ControlError> {
        let connect = TcpStream::connect(address);
        let stream = connected(timeout(CONNECT_TIMEOUT, connect).await)?;
        stream
            .set_nodelay(true)
            .map_err(|source| ControlError::Connect { source })?;
        Self::login(Box::new(stream), user, password).await
    }

    async fn login(
        stream: Box<dyn Stream>,
        user: &str,
        password: &str,
    ) -> Result<Self, ControlError> {
        let mut control = Self {
            stream: Some(stream),
            buffer: Vec::with_capacity(1024),
        };
        control.call(&["AUTH", user, password]).await?;
        Ok(control)
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection.
    pub async fn call(&mut self, args: &[&str]) -> Result<Value, ControlError> {
        self.call_within(args, COMMAND_TIMEOUT).await
    }

    pub async fn call_within(
        &mut self,
        args: &[&str],
        limit: Duration,
    ) -> Result<Value, ControlError> {
        // Out of `self` while a reply is owed: an early end leaves the connection closed.
        let Some(mut stream) = self.stream.take() else {
            return Err(ControlError::Connect {
                source: io::ErrorKind::NotConnected.into(),
            });
        };
        let round_trip = round_trip(stream.as_mut(), &mut self.buffer, args);
        let answer = match timeout(limit, round_trip).await {
            Ok(answer) => answer,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        let value = answer.map_err(|source| {
            let command = args.first().copied().unwrap_or_default().to_owned();
            ControlError::Unanswered { command, source }
        })?;
        self.stream = Some(stream);
        match value {
            Value::Error(text) => Err(ControlError::Refused(text)),
            value => Ok(value),
        }
    }

    /// Sends a command that nobody answers.
    pub async fn tell(&mut self, args: &[&str]) -> Result<(), ControlError> {
        let Some(mut stream) = self.stream.take() else {
            return Err(ControlError::Connect {
                source: io::ErrorKind::NotConnected.into(),
            });
        };
        let frame = encode(args);
        let sent = timeout(COMMAND_TIMEOUT, stream.write_all(&frame)).await;
        sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|source| ControlError::Connect { source })?;
        self.stream = Some(stream);
        Ok(())
    }

    /// Closed by an error; connect again.
    pub fn is_closed(&self) -> bool {
        self.stream.is_none()
    }
}

fn connected<T>(
    result: Result<io::Result<T>, tokio::time::error::Elapsed>,
) -> Result<T, ControlError> {
    result
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|source| ControlError::Connect { source })
}

fn encode(args: &[&str]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(64);
    let args: Vec<&[u8]> = args.iter().map(|a| a.as_bytes()).collect();
    write::encode_command(&mut frame, &args);
    frame
}

async fn round_trip(
    stream: &mut dyn Stream,
    buffer: &mut Vec<u8>,
    args: &[&str],
) -> io::Result<Value> {
    stream.write_all(&encode(args)).await?;
    buffer.clear();
    loop {
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if buffer.len() > REPLY_BYTES_MAX {
            return Err(io::Error::other("reply is too long"));
        }
        let decoded = Value::decode(buffer).map_err(io::Error::other)?;
        if let Some((value, _)) = decoded {
            return Ok(value);
        }
    }
}

/// Every string in a list, in order.
pub fn strings(value: &Value) -> Vec<String> {
    let items = value.as_items().unwrap_or_default();
    items
        .iter()
        .filter_map(|item| item.as_str().map(str::to_owned))
        .collect()
}
