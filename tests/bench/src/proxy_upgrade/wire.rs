//! One connection, byte by byte: it is made once, and never made again.
//!
//! Invariant: every byte that comes is looked at; what nobody asked for is found.

use std::time::Duration;

use anyhow::{Context as _, bail};
use slotmesh_resp::{ReplyScanner, Scan, write};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// Longer than anything that a hand-over may take; who waits longer waits for ever.
pub(super) const REPLY_LIMIT: Duration = Duration::from_secs(15);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Of what went wrong, in a report.
const SHOWN_BYTES_MAX: usize = 120;

/// The other end has closed the connection; what was unread is shown.
#[derive(Debug, thiserror::Error)]
#[error("closed by the proxy after {0:?}")]
struct Closed(String);

/// Whether a connection is over, which is all that is wrong with it.
pub(super) fn is_closed(error: &anyhow::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    error.chain().any(|cause| {
        let kind = cause.downcast_ref().map(std::io::Error::kind);
        cause.is::<Closed>() || matches!(kind, Some(BrokenPipe | ConnectionReset))
    })
}

/// See the module.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Wire {
    pub(super) async fn connect(address: &str) -> anyhow::Result<Self> {
        let connecting = timeout(CONNECT_LIMIT, TcpStream::connect(address)).await;
        let stream = connecting
            .with_context(|| format!("no connection to {address} in {CONNECT_LIMIT:?}"))?
            .with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
        })
    }

    /// In RESP3.
    pub(super) async fn connect_resp3(address: &str) -> anyhow::Result<Self> {
        let mut wire = Self::connect(address).await?;
        let reply = wire.ask("HELLO 3").await?;
        anyhow::ensure!(reply.starts_with('%'), "HELLO 3: {}", shown(&reply));
        Ok(wire)
    }

    /// Sends commands, one a line, words separated by spaces.
    pub(super) async fn say(&mut self, lines: &str) -> anyhow::Result<()> {
        let mut frames = Vec::new();
        for line in lines.lines() {
            let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
            write::encode_command(&mut frames, &words);
        }
        let sent = timeout(REPLY_LIMIT, self.stream.write_all(&frames)).await;
        sent.with_context(|| format!("nothing could be sent for {REPLY_LIMIT:?}"))?
            .context("send")
    }

    /// The next reply or push.
    pub(super) async fn hear(&mut self) -> anyhow::Result<String> {
        let heard = timeout(REPLY_LIMIT, self.hear_however_long()).await;
        heard.with_context(|| format!("no reply in {REPLY_LIMIT:?}"))?
    }

    /// As [`Wire::hear`], for who waits for something that others do.
    pub(super) async fn hear_however_long(&mut self) -> anyhow::Result<String> {
        loop {
            match ReplyScanner::new().scan(&self.input) {
                Ok(Scan::Complete { consumed, .. }) => {
                    let reply: Vec<u8> = self.input.drain(..consumed).collect();
                    return Ok(String::from_utf8_lossy(&reply).into_owned());
                }
                Ok(_) => {}
                Err(error) => bail!("no reply at all: {error}: {}", self.left()),
            }
            if self
                .stream
                .read_buf(&mut self.input)
                .await
                .context("read")?
                == 0
            {
                return Err(Closed(self.left()).into());
            }
        }
    }

    pub(super) async fn ask(&mut self, line: &str) -> anyhow::Result<String> {
        self.say(line).await?;
        self.hear().await
    }

    /// Asks for what has one right answer.
    pub(super) async fn expect(&mut self, line: &str, want: &str) -> anyhow::Result<()> {
        let reply = self.ask(line).await?;
        anyhow::ensure!(
            reply == want,
            "{line}: {} instead of {want:?}",
            shown(&reply)
        );
        Ok(())
    }

    /// What the proxy calls this connection.
    pub(super) async fn id(&mut self) -> anyhow::Result<String> {
        let id = self.ask("CLIENT ID").await?;
        anyhow::ensure!(id.starts_with(':'), "CLIENT ID: {}", shown(&id));
        Ok(id)
    }

    /// Nobody waits for anything: is the connection as it was, and has nothing come?
    ///
    /// # Errors
    /// It has ended, or bytes came that nobody had asked for.
    pub(super) fn is_quiet(&mut self) -> anyhow::Result<()> {
        match self.stream.try_read_buf(&mut self.input) {
            Ok(0) => return Err(Closed(self.left()).into()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("read"),
        }
        anyhow::ensure!(self.input.is_empty(), "unasked for: {:?}", self.left());
        Ok(())
    }

    fn left(&self) -> String {
        shown(&String::from_utf8_lossy(&self.input))
    }
}

/// The begin of a reply, for people.
pub(super) fn shown(reply: &str) -> String {
    reply
        .chars()
        .take(SHOWN_BYTES_MAX)
        .collect::<String>()
        .escape_debug()
        .to_string()
}

/// The number of `:7\r\n`.
pub(super) fn integer(reply: &str) -> anyhow::Result<u64> {
    let digits = reply.strip_prefix(':').map(str::trim_end);
    let number = digits.and_then(|digits| digits.parse().ok());
    number.with_context(|| format!("{} instead of a number", shown(reply)))
}
