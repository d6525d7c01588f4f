//! A client's socket with TLS: from the byte that says whether it speaks it, to the last word.
//!
//! Invariants: what was sealed is sent before anything else is sealed, and no more than one piece of it
//! waits ([`PIECE`]); a session is worth what it is at any byte, so it can move between two of them; a
//! socket that failed once is not used again.

use std::io::{self, Read, Write};
use std::sync::Arc;

use super::Port;
use super::greeting::Greeting;
use super::records::Records;
use super::secrets::HANDSHAKE;

/// Sealed at a time: what a socket that is full leaves of it waits in memory.
pub(super) const PIECE: usize = 64 * 1024;
/// The answer to a client without TLS where it must have it.
const ONLY_TLS: &[u8] = b"-ERR this port only takes TLS connections\r\n";

/// How far a client's TLS is.
#[derive(Debug)]
pub(super) enum Stage {
    /// It has said nothing yet: it may be one without TLS.
    Unsaid(Arc<Port>),
    Greeting(Box<Greeting>),
    Open(Box<Records>),
    /// Its handshake led to nothing.
    Ended,
}

/// What a read brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Got {
    /// Bytes of requests, at the front of the buffer.
    pub(crate) bytes: usize,
    /// The socket may have more.
    pub(crate) more: bool,
    /// The client sends nothing more.
    pub(crate) ended: bool,
    /// It is a client without TLS, and all of this was its.
    pub(crate) is_plain: bool,
    /// Its handshake has begun with this.
    pub(crate) begins: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Tls {
    pub(super) stage: Stage,
    /// Sealed, and not sent from `sent` on.
    pub(super) out: Vec<u8>,
    pub(super) sent: usize,
    broken: bool,
    /// The client said that it sends nothing more: the socket is not read again.
    ended: bool,
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Tls {
    pub(super) fn of(stage: Stage) -> Self {
        Self {
            stage,
            out: Vec::new(),
            sent: 0,
            broken: false,
            ended: false,
        }
    }

    /// Of a client that has just connected.
    pub(crate) fn unsaid(port: &Arc<Port>) -> Box<Self> {
        Box::new(Self::of(Stage::Unsaid(Arc::clone(port))))
    }

    /// It is in its handshake.
    pub(crate) fn is_greeting(&self) -> bool {
        matches!(self.stage, Stage::Greeting(_))
    }

    /// It has a session.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open(_))
    }

    /// All of it can be told to another process: nothing of a handshake, and not that the client sends
    /// nothing more.
    pub(crate) fn may_travel(&self) -> bool {
        matches!(self.stage, Stage::Unsaid(_) | Stage::Open(_)) && !self.ended
    }

    /// The beginning of a record has come: the client is in the midst of sending.
    pub(crate) fn has_partial(&self) -> bool {
        matches!(&self.stage, Stage::Open(records) if !records.partial.is_empty())
    }

    /// Something is sealed and not sent.
    pub(crate) fn has_unsent(&self) -> bool {
        self.sent < self.out.len()
    }

    /// Reads once and opens what is whole, at the front of `buffer`, which has room for two records.
    /// Answers that TLS itself gives are sent as far as the socket takes them. Behind the client's last
    /// word this says so again, whatever the socket has.
    ///
    /// # Errors
    /// Of the socket; `InvalidData`: the client is to be closed.
    pub(crate) fn read<S: Read + Write>(
        &mut self,
        socket: &mut S,
        buffer: &mut [u8],
    ) -> io::Result<Got> {
        if self.broken {
            return Err(broken("the session is over"));
        }
        if self.ended {
            return Ok(Got {
                ended: true,
                ..Got::default()
            });
        }
        let kept: &[u8] = match &self.stage {
            Stage::Unsaid(_) | Stage::Ended => &[],
            Stage::Greeting(greeting) => &greeting.partial,
            Stage::Open(records) => &records.partial,
        };
        let begin = kept.len();
        buffer[..begin].copy_from_slice(kept);
        let count = socket.read(&mut buffer[begin..])?;
        if count == 0 {
            return Ok(Got {
                ended: true,
                ..Got::default()
            });
        }
        let more = begin + count == buffer.len();
        let mut got = self.take(socket, &mut buffer[..begin + count]);
        if let Ok(got) = &mut got {
            got.more = more;
        }
        if self.has_unsent()
            && let Err(error) = self.flush(socket)
            && got.is_ok()
        {
            return Err(error);
        }
        self.broken |= got.is_err();
        got
    }

    /// What a read brought is the next stage's.
    fn take<S: Write>(&mut self, socket: &mut S, bytes: &mut [u8]) -> io::Result<Got> {
        let mut got = Got::default();
        if let Stage::Unsaid(port) = &self.stage {
            if bytes[0] != HANDSHAKE {
                if port.required {
                    // It is closed either way.
                    let _ = socket.write(ONLY_TLS);
                    return Err(broken("a client without TLS"));
                }
                (got.bytes, got.is_plain) = (bytes.len(), true);
                return Ok(got);
            }
            let greeting = Greeting::new(port).map_err(broken)?;
            self.stage = Stage::Greeting(Box::new(greeting));
            got.begins = true;
        }
        let mut len = bytes.len();
        if let Stage::Greeting(greeting) = &mut self.stage {
            let (done, used) = greeting.hear(bytes, &mut self.out).map_err(broken)?;
            if !done {
                return Ok(got);
            }
            self.open_session()?;
            bytes.copy_within(used.., 0);
            len -= used;
        }
        if let Stage::Open(records) = &mut self.stage {
            // What waits is measured before it grows.
            self.out.drain(..std::mem::take(&mut self.sent));
            let opened = records
                .open(&mut bytes[..len], &mut self.out)
                .map_err(broken)?;
            (got.bytes, got.ended) = (opened.bytes, opened.ended);
            self.ended = opened.ended;
        }
        Ok(got)
    }

    fn open_session(&mut self) -> io::Result<()> {
        let Stage::Greeting(greeting) = std::mem::replace(&mut self.stage, Stage::Ended) else {
            return Ok(());
        };
        let records = greeting.session().map_err(broken)?;
        self.stage = Stage::Open(Box::new(records));
        Ok(())
    }

    /// Sends what waits. True: nothing does any more.
    fn flush<S: Write>(&mut self, socket: &mut S) -> io::Result<bool> {
        while self.has_unsent() {
            match write(socket, &self.out[self.sent..]) {
                Ok(0) => return Ok(false),
                Ok(count) => self.sent += count,
                Err(error) => {
                    self.broken = true;
                    return Err(error);
                }
            }
        }
        (self.out, self.sent) = (Vec::new(), 0); // who is idle has no buffer
        Ok(true)
    }

    /// Seals and sends what the socket takes now; returns how much of `bytes` is on its way. With
    /// nothing to send, sends what waits. `scratch` is anybody's.
    ///
    /// # Errors
    /// The client is to be closed.
    pub(crate) fn send<S: Write>(
        &mut self,
        socket: &mut S,
        bytes: &[u8],
        scratch: &mut Vec<u8>,
    ) -> io::Result<usize> {
        if self.broken {
            return Err(broken("the session is over"));
        }
        if self.has_unsent() && !self.flush(socket)? {
            return Ok(0);
        }
        let Stage::Open(records) = &mut self.stage else {
            return Ok(0); // it has asked for nothing
        };
        let mut used = 0;
        while used < bytes.len() {
            let piece = &bytes[used..bytes.len().min(used + PIECE)];
            scratch.clear();
            let sealed = records.seal(piece, scratch).map_err(broken);
            let wrote = sealed.and_then(|()| write(socket, scratch));
            self.broken = wrote.is_err();
            let wrote = wrote?;
            used += piece.len();
            if wrote < scratch.len() {
                self.out.extend_from_slice(&scratch[wrote..]);
                break;
            }
        }
        Ok(used)
    }

    /// The last word, if the socket takes it: the client knows then that nothing was cut off.
    pub(crate) fn farewell<S: Write>(&mut self, socket: &mut S) {
        let mut word = Vec::new();
        if let Stage::Open(records) = &mut self.stage
            && !self.broken
            && self.out.is_empty()
            && records.seal_end(&mut word).is_ok()
        {
            let _ = write(socket, &word); // it may be gone
            self.broken = true;
        }
    }
}

/// Writes what the socket takes now.
pub(crate) fn write<S: Write>(socket: &mut S, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match socket.write(bytes) {
            Ok(count) => return Ok(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
