//! Finds the next command in a client's bytes, in place: no copy, no value tree.
//!
//! A frame begins at `buf[0]` and the caller shows the same bytes, plus what came since, until it is
//! complete. The parser remembers where it was, so that a big frame in small pieces costs one pass;
//! what it remembers is only a cache of the bytes: a fresh parser over the same bytes continues
//! equally well, so handing a client to another process means handing over its bytes.
//!
//! What is accepted is what every supported engine accepts, byte for byte (even what Redis does not
//! check, such as the byte after CR), because accepted frames are forwarded as they are.

use memchr::memchr;

use crate::ProtocolError;
use crate::number::{parse_i64, short_length};

/// Most arguments of one command. Redis 6.2 cuts the connection above this (newer ones at `i32::MAX`),
/// and a node must never cut a connection that other clients share.
pub const MULTIBULK_COUNT_MAX: u32 = 1024 * 1024;
/// Longest argument: Redis's default of `proto-max-bulk-len`.
pub const BULK_BYTES_MAX: u32 = 512 * 1024 * 1024;
/// Longest inline command, and longest count or length line: Redis's `PROTO_INLINE_MAX_SIZE`.
pub const LINE_BYTES_MAX: usize = 64 * 1024;
/// Longest frame: Redis's default of `client-query-buffer-limit`. Also keeps positions in 32 bits.
pub const FRAME_BYTES_MAX: u32 = 1024 * 1024 * 1024;
/// What Redis lets a client send before it has logged in, so that strangers cannot take memory.
pub const UNAUTHENTICATED_COUNT_MAX: u32 = 10;
pub const UNAUTHENTICATED_BULK_BYTES_MAX: u32 = 16 * 1024;

/// How much one client may send in one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limits {
    Authenticated,
    Unauthenticated,
}

/// What the bytes so far amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// A command: its arguments (at least one) are in [`Args`], its raw frame is `buf[..consumed]`.
    Complete { consumed: usize },
    /// A command typed as a line. Its arguments may be quoted, so they are no slices of the buffer:
    /// give `buf[..consumed]` to [`crate::rewrite_inline`], which makes an ordinary frame of it.
    Inline { consumed: usize },
    /// Nothing to execute and nothing to answer (`*0`, `*-1`, an empty line): skip it.
    Empty { consumed: usize },
    /// At least `missing` more bytes are needed. It comes from the client: bound what you reserve.
    Incomplete { missing: usize },
}

/// Where the arguments of the command lie in its frame. One is enough for a whole worker: it means
/// nothing between calls.
#[derive(Debug, Default)]
pub struct Args {
    ranges: Vec<(u32, u32)>,
}

impl Args {
    /// Capacity that is kept for the next command (512 KiB); one huge command must not pin its own.
    const RETAINED_MAX: usize = 64 * 1024;

    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Argument `index` (0 is the command's name) of the frame `buf` that was parsed.
    #[inline]
    #[must_use]
    pub fn get<'b>(&self, buf: &'b [u8], index: usize) -> Option<&'b [u8]> {
        let &(start, end) = self.ranges.get(index)?;
        buf.get(start as usize..end as usize)
    }

    /// Start and end of argument `index` in the frame.
    #[inline]
    #[must_use]
    pub fn range(&self, index: usize) -> Option<(u32, u32)> {
        self.ranges.get(index).copied()
    }

    #[must_use]
    pub fn ranges(&self) -> &[(u32, u32)] {
        &self.ranges
    }

    pub fn iter<'a>(&'a self, buf: &'a [u8]) -> impl ExactSizeIterator<Item = &'a [u8]> + 'a {
        self.ranges
            .iter()
            .map(move |&(start, end)| &buf[start as usize..end as usize])
    }

    #[inline]
    pub fn clear(&mut self) {
        self.ranges.clear();
        if self.ranges.capacity() > Self::RETAINED_MAX {
            self.ranges.shrink_to(Self::RETAINED_MAX);
        }
    }

    #[inline]
    pub(crate) fn push(&mut self, start: u32, end: u32) {
        self.ranges.push((start, end));
    }
}

/// No body is being read; a body is at most [`BULK_BYTES_MAX`] long.
const NO_BODY: u32 = u32::MAX;

/// Where the parser of one client is inside its current frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestParser {
    /// Start of the line or body that is being read.
    at: u32,
    /// Bytes from `at` that are known to hold no line end.
    searched: u32,
    /// Arguments still to come, known once the count line has been read.
    remaining: u32,
    /// Length of the body that begins at `at`, or `NO_BODY`.
    body: u32,
}

impl Default for RequestParser {
    fn default() -> Self {
        Self {
            at: 0,
            searched: 0,
            remaining: 0,
            body: NO_BODY,
        }
    }
}

impl RequestParser {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// True between frames: no byte of a next frame has been looked at.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        *self == Self::default()
    }

    /// Parses the frame that begins at `buf[0]`, for a client that has logged in.
    ///
    /// # Errors
    /// The bytes are no request; the connection cannot be used any further.
    #[inline]
    pub fn parse(&mut self, buf: &[u8], args: &mut Args) -> Result<Parsed, ProtocolError> {
        self.parse_within(buf, args, Limits::Authenticated)
    }

    /// Like [`Self::parse`], with the limits that hold for this client now.
    ///
    /// # Errors
    /// The bytes are no request, or exceed the limits; the connection cannot be used any further.
    pub fn parse_within(
        &mut self,
        buf: &[u8],
        args: &mut Args,
        limits: Limits,
    ) -> Result<Parsed, ProtocolError> {
        args.clear();
        match buf.first() {
            None => return Ok(Parsed::Incomplete { missing: 1 }),
            Some(b'*') => {}
            Some(_) => return self.parse_line(buf),
        }
        let resumed = self.at > 0;
        let parsed = self.advance(buf, args, limits)?;
        match parsed {
            Parsed::Complete { consumed } => {
                if resumed {
                    collect(&buf[..consumed], args);
                }
                *self = Self::default();
            }
            Parsed::Empty { .. } => *self = Self::default(),
            Parsed::Inline { .. } | Parsed::Incomplete { .. } => {}
        }
        Ok(parsed)
    }

    /// Reads on from where the last call stopped; `args` gets the arguments that end in this call.
    fn advance(
        &mut self,
        buf: &[u8],
        args: &mut Args,
        limits: Limits,
    ) -> Result<Parsed, ProtocolError> {
        let mut state = *self;
        if state.at == 0 {
            let Some((count, next)) = state.length(buf, ProtocolError::TooBigMultibulkCount)?
            else {
                *self = state;
                return Ok(Parsed::Incomplete { missing: 1 });
            };
            match check_count(count, limits)? {
                None => return Ok(Parsed::Empty { consumed: next }),
                Some(count) => state.begin(next, count),
            }
        }
        while state.remaining > 0 {
            if state.body == NO_BODY {
                let Some((len, next)) = state.length(buf, ProtocolError::TooBigBulkCount)? else {
                    *self = state;
                    return Ok(Parsed::Incomplete { missing: 1 });
                };
                // As Redis: of a line that has not ended, not even the first byte is judged.
                let kind = buf[state.at as usize];
                if kind != b'$' {
                    return Err(ProtocolError::ExpectedDollar(kind));
                }
                state.body = check_bulk(len, limits)?;
                state.at = position(next)?;
                position(next + state.body as usize + 2)?;
            }
            let end = state.at + state.body;
            if buf.len() < end as usize + 2 {
                *self = state;
                return Ok(Parsed::Incomplete {
                    missing: end as usize + 2 - buf.len(),
                });
            }
            args.push(state.at, end);
            state = Self {
                at: end + 2,
                remaining: state.remaining - 1,
                ..Self::default()
            };
        }
        Ok(Parsed::Complete {
            consumed: state.at as usize,
        })
    }

    fn begin(&mut self, at: usize, count: u32) {
        // A count line is at most LINE_BYTES_MAX long, so the cast keeps its value.
        *self = Self {
            at: at as u32,
            remaining: count,
            ..Self::default()
        };
    }

    /// Reads the count or length line at `self.at`: its number (`None` if Redis would not read it) and
    /// the position behind it. The outer `None`: its end has not come yet.
    #[inline(always)]
    fn length(
        &mut self,
        buf: &[u8],
        too_big: ProtocolError,
    ) -> Result<Option<(Option<i64>, usize)>, ProtocolError> {
        match short_length(buf, self.at as usize) {
            Some((value, next)) => Ok(Some((Some(i64::from(value)), next))),
            None => self.unusual_length(buf, too_big),
        }
    }

    #[cold]
    fn unusual_length(
        &mut self,
        buf: &[u8],
        too_big: ProtocolError,
    ) -> Result<Option<(Option<i64>, usize)>, ProtocolError> {
        let Some(line) = self.line_end(buf, b'\r', too_big)? else {
            return Ok(None);
        };
        // The line's LF is skipped unseen, as Redis does, but it must be there.
        if line + 1 >= buf.len() {
            return Ok(None);
        }
        // The line may be empty, without even the byte that says what it counts.
        let digits = buf.get(self.at as usize + 1..line).unwrap_or_default();
        Ok(Some((parse_i64(digits), line + 2)))
    }

    /// Position of the first `end` byte at or after `self.at`, looking at each byte once.
    fn line_end(
        &mut self,
        buf: &[u8],
        end: u8,
        too_big: ProtocolError,
    ) -> Result<Option<usize>, ProtocolError> {
        let at = self.at as usize;
        let from = at + self.searched as usize;
        let (found, searched) = match memchr(end, buf.get(from..).unwrap_or_default()) {
            Some(offset) => (Some(from + offset), from + offset - at),
            None => (None, buf.len().saturating_sub(at)),
        };
        // The same rule whether the end has come or not: how the line was cut must not matter.
        if searched > LINE_BYTES_MAX {
            return Err(too_big);
        }
        self.searched = searched as u32; // at most LINE_BYTES_MAX
        Ok(found)
    }

    fn parse_line(&mut self, buf: &[u8]) -> Result<Parsed, ProtocolError> {
        let Some(end) = self.line_end(buf, b'\n', ProtocolError::TooBigInline)? else {
            return Ok(Parsed::Incomplete { missing: 1 });
        };
        *self = Self::default();
        let consumed = end + 1;
        if buf[..end].iter().all(|&byte| crate::inline::is_space(byte)) {
            return Ok(Parsed::Empty { consumed });
        }
        Ok(Parsed::Inline { consumed })
    }
}

/// `None` for a count that asks for nothing.
#[inline]
fn check_count(count: Option<i64>, limits: Limits) -> Result<Option<u32>, ProtocolError> {
    let count = count.ok_or(ProtocolError::InvalidMultibulkLength)?;
    if count <= 0 {
        return Ok(None);
    }
    match u32::try_from(count) {
        Ok(count) if count <= MULTIBULK_COUNT_MAX => {
            if limits == Limits::Unauthenticated && count > UNAUTHENTICATED_COUNT_MAX {
                return Err(ProtocolError::UnauthenticatedMultibulkLength);
            }
            Ok(Some(count))
        }
        _ => Err(ProtocolError::InvalidMultibulkLength),
    }
}

#[inline]
fn check_bulk(len: Option<i64>, limits: Limits) -> Result<u32, ProtocolError> {
    match len.map(u32::try_from) {
        Some(Ok(len)) if len <= BULK_BYTES_MAX => {
            if limits == Limits::Unauthenticated && len > UNAUTHENTICATED_BULK_BYTES_MAX {
                return Err(ProtocolError::UnauthenticatedBulkLength);
            }
            Ok(len)
        }
        _ => Err(ProtocolError::InvalidBulkLength),
    }
}

#[inline]
fn position(at: usize) -> Result<u32, ProtocolError> {
    match u32::try_from(at) {
        Ok(at) if at <= FRAME_BYTES_MAX => Ok(at),
        _ => Err(ProtocolError::TooBigRequest),
    }
}

/// Lists the arguments of a complete frame. Used once for a frame that came in pieces, so that a
/// waiting client holds no list.
fn collect(frame: &[u8], args: &mut Args) {
    args.clear();
    let mut state = RequestParser::default();
    let parsed = state.advance(frame, args, Limits::Authenticated);
    debug_assert_eq!(
        parsed,
        Ok(Parsed::Complete {
            consumed: frame.len()
        })
    );
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
