//! Lines of MONITOR: when, from which connection, which command.
//!
//! Invariant: what is not such a line is not taken for one.

/// Commands of the load that change data. An EVAL is one as a whole: what it does inside is shown as
/// lines of `lua`, which belong to no connection.
const WRITES: [&str; 9] = [
    "RPUSH", "INCR", "SET", "EVAL", "EVALSHA", "PUBLISH", "DEL", "HINCRBY", "APPEND",
];
/// After these a connection may be of another user.
const LOGINS: [&str; 3] = ["AUTH", "HELLO", "RESET"];

/// One line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Line<'a> {
    /// Wall clock of the process, in microseconds.
    pub(super) wall_us: u64,
    /// `address:port` of the connection; `lua` and `unix:…` stand for themselves.
    pub(super) client: &'a str,
    /// As the client wrote it.
    pub(super) command: &'a str,
}

impl<'a> Line<'a> {
    /// Of `+1795331617.693419 [0 127.0.0.1:37178] "RPUSH" "a" "1"`, with or without its `+`.
    #[must_use]
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let text = text.strip_prefix('+').unwrap_or(text);
        let (stamp, rest) = text.split_once(" [")?;
        let (seconds, micros) = stamp.split_once('.')?;
        let wall_us = seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?;
        let (whose, words) = rest.split_once("] \"")?;
        let (_, client) = whose.split_once(' ')?;
        let (command, _) = words.split_once('"')?;
        Some(Self {
            wall_us,
            client,
            command,
        })
    }

    /// Whether it changes data or sends messages.
    #[must_use]
    pub(super) fn is_write(&self) -> bool {
        WRITES.iter().any(|w| w.eq_ignore_ascii_case(self.command))
    }

    /// Whether its connection may be of another user afterwards.
    #[must_use]
    pub(super) fn is_login(&self) -> bool {
        LOGINS.iter().any(|w| w.eq_ignore_ascii_case(self.command))
    }

    /// The host of a connection over the network.
    #[must_use]
    pub(super) fn host(&self) -> Option<&'a str> {
        let (host, port) = self.client.rsplit_once(':')?;
        (port.parse::<u16>().is_ok() && host != "unix").then_some(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_when_who_and_what() {
        let line = "+1795331617.693419 [0 10.77.0.16:37178] \"rpush\" \"a\" \"1\"";
        let line = Line::parse(line).unwrap();
        assert_eq!(line.wall_us, 1_795_331_617_693_419);
        assert_eq!(line.host(), Some("10.77.0.16"));
        assert!(line.is_write() && !line.is_login());
        let script = Line::parse("1.000002 [3 lua] \"RPUSH\" \"k\" \"5\"").unwrap();
        assert_eq!((script.host(), script.wall_us), (None, 1_000_002));
        let agent = Line::parse("1.0 [0 unix:/a b/admin.sock] \"INFO\"").unwrap();
        assert_eq!((agent.host(), agent.command), (None, "INFO"));
        let login = Line::parse("1.0 [0 1.2.3.4:5] \"AUTH\" \"(redacted)\"").unwrap();
        assert!(login.is_login() && !login.is_write());
        for other in ["+OK", "", "-ERR [0 x] \"", "1.0 [0 1.2.3.4:5]"] {
            assert_eq!(Line::parse(other), None, "{other}");
        }
    }
}
