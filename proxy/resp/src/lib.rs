//! RESP2 and RESP3 on byte slices: what clients send ([`request`]), what nodes answer ([`reply`]),
//! and small owned values for control connections ([`value`], [`mod@write`]).
//!
//! Invariant: nothing here reads a socket, a clock or another workspace crate, and no input makes
//! it panic, rescan what it has already seen, or allocate more than the input itself is long.
//! Every parser gives the same answer however its input was cut into pieces.

mod error;
mod inline;
mod number;
pub mod reply;
pub mod request;
pub mod value;
pub mod write;

pub use error::ProtocolError;
pub use inline::rewrite_inline;
pub use number::parse_i64;
pub use reply::{ReplyKind, ReplyScanner, Scan};
pub use request::{Args, Limits, Parsed, RequestParser};
pub use value::Value;
pub use write::Protocol;
