//! Trace ids: which call, or which decision of the leader's own, led to which change.
//!
//! Invariant: every call that changes something is served with a trace id, the caller's (W3C
//! `traceparent`) or one made here; the same goes to the leader with a forwarded call, into the
//! task's record, and to the agents.

use std::{fmt::Write as _, future::Future};

use tokio::task::futures::TaskLocalFuture;
use tonic::codegen::http::{HeaderMap, HeaderValue};

/// As W3C's Trace Context names it.
pub(crate) const HEADER: &str = "traceparent";

tokio::task_local! {
    /// Of the call that this task serves.
    static CURRENT: String;
}

/// Of the call that is being served; outside of one, a new one.
pub(crate) fn current() -> String {
    CURRENT.try_with(Clone::clone).unwrap_or_else(|_| new_id())
}

/// Of the call that is being served; outside of one, `other`.
pub(crate) fn current_or(other: &str) -> String {
    let current = CURRENT.try_with(Clone::clone);
    current.unwrap_or_else(|_| other.to_owned())
}

/// A future in which [`current`] is `id`.
pub(crate) fn scope<F: Future>(id: String, future: F) -> TaskLocalFuture<String, F> {
    CURRENT.scope(id, future)
}

/// 32 hexadecimal digits, not all of them 0.
pub(crate) fn new_id() -> String {
    hex::encode(rand::random::<[u8; 16]>())
}

/// The header for a call that belongs to a trace; `None` for what is no trace id.
pub(crate) fn parent(trace_id: &str) -> Option<String> {
    let mut parent = String::from("00-");
    if !is_id(trace_id, 32) {
        return None;
    }
    // Every call is a span of its own.
    let span = rand::random::<u64>().max(1);
    write!(parent, "{trace_id}-{span:016x}-01").ok()?;
    Some(parent)
}

/// The caller's trace id. One that gave none, or nonsense, is given one, in the headers too.
pub(crate) fn of(headers: &mut HeaderMap) -> String {
    let given = headers.get(HEADER).and_then(|value| value.to_str().ok());
    if let Some(id) = given.and_then(read) {
        return id.to_owned();
    }
    let id = new_id();
    if let Some(Ok(value)) = parent(&id).as_deref().map(HeaderValue::from_str) {
        headers.insert(HEADER, value);
    }
    id
}

/// The trace id in `00-<trace id>-<span id>-<flags>`; later versions may have more parts.
fn read(text: &str) -> Option<&str> {
    let mut parts = text.trim().split('-');
    let (version, id, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_version = version.len() == 2 && is_hex(version) && version != "ff";
    let is_flags = flags.len() == 2 && is_hex(flags);
    let is_whole = version != "00" || parts.next().is_none();
    (is_version && is_id(id, 32) && is_id(span, 16) && is_flags && is_whole).then_some(id)
}

fn is_id(text: &str, length: usize) -> bool {
    text.len() == length && is_hex(text) && text.bytes().any(|b| b != b'0')
}

fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn headers(text: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(HEADER, HeaderValue::from_str(text).unwrap());
        headers
    }

    #[test]
    fn the_callers_trace_is_kept_and_its_header_is_left_as_it_is() {
        let mut headers = headers(GIVEN);
        assert_eq!(of(&mut headers), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(headers.get(HEADER).unwrap(), GIVEN);
    }

    #[test]
    fn a_call_without_a_trace_or_with_nonsense_is_given_one_that_the_leader_sees_too() {
        let zeros = "00-00000000000000000000000000000000-00f067aa0ba902b7-01";
        let upper = GIVEN.to_ascii_uppercase();
        for text in ["", "x", zeros, &upper, &GIVEN[..54], &format!("{GIVEN}-x")] {
            let mut headers = headers(text);
            let id = of(&mut headers);
            assert!(is_id(&id, 32), "{text:?}: {id}");
            assert_eq!(of(&mut headers), id, "{text:?}: forwarded as it is");
        }
        assert_ne!(of(&mut HeaderMap::new()), of(&mut HeaderMap::new()));
    }

    #[tokio::test]
    async fn what_is_done_in_a_call_has_its_trace_and_what_is_not_has_its_own() {
        let seen = scope("a".into(), async { (current(), current_or("b")) }).await;
        assert_eq!(seen, ("a".to_owned(), "a".to_owned()));
        assert_eq!(current_or("b"), "b");
        assert!(is_id(&current(), 32));
        assert_eq!(parent("a"), None);
    }
}
