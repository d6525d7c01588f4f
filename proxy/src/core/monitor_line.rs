//! One line of a node's MONITOR: what of it clients are shown.
//!
//! Invariant: what is shown has Redis's form, and names the proxy where the node names an address.

/// Commands that proxies and agents send for themselves; clients' own ones of these names are
/// answered by the proxy and never reach a node.
const OWN: &[&[u8]] = &[b"select", b"ping", b"auth", b"hello", b"client", b"command"];
/// Of those, what also comes out of scripts of limited accounts: see [`super::confined`].
const OWN_IN_SCRIPTS: &[&[u8]] = &[b"command"];

/// A line that is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shown<'a> {
    /// `+<seconds>.<micros>`
    time: &'a [u8],
    db: &'a [u8],
    /// It came out of a script and not from a connection.
    script: bool,
    /// `"SET" "key" "value"` and the line's end.
    command: &'a [u8],
}

impl<'a> Shown<'a> {
    /// `None`: it is no such line, or not for clients.
    pub(super) fn read(line: &'a [u8]) -> Option<Self> {
        let open = memchr::memmem::find(line, b" [")?;
        let close = open + memchr::memmem::find(&line[open..], b"] \"")?;
        let (db, from) = split_at_byte(&line[open + 2..close], b' ')?;
        let command = &line[close + 2..];
        let shown = Self {
            time: &line[..open],
            db,
            script: from == b"lua",
            command,
        };
        (!from.starts_with(b"unix:") && !is_own(command, shown.script)).then_some(shown)
    }

    pub(super) fn write(&self, out: &mut Vec<u8>, port: u16) {
        out.extend_from_slice(self.time);
        out.extend_from_slice(b" [");
        out.extend_from_slice(self.db);
        if self.script {
            out.extend_from_slice(b" lua] ");
        } else {
            out.extend_from_slice(b" proxy:");
            out.extend_from_slice(itoa::Buffer::new().format(port).as_bytes());
            out.extend_from_slice(b"] ");
        }
        // The proxy sends transactions as blocks of its own; clients are shown what they sent.
        match self.command {
            b"\"MULTI\"\r\n" => out.extend_from_slice(b"\"multi\"\r\n"),
            b"\"EXEC\"\r\n" => out.extend_from_slice(b"\"exec\"\r\n"),
            command => out.extend_from_slice(command),
        }
    }
}

fn is_own(command: &[u8], script: bool) -> bool {
    let mut words = command.split(|byte| *byte == b' ').map(|word| {
        let word = word.strip_prefix(b"\"").unwrap_or(word);
        let end = word.iter().position(|byte| matches!(byte, b'"' | b'\r'));
        &word[..end.unwrap_or(word.len())]
    });
    let name = words.next().unwrap_or_default();
    let is = |names: &[&[u8]]| names.iter().any(|own| own.eq_ignore_ascii_case(name));
    let hidden = |channel: &[u8]| channel.starts_with(super::pubsub_frame::HIDDEN);
    is(if script { OWN_IN_SCRIPTS } else { OWN }) || words.next().is_some_and(hidden)
}

fn split_at_byte(text: &[u8], byte: u8) -> Option<(&[u8], &[u8])> {
    let at = memchr::memchr(byte, text)?;
    Some((&text[..at], &text[at + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, want: Option<&str>) {
        let shown = Shown::read(line.as_bytes()).map(|shown| {
            let mut out = Vec::new();
            shown.write(&mut out, 7000);
            String::from_utf8(out).unwrap()
        });
        assert_eq!(shown.as_deref(), want, "{line}");
    }

    #[test]
    fn addresses_become_the_proxy_s_and_scripts_stay_scripts() {
        check(
            "+1339518083.107412 [0 127.0.0.1:60866] \"keys\" \"*\"\r\n",
            Some("+1339518083.107412 [0 proxy:7000] \"keys\" \"*\"\r\n"),
        );
        check(
            "+1.2 [255 [::1]:60866] \"set\" \"] \\\"x\" \"[0 a] \"\r\n",
            Some("+1.2 [255 proxy:7000] \"set\" \"] \\\"x\" \"[0 a] \"\r\n"),
        );
        check(
            "+1.2 [0 127.0.0.1:1] \"MULTI\"\r\n",
            Some("+1.2 [0 proxy:7000] \"multi\"\r\n"),
        );
        check(
            "+1.2 [0 lua] \"set\" \"a\" \"b\"\r\n",
            Some("+1.2 [0 lua] \"set\" \"a\" \"b\"\r\n"),
        );
    }

    #[test]
    fn what_the_mesh_does_for_itself_is_not_shown() {
        check(
            "+1.2 [0 127.0.0.1:1] \"SETRANGE\" \"__slotmesh:health\" \"0\" \"\"\r\n",
            None,
        );
        check("+1.2 [0 127.0.0.1:1] \"SELECT\" \"3\"\r\n", None);
        check("+1.2 [0 127.0.0.1:1] \"PING\"\r\n", None);
        let question = "+1.2 [0 127.0.0.1:1] \"COMMAND\" \"INFO\" \"x\"\r\n";
        check(question, None);
        check("+1.2 [0 lua] \"COMMAND\" \"GETKEYSANDFLAGS\"\r\n", None);
        assert!(Shown::read(b"+1.2 [0 lua] \"ping\"\r\n").is_some());
        check("+1.2 [0 unix:/run/node.sock] \"info\"\r\n", None);
        check(
            "+1.2 [0 127.0.0.1:1] \"PUBLISH\" \"__slotmesh__:r:1\" \"\"\r\n",
            None,
        );
        check("+OK\r\n", None);
        assert!(Shown::read(b"+1.2 [0 127.0.0.1:1] \"publish\" \"news\" \"x\"\r\n").is_some());
    }
}
