//! Finds where a node's reply ends, for RESP2 and RESP3, without looking into it.
//!
//! Invariant: `outstanding` is the number of frames that must still come before the reply is whole.
//! An aggregate adds its members, every frame takes one, an attribute adds its members and takes
//! none. So nesting of any depth needs no stack, and a resumed scan looks at no byte twice.

use memchr::memchr;

use crate::ProtocolError;
use crate::number::{parse_i64, short_length};

/// Longest line (simple string, error, number): nodes are trusted more than clients, a script may
/// return a long error; but it is still bounded, like any bulk.
pub const REPLY_LINE_BYTES_MAX: usize = 512 * 1024 * 1024;
/// Longest body and most members of one frame. Redis's own bound for replies is 32 bits.
pub const REPLY_LENGTH_MAX: i64 = u32::MAX as i64;

/// The type of a whole reply: its first byte that is not an attribute's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyKind {
    Simple,
    Error,
    Int,
    Bulk,
    Array,
    Null,
    Map,
    Set,
    /// Not an answer to anything: the caller must not give it to the oldest waiting request.
    Push,
    Double,
    Bool,
    BigNumber,
    Verbatim,
    BlobError,
}

impl ReplyKind {
    fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            b'+' => Self::Simple,
            b'-' => Self::Error,
            b':' => Self::Int,
            b'$' => Self::Bulk,
            b'*' => Self::Array,
            b'_' => Self::Null,
            b'%' => Self::Map,
            b'~' => Self::Set,
            b'>' => Self::Push,
            b',' => Self::Double,
            b'#' => Self::Bool,
            b'(' => Self::BigNumber,
            b'=' => Self::Verbatim,
            b'!' => Self::BlobError,
            _ => return None,
        })
    }

    /// True for both forms of an error reply.
    #[must_use]
    pub fn is_error(self) -> bool {
        matches!(self, Self::Error | Self::BlobError)
    }
}

/// What the bytes so far amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// The reply (with its attributes) is `buf[..consumed]`.
    Complete { consumed: usize, kind: ReplyKind },
    /// At least `missing` more bytes are needed.
    Incomplete { missing: usize },
}

/// Where the scan of one node's current reply stands. The reply begins at `buf[0]`; show the same
/// bytes, plus what came since, until it is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyScanner {
    /// Start of the next frame; behind the buffer's end while a body is still coming.
    at: usize,
    /// Bytes from `at` that are known to hold no line end.
    searched: usize,
    outstanding: u64,
    kind: Option<ReplyKind>,
}

impl Default for ReplyScanner {
    fn default() -> Self {
        Self {
            at: 0,
            searched: 0,
            outstanding: 1,
            kind: None,
        }
    }
}

/// What one frame's first line says.
enum Frame {
    /// It ends at this position, which may be behind what has come.
    Leaf(usize),
    /// Its members follow at this position.
    Members { at: usize, count: u64 },
}

impl ReplyScanner {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// True between replies: no byte of a next one has been looked at.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        *self == Self::default()
    }

    /// The kind of the current reply, as soon as its first byte has come.
    #[must_use]
    pub fn kind(&self) -> Option<ReplyKind> {
        self.kind
    }

    /// # Errors
    /// The bytes are no reply: the node and we are out of step, so its connection must be closed.
    pub fn scan(&mut self, buf: &[u8]) -> Result<Scan, ProtocolError> {
        loop {
            if self.at > buf.len() {
                return Ok(Scan::Incomplete {
                    missing: self.at - buf.len(),
                });
            }
            if let (0, Some(kind)) = (self.outstanding, self.kind) {
                let consumed = self.at;
                *self = Self::default();
                return Ok(Scan::Complete { consumed, kind });
            }
            let Some(&first) = buf.get(self.at) else {
                return Ok(Scan::Incomplete { missing: 1 });
            };
            let kind = ReplyKind::of(first);
            if kind.is_none() && first != b'|' {
                return Err(ProtocolError::UnknownReplyType(first));
            }
            let Some(frame) = self.frame(buf, first)? else {
                return Ok(Scan::Incomplete { missing: 1 });
            };
            // Only the reply itself is met with one frame outstanding and no kind known: before
            // that, members of its attributes are outstanding too.
            if self.outstanding == 1 && self.kind.is_none() {
                self.kind = kind;
            }
            self.take(frame, kind.is_some())?;
        }
    }

    /// The caller has taken `bytes` off the front of the buffer (sent on before the reply was
    /// whole); what is shown next begins behind them. At most [`Self::settled`] may be taken.
    pub fn discard(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.at, "a frame's unread start would be lost");
        self.at = self.at.saturating_sub(bytes);
    }

    /// How many of the `available` bytes at the buffer's front are part of this reply for sure and
    /// will not be looked at again.
    #[must_use]
    pub fn settled(&self, available: usize) -> usize {
        self.at.min(available)
    }

    fn take(&mut self, frame: Frame, counts: bool) -> Result<(), ProtocolError> {
        let members = match frame {
            Frame::Leaf(end) => {
                self.at = end;
                0
            }
            Frame::Members { at, count } => {
                self.at = at;
                count
            }
        };
        self.searched = 0;
        let left = self.outstanding - u64::from(counts);
        self.outstanding = left
            .checked_add(members)
            .ok_or(ProtocolError::TooManyFrames)?;
        Ok(())
    }

    /// Reads the first line of the frame at `self.at`. `None`: its end has not come yet.
    #[inline]
    fn frame(&mut self, buf: &[u8], first: u8) -> Result<Option<Frame>, ProtocolError> {
        let (length, next) = match first {
            b'$' | b'*' | b'=' | b'!' | b'%' | b'~' | b'>' | b'|' => {
                match short_length(buf, self.at) {
                    Some((length, next)) => (i64::from(length), next),
                    None => match self.line(buf)? {
                        None => return Ok(None),
                        Some(end) => match parse_i64(&buf[self.at + 1..end]) {
                            Some(length) if length <= REPLY_LENGTH_MAX => (length, end + 2),
                            _ => return Err(ProtocolError::InvalidReplyLength),
                        },
                    },
                }
            }
            _ => return Ok(self.line(buf)?.map(|end| Frame::Leaf(end + 2))),
        };
        match (first, u64::try_from(length)) {
            (b'$' | b'=' | b'!', Ok(_)) => Ok(Some(Frame::Leaf(next + length as usize + 2))),
            (b'*' | b'~' | b'>', Ok(count)) => Ok(Some(Frame::Members { at: next, count })),
            (b'%' | b'|', Ok(pairs)) => Ok(Some(Frame::Members {
                at: next,
                count: pairs * 2,
            })),
            // RESP2's nulls.
            (b'$' | b'*', Err(_)) if length == -1 => Ok(Some(Frame::Leaf(next))),
            _ => Err(ProtocolError::InvalidReplyLength),
        }
    }

    /// Position of the CR that ends the line at `self.at`, looking at each byte once.
    fn line(&mut self, buf: &[u8]) -> Result<Option<usize>, ProtocolError> {
        let from = self.at + self.searched;
        let found = memchr(b'\r', &buf[from..]);
        self.searched = found.map_or(buf.len(), |offset| from + offset) - self.at;
        if self.searched > REPLY_LINE_BYTES_MAX {
            return Err(ProtocolError::InvalidReplyLine);
        }
        let Some(offset) = found else { return Ok(None) };
        match buf.get(from + offset + 1) {
            None => Ok(None),
            Some(b'\n') => Ok(Some(from + offset)),
            Some(_) => Err(ProtocolError::InvalidReplyLine),
        }
    }
}

#[cfg(test)]
#[path = "reply_tests.rs"]
mod tests;
