//! What a node says on a connection that subscribes, and which channels are the proxies' own.
//!
//! Invariant: bytes that are none of the known messages are never taken for one.

use super::pubsub_topics::TopicKind;

/// Channels and keys of this kind are the mesh's own: clients neither see nor hear of them.
pub(crate) const HIDDEN: &[u8] = b"__slotmesh";

/// One frame of a subscribed connection (RESP2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard<'a> {
    Message {
        kind: TopicKind,
        /// What was subscribed: the channel or the pattern.
        topic: &'a [u8],
        channel: &'a [u8],
    },
    /// The answer to a SUBSCRIBE or UNSUBSCRIBE.
    Confirmed,
    /// The same, with the error's text.
    Error(&'a [u8]),
    Other,
}

impl<'a> Heard<'a> {
    pub(super) fn read(frame: &'a [u8]) -> Self {
        if let Some(rest) = frame.strip_prefix(b"-") {
            return Self::Error(rest.strip_suffix(b"\r\n").unwrap_or(rest));
        }
        let mut members = members(frame);
        let mut next = || members.next().unwrap_or_default();
        let word = next();
        match word {
            b"message" | b"smessage" => {
                let channel = next();
                Self::Message {
                    kind: TopicKind::of_messages(word == b"smessage"),
                    topic: channel,
                    channel,
                }
            }
            b"pmessage" => Self::Message {
                kind: TopicKind::Pattern,
                topic: next(),
                channel: next(),
            },
            _ if TopicKind::ALL
                .iter()
                .any(|kind| [kind.subscribe(), kind.unsubscribe()].contains(&word)) =>
            {
                Self::Confirmed
            }
            _ => Self::Other,
        }
    }

    pub(super) fn is_hidden(channel: &[u8]) -> bool {
        let own_key = |channel: &[u8]| {
            let at = memchr::memmem::find(channel, b"__:");
            at.is_some_and(|at| channel[at + 3..].starts_with(HIDDEN))
        };
        channel.starts_with(HIDDEN) || (channel.starts_with(b"__keyspace@") && own_key(channel))
    }
}

/// The bulk strings at the beginning of an array or push.
pub(super) fn members(frame: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = match frame.first() {
        Some(b'*' | b'>') => line(frame).map_or(&[][..], |(_, rest)| rest),
        _ => &[],
    };
    std::iter::from_fn(move || {
        let (header, body) = line(rest)?;
        let digits = header.strip_prefix(b"$")?;
        let len = usize::try_from(slotmesh_resp::parse_i64(digits)?).ok()?;
        let member = body.get(..len)?;
        rest = body.get(len + 2..)?;
        Some(member)
    })
}

/// The first line without its end, and what follows.
fn line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = memchr::memchr(b'\n', bytes)?;
    Some((bytes.get(..end.checked_sub(1)?)?, &bytes[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_all_kinds_are_told_from_confirmations() {
        let heard = Heard::read(b"*3\r\n$7\r\nmessage\r\n$2\r\nch\r\n$2\r\nhi\r\n");
        let message = |kind, topic, channel| Heard::Message {
            kind,
            topic,
            channel,
        };
        assert_eq!(heard, message(TopicKind::Channel, b"ch", b"ch"));
        let heard = Heard::read(b"*4\r\n$8\r\npmessage\r\n$2\r\nc*\r\n$2\r\nch\r\n$2\r\nhi\r\n");
        assert_eq!(heard, message(TopicKind::Pattern, b"c*", b"ch"));
        let heard = Heard::read(b"*3\r\n$8\r\nsmessage\r\n$2\r\nch\r\n$2\r\nhi\r\n");
        assert_eq!(heard, message(TopicKind::ShardChannel, b"ch", b"ch"));
        let heard = Heard::read(b"*3\r\n$10\r\npsubscribe\r\n$2\r\nc*\r\n:1\r\n");
        assert_eq!(heard, Heard::Confirmed);
        let heard = Heard::read(b"*3\r\n$11\r\nunsubscribe\r\n$-1\r\n:0\r\n");
        assert_eq!(heard, Heard::Confirmed);
        assert_eq!(Heard::read(b"-NOPERM no\r\n"), Heard::Error(b"NOPERM no"));
        assert_eq!(Heard::read(b"+PONG\r\n"), Heard::Other);
        assert_eq!(Heard::read(b"*0\r\n"), Heard::Other);
        assert!(Heard::is_hidden(b"__keyspace@0__:__slotmesh:x") && !Heard::is_hidden(b"a"));
        let empty = Heard::read(b"*3\r\n$7\r\nmessage\r\n$0\r\n\r\n$0\r\n\r\n");
        assert_eq!(empty, message(TopicKind::Channel, b"", b""));
    }
}
