//! What is wrong with a peer's bytes, in the words that Redis uses for it.
//!
//! The request errors' texts are a contract: a client library shows them, and Redis's own test
//! suite compares them. Each of them ends the connection that sent the bytes, and no other.

/// Bytes that are not RESP. For a request, the text is what Redis answers after `-ERR `.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error("Protocol error: invalid multibulk length")]
    InvalidMultibulkLength,
    #[error("Protocol error: invalid bulk length")]
    InvalidBulkLength,
    #[error("Protocol error: unauthenticated multibulk length")]
    UnauthenticatedMultibulkLength,
    #[error("Protocol error: unauthenticated bulk length")]
    UnauthenticatedBulkLength,
    #[error("Protocol error: too big mbulk count string")]
    TooBigMultibulkCount,
    #[error("Protocol error: too big bulk count string")]
    TooBigBulkCount,
    #[error("Protocol error: too big inline request")]
    TooBigInline,
    #[error("Protocol error: expected '$', got '{}'", printable(*.0))]
    ExpectedDollar(u8),
    #[error("Protocol error: unbalanced quotes in request")]
    UnbalancedQuotes,
    /// Redis closes such a client without a word (its `client-query-buffer-limit`).
    #[error("Protocol error: too big request")]
    TooBigRequest,

    #[error("reply begins with byte {0:#04x}")]
    UnknownReplyType(u8),
    #[error("reply has an invalid length or count")]
    InvalidReplyLength,
    #[error("reply line is not ended by CRLF, or is too long")]
    InvalidReplyLine,
    #[error("reply holds more frames than can be counted")]
    TooManyFrames,
    #[error("reply is nested too deeply")]
    TooDeep,
}

impl ProtocolError {
    /// What Redis answers, without the leading `-` and the line end. A byte of the client that the text
    /// repeats is repeated as it is, whatever it is.
    #[must_use]
    pub fn reply(&self) -> Vec<u8> {
        match self {
            Self::ExpectedDollar(byte) => {
                let mut text = b"ERR Protocol error: expected '$', got '".to_vec();
                text.push(if matches!(byte, b'\r' | b'\n') {
                    b' '
                } else {
                    *byte
                });
                text.push(b'\'');
                text
            }
            other => format!("ERR {other}").into_bytes(),
        }
    }
}

/// An error reply is one line, so Redis writes a line break inside it as a space.
fn printable(byte: u8) -> char {
    match byte {
        b'\r' | b'\n' => ' ',
        byte => char::from(byte),
    }
}
