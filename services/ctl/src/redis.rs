//! The smallest Redis client: enough to ask a proxy whether it serves, and to load it in the demo.
//!
//! One request at a time on one connection; every wait has a deadline. Tests use a foreign client
//! instead, so that our codec is never checked by itself.

use std::{io, time::Duration};

use slotmesh_resp::{Value, write};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// Longer than any hold that a proxy makes a request wait (its budget is 5 s by default).
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection.
#[derive(Debug)]
pub struct Client {
    socket: TcpStream,
    request: Vec<u8>,
    received: Vec<u8>,
}

impl Client {
    /// Connects to `host:port`.
    ///
    /// # Errors
    /// As the socket says, or timed out.
    pub async fn connect(address: &str) -> io::Result<Self> {
        let socket = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await??;
        socket.set_nodelay(true)?;
        Ok(Self {
            socket,
            request: Vec::new(),
            received: Vec::new(),
        })
    }

    /// Sends a command and waits for its reply, which may be an error value.
    ///
    /// # Errors
    /// When the connection broke or the reply took too long: then the outcome is not known.
    pub async fn call(&mut self, arguments: &[&[u8]]) -> io::Result<Value> {
        self.request.clear();
        write::encode_command(&mut self.request, arguments);
        timeout(REPLY_TIMEOUT, self.exchange()).await?
    }

    async fn exchange(&mut self) -> io::Result<Value> {
        self.socket.write_all(&self.request).await?;
        loop {
            let decoded = Value::decode(&self.received)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            if let Some((value, consumed)) = decoded {
                self.received.drain(..consumed);
                return Ok(value);
            }
            if self.socket.read_buf(&mut self.received).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
