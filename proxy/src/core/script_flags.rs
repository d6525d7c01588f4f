//! What the first line of a script declares: `#!lua flags=no-writes,allow-stale`.
//!
//! Invariant: a flag is found only where every engine finds it too; a line that an engine may refuse
//! declares nothing.

/// Whether the engine runs the text as one that must not write.
pub(super) fn declares_no_writes(text: &[u8]) -> bool {
    let Some(line) = first_line(text) else {
        return false;
    };
    let mut words = line
        .split(u8::is_ascii_whitespace)
        .filter(|w| !w.is_empty());
    words.next() == Some(b"#!lua")
        && words.any(|word| {
            let flags = word.strip_prefix(b"flags=").unwrap_or_default();
            flags.split(|b| *b == b',').any(|flag| flag == b"no-writes")
        })
}

/// The line that is for the engine and not part of the program, without its end. An engine takes it
/// for one only if it ends, and before any NUL.
pub(super) fn first_line(text: &[u8]) -> Option<&[u8]> {
    if !text.starts_with(b"#!") {
        return None;
    }
    let end = memchr::memchr2(b'\n', 0, text)?;
    (text[end] == b'\n').then_some(&text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_those_of_a_whole_first_line() {
        for yes in [
            "#!lua flags=no-writes\nreturn 1",
            "#!lua flags=allow-stale,no-writes \r\nreturn 1",
            "#!lua  name=x flags=no-writes\n",
        ] {
            assert!(declares_no_writes(yes.as_bytes()), "{yes:?}");
        }
        for no in [
            "return 1",
            "#!lua\nreturn 1",
            "#!lua flags=no-writes",
            "#!lua flags=no-writes\0\nreturn 1",
            "#!js flags=no-writes\nreturn 1",
            "#!lua flags=allow-oom\n-- flags=no-writes",
            " #!lua flags=no-writes\nreturn 1",
            "#!lua flags=no-writesx\nreturn 1",
        ] {
            assert!(!declares_no_writes(no.as_bytes()), "{no:?}");
        }
    }
}
