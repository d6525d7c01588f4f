//! The time of records: milliseconds since the Unix epoch, and as text.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now. Times in records only order events for people and end waits; nothing's safety depends on
/// them.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// RFC 3339 in UTC, with milliseconds; empty for 0.
#[must_use]
pub fn rfc3339(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return String::new();
    }
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map(|t| format!("{t:.3}"))
        .unwrap_or_default()
}

/// Milliseconds since the Unix epoch of a time with an offset; `None` when it is none, or before it.
#[must_use]
pub fn from_rfc3339(text: &str) -> Option<u64> {
    let time: jiff::Timestamp = text.parse().ok()?;
    u64::try_from(time.as_millisecond()).ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(
            super::rfc3339(1_795_300_000_123),
            "2026-11-21T22:26:40.123Z"
        );
        assert_eq!(super::rfc3339(0), "");
        assert_eq!(
            super::from_rfc3339("2026-11-21T23:26:40.123+01:00"),
            Some(1_795_300_000_123)
        );
        assert_eq!(super::from_rfc3339("2026-11-21"), None);
    }
}
