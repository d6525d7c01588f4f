//! Owned replies, for connections where clarity counts and speed does not (an agent's admin
//! connection, tests). The data path never builds one.
//!
//! Invariant: decoding takes memory in proportion to the bytes that are there, whatever lengths they
//! claim, and its recursion is bounded.

use crate::reply::{ReplyScanner, Scan};
use crate::write::{self, Protocol};
use crate::{ProtocolError, parse_i64};

/// Deepest nesting. Redis's own replies reach about 8 (COMMAND DOCS); scripts may return more.
pub const DEPTH_MAX: u32 = 128;

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Simple(String),
    /// With its code: `ERR no such key`.
    Error(String),
    Int(i64),
    Bulk(Vec<u8>),
    Null,
    Array(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Set(Vec<Value>),
    Push(Vec<Value>),
    Double(f64),
    Bool(bool),
    BigNumber(String),
    Verbatim {
        format: [u8; 3],
        text: Vec<u8>,
    },
}

impl Value {
    /// The first reply in `buf` and how many bytes it took; `None` while it is incomplete.
    /// Attributes are dropped. Scanning starts over in each call, so wait for more bytes with a
    /// [`ReplyScanner`] if replies are big.
    ///
    /// # Errors
    /// The bytes are no reply, or it is nested deeper than [`DEPTH_MAX`].
    pub fn decode(buf: &[u8]) -> Result<Option<(Self, usize)>, ProtocolError> {
        let consumed = match ReplyScanner::new().scan(buf)? {
            Scan::Incomplete { .. } => return Ok(None),
            Scan::Complete { consumed, .. } => consumed,
        };
        // The frame is whole, so every read below finds what it looks for.
        let mut reader = Reader {
            rest: &buf[..consumed],
        };
        let value = reader.value(0)?;
        Ok(Some((value, consumed)))
    }

    /// Appends the value as a client of `protocol` reads it.
    pub fn encode(&self, out: &mut Vec<u8>, protocol: Protocol) {
        match self {
            Self::Simple(text) => write::write_simple(out, text),
            Self::Error(text) => write::write_error(out, text),
            Self::Int(value) => write::write_int(out, *value),
            Self::Bulk(bytes) => write::write_bulk(out, bytes),
            Self::Null => write::write_null(out, protocol),
            Self::Double(value) => write::write_double(out, protocol, *value),
            Self::Bool(value) => write::write_bool(out, protocol, *value),
            Self::Verbatim { format, text } => write::write_verbatim(out, protocol, *format, text),
            Self::BigNumber(digits) => write::write_big_number(out, protocol, digits.as_bytes()),
            Self::Array(items) => {
                write::write_array_header(out, items.len());
                items.iter().for_each(|item| item.encode(out, protocol));
            }
            Self::Set(items) => {
                write::write_set_header(out, protocol, items.len());
                items.iter().for_each(|item| item.encode(out, protocol));
            }
            Self::Push(items) => {
                write::write_push_header(out, protocol, items.len());
                items.iter().for_each(|item| item.encode(out, protocol));
            }
            Self::Map(pairs) => {
                write::write_map_header(out, protocol, pairs.len());
                for (key, value) in pairs {
                    key.encode(out, protocol);
                    value.encode(out, protocol);
                }
            }
        }
    }

    /// The bytes of any kind of string, not of an error.
    #[must_use]
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Simple(text) | Self::BigNumber(text) => Some(text.as_bytes()),
            Self::Bulk(bytes) | Self::Verbatim { text: bytes, .. } => Some(bytes),
            _ => None,
        }
    }

    /// Like [`Self::as_bytes`], if it is UTF-8.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(self.as_bytes()?).ok()
    }

    /// An integer, also one that a node sent as a string.
    #[must_use]
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            other => parse_i64(other.as_bytes()?),
        }
    }

    /// The members of an array, a set or a push.
    #[must_use]
    pub fn as_items(&self) -> Option<&[Value]> {
        match self {
            Self::Array(items) | Self::Set(items) | Self::Push(items) => Some(items),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_error(&self) -> Option<&str> {
        match self {
            Self::Error(text) => Some(text),
            _ => None,
        }
    }

    #[must_use]
    pub fn is_ok(&self) -> bool {
        matches!(self, Self::Simple(text) if text == "OK")
    }
}

struct Reader<'b> {
    rest: &'b [u8],
}

impl<'b> Reader<'b> {
    fn value(&mut self, depth: u32) -> Result<Value, ProtocolError> {
        if depth > DEPTH_MAX {
            return Err(ProtocolError::TooDeep);
        }
        let (kind, line) = self.line()?;
        Ok(match kind {
            b'+' => Value::Simple(text(line)),
            b'-' => Value::Error(text(line)),
            b':' => Value::Int(parse_i64(line).ok_or(ProtocolError::InvalidReplyLine)?),
            b'(' => Value::BigNumber(text(line)),
            b',' => {
                let number = text(line).parse();
                Value::Double(number.map_err(|_| ProtocolError::InvalidReplyLine)?)
            }
            b'#' => Value::Bool(line == b"t"),
            b'_' => Value::Null,
            b'$' | b'*' if line == b"-1" => Value::Null,
            b'$' => Value::Bulk(self.body(line)?.to_vec()),
            b'!' => Value::Error(text(self.body(line)?)),
            b'=' => match self.body(line)? {
                [a, b, c, b':', body @ ..] => Value::Verbatim {
                    format: [*a, *b, *c],
                    text: body.to_vec(),
                },
                _ => return Err(ProtocolError::InvalidReplyLength),
            },
            b'*' => Value::Array(self.items(line, depth)?),
            b'~' => Value::Set(self.items(line, depth)?),
            b'>' => Value::Push(self.items(line, depth)?),
            b'%' => Value::Map(self.pairs(line, depth)?),
            b'|' => {
                self.pairs(line, depth)?;
                // A chain of attributes counts as nesting, so that it cannot recurse without bound.
                self.value(depth + 1)?
            }
            other => return Err(ProtocolError::UnknownReplyType(other)),
        })
    }

    fn line(&mut self) -> Result<(u8, &'b [u8]), ProtocolError> {
        let (&kind, rest) = self
            .rest
            .split_first()
            .ok_or(ProtocolError::InvalidReplyLine)?;
        let end = memchr::memchr(b'\r', rest).ok_or(ProtocolError::InvalidReplyLine)?;
        self.rest = rest.get(end + 2..).ok_or(ProtocolError::InvalidReplyLine)?;
        Ok((kind, &rest[..end]))
    }

    fn body(&mut self, line: &[u8]) -> Result<&'b [u8], ProtocolError> {
        let len = length(line)?;
        let body = self
            .rest
            .get(..len)
            .ok_or(ProtocolError::InvalidReplyLength)?;
        self.rest = self
            .rest
            .get(len + 2..)
            .ok_or(ProtocolError::InvalidReplyLength)?;
        Ok(body)
    }

    fn items(&mut self, line: &[u8], depth: u32) -> Result<Vec<Value>, ProtocolError> {
        (0..length(line)?).map(|_| self.value(depth + 1)).collect()
    }

    fn pairs(&mut self, line: &[u8], depth: u32) -> Result<Vec<(Value, Value)>, ProtocolError> {
        (0..length(line)?)
            .map(|_| Ok((self.value(depth + 1)?, self.value(depth + 1)?)))
            .collect()
    }
}

fn length(line: &[u8]) -> Result<usize, ProtocolError> {
    let length = parse_i64(line).ok_or(ProtocolError::InvalidReplyLength)?;
    usize::try_from(length).map_err(|_| ProtocolError::InvalidReplyLength)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
#[path = "value_tests.rs"]
mod tests;
